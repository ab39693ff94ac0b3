package cow

import (
	"context"
	"fmt"
	"iter"
)

const (
	// diffExtents and diffPages bound what one step of a walk gathers and
	// reads before it lets go of the views.
	diffExtents = 512
	diffPages   = 2048
)

// Diff yields, in ascending order from byte off on, the ranges of to that may
// differ from from; what from does not have counts as zero. A range that
// reads as zero in to has Hole set. Both disks are of this store, related or
// not. The walk goes in short steps, each of which looks at the disks as they
// are then: for a diff of one instant both are pinned or read-only. A caller
// may stop and continue at the end of the last extent.
//
// It costs in proportion to what differs, for disks that share their past.
// The grain is the unit: a unit written with equal bytes in a small write
// counts as different.
func (s *Store) Diff(ctx context.Context, from, to *Disk, off int64) iter.Seq2[Extent, error] {
	return func(yield func(Extent, error) bool) {
		if from.s != s || to.s != s || off < 0 {
			yield(Extent{}, fmt.Errorf("%w: diff", ErrInvalid))
			return
		}
		s.walkDiff(ctx, from, to, off, MaxSize, yield)
	}
}

// Extents describes n bytes from off as adjoining extents: data where there
// may be some, holes where all is zero. What lies past the end is left out.
func (d *Disk) Extents(ctx context.Context, off, n int64) iter.Seq2[Extent, error] {
	return func(yield func(Extent, error) bool) {
		if off < 0 || n < 0 {
			yield(Extent{}, fmt.Errorf("%w: extents", ErrInvalid))
			return
		}
		end := off + min(n, MaxSize)
		ok := d.s.walkDiff(ctx, nil, d, off, end, func(e Extent, err error) bool {
			if err == nil && e.Off > off && !yield(Extent{Off: off, Len: e.Off - off, Hole: true}, nil) {
				return false
			}
			off = e.End()
			return yield(e, err)
		})
		if end = min(end, d.Size()); ok && off < end {
			yield(Extent{Off: off, Len: end - off, Hole: true}, nil)
		}
	}
}

// walkDiff yields what differs in [off, end); a nil from is all zero. It
// reports whether it came to the end.
func (s *Store) walkDiff(ctx context.Context, from, to *Disk, off, end int64, yield func(Extent, error) bool) bool {
	return walkSteps(off, end, yield, func(off int64) ([]Extent, int64, error) {
		return s.diffStep(ctx, from, to, off, end)
	})
}

// walkSteps yields what step gathers from off on, step by step, adjoining
// extents joined. It reports whether it came to the end.
func walkSteps(off, end int64, yield func(Extent, error) bool, step func(off int64) ([]Extent, int64, error)) bool {
	var hold Extent // the last extent, which the next one may continue
	for off < end {
		batch, next, err := step(off)
		for _, e := range batch {
			if hold.Len > 0 && hold.End() == e.Off && hold.Hole == e.Hole {
				hold.Len += e.Len
				continue
			}
			if hold.Len > 0 && !yield(hold, nil) {
				return false
			}
			hold = e
		}
		if err != nil {
			if hold.Len == 0 || yield(hold, nil) {
				yield(Extent{}, err)
			}
			return false
		}
		off = next
	}
	return hold.Len == 0 || yield(hold, nil)
}

// diffStep gathers some differences from off on and says where to go on.
func (s *Store) diffStep(ctx context.Context, from, to *Disk, off, end int64) ([]Extent, int64, error) {
	if err := ctx.Err(); err != nil {
		return nil, 0, context.Cause(ctx)
	}
	if from != nil && from.closed.Load() {
		return nil, 0, ErrClosed
	}
	if err := to.begin(false); err != nil {
		return nil, 0, err
	}
	defer s.end()
	e := s.eras.enter()
	defer e.leave()
	if err := to.alive(); err != nil {
		return nil, 0, err
	}
	a := &view{}
	s.mu.Lock() // both views of one generation: equal addresses mean equal contents
	b := to.v.view.Load()
	if from != nil {
		a = from.v.view.Load()
	}
	s.mu.Unlock()
	if from != nil {
		if err := from.alive(); err != nil {
			return nil, 0, err
		}
	}
	switch {
	case b.bare:
		return nil, 0, to.noData()
	case a.bare:
		return nil, 0, from.noData()
	}
	u := int64(s.geo.UnitSize)
	w := &diffWalk{
		pageReader: s.pageReader, a: a, b: b, first: off, end: min(end, b.size),
		old: make([]slot, s.geo.Fanout), now: make([]slot, s.geo.Fanout),
	}
	w.layers = differingLayers(a, b)
	level := max(1, int(a.base.root.level), int(b.base.root.level), s.geo.height(s.geo.units(w.end)))
	if off < w.end {
		if err := w.walk(a.base.root, b.base.root, level, 0); err != nil {
			id := to.id
			if w.inOld {
				id = from.id
			}
			if ce, ok := damagedAt(err, int64(w.at)*u).(*CorruptError); ok {
				ce.Volume, err = id, ce
			}
			return w.out, 0, err
		}
	}
	if w.stopped {
		return w.out, int64(w.next) * u, nil
	}
	return w.out, end, nil
}

// differingLayers returns the layers that only one of two views has.
func differingLayers(a, b *view) []*layer {
	seen := map[*layer]int{}
	for _, v := range []*view{a, b} {
		v.chain(func(l *layer) bool {
			seen[l]++
			return true
		})
	}
	var out []*layer
	for l, n := range seen {
		if n == 1 {
			out = append(out, l)
		}
	}
	return out
}

// diffWalk compares two views by walking their trees together.
type diffWalk struct {
	*pageReader
	a, b       *view
	layers     []*layer // in one view only: a reason to descend
	first, end int64    // bytes
	old, now   []slot

	out     []Extent
	pages   int
	next    uint64 // unit to go on at
	stopped bool
	at      uint64 // unit being looked at, for errors
	inOld   bool   // an error is in a
}

// walk compares the subtrees x of a and y of b, seen as pages of the given
// level that begin at unit lo.
func (w *diffWalk) walk(x, y entry, level int, lo uint64) error {
	n := w.geo.span(level)
	firstUnit := uint64(w.first / int64(w.geo.UnitSize))
	if w.stopped || lo >= w.geo.units(w.end) || lo+n <= firstUnit {
		return nil
	}
	w.at = lo
	chunk, chunks := lo/uint64(w.geo.Fanout), n/uint64(w.geo.Fanout)
	x, plainX := w.a.under(x, chunk, chunks)
	y, plainY := w.b.under(y, chunk, chunks)
	if x.sameContent(y) && (plainX && plainY || !w.touched(chunk, chunks)) {
		return nil
	}
	if w.pages >= diffPages || len(w.out) >= diffExtents {
		w.stopped, w.next = true, max(lo, firstUnit)
		return nil
	}
	w.pages++
	if level == 1 && !(plainX && plainY) {
		return w.layered(lo)
	}
	old, err := w.childrenOf(x, level)
	if err != nil {
		w.inOld = true
		return err
	}
	now, err := w.childrenOf(y, level)
	if err != nil {
		return err
	}
	if level == 1 {
		return w.plain(lo, old, now)
	}
	for i := range w.geo.Fanout {
		if plainX && plainY && old.equal(now, i) {
			continue
		}
		if err := w.walk(old.at(i), now.at(i), level-1, lo+uint64(i)*w.geo.span(level-1)); err != nil {
			return err
		}
	}
	return nil
}

// under returns what a view has in n chunks from chunk on, given what its tree
// has: the same, or a hole when the layers clear the range. It is plain when
// the layers have nothing more to say there.
func (v *view) under(e entry, chunk, n uint64) (_ entry, plain bool) {
	plain = true
	v.chain(func(l *layer) bool {
		switch {
		case l.clears(chunk, chunk+n):
			e = hole(0)
			return false
		case l.touches(chunk, chunk+n):
			plain = false
		}
		return plain
	})
	return e, plain
}

// children are those of an entry seen as a page of some level.
type children struct {
	page        []byte // that has them, or
	first, rest entry
}

func (c *children) at(i int) entry {
	switch {
	case c.page != nil:
		return getEntry(c.page[i*entrySize:])
	case i == 0:
		return c.first
	}
	return c.rest
}

// equal reports whether entry i of two pages is, byte for byte, the same one of
// something readable. It is quicker than decoding them, and most of the entries
// of pages that differ are.
func (c *children) equal(o *children, i int) bool {
	if c.page == nil || o.page == nil {
		return false
	}
	x, y := c.page[i*entrySize:][:entrySize], o.page[i*entrySize:][:entrySize]
	return [entrySize]byte(x) == [entrySize]byte(y) && kind(x[14]) != kindLost
}

// childrenOf returns those of e seen as a page of the given level: a lower
// tree is entry 0 of a higher one.
func (w *diffWalk) childrenOf(e entry, level int) (*children, error) {
	switch {
	case !e.refers():
		return &children{first: e, rest: e}, nil
	case int(e.level) < level:
		return &children{first: e, rest: hole(0)}, nil
	}
	b, err := w.page(e)
	return &children{page: b}, err
}

func (w *diffWalk) touched(chunk, n uint64) bool {
	for _, l := range w.layers {
		if l.touches(chunk, chunk+n) {
			return true
		}
	}
	return false
}

// plain compares one chunk in which no layer has anything.
func (w *diffWalk) plain(lo uint64, old, now *children) error {
	return w.units(lo, func(i int) (slotState, slotState, bool) {
		if old.equal(now, i) {
			return slotNone, slotNone, true
		}
		x, y := old.at(i), now.at(i)
		return x.slotState(), y.slotState(), x.sameContent(y)
	})
}

// layered compares one chunk in which layers have something.
func (w *diffWalk) layered(lo uint64) error {
	chunk := lo / uint64(w.geo.Fanout)
	if err := w.resolve(w.a, chunk, 0, w.old); err != nil {
		w.inOld = true
		return err
	}
	if err := w.resolve(w.b, chunk, 0, w.now); err != nil {
		return err
	}
	return w.units(lo, func(i int) (slotState, slotState, bool) {
		return w.old[i].state, w.now[i].state, w.now[i].same(w.old[i])
	})
}

// units gathers the units of the chunk at lo that are not the same.
func (w *diffWalk) units(lo uint64, at func(i int) (old, now slotState, same bool)) error {
	u := int64(w.geo.UnitSize)
	for i := range w.geo.Fanout {
		from := max(w.first, int64(lo+uint64(i))*u)
		to := min(w.end, int64(lo+uint64(i)+1)*u)
		if from >= to {
			continue
		}
		old, now, same := at(i)
		if w.inOld = old == slotLost; w.inOld || now == slotLost {
			w.at = lo + uint64(i)
			return errLost()
		}
		if !same {
			w.add(from, to, now == slotZero)
		}
	}
	return nil
}

// add appends the bytes [from, to) to what has been found.
func (w *diffWalk) add(from, to int64, hole bool) {
	if k := len(w.out) - 1; k >= 0 && w.out[k].End() == from && w.out[k].Hole == hole {
		w.out[k].Len += to - from
		return
	}
	w.out = append(w.out, Extent{Off: from, Len: to - from, Hole: hole})
}
