package api

import (
	"context"
	"crypto/md5"
	"encoding/hex"
	"fmt"
	"strconv"

	"coppice/internal/claim"
	"coppice/internal/db"
	"coppice/internal/diskcopy"
	"coppice/internal/storage"
	"coppice/internal/xapi"
)

// zeroedKey is the key in sm_config of a disk that VDI.copy made with a base and
// no destination: which of its holes have become zero since the base, as
// [diskcopy.Zeroed] writes them.
const zeroedKey = "coppice:zeroed"

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
	job := copyOf(c, src)
	if !base.IsNull() {
		from, err := a.openReader(ctx, c, base, nil)
		if err != nil {
			return "", err
		}
		defer from.close()
		job.Base = new(from.readable())
	} else if err := src.verifyKnown(ctx); err != nil {
		return "", err
	}
	if into.IsNull() {
		return a.copyToNew(ctx, c, job, src.rec, sr)
	}
	return into, a.copyInto(ctx, c, job, ref, into)
}

// copyOf is a copy of all of a disk as a part of a call.
func copyOf(c *Call, src *openDisk) diskcopy.Job {
	return diskcopy.Job{From: src.readable(), Zeroed: src.rec.SMConfig[zeroedKey], Progress: c.Progress}
}

// readable is the disk for a copy.
func (d *openDisk) readable() diskcopy.Disk {
	return diskcopy.Disk{Volume: d.Volume, Repo: d.repo.Repo, Name: d.rec.UUID}
}

// copyInto runs a copy of the disk ref into another existing one.
func (a *API) copyInto(ctx context.Context, c *Call, job diskcopy.Job, ref, into xapi.Ref[xapi.VDI]) error {
	if into == ref {
		return xapi.NewError(xapi.ErrVDIInUse, string(into), string(xapi.VDIOperationsCopy))
	}
	dst, err := a.openWriter(ctx, c, into, string(xapi.VDIOperationsCopy))
	if err != nil {
		return err
	}
	defer dst.close()
	if size := job.From.Size(); dst.Size() < size {
		return xapi.NewError(xapi.ErrVDITooSmall, string(into), strconv.FormatInt(size, 10))
	}
	if err := a.db.Update(ctx, func(tx *db.Tx) error { return forgetReceived(tx, into) }); err != nil {
		return err
	}
	err = job.Into(ctx, dst.Volume)
	a.noteWritten(context.WithoutCancel(ctx), dst)
	return err
}

// copyToNew runs a copy of the disk src to one that it creates in sr.
func (a *API) copyToNew(ctx context.Context, c *Call, job diskcopy.Job, src *xapi.VDI, sr xapi.Ref[xapi.SR]) (xapi.Ref[xapi.VDI], error) {
	repo, drop, err := a.holdSR(ctx, c, sr, xapi.StorageOperationsVDICopy)
	if err != nil {
		return "", err
	}
	defer drop()
	rec := derivedDisk(src)
	rec.SR, rec.OnBoot = sr, xapi.OnBootPersist
	ref, err := a.addDisk(ctx, repo, rec, func(id storage.ID, attrs []byte) (storage.Info, error) {
		var zeroed diskcopy.Zeroed
		info, err := job.Create(ctx, repo, storage.Spec{ID: id, Attrs: attrs}, &zeroed)
		setOrDelete(rec.SMConfig, zeroedKey, zeroed.String())
		return info, err
	})
	if err == nil && rec.SMConfig[zeroedKey] != "" {
		a.syncAttrs(ctx, ref)
	}
	return ref, err
}

// checksumChunk is how much a checksum reads at a time, in bytes.
const checksumChunk = 1 << 20

// vdiChecksum returns the MD5 of the whole disk at this instant, in
// hexadecimal.
func (a *API) vdiChecksum(ctx context.Context, c *Call, ref xapi.Ref[xapi.VDI]) (string, error) {
	d, err := a.openReader(ctx, c, ref, nil)
	if err != nil {
		return "", err
	}
	defer d.close()
	h := md5.New()
	zeros := make([]byte, checksumChunk)
	buf := make([]byte, checksumChunk)
	for e, err := range d.Extents(ctx, 0, d.Size()) {
		if err != nil {
			return "", fmt.Errorf("read VDI %s: %w", d.rec.UUID, err)
		}
		for off := e.Off; off < e.End(); {
			if err := context.Cause(ctx); err != nil {
				return "", err
			}
			p := zeros[:min(e.End()-off, checksumChunk)]
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
