package storagetest

import (
	"math/rand/v2"

	"coppice/internal/storage"

	"github.com/google/go-cmp/cmp"
)

// testReopen closes the repo in all kinds of states and opens it again.
func testReopen(s *suite) {
	if s.Reopen == nil {
		s.Skip("contents end with Close")
	}
	id, data := s.filled(1, 3*mib)
	v := s.live(id)
	s.flush(v)
	snap := s.snapshot(id)
	s.write(v, noise(2, mib), 12345) // never flushed
	young := s.read(v, 0, v.Size())
	clone := s.newID()
	_, err := s.Repo.Clone(s.ctx, storage.Derived{Source: snap, ID: clone, Attrs: noise(1, 9000)})
	s.must(err)
	dead, _ := s.filled(3, mib)
	s.open(dead, storage.Pinned) // pinned until the end
	s.delete(dead)
	for range 3 {
		before := map[storage.ID]storage.Info{}
		for info, err := range s.Repo.List(s.ctx) {
			s.must(err)
			before[info.ID] = info
		}
		s.Reopen()
		for info, err := range s.Repo.List(s.ctx) {
			s.must(err)
			if d := cmp.Diff(before[info.ID], info, ignoreUsed); d != "" {
				s.Errorf("Info (-before +after):\n%s", d)
			}
			delete(before, info.ID)
		}
		if len(before) != 0 {
			s.Errorf("lost: %v", before)
		}
		s.wantContents(id, young)
		s.wantContents(snap, data)
		s.wantContents(clone, data)
		s.write(s.live(id), []byte("more"), 77)
		copy(young[77:], "more")
		s.check()
	}
	_, err = v.ReadAt(make([]byte, 1), 0)
	s.wantErr(err, storage.ErrClosed)
}

// testCrash cuts the power again and again: what was flushed or is durable by
// contract stays, everything else is old or new, unit by unit.
func testCrash(s *suite) {
	if s.Crash == nil {
		s.Skip("power cuts cannot be simulated")
	}
	const size = 50 * unit
	rng := rand.New(rand.NewPCG(6, 6))
	id := s.create(size)
	model := newShadow(size)
	for round := range 12 {
		v := s.live(id)
		change := func(n int) {
			for i := range n {
				off := rng.IntN(size)
				p := noise(100*round+i, 1+rng.IntN(min(size-off, 4*unit)))
				s.write(v, p, int64(off))
				model.write(p, off)
			}
		}
		change(5)
		s.flush(v)
		model.flush()
		change(2)
		snap := s.snapshot(id)
		frozen := model.clone()
		change(3 * (round % 2))
		s.Crash(rng.IntN)
		s.wantContents(snap, frozen.data)
		if err := model.settle(s.read(s.live(id), 0, size)); err != nil {
			s.Fatalf("round %d: %v", round, err)
		}
		s.delete(snap)
		s.check()
	}
}
