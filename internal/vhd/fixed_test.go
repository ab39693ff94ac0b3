package vhd

import (
	"bytes"
	"errors"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/iotest"

	"coppice/internal/peertest"
)

// fixed is a fixed image of a disk.
func fixed(contents []byte, change func(*Footer)) []byte {
	var f Footer
	copy(f[:], cookieFooter)
	put32(f[12:], version1)
	put64(f[16:], noOffset)
	put64(f[48:], uint64(len(contents)))
	put32(f[60:], TypeFixed)
	if change != nil {
		change(&f)
	}
	f.seal()
	return append(bytes.Clone(contents), f[:]...)
}

func TestFixedReader(t *testing.T) {
	contents := make([]byte, 300<<10)
	fill(contents, 7)
	good := fixed(contents, nil)
	for _, length := range []int64{-1, int64(len(good))} {
		r, err := NewFixedReader(bytes.NewReader(good), ReaderOptions{Length: length})
		if err != nil {
			t.Fatal(err)
		}
		if got, err := io.ReadAll(r); err != nil || !bytes.Equal(got, contents) {
			t.Errorf("length %d: %d bytes, %v", length, len(got), err)
		}
		if want := max(-1, length-footerSize); r.Size() != want {
			t.Errorf("size %d, want %d", r.Size(), want)
		}
	}
	short := good[:len(good)-1] // as old tools wrote them
	for _, tt := range []struct{ length, size int64 }{{-1, -1}, {int64(len(short)), int64(len(contents))}} {
		for _, src := range []io.Reader{bytes.NewReader(short), iotest.OneByteReader(bytes.NewReader(short))} {
			r, err := NewFixedReader(src, ReaderOptions{Length: tt.length})
			if err != nil {
				t.Fatal(err)
			}
			if got, err := io.ReadAll(r); err != nil || !bytes.Equal(got, contents) || r.Size() != tt.size {
				t.Errorf("footer of 511 bytes, length %d: %d bytes of %d, %v", tt.length, len(got), r.Size(), err)
			}
		}
	}
	for want, image := range map[string][]byte{
		"cookie":       append(bytes.Clone(contents), make([]byte, 512)...),
		"disk type":    fixed(contents, func(f *Footer) { put32(f[60:], TypeDynamic) }),
		"current size": fixed(contents, func(f *Footer) { put64(f[48:], 5) }),
		"version":      fixed(contents, func(f *Footer) { put32(f[12:], 0) }),
		"ends at byte": good[:511],
	} {
		r, err := NewFixedReader(bytes.NewReader(image), ReaderOptions{Length: -1})
		if err == nil {
			_, err = io.ReadAll(r)
		}
		if err == nil || !strings.Contains(err.Error(), want) || !errors.Is(err, ErrFormat) && !errors.Is(err, io.ErrUnexpectedEOF) {
			t.Errorf("%s: %v", want, err)
		}
	}
	for cut := 0; cut < len(good); cut += SectorSize {
		r, err := NewFixedReader(bytes.NewReader(good[:cut]), ReaderOptions{Length: int64(len(good))})
		if err == nil {
			_, err = io.ReadAll(r)
		}
		if !errors.Is(err, io.ErrUnexpectedEOF) {
			t.Fatalf("cut at %d: %v", cut, err)
		}
	}
	for _, length := range []int64{0, 511, 512, 1022, 1025, 1534} {
		if _, err := NewFixedReader(bytes.NewReader(good), ReaderOptions{Length: length}); !errors.Is(err, ErrFormat) {
			t.Errorf("length %d: %v", length, err)
		}
	}
}

func TestIsFixed(t *testing.T) {
	s := fullSource()
	var out bytes.Buffer
	s.write(t, &out)
	dynamic := out.Bytes()
	damaged := bytes.Clone(dynamic)
	damaged[20]++
	poisoned := bytes.Clone(dynamic)
	copy(poisoned, cookiePoison)
	contents := make([]byte, 8192)
	fill(contents, 3)
	cookie := append([]byte(cookieFooter), contents...)
	var footer Footer // of a fixed image
	copy(footer[:], fixed(contents, nil)[len(contents):])
	for name, tt := range map[string]struct {
		start []byte
		want  bool
	}{
		"dynamic":                  {dynamic, false},
		"dynamic, footer damaged":  {damaged, false},
		"dynamic, poisoned":        {poisoned, false},
		"dynamic, cut":             {damaged[:512], false},
		"data":                     {contents, true},
		"data, short":              {contents[:100], true},
		"disk with a cookie":       {cookie, true},
		"disk with a fixed footer": {append(footer[:], contents...), true},
	} {
		if got := IsFixed(tt.start[:min(FixedPeek, len(tt.start))]); got != tt.want {
			t.Errorf("%s: %v", name, got)
		}
	}
}

// A fixed image of a disk that begins with a dynamic one looks like that up to
// its end.
func TestFixedImageOfImage(t *testing.T) {
	s := fullSource()
	var out bytes.Buffer
	s.write(t, &out)
	_, err := apply(bytes.NewReader(fixed(append(out.Bytes(), make([]byte, 1<<20)...), nil)), -1, int64(len(s.data)))
	if !errors.Is(err, ErrFormat) || !strings.Contains(err.Error(), "without its footer") {
		t.Errorf("error %v", err)
	}
}

func TestFixedReaderTakesQemuImages(t *testing.T) {
	qemu := peertest.Tool(t, "qemu-img", "qemu-utils")
	raw, image := filepath.Join(t.TempDir(), "raw"), filepath.Join(t.TempDir(), "vhd")
	contents := make([]byte, 3<<20)
	fill(contents, 5)
	if err := os.WriteFile(raw, contents, 0o600); err != nil {
		t.Fatal(err)
	}
	peertest.Run(t, qemu, "convert", "-O", "vpc", "-o", "subformat=fixed,force_size=on", raw, image)
	b, err := os.ReadFile(image)
	if err != nil {
		t.Fatal(err)
	}
	r, err := NewFixedReader(bytes.NewReader(b), ReaderOptions{Length: int64(len(b))})
	if err != nil {
		t.Fatal(err)
	}
	if got, err := io.ReadAll(r); err != nil || !bytes.Equal(got, contents) {
		t.Errorf("%d bytes, %v", len(got), err)
	}
}
