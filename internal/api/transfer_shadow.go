package api

import (
	"bytes"
	"context"
	"fmt"
	"strconv"

	"github.com/google/uuid"

	"coppice/internal/db"
	"coppice/internal/storage"
	"coppice/internal/xapi"
)

// hidden is a volume of an import that is no disk: it has no record, and a
// crash leaves one that start-up reclaims.
type hidden struct {
	storage.Volume
	id   storage.ID
	repo *repository
	done func() // lets scans see the volume
}

// hide makes a hidden volume. create puts it into storage.
func (a *API) hide(ctx context.Context, repo *repository, create func(id storage.ID) error) (h *hidden, err error) {
	h = &hidden{id: storage.ID(uuid.NewString()), repo: repo}
	h.done = repo.reserve(h.id)
	defer func() {
		if err != nil {
			a.discard(context.WithoutCancel(ctx), repo, h.id)
			h.done()
		}
	}()
	if err := create(h.id); err != nil {
		return nil, err
	}
	h.Volume, err = repo.Open(ctx, h.id, storage.Live)
	return h, err
}

// reveal gives the room of a hidden volume back.
func (a *API) reveal(ctx context.Context, h *hidden) {
	if err := h.Close(); err != nil {
		a.log.Warn("closing a hidden volume failed", "volume", h.id, "err", err)
	}
	a.discard(ctx, h.repo, h.id)
	h.done()
}

// Shadow makes Volume a hidden version of the disk, which Finish publishes at
// one instant when the import succeeded, and drops when not: until then, and
// after a crash, the disk is what it was. It must be called before anything is
// written. A disk that is made by the import is not to be seen before it is
// complete anyhow.
func (x *Import) Shadow() error {
	if x.record != nil || x.shadow != nil {
		return nil
	}
	if _, ok := x.Repo.(storage.Reverter); !ok {
		return xapi.NewError(xapi.ErrSROperationNotSupported, string(x.VDI.SR))
	}
	ctx, disk := x.call.Context(), storage.ID(x.VDI.UUID)
	h, err := x.call.api.hide(ctx, x.dst.repo, func(id storage.ID) error {
		_, err := x.Repo.Clone(ctx, storage.Derived{Source: disk, ID: id})
		return err
	})
	if err != nil {
		return fmt.Errorf("shadow of VDI %s: %w", disk, err)
	}
	x.shadow, x.Volume = h, h.Volume
	return nil
}

// replace is Shadow for an import that replaces all contents: Volume is empty
// and has a size of its own, in bytes, which the disk gets with it.
func (x *Import) replace(size int64) error {
	if _, ok := x.Repo.(storage.Reverter); !ok {
		return xapi.NewError(xapi.ErrSROperationNotSupported, string(x.VDI.SR))
	}
	ctx := x.call.Context()
	h, err := x.call.api.hide(ctx, x.dst.repo, func(id storage.ID) error {
		_, err := x.Repo.Create(ctx, storage.Spec{ID: id, Size: size})
		return err
	})
	if err != nil {
		return fmt.Errorf("new contents of VDI %s: %w", x.VDI.UUID, err)
	}
	x.shadow, x.Volume = h, h.Volume
	return nil
}

// publish makes the shadow, if there is one, the contents of the disk.
func (x *Import) publish(ctx context.Context) error {
	if x.shadow == nil {
		return nil
	}
	if err := x.Repo.(storage.Reverter).Revert(ctx, storage.ID(x.VDI.UUID), x.shadow.id); err != nil {
		return fmt.Errorf("publish the shadow of VDI %s: %w", x.VDI.UUID, err)
	}
	return nil
}

// Scratch makes a hidden volume of at least size bytes in the SR of the disk,
// which goes when the import ends. Its contents take room of the SR as those
// of a disk do. What it has can be moved to Volume by the batch, which is nil
// when the SR cannot.
func (x *Import) Scratch(size int64) (storage.Volume, *storage.CloneBatch, error) {
	ctx := x.call.Context()
	size = (min(max(size, 1), storage.MaxSize) + storage.Unit - 1) / storage.Unit * storage.Unit
	h, err := x.call.api.hide(ctx, x.dst.repo, func(id storage.ID) error {
		_, err := x.Repo.Create(ctx, storage.Spec{ID: id, Size: size})
		return err
	})
	if err != nil {
		return nil, nil, fmt.Errorf("scratch volume for VDI %s: %w", x.VDI.UUID, err)
	}
	x.scratch = append(x.scratch, h)
	return h.Volume, storage.NewCloneBatch(x.Repo, x.Volume, h.Volume), nil
}

// Describe puts an entry into the other_config of the task when it ends.
func (x *Import) Describe(key, value string) { x.notes = append(x.notes, [2]string{key, value}) }

// Describe is like Import.Describe.
func (x *Export) Describe(key, value string) { x.notes = append(x.notes, [2]string{key, value}) }

// describe writes what Describe collected.
func (a *API) describe(task xapi.Ref[xapi.Task], notes [][2]string) {
	if len(notes) == 0 {
		return
	}
	err := a.db.Update(context.WithoutCancel(a.ctx), func(tx *db.Tx) error {
		if t, err := db.Get(tx, task); err != nil || finished(t) {
			return nil // destroyed, or completed by somebody else
		}
		return db.Modify(tx, task, func(t *xapi.Task) {
			if t.OtherConfig == nil {
				t.OtherConfig = map[string]string{}
			}
			for _, n := range notes {
				t.OtherConfig[n[0]] = n[1]
			}
		})
	})
	if err != nil {
		a.log.Warn("task: other_config not recorded", "task", task, "err", err)
	}
}

// compareChunk is how much of two disks is compared at a time, in bytes.
const compareChunk = 1 << 20

// Holds fails with INVALID_VALUE unless the disk, as it is, has the same
// contents and size as another one of its SR, given by reference or UUID. What
// the two share is not read. It returns the record of the other one.
func (x *Import) Holds(name, vdi string) (*xapi.VDI, error) {
	a, c := x.call.api, x.call
	ref, err := a.findDisk(vdi)
	if err != nil {
		return nil, err
	}
	other, err := a.openReader(c.Context(), c, ref, nil)
	if err != nil {
		return nil, err
	}
	defer other.close()
	differ, ok := x.Repo.(storage.Differ)
	if !ok || other.repo != x.dst.repo {
		return nil, xapi.NewError(xapi.ErrSROperationNotSupported, string(other.rec.SR))
	}
	differs := xapi.NewError(xapi.ErrInvalidValue, name, vdi)
	if other.Size() != x.Volume.Size() {
		return nil, differs
	}
	mine, theirs := make([]byte, compareChunk), make([]byte, compareChunk)
	for e, err := range differ.Diff(c.Context(), other.Volume, x.dst.Volume, 0) {
		if err != nil {
			return nil, err
		}
		for e.Len > 0 {
			n := min(e.Len, compareChunk)
			for v, b := range map[storage.Volume][]byte{x.dst.Volume: mine, other.Volume: theirs} {
				if k, err := v.ReadAt(b[:n], e.Off); int64(k) < n {
					return nil, fmt.Errorf("compare VDI %s: %w", x.VDI.UUID, err)
				}
			}
			if !bytes.Equal(mine[:n], theirs[:n]) {
				return nil, differs
			}
			e.Off, e.Len = e.Off+n, e.Len-n
		}
	}
	return other.rec, nil
}

// receivedKey is the key in the other_config of a VDI that says how much of an
// interrupted upload of raw data it holds, in bytes.
const receivedKey = "coppice:received"

// received returns how much of an interrupted upload a disk holds, in bytes.
func received(v *xapi.VDI) int64 {
	n, err := strconv.ParseInt(v.OtherConfig[receivedKey], 10, 64)
	if err != nil {
		return 0
	}
	return n
}

// forgetReceived forgets that a disk holds a part of an upload, when something
// else than the upload's continuation changes the disk.
func forgetReceived(tx *db.Tx, ref xapi.Ref[xapi.VDI]) error {
	v, err := db.Get(tx, ref)
	if err != nil || received(v) == 0 {
		return err
	}
	return db.Modify(tx, ref, func(v *xapi.VDI) { delete(v.OtherConfig, receivedKey) })
}

// Received returns how much of an interrupted upload the disk of a request
// holds, durably, in bytes. It checks session and role like an import.
func (a *API) Received(ctx context.Context, o Origin, r TransferRequest) (int64, error) {
	if err := a.CheckImport(ctx, o, r); err != nil {
		return 0, err
	}
	ref, err := a.findDisk(r.VDI)
	if err != nil {
		return 0, err
	}
	var n int64
	err = a.db.View(func(tx *db.Tx) error {
		v, err := db.Get(tx, ref)
		if err == nil {
			n = received(v)
		}
		return err
	})
	return n, err
}

// Received is how much of an interrupted upload the disk held when the import
// began, in bytes.
func (x *Import) Received() int64 { return received(x.VDI) }

// Keep makes the first n bytes of an upload durable and notes in the record of
// the disk that it holds them, for an upload that goes on there. 0 forgets
// about it.
func (x *Import) Keep(n int64) error {
	ctx := context.WithoutCancel(x.call.Context())
	if x.record != nil {
		return nil // the disk goes when the import fails
	}
	if n > 0 {
		if err := x.Volume.Flush(ctx); err != nil {
			return fmt.Errorf("flush VDI %s: %w", x.VDI.UUID, err)
		}
	}
	return x.call.api.db.Update(ctx, func(tx *db.Tx) error {
		v, err := db.Get(tx, x.Ref)
		if err != nil || received(v) == n {
			return err
		}
		return db.Modify(tx, x.Ref, func(v *xapi.VDI) {
			if n == 0 {
				delete(v.OtherConfig, receivedKey)
				return
			}
			if v.OtherConfig == nil {
				v.OtherConfig = map[string]string{}
			}
			v.OtherConfig[receivedKey] = strconv.FormatInt(n, 10)
		})
	})
}
