package vfs

import (
	"bytes"
	"os"
	"path/filepath"
	"testing"
)

// TestDirectWrites writes past the cache and in the ways that stand in for it,
// and reads through the cache.
func TestDirectWrites(t *testing.T) {
	for name, prepare := range map[string]func(t *testing.T, d *Dir, f *dirFile){
		"direct":  func(*testing.T, *Dir, *dirFile) {},
		"refused": func(_ *testing.T, _ *Dir, f *dirFile) { f.direct.refuse.Store(true) },
		"none":    func(_ *testing.T, _ *Dir, f *dirFile) { f.direct.once.Do(func() {}) },
		"directory closed": func(t *testing.T, d *Dir, _ *dirFile) {
			if err := d.Close(); err != nil {
				t.Fatal(err)
			}
		},
		"renamed": func(t *testing.T, d *Dir, _ *dirFile) {
			if err := d.Rename("f", "g"); err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(filepath.Join(d.Path(), "f"), []byte("another"), 0o600); err != nil {
				t.Fatal(err)
			}
		},
		"cannot write": func(t *testing.T, d *Dir, f *dirFile) { // as a host that finds out late
			strict, err := os.OpenFile("/proc/self/oom_score_adj", os.O_RDWR, 0) // EINVAL for what is no number
			if err != nil {
				t.Fatal(err)
			}
			f.direct.once.Do(func() { f.direct.file = strict })
		},
	} {
		t.Run(name, func(t *testing.T) {
			d, err := OpenDir(t.TempDir())
			if err != nil {
				t.Fatal(err)
			}
			defer d.Close()
			file, err := d.Create("f")
			if err != nil {
				t.Fatal(err)
			}
			defer file.Close()
			f := file.(*dirFile)
			prepare(t, d, f)
			model := make([]byte, 64<<10)
			for i, n := range []int{4096, 8192, 512, 4096, 12288, 1, 4096} {
				b := Aligned(n)
				if uint64(len(b)) != uint64(n) || !isAligned(b[:0], 0) {
					t.Fatalf("%d bytes are not aligned", n)
				}
				for k := range b {
					b[k] = byte(i + 1)
				}
				off := int64(i%3) * 8192
				if _, err := file.ReadAt(make([]byte, 20000), 0); err != nil && err.Error() != "EOF" { // into the cache
					t.Fatal(err)
				}
				if err := file.WriteSync(b, off); err != nil {
					t.Fatal(err)
				}
				copy(model[off:], b)
			}
			size, err := file.Size()
			if err != nil {
				t.Fatal(err)
			}
			got := make([]byte, size)
			if _, err := file.ReadAt(got, 0); err != nil {
				t.Fatal(err)
			}
			if !bytes.Equal(got, model[:size]) || !bytes.Equal(model[size:], make([]byte, len(model)-int(size))) {
				t.Error("wrong contents")
			}
			if name == "renamed" {
				if b, err := os.ReadFile(filepath.Join(d.Path(), "f")); string(b) != "another" || err != nil {
					t.Errorf("the file that took the name holds %q, %v", b, err)
				}
			}
		})
	}
}
