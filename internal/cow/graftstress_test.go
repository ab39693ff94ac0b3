package cow

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"testing"

	"coppice/internal/vfs"
)

// TestGraftsAreOneInstant gives pairs of units from disk to disk, in circles,
// while the first disk is written, unit by unit, and the others are flushed,
// pinned, snapshotted, reverted and resized: the two units of a pair are at
// every instant and on every disk of the same number, or the first one is the
// next. Sources are deleted, closed, and lose their contents meanwhile, and calls are cancelled.
func TestGraftsAreOneInstant(t *testing.T) {
	ctx := context.Background()
	m := vfs.NewMem(0)
	o := tinyOptions()
	o.LogBytes = 1 << 20
	s, err := Create(ctx, m, o)
	if err != nil {
		t.Fatal(err)
	}
	const volumes, pairs, apart, rounds = 4, 6, 37, 40
	u := int64(tiny.UnitSize)
	size := u * (apart + pairs)
	disks := make([]*Disk, volumes)
	for i := range disks {
		disks[i] = newDisk(t, s, byte(i+1), size, nil)
	}
	pair := func(to, from int64) []RangeClone {
		return []RangeClone{unitRange(to, from, 1), unitRange(to+apart, from+apart, 1)}
	}
	check := func(id ID) error {
		d, err := s.OpenDisk(ctx, id, Pinned)
		if err != nil {
			return err
		}
		p := make([]byte, size)
		if _, err := d.ReadAt(p, 0); err != nil {
			return err
		}
		for i := range int64(pairs) {
			a, err := readStamp(p[i*u : (i+1)*u])
			b, err2 := readStamp(p[(i+apart)*u : (i+apart+1)*u])
			if err := errors.Join(err, err2); err != nil {
				return err
			}
			if a != b && a != b+1 {
				return fmt.Errorf("pair %d of %v is %d and %d", i, id, a, b)
			}
		}
		return d.Close()
	}
	// meanwhile are the errors of a source that goes during the call.
	meanwhile := func(err error) bool {
		for _, e := range []error{ErrNotFound, ErrClosed, ErrNoData, context.Canceled} {
			if errors.Is(err, e) {
				return true
			}
		}
		return false
	}
	stop := make(chan struct{})
	var writer, wg sync.WaitGroup
	writer.Go(func() {
		b := make([]byte, u)
		for n := uint64(1); ; n++ {
			for i := range int64(pairs) {
				stamp(b, n)
				for _, at := range []int64{i, i + apart} {
					if _, err := disks[0].WriteAt(b, at*u); err != nil {
						t.Error(err)
						return
					}
				}
			}
			select {
			case <-stop:
				return
			default:
			}
		}
	})
	worker := func(k int, f func(rng *rand.Rand, id ID) error) {
		wg.Go(func() {
			rng := rand.New(rand.NewPCG(uint64(k), 9))
			for n := range rounds {
				if err := f(rng, ID{byte(10 + k), byte(n)}); err != nil {
					t.Errorf("worker %d: %v", k, err)
					return
				}
			}
		})
	}
	for k := range 3 {
		worker(k, func(rng *rand.Rand, _ ID) error {
			to, from := 1+rng.IntN(volumes-1), rng.IntN(volumes)
			err := s.CloneRanges(ctx, disks[to], disks[from], pair(rng.Int64N(pairs), rng.Int64N(pairs)))
			if err == nil {
				err = check(ID{byte(to + 1)})
			}
			return err
		})
	}
	worker(3, func(rng *rand.Rand, id ID) error {
		from := ID{byte(1 + rng.IntN(volumes))}
		if _, err := s.Snapshot(ctx, []Pair{{Src: from, New: id}}); err != nil {
			return err
		}
		d, err := s.OpenDisk(ctx, id, Mode(rng.IntN(2)))
		if err != nil {
			return err
		}
		ctx, cancel := context.WithCancel(ctx)
		defer cancel()
		var gone sync.WaitGroup
		kind := rng.IntN(4)
		gone.Go(func() {
			var err error
			switch kind {
			case 0:
				err = s.Delete(context.Background(), id)
			case 1:
				err = d.Close()
			case 2:
				err = s.DestroyData(context.Background(), id)
			case 3:
				cancel()
			}
			if err != nil {
				t.Error(err)
			}
		})
		to := 1 + rng.IntN(volumes-1)
		err = s.CloneRanges(ctx, disks[to], d, pair(rng.Int64N(pairs), rng.Int64N(pairs)))
		gone.Wait()
		if err != nil && !meanwhile(err) {
			return err
		}
		if kind != 1 {
			err = d.Close()
		} else {
			err = nil
		}
		if kind != 0 {
			err = errors.Join(err, s.Delete(context.Background(), id))
		}
		return errors.Join(err, check(ID{byte(to + 1)}))
	})
	worker(4, func(rng *rand.Rand, id ID) error {
		from, to := ID{byte(1 + rng.IntN(volumes))}, ID{byte(2 + rng.IntN(volumes-1))}
		if _, err := s.Snapshot(ctx, []Pair{{Src: from, New: id}}); err != nil {
			return err
		}
		grown := size + u*(1+rng.Int64N(2000))
		_, err := s.Resize(ctx, to, grown)
		err = errors.Join(err, check(id), s.Revert(ctx, to, id), check(to))
		_, err2 := s.Resize(ctx, to, size)
		return errors.Join(err, err2, s.Delete(ctx, id))
	})
	worker(5, func(rng *rand.Rand, id ID) error {
		i := rng.IntN(volumes)
		return errors.Join(disks[i].Flush(ctx), check(ID{byte(i + 1)}))
	})
	wg.Wait()
	close(stop)
	writer.Wait()
	for i := range disks {
		if err := check(ID{byte(i + 1)}); err != nil {
			t.Error(err)
		}
	}
	for p, err := range s.Check(ctx) {
		t.Errorf("online: %v %v", p, err)
	}
	if err := errors.Join(drain(s), checkClean(m.Kill())); err != nil {
		t.Error(err)
	}
	if s.space.reserved != 0 && len(s.changedVolumes()) == 0 {
		t.Errorf("%d units are promised in the end", s.space.reserved)
	}
	if err := errors.Join(s.Close(), checkClean(m)); err != nil {
		t.Error(err)
	}
}

// TestGraftsInAFullStore gives scattered ranges in a store that is full most of
// the time, while it is written and snapshots come and go, and cancels some of
// it: what there is no room for is refused, no checkpoint fails for it, and all
// promises are given back.
func TestGraftsInAFullStore(t *testing.T) {
	ctx := context.Background()
	m := vfs.NewMem(0)
	o := tinyOptions()
	o.LogBytes = 1 << 20
	o.MaxBytes = 20 * o.Geometry.regionBytes()
	s, err := Create(ctx, m, o)
	if err != nil {
		t.Fatal(err)
	}
	const units, rounds = 4096, 60
	u := int64(tiny.UnitSize)
	var disks [4]*Disk
	for i := range disks {
		disks[i] = newDisk(t, s, byte(i+1), units*u, nil)
	}
	clone := func(rng *rand.Rand, to, from *Disk) error {
		var ranges []RangeClone
		for range 1 + rng.IntN(60) {
			n := 1 + rng.Int64N(3)
			ranges = append(ranges, unitRange(rng.Int64N(units-n), rng.Int64N(units-n), n))
		}
		ctx, cancel := context.WithCancel(ctx)
		defer cancel()
		if rng.IntN(3) == 0 {
			go cancel()
		}
		return s.CloneRanges(ctx, to, from, ranges)
	}
	var refused atomic.Int64
	var wg sync.WaitGroup
	for k := range 4 {
		wg.Go(func() {
			rng := rand.New(rand.NewPCG(7, uint64(k)))
			for n := range rounds {
				var err error
				d := disks[rng.IntN(len(disks))]
				switch id := (ID{99, byte(n)}); {
				case k == 0:
					_, err = d.WriteAt(noise(int(u)*(1+rng.IntN(20))), u*rng.Int64N(units-20))
				case k == 1 && n%10 == 9:
					if _, err = s.Snapshot(ctx, []Pair{{Src: d.id, New: id}}); err == nil {
						err = s.Delete(ctx, id)
					}
				case rng.IntN(8) == 0:
					err = d.Zero(ctx, 0, units*u/2)
				default:
					err = clone(rng, disks[rng.IntN(len(disks))], d)
				}
				switch {
				case errors.Is(err, ErrNoSpace):
					refused.Add(1)
				case err != nil && !errors.Is(err, context.Canceled):
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()
	if refused.Load() == 0 {
		t.Error("the store has never been full")
	}
	if err := errors.Join(s.Failed(), drain(s), checkClean(m.Kill())); err != nil {
		t.Error(err)
	}
	if n := s.space.reserved; n != 0 {
		t.Errorf("%d units are promised in the end", n)
	}
	if err := errors.Join(s.Close(), checkClean(m)); err != nil {
		t.Error(err)
	}
}
