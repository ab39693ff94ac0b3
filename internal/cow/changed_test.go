package cow

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"testing"

	"coppice/internal/vfs"
)

// TestDestroyData: what is left of a snapshot whose data is destroyed, what
// still works and what does not, at once, after a kill and after a checkpoint.
func TestDestroyData(t *testing.T) {
	ctx := context.Background()
	m := vfs.NewMem(0)
	s, err := Create(ctx, m, tinyOptions())
	if err != nil {
		t.Fatal(err)
	}
	u := int64(tiny.UnitSize)
	d := newDisk(t, s, 1, 16*u, []byte("blob"))
	p := noise(int(16 * u))
	if _, err := d.WriteAt(p, 0); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Snapshot(ctx, []Pair{{Src: ID{1}, New: ID{2}}}); err != nil {
		t.Fatal(err)
	}
	if err := d.Zero(ctx, 0, 12*u); err != nil { // the first 12 units are the snapshot's alone
		t.Fatal(err)
	}
	if err := drain(s); err != nil {
		t.Fatal(err)
	}
	before := s.Usage().Used
	snap, err := s.OpenDisk(ctx, ID{2}, Live)
	if err != nil {
		t.Fatal(err)
	}
	pin, err := s.OpenDisk(ctx, ID{2}, Pinned)
	if err != nil {
		t.Fatal(err)
	}
	if err := s.DestroyData(ctx, ID{1}); !errors.Is(err, ErrInvalid) {
		t.Errorf("of a disk: %v", err)
	}
	if err := s.DestroyData(ctx, ID{9}); !errors.Is(err, ErrNotFound) {
		t.Errorf("of nothing: %v", err)
	}
	for range 2 {
		if err := s.DestroyData(ctx, ID{2}); err != nil {
			t.Fatal(err)
		}
	}
	got := make([]byte, len(p))
	if _, err := pin.ReadAt(got, 0); err != nil || !bytes.Equal(got, p) {
		t.Errorf("a pinned disk has lost its contents (%v)", err)
	}
	if _, err := snap.ReadAt(got, 0); !errors.Is(err, ErrNoData) {
		t.Errorf("read of a disk that was open: %v", err)
	}
	for _, err := range snap.Extents(ctx, 0, 16*u) {
		if !errors.Is(err, ErrNoData) {
			t.Errorf("extents of a disk that was open: %v", err)
		}
	}
	check := func(s *Store) {
		t.Helper()
		for _, mode := range []Mode{Live, Pinned} {
			if _, err := s.OpenDisk(ctx, ID{2}, mode); !errors.Is(err, ErrNoData) {
				t.Errorf("open in mode %d: %v", mode, err)
			}
		}
		if _, err := s.Clone(ctx, Pair{Src: ID{2}, New: ID{3}}); !errors.Is(err, ErrNoData) {
			t.Errorf("clone: %v", err)
		}
		if _, err := s.Snapshot(ctx, []Pair{{Src: ID{2}, New: ID{3}}}); !errors.Is(err, ErrNoData) {
			t.Errorf("snapshot: %v", err)
		}
		if err := s.Revert(ctx, ID{1}, ID{2}); !errors.Is(err, ErrNoData) {
			t.Errorf("revert: %v", err)
		}
		i, err := s.Stat(ctx, ID{2})
		if err != nil || !i.NoData || i.Size != 16*u || !i.ReadOnly || i.Used != 0 {
			t.Errorf("%+v, %v", i, err)
		}
		if i, err := s.Stat(ctx, ID{1}); err != nil || i.Parent != (ID{2}) || i.NoData {
			t.Errorf("the disk: %+v, %v", i, err)
		}
		if attrs, err := s.Attrs(ctx, ID{2}); err != nil || string(attrs) != "blob" {
			t.Errorf("attributes %q, %v", attrs, err)
		}
	}
	check(s)
	killed, err := Open(ctx, m.Kill(), tinyOptions())
	if err != nil {
		t.Fatal(err)
	}
	check(killed)
	if err := errors.Join(killed.Close(), pin.Close(), drain(s)); err != nil {
		t.Fatal(err)
	}
	if freed := before - s.Usage().Used; freed < 12*u {
		t.Errorf("%d bytes have come back, want at least %d", freed, 12*u)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	if err := checkClean(m); err != nil {
		t.Fatal(err)
	}
	if s, err = Open(ctx, m, tinyOptions()); err != nil {
		t.Fatal(err)
	}
	check(s)
	if err := errors.Join(s.Delete(ctx, ID{2}), s.Close(), checkClean(m)); err != nil {
		t.Fatal(err)
	}
}

// family is a store of relatives beside what each of them has, or had before
// its data was destroyed, and what it descends from.
type family struct {
	t    *testing.T
	rng  *rand.Rand
	m    *vfs.Mem
	s    *Store
	vols map[ID]*relative
	next byte
}

type relative struct {
	data   []byte
	ro     bool
	bare   bool
	parent ID
}

func (f *family) pick(ok func(*relative) bool) (ID, *relative) {
	var ids []ID
	for id, r := range f.vols {
		if ok(r) {
			ids = append(ids, id)
		}
	}
	if len(ids) == 0 {
		return ID{}, nil
	}
	slices.SortFunc(ids, func(a, b ID) int { return bytes.Compare(a[:], b[:]) })
	id := ids[f.rng.IntN(len(ids))]
	return id, f.vols[id]
}

func (f *family) descends(id, from ID) bool {
	for id != (ID{}) && id != from {
		id = f.vols[id].parent
	}
	return id == from
}

// step does one random thing to the store and to what is known of it.
func (f *family) step() error {
	ctx := context.Background()
	u := tiny.UnitSize
	live := func(r *relative) bool { return !r.ro }
	whole := func(r *relative) bool { return !r.bare }
	f.next++
	switch f.rng.IntN(14) {
	case 0, 1, 2, 3, 4, 5:
		id, r := f.pick(live)
		if r == nil || len(r.data) == 0 {
			return nil
		}
		d, err := f.s.OpenDisk(ctx, id, Live)
		if err != nil {
			return err
		}
		off := f.rng.IntN(len(r.data))
		n := f.rng.IntN(min(12*u, len(r.data)-off)) + 1
		if f.rng.IntN(3) == 0 {
			clear(r.data[off : off+n])
			return d.Zero(ctx, int64(off), int64(n))
		}
		copy(r.data[off:off+n], content(f.rng.Uint64(), n))
		if _, err := d.WriteAt(r.data[off:off+n], int64(off)); err != nil {
			return err
		}
		return d.Flush(ctx)
	case 6, 7, 8:
		id, r := f.pick(whole)
		if r == nil || len(f.vols) > 14 {
			return nil
		}
		n := &relative{data: bytes.Clone(r.data), ro: f.rng.IntN(3) > 0, parent: r.parent}
		if r.ro {
			n.parent = id
		}
		p := Pair{Src: id, New: ID{1, f.next}}
		f.vols[p.New] = n
		if !n.ro {
			_, err := f.s.Clone(ctx, p)
			return err
		}
		if !r.ro {
			r.parent = p.New
		}
		_, err := f.s.Snapshot(ctx, []Pair{p})
		return err
	case 9:
		id, r := f.pick(live)
		to, src := f.pick(whole)
		if r == nil || id == to {
			return nil
		}
		if r.data, r.parent = bytes.Clone(src.data), src.parent; src.ro {
			r.parent = to
		}
		return f.s.Revert(ctx, id, to)
	case 10:
		id, r := f.pick(live)
		if r == nil {
			return nil
		}
		grown := make([]byte, f.rng.IntN(60)*u)
		copy(grown, r.data)
		r.data = grown
		_, err := f.s.Resize(ctx, id, int64(len(grown)))
		return err
	case 11:
		id, r := f.pick(func(r *relative) bool { return r.ro })
		if r == nil {
			return nil
		}
		r.bare = true
		return f.s.DestroyData(ctx, id)
	case 12:
		id, r := f.pick(func(r *relative) bool { return len(f.vols) > 4 })
		if r == nil {
			return nil
		}
		delete(f.vols, id)
		for _, c := range f.vols {
			if c.parent == id {
				c.parent = r.parent
			}
		}
		return f.s.Delete(ctx, id)
	default:
		if f.rng.IntN(2) == 0 {
			return f.s.sync(ctx)
		}
		for id, r := range f.vols { // a kill keeps what was flushed
			if !r.ro {
				d, err := f.s.OpenDisk(ctx, id, Live)
				if err == nil {
					err = d.Flush(ctx)
				}
				if err != nil {
					return err
				}
			}
		}
		m := f.m.Kill()
		if err := f.s.Close(); err != nil {
			return err
		}
		var err error
		f.m = m
		f.s, err = Open(ctx, m, tinyOptions())
		return err
	}
}

// compare asks for what has changed between any two volumes.
func (f *family) compare() (answers int, err error) {
	ctx := context.Background()
	u := tiny.UnitSize
	for from, a := range f.vols {
		for to, b := range f.vols {
			if b.bare {
				continue
			}
			mode := Mode(f.rng.IntN(2))
			d, err := f.s.OpenDisk(ctx, to, mode)
			if err != nil {
				return answers, err
			}
			seen := make([]bool, len(b.data)/u)
			at, off := int64(0), int64(f.rng.IntN(len(b.data)+1))
			for e, err := range f.s.ChangedSince(ctx, from, d, off) {
				if err != nil {
					if errors.Is(err, ErrNoLineage) && a.bare && !f.descends(to, from) {
						seen = nil
						break
					}
					return answers, fmt.Errorf("%v since %v: %w", to, from, err)
				}
				if e.Off < max(at, off) || e.Len <= 0 || e.End() > int64(len(b.data)) {
					return answers, fmt.Errorf("%v since %v from %d: extent %+v behind %d", to, from, off, e, at)
				}
				at = e.End()
				if e.Hole && !onlyZeros(b.data[e.Off:e.End()]) {
					return answers, fmt.Errorf("%v since %v: %+v is no hole", to, from, e)
				}
				for i := e.Off / int64(u); i*int64(u) < e.End(); i++ {
					seen[i] = true
				}
			}
			if seen != nil {
				if a.bare && !f.descends(to, from) && int(off) < len(b.data) {
					return answers, fmt.Errorf("%v is no descendant of %v", to, from)
				}
				answers++
			}
			for i := range seen {
				lo, hi := i*u, (i+1)*u
				old := make([]byte, u)
				if lo < len(a.data) {
					copy(old, a.data[lo:])
				}
				if int64(lo) >= off && !seen[i] && !bytes.Equal(old, b.data[lo:hi]) {
					return answers, fmt.Errorf("%v since %v: unit %d differs and is left out", to, from, i)
				}
			}
			if err := d.Close(); err != nil {
				return answers, err
			}
		}
	}
	return answers, nil
}

func onlyZeros(b []byte) bool { return len(bytes.TrimLeft(b, "\x00")) == 0 }

// TestChangedSince compares ChangedSince with what random relatives have, and
// had before their data was destroyed.
func TestChangedSince(t *testing.T) {
	answers := 0
	for seed := range uint64(60) {
		rng := rand.New(rand.NewPCG(seed, 5))
		m := vfs.NewMem(0)
		s, err := Create(context.Background(), m, tinyOptions())
		if err != nil {
			t.Fatal(err)
		}
		f := &family{t: t, rng: rng, m: m, s: s, vols: map[ID]*relative{{1}: {data: make([]byte, 40*tiny.UnitSize)}}}
		if _, err := s.Create(context.Background(), ID{1}, 40*int64(tiny.UnitSize), nil); err != nil {
			t.Fatal(err)
		}
		for i := range 120 {
			err := f.step()
			n := 0
			if err == nil && i%15 == 14 {
				if n, err = f.compare(); err == nil {
					err = checkClean(f.m.Kill())
				}
			}
			if err != nil {
				t.Fatalf("seed %d, step %d: %v", seed, i, err)
			}
			answers += n
		}
		if err := f.s.Close(); err != nil {
			t.Fatal(err)
		}
	}
	if answers < 1000 {
		t.Errorf("only %d answers", answers)
	}
}

// TestChangedSinceIsNarrow: what was not written since is not listed, however
// large the disk, and what was discarded is one extent.
func TestChangedSinceIsNarrow(t *testing.T) {
	ctx := context.Background()
	s, err := Create(ctx, vfs.NewMem(0), Options{})
	if err != nil {
		t.Fatal(err)
	}
	d := sparse(t, s, ID{1}, 300, nil)
	if _, err := s.Resize(ctx, ID{1}, 1<<40); err != nil {
		t.Fatal(err)
	}
	if _, err := d.WriteAt([]byte("end"), 1<<40-3); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Snapshot(ctx, []Pair{{Src: ID{1}, New: ID{2}}}); err != nil {
		t.Fatal(err)
	}
	if err := s.DestroyData(ctx, ID{2}); err != nil {
		t.Fatal(err)
	}
	if _, err := d.WriteAt([]byte("new"), 5<<20); err != nil {
		t.Fatal(err)
	}
	if err := d.Zero(ctx, 100<<20, 896<<30-100<<20); err != nil {
		t.Fatal(err)
	}
	want := []Extent{{Off: 5 << 20, Len: 4096}, {Off: 100 << 20, Len: 896<<30 - 100<<20, Hole: true}}
	for _, place := range []string{"layers", "tree"} {
		var got []Extent
		for e, err := range s.ChangedSince(ctx, ID{2}, d, 0) {
			if err != nil {
				t.Fatal(err)
			}
			got = append(got, e)
		}
		if !slices.Equal(got, want) {
			t.Errorf("in %s: %+v, want %+v", place, got, want)
		}
		if err := s.sync(ctx); err != nil {
			t.Fatal(err)
		}
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
}
