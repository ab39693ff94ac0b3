package api

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"iter"
	"maps"
	"slices"

	"coppice/internal/db"
	"coppice/internal/storage"
	"coppice/internal/xapi"
)

// inventory is what a repository holds, to be compared with the records.
//
// Storage and database are two stores that cannot commit together. Creation
// puts the volume first, deletion takes the record first, so a crash leaves
// at worst a volume without a record. What that means depends on when it is
// seen: at start-up it is the rest of a crashed operation and is reclaimed,
// in a scan it is a disk that came from elsewhere and gets a record.
type inventory struct {
	repo    *repository
	volumes map[storage.ID]storage.Info
	usage   storage.Usage
	strange *[]storage.ID         // see strangers
	bared   []xapi.Ref[xapi.VDI]  // disks that compareWith found to be without data
	settled func(storage.ID) bool // no operation touched the volume meanwhile
	end     func()
}

// takeInventory lists a repository. The caller calls end when it has used the
// result.
func takeInventory(ctx context.Context, repo *repository) (*inventory, error) {
	return listVolumes(ctx, repo, repo.List(ctx))
}

// takeBareInventory is takeInventory with the attributes of only those volumes
// that are no disks of the SR by its records.
func (a *API) takeBareInventory(ctx context.Context, repo *repository) (*inventory, error) {
	l, ok := repo.Repo.(storage.BareLister)
	if !ok {
		return takeInventory(ctx, repo)
	}
	inv, err := listVolumes(ctx, repo, l.ListBare(ctx))
	if err != nil {
		return nil, err
	}
	for _, id := range a.strangers(inv) {
		info, err := repo.Stat(ctx, id)
		switch {
		case errors.Is(err, storage.ErrNotFound):
			delete(inv.volumes, id)
		case err != nil:
			inv.end()
			return nil, fmt.Errorf("look at volume %s of SR %s: %w", id, repo.sr, err)
		default:
			inv.volumes[id] = info
		}
	}
	return inv, nil
}

// listVolumes makes an inventory of what a list of all volumes yields.
func listVolumes(ctx context.Context, repo *repository, list iter.Seq2[storage.Info, error]) (*inventory, error) {
	inv := &inventory{repo: repo, volumes: map[storage.ID]storage.Info{}}
	inv.settled, inv.end = repo.beginScan()
	for info, err := range list {
		if err != nil {
			inv.end()
			return nil, fmt.Errorf("list the volumes of SR %s: %w", repo.sr, err)
		}
		inv.volumes[info.ID] = info
	}
	var err error
	if inv.usage, err = repo.Usage(ctx); err != nil {
		inv.end()
		return nil, fmt.Errorf("usage of SR %s: %w", repo.sr, err)
	}
	return inv, nil
}

// strangers are the volumes of an inventory that are no disks of its SR by the
// records of the first time that it is asked for.
func (a *API) strangers(inv *inventory) []storage.ID {
	if inv.strange != nil {
		return *inv.strange
	}
	disks := make(map[storage.ID]bool, len(inv.volumes))
	_ = a.db.View(func(tx *db.Tx) error {
		for _, v := range db.All[xapi.VDI](tx) {
			if v.SR == inv.repo.sr {
				disks[storage.ID(v.UUID)] = true
			}
		}
		return nil
	})
	inv.strange = new([]storage.ID)
	for id := range inv.volumes {
		if !disks[id] {
			*inv.strange = append(*inv.strange, id)
		}
	}
	return *inv.strange
}

// vanishing says what becomes of the record of a disk without a volume.
type vanishing int

const (
	markMissing   vanishing = iota // it stays and says so
	destroyRecord                  // it goes
)

// compareWith brings the records of the SR in line with the inventory: sizes
// are refreshed, disks that are back are no longer missing, those that vanished
// are treated as gone says. It returns the volumes that have no record, in
// the order of their IDs; volumes that an operation touched are left out.
func (a *API) compareWith(tx *db.Tx, inv *inventory, gone vanishing) (unowned []storage.Info, err error) {
	sr, err := db.Get(tx, inv.repo.sr)
	if err != nil {
		return nil, err
	}
	owned := make(map[storage.ID]bool, len(sr.VDIs))
	var allocated int64
	for ref, v := range db.All[xapi.VDI](tx) {
		if v.SR != inv.repo.sr {
			continue
		}
		id := storage.ID(v.UUID)
		owned[id] = true
		info, found := inv.volumes[id]
		switch {
		case !inv.settled(id):
			allocated += v.VirtualSize
			continue
		case found:
			allocated += info.Size
			bare := info.NoData && v.Type != xapi.VDITypeCBTMetadata
			if v.VirtualSize == info.Size && v.PhysicalUtilisation == info.Used && !v.Missing && !bare {
				continue
			}
			if bare {
				inv.bared = append(inv.bared, ref)
			}
			err = db.Modify(tx, ref, func(v *xapi.VDI) {
				v.VirtualSize, v.PhysicalUtilisation, v.Missing = info.Size, info.Used, false
				if bare {
					markNoData(v)
				}
			})
		case gone == destroyRecord:
			a.log.Warn("a disk has vanished from its storage; its record is removed", "vdi", v.UUID, "name", v.NameLabel)
			err = a.removeDiskRecord(tx, ref)
		default:
			allocated += v.VirtualSize
			if v.Missing {
				continue
			}
			a.log.Error("a disk is missing from its storage", "vdi", v.UUID, "name", v.NameLabel)
			err = db.Modify(tx, ref, func(v *xapi.VDI) { v.Missing = true })
		}
		if err != nil {
			return nil, err
		}
	}
	for _, id := range slices.Sorted(maps.Keys(inv.volumes)) {
		if !owned[id] && inv.settled(id) {
			unowned = append(unowned, inv.volumes[id])
		}
	}
	return unowned, db.Modify(tx, inv.repo.sr, func(sr *xapi.SR) {
		sr.VirtualAllocation = allocated
		sr.PhysicalSize, sr.PhysicalUtilisation = inv.usage.Total, inv.usage.Used
	})
}

// introduceVolumes gives records to volumes that have none, from what their
// attribute blobs say. A volume whose UUID is that of a disk in another SR is
// a copy of somebody's storage and is left alone.
func (a *API) introduceVolumes(tx *db.Tx, repo *repository, volumes []storage.Info) error {
	byUUID := map[string]xapi.Ref[xapi.VDI]{}
	parents := map[xapi.Ref[xapi.VDI]]string{}
	var allocated int64
	for _, info := range volumes {
		if repo.isDoomed(info.ID) {
			continue
		}
		if _, other, err := db.ByUUID[xapi.VDI](tx, string(info.ID)); err == nil {
			a.log.Warn("a volume has the UUID of a disk in another SR and is ignored", "volume", info.ID, "other", other.SR)
			continue
		}
		rec := xapi.New[xapi.VDI]()
		rec.Type = xapi.VDITypeUser
		of := ""
		if at, ok := decodeAttrs(info.Attrs); ok {
			at.apply(rec)
			of = at.SnapshotOf
		}
		rec.UUID, rec.Location, rec.SR = string(info.ID), string(info.ID), repo.sr
		rec.VirtualSize, rec.PhysicalUtilisation, rec.Managed = info.Size, info.Used, true
		rec.IsASnapshot = rec.IsASnapshot || info.ReadOnly
		if info.NoData {
			markNoData(rec)
		}
		ref, err := db.Insert(tx, rec)
		if err != nil {
			return err
		}
		allocated += info.Size
		byUUID[rec.UUID] = ref
		if of != "" {
			parents[ref] = of
		}
	}
	for _, ref := range slices.Sorted(maps.Keys(parents)) {
		of, ok := byUUID[parents[ref]]
		if !ok {
			var err error
			if of, _, err = db.ByUUID[xapi.VDI](tx, parents[ref]); err != nil {
				continue // the disk it was taken of is gone
			}
		}
		if err := db.Modify(tx, ref, func(v *xapi.VDI) { v.SnapshotOf = of }); err != nil {
			return err
		}
	}
	if allocated == 0 {
		return nil
	}
	return db.Modify(tx, repo.sr, func(sr *xapi.SR) { sr.VirtualAllocation += allocated })
}

// reclaim deletes volumes that nobody owns and reports each. What VDI.forget
// left stays, for a scan to find, and so does a volume with the UUID of a disk
// in another SR: this store is then a copy of that one.
func (a *API) reclaim(ctx context.Context, repo *repository, unowned []storage.Info) error {
	copies := map[storage.ID]bool{}
	err := a.db.View(func(tx *db.Tx) error {
		for _, info := range unowned {
			_, _, err := db.ByUUID[xapi.VDI](tx, string(info.ID))
			copies[info.ID] = err == nil
		}
		return nil
	})
	if err != nil {
		return err
	}
	var errs []error
	for _, info := range unowned {
		if at, ok := decodeAttrs(info.Attrs); ok && at.Forgotten || copies[info.ID] {
			continue
		}
		if err := repo.remove(ctx, info.ID); err != nil {
			errs = append(errs, fmt.Errorf("reclaim volume %s: %w", info.ID, err))
			continue
		}
		a.log.Warn("reclaimed a volume that no disk owns", "sr", repo.sr, "volume", info.ID, "bytes", info.Used)
	}
	return errors.Join(errs...)
}

// refreshAttrs rewrites the attribute blobs that do not say what the records
// say.
func (a *API) refreshAttrs(ctx context.Context, inv *inventory) {
	var stale []xapi.Ref[xapi.VDI]
	_ = a.db.View(func(tx *db.Tx) error {
		sr, err := db.Get(tx, inv.repo.sr)
		if err != nil {
			return err
		}
		for _, ref := range sr.VDIs {
			v, err := db.Get(tx, ref)
			if err != nil {
				continue
			}
			info, found := inv.volumes[storage.ID(v.UUID)]
			if found && !bytes.Equal(info.Attrs, attrsOf(tx, v).inherit(info.Attrs).encode()) {
				stale = append(stale, ref)
			}
		}
		return nil
	})
	for _, ref := range stale {
		if err := a.writeAttrs(ctx, inv.repo, ref); err != nil {
			a.log.Warn("the volume's copy of the VDI record is out of date", "vdi", ref, "err", err)
		}
	}
}
