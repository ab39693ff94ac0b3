package api

import (
	"context"
	"fmt"
	"slices"

	"coppice/internal/ova"
	"coppice/internal/storage"
	"coppice/internal/xapi"
)

// Base gives a disk of the archive, before anything is written to it, the
// contents of its nearest relative that has come completely: the disk that both
// are snapshots of, or that one is of the other. What the two have in common is
// then stored once, if the caller writes what is different only. It reports
// whether it did: else the disk is empty. It takes no time that depends on sizes.
func (x *VMImport) Base(ctx context.Context, name string) (bool, error) {
	d := x.arriving(name)
	near := x.nearest(d)
	if near == nil {
		return false, nil
	}
	reverter, ok := d.repo.Repo.(storage.Reverter)
	resizer, resizes := d.repo.Repo.(storage.Resizer)
	size := d.volume.Size()
	if !ok || !resizes && near.volume.Size() != size {
		return false, nil
	}
	if err := reverter.Revert(ctx, d.batchDisk.id(), near.batchDisk.id()); err != nil {
		return false, fmt.Errorf("begin VDI %s as %s: %w", d.rec.UUID, near.rec.UUID, err)
	}
	if d.volume.Size() != size {
		if _, err := resizer.Resize(ctx, d.batchDisk.id(), size); err != nil {
			return false, fmt.Errorf("resize VDI %s: %w", d.rec.UUID, err)
		}
	}
	return true, nil
}

// Arrived says that a disk has all of its contents.
func (x *VMImport) Arrived(name string) { x.arriving(name).arrived = true }

// arriving returns the disk with a name that Begin gave.
func (x *VMImport) arriving(name string) *arrivingDisk {
	i := slices.IndexFunc(x.disks, func(d *arrivingDisk) bool { return string(d.id) == name })
	return x.disks[i]
}

// nearest returns the relative of a disk, of those that have come to the same
// SR, whose instant is nearest to that of the disk; nil for none.
func (x *VMImport) nearest(d *arrivingDisk) (near *arrivingDisk) {
	family, at := x.lineage(d)
	var least int64
	for _, other := range x.disks {
		of, when := x.lineage(other)
		if !other.arrived || other.repo != d.repo || of != family || of.IsNull() {
			continue
		}
		if away := max(at-when, when-at); near == nil || away < least {
			near, least = other, away
		}
	}
	return near
}

// lineage is the disk, in the manifest, that a disk is, or is a snapshot of, and
// the second that it shows, far in the future for one that is no snapshot.
func (x *VMImport) lineage(d *arrivingDisk) (of xapi.Ref[xapi.VDI], at int64) {
	src := ova.Get(x.manifest, d.id)
	if src.IsASnapshot {
		return src.SnapshotOf, src.SnapshotTime.Unix()
	}
	return d.id, 1 << 40
}
