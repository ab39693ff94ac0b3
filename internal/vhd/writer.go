package vhd

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"iter"
	"strings"
	"time"
	"unicode/utf16"
)

// blockBytes is the room of a block of the writer's profile in a stream: one
// sector of bitmap and the data.
const blockBytes = SectorSize + BlockSize

// maxParentName is the longest parent file name whose locator fits a sector
// and that every reader accepts.
const maxParentName = 200

// Options describe an image to write.
type Options struct {
	Size      int64     // of the disk in bytes: a multiple of SectorSize, at most MaxSize
	UUID      [16]byte  // identity of the image; see WellFormed
	Timestamp time.Time // modification time; zero is written as 0
	Parent    *Parent   // nil for a full image
	Blocks    *BlockSet // the blocks that will be sent, made for Size
}

// Parent identifies the image that a delta is to be laid over.
type Parent struct {
	UUID      [16]byte
	Name      string // bare ASCII file name, at most 200 bytes
	Timestamp time.Time
}

// Layout is an image whose place of every byte is decided. It is immutable.
type Layout struct {
	footer  Footer
	header  Header
	locator []byte // payload of the parent locator, one sector; nil without a parent
	blocks  *BlockSet
	first   int64 // byte offset of the first block
	entries int64 // of the BAT
}

// NewLayout decides the layout of an image. The error names the option that
// cannot be written.
func NewLayout(o Options) (*Layout, error) {
	if err := o.validate(); err != nil {
		return nil, fmt.Errorf("vhd: %w", err)
	}
	l := &Layout{blocks: o.Blocks, entries: o.Blocks.blocks}
	table := int64(footerSize + headerSize)
	if o.Parent != nil {
		l.locator = locatorPayload(o.Parent.Name)
		table += SectorSize
	}
	l.first = table + roundUp(4*l.entries, SectorSize)

	f := &l.footer
	copy(f[:], cookieFooter)
	put32(f[8:], featureReserved)
	put32(f[12:], version1)
	put64(f[16:], footerSize)
	put32(f[24:], toStamp(o.Timestamp))
	put32(f[28:], creatorWindows)
	put32(f[32:], 0x000A0000)
	put32(f[36:], hostWindows)
	put64(f[40:], uint64(o.Size))
	put64(f[48:], uint64(o.Size))
	g := GeometryOf(o.Size)
	binary.BigEndian.PutUint16(f[56:], g.Cylinders)
	f[58], f[59] = g.Heads, g.Sectors
	put32(f[60:], TypeDynamic)
	copy(f[68:84], o.UUID[:])

	h := &l.header
	copy(h[:], cookieHeader)
	put64(h[8:], noOffset)
	put64(h[16:], uint64(table))
	put32(h[24:], version1)
	put32(h[28:], uint32(l.entries))
	put32(h[32:], BlockSize)
	if p := o.Parent; p != nil {
		put32(f[60:], TypeDifferencing)
		copy(h[40:56], p.UUID[:])
		put32(h[56:], toStamp(p.Timestamp))
		for i, u := range utf16.Encode([]rune(p.Name)) {
			binary.BigEndian.PutUint16(h[64+2*i:], u)
		}
		// The room is given in sectors: one reader always takes it as such.
		h.setLocator(0, Locator{
			Platform: platformW2ru,
			Space:    1,
			Length:   uint32(2 * len(`.\`+p.Name)),
			Offset:   footerSize + headerSize,
		})
	}
	f.seal()
	h.seal()
	return l, nil
}

func (o *Options) validate() error {
	var faults []error
	fault := func(format string, args ...any) { faults = append(faults, fmt.Errorf(format, args...)) }
	switch {
	case o.Size <= 0 || o.Size%SectorSize != 0:
		fault("size %d is not a positive multiple of %d", o.Size, SectorSize)
	case o.Size > MaxSize:
		fault("size %d exceeds %d", o.Size, int64(MaxSize))
	case o.Blocks == nil || o.Blocks.blocks != (o.Size+BlockSize-1)/BlockSize:
		fault("block set is not made for size %d", o.Size)
	}
	if !wellFormed(o.UUID) {
		fault("identity %x is not an RFC 4122 UUID", o.UUID)
	}
	if p := o.Parent; p != nil {
		if !wellFormed(p.UUID) {
			fault("parent identity %x is not an RFC 4122 UUID", p.UUID)
		}
		odd := func(r rune) bool { return r < ' ' || r > '~' || r == '/' || r == '\\' }
		if p.Name == "" || len(p.Name) > maxParentName || strings.ContainsFunc(p.Name, odd) {
			fault("parent name %q is not a bare ASCII file name of at most %d bytes", p.Name, maxParentName)
		}
	}
	return errors.Join(faults...)
}

// locatorPayload is the parent's path relative to the image, in UTF-16LE.
func locatorPayload(name string) []byte {
	b := make([]byte, 0, SectorSize)
	for _, u := range utf16.Encode([]rune(`.\` + name)) {
		b = binary.LittleEndian.AppendUint16(b, u)
	}
	return b[:SectorSize]
}

// Length is the exact length of the stream in bytes.
func (l *Layout) Length() int64 { return l.first + l.blocks.count*blockBytes + footerSize }

// Footer returns the footer of the image.
func (l *Layout) Footer() *Footer { return &l.footer }

// Header returns the dynamic header of the image.
func (l *Layout) Header() *Header { return &l.header }

// Blocks yields the blocks of the image in the order in which they are sent.
func (l *Layout) Blocks() iter.Seq[int64] { return l.blocks.All() }

// NumBlocks is the number of blocks of the image.
func (l *Layout) NumBlocks() int64 { return l.blocks.count }

// Block is one block as it travels: the bitmap, then the data.
type Block [blockBytes]byte

// Data is the contents of the block. Bytes behind the end of the disk must be
// zero.
func (b *Block) Data() []byte { return b[SectorSize:] }

// Bitmap is one bit per sector, most significant bit first.
func (b *Block) Bitmap() []byte { return b[:SectorSize] }

// MarkAll sets the bit of every sector.
func (b *Block) MarkAll() {
	for i := range b.Bitmap() {
		b[i] = 0xFF
	}
}

// Clear clears every bit of the bitmap.
func (b *Block) Clear() { clear(b.Bitmap()) }

// Mark sets the bits of the sectors of the bytes [off, off+n) of the block,
// widened to multiples of eight sectors: some readers know no finer grain.
func (b *Block) Mark(off, n int64) {
	const grain = 8 * SectorSize
	for i := off / grain; i < (off+n+grain-1)/grain; i++ {
		b[i] = 0xFF
	}
}

// Writer sends an image. It is not safe for concurrent use.
type Writer struct {
	w       io.Writer
	l       *Layout
	pending int64 // the block that must come next, -1 after the last one
	err     error
}

// NewWriter sends everything of the image that comes before its blocks.
func NewWriter(w io.Writer, l *Layout) (*Writer, error) {
	head := make([]byte, 0, footerSize+headerSize+SectorSize)
	head = append(head, l.footer[:]...)
	head = append(head, l.header[:]...)
	head = append(head, l.locator...)
	if _, err := w.Write(head); err != nil {
		return nil, err
	}
	if err := l.writeTable(w); err != nil {
		return nil, err
	}
	return &Writer{w: w, l: l, pending: l.blocks.next(0)}, nil
}

// writeTable sends the BAT, padded with ones to whole sectors.
func (l *Layout) writeTable(w io.Writer) error {
	const chunk = 16 << 10 // entries
	padded := roundUp(4*l.entries, SectorSize) / 4
	buf := make([]byte, 0, 4*min(chunk, padded))
	sector := uint32(l.first / SectorSize)
	for i := range padded {
		entry := uint32(unallocated)
		if l.blocks.Has(i) {
			entry = sector
			sector += blockBytes / SectorSize
		}
		buf = binary.BigEndian.AppendUint32(buf, entry)
		if len(buf) == cap(buf) || i == padded-1 {
			if _, err := w.Write(buf); err != nil {
				return err
			}
			buf = buf[:0]
		}
	}
	return nil
}

// WriteBlock sends one block, which must be the next one of the layout.
func (w *Writer) WriteBlock(index int64, b *Block) error {
	switch {
	case w.err != nil:
		return w.err
	case w.pending < 0:
		return w.fail(fmt.Errorf("vhd: block %d sent after the last one", index))
	case index != w.pending:
		return w.fail(fmt.Errorf("vhd: block %d sent in place of block %d", index, w.pending))
	}
	if _, err := w.w.Write(b[:]); err != nil {
		return w.fail(err)
	}
	w.pending = w.l.blocks.next(index + 1)
	return nil
}

// Close sends the trailing footer. It fails when blocks of the layout were not
// sent, and leaves the stream without a footer then.
func (w *Writer) Close() error {
	switch {
	case w.err != nil:
		return w.err
	case w.pending >= 0:
		return w.fail(fmt.Errorf("vhd: closed before block %d was sent", w.pending))
	}
	if _, err := w.w.Write(w.l.footer[:]); err != nil {
		return w.fail(err)
	}
	w.err = errors.New("vhd: writer is closed")
	return nil
}

func (w *Writer) fail(err error) error {
	w.err = err
	return err
}
