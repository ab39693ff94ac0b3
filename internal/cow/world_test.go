package cow

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"sync/atomic"

	"coppice/internal/vfs"
)

// tiny is a geometry in which every boundary is a few units away: 4 entries
// per page, regions of 64 units, files of 4 regions, units of two sectors.
var tiny = Geometry{UnitSize: 1024, Fanout: 4, PageCounters: 8, RegionsPerFile: 4}

func tinyOptions() Options {
	return Options{
		Geometry: tiny,
		Limits:   Limits{DirectMin: 6 << 10, BulkCache: 16 << 10, PageCache: 64 << 10, Chain: 4, ReapPages: 8},
		FirstFit: true,
		LogBytes: 40 << 10, // a group with long attributes is more than a frame
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
	{"big", 8},
	{"bulk", 4},
	{"zero", 8},
	{"flush", 6},
	{"snapshot", 7},
	{"group", 2},
	{"clone", 5},
	{"revert", 4},
	{"graft", 4},
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
	{"writeout", 3},
	{"destroy", 2},
	{"since", 5},
	{"written", 4},
	{"wouldfree", 1},
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
	bare   bool // the store has given up the data; the model has not
	parent ID
	// Units that have been written or zeroed since the parent was made.
	since map[int]bool
	attrs []byte
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
	c.since = maps.Clone(m.since)
	return &c
}

// touch notes the current versions of the units in a range before it changes.
func (m *mvol) touch(off, n int) {
	u := tiny.UnitSize
	for i := off / u; i*u < off+n; i++ {
		m.old[i] = append(m.old[i], bytes.Clone(m.data[i*u:(i+1)*u]))
		m.since[i] = true
	}
}

// change puts p into the model of a volume and returns what was there. A unit
// that it does not change may be left alone by the store, which makes the count
// of units that have been written vague; those that are zero do not count.
func (w *world) change(m *mvol, off int, p []byte) (prev []byte) {
	m.touch(off, len(p))
	prev = bytes.Clone(m.data[off : off+len(p)])
	copy(m.data[off:], p)
	u := tiny.UnitSize
	for i, k := 0, 0; i < len(p); i = k {
		k = min(len(p), i+u-(off+i)%u)
		unit := (off + i) / u * u
		w.vague = w.vague || bytes.Equal(p[i:k], prev[i:k]) && !isZero(m.data[unit:unit+u])
	}
	return prev
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

	maybe map[ID]*mvol // volumes before an operation that failed
	vague bool         // the store may have counted fewer writes than the model
}

type pinned struct {
	d    *Disk
	data []byte
}

func (w *world) hook(vfs.Call) error {
	switch w.arm.Load() {
	case 0:
	case 1:
		m := w.mem.Kill()
		if w.rng.IntN(3) > 0 {
			m = w.mem.Crash(w.rng.IntN)
		}
		w.crashed.Store(m)
		w.arm.Store(0) // only now may another crash be armed
	default:
		w.arm.Add(-1)
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
func hasData(m *mvol) bool   { return !m.bare }
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
		m := &mvol{id: w.newID(), data: make([]byte, int(o.a%70)*tiny.UnitSize), old: map[int][][]byte{}, since: map[int]bool{}}
		if o.b%3 == 0 {
			m.attrs = content(o.seed, int(o.c)%(3*tiny.UnitSize))
		}
		return w.volumeOp(func() error {
			_, err := w.s.Create(ctx, m.id, int64(len(m.data)), m.attrs)
			return err
		}, func() { w.vols[m.id] = m })
	case "write", "big", "bulk", "same":
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
		prev := w.change(m, off, p)
		write := d.WriteAt
		if o.kind == "bulk" {
			write = d.WriteBulk
		}
		if _, err = write(p, int64(off)); full(err) {
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
		prev := w.change(m, off, make([]byte, n))
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
	case "writeout":
		for _, v := range w.s.changedVolumes() {
			w.s.writeOut(v)
		}
		return nil
	case "snapshot", "clone", "group":
		n := 1
		if o.kind == "group" {
			n = 3
		}
		var pairs []Pair
		var news []*mvol
		for i := range n {
			src := w.pick(o.a+uint32(i), hasData)
			if src == nil || len(w.vols)+i >= 12 {
				return nil
			}
			m := src.clone()
			m.id, m.ro = w.newID(), o.kind != "clone"
			m.settle()
			p := Pair{Src: src.id, New: m.id}
			if o.b%3 == 0 {
				p.Attrs = content(o.seed, int(o.c)%(4*tiny.UnitSize+1))
				m.attrs = p.Attrs
			}
			switch {
			case src.ro:
				m.parent = src.id
				m.since = map[int]bool{}
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
					m.since = maps.Clone(src.since)
					if m.ro {
						src.parent, src.since = m.id, map[int]bool{}
					}
				}
				w.vols[m.id] = m
			}
		})
	case "revert":
		m, to := w.pick(o.a, writable), w.pick(o.b, hasData)
		if m == nil || m == to {
			return nil
		}
		return w.volumeOp(func() error { return w.s.Revert(ctx, m.id, to.id) }, func() {
			m.before = m.clone()
			m.data = bytes.Clone(to.data)
			m.settle()
			m.parent, m.since = to.id, map[int]bool{}
			if !to.ro {
				m.parent, m.since = to.parent, maps.Clone(to.since)
			}
		})
	case "graft":
		return w.graft(o)
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
					maps.Copy(c.since, m.since)
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
		m := w.pick(o.a, func(m *mvol) bool { return len(m.data) > 0 && !m.bare })
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
		return w.diff(w.pick(o.a, hasData), w.pick(o.b, hasData), int64(o.c))
	case "destroy":
		m := w.pick(o.a, func(m *mvol) bool { return m.ro })
		if m == nil {
			return nil
		}
		return w.volumeOp(func() error { return w.s.DestroyData(ctx, m.id) }, func() { m.bare = true })
	case "since":
		return w.since(w.pick(o.a, anyVolume), w.pick(o.b, hasData), int64(o.c))
	case "written":
		return w.written(w.pick(o.a, hasData))
	case "wouldfree":
		return w.wouldFreeAll()
	case "pin":
		m := w.pick(o.a, hasData)
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

// graft gives ranges of one volume to another, or to itself.
func (w *world) graft(o op) error {
	m, src := w.pick(o.a, writableN), w.pick(o.b, func(m *mvol) bool { return hasData(m) && len(m.data) > 0 })
	if m == nil || src == nil {
		return nil
	}
	rng := rand.New(rand.NewPCG(o.seed, 4))
	u := tiny.UnitSize
	var ranges []RangeClone
	for range 1 + o.c%3 {
		n := 1 + rng.IntN(min(len(m.data), len(src.data), 24*u)/u)
		ranges = append(ranges, RangeClone{
			To:   int64(rng.IntN(len(m.data)/u-n+1) * u),
			From: int64(rng.IntN(len(src.data)/u-n+1) * u),
			Len:  int64(n * u),
		})
	}
	to, err := w.disk(m)
	if err != nil {
		return err
	}
	from, err := w.disk(src)
	if err != nil {
		return err
	}
	return w.volumeOp(func() error { return w.s.CloneRanges(context.Background(), to, from, ranges) }, func() {
		m.before = m.clone()
		from := bytes.Clone(src.data)
		for _, r := range ranges {
			w.change(m, int(r.To), from[r.From:r.From+r.Len])
		}
		m.settle()
	})
}
