package cow

import (
	"bytes"
	"cmp"
	"context"
	"fmt"
	"iter"
	"maps"
	"slices"
	"sync"
	"sync/atomic"
)

// volume is a volume in memory: a named one, or the pin that keeps the
// contents of an open pinned one.
type volume struct {
	num uint64
	id  ID

	gate sync.RWMutex // shared by writers while they publish, exclusive to seal the top layer
	view atomic.Pointer[view]
	gone atomic.Bool // the name is deleted; set under the exclusive gate

	// Guarded by Store.mu.
	flags    uint32
	parent   uint64 // number
	sealedAt uint64
	attrs    *blob // nil when empty
	removed  bool  // to be taken out of the volume table
}

func (v *volume) readOnly() bool { return v.flags&flagReadOnly != 0 }

// blob is the attribute blob of one or more volumes. Guarded by Store.mu.
type blob struct {
	n    int    // bytes
	data []byte // until a checkpoint has written it
	root entry  // afterwards
}

// register makes a volume known. mu is held, or the store is being opened.
func (s *Store) register(v *volume) {
	s.byNum[v.num] = v
	if v.flags&flagPin == 0 {
		s.byID[v.id] = v
	}
	s.setParent(v, v.parent)
}

// setParent moves v below another parent. mu is held.
func (s *Store) setParent(v *volume, parent uint64) {
	if c := s.children[v.parent]; c != nil {
		if delete(c, v); len(c) == 0 {
			delete(s.children, v.parent)
		}
	}
	v.parent = parent
	if parent != 0 {
		if s.children[parent] == nil {
			s.children[parent] = map[*volume]struct{}{}
		}
		s.children[parent][v] = struct{}{}
	}
}

// unregister makes a volume unknown and gives its parent to its children. mu
// is held, and the gate exclusively.
func (s *Store) unregister(v *volume) {
	delete(s.byNum, v.num)
	if v.flags&flagPin == 0 {
		delete(s.byID, v.id)
	}
	for _, c := range slices.Collect(maps.Keys(s.children[v.num])) {
		s.setParent(c, v.parent)
		s.markChanged(c)
	}
	s.setParent(v, 0)
	v.removed = true
	s.unhold(v.view.Load())
	s.markChanged(v)
}

// markChanged has the next checkpoint look at v.
func (s *Store) markChanged(v *volume) {
	s.changedMu.Lock()
	s.markLocked(v)
	s.changedMu.Unlock()
}

func (s *Store) markLocked(v *volume) {
	if len(s.changed) == 0 {
		select {
		case s.armed <- struct{}{}:
		default:
		}
	}
	s.changed[v] = struct{}{}
}

// setView replaces the contents of v. mu is held; when the top layer changes,
// the gate is, too, exclusively.
func (s *Store) setView(v *volume, nv *view) {
	s.hold(nv)
	if old := v.view.Swap(nv); old != nil {
		s.unhold(old)
	}
}

func (s *Store) hold(w *view) {
	w.chain(func(l *layer) bool {
		l.refs++
		return true
	})
}

// unhold gives up the layers of a view. What no tree has taken over is
// dropped with the last view.
func (s *Store) unhold(w *view) {
	w.chain(func(l *layer) bool {
		if l.refs--; l.refs == 0 && !l.merged {
			s.dropUnits(l.addrs())
			s.forget(l)
		}
		return true
	})
}

// forget takes a layer out of the accounts.
func (s *Store) forget(l *layer) {
	s.entries.Add(-l.load.entries)
	s.buffers.Add(-l.load.buffers)
	s.space.unpromise(l.load.promised)
	l.load = load{}
}

// dropUnits has the next checkpoint release units that no tree refers to.
func (s *Store) dropUnits(addrs []uint64) {
	if len(addrs) > 0 {
		s.dropMu.Lock()
		s.dropped = append(s.dropped, addrs...)
		s.dropMu.Unlock()
	}
}

// seal ends the top layer of v, unless it is empty, and returns v's view
// without a top. mu and the gate are held.
func (s *Store) seal(v *volume) *view {
	w := v.view.Load()
	if w.top == nil {
		return w
	}
	frozen := *w
	frozen.top = nil
	if !w.top.empty() {
		w.top.epoch = s.epoch
		frozen.sealed = append([]*layer{w.top}, w.sealed...)
		nv := frozen
		nv.top = newLayer(w.height)
		s.setView(v, &nv)
	}
	return &frozen
}

// lookup returns the volume of a name. mu is held.
func (s *Store) lookup(id ID) (*volume, error) {
	v := s.byID[id]
	if v == nil {
		return nil, fmt.Errorf("%w: %v", ErrNotFound, id)
	}
	return v, nil
}

// info describes v. mu is held.
func (s *Store) info(v *volume) Info {
	w := v.view.Load()
	i := Info{ID: v.id, Size: w.size, ReadOnly: v.readOnly(), Used: int64(w.base.mapped) * int64(s.geo.UnitSize)}
	if p := s.byNum[v.parent]; p != nil {
		i.Parent = p.id
	}
	if v.attrs != nil {
		i.AttrsLen = v.attrs.n
	}
	return i
}

// Stat describes one volume.
func (s *Store) Stat(ctx context.Context, id ID) (Info, error) {
	if err := s.begin(); err != nil {
		return Info{}, err
	}
	defer s.end()
	s.mu.Lock()
	defer s.mu.Unlock()
	v, err := s.lookup(id)
	if err != nil {
		return Info{}, err
	}
	return s.info(v), nil
}

// List yields the volumes of one instant in the order of their IDs.
func (s *Store) List() iter.Seq[Info] {
	return func(yield func(Info) bool) {
		s.mu.Lock()
		all := make([]Info, 0, len(s.byID))
		for _, v := range s.byID {
			all = append(all, s.info(v))
		}
		s.mu.Unlock()
		slices.SortFunc(all, func(a, b Info) int { return bytes.Compare(a.ID[:], b.ID[:]) })
		for _, i := range all {
			if !yield(i) {
				return
			}
		}
	}
}

func (s *Store) checkSize(size int64) error {
	if size < 0 || size > MaxSize || size%int64(s.geo.UnitSize) != 0 {
		return fmt.Errorf("%w: size %d is not a multiple of %d from 0 to %d", ErrInvalid, size, s.geo.UnitSize, int64(MaxSize))
	}
	return nil
}

func (s *Store) checkNew(id ID, attrs []byte) error {
	switch {
	case id == ID{}:
		return fmt.Errorf("%w: zero volume ID", ErrInvalid)
	case len(attrs) > s.geo.maxAttrs():
		return fmt.Errorf("%w: %d bytes of attributes, at most %d", ErrInvalid, len(attrs), s.geo.maxAttrs())
	}
	return nil
}

// newBlob returns the blob with a copy of attrs.
func newBlob(attrs []byte) *blob {
	if len(attrs) == 0 {
		return nil
	}
	return &blob{n: len(attrs), data: bytes.Clone(attrs)}
}

// opCost is the number of units that one volume operation with an attribute
// blob takes: the blob, its page, a leaf and a path of the volume table.
func (s *Store) opCost(attrs []byte) int64 {
	return int64(s.geo.units(int64(len(attrs)))) + 1 + s.tableCost()
}

// tableCost is the number of units that a changed record takes: a leaf and a
// path of the volume table.
func (s *Store) tableCost() int64 { return int64(maxTableHeight) + 1 }

// maxTableHeight bounds the height of the volume table for promises; with the
// default geometry it holds 16 records × 2^24.
const maxTableHeight = 3

// admit promises the units of volume operations until the next checkpoint has
// written them.
func (s *Store) admit(ctx context.Context, units int64) error {
	if err := s.promise(ctx, units, floorWrite); err != nil {
		return err
	}
	s.mu.Lock()
	s.opPromised += units
	s.mu.Unlock()
	return nil
}

// Create makes a volume of zeros. It is durable on return, and whole or not
// there after a crash or a cancel. Errors: [ErrInvalid], [ErrExists], a
// *SpaceError, [ErrFailed].
func (s *Store) Create(ctx context.Context, id ID, size int64, attrs []byte) (Info, error) {
	if err := s.beginWrite(); err != nil {
		return Info{}, err
	}
	defer s.end()
	if err := cmp.Or(s.checkSize(size), s.checkNew(id, attrs)); err != nil {
		return Info{}, err
	}
	if err := s.admit(ctx, s.opCost(attrs)); err != nil {
		return Info{}, err
	}
	s.mu.Lock()
	if s.byID[id] != nil {
		s.mu.Unlock()
		return Info{}, fmt.Errorf("%w: %v", ErrExists, id)
	}
	v := &volume{num: s.nextNum, id: id, attrs: newBlob(attrs)}
	s.nextNum++
	h := s.geo.height(s.geo.units(size))
	s.setView(v, &view{size: size, height: h, top: newLayer(h)})
	s.register(v)
	s.markChanged(v)
	info := s.info(v)
	s.mu.Unlock()
	return info, s.sync(ctx)
}

// derive makes a volume with the contents that src has now. mu is held, and
// the gate of src exclusively.
func (s *Store) derive(src *volume, id ID, flags uint32, attrs *blob) *volume {
	w := s.seal(src)
	v := &volume{num: s.nextNum, id: id, flags: flags, attrs: attrs, sealedAt: s.epoch}
	s.nextNum++
	switch {
	case flags&flagPin != 0: // nobody descends from a pin
	case src.readOnly():
		v.parent = src.num
	default:
		v.parent = src.parent
	}
	nv := *w
	if flags&flagReadOnly == 0 {
		nv.top = newLayer(nv.height)
	}
	s.setView(v, &nv)
	s.register(v)
	if flags&flagReadOnly != 0 && flags&flagPin == 0 && !src.readOnly() {
		s.setParent(src, v.num)
		s.markChanged(src)
	}
	s.markChanged(v)
	return v
}

// deriveAll makes a volume from each source, all from one instant.
func (s *Store) deriveAll(ctx context.Context, pairs []Pair, flags uint32) ([]Info, error) {
	if err := s.beginWrite(); err != nil {
		return nil, err
	}
	defer s.end()
	cost := int64(0)
	for _, p := range pairs {
		if err := s.checkNew(p.New, p.Attrs); err != nil {
			return nil, err
		}
		cost += s.opCost(p.Attrs) + s.tableCost()
	}
	if err := s.admit(ctx, cost); err != nil {
		return nil, err
	}
	infos, err := func() ([]Info, error) {
		s.mu.Lock()
		defer s.mu.Unlock()
		srcs, gates, names := []*volume{}, []*volume{}, map[ID]bool{}
		for _, p := range pairs {
			v, err := s.lookup(p.Src)
			if err != nil {
				return nil, err
			}
			if s.byID[p.New] != nil || names[p.New] {
				return nil, fmt.Errorf("%w: %v", ErrExists, p.New)
			}
			names[p.New] = true
			srcs = append(srcs, v)
		}
		gates = append(gates, srcs...)
		slices.SortFunc(gates, func(a, b *volume) int { return cmp.Compare(a.num, b.num) })
		gates = slices.Compact(gates)
		for _, v := range gates {
			v.gate.Lock()
		}
		vs := make([]*volume, len(pairs))
		for i, p := range pairs {
			attrs := srcs[i].attrs
			if p.Attrs != nil {
				attrs = newBlob(p.Attrs)
			}
			vs[i] = s.derive(srcs[i], p.New, flags, attrs)
		}
		s.epoch++
		for _, v := range gates {
			v.gate.Unlock()
		}
		infos := make([]Info, len(vs))
		for i, v := range vs {
			infos[i] = s.info(v)
		}
		return infos, nil
	}()
	if err != nil {
		return nil, err
	}
	return infos, s.sync(ctx)
}

// Snapshot makes a read-only volume from each source, with the contents that
// all sources have at one instant during the call: every write that returned
// before the call is in it. All come into being or none. The parent of a new
// snapshot is the source's, and it becomes the source's parent.
func (s *Store) Snapshot(ctx context.Context, pairs []Pair) ([]Info, error) {
	return s.deriveAll(ctx, pairs, flagReadOnly)
}

// Clone makes a writable volume with the contents of the source at one
// instant during the call.
func (s *Store) Clone(ctx context.Context, p Pair) (Info, error) {
	infos, err := s.deriveAll(ctx, []Pair{p}, 0)
	if len(infos) == 0 {
		return Info{}, err
	}
	return infos[0], err
}

// Revert replaces contents and size of a writable volume by those of another.
// Open Live disks see the new contents.
func (s *Store) Revert(ctx context.Context, disk, to ID) error {
	if err := s.beginWrite(); err != nil {
		return err
	}
	defer s.end()
	if err := s.revert(disk, to); err != nil {
		return err
	}
	return s.sync(ctx)
}

func (s *Store) revert(disk, to ID) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	d, err := s.lookup(disk)
	if err != nil {
		return err
	}
	src, err := s.lookup(to)
	if err != nil {
		return err
	}
	if d.readOnly() {
		return fmt.Errorf("%w: %v", ErrReadOnly, disk)
	}
	if d == src {
		return nil
	}
	first, second := d, src
	if first.num > second.num {
		first, second = second, first
	}
	first.gate.Lock()
	defer first.gate.Unlock()
	second.gate.Lock()
	defer second.gate.Unlock()
	nv := *s.seal(src)
	nv.height = max(nv.height, d.view.Load().height)
	nv.top = newLayer(nv.height)
	s.epoch++
	s.setView(d, &nv)
	if src.readOnly() {
		s.setParent(d, src.num)
	} else {
		s.setParent(d, src.parent)
	}
	s.markChanged(d)
	s.markChanged(src)
	return nil
}

// Resize changes the size of a writable volume. What a shrink cuts off is
// gone; growth reads as zero.
func (s *Store) Resize(ctx context.Context, id ID, size int64) (Info, error) {
	if err := s.beginWrite(); err != nil {
		return Info{}, err
	}
	defer s.end()
	if err := s.checkSize(size); err != nil {
		return Info{}, err
	}
	info, err := s.resize(id, size)
	if err != nil {
		return Info{}, err
	}
	return info, s.sync(ctx)
}

func (s *Store) resize(id ID, size int64) (Info, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	v, err := s.lookup(id)
	if err != nil {
		return Info{}, err
	}
	if v.readOnly() {
		return Info{}, fmt.Errorf("%w: %v", ErrReadOnly, id)
	}
	v.gate.Lock()
	defer v.gate.Unlock()
	if size == v.view.Load().size {
		return s.info(v), nil
	}
	nv := *s.seal(v)
	s.epoch++
	nv.height = max(nv.height, s.geo.height(s.geo.units(size)))
	nv.top = newLayer(nv.height)
	if size < nv.size {
		// What a layer promises for the cut-off tail comes from the reserve.
		d, _ := nv.top.zeroUnits(s.geo.units(size), s.geo.units(nv.size), uint64(s.geo.Fanout))
		s.entries.Add(d.entries)
		s.space.promiseOwn(d.promised)
	}
	nv.size = size
	s.setView(v, &nv)
	s.markChanged(v)
	return s.info(v), nil
}

// Delete removes a volume, whatever has been derived from it. Pinned disks
// stay readable, Live ones fail with [ErrNotFound] from now on. Space that
// was the volume's alone comes back in the background.
func (s *Store) Delete(ctx context.Context, id ID) error {
	if err := s.beginWrite(); err != nil {
		return err
	}
	defer s.end()
	s.mu.Lock()
	v, err := s.lookup(id)
	if err != nil {
		s.mu.Unlock()
		return err
	}
	v.gate.Lock()
	v.gone.Store(true)
	s.unregister(v)
	v.gate.Unlock()
	s.mu.Unlock()
	return s.sync(ctx)
}

// SetAttrs replaces the attribute blob of a volume, read-only ones included.
func (s *Store) SetAttrs(ctx context.Context, id ID, attrs []byte) error {
	if err := s.beginWrite(); err != nil {
		return err
	}
	defer s.end()
	if err := s.checkNew(id, attrs); err != nil {
		return err
	}
	if err := s.admit(ctx, s.opCost(attrs)); err != nil {
		return err
	}
	s.mu.Lock()
	v, err := s.lookup(id)
	if err != nil {
		s.mu.Unlock()
		return err
	}
	v.attrs = newBlob(attrs)
	s.markChanged(v)
	s.mu.Unlock()
	return s.sync(ctx)
}

// Attrs returns the attribute blob of a volume.
func (s *Store) Attrs(ctx context.Context, id ID) ([]byte, error) {
	if err := s.begin(); err != nil {
		return nil, err
	}
	defer s.end()
	e := s.eras.enter()
	defer e.leave()
	s.mu.Lock()
	v, err := s.lookup(id)
	if err != nil || v.attrs == nil {
		s.mu.Unlock()
		return nil, err
	}
	b := *v.attrs
	s.mu.Unlock()
	if b.data != nil {
		return bytes.Clone(b.data), nil
	}
	return s.readBlob(b.root, b.n)
}

// readBlob reads n bytes below root.
func (r *pageReader) readBlob(root entry, n int) ([]byte, error) {
	u := r.geo.UnitSize
	out := make([]byte, (n+u-1)/u*u)
	for i := 0; i*u < n; i++ {
		e := root
		if root.kind == kindPage {
			var err error
			if e, err = r.child(root, i); err != nil {
				return nil, fmt.Errorf("attributes: %w", err)
			}
		}
		if e.kind != kindData {
			return nil, errShape(root, "attributes: unit %d is missing", i)
		}
		if err := r.verified(out[i*u:(i+1)*u], e); err != nil {
			return nil, fmt.Errorf("attributes: %w", err)
		}
	}
	return out[:n], nil
}
