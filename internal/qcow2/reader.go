package qcow2

import (
	"bufio"
	"container/heap"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math"
)

const (
	// maxAhead is how many places a Reader remembers that lie ahead: 24 MiB
	// of them. Tables that it then comes to are put into the spool and done
	// last, and so is what they refer to.
	maxAhead = 1 << 20

	// maxL1Ahead is the largest L1 table that is used while the image is
	// read, in entries: 256 TiB of disk with clusters of 64 KiB. A larger
	// one is put into the spool, like all that it refers to.
	maxL1Ahead = 512 << 10

	// spoolPiece is what writes to the spool begin and end at multiples of, if
	// they can, in bytes.
	spoolPiece = 1 << 20
)

// Spool is scratch space for parts of an image that come before what says
// what they mean. It reads as zero where nothing was written.
type Spool interface {
	io.ReaderAt
	io.WriterAt
}

// ReaderOptions say what is known about a stream beforehand.
type ReaderOptions struct {
	// Length of the image in bytes. Nothing is read behind it. Below zero it
	// is not known, and the image ends where the stream ends.
	Length int64

	// Spool is called when scratch space is needed, once. Offsets in it are
	// those of the image. Without it an image that needs one is refused.
	Spool func() (Spool, error)

	// Check, unless nil, is asked before each table that is read from the
	// scratch space, of which a small image can have millions: an error ends
	// the reading.
	Check func() error
}

// Reader reads an image forward. It is not safe for concurrent use.
//
// A stream that ends too early gives an error matching io.ErrUnexpectedEOF, a
// wrong one a [FormatError], and a failing source or spool its own error;
// after any of them the Reader returns it for ever.
//
// No part of an image is used twice, so the work is bounded by its length. A
// Reader takes some 10 MiB for usual images, and 150 MiB at most whatever the
// image says.
type Reader struct {
	h      *header
	src    *bufio.Reader
	pos    int64 // bytes consumed
	length int64 // of the stream, -1 when not known
	ended  bool

	ahead claims
	l1    l1State

	// Tables still to be read, in the order of the disk: those that lay
	// behind when the L1 table was read, and at the end those that were late.
	behind, late []tableRef

	table   tableIter
	pending int64 // L2 tables ahead

	spool   spool
	piece   []byte // on its way there
	check   func() error
	inflate inflater

	run  Run       // the current one
	left int64     // bytes of it not read yet
	from io.Reader // of the current run
	err  error
}

// l1State says what has become of the L1 table.
type l1State int

const (
	l1Ahead   l1State = iota
	l1Known           // every table is ahead, behind, late or done
	l1Spooled         // too large: its tables are read from the spool at the end
)

// tableRef is an L2 table: where it lies and which one it is.
type tableRef struct {
	off   int64
	index int64
}

// NewReader reads the header and checks it.
func NewReader(src io.Reader, o ReaderOptions) (*Reader, error) {
	if o.Length >= 0 {
		src = io.LimitReader(src, o.Length)
	}
	first := bufio.NewReaderSize(src, 4096)
	b, err := first.Peek(headPeek)
	if err != nil && err != io.EOF {
		return nil, err
	}
	h, err := parseHeader(b)
	if err != nil {
		return nil, err
	}
	r := &Reader{h: h, length: o.Length, spool: spool{open: o.Spool}, check: o.Check}
	// A compressed cluster is looked at as a whole: it may share a sector
	// with the next one, and take up two clusters at most.
	r.src = bufio.NewReaderSize(first, int(max(64<<10, 2*h.clusterSize()+SectorSize)))
	r.inflate.init(h)
	r.ahead.add(claim{kind: claimHeader, n: h.clusterSize()})
	if h.refTable > 0 && h.refTableAt > 0 {
		r.ahead.add(claim{off: h.refTableAt, kind: claimRefTable, n: h.refTable})
	}
	if h.l1Entries > 0 {
		if err := r.inside(40, "L1 table offset", h.l1At, 8*h.l1Entries); err != nil {
			return nil, err
		}
		if h.l1Entries > maxL1Ahead {
			r.l1 = l1Spooled
		} else {
			r.ahead.add(claim{off: h.l1At, kind: claimL1, n: 8 * h.l1Entries})
		}
	} else {
		r.l1 = l1Known
	}
	return r, nil
}

// Size is the size of the disk in bytes.
func (r *Reader) Size() int64 { return r.h.size }

// Delta tells whether the image has a backing file, which is what parts that
// it does not hold read as.
func (r *Reader) Delta() bool { return r.h.backing }

// Consumed is how many bytes of the image have been read.
func (r *Reader) Consumed() int64 { return r.pos }

// Next skips what is left of the current run and returns the next one. Runs
// do not reach past the end of the disk, and come in no particular order. The
// error is io.EOF after the last one, when the whole image has been read.
func (r *Reader) Next() (Run, error) {
	if r.err != nil {
		return Run{}, r.err
	}
	if r.left > 0 && !r.run.Spooled {
		if _, err := io.Copy(io.Discard, onlyReader{r}); err != nil {
			return Run{}, err
		}
	}
	r.left = 0
	run, err := r.advance()
	if err != nil {
		r.err = err
		return Run{}, err
	}
	r.run = run
	if !run.Zero {
		r.left = run.Len
	}
	return run, nil
}

// onlyReader hides other methods of a reader.
type onlyReader struct{ io.Reader }

// Read reads from the current run; io.EOF is its end.
func (r *Reader) Read(p []byte) (int, error) {
	switch {
	case r.err != nil:
		return 0, r.err
	case r.left == 0:
		return 0, io.EOF
	}
	n, err := r.from.Read(p[:min(int64(len(p)), r.left)])
	r.left -= int64(n)
	if err == io.EOF && r.left > 0 {
		err = cut(r.pos, "data")
	}
	if err != nil && err != io.EOF {
		r.err = err
	}
	if n > 0 {
		return n, nil
	}
	return 0, r.err
}

// advance finds the next run.
func (r *Reader) advance() (Run, error) {
	for {
		if run, err := r.advanceOnce(); err != nil || run.Len > 0 {
			return run, err
		}
	}
}

// advanceOnce does the next thing that there is to do, which need not give a
// run.
func (r *Reader) advanceOnce() (Run, error) {
	switch {
	case r.table.on:
		return r.fromTable()
	case len(r.behind) > 0:
		return Run{}, r.loadBehind()
	case len(r.ahead) > 0:
		return r.step()
	case !r.ended:
		return Run{}, r.drain()
	}
	return Run{}, r.takeLate()
}

// step goes to the nearest place ahead that means something.
func (r *Reader) step() (Run, error) {
	c := heap.Pop(&r.ahead).(claim)
	if c.off < r.pos {
		return Run{}, field(c.off, c.kind.String(), "a place that is used already", fmt.Sprintf("one from %d on", r.pos))
	}
	if err := r.passTo(c.off); err != nil {
		return Run{}, err
	}
	switch c.kind {
	case claimRefTable:
		return Run{}, r.readRefTable(c.n)
	case claimHeader, claimRefBlock:
		return Run{}, r.skip(c.n, c.kind.String())
	case claimL1:
		return Run{}, r.readL1()
	case claimL2:
		return Run{}, r.readL2(tableRef{c.off, c.at})
	case claimCompressed:
		return r.decompress(c)
	}
	r.from = io.TeeReader(io.LimitReader(r.src, c.n), (*counter)(&r.pos))
	return Run{Off: c.at, Len: c.n}, nil
}

// counter counts what is written to it.
type counter int64

func (c *counter) Write(p []byte) (int, error) {
	*c += counter(len(p))
	return len(p), nil
}

// readRefTable notes where the refcount blocks are, so that they are not taken
// for data that nothing refers to yet. Refcounts mean nothing to a reader.
func (r *Reader) readRefTable(n int64) error {
	return r.eachEntry(n, "refcount table", func(_ int64, off uint64) error {
		at := int64(off & maskOffset)
		inside := r.inside(0, "", at, r.h.clusterSize()) == nil
		if at >= r.pos && at%r.h.clusterSize() == 0 && inside && len(r.ahead) < maxAhead {
			r.ahead.add(claim{off: at, kind: claimRefBlock, n: r.h.clusterSize()})
		}
		return nil
	})
}

// eachEntry reads n bytes of entries and passes them to fn.
func (r *Reader) eachEntry(n int64, what string, fn func(index int64, entry uint64) error) error {
	var chunk [4096]byte
	end := r.pos + n
	for index := int64(0); r.pos < end; {
		b := chunk[:min(int64(len(chunk)), end-r.pos)]
		if err := r.read(b, what); err != nil {
			return err
		}
		for ; len(b) > 0; b, index = b[8:], index+1 {
			if err := fn(index, binary.BigEndian.Uint64(b)); err != nil {
				return err
			}
		}
	}
	return nil
}

// readL1 notes where the L2 tables are.
func (r *Reader) readL1() error {
	at := r.pos
	r.l1 = l1Known
	return r.eachEntry(8*r.h.l1Entries, "L1 table", func(index int64, entry uint64) error {
		off, err := r.l2Offset(at+8*index, entry)
		if err != nil || off == 0 {
			return err
		}
		if off < r.h.l1At {
			r.behind = append(r.behind, tableRef{off, index})
			return nil
		}
		r.pending++
		r.ahead.add(claim{off: off, kind: claimL2, at: index, n: r.h.clusterSize()})
		return nil
	})
}

// l2Offset checks an L1 entry at a place and returns the offset in it.
func (r *Reader) l2Offset(at int64, entry uint64) (int64, error) {
	off := int64(entry & maskOffset)
	if entry == 0 || off == 0 {
		return 0, nil
	}
	if off%r.h.clusterSize() != 0 {
		return 0, field(at, "L1 entry", fmt.Sprintf("%#x", entry), fmt.Sprintf("a multiple of %d", r.h.clusterSize()))
	}
	return off, r.inside(at, "L1 entry", off, r.h.clusterSize())
}

// readL2 reads a table that the stream has come to.
func (r *Reader) readL2(ref tableRef) error {
	r.pending--
	if r.crowded() {
		r.late = append(r.late, ref)
		return r.passTo(ref.off + r.h.clusterSize())
	}
	b := r.table.buffer(r.h)
	if err := r.read(b, "L2 table"); err != nil {
		return err
	}
	r.table.begin(ref)
	return nil
}

// crowded tells whether another table might be one too many to remember.
func (r *Reader) crowded() bool {
	most := r.h.perTable()
	if r.h.extended {
		most *= subclusters / 2
	}
	backlog := int64(len(r.ahead)) - r.pending
	return backlog > 0 && backlog+most > maxAhead
}

// loadBehind reads the next table that lies in the spool.
func (r *Reader) loadBehind() error {
	if r.check != nil {
		if err := r.check(); err != nil {
			return err
		}
	}
	ref := r.behind[0]
	r.behind = r.behind[1:]
	if r.crowded() {
		r.late = append(r.late, ref)
		return nil
	}
	if err := r.spool.takeTable(ref.off, r.h.clusterSize()); err != nil {
		return err
	}
	if err := r.spool.readFull(r.table.buffer(r.h), ref.off); err != nil {
		return err
	}
	r.table.begin(ref)
	return nil
}

// takeLate makes what was put off the work that is left; io.EOF when that is
// nothing. The stream has been read to its end.
func (r *Reader) takeLate() error {
	switch {
	case len(r.late) > 0:
		r.behind, r.late = r.late, nil
	case r.l1 == l1Ahead:
		return cut(r.pos, "gap before the L1 table")
	case r.l1 == l1Spooled && r.h.l1Entries > 0:
		return r.nextTables()
	default:
		return io.EOF
	}
	return nil
}

// nextTables takes some more tables of a large L1 table out of the spool.
func (r *Reader) nextTables() error {
	var chunk [4096]byte
	b := chunk[:min(int64(len(chunk)), 8*r.h.l1Entries)]
	if err := r.spool.has(r.h.l1At, int64(len(b)), "L1 table"); err != nil {
		return err
	}
	if err := r.spool.readFull(b, r.h.l1At); err != nil {
		return err
	}
	first := r.h.tables() - r.h.l1Entries
	for i := 0; i < len(b); i += 8 {
		off, err := r.l2Offset(r.h.l1At+int64(i), binary.BigEndian.Uint64(b[i:]))
		if err != nil {
			return err
		}
		if off > 0 {
			r.behind = append(r.behind, tableRef{off, first + int64(i/8)})
		}
	}
	r.h.l1At += int64(len(b))
	r.h.l1Entries -= int64(len(b) / 8)
	return nil
}

// wanted tells whether a table is still to come that may refer to what is
// passed now.
func (r *Reader) wanted() bool {
	return r.l1 != l1Known || r.pending > 0 || len(r.late) > 0
}

// passTo goes forward to off, which lies ahead, over bytes that nothing has
// referred to so far.
func (r *Reader) passTo(off int64) error {
	if !r.wanted() {
		return r.skip(off-r.pos, "gap")
	}
	for r.pos < off {
		switch err := r.divert(off - r.pos); err {
		case nil:
		case io.EOF:
			return cut(r.pos, "gap")
		default:
			return err
		}
	}
	return nil
}

// divert puts up to n of the next bytes into the spool. At the end of the stream
// there are none, and the error is io.EOF.
func (r *Reader) divert(n int64) error {
	if r.piece == nil {
		r.piece = make([]byte, spoolPiece)
	}
	k, err := io.ReadFull(r.src, r.piece[:min(n, spoolPiece-r.pos%spoolPiece)])
	if k > 0 && err == io.ErrUnexpectedEOF {
		err = nil // the end comes again
	}
	if err != nil {
		return err
	}
	if err := r.spool.put(r.piece[:k], r.pos); err != nil {
		return err
	}
	r.pos += int64(k)
	return nil
}

// drain reads the rest of the stream.
func (r *Reader) drain() error {
	for {
		var err error
		if r.wanted() {
			err = r.divert(math.MaxInt64)
		} else {
			var n int
			n, err = r.src.Discard(r.src.Size())
			r.pos += int64(n)
		}
		if err == io.EOF {
			break
		}
		if err != nil {
			return err
		}
	}
	if r.length >= 0 && r.pos < r.length {
		return cut(r.pos, "rest of the image")
	}
	r.ended = true
	return nil
}

// inside checks that n bytes at off are within the stream as far as its length
// is known.
func (r *Reader) inside(at int64, name string, off, n int64) error {
	if r.length >= 0 && off > r.length-n {
		return field(at, name, off, fmt.Sprintf("such that %d bytes fit an image of %d", n, r.length))
	}
	return nil
}

// read fills p; what names it in errors.
func (r *Reader) read(p []byte, what string) error {
	n, err := io.ReadFull(r.src, p)
	r.pos += int64(n)
	return r.named(err, what)
}

// skip discards n bytes.
func (r *Reader) skip(n int64, what string) error {
	k, err := io.CopyN(io.Discard, r.src, n)
	r.pos += k
	return r.named(err, what)
}

func (r *Reader) named(err error, what string) error {
	if err == io.EOF || errors.Is(err, io.ErrUnexpectedEOF) {
		return cut(r.pos, what)
	}
	return err
}

// cut is the error of a stream that ends at pos, within something.
func cut(pos int64, what string) error {
	return fmt.Errorf("qcow2: stream ends at byte %d, in the %s: %w", pos, what, io.ErrUnexpectedEOF)
}
