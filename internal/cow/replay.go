package cow

import (
	"fmt"
)

// minLogFrames is how many frames of the greatest size a log has at least.
const minLogFrames = 4

// minLogBytes is the least size of a log: the greatest frame is a quarter of
// it and must hold the attributes of a volume and a unit.
func minLogBytes(g Geometry) int64 {
	u := int64(g.UnitSize)
	return minLogFrames * ((int64(g.maxAttrs()) + 2*u + 4096 + u - 1) / u * u)
}

// checkLogSize reports why a log cannot have the given size.
func checkLogSize(n int64, g Geometry) error {
	if n < minLogBytes(g) || n%int64(g.UnitSize) != 0 || n > 1<<40 {
		return fmt.Errorf("%w: log of %d bytes", ErrInvalid, n)
	}
	return nil
}

// replay brings the state in memory from the superblock to the end of the
// log. Nothing that a generation or the log has is written. It reports whether the log has been used since the
// superblock was written, so that a checkpoint must come before anything else.
func (s *Store) replay() (used bool, err error) {
	var recs []logRecord
	first := s.log.head.seq
	if used, err = s.log.torn(); err != nil {
		return false, err
	}
	err = s.log.scan(s.super.gen, func(f frame) error {
		rs, err := decodeRecords(f.payload, s.geo)
		if err != nil {
			return &CorruptError{Detail: "log: " + err.Error()}
		}
		recs = append(recs, rs...)
		return nil
	})
	if err != nil {
		return false, err
	}
	if used = used || s.log.head.seq != first; used {
		s.log.head.seq++ // the number of the frame that was being written is not used again
	}
	for _, r := range recs { // before anything can be allocated
		if r.kind == recMap && s.failure() == nil {
			if err := s.space.adopt(r.addr, r.count); err != nil {
				return used, fmt.Errorf("log: %w", err)
			}
		}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	for i := range recs {
		r := &recs[i]
		switch r.kind {
		case recWrite, recMap, recZero:
			err = s.replayUnits(r)
		default:
			err = s.apply(&batch{}, r)
		}
		if err != nil {
			return used, &CorruptError{Detail: fmt.Sprintf("log: record %q of volume %d", r.kind, r.num), Cause: err}
		}
	}
	if s.failure() != nil {
		return used, nil
	}
	return used, s.space.cover()
}

// replayUnits puts the units of a record into the logged layer of its volume.
func (s *Store) replayUnits(r *logRecord) error {
	v := s.byNum[r.num]
	if v == nil {
		return ErrNotFound
	}
	w := v.view.Load()
	if w.logged == nil || r.first+r.count > s.geo.units(w.size) {
		return ErrInvalid
	}
	fan := uint64(s.geo.Fanout)
	l := w.logged
	l.mu.Lock()
	var d load
	var dropped []uint64
	if r.kind == recZero {
		d, dropped = l.zeroUnits(r.first, r.first+r.count, fan)
	} else {
		for i := uint64(0); i < r.count; {
			at := r.first + i
			var run []slot
			for ; i < r.count && (r.first+i)/fan == at/fan; i++ {
				sl := slot{idx: uint16((r.first + i) % fan)}
				if r.kind == recMap {
					sl.state, sl.addr, sl.crc = slotAddr, r.addr+i, r.crcs[i]
				} else {
					u := uint64(s.geo.UnitSize)
					sl.state, sl.buf = slotBuf, r.data[i*u:(i+1)*u:(i+1)*u]
					sl.crc = checksum(sl.buf)
				}
				run = append(run, sl)
			}
			g, gone := l.putRun(at/fan, run)
			d.add(g)
			dropped = append(dropped, gone...)
		}
	}
	l.mu.Unlock()
	s.entries.Add(d.entries)
	s.buffers.Add(d.buffers)
	s.space.promiseOwn(d.promised)
	s.dropUnits(dropped)
	s.markChanged(v)
	return nil
}

// adopt holds n units from addr that the log names: they are as they were
// after their allocation. Regions that the store had grown by are grown again.
func (s *space) adopt(addr, n uint64) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	for a := addr; a < addr+n; a++ {
		i := a / uint64(s.geo.regionUnits())
		if i >= uint64(s.geo.maxRegions()) || int(a%uint64(s.geo.regionUnits())) < s.geo.metaUnits() {
			return &CorruptError{Addr: a, Detail: "unit cannot be allocated"}
		}
		for uint64(len(s.regions)) <= i {
			if err := s.append(); err != nil {
				return err
			}
		}
		if s.regions[i].rec.unbacked {
			if err := s.back(int(i)); err != nil {
				return err
			}
		}
		p, k, err := s.counter(a)
		if err != nil {
			return err
		}
		r, u := s.locate(a)
		if p.n[k] != 0 || r.isHeld(u) {
			return &CorruptError{Addr: a, Detail: "unit is in use already"}
		}
		r.hold(u)
		s.free--
		s.held++
	}
	return nil
}

// cover grows the store until what has been promised is there. It was before
// the crash.
func (s *space) cover() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	for s.free < s.reserved {
		if err := s.grow(); err != nil {
			return &SpaceError{Needed: (s.reserved - s.free) * int64(s.geo.UnitSize), Cause: err}
		}
	}
	return nil
}
