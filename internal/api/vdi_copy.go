package api

import (
	"bytes"
	"context"
	"crypto/md5"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"iter"
	"strconv"

	"coppice/internal/claim"
	"coppice/internal/db"
	"coppice/internal/storage"
	"coppice/internal/xapi"
)

// vdiCopy copies the contents of a disk to a new one in sr, or into the disk
// into; with base only what differs from it. The source is read as it is at
// one instant. A new disk appears when it is complete; a failure or cancel
// leaves nothing of it. A disk copied into keeps what was written so far, and
// the copy may be repeated.
//
// Ranges that are zero because nobody wrote them are not copied: into a disk
// that has contents, a copy of a sparse disk merges. So a copy with base to a
// new disk makes a delta, which a second copy merges into a copy of base; see
// zeroedKey. With a base and a destination the sectors that differ are
// written, and no others.
func (a *API) vdiCopy(ctx context.Context, c *Call, ref xapi.Ref[xapi.VDI], sr xapi.Ref[xapi.SR], base, into xapi.Ref[xapi.VDI]) (xapi.Ref[xapi.VDI], error) {
	release, err := c.Claim(ctx, func(tx *db.Tx) error {
		return a.vdiAllows(tx, ref, xapi.VDIOperationsCopy)
	}, claim.On(ref, xapi.VDIOperationsCopy))
	if err != nil {
		return "", err
	}
	defer release()
	src, err := a.openReader(ctx, c, ref, nil)
	if err != nil {
		return "", err
	}
	defer src.close()
	job := copyJob{call: c, src: src}
	if !base.IsNull() {
		if job.base, err = a.openReader(ctx, c, base, nil); err != nil {
			return "", err
		}
		defer job.base.close()
	} else if err := src.verifyKnown(ctx); err != nil {
		return "", err
	}
	if into.IsNull() {
		return a.copyToNew(ctx, c, job, sr)
	}
	return into, a.copyInto(ctx, c, job, into)
}

// copyInto runs a copy into an existing disk.
func (a *API) copyInto(ctx context.Context, c *Call, job copyJob, into xapi.Ref[xapi.VDI]) error {
	if into == job.src.ref {
		return xapi.NewError(xapi.ErrVDIInUse, string(into), string(xapi.VDIOperationsCopy))
	}
	dst, err := a.openWriter(ctx, c, into, string(xapi.VDIOperationsCopy))
	if err != nil {
		return err
	}
	defer dst.close()
	if dst.Size() < job.src.Size() {
		return xapi.NewError(xapi.ErrVDITooSmall, string(into), strconv.FormatInt(job.src.Size(), 10))
	}
	if err := a.db.Update(ctx, func(tx *db.Tx) error { return forgetReceived(tx, into) }); err != nil {
		return err
	}
	over := storage.NewOverlay(dst.Volume)
	job.sectors = job.base != nil
	err = job.run(ctx, func(p []byte, off int64) error { return over.WriteAt(ctx, p, off) },
		func(off, n int64) error { return over.Zero(ctx, off, n) })
	// What was written stays, so it is made durable also after a failure.
	err = errors.Join(err, dst.Flush(context.WithoutCancel(ctx)))
	a.noteWritten(context.WithoutCancel(ctx), dst)
	return err
}

// copyToNew runs a copy to a disk that it creates in sr.
func (a *API) copyToNew(ctx context.Context, c *Call, job copyJob, sr xapi.Ref[xapi.SR]) (xapi.Ref[xapi.VDI], error) {
	repo, drop, err := a.holdSR(ctx, c, sr, xapi.StorageOperationsVDICopy)
	if err != nil {
		return "", err
	}
	defer drop()
	rec := derivedDisk(job.src.rec)
	rec.SR, rec.OnBoot = sr, xapi.OnBootPersist
	job.zeroed = new(zeroedText)
	ref, err := a.addDisk(ctx, repo, rec, func(id storage.ID, attrs []byte) (storage.Info, error) {
		info, err := job.toNew(ctx, repo, id, attrs)
		setOrDelete(rec.SMConfig, zeroedKey, job.zeroed.String())
		return info, err
	})
	if err == nil && rec.SMConfig[zeroedKey] != "" {
		a.syncAttrs(ctx, ref)
	}
	return ref, err
}

// toNew runs a copy to a volume that it creates, which is zero already where
// the source is.
func (j copyJob) toNew(ctx context.Context, repo *repository, id storage.ID, attrs []byte) (storage.Info, error) {
	if _, err := repo.Create(ctx, storage.Spec{ID: id, Size: j.src.Size(), Attrs: attrs}); err != nil {
		return storage.Info{}, fmt.Errorf("create VDI %s: %w", id, err)
	}
	dst, err := repo.Open(ctx, id, storage.Live)
	if err != nil {
		return storage.Info{}, fmt.Errorf("open VDI %s: %w", id, err)
	}
	defer func() { _ = dst.Close() }() // Flush tells what matters
	write := func(p []byte, off int64) error {
		_, err := dst.WriteAt(p, off)
		return err
	}
	if err = j.run(ctx, write, j.zeroed.add); err != nil {
		return storage.Info{}, err
	}
	if err := dst.Flush(ctx); err != nil {
		return storage.Info{}, fmt.Errorf("flush VDI %s: %w", id, err)
	}
	return repo.Stat(ctx, id)
}

// changed yields the ranges of to that may differ from from, in ascending
// order, as [storage.Differ] says. Volumes of one repo are compared by their
// maps, where its driver can; others by reading both.
func changed(ctx context.Context, fromRepo storage.Repo, from storage.Volume, toRepo storage.Repo, to storage.Volume) iter.Seq2[storage.Extent, error] {
	if d, ok := toRepo.(storage.Differ); ok && fromRepo == toRepo {
		return d.Diff(ctx, from, to, 0)
	}
	return compare(ctx, from, to)
}

// compareUnit is the granularity of a comparison by reading, in bytes.
const compareUnit = storage.Unit

// compare yields the units of to that have other bytes than from, which
// counts as zero behind its end.
func compare(ctx context.Context, from, to storage.Volume) iter.Seq2[storage.Extent, error] {
	return func(yield func(storage.Extent, error) bool) {
		old, cur := make([]byte, copyChunk), make([]byte, copyChunk)
		zeros := make([]byte, compareUnit)
		var run storage.Extent // grows while units are alike
		for off := int64(0); off < to.Size(); off += copyChunk {
			if err := context.Cause(ctx); err != nil {
				yield(storage.Extent{}, err)
				return
			}
			cur := cur[:min(copyChunk, to.Size()-off)]
			if err := readOrZero(to, cur, off); err != nil {
				yield(storage.Extent{}, err)
				return
			}
			old := old[:len(cur)]
			if err := readOrZero(from, old, off); err != nil {
				yield(storage.Extent{}, err)
				return
			}
			for i := 0; i < len(cur); i += compareUnit {
				j := min(i+compareUnit, len(cur))
				if bytes.Equal(old[i:j], cur[i:j]) {
					continue
				}
				e := storage.Extent{Off: off + int64(i), Len: int64(j - i), Hole: bytes.Equal(cur[i:j], zeros[:j-i])}
				if run.Len > 0 && run.End() == e.Off && run.Hole == e.Hole {
					run.Len += e.Len
					continue
				}
				if run.Len > 0 && !yield(run, nil) {
					return
				}
				run = e
			}
		}
		if run.Len > 0 {
			yield(run, nil)
		}
	}
}

// readOrZero fills p from off, with zeros behind the end of v.
func readOrZero(v storage.Volume, p []byte, off int64) error {
	n := 0
	if off < v.Size() {
		var err error
		n, err = v.ReadAt(p[:min(int64(len(p)), v.Size()-off)], off)
		if err != nil && !errors.Is(err, io.EOF) {
			return err
		}
	}
	clear(p[n:])
	return nil
}

// vdiChecksum returns the MD5 of the whole disk at this instant, in
// hexadecimal.
func (a *API) vdiChecksum(ctx context.Context, c *Call, ref xapi.Ref[xapi.VDI]) (string, error) {
	d, err := a.openReader(ctx, c, ref, nil)
	if err != nil {
		return "", err
	}
	defer d.close()
	h := md5.New()
	zeros := make([]byte, copyChunk)
	buf := make([]byte, copyChunk)
	for e, err := range d.Extents(ctx, 0, d.Size()) {
		if err != nil {
			return "", fmt.Errorf("read VDI %s: %w", d.rec.UUID, err)
		}
		for off := e.Off; off < e.End(); {
			if err := context.Cause(ctx); err != nil {
				return "", err
			}
			p := zeros[:min(e.End()-off, copyChunk)]
			if !e.Hole {
				p = buf[:len(p)]
				if n, err := d.ReadAt(p, off); n < len(p) {
					return "", fmt.Errorf("read VDI %s: %w", d.rec.UUID, err)
				}
			}
			h.Write(p)
			off += int64(len(p))
			c.Progress(off, d.Size())
		}
	}
	return hex.EncodeToString(h.Sum(nil)), nil
}
