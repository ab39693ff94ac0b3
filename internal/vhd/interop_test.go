package vhd

import (
	"bytes"
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"coppice/internal/peertest"
)

// sparse is a disk of any size whose few blocks carry their index.
func sparse(t *testing.T, path string, size int64, parent *Parent, indexes ...int64) {
	t.Helper()
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	o := Options{Size: size, UUID: idBase, Timestamp: stampBase, Parent: parent, Blocks: NewBlockSet(size)}
	if parent != nil {
		o.UUID = idDelta
	}
	for _, index := range indexes {
		o.Blocks.Add(index*BlockSize, 1)
	}
	l, err := NewLayout(o)
	if err != nil {
		t.Fatal(err)
	}
	w, err := NewWriter(f, l)
	if err != nil {
		t.Fatal(err)
	}
	for index := range l.Blocks() {
		b := new(Block)
		b.MarkAll()
		fill(b.Data()[:min(BlockSize, size-index*BlockSize)], uint64(index))
		if err := w.WriteBlock(index, b); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
}

func TestQemuReadsSize(t *testing.T) {
	qemu := peertest.Tool(t, "qemu-img", "qemu-utils")
	parent := &Parent{UUID: idBase, Name: nameBase, Timestamp: stampBase}
	for _, size := range []int64{512, 1 << 20, 2 << 20, 2<<20 + 512, 9<<20 + 512, 1 << 30, 24 << 30, 127 << 30, 128 << 30, 500 << 30, MaxSize} {
		for name, p := range map[string]*Parent{"full": nil, "delta": parent} {
			file := filepath.Join(t.TempDir(), name+".vhd")
			sparse(t, file, size, p, 0, (size-1)/BlockSize)
			var info struct {
				Format string `json:"format"`
				Size   int64  `json:"virtual-size"`
			}
			if err := json.Unmarshal([]byte(peertest.Run(t, qemu, "info", "--output=json", file)), &info); err != nil {
				t.Fatal(err)
			}
			if info.Format != "vpc" || info.Size != size {
				t.Errorf("%s of %d bytes: qemu-img sees %s of %d bytes", name, size, info.Format, info.Size)
			}
		}
	}
}

func TestQemuReadsContents(t *testing.T) {
	qemu := peertest.Tool(t, "qemu-img", "qemu-utils")
	dir := t.TempDir()
	s := fullSource()
	var out bytes.Buffer
	s.write(t, &out)
	vhd, raw, back := filepath.Join(dir, "full.vhd"), filepath.Join(dir, "full.raw"), filepath.Join(dir, "back.raw")
	for file, b := range map[string][]byte{vhd: out.Bytes(), raw: s.data} {
		if err := os.WriteFile(file, b, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	peertest.Run(t, qemu, "compare", "-f", "vpc", "-F", "raw", vhd, raw)
	peertest.Run(t, qemu, "convert", "-f", "vpc", "-O", "raw", vhd, back)
	got, err := os.ReadFile(back)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got, s.data) {
		t.Error("qemu-img convert gives other contents")
		firstDifference(t, got, s.data)
	}
}

func TestReadsQemu(t *testing.T) {
	qemu := peertest.Tool(t, "qemu-img", "qemu-utils")
	for _, size := range []int64{512, 3 << 20, 9<<20 + 512, 40 << 20} {
		for _, options := range []string{"subformat=dynamic", "subformat=dynamic,force_size=on"} {
			dir := t.TempDir()
			raw, vhd := filepath.Join(dir, "disk.raw"), filepath.Join(dir, "disk.vhd")
			data := make([]byte, size)
			fill(data[:size/3], 1)
			fill(data[size-size/5:], 2)
			if err := os.WriteFile(raw, data, 0o600); err != nil {
				t.Fatal(err)
			}
			peertest.Run(t, qemu, "convert", "-f", "raw", "-O", "vpc", "-o", options, raw, vhd)
			b, err := os.ReadFile(vhd)
			if err != nil {
				t.Fatal(err)
			}
			r, err := NewReader(bytes.NewReader(b), ReaderOptions{Length: int64(len(b))})
			if err != nil {
				t.Fatal(err)
			}
			if r.Size() < size {
				t.Errorf("%s, %d bytes: Size is %d", options, size, r.Size())
			}
			got, err := apply(bytes.NewReader(b), -1, r.Size())
			if err != nil {
				t.Fatal(err)
			}
			want := bytes.Repeat([]byte{untouched}, int(r.Size()))
			for off := int64(0); off < r.Size(); off += BlockSize {
				end := min(off+BlockSize, r.Size())
				if slice := data[min(off, size):min(end, size)]; bytes.ContainsFunc(slice, func(r rune) bool { return r != 0 }) {
					clear(want[copy(want[off:end], slice)+int(off) : end])
				}
			}
			if !bytes.Equal(got, want) {
				t.Errorf("%s, %d bytes: wrong contents", options, size)
				firstDifference(t, got, want)
			}
		}
	}
}

func TestRefusesFixedOfQemu(t *testing.T) {
	qemu := peertest.Tool(t, "qemu-img", "qemu-utils")
	file := filepath.Join(t.TempDir(), "fixed.vhd")
	peertest.Run(t, qemu, "create", "-f", "vpc", "-o", "subformat=fixed", file, "4M")
	b, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := NewReader(bytes.NewReader(b), ReaderOptions{Length: int64(len(b))}); err == nil {
		t.Error("a fixed image was accepted")
	}
}

func TestLibvhdiReads(t *testing.T) {
	info := peertest.Tool(t, "vhdiinfo", "libvhdi-utils")
	dir := t.TempDir()
	for _, tt := range []struct {
		name   string
		size   int64
		parent *Parent
		want   []string
	}{
		{"full", 24 << 30, nil, []string{
			"Dynamic", "25769803776 bytes", "3f1e6c5a-9b0d-4e8f-a102-5c772190de01",
		}},
		{"delta", 24 << 30, &Parent{UUID: idBase, Name: nameBase, Timestamp: stampBase}, []string{
			"Differential", "25769803776 bytes", "b29a1104-77c3-4d21-8e5f-0a31c648ee02",
			"3f1e6c5a-9b0d-4e8f-a102-5c772190de01", nameBase,
		}},
	} {
		file := filepath.Join(dir, tt.name+".vhd")
		sparse(t, file, tt.size, tt.parent, 0, 7, (tt.size-1)/BlockSize)
		out := peertest.Run(t, info, file)
		for _, want := range tt.want {
			if !strings.Contains(out, want) {
				t.Errorf("%s: vhdiinfo does not say %q:\n%s", tt.name, want, out)
			}
		}
	}
}
