package vhd

import (
	"bytes"
	"encoding/binary"
	"errors"
	"io"
	"math/bits"
	"testing"
)

// image describes an image byte by byte, so that tests can make every shape
// that is found in the wild, and every one that should not be.
type image struct {
	size      int64
	blockSize int64
	typ       uint32
	creator   string
	version   uint32 // of the creator
	headerAt  int64
	tableAt   int64
	entries   int64 // of the BAT; 0: as many as the disk has blocks
	blocks    []block
	raw       map[int64]string // bytes to put somewhere, past everything else
	padding   int64            // zeroes before the trailing footer
	footer    func(*Footer)    // last changes, before the checksum is made
	header    func(*Header)
	trailer   func(*Footer) // changes of the trailing footer, before its checksum
}

// block is an allocated block. Its data is one byte repeated.
type block struct {
	index  int64
	at     int64  // byte offset; 0: behind everything so far
	bitmap []byte // nil: all ones
	fill   byte
	cut    int64 // bytes of data that are left out at the end
}

// small is an image of four blocks of 4 KiB, to be changed by a test.
func small() image {
	return image{
		size: 16 << 10, blockSize: 4 << 10, typ: TypeDynamic, creator: "win ", version: 0x000A0000,
		headerAt: 512, tableAt: 1536,
	}
}

func (im image) bytes() []byte {
	entries := im.entries
	if entries == 0 {
		entries = (im.size + im.blockSize - 1) / im.blockSize
	}
	out := make([]byte, roundUp(im.tableAt+4*entries, SectorSize))
	put := func(off int64, b []byte) {
		if need := off + int64(len(b)); need > int64(len(out)) {
			out = append(out, make([]byte, need-int64(len(out)))...)
		}
		copy(out[off:], b)
	}

	var f Footer
	copy(f[:], cookieFooter)
	put32(f[8:], 2)
	put32(f[12:], version1)
	put64(f[16:], uint64(im.headerAt))
	copy(f[28:], im.creator)
	put32(f[32:], im.version)
	put64(f[40:], uint64(im.size))
	put64(f[48:], uint64(im.size))
	put32(f[60:], im.typ)
	if im.footer != nil {
		im.footer(&f)
	}
	f.seal()

	var h Header
	copy(h[:], cookieHeader)
	put64(h[8:], noOffset)
	put64(h[16:], uint64(im.tableAt))
	put32(h[24:], version1)
	put32(h[28:], uint32(entries))
	put32(h[32:], uint32(im.blockSize))
	if im.header != nil {
		im.header(&h)
	}
	h.seal()

	table := bytes.Repeat([]byte{0xFF}, int(4*entries))
	for _, b := range im.blocks {
		at := b.at
		if at == 0 {
			at = int64(len(out))
		}
		binary.BigEndian.PutUint32(table[4*b.index:], uint32(at/SectorSize))
		bitmap := bytes.Repeat([]byte{0xFF}, int(roundUp((im.blockSize/SectorSize+7)/8, SectorSize)))
		if b.bitmap != nil {
			clear(bitmap)
			copy(bitmap, b.bitmap)
		}
		put(at, bitmap)
		put(at+int64(len(bitmap)), bytes.Repeat([]byte{b.fill}, int(im.blockSize-b.cut)))
	}
	put(0, f[:])
	put(im.headerAt, h[:])
	put(im.tableAt, table)
	for off, s := range im.raw {
		put(off, []byte(s))
	}
	out = append(out, make([]byte, im.padding)...)
	if im.trailer != nil {
		im.trailer(&f)
		f.seal()
	}
	return append(out, f[:]...)
}

// untouched is what a test disk holds before an image is applied.
const untouched = 0xEE

// disk returns the contents of the image's disk after it was applied to one
// that was untouched, worked out sector by sector from the description.
func (im image) disk() []byte {
	d := bytes.Repeat([]byte{untouched}, int(im.size))
	for _, b := range im.blocks {
		for s := range im.blockSize / SectorSize {
			set := true
			if b.bitmap != nil {
				set = s/8 < int64(len(b.bitmap)) && b.bitmap[s/8]&(0x80>>(s%8)) != 0
				if im.creator == "tap\x00" && im.version == 1 {
					set = s/8 < int64(len(b.bitmap)) && b.bitmap[s/8]&(1<<(s%8)) != 0
				}
			}
			off := b.index*im.blockSize + s*SectorSize
			if set && off < im.size {
				n := min(SectorSize, im.size-off)
				copy(d[off:off+n], bytes.Repeat([]byte{b.fill}, int(n)))
			}
		}
	}
	return d
}

// apply reads an image and writes its runs to a disk of size bytes.
func apply(src io.Reader, length, size int64) ([]byte, error) {
	r, err := NewReader(src, ReaderOptions{Length: length})
	if err != nil {
		return nil, err
	}
	d := bytes.Repeat([]byte{untouched}, int(size))
	for {
		run, err := r.Next()
		if err == io.EOF {
			return d, nil
		} else if err != nil {
			return d, err
		}
		if run.Len <= 0 || run.Off < 0 || run.Off+run.Len > r.End() {
			return d, errors.New("run outside of what the reader announced")
		}
		if _, err := io.ReadFull(r, d[run.Off:run.Off+run.Len]); err != nil {
			return d, err
		}
		if n, err := r.Read(make([]byte, 1)); n != 0 || err != io.EOF {
			return d, errors.New("run is longer than announced")
		}
	}
}

// reversed returns b with the bits of each byte in reverse order.
func reversed(b ...byte) []byte {
	out := bytes.Clone(b)
	for i := range out {
		out[i] = bits.Reverse8(out[i])
	}
	return out
}

// firstDifference is where two slices differ first, for messages.
func firstDifference(t *testing.T, got, want []byte) {
	t.Helper()
	if len(got) != len(want) {
		t.Errorf("length is %d, want %d", len(got), len(want))
	}
	for i := range min(len(got), len(want)) {
		if got[i] != want[i] {
			t.Errorf("byte %d is %#02x, want %#02x", i, got[i], want[i])
			return
		}
	}
}
