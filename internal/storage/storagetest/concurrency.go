package storagetest

import (
	"encoding/binary"
	"errors"
	"io"
	"slices"
	"sync"
	"sync/atomic"

	"coppice/internal/storage"
)

// testConcurrentIO lets several writers fill interleaved stripes that share
// units, beside readers, flushes and snapshots.
func testConcurrentIO(s *suite) {
	const writers, stripe, rounds = 4, 1000, 100
	const size = (writers*stripe*rounds + unit - 1) &^ (unit - 1)
	id := s.create(size)
	v := s.live(id)
	var wg sync.WaitGroup
	for w := range writers {
		wg.Go(func() {
			p := noise(w, stripe)
			got := make([]byte, stripe)
			for i := range rounds {
				off := int64(i*writers+w) * stripe
				if _, err := v.WriteAt(p, off); err != nil {
					s.Errorf("WriteAt: %v", err)
					return
				}
				if _, err := v.ReadAt(got, off); err != nil || firstDifference(got, p) >= 0 {
					s.Errorf("writer %d does not read what it wrote at %d: %v", w, off, err)
					return
				}
			}
		})
	}
	wg.Go(func() {
		for i := range 20 {
			if err := v.Flush(s.ctx); err != nil {
				s.Errorf("Flush: %v", err)
			}
			if _, err := s.Repo.Snapshot(s.ctx, storage.Derived{Source: id, ID: testID(1000 + i)}); err != nil {
				s.Errorf("Snapshot: %v", err)
			}
			for _, err := range v.Extents(s.ctx, 0, size) {
				if err != nil {
					s.Errorf("Extents: %v", err)
				}
			}
		}
	})
	wg.Wait()
	want := make([]byte, size)
	for i := range writers * rounds {
		copy(want[i*stripe:], noise(i%writers, stripe))
	}
	s.wantVolume(v, want)
	s.check()
}

// testConcurrentVolumes lets several users work on volumes of their own.
func testConcurrentVolumes(s *suite) {
	var wg sync.WaitGroup
	for w := range 4 {
		wg.Go(func() {
			u := &user{suite: s, next: 1000 * (w + 1)}
			for i := range 8 {
				if err := u.round(i); err != nil {
					s.Errorf("user %d, round %d: %v", w, i, err)
					return
				}
			}
		})
	}
	for range 20 {
		for _, err := range s.Repo.List(s.ctx) {
			if err != nil {
				s.Errorf("List: %v", err)
			}
		}
		if _, err := s.Repo.Usage(s.ctx); err != nil {
			s.Errorf("Usage: %v", err)
		}
	}
	wg.Wait()
	if got := s.list(); len(got) != 0 {
		s.Errorf("left over: %v", got)
	}
	s.check()
}

type user struct {
	*suite
	next int
}

func (u *user) id() storage.ID {
	u.next++
	return testID(u.next)
}

// round makes a volume, a snapshot and a clone, compares and deletes them.
func (u *user) round(i int) error {
	const size = 50 * unit
	disk, snap, clone := u.id(), u.id(), u.id()
	_, err := u.Repo.Create(u.ctx, storage.Spec{ID: disk, Size: size})
	if err != nil {
		return err
	}
	v, err := u.Repo.Open(u.ctx, disk, storage.Live)
	if err != nil {
		return err
	}
	defer v.Close()
	old, young := noise(u.next, size), noise(u.next+1, 9*unit)
	if _, err := v.WriteAt(old, 0); err != nil {
		return err
	}
	if _, err := u.Repo.Snapshot(u.ctx, storage.Derived{Source: disk, ID: snap}); err != nil {
		return err
	}
	if _, err := v.WriteAt(young, int64(i)*unit); err != nil {
		return err
	}
	if _, err := u.Repo.Clone(u.ctx, storage.Derived{Source: snap, ID: clone}); err != nil {
		return err
	}
	if err := v.Flush(u.ctx); err != nil {
		return err
	}
	changed := slices.Clone(old)
	copy(changed[i*unit:], young)
	for id, want := range map[storage.ID][]byte{disk: changed, snap: old, clone: old} {
		if err := u.compare(id, want); err != nil {
			return err
		}
		if err := u.Repo.Delete(u.ctx, id); err != nil {
			return err
		}
	}
	return nil
}

func (u *user) compare(id storage.ID, want []byte) error {
	v, err := u.Repo.Open(u.ctx, id, storage.Pinned)
	if err != nil {
		return err
	}
	defer v.Close()
	got := make([]byte, len(want))
	if _, err := v.ReadAt(got, 0); err != nil && err != io.EOF {
		return err
	}
	if firstDifference(got, want) >= 0 {
		return errors.New("wrong contents")
	}
	return nil
}

// clock is a writer that stores 1, 2, 3… in each of its places in turn.
type clock struct {
	places []place
	begun  atomic.Uint64 // the number that may be in the first place
	done   atomic.Uint64 // the number that is in all places
	stop   atomic.Bool
}

type place struct {
	v   storage.Volume
	off int64
}

func (c *clock) run() error {
	for n := uint64(1); !c.stop.Load(); n++ {
		c.begun.Store(n)
		for _, p := range c.places {
			if _, err := p.v.WriteAt(binary.LittleEndian.AppendUint64(nil, n), p.off); err != nil {
				return err
			}
		}
		c.done.Store(n)
	}
	return nil
}

// wantInstant checks that the numbers read from the places are those of one
// instant, not before the number low and not after high.
func (s *suite) wantInstant(numbers []uint64, low, high uint64) {
	s.Helper()
	for i, n := range numbers {
		if n < low || n > high {
			s.Fatalf("place %d has %d, want %d to %d", i, n, low, high)
		}
		if i > 0 && n > numbers[i-1] || n+1 < numbers[0] {
			s.Fatalf("the places have %v, which they never had at one instant", numbers)
		}
	}
}

func (s *suite) number(v storage.Volume, off int64) uint64 {
	s.Helper()
	return binary.LittleEndian.Uint64(s.read(v, off, 8))
}

// testSnapshotsUnderWrites checks that a snapshot holds what was written
// before it, nothing that was begun after it, and nothing in between twice.
func testSnapshotsUnderWrites(s *suite) {
	id := s.create(40 * mib)
	v := s.live(id)
	offs := []int64{0, 20*mib + 2*unit, 40*mib - 8, 512} // 512 is in a unit written before
	c := &clock{}
	for _, off := range offs {
		c.places = append(c.places, place{v, off})
	}
	var wg sync.WaitGroup
	wg.Go(func() {
		if err := c.run(); err != nil {
			s.Errorf("writer: %v", err)
		}
	})
	numbers := func(v storage.Volume) (out []uint64) {
		s.Helper()
		for _, off := range offs {
			out = append(out, s.number(v, off))
		}
		return out
	}
	for i := range 60 {
		low := c.done.Load()
		var view storage.Volume
		switch i % 3 {
		case 0:
			view = s.live(s.snapshot(id))
		case 1:
			view = s.open(id, storage.Pinned)
		case 2:
			view = s.live(s.clone(id))
		}
		high := c.begun.Load()
		got := numbers(view)
		s.wantInstant(got, low, high)
		if i%5 == 0 {
			s.flush(v)
		}
		if !slices.Equal(numbers(view), got) {
			s.Errorf("a view has changed")
		}
	}
	c.stop.Store(true)
	wg.Wait()
}

// testGroupInstant checks that a group of snapshots shows one instant.
func testGroupInstant(s *suite) {
	r := power[storage.GroupSnapshotter](s)
	c := &clock{}
	var ids []storage.ID
	for range 4 {
		id := s.create(mib)
		ids = append(ids, id)
		c.places = append(c.places, place{s.live(id), 5000})
	}
	slices.Reverse(c.places) // written in another order than that of the IDs
	var wg sync.WaitGroup
	wg.Go(func() {
		if err := c.run(); err != nil {
			s.Errorf("writer: %v", err)
		}
	})
	for range 40 {
		var ds []storage.Derived
		for _, id := range ids {
			ds = append(ds, storage.Derived{Source: id, ID: s.newID()})
		}
		low := c.done.Load()
		_, err := r.SnapshotGroup(s.ctx, ds)
		s.must(err)
		high := c.begun.Load()
		var numbers []uint64
		for _, d := range slices.Backward(ds) {
			numbers = append(numbers, s.number(s.live(d.ID), 5000))
		}
		s.wantInstant(numbers, low, high)
	}
	c.stop.Store(true)
	wg.Wait()
}

// testCloseUnderLoad closes the repo while it is in use.
func testCloseUnderLoad(s *suite) {
	id, _ := s.filled(1, mib)
	var wg sync.WaitGroup
	var started sync.WaitGroup
	use := func(call func(n int) error) {
		started.Add(1)
		wg.Go(func() {
			for n := 0; ; n++ {
				err := call(n)
				if n == 0 {
					started.Done()
				}
				if errors.Is(err, storage.ErrClosed) {
					return
				}
				if err != nil {
					s.Errorf("while closing: %v", err)
					return
				}
			}
		})
	}
	v := s.live(id)
	use(func(n int) error { _, err := v.WriteAt(noise(n, 5000), int64(n%200)*5000); return err })
	use(func(n int) error { _, err := v.ReadAt(make([]byte, 9000), int64(n%100)*5000); return err })
	use(func(int) error { return v.Flush(s.ctx) })
	use(func(n int) error {
		_, err := s.Repo.Snapshot(s.ctx, storage.Derived{Source: id, ID: testID(5000 + n)})
		return err
	})
	use(func(n int) error {
		w, err := s.Repo.Open(s.ctx, id, storage.Pinned)
		if err != nil {
			return err
		}
		return w.Close()
	})
	use(func(int) error {
		for _, err := range s.Repo.List(s.ctx) {
			if err != nil {
				return err
			}
		}
		return nil
	})
	use(func(n int) error { // writes while it goes through the extents
		for e, err := range v.Extents(s.ctx, 0, mib) {
			if err != nil {
				return err
			}
			if _, err := v.WriteAt(noise(n, 10), e.Off); err != nil {
				return err
			}
		}
		return nil
	})
	if r, ok := s.Repo.(storage.Differ); ok {
		use(func(n int) error {
			for e, err := range r.Diff(s.ctx, v, v, 0) {
				if err != nil {
					return err
				}
				if _, err := v.ReadAt(make([]byte, 10), e.Off); err != nil {
					return err
				}
			}
			_, err := s.Repo.Stat(s.ctx, id)
			return err
		})
	}
	started.Wait()
	s.must(s.Repo.Close())
	wg.Wait()
}
