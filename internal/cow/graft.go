package cow

import (
	"cmp"
	"context"
	"fmt"
	"iter"
)

// RangeClone says which bytes of one volume become those of another. All of it
// is multiples of the unit size.
type RangeClone struct {
	To, From int64 // bytes into the volumes
	Len      int64 // bytes
}

// MaxRangeClone is how many units one call of [Store.CloneRanges] may give, 1
// GiB of them with the default geometry: each takes 40 bytes of memory.
const MaxRangeClone = 1 << 18

// CloneRanges has ranges of a disk read as ranges of another disk of the store
// do, or of itself, at one instant during the call. No contents are copied: both
// volumes refer to the same units from then on, and neither sees later writes to
// the other. Where the ranges overlap the last one counts. Together they must
// not have more than [MaxRangeClone] units.
//
// It is done by a checkpoint, which takes about as long as writing the map pages
// that change, and during which flushes wait, and writes to the disk that gets
// the ranges. It is durable on return; a crash or a cancel leaves all of it or
// nothing, and nothing is done after the return. Errors: [ErrInvalid],
// [ErrReadOnly], a *SpaceError, and a *CorruptError when a map is damaged, after
// all of which nothing has changed, and [ErrFailed], after which it is known when
// the store has been opened again.
func (s *Store) CloneRanges(ctx context.Context, to, from *Disk, ranges []RangeClone) error {
	if to.s != s || from.s != s {
		return fmt.Errorf("%w: disk of another store", ErrInvalid)
	}
	if err := to.begin(true); err != nil {
		return err
	}
	defer s.end()
	if from.closed.Load() {
		return ErrClosed
	}
	for {
		err := s.cloneRanges(ctx, to, from, ranges)
		if err != errRetry { // the volume has grown: leaves cost more
			return err
		}
	}
}

func (s *Store) cloneRanges(ctx context.Context, to, from *Disk, ranges []RangeClone) error {
	if err := s.mayGraft(to, from, ranges); err != nil || len(ranges) == 0 {
		return err
	}
	leaves, err := s.foresee(ctx, to, from, ranges)
	if err != nil {
		return err
	}
	// What has been written so far is merged by a checkpoint of its own, during
	// which flushes go on.
	if err := s.sync(ctx); err != nil {
		return err
	}
	return s.giveRanges(ctx, to, from, ranges, leaves)
}

// giveRanges has the next checkpoint do what [Store.CloneRanges] says, which
// changes so many leaves. It fails with errRetry when each costs more than it
// seemed.
func (s *Store) giveRanges(ctx context.Context, to, from *Disk, ranges []RangeClone, leaves int) error {
	height := to.v.view.Load().height
	units := int64(2*leaves*height) + 2*s.tableCost()
	if err := s.promise(ctx, units, floorWrite); err != nil {
		return err
	}
	g := &graft{ranges: ranges}
	err := s.commitAtCut(ctx, func(*batch) error {
		s.mu.Lock()
		defer s.mu.Unlock()
		if err := s.mayGraft(to, from, g.ranges); err != nil {
			return err
		}
		if to.v.view.Load().height > height {
			return errRetry
		}
		s.addGraft(to.v, from.v, g)
		s.opPromised += units // not before: a cut without the graft would give them back
		units = 0
		return nil
	})
	s.space.unpromise(units)
	switch {
	case err != nil:
		return err
	case g.err != nil:
		return from.damaged(g.err, g.errAt)
	}
	return nil
}

// mayGraft says why ranges cannot be given. While mu is held its answer stands.
func (s *Store) mayGraft(to, from *Disk, ranges []RangeClone) error {
	if err := cmp.Or(to.alive(), from.alive()); err != nil {
		return err
	}
	dst, src := to.v.view.Load(), from.v.view.Load()
	if src.bare {
		return from.noData()
	}
	u, left := int64(s.geo.UnitSize), int64(MaxRangeClone)
	for _, r := range ranges {
		if r.Len < 0 || r.To < 0 || r.From < 0 || r.To > dst.size-r.Len || r.From > src.size-r.Len || (r.To|r.From|r.Len)%u != 0 {
			return fmt.Errorf("%w: %d bytes at %d of %d, from %d of %d, in units of %d", ErrInvalid, r.Len, r.To, dst.size, r.From, src.size, u)
		}
		if left -= r.Len / u; left < 0 {
			return fmt.Errorf("%w: more than %d units at once", ErrInvalid, MaxRangeClone)
		}
	}
	return nil
}

// foresee reads the maps of ranges, so that damage is found while it can be
// refused, and the checkpoint finds them in memory. It returns how many leaves
// change.
func (s *Store) foresee(ctx context.Context, to, from *Disk, ranges []RangeClone) (changed int, err error) {
	e := s.eras.enter()
	defer e.leave()
	leaves := map[uint64]struct{}{} // by chunk
	look := func(d *Disk, off, n int64) error {
		w := d.v.view.Load()
		for p := range s.geo.parts(off, n) {
			if err := context.Cause(ctx); err != nil {
				return err
			}
			leaves[p.chunk] = struct{}{}
			sl, err := s.pageReader.lookup(w, p.chunk, p.lo)
			if err == nil && sl.state == slotLost {
				err = errLost()
			}
			if err != nil {
				return d.damaged(err, int64(p.first)*int64(s.geo.UnitSize))
			}
		}
		return nil
	}
	for _, r := range ranges {
		if err := look(from, r.From, r.Len); err != nil {
			return 0, err
		}
	}
	clear(leaves)
	for _, r := range ranges {
		if err := look(to, r.To, r.Len); err != nil {
			return 0, err
		}
	}
	return len(leaves), nil
}

// part is the units of a range that one leaf maps.
type part struct {
	first uint64 // unit of the volume
	chunk uint64
	lo, n int // units, within the chunk
}

// parts yields the parts of n bytes at off, in whole units.
func (g Geometry) parts(off, n int64) iter.Seq[part] {
	return func(yield func(part) bool) {
		fan := uint64(g.Fanout)
		at, end := g.units(off), g.units(off+n)
		for at < end {
			p := part{first: at, chunk: at / fan, lo: int(at % fan)}
			p.n = int(min(end-at, fan-at%fan))
			if !yield(p) {
				return
			}
			at += uint64(p.n)
		}
	}
}

// graft is ranges that a volume gets from another one. A layer that has one
// is empty, and only part of the cut that is made next: what it stands for is
// known when the trees below have been written. Until then the volume reads as
// before, and writes to it wait.
type graft struct {
	ranges []RangeClone
	from   *view // all sealed, and held by the cut

	// Set by the checkpoint, before it answers, when the graft was left out:
	err   error // of the source
	errAt int64 // byte in it
}

// addGraft puts a graft on dst. The role and mu are held, and the next cut
// follows before they are let go of.
func (s *Store) addGraft(dst, src *volume, g *graft) {
	seal := func(v *volume) *view {
		v.gate.Lock()
		defer v.gate.Unlock()
		s.markChanged(v)
		w := s.seal(&batch{}, v)
		s.epoch++
		return w
	}
	g.from = seal(src)
	seal(dst)
	w := dst.view.Load()
	l := newLayer(w.height)
	l.graft, l.epoch = g, s.epoch
	nv := *w
	nv.sealed = append([]*layer{l}, w.sealed...)
	dst.gate.Lock()
	s.setView(dst, &nv)
	dst.gate.Unlock()
	s.epoch++
}

// mergeGraft gives what a graft says to the tree t. The tree that it is taken
// from has been written; all references in it stay while this goes on. A graft
// whose source cannot be read leaves t as it is.
func (w *treeWriter) mergeGraft(t tree, g *graft, from tree, epoch uint64) (tree, error) {
	if err := w.flush(); err != nil {
		return t, err
	}
	l := newLayer(0)
	l.epoch = epoch
	u := int64(w.geo.UnitSize)
	for _, r := range g.ranges {
		for p := range w.geo.parts(r.To, r.Len) {
			run := make([]slot, p.n)
			at := r.From + int64(p.first)*u - r.To // in the source
			done := 0
			for q := range w.geo.parts(at, int64(p.n)*u) {
				err := w.fill(from.root, q.chunk, q.lo, run[done:done+q.n])
				if err != nil {
					g.err, g.errAt = err, int64(q.first)*u
					return t, nil
				}
				done += q.n
			}
			for i := range run {
				if run[i].state == slotLost {
					g.err, g.errAt = errLost(), at+int64(i)*u
					return t, nil
				}
				run[i].idx = uint16(p.lo + i)
			}
			l.putRun(p.chunk, run)
		}
	}
	l.takeLoad() // has been promised to the operation
	return w.mergeVolume(t, l)
}
