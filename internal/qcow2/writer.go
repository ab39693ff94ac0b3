package qcow2

import (
	"bufio"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/bits"
	"strings"
)

// perRefBlock is how many clusters of the file a refcount block describes.
const perRefBlock = ClusterSize / 2

// Options describe an image to write.
type Options struct {
	Size     int64       // of the disk in bytes: a multiple of SectorSize, at most MaxSize
	Clusters *ClusterSet // what will be sent, made for Size
	Backing  *Backing    // nil for a full image
}

// Backing names the image that a delta is to be laid over.
type Backing struct {
	Name   string // bare ASCII file name, at most 200 bytes
	Format string // as qemu calls it: qcow2, raw, vpc
}

// maxName is the longest name of a backing file that is written, in bytes.
const maxName = 200

// Layout is an image whose place of every byte is decided. It is immutable
// once its set of clusters is not changed any more.
type Layout struct {
	set     *ClusterSet
	size    int64
	backing *Backing

	// In clusters:
	refTable, refBlocks int64
	l1                  int64
	l1Entries           int64
}

// NewLayout decides the layout of an image. The error names the option that
// cannot be written.
func NewLayout(o Options) (*Layout, error) {
	if err := o.validate(); err != nil {
		return nil, fmt.Errorf("qcow2: %w", err)
	}
	l := &Layout{set: o.Clusters, size: o.Size, backing: o.Backing, l1Entries: int64(len(o.Clusters.tables))}
	l.l1 = max(1, ceilDiv(8*l.l1Entries, ClusterSize))
	fixed := 1 + l.l1 + l.set.used + l.set.count
	for { // counts count themselves
		blocks := ceilDiv(fixed+l.refBlocks+l.refTable, perRefBlock)
		table := ceilDiv(8*blocks, ClusterSize)
		if blocks == l.refBlocks && table == l.refTable {
			return l, nil
		}
		l.refBlocks, l.refTable = blocks, table
	}
}

func (o *Options) validate() error {
	var faults []error
	fault := func(format string, args ...any) { faults = append(faults, fmt.Errorf(format, args...)) }
	switch {
	case o.Size <= 0 || o.Size%SectorSize != 0:
		fault("size %d is not a positive multiple of %d", o.Size, SectorSize)
	case o.Size > MaxSize:
		fault("size %d exceeds %d", o.Size, int64(MaxSize))
	case o.Clusters == nil || o.Clusters.size != o.Size:
		fault("cluster set is not made for size %d", o.Size)
	}
	if b := o.Backing; b != nil {
		// A colon would make a prefix of it that selects a protocol.
		odd := func(r rune) bool { return r <= ' ' || r > '~' || strings.ContainsRune(`/\:`, r) }
		if b.Name == "" || len(b.Name) > maxName || strings.ContainsFunc(b.Name, odd) {
			fault("backing name %q is not a bare ASCII file name of at most %d bytes", b.Name, maxName)
		}
		if b.Format == "" || len(b.Format) > 16 || strings.ContainsFunc(b.Format, odd) {
			fault("backing format %q is not the name of a format", b.Format)
		}
	}
	return errors.Join(faults...)
}

// clusters is the number of clusters of the image.
func (l *Layout) clusters() int64 { return l.dataAt() + l.set.count }

// dataAt, l1At and l2At are where the data, the L1 table and the L2 tables
// begin, in clusters.
func (l *Layout) dataAt() int64 { return l.l2At() + l.set.used }
func (l *Layout) l2At() int64   { return l.l1At() + l.l1 }
func (l *Layout) l1At() int64   { return 1 + l.refTable + l.refBlocks }

// Length is the exact length of the image in bytes.
func (l *Layout) Length() int64 { return l.clusters() * ClusterSize }

// HeadLength is the length of all that comes before the data, in bytes.
func (l *Layout) HeadLength() int64 { return l.dataAt() * ClusterSize }

// headBuffer is how much of a head is written at a time, in bytes.
const headBuffer = 4 * ClusterSize

// WriteHead writes everything that comes before the data.
func (l *Layout) WriteHead(w io.Writer) error {
	b := &entries{w: bufio.NewWriterSize(w, headBuffer)}
	b.bytes(l.header())
	b.pad()
	for i := range l.refBlocks {
		b.u64(uint64(1+l.refTable+i) * ClusterSize)
	}
	b.pad()
	for range l.clusters() {
		b.u16(1)
	}
	b.pad()
	table := l.l2At()
	for _, t := range l.set.tables {
		if t == nil {
			b.u64(0)
			continue
		}
		b.u64(uint64(table)*ClusterSize | flagCopied)
		table++
	}
	b.padTo(l.l2At() * ClusterSize)
	// A table of data that is scattered is nearly empty, so only what it has is looked at.
	data, page := l.dataAt(), make([]byte, ClusterSize)
	for _, t := range l.set.tables {
		if t == nil {
			continue
		}
		clear(page)
		for i, word := range t.words {
			for ; word != 0; word &= word - 1 {
				at := 8 * (i<<6 + bits.TrailingZeros64(word))
				binary.BigEndian.PutUint64(page[at:], uint64(data)*ClusterSize|flagCopied)
				data++
			}
		}
		b.bytes(page)
	}
	return b.w.Flush()
}

// header returns header, extensions and backing name.
func (l *Layout) header() []byte {
	h := make([]byte, headSizeV3, 2*maxName)
	be := binary.BigEndian
	be.PutUint32(h, magic)
	be.PutUint32(h[4:], 3)
	be.PutUint32(h[20:], 16) // bits of a cluster
	be.PutUint64(h[24:], uint64(l.size))
	be.PutUint32(h[36:], uint32(l.l1Entries))
	be.PutUint64(h[40:], uint64(l.l1At())*ClusterSize)
	be.PutUint64(h[48:], ClusterSize)
	be.PutUint32(h[56:], uint32(l.refTable))
	be.PutUint32(h[96:], 4) // refcounts of 1<<4 bits
	be.PutUint32(h[100:], headSizeV3)
	if b := l.backing; b != nil {
		h = be.AppendUint32(h, extensionBackingFormat)
		h = be.AppendUint32(h, uint32(len(b.Format)))
		h = append(h, b.Format...)
		h = append(h, make([]byte, -len(b.Format)&7)...)
	}
	h = append(h, make([]byte, 8)...) // end of the extensions
	if b := l.backing; b != nil {
		be.PutUint64(h[8:], uint64(len(h)))
		be.PutUint32(h[16:], uint32(len(b.Name)))
		h = append(h, b.Name...)
	}
	return h
}

// entries writes tables. Its writer keeps the first error.
type entries struct {
	w   *bufio.Writer
	pos int64
}

// The errors that are dropped here stick to the writer, and Flush returns them.

func (e *entries) bytes(p []byte) {
	_, _ = e.w.Write(p)
	e.pos += int64(len(p))
}

func (e *entries) u64(v uint64) {
	b := e.w.AvailableBuffer()
	_, _ = e.w.Write(binary.BigEndian.AppendUint64(b, v))
	e.pos += 8
}

func (e *entries) u16(v uint16) {
	b := e.w.AvailableBuffer()
	_, _ = e.w.Write(binary.BigEndian.AppendUint16(b, v))
	e.pos += 2
}

// pad fills the current cluster with zeros.
func (e *entries) pad() { e.padTo(roundUp(e.pos, ClusterSize)) }

func (e *entries) padTo(end int64) {
	for e.pos < end {
		e.bytes(zeros[:min(int64(len(zeros)), end-e.pos)])
	}
}

var zeros [4096]byte
