package cow

import (
	"bytes"
	"context"
	"errors"
	"sync"
	"testing"

	"coppice/internal/vfs"
)

// narrow is a store that cannot grow, so that a unit that counts as free is
// soon used: n volumes with a unit of data each, all in the trees.
func narrow(t *testing.T, n byte) (*vfs.Mem, *Store) {
	t.Helper()
	ctx := context.Background()
	o := tinyOptions()
	o.MaxBytes = 5 * tiny.regionBytes()
	m := vfs.NewMem(0)
	s, err := Create(ctx, m, o)
	if err != nil {
		t.Fatal(err)
	}
	for i := range n {
		sparse(t, s, ID{1 + i}, 1, nil)
	}
	if err := errors.Join(drain(s), s.sync(ctx), s.awaitReleases(ctx)); err != nil {
		t.Fatal(err)
	}
	return m, s
}

// TestRepairSparesTheLog repairs a store most of whose free units are named by
// the log.
func TestRepairSparesTheLog(t *testing.T) {
	ctx := context.Background()
	m, s := narrow(t, 2)
	d, err := s.OpenDisk(ctx, ID{1}, Live)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := s.Resize(ctx, ID{1}, 40<<10); err != nil {
		t.Fatal(err)
	}
	want := noise(40 << 10)
	if _, err := d.WriteAt(want, 0); err != nil {
		t.Fatal(err)
	}
	if err := d.Flush(ctx); err != nil {
		t.Fatal(err)
	}
	leaf, err := s.leaf(s.byID[ID{2}].view.Load().base.root, 0)
	if err != nil {
		t.Fatal(err)
	}
	c := m.Kill()
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	damageUnit(t, c, tiny, leaf.addr)
	var mu sync.Mutex
	var wrote []uint64
	perFile := int64(tiny.RegionsPerFile * tiny.regionUnits())
	inj := vfs.NewInject(c, nil, func(call vfs.Call) error {
		mu.Lock()
		defer mu.Unlock()
		if call.Op == vfs.OpWrite && (call.Name == spaceName(0) || call.Name == spaceName(1)) {
			at := call.Off / int64(tiny.UnitSize)
			if call.Name == spaceName(1) {
				at += perFile
			}
			for i := range call.Len / int64(tiny.UnitSize) {
				wrote = append(wrote, uint64(at+i))
			}
		}
		return nil
	})
	im, err := readImage(c, Options{})
	if err != nil {
		t.Fatal(err)
	}
	named := map[uint64]bool{}
	ch := newChecker(ctx, im, func(Problem, error) bool { return true })
	if err := ch.scanLog(func(r logRecord) {
		for i := range r.count {
			if r.kind == recMap {
				named[r.addr+i] = true
			}
		}
	}); err != nil {
		t.Fatal(err)
	}
	if err := im.close(); err != nil {
		t.Fatal(err)
	}
	if len(named) != 40 {
		t.Fatalf("the log names %d units", len(named))
	}
	if _, err := repaired(inj, RepairOptions{AcceptLoss: true}); err != nil {
		t.Fatal(err)
	}
	for _, addr := range wrote {
		if named[addr] {
			t.Errorf("unit %d, which the log names, has been written", addr)
		}
	}
	if s, err = Open(ctx, c, tinyOptions()); err != nil {
		t.Fatal(err)
	}
	if d, err = s.OpenDisk(ctx, ID{1}, Live); err != nil {
		t.Fatal(err)
	}
	got := make([]byte, len(want))
	if _, err := d.ReadAt(got, 0); err != nil || !bytes.Equal(got, want) {
		t.Errorf("what was in the log: %v", err)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
}

// TestRepairSparesTheOldTable takes a leaf of the volume table and its copy
// away. What is left of the table is not written before the new one is
// durable: a crash in between must not take more volumes.
func TestRepairSparesTheOldTable(t *testing.T) {
	m, s := narrow(t, 11)
	var leafs []entry
	for u, err := range s.data(s.super.table) {
		if err != nil {
			t.Fatal(err)
		}
		leafs = append(leafs, u.entry)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	if len(leafs) != 3 {
		t.Fatalf("the table has %d leaves", len(leafs))
	}
	im, err := readImage(m, Options{})
	if err != nil {
		t.Fatal(err)
	}
	im.pageReader = im.newReader(1 << 20)
	leafs = leafs[:0]
	old := map[uint64]bool{}
	keep := func(e entry) {
		old[e.addr] = true
		if e.twice {
			old[tiny.copyOf(e.addr)] = true
		}
	}
	keep(im.super.table)
	for u, err := range im.data(im.super.table) {
		if err != nil {
			t.Fatal(err)
		}
		keep(u.entry)
		leafs = append(leafs, u.entry)
	}
	if err := im.close(); err != nil {
		t.Fatal(err)
	}
	damageUnit(t, m, tiny, leafs[1].addr)
	if leafs[1].twice {
		damageUnit(t, m, tiny, tiny.copyOf(leafs[1].addr))
	}
	// None of the old table is free while the new one is made.
	if im, err = readDamaged(m.Kill(), Options{}, nil); err != nil {
		t.Fatal(err)
	}
	r := &repair{
		checker: newChecker(context.Background(), im, func(Problem, error) bool { return true }),
		accept:  true, recs: map[uint64]*record{}, mended: map[uint64]entry{},
	}
	if err := errors.Join(r.run(), r.recount()); err != nil {
		t.Fatal(err)
	}
	for addr := range old {
		if reg, u := im.space.locate(addr); !reg.isHeld(u) && addr != leafs[1].addr && addr != tiny.copyOf(leafs[1].addr) {
			t.Errorf("unit %d of the old table is free", addr)
		}
	}
	if err := im.close(); err != nil {
		t.Fatal(err)
	}
	var mu sync.Mutex
	perFile := int64(tiny.RegionsPerFile * tiny.regionUnits())
	super := false
	inj := vfs.NewInject(m, nil, func(call vfs.Call) error {
		mu.Lock()
		defer mu.Unlock()
		super = super || call.Op == vfs.OpWrite && call.Name == superName
		if super || call.Op != vfs.OpWrite || call.Name != spaceName(0) && call.Name != spaceName(1) {
			return nil
		}
		at := call.Off / int64(tiny.UnitSize)
		if call.Name == spaceName(1) {
			at += perFile
		}
		for i := range call.Len / int64(tiny.UnitSize) {
			if old[uint64(at+i)] {
				t.Errorf("unit %d of the old table has been written", at+i)
			}
		}
		return nil
	})
	if _, err := repaired(inj, RepairOptions{AcceptLoss: true}); err != nil {
		t.Fatal(err)
	}
	if s, err = Open(context.Background(), m, tinyOptions()); err != nil {
		t.Fatal(err)
	}
	n := 0
	for range s.List() {
		n++
	}
	if n != 7 { // 1 to 3 and 8 to 11: four numbers to a leaf, none of them 0
		t.Errorf("%d volumes are left, want 7", n)
	}
	if err := errors.Join(s.Close(), checkClean(m)); err != nil {
		t.Fatal(err)
	}
}
