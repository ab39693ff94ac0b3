package cow

import (
	"encoding/binary"
	"fmt"
	"hash/crc32"
)

const (
	entrySize = 16
	maxAddr   = 1<<40 - 1
	maxEpoch  = 1<<40 - 1
)

type kind uint8

const (
	kindHole kind = 0 // reads as zero; birth says since when
	kindData kind = 1 // a unit of a volume's contents
	kindPage kind = 2 // a map page
	kindLost kind = 3 // contents that cannot be had any more; reading them is an error
	// 4 is reserved for compressed, 5 for encrypted contents.
)

// levelTwice is the bit of the level byte that says that there is a copy.
const levelTwice = 1 << 7

// entry is a dated, checksummed reference to a unit: the only kind of pointer
// in the format. Equal entries of one generation stand for equal contents.
type entry struct {
	addr  uint64 // 40 bits, 0 for a hole
	birth uint64 // 40 bits, epoch of the content
	crc   uint32 // CRC32C of the unit
	kind  kind
	level uint8 // of a page: 1 for a leaf
	twice bool  // there is a copy of the unit, at [Geometry.copyOf]
}

func hole(birth uint64) entry { return entry{birth: birth} }

// lost is what remains of a reference to a page that cannot be read.
func lost(birth uint64) entry { return entry{birth: birth, kind: kindLost} }

func (e entry) isHole() bool { return e.kind == kindHole }

// refers reports whether e refers to a unit.
func (e entry) refers() bool { return e.kind == kindData || e.kind == kindPage }

// sameContent reports whether two entries of one generation stand for the
// same bytes. Holes do, whatever their birth.
func (e entry) sameContent(o entry) bool {
	return e.kind != kindLost && e.addr == o.addr && e.kind == o.kind && e.level == o.level && e.crc == o.crc
}

// put encodes e into the first 16 bytes of b.
func (e entry) put(b []byte) {
	_ = b[entrySize-1]
	binary.LittleEndian.PutUint64(b, e.addr&maxAddr|e.birth<<40)
	b[8], b[9] = byte(e.birth>>24), byte(e.birth>>32)
	binary.LittleEndian.PutUint32(b[10:], e.crc)
	b[14], b[15] = byte(e.kind), e.level
	if e.twice {
		b[15] |= levelTwice
	}
}

// getEntry decodes an entry without judging it.
func getEntry(b []byte) entry {
	_ = b[entrySize-1]
	lo := binary.LittleEndian.Uint64(b)
	return entry{
		addr:  lo & maxAddr,
		birth: lo>>40 | uint64(b[8])<<24 | uint64(b[9])<<32,
		crc:   binary.LittleEndian.Uint32(b[10:]),
		kind:  kind(b[14]),
		level: b[15] &^ levelTwice,
		twice: b[15]&levelTwice != 0,
	}
}

// check reports why e cannot be an entry of a page of the given level
// (level 1 holds data).
func (e entry) check(level int) error {
	switch {
	case (e.kind == kindHole || e.kind == kindLost) && e.addr == 0 && e.crc == 0 && e.level == 0 && !e.twice:
		return nil
	case e.kind == kindData && e.addr != 0 && e.level == 0 && level == 1:
		return nil
	case e.kind == kindPage && e.addr != 0 && level > 1 && int(e.level) == level-1:
		return nil
	}
	return fmt.Errorf("bad entry %+v in a page of level %d", e, level)
}

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

func checksum(b []byte) uint32 { return crc32.Checksum(b, castagnoli) }
