package cow

import (
	"bytes"
	"context"
	"errors"
	"flag"
	"fmt"
	"math/rand/v2"
	"slices"
	"sync/atomic"
	"testing"
	"time"

	"coppice/internal/vfs"
)

var (
	modelRuns = flag.Int("cow.runs", 120, "random runs of TestModel")
	modelOps  = flag.Int("cow.ops", 120, "operations of a run of TestModel")
	modelSeed = flag.Uint64("cow.seed", 0, "seed of the first run of TestModel; 0 takes the time")
)

// tiny is a geometry in which every boundary is a few units away: 4 entries
// per page, regions of 64 units, files of 4 regions, units of two sectors.
var tiny = Geometry{UnitSize: 1024, Fanout: 4, PageCounters: 8, RegionsPerFile: 4}

func tinyOptions() Options {
	return Options{
		Geometry: tiny,
		Limits:   Limits{DirectMin: 6 << 10, PageCache: 64 << 10, Chain: 4, ReapPages: 8},
		FirstFit: true,
	}
}

// op is one step of a random run. Its numbers mean something relative to what
// is there when it runs, so that any subset of a run is a run.
type op struct {
	kind    string
	a, b, c uint32
	seed    uint64
}

var opKinds = []struct {
	kind   string
	weight int
}{
	{"create", 4},
	{"write", 22},
	{"big", 12},
	{"zero", 8},
	{"flush", 6},
	{"snapshot", 7},
	{"group", 2},
	{"clone", 5},
	{"revert", 4},
	{"resize", 4},
	{"delete", 5},
	{"attrs", 3},
	{"diff", 5},
	{"read", 10},
	{"pin", 4},
	{"unpin", 3},
	{"reopen", 1},
	{"kill", 1},
	{"crash", 2},
	{"midcrash", 4},
	{"check", 6},
	{"scrub", 1},
	{"list", 2},
	{"same", 3},
	{"sync", 2},
}

func randomOps(rng *rand.Rand, n int) []op {
	total := 0
	for _, k := range opKinds {
		total += k.weight
	}
	ops := make([]op, n)
	for i := range ops {
		x := rng.IntN(total)
		for _, k := range opKinds {
			if x -= k.weight; x < 0 {
				ops[i] = op{k.kind, rng.Uint32(), rng.Uint32(), rng.Uint32(), rng.Uint64()}
				break
			}
		}
	}
	return ops
}

// mvol is the model of a volume: its bytes, and for each unit the versions a
// crash may bring back.
type mvol struct {
	id     ID
	data   []byte
	old    map[int][][]byte // by unit
	ro     bool
	parent ID
	attrs  []byte
	// A crash may also bring back the size and contents from before the
	// operation that was running.
	before *mvol
}

func (m *mvol) clone() *mvol {
	c := *m
	c.data = bytes.Clone(m.data)
	c.old = map[int][][]byte{}
	c.before = nil
	for u, vs := range m.old {
		c.old[u] = slices.Clone(vs)
	}
	return &c
}

// touch notes the current versions of the units in a range before it changes.
func (m *mvol) touch(off, n int) {
	u := tiny.UnitSize
	for i := off / u; i*u < off+n; i++ {
		m.old[i] = append(m.old[i], bytes.Clone(m.data[i*u:(i+1)*u]))
	}
}

func (m *mvol) settle() { m.old = map[int][][]byte{} }

// world is a store beside its model.
type world struct {
	mem   *vfs.Mem
	inj   *vfs.Inject
	opts  Options
	s     *Store
	vols  map[ID]*mvol
	disks map[ID]*Disk
	pins  []pinned
	ids   byte

	// A crash in the middle of an operation.
	arm     atomic.Int64 // calls left, 0 when not armed
	rng     *rand.Rand
	crashed atomic.Pointer[vfs.Mem]
}

type pinned struct {
	d    *Disk
	data []byte
}

func (w *world) hook(vfs.Call) error {
	if w.arm.Load() > 0 {
		if w.arm.Add(-1) == 0 {
			w.crashed.Store(w.mem.Crash(w.rng.IntN))
		}
	}
	return nil
}

func newWorld(o Options) (*world, error) {
	w := &world{opts: o, vols: map[ID]*mvol{}, disks: map[ID]*Disk{}}
	w.use(vfs.NewMem(0))
	s, err := Create(context.Background(), w.inj, o)
	w.s = s
	return w, err
}

func (w *world) use(m *vfs.Mem) {
	w.mem = m
	w.inj = vfs.NewInject(m, nil, w.lockedHook())
}

// lockedHook serialises the hook: calls come from several goroutines.
func (w *world) lockedHook() func(vfs.Call) error {
	mu := make(chan struct{}, 1)
	return func(c vfs.Call) error {
		mu <- struct{}{}
		defer func() { <-mu }()
		return w.hook(c)
	}
}

func (w *world) newID() ID {
	w.ids++
	return ID{w.ids, 15: w.ids}
}

// pick returns a volume that satisfies ok, nil when there is none.
func (w *world) pick(n uint32, ok func(*mvol) bool) *mvol {
	var list []*mvol
	for _, m := range w.vols {
		if ok(m) {
			list = append(list, m)
		}
	}
	if len(list) == 0 {
		return nil
	}
	slices.SortFunc(list, func(a, b *mvol) int { return bytes.Compare(a.id[:], b.id[:]) })
	return list[int(n)%len(list)]
}

func anyVolume(*mvol) bool   { return true }
func writable(m *mvol) bool  { return !m.ro }
func writableN(m *mvol) bool { return !m.ro && len(m.data) > 0 }

func (w *world) disk(m *mvol) (*Disk, error) {
	if d := w.disks[m.id]; d != nil {
		return d, nil
	}
	d, err := w.s.OpenDisk(context.Background(), m.id, Live)
	w.disks[m.id] = d
	return d, err
}

// content is a range of bytes with runs of equal units, zeros among them.
func content(seed uint64, n int) []byte {
	rng := rand.New(rand.NewPCG(seed, 1))
	b := make([]byte, n)
	for i := 0; i < n; {
		k := 1 + rng.IntN(3*tiny.UnitSize)
		v := byte(rng.IntN(4))
		for ; k > 0 && i < n; i, k = i+1, k-1 {
			b[i] = v
			if v == 3 {
				b[i] = byte(rng.Uint32())
			}
		}
	}
	return b
}

func full(err error) bool { return errors.Is(err, ErrNoSpace) }

// step runs one operation on store and model.
func (w *world) step(o op) error {
	ctx := context.Background()
	switch o.kind {
	case "create":
		if len(w.vols) >= 12 {
			return nil
		}
		m := &mvol{id: w.newID(), data: make([]byte, int(o.a%70)*tiny.UnitSize), old: map[int][][]byte{}}
		if o.b%3 == 0 {
			m.attrs = content(o.seed, int(o.c)%(3*tiny.UnitSize))
		}
		return w.volumeOp(func() error {
			_, err := w.s.Create(ctx, m.id, int64(len(m.data)), m.attrs)
			return err
		}, func() { w.vols[m.id] = m })
	case "write", "big", "same":
		m := w.pick(o.a, writableN)
		if m == nil {
			return nil
		}
		d, err := w.disk(m)
		if err != nil {
			return err
		}
		off, n := int(o.b)%len(m.data), int(o.c)%(2*tiny.UnitSize)+1
		if o.kind != "write" {
			off -= off % tiny.UnitSize
			n = (int(o.c)%24 + 1) * tiny.UnitSize
		}
		n = min(n, len(m.data)-off)
		p := content(o.seed, n)
		if o.kind == "same" {
			copy(p[n/2:], m.data[off+n/2:off+n])
		}
		m.touch(off, n)
		prev := bytes.Clone(m.data[off : off+n])
		copy(m.data[off:], p)
		if _, err = d.WriteAt(p, int64(off)); full(err) {
			return w.resync(m, off, prev)
		}
		return err
	case "zero":
		m := w.pick(o.a, writableN)
		if m == nil {
			return nil
		}
		d, err := w.disk(m)
		if err != nil {
			return err
		}
		off := int(o.b) % len(m.data)
		n := int(o.c) % (len(m.data) - off + 1)
		if o.seed%2 == 0 {
			off -= off % tiny.UnitSize
			n -= n % tiny.UnitSize
		}
		if n == 0 {
			return nil
		}
		m.touch(off, n)
		prev := bytes.Clone(m.data[off : off+n])
		clear(m.data[off : off+n])
		if err = d.Zero(ctx, int64(off), int64(n)); full(err) {
			return w.resync(m, off, prev)
		}
		return err
	case "flush":
		m := w.pick(o.a, writable)
		if m == nil {
			return nil
		}
		d, err := w.disk(m)
		if err == nil {
			err = d.Flush(ctx)
		}
		if err == nil && w.crashed.Load() == nil {
			m.settle()
		}
		return err
	case "sync":
		return w.s.sync(ctx)
	case "snapshot", "clone", "group":
		n := 1
		if o.kind == "group" {
			n = 3
		}
		var pairs []Pair
		var news []*mvol
		for i := range n {
			src := w.pick(o.a+uint32(i), anyVolume)
			if src == nil || len(w.vols)+i >= 12 {
				return nil
			}
			m := src.clone()
			m.id, m.ro = w.newID(), o.kind != "clone"
			m.settle()
			p := Pair{Src: src.id, New: m.id}
			if o.b%3 == 0 {
				p.Attrs = content(o.seed, int(o.c)%tiny.UnitSize)
				m.attrs = p.Attrs
			}
			switch {
			case src.ro:
				m.parent = src.id
			default:
				m.parent = src.parent
			}
			pairs, news = append(pairs, p), append(news, m)
		}
		return w.volumeOp(func() error {
			if o.kind == "clone" {
				_, err := w.s.Clone(ctx, pairs[0])
				return err
			}
			_, err := w.s.Snapshot(ctx, pairs)
			return err
		}, func() {
			for i, m := range news {
				src := w.vols[pairs[i].Src]
				if !src.ro {
					m.parent = src.parent // an earlier pair of the group may have the same source
					if m.ro {
						src.parent = m.id
					}
				}
				w.vols[m.id] = m
			}
		})
	case "revert":
		m, to := w.pick(o.a, writable), w.pick(o.b, anyVolume)
		if m == nil || m == to {
			return nil
		}
		return w.volumeOp(func() error { return w.s.Revert(ctx, m.id, to.id) }, func() {
			m.before = m.clone()
			m.data = bytes.Clone(to.data)
			m.settle()
			m.parent = to.id
			if !to.ro {
				m.parent = to.parent
			}
		})
	case "resize":
		m := w.pick(o.a, writable)
		if m == nil {
			return nil
		}
		size := int(o.b%90) * tiny.UnitSize
		return w.volumeOp(func() error {
			_, err := w.s.Resize(ctx, m.id, int64(size))
			return err
		}, func() {
			m.before = m.clone()
			grown := make([]byte, size)
			copy(grown, m.data)
			m.data = grown
			m.settle()
		})
	case "delete":
		m := w.pick(o.a, anyVolume)
		if m == nil {
			return nil
		}
		delete(w.disks, m.id)
		return w.volumeOp(func() error { return w.s.Delete(ctx, m.id) }, func() {
			delete(w.vols, m.id)
			for _, c := range w.vols {
				if c.parent == m.id {
					c.parent = m.parent
				}
			}
		})
	case "attrs":
		m := w.pick(o.a, anyVolume)
		if m == nil {
			return nil
		}
		attrs := content(o.seed, int(o.c)%(4*tiny.UnitSize+1))
		return w.volumeOp(func() error { return w.s.SetAttrs(ctx, m.id, attrs) }, func() {
			m.before = m.clone()
			m.attrs = attrs
		})
	case "read":
		m := w.pick(o.a, func(m *mvol) bool { return len(m.data) > 0 })
		if m == nil {
			return nil
		}
		d, err := w.disk(m)
		if err != nil {
			return err
		}
		off := int(o.b) % len(m.data)
		p := make([]byte, int(o.c)%(len(m.data)-off)+1)
		if _, err := d.ReadAt(p, int64(off)); err != nil {
			return err
		}
		return sameBytes(p, m.data[off:off+len(p)], fmt.Sprintf("read of %d at %d of %v", len(p), off, m.id))
	case "diff":
		return w.diff(w.pick(o.a, anyVolume), w.pick(o.b, anyVolume), int64(o.c))
	case "pin":
		m := w.pick(o.a, anyVolume)
		if m == nil || len(w.pins) > 4 {
			return nil
		}
		d, err := w.s.OpenDisk(ctx, m.id, Pinned)
		w.pins = append(w.pins, pinned{d, bytes.Clone(m.data)})
		return err
	case "unpin":
		if len(w.pins) == 0 {
			return nil
		}
		i := int(o.a) % len(w.pins)
		p := w.pins[i]
		w.pins = slices.Delete(w.pins, i, i+1)
		got := make([]byte, len(p.data))
		if _, err := p.d.ReadAt(got, 0); err != nil {
			return fmt.Errorf("pin: %w", err)
		}
		if err := sameBytes(got, p.data, "pin"); err != nil {
			return err
		}
		return p.d.Close()
	case "reopen":
		err := w.s.Close()
		w.s = nil
		if err != nil || w.crashed.Load() != nil {
			return err
		}
		for _, m := range w.vols {
			m.settle()
		}
		return w.open(w.mem)
	case "kill", "crash":
		m := w.mem.Kill()
		if o.kind == "crash" {
			m = w.mem.Crash(rand.New(rand.NewPCG(o.seed, 2)).IntN)
		}
		w.abandon()
		return w.open(m)
	case "midcrash":
		if w.arm.Load() == 0 && w.crashed.Load() == nil {
			w.rng = rand.New(rand.NewPCG(o.seed, 3))
			w.arm.Store(1 + int64(o.a%25))
		}
		return nil
	case "check":
		return checkClean(w.mem.Kill())
	case "scrub":
		for p, err := range w.s.Check(ctx) {
			return fmt.Errorf("online check: %v %w", p, err)
		}
		return nil
	case "list":
		return w.list()
	}
	return fmt.Errorf("unknown operation %q", o.kind)
}

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
	w.arm.Store(0)
	w.crashed.Store(nil)
	if w.s != nil {
		_ = w.s.Close()
		w.s = nil
	}
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
		if i.Size != int64(len(m.data)) || i.ReadOnly != m.ro || i.Parent != m.parent || i.AttrsLen != len(m.attrs) {
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

// shrink removes operations as long as the run still fails.
func shrink(o Options, ops []op, deadline time.Time) []op {
	for n := len(ops) / 2; n > 0; n /= 2 {
		for i := 0; i+n <= len(ops) && time.Now().Before(deadline); {
			less := slices.Delete(slices.Clone(ops), i, i+n)
			if run(o, less) != nil {
				ops = less
			} else {
				i += n
			}
		}
	}
	return ops
}

// TestModel compares random operations, crashes among them, with a model of
// byte slices.
func TestModel(t *testing.T) {
	seed := *modelSeed
	if seed == 0 {
		seed = uint64(time.Now().UnixNano())
	}
	for i := range uint64(*modelRuns) {
		rng := rand.New(rand.NewPCG(seed+i, 0))
		o := tinyOptions()
		if i%3 == 1 {
			o.MaxBytes = int64(5+rng.IntN(6)) * tiny.regionBytes()
		}
		if i%4 == 3 {
			o.Limits.Entries = 40
		}
		ops := randomOps(rng, *modelOps)
		if err := run(o, ops); err != nil {
			small := shrink(o, ops, time.Now().Add(20*time.Second))
			for _, o := range small {
				t.Logf("%+v", o)
			}
			t.Fatalf("-cow.seed=%d: %v\nshrunk to %d operations: %v", seed+i, err, len(small), run(o, small))
		}
	}
}
