// Package vmdk reads and writes VMDK images of the kind streamOptimized as
// streams: forward only and in bounded memory.
//
// # The format
//
// All integers are little-endian; a sector has 512 bytes. An image is
//
//	0        sparse header, a sector
//	512      descriptor, text padded with zeros to 20 sectors
//	…        zeros, or grain directory and tables, up to the overhead
//	…        grains, 64 KiB of the disk each: u64 first sector on the disk,
//	         u32 length, a zlib stream, padded to a sector
//	…        behind the grains of a table, which covers 32 MiB: a marker, then
//	         the table, one u32 per grain, its sector or 0
//	…        a marker, the grain directory, one u32 per table
//	…        a marker, the footer, which is the header with the place of the
//	         directory
//	end-512  the end-of-stream marker, a sector of zeros
//
// A marker is a sector: u64 sectors that follow, u32 zero, u32 kind. Some
// writers put directory and tables in front, and leave footer and markers
// out.
//
// # Writing
//
// A [Writer] takes grains in ascending order and leaves those out that are not
// written, which read as zero. Grains are compressed, so the length of an
// image shows only when it is complete. Its bytes follow from the options and
// the grains alone. What is written is the profile that qemu and libvmdk read.
//
// # Reading
//
// A [Reader] follows the grains as they come and checks them against footer and
// tables in front, which those who can seek go by: an image whose tables count
// more grains than came, or whose end is missing, is not complete, and one whose
// tables mean other grains, or other places on the disk, is refused in the end.
// Up to 8 MiB of tables may come before their directory. Parents are never opened; an image that has one is
// a set of ranges to write like any other.
package vmdk

import (
	"encoding/binary"
	"errors"
	"fmt"
)

const (
	// GrainSize is the size of a grain of an image that is written, in bytes.
	GrainSize = 64 << 10

	// MaxSize is the largest disk that can be written, in bytes (62 TiB).
	MaxSize = 62 << 40

	// MaxData is how much of a disk, in whole grains, fits an image whatever
	// it compresses to, in bytes: places in the image are 32 bits of sectors.
	MaxData = (1<<32 - 1<<24) / maxGrainSectors * GrainSize

	// SectorSize is what sizes are multiples of, in bytes.
	SectorSize = 512
)

const (
	headMagic = 0x564D444B // "KDMV"

	flagNewline    = 1 << 0
	flagCompressed = 1 << 16
	flagMarkers    = 1 << 17

	perTable        = 512 // entries of a grain table
	tableSectors    = perTable * 4 / SectorSize
	overheadSectors = 128
	descriptorAt    = 1
	descriptorSize  = 20 // sectors
	atEnd           = 0xFFFFFFFFFFFFFFFF

	// maxGrainSectors is the largest room of a grain: what does not compress
	// grows by little.
	maxGrainSectors = (GrainSize + GrainSize/64 + 64 + grainHead) / SectorSize
	grainHead       = 12

	markerEnd       = 0
	markerTable     = 1
	markerDirectory = 2
	markerFooter    = 3
)

// ErrFormat is matched by every [FormatError].
var ErrFormat = errors.New("not a usable VMDK")

// FormatError says which field of an image is wrong. It matches [ErrFormat].
type FormatError struct {
	Off   int64  // where the field lies in the stream, in bytes
	Field string // the name of the field, for example "grain size"
	Found string // what it holds
	Want  string // what it should hold
}

func (e *FormatError) Error() string {
	return fmt.Sprintf("%v: %s at byte %d is %s, want %s", ErrFormat, e.Field, e.Off, e.Found, e.Want)
}

// Is makes the error match ErrFormat.
func (e *FormatError) Is(target error) bool { return target == ErrFormat }

func field(off int64, name string, found, want any) error {
	return &FormatError{Off: off, Field: name, Found: fmt.Sprint(found), Want: fmt.Sprint(want)}
}

// header is the sparse header, the first sector.
type header struct {
	version, flags            uint32
	capacity, grain           uint64 // sectors
	descriptorAt, descriptorN uint64
	perTable                  uint32
	redundantAt, directoryAt  uint64
	overhead                  uint64
	newlines                  [4]byte
	compression               uint16
	magic                     uint32
	unclean                   byte
}

var goodNewlines = [4]byte{'\n', ' ', '\r', '\n'}

func (h *header) encode() []byte {
	b := make([]byte, 0, SectorSize)
	le := binary.LittleEndian
	b = le.AppendUint32(b, h.magic)
	b = le.AppendUint32(b, h.version)
	b = le.AppendUint32(b, h.flags)
	for _, v := range []uint64{h.capacity, h.grain, h.descriptorAt, h.descriptorN} {
		b = le.AppendUint64(b, v)
	}
	b = le.AppendUint32(b, h.perTable)
	for _, v := range []uint64{h.redundantAt, h.directoryAt, h.overhead} {
		b = le.AppendUint64(b, v)
	}
	b = append(b, h.unclean)
	b = append(b, h.newlines[:]...)
	b = le.AppendUint16(b, h.compression)
	return b[:SectorSize]
}

func decodeHeader(b []byte) *header {
	le := binary.LittleEndian
	return &header{
		magic: le.Uint32(b), version: le.Uint32(b[4:]), flags: le.Uint32(b[8:]),
		capacity: le.Uint64(b[12:]), grain: le.Uint64(b[20:]), descriptorAt: le.Uint64(b[28:]), descriptorN: le.Uint64(b[36:]),
		perTable: le.Uint32(b[44:]), redundantAt: le.Uint64(b[48:]), directoryAt: le.Uint64(b[56:]), overhead: le.Uint64(b[64:]),
		unclean: b[72], newlines: [4]byte(b[73:77]), compression: le.Uint16(b[77:]),
	}
}

// roundUp rounds n up to a multiple of unit, a power of two.
func roundUp(n, unit int64) int64 { return (n + unit - 1) &^ (unit - 1) }
