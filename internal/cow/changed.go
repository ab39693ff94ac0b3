package cow

import (
	"context"
	"fmt"
	"iter"
)

// ChangedSince is [Store.Diff] from a volume that is named rather than open,
// and whose data may have been destroyed. Then it goes by the dates of what to
// has: it yields every range that differs from what the volume had, and may
// yield one that was written with equal bytes, or zeroed when it was zero. That
// is possible only when to descends from the volume; [ErrNoLineage] if it does
// not, also when it is reverted past it in the middle of the walk.
//
// It costs in proportion to what has been written since.
func (s *Store) ChangedSince(ctx context.Context, from ID, to *Disk, off int64) iter.Seq2[Extent, error] {
	return func(yield func(Extent, error) bool) {
		if to.s != s || off < 0 {
			yield(Extent{}, fmt.Errorf("%w: changes", ErrInvalid))
			return
		}
		s.mu.Lock()
		v, err := s.lookup(from)
		bare := err == nil && v.view.Load().bare
		s.mu.Unlock()
		switch {
		case err != nil:
			yield(Extent{}, err)
		case bare:
			walkSteps(off, MaxSize, yield, func(off int64) ([]Extent, int64, error) {
				return s.sinceStep(ctx, v, to, off)
			})
		default:
			s.walkDiff(ctx, &Disk{s: s, v: v, id: from}, to, off, MaxSize, yield)
		}
	}
}

// descends reports whether the contents of v descend from those of the
// snapshot from, or are the same. mu is held.
func (s *Store) descends(v, from *volume) bool {
	for v != nil && v != from {
		v = s.byNum[v.parent]
	}
	return v != nil
}

// sinceStep gathers some of what to has that is younger than from, from off
// on, and says where to go on.
func (s *Store) sinceStep(ctx context.Context, from *volume, to *Disk, off int64) ([]Extent, int64, error) {
	if err := ctx.Err(); err != nil {
		return nil, 0, context.Cause(ctx)
	}
	if err := to.begin(false); err != nil {
		return nil, 0, err
	}
	defer s.end()
	e := s.eras.enter()
	defer e.leave()
	s.mu.Lock()
	view, since := to.v.view.Load(), from.sealedAt
	removed, related := from.removed, s.descends(to.v, from)
	s.mu.Unlock()
	if err := to.alive(); err != nil {
		return nil, 0, err
	}
	switch {
	case removed:
		return nil, 0, fmt.Errorf("%w: %v", ErrNotFound, from.id)
	case !related:
		return nil, 0, fmt.Errorf("%w: %v of %v", ErrNoLineage, to.id, from.id)
	case view.bare:
		return nil, 0, to.noData()
	}
	w := &sinceWalk{since: since}
	w.pageReader, w.b, w.first, w.end = s.pageReader, view, off, view.size
	w.now = make([]slot, s.geo.Fanout)
	for _, l := range []*layer{view.top, view.caught, view.logged} { // not sealed yet
		if l != nil {
			w.layers = append(w.layers, l)
		}
	}
	for _, l := range view.sealed {
		if l.epoch > since {
			w.layers = append(w.layers, l)
		}
	}
	if off < w.end {
		level := max(1, int(view.base.root.level), s.geo.height(s.geo.units(w.end)))
		if err := w.walk(view.base.root, level, 0); err != nil {
			err = damagedAt(err, int64(w.at)*int64(s.geo.UnitSize))
			if ce, ok := err.(*CorruptError); ok {
				ce.Volume = to.id
			}
			return w.out, 0, err
		}
	}
	if w.stopped {
		return w.out, int64(w.next) * int64(s.geo.UnitSize), nil
	}
	return w.out, MaxSize, nil
}

// sinceWalk looks for what a view, b, has that is younger than a date. Its
// layers are those of b that are, newest first. What lies below one that is
// not is older still.
type sinceWalk struct {
	diffWalk
	since uint64
}

// walk looks through the subtree e, seen as a page of the given level that
// begins at unit lo.
func (w *sinceWalk) walk(e entry, level int, lo uint64) error {
	n, u := w.geo.span(level), int64(w.geo.UnitSize)
	firstUnit := uint64(w.first / u)
	if w.stopped || lo >= w.geo.units(w.end) || lo+n <= firstUnit {
		return nil
	}
	w.at = lo
	chunk, chunks := lo/uint64(w.geo.Fanout), n/uint64(w.geo.Fanout)
	touched, cleared := false, false
	for _, l := range w.layers {
		if cleared = l.clears(chunk, chunk+chunks); cleared {
			break
		}
		if touched = l.touches(chunk, chunk+chunks); touched {
			break
		}
	}
	if !touched && !cleared && e.birth <= w.since {
		return nil
	}
	if w.pages >= diffPages || len(w.out) >= diffExtents {
		w.stopped, w.next = true, max(lo, firstUnit)
		return nil
	}
	if cleared || !touched && e.isHole() {
		end := w.end
		if hi := lo + n; hi < w.geo.units(w.end) {
			end = int64(hi) * u
		}
		w.add(max(w.first, int64(lo)*u), end, true)
		return nil
	}
	w.pages++
	if level == 1 {
		return w.units(e, lo)
	}
	children, err := w.childrenOf(e, level)
	if err != nil {
		return err
	}
	for i := range w.geo.Fanout {
		if err := w.walk(children.at(i), level-1, lo+uint64(i)*w.geo.span(level-1)); err != nil {
			return err
		}
	}
	return nil
}

// units looks through one chunk, whose leaf is e.
func (w *sinceWalk) units(e entry, lo uint64) error {
	clear(w.now)
	(&view{sealed: w.layers}).fill(lo/uint64(w.geo.Fanout), 0, w.now)
	u := int64(w.geo.UnitSize)
	for i, sl := range w.now {
		from := max(w.first, int64(lo+uint64(i))*u)
		to := min(w.end, int64(lo+uint64(i)+1)*u)
		if from >= to {
			continue
		}
		if sl.state != slotNone {
			w.add(from, to, sl.state == slotZero)
			continue
		}
		c, err := w.child(e, i)
		if err != nil {
			return err
		}
		if c.birth > w.since {
			w.add(from, to, c.isHole())
		}
	}
	return nil
}
