package cow

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"

	"coppice/internal/vfs"
)

// volumeOp runs a volume operation and, when it succeeds, the model's side.
// Both outcomes are possible for a crash in between.
func (w *world) volumeOp(do func() error, model func()) error {
	before := map[ID]*mvol{}
	for id, m := range w.vols {
		before[id] = m.clone()
	}
	err := do()
	if full(err) {
		return nil
	}
	if err != nil {
		model()
		w.maybe = before
		return err
	}
	model()
	if w.crashed.Load() != nil {
		return w.recoverFrom(before)
	}
	for _, m := range w.vols {
		m.before = nil
	}
	return nil
}

// recoverFrom opens the crashed store; it may show the state before the last
// operation or after it.
func (w *world) recoverFrom(before map[ID]*mvol) error {
	m := w.crashed.Swap(nil)
	w.arm.Store(0)
	w.abandon()
	after := w.vols
	err := w.open(m.Kill())
	if err == nil || before == nil {
		return err
	}
	w.abandon()
	w.vols = before
	if err2 := w.open(m); err2 != nil {
		w.vols = after
		return fmt.Errorf("neither the state after (%w) nor the one before the operation (%w)", err, err2)
	}
	return nil
}

// abandon lets go of the store as a crash does. The old one may finish what it
// is doing; nobody looks at its directory again.
func (w *world) abandon() {
	if w.s != nil {
		_ = w.s.Close()
		w.s = nil
	}
	w.arm.Store(0)
	w.crashed.Store(nil)
	w.vague = true
	w.disks = map[ID]*Disk{}
	w.pins = nil
}

// open checks and opens the store in m and compares it with the model.
func (w *world) open(m *vfs.Mem) error {
	w.disks = map[ID]*Disk{}
	w.pins = nil
	if err := checkClean(m); err != nil {
		return err
	}
	w.use(m)
	var err error
	if w.s, err = Open(context.Background(), w.inj, w.opts); err != nil {
		w.s = nil
		return err
	}
	return w.compare()
}

// compare reads everything; what a crash decided becomes the model's truth.
func (w *world) compare() error {
	if err := w.list(); err != nil {
		return err
	}
	for _, m := range w.vols {
		if m.bare {
			continue
		}
		d, err := w.disk(m)
		if err != nil {
			return err
		}
		if err := w.adopt(d, m); err != nil {
			return err
		}
	}
	return nil
}

// adopt compares a disk with its model, where any version may show.
func (w *world) adopt(d *Disk, m *mvol) error {
	u := tiny.UnitSize
	got := make([]byte, len(m.data))
	if len(got) > 0 {
		if _, err := d.ReadAt(got, 0); err != nil {
			return fmt.Errorf("volume %v: %w", m.id, err)
		}
	}
	for i := range len(got) / u {
		g := got[i*u : (i+1)*u]
		ok := bytes.Equal(g, m.data[i*u:(i+1)*u])
		for _, v := range m.old[i] {
			ok = ok || bytes.Equal(g, v)
		}
		if !ok {
			return fmt.Errorf("volume %v: unit %d is none of the %d versions it had: %x…, want %x…", m.id, i, len(m.old[i])+1, g[:8], m.data[i*u:i*u+8])
		}
	}
	m.data = got
	m.settle()
	m.before = nil
	return nil
}

// resync looks what a failed write has done.
func (w *world) resync(m *mvol, off int, prev []byte) error {
	d, err := w.disk(m)
	if err != nil {
		return err
	}
	got := make([]byte, len(prev))
	if _, err := d.ReadAt(got, int64(off)); err != nil {
		return err
	}
	for i, b := range got {
		if b != prev[i] && b != m.data[off+i] {
			return fmt.Errorf("volume %v: byte %d is neither old nor new after a failed write", m.id, off+i)
		}
	}
	copy(m.data[off:], got)
	return nil
}

func (w *world) list() error {
	n := 0
	for i := range w.s.List() {
		n++
		m := w.vols[i.ID]
		if m == nil {
			return fmt.Errorf("volume %v should not be there", i.ID)
		}
		if i.Size != int64(len(m.data)) || i.ReadOnly != m.ro || i.NoData != m.bare || i.Parent != m.parent || i.AttrsLen != len(m.attrs) {
			return fmt.Errorf("info %+v, want size %d, read-only %v, parent %v, %d bytes of attributes", i, len(m.data), m.ro, m.parent, len(m.attrs))
		}
		attrs, err := w.s.Attrs(context.Background(), i.ID)
		if err != nil {
			return err
		}
		if err := sameBytes(attrs, m.attrs, "attributes"); err != nil {
			return err
		}
	}
	if n != len(w.vols) {
		return fmt.Errorf("%d volumes, want %d", n, len(w.vols))
	}
	return nil
}

func (w *world) diff(a, b *mvol, off int64) error {
	if a == nil || b == nil {
		return nil
	}
	da, err := w.disk(a)
	if err != nil {
		return err
	}
	db, err := w.disk(b)
	if err != nil {
		return err
	}
	off %= int64(len(b.data) + 1)
	at := off
	equal := func(from, to int64) error {
		for i := from; i < to; i++ {
			old := byte(0)
			if i < int64(len(a.data)) {
				old = a.data[i]
			}
			if b.data[i] != old {
				return fmt.Errorf("diff of %v and %v misses byte %d", a.id, b.id, i)
			}
		}
		return nil
	}
	for e, err := range w.s.Diff(context.Background(), da, db, off) {
		if err != nil {
			return err
		}
		if e.Off < at || e.Len <= 0 || e.End() > int64(len(b.data)) || a == b {
			return fmt.Errorf("diff of %v and %v from %d: extent %+v", a.id, b.id, off, e)
		}
		if err := equal(at, e.Off); err != nil {
			return err
		}
		if e.Hole && len(bytes.Trim(b.data[e.Off:e.End()], "\x00")) > 0 {
			return fmt.Errorf("diff calls %+v a hole", e)
		}
		at = e.End()
	}
	if err := equal(at, int64(len(b.data))); err != nil {
		return err
	}
	at = off
	for e, err := range db.Extents(context.Background(), off, int64(len(b.data))-off) {
		if err != nil {
			return err
		}
		if e.Off != at || e.Len <= 0 || e.Hole && len(bytes.Trim(b.data[e.Off:e.End()], "\x00")) > 0 {
			return fmt.Errorf("extents of %v from %d: %+v after %d", b.id, off, e, at)
		}
		at = e.End()
	}
	if at != int64(len(b.data)) {
		return fmt.Errorf("extents of %v end at %d of %d", b.id, at, len(b.data))
	}
	return nil
}

func sameBytes(got, want []byte, what string) error {
	if bytes.Equal(got, want) {
		return nil
	}
	if len(got) != len(want) {
		return fmt.Errorf("%s: %d bytes, want %d", what, len(got), len(want))
	}
	for i := range got {
		if got[i] != want[i] {
			return fmt.Errorf("%s: byte %d is %#x, want %#x", what, i, got[i], want[i])
		}
	}
	return nil
}

// checkClean runs the exact offline check.
func checkClean(m *vfs.Mem) error {
	for p, err := range Check(context.Background(), m) {
		return fmt.Errorf("check: %v %w", p, err)
	}
	return nil
}

// run runs operations on a fresh store and ends with everything deleted.
func run(o Options, ops []op) (err error) {
	w, err := newWorld(o)
	if err != nil {
		return err
	}
	defer w.abandon()
	empty := w.s.Usage().Used
	for i, o := range ops {
		err := w.step(o)
		if err == nil && w.crashed.Load() != nil {
			err = w.recoverFrom(nil)
		}
		if err != nil {
			return fmt.Errorf("operation %d, %+v: %w", i, o, err)
		}
	}
	if err := w.compare(); err != nil {
		return fmt.Errorf("at the end: %w", err)
	}
	if err := w.s.sync(context.Background()); err != nil {
		return err
	}
	if err := checkClean(w.mem.Kill()); err != nil {
		return fmt.Errorf("at the end: %w", err)
	}
	return w.emptied(empty)
}

// emptied deletes everything and expects the space back.
func (w *world) emptied(used int64) error {
	ctx := context.Background()
	for _, p := range w.pins {
		if err := p.d.Close(); err != nil {
			return err
		}
	}
	for id := range w.vols {
		if err := w.s.Delete(ctx, id); err != nil {
			return err
		}
	}
	for range 100 {
		if err := w.s.sync(ctx); err != nil {
			return err
		}
		if err := w.s.awaitReleases(ctx); err != nil {
			return err
		}
		if !w.s.Usage().Reaping && !w.s.reclaimable() {
			break
		}
	}
	s := w.s.space
	s.mu.Lock()
	defer s.mu.Unlock()
	free := int64(0)
	for _, r := range s.regions {
		free += int64(r.rec.free)
	}
	if lost := int64(len(s.regions)*s.geo.dataUnits()) - free; lost != 0 || s.held != 0 || s.reserved != 0 {
		return fmt.Errorf("after everything is deleted %d units are in use, %d held, %d promised", lost, s.held, s.reserved)
	}
	if n, b := w.s.entries.Load(), w.s.buffers.Load(); n != 0 || b != 0 {
		return fmt.Errorf("after everything is deleted %d entries and %d bytes are accounted for", n, b)
	}
	return nil
}

// since compares what has changed since a volume, whose data may be gone, with
// what has.
func (w *world) since(a, b *mvol, off int64) error {
	if a == nil || b == nil {
		return nil
	}
	db, err := w.disk(b)
	if err != nil {
		return err
	}
	related := false
	for id := b.id; id != (ID{}) && !related; id = w.vols[id].parent {
		related = id == a.id
	}
	off %= int64(len(b.data) + 1)
	at := off
	equal := func(to int64) error {
		for ; at < to; at++ {
			old := byte(0)
			if at < int64(len(a.data)) {
				old = a.data[at]
			}
			if b.data[at] != old {
				return fmt.Errorf("changes of %v since %v miss byte %d", b.id, a.id, at)
			}
		}
		return nil
	}
	for e, err := range w.s.ChangedSince(context.Background(), a.id, db, off) {
		if errors.Is(err, ErrNoLineage) && a.bare && !related {
			return nil
		}
		if err != nil {
			return err
		}
		if e.Off < at || e.Len <= 0 || e.End() > int64(len(b.data)) {
			return fmt.Errorf("changes of %v since %v from %d: extent %+v", b.id, a.id, off, e)
		}
		if err := equal(e.Off); err != nil {
			return err
		}
		if e.Hole && len(bytes.Trim(b.data[e.Off:e.End()], "\x00")) > 0 {
			return fmt.Errorf("changes of %v since %v call %+v a hole", b.id, a.id, e)
		}
		at = e.End()
	}
	return equal(int64(len(b.data)))
}

// written compares what has been written since the parent: all units that have
// been touched and are not zero, and at least those that differ.
func (w *world) written(m *mvol) error {
	if m == nil {
		return nil
	}
	got, err := w.s.Written(context.Background(), m.id)
	if err != nil {
		return err
	}
	u := tiny.UnitSize
	least, most := 0, 0
	for i := range len(m.data) / u {
		b := m.data[i*u : (i+1)*u]
		if isZero(b) {
			continue
		}
		if m.since[i] {
			most++
		}
		var old []byte
		if p := w.vols[m.parent]; p != nil && (i+1)*u <= len(p.data) {
			old = p.data[i*u : (i+1)*u]
		}
		if !bytes.Equal(b, old) && (len(old) > 0 || !isZero(b)) {
			least++
		}
	}
	if n := int(got) / u; n < least || n > most || n != most && !w.vague {
		return fmt.Errorf("%d units have been written to %v since %v, want %d to %d", n, m.id, m.parent, least, most)
	}
	return nil
}

// wouldFreeAll compares what all volumes together would free with all that is
// in use.
func (w *world) wouldFreeAll() error {
	if len(w.pins) > 0 || w.arm.Load() > 0 || w.crashed.Load() != nil {
		return nil
	}
	if err := drain(w.s); err != nil {
		return err
	}
	ids := slices.Collect(maps.Keys(w.vols))
	f, err := w.s.WouldFree(context.Background(), ids...)
	if err != nil {
		return err
	}
	live, err := liveUnits(w.mem.Kill())
	if err == nil && f.Bytes != live*int64(tiny.UnitSize) {
		err = fmt.Errorf("all volumes would free %d bytes, %d units are in use", f.Bytes, live)
	}
	return err
}
