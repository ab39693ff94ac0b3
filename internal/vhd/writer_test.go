package vhd

import (
	"bytes"
	"errors"
	"flag"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

var (
	idBase  = [16]byte{0x3f, 0x1e, 0x6c, 0x5a, 0x9b, 0x0d, 0x4e, 0x8f, 0xa1, 0x02, 0x5c, 0x77, 0x21, 0x90, 0xde, 0x01}
	idDelta = [16]byte{0xb2, 0x9a, 0x11, 0x04, 0x77, 0xc3, 0x4d, 0x21, 0x8e, 0x5f, 0x0a, 0x31, 0xc6, 0x48, 0xee, 0x02}

	stampBase  = time.Date(2026, 11, 24, 22, 0, 0, 0, time.UTC)
	stampDelta = time.Date(2026, 11, 25, 22, 0, 0, 0, time.UTC)
)

const nameBase = "3f1e6c5a-9b0d-4e8f-a102-5c772190de01.vhd"

var update = flag.Bool("update", false, "write the golden files anew")

// source is a disk to be written: bytes, and the blocks of them to send.
type source struct {
	data   []byte
	blocks []int64
	marks  map[int64][2]int64 // of a block: the range to mark instead of all
	o      Options
}

// write sends the source through a Writer.
func (s source) write(t testing.TB, dst io.Writer) *Layout {
	t.Helper()
	s.o.Size = int64(len(s.data))
	s.o.Blocks = NewBlockSet(s.o.Size)
	for _, index := range s.blocks {
		s.o.Blocks.Add(index*BlockSize, 1)
	}
	l, err := NewLayout(s.o)
	if err != nil {
		t.Fatal(err)
	}
	w, err := NewWriter(dst, l)
	if err != nil {
		t.Fatal(err)
	}
	b := new(Block)
	for index := range l.Blocks() {
		clear(b.Data()[copy(b.Data(), s.data[index*BlockSize:]):])
		b.MarkAll()
		if m, ok := s.marks[index]; ok {
			b.Clear()
			b.Mark(m[0], m[1])
		}
		if err := w.WriteBlock(index, b); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return l
}

func fullSource() source {
	s := source{data: make([]byte, 9<<20+512), blocks: []int64{0, 3, 4}}
	fill(s.data[:1<<20], 1)
	fill(s.data[7<<20:], 2)
	s.o = Options{UUID: idBase, Timestamp: stampBase}
	return s
}

func deltaSource() source {
	s := source{data: make([]byte, 9<<20+512), blocks: []int64{1, 4}, marks: map[int64][2]int64{1: {4096 + 512, 8192}}}
	fill(s.data[2<<20:4<<20], 3)
	fill(s.data[8<<20:], 4)
	s.o = Options{UUID: idDelta, Timestamp: stampDelta, Parent: &Parent{UUID: idBase, Name: nameBase, Timestamp: stampBase}}
	return s
}

func fill(b []byte, seed uint64) {
	r := rand.NewChaCha8([32]byte{byte(seed)})
	_, _ = r.Read(b)
}

// The bytes of both kinds of image, as a hex dump without the block data.
func TestGolden(t *testing.T) {
	for name, s := range map[string]source{"full": fullSource(), "delta": deltaSource()} {
		t.Run(name, func(t *testing.T) {
			for i := range s.data {
				s.data[i] = 0xDD
			}
			var out bytes.Buffer
			l := s.write(t, &out)
			if int64(out.Len()) != l.Length() {
				t.Errorf("%d bytes written, Length is %d", out.Len(), l.Length())
			}
			if head, tail := out.Bytes()[:512], out.Bytes()[out.Len()-512:]; !bytes.Equal(head, tail) {
				t.Error("the footers differ")
			}
			file := "testdata/" + name + ".hex"
			if *update {
				if err := os.WriteFile(file, []byte(hexDump(out.Bytes())), 0o644); err != nil {
					t.Fatal(err)
				}
			}
			want, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			if got := hexDump(out.Bytes()); got != string(want) {
				t.Errorf("%s differs (-want +got):\n%s", file, cmp.Diff(string(want), got))
			}
		})
	}
}

// hexDump prints 16 bytes in each line, and a star for lines that repeat.
func hexDump(b []byte) string {
	var out strings.Builder
	var last []byte
	starred := false
	for off := 0; off < len(b); off += 16 {
		line := b[off:min(off+16, len(b))]
		if off+16 < len(b) && bytes.Equal(line, last) {
			if !starred {
				out.WriteString("*\n")
			}
			starred = true
			continue
		}
		starred, last = false, line
		fmt.Fprintf(&out, "%08x  % x\n", off, line)
	}
	return out.String()
}

func TestLength(t *testing.T) {
	for _, tt := range []struct {
		size, blocks int64
		delta        bool
		want         int64
	}{
		{2 << 20, 0, false, 1536 + 512 + 512},
		{2 << 20, 1, false, 1536 + 512 + 2097664 + 512},
		{24 << 30, 100, false, 1536 + 4*12288 + 100*2097664 + 512},
		{24 << 30, 3, true, 2048 + 4*12288 + 3*2097664 + 512},
		{512, 1, true, 2048 + 512 + 2097664 + 512},
		{MaxSize, 1044480, false, 1536 + 4*1044480 + 1044480*2097664 + 512},
	} {
		o := Options{Size: tt.size, UUID: idBase, Blocks: NewBlockSet(tt.size)}
		if tt.delta {
			o.Parent = &Parent{UUID: idDelta, Name: "p"}
		}
		o.Blocks.Add(0, tt.blocks*BlockSize)
		l, err := NewLayout(o)
		if err != nil {
			t.Fatal(err)
		}
		if l.Length() != tt.want || l.NumBlocks() != tt.blocks {
			t.Errorf("size %d with %d blocks: Length %d, want %d; NumBlocks %d", tt.size, tt.blocks, l.Length(), tt.want, l.NumBlocks())
		}
	}
}

// The largest full disk: its last block is addressed by a sector that fits.
func TestLargestTable(t *testing.T) {
	o := Options{Size: MaxSize, UUID: idBase, Blocks: NewBlockSet(MaxSize)}
	o.Blocks.Add(0, MaxSize)
	l, err := NewLayout(o)
	if err != nil {
		t.Fatal(err)
	}
	var head bytes.Buffer
	if _, err := NewWriter(&head, l); err != nil {
		t.Fatal(err)
	}
	r, err := NewReader(&head, ReaderOptions{Length: l.Length()})
	if err != nil {
		t.Fatal(err)
	}
	if r.Blocks() != 1044480 || r.End() != MaxSize {
		t.Errorf("%d blocks up to %d, want 1044480 up to %d", r.Blocks(), r.End(), int64(MaxSize))
	}
	last, _ := r.place(r.blocks[len(r.blocks)-1])
	if want := l.Length() - 512 - blockBytes; last != want {
		t.Errorf("last block is at %d, want %d", last, want)
	}
}

func TestLayoutRefuses(t *testing.T) {
	good := func() Options {
		return Options{
			Size: 4 << 20, UUID: idDelta, Blocks: NewBlockSet(4 << 20),
			Parent: &Parent{UUID: idBase, Name: nameBase},
		}
	}
	if _, err := NewLayout(good()); err != nil {
		t.Fatal(err)
	}
	for name, tt := range map[string]struct {
		change func(*Options)
		want   string
	}{
		"no size":             {func(o *Options) { o.Size = 0 }, "size 0"},
		"negative size":       {func(o *Options) { o.Size = -512 }, "size -512"},
		"odd size":            {func(o *Options) { o.Size = 4<<20 + 1 }, "size 4194305"},
		"too large":           {func(o *Options) { o.Size = MaxSize + 512; o.Blocks = NewBlockSet(MaxSize + 512) }, "exceeds"},
		"no block set":        {func(o *Options) { o.Blocks = nil }, "block set"},
		"foreign block set":   {func(o *Options) { o.Blocks = NewBlockSet(6 << 20) }, "block set"},
		"no identity":         {func(o *Options) { o.UUID = [16]byte{} }, "identity"},
		"identity no UUID":    {func(o *Options) { o.UUID[6] = 0xF0 }, "identity"},
		"parent without one":  {func(o *Options) { o.Parent.UUID = [16]byte{} }, "parent identity"},
		"parent without name": {func(o *Options) { o.Parent.Name = "" }, "parent name"},
		"path":                {func(o *Options) { o.Parent.Name = "../x.vhd" }, "parent name"},
		"windows path":        {func(o *Options) { o.Parent.Name = `C:\x.vhd` }, "parent name"},
		"name not ASCII":      {func(o *Options) { o.Parent.Name = "größe.vhd" }, "parent name"},
		"control character":   {func(o *Options) { o.Parent.Name = "a\nb" }, "parent name"},
		"name too long":       {func(o *Options) { o.Parent.Name = strings.Repeat("n", 201) }, "parent name"},
	} {
		o := good()
		tt.change(&o)
		if _, err := NewLayout(o); err == nil || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%s: error is %v, want one with %q", name, err, tt.want)
		}
	}
	// Every fault is reported at once.
	_, err := NewLayout(Options{})
	for _, want := range []string{"size", "identity"} {
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("error of empty options does not mention %s: %v", want, err)
		}
	}
}

func TestWriterOrder(t *testing.T) {
	set := NewBlockSet(20 << 20)
	set.Add(2<<20, 1)
	set.Add(8<<20, 4<<20)
	l, err := NewLayout(Options{Size: 20 << 20, UUID: idBase, Blocks: set})
	if err != nil {
		t.Fatal(err)
	}
	b := new(Block)
	for name, tt := range map[string]struct {
		send  []int64
		close bool
		want  string
	}{
		"complete":    {send: []int64{1, 4, 5}, close: true},
		"none":        {close: true, want: "before block 1"},
		"last absent": {send: []int64{1, 4}, close: true, want: "before block 5"},
		"not first":   {send: []int64{4}, want: "block 4 sent in place of block 1"},
		"backwards":   {send: []int64{1, 1}, want: "block 1 sent in place of block 4"},
		"too many":    {send: []int64{1, 4, 5, 6}, want: "block 6 sent after the last"},
	} {
		var out bytes.Buffer
		w, err := NewWriter(&out, l)
		for _, index := range tt.send {
			if err == nil {
				err = w.WriteBlock(index, b)
			}
		}
		if err != nil {
			if again := w.WriteBlock(1, b); again != err {
				t.Errorf("%s: later error is %v, want %v", name, again, err)
			}
		} else if tt.close {
			err = w.Close()
		}
		if got := fmt.Sprint(err); err == nil && tt.want != "" || !strings.Contains(got, tt.want) {
			t.Errorf("%s: error is %v, want %q", name, err, tt.want)
		}
		if whole := int64(out.Len()) == l.Length(); whole != (tt.want == "") && name != "too many" {
			t.Errorf("%s: %d bytes of %d written", name, out.Len(), l.Length())
		}
	}
}

// failing accepts n bytes.
type failing struct{ n int }

var errSink = errors.New("sink is full")

func (f *failing) Write(p []byte) (int, error) {
	if f.n -= len(p); f.n < 0 {
		return 0, errSink
	}
	return len(p), nil
}

func TestWriterSinkError(t *testing.T) {
	set := NewBlockSet(2 << 20)
	set.Add(0, 1)
	l, err := NewLayout(Options{Size: 2 << 20, UUID: idBase, Blocks: set})
	if err != nil {
		t.Fatal(err)
	}
	for _, n := range []int{0, 1536, 2048, 2048 + blockBytes} {
		w, err := NewWriter(&failing{n}, l)
		if err == nil {
			err = w.WriteBlock(0, new(Block))
		}
		if err == nil {
			err = w.Close()
		}
		if !errors.Is(err, errSink) {
			t.Errorf("sink of %d bytes: error is %v", n, err)
		}
	}
}

func TestMark(t *testing.T) {
	for _, tt := range []struct {
		off, n int64
		want   string
	}{
		{0, 1, "0-8"},
		{0, 4096, "0-8"},
		{0, 4097, "0-16"},
		{4095, 2, "0-16"},
		{4096 + 512, 8192, "8-32"},
		{BlockSize - 1, 1, "4088-4096"},
		{0, BlockSize, "0-4096"},
		{100, 0, ""},
	} {
		b := new(Block)
		if tt.n > 0 {
			b.Mark(tt.off, tt.n)
		}
		r := &Reader{bitmap: b.Bitmap()}
		got := ""
		if first := r.scan(0, 4096, true); first < 4096 {
			end := r.scan(first, 4096, false)
			got = fmt.Sprintf("%d-%d", first, end)
			if r.scan(end, 4096, true) != 4096 {
				got += " and more"
			}
		}
		if got != tt.want {
			t.Errorf("Mark(%d, %d): sectors %q, want %q", tt.off, tt.n, got, tt.want)
		}
	}
}

func TestBlockSet(t *testing.T) {
	s := NewBlockSet(300*BlockSize + 1)
	for _, r := range [][2]int64{{0, 1}, {63 * BlockSize, 2 * BlockSize}, {64*BlockSize - 1, 2}, {300 * BlockSize, 1}, {5, 0}, {200*BlockSize + 7, 3 * BlockSize}} {
		s.Add(r[0], r[1])
	}
	want := []int64{0, 63, 64, 200, 201, 202, 203, 300}
	if got := slices.Collect(s.All()); !slices.Equal(got, want) || s.Len() != int64(len(want)) {
		t.Errorf("set is %v with Len %d, want %v", got, s.Len(), want)
	}
	for i := int64(-1); i < 310; i++ {
		if s.Has(i) != slices.Contains(want, i) {
			t.Errorf("Has(%d) is %v", i, s.Has(i))
		}
	}
	for range s.All() {
		break // stopping early is allowed
	}
}

// What a Writer sends, a Reader applies: blocks, marks and nothing else.
func TestRoundTrip(t *testing.T) {
	for name, s := range map[string]source{"full": fullSource(), "delta": deltaSource(), "empty": {data: make([]byte, 4<<20), o: Options{UUID: idBase}}} {
		var out bytes.Buffer
		s.write(t, &out)
		got, err := apply(&out, -1, int64(len(s.data)))
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		want := bytes.Repeat([]byte{untouched}, len(s.data))
		for _, index := range s.blocks {
			off, end := index*BlockSize, (index+1)*BlockSize
			if m, ok := s.marks[index]; ok {
				off, end = off+4096, off+roundUp(m[0]+m[1], 4096)
			}
			end = min(end, int64(len(s.data)))
			copy(want[off:end], s.data[off:end])
		}
		if !bytes.Equal(got, want) {
			t.Errorf("%s: wrong contents", name)
			firstDifference(t, got, want)
		}
	}
}
