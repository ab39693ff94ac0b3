// Package qcow2 reads and writes qcow2 images as streams: forward only and in
// bounded memory.
//
// # The format
//
// All integers are big-endian. An image is a file of clusters of equal size, a
// power of two from 512 bytes to 2 MiB:
//
//	0   header: 72 bytes in version 2, at least 104 in version 3, then
//	    extensions and the name of the backing file
//	…   refcount table and refcount blocks: how often each cluster is used
//	…   L1 table: one u64 per L2 table, its offset or 0
//	…   L2 tables, a cluster each: one u64 per cluster of the disk
//	…   data
//
// A cluster of the disk is one of
//
//	not allocated     reads as the backing file does, without one as zero
//	zero (bit 0)      reads as zero whatever the backing file holds
//	standard          lies at an offset of the file
//	compressed (62)   lies at an offset of the file, deflated or as zstd
//
// and with extended entries of 128 bits each of its 32 parts is one of the
// first three. To a consumer of a stream an image is a set of ranges to write;
// what is not allocated is not in the set.
//
// # Writing
//
// [NewLayout] takes the size and the set of clusters that will be sent, and
// knows the exact length of the image, and where each cluster lies in it,
// before its first byte. [Layout.WriteHead] sends all that comes before the
// data, which then follows in ascending order without gaps:
//
//	set := qcow2.NewClusterSet(size)
//	set.Add(off, n)
//	l, err := qcow2.NewLayout(qcow2.Options{Size: size, Clusters: set})
//	// Content-Length: l.Length()
//	err = l.WriteHead(w)
//	for run := range set.Runs() {
//		… write run.Len bytes of the disk from run.Off on, zero behind its end …
//	}
//
// What is written is the profile that qemu, libqcow and readers that go
// forward only all take: version 3, clusters of 64 KiB, refcounts of 16 bits,
// header, refcount table, refcount blocks, L1 table, L2 tables, data, each in
// ascending order, the last cluster whole. The refcounts are exact: qemu-img
// check finds nothing. The bytes follow from size, set and backing reference
// alone.
//
// A delta names its backing file, by a bare file name and a format, and holds
// the complete current contents of every cluster that changed; a cluster that
// became zero is sent as a cluster of zeros, because not every reader knows
// the zero bit.
//
// # Reading
//
// A [Reader] accepts versions 2 and 3, all sizes of clusters, extended
// entries, compressed clusters, and clusters in any order. It yields ranges of
// the disk in the order in which they can be had:
//
//	r, err := qcow2.NewReader(src, qcow2.ReaderOptions{Length: n, Spool: scratch})
//	for {
//		run, err := r.Next()            // io.EOF: complete
//		… run.Zero, or read run.Len bytes from r …
//	}
//
// Data that comes before the table that refers to it is put into scratch space
// which the caller provides when it is needed first, and the run says where it
// is there, so that a caller who can may move it without reading it. Images of this package,
// of qemu-img convert and of the common backup tools need none.
//
// Backing files and external data files are never opened. An image with an
// external data file or encryption, or one marked corrupt, is refused;
// internal snapshots are passed over.
package qcow2

import (
	"errors"
	"fmt"
	"math"
)

const (
	// ClusterSize is the size of a cluster of an image that is written, in
	// bytes.
	ClusterSize = 64 << 10

	// MaxSize is the largest disk that can be written, in bytes (2 PiB): what
	// qemu opens with clusters of this size.
	MaxSize = 2 << 50

	// SectorSize is what sizes are multiples of, in bytes.
	SectorSize = 512
)

// ErrFormat is matched by every [FormatError].
var ErrFormat = errors.New("not a usable qcow2 image")

// FormatError says which field of an image is wrong. It matches [ErrFormat].
type FormatError struct {
	Off   int64  // where the field lies in the stream, in bytes
	Field string // the name of the field, for example "L1 table offset"
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

// Run is a range of a disk.
type Run struct {
	Off, Len int64 // bytes
	Zero     bool  // reads as zero; of a Reader, which has no bytes for it

	// Of a Reader: the bytes are in its Spool, from From on, and need not be read
	// from the Reader.
	Spooled bool
	From    int64
}

// End returns the first byte behind the run.
func (r Run) End() int64 { return r.Off + r.Len }

// maxFile is the largest offset in a file that entries can hold, in bytes.
const maxFile = 1 << 56

// Names of the format.
const (
	magic       = 0x514649FB // "QFI\xfb"
	headSizeV2  = 72
	headSizeV3  = 104
	maxBackName = 1023 // bytes of a backing file's name

	extensionEnd           = 0
	extensionBackingFormat = 0xE2792ACA

	incompatDirty    = 1 << 0
	incompatCorrupt  = 1 << 1
	incompatDataFile = 1 << 2
	incompatCompress = 1 << 3
	incompatExtended = 1 << 4

	compressionDeflate = 0
	compressionZstd    = 1

	flagCopied     = 1 << 63 // in L1 and L2: the refcount is 1
	flagCompressed = 1 << 62
	flagZero       = 1 << 0
	maskOffset     = 0x00FFFFFFFFFFFE00
)

// roundUp rounds n up to a multiple of unit, a power of two.
func roundUp(n, unit int64) int64 { return (n + unit - 1) &^ (unit - 1) }

// ceilDiv divides and rounds up.
func ceilDiv(n, by int64) int64 {
	if n > math.MaxInt64-by {
		return n/by + 1
	}
	return (n + by - 1) / by
}
