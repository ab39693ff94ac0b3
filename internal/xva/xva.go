// Package xva reads and writes the chunked form in which disks travel inside
// tar archives: alone, as the format tar of a disk transfer, and beside their
// records in an XVA, the export of a whole virtual machine.
//
// # The format
//
// A disk is a directory of the archive. Each MiB of it is a file whose name is
// its number in eight decimal digits; the last one of the disk may be shorter.
// A file with the checksum of a chunk follows it: its name is that of the chunk
// and ".xxhash", its contents XXH64 with the seed 0 in 16 upper-case
// hexadecimal digits. Older writers end the name in ".checksum" and use SHA-1
// in 40 digits. A chunk of zeros is left out, except for the first and the
// last one; an empty file may stand anywhere to keep a connection busy.
//
//	vdi/00000000
//	vdi/00000000.xxhash
//	vdi/00000005
//	vdi/00000005.xxhash
//
// # Writing
//
// [Layout] knows the exact length of a disk in an archive from the set of
// chunks that will be sent, before the first byte.
//
// # Whole machines
//
// An XVA is such an archive of several disks, with a file ova.xml in front of
// them: an XML-RPC value <value><struct>… with two members. version says who
// wrote it (hostname, date, product_version, product_brand, build_number,
// xapi_major, xapi_minor) and in which version of the format (export_vsn, 2).
// objects is an array of structs of class ("VM", "VBD", "VDI", …), id ("Ref:0",
// "Ref:1", …) and snapshot, the record of the object with the ids of others
// for its references and OpaqueRef:NULL for those to objects that are not in
// the archive. The directory of a disk has the id of its VDI for a name;
// directories follow in the order of their names. All of it may be compressed
// as one file, with gzip or zstd.
//
// # Reading
//
// [Reader] takes the disks that it was told of, one or, of an XVA, several.
// Only plain files with names of this form are accepted, no links, no other
// directories; a chunk is passed on when its checksum has been verified.
package xva

import (
	"archive/tar"
	"bytes"
	"errors"
	"fmt"
	"iter"
	"math/bits"
	"time"

	"github.com/cespare/xxhash/v2"
)

const (
	// ChunkSize is the size of a chunk in bytes.
	ChunkSize = 1 << 20

	// MaxSize is the largest disk whose chunks have numbers of eight digits,
	// in bytes (95 TiB).
	MaxSize = 100_000_000 * ChunkSize

	sector     = 512
	hashSuffix = ".xxhash"
	sha1Suffix = ".checksum"

	// trailerSize is the end of an archive: two sectors of zeros.
	trailerSize = 2 * sector
)

// ErrFormat is matched by every error about the contents of an archive,
// ErrChecksum by those about a chunk with another checksum than its file says.
var (
	ErrFormat   = errors.New("not a usable archive of a disk")
	ErrChecksum = errors.New("wrong checksum")
)

func malformed(format string, args ...any) error {
	return fmt.Errorf("%w: %w", ErrFormat, fmt.Errorf(format, args...))
}

// Layout is a disk in an archive whose place of every byte is decided.
type Layout struct {
	prefix string // of names: "vdi/"
	size   int64  // of the disk in bytes
	words  []uint64
	count  int64
}

// NewLayout begins the layout of a disk whose chunks have names that begin
// with a prefix. Its first and last chunk are always sent.
func NewLayout(prefix string, size int64) (*Layout, error) {
	if size <= 0 || size > MaxSize {
		return nil, fmt.Errorf("xva: size %d is not one up to %d", size, int64(MaxSize))
	}
	l := &Layout{prefix: prefix, size: size}
	l.words = make([]uint64, l.last()/64+1)
	l.Add(0, 1)
	l.Add(size-1, 1)
	return l, nil
}

// last is the number of the last chunk.
func (l *Layout) last() int64 { return (l.size - 1) / ChunkSize }

// Add lets every chunk be sent that the bytes [off, off+n) of the disk touch.
func (l *Layout) Add(off, n int64) {
	if n <= 0 {
		return
	}
	for i := off / ChunkSize; i <= (off+n-1)/ChunkSize; i++ {
		if bit := uint64(1) << (i & 63); l.words[i>>6]&bit == 0 {
			l.words[i>>6] |= bit
			l.count++
		}
	}
}

// Chunks yields the numbers of the chunks that are sent, in their order.
func (l *Layout) Chunks() iter.Seq[int64] {
	return func(yield func(int64) bool) {
		for w, word := range l.words {
			for ; word != 0; word &= word - 1 {
				if !yield(int64(w)<<6 + int64(bits.TrailingZeros64(word))) {
					return
				}
			}
		}
	}
}

// ChunkLen is the number of bytes of the disk in a chunk.
func (l *Layout) ChunkLen(chunk int64) int64 { return min(ChunkSize, l.size-chunk*ChunkSize) }

// EntryLen is the room of a chunk and its checksum in the archive, in bytes.
func (l *Layout) EntryLen(chunk int64) int64 {
	return sector + roundUp(l.ChunkLen(chunk)) + sector + sector
}

// Length is the room of the disk in an archive, in bytes, without the end of
// the archive.
func (l *Layout) Length() int64 {
	const full = 3*sector + ChunkSize
	return (l.count-1)*full + l.EntryLen(l.last())
}

// Trailer is the end of an archive.
func Trailer() []byte { return make([]byte, trailerSize) }

// Entry is a chunk and its checksum as they travel.
type Entry struct {
	buf []byte
	n   int64
}

// Data returns room for n bytes of a chunk, at most ChunkSize.
func (e *Entry) Data(n int64) []byte {
	if e.buf == nil {
		e.buf = make([]byte, 3*sector+ChunkSize)
	}
	e.n = n
	return e.buf[sector : sector+n]
}

// Seal completes the entry of a chunk whose data is in Data, and returns its
// bytes.
func (l *Layout) Seal(e *Entry, chunk int64) ([]byte, error) {
	name := fmt.Sprintf("%s%08d", l.prefix, chunk)
	at := sector + roundUp(e.n)
	clear(e.buf[sector+e.n : at])
	sum := e.buf[at : at+2*sector]
	clear(sum)
	if err := putHeader(e.buf, name, e.n); err != nil {
		return nil, err
	}
	if err := putHeader(sum, name+hashSuffix, 16); err != nil {
		return nil, err
	}
	copy(sum[sector:], fmt.Sprintf("%016X", xxhash.Sum64(e.buf[sector:sector+e.n])))
	return e.buf[:at+2*sector], nil
}

// putHeader writes the header of a plain file, which depends on nothing else.
func putHeader(p []byte, name string, size int64) error {
	var b bytes.Buffer
	err := tar.NewWriter(&b).WriteHeader(&tar.Header{
		Typeflag: tar.TypeReg, Name: name, Size: size, Mode: 0o644, ModTime: time.Unix(0, 0), Format: tar.FormatUSTAR,
	})
	copy(p, b.Bytes())
	return err
}

// File returns a plain file as it stands in an archive.
func File(name string, contents []byte) ([]byte, error) {
	b := make([]byte, sector+roundUp(int64(len(contents))))
	copy(b[sector:], contents)
	return b, putHeader(b, name, int64(len(contents)))
}

func roundUp(n int64) int64 { return (n + sector - 1) &^ (sector - 1) }
