package storagetest

import (
	"math/rand/v2"
	"slices"

	"coppice/internal/storage"
)

// diff returns the extents between two volumes, after checking their order.
func (s *suite) diff(from, to storage.Volume, off int64) []storage.Extent {
	s.Helper()
	r := power[storage.Differ](s)
	var out []storage.Extent
	next := off
	for e, err := range r.Diff(s.ctx, from, to, off) {
		s.must(err)
		if e.Off < next || e.Len <= 0 || e.End() > to.Size() {
			s.Fatalf("extent %+v when %d of %d is next", e, next, to.Size())
		}
		next = e.End()
		out = append(out, e)
	}
	return out
}

// wantDiff checks that the diff, applied to from, gives to, that its holes
// are holes, and that no unit is in it of which changed says no.
func (s *suite) wantDiff(from, to storage.Volume, changed func(off int64) bool) {
	s.Helper()
	want := s.read(to, 0, to.Size())
	got := make([]byte, to.Size())
	copy(got, s.read(from, 0, min(from.Size(), to.Size())))
	for _, e := range s.diff(from, to, 0) {
		part := want[e.Off:e.End()]
		copy(got[e.Off:], part)
		if e.Hole && !isZero(part) {
			s.Fatalf("the hole %+v is none", e)
		}
		for off := e.Off; off < e.End(); off = (off/unit + 1) * unit {
			if !changed(off) {
				s.Fatalf("byte %d is in extent %+v and cannot have changed", off, e)
			}
		}
	}
	s.wantBytes(got, want)
}

func testDiffRelated(s *suite) {
	power[storage.Differ](s)
	const size = 600 * unit
	id, _ := s.filled(1, size)
	v := s.live(id)
	s.zero(v, 100*unit, 100*unit)
	none := func(int64) bool { return false }
	s.wantDiff(v, v, none)
	base := s.live(s.snapshot(id))
	s.wantDiff(base, v, none)
	s.wantDiff(v, base, none)

	touched := map[int64]bool{}
	inTouched := func(off int64) bool { return touched[off/unit] }
	rng := rand.New(rand.NewPCG(5, 5))
	for round := range 6 {
		for i := range 10 {
			off := rng.Int64N(size)
			n := 1 + rng.Int64N(min(size-off, 3*unit))
			if i%4 == 3 {
				s.zero(v, off, n)
			} else {
				s.write(v, noise(i, int(n)), off)
			}
			for u := off / unit; u*unit < off+n; u++ {
				touched[u] = true
			}
		}
		if round%2 == 1 {
			s.flush(v)
		}
		s.wantDiff(base, v, inTouched)
		s.wantDiff(v, base, inTouched)
		s.wantDiff(base, s.open(id, storage.Pinned), inTouched)
		s.wantDiff(base, s.live(s.snapshot(id)), inTouched)
		s.wantDiff(s.live(s.clone(id)), base, inTouched)
	}
	// A cousin, by way of a common ancestor.
	cousin := s.clone(s.snapshot(id))
	s.write(s.live(cousin), noise(9, unit), 7*unit)
	touched[7] = true
	s.wantDiff(base, s.live(cousin), inTouched)
	s.wantDiff(v, s.live(cousin), func(off int64) bool { return off/unit == 7 })
}

func testDiffUnrelated(s *suite) {
	power[storage.Differ](s)
	a, _ := s.filled(1, 64*unit)
	b, _ := s.filled(2, 64*unit)
	empty := s.live(s.create(64 * unit))
	va, vb := s.live(a), s.live(b)
	s.zero(vb, 10*unit, 20*unit)
	s.zero(va, 20*unit, 20*unit)
	s.wantDiff(va, vb, func(off int64) bool { return off < 20*unit || off >= 30*unit }) // both holes
	s.wantDiff(empty, vb, func(off int64) bool { return off < 10*unit || off >= 30*unit })
	s.wantDiff(vb, empty, func(off int64) bool { return off < 10*unit || off >= 30*unit })
	s.wantDiff(empty, empty, func(int64) bool { return false })
	if got := s.diff(empty, s.live(s.create(storage.MaxSize)), 0); len(got) != 0 {
		s.Errorf("two empty volumes differ in %v", got)
	}
}

func testDiffResized(s *suite) {
	power[storage.Differ](s)
	r := power[storage.Resizer](s)
	id, _ := s.filled(1, 100*unit)
	v := s.live(id)
	base := s.live(s.snapshot(id))
	resize := func(units int64) {
		s.Helper()
		_, err := r.Resize(s.ctx, id, units*unit)
		s.must(err)
	}
	resize(5000) // beyond a page of a map
	s.wantDiff(base, v, func(int64) bool { return false })
	s.write(v, noise(2, 3*unit), 4000*unit)
	s.wantDiff(base, v, func(off int64) bool { return off/unit >= 4000 && off/unit < 4003 })
	s.wantDiff(v, base, func(int64) bool { return false })
	resize(40)
	s.wantDiff(base, v, func(int64) bool { return false })
	s.wantDiff(v, base, func(off int64) bool { return off >= 40*unit })
	resize(200)
	s.wantDiff(base, v, func(off int64) bool { return off >= 40*unit && off < 100*unit })
	s.wantDiff(v, base, func(off int64) bool { return off >= 40*unit && off < 100*unit })
}

// testDiffResume stops after each extent and goes on in a new call.
func testDiffResume(s *suite) {
	r := power[storage.Differ](s)
	id := s.create(400 * unit)
	v := s.live(id)
	base := s.live(s.snapshot(id))
	for i := range int64(50) {
		s.write(v, noise(int(i), unit), (i*i%400)*unit)
	}
	to := s.open(id, storage.Pinned)
	whole := coverage(s.diff(base, to, 0))
	var parts []storage.Extent
	for off, more := int64(0), true; more; {
		more = false
		for e, err := range r.Diff(s.ctx, base, to, off) {
			s.must(err)
			parts = append(parts, e)
			off, more = e.End(), true
			break
		}
	}
	if got := coverage(parts); !slices.Equal(got, whole) {
		s.Errorf("in parts the diff covers %v, in one %v", got, whole)
	}
	for _, off := range []int64{0, 1, unit - 1, 5*unit + 100, 399 * unit, 400*unit - 1, 400 * unit} {
		want := make([]storage.Extent, 0, len(whole))
		for _, e := range whole {
			if e.End() > off {
				start := max(e.Off, off)
				want = append(want, storage.Extent{Off: start, Len: e.End() - start})
			}
		}
		if got := coverage(s.diff(base, to, off)); !slices.Equal(got, want) {
			s.Errorf("from %d on the diff covers %v, want %v", off, got, want)
		}
	}
}

// coverage joins neighbouring extents, whatever their kind.
func coverage(extents []storage.Extent) []storage.Extent {
	out := make([]storage.Extent, 0, len(extents))
	for _, e := range extents {
		if n := len(out); n > 0 && out[n-1].End() == e.Off {
			out[n-1].Len += e.Len
		} else {
			out = append(out, storage.Extent{Off: e.Off, Len: e.Len})
		}
	}
	return out
}

func testDiffInvalid(s *suite) {
	r := power[storage.Differ](s)
	v := s.live(s.create(4 * unit))
	gone, err := s.Repo.Open(s.ctx, s.create(unit), storage.Live)
	s.must(err)
	s.must(gone.Close())
	for _, c := range []struct {
		from, to storage.Volume
		off      int64
		err      error
	}{
		{v, v, -1, storage.ErrInvalid},
		{v, v, 4*unit + 1, storage.ErrInvalid},
		{foreign{v}, v, 0, storage.ErrInvalid},
		{v, foreign{v}, 0, storage.ErrInvalid},
		{v, gone, 0, storage.ErrClosed},
		{gone, v, 0, storage.ErrClosed},
	} {
		last := error(nil)
		for _, last = range r.Diff(s.ctx, c.from, c.to, c.off) {
		}
		s.wantErr(last, c.err)
	}
}

// foreign is a volume of no driver.
type foreign struct{ storage.Volume }
