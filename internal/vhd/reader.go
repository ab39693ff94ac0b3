package vhd

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"math"
	"math/bits"
	"slices"
)

// maxReadSize is the largest disk a Reader reads, in bytes: far beyond what can
// be addressed in blocks, and small enough that no sum of offsets overflows.
const maxReadSize = 1 << 62

// ReaderOptions say what is known about a stream beforehand.
type ReaderOptions struct {
	// Length of the image in bytes. Nothing is read behind it. Below zero it
	// is not known, and the image ends where the stream ends.
	Length int64
}

// Run is a run of sectors to write.
type Run struct {
	Off, Len int64 // bytes on the disk
}

// Reader reads an image forward. It is not safe for concurrent use.
//
// A stream that ends too early gives an error matching io.ErrUnexpectedEOF, a
// wrong one a [FormatError], and a failing source its own error; after any of
// them the Reader returns it for ever.
type Reader struct {
	src    *bufio.Reader
	pos    int64 // bytes consumed
	length int64 // of the stream, -1 when not known
	footer Footer
	header Header

	// blocks are the allocated ones in the order of the file, the sector in
	// the upper half of each and the index in the lower.
	blocks []uint64
	done   int   // blocks that have been entered
	last   int64 // highest allocated index, -1 without any
	lsb    bool  // bitmaps have the least significant bit first

	bitmap []byte // of the current block
	sector int64  // sectors of the current block before which all runs are yielded
	start  int64  // byte offset of the current block's data in the stream
	left   int64  // bytes of the current run not read yet
	err    error
}

// NewReader reads up to the end of the allocation table and checks everything
// that is known by then, so that an image that cannot be read is refused
// before any of its data is used. It may buffer more of src than it consumes.
func NewReader(src io.Reader, o ReaderOptions) (*Reader, error) {
	if o.Length >= 0 {
		src = io.LimitReader(src, o.Length)
	}
	r := &Reader{src: bufio.NewReaderSize(src, 64<<10), length: o.Length, last: -1}
	for _, step := range []func() error{r.readFooter, r.readHeader, r.readTable, r.checkPlaces} {
		if err := step(); err != nil {
			return nil, err
		}
	}
	r.lsb = be32(r.footer[28:]) == creatorTapdisk && r.footer.CreatorVersion() == 1
	r.bitmap = make([]byte, r.bitmapSize())
	r.sector = int64(r.header.BlockSize()) / SectorSize
	return r, nil
}

// Footer returns the footer at the start of the image.
func (r *Reader) Footer() *Footer { return &r.footer }

// Header returns the dynamic header.
func (r *Reader) Header() *Header { return &r.header }

// Size is the size of the disk in bytes.
func (r *Reader) Size() int64 { return int64(r.footer.CurrentSize()) }

// Blocks is the number of allocated blocks.
func (r *Reader) Blocks() int { return len(r.blocks) }

// Done is the number of blocks that have been begun.
func (r *Reader) Done() int { return r.done }

// LastBlock is the offset on the disk of the highest allocated block in bytes,
// -1 when there is none. No run starts behind that block.
func (r *Reader) LastBlock() int64 {
	if r.last < 0 {
		return -1
	}
	return r.last * int64(r.header.BlockSize())
}

// End is the first byte on the disk behind everything that the image could
// write.
func (r *Reader) End() int64 {
	return min((r.last+1)*int64(r.header.BlockSize()), r.Size())
}

func (r *Reader) bitmapSize() int64 {
	return roundUp((int64(r.header.BlockSize())/SectorSize+7)/8, SectorSize)
}

func (r *Reader) readFooter() error {
	if err := r.read(r.footer[:], "footer"); err != nil {
		return err
	}
	if err := checkFooter(&r.footer, 0, "footer"); err != nil {
		return err
	}
	f := &r.footer
	switch f.Type() {
	case TypeDynamic, TypeDifferencing:
	case TypeFixed:
		return field(60, "footer disk type", "2 (fixed)",
			"3 (dynamic) or 4 (differencing); a fixed image is raw data and a footer")
	default:
		return field(60, "footer disk type", f.Type(), "3 (dynamic) or 4 (differencing)")
	}
	if f.CurrentSize() > maxReadSize {
		return field(48, "footer current size", f.CurrentSize(), fmt.Sprintf("at most %d", int64(maxReadSize)))
	}
	return r.forward(16, "footer data offset", f.DataOffset(), headerSize)
}

// checkFooter checks what holds for every footer, at off in the stream.
func checkFooter(f *Footer, off int64, name string) error {
	switch {
	case f.Cookie() == cookiePoison:
		return field(off, name+" cookie", fmt.Sprintf("%q (disabled)", f.Cookie()), `"conectix"`)
	case f.Cookie() != cookieFooter:
		return field(off, name+" cookie", fmt.Sprintf("%q", f.Cookie()), `"conectix"`)
	case f.Checksum() != checksum(f[:], checksumFooterAt):
		return field(off+checksumFooterAt, name+" checksum",
			hex(f.Checksum()), hex(checksum(f[:], checksumFooterAt)))
	case f.Version()>>16 != version1>>16:
		return field(off+12, name+" version", hex(f.Version()), hex(version1))
	}
	return nil
}

func (r *Reader) readHeader() error {
	at := int64(r.footer.DataOffset())
	if err := r.skipTo(at, "gap before the header"); err != nil {
		return err
	}
	if err := r.read(r.header[:], "header"); err != nil {
		return err
	}
	h := &r.header
	size, block := r.footer.CurrentSize(), uint64(h.BlockSize())
	switch {
	case h.Cookie() != cookieHeader:
		return field(at, "header cookie", fmt.Sprintf("%q", h.Cookie()), `"cxsparse"`)
	case h.Checksum() != checksum(h[:], checksumHeaderAt):
		return field(at+checksumHeaderAt, "header checksum",
			hex(h.Checksum()), hex(checksum(h[:], checksumHeaderAt)))
	case h.Version()>>16 != version1>>16:
		return field(at+24, "header version", hex(h.Version()), hex(version1))
	case h.DataOffset() != noOffset:
		return field(at+8, "header data offset", fmt.Sprintf("%#x", h.DataOffset()), "all ones")
	case bits.OnesCount64(block) != 1 || block < SectorSize:
		return field(at+32, "header block size", block, "a power of two of at least 512")
	case (size+block-1)/block > uint64(h.TableEntries()):
		return field(at+28, "header table entries", h.TableEntries(),
			fmt.Sprintf("at least %d for %d bytes", (size+block-1)/block, size))
	}
	return r.forward(at+16, "header table offset", h.TableOffset(), 4*int64(h.TableEntries()))
}

// readTable reads the BAT and keeps the allocated entries. Entries behind the
// end of the disk are room for growth and mean nothing.
func (r *Reader) readTable() error {
	if err := r.skipTo(int64(r.header.TableOffset()), "gap before the allocation table"); err != nil {
		return err
	}
	block := int64(r.header.BlockSize())
	entries := int64(r.header.TableEntries())
	used := r.Size() / block
	if r.Size()%block != 0 {
		used++
	}
	var chunk [4096]byte
	for i := int64(0); i < used; {
		b := chunk[:min(int64(len(chunk)), 4*(used-i))]
		if err := r.read(b, "allocation table"); err != nil {
			return err
		}
		for ; len(b) > 0; b, i = b[4:], i+1 {
			sector := be32(b)
			if sector == unallocated {
				continue
			}
			if len(r.blocks) == MaxBlocks {
				return field(int64(r.header.TableOffset())+4*i, "number of allocated blocks",
					"greater", fmt.Sprintf("at most %d", MaxBlocks))
			}
			r.blocks = append(r.blocks, uint64(sector)<<32|uint64(i))
			r.last = i
		}
	}
	return r.skipTo(int64(r.header.TableOffset())+4*entries, "allocation table")
}

// checkPlaces sorts the blocks into the order of the file and checks that each
// lies behind the table, behind the block before it and, as far as the length
// is known, before the trailing footer.
func (r *Reader) checkPlaces() error {
	slices.Sort(r.blocks)
	free, before := r.pos, int64(-1) // the block before, -1 for the table
	for i, b := range r.blocks {
		off, index := r.place(b)
		if off < free {
			behind := "the end of the allocation table"
			if before >= 0 {
				behind = fmt.Sprintf("the end of block %d", before)
			}
			return r.misplaced(index, off, fmt.Sprintf("at least %d, %s", free, behind))
		}
		data := off + r.bitmapSize()
		free, before = data+int64(r.header.BlockSize()), index
		end := free
		if i == len(r.blocks)-1 {
			end = data + r.needed(index)
		}
		if r.length >= 0 && end > r.length-(footerSize-1) {
			return r.misplaced(index, off, fmt.Sprintf("such that it ends before the footer of %d bytes", r.length))
		}
	}
	return nil
}

func (r *Reader) misplaced(index, off int64, want string) error {
	at := int64(r.header.TableOffset()) + 4*index
	return field(at, fmt.Sprintf("place of block %d", index), off, want)
}

// place splits an element of r.blocks into byte offset and index.
func (r *Reader) place(b uint64) (off, index int64) {
	return int64(b>>32) * SectorSize, int64(b & math.MaxUint32)
}

// needed is how much of the data of a block must be there when it is the last
// one in the file: some writers cut it at the end of the disk.
func (r *Reader) needed(index int64) int64 {
	block := int64(r.header.BlockSize())
	return roundUp(min(block, r.Size()-index*block), SectorSize)
}

// Next skips what is left of the current run and returns the next one. Runs
// are maximal within a block, and end at the end of the disk. The error is
// io.EOF after the last run, when the image is complete and its trailing
// footer has been verified.
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

func (r *Reader) advance() (Run, error) {
	sectors := int64(r.header.BlockSize()) / SectorSize
	for {
		if r.sector < sectors {
			first := r.scan(r.sector, sectors, true)
			r.sector = r.scan(first, sectors, false)
			if first < r.sector {
				return r.enter(first)
			}
		}
		if err := r.nextBlock(); err != nil {
			return Run{}, err
		}
	}
}

// enter moves to the first of the sectors before r.sector, which are a run of
// the current block.
func (r *Reader) enter(first int64) (Run, error) {
	_, index := r.place(r.blocks[r.done-1])
	off := index*int64(r.header.BlockSize()) + first*SectorSize
	if off >= r.Size() {
		r.sector = int64(r.header.BlockSize()) / SectorSize
		return r.advance()
	}
	if err := r.skipTo(r.start+first*SectorSize, "block data"); err != nil {
		return Run{}, err
	}
	r.left = min((r.sector-first)*SectorSize, r.Size()-off)
	return Run{Off: off, Len: r.left}, nil
}

// nextBlock leaves the current block and reads the bitmap of the next one;
// after the last it verifies the end of the image.
func (r *Reader) nextBlock() error {
	r.left = 0
	if r.done == len(r.blocks) {
		return r.finish()
	}
	off, _ := r.place(r.blocks[r.done])
	if err := r.skipTo(off, "gap before a block"); err != nil {
		return err
	}
	if err := r.read(r.bitmap, "block bitmap"); err != nil {
		return err
	}
	if r.lsb {
		for i, b := range r.bitmap {
			r.bitmap[i] = bits.Reverse8(b)
		}
	}
	r.done++
	r.sector, r.start = 0, r.pos
	return nil
}

// scan returns the first sector from s on whose bit is as asked, or sectors.
func (r *Reader) scan(s, sectors int64, set bool) int64 {
	skip := byte(0xFF)
	if set {
		skip = 0
	}
	for s < sectors {
		if b := r.bitmap[s>>3]; s&7 == 0 && b == skip {
			s += 8
		} else if b&(0x80>>(s&7)) != 0 == set {
			return s
		} else {
			s++
		}
	}
	return min(s, sectors)
}

// Read reads from the current run; io.EOF is its end.
func (r *Reader) Read(p []byte) (int, error) {
	switch {
	case r.err != nil:
		return 0, r.err
	case r.left == 0:
		return 0, io.EOF
	}
	n, err := r.src.Read(p[:min(int64(len(p)), r.left)])
	r.pos += int64(n)
	r.left -= int64(n)
	if err != nil {
		r.err = r.cut(err, "block data")
	}
	if n > 0 {
		return n, nil
	}
	return 0, r.err
}

// finish reads to the end of the image and verifies the trailing footer: the
// last 512 bytes, or the last 511 with the final one taken as zero.
func (r *Reader) finish() error {
	if n := len(r.blocks); n > 0 {
		_, index := r.place(r.blocks[n-1])
		if err := r.skipTo(r.start+r.needed(index), "block data"); err != nil {
			return err
		}
	}
	const keep = footerSize
	buf := make([]byte, 0, keep+64<<10) // what was read last, at least keep bytes if there were
	for {
		n, err := r.src.Read(buf[len(buf):cap(buf)])
		r.pos += int64(n)
		buf = buf[:len(buf)+n]
		if err == io.EOF {
			break
		} else if err != nil {
			return err
		}
		if len(buf) > keep {
			buf = buf[:copy(buf, buf[len(buf)-keep:])]
		}
	}
	if r.length >= 0 && r.pos < r.length {
		return r.cut(io.EOF, "padding or trailing footer")
	}
	var whole, short Footer
	if len(buf) >= footerSize {
		whole = Footer(buf[len(buf)-footerSize:])
	}
	if len(buf) >= footerSize-1 {
		copy(short[:], buf[len(buf)-(footerSize-1):])
	} else {
		return r.cut(io.EOF, "trailing footer")
	}
	tail, at := &whole, r.pos-footerSize
	if whole.Cookie() != cookieFooter && r.pos%SectorSize == footerSize-1 {
		tail, at = &short, r.pos-(footerSize-1)
	}
	if err := checkFooter(tail, at, "trailing footer"); err != nil {
		return err
	}
	switch {
	case tail.Type() == TypeFixed:
		return field(at+60, "trailing footer disk type", "2 (fixed)", fmt.Sprintf(
			"%d, as at the start; a fixed image of a disk that begins with a VHD can be sent as raw data, without its footer", r.footer.Type()))
	case tail.CurrentSize() != r.footer.CurrentSize():
		return field(at+48, "trailing footer current size", tail.CurrentSize(), r.footer.CurrentSize())
	case tail.Type() != r.footer.Type():
		return field(at+60, "trailing footer disk type", tail.Type(), r.footer.Type())
	}
	return io.EOF
}

// read fills p; what names it in errors.
func (r *Reader) read(p []byte, what string) error {
	n, err := io.ReadFull(r.src, p)
	r.pos += int64(n)
	return r.cut(err, what)
}

// skipTo discards the stream up to the byte off, which is not behind r.pos.
func (r *Reader) skipTo(off int64, what string) error {
	n, err := io.CopyN(io.Discard, r.src, off-r.pos)
	r.pos += n
	return r.cut(err, what)
}

// cut turns the end of the stream in the middle of something into an error
// that says where.
func (r *Reader) cut(err error, what string) error {
	if err == io.EOF || errors.Is(err, io.ErrUnexpectedEOF) {
		return fmt.Errorf("vhd: stream ends at byte %d, in the %s: %w", r.pos, what, io.ErrUnexpectedEOF)
	}
	return err
}

// forward checks that something of n bytes at off, as the field at says, lies
// ahead and before the trailing footer.
func (r *Reader) forward(at int64, name string, off uint64, n int64) error {
	if off < uint64(r.pos) || off > math.MaxInt64-uint64(n) {
		return field(at, name, off, fmt.Sprintf("at least %d", r.pos))
	}
	if r.length >= 0 && int64(off)+n > r.length-(footerSize-1) {
		return field(at, name, off, fmt.Sprintf("such that %d bytes fit before the footer of %d", n, r.length))
	}
	return nil
}

func field(off int64, name string, found, want any) error {
	return &FormatError{Off: off, Field: name, Found: fmt.Sprint(found), Want: fmt.Sprint(want)}
}

func hex(v uint32) string { return fmt.Sprintf("%#08x", v) }
