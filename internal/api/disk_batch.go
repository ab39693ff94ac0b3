package api

import (
	"context"
	"fmt"
	"time"

	"github.com/google/uuid"

	"coppice/internal/db"
	"coppice/internal/storage"
	"coppice/internal/xapi"
)

// diskBatch makes disks that appear together or not at all: first all their
// volumes, then, in one commit with whatever else the caller changes, all
// their records. A crash in between leaves volumes without records, which
// start-up reclaims; a failure takes the volumes back.
//
//	b := a.newBatch()
//	defer b.end(ctx)
//	ref := b.snapshot(repo, rec, source) // any number of these
//	if err := b.make(ctx); err != nil { … }
//	return b.commit(ctx, func(tx *db.Tx) error { … })
type diskBatch struct {
	api   *API
	disks []*batchDisk
	undo  undoStack
	done  []func() // ends of reservations
	keep  bool     // volumes must survive a failure, for the next start to use
}

// batchDisk is one disk of a batch.
type batchDisk struct {
	ref    xapi.Ref[xapi.VDI] // of its record, which is made by commit
	rec    *xapi.VDI
	repo   *repository
	source storage.ID  // what it is a snapshot of, else "" and fill makes it
	fill   volumeMaker // makes the volume
	mark   *revertMark // see settleReverts
	// passing marks a volume that never gets a record and goes away with the
	// end of the operation.
	passing bool
}

// volumeMaker makes a volume under a name.
type volumeMaker func(ctx context.Context, id storage.ID, attrs []byte) (storage.Info, error)

func (d *batchDisk) id() storage.ID { return storage.ID(d.rec.UUID) }

func (a *API) newBatch() *diskBatch { return &diskBatch{api: a} }

// add plans a disk whose volume fill makes.
func (b *diskBatch) add(repo *repository, rec *xapi.VDI, fill volumeMaker) *batchDisk {
	rec.UUID = uuid.NewString()
	rec.Location, rec.Managed = rec.UUID, true
	d := &batchDisk{ref: xapi.NewRef[xapi.VDI](), rec: rec, repo: repo, fill: fill}
	b.done = append(b.done, repo.reserve(d.id()))
	b.disks = append(b.disks, d)
	return d
}

// snapshot plans a snapshot of the volume source. All snapshots of a batch in
// one repository are taken at one instant, where its driver can do that.
func (b *diskBatch) snapshot(repo *repository, rec *xapi.VDI, source storage.ID) *batchDisk {
	d := b.add(repo, rec, nil)
	d.source = source
	return d
}

// clone plans a clone of the volume source.
func (b *diskBatch) clone(repo *repository, rec *xapi.VDI, source storage.ID) *batchDisk {
	return b.add(repo, rec, func(ctx context.Context, id storage.ID, attrs []byte) (storage.Info, error) {
		info, err := repo.Clone(ctx, storage.Derived{Source: source, ID: id, Attrs: attrs})
		if err != nil {
			return info, fmt.Errorf("clone VDI %s: %w", source, err)
		}
		return info, nil
	})
}

// create plans an empty disk of the size in rec.
func (b *diskBatch) create(repo *repository, rec *xapi.VDI) *batchDisk {
	return b.add(repo, rec, func(ctx context.Context, id storage.ID, attrs []byte) (storage.Info, error) {
		info, err := repo.Create(ctx, storage.Spec{ID: id, Size: rec.VirtualSize, Attrs: attrs})
		if err != nil {
			return info, fmt.Errorf("create VDI %s: %w", id, err)
		}
		return info, nil
	})
}

// make makes the volumes: snapshots first, for they are to show one instant.
func (b *diskBatch) make(ctx context.Context) error {
	attrs := make(map[*batchDisk][]byte, len(b.disks))
	err := b.api.db.View(func(tx *db.Tx) error {
		for _, d := range b.disks {
			at := attrsOf(tx, d.rec)
			at.Revert = d.mark
			attrs[d] = at.encode()
		}
		return nil
	})
	if err != nil {
		return err
	}
	var repos []*repository
	groups := map[*repository][]*batchDisk{}
	for _, d := range b.disks {
		if d.fill != nil {
			continue
		}
		if groups[d.repo] == nil {
			repos = append(repos, d.repo)
		}
		groups[d.repo] = append(groups[d.repo], d)
	}
	for _, repo := range repos {
		group := groups[repo]
		b.willDiscard(group...)
		if err := snapshotGroup(ctx, repo, group, attrs); err != nil {
			return err
		}
	}
	for _, d := range b.disks {
		if d.fill == nil {
			continue
		}
		b.willDiscard(d)
		info, err := d.fill(ctx, d.id(), attrs[d])
		if err != nil {
			return err
		}
		d.made(info)
	}
	return nil
}

// made notes what the storage says about a new volume.
func (d *batchDisk) made(info storage.Info) {
	d.rec.VirtualSize, d.rec.PhysicalUtilisation = info.Size, info.Used
}

// willDiscard has a failure delete volumes that are about to be made. Their
// names are new, so nobody else's are deleted.
func (b *diskBatch) willDiscard(disks ...*batchDisk) {
	b.undo.push(func(ctx context.Context) {
		if b.keep {
			return
		}
		for _, d := range disks {
			b.api.discard(ctx, d.repo, d.id())
		}
	})
}

// snapshotGroup takes snapshots of volumes of one repository, at one instant
// where the driver can, else one after the other.
func snapshotGroup(ctx context.Context, repo *repository, group []*batchDisk, attrs map[*batchDisk][]byte) error {
	derived := make([]storage.Derived, len(group))
	for i, d := range group {
		derived[i] = storage.Derived{Source: d.source, ID: d.id(), Attrs: attrs[d]}
	}
	if g, ok := repo.Repo.(storage.GroupSnapshotter); ok && len(group) > 1 {
		infos, err := g.SnapshotGroup(ctx, derived)
		if err != nil {
			return fmt.Errorf("snapshot %d VDIs of SR %s: %w", len(group), repo.sr, err)
		}
		for i, d := range group {
			d.made(infos[i])
		}
		return nil
	}
	for i, d := range group {
		info, err := repo.Snapshot(ctx, derived[i])
		if err != nil {
			return fmt.Errorf("snapshot VDI %s: %w", d.source, err)
		}
		d.made(info)
	}
	return nil
}

// putBack gives the disk that d is a snapshot of the contents and the size of
// the volume from. A failure later gives it those of d. The caller commits with
// a context that cannot be cancelled.
func (b *diskBatch) putBack(ctx context.Context, d *batchDisk, from storage.ID) (storage.Info, error) {
	r, ok := d.repo.Repo.(storage.Reverter)
	if !ok {
		return storage.Info{}, xapi.NewError(xapi.ErrUnimplementedInSMBackend, string(d.repo.sr))
	}
	b.done = append(b.done, d.repo.reserve(d.source)) // a scan beside this does not know the size
	b.undo.push(func(ctx context.Context) {
		if err := r.Revert(ctx, d.source, d.id()); err != nil {
			b.keep = true
			b.api.log.Error("a disk of a failed revert could not be put back; the next start does it",
				"vdi", d.source, "from", d.id(), "err", err)
		}
	})
	if err := r.Revert(ctx, d.source, from); err != nil {
		return storage.Info{}, fmt.Errorf("revert VDI %s to %s: %w", d.source, from, err)
	}
	info, err := d.repo.Stat(ctx, d.source)
	if err != nil {
		return info, fmt.Errorf("look at VDI %s: %w", d.source, err)
	}
	return info, nil
}

// commit adds the records of all disks but the passing ones, and does also in
// the same commit. When it returns nil or an unsettled error, nothing is taken
// back any more.
func (b *diskBatch) commit(ctx context.Context, also func(*db.Tx) error) error {
	a := b.api
	err := a.db.Update(ctx, func(tx *db.Tx) error {
		for _, d := range b.disks {
			if d.passing {
				continue
			}
			if err := db.InsertAs(tx, d.ref, d.rec); err != nil {
				return err
			}
			if err := db.Modify(tx, d.rec.SR, func(sr *xapi.SR) { sr.VirtualAllocation += d.rec.VirtualSize }); err != nil {
				return err
			}
		}
		if err := also(tx); err != nil {
			return err
		}
		for _, d := range b.disks {
			if err := a.refreshVDI(tx, d.ref); err != nil {
				return err
			}
		}
		return nil
	})
	a.repos.used()
	if unsettled(err) {
		b.keep = true
	}
	if err == nil || unsettled(err) {
		b.undo.disarm()
	}
	return err
}

// end takes back what has not been committed and lets scans see the volumes.
// Passing volumes are deleted in any case.
func (b *diskBatch) end(ctx context.Context) {
	committed := len(b.undo) == 0
	b.undo.run(ctx)
	if b.keep {
		return // nobody may touch them before the next start has decided
	}
	if committed {
		for _, d := range b.disks {
			if d.passing {
				b.api.discard(context.WithoutCancel(ctx), d.repo, d.id())
			}
		}
	}
	for _, done := range b.done {
		done()
	}
}

// snapshotRecord is the record of a snapshot, taken now, of a disk.
func (a *API) snapshotRecord(of xapi.Ref[xapi.VDI], src *xapi.VDI) *xapi.VDI {
	rec := derivedDisk(src)
	rec.IsASnapshot, rec.SnapshotOf = true, of
	rec.SnapshotTime = a.now().Truncate(time.Second)
	rec.CBTEnabled = src.CBTEnabled
	return rec
}

// noteDiskInfo brings the sizes in the record of a disk up to date.
func noteDiskInfo(tx *db.Tx, ref xapi.Ref[xapi.VDI], info storage.Info) error {
	v, err := db.Get(tx, ref)
	if err != nil {
		return err
	}
	grown := info.Size - v.VirtualSize
	err = db.Modify(tx, ref, func(v *xapi.VDI) {
		v.VirtualSize, v.PhysicalUtilisation, v.Missing = info.Size, info.Used, false
	})
	if err != nil {
		return err
	}
	return db.Modify(tx, v.SR, func(sr *xapi.SR) { sr.VirtualAllocation += grown })
}
