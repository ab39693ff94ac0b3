package cow

import (
	"maps"
	"slices"
)

// mergePlan says which layers a cut has to be merged, and keeps the account of
// the references to roots.
//
// A root has one reference for each record and each layer to be merged onto
// it, and one for each graft that is taken from it, until that is done. What
// the records had before is given, what they and the layers want is taken; only
// the difference is counted.
type mergePlan struct {
	order   []*layer          // each behind those that its tree is made from
	below   map[*layer]*layer // the layer that one is merged onto, nil for its base
	base    map[*layer]tree
	holders map[*layer]int   // of the tree that a layer becomes
	net     map[uint64]int   // references that roots of the last generation gain, by unit
	roots   map[uint64]entry // these
	blobs   map[*blob]int    // holders of blobs to be written

	trees map[*layer]tree // what has been merged
}

// planMerge makes the plan for a cut.
func (s *Store) planMerge(c *cut) *mergePlan {
	p := &mergePlan{
		below: map[*layer]*layer{}, base: map[*layer]tree{}, holders: map[*layer]int{},
		net: map[uint64]int{}, roots: map[uint64]entry{}, blobs: map[*blob]int{},
		trees: map[*layer]tree{},
	}
	for i := range c.vols {
		cv := &c.vols[i]
		if old := s.durable[cv.v.num]; old != nil {
			p.take(old.root, -1)
			p.take(old.attrs, -1)
		}
		if cv.removed {
			continue
		}
		p.hold(cv.view, p.add(cv.view))
		switch {
		case cv.data != nil:
			p.blobs[cv.attrs]++
		case cv.attrs != nil:
			p.take(cv.rec.attrs, 1)
		}
	}
	return p
}

// add has the layers of a view merged and returns the newest.
func (p *mergePlan) add(v *view) (below *layer) {
	for _, l := range slices.Backward(v.sealed) {
		if _, seen := p.below[l]; !seen {
			p.below[l], p.base[l] = below, v.base
			p.hold(v, below)
			if g := l.graft; g != nil {
				p.hold(g.from, p.add(g.from))
			}
			p.order = append(p.order, l)
		}
		below = l
	}
	return below
}

// hold counts a holder of what a view has up to a layer, nil for its base.
func (p *mergePlan) hold(v *view, l *layer) {
	if l != nil {
		p.holders[l]++
	} else {
		p.take(v.base.root, 1)
	}
}

func (p *mergePlan) take(e entry, n int) {
	if e.refers() {
		p.net[e.addr] += n
		p.roots[e.addr] = e
	}
}

// tree is what a layer has become, or a base without one.
func (p *mergePlan) tree(l *layer, base tree) tree {
	if l == nil {
		return base
	}
	return p.trees[l]
}

// mergeCut merges the layers of a cut into trees, writes new attribute blobs, and
// brings the references of the changed records in line. It fills in the roots of
// the records.
func (s *Store) mergeCut(w *treeWriter, c *cut) (map[*layer]tree, map[*blob]entry, error) {
	p := s.planMerge(c)
	for addr, n := range p.net {
		if n > 0 {
			if err := w.ref(p.roots[addr], uint32(n)); err != nil {
				return nil, nil, err
			}
		}
	}
	for _, l := range p.order {
		if err := w.mergePlanned(p, l); err != nil {
			return nil, nil, err
		}
	}
	for _, addr := range slices.Sorted(maps.Keys(p.net)) { // so that equal stores are written equally
		for n := p.net[addr]; n < 0; n++ {
			w.queue.push(p.roots[addr])
		}
	}
	blobs, err := w.fillRecords(p, c)
	return p.trees, blobs, err
}

// mergePlanned merges a layer of a plan onto what it lies on.
func (w *treeWriter) mergePlanned(p *mergePlan, l *layer) (err error) {
	t := p.tree(p.below[l], p.base[l])
	if g := l.graft; g != nil {
		from := p.tree(g.from.newest(), g.from.base)
		t, err = w.mergeGraft(t, g, from, l.epoch)
		if from.root.refers() {
			w.queue.push(from.root)
		}
	} else {
		t, err = w.mergeVolume(t, l)
	}
	if err != nil {
		return err
	}
	p.trees[l] = t
	if n := p.holders[l] - 1; n > 0 {
		return w.ref(t.root, uint32(n))
	}
	return nil
}

// fillRecords fills in the roots of the records of a cut, and writes the blobs
// that are new.
func (w *treeWriter) fillRecords(p *mergePlan, c *cut) (map[*blob]entry, error) {
	blobs := map[*blob]entry{}
	w.epoch = c.epoch
	for i := range c.vols {
		cv := &c.vols[i]
		if cv.removed {
			continue
		}
		t := p.tree(cv.view.newest(), cv.view.base)
		cv.rec.root, cv.rec.mapped = t.root, t.mapped
		if t.inexact {
			cv.rec.flags |= flagInexact
		}
		if cv.data == nil {
			continue
		}
		e, ok := blobs[cv.attrs]
		if !ok {
			var err error
			if e, err = w.writeBlob(cv.data); err != nil {
				return nil, err
			}
			if n := p.blobs[cv.attrs] - 1; n > 0 {
				if err := w.ref(e, uint32(n)); err != nil {
					return nil, err
				}
			}
			blobs[cv.attrs] = e
		}
		cv.rec.attrs = e
	}
	return blobs, nil
}
