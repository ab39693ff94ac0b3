package xva

import (
	"archive/tar"
	"bytes"
	"crypto/sha1"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"maps"
	"slices"
	"strconv"
	"strings"

	"github.com/cespare/xxhash/v2"
)

// Reader reads the chunks of the disks of an archive. It is not safe for
// concurrent use.
type Reader struct {
	src   *counted
	tar   *tar.Reader
	disks map[string]*progress // by prefix
	disk  string               // prefix of the chunk returned last
	whole bool                 // the disks are those of an XVA
	trust bool                 // in spite of wrong checksums
	buf   []byte
	err   error
}

// progress is a disk that is being read.
type progress struct {
	size  int64 // in bytes
	next  int64 // number of the lowest chunk that can follow
	first bool  // chunk 0 was there
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
	r := newReader(src)
	r.disks = map[string]*progress{prefix: {size: size}}
	return r
}

func newReader(src io.Reader) *Reader {
	c := &counted{r: src}
	return &Reader{src: c, tar: tar.NewReader(c), buf: make([]byte, ChunkSize)}
}

// Manifest is the name of the file with which an XVA begins.
const Manifest = "ova.xml"

// maxManifest is the largest manifest that is read, in bytes: that of a VM
// with 800 snapshots of 16 disks.
const maxManifest = 64 << 20

// NewArchive begins to read an XVA and returns its manifest, which must be read
// before the disks. The reader knows of none until it is told by Expect.
func NewArchive(src io.Reader) (r *Reader, manifest io.Reader, err error) {
	r = newReader(src)
	h, err := r.header()
	switch {
	case err == io.EOF:
		return nil, nil, fmt.Errorf("xva: archive ends at byte %d: %w", r.src.n, io.ErrUnexpectedEOF)
	case err != nil:
		return nil, nil, err
	case h.Name != Manifest:
		return nil, nil, &UnexpectedFileError{Want: Manifest, Found: h.Name}
	case h.Size > maxManifest:
		return nil, nil, malformed("%s has %d bytes, %d are possible", Manifest, h.Size, int64(maxManifest))
	}
	return r, &manifestReader{r}, nil
}

// manifestReader reads the manifest of an archive.
type manifestReader struct{ archive *Reader }

func (m *manifestReader) Read(p []byte) (int, error) {
	n, err := m.archive.tar.Read(p)
	if err != nil && err != io.EOF {
		err = m.archive.short(Manifest, err)
	}
	return n, err
}

// Expect says which disks follow the manifest: their sizes in bytes by the
// prefix of their names. Every one must be there with its first and its last
// chunk; the chunks of a disk ascend, and none but the last is short. With
// trust wrong checksums are overlooked.
func (r *Reader) Expect(disks map[string]int64, trust bool) {
	r.whole, r.trust, r.disks = true, trust, make(map[string]*progress, len(disks))
	for prefix, size := range disks {
		r.disks[prefix] = &progress{size: size}
	}
}

// UnexpectedFileError is a file that does not belong where it stands.
type UnexpectedFileError struct{ Want, Found string }

func (e *UnexpectedFileError) Error() string {
	return fmt.Sprintf("%v: there is a file %q in it, not %s", ErrFormat, e.Found, e.Want)
}

func (e *UnexpectedFileError) Unwrap() error { return ErrFormat }

// Disk is the prefix of the disk that the chunk returned last belongs to.
func (r *Reader) Disk() string { return r.disk }

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
		disk, number, suffix, err := r.parse(h.Name)
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
		if off > disk.size || h.Size > min(ChunkSize, disk.size-off) {
			return 0, nil, malformed("chunk %q of %d bytes does not fit a disk of %d bytes", h.Name, h.Size, disk.size)
		}
		data, err := r.contents(h)
		if err != nil {
			return 0, nil, err
		}
		if len(data) == 0 {
			continue
		}
		if r.whole && (number < disk.next || h.Size < min(ChunkSize, disk.size-off)) {
			return 0, nil, malformed("chunk %q of %d bytes is short or out of order", h.Name, h.Size)
		}
		disk.next, disk.first = number+1, disk.first || number == 0
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
func (r *Reader) parse(name string) (disk *progress, number int64, suffix string, err error) {
	slash := strings.LastIndexByte(name, '/') + 1
	digits, suffix, dot := strings.Cut(name[slash:], ".")
	if dot {
		suffix = "." + suffix
	}
	disk = r.disks[name[:slash]]
	n, bad := strconv.ParseUint(digits, 10, 40)
	if disk == nil || bad != nil || len(digits) != 8 || suffix != "" && suffix != hashSuffix && suffix != sha1Suffix {
		return nil, 0, "", &UnexpectedFileError{Want: "a chunk of a disk", Found: name}
	}
	r.disk = name[:slash]
	return disk, int64(n), suffix, nil
}

// contents reads a file, at most a chunk.
func (r *Reader) contents(h *tar.Header) ([]byte, error) {
	b := r.buf[:h.Size]
	if _, err := io.ReadFull(r.tar, b); err != nil {
		return nil, r.short(h.Name, err)
	}
	return b, nil
}

// short explains an error in the contents of a file.
func (r *Reader) short(name string, err error) error {
	if err == io.EOF || errors.Is(err, io.ErrUnexpectedEOF) {
		return fmt.Errorf("xva: archive ends at byte %d, in %q: %w", r.src.n, name, io.ErrUnexpectedEOF)
	}
	return err
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
		want = fmt.Sprintf("%016X", xxhash.Sum64(data))
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
		return r.short(h.Name, err)
	}
	if got := strings.TrimSpace(string(sum)); !strings.EqualFold(got, want) && !r.trust {
		return malformed("%w: chunk %q has %s, its file says %q", ErrChecksum, name, want, got)
	}
	return nil
}

// finish reads what follows the end of the archive, which is padding, and
// checks that an XVA had all of its disks.
func (r *Reader) finish() error {
	if _, err := io.Copy(io.Discard, r.src); err != nil {
		return err
	}
	if r.src.zeros < trailerSize { // which the tar reader does not insist on
		return fmt.Errorf("xva: archive ends at byte %d, before its end is marked: %w", r.src.n, io.ErrUnexpectedEOF)
	}
	if r.whole {
		for _, prefix := range slices.Sorted(maps.Keys(r.disks)) {
			if d := r.disks[prefix]; !d.first || d.next <= (d.size-1)/ChunkSize {
				return malformed("the first or the last chunk of %s is missing", prefix)
			}
		}
	}
	return io.EOF
}
