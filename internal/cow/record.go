package cow

import (
	"cmp"
	"encoding/binary"
	"fmt"
	"slices"
)

const recordSize = 256

// Flags of a volume record.
const (
	flagReadOnly = 1 << 0
	flagPin      = 1 << 1 // keeps the contents of an open pinned volume; removed by the next open of the store
	flagInexact  = 1 << 2 // mapped is an upper bound
	flagNoData   = 1 << 3 // of a snapshot: its contents have been given up
)

// record is a volume as the volume table has it.
type record struct {
	num     uint64 // number of the volume, never reused; 0 for a free place
	id      ID
	flags   uint32
	attrLen uint32 // bytes of the attribute blob
	size    int64  // bytes
	parent  uint64 // number of the snapshot its contents descend from, or 0
	sealed  uint64 // read-only volumes: no unit in it is younger
	mapped  uint64 // units of data in its tree
	root    entry  // of its tree; the level is the height
	attrs   entry  // root of the blob: a data unit or a leaf
}

func (r *record) put(b []byte) {
	le := binary.LittleEndian
	clear(b[:recordSize])
	le.PutUint64(b, r.num)
	copy(b[8:], r.id[:])
	le.PutUint32(b[24:], r.flags)
	le.PutUint32(b[28:], r.attrLen)
	le.PutUint64(b[32:], uint64(r.size))
	le.PutUint64(b[40:], r.parent)
	le.PutUint64(b[48:], r.sealed)
	le.PutUint64(b[56:], r.mapped)
	r.root.put(b[64:])
	r.attrs.put(b[80:])
}

// getRecord decodes a record and reports why it cannot be one.
func getRecord(b []byte, g Geometry) (record, error) {
	le := binary.LittleEndian
	r := record{
		num:     le.Uint64(b),
		id:      ID(b[8:24]),
		flags:   le.Uint32(b[24:]),
		attrLen: le.Uint32(b[28:]),
		size:    int64(le.Uint64(b[32:])),
		parent:  le.Uint64(b[40:]),
		sealed:  le.Uint64(b[48:]),
		mapped:  le.Uint64(b[56:]),
		root:    getEntry(b[64:]),
		attrs:   getEntry(b[80:]),
	}
	switch {
	case r.num == 0:
		return r, nil
	case r.size < 0 || r.size > MaxSize || r.size%int64(g.UnitSize) != 0:
		return r, fmt.Errorf("volume %d: bad size %d", r.num, r.size)
	case int64(r.attrLen) > int64(g.maxAttrs()):
		return r, fmt.Errorf("volume %d: %d bytes of attributes", r.num, r.attrLen)
	}
	if err := checkRoot(r.root, g); err != nil {
		return r, fmt.Errorf("volume %d: %w", r.num, err)
	}
	if r.flags&flagNoData != 0 && (!r.root.isHole() || r.flags&(flagReadOnly|flagPin) != flagReadOnly) {
		return r, fmt.Errorf("volume %d: flags %#x do not go with root %+v", r.num, r.flags, r.root)
	}
	var err error
	switch n := g.units(int64(r.attrLen)); {
	case n == 0 && !r.attrs.isHole(), n == 1 && r.attrs.kind != kindData:
		err = fmt.Errorf("bad root %+v", r.attrs)
	case n == 1:
		err = r.attrs.check(1)
	case n > 1:
		err = r.attrs.check(2)
		if r.attrs.isHole() {
			err = fmt.Errorf("no root")
		}
	}
	if err != nil {
		return r, fmt.Errorf("volume %d: attributes: %w", r.num, err)
	}
	return r, nil
}

// findRecord returns the record of a number in a list sorted by number, nil if
// it is not there.
func findRecord(recs []record, num uint64) *record {
	i, ok := slices.BinarySearchFunc(recs, num, func(r record, n uint64) int { return cmp.Compare(r.num, n) })
	if !ok {
		return nil
	}
	return &recs[i]
}

// checkRoot reports why e cannot be the root of a tree.
func checkRoot(e entry, g Geometry) error {
	if e.isHole() {
		return e.check(1)
	}
	if e.kind != kindPage || e.level == 0 || int(e.level) > maxHeight(g) {
		return fmt.Errorf("bad root %+v", e)
	}
	return e.check(int(e.level) + 1)
}

// maxHeight is the greatest height of a tree in geometry g.
func maxHeight(g Geometry) int { return g.height(maxAddr) }
