package cow

import (
	"bytes"
	"context"
	"errors"
	"math"
	"testing"

	"coppice/internal/vfs"
)

// bytesOf reads all of a disk.
func bytesOf(t *testing.T, d *Disk) []byte {
	t.Helper()
	p := make([]byte, d.Size())
	if _, err := d.ReadAt(p, 0); err != nil {
		t.Fatal(err)
	}
	return p
}

func mustWrite(t *testing.T, d *Disk, p []byte, unit int) {
	t.Helper()
	if _, err := d.WriteAt(p, int64(unit*d.s.geo.UnitSize)); err != nil {
		t.Fatal(err)
	}
}

// unitRange is a RangeClone in units of the tiny geometry.
func unitRange(to, from, n int64) RangeClone {
	u := int64(tiny.UnitSize)
	return RangeClone{To: to * u, From: from * u, Len: n * u}
}

// TestCloneRanges gives away what is in a tree, what is only in memory, holes,
// and parts of chunks: the bytes are there at once and after a crash, take no
// room of their own, and neither disk sees what is written to the other then.
func TestCloneRanges(t *testing.T) {
	ctx := context.Background()
	m := vfs.NewMem(0)
	s, err := Create(ctx, m, tinyOptions())
	if err != nil {
		t.Fatal(err)
	}
	const units = 64
	u := tiny.UnitSize
	src, dst := newDisk(t, s, 1, int64(units*u), nil), newDisk(t, s, 2, int64(units*u), nil)
	mustWrite(t, src, noise(30*u), 3)
	mustWrite(t, dst, noise(5 * u)[u:], 20)
	if err := s.sync(ctx); err != nil {
		t.Fatal(err)
	}
	mustWrite(t, src, bytes.Repeat([]byte{7}, u), 10) // small: in memory
	mustWrite(t, src, noise(20 * u)[7*u:], 40)        // large: in the space files
	mustWrite(t, dst, bytes.Repeat([]byte{8}, u), 63)
	if _, err := s.Snapshot(ctx, []Pair{{Src: ID{2}, New: ID{3}}}); err != nil {
		t.Fatal(err)
	}
	ranges := []RangeClone{unitRange(9, 2, 20), unitRange(31, 38, 9), unitRange(0, 60, 2), unitRange(24, 10, 1)}
	from, want := bytesOf(t, src), bytesOf(t, dst)
	changed := make([]bool, units)
	for _, r := range ranges {
		copy(want[r.To:r.To+r.Len], from[r.From:])
		for i := r.To; i < r.To+r.Len; i += int64(u) {
			changed[i/int64(u)] = true
		}
	}
	if err := s.sync(ctx); err != nil {
		t.Fatal(err)
	}
	before, err := liveUnits(m.Kill())
	if err != nil {
		t.Fatal(err)
	}
	if err := s.CloneRanges(ctx, dst, src, ranges); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(bytesOf(t, dst), want) || !bytes.Equal(bytesOf(t, src), from) {
		t.Error("other bytes than those that were given")
	}
	after, err := liveUnits(m.Kill())
	if err != nil {
		t.Fatal(err)
	}
	if after-before >= 32 { // as many as have been given
		t.Errorf("%d units are in use, %d before", after, before)
	}
	old, err := s.OpenDisk(ctx, ID{3}, Live)
	if err != nil {
		t.Fatal(err)
	}
	differs := make([]bool, units)
	for e, err := range s.Diff(ctx, old, dst, 0) {
		if err != nil {
			t.Fatal(err)
		}
		for i := e.Off; i < e.Off+e.Len; i += int64(u) {
			differs[i/int64(u)] = true
		}
	}
	was := bytesOf(t, old)
	for i := range units {
		same := bytes.Equal(was[i*u:(i+1)*u], want[i*u:(i+1)*u])
		if !same && !differs[i] || differs[i] && !changed[i] {
			t.Errorf("unit %d: given %v, equal %v, in the difference %v", i, changed[i], same, differs[i])
		}
	}

	reopened, err := Open(ctx, m.Crash(func(int) int { return 0 }), tinyOptions())
	if err != nil {
		t.Fatal(err)
	}
	d, err := reopened.OpenDisk(ctx, ID{2}, Live)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(bytesOf(t, d), want) {
		t.Error("other bytes after a crash")
	}
	if err := reopened.Close(); err != nil {
		t.Fatal(err)
	}

	mustWrite(t, dst, bytes.Repeat([]byte{1}, 12*u), 9)
	if !bytes.Equal(bytesOf(t, src), from) {
		t.Error("the source has what was written to the other disk")
	}
	if err := s.Delete(ctx, ID{1}); err != nil {
		t.Fatal(err)
	}
	copy(want[9*u:], bytes.Repeat([]byte{1}, 12*u))
	if err := drain(s); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(bytesOf(t, dst), want) {
		t.Error("other bytes without the source")
	}
	if err := errors.Join(s.Close(), checkClean(m)); err != nil {
		t.Error(err)
	}
}

// TestCloneRangesInOneCut has three grafts in one cut, each of which takes what
// the one before gave, and one of a disk to itself, all of them shared with a
// snapshot that is deleted.
func TestCloneRangesInOneCut(t *testing.T) {
	ctx := context.Background()
	m := vfs.NewMem(0)
	s, err := Create(ctx, m, tinyOptions())
	if err != nil {
		t.Fatal(err)
	}
	const units = 40
	u := tiny.UnitSize
	disks := make([]*Disk, 4)
	want := make([][]byte, 4)
	for i := range disks {
		disks[i] = newDisk(t, s, byte(4-i), units*int64(u), nil) // against the order of numbers
		mustWrite(t, disks[i], noise(31 * u)[i*u:], i)
		want[i] = bytesOf(t, disks[i])
	}
	if _, err := s.Snapshot(ctx, []Pair{{Src: ID{2}, New: ID{9}}}); err != nil {
		t.Fatal(err)
	}
	if err := s.Delete(ctx, ID{9}); err != nil {
		t.Fatal(err)
	}
	steps := []struct {
		to, from int
		r        RangeClone
	}{
		{1, 0, unitRange(5, 1, 30)},
		{2, 1, unitRange(0, 3, 30)},
		{3, 2, unitRange(7, 7, 11)},
		{1, 1, unitRange(2, 9, 20)},
	}
	var queue []*request
	var grafts []*graft
	for _, st := range steps {
		g := &graft{ranges: []RangeClone{st.r}}
		queue = append(queue, &request{done: make(chan error, 1), do: func(*batch) error {
			s.mu.Lock()
			defer s.mu.Unlock()
			s.addGraft(disks[st.to].v, disks[st.from].v, g)
			return nil
		}})
		grafts = append(grafts, g)
		copy(want[st.to][st.r.To:], bytes.Clone(want[st.from][st.r.From:][:st.r.Len]))
	}
	s.waitMu.Lock()
	s.atCut = append(s.atCut, queue...)
	s.waitMu.Unlock()
	s.kick()
	for i, r := range queue {
		if err := errors.Join(<-r.done, grafts[i].err); err != nil {
			t.Fatal(err)
		}
	}
	for i, d := range disks {
		if !bytes.Equal(bytesOf(t, d), want[i]) {
			t.Errorf("disk %d has other bytes", i)
		}
	}
	if err := errors.Join(drain(s), checkClean(m.Kill()), s.Close(), checkClean(m)); err != nil {
		t.Error(err)
	}
}

// TestCloneRangesRefused has calls that cannot be done change nothing.
func TestCloneRangesRefused(t *testing.T) {
	ctx := context.Background()
	s, err := Create(ctx, vfs.NewMem(0), tinyOptions())
	if err != nil {
		t.Fatal(err)
	}
	other, err := Create(ctx, vfs.NewMem(0), tinyOptions())
	if err != nil {
		t.Fatal(err)
	}
	u := int64(tiny.UnitSize)
	src, dst := newDisk(t, s, 1, 8*u, nil), newDisk(t, s, 2, 4*u, nil)
	mustWrite(t, src, noise(int(8*u)), 0)
	foreign := newDisk(t, other, 1, 8*u, nil)
	if _, err := s.Snapshot(ctx, []Pair{{Src: ID{1}, New: ID{3}}, {Src: ID{1}, New: ID{4}}}); err != nil {
		t.Fatal(err)
	}
	open := func(id ID, m Mode) *Disk {
		t.Helper()
		d, err := s.OpenDisk(ctx, id, m)
		if err != nil {
			t.Fatal(err)
		}
		return d
	}
	snap, bare, gone, closed, pin := open(ID{3}, Live), open(ID{4}, Live), newDisk(t, s, 5, u, nil), open(ID{1}, Live), open(ID{1}, Pinned)
	if err := errors.Join(s.DestroyData(ctx, ID{4}), s.Delete(ctx, ID{5}), closed.Close()); err != nil {
		t.Fatal(err)
	}
	one := []RangeClone{unitRange(0, 0, 1)}
	cancelled, cancel := context.WithCancel(ctx)
	cancel()
	for _, c := range []struct {
		name     string
		ctx      context.Context
		to, from *Disk
		ranges   []RangeClone
		want     error
	}{
		{"behind the end", ctx, dst, src, []RangeClone{unitRange(3, 0, 2)}, ErrInvalid},
		{"behind the end of the source", ctx, src, dst, []RangeClone{unitRange(0, 3, 2)}, ErrInvalid},
		{"below zero", ctx, dst, src, []RangeClone{unitRange(0, -1, 1)}, ErrInvalid},
		{"negative", ctx, dst, src, []RangeClone{unitRange(1, 1, -1)}, ErrInvalid},
		{"overflow", ctx, dst, src, []RangeClone{{To: u, Len: 1<<62 + 1<<61}}, ErrInvalid},
		{"half a unit", ctx, dst, src, []RangeClone{{Len: u / 2}}, ErrInvalid},
		{"between units", ctx, dst, src, []RangeClone{{To: 1, Len: u}}, ErrInvalid},
		{"the second range", ctx, dst, src, append(one[:1:1], unitRange(4, 0, 1)), ErrInvalid},
		{"onto a snapshot", ctx, snap, src, one, ErrReadOnly},
		{"onto a pinned disk", ctx, pin, src, one, ErrReadOnly},
		{"without data", ctx, dst, bare, one, ErrNoData},
		{"deleted source", ctx, dst, gone, one, ErrNotFound},
		{"deleted target", ctx, gone, src, one, ErrNotFound},
		{"closed source", ctx, dst, closed, one, ErrClosed},
		{"closed target", ctx, closed, src, one, ErrClosed},
		{"another store", ctx, dst, foreign, one, ErrInvalid},
		{"cancelled", cancelled, dst, src, one, context.Canceled},
	} {
		if err := s.CloneRanges(c.ctx, c.to, c.from, c.ranges); !errors.Is(err, c.want) {
			t.Errorf("%s: %v, want %v", c.name, err, c.want)
		}
	}
	if err := s.CloneRanges(ctx, dst, src, nil); err != nil {
		t.Errorf("nothing: %v", err)
	}
	if !bytes.Equal(bytesOf(t, dst), make([]byte, 4*u)) {
		t.Error("the disk has changed")
	}
	if err := s.CloneRanges(ctx, dst, pin, one); err != nil || !bytes.Equal(bytesOf(t, dst)[:u], bytesOf(t, src)[:u]) {
		t.Errorf("from a pinned disk: %v", err)
	}
	if err := errors.Join(s.Close(), other.Close()); err != nil {
		t.Error(err)
	}
}

// TestCloneRangesOfDamage damages a leaf of the source: whether that is found
// before the checkpoint or by it, the call fails, the other disk is as it was,
// and the store goes on.
func TestCloneRangesOfDamage(t *testing.T) {
	ctx := context.Background()
	for _, late := range []bool{false, true} {
		m := vfs.NewMem(0)
		s, err := Create(ctx, m, tinyOptions())
		if err != nil {
			t.Fatal(err)
		}
		src := sparse(t, s, ID{1}, 20, nil)
		dst := newDisk(t, s, 2, src.Size(), nil)
		mustWrite(t, dst, noise(tiny.UnitSize), 5)
		want := bytesOf(t, dst)
		const chunk = 7
		leaf, err := s.leaf(s.byID[ID{1}].view.Load().base.root, chunk)
		if err != nil {
			t.Fatal(err)
		}
		damageUnit(t, m, tiny, leaf.addr)
		s.cache = newPageCache(64<<10, tiny.UnitSize) // nobody has it in memory
		fan := int64(tiny.Fanout)
		r := unitRange(fan, chunk*fan-3, 8)
		if late {
			g := &graft{ranges: []RangeClone{r}}
			err = s.commitAtCut(ctx, func(*batch) error {
				s.mu.Lock()
				defer s.mu.Unlock()
				s.addGraft(dst.v, src.v, g)
				return nil
			})
			if err != nil || g.errAt != chunk*fan*int64(tiny.UnitSize) {
				t.Errorf("the checkpoint: %v, and byte %d", err, g.errAt)
			}
			err = g.err
		} else {
			err = s.CloneRanges(ctx, dst, src, []RangeClone{r})
		}
		if !errors.Is(err, ErrCorrupt) {
			t.Errorf("late %v: %v", late, err)
		}
		if !bytes.Equal(bytesOf(t, dst), want) {
			t.Errorf("late %v: the disk has changed", late)
		}
		if err := s.CloneRanges(ctx, dst, src, []RangeClone{unitRange(0, 0, fan)}); err != nil {
			t.Errorf("late %v: what is whole: %v", late, err)
		}
		if err := s.Close(); err != nil {
			t.Fatal(err)
		}
		list, err := checked(m)
		if err != nil {
			t.Fatal(err)
		}
		for _, p := range list {
			if p.Volume == (ID{2}) {
				t.Errorf("late %v: a check finds %v", late, p)
			}
		}
	}
}

// TestUnitsWithAllReferences clones, and writes beside, a unit that has as many
// references as its counter can count: it is copied.
func TestUnitsWithAllReferences(t *testing.T) {
	ctx := context.Background()
	m := vfs.NewMem(0)
	s, err := Create(ctx, m, tinyOptions())
	if err != nil {
		t.Fatal(err)
	}
	u := tiny.UnitSize
	d, dst := newDisk(t, s, 1, int64(4*u), nil), newDisk(t, s, 2, int64(4*u), nil)
	want := append(noise(2*u), make([]byte, 2*u)...)
	mustWrite(t, d, want[:2*u], 0)
	if err := s.sync(ctx); err != nil {
		t.Fatal(err)
	}
	leaf, err := s.leafPage(d.v.view.Load().base.root, 0)
	if err != nil {
		t.Fatal(err)
	}
	counted := func(n uint32) (before uint32) {
		s.space.mu.Lock()
		defer s.space.mu.Unlock()
		p, i, err := s.space.counter(getEntry(leaf).addr)
		if err != nil {
			t.Fatal(err)
		}
		before, p.n[i] = p.n[i], n
		return before
	}
	counted(math.MaxUint32)
	if err := s.CloneRanges(ctx, dst, d, []RangeClone{unitRange(2, 0, 2)}); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(bytesOf(t, dst)[2*u:], want[:2*u]) {
		t.Error("other bytes in the clone")
	}
	if _, err := s.Snapshot(ctx, []Pair{{Src: ID{1}, New: ID{3}}}); err != nil {
		t.Fatal(err)
	}
	before := bytes.Clone(want)
	clear(want[u : 2*u])
	if err := errors.Join(d.Zero(ctx, int64(u), int64(u)), s.sync(ctx)); err != nil {
		t.Fatal(err)
	}
	if n := counted(1); n != math.MaxUint32 {
		t.Errorf("%d references are counted", n)
	}
	snap, err := s.OpenDisk(ctx, ID{3}, Live)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(bytesOf(t, d), want) || !bytes.Equal(bytesOf(t, snap), before) {
		t.Error("other bytes")
	}
	s.space.mu.Lock()
	p, _, err := s.space.counter(getEntry(leaf).addr)
	s.space.touch(p, getEntry(leaf).addr) // to be written as it is now
	s.space.mu.Unlock()
	if err != nil {
		t.Fatal(err)
	}
	mustWrite(t, d, noise(u), 3)
	if err := errors.Join(drain(s), s.Close(), checkClean(m)); err != nil {
		t.Error(err)
	}
}
