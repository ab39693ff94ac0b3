// Package vhd reads and writes virtual hard disk images as streams: forward
// only, in bounded memory, with nothing but the standard library.
//
// # The format
//
// All integers are big-endian; a sector has 512 bytes. A dynamic or
// differencing image is a sequence of
//
//	0        footer, a copy        512 bytes   [Footer]
//	512      dynamic header       1024 bytes   [Header]
//	…        block allocation table (BAT), one u32 per block: the sector at
//	         which the block starts, 0xFFFFFFFF when it is not allocated
//	…        blocks: a bitmap with one bit per sector, most significant bit
//	         first, padded to whole sectors, then the data of the whole block
//	end-512  footer
//
// In a dynamic image a sector whose bit is clear, and a block that is not
// allocated, reads as zero; in a differencing image it reads as the parent
// does. To a consumer of a stream both are the same thing: a set of sectors
// to write.
//
// # Writing
//
// [NewLayout] takes the size, the identity and the set of blocks that will be
// sent, and knows the exact length of the stream before its first byte. A
// [Writer] then sends the blocks in ascending order, each one a [Block]: the
// bitmap and the complete 2 MiB of data in one buffer.
//
//	l, err := vhd.NewLayout(vhd.Options{Size: size, UUID: id, Blocks: set})
//	// Content-Length: l.Length()
//	w, err := vhd.NewWriter(dst, l)
//	for index := range set.All() {
//		… fill b.Data() with the complete block …
//		b.MarkAll()                       // or b.Clear() and b.Mark(off, n)
//		err = w.WriteBlock(index, b)
//	}
//	err = w.Close()
//
// What is written is the profile that qemu, libvhdi, libvhd and the common
// backup tools all read with the exact size: creator "win ", footer copy and
// trailing footer identical, blocks ascending and contiguous, every block
// complete whatever its bitmap says (several readers ignore bitmaps), a delta
// with its parent's identity, a bare parent file name and one relative
// locator.
//
// # Reading
//
// A [Reader] accepts what is found in the wild: blocks in any order, gaps
// anywhere, allocation tables with spare entries, other block sizes, batmaps
// and parent locators wherever they lie, a last block cut at the end of the
// disk, padding before the trailing footer, and a trailing footer of 511
// bytes. It yields runs of sectors in the order of the file:
//
//	r, err := vhd.NewReader(src, vhd.ReaderOptions{Length: n}) // -1: to EOF
//	// r.Size(), r.LastBlock() tell beforehand what could be touched
//	for {
//		run, err := r.Next()           // io.EOF: complete, footer verified
//		… read run.Len bytes from r …
//	}
//
// Names of parents are never followed and need not exist.
//
// A fixed image is raw data with a footer at its end. Nothing that was read
// before that footer can be trusted to be meant for a disk, so it has a reader
// of its own, [FixedReader].
package vhd

import (
	"errors"
	"fmt"
)

const (
	// SectorSize is the unit of offsets and bitmaps, in bytes.
	SectorSize = 512

	// BlockSize is the size of a block that a Writer sends, in bytes.
	BlockSize = 2 << 20

	// MaxSize is the largest disk that fits the format, in bytes (2040 GiB).
	MaxSize = 2040 << 30

	// MaxBlocks is the largest number of allocated blocks that a Reader
	// accepts: a full disk of MaxSize in blocks of 512 KiB. It bounds the
	// memory of a Reader to 8 bytes for each.
	MaxBlocks = 1 << 22
)

// ErrFormat is matched by every [FormatError].
var ErrFormat = errors.New("not a usable VHD")

// FormatError says which field of an image is wrong. It matches [ErrFormat].
type FormatError struct {
	Off   int64  // where the field lies in the stream, in bytes
	Field string // the name of the field, for example "footer checksum"
	Found string // what it holds
	Want  string // what it should hold
}

func (e *FormatError) Error() string {
	return fmt.Sprintf("%v: %s at byte %d is %s, want %s", ErrFormat, e.Field, e.Off, e.Found, e.Want)
}

// Is makes the error match ErrFormat.
func (e *FormatError) Is(target error) bool { return target == ErrFormat }
