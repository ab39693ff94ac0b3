package api

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"path/filepath"
	"slices"
	"strings"

	"github.com/google/uuid"

	"coppice/internal/claim"
	"coppice/internal/db"
	"coppice/internal/storage"
	"coppice/internal/xapi"
)

func srMethods() map[string]any {
	return map[string]any{
		"SR.create":               (*API).srCreate,
		"SR.introduce":            (*API).srIntroduce,
		"SR.forget":               (*API).srForget,
		"SR.destroy":              (*API).srDestroy,
		"SR.scan":                 (*API).srScan,
		"SR.update":               (*API).srUpdate,
		"SR.get_supported_types":  (*API).srGetSupportedTypes,
		"SR.get_live_hosts":       (*API).srGetLiveHosts,
		"SR.set_name_label":       (*API).srSetNameLabel,
		"SR.set_name_description": (*API).srSetNameDescription,
		"SR.set_shared":           (*API).srSetShared,
	}
}

// driver returns the driver of an SR type.
func (a *API) driver(typ string) (storage.Driver, error) {
	d, ok := a.cfg.Storage[typ]
	if !ok {
		return storage.Driver{}, xapi.NewError(xapi.ErrSRUnknownDriver, typ)
	}
	return a.rooted(d), nil
}

// newSR is the record of an SR.
func newSR(typ, label, description, contentType string, shared bool, smConfig map[string]string) *xapi.SR {
	sr := xapi.New[xapi.SR]()
	sr.Type, sr.ContentType, sr.Shared = typ, contentType, shared
	sr.NameLabel, sr.NameDescription = label, description
	sr.SMConfig = maps.Clone(smConfig)
	sr.DefaultVDIVisibility = true
	return sr
}

// srCreate makes an SR with its storage and attaches it. Where the storage
// exists already and is nobody's, its disks come with it: nothing is erased.
// A failure leaves no record; an empty store may stay on the disk. A key of
// the configuration that the driver does not know is INVALID_VALUE: it could be
// meant to be the place, or a bound that there is not.
func (a *API) srCreate(ctx context.Context, c *Call, host xapi.Ref[xapi.Host], config map[string]string, size int64, label, description, typ, contentType string, shared bool, smConfig map[string]string) (xapi.Ref[xapi.SR], error) {
	drv, err := a.driver(typ)
	if err != nil {
		return "", err
	}
	for _, key := range slices.Sorted(maps.Keys(config)) {
		if _, ok := drv.Config[key]; !ok {
			known := slices.Sorted(maps.Keys(drv.Config))
			return "", invalidValue("device_config", fmt.Sprintf("%s (there are for SRs of type %s: %s)", key, typ, cmp.Or(strings.Join(known, ", "), "none")))
		}
	}
	sr := newSR(typ, label, description, contentType, shared, smConfig)
	sr.UUID = uuid.NewString()
	config = maps.Clone(config)
	if config == nil {
		config = map[string]string{}
	}
	if _, ok := drv.Config[locationKey]; ok && config[locationKey] == "" {
		config[locationKey] = filepath.Join("sr", sr.UUID)
	}
	err = a.db.View(func(tx *db.Tx) error {
		if _, err := db.Get(tx, host); err != nil {
			return err
		}
		return a.configUnused(tx, config, typ, "")
	})
	if err != nil {
		return "", err
	}
	ref := xapi.NewRef[xapi.SR]()
	err = a.attach(ctx, ref, drv, config, true, func(tx *db.Tx) error {
		if err := a.configUnused(tx, config, typ, ""); err != nil {
			return err
		}
		if err := db.InsertAs(tx, ref, sr); err != nil {
			return err
		}
		pbd := xapi.New[xapi.PBD]()
		pbd.SR, pbd.Host, pbd.DeviceConfig, pbd.CurrentlyAttached = ref, host, config, true
		_, err := db.Insert(tx, pbd)
		return err
	})
	if err != nil {
		return "", err
	}
	return ref, nil
}

// configUnused is SR_DEVICE_IN_USE when a PBD other than except leads to the
// same storage.
func (a *API) configUnused(tx *db.Tx, config map[string]string, typ string, except xapi.Ref[xapi.PBD]) error {
	if config[locationKey] == "" {
		return nil
	}
	wanted, err := a.locate(config[locationKey])
	if err != nil {
		return err
	}
	for ref, pbd := range db.All[xapi.PBD](tx) {
		if ref == except || pbd.DeviceConfig[locationKey] == "" {
			continue
		}
		sr, err := db.Get(tx, pbd.SR)
		if err != nil || sr.Type != typ {
			continue
		}
		if used, err := a.locate(pbd.DeviceConfig[locationKey]); err == nil && used == wanted {
			return xapi.NewError(xapi.ErrSRDeviceInUse)
		}
	}
	return nil
}

// attach opens the storage of an SR, runs record, which says in the database
// that it is attached, and gives records to the volumes that have none, all in
// one commit. Disks whose volumes are not there are marked missing.
func (a *API) attach(ctx context.Context, ref xapi.Ref[xapi.SR], drv storage.Driver, config map[string]string, create bool, record func(*db.Tx) error) error {
	r, err := drv.Open(ctx, config, create)
	if err != nil {
		return fmt.Errorf("open the storage of SR %s: %w", ref, err)
	}
	repo := newRepository(ref, r)
	var undo undoStack
	defer func() { undo.run(ctx) }()
	undo.push(func(context.Context) {
		if err := repo.Close(); err != nil {
			a.log.Error("closing the storage of an SR failed", "sr", ref, "err", err)
		}
	})
	inv, err := takeInventory(ctx, repo)
	if err != nil {
		return err
	}
	defer inv.end()
	if own, err := a.ownStore(ctx, repo); err != nil {
		return err
	} else if own {
		if err := a.settleReverts(ctx, inv); err != nil {
			return err
		}
	}
	a.repos.put(repo)
	undo.push(func(context.Context) { a.repos.take(ref) })
	err = a.db.Update(ctx, func(tx *db.Tx) error {
		if err := record(tx); err != nil {
			return err
		}
		unowned, err := a.compareWith(tx, inv, markMissing)
		if err != nil {
			return err
		}
		if why := recovery(tx, ref); why != "" {
			err = a.recoverVolumes(tx, repo, unowned, why)
		} else {
			err = a.introduceVolumes(tx, repo, unowned)
		}
		if err != nil {
			return err
		}
		return a.refreshDisksOf(tx, ref)
	})
	if err != nil {
		return err
	}
	undo.disarm()
	a.refreshAttrs(ctx, inv)
	if err := a.markStore(ctx, repo); err != nil {
		a.log.Warn("a store does not know whose it is", "err", err)
	}
	return nil
}

// srIntroduce makes the record of an SR that exists elsewhere. Its disks
// appear when a PBD is attached.
func (a *API) srIntroduce(ctx context.Context, c *Call, id, label, description, typ, contentType string, shared bool, smConfig map[string]string) (ref xapi.Ref[xapi.SR], err error) {
	if _, err := a.driver(typ); err != nil {
		return "", err
	}
	sr := newSR(typ, label, description, contentType, shared, smConfig)
	sr.UUID = id
	err = a.db.Update(ctx, func(tx *db.Tx) (err error) {
		if _, _, err := db.ByUUID[xapi.SR](tx, id); err == nil {
			return xapi.NewError(xapi.ErrSRUUIDExists, id)
		}
		if ref, err = db.Insert(tx, sr); err != nil {
			return err
		}
		return a.refreshSR(tx, ref)
	})
	return ref, err
}

// srForget removes the records of an SR, its PBDs and its disks. The storage
// is not touched: introduced again, the SR has its disks back.
func (a *API) srForget(ctx context.Context, c *Call, ref xapi.Ref[xapi.SR]) error {
	op := xapi.StorageOperationsForget
	release, err := c.Claim(ctx, func(tx *db.Tx) error { return a.srAllows(tx, ref, op) }, claim.On(ref, op))
	if err != nil {
		return err
	}
	defer release()
	return a.db.Update(ctx, func(tx *db.Tx) error { return a.removeSRRecord(tx, ref) })
}

// srDestroy is srForget for an SR without disks, and removes its storage too:
// the records first, so that a crash leaves at worst an empty store. Volumes
// that VDI.forget left count as disks.
func (a *API) srDestroy(ctx context.Context, c *Call, ref xapi.Ref[xapi.SR]) error {
	op := xapi.StorageOperationsDestroy
	release, err := c.Claim(ctx, func(tx *db.Tx) error { return a.srAllows(tx, ref, op) }, claim.On(ref, op))
	if err != nil {
		return err
	}
	defer release()
	var typ string
	var configs []map[string]string
	err = a.db.View(func(tx *db.Tx) error {
		sr, err := db.Get(tx, ref)
		if err != nil {
			return err
		}
		typ = sr.Type
		for _, p := range sr.PBDs {
			if pbd, err := db.Get(tx, p); err == nil {
				configs = append(configs, pbd.DeviceConfig)
			}
		}
		return nil
	})
	if err != nil {
		return err
	}
	drv, err := a.driver(typ)
	if err != nil {
		return err
	}
	for _, config := range configs {
		if err := storeEmpty(ctx, drv, config); err != nil {
			return err
		}
	}
	if err := a.db.Update(ctx, func(tx *db.Tx) error { return a.removeSRRecord(tx, ref) }); err != nil {
		return err
	}
	for _, config := range configs {
		err := drv.Destroy(context.WithoutCancel(ctx), config)
		if err != nil && !errors.Is(err, storage.ErrNoRepo) {
			return fmt.Errorf("destroy the storage of SR %s: %w", ref, err)
		}
	}
	return nil
}

// storeEmpty is SR_NOT_EMPTY when there is a volume in a store. A store that
// does not exist is empty.
func storeEmpty(ctx context.Context, drv storage.Driver, config map[string]string) error {
	r, err := drv.Open(ctx, config, false)
	switch {
	case errors.Is(err, storage.ErrNoRepo):
		return nil
	case err != nil:
		return fmt.Errorf("look into the storage: %w", err)
	}
	err = nil
	for _, e := range r.List(ctx) {
		if err = e; err == nil {
			err = xapi.NewError(xapi.ErrSRNotEmpty)
		}
		break
	}
	return cmpErr(err, r.Close())
}

// removeSRRecord removes the records of an SR, its disks and its PBDs.
func (a *API) removeSRRecord(tx *db.Tx, ref xapi.Ref[xapi.SR]) error {
	sr, err := db.Get(tx, ref)
	if err != nil {
		return err
	}
	for _, v := range slices.Clone(sr.VDIs) {
		if err := a.removeDiskRecord(tx, v); err != nil {
			return err
		}
	}
	if err := deleteEach(tx, sr.PBDs); err != nil {
		return err
	}
	return db.Delete(tx, ref)
}

// srScan brings the records in line with the storage: unknown volumes get
// records, the records of vanished ones go, sizes are read again.
func (a *API) srScan(ctx context.Context, c *Call, ref xapi.Ref[xapi.SR]) error {
	repo, release, err := a.beginSR(ctx, c, ref, xapi.StorageOperationsScan)
	if err != nil {
		return err
	}
	defer release()
	inv, err := takeInventory(ctx, repo)
	if err != nil {
		return err
	}
	defer inv.end()
	var failed []storage.ID
	err = a.db.Update(ctx, func(tx *db.Tx) error {
		unowned, err := a.compareWith(tx, inv, destroyRecord)
		if err != nil {
			return err
		}
		for _, info := range unowned {
			if repo.isDoomed(info.ID) {
				failed = append(failed, info.ID)
			}
		}
		if err := a.introduceVolumes(tx, repo, unowned); err != nil {
			return err
		}
		return a.refreshDisksOf(tx, ref)
	})
	if err != nil {
		return err
	}
	for _, id := range failed { // what could not be deleted earlier
		a.discard(ctx, repo, id)
	}
	a.refreshAttrs(ctx, inv)
	return nil
}

// beginSR claims an operation on an attached SR.
func (a *API) beginSR(ctx context.Context, c *Call, ref xapi.Ref[xapi.SR], op xapi.StorageOperations) (*repository, func(), error) {
	release, err := c.Claim(ctx, func(tx *db.Tx) error { return a.srAllows(tx, ref, op) }, claim.On(ref, op))
	if err != nil {
		return nil, nil, err
	}
	repo, err := a.repos.get(ref)
	if err != nil {
		release()
		return nil, nil, err
	}
	return repo, release, nil
}

// srUpdate reads the sizes of an SR from its storage again.
func (a *API) srUpdate(ctx context.Context, c *Call, ref xapi.Ref[xapi.SR]) error {
	repo, release, err := a.beginSR(ctx, c, ref, xapi.StorageOperationsUpdate)
	if err != nil {
		return err
	}
	defer release()
	usage, err := repo.Usage(ctx)
	if err != nil {
		return fmt.Errorf("usage of SR %s: %w", ref, err)
	}
	return a.db.Update(ctx, func(tx *db.Tx) error {
		return db.Modify(tx, ref, func(sr *xapi.SR) {
			sr.PhysicalSize, sr.PhysicalUtilisation = usage.Total, usage.Used
		})
	})
}

func (a *API) srGetSupportedTypes(ctx context.Context, c *Call) ([]string, error) {
	return a.cfg.Storage.Types(), nil
}

func (a *API) srGetLiveHosts(ctx context.Context, c *Call, ref xapi.Ref[xapi.SR]) ([]xapi.Ref[xapi.Host], error) {
	live := []xapi.Ref[xapi.Host]{}
	err := a.db.View(func(tx *db.Tx) error {
		sr, err := db.Get(tx, ref)
		if err != nil {
			return err
		}
		for _, p := range sr.PBDs {
			if pbd, err := db.Get(tx, p); err == nil && pbd.CurrentlyAttached {
				live = append(live, pbd.Host)
			}
		}
		return nil
	})
	return live, err
}

func (a *API) srSetNameLabel(ctx context.Context, c *Call, ref xapi.Ref[xapi.SR], value string) error {
	return a.modifySR(ctx, ref, func(sr *xapi.SR) { sr.NameLabel = value })
}

func (a *API) srSetNameDescription(ctx context.Context, c *Call, ref xapi.Ref[xapi.SR], value string) error {
	return a.modifySR(ctx, ref, func(sr *xapi.SR) { sr.NameDescription = value })
}

// srSetShared says whether several hosts can attach an SR. There is one host,
// so it is a label.
func (a *API) srSetShared(ctx context.Context, c *Call, ref xapi.Ref[xapi.SR], value bool) error {
	return a.modifySR(ctx, ref, func(sr *xapi.SR) { sr.Shared = value })
}

func (a *API) modifySR(ctx context.Context, ref xapi.Ref[xapi.SR], set func(*xapi.SR)) error {
	return a.db.Update(ctx, func(tx *db.Tx) error { return db.Modify(tx, ref, set) })
}
