package api

import (
	"context"
	"maps"

	"coppice/internal/claim"
	"coppice/internal/db"
	"coppice/internal/xapi"
)

func pbdMethods() map[string]any {
	return map[string]any{
		"PBD.create":            (*API).pbdCreate,
		"PBD.destroy":           (*API).pbdDestroy,
		"PBD.plug":              (*API).pbdPlug,
		"PBD.unplug":            (*API).pbdUnplug,
		"PBD.set_device_config": (*API).pbdSetDeviceConfig,
	}
}

// pbdCreate records how a host reaches an SR; a host has one PBD per SR.
func (a *API) pbdCreate(ctx context.Context, c *Call, args *xapi.PBD) (xapi.Ref[xapi.PBD], error) {
	release, err := c.Claim(ctx, func(tx *db.Tx) error {
		return a.srAllows(tx, args.SR, xapi.StorageOperationsPBDCreate)
	}, claim.On(args.SR, xapi.StorageOperationsPBDCreate))
	if err != nil {
		return "", err
	}
	defer release()
	var ref xapi.Ref[xapi.PBD]
	err = a.db.Update(ctx, func(tx *db.Tx) (err error) {
		sr, err := db.Get(tx, args.SR)
		if err != nil {
			return err
		}
		if _, err := db.Get(tx, args.Host); err != nil {
			return err
		}
		for _, p := range sr.PBDs {
			if pbd, err := db.Get(tx, p); err == nil && pbd.Host == args.Host {
				return xapi.NewError(xapi.ErrPBDExists, string(args.SR), string(args.Host), string(p))
			}
		}
		if err := a.configUnused(tx, args.DeviceConfig, sr.Type, ""); err != nil {
			return err
		}
		rec := xapi.New[xapi.PBD]()
		rec.SR, rec.Host = args.SR, args.Host
		rec.DeviceConfig, rec.OtherConfig = args.DeviceConfig, args.OtherConfig
		if ref, err = db.Insert(tx, rec); err != nil {
			return err
		}
		return a.refreshSR(tx, args.SR)
	})
	return ref, err
}

func (a *API) pbdDestroy(ctx context.Context, c *Call, ref xapi.Ref[xapi.PBD]) error {
	return a.db.Update(ctx, func(tx *db.Tx) error {
		pbd, err := db.Get(tx, ref)
		if err != nil {
			return err
		}
		if pbd.CurrentlyAttached {
			return xapi.NewError(xapi.ErrOperationNotAllowed, "PBD is currently attached")
		}
		if err := db.Delete(tx, ref); err != nil {
			return err
		}
		return a.refreshSR(tx, pbd.SR)
	})
}

// pbdPlug attaches an SR: its storage is opened and compared with the
// records. An attached PBD is left as it is.
func (a *API) pbdPlug(ctx context.Context, c *Call, ref xapi.Ref[xapi.PBD]) error {
	pbd, release, err := a.beginPBD(ctx, c, ref, xapi.StorageOperationsPlug)
	if err != nil {
		return err
	}
	defer release()
	if pbd.CurrentlyAttached {
		return nil
	}
	return a.plug(ctx, ref, pbd)
}

// plug attaches the SR of a PBD that is detached.
func (a *API) plug(ctx context.Context, ref xapi.Ref[xapi.PBD], pbd *xapi.PBD) error {
	var typ string
	err := a.db.View(func(tx *db.Tx) error {
		sr, err := db.Get(tx, pbd.SR)
		if err == nil {
			typ = sr.Type
		}
		return err
	})
	if err != nil {
		return err
	}
	drv, err := a.driver(typ)
	if err != nil {
		return err
	}
	return a.attach(ctx, pbd.SR, drv, pbd.DeviceConfig, false, func(tx *db.Tx) error {
		return db.Modify(tx, ref, func(p *xapi.PBD) {
			p.CurrentlyAttached = true
			delete(p.OtherConfig, unavailableKey)
		})
	})
}

// beginPBD claims an operation on the SR of a PBD. Plugging twice at the same
// time is not something that SRs exclude, so it is excluded here.
func (a *API) beginPBD(ctx context.Context, c *Call, ref xapi.Ref[xapi.PBD], op xapi.StorageOperations) (pbd *xapi.PBD, release func(), err error) {
	err = a.db.View(func(tx *db.Tx) (err error) {
		pbd, err = db.Get(tx, ref)
		return err
	})
	if err != nil {
		return nil, nil, err
	}
	release, err = c.Claim(ctx, func(tx *db.Tx) (err error) {
		if pbd, err = db.Get(tx, ref); err != nil {
			return err
		}
		sr, err := db.Get(tx, pbd.SR)
		if err != nil {
			return err
		}
		for task, cur := range sr.CurrentOperations {
			if cur == xapi.StorageOperationsPlug || cur == xapi.StorageOperationsUnplug {
				return otherOperation("SR", string(pbd.SR), string(cur), task)
			}
		}
		if !pbd.CurrentlyAttached && op == xapi.StorageOperationsUnplug {
			return nil // nothing to do, so nothing to object to
		}
		return a.srAllows(tx, pbd.SR, op)
	}, claim.On(pbd.SR, op))
	return pbd, release, err
}

// pbdUnplug detaches an SR. Its disks stay known, but nothing can be done
// with their contents. VDI_IN_USE when one of them is attached, under an
// operation or being transferred.
func (a *API) pbdUnplug(ctx context.Context, c *Call, ref xapi.Ref[xapi.PBD]) error {
	pbd, release, err := a.beginPBD(ctx, c, ref, xapi.StorageOperationsUnplug)
	if err != nil {
		return err
	}
	defer release()
	if !pbd.CurrentlyAttached {
		return nil
	}
	var repo *repository
	err = a.db.Update(ctx, func(tx *db.Tx) error {
		// Transfers need no claim to begin; this is where they and we meet.
		if err := a.srUnused(tx, pbd.SR); err != nil {
			return err
		}
		if err := db.Modify(tx, ref, func(p *xapi.PBD) { p.CurrentlyAttached = false }); err != nil {
			return err
		}
		return a.refreshDisksOf(tx, pbd.SR)
	})
	if err != nil {
		return err
	}
	if repo = a.repos.take(pbd.SR); repo == nil {
		return nil
	}
	return repo.Close()
}

// pbdSetDeviceConfig changes how a host reaches an SR, while it does not.
func (a *API) pbdSetDeviceConfig(ctx context.Context, c *Call, ref xapi.Ref[xapi.PBD], value map[string]string) error {
	return a.db.Update(ctx, func(tx *db.Tx) error {
		pbd, err := db.Get(tx, ref)
		if err != nil {
			return err
		}
		if pbd.CurrentlyAttached {
			return xapi.NewError(xapi.ErrOperationNotAllowed, "PBD is currently attached")
		}
		sr, err := db.Get(tx, pbd.SR)
		if err != nil {
			return err
		}
		if err := a.configUnused(tx, value, sr.Type, ref); err != nil {
			return err
		}
		return db.Modify(tx, ref, func(p *xapi.PBD) { p.DeviceConfig = maps.Clone(value) })
	})
}
