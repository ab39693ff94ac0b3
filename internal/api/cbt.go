package api

import (
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"time"

	"coppice/internal/claim"
	"coppice/internal/db"
	"coppice/internal/storage"
	"coppice/internal/xapi"
)

// Changed block tracking. The trees of the storage always know what has
// changed between two disks, so nothing is switched on there: cbt_enabled is a
// flag of the record, which decides what clients are told.

// vdiEnableCBT says that the changes of a disk, and of the snapshots taken of
// it from now on, are to be listed.
func (a *API) vdiEnableCBT(ctx context.Context, c *Call, ref xapi.Ref[xapi.VDI]) error {
	return a.setCBT(ctx, c, ref, true, xapi.VDIOperationsEnableCBT, xapi.StorageOperationsVDIEnableCBT)
}

// vdiDisableCBT takes that back. Snapshots taken before keep the flag.
func (a *API) vdiDisableCBT(ctx context.Context, c *Call, ref xapi.Ref[xapi.VDI]) error {
	return a.setCBT(ctx, c, ref, false, xapi.VDIOperationsDisableCBT, xapi.StorageOperationsVDIDisableCBT)
}

func (a *API) setCBT(ctx context.Context, c *Call, ref xapi.Ref[xapi.VDI], on bool, op xapi.VDIOperations, srOp xapi.StorageOperations) error {
	w, err := a.beginDisk(ctx, c, ref, op, srOp)
	if err != nil {
		return err
	}
	defer w.release()
	err = a.db.Update(ctx, func(tx *db.Tx) error {
		return db.Modify(tx, ref, func(v *xapi.VDI) { v.CBTEnabled = on })
	})
	if err == nil {
		a.syncAttrs(ctx, ref)
	}
	return err
}

const (
	contentIDKey = "content_id"
	// noContent is the content_id of a disk whose data has been destroyed.
	noContent = "/No content: this is a cbt_metadata VDI/"
	// detachPatience is how long VDI.data_destroy waits for a disk that is
	// being detached.
	detachPatience = 4 * time.Second
)

// vdiDataDestroy gives up the data of a snapshot and keeps its record, as the
// from of later lists of changed blocks. The record changes first; a crash in
// between is made good at start-up, a failure at once. A disk without data is
// left as it is.
func (a *API) vdiDataDestroy(ctx context.Context, c *Call, ref xapi.Ref[xapi.VDI]) error {
	if err := a.waitDetached(ctx, ref); err != nil {
		return err
	}
	w, err := a.beginDisk(ctx, c, ref, xapi.VDIOperationsDataDestroy, xapi.StorageOperationsVDIDataDestroy)
	if err != nil {
		return err
	}
	defer w.release()
	if w.rec.Type == xapi.VDITypeCBTMetadata {
		return nil
	}
	if _, ok := w.repo.Repo.(storage.DataDestroyer); !ok {
		return xapi.NewError(xapi.ErrSROperationNotSupported, string(w.rec.SR))
	}
	err = a.db.Update(ctx, func(tx *db.Tx) error {
		if busy, err := attachedSomewhere(tx, ref); err != nil {
			return err
		} else if busy {
			return xapi.NewError(xapi.ErrVDIInUse, string(ref), string(xapi.VDIOperationsDataDestroy))
		}
		return db.Modify(tx, ref, markNoData)
	})
	if err != nil {
		return err
	}
	ctx = context.WithoutCancel(ctx) // the record says so already
	if err := a.finishDataDestroy(ctx, w.repo, ref, w.id()); err != nil {
		undone := a.db.Update(ctx, func(tx *db.Tx) error {
			return db.Modify(tx, ref, func(v *xapi.VDI) {
				v.Type = w.rec.Type
				delete(v.OtherConfig, contentIDKey)
				if id, ok := w.rec.OtherConfig[contentIDKey]; ok {
					v.OtherConfig[contentIDKey] = id
				}
			})
		})
		if undone != nil {
			a.log.Error("a failed VDI.data_destroy could not be taken back", "vdi", ref, "err", undone)
			a.syncAttrs(ctx, ref)
		}
		return fmt.Errorf("destroy the data of VDI %s: %w", w.id(), err)
	}
	a.syncAttrs(ctx, ref)
	return nil
}

// markNoData changes a record to that of a disk without data.
func markNoData(v *xapi.VDI) {
	v.Type = xapi.VDITypeCBTMetadata
	if v.OtherConfig == nil {
		v.OtherConfig = map[string]string{}
	}
	v.OtherConfig[contentIDKey] = noContent
}

// finishDataDestroy does what is left when the record of a disk says that its
// data has been destroyed: it destroys the data, and then the VBDs.
func (a *API) finishDataDestroy(ctx context.Context, repo *repository, ref xapi.Ref[xapi.VDI], id storage.ID) error {
	d, ok := repo.Repo.(storage.DataDestroyer)
	if !ok {
		return xapi.NewError(xapi.ErrSROperationNotSupported, string(repo.sr))
	}
	if err := d.DestroyData(ctx, id); err != nil {
		if info, statErr := repo.Stat(ctx, id); statErr != nil || !info.NoData {
			return err
		}
	}
	defer a.repos.used()
	return a.db.Update(ctx, func(tx *db.Tx) error {
		v, err := db.Get(tx, ref)
		if err != nil {
			return err
		}
		if err := a.removeVBDs(tx, v); err != nil {
			return err
		}
		return db.Modify(tx, ref, func(v *xapi.VDI) { v.PhysicalUtilisation = 0 })
	})
}

// attachedSomewhere tells whether a disk has a VBD that is attached, or on its
// way from or to being so.
func attachedSomewhere(tx *db.Tx, ref xapi.Ref[xapi.VDI]) (bool, error) {
	v, err := db.Get(tx, ref)
	if err != nil {
		return false, err
	}
	for _, b := range v.VBDs {
		vbd, err := db.Get(tx, b)
		if err == nil && (vbd.CurrentlyAttached || vbd.Reserved || len(vbd.CurrentOperations) > 0) {
			return true, nil
		}
	}
	return false, nil
}

// waitDetached waits a little until a disk is attached nowhere; VDI_IN_USE when
// that takes too long.
func (a *API) waitDetached(ctx context.Context, ref xapi.Ref[xapi.VDI]) error {
	inUse := xapi.NewError(xapi.ErrVDIInUse, string(ref), string(xapi.VDIOperationsDataDestroy))
	ctx, cancel := context.WithTimeoutCause(ctx, detachPatience, inUse)
	defer cancel()
	for {
		var busy bool
		var seen uint64
		err := a.db.View(func(tx *db.Tx) (err error) {
			seen = tx.Revision()
			busy, err = attachedSomewhere(tx, ref)
			return err
		})
		if err != nil || !busy {
			return err
		}
		if err := a.db.Wait(ctx, seen); err != nil {
			return err
		}
	}
}

const (
	// changedBlock is what one bit of a list of changed blocks stands for, in
	// bytes.
	changedBlock = 64 << 10
	// longestList is the size of the largest disk that has a list, in bytes.
	// Its bitmap is 32 MiB.
	longestList = 16 << 40
	// changedBlocksKey is the key in the pool's other_config that, with the
	// value anyDisks, lists the changes between any two disks that have
	// something to compare, whether they were enabled or not.
	changedBlocksKey = "coppice:changed-blocks"
	anyDisks         = "any"
)

// notComparable is the answer for disks between which changes are not listed.
func notComparable(why string) *xapi.Error {
	return backendFailure(460, "Failed to calculate changed blocks for given VDIs. [opterr="+why+"]")
}

// vdiListChangedBlocks returns in which blocks of 64 KiB a disk may differ from
// another that it descends from: a bitmap over the size of the disk, most
// significant bit first, in base64. Blocks that are not in it are equal.
func (a *API) vdiListChangedBlocks(ctx context.Context, c *Call, from, to xapi.Ref[xapi.VDI]) (string, error) {
	op := xapi.VDIOperationsListChangedBlocks
	var older, newer *xapi.VDI
	anyTwo := false
	release, err := c.Claim(ctx, func(tx *db.Tx) (err error) {
		for _, ref := range []xapi.Ref[xapi.VDI]{from, to} {
			if err := a.vdiAllows(tx, ref, op); err != nil {
				return err
			}
		}
		if older, err = db.Get(tx, from); err != nil {
			return err
		}
		if newer, err = db.Get(tx, to); err != nil {
			return err
		}
		_, pool, err := a.pool(tx)
		if err != nil {
			return err
		}
		anyTwo = pool.OtherConfig[changedBlocksKey] == anyDisks
		return comparable(older, newer, anyTwo)
	}, claim.On(to, op))
	if err != nil {
		return "", err
	}
	defer release()
	repo, err := a.repos.get(newer.SR)
	if err != nil {
		return "", err
	}
	if !anyTwo {
		err = descends(ctx, repo, storage.ID(newer.UUID), storage.ID(older.UUID))
	}
	var bitmap []byte
	if err == nil {
		bitmap, err = changedBlocks(ctx, c, repo, older, newer)
	}
	switch {
	case errors.Is(err, storage.ErrNoData):
		return "", notComparable("The data of the target VDI has been destroyed").WithCause(err)
	case errors.Is(err, storage.ErrNoLineage):
		return "", notComparable("Source and target VDI are unrelated").WithCause(err)
	case err != nil:
		return "", fmt.Errorf("list what has changed in VDI %s since %s: %w", newer.UUID, older.UUID, err)
	}
	return base64.StdEncoding.EncodeToString(bitmap), nil
}

// comparable says whether two disks may be asked about, from what their
// records say; anyTwo is the extension to disks that are not enabled.
func comparable(from, to *xapi.VDI, anyTwo bool) error {
	switch {
	case from.UUID == to.UUID:
		return notComparable("Source and target VDI are the same")
	case from.SR != to.SR:
		return notComparable("Source and target VDI are in different SRs")
	case !anyTwo && !from.CBTEnabled:
		return notComparable("Changed block tracking is not enabled for source VDI")
	case !anyTwo && !to.CBTEnabled:
		return notComparable("Changed block tracking is not enabled for target VDI")
	case to.VirtualSize > longestList:
		return notComparable(fmt.Sprintf("A list for %d bytes is too long; the most is %d", to.VirtualSize, int64(longestList)))
	}
	return nil
}

// changedBlocks makes the bitmap.
func changedBlocks(ctx context.Context, c *Call, repo *repository, from, to *xapi.VDI) ([]byte, error) {
	tracker, ok := repo.Repo.(storage.ChangeTracker)
	if !ok {
		return nil, xapi.NewError(xapi.ErrSROperationNotSupported, string(repo.sr))
	}
	v, err := repo.Open(ctx, storage.ID(to.UUID), storage.Pinned)
	if err != nil {
		return nil, err
	}
	defer func() { _ = v.Close() }() // nothing was written
	blocks := (v.Size() + changedBlock - 1) / changedBlock
	bitmap := make([]byte, (blocks+7)/8)
	for e, err := range tracker.ChangedSince(ctx, storage.ID(from.UUID), v, 0) {
		if err != nil {
			return nil, err
		}
		for n := e.Off / changedBlock; n*changedBlock < e.End(); n++ {
			bitmap[n/8] |= 0x80 >> (n % 8)
		}
		c.Progress(e.End(), v.Size())
	}
	return bitmap, nil
}

// descends is storage.ErrNoLineage unless the contents of one volume descend
// from those of the other.
func descends(ctx context.Context, repo *repository, id, from storage.ID) error {
	for id != from {
		info, err := repo.Stat(ctx, id)
		if err != nil {
			return err
		}
		if info.Parent == "" {
			return fmt.Errorf("%w: %s of %s", storage.ErrNoLineage, id, from)
		}
		id = info.Parent
	}
	return nil
}
