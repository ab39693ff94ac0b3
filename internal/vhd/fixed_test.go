package vhd

import (
	"bytes"
	"errors"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

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
	for _, length := range []int64{0, 512, 1023, 1025} {
		if _, err := NewFixedReader(bytes.NewReader(good), ReaderOptions{Length: length}); !errors.Is(err, ErrFormat) {
			t.Errorf("length %d: %v", length, err)
		}
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
