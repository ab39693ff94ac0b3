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
// # Reading
//
// [Reader] takes one disk. Only plain files with names of this form are
// accepted, no links, no other directories; a chunk is passed on when its
// checksum has been verified.
package xva

import (
	"archive/tar"
	"bytes"
	"crypto/sha1"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"iter"
	"math/bits"
	"strconv"
	"strings"
	"time"
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

// ErrFormat is matched by every error about the contents of an archive.
var ErrFormat = errors.New("not a usable archive of a disk")

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
	copy(sum[sector:], fmt.Sprintf("%016X", xxh64(e.buf[sector:sector+e.n])))
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

func roundUp(n int64) int64 { return (n + sector - 1) &^ (sector - 1) }

// Reader reads the chunks of one disk. It is not safe for concurrent use.
type Reader struct {
	src    *counted
	tar    *tar.Reader
	prefix string
	size   int64 // of the disk in bytes
	buf    []byte
	err    error
}

// counted counts what is read, and the zeros at its end.
type counted struct {
	r        io.Reader
	n, zeros int64
}

func (c *counted) Read(p []byte) (int, error) {
	n, err := c.r.Read(p)
	c.n += int64(n)
	tail := int64(n - len(bytes.TrimRight(p[:n], "\x00")))
	if tail == int64(n) {
		tail += c.zeros
	}
	c.zeros = tail
	return n, err
}

// NewReader reads the chunks of a disk of size bytes, whose names begin with a
// prefix, from an archive that holds nothing else.
func NewReader(src io.Reader, prefix string, size int64) *Reader {
	c := &counted{r: src}
	return &Reader{src: c, tar: tar.NewReader(c), prefix: prefix, size: size, buf: make([]byte, ChunkSize)}
}

// Consumed is how many bytes of the archive have been read.
func (r *Reader) Consumed() int64 { return r.src.n }

// Next returns the next chunk, verified: where it lies on the disk in bytes,
// and its contents, which are valid until the next call. The error is io.EOF
// when the archive is complete.
func (r *Reader) Next() (off int64, data []byte, err error) {
	if r.err != nil {
		return 0, nil, r.err
	}
	off, data, err = r.next()
	if err != nil {
		r.err = err
	}
	return off, data, err
}

func (r *Reader) next() (int64, []byte, error) {
	for {
		h, err := r.header()
		if err != nil {
			if err == io.EOF {
				return 0, nil, r.finish()
			}
			return 0, nil, err
		}
		number, suffix, err := r.parse(h.Name)
		if err != nil {
			return 0, nil, err
		}
		if suffix != "" && h.Size > 64 {
			return 0, nil, malformed("checksum %q has %d bytes", h.Name, h.Size)
		}
		if suffix != "" { // of an empty chunk
			if _, err := r.contents(h); err != nil {
				return 0, nil, err
			}
			continue
		}
		off := number * ChunkSize
		if off > r.size || h.Size > min(ChunkSize, r.size-off) {
			return 0, nil, malformed("chunk %q of %d bytes does not fit a disk of %d bytes", h.Name, h.Size, r.size)
		}
		data, err := r.contents(h)
		if err != nil {
			return 0, nil, err
		}
		if len(data) == 0 {
			continue
		}
		return off, data, r.verify(h.Name, data)
	}
}

// header reads the header of a file and refuses everything that is no plain
// file.
func (r *Reader) header() (*tar.Header, error) {
	h, err := r.tar.Next()
	switch {
	case err == io.EOF:
		return nil, err
	case errors.Is(err, io.ErrUnexpectedEOF):
		return nil, fmt.Errorf("xva: archive ends at byte %d: %w", r.src.n, err)
	case errors.Is(err, tar.ErrHeader):
		return nil, malformed("at byte %d: %w", r.src.n, err)
	case err != nil:
		return nil, err
	case h.Typeflag != tar.TypeReg:
		return nil, malformed("%q is no plain file", h.Name)
	}
	for key := range h.PAXRecords {
		if strings.HasPrefix(key, "GNU.sparse.") {
			return nil, malformed("%q is a sparse file", h.Name)
		}
	}
	return h, nil
}

// parse takes a name apart.
func (r *Reader) parse(name string) (number int64, suffix string, err error) {
	rest, ok := strings.CutPrefix(name, r.prefix)
	digits, suffix, dot := strings.Cut(rest, ".")
	if dot {
		suffix = "." + suffix
	}
	n, bad := strconv.ParseUint(digits, 10, 40)
	if !ok || bad != nil || len(digits) != 8 || suffix != "" && suffix != hashSuffix && suffix != sha1Suffix {
		return 0, "", malformed("there is a file %q in it", name)
	}
	return int64(n), suffix, nil
}

// contents reads a file, at most a chunk.
func (r *Reader) contents(h *tar.Header) ([]byte, error) {
	b := r.buf[:h.Size]
	if _, err := io.ReadFull(r.tar, b); err != nil {
		if err == io.EOF || errors.Is(err, io.ErrUnexpectedEOF) {
			return nil, fmt.Errorf("xva: archive ends at byte %d, in %q: %w", r.src.n, h.Name, io.ErrUnexpectedEOF)
		}
		return nil, err
	}
	return b, nil
}

// verify reads the checksum that must follow a chunk.
func (r *Reader) verify(name string, data []byte) error {
	h, err := r.header()
	if err == io.EOF {
		return malformed("chunk %q has no checksum", name)
	}
	if err != nil {
		return err
	}
	suffix, ok := strings.CutPrefix(h.Name, name)
	var want string
	switch {
	case ok && suffix == hashSuffix:
		want = fmt.Sprintf("%016X", xxh64(data))
	case ok && suffix == sha1Suffix:
		sum := sha1.Sum(data)
		want = hex.EncodeToString(sum[:])
	default:
		return malformed("after chunk %q comes %q, not its checksum", name, h.Name)
	}
	if h.Size > 64 {
		return malformed("checksum %q has %d bytes", h.Name, h.Size)
	}
	sum := make([]byte, h.Size)
	if _, err := io.ReadFull(r.tar, sum); err != nil {
		return fmt.Errorf("xva: archive ends at byte %d, in %q: %w", r.src.n, h.Name, io.ErrUnexpectedEOF)
	}
	if got := strings.TrimSpace(string(sum)); !strings.EqualFold(got, want) {
		return malformed("chunk %q has the checksum %s, its file says %q", name, want, got)
	}
	return nil
}

// finish reads what follows the end of the archive, which is padding.
func (r *Reader) finish() error {
	if _, err := io.Copy(io.Discard, r.src); err != nil {
		return err
	}
	if r.src.zeros < trailerSize { // which the tar reader does not insist on
		return fmt.Errorf("xva: archive ends at byte %d, before its end is marked: %w", r.src.n, io.ErrUnexpectedEOF)
	}
	return io.EOF
}
