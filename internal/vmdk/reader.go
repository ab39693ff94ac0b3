package vmdk

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/maphash"
	"io"
	"math"
	"math/bits"
	"slices"

	"github.com/klauspost/compress/zlib"
)

// Limits of what is read.
const (
	maxReadSize = 1 << 56 // bytes of a disk
	maxGrain    = 2048    // sectors
)

// ReaderOptions say what is known about a stream beforehand.
type ReaderOptions struct {
	// Length of the image in bytes. Nothing is read behind it. Below zero it
	// is not known, and the image ends where the stream ends.
	Length int64
}

// Run is a range of a disk.
type Run struct {
	Off, Len int64 // bytes
}

// Reader reads an image forward. It is not safe for concurrent use.
//
// A stream that ends too early gives an error matching io.ErrUnexpectedEOF, a
// wrong one a [FormatError], and a failing source its own error; after any of
// them the Reader returns it for ever. It takes a few megabytes, and while it
// reads tables in front 32 MiB at most, whatever the image says.
type Reader struct {
	src    *bufio.Reader
	pos    int64 // bytes consumed
	length int64
	h      *header

	seed  maphash.Seed
	front grains // that tables before the grains promise, if there are any
	came  grains
	dir   int64 // place of a directory that came, in sectors; 0 for none
	z     zlibReader
	in    []byte // a grain, compressed
	out   []byte // a grain
	rest  []byte // of the current run
	err   error
}

// grains is a set of grains, as far as two can be compared.
type grains struct {
	n    int64
	last int64  // place of the last one in the image, in sectors
	sum  uint64 // of a hash of each, so that their order does not matter
}

// add puts a grain into a set: the one with that index on the disk, which lies
// at a sector of the image.
func (r *Reader) add(set *grains, index, place int64) {
	set.n++
	set.last = max(set.last, place)
	set.sum += maphash.Comparable(r.seed, [2]int64{index, place})
}

// zlibReader is what a zlib reader can do.
type zlibReader interface {
	io.ReadCloser
	zlib.Resetter
}

// NewReader reads everything that comes before the grains.
func NewReader(src io.Reader, o ReaderOptions) (*Reader, error) {
	if o.Length >= 0 {
		src = io.LimitReader(src, o.Length)
	}
	r := &Reader{src: bufio.NewReaderSize(src, 64<<10), length: o.Length, seed: maphash.MakeSeed()}
	b := make([]byte, SectorSize)
	if err := r.read(b, "header"); err != nil {
		return nil, err
	}
	r.h = decodeHeader(b)
	if err := r.h.check(); err != nil {
		return nil, err
	}
	if err := r.readFront(); err != nil {
		return nil, err
	}
	r.out = make([]byte, r.h.grain*SectorSize)
	return r, nil
}

// IsSparse tells whether data begins with the header of a sparse extent,
// streamOptimized or not, by its first 512 bytes.
func IsSparse(start []byte) bool {
	if len(start) < SectorSize {
		return false
	}
	h := decodeHeader(start)
	return h.magic == headMagic && h.version >= 1 && h.version <= 3
}

func (h *header) check() error {
	const need = flagCompressed | flagMarkers
	switch {
	case h.magic != headMagic:
		return field(0, "magic", fmt.Sprintf("%#08x", h.magic), fmt.Sprintf("%#08x (a sparse extent)", uint32(headMagic)))
	case h.version < 1 || h.version > 3:
		return field(4, "version", h.version, "1 to 3")
	case h.flags&need != need || h.compression != 1:
		return field(8, "flags", fmt.Sprintf("%#x, compression %d", h.flags, h.compression), "those of a compressed image with markers (streamOptimized)")
	case h.capacity > maxReadSize/SectorSize:
		return field(12, "capacity", h.capacity, fmt.Sprintf("at most %d", int64(maxReadSize/SectorSize)))
	case bits.OnesCount64(h.grain) != 1 || h.grain > maxGrain || h.grain < 8:
		return field(20, "grain size", h.grain, fmt.Sprintf("a power of two from 8 to %d", maxGrain))
	case h.perTable != perTable:
		return field(44, "entries of a table", h.perTable, perTable)
	case h.flags&flagNewline != 0 && h.newlines != goodNewlines:
		return field(73, "line ends", fmt.Sprintf("%q", h.newlines[:]), fmt.Sprintf("%q (translated as text?)", goodNewlines[:]))
	case h.overhead < 1 || h.overhead > 1<<32:
		return field(64, "overhead", h.overhead, "a place behind the header")
	}
	return nil
}

// readFront passes what comes before the grains. When the directory is there it
// reads the tables, too, which may lie before it as well as behind it.
func (r *Reader) readFront() error {
	end := int64(r.h.overhead) * SectorSize
	if r.h.directoryAt == atEnd || r.h.directoryAt >= r.h.overhead {
		return r.skipTo(end, "overhead")
	}
	at := int64(r.h.directoryAt) * SectorSize
	if at < r.pos {
		return field(56, "directory", r.h.directoryAt, "a place behind the header")
	}
	start := r.pos
	var before []byte // what lies from start up to the directory
	if at-start <= maxBefore {
		before = make([]byte, at-start)
		if err := r.read(before, "overhead"); err != nil {
			return err
		}
	} else if err := r.skipTo(at, "overhead"); err != nil {
		return err
	}
	tables, err := r.readDirectory(end)
	if err != nil {
		return err
	}
	buf := make([]byte, perTable*4)
	free := start // behind the table before
	for _, t := range tables {
		place, index := int64(t>>32)*SectorSize, int64(t&math.MaxUint32)
		after := place + int64(len(buf))
		table := buf
		switch {
		case place < free || place < r.pos && after > at || after > end:
			return field(at+4*index, "place of a grain table", place, fmt.Sprintf("one of its own from %d on and before the grains", start))
		case after > at:
			if err := r.skipTo(place, "overhead"); err != nil {
				return err
			}
			if err := r.read(table, "grain table"); err != nil {
				return err
			}
		case before == nil:
			return field(at+4*index, "place of a grain table", place, fmt.Sprintf("one behind the directory, which lies more than %d bytes behind the header", maxBefore))
		default:
			table = before[place-start : after-start]
		}
		free = after
		for i := range int64(perTable) {
			if grain := int64(binary.LittleEndian.Uint32(table[4*i:])); grain > 1 { // 1 is a grain of zeros
				r.add(&r.front, index*perTable+i, grain)
			}
		}
	}
	return r.skipTo(end, "overhead")
}

// readDirectory reads a directory before the grains, which begin at end, and
// returns its entries in the order of the tables' places: the sector in the
// upper half, the index in the lower.
func (r *Reader) readDirectory(end int64) ([]uint64, error) {
	span := r.h.grain * perTable
	n := (r.h.capacity + span - 1) / span
	if n*4 > maxDirectory || int64(n)*4 > end-r.pos {
		return nil, field(12, "capacity", r.h.capacity, "one whose directory fits before the grains")
	}
	directory := make([]byte, n*4)
	if err := r.read(directory, "directory"); err != nil {
		return nil, err
	}
	var tables []uint64
	for i := range n {
		if sector := binary.LittleEndian.Uint32(directory[4*i:]); sector > 0 {
			tables = append(tables, uint64(sector)<<32|i)
		}
	}
	slices.Sort(tables)
	return tables, nil
}

// maxDirectory bounds a directory in front, in bytes: 64 TiB of disk; maxBefore
// what is remembered for tables that come before it: of 128 GiB.
const (
	maxDirectory = 8 << 20
	maxBefore    = 8 << 20
)

// Size is the size of the disk in bytes.
func (r *Reader) Size() int64 { return int64(r.h.capacity) * SectorSize }

// Consumed is how many bytes of the image have been read.
func (r *Reader) Consumed() int64 { return r.pos }

// Next skips what is left of the current run and returns the next one, a
// grain or what is left of the disk. The error is io.EOF after the last one,
// when the image is complete.
func (r *Reader) Next() (Run, error) {
	if r.err != nil {
		return Run{}, r.err
	}
	run, err := r.advance()
	if err != nil {
		r.err = err
	}
	return run, err
}

// Read reads from the current run; io.EOF is its end.
func (r *Reader) Read(p []byte) (int, error) {
	switch {
	case r.err != nil:
		return 0, r.err
	case len(r.rest) == 0:
		return 0, io.EOF
	}
	n := copy(p, r.rest)
	r.rest = r.rest[n:]
	return n, nil
}

func (r *Reader) advance() (Run, error) {
	for {
		at := r.pos
		var head [16]byte
		// A grain's stream begins behind the 12 bytes that it shares with a
		// marker, which is longer.
		if b, err := r.src.Peek(grainHead); len(b) == 0 && err == io.EOF {
			return Run{}, r.finishFront()
		}
		if err := r.read(head[:grainHead], "marker"); err != nil {
			return Run{}, err
		}
		value, size := binary.LittleEndian.Uint64(head[:]), binary.LittleEndian.Uint32(head[8:])
		if size > 0 {
			return r.grain(at, value, size)
		}
		if err := r.read(head[grainHead:], "marker"); err != nil {
			return Run{}, err
		}
		kind := binary.LittleEndian.Uint32(head[grainHead:])
		if err := r.skipTo(at+SectorSize, "marker"); err != nil {
			return Run{}, err
		}
		switch {
		case kind == markerEnd && value == 0:
			return Run{}, r.finish()
		case kind == markerFooter && value == 1:
			if err := r.footer(); err != nil {
				return Run{}, err
			}
		case kind == markerTable || kind == markerDirectory:
			if value > maxDirectory/SectorSize {
				return Run{}, field(at, "sectors of a table", value, fmt.Sprintf("at most %d", maxDirectory/SectorSize))
			}
			if kind == markerDirectory {
				r.dir = r.pos / SectorSize
			}
			if err := r.skipTo(r.pos+int64(value)*SectorSize, "table"); err != nil {
				return Run{}, err
			}
		default:
			return Run{}, field(at, "marker", fmt.Sprintf("%d, of %d sectors", kind, value), "one of 0 to 3")
		}
	}
}

// grain reads a grain whose head lies at a place in the image.
func (r *Reader) grain(at int64, sector uint64, size uint32) (Run, error) {
	if sector >= r.h.capacity || sector%r.h.grain != 0 {
		return Run{}, field(at, "sector of a grain", sector, fmt.Sprintf("a multiple of %d below %d", r.h.grain, r.h.capacity))
	}
	if most := 2*int64(len(r.out)) + SectorSize; int64(size) > most {
		return Run{}, field(at+8, "length of a grain", size, fmt.Sprintf("at most %d", most))
	}
	if int64(cap(r.in)) < int64(size) {
		r.in = make([]byte, size)
	}
	b := r.in[:size]
	if err := r.read(b, "grain"); err != nil {
		return Run{}, err
	}
	off := int64(sector) * SectorSize
	want := min(int64(len(r.out)), r.Size()-off)
	n, err := r.inflate(b)
	if err != nil {
		return Run{}, field(at+grainHead, "grain", err, fmt.Sprintf("a zlib stream of at most %d bytes", len(r.out)))
	}
	if n < want {
		return Run{}, field(at+grainHead, "grain", fmt.Sprintf("%d bytes", n), want)
	}
	// The last one may end with the image, without padding.
	if err := r.skipTo(roundUp(r.pos, SectorSize), "grain"); err != nil && !errors.Is(err, io.ErrUnexpectedEOF) {
		return Run{}, err
	}
	r.add(&r.came, int64(sector/r.h.grain), at/SectorSize)
	r.rest = r.out[:want]
	return Run{Off: off, Len: want}, nil
}

// inflate decompresses a grain into r.out and returns its length.
func (r *Reader) inflate(b []byte) (int64, error) {
	if r.z == nil {
		z, err := zlib.NewReader(bytes.NewReader(b))
		if err != nil {
			return 0, err
		}
		r.z = z.(zlibReader)
	} else if err := r.z.Reset(bytes.NewReader(b), nil); err != nil {
		return 0, err
	}
	for n := 0; ; {
		// At the end of the grain one more byte must be refused.
		room, spare := r.out[n:], [1]byte{}
		if len(room) == 0 {
			room = spare[:]
		}
		k, err := r.z.Read(room)
		if n += k; n > len(r.out) {
			return 0, errors.New("more than a grain")
		}
		if err == io.EOF {
			return int64(n), nil
		}
		if err != nil {
			return 0, err
		}
	}
}

// footer reads the footer, and checks that it belongs to what came.
func (r *Reader) footer() error {
	at := r.pos
	b := make([]byte, SectorSize)
	if err := r.read(b, "footer"); err != nil {
		return err
	}
	f := decodeHeader(b)
	switch {
	case f.magic != headMagic || f.capacity != r.h.capacity || f.grain != r.h.grain:
		return field(at, "footer", "different", "a copy of the header")
	case r.dir == 0 || f.directoryAt != uint64(r.dir):
		return field(at+56, "directory", f.directoryAt, fmt.Sprintf("%d, where it came", r.dir))
	}
	r.h.directoryAt = f.directoryAt
	return nil
}

// finish is the end at an end-of-stream marker.
func (r *Reader) finish() error {
	if r.h.directoryAt == atEnd {
		return field(r.pos-SectorSize, "end of stream", "without a footer", "one, because the header has no directory")
	}
	if n, err := io.Copy(io.Discard, r.src); err != nil {
		return err
	} else if r.pos += n; r.length >= 0 && r.pos < r.length {
		return r.cut("rest of the image")
	}
	return r.finishTables()
}

// finishFront is the end of an image without an end-of-stream marker, which
// only one with its tables in front may lack.
func (r *Reader) finishFront() error {
	if r.h.directoryAt == atEnd || r.length >= 0 && r.pos < r.length {
		return r.cut("grains")
	}
	return r.finishTables()
}

// finishTables compares what came with what tables in front promised, which is
// what those who can seek go by.
func (r *Reader) finishTables() error {
	switch front := r.h.directoryAt < r.h.overhead; {
	case !front && r.h.directoryAt != uint64(r.dir), front && (r.front.n > r.came.n || r.front.last > r.came.last):
		return r.cut("grains")
	case front && r.front != r.came:
		return field(int64(r.h.directoryAt)*SectorSize, "grain tables", fmt.Sprintf("of other grains than the %d that came", r.came.n),
			"an entry for each grain with its place, and no others")
	}
	return io.EOF
}

// read fills p; what names it in errors.
func (r *Reader) read(p []byte, what string) error {
	n, err := io.ReadFull(r.src, p)
	r.pos += int64(n)
	return r.named(err, what)
}

// skipTo discards the stream up to the byte off, which is not behind r.pos.
func (r *Reader) skipTo(off int64, what string) error {
	n, err := io.CopyN(io.Discard, r.src, off-r.pos)
	r.pos += n
	return r.named(err, what)
}

func (r *Reader) named(err error, what string) error {
	if err == io.EOF || errors.Is(err, io.ErrUnexpectedEOF) {
		return r.cut(what)
	}
	return err
}

// cut is the error of a stream that ends within something.
func (r *Reader) cut(what string) error {
	return fmt.Errorf("vmdk: stream ends at byte %d, in the %s: %w", r.pos, what, io.ErrUnexpectedEOF)
}
