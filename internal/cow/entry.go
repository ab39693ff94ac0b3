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
)

// entry is a dated, checksummed reference to a unit: the only kind of pointer
// in the format. Equal entries of one generation stand for equal contents.
type entry struct {
	addr  uint64 // 40 bits, 0 for a hole
	birth uint64 // 40 bits, epoch of the content
	crc   uint32 // CRC32C of the unit
	kind  kind
	level uint8 // of a page: 1 for a leaf; 3 bits
}

func hole(birth uint64) entry { return entry{birth: birth} }

func (e entry) isHole() bool { return e.kind == kindHole }

// sameContent reports whether two entries of one generation stand for the
// same bytes. Holes do, whatever their birth.
func (e entry) sameContent(o entry) bool {
	return e.addr == o.addr && e.kind == o.kind && e.level == o.level && e.crc == o.crc
}

// put encodes e into the first 16 bytes of b.
func (e entry) put(b []byte) {
	_ = b[entrySize-1]
	binary.LittleEndian.PutUint64(b, e.addr&maxAddr|e.birth<<40)
	b[8], b[9] = byte(e.birth>>24), byte(e.birth>>32)
	binary.LittleEndian.PutUint32(b[10:], e.crc)
	b[14], b[15] = byte(e.kind), e.level
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
		level: b[15],
	}
}

// check reports why e cannot be an entry of a page of the given level
// (level 1 holds data).
func (e entry) check(level int) error {
	switch {
	case e.kind == kindHole && e.addr == 0 && e.crc == 0 && e.level == 0:
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
