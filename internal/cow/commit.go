package cow

import (
	"context"
	"errors"
	"slices"
	"sync"
)

// errNoRoom says that the log has no room for a request before the next
// checkpoint.
var errNoRoom = errors.New("log is full")

// request is something that is to be in the log: the open changes of a
// volume, or a volume operation.
type request struct {
	// do changes the state in memory and adds the records of that, which it
	// has the batch admit first. It runs under the commit role, so between two
	// frames. An error means that nothing was changed.
	do   func(*batch) error
	done chan error
}

// takeBack removes a request from a queue, which mu guards, and reports whether
// it was still there.
func (r *request) takeBack(mu *sync.Mutex, queue *[]*request) bool {
	mu.Lock()
	defer mu.Unlock()
	i := slices.Index(*queue, r)
	if i >= 0 {
		*queue = slices.Delete(*queue, i, i+1)
	}
	return i >= 0
}

// batch is what one leader writes.
type batch struct {
	log    *redoLog // nil: nothing is written, as what is done is part of a cut or in the log
	used   uint64   // bytes of records admitted
	items  []batchItem
	direct bool // a unit in the space files is named
}

// admit says that there is no room for n bytes of records with those that the
// batch has, or counts them. Open changes stay as many as were counted only
// while the gate of their volume is held.
func (b *batch) admit(n uint64) error {
	if b.log == nil {
		return nil
	}
	if b.log.cost(b.used+n) > b.log.room() {
		return errNoRoom
	}
	b.used += n
	return nil
}

// batchItem is a record, or a layer that is to become records.
type batchItem struct {
	num    uint64
	layer  *layer
	record logRecord
	caught *volume // whose caught layer it is
}

// committer is the queue before the log.
type committer struct {
	role chan struct{} // held by who writes frames or cuts
	mu   sync.Mutex
	todo []*request // guarded by mu
}

// commit has a request in the log, durable, before it returns. Whoever finds
// the role free leads: one frame takes everything that is queued. While the
// log is full it waits for a checkpoint, and runs before, which may be nil,
// again, as at the beginning. A cancel takes the request back, or waits for the
// frame that it is in: do is not called after the return.
func (s *Store) commit(ctx context.Context, before func() error, do func(*batch) error) error {
	for {
		if before != nil {
			if err := before(); err != nil {
				return err
			}
		}
		r := &request{do: do, done: make(chan error, 1)}
		s.commits.mu.Lock()
		s.commits.todo = append(s.commits.todo, r)
		s.commits.mu.Unlock()
		var err error
		select {
		case err = <-r.done:
		case s.commits.role <- struct{}{}:
			s.lead()
			<-s.commits.role
			err = <-r.done
		case <-ctx.Done():
			if r.takeBack(&s.commits.mu, &s.commits.todo) {
				return context.Cause(ctx)
			}
			err = <-r.done
		}
		if err != errNoRoom {
			return err
		}
		if err := s.sync(ctx); err != nil {
			return err
		}
	}
}

// commitAtCut has an operation that is too large for a frame done by the next
// checkpoint, within its cut. A cancel takes the operation back, or waits for the
// checkpoint that is at it: do is not called after the return.
func (s *Store) commitAtCut(ctx context.Context, do func(*batch) error) error {
	r := &request{do: do, done: make(chan error, 1)}
	s.waitMu.Lock()
	s.atCut = append(s.atCut, r)
	s.waitMu.Unlock()
	s.kick()
	select {
	case err := <-r.done:
		return err
	case <-ctx.Done():
	}
	if r.takeBack(&s.waitMu, &s.atCut) {
		return context.Cause(ctx)
	}
	return <-r.done
}

// lead answers everything in the queue. The role is held.
func (s *Store) lead() {
	s.commits.mu.Lock()
	todo := s.commits.todo
	s.commits.todo = nil
	s.commits.mu.Unlock()
	b := &batch{log: &s.log}
	var waiting []*request
	for _, r := range todo {
		err := s.failure()
		if err == nil {
			err = r.do(b)
		}
		if err != nil {
			r.done <- err
			continue
		}
		waiting = append(waiting, r)
	}
	var err error
	if len(b.items) > 0 {
		if err = s.writeBatch(b); err != nil {
			s.fail(err)
			err = s.failure()
		}
	}
	for _, r := range waiting {
		r.done <- err
	}
	if s.log.head.virt-s.log.tail > s.log.size/2 {
		s.kick()
	}
}

// writeBatch writes the frames of a batch. What was caught is logged then.
func (s *Store) writeBatch(b *batch) error {
	if b.direct {
		if err := s.files.sync(); err != nil {
			return err
		}
	}
	limit := int(s.log.maxFrame()) - frameHeader
	payload := s.log.begin()
	emit := func(r *logRecord, size int) error {
		if len(payload) > 0 && len(payload)+size > limit {
			if err := s.log.write(s.durableGen.Load(), payload); err != nil {
				return err
			}
			payload = s.log.begin()
		}
		payload = r.append(payload)
		return nil
	}
	for _, it := range b.items {
		var err error
		if it.layer == nil {
			err = emit(&it.record, it.record.bytes())
		} else {
			err = it.layer.records(s.geo, it.num, limit, emit)
		}
		if err != nil {
			return err
		}
	}
	if len(payload) > 0 {
		if err := s.log.write(s.durableGen.Load(), payload); err != nil {
			return err
		}
	}
	for _, it := range b.items {
		if it.caught != nil {
			s.settle(it.caught, it.layer)
		}
	}
	return nil
}

// rangeRecord is the size of a record of units without what follows.
const rangeRecord = 1 + 8 + 8 + 8

// bytes is how long a record of a volume operation is at most.
func (r *logRecord) bytes() int {
	n := 64 + len(r.attrs)
	for _, p := range r.pairs {
		n += 64 + len(p.attrs)
	}
	return n
}

// records calls emit with the records of a layer, none longer than limit, in
// an order in which they can be applied. A record is valid during the call.
func (l *layer) records(g Geometry, num uint64, limit int, emit func(*logRecord, int) error) (err error) {
	l.mu.RLock()
	defer l.mu.RUnlock()
	fan := uint64(g.Fanout)
	l.zeros.Scan(func(from, to uint64) bool {
		err = emit(&logRecord{kind: recZero, num: num, first: from * fan, count: (to - from) * fan}, rangeRecord)
		return err == nil
	})
	if err != nil {
		return err
	}
	var r logRecord
	size := 0
	flush := func() {
		if size > 0 {
			err = emit(&r, size)
			size = 0
		}
	}
	l.slots.Scan(func(c uint64, ss []slot) bool {
		for _, s := range ss {
			u := c*fan + uint64(s.idx)
			more, kind := 0, recZero
			switch s.state {
			case slotBuf:
				more, kind = g.UnitSize, recWrite
			case slotAddr:
				more, kind = 4, recMap
			}
			joins := size > 0 && r.kind == kind && u == r.first+r.count && size+more <= limit &&
				(kind != recMap || s.addr == r.addr+r.count)
			if !joins {
				if flush(); err != nil {
					return false
				}
				r, size = logRecord{kind: kind, num: num, first: u, addr: s.addr, bufs: r.bufs[:0], crcs: r.crcs[:0]}, rangeRecord
				if kind == recMap {
					size += 8
				}
			}
			r.count++
			size += more
			switch kind {
			case recWrite:
				r.bufs = append(r.bufs, s.buf)
			case recMap:
				r.crcs = append(r.crcs, s.crc)
			}
		}
		return true
	})
	if err == nil {
		flush()
	}
	return err
}

// openCost is how many bytes of records the open changes of v take at most,
// with their contents if inline. The gate is held, or more may come.
func (s *Store) openCost(v *volume, inline bool) uint64 {
	w := v.view.Load()
	if w.top == nil {
		return 0
	}
	l, _ := w.top.occupies()
	n := uint64(l.entries) * (rangeRecord + 8 + 4)
	if inline || l.buffers <= s.limits.DirectMin {
		n += uint64(l.buffers)
	}
	return n
}

// beforeSeal writes out what an operation is about to seal, as what of it is
// in memory goes into its frame: little, if it can be helped. The role is held.
func (s *Store) beforeSeal(vols ...*volume) {
	for range 4 { // each takes as long as writing what the one before has missed
		much := false
		for _, v := range vols {
			much = s.writeOutMuch(v) || much
		}
		if !much {
			return
		}
	}
}

// fewOpen reports whether the open changes of v go well into the frame of an
// operation on it.
func (s *Store) fewOpen(v *volume) bool {
	w := v.view.Load()
	if w.top == nil {
		return true
	}
	l, direct := w.top.occupies()
	return !direct && l.buffers <= s.limits.DirectMin && l.entries <= 1024
}

// flushVolume has the open changes of v in the log.
func (s *Store) flushVolume(ctx context.Context, v *volume) error {
	w := v.view.Load()
	if w.top == nil {
		return s.failure()
	}
	if w.top.empty() {
		// What was open may be caught, or sealed, by a frame or a cut that is
		// not durable yet; then the role is held.
		select {
		case s.commits.role <- struct{}{}:
			<-s.commits.role
			return s.failure()
		default:
		}
	}
	s.writeOutMuch(v) // not under the role: small flushes go on meanwhile
	if _, direct := v.open(); direct {
		if err := s.files.sync(); err != nil {
			s.fail(err)
			return s.failure()
		}
	}
	return s.commit(ctx, nil, func(b *batch) error { return s.catch(b, v) })
}

// catch takes the open changes of v into a batch. The role is held.
func (s *Store) catch(b *batch, v *volume) error {
	s.mu.Lock()
	v.gate.Lock()
	w := v.view.Load()
	if v.removed || w.top == nil || w.top.empty() || w.caught != nil {
		// What was caught earlier for this batch has everything that the
		// request is about: it was queued by then.
		v.gate.Unlock()
		s.mu.Unlock()
		return nil
	}
	if err := b.admit(s.openCost(v, false)); err != nil {
		v.gate.Unlock()
		s.mu.Unlock()
		return err
	}
	nv := *w
	nv.caught, nv.top = w.top, newLayer(w.height)
	s.setView(v, &nv)
	v.gate.Unlock()
	s.mu.Unlock()

	l := nv.caught
	if g, _ := l.occupies(); g.buffers > s.limits.DirectMin {
		placed, err := s.placeLayer(l)
		if err != nil {
			s.fail(err)
			return s.failure()
		}
		s.mu.Lock()
		defer s.mu.Unlock()
		pv := *v.view.Load()
		pv.caught = placed
		l.merged = true // its contents are those of placed
		s.setView(v, &pv)
		l = placed
	}
	b.direct = b.direct || l.direct
	b.items = append(b.items, batchItem{num: v.num, layer: l, caught: v})
	return nil
}

// placeLayer returns a copy of a layer that has its buffers in the space
// files, and takes over its load.
func (s *Store) placeLayer(l *layer) (*layer, error) {
	w := newTreeWriter(s.pageReader, s.space, nil)
	l.mu.Lock()
	p := &layer{pathCost: l.pathCost, zeros: *l.zeros.Copy(), load: l.load, direct: true}
	p.some.Store(true)
	l.mu.Unlock()
	before := p.load.buffers
	var err error
	l.slots.Scan(func(c uint64, ss []slot) bool {
		var units []uint64
		if units, err = w.place(ss, l); err != nil {
			return false
		}
		out := make([]slot, len(ss))
		for i, sl := range ss {
			if sl.state == slotBuf {
				p.load.buffers -= int64(len(sl.buf))
				sl.state, sl.addr, sl.buf = slotAddr, units[0], nil
				units = units[1:]
			}
			out[i] = sl
		}
		p.slots.Set(c, out)
		return true
	})
	if err == nil {
		err = w.flush()
	}
	s.buffers.Add(p.load.buffers - before)
	p.load.promised = l.takeLoad().promised // place has spent what it used
	return p, err
}

// settle makes the caught layer l of v a part of the logged one.
func (s *Store) settle(v *volume, l *layer) {
	s.mu.Lock()
	defer s.mu.Unlock()
	w := v.view.Load()
	if v.removed || w.caught != l {
		return // sealed or given up meanwhile
	}
	nv := *w
	nv.caught = nil
	if w.logged.empty() {
		nv.logged = l
		s.setView(v, &nv)
		return
	}
	w.logged.mu.Lock()
	d, dropped := w.logged.absorb(l)
	w.logged.mu.Unlock()
	g := l.takeLoad()
	s.entries.Add(d.entries - g.entries)
	s.buffers.Add(d.buffers - g.buffers)
	s.space.unpromise(g.promised - d.promised)
	s.dropUnits(dropped)
	l.merged = true // its units are the logged layer's
	s.setView(v, &nv)
}
