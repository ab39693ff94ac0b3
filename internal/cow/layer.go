package cow

import (
	"slices"
	"sync"
	"sync/atomic"

	"github.com/tidwall/btree"
)

// slotState says what a layer has for a unit.
type slotState uint8

const (
	slotNone slotState = iota // nothing: look further down
	slotZero
	slotBuf  // in memory
	slotAddr // in the space files
	slotLost // cannot be had; never in a layer
)

// slot is a layer's version of one unit.
type slot struct {
	idx   uint16 // of the unit in its chunk
	state slotState
	crc   uint32 // slotBuf and slotAddr
	addr  uint64 // slotAddr
	buf   []byte // slotBuf; immutable
}

// same reports whether two slots are the same version of a unit.
func (s slot) same(o slot) bool {
	if s.state != o.state || s.addr != o.addr || s.crc != o.crc {
		return false
	}
	return s.state != slotBuf || &s.buf[0] == &o.buf[0]
}

// layer is a set of changes to a volume that no tree holds yet, by unit.
// Units are grouped in chunks, the units of one leaf. Changes of whole chunks
// to zero are kept as ranges.
//
// Only the top layer of a writable volume changes; a sealed one is immutable
// and may lie under several volumes.
type layer struct {
	pathCost  int64 // units promised for the first change of a chunk: a path of map pages
	tableCost int64 // units promised for the first change of all: a path of the volume table

	stays atomic.Bool               // what is in memory is not to be written to the space files early
	some  atomic.Bool               // there has been a change; until then readers pass without the lock
	mu    sync.RWMutex              // guards the maps; not needed once sealed, but harmless
	slots btree.Map[uint64, []slot] // by chunk; each sorted by idx, never empty
	zeros btree.Map[uint64, uint64] // ranges of chunks that are zero below their slots: first → end
	load  load                      // what the layer occupies

	epoch  uint64 // at which it was sealed
	direct bool   // has had a slotAddr
	refs   int    // views and checkpoints that hold it; guarded by Store.mu
	merged bool   // its contents belong to a tree; guarded by Store.mu
	graft  *graft // what it stands for, in place of changes of its own
}

// load is what a change adds to the memory and the promises of a layer.
type load struct {
	entries  int64
	buffers  int64 // bytes
	promised int64 // units
}

func (l *load) add(o load) {
	l.entries += o.entries
	l.buffers += o.buffers
	l.promised += o.promised
}

// newLayer makes an empty layer of a volume whose tree has the given height.
func newLayer(height int) *layer {
	return &layer{pathCost: int64(height), tableCost: maxTableHeight + 1}
}

func (l *layer) empty() bool {
	l.mu.RLock()
	defer l.mu.RUnlock()
	return l.slots.Len() == 0 && l.zeros.Len() == 0
}

// putRun stores slots, sorted by idx, in a chunk. It returns what the layer's load
// grew by and the units of the space files that nobody refers to now.
// l.mu is held.
func (l *layer) putRun(chunk uint64, add []slot) (d load, dropped []uint64) {
	l.some.Store(true)
	d.promised = l.first()
	old, ok := l.slots.Get(chunk)
	if !ok {
		d.promised += l.pathCost
	}
	for _, s := range add {
		d.add(s.load())
		l.direct = l.direct || s.state == slotAddr
	}
	d.entries += int64(len(add))
	var out []slot
	switch {
	case len(old) == 0:
		out = slices.Clone(add)
	case old[len(old)-1].idx < add[0].idx:
		out = append(old, add...)
	default:
		out = make([]slot, 0, len(old)+len(add))
		i := 0
		for _, s := range add {
			for i < len(old) && old[i].idx < s.idx {
				out = append(out, old[i])
				i++
			}
			if i < len(old) && old[i].idx == s.idx {
				dropped = old[i].drop(&d, dropped)
				i++
			}
			out = append(out, s)
		}
		out = append(out, old[i:]...)
	}
	l.slots.Set(chunk, out)
	l.load.add(d)
	return d, dropped
}

// first is what the first change of a layer promises.
func (l *layer) first() int64 {
	c := l.tableCost
	l.tableCost = 0
	return c
}

// absorb takes over everything that o has, which lies above l. o must not
// change any more; its units become l's. l.mu is held.
func (l *layer) absorb(o *layer) (d load, dropped []uint64) {
	o.mu.RLock()
	defer o.mu.RUnlock()
	do := func(g load, gone []uint64) {
		d.add(g)
		dropped = append(dropped, gone...)
	}
	o.zeros.Scan(func(from, to uint64) bool {
		do(l.zeroChunks(from, to))
		return true
	})
	o.slots.Scan(func(c uint64, ss []slot) bool {
		do(l.putRun(c, ss))
		return true
	})
	return d, dropped
}

// occupies returns the layer's load and whether it has units that were
// written to the space files.
func (l *layer) occupies() (load, bool) {
	l.mu.RLock()
	defer l.mu.RUnlock()
	return l.load, l.direct
}

// spend takes n units out of the layer's promise: they have been used or given
// back.
func (l *layer) spend(n int64) {
	l.mu.Lock()
	l.load.promised -= n
	l.mu.Unlock()
}

// takeLoad takes the layer's load out of it, for another account.
func (l *layer) takeLoad() load {
	l.mu.Lock()
	defer l.mu.Unlock()
	g := l.load
	l.load = load{}
	return g
}

// load is what the slot itself occupies.
func (s slot) load() load {
	if s.state == slotBuf {
		return load{buffers: int64(len(s.buf)), promised: 1}
	}
	return load{}
}

// drop takes a slot that is replaced out of the account.
func (s slot) drop(d *load, dropped []uint64) []uint64 {
	g := s.load()
	d.add(load{entries: -1, buffers: -g.buffers, promised: -g.promised})
	if s.state == slotAddr {
		dropped = append(dropped, s.addr)
	}
	return dropped
}

// zeroChunks makes whole chunks [from, to) zero. l.mu is held.
func (l *layer) zeroChunks(from, to uint64) (d load, dropped []uint64) {
	l.some.Store(true)
	d.promised = l.first()
	var gone []uint64
	l.slots.Ascend(from, func(c uint64, ss []slot) bool {
		if c >= to {
			return false
		}
		for _, s := range ss {
			dropped = s.drop(&d, dropped)
		}
		d.promised -= l.pathCost
		gone = append(gone, c)
		return true
	})
	for _, c := range gone {
		l.slots.Delete(c)
	}
	before := l.zeros.Len()
	l.zeros.Descend(from, func(f, t uint64) bool { // joins what it touches
		if t >= from {
			from, to = f, max(to, t)
		}
		return false
	})
	gone = gone[:0]
	l.zeros.Ascend(from, func(f, t uint64) bool {
		if f > to {
			return false
		}
		to = max(to, t)
		gone = append(gone, f)
		return true
	})
	for _, f := range gone {
		l.zeros.Delete(f)
	}
	l.zeros.Set(from, to)
	// The edges of a range open a path each.
	n := int64(l.zeros.Len() - before)
	d.promised += 2 * n * l.pathCost
	d.entries += n
	l.load.add(d)
	return d, dropped
}

// zeroed reports whether a chunk is zero below its slots. l.mu is held.
func (l *layer) zeroed(chunk uint64) bool {
	z := false
	l.zeros.Descend(chunk, func(_, to uint64) bool {
		z = chunk < to
		return false
	})
	return z
}

// get returns the layer's version of a unit.
func (l *layer) get(chunk uint64, idx int) slot {
	if !l.some.Load() {
		return slot{}
	}
	l.mu.RLock()
	defer l.mu.RUnlock()
	return l.getLocked(chunk, idx)
}

func (l *layer) getLocked(chunk uint64, idx int) slot {
	ss, _ := l.slots.Get(chunk)
	if i := search(ss, idx); i < len(ss) && int(ss[i].idx) == idx {
		return ss[i]
	}
	if l.zeroed(chunk) {
		return slot{idx: uint16(idx), state: slotZero}
	}
	return slot{}
}

// search returns the place of unit idx in slots sorted by idx, or where it
// would be. Most are in unbroken runs, in which the place is known.
func search(ss []slot, idx int) int {
	if len(ss) == 0 || idx <= int(ss[0].idx) {
		return 0
	}
	if i := idx - int(ss[0].idx); i < len(ss) && int(ss[i].idx) == idx {
		return i
	}
	lo, hi := 1, min(len(ss), idx-int(ss[0].idx)) // numbers differ, so none is further behind
	for lo < hi {
		m := int(uint(lo+hi) / 2)
		if int(ss[m].idx) < idx {
			lo = m + 1
		} else {
			hi = m
		}
	}
	return lo
}

// fill sets those of out, the units from idx lo on of a chunk, for which the
// layer has a version and out has none. It returns how many it set.
func (l *layer) fill(chunk uint64, lo int, out []slot) int {
	if !l.some.Load() {
		return 0
	}
	l.mu.RLock()
	defer l.mu.RUnlock()
	n := 0
	ss, _ := l.slots.Get(chunk)
	for _, s := range ss[search(ss, lo):] {
		i := int(s.idx) - lo
		if i >= len(out) {
			break
		}
		if out[i].state == slotNone {
			out[i] = s
			n++
		}
	}
	if l.zeroed(chunk) {
		for i := range out {
			if out[i].state == slotNone {
				out[i] = slot{idx: uint16(lo + i), state: slotZero}
				n++
			}
		}
	}
	return n
}

// touches reports whether the layer changes anything in chunks [from, to).
func (l *layer) touches(from, to uint64) bool {
	l.mu.RLock()
	defer l.mu.RUnlock()
	return l.touchesLocked(from, to)
}

func (l *layer) touchesLocked(from, to uint64) bool {
	hit := false
	l.slots.Ascend(from, func(c uint64, _ []slot) bool {
		hit = c < to
		return false
	})
	if hit {
		return true
	}
	l.zeros.Descend(to-1, func(_, t uint64) bool {
		hit = t > from
		return false
	})
	return hit
}

// clears reports whether the layer makes all of chunks [from, to) zero.
func (l *layer) clears(from, to uint64) bool {
	l.mu.RLock()
	defer l.mu.RUnlock()
	z := false
	l.zeros.Descend(from, func(_, t uint64) bool {
		z = to <= t
		return false
	})
	if !z {
		return false
	}
	l.slots.Ascend(from, func(c uint64, _ []slot) bool {
		z = c >= to
		return false
	})
	return z
}

// chunk returns the slots of a chunk and whether all else in it is zero.
func (l *layer) chunk(c uint64) ([]slot, bool) {
	l.mu.RLock()
	defer l.mu.RUnlock()
	ss, _ := l.slots.Get(c)
	return ss, l.zeroed(c)
}

// lastChunk returns the highest chunk with slots, -1 when there is none.
func (l *layer) lastChunk() int64 {
	l.mu.RLock()
	defer l.mu.RUnlock()
	if c, _, ok := l.slots.Max(); ok {
		return int64(c)
	}
	return -1
}

// addrs returns every unit of the space files that the layer refers to.
func (l *layer) addrs() []uint64 {
	l.mu.RLock()
	defer l.mu.RUnlock()
	var out []uint64
	l.slots.Scan(func(_ uint64, ss []slot) bool {
		for _, s := range ss {
			if s.state == slotAddr {
				out = append(out, s.addr)
			}
		}
		return true
	})
	return out
}
