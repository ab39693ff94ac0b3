package api

import (
	"context"
	"fmt"
	"maps"
	"slices"

	"coppice/internal/db"
	"coppice/internal/storage"
	"coppice/internal/xapi"
)

// vdiSnapshot makes a read-only disk with the contents of this instant. It
// takes the same time for every disk: one commit in the storage and one in the
// database. driverParams are hints to other drivers and mean nothing to ours.
func (a *API) vdiSnapshot(ctx context.Context, c *Call, ref xapi.Ref[xapi.VDI], driverParams map[string]string) (xapi.Ref[xapi.VDI], error) {
	w, err := a.beginDisk(ctx, c, ref, xapi.VDIOperationsSnapshot, xapi.StorageOperationsVDISnapshot)
	if err != nil {
		return "", err
	}
	defer w.release()
	return a.addDisk(ctx, w.repo, a.snapshotRecord(ref, w.rec), func(id storage.ID, attrs []byte) (storage.Info, error) {
		info, err := w.repo.Snapshot(ctx, storage.Derived{Source: w.id(), ID: id, Attrs: attrs})
		if err != nil {
			return info, fmt.Errorf("snapshot VDI %s: %w", w.id(), err)
		}
		return info, nil
	})
}

// vdiClone makes a writable disk with the contents of this instant, as fast
// as a snapshot. It is a disk of its own: nothing points from one to the other.
func (a *API) vdiClone(ctx context.Context, c *Call, ref xapi.Ref[xapi.VDI], driverParams map[string]string) (xapi.Ref[xapi.VDI], error) {
	w, err := a.beginDisk(ctx, c, ref, xapi.VDIOperationsClone, xapi.StorageOperationsVDIClone)
	if err != nil {
		return "", err
	}
	defer w.release()
	return a.addDisk(ctx, w.repo, derivedDisk(w.rec), func(id storage.ID, attrs []byte) (storage.Info, error) {
		info, err := w.repo.Clone(ctx, storage.Derived{Source: w.id(), ID: id, Attrs: attrs})
		if err != nil {
			return info, fmt.Errorf("clone VDI %s: %w", w.id(), err)
		}
		return info, nil
	})
}

// derivedDisk is the record of a disk made from src: what a user would call
// its properties is the same, its identity and history are its own.
func derivedDisk(src *xapi.VDI) *xapi.VDI {
	rec := xapi.New[xapi.VDI]()
	rec.SR, rec.Type, rec.VirtualSize = src.SR, src.Type, src.VirtualSize
	rec.NameLabel, rec.NameDescription = src.NameLabel, src.NameDescription
	rec.Sharable, rec.OnBoot, rec.AllowCaching = src.Sharable, src.OnBoot, src.AllowCaching
	rec.OtherConfig, rec.XenstoreData = maps.Clone(src.OtherConfig), maps.Clone(src.XenstoreData)
	delete(rec.OtherConfig, holdKey) // it was meant for src
	delete(rec.OtherConfig, receivedKey)
	rec.Tags = slices.Clone(src.Tags)
	delete(rec.OtherConfig, recoveredKey)
	if z, ok := src.SMConfig[zeroedKey]; ok { // it is about the contents
		rec.SMConfig[zeroedKey] = z
	}
	return rec
}

// vdiRevert gives the disk that a snapshot was taken of the contents of the
// snapshot. The disk keeps its identity; every snapshot survives, also newer
// ones. The storage goes back in one step; a crash before the record has the
// snapshot's size too is made good at start-up.
func (a *API) vdiRevert(ctx context.Context, c *Call, snapshot xapi.Ref[xapi.VDI]) error {
	var snap, disk *xapi.VDI
	err := a.db.View(func(tx *db.Tx) (err error) {
		if snap, err = db.Get(tx, snapshot); err != nil {
			return err
		}
		if !snap.IsASnapshot {
			return xapi.NewError(xapi.ErrRevertOnlyAllowedOnSnapshot)
		}
		disk, err = db.Get(tx, snap.SnapshotOf)
		return err
	})
	if err != nil {
		return err
	}
	ref := snap.SnapshotOf
	a.nbdSettle(ctx, nbdWritten(ref, ""))
	release, err := c.Claim(ctx, func(tx *db.Tx) (err error) {
		if err := a.vdiAllows(tx, snapshot, xapi.VDIOperationsRevertTo); err != nil {
			return err
		}
		if err := a.vdiAllows(tx, ref, xapi.VDIOperationsRevertFrom); err != nil {
			return err
		}
		if err := a.srAllows(tx, disk.SR, xapi.StorageOperationsVDIRevert); err != nil {
			return err
		}
		if disk, err = db.Get(tx, ref); err != nil {
			return err
		}
		if disk.SR != snap.SR {
			return xapi.NewError(xapi.ErrSROperationNotSupported, string(snap.SR))
		}
		return forgetReceived(tx, ref)
	}, claimOn(snapshot, xapi.VDIOperationsRevertTo), claimOn(ref, xapi.VDIOperationsRevertFrom),
		claimOn(disk.SR, xapi.StorageOperationsVDIRevert))
	if err != nil {
		return err
	}
	defer release()
	repo, err := a.repos.get(disk.SR)
	if err != nil {
		return err
	}
	r, ok := repo.Repo.(storage.Reverter)
	if !ok {
		return xapi.NewError(xapi.ErrUnimplementedInSMBackend, string(disk.SR))
	}
	id := storage.ID(disk.UUID)
	defer repo.reserve(id)() // a scan beside this does not know the size
	if err := r.Revert(ctx, id, storage.ID(snap.UUID)); err != nil {
		return fmt.Errorf("revert VDI %s to %s: %w", disk.UUID, snap.UUID, err)
	}
	// The contents have changed; the record follows whatever happens to the call.
	ctx = context.WithoutCancel(ctx)
	info, err := repo.Stat(ctx, id)
	if err != nil {
		return fmt.Errorf("look at VDI %s: %w", disk.UUID, err)
	}
	return a.noteInfo(ctx, &diskWork{ref: ref, rec: disk, repo: repo}, info)
}
