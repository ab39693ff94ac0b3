package cow

// What has been written to a volume and not flushed lies in memory. When it is
// much, a flush, a snapshot or a checkpoint brings it to the space files before
// it takes the commit role, so that small flushes of others go on
// meanwhile and little is left to be done under the role. Nobody's contents
// change and nothing is durable by that; the log hears of the new places with
// the frame that follows.

// changedVolumes returns the volumes that have changed since the last cut.
func (s *Store) changedVolumes() []*volume {
	s.changedMu.Lock()
	defer s.changedMu.Unlock()
	vols := make([]*volume, 0, len(s.changed))
	for v := range s.changed {
		vols = append(vols, v)
	}
	return vols
}

// open returns what the open changes of v occupy, and whether some of them lie
// in the space files.
func (v *volume) open() (load, bool) {
	if w := v.view.Load(); w != nil && w.top != nil {
		return w.top.occupies()
	}
	return load{}, false
}

// openRun is adjoining slots of a chunk that have been written to the space files.
type openRun struct {
	chunk uint64
	from  []slot // as they were, in memory
	addrs []uint64
}

// writeOutMuch writes v out if more of it is in memory than goes well into a
// frame, and reports whether there was.
func (s *Store) writeOutMuch(v *volume) bool {
	l, _ := v.open()
	much := l.buffers > s.limits.DirectMin
	if much {
		s.writeOut(v)
	}
	return much
}

// writeOut writes the open contents of v that are in memory to the space
// files. Where that fails, or there is no room for both, they stay in memory,
// and it is not tried again before the next flush.
func (s *Store) writeOut(v *volume) {
	v.writing.Lock()
	defer v.writing.Unlock()
	w := v.view.Load()
	if w == nil || w.top == nil || w.top.stays.Load() || s.failure() != nil {
		return
	}
	l := w.top
	runs, n := l.buffered()
	if n == 0 {
		return
	}
	// The slots have promises of their own, which they keep until they are
	// replaced.
	if s.space.promise(n, floorWrite) != nil {
		l.stays.Store(true)
		return
	}
	var err error
	to := unitWriter{files: s.files}
	promised := n
	for i := range runs {
		r := &runs[i]
		for len(r.addrs) < len(r.from) && err == nil {
			var addr uint64
			var got int
			k := len(r.from) - len(r.addrs)
			if addr, got, err = s.space.alloc(classDirect, k, k); err != nil {
				break
			}
			promised -= int64(got)
			for j := range got {
				if err == nil {
					err = to.write(addr+uint64(j), r.from[len(r.addrs)].buf)
				}
				r.addrs = append(r.addrs, addr+uint64(j))
			}
		}
	}
	if err == nil {
		err = to.flush()
	}
	if err != nil {
		l.stays.Store(true)
		for i := range runs {
			s.dropUnits(runs[i].addrs)
		}
		s.space.unpromise(promised)
		return
	}
	s.moveOut(v, l, runs, promised)
}

// moveOut has the open layer l of v name the units that runs have been written
// to, as far as it still has the same contents. The rest of the units is given
// up.
func (s *Store) moveOut(v *volume, l *layer, runs []openRun, promised int64) {
	v.gate.RLock()
	defer v.gate.RUnlock()
	still := !v.gone.Load() && v.view.Load().top == l // not deleted, caught or sealed
	var d load
	var dropped []uint64
	l.mu.Lock()
	for _, r := range runs {
		moved := make([]slot, 0, len(r.from))
		for i, sl := range r.from {
			if !still || !l.getLocked(r.chunk, int(sl.idx)).same(sl) {
				dropped = append(dropped, r.addrs[i])
				continue
			}
			moved = append(moved, slot{idx: sl.idx, state: slotAddr, crc: sl.crc, addr: r.addrs[i]})
		}
		if len(moved) > 0 {
			g, _ := l.putRun(r.chunk, moved) // buffers have no units to drop
			d.add(g)
		}
	}
	l.mu.Unlock()
	s.entries.Add(d.entries)
	s.buffers.Add(d.buffers)
	s.space.unpromise(promised - d.promised)
	s.dropUnits(dropped)
}

// buffered returns the contents of a layer that are in memory, and how many
// units they are.
func (l *layer) buffered() (runs []openRun, n int64) {
	l.mu.RLock()
	defer l.mu.RUnlock()
	if l.load.buffers == 0 {
		return nil, 0
	}
	l.slots.Scan(func(c uint64, ss []slot) bool {
		var in []slot
		for _, sl := range ss {
			if sl.state == slotBuf {
				in = append(in, sl)
			}
		}
		if len(in) > 0 {
			runs = append(runs, openRun{chunk: c, from: in})
			n += int64(len(in))
		}
		return true
	})
	return runs, n
}
