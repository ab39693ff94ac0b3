package cow

import (
	"cmp"
	"errors"
	"fmt"
	"slices"
	"sync"
)

// cut is what a checkpoint writes: the changed volumes as they were at one
// moment between two operations.
type cut struct {
	epoch    uint64
	nextNum  uint64
	vols     []cutVolume
	dropped  []uint64
	promised int64  // to volume operations
	log      logPos // everything before it is in the cut
}

type cutVolume struct {
	v       *volume
	removed bool
	rec     record // roots and mapped units are filled in by the merge
	view    *view  // without a top; its layers are held
	attrs   *blob
	data    []byte // of attrs, while it is not written
}

// cut notes the state to be written and starts the next one. What is not in
// the log stays above it. The role is held.
func (s *Store) cut() *cut {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.changedMu.Lock()
	changed := s.changed
	s.changed = map[*volume]struct{}{}
	for v := range changed {
		v.marked = false
	}
	s.changedMu.Unlock()

	c := &cut{promised: s.opPromised, nextNum: s.nextNum, log: s.log.head}
	s.opPromised = 0
	for v := range changed {
		cv := cutVolume{v: v, removed: v.removed}
		if !v.removed {
			v.gate.Lock()
			cv.view = s.sealLogged(v)
			if w := v.view.Load(); w.top != nil && !w.top.empty() {
				s.markChanged(v)
			}
			v.gate.Unlock()
			s.hold(cv.view)
			cv.rec = record{
				num: v.num, id: v.id, flags: v.flags, size: cv.view.size,
				parent: v.parent, sealed: v.sealedAt,
			}
			if cv.attrs = v.attrs; v.attrs != nil {
				cv.rec.attrLen, cv.data = uint32(v.attrs.n), v.attrs.data
				cv.rec.attrs = v.attrs.root
			}
		}
		c.vols = append(c.vols, cv)
	}
	slices.SortFunc(c.vols, func(a, b cutVolume) int { return cmp.Compare(a.v.num, b.v.num) })
	s.epoch++
	c.epoch = s.epoch
	s.dropMu.Lock()
	c.dropped, s.dropped = s.dropped, nil
	s.dropMu.Unlock()
	return c
}

// write makes a cut durable and publishes it.
func (s *Store) write(c *cut) error {
	s.trees <- struct{}{}
	defer func() { <-s.trees }()
	if len(c.vols) == 0 && len(c.dropped) == 0 && (len(s.queue.ents) == 0 || s.stuck) && !s.force && !s.space.hasSpare() {
		s.space.unpromise(c.promised)
		s.stuck = false
		return nil
	}
	w := newTreeWriter(s.pageReader, s.space, s.queue)
	trees, blobs, err := s.mergeCut(w, c)
	if err != nil {
		return fmt.Errorf("checkpoint: %w", err)
	}
	if err := s.reap(w); err != nil {
		return fmt.Errorf("checkpoint: reaping: %w", err)
	}
	for _, ce := range w.losses {
		s.damage.add(ce)
	}
	table, err := s.mergeTable(w, c)
	if err != nil {
		return fmt.Errorf("checkpoint: volume table: %w", err)
	}
	if err := w.saveQueue(); err != nil {
		return fmt.Errorf("checkpoint: reap queue: %w", err)
	}
	if err := w.flush(); err != nil {
		return fmt.Errorf("checkpoint: %w", err)
	}
	s.space.unpromise(c.promised)

	next := s.super
	next.gen++
	next.epoch, next.nextID, next.log = c.epoch, c.nextNum, c.log
	next.table, next.queue, next.queueLen = table, s.queue.top(), uint64(len(s.queue.ents))
	punch, err := s.space.commit(&next)
	if err != nil {
		return fmt.Errorf("checkpoint: %w", err)
	}
	if err := writeSuper(s.superF, &next); err != nil {
		return fmt.Errorf("checkpoint: %w", err)
	}
	s.super, s.force = next, false
	s.durableGen.Store(next.gen)
	s.freeable.begin(next.gen)
	s.publish(c, trees, blobs)
	s.addRelease(release{era: s.eras.retire(), addrs: append(c.dropped, s.space.takeFreed()...)})
	s.reaping.Store(len(s.queue.ents) > 0 && !s.stuck)
	s.space.punch(punch)
	return nil
}

// commit writes counters and region table of the generation of next and makes
// them durable together with everything written to the space files before. It
// returns the regions to be punched once next is durable.
func (s *space) commit(next *super) (punch []int, err error) {
	punch = s.unback()
	if err := s.writeCounters(); err != nil {
		return nil, err
	}
	s.mu.Lock()
	pages, sum := s.table.encode(next.gen, len(s.regions), func(i int) regionRecord { return s.regions[i].rec })
	next.regions, next.tableCRC = uint64(len(s.regions)), sum
	s.mu.Unlock()
	var wg sync.WaitGroup // the two do not depend on each other
	var tableErr error
	wg.Go(func() { tableErr = s.table.write(next.gen, pages) })
	err = s.files.sync()
	wg.Wait()
	return punch, errors.Join(err, tableErr)
}

// writeBlob writes an attribute blob as one data unit or one page of them.
func (w *treeWriter) writeBlob(data []byte) (entry, error) {
	u := w.geo.UnitSize
	ents := w.entries(1)
	clear(ents)
	for i := 0; i*u < len(data); i++ {
		b := make([]byte, u)
		copy(b, data[i*u:])
		var err error
		if ents[i], err = w.writeUnit(b, classUpper, &w.upper, false); err != nil {
			return entry{}, err
		}
	}
	if len(data) <= u {
		return ents[0], nil
	}
	return w.writePage(ents, 1)
}

// mergeTable brings the volume table up to the cut and returns its root.
func (s *Store) mergeTable(w *treeWriter, c *cut) (entry, error) {
	nums := make([]uint64, 0, len(c.vols))
	for _, cv := range c.vols {
		if cv.removed {
			delete(s.durable, cv.v.num)
		} else {
			rec := cv.rec // alone: the cut holds the layers
			s.durable[cv.v.num] = &rec
		}
		nums = append(nums, cv.v.num)
	}
	w.epoch = c.epoch
	return w.mergeRecords(s.super.table, nums, s.durable)
}

// mergeRecords writes the records of the given numbers, as recs has them, into
// a volume table and returns its new root.
func (w *treeWriter) mergeRecords(root entry, nums []uint64, recs map[uint64]*record) (entry, error) {
	l := newLayer(0)
	l.epoch = w.epoch
	per := uint64(w.geo.recordsPerUnit())
	leafs := map[uint64]struct{}{}
	for _, n := range nums {
		leafs[n/per] = struct{}{}
	}
	for u := range leafs {
		b := make([]byte, w.geo.UnitSize)
		used := false
		for i := range per {
			if r := recs[u*per+i]; r != nil {
				r.put(b[i*recordSize:])
				used = true
			}
		}
		sl := slot{idx: uint16(u % uint64(w.geo.Fanout)), state: slotZero}
		if used {
			sl.state, sl.buf = slotBuf, b
			sl.crc = checksum(b)
		}
		l.putRun(u/uint64(w.geo.Fanout), []slot{sl})
	}
	w.space.promiseOwn(l.load.promised)
	w.table = true
	t, err := w.mergeLayer(tree{root: root}, l)
	w.table = false
	return t.root, err
}

// promiseOwn promises units to the checkpoint itself, from the reserve.
func (s *space) promiseOwn(n int64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.reserved += n
}

// reap works off a slice of the queue. A page that cannot be read stops it
// until the next checkpoint and goes to the bottom of the queue.
func (s *Store) reap(w *treeWriter) error {
	s.stuck = false
	for n := 0; len(s.queue.ents) > 0 && n < s.limits.ReapPages; n++ {
		readable, err := w.reapOne()
		if err != nil {
			return err
		}
		if !readable {
			s.queue.bury(s.queue.pop())
			s.stuck = true
			return nil
		}
	}
	return nil
}

// publish gives the views the new trees in place of the merged layers.
func (s *Store) publish(c *cut, trees map[*layer]tree, blobs map[*blob]entry) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for l := range trees {
		l.merged = true
		s.forget(l)
	}
	s.changedMu.Lock()
	vols := make([]*volume, 0, len(s.changed)+len(c.vols))
	for v := range s.changed {
		vols = append(vols, v)
	}
	s.changedMu.Unlock()
	for _, cv := range c.vols {
		vols = append(vols, cv.v)
	}
	for _, v := range vols {
		if v.removed {
			continue
		}
		w := v.view.Load()
		for i, l := range w.sealed {
			if t, ok := trees[l]; ok {
				nv := *w
				nv.sealed, nv.base = slices.Clone(w.sealed[:i]), t
				nv.height = max(nv.height, int(t.root.level))
				s.setView(v, &nv)
				break
			}
		}
	}
	for _, cv := range c.vols {
		if cv.view != nil {
			s.unhold(cv.view)
		}
	}
	for b, e := range blobs {
		b.root, b.data = e, nil
	}
}
