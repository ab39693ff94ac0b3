package storagetest

import (
	"context"
	"math/rand/v2"

	"coppice/internal/storage"
)

// testCloneRanges gives ranges from one volume to another, and to itself, and
// compares with copies. What is shared takes no room, and is independent.
func testCloneRanges(s *suite) {
	r := power[storage.RangeCloner](s)
	const size = 700 * unit
	from, theirs := s.filled(1, size)
	to, mine := s.filled(2, size)
	src, dst := s.live(from), s.live(to)
	s.zero(src, 50*unit, 300*unit)
	clear(theirs[50*unit : 350*unit])
	base := s.live(s.snapshot(to))
	rng := rand.New(rand.NewPCG(6, 6))
	touched := map[int64]bool{}
	some := func() (ranges []storage.RangeClone) {
		for range 1 + rng.IntN(4) {
			n := 1 + rng.Int64N(200)
			ranges = append(ranges, storage.RangeClone{To: rng.Int64N(701-n) * unit, From: rng.Int64N(701-n) * unit, Len: n * unit})
		}
		return ranges
	}
	for round := range 8 {
		ranges := some()
		source, old := src, theirs
		if round%3 == 2 {
			source, old = dst, append([]byte(nil), mine...)
		}
		s.must(r.CloneRanges(s.ctx, dst, source, ranges))
		for _, c := range ranges {
			copy(mine[c.To:c.To+c.Len], old[c.From:])
			for u := c.To / unit; u < (c.To+c.Len)/unit; u++ {
				touched[u] = true
			}
		}
		s.wantContents(to, mine)
		s.wantContents(from, theirs)
		p := noise(10+round, 3*unit)
		s.write(src, p, int64(round)*20*unit)
		copy(theirs[round*20*unit:], p)
		s.wantContents(to, mine)
	}
	if _, ok := s.Repo.(storage.Differ); ok {
		s.wantDiff(base, dst, func(off int64) bool { return touched[off/unit] })
	}
	pin := s.open(from, storage.Pinned)
	s.write(src, noise(30, size), 0)
	s.must(r.CloneRanges(s.ctx, dst, pin, []storage.RangeClone{{Len: size}}))
	s.wantContents(to, theirs)
	s.delete(from)
	s.wantContents(to, theirs)
	if s.Reopen != nil {
		s.Reopen()
		s.wantContents(to, theirs)
	}
}

// testCloneRangesInvalid has what cannot be done change nothing.
func testCloneRangesInvalid(s *suite) {
	r := power[storage.RangeCloner](s)
	from, _ := s.filled(1, 8*unit)
	to, mine := s.filled(2, 4*unit)
	src, dst := s.live(from), s.live(to)
	one := []storage.RangeClone{{Len: unit}}
	for _, c := range []storage.RangeClone{
		{To: 3 * unit, Len: 2 * unit},
		{From: 7 * unit, Len: 2 * unit},
		{From: -unit, Len: unit},
		{To: -unit, Len: unit},
		{To: unit, From: unit, Len: -unit},
		{To: 1, Len: unit},
		{From: 1, Len: unit},
		{Len: 1},
		{To: unit, Len: (1<<63 - 1) / unit * unit},
	} {
		s.wantErr(r.CloneRanges(s.ctx, dst, src, []storage.RangeClone{one[0], c}), storage.ErrInvalid)
	}
	large := s.live(s.create(2 << 30))
	s.wantErr(r.CloneRanges(s.ctx, large, large, []storage.RangeClone{{Len: unit}, {Len: storage.MaxRangeClone}}), storage.ErrInvalid)
	s.must(r.CloneRanges(s.ctx, large, large, []storage.RangeClone{{To: 1 << 30, Len: storage.MaxRangeClone}}))
	s.wantErr(r.CloneRanges(s.ctx, s.live(s.snapshot(to)), src, one), storage.ErrReadOnly)
	s.wantErr(r.CloneRanges(s.ctx, s.open(to, storage.Pinned), src, one), storage.ErrReadOnly)
	cancelled, cancel := context.WithCancel(s.ctx)
	cancel()
	s.wantErr(r.CloneRanges(cancelled, dst, src, one), context.Canceled)
	s.must(r.CloneRanges(s.ctx, dst, src, nil))
	gone := s.create(unit)
	v := s.live(gone)
	s.delete(gone)
	s.wantErr(r.CloneRanges(s.ctx, dst, v, one), storage.ErrNotFound)
	s.wantErr(r.CloneRanges(s.ctx, v, src, one), storage.ErrNotFound)
	closed := s.live(from)
	s.must(closed.Close())
	s.wantErr(r.CloneRanges(s.ctx, dst, closed, one), storage.ErrClosed)
	s.wantErr(r.CloneRanges(s.ctx, closed, src, one), storage.ErrClosed)
	s.wantContents(to, mine)
}
