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

	writing sync.Mutex // held while open contents are written out

	gate sync.RWMutex // shared by writers while they publish, exclusive to seal the top layer
	view atomic.Pointer[view]
	gone atomic.Bool // the name is deleted; set under the exclusive gate

	// Guarded by Store.mu.
	flags    uint32
	parent   uint64 // number
	sealedAt uint64
	attrs    *blob // nil when empty
	removed  bool  // to be taken out of the volume table

	marked bool // is in Store.changed; guarded by Store.changedMu
}

func (v *volume) readOnly() bool { return v.flags&flagReadOnly != 0 }

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
	if v.marked {
		return
	}
	if len(s.changed) == 0 {
		select {
		case s.armed <- struct{}{}:
		default:
		}
	}
	s.changed[v] = struct{}{}
	v.marked = true
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
	g := l.takeLoad()
	s.entries.Add(-g.entries)
	s.buffers.Add(-g.buffers)
	s.space.unpromise(g.promised)
}

// dropUnits has the next checkpoint release units that no tree refers to.
func (s *Store) dropUnits(addrs []uint64) {
	if len(addrs) > 0 {
		s.dropMu.Lock()
		s.dropped = append(s.dropped, addrs...)
		s.dropMu.Unlock()
	}
}

// seal ends the layers of v that take changes, and returns v's view as it is
// then: all sealed. Open changes go to the batch; there are none when b is nil.
// The role, mu and the gate are held.
func (s *Store) seal(b *batch, v *volume) *view {
	w := v.view.Load()
	if w.top == nil {
		return w
	}
	frozen := w.frozen()
	for _, l := range []*layer{w.logged, w.caught, w.top} {
		if l == nil || l.empty() {
			continue
		}
		if l == w.top {
			b.items = append(b.items, batchItem{num: v.num, layer: l})
			b.direct = b.direct || l.direct
		}
		l.epoch = s.epoch
		frozen.sealed = append([]*layer{l}, frozen.sealed...)
	}
	if len(frozen.sealed) > len(w.sealed) {
		nv := *frozen
		nv.top, nv.logged = newLayer(w.height), newLayer(w.height)
		s.setView(v, &nv)
	}
	return frozen
}

// sealLogged ends the logged layer of v and returns v's view without what is
// not in the log. The role, mu and the gate are held, and nothing is caught.
func (s *Store) sealLogged(v *volume) *view {
	w := v.view.Load()
	if w.logged == nil || w.logged.empty() {
		return w.frozen()
	}
	w.logged.epoch = s.epoch
	nv := *w
	nv.sealed = append([]*layer{w.logged}, w.sealed...)
	nv.logged = newLayer(w.height)
	s.setView(v, &nv)
	return nv.frozen()
}

// lookup returns the volume of a name. mu is held.
func (s *Store) lookup(id ID) (*volume, error) {
	v := s.byID[id]
	if v == nil {
		return nil, fmt.Errorf("%w: %v", ErrNotFound, id)
	}
	return v, nil
}

// source returns the volume of a name whose contents are wanted. mu is held.
func (s *Store) source(id ID) (*volume, error) {
	v, err := s.lookup(id)
	if err == nil && v.view.Load().bare {
		err = fmt.Errorf("%w: %v", ErrNoData, id)
	}
	return v, err
}

// info describes v. mu is held.
func (s *Store) info(v *volume) Info {
	w := v.view.Load()
	i := Info{ID: v.id, Size: w.size, ReadOnly: v.readOnly(), NoData: w.bare, Used: int64(w.base.mapped) * int64(s.geo.UnitSize)}
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
	return s.stat(id)
}

func (s *Store) stat(id ID) (Info, error) {
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

// opCost is the number of units that one volume operation with an attribute
// blob takes: the blob, its page, a leaf and a path of the volume table.
func (s *Store) opCost(attrs []byte) int64 {
	return int64(s.geo.units(int64(len(attrs)))) + 1 + s.tableCost()
}

// tableCost is the number of units that a changed record takes: a leaf and a
// path of the volume table.
func (s *Store) tableCost() int64 { return maxTableHeight + 1 }

// maxTableHeight bounds the height of the volume table for promises; with the
// default geometry it holds 16 records × 2^24.
const maxTableHeight = 3

// operate has a volume operation in the log. build checks it and returns its
// record, whose epoch operate sets; mu is held then. cost is the number of
// units that the operation is promised, 0 for one that must always succeed.
// The sources, whose contents the operation fixes, are flushed first unless
// their open changes are few, so that little is left to do under the role.
func (s *Store) operate(ctx context.Context, units int64, sources []ID, build func() (*logRecord, error)) error {
	if units > 0 {
		if err := s.promise(ctx, units, floorWrite); err != nil {
			return err
		}
		defer func() { s.space.unpromise(units) }() // of what has not been done
	}
	volumes := func() (vols []*volume) {
		s.mu.Lock()
		defer s.mu.Unlock()
		for _, id := range sources {
			if v := s.byID[id]; v != nil {
				vols = append(vols, v)
			}
		}
		return vols
	}
	flush := func() error {
		for _, v := range volumes() {
			if !s.fewOpen(v) {
				if err := s.flushVolume(ctx, v); err != nil {
					return err
				}
			}
		}
		return nil
	}
	s.mu.Lock()
	r, err := build()
	s.mu.Unlock()
	if err != nil {
		return err
	}
	do := func(b *batch) error {
		s.beforeSeal(volumes()...)
		s.mu.Lock()
		defer s.mu.Unlock()
		r, err := build()
		if err != nil {
			return err
		}
		r.epoch = s.epoch
		if err := s.apply(b, r); err != nil {
			return err
		}
		b.items = append(b.items, batchItem{record: *r})
		s.opPromised += units // not before: a cut in between would give them back
		units = 0
		return nil
	}
	if uint64(r.bytes()) > s.log.maxFrame()-frameHeader {
		if err := flush(); err != nil {
			return err
		}
		return s.commitAtCut(ctx, do)
	}
	return s.commit(ctx, flush, do)
}

// Create makes a volume of zeros. It is durable on return, and whole or not
// there after a crash or a cancel. Errors: [ErrInvalid], [ErrExists], a
// *SpaceError, [ErrFailed].
func (s *Store) Create(ctx context.Context, id ID, size int64, attrs []byte) (info Info, err error) {
	if err := s.beginWrite(); err != nil {
		return Info{}, err
	}
	defer s.end()
	if err := cmp.Or(s.checkSize(size), s.checkNew(id, attrs)); err != nil {
		return Info{}, err
	}
	err = s.operate(ctx, s.opCost(attrs), nil, func() (*logRecord, error) {
		if s.byID[id] != nil {
			return nil, fmt.Errorf("%w: %v", ErrExists, id)
		}
		return &logRecord{kind: recCreate, num: s.nextNum, id: id, size: size, attrs: attrs}, nil
	})
	if err != nil {
		return Info{}, err
	}
	return s.stat(id)
}

// derived makes a volume from each source, all from one instant.
func (s *Store) derived(ctx context.Context, pairs []Pair, flags uint32) ([]Info, error) {
	if err := s.beginWrite(); err != nil {
		return nil, err
	}
	defer s.end()
	cost := int64(0)
	var sources []ID
	for _, p := range pairs {
		if err := s.checkNew(p.New, p.Attrs); err != nil {
			return nil, err
		}
		cost += s.opCost(p.Attrs) + s.tableCost()
		sources = append(sources, p.Src)
	}
	err := s.operate(ctx, cost, sources, func() (*logRecord, error) {
		r := &logRecord{kind: recDerive, flags: flags}
		names := map[ID]bool{}
		for i, p := range pairs {
			v, err := s.source(p.Src)
			if err != nil {
				return nil, err
			}
			if s.byID[p.New] != nil || names[p.New] {
				return nil, fmt.Errorf("%w: %v", ErrExists, p.New)
			}
			names[p.New] = true
			r.pairs = append(r.pairs, logPair{src: v.num, num: s.nextNum + uint64(i), id: p.New, own: p.Attrs != nil, attrs: p.Attrs})
		}
		return r, nil
	})
	if err != nil {
		return nil, err
	}
	infos := make([]Info, len(pairs))
	for i, p := range pairs {
		if infos[i], err = s.stat(p.New); err != nil {
			return nil, err
		}
	}
	return infos, nil
}

// Snapshot makes a read-only volume from each source, with the contents that
// all sources have at one instant during the call: every write that returned
// before the call is in it. All come into being or none. The parent of a new
// snapshot is the source's, and it becomes the source's parent.
func (s *Store) Snapshot(ctx context.Context, pairs []Pair) ([]Info, error) {
	return s.derived(ctx, pairs, flagReadOnly)
}

// Clone makes a writable volume with the contents of the source at one
// instant during the call.
func (s *Store) Clone(ctx context.Context, p Pair) (Info, error) {
	infos, err := s.derived(ctx, []Pair{p}, 0)
	if err != nil {
		return Info{}, err
	}
	return infos[0], nil
}

// writable returns the volume of a name that must not be read-only. mu is
// held.
func (s *Store) writable(id ID) (*volume, error) {
	v, err := s.lookup(id)
	if err == nil && v.readOnly() {
		err = fmt.Errorf("%w: %v", ErrReadOnly, id)
	}
	return v, err
}

// Revert replaces contents and size of a writable volume by those of another.
// Open Live disks see the new contents.
func (s *Store) Revert(ctx context.Context, disk, to ID) error {
	if err := s.beginWrite(); err != nil {
		return err
	}
	defer s.end()
	return s.operate(ctx, 0, []ID{to}, func() (*logRecord, error) {
		d, err := s.writable(disk)
		if err != nil {
			return nil, err
		}
		src, err := s.source(to)
		if err != nil {
			return nil, err
		}
		return &logRecord{kind: recRevert, num: d.num, to: src.num}, nil
	})
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
	err := s.operate(ctx, 0, []ID{id}, func() (*logRecord, error) {
		v, err := s.writable(id)
		if err != nil {
			return nil, err
		}
		return &logRecord{kind: recResize, num: v.num, size: size}, nil
	})
	if err != nil {
		return Info{}, err
	}
	return s.stat(id)
}

// Delete removes a volume, whatever has been derived from it. Pinned disks
// stay readable, Live ones fail with [ErrNotFound] from now on. Space that
// was the volume's alone comes back in the background.
func (s *Store) Delete(ctx context.Context, id ID) error {
	if err := s.beginWrite(); err != nil {
		return err
	}
	defer s.end()
	return s.operate(ctx, 0, nil, func() (*logRecord, error) {
		v, err := s.lookup(id)
		if err != nil {
			return nil, err
		}
		return &logRecord{kind: recDelete, num: v.num}, nil
	})
}

// DestroyData gives up the contents of a snapshot and keeps the rest: its
// name, size, attributes and place among its relatives, so that
// [Store.ChangedSince] can still tell what has changed since it. Pinned disks
// stay readable; Live ones, and whatever wants the contents, fail with
// [ErrNoData] from now on. Space that was the snapshot's alone comes back in
// the background. It is durable on return. [ErrInvalid] for a volume that is
// not a snapshot; doing it again changes nothing.
func (s *Store) DestroyData(ctx context.Context, id ID) error {
	if err := s.beginWrite(); err != nil {
		return err
	}
	defer s.end()
	return s.operate(ctx, 0, nil, func() (*logRecord, error) {
		v, err := s.lookup(id)
		if err != nil {
			return nil, err
		}
		if !v.readOnly() {
			return nil, fmt.Errorf("%w: %v is not a snapshot", ErrInvalid, id)
		}
		return &logRecord{kind: recEmpty, num: v.num}, nil
	})
}
