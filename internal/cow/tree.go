package cow

import (
	"errors"
	"fmt"
)

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

	// fellBack is told of a unit that was read from its copy, and why; nil
	// tells nobody.
	fellBack func(*CorruptError)
}

// verified reads a unit and checks it against its entry, then its copy if it
// has one. The error is that of the unit itself.
func (r *pageReader) verified(p []byte, e entry) error {
	err := r.verifiedAt(p, e.addr, e.crc)
	if err == nil || !e.twice {
		return err
	}
	if r.verifiedAt(p, r.geo.copyOf(e.addr), e.crc) != nil {
		return err
	}
	if ce, ok := errors.AsType[*CorruptError](err); ok && r.fellBack != nil {
		r.fellBack(ce)
	}
	return nil
}

// verifiedAt reads what is at addr and compares it with its checksum, a
// second time if need be.
func (r *pageReader) verifiedAt(p []byte, addr uint64, crc uint32) error {
	err := r.files.read(p, addr)
	if err == nil && checksum(p) == crc {
		return nil
	}
	if err = r.files.read(p, addr); err != nil {
		return &CorruptError{Addr: addr, Detail: "unit cannot be read", Cause: err}
	}
	if checksum(p) != crc {
		return &CorruptError{Addr: addr, Detail: "checksum mismatch"}
	}
	return nil
}

// errLost is the error of reading what has been lost.
func errLost() *CorruptError {
	return &CorruptError{Detail: "the contents were lost with a map page that cannot be read"}
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
	return b, r.checkEntries(b, e)
}

// checkEntries reports why b cannot be the map page e.
func (r *pageReader) checkEntries(b []byte, e entry) error {
	for i := range r.geo.Fanout {
		if err := getEntry(b[i*entrySize:]).check(int(e.level)); err != nil {
			return &CorruptError{Addr: e.addr, Detail: err.Error()}
		}
	}
	return nil
}

// verifyBoth is verified with a look at the copy, too: half is the damage of
// one of the two when the other is whole. With mend that one is written anew.
func (r *pageReader) verifyBoth(p []byte, e entry, mend bool) (half *Problem, err error) {
	err = r.verifiedAt(p, e.addr, e.crc)
	if !e.twice {
		return nil, err
	}
	q := make([]byte, len(p))
	err2 := r.verifiedAt(q, r.geo.copyOf(e.addr), e.crc)
	switch {
	case (err == nil) == (err2 == nil):
		return nil, err
	case err != nil:
		copy(p, q)
	default:
		err = err2
	}
	ce, ok := errors.AsType[*CorruptError](err)
	if !ok {
		return nil, err
	}
	half = &Problem{Addr: ce.Addr, Detail: ce.Detail + ", its copy is whole"}
	if mend {
		if err := r.files.write(p, ce.Addr); err != nil {
			half.Detail += ", and " + err.Error()
		} else {
			half.Done = "restored"
		}
	}
	return half, nil
}

// child returns entry i of the page e. What stands for a whole range, a hole
// or something lost, counts as a page of its like.
func (r *pageReader) child(e entry, i int) (entry, error) {
	if !e.refers() {
		return e, nil
	}
	b, err := r.page(e)
	if err != nil {
		return entry{}, err
	}
	return getEntry(b[i*entrySize:]), nil
}

// leaf returns the entry of the leaf that maps a chunk, or of what is in its
// place: a hole, or something lost.
func (r *pageReader) leaf(root entry, chunk uint64) (entry, error) {
	if root.isHole() || chunk >= r.geo.span(int(root.level)-1) {
		return hole(0), nil
	}
	e := root
	for e.level > 1 {
		i := chunk >> (uint(e.level-2) * r.geo.fanBits()) & uint64(r.geo.Fanout-1)
		var err error
		if e, err = r.child(e, int(i)); err != nil || !e.refers() {
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
	if !e.refers() {
		return r.lostLeaf(e), nil
	}
	p, err := r.cached(e)
	if err != nil {
		return nil, err
	}
	r.cache.putLeaf(root, chunk, p)
	return p.data, nil
}

// lostLeaf is a page of nothing but what has been lost with e.
func (r *pageReader) lostLeaf(e entry) []byte {
	b := make([]byte, r.geo.UnitSize)
	for i := range r.geo.Fanout {
		e.put(b[i*entrySize:])
	}
	return b
}

// leafSlot is what a leaf, nil for a hole, has for the unit idx.
func leafSlot(page []byte, idx int) slot {
	if page == nil {
		return slot{idx: uint16(idx), state: slotZero}
	}
	c := getEntry(page[idx*entrySize:])
	return slot{idx: uint16(idx), state: c.slotState(), addr: c.addr, crc: c.crc}
}

// slotState is what an entry of a leaf says of its unit.
func (e entry) slotState() slotState {
	switch e.kind {
	case kindData:
		return slotAddr
	case kindLost:
		return slotLost
	}
	return slotZero
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
