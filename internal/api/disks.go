package api

import (
	"context"
	"errors"
	"fmt"
	"log/slog"

	"coppice/internal/db"
	"coppice/internal/storage"
	"coppice/internal/xapi"
)

// openDisk is a disk that the server itself has open: a pinned version to
// read from, or the live disk to write to. While it is open its SR cannot be
// detached; a writer also keeps others off the disk, as if it were attached.
type openDisk struct {
	storage.Volume
	ref  xapi.Ref[xapi.VDI]
	rec  *xapi.VDI // as it was when the disk was opened
	repo *repository
	drop func()
	log  *slog.Logger
}

// close releases the disk; what was written is durable only after a Flush, so
// an error is a curiosity for the log.
func (d *openDisk) close() {
	if err := d.Volume.Close(); err != nil {
		d.log.Warn("closing a disk failed", "vdi", d.rec.UUID, "err", err)
	}
	d.drop()
}

// openReader opens the version of a disk of this instant. Nothing that
// happens to the disk later, not even its deletion, disturbs the reader.
// check, which may be nil, adds rules of the operation.
func (a *API) openReader(ctx context.Context, c *Call, ref xapi.Ref[xapi.VDI], check func(*db.Tx) error) (*openDisk, error) {
	return a.open(ctx, c, ref, reading, func(tx *db.Tx) error {
		if err := a.vdiReadable(tx, ref); err != nil {
			return err
		}
		if check != nil {
			return check(tx)
		}
		return nil
	})
}

// openWriter opens the live disk for what, which the errors of those that
// come too late name. It waits for operations that it would disturb, but for
// another writer only as long as that may be about to end.
func (a *API) openWriter(ctx context.Context, c *Call, ref xapi.Ref[xapi.VDI], what string) (*openDisk, error) {
	a.awaitWriters(ctx, ref)
	return a.open(ctx, c, ref, writing, func(tx *db.Tx) error { return a.vdiWritable(tx, ref, what) })
}

func (a *API) open(ctx context.Context, c *Call, ref xapi.Ref[xapi.VDI], how diskUse, check func(*db.Tx) error) (_ *openDisk, err error) {
	d := &openDisk{ref: ref, log: a.log}
	defer func() {
		if err != nil && d.drop != nil {
			d.drop()
		}
	}()
	mode := storage.Pinned
	if how != reading {
		mode = storage.Live
	}
	_, err = c.ClaimWithin(ctx, transferPatience, func(tx *db.Tx) (err error) {
		if err := check(tx); err != nil {
			return err
		}
		if d.rec, err = db.Get(tx, ref); err != nil {
			return err
		}
		d.drop = a.use(ref, how)
		return a.refreshVDI(tx, ref)
	})
	if err != nil {
		return nil, err
	}
	if d.repo, err = a.repos.get(d.rec.SR); err != nil {
		return nil, err
	}
	d.Volume, err = d.repo.Open(ctx, storage.ID(d.rec.UUID), mode)
	if errors.Is(err, storage.ErrNotFound) {
		// Deleted since the check, if the record is gone too.
		gone := a.db.View(func(tx *db.Tx) error { _, err := db.Get(tx, ref); return err })
		if gone != nil {
			return nil, gone
		}
	}
	if err != nil {
		return nil, fmt.Errorf("open VDI %s: %w", d.rec.UUID, err)
	}
	return d, nil
}

// holdSR lets op begin in an SR, for the long work of filling a new disk
// there, and keeps the SR attached until drop is called.
func (a *API) holdSR(ctx context.Context, c *Call, sr xapi.Ref[xapi.SR], op xapi.StorageOperations) (repo *repository, drop func(), err error) {
	_, err = c.ClaimWithin(ctx, transferPatience, func(tx *db.Tx) (err error) {
		if err := a.srAllows(tx, sr, op); err != nil {
			return err
		}
		if repo, err = a.repos.get(sr); err != nil {
			return err
		}
		drop = repo.hold()
		return nil
	})
	if err != nil {
		if drop != nil {
			drop()
		}
		return nil, nil, err
	}
	return repo, drop, nil
}

// use notes that the server has a disk open. The returned function takes that
// back and lets the disk's allowed_operations know.
func (a *API) use(ref xapi.Ref[xapi.VDI], how diskUse) (drop func()) {
	forget := a.repos.uses.add(ref, how)
	return func() {
		forget()
		if how == reading {
			return // hinders no operation of the disk
		}
		err := a.db.Update(context.WithoutCancel(a.ctx), func(tx *db.Tx) error { return a.refreshVDI(tx, ref) })
		if err != nil {
			a.log.Error("allowed_operations of a disk are out of date", "vdi", ref, "err", err)
		}
	}
}

// noteWritten brings the sizes in the record of a disk up to date after its
// contents changed, as well as they can be had.
func (a *API) noteWritten(ctx context.Context, d *openDisk) {
	info, err := d.repo.Stat(ctx, storage.ID(d.rec.UUID))
	if err != nil { // one of the sizes is known
		info = storage.Info{Size: d.Size(), Used: d.rec.PhysicalUtilisation}
	}
	err = cmpErr(err, a.noteInfo(ctx, &diskWork{ref: d.ref, rec: d.rec, repo: d.repo}, info))
	if err != nil {
		a.log.Warn("sizes of a disk are out of date", "vdi", d.ref, "err", err)
	}
}
