package api

import (
	"context"
	"slices"

	"coppice/internal/claim"
	"coppice/internal/db"
	"coppice/internal/diskcopy"
	"coppice/internal/storage"
	"coppice/internal/xapi"
)

// vdiPoolMigrate moves a disk of VMs that do not run to another SR and returns
// it there: a new disk with the contents and the properties of the old one,
// which the VMs' VBDs now show, and of which the snapshots now are; those stay
// where they are. The old disk goes with the commit that does all of this. A
// failure, a cancel or a crash before leaves the old one as it was.
//
// A disk without VBDs is VDI_NEEDS_VM_FOR_MIGRATE, on which clients copy it.
func (a *API) vdiPoolMigrate(ctx context.Context, c *Call, ref xapi.Ref[xapi.VDI], sr xapi.Ref[xapi.SR], options map[string]string) (xapi.Ref[xapi.VDI], error) {
	if format := options["dest_img_format"]; format != "" {
		return "", xapi.NewError(xapi.ErrValueNotSupported, "dest_img_format", format, "The SRs of this server have one format each")
	}
	a.awaitWriters(ctx, ref)
	release, err := c.Claim(ctx, func(tx *db.Tx) error {
		if _, err := db.Get(tx, sr); err != nil {
			return err
		}
		return a.vdiMigratable(tx, ref)
	}, claim.On(ref, xapi.VDIOperationsMirror))
	if err != nil {
		return "", err
	}
	defer release()
	src, err := a.openReader(ctx, c, ref, nil)
	if err != nil {
		return "", err
	}
	defer src.close()
	if src.rec.SR == sr {
		return ref, nil
	}
	if err := src.verifyKnown(ctx); err != nil {
		return "", err
	}
	repo, drop, err := a.holdSR(ctx, c, sr, xapi.StorageOperationsVDICreate)
	if err != nil {
		return "", err
	}
	defer drop()

	b := a.newBatch()
	defer b.end(ctx)
	rec := derivedDisk(src.rec)
	rec.SR = sr
	job := copyOf(c, src)
	moved := b.add(repo, rec, func(ctx context.Context, id storage.ID, attrs []byte) (storage.Info, error) {
		var zeroed diskcopy.Zeroed
		info, err := job.Create(ctx, repo, storage.Spec{ID: id, Attrs: attrs}, &zeroed)
		setOrDelete(rec.SMConfig, zeroedKey, zeroed.String())
		return info, err
	})
	if err := b.make(ctx); err != nil {
		return "", err
	}
	defer src.repo.reserve(storage.ID(src.rec.UUID))() // until its volume is gone, too
	ctx = context.WithoutCancel(ctx)
	var snapshots []xapi.Ref[xapi.VDI]
	err = b.commit(ctx, func(tx *db.Tx) (err error) {
		snapshots, err = a.moveDiskRecord(tx, ref, moved.ref)
		return err
	})
	if err != nil {
		return "", err
	}
	a.discard(ctx, src.repo, storage.ID(src.rec.UUID))
	for _, v := range append(snapshots, moved.ref) {
		a.syncAttrs(ctx, v)
	}
	return moved.ref, nil
}

// vdiMigratable says whether a disk can be moved to another SR now.
func (a *API) vdiMigratable(tx *db.Tx, ref xapi.Ref[xapi.VDI]) error {
	v, err := db.Get(tx, ref)
	if err != nil {
		return err
	}
	switch {
	case v.CBTEnabled:
		return xapi.NewError(xapi.ErrVDICBTEnabled, string(ref))
	case v.Type == xapi.VDITypeSuspend:
		return xapi.NewError(xapi.ErrVDIIncompatibleType, string(ref), string(v.Type))
	case len(v.VBDs) == 0:
		return xapi.NewError(xapi.ErrVDINeedsVMForMigrate, string(ref))
	}
	for _, b := range v.VBDs {
		vbd, err := db.Get(tx, b)
		if err != nil {
			continue
		}
		vm, err := db.Get(tx, vbd.VM)
		switch {
		case err != nil:
			continue
		case vm.IsASnapshot:
			return xapi.NewError(xapi.ErrVMIsSnapshot, string(vbd.VM), string(xapi.VMOperationsMigrateSend))
		}
		if reason, blocked := vm.BlockedOperations[xapi.VMOperationsMigrateSend]; blocked {
			return xapi.NewError(xapi.ErrOperationBlocked, string(vbd.VM), reason)
		}
	}
	if v.IsASnapshot {
		return xapi.NewError(xapi.ErrOperationNotAllowed, "VDI is a snapshot: "+string(ref))
	}
	return cmpErr(a.vdiAllows(tx, ref, xapi.VDIOperationsCopy), a.vdiAllows(tx, ref, xapi.VDIOperationsDestroy))
}

// moveDiskRecord makes the disk to stand for the disk from wherever that is
// meant, and removes from. It returns the snapshots whose disk is now another.
func (a *API) moveDiskRecord(tx *db.Tx, from, to xapi.Ref[xapi.VDI]) (snapshots []xapi.Ref[xapi.VDI], err error) {
	v, err := db.Get(tx, from)
	if err != nil {
		return nil, err
	}
	for _, b := range slices.Clone(v.VBDs) {
		if err := db.Modify(tx, b, func(b *xapi.VBD) { b.VDI = to }); err != nil {
			return nil, err
		}
		if err := a.refreshAllowed(tx, "VBD", string(b)); err != nil {
			return nil, err
		}
	}
	snapshots = slices.Clone(v.Snapshots)
	for _, s := range snapshots {
		if err := db.Modify(tx, s, func(s *xapi.VDI) { s.SnapshotOf = to }); err != nil {
			return nil, err
		}
	}
	return snapshots, a.removeDiskRecord(tx, from)
}
