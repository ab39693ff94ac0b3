package main

import (
	"context"
	"errors"
	"fmt"
	"runtime"
	"sync"
	"time"

	"coppice/internal/cow"
)

const pib = 1 << 50

// subject is a disk with snapshots.
type subject struct {
	name  string
	size  int64
	depth int
	id    cow.ID
	snap  cow.ID // the newest
}

// volumeOps times snapshot, clone and revert of disks of several sizes and
// depths.
func (b *engineBench) volumeOps(ctx context.Context, cfg config) error {
	return b.timeVolumeOps(ctx, cfg, []*subject{
		{name: "1 GiB, depth 1", size: gib, depth: 1},
		{name: "1 GiB, depth 1,000", size: gib, depth: 1000},
		{name: "1 TiB, depth 1", size: tib, depth: 1},
		{name: "1 TiB, depth 1,000", size: tib, depth: 1000},
		{name: "1 PiB, depth 1", size: pib, depth: 1},
	})
}

// deepVolumeOps is volumeOps with a hundred thousand snapshots.
func (b *engineBench) deepVolumeOps(ctx context.Context, cfg config) error {
	return b.timeVolumeOps(ctx, cfg, []*subject{
		{name: "1 GiB, depth 1", size: gib, depth: 1},
		{name: "1 GiB, depth 100,000", size: gib, depth: 100_000},
		{name: "1 PiB, depth 1,000", size: pib, depth: 1000},
	})
}

// timeVolumeOps times the operations on idle disks, against two syncs of a
// file.
func (b *engineBench) timeVolumeOps(ctx context.Context, cfg config, subjects []*subject) error {
	for _, s := range subjects {
		if err := b.deepen(ctx, s); err != nil {
			return err
		}
	}
	twoSyncs := contestant{"two writes of 4 KiB with fdatasync", 0, func(ctx context.Context) error {
		p := make([]byte, block)
		for range 2 {
			noise(p)
			if _, err := b.file.WriteAt(p, 0); err != nil {
				return err
			}
			if err := b.file.flush(ctx); err != nil {
				return err
			}
		}
		return nil
	}, nil}
	cfg.rounds *= 5
	for _, op := range []struct {
		name string
		run  func(context.Context, *subject) (made cow.ID, err error)
	}{
		{"snapshot", func(ctx context.Context, s *subject) (cow.ID, error) { return b.snapshot(ctx, s.id) }},
		{"clone", func(ctx context.Context, s *subject) (cow.ID, error) { return b.clone(ctx, s.snap) }},
		{"revert", func(ctx context.Context, s *subject) (cow.ID, error) {
			return cow.ID{}, b.store.Revert(ctx, s.id, s.snap)
		}},
	} {
		var cs []contestant
		for _, s := range subjects {
			var made cow.ID
			cs = append(cs, contestant{op.name + ", " + s.name, 0, func(ctx context.Context) (err error) {
				made, err = op.run(ctx, s)
				return err
			}, func() error {
				if made == (cow.ID{}) {
					return nil
				}
				return b.store.Delete(ctx, made)
			}})
		}
		if err := compare(ctx, cfg, "Engine: "+op.name+" of an idle disk", append(cs, twoSyncs)...); err != nil {
			return err
		}
	}
	return nil
}

// deepen makes the disk of a subject and its snapshots, a block written before
// each.
func (b *engineBench) deepen(ctx context.Context, s *subject) error {
	var d engineDisk
	var err error
	if s.id, d, err = b.create(ctx, s.size); err != nil {
		return err
	}
	p := make([]byte, block)
	start := time.Now()
	for i := range s.depth {
		noise(p)
		if _, err := d.WriteAt(p, int64(i)*7919%(s.size/block)*block); err != nil {
			return err
		}
		if s.snap, err = b.snapshot(ctx, s.id); err != nil {
			return err
		}
	}
	if s.depth >= 1000 {
		fmt.Printf("\n%s: a write and a snapshot took %v in the mean\n", s.name, round(time.Since(start)/time.Duration(s.depth)))
	}
	return d.Close()
}

func (b *engineBench) clone(ctx context.Context, src cow.ID) (cow.ID, error) {
	id := b.newID()
	_, err := b.store.Clone(ctx, cow.Pair{Src: src, New: id})
	return id, err
}

// used is the space of the store when everything is in its trees. Asking a
// pinned disk for its version brings a change there.
func (b *engineBench) used(ctx context.Context) (int64, error) {
	for range 3 { // the space of one checkpoint comes back with the next
		if err := b.checkpoint(ctx); err != nil {
			return 0, err
		}
	}
	return b.store.Usage().Used, nil
}

// checkpoint makes a change and has all changes written to the trees.
func (b *engineBench) checkpoint(ctx context.Context) error {
	p := make([]byte, block)
	noise(p)
	if _, err := b.disk.WriteAt(p, 0); err != nil {
		return err
	}
	pin, err := b.store.OpenDisk(ctx, b.id, cow.Pinned)
	if err != nil {
		return err
	}
	_, err = pin.Version(ctx)
	return errors.Join(err, pin.Close())
}

// heap is the memory that the program's objects take.
func heap() int64 {
	runtime.GC()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return int64(m.HeapAlloc)
}

// clones makes ten thousand clones of one snapshot and says what they take.
func (b *engineBench) clones(ctx context.Context, _ config) error {
	const n = 10_000
	snap, err := b.snapshot(ctx, b.id)
	if err != nil {
		return err
	}
	for _, workers := range []int{1, 32} {
		before, err := b.used(ctx)
		if err != nil {
			return err
		}
		memory := heap()
		ids := make([]cow.ID, n)
		for i := range ids {
			ids[i] = b.newID()
		}
		start := time.Now()
		err = each(n, workers, func(i int) error {
			_, err := b.store.Clone(ctx, cow.Pair{Src: snap, New: ids[i]})
			return err
		})
		if err != nil {
			return err
		}
		elapsed := time.Since(start)
		after, err := b.used(ctx)
		if err != nil {
			return err
		}
		fmt.Printf("\n%d clones of one snapshot, %d at a time: %v; each takes %d bytes of the store and %d of memory\n",
			n, workers, round(elapsed), (after-before)/n, (heap()-memory)/n)
	}
	return nil
}

// each calls f with every number below n, so many at a time.
func each(n, workers int, f func(i int) error) error {
	errs := make([]error, workers)
	var wg sync.WaitGroup
	for w := range workers {
		wg.Go(func() {
			for i := w; i < n && errs[w] == nil; i += workers {
				errs[w] = f(i)
			}
		})
	}
	wg.Wait()
	return errors.Join(errs...)
}
