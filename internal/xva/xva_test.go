package xva

import (
	"archive/tar"
	"bytes"
	"crypto/sha1"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"

	"github.com/cespare/xxhash/v2"
)

const mib = 1 << 20

func disk(size int64, ranges ...[2]int64) []byte {
	b := make([]byte, size)
	rng := rand.NewChaCha8([32]byte{3})
	for _, r := range ranges {
		_, _ = rng.Read(b[min(r[0], size):min(r[0]+r[1], size)])
	}
	return b
}

// write makes an archive of a disk.
func write(t testing.TB, contents []byte) []byte {
	t.Helper()
	l, err := NewLayout("vdi/", int64(len(contents)))
	if err != nil {
		t.Fatal(err)
	}
	for off := 0; off < len(contents); off++ {
		if contents[off] != 0 {
			l.Add(int64(off), 1)
			off |= ChunkSize - 1
		}
	}
	var out bytes.Buffer
	var e Entry
	for chunk := range l.Chunks() {
		n := l.ChunkLen(chunk)
		copy(e.Data(n), contents[chunk*ChunkSize:][:n])
		b, err := l.Seal(&e, chunk)
		if err != nil {
			t.Fatal(err)
		}
		if int64(len(b)) != l.EntryLen(chunk) {
			t.Fatalf("chunk %d takes %d bytes, EntryLen is %d", chunk, len(b), l.EntryLen(chunk))
		}
		out.Write(b)
	}
	if int64(out.Len()) != l.Length() {
		t.Fatalf("%d bytes, Length is %d", out.Len(), l.Length())
	}
	out.Write(Trailer())
	return out.Bytes()
}

func apply(archive []byte, over []byte) error {
	r := NewReader(bytes.NewReader(archive), "vdi/", int64(len(over)))
	for {
		off, data, err := r.Next()
		if err == io.EOF {
			return nil
		}
		if err != nil {
			return err
		}
		copy(over[off:], data)
	}
}

func TestRoundTrip(t *testing.T) {
	for _, size := range []int64{512, 4096, mib - 512, mib, mib + 512, 3 * mib, 70*mib + 4096} {
		contents := disk(size, [2]int64{0, 10}, [2]int64{2 * mib, 100}, [2]int64{66 * mib, mib})
		archive := write(t, contents)
		got := make([]byte, size)
		if err := apply(archive, got); err != nil || !bytes.Equal(got, contents) {
			t.Errorf("%d: %v, or not the contents", size, err)
		}
		var names []string
		for r := tar.NewReader(bytes.NewReader(archive)); ; {
			h, err := r.Next()
			if err == io.EOF {
				break
			}
			if err != nil {
				t.Fatal(err)
			}
			names = append(names, h.Name)
		}
		last := fmt.Sprintf("vdi/%08d", (size-1)/mib)
		if names[0] != "vdi/00000000" || names[1] != "vdi/00000000.xxhash" || names[len(names)-2] != last || !slices.IsSorted(names) {
			t.Errorf("%d: names %q", size, names)
		}
	}
}

type file struct {
	name, data string
	kind       byte
	link       string
}

func archive(t testing.TB, files ...file) []byte {
	t.Helper()
	var out bytes.Buffer
	w := tar.NewWriter(&out)
	for _, f := range files {
		h := &tar.Header{Name: f.name, Size: int64(len(f.data)), Typeflag: f.kind, Linkname: f.link, Mode: 0o600}
		if err := w.WriteHeader(h); err != nil {
			t.Fatal(err)
		}
		if _, err := io.WriteString(w, f.data); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return out.Bytes()
}

func sha1Of(s string) string {
	sum := sha1.Sum([]byte(s))
	return hex.EncodeToString(sum[:])
}

// Archives of older writers, and in other orders.
func TestReaderAccepts(t *testing.T) {
	hash := fmt.Sprintf("%016X", xxhash.Sum64([]byte("data")))
	for name, files := range map[string][]file{
		"sha-1":      {{name: "vdi/00000001", data: "data"}, {name: "vdi/00000001.checksum", data: sha1Of("data")}},
		"keep-alive": {{name: "vdi/00000000"}, {name: "vdi/00000000.xxhash", data: fmt.Sprintf("%016X", xxhash.Sum64(nil))}, {name: "vdi/00000001", data: "data"}, {name: "vdi/00000001.xxhash", data: hash}, {name: "vdi/00000002"}},
		"lower case": {{name: "vdi/00000001", data: "data"}, {name: "vdi/00000001.xxhash", data: strings.ToLower(hash) + "\n"}},
	} {
		got, want := make([]byte, 2*mib), make([]byte, 2*mib)
		copy(want[mib:], "data")
		if err := apply(archive(t, files...), got); err != nil || !bytes.Equal(got, want) {
			t.Errorf("%s: %v, or not the contents", name, err)
		}
	}
}

func TestReaderRefuses(t *testing.T) {
	good := file{name: "vdi/00000000", data: "data"}
	for name, files := range map[string][]file{
		"wrong checksum":        {good, {name: "vdi/00000000.xxhash", data: "0000000000000000"}},
		"wrong sha-1":           {good, {name: "vdi/00000000.checksum", data: sha1Of("other")}},
		"no checksum":           {good},
		"checksum of another":   {good, {name: "vdi/00000001.xxhash", data: "0"}},
		"long checksum":         {good, {name: "vdi/00000000.xxhash", data: strings.Repeat("0", 65)}},
		"another kind":          {good, {name: "vdi/00000000.md5", data: "0"}},
		"not a number":          {{name: "vdi/0000000x", data: "d"}},
		"few digits":            {{name: "vdi/0", data: "d"}},
		"many digits":           {{name: "vdi/000000000", data: "d"}},
		"another directory":     {{name: "other/00000000", data: "d"}},
		"out of the directory":  {{name: "vdi/../../etc/passwd", data: "d"}},
		"absolute":              {{name: "/etc/passwd", data: "d"}},
		"symbolic link":         {{name: "vdi/00000000", kind: tar.TypeSymlink, link: "/etc/passwd"}},
		"hard link":             {{name: "vdi/00000000", kind: tar.TypeLink, link: "vdi/00000001"}},
		"directory":             {{name: "vdi/", kind: tar.TypeDir}},
		"device":                {{name: "vdi/00000000", kind: tar.TypeChar}},
		"behind the disk":       {{name: "vdi/00000002", data: "d"}},
		"far behind the disk":   {{name: "vdi/99999999", data: "d"}},
		"across the end":        {{name: "vdi/00000001", data: strings.Repeat("d", mib/2+1)}},
		"larger than a chunk":   {{name: "vdi/00000000", data: strings.Repeat("d", mib+1)}},
		"a large checksum file": {{name: "vdi/00000000.xxhash", data: strings.Repeat("0", 1000)}},
	} {
		if err := apply(archive(t, files...), make([]byte, mib+mib/2)); !errors.Is(err, ErrFormat) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// An archive that ends too early is told from a whole one wherever it ends.
func TestReaderNoticesTheEnd(t *testing.T) {
	contents := disk(mib+mib/2, [2]int64{0, mib + mib/2})
	whole := write(t, contents)
	for cut := 0; cut < len(whole); cut += 512 {
		err := apply(whole[:cut], make([]byte, len(contents)))
		if !errors.Is(err, io.ErrUnexpectedEOF) && !errors.Is(err, ErrFormat) {
			t.Fatalf("cut at %d of %d: %v", cut, len(whole), err)
		}
	}
	if err := apply(append(bytes.Clone(whole), make([]byte, 10240)...), make([]byte, len(contents))); err != nil {
		t.Errorf("with more padding: %v", err)
	}
}

func TestLayoutRefuses(t *testing.T) {
	for _, size := range []int64{0, -1, MaxSize + 1} {
		if _, err := NewLayout("vdi/", size); err == nil {
			t.Errorf("size %d is taken", size)
		}
	}
}

// FuzzReader feeds anything to a Reader: it ends with io.EOF or an error of
// the archive, and its chunks lie on the disk.
func FuzzReader(f *testing.F) {
	f.Add(write(f, disk(5000, [2]int64{0, 5000})), uint32(5000))
	f.Add(archive(f, file{name: "vdi/00000000", data: "d"}, file{name: "vdi/00000000.checksum", data: sha1Of("d")}), uint32(1))
	f.Fuzz(func(t *testing.T, b []byte, size uint32) {
		r := NewReader(bytes.NewReader(b), "vdi/", int64(size))
		for {
			off, data, err := r.Next()
			if err != nil {
				return
			}
			if off < 0 || len(data) == 0 || off+int64(len(data)) > int64(size) {
				t.Fatalf("%d bytes at %d of a disk of %d", len(data), off, size)
			}
		}
	})
}

// FuzzArchive feeds anything to the reader of whole machines: chunks lie on
// the disks that were expected, and ascend.
func FuzzArchive(f *testing.F) {
	manifest := file{name: Manifest, data: "<value/>"}
	sum := file{name: "Ref:7/00000000.checksum", data: sha1Of("d")}
	f.Add(archive(f, manifest, file{name: "Ref:7/00000000", data: "d"}, sum), uint32(1))
	f.Add(archive(f, manifest), uint32(5000))
	f.Add(archive(f, manifest, file{name: "../x", kind: tar.TypeSymlink, link: "/"}), uint32(5000))
	f.Fuzz(func(t *testing.T, b []byte, size uint32) {
		r, manifest, err := NewArchive(bytes.NewReader(b))
		var text []byte
		if err == nil {
			text, err = io.ReadAll(manifest)
		}
		if err != nil {
			if !errors.Is(err, ErrFormat) && !errors.Is(err, io.ErrUnexpectedEOF) {
				t.Fatal(err)
			}
			return
		}
		if len(text) > len(b) {
			t.Fatalf("a manifest of %d bytes in %d", len(text), len(b))
		}
		r.Expect(map[string]int64{"Ref:7/": int64(size) + 1}, false)
		for last := int64(-1); ; {
			off, data, err := r.Next()
			if err != nil {
				if err != io.EOF && !errors.Is(err, ErrFormat) && !errors.Is(err, io.ErrUnexpectedEOF) {
					t.Fatal(err)
				}
				return
			}
			if off <= last || r.Disk() != "Ref:7/" || off+int64(len(data)) > int64(size)+1 {
				t.Fatalf("%d bytes at %d of %s after %d", len(data), off, r.Disk(), last)
			}
			last = off
		}
	})
}
