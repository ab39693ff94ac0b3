package storagetest

import (
	"io"
	"math/rand/v2"
	"slices"

	"coppice/internal/storage"
)

// testReadWrite compares reads and writes of every alignment with a slice.
func testReadWrite(s *suite) {
	const size = 40 * unit
	id := s.create(size)
	v, other := s.live(id), s.live(id)
	model := make([]byte, size)
	rng := rand.New(rand.NewPCG(1, 1))
	for i := range 400 {
		off := rng.Int64N(size)
		n := 1 + rng.Int64N(min(3*unit, size-off))
		switch rng.IntN(4) {
		case 0:
			off = off &^ (unit - 1)
			n = min(unit*(1+rng.Int64N(3)), size-off)
		case 1:
			n = min(n, 512)
		}
		p := noise(i, int(n))
		s.write(v, p, off)
		copy(model[off:], p)
		// Another handle sees it at once.
		at := max(0, off-rng.Int64N(unit))
		k := min(size-at, n+rng.Int64N(2*unit))
		s.wantBytes(s.read(other, at, k), model[at:at+k])
	}
	s.wantVolume(v, model)
	s.flush(v)
	s.wantContents(id, model)
	s.wantContents(s.snapshot(id), model)
}

func testBounds(s *suite) {
	const size = 2 * unit
	id, data := s.filled(1, size)
	v, pin, snap := s.live(id), s.open(id, storage.Pinned), s.live(s.snapshot(id))
	for _, r := range []storage.Volume{v, pin, snap} {
		for _, c := range []struct {
			off, n int64
			want   int
			err    error
		}{
			{0, size + 1, size, io.EOF},
			{size - 1, 2, 1, io.EOF},
			{size, 1, 0, io.EOF},
			{size + 5*unit, 1, 0, io.EOF},
			{1, 0, 0, nil},
		} {
			p := make([]byte, c.n)
			n, err := r.ReadAt(p, c.off)
			if n != c.want || err != c.err {
				s.Errorf("ReadAt(%d bytes, %d) = %d, %v; want %d, %v", c.n, c.off, n, err, c.want, c.err)
			}
			if n > 0 {
				s.wantBytes(p[:n], data[c.off:][:n])
			}
		}
		_, err := r.ReadAt(make([]byte, 1), -1)
		s.wantErr(err, storage.ErrInvalid)
	}
	for _, c := range []struct{ off, n int64 }{{-1, 1}, {size, 1}, {size - 1, 2}, {0, size + 1}, {1 << 62, 1}} {
		n, err := v.WriteAt(make([]byte, c.n), c.off)
		if n != 0 {
			s.Errorf("WriteAt(%d bytes, %d) = %d", c.n, c.off, n)
		}
		s.wantErr(err, storage.ErrInvalid)
		s.wantErr(v.Zero(s.ctx, c.off, c.n), storage.ErrInvalid)
		for _, err := range v.Extents(s.ctx, c.off, c.n) {
			s.wantErr(err, storage.ErrInvalid)
		}
	}
	s.wantErr(v.Zero(s.ctx, 0, -1), storage.ErrInvalid)
	s.wantErr(v.Zero(s.ctx, unit, 1<<62), storage.ErrInvalid)
	s.write(v, nil, size)
	s.zero(v, size, 0)
	for _, ro := range []storage.Volume{pin, snap} {
		n, err := ro.WriteAt([]byte("x"), 0)
		if n != 0 {
			s.Errorf("a read-only volume took %d bytes", n)
		}
		s.wantErr(err, storage.ErrReadOnly)
		s.wantErr(ro.Zero(s.ctx, 0, unit), storage.ErrReadOnly)
		s.flush(ro)
		s.wantVolume(ro, data)
	}
	s.wantVolume(v, data)
}

// testWriteBulk expects bulk writes to be writes.
func testWriteBulk(s *suite) {
	const size = 4 * mib
	id, data := s.filled(1, size)
	snap := s.snapshot(id)
	before := slices.Clone(data)
	v := s.live(id)
	for i, c := range []struct{ off, n int }{{0, mib}, {mib + 7, mib}, {100, 9}, {3 * mib, mib}, {0, size}, {size, 0}} {
		p := noise(i+2, c.n)
		if n, err := storage.WriteBulk(v, p, int64(c.off)); n != c.n || err != nil {
			s.Errorf("WriteBulk(%d bytes, %d) = %d, %v", c.n, c.off, n, err)
		}
		copy(data[c.off:], p)
		s.wantVolume(v, data)
	}
	n, err := storage.WriteBulk(v, make([]byte, mib), size-1)
	if n != 0 {
		s.Errorf("WriteBulk past the end = %d", n)
	}
	s.wantErr(err, storage.ErrInvalid)
	s.flush(v)
	s.wantVolume(v, data)

	s.wantContents(snap, before)
	_, err = storage.WriteBulk(s.live(snap), make([]byte, mib), 0)
	s.wantErr(err, storage.ErrReadOnly)
}

func testLargeIO(s *suite) {
	const size = 12 * mib
	id, data := s.filled(1, size)
	s.wantContents(id, data)
	v := s.live(id)
	p := noise(2, 5*mib+5)
	s.write(v, p, 3*mib-7)
	copy(data[3*mib-7:], p)
	s.wantVolume(v, data)
	s.flush(v)
	s.wantVolume(v, data)
}

// testSparse writes far apart in a huge volume.
func testSparse(s *suite) {
	id := s.create(100 * tib)
	v := s.live(id)
	offs := []int64{0, 1*mib - 2, 1 << 30, 16 * tib, 64*tib + 5, 100*tib - 3000}
	for i, off := range offs {
		s.write(v, noise(i, 3000), off)
	}
	snap := s.live(s.snapshot(id))
	s.flush(v)
	for _, v := range []storage.Volume{v, snap} {
		for i, off := range offs {
			s.wantBytes(s.read(v, off, 3000), noise(i, 3000))
		}
		s.wantBytes(s.read(v, 50*tib, 100), make([]byte, 100))
		if data := s.dataBytes(v, 0, v.Size()); data > 64*mib {
			s.Errorf("%d bytes of data extents in a volume with 18000", data)
		}
	}
	s.zero(v, 0, 100*tib)
	if data := s.dataBytes(v, 0, v.Size()); data != 0 {
		s.Errorf("%d bytes of data extents in a zeroed volume", data)
	}
	for i, off := range offs {
		s.wantBytes(s.read(v, off, 3000), make([]byte, 3000))
		s.wantBytes(s.read(snap, off, 3000), noise(i, 3000))
	}
}

// testZeroWrites checks that zeros that are written take no space.
func testZeroWrites(s *suite) {
	id := s.create(8 * mib)
	v := s.live(id)
	s.write(v, make([]byte, 8*mib), 0)
	if n := s.dataBytes(v, 0, 8*mib); n != 0 {
		s.Errorf("%d bytes of data after writing zeros", n)
	}
	data := noise(1, 8*mib)
	s.write(v, data, 0)
	s.write(v, make([]byte, 3*mib), mib)
	clear(data[mib : 4*mib])
	s.wantVolume(v, data)
	if n := s.dataBytes(v, mib, 3*mib); n != 0 {
		s.Errorf("%d bytes of data under zeros", n)
	}
	s.flush(v)
	s.wantVolume(v, data)
	if n := s.dataBytes(v, mib, 3*mib); n != 0 {
		s.Errorf("%d bytes of data under zeros after a flush", n)
	}
}

func testZero(s *suite) {
	const size = 64 * unit
	id, model := s.filled(1, size)
	v := s.live(id)
	snap := s.snapshot(id)
	before := append([]byte(nil), model...)
	rng := rand.New(rand.NewPCG(2, 2))
	for i := range 200 {
		off := rng.Int64N(size)
		n := rng.Int64N(min(size-off, 8*unit) + 1)
		if rng.IntN(3) == 0 {
			off, n = off&^(unit-1), n&^(unit-1)
		}
		s.zero(v, off, n)
		clear(model[off : off+n])
		if i%3 == 0 {
			p := noise(i, int(n))
			s.write(v, p, off)
			copy(model[off:], p)
		}
		if i%50 == 0 {
			s.flush(v)
		}
		s.wantVolume(v, model)
	}
	s.zero(v, 0, size)
	s.wantVolume(v, make([]byte, size))
	if n := s.dataBytes(v, 0, size); n != 0 {
		s.Errorf("%d bytes of data in a zeroed volume", n)
	}
	s.wantContents(snap, before)
}

// extents returns what v says about a range, after checking that it describes
// all of it in order.
func (s *suite) extents(v storage.Volume, off, n int64) []storage.Extent {
	s.Helper()
	var out []storage.Extent
	next := off
	for e, err := range v.Extents(s.ctx, off, n) {
		s.must(err)
		if e.Off != next || e.Len <= 0 || e.End() > off+n {
			s.Fatalf("extent %+v in [%d, %d) when %d is next", e, off, off+n, next)
		}
		next = e.End()
		out = append(out, e)
	}
	if next != off+n {
		s.Fatalf("the extents of [%d, %d) end at %d", off, off+n, next)
	}
	return out
}

// dataBytes returns how much of a range may hold data.
func (s *suite) dataBytes(v storage.Volume, off, n int64) int64 {
	s.Helper()
	var data int64
	for _, e := range s.extents(v, off, n) {
		if !e.Hole {
			data += e.Len
		}
	}
	return data
}

// wantExtents checks that no hole has anything but zeros, and that at most
// slack bytes of zeros are called data.
func (s *suite) wantExtents(v storage.Volume, model []byte, slack int64) {
	s.Helper()
	var called, have int64
	for _, e := range s.extents(v, 0, int64(len(model))) {
		if !e.Hole {
			called += e.Len
			continue
		}
		if !isZero(model[e.Off:e.End()]) {
			s.Fatalf("the hole %+v has data", e)
		}
	}
	for part := range slices.Chunk(model, unit) {
		if !isZero(part) {
			have += unit
		}
	}
	if called > have+slack {
		s.Errorf("%d bytes of units with data, but %d bytes of data extents", have, called)
	}
}

func testExtents(s *suite) {
	const size = 300 * unit
	id := s.create(size)
	v := s.live(id)
	model := make([]byte, size)
	s.wantExtents(v, model, 0)
	rng := rand.New(rand.NewPCG(3, 3))
	for i := range 60 {
		off := rng.Int64N(size)
		n := rng.Int64N(min(size-off, 20*unit)) + 1
		if i%3 == 2 {
			s.zero(v, off, n)
			clear(model[off : off+n])
		} else {
			p := noise(i, int(n))
			s.write(v, p, off)
			copy(model[off:], p)
		}
		if i%20 == 0 {
			s.flush(v)
		}
		s.wantExtents(v, model, 0)
		from := rng.Int64N(size)
		s.extents(v, from, rng.Int64N(size-from+1))
	}
	snap, pin := s.live(s.snapshot(id)), s.open(id, storage.Pinned)
	s.zero(v, 0, size)
	s.wantExtents(snap, model, 0)
	s.wantExtents(pin, model, 0)
	s.wantExtents(v, make([]byte, size), 0)
	if got := s.extents(v, 5, 0); len(got) != 0 {
		s.Errorf("an empty range has the extents %v", got)
	}
}

// testExtentsStop stops in the middle, and changes the volume meanwhile.
func testExtentsStop(s *suite) {
	id := s.create(100 * unit)
	v := s.live(id)
	for i := range int64(50) {
		s.write(v, noise(1, unit), 2*i*unit)
	}
	n := 0
	for _, err := range v.Extents(s.ctx, 0, 100*unit) {
		s.must(err)
		if n++; n == 3 {
			break
		}
	}
	for e, err := range v.Extents(s.ctx, 0, 100*unit) {
		s.must(err)
		if !e.Hole {
			s.zero(v, e.Off, e.Len)
		}
	}
	s.wantVolume(v, make([]byte, 100*unit))
}
