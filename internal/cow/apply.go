package cow

import (
	"cmp"
	"fmt"
	"slices"
)

// apply changes the state in memory as the record of a volume operation says:
// when the operation is done, and again when the log is replayed. Open changes
// of the volumes whose contents it fixes go to the batch, which has admitted
// them and r. The role and mu are held. An error means that nothing was changed.
func (s *Store) apply(b *batch, r *logRecord) error {
	var vols []*volume // those concerned, in the order of the record
	want := func(num uint64) error {
		v := s.byNum[num]
		if v == nil {
			return fmt.Errorf("%w: number %d", ErrNotFound, num)
		}
		vols = append(vols, v)
		return nil
	}
	var err error
	switch r.kind {
	case recCreate:
		return s.applyCreate(b, r)
	case recDerive:
		for _, p := range r.pairs {
			err = cmp.Or(err, want(p.src))
			if err == nil && s.byNum[p.num] != nil {
				err = fmt.Errorf("%w: number %d", ErrExists, p.num)
			}
		}
	case recRevert:
		err = cmp.Or(want(r.num), want(r.to))
	case recEmpty:
		if err = want(r.num); err == nil && !vols[0].readOnly() {
			err = fmt.Errorf("%w: number %d is not a snapshot", ErrInvalid, r.num)
		}
	default:
		err = want(r.num)
	}
	if err != nil {
		return err
	}
	gates := slices.SortedFunc(slices.Values(vols), func(a, b *volume) int { return cmp.Compare(a.num, b.num) })
	for _, v := range slices.Compact(gates) {
		v.gate.Lock()
		defer v.gate.Unlock()
	}
	n := uint64(r.bytes())
	for i, v := range vols {
		if r.kind == recDerive || r.kind == recResize || r.kind == recRevert && i == 1 { // to be sealed
			n += s.openCost(v, true)
		}
	}
	if err := b.admit(n); err != nil {
		return err
	}
	s.epoch = max(s.epoch, r.epoch)
	switch r.kind {
	case recDerive:
		for i, p := range r.pairs {
			attrs := vols[i].attrs
			if p.own {
				attrs = newBlob(p.attrs)
			}
			s.derive(b, vols[i], p.num, p.id, r.flags, attrs)
		}
	case recRevert:
		s.revert(b, vols[0], vols[1])
	case recResize:
		s.resize(b, vols[0], r.size)
	case recDelete:
		vols[0].gone.Store(true)
		s.unregister(vols[0])
	case recEmpty:
		s.empty(vols[0])
	case recAttrs:
		vols[0].attrs = newBlob(r.attrs)
		s.markChanged(vols[0])
	}
	switch r.kind {
	case recRevert, recResize, recDelete, recEmpty:
		s.hurry()
	}
	s.epoch++
	return nil
}

func (s *Store) applyCreate(b *batch, r *logRecord) error {
	if s.byNum[r.num] != nil || s.byID[r.id] != nil {
		return fmt.Errorf("%w: %v", ErrExists, r.id)
	}
	if err := b.admit(uint64(r.bytes())); err != nil {
		return err
	}
	v := &volume{num: r.num, id: r.id, attrs: newBlob(r.attrs)}
	s.nextNum = max(s.nextNum, r.num+1)
	h := s.geo.height(s.geo.units(r.size))
	s.setView(v, &view{size: r.size, height: h, top: newLayer(h), logged: newLayer(h)})
	s.register(v)
	s.markChanged(v)
	return nil
}

// derive makes a volume with the contents that src has now.
func (s *Store) derive(b *batch, src *volume, num uint64, id ID, flags uint32, attrs *blob) *volume {
	nv := *s.seal(b, src)
	v := &volume{num: num, id: id, flags: flags, attrs: attrs, sealedAt: s.epoch}
	s.nextNum = max(s.nextNum, num+1)
	if v.parent = src.parent; src.readOnly() {
		v.parent = src.num
	}
	if flags&flagReadOnly == 0 {
		nv.top, nv.logged = newLayer(nv.height), newLayer(nv.height)
	}
	s.setView(v, &nv)
	s.register(v)
	if flags&flagReadOnly != 0 && flags&flagPin == 0 && !src.readOnly() {
		s.setParent(src, v.num)
	}
	s.markChanged(src)
	s.markChanged(v)
	return v
}

// empty gives up the contents of a snapshot.
func (s *Store) empty(v *volume) {
	w := v.view.Load()
	s.setView(v, &view{size: w.size, height: w.height, bare: true})
	v.flags |= flagNoData
	s.markChanged(v)
}

func (s *Store) revert(b *batch, d, src *volume) {
	if d == src {
		return
	}
	nv := *s.seal(b, src)
	nv.height = max(nv.height, d.view.Load().height)
	nv.top, nv.logged = newLayer(nv.height), newLayer(nv.height)
	s.setView(d, &nv)
	if src.readOnly() {
		s.setParent(d, src.num)
	} else {
		s.setParent(d, src.parent)
	}
	s.markChanged(d)
	s.markChanged(src)
}

func (s *Store) resize(b *batch, v *volume, size int64) {
	nv := *s.seal(b, v)
	nv.height = max(nv.height, s.geo.height(s.geo.units(size)))
	nv.top, nv.logged = newLayer(nv.height), newLayer(nv.height)
	if size < nv.size {
		// What a layer promises for the cut-off tail comes from the reserve.
		d, _ := nv.logged.zeroUnits(s.geo.units(size), s.geo.units(nv.size), uint64(s.geo.Fanout))
		s.entries.Add(d.entries)
		s.space.promiseOwn(d.promised)
	}
	nv.size = size
	s.setView(v, &nv)
	s.markChanged(v)
}
