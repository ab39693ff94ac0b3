package vhd

import (
	"bytes"
	"encoding/binary"
	"errors"
	"io"
	"testing"
)

// FuzzReader feeds anything to a Reader: it ends with io.EOF or a typed error,
// its runs lie where it announced, and it never takes more than was sent.
func FuzzReader(f *testing.F) {
	im := small()
	f.Add(im.bytes())
	im.blocks = []block{{index: 3, fill: 3, bitmap: []byte{0xA5}}, {index: 0, fill: 1}}
	f.Add(im.bytes())
	im.typ, im.padding, im.size = TypeDifferencing, 100, 13<<10
	f.Add(im.bytes())
	im.blockSize = 512
	f.Add(im.bytes())
	im.creator, im.version = "tap\x00", 1
	f.Add(im.bytes())
	f.Add(im.bytes()[:1700])
	f.Fuzz(func(t *testing.T, b []byte) {
		reseal(b)
		for _, length := range []int64{-1, int64(len(b)), int64(len(b)) / 2, 1 << 50} {
			read(t, b, length)
		}
	})
}

// reseal makes the checksums right, or hardly any input would get further.
func reseal(b []byte) {
	if len(b) < footerSize {
		return
	}
	binary.BigEndian.PutUint32(b[checksumFooterAt:], checksum(b[:footerSize], checksumFooterAt))
	at := binary.BigEndian.Uint64(b[16:])
	if uint64(len(b)) >= headerSize && at <= uint64(len(b)-headerSize) {
		h := b[at : at+headerSize]
		binary.BigEndian.PutUint32(h[checksumHeaderAt:], checksum(h, checksumHeaderAt))
	}
}

func read(t *testing.T, b []byte, length int64) {
	r, err := NewReader(bytes.NewReader(b), ReaderOptions{Length: length})
	if err == nil && 4*r.Blocks() > len(b) {
		t.Fatalf("%d blocks from %d bytes", r.Blocks(), len(b))
	}
	var total int64
	for err == nil {
		var run Run
		if run, err = r.Next(); err != nil {
			break
		}
		if run.Off < 0 || run.Len <= 0 || run.Off > r.LastBlock()+int64(r.Header().BlockSize()) || run.Off+run.Len > r.End() {
			t.Fatalf("run %+v; LastBlock %d, End %d", run, r.LastBlock(), r.End())
		}
		var n int64
		if n, err = io.Copy(io.Discard, r); err == nil && n != run.Len {
			t.Fatalf("run of %d bytes has %d", run.Len, n)
		}
		if total += n; total > int64(len(b)) {
			t.Fatalf("%d bytes out of %d", total, len(b))
		}
	}
	if err != io.EOF && !errors.Is(err, ErrFormat) && !errors.Is(err, io.ErrUnexpectedEOF) {
		t.Fatalf("error is %v", err)
	}
}

// FuzzRoundTrip makes a disk and a delta of the input; what is written is what
// is read.
func FuzzRoundTrip(f *testing.F) {
	f.Add(uint16(0), uint8(1), []byte{}, false)
	f.Add(uint16(9000), uint8(7), []byte("some contents"), true)
	f.Add(uint16(65535), uint8(0), bytes.Repeat([]byte{1, 0}, 1000), true)
	f.Fuzz(func(t *testing.T, sectors uint16, pick uint8, contents []byte, delta bool) {
		s := source{data: make([]byte, (int64(sectors%(3*4096))+1)*SectorSize), o: Options{UUID: idDelta, Timestamp: stampDelta}}
		if delta {
			s.o.Parent = &Parent{UUID: idBase, Name: nameBase}
		}
		for off := 0; len(contents) > 0 && off < len(s.data); off += len(contents) * 101 {
			copy(s.data[off:], contents)
		}
		want := bytes.Repeat([]byte{untouched}, len(s.data))
		for i := int64(0); i*BlockSize < int64(len(s.data)); i++ {
			if pick&(1<<i) != 0 {
				s.blocks = append(s.blocks, i)
				off := i * BlockSize
				copy(want[off:min(off+BlockSize, int64(len(want)))], s.data[off:])
			}
		}
		var out bytes.Buffer
		l := s.write(t, &out)
		if int64(out.Len()) != l.Length() {
			t.Fatalf("%d bytes written, Length is %d", out.Len(), l.Length())
		}
		got, err := apply(&out, l.Length(), int64(len(s.data)))
		if err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(got, want) {
			t.Error("wrong contents")
			firstDifference(t, got, want)
		}
	})
}
