package vhd

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"math"
	"runtime"
	"slices"
	"strings"
	"testing"
	"testing/iotest"
)

func TestReaderAccepts(t *testing.T) {
	edit := func(change func(*image)) image {
		im := small()
		change(&im)
		return im
	}
	two := []block{{index: 0, fill: 1}, {index: 2, fill: 2}}
	for name, im := range map[string]image{
		"no blocks":   small(),
		"two blocks":  edit(func(im *image) { im.blocks = two }),
		"every block": edit(func(im *image) { im.blocks = []block{{fill: 1}, {index: 1}, {index: 2, fill: 3}, {index: 3, fill: 4}} }),
		"differencing with a parent": edit(func(im *image) {
			im.typ, im.blocks = TypeDifferencing, two
			im.header = func(h *Header) {
				copy(h[40:], bytes.Repeat([]byte{7}, 16))
				copy(h[64:], "\x00/\x00e\x00t\x00c\x00/\x00p\x00a\x00s\x00s\x00w\x00d")
				h.setLocator(0, Locator{Platform: platformW2ru, Space: 512, Length: 30, Offset: 1 << 40})
				h.setLocator(7, Locator{Platform: 0x12345678, Space: 9, Length: math.MaxUint32, Offset: 3})
			}
		}),
		"blocks out of order": edit(func(im *image) {
			im.blocks = []block{{index: 3, fill: 3}, {index: 0, fill: 1}, {index: 1, fill: 2}}
		}),
		"data aligned to 4 KiB": edit(func(im *image) {
			im.blocks = []block{{index: 0, fill: 1, at: 7 * 512}, {index: 1, fill: 2, at: 23 * 512}}
		}),
		"gap behind the table":        edit(func(im *image) { im.blocks = []block{{index: 1, fill: 1, at: 100 * 512}} }),
		"gap before the table":        edit(func(im *image) { im.tableAt, im.blocks = 9*512, two }),
		"table at no sector boundary": edit(func(im *image) { im.tableAt, im.blocks = 1700, two }),
		"header not at 512":           edit(func(im *image) { im.headerAt, im.tableAt, im.blocks = 2048, 4096, two }),
		"padding before the footer":   edit(func(im *image) { im.padding, im.blocks = 5000*512, two }),
		"padding of no whole sectors": edit(func(im *image) { im.padding, im.blocks = 100, two }),
		"table with spare entries":    edit(func(im *image) { im.entries, im.blocks = 5000, two }),
		"spare entries with garbage": edit(func(im *image) {
			im.entries, im.blocks, im.raw = 300, two, map[int64]string{1536 + 4*100: "\x00\x00\x00\x01"}
		}),
		"batmap and locators in gaps": edit(func(im *image) {
			im.blocks = []block{{index: 1, fill: 1, at: 20 * 512}}
			im.raw = map[int64]string{2048: "tdbatmap", 3072: ".\x00\\\x00"}
		}),
		"block size of one sector":    edit(func(im *image) { im.blockSize, im.size, im.blocks = 512, 2048, two }),
		"block size of 512 KiB":       edit(func(im *image) { im.blockSize, im.size, im.blocks = 512<<10, 2<<20, two }),
		"block size of 4 MiB":         edit(func(im *image) { im.blockSize, im.size, im.blocks = 4<<20, 12<<20, two }),
		"block size of 2 MiB":         edit(func(im *image) { im.blockSize, im.size, im.blocks = 2<<20, 6<<20, two }),
		"block larger than the disk":  edit(func(im *image) { im.blockSize, im.size, im.blocks = 2<<20, 4096, two[:1] }),
		"last block ends in the disk": edit(func(im *image) { im.size, im.blocks = 9<<10, two }),
		"last block cut at the end": edit(func(im *image) {
			im.size, im.blocks = 9<<10, []block{{index: 0, fill: 1}, {index: 2, fill: 2, cut: 3 << 10}}
		}),
		"size of no whole sectors": edit(func(im *image) { im.size, im.blocks = 9<<10+100, []block{{index: 0, fill: 1}, {index: 2, fill: 2}} }),
		"one sector":               edit(func(im *image) { im.blocks = []block{{index: 1, fill: 1, bitmap: []byte{0x10}}} }),
		"first and last sector":    edit(func(im *image) { im.blocks = []block{{index: 1, fill: 1, bitmap: []byte{0x81}}} }),
		"alternating sectors": edit(func(im *image) {
			im.blocks = []block{{index: 1, fill: 1, bitmap: []byte{0xAA}}, {index: 0, fill: 2, bitmap: []byte{0x55}}}
		}),
		"bitmap all zero":      edit(func(im *image) { im.blocks = []block{{index: 1, fill: 1, bitmap: []byte{0}}, {index: 2, fill: 2}} }),
		"last bitmap all zero": edit(func(im *image) { im.blocks = []block{{index: 1, fill: 1, bitmap: []byte{0}}} }),
		"runs across bytes": edit(func(im *image) {
			im.blockSize, im.size = 64<<10, 256<<10
			im.blocks = []block{{index: 1, fill: 1, bitmap: []byte{0x01, 0xFF, 0xFF, 0x80, 0, 0x0F, 0xF0, 0x3C, 0, 0, 0, 0, 0, 0, 0, 0xFF}}}
		}),
		"bits behind the end": edit(func(im *image) { im.size, im.blocks = 512, []block{{index: 0, fill: 1, bitmap: []byte{0x7F}}} }),
		"bit order of tapdisk 0.1": edit(func(im *image) {
			im.creator, im.version, im.blocks = "tap\x00", 1, []block{{index: 1, fill: 1, bitmap: reversed(0x13)}}
		}),
		"bit order of tapdisk 1.3": edit(func(im *image) {
			im.creator, im.version, im.blocks = "tap\x00", 0x00010003, []block{{index: 1, fill: 1, bitmap: []byte{0x13}}}
		}),
		"creator caml 0.1": edit(func(im *image) {
			im.creator, im.version, im.blocks = "caml", 1, []block{{index: 1, fill: 1, bitmap: []byte{0x13}}}
		}),
		"hidden":                      edit(func(im *image) { im.blocks, im.footer = two, func(f *Footer) { f[85] = 1 } }),
		"footers that differ":         edit(func(im *image) { im.blocks, im.trailer = two, func(f *Footer) { f[85] = 1; put32(f[24:], 77) } }),
		"no reserved feature bit":     edit(func(im *image) { im.blocks, im.footer = two, func(f *Footer) { put32(f[8:], 0) } }),
		"temporary":                   edit(func(im *image) { im.blocks, im.footer = two, func(f *Footer) { put32(f[8:], 3) } }),
		"minor version":               edit(func(im *image) { im.blocks, im.footer = two, func(f *Footer) { put32(f[12:], 0x00010001) } }),
		"original size differs":       edit(func(im *image) { im.blocks, im.footer = two, func(f *Footer) { put64(f[40:], 1) } }),
		"geometry larger than size":   edit(func(im *image) { im.blocks, im.footer = two, func(f *Footer) { copy(f[56:], "\xFF\xFF\x10\xFF") } }),
		"timestamp in the far future": edit(func(im *image) { im.blocks, im.footer = two, func(f *Footer) { put32(f[24:], math.MaxUint32) } }),
		"identity is no UUID": edit(func(im *image) {
			im.blocks, im.footer = two, func(f *Footer) { copy(f[68:], bytes.Repeat([]byte{0xFF}, 16)) }
		}),
		"disk without a single sector": edit(func(im *image) { im.size, im.entries = 0, 1 }),
	} {
		t.Run(name, func(t *testing.T) {
			b, want := im.bytes(), im.disk()
			for source, open := range map[string]func() (io.Reader, int64){
				"known length":   func() (io.Reader, int64) { return bytes.NewReader(b), int64(len(b)) },
				"unknown length": func() (io.Reader, int64) { return bytes.NewReader(b), -1 },
				"more behind": func() (io.Reader, int64) {
					return io.MultiReader(bytes.NewReader(b), strings.NewReader("GET / HTTP/1.0")), int64(len(b))
				},
				"small reads":   func() (io.Reader, int64) { return iotest.HalfReader(bytes.NewReader(b)), -1 },
				"data with EOF": func() (io.Reader, int64) { return iotest.DataErrReader(bytes.NewReader(b)), -1 },
				"byte by byte":  func() (io.Reader, int64) { return iotest.OneByteReader(bytes.NewReader(b[:min(len(b), 1<<20)])), -1 },
				"511-byte footer": func() (io.Reader, int64) {
					return bytes.NewReader(b[:len(b)-1]), int64(len(b) - 1)
				},
			} {
				if source == "byte by byte" && len(b) > 1<<20 || source == "511-byte footer" && len(b)%SectorSize != 0 {
					continue
				}
				src, length := open()
				got, err := apply(src, length, im.size)
				if err != nil {
					t.Errorf("%s: %v", source, err)
					continue
				}
				if !bytes.Equal(got, want) {
					t.Errorf("%s: wrong contents", source)
					firstDifference(t, got, want)
				}
			}
		})
	}
}

func TestReaderRefuses(t *testing.T) {
	edit := func(change func(*image)) []byte {
		im := small()
		im.blocks = []block{{index: 0, fill: 1}, {index: 2, fill: 2}}
		change(&im)
		return im.bytes()
	}
	footer := func(change func(*Footer)) []byte { return edit(func(im *image) { im.footer = change }) }
	header := func(change func(*Header)) []byte { return edit(func(im *image) { im.header = change }) }
	trailer := func(change func(*Footer)) []byte { return edit(func(im *image) { im.trailer = change }) }
	flip := func(at int, from []byte) []byte {
		b := bytes.Clone(from)
		if at < 0 {
			at += len(b)
		}
		b[at] ^= 0x40
		return b
	}
	good := edit(func(*image) {})

	for name, tt := range map[string]struct {
		in    []byte
		field string
		late  bool // only known after data has been read
	}{
		"empty disk image":             {in: make([]byte, 4096), field: "footer cookie"},
		"footer cookie":                {in: footer(func(f *Footer) { copy(f[:], "conectiX") }), field: "footer cookie"},
		"poisoned":                     {in: footer(func(f *Footer) { copy(f[:], cookiePoison) }), field: "footer cookie"},
		"footer checksum":              {in: flip(100, good), field: "footer checksum"},
		"footer checksum itself":       {in: flip(64, good), field: "footer checksum"},
		"footer version":               {in: footer(func(f *Footer) { put32(f[12:], 0x00020000) }), field: "footer version"},
		"fixed":                        {in: footer(func(f *Footer) { put32(f[60:], TypeFixed); put64(f[16:], noOffset) }), field: "footer disk type"},
		"disk type none":               {in: footer(func(f *Footer) { put32(f[60:], 0) }), field: "footer disk type"},
		"disk type reserved":           {in: footer(func(f *Footer) { put32(f[60:], 6) }), field: "footer disk type"},
		"data offset in the footer":    {in: footer(func(f *Footer) { put64(f[16:], 256) }), field: "footer data offset"},
		"data offset all ones":         {in: footer(func(f *Footer) { put64(f[16:], noOffset) }), field: "footer data offset"},
		"data offset overflows":        {in: footer(func(f *Footer) { put64(f[16:], math.MaxInt64) }), field: "footer data offset"},
		"current size huge":            {in: footer(func(f *Footer) { put64(f[48:], math.MaxUint64) }), field: "footer current size"},
		"current size 63 bits":         {in: footer(func(f *Footer) { put64(f[48:], math.MaxInt64) }), field: "footer current size"},
		"header cookie":                {in: header(func(h *Header) { h[0] = 'x' }), field: "header cookie"},
		"header checksum":              {in: flip(512+700, good), field: "header checksum"},
		"header version":               {in: header(func(h *Header) { put32(h[24:], 0) }), field: "header version"},
		"header data offset":           {in: header(func(h *Header) { put64(h[8:], 0) }), field: "header data offset"},
		"block size zero":              {in: header(func(h *Header) { put32(h[32:], 0) }), field: "header block size"},
		"block size no power of two":   {in: header(func(h *Header) { put32(h[32:], 3<<20) }), field: "header block size"},
		"block size below a sector":    {in: header(func(h *Header) { put32(h[32:], 256) }), field: "header block size"},
		"table too small":              {in: header(func(h *Header) { put32(h[28:], 3) }), field: "header table entries"},
		"table too small for the size": {in: footer(func(f *Footer) { put64(f[48:], 1<<61) }), field: "header table entries"},
		"table before the header":      {in: header(func(h *Header) { put64(h[16:], 512) }), field: "header table offset"},
		"table offset overflows":       {in: header(func(h *Header) { put64(h[16:], math.MaxUint64) }), field: "header table offset"},
		"block in the footer":          {in: edit(func(im *image) { im.raw = map[int64]string{1536: "\x00\x00\x00\x00"} }), field: "place of block 0"},
		"block in the table":           {in: edit(func(im *image) { im.raw = map[int64]string{1536 + 8: "\x00\x00\x00\x03"} }), field: "place of block 2"},
		"two blocks in one place":      {in: edit(func(im *image) { im.raw = map[int64]string{1536 + 4: "\x00\x00\x00\x04"} }), field: "place of block 1"},
		"blocks overlap":               {in: edit(func(im *image) { im.raw = map[int64]string{1536 + 4: "\x00\x00\x00\x05"} }), field: "place of block 1"},
		"bitmap overlaps":              {in: edit(func(im *image) { im.raw = map[int64]string{1536 + 4: "\x00\x00\x00\x0c"} }), field: "place of block 1"},
		"trailing cookie":              {in: flip(-512, good), field: "trailing footer cookie", late: true},
		"trailing checksum":            {in: flip(-100, good), field: "trailing footer checksum", late: true},
		"trailing version":             {in: trailer(func(f *Footer) { put32(f[12:], 0x00090000) }), field: "trailing footer version", late: true},
		"trailing size":                {in: trailer(func(f *Footer) { put64(f[48:], 4096) }), field: "trailing footer current size", late: true},
		"trailing type":                {in: trailer(func(f *Footer) { put32(f[60:], 4) }), field: "trailing footer disk type", late: true},
		"data behind the footer":       {in: append(bytes.Clone(good), make([]byte, 512)...), field: "trailing footer cookie", late: true},
		"byte behind the footer":       {in: append(bytes.Clone(good), 0), field: "trailing footer cookie", late: true},
	} {
		t.Run(name, func(t *testing.T) {
			for _, length := range []int64{-1, int64(len(tt.in))} {
				r, err := NewReader(bytes.NewReader(tt.in), ReaderOptions{Length: length})
				if tt.late != (err == nil) {
					t.Fatalf("length %d: NewReader: %v, late is %v", length, err, tt.late)
				}
				for err == nil {
					_, err = r.Next()
				}
				fe, ok := errors.AsType[*FormatError](err)
				if !ok || !errors.Is(err, ErrFormat) || fe.Field != tt.field {
					t.Fatalf("length %d: error is %v, want a FormatError for %q", length, err, tt.field)
				}
				if fe.Found == "" || fe.Want == "" || !strings.Contains(err.Error(), fe.Found) {
					t.Errorf("error does not say what was found: %v", err)
				}
				if r != nil {
					if _, again := r.Next(); again != err {
						t.Errorf("second error is %v, want the first again", again)
					}
				}
			}
		})
	}
}

// With the length known, what lies behind it is refused before any data.
func TestReaderRefusesEarly(t *testing.T) {
	im := small()
	im.blocks = []block{{index: 0, fill: 1}, {index: 2, fill: 2}}
	whole := im.bytes()
	for _, tt := range []struct {
		length int64
		field  string
	}{
		{length: 512, field: "footer data offset"},
		{length: 1536, field: "footer data offset"},
		{length: 1600, field: "footer data offset"},
		{length: 2040, field: "footer data offset"},
		{length: 2048, field: "header table offset"},
		{length: 2048 + 511, field: "place of block 0"},
		{length: int64(len(whole)) - 512, field: "place of block 2"},
		{length: int64(len(whole)) - 2, field: "place of block 2"},
	} {
		_, err := NewReader(bytes.NewReader(whole), ReaderOptions{Length: tt.length})
		if fe, ok := errors.AsType[*FormatError](err); !ok || fe.Field != tt.field {
			t.Errorf("length %d: error is %v, want a FormatError for %q", tt.length, err, tt.field)
		}
	}
}

// Cut anywhere, an image is never taken for a whole one, and what was applied
// before the cut is right.
func TestReaderTruncated(t *testing.T) {
	im := small()
	im.padding = 1000
	im.blocks = []block{{index: 2, fill: 2, bitmap: []byte{0x3C}}, {index: 0, fill: 1}}
	whole, want := im.bytes(), im.disk()
	for n := range len(whole) - 1 {
		got, err := apply(bytes.NewReader(whole[:n]), -1, im.size)
		if err == nil {
			t.Fatalf("cut to %d of %d bytes: no error", n, len(whole))
		}
		if !errors.Is(err, io.ErrUnexpectedEOF) && !errors.Is(err, ErrFormat) {
			t.Fatalf("cut to %d bytes: error is %v", n, err)
		}
		for i, b := range got {
			if b != untouched && b != want[i] && b != 0 {
				t.Fatalf("cut to %d bytes: byte %d is %#02x", n, i, b)
			}
		}
		if _, err = apply(bytes.NewReader(whole[:n]), int64(len(whole)), im.size); !errors.Is(err, io.ErrUnexpectedEOF) {
			t.Fatalf("cut to %d bytes of a known length: error is %v, want io.ErrUnexpectedEOF", n, err)
		}
	}
}

func TestReaderSourceError(t *testing.T) {
	im := small()
	im.blocks = []block{{index: 1, fill: 2}}
	whole := im.bytes()
	broken := errors.New("cable cut")
	for n := range len(whole) {
		src := io.MultiReader(bytes.NewReader(whole[:n]), iotest.ErrReader(broken))
		if _, err := apply(src, -1, im.size); !errors.Is(err, broken) {
			t.Fatalf("after %d bytes: error is %v, want %v", n, err, broken)
		}
	}
}

func TestReaderForesight(t *testing.T) {
	for _, tt := range []struct {
		size, blockSize int64
		blocks          []int64
		last, end       int64
	}{
		{16 << 10, 4 << 10, nil, -1, 0},
		{16 << 10, 4 << 10, []int64{0}, 0, 4 << 10},
		{16 << 10, 4 << 10, []int64{2, 1}, 8 << 10, 12 << 10},
		{13 << 10, 4 << 10, []int64{3}, 12 << 10, 13 << 10},
		{13 << 10, 4 << 10, []int64{3, 0}, 12 << 10, 13 << 10},
	} {
		im := small()
		im.size, im.blockSize = tt.size, tt.blockSize
		for _, index := range tt.blocks {
			im.blocks = append(im.blocks, block{index: index})
		}
		r, err := NewReader(bytes.NewReader(im.bytes()), ReaderOptions{Length: -1})
		if err != nil {
			t.Fatal(err)
		}
		if r.Size() != tt.size || r.Blocks() != len(tt.blocks) || r.LastBlock() != tt.last || r.End() != tt.end {
			t.Errorf("size %d, blocks %v: Size %d, Blocks %d, LastBlock %d (want %d), End %d (want %d)",
				tt.size, tt.blocks, r.Size(), r.Blocks(), r.LastBlock(), tt.last, r.End(), tt.end)
		}
		for done := 0; ; done++ {
			if r.Done() != done {
				t.Errorf("Done is %d, want %d", r.Done(), done)
			}
			if _, err := r.Next(); err != nil {
				break
			}
		}
	}
}

// A run that is not read, or only in part, is skipped.
func TestReaderSkips(t *testing.T) {
	im := small()
	im.blocks = []block{{index: 3, fill: 3, bitmap: []byte{0xCC}}, {index: 1, fill: 1}}
	r, err := NewReader(bytes.NewReader(im.bytes()), ReaderOptions{Length: -1})
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for {
		run, err := r.Next()
		if err == io.EOF {
			break
		} else if err != nil {
			t.Fatal(err)
		}
		b := make([]byte, len(got)%2)
		n, _ := r.Read(b)
		got = append(got, fmt.Sprintf("%d+%d %d", run.Off, run.Len, b[:n]))
	}
	want := []string{"12288+1024 []", "14336+1024 [3]", "4096+4096 []"}
	if !slices.Equal(got, want) {
		t.Errorf("runs are %q, want %q", got, want)
	}
}

// A table that claims to be huge costs memory only for what arrives.
func TestReaderBoundsMemory(t *testing.T) {
	for _, entries := range []uint32{1 << 22, math.MaxUint32} {
		im := small()
		im.footer = func(f *Footer) { put64(f[48:], uint64(entries)*4096) }
		im.header = func(h *Header) { put32(h[28:], entries) }
		b := im.bytes()
		var before, after runtime.MemStats
		runtime.ReadMemStats(&before)
		_, err := NewReader(bytes.NewReader(b), ReaderOptions{Length: -1})
		runtime.ReadMemStats(&after)
		if !errors.Is(err, io.ErrUnexpectedEOF) {
			t.Errorf("%d entries: error is %v", entries, err)
		}
		if n := after.TotalAlloc - before.TotalAlloc; n > 1<<20 {
			t.Errorf("%d entries: %d bytes allocated for %d bytes of input", entries, n, len(b))
		}
	}
}

func TestReaderBoundsBlocks(t *testing.T) {
	im := small()
	im.blockSize, im.entries = 512, MaxBlocks+1
	im.size = im.blockSize * im.entries
	b := im.bytes()
	clear(b[im.tableAt : len(b)-512]) // every entry allocated
	_, err := NewReader(bytes.NewReader(b), ReaderOptions{Length: -1})
	if fe, ok := errors.AsType[*FormatError](err); !ok || fe.Field != "number of allocated blocks" {
		t.Errorf("error is %v, want a FormatError for the number of blocks", err)
	}
}
