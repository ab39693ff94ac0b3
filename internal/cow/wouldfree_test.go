package cow

import (
	"context"
	"errors"
	"math/rand/v2"
	"slices"
	"sync"
	"sync/atomic"
	"testing"

	"coppice/internal/vfs"
)

// drain makes checkpoints until nothing is left to be reaped.
func drain(s *Store) error {
	for {
		if err := s.sync(context.Background()); err != nil {
			return err
		}
		if !s.reaping.Load() {
			return errors.Join(s.sync(context.Background()), s.awaitReleases(context.Background()))
		}
	}
}

// liveUnits counts the units of a store that nobody has open which somebody
// refers to, those of the volume table left out.
func liveUnits(m *vfs.Mem) (n int64, err error) {
	im, err := readImage(m, Options{})
	if err != nil {
		return 0, err
	}
	defer func() { err = errors.Join(err, im.close()) }()
	im.pageReader = im.newReader(1 << 20)
	for _, r := range im.space.regions {
		n += int64(im.super.geo.dataUnits()) - int64(r.rec.free)
	}
	var walk func(e entry) error
	walk = func(e entry) error {
		if e.isHole() {
			return nil
		}
		n--
		if e.twice {
			n--
		}
		if e.kind == kindData {
			return nil
		}
		b, err := im.page(e)
		for i := 0; err == nil && i < im.super.geo.Fanout; i++ {
			err = walk(getEntry(b[i*entrySize:]))
		}
		return err
	}
	return n, walk(im.super.table)
}

// TestWouldFree compares what WouldFree says of random sets of volumes of
// random stores with what comes back when they are deleted.
func TestWouldFree(t *testing.T) {
	ctx := context.Background()
	for seed := range uint64(60) {
		rng := rand.New(rand.NewPCG(seed, 21))
		w, err := newWorld(tinyOptions())
		if err != nil {
			t.Fatal(err)
		}
		ops := randomOps(rng, 60)
		for _, o := range ops {
			switch o.kind {
			case "crash", "midcrash", "kill", "check", "pin":
				continue
			}
			if err := w.step(o); err != nil {
				t.Fatalf("seed %d: %v", seed, err)
			}
		}
		if err := drain(w.s); err != nil {
			t.Fatal(err)
		}
		var all []ID
		for i := range w.s.List() {
			all = append(all, i.ID)
		}
		for range 4 {
			set := slices.DeleteFunc(slices.Clone(all), func(ID) bool { return rng.IntN(3) == 0 })
			f, err := w.s.WouldFree(ctx, append(set, set...)...)
			if err != nil || !f.Exact {
				t.Fatalf("seed %d: %+v, %v", seed, f, err)
			}
			again, err := w.s.WouldFree(ctx, set...)
			if err != nil || again != f {
				t.Fatalf("seed %d: first %+v, then %+v, %v", seed, f, again, err)
			}
			m := w.mem.Kill()
			before, err := liveUnits(m)
			if err != nil {
				t.Fatal(err)
			}
			s, err := Open(ctx, m, w.opts)
			if err != nil {
				t.Fatal(err)
			}
			for _, id := range set {
				if err := s.Delete(ctx, id); err != nil {
					t.Fatal(err)
				}
			}
			if err := errors.Join(drain(s), s.Close()); err != nil {
				t.Fatal(err)
			}
			after, err := liveUnits(m)
			if err != nil {
				t.Fatal(err)
			}
			if got := (before - after) * int64(tiny.UnitSize); got != f.Bytes {
				t.Fatalf("seed %d: deleting %d of %d volumes frees %d bytes, WouldFree says %d", seed, len(set), len(all), got, f.Bytes)
			}
			if len(set) == len(all) && after != 0 {
				t.Fatalf("seed %d: %d units are left of nothing", seed, after)
			}
		}
		if err := w.s.Close(); err != nil {
			t.Fatal(err)
		}
	}
}

// TestWouldFreeOfPinned: what an open disk holds does not come back.
func TestWouldFreeOfPinned(t *testing.T) {
	ctx := context.Background()
	s, err := Create(ctx, vfs.NewMem(0), tinyOptions())
	if err != nil {
		t.Fatal(err)
	}
	if _, err := s.WouldFree(ctx, ID{1}); !errors.Is(err, ErrNotFound) {
		t.Errorf("a volume that is not there: %v", err)
	}
	u := int64(tiny.UnitSize)
	d := newDisk(t, s, 1, 4*u, nil)
	if _, err := d.WriteAt(noise(int(3*u)), 0); err != nil {
		t.Fatal(err)
	}
	expect := func(want int64) {
		t.Helper()
		if err := drain(s); err != nil {
			t.Fatal(err)
		}
		if f, err := s.WouldFree(ctx, ID{1}); err != nil || f.Bytes != want || !f.Exact || f.At.IsZero() {
			t.Errorf("%+v, %v; want %d bytes", f, err, want)
		}
	}
	expect(4 * u) // three units and their leaf
	pin, err := s.OpenDisk(ctx, ID{1}, Pinned)
	if err != nil {
		t.Fatal(err)
	}
	expect(0)
	if err := pin.Close(); err != nil {
		t.Fatal(err)
	}
	expect(4 * u)
	gone, cancel := context.WithCancel(ctx)
	cancel()
	s.trees <- struct{}{} // as a checkpoint does
	if _, err := s.WouldFree(gone, ID{1}); !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled: %v", err)
	}
	<-s.trees
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
}

// TestWouldFreeUnderLoad asks while checkpoints are made one after the other.
func TestWouldFreeUnderLoad(t *testing.T) {
	ctx := context.Background()
	m := vfs.NewMem(0)
	s, err := Create(ctx, m, tinyOptions())
	if err != nil {
		t.Fatal(err)
	}
	const size = 64 << 10
	d := newDisk(t, s, 1, size, []byte("a"))
	var stop atomic.Bool
	var wg sync.WaitGroup
	wg.Go(func() {
		rng := rand.New(rand.NewPCG(1, 1))
		for n := 0; !stop.Load(); n++ {
			if _, err := d.WriteAt([]byte{byte(n)}, rng.Int64N(size)); err != nil {
				t.Error(err)
			}
			if n%10 == 0 {
				if _, err := s.Snapshot(ctx, []Pair{{Src: ID{1}, New: ID{2}}}); err != nil {
					t.Error(err)
				}
				if err := errors.Join(s.Delete(ctx, ID{2}), s.sync(ctx)); err != nil {
					t.Error(err)
				}
			}
		}
	})
	for range 200 {
		f, err := s.WouldFree(ctx, ID{1})
		if err != nil || f.Bytes < 0 || f.Bytes > 4*size {
			t.Errorf("%+v, %v", f, err)
		}
	}
	stop.Store(true)
	wg.Wait()
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	if err := checkClean(m); err != nil {
		t.Fatal(err)
	}
}
