package api

import (
	"context"
	"errors"
	"fmt"
	"slices"

	"github.com/google/uuid"

	"coppice/internal/claim"
	"coppice/internal/db"
	"coppice/internal/storage"
	"coppice/internal/xapi"
)

// generationKey is the key in sm_config of a disk for a value that each revert
// of the disk that can be undone replaces; see revertMark.
const generationKey = "coppice:generation"

// vdiRevert gives the disk that a snapshot was taken of the contents of the
// snapshot. The disk keeps its identity; every snapshot survives, also newer
// ones.
//
// The storage goes back in one step, and a crash before the record has the
// snapshot's size too is made good at start-up. With an undo snapshot there are
// two, and the commit that records it decides: what a crash or a failure before
// it has changed is put back, at once or when the SR is opened again (see
// settleReverts). The same commit removes the undo snapshot that was there
// before, also if it is what the disk is reverted to.
func (a *API) vdiRevert(ctx context.Context, c *Call, snapshot xapi.Ref[xapi.VDI]) error {
	w, release, err := a.claimDiskRevert(ctx, c, snapshot)
	if err != nil {
		return err
	}
	defer release()
	if w.undo {
		return w.runWithUndo(ctx)
	}
	return w.run(ctx)
}

// diskRevert is a revert of one disk. It is planned in one transaction.
type diskRevert struct {
	diskWork
	api     *API
	snap    *xapi.VDI
	undo    bool
	dropped []xapi.Ref[xapi.VDI] // older undo snapshots, which go
	gone    []*xapi.VDI          // their records
	claims  []claim.Claim
}

// claimDiskRevert plans a revert and claims all that it is going to touch.
func (a *API) claimDiskRevert(ctx context.Context, c *Call, snapshot xapi.Ref[xapi.VDI]) (w *diskRevert, release func(), err error) {
	for {
		err := a.db.View(func(tx *db.Tx) (err error) {
			w, err = a.planDiskRevert(tx, c, snapshot)
			return err
		})
		if err != nil {
			return nil, nil, err
		}
		a.awaitWriters(ctx, w.ref)
		claims := w.claims
		release, err := c.Claim(ctx, func(tx *db.Tx) error {
			now, err := a.planDiskRevert(tx, c, snapshot)
			if err != nil {
				return err
			}
			if !slices.Equal(now.claims, claims) {
				return errPartsChanged
			}
			w = now
			return w.begin(tx)
		}, claims...)
		if errors.Is(err, errPartsChanged) {
			continue
		}
		if err != nil {
			return nil, nil, err
		}
		if w.repo, err = a.repos.get(w.rec.SR); err != nil {
			release()
			return nil, nil, err
		}
		return w, release, nil
	}
}

// planDiskRevert finds out what a revert is about.
func (a *API) planDiskRevert(tx *db.Tx, c *Call, snapshot xapi.Ref[xapi.VDI]) (*diskRevert, error) {
	w := &diskRevert{api: a, undo: a.wantsUndo(tx, c)}
	var err error
	if w.snap, err = db.Get(tx, snapshot); err != nil {
		return nil, err
	}
	if !w.snap.IsASnapshot {
		return nil, xapi.NewError(xapi.ErrRevertOnlyAllowedOnSnapshot)
	}
	w.ref = w.snap.SnapshotOf
	if w.rec, err = db.Get(tx, w.ref); err != nil {
		return nil, err
	}
	w.claims = []claim.Claim{
		claim.On(snapshot, xapi.VDIOperationsRevertTo), claim.On(w.ref, xapi.VDIOperationsRevertFrom),
		claim.On(w.rec.SR, xapi.StorageOperationsVDIRevert),
	}
	if !w.undo {
		return w, nil
	}
	for _, ref := range w.rec.Snapshots {
		v, err := db.Get(tx, ref)
		if err != nil || v.OtherConfig[undoKey] != "true" || v.SR != w.rec.SR || len(v.VBDs) > 0 {
			continue // somebody has taken it into use
		}
		if err := a.vdiAllows(tx, ref, xapi.VDIOperationsDestroy); err != nil && !busy(err) {
			continue // it is on hold
		}
		w.dropped, w.gone = append(w.dropped, ref), append(w.gone, v)
		if ref != snapshot {
			w.claims = append(w.claims, claim.On(ref, xapi.VDIOperationsDestroy))
		}
	}
	return w, nil
}

// begin checks every claim against the rules.
func (w *diskRevert) begin(tx *db.Tx) error {
	for _, cl := range w.claims {
		if cl.Class != "VDI" {
			continue
		}
		if err := w.api.vdiAllows(tx, xapi.Ref[xapi.VDI](cl.Ref), xapi.VDIOperations(cl.Op)); err != nil {
			return err
		}
	}
	if err := w.api.srAllows(tx, w.rec.SR, xapi.StorageOperationsVDIRevert); err != nil {
		return err
	}
	if w.rec.SR != w.snap.SR {
		return xapi.NewError(xapi.ErrSROperationNotSupported, string(w.snap.SR))
	}
	if w.undo && w.rec.SMConfig[generationKey] == "" {
		if err := db.Modify(tx, w.ref, newGeneration); err != nil {
			return err
		}
		var err error
		if w.rec, err = db.Get(tx, w.ref); err != nil {
			return err
		}
	}
	return forgetReceived(tx, w.ref)
}

func newGeneration(v *xapi.VDI) { v.SMConfig[generationKey] = uuid.NewString() }

// run reverts the disk.
func (w *diskRevert) run(ctx context.Context) error {
	r, ok := w.repo.Repo.(storage.Reverter)
	if !ok {
		return xapi.NewError(xapi.ErrUnimplementedInSMBackend, string(w.rec.SR))
	}
	defer w.repo.reserve(w.id())() // a scan beside this does not know the size
	if err := r.Revert(ctx, w.id(), storage.ID(w.snap.UUID)); err != nil {
		return fmt.Errorf("revert VDI %s to %s: %w", w.rec.UUID, w.snap.UUID, err)
	}
	// The contents have changed; the record follows whatever happens to the call.
	ctx = context.WithoutCancel(ctx)
	info, err := w.repo.Stat(ctx, w.id())
	if err != nil {
		return fmt.Errorf("look at VDI %s: %w", w.rec.UUID, err)
	}
	return w.api.noteInfo(ctx, &w.diskWork, info)
}

// runWithUndo reverts the disk after a snapshot of it. A cancel is heeded until
// the disk goes back.
func (w *diskRevert) runWithUndo(ctx context.Context) error {
	a := w.api
	b := a.newBatch()
	defer b.end(ctx)
	undo := a.snapshotRecord(w.ref, w.rec)
	undo.NameLabel = undoLabel(w.snap.NameLabel, w.snap.OtherConfig)
	undo.OtherConfig[undoKey] = "true"
	d := b.snapshot(w.repo, undo, w.id())
	d.mark = &revertMark{Generation: w.rec.SMConfig[generationKey], Disk: w.rec.UUID}
	for _, v := range w.gone {
		defer w.repo.reserve(storage.ID(v.UUID))() // until its volume is gone, too
	}
	if err := b.make(ctx); err != nil {
		return err
	}
	if err := context.Cause(ctx); err != nil {
		return err
	}
	ctx = context.WithoutCancel(ctx)
	info, err := b.putBack(ctx, d, storage.ID(w.snap.UUID))
	if err != nil {
		return err
	}
	err = b.commit(ctx, func(tx *db.Tx) error {
		if err := noteDiskInfo(tx, w.ref, info); err != nil {
			return err
		}
		if err := db.Modify(tx, w.ref, newGeneration); err != nil {
			return err
		}
		for _, ref := range w.dropped {
			if err := a.removeDiskRecord(tx, ref); err != nil {
				return err
			}
		}
		return a.refreshVDI(tx, w.ref)
	})
	if err != nil {
		return err
	}
	for _, v := range w.gone {
		a.discard(ctx, w.repo, storage.ID(v.UUID))
	}
	a.syncAttrs(ctx, d.ref) // without the mark
	return nil
}
