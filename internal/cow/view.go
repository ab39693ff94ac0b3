package cow

import "slices"

// view is the contents of a volume at one moment: a tree under a short chain
// of layers. It is immutable; a change of the chain is a new view.
type view struct {
	size   int64    // bytes
	height int      // at least that of every tree the volume has had
	top    *layer   // takes writes and is not in the log; nil for a read-only volume
	caught *layer   // is being written to the log; nil when no frame is
	logged *layer   // is in the log; nil for a read-only volume
	sealed []*layer // newest first
	base   tree
	bare   bool // the contents have been given up; nothing is below
}

// frozen is the view as it stays when the volume changes: everything sealed.
func (v *view) frozen() *view {
	f := *v
	f.top, f.caught, f.logged = nil, nil, nil
	return &f
}

// newest is the layer that was sealed last, nil when there is none.
func (v *view) newest() *layer {
	if len(v.sealed) == 0 {
		return nil
	}
	return v.sealed[0]
}

// grafted reports whether the volume gets ranges of another one by the
// checkpoint that is being made.
func (v *view) grafted() bool {
	return slices.ContainsFunc(v.sealed, func(l *layer) bool { return l.graft != nil })
}

// chain calls f for every layer, newest first, until f returns false.
func (v *view) chain(f func(*layer) bool) {
	for _, l := range [...]*layer{v.top, v.caught, v.logged} {
		if l != nil && !f(l) {
			return
		}
	}
	for _, l := range v.sealed {
		if !f(l) {
			return
		}
	}
}

// fill sets those of out, the units from idx lo on of a chunk, for which a
// layer has a version. It reports whether all are set.
func (v *view) fill(chunk uint64, lo int, out []slot) bool {
	left := len(out)
	v.chain(func(l *layer) bool {
		left -= l.fill(chunk, lo, out)
		return left > 0
	})
	return left == 0
}

// resolve finds the version of each unit from idx lo on of a chunk; out is
// overwritten and has no slotNone afterwards. The caller is in an era.
func (r *pageReader) resolve(v *view, chunk uint64, lo int, out []slot) error {
	clear(out)
	if v.fill(chunk, lo, out) {
		return nil
	}
	return r.fill(v.base.root, chunk, lo, out)
}

// lookup is resolve for one unit.
func (r *pageReader) lookup(v *view, chunk uint64, idx int) (slot, error) {
	for _, l := range [...]*layer{v.top, v.caught, v.logged} {
		if l != nil {
			if s := l.get(chunk, idx); s.state != slotNone {
				return s, nil
			}
		}
	}
	for _, l := range v.sealed {
		if s := l.get(chunk, idx); s.state != slotNone {
			return s, nil
		}
	}
	b, err := r.leafPage(v.base.root, chunk)
	return leafSlot(b, idx), err
}

// version identifies what a unit's contents were at some moment: a layer's
// slot, or the tree below the layers.
type version struct {
	s    slot
	root entry // of the tree, when s is slotNone
}

// version returns the version of one unit, given the top layer's.
func (v *view) version(chunk uint64, idx int, top slot) version {
	if top.state != slotNone {
		return version{s: top}
	}
	below := *v
	below.top = nil
	ver := version{root: v.base.root}
	below.chain(func(l *layer) bool {
		if s := l.get(chunk, idx); s.state != slotNone {
			ver = version{s: s}
			return false
		}
		return true
	})
	return ver
}

func (a version) same(b version) bool { return a.s.same(b.s) && a.root == b.root }
