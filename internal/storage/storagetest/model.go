package storagetest

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"math/rand/v2"
	"slices"
	"testing"

	"coppice/internal/storage"

	"pgregory.net/rapid"
)

// Model runs random histories of every operation that the repository has and
// compares everything it says with plain byte slices. A failing history is
// shrunk and printed by rapid; -rapid.checks sets how many are run.
func Model(t *testing.T, open Open) {
	rapid.Check(t, func(t *rapid.T) {
		m := &machine{Fixture: open(t), ctx: t.Context(), disks: map[storage.ID]*disk{}}
		m.create(t)
		t.Repeat(m.actions())
		m.compareAll(t)
		m.check(t)
	})
}

// machine is a repository and what it must hold.
type machine struct {
	*Fixture
	ctx   context.Context
	disks map[storage.ID]*disk
	pins  []pin
	next  int // number of the next ID and of the next noise
}

type disk struct {
	*shadow
	id       storage.ID
	readOnly bool
	attrs    []byte
	open     storage.Volume // Live
}

type pin struct {
	v    storage.Volume
	data []byte
}

// actions returns what the repository can do.
func (m *machine) actions() map[string]func(*rapid.T) {
	all := map[string]func(*rapid.T){
		"":          m.compareOne,
		"create":    m.create,
		"write":     m.write,
		"overwrite": m.write, // twice, to have more of them
		"zero":      m.zero,
		"flush":     m.flush,
		"snapshot":  func(t *rapid.T) { m.derive(t, true) },
		"clone":     func(t *rapid.T) { m.derive(t, false) },
		"delete":    m.delete,
		"pin":       m.pin,
		"unpin":     m.unpin,
		"extents":   m.extents,
		"overlay":   m.overlay,
	}
	if _, ok := m.Repo.(storage.GroupSnapshotter); ok {
		all["group"] = m.group
	}
	if _, ok := m.Repo.(storage.Resizer); ok {
		all["resize"] = m.resize
	}
	if _, ok := m.Repo.(storage.Reverter); ok {
		all["revert"] = m.revert
	}
	if _, ok := m.Repo.(storage.RangeCloner); ok {
		all["clone ranges"] = m.cloneRanges
	}
	if _, ok := m.Repo.(storage.Attributer); ok {
		all["attributes"] = m.setAttrs
	}
	if _, ok := m.Repo.(storage.Differ); ok {
		all["diff"] = m.diff
	}
	if _, ok := m.Repo.(storage.Checker); ok {
		all["check"] = m.check
	}
	if m.Reopen != nil {
		all["reopen"] = m.reopen
	}
	if m.Crash != nil {
		all["crash"] = m.crash
	}
	return all
}

const maxUnits = 40 // of a volume in a history

func (m *machine) newID() storage.ID {
	m.next++
	return testID(m.next)
}

// draw picks one of the disks for which ok holds, or skips the action.
func (m *machine) draw(t *rapid.T, name string, ok func(*disk) bool) *disk {
	var ids []storage.ID
	for _, id := range slices.Sorted(maps.Keys(m.disks)) {
		if ok(m.disks[id]) {
			ids = append(ids, id)
		}
	}
	if len(ids) == 0 {
		t.Skip("no disk")
	}
	return m.disks[rapid.SampledFrom(ids).Draw(t, name)]
}

func anyDisk(*disk) bool { return true }

func (m *machine) writable(t *rapid.T) *disk {
	return m.draw(t, "disk", func(d *disk) bool { return !d.readOnly })
}

// drawRange picks a part of a disk, often of whole units.
func drawRange(t *rapid.T, d *disk, most int) (off, n int) {
	size := len(d.data)
	if rapid.Bool().Draw(t, "aligned") {
		off = unit * rapid.IntRange(0, size/unit-1).Draw(t, "unit")
		n = unit * rapid.IntRange(0, min(most, size-off)/unit).Draw(t, "units")
		return off, n
	}
	off = rapid.IntRange(0, size-1).Draw(t, "off")
	return off, rapid.IntRange(0, min(most, size-off)).Draw(t, "len")
}

func drawSize(t *rapid.T) int { return unit * rapid.IntRange(1, maxUnits).Draw(t, "size") }

func drawAttrs(t *rapid.T) []byte {
	n := rapid.SampledFrom([]int{0, 3, unit, 2*unit + 1}).Draw(t, "attrs")
	return noise(n, n)
}

func must(t *rapid.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// adopt adds a volume that the repository has just described.
func (m *machine) adopt(t *rapid.T, info storage.Info, d *disk) {
	v, err := m.Repo.Open(m.ctx, d.id, storage.Live)
	must(t, err)
	d.open = v
	m.disks[d.id] = d
	m.compareInfo(t, info, d)
}

func (m *machine) create(t *rapid.T) {
	d := &disk{id: m.newID(), shadow: newShadow(drawSize(t)), attrs: drawAttrs(t)}
	info, err := m.Repo.Create(m.ctx, storage.Spec{ID: d.id, Size: int64(len(d.data)), Attrs: d.attrs})
	must(t, err)
	m.adopt(t, info, d)
}

func (m *machine) write(t *rapid.T) {
	d := m.writable(t)
	off, n := drawRange(t, d, 12*unit)
	m.next++
	p := noise(m.next, n)
	if rapid.IntRange(0, 7).Draw(t, "zeros") == 0 {
		clear(p)
	}
	k, err := d.open.WriteAt(p, int64(off))
	if k != n || err != nil {
		t.Fatalf("WriteAt(%d bytes, %d) = %d, %v", n, off, k, err)
	}
	d.shadow.write(p, off)
}

func (m *machine) zero(t *rapid.T) {
	d := m.writable(t)
	off, n := drawRange(t, d, len(d.data))
	must(t, d.open.Zero(m.ctx, int64(off), int64(n)))
	d.shadow.zero(off, n)
}

// overlay writes over a part of the disk what is partly there already.
func (m *machine) overlay(t *rapid.T) {
	d := m.writable(t)
	off, n := drawRange(t, d, 20*unit)
	p := slices.Clone(d.data[off : off+n])
	m.next++
	if n > 0 {
		from := rapid.IntRange(0, n-1).Draw(t, "from")
		to := rapid.IntRange(from, n).Draw(t, "to")
		copy(p[from:to], noise(m.next, to-from))
		clear(p[:from/2])
	}
	o := storage.NewOverlay(d.open)
	half := n / 2
	must(t, o.WriteAt(m.ctx, p[:half], int64(off)))
	must(t, o.WriteAt(m.ctx, p[half:], int64(off+half)))
	d.shadow.write(p, off)
}

func (m *machine) flush(t *rapid.T) {
	d := m.draw(t, "disk", anyDisk)
	must(t, d.open.Flush(m.ctx))
	d.shadow.flush()
}

func (m *machine) derive(t *rapid.T, readOnly bool) {
	src := m.draw(t, "source", anyDisk)
	d := &disk{id: m.newID(), shadow: src.clone(), readOnly: readOnly, attrs: drawAttrs(t)}
	call := m.Repo.Clone
	if readOnly {
		call = m.Repo.Snapshot
	}
	info, err := call(m.ctx, storage.Derived{Source: src.id, ID: d.id, Attrs: d.attrs})
	must(t, err)
	m.adopt(t, info, d)
}

func (m *machine) group(t *rapid.T) {
	var derived []storage.Derived
	var disks []*disk
	for _, id := range slices.Sorted(maps.Keys(m.disks)) {
		if !rapid.Bool().Draw(t, "member") {
			continue
		}
		d := &disk{id: m.newID(), shadow: m.disks[id].clone(), readOnly: true, attrs: drawAttrs(t)}
		derived = append(derived, storage.Derived{Source: id, ID: d.id, Attrs: d.attrs})
		disks = append(disks, d)
	}
	infos, err := m.Repo.(storage.GroupSnapshotter).SnapshotGroup(m.ctx, derived)
	must(t, err)
	if len(infos) != len(disks) {
		t.Fatalf("%d infos for %d snapshots", len(infos), len(disks))
	}
	for i, d := range disks {
		m.adopt(t, infos[i], d)
	}
}

func (m *machine) delete(t *rapid.T) {
	d := m.draw(t, "disk", anyDisk)
	must(t, m.Repo.Delete(m.ctx, d.id))
	delete(m.disks, d.id)
	if _, err := d.open.ReadAt(make([]byte, 1), 0); !errors.Is(err, storage.ErrNotFound) {
		t.Fatalf("reading a deleted disk: %v", err)
	}
	must(t, d.open.Close())
}

func (m *machine) resize(t *rapid.T) {
	d := m.writable(t)
	size := drawSize(t)
	info, err := m.Repo.(storage.Resizer).Resize(m.ctx, d.id, int64(size))
	must(t, err)
	d.shadow.resize(size)
	m.compareInfo(t, info, d)
}

func (m *machine) revert(t *rapid.T) {
	d, to := m.writable(t), m.draw(t, "to", anyDisk)
	must(t, m.Repo.(storage.Reverter).Revert(m.ctx, d.id, to.id))
	if d != to {
		d.become(to.shadow)
	}
}

func (m *machine) setAttrs(t *rapid.T) {
	d := m.draw(t, "disk", anyDisk)
	d.attrs = drawAttrs(t)
	must(t, m.Repo.(storage.Attributer).SetAttrs(m.ctx, d.id, d.attrs))
}

func (m *machine) pin(t *rapid.T) {
	d := m.draw(t, "disk", anyDisk)
	v, err := m.Repo.Open(m.ctx, d.id, storage.Pinned)
	must(t, err)
	m.pins = append(m.pins, pin{v, slices.Clone(d.data)})
}

func (m *machine) unpin(t *rapid.T) {
	if len(m.pins) == 0 {
		t.Skip("no pin")
	}
	i := rapid.IntRange(0, len(m.pins)-1).Draw(t, "pin")
	p := m.pins[i]
	must(t, compare(p.v, p.data))
	must(t, p.v.Close())
	m.pins = slices.Delete(m.pins, i, i+1)
}

// volume is an open volume and what it must hold.
func (m *machine) volume(t *rapid.T, name string) (storage.Volume, []byte) {
	if len(m.pins) > 0 && rapid.IntRange(0, 2).Draw(t, name+" pinned") == 0 {
		p := m.pins[rapid.IntRange(0, len(m.pins)-1).Draw(t, name)]
		return p.v, p.data
	}
	d := m.draw(t, name, anyDisk)
	return d.open, d.data
}

func (m *machine) cloneRanges(t *rapid.T) {
	d := m.writable(t)
	from, old := m.volume(t, "from")
	old = slices.Clone(old)
	var ranges []storage.RangeClone
	for range rapid.IntRange(1, 3).Draw(t, "ranges") {
		n := rapid.IntRange(1, min(len(old), len(d.data))/unit).Draw(t, "units")
		off := unit * rapid.IntRange(0, len(old)/unit-n).Draw(t, "at")
		to := unit * rapid.IntRange(0, len(d.data)/unit-n).Draw(t, "to")
		ranges = append(ranges, storage.RangeClone{To: int64(to), From: int64(off), Len: int64(n * unit)})
	}
	must(t, m.Repo.(storage.RangeCloner).CloneRanges(m.ctx, d.open, from, ranges))
	for _, r := range ranges {
		d.shadow.write(old[r.From:r.From+r.Len], int(r.To))
	}
	d.shadow.flush()
}

func (m *machine) diff(t *rapid.T) {
	a, from := m.volume(t, "from")
	b, want := m.volume(t, "to")
	got := make([]byte, len(want))
	copy(got, from)
	off := int64(0)
	if rapid.IntRange(0, 3).Draw(t, "resumed") == 0 {
		off = int64(rapid.IntRange(0, len(want)).Draw(t, "off"))
		copy(got, want[:off])
	}
	next := off
	for e, err := range m.Repo.(storage.Differ).Diff(m.ctx, a, b, off) {
		must(t, err)
		if e.Off < next || e.Len <= 0 || e.End() > int64(len(want)) {
			t.Fatalf("extent %+v when %d of %d is next", e, next, len(want))
		}
		next = e.End()
		if e.Hole {
			clear(got[e.Off:e.End()])
		} else {
			copy(got[e.Off:], want[e.Off:e.End()])
		}
	}
	if i := firstDifference(got, want); i >= 0 {
		t.Fatalf("byte %d differs after applying the diff: %#x, want %#x", i, got[i], want[i])
	}
}

func (m *machine) extents(t *rapid.T) {
	v, data := m.volume(t, "volume")
	off := rapid.IntRange(0, len(data)).Draw(t, "off")
	n := rapid.IntRange(0, len(data)-off).Draw(t, "len")
	next := int64(off)
	for e, err := range v.Extents(m.ctx, int64(off), int64(n)) {
		must(t, err)
		if e.Off != next || e.Len <= 0 || e.End() > int64(off+n) {
			t.Fatalf("extent %+v in [%d, %d) when %d is next", e, off, off+n, next)
		}
		next = e.End()
		if e.Hole && !isZero(data[e.Off:e.End()]) {
			t.Fatalf("the hole %+v has data", e)
		}
	}
	if next != int64(off+n) {
		t.Fatalf("the extents of [%d, %d) end at %d", off, off+n, next)
	}
}

// reopen closes the repository, which flushes everything.
func (m *machine) reopen(t *rapid.T) {
	for _, d := range m.disks {
		d.shadow.flush()
	}
	m.Reopen()
	m.restart(t)
}

// crash cuts the power. What it leaves open is decided by a generator of its
// own, so that histories shrink.
func (m *machine) crash(t *rapid.T) {
	rng := rand.New(rand.NewPCG(rapid.Uint64().Draw(t, "cut"), 0))
	m.Crash(rng.IntN)
	m.restart(t)
	m.compareAll(t)
}

// restart opens the disks again and takes what they hold.
func (m *machine) restart(t *rapid.T) {
	m.pins = nil
	for _, id := range slices.Sorted(maps.Keys(m.disks)) {
		d := m.disks[id]
		v, err := m.Repo.Open(m.ctx, d.id, storage.Live)
		must(t, err)
		d.open = v
		got, err := contents(v)
		must(t, err)
		if err := d.settle(got); err != nil {
			t.Fatalf("disk %.8s: %v", d.id, err)
		}
	}
}

func contents(v storage.Volume) ([]byte, error) {
	p := make([]byte, v.Size())
	if n, err := v.ReadAt(p, 0); n < len(p) || err != nil && err != io.EOF {
		return nil, fmt.Errorf("ReadAt(%d bytes, 0) = %d, %w", len(p), n, err)
	}
	return p, nil
}

// compare checks the contents of a volume.
func compare(v storage.Volume, want []byte) error {
	got, err := contents(v)
	if err != nil {
		return err
	}
	if len(got) != len(want) {
		return fmt.Errorf("size %d, want %d", len(got), len(want))
	}
	if i := firstDifference(got, want); i >= 0 {
		return fmt.Errorf("byte %d of %d is %#x, want %#x", i, len(got), got[i], want[i])
	}
	return nil
}

func (m *machine) compareInfo(t *rapid.T, info storage.Info, d *disk) {
	if info.ID != d.id || info.Size != int64(len(d.data)) || info.ReadOnly != d.readOnly {
		t.Fatalf("info %+v of disk %.8s with %d bytes, read-only %v", info, d.id, len(d.data), d.readOnly)
	}
	if string(info.Attrs) != string(d.attrs) {
		t.Fatalf("%d bytes of attributes of disk %.8s are not the %d that were set", len(info.Attrs), d.id, len(d.attrs))
	}
}

// compareOne reads a part of one disk.
func (m *machine) compareOne(t *rapid.T) {
	if len(m.disks) == 0 {
		return
	}
	v, data := m.volume(t, "read")
	off := rapid.IntRange(0, len(data)).Draw(t, "off")
	p := make([]byte, rapid.IntRange(0, len(data)-off).Draw(t, "len"))
	if n, err := v.ReadAt(p, int64(off)); n < len(p) || err != nil && err != io.EOF {
		t.Fatalf("ReadAt(%d bytes, %d) = %d, %v", len(p), off, n, err)
	}
	if i := firstDifference(p, data[off:][:len(p)]); i >= 0 {
		t.Fatalf("byte %d is %#x, want %#x", off+i, p[i], data[off+i])
	}
}

// compareAll reads everything.
func (m *machine) compareAll(t *rapid.T) {
	seen := 0
	for info, err := range m.Repo.List(m.ctx) {
		must(t, err)
		d := m.disks[info.ID]
		if d == nil {
			t.Fatalf("disk %.8s is listed and should not exist", info.ID)
		}
		seen++
		m.compareInfo(t, info, d)
		if err := compare(d.open, d.data); err != nil {
			t.Fatalf("disk %.8s: %v", d.id, err)
		}
	}
	if seen != len(m.disks) {
		t.Fatalf("%d disks are listed, want %d", seen, len(m.disks))
	}
	for i, p := range m.pins {
		if err := compare(p.v, p.data); err != nil {
			t.Fatalf("pin %d: %v", i, err)
		}
	}
}

func (m *machine) check(t *rapid.T) {
	r, ok := m.Repo.(storage.Checker)
	if !ok {
		return
	}
	for p, err := range r.Check(m.ctx) {
		must(t, err)
		t.Errorf("check: volume %q at %d: %s", p.Volume, p.Off, p.Detail)
	}
}
