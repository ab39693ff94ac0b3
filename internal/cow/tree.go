package cow

import "fmt"

// tree is the map of a volume as some checkpoint left it.
type tree struct {
	root    entry  // a page whose level is the height, or a hole
	mapped  uint64 // units of data below
	inexact bool   // mapped is an upper bound
}

// pageReader reads and verifies map pages through a cache.
type pageReader struct {
	geo   Geometry
	files *spaceFiles
	cache *pageCache
}

// verified reads a unit and checks it against its entry, a second time if
// need be.
func (r *pageReader) verified(p []byte, e entry) error {
	err := r.files.read(p, e.addr)
	if err == nil && checksum(p) == e.crc {
		return nil
	}
	if err = r.files.read(p, e.addr); err != nil {
		return &CorruptError{Addr: e.addr, Detail: "unit cannot be read", Cause: err}
	}
	if checksum(p) != e.crc {
		return &CorruptError{Addr: e.addr, Detail: "checksum mismatch"}
	}
	return nil
}

// page returns a map page, whose entries have been checked for their form.
// The result is shared and immutable.
func (r *pageReader) page(e entry) ([]byte, error) {
	p, err := r.cached(e)
	if err != nil {
		return nil, err
	}
	return p.data, nil
}

func (r *pageReader) cached(e entry) (*cachedPage, error) {
	if p := r.cache.find(e); p != nil {
		return p, nil
	}
	b, err := r.storedPage(e)
	if err != nil {
		return nil, err
	}
	return r.cache.put(e, b), nil
}

// storedPage is page without the cache.
func (r *pageReader) storedPage(e entry) ([]byte, error) {
	b := make([]byte, r.geo.UnitSize)
	if err := r.verified(b, e); err != nil {
		return nil, err
	}
	for i := range r.geo.Fanout {
		if err := getEntry(b[i*entrySize:]).check(int(e.level)); err != nil {
			return nil, &CorruptError{Addr: e.addr, Detail: err.Error()}
		}
	}
	return b, nil
}

// child returns entry i of the page e. A hole counts as a page of holes.
func (r *pageReader) child(e entry, i int) (entry, error) {
	if e.isHole() {
		return hole(e.birth), nil
	}
	b, err := r.page(e)
	if err != nil {
		return entry{}, err
	}
	return getEntry(b[i*entrySize:]), nil
}

// leaf returns the entry of the leaf that maps a chunk, or of the hole in its
// place.
func (r *pageReader) leaf(root entry, chunk uint64) (entry, error) {
	if root.isHole() || chunk >= r.geo.span(int(root.level)-1) {
		return hole(0), nil
	}
	e := root
	for e.level > 1 {
		i := chunk >> (uint(e.level-2) * r.geo.fanBits()) & uint64(r.geo.Fanout-1)
		var err error
		if e, err = r.child(e, int(i)); err != nil || e.isHole() {
			return e, err
		}
	}
	return e, nil
}

// leafPage returns the leaf that maps a chunk, nil for a hole.
func (r *pageReader) leafPage(root entry, chunk uint64) ([]byte, error) {
	if b, ok := r.cache.leaf(root, chunk); ok {
		return b, nil
	}
	e, err := r.leaf(root, chunk)
	if err != nil {
		return nil, err
	}
	if e.isHole() {
		r.cache.putLeaf(root, chunk, nil)
		return nil, nil
	}
	p, err := r.cached(e)
	if err != nil {
		return nil, err
	}
	r.cache.putLeaf(root, chunk, p)
	return p.data, nil
}

// leafSlot is what a leaf, nil for a hole, has for the unit idx.
func leafSlot(page []byte, idx int) slot {
	s := slot{idx: uint16(idx), state: slotZero}
	if page != nil {
		if c := getEntry(page[idx*entrySize:]); c.kind == kindData {
			s.state, s.addr, s.crc = slotAddr, c.addr, c.crc
		}
	}
	return s
}

// fill sets those of out, the units from idx lo on of a chunk, that are not
// set yet, from the tree.
func (r *pageReader) fill(root entry, chunk uint64, lo int, out []slot) error {
	b, err := r.leafPage(root, chunk)
	if err != nil {
		return err
	}
	for i := range out {
		if out[i].state == slotNone {
			out[i] = leafSlot(b, lo+i)
		}
	}
	return nil
}

// errShape reports a tree that cannot be.
func errShape(e entry, format string, args ...any) error {
	return &CorruptError{Addr: e.addr, Detail: fmt.Sprintf(format, args...)}
}
