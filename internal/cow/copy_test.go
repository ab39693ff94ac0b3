package cow

import (
	"bytes"
	"context"
	"errors"
	"testing"

	"coppice/internal/vfs"
)

// damageUnit flips a bit of a unit.
func damageUnit(t *testing.T, m *vfs.Mem, g Geometry, addr uint64) {
	t.Helper()
	perFile := uint64(g.RegionsPerFile * g.regionUnits())
	if err := flip(m, spaceName(int(addr/perFile)), int64(addr%perFile)*int64(g.UnitSize)+1, 0x20); err != nil {
		t.Fatal(err)
	}
}

// TestCopies takes away one of the two of each page that has a copy: every read
// is right all the same, the damage is known, and a scrub puts it right.
func TestCopies(t *testing.T) {
	ctx := context.Background()
	m := vfs.NewMem(0)
	s, err := Create(ctx, m, tinyOptions())
	if err != nil {
		t.Fatal(err)
	}
	d := sparse(t, s, ID{1}, 20, []byte("attributes"))
	want := make([]byte, d.Size())
	if _, err := d.ReadAt(want, 0); err != nil {
		t.Fatal(err)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	im, err := readImage(m, Options{})
	if err != nil {
		t.Fatal(err)
	}
	im.pageReader = im.newReader(1 << 20)
	var twice []entry
	once := map[uint8]int{} // pages without a copy, by level
	var walk func(e entry)
	walk = func(e entry) {
		if e.twice {
			twice = append(twice, e)
		} else if e.kind == kindPage {
			once[e.level]++
		}
		if e.kind != kindPage {
			return
		}
		b, err := im.page(e)
		if err != nil {
			t.Fatal(err)
		}
		for i := range tiny.Fanout {
			walk(getEntry(b[i*entrySize:]))
		}
	}
	walk(im.super.table)
	if len(twice) != 2 || len(once) != 0 {
		t.Errorf("of the volume table %v have copies, pages of levels %v have not", twice, once)
	}
	for r, err := range im.records() {
		if err != nil {
			t.Fatal(err)
		}
		walk(r.root)
	}
	if once[1] != 20 || len(once) != 1 {
		t.Errorf("pages without a copy, by level: %v; want 20 leaves", once)
	}
	if err := im.close(); err != nil {
		t.Fatal(err)
	}
	for _, e := range twice {
		for _, addr := range []uint64{e.addr, tiny.copyOf(e.addr)} {
			c := m.Kill()
			damageUnit(t, c, tiny, addr)
			if list, err := checked(c); err != nil || len(list) != 1 || list[0].Addr != addr {
				t.Errorf("%v without %d: a check finds %v, %v", e, addr, list, err)
			}
			s, err := Open(ctx, c, tinyOptions())
			if err != nil {
				t.Fatalf("%v without %d: %v", e, addr, err)
			}
			d, err := s.OpenDisk(ctx, ID{1}, Live)
			if err != nil {
				t.Fatal(err)
			}
			got := make([]byte, len(want))
			if _, err := d.ReadAt(got, 0); err != nil || !bytes.Equal(got, want) {
				t.Fatalf("%v without %d: %v", e, addr, err)
			}
			if list := s.Damage(); addr == e.addr && (e.level > 1 || e.kind == kindData) && (len(list) != 1 || list[0].Addr != addr) {
				t.Errorf("%v without %d: the table of damage has %v", e, addr, list)
			}
			n := 0
			for p, err := range s.Scrub(ctx, ScrubOptions{}) {
				if err != nil || p.Addr != addr || p.Done != "restored" {
					t.Errorf("%v without %d: the scrub says %v, %v", e, addr, p, err)
				}
				n++
			}
			if n != 1 || len(s.Damage()) != 0 {
				t.Errorf("%v without %d: the scrub found %d problems and left %v", e, addr, n, s.Damage())
			}
			if err := errors.Join(s.Close(), checkClean(c)); err != nil {
				t.Errorf("%v without %d: %v", e, addr, err)
			}
		}
	}
}

// TestLostAtCheckpoint damages a leaf between the write that it has passed and
// the checkpoint that merges it, in a volume with a snapshot. The store goes
// on; what was written is there, the rest of the leaf is lost in the volume.
func TestLostAtCheckpoint(t *testing.T) {
	ctx := context.Background()
	m := vfs.NewMem(0)
	s, err := Create(ctx, m, tinyOptions())
	if err != nil {
		t.Fatal(err)
	}
	sparse(t, s, ID{1}, 20, nil)
	if _, err := s.Snapshot(ctx, []Pair{{Src: ID{1}, New: ID{2}}}); err != nil {
		t.Fatal(err)
	}
	sparse(t, s, ID{3}, 20, nil)
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	if s, err = Open(ctx, m, tinyOptions()); err != nil {
		t.Fatal(err)
	}
	open := func(id ID) *Disk {
		t.Helper()
		d, err := s.OpenDisk(ctx, id, Live)
		if err != nil {
			t.Fatal(err)
		}
		return d
	}
	d, other := open(ID{1}), open(ID{3})
	const chunk = 7
	u := int64(tiny.UnitSize)
	at := chunk * int64(tiny.Fanout) * u
	leaf, err := s.leaf(s.byID[ID{1}].view.Load().base.root, chunk)
	if err != nil {
		t.Fatal(err)
	}
	p := noise(tiny.UnitSize)
	if _, err := d.WriteAt(p, at+u); err != nil { // the second unit; the first one is in the leaf
		t.Fatal(err)
	}
	if err := d.Flush(ctx); err != nil {
		t.Fatal(err)
	}
	if _, err := other.WriteAt(p, 0); err != nil {
		t.Fatal(err)
	}
	damageUnit(t, m, tiny, leaf.addr)
	s.cache = newPageCache(64<<10, tiny.UnitSize) // nobody has it in memory
	if err := s.sync(ctx); err != nil {
		t.Fatalf("the checkpoint: %v", err)
	}
	if list := s.Damage(); len(list) != 1 || list[0].Addr != leaf.addr {
		t.Errorf("damage: %v", list)
	}
	got := make([]byte, u)
	for i := range int64(tiny.Fanout) {
		n, err := d.ReadAt(got, at+i*u)
		ce, damaged := errors.AsType[*CorruptError](err)
		switch {
		case i == 1 && (err != nil || !bytes.Equal(got, p)):
			t.Errorf("what was written: %v", err)
		case i != 1 && (!damaged || n != 0 || ce.Off != at+i*u || ce.Volume != ID{1}):
			t.Errorf("unit %d of the lost leaf: %d bytes, %v", i, n, err)
		}
	}
	if _, err := other.ReadAt(got, 0); err != nil || !bytes.Equal(got, p) {
		t.Errorf("another volume: %v", err)
	}
	if _, err := open(ID{2}).ReadAt(got, at-u); err != nil {
		t.Errorf("the snapshot before the leaf: %v", err)
	}
	for _, err := range s.Diff(ctx, open(ID{2}), d, 0) {
		if err != nil && !errors.Is(err, ErrCorrupt) {
			t.Errorf("diff: %v", err)
		}
	}
	lostUnits := int64(0)
	for p, err := range s.Check(ctx) {
		if err != nil {
			t.Fatal(err)
		}
		if p.Volume == (ID{1}) {
			lostUnits += p.Len / u
		}
	}
	if lostUnits != int64(tiny.Fanout)-1 {
		t.Errorf("a scrub finds %d lost units, want %d", lostUnits, tiny.Fanout-1)
	}
	if _, err := d.WriteAt(noise(tiny.UnitSize*tiny.Fanout), at); err != nil {
		t.Errorf("healing: %v", err)
	}
	if err := d.Zero(ctx, 0, d.Size()); err != nil {
		t.Fatal(err)
	}
	if err := s.Delete(ctx, ID{2}); err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(s.sync(ctx), s.Close()); err != nil {
		t.Fatal(err)
	}
	// The snapshot's reference cannot be given up, and what the leaf referred
	// to is counted; a repair puts both right.
	if list, err := checked(m); err != nil || len(list) == 0 {
		t.Errorf("before the repair: %v, %v", list, err)
	}
	if _, err := repaired(m, RepairOptions{AcceptLoss: true}); err != nil {
		t.Fatal(err)
	}
	list, err := checked(m)
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range list { // what is lost waits in the reap queue
		if p.Done != "" || p.Detail != "reap queue: "+errLost().Detail {
			t.Errorf("after the repair: %v", p)
		}
	}
	if s, err = Open(ctx, m, tinyOptions()); err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(drain(s), s.Close(), checkClean(m)); err != nil {
		t.Fatal(err)
	}
}

// TestFeatures sets feature bits that this version does not know.
func TestFeatures(t *testing.T) {
	ctx := context.Background()
	r := makeRotten(t)
	with := func(change func(*super)) *vfs.Mem {
		t.Helper()
		m := r.mem.Kill()
		f, sb := storedSuper(t, m)
		change(sb)
		if err := errors.Join(writeSuper(f, sb), f.Close()); err != nil {
			t.Fatal(err)
		}
		return m
	}
	t.Run("incompatible", func(t *testing.T) {
		m := with(func(sb *super) { sb.incompat = 1 << 7 })
		_, err := Open(ctx, m, tinyOptions())
		ue, ok := errors.AsType[*UnsupportedError](err)
		if !ok || ue.Incompatible != 1<<7 || !errors.Is(err, ErrUnsupported) {
			t.Errorf("open: %v", err)
		}
		if _, err := checked(m); !errors.Is(err, ErrUnsupported) {
			t.Errorf("check: %v", err)
		}
	})
	t.Run("read-only", func(t *testing.T) {
		m := with(func(sb *super) { sb.readOnly = 1 << 3 })
		c := &calls{}
		s, err := Open(ctx, vfs.NewInject(m, nil, c.hook), tinyOptions())
		if err != nil {
			t.Fatal(err)
		}
		if ue, ok := errors.AsType[*UnsupportedError](s.Failed()); !ok || ue.ReadOnly != 1<<3 {
			t.Errorf("the store says %v", s.Failed())
		}
		for id, want := range r.data { // what is in the log, too
			d, err := s.OpenDisk(ctx, id, Live)
			if err != nil {
				t.Fatal(err)
			}
			got := make([]byte, len(want))
			if len(want) > 0 {
				if _, err := d.ReadAt(got, 0); err != nil || !bytes.Equal(got, want) {
					t.Errorf("volume %v: %v", id, err)
				}
			}
			if err := s.Delete(ctx, id); !errors.Is(err, ErrUnsupported) {
				t.Errorf("delete: %v", err)
			}
		}
		if err := s.Close(); !errors.Is(err, ErrUnsupported) {
			t.Errorf("close: %v", err)
		}
		for _, call := range c.take() {
			if call[:5] == "write" {
				t.Errorf("a store that must not be written: %s", call)
			}
		}
		if _, err := checked(m); !errors.Is(err, ErrUnsupported) {
			t.Errorf("check: %v", err)
		}
		if _, err := repaired(m, RepairOptions{AcceptLoss: true}); !errors.Is(err, ErrUnsupported) {
			t.Errorf("repair: %v", err)
		}
	})
	t.Run("compatible", func(t *testing.T) {
		m := with(func(sb *super) { sb.compat = 1 << 30 })
		s, err := Open(ctx, m, tinyOptions())
		if err != nil {
			t.Fatal(err)
		}
		gen := s.super.gen
		if err := s.Close(); err != nil {
			t.Fatal(err)
		}
		f, err := m.Open(superName)
		if err != nil {
			t.Fatal(err)
		}
		sb, err := newestSuper(f)
		if err != nil || sb.gen < gen || sb.compat != 1<<30 {
			t.Errorf("generation %d, features %#x, %v; want the bit kept", sb.gen, sb.compat, err)
		}
		if err := errors.Join(f.Close(), checkClean(m)); err != nil {
			t.Error(err)
		}
	})
	t.Run("version", func(t *testing.T) {
		b := (&super{geo: tiny, logSize: uint64(minLogBytes(tiny))}).encode()
		b[8]++
		_, err := decodeSuper(b)
		if !errors.Is(err, errNoSlot) {
			t.Errorf("with the CRC of another version: %v", err)
		}
		s := superOfVersion(b)
		if _, err := decodeSuper(s); !errors.Is(err, ErrUnsupported) {
			t.Errorf("version 2: %v", err)
		}
	})
}

// superOfVersion gives a superblock that has been changed its CRC.
func superOfVersion(b []byte) []byte {
	le32(b[superSize-4:], checksum(b[:superSize-4]))
	return b
}

func le32(b []byte, v uint32) {
	b[0], b[1], b[2], b[3] = byte(v), byte(v>>8), byte(v>>16), byte(v>>24)
}

// TestCopiesLeaveTheReserve asks for pairs of units in a store that has no more
// than its reserve.
func TestCopiesLeaveTheReserve(t *testing.T) {
	o := tinyOptions()
	o.MaxBytes = 5 * tiny.regionBytes()
	s, err := Create(context.Background(), vfs.NewMem(0), o)
	if err != nil {
		t.Fatal(err)
	}
	n := int64(0)
	for s.space.promise(1, floorWrite) == nil {
		n++
	}
	if addr, ok, err := s.space.allocTwice(); ok || err != nil {
		t.Errorf("a pair at %d, %v", addr, err)
	}
	s.space.unpromise(2)
	addr, ok, err := s.space.allocTwice()
	if !ok || err != nil {
		t.Fatalf("no pair where there is room: %v", err)
	}
	if err := s.space.release([]uint64{addr, tiny.copyOf(addr)}); err != nil {
		t.Fatal(err)
	}
	s.space.unpromise(n - 2)
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
}
