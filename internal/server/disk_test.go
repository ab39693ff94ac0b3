package server

import (
	"bytes"
	"context"
	"fmt"
	"iter"
	"math/rand/v2"
	"sync"
	"testing"
	"time"

	"coppice/internal/storage"
	"coppice/internal/storage/mem"
	"coppice/internal/xapi"
)

// testRepo is a repository in memory.
func testRepo(t testing.TB) storage.Repo {
	t.Helper()
	repo, err := mem.Driver().Open(t.Context(), map[string]string{"location": t.Name()}, true)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := repo.Close(); err != nil {
			t.Error(err)
		}
	})
	return repo
}

func testID(n int) storage.ID {
	return storage.ID(fmt.Sprintf("00000000-0000-4000-8000-%012d", n))
}

// testDisk makes volume n of repo with the given contents.
func testDisk(t testing.TB, repo storage.Repo, n int, contents []byte) storage.Volume {
	t.Helper()
	if _, err := repo.Create(t.Context(), storage.Spec{ID: testID(n), Size: int64(len(contents))}); err != nil {
		t.Fatal(err)
	}
	v := testOpen(t, repo, n, storage.Live)
	for off := 0; off < len(contents); off += storage.Unit {
		if part := contents[off:min(off+storage.Unit, len(contents))]; bytes.ContainsFunc(part, func(r rune) bool { return r != 0 }) {
			if _, err := v.WriteAt(part, int64(off)); err != nil {
				t.Fatal(err)
			}
		}
	}
	return v
}

// testEdit makes volume n a clone of volume from with other contents: only the
// units that differ are written.
func testEdit(t testing.TB, repo storage.Repo, from, n int, contents []byte) storage.Volume {
	t.Helper()
	if _, err := repo.Clone(t.Context(), storage.Derived{Source: testID(from), ID: testID(n)}); err != nil {
		t.Fatal(err)
	}
	if _, err := repo.(storage.Resizer).Resize(t.Context(), testID(n), int64(len(contents))); err != nil {
		t.Fatal(err)
	}
	v := testOpen(t, repo, n, storage.Live)
	if err := storage.NewOverlay(v).WriteAt(t.Context(), contents, 0); err != nil {
		t.Fatal(err)
	}
	return v
}

func testOpen(t testing.TB, repo storage.Repo, n int, m storage.Mode) storage.Volume {
	t.Helper()
	v, err := repo.Open(t.Context(), testID(n), m)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := v.Close(); err != nil {
			t.Error(err)
		}
	})
	return v
}

func contentsOf(t testing.TB, v storage.Volume) []byte {
	t.Helper()
	b := make([]byte, v.Size())
	if err := storage.ReadFull(v, b, 0); err != nil {
		t.Fatal(err)
	}
	return b
}

// random returns n bytes of which only the given ranges are not zero.
func random(n int64, seed byte, ranges ...[2]int64) []byte {
	b := make([]byte, n)
	rng := rand.NewChaCha8([32]byte{seed})
	for _, r := range ranges {
		_, _ = rng.Read(b[r[0] : r[0]+r[1]])
	}
	return b
}

// watched is a volume that notes what is read, and fails when told to.
type watched struct {
	storage.Volume
	mu     sync.Mutex // guards reads
	reads  []storage.Extent
	writes []storage.Extent
	fail   func(off int64) error
}

func (w *watched) ReadAt(p []byte, off int64) (int, error) {
	w.mu.Lock()
	w.reads = append(w.reads, storage.Extent{Off: off, Len: int64(len(p))})
	w.mu.Unlock()
	if w.fail != nil {
		if err := w.fail(off); err != nil {
			return 0, err
		}
	}
	return w.Volume.ReadAt(p, off)
}

func (w *watched) WriteAt(p []byte, off int64) (int, error) {
	w.writes = append(w.writes, storage.Extent{Off: off, Len: int64(len(p))})
	if w.fail != nil {
		if err := w.fail(off); err != nil {
			return 0, err
		}
	}
	return w.Volume.WriteAt(p, off)
}

// The records of a snapshot that is downloaded, and of its base.
var (
	vdiTest = &xapi.VDI{
		UUID: "b29a1104-77c3-4d21-8e5f-0a31c648ee02", IsASnapshot: true,
		SnapshotTime: time.Date(2026, 11, 25, 0, 0, 0, 0, time.UTC),
	}
	baseTest = &xapi.VDI{
		UUID: "3f1e6c5a-9b0d-4e8f-a102-5c772190de01", IsASnapshot: true,
		SnapshotTime: time.Date(2026, 11, 24, 0, 0, 0, 0, time.UTC),
	}
)

// downloadOf is a download of a volume, or of what differs from a base.
func downloadOf(repo storage.Repo, v, base storage.Volume) *download {
	d := &download{ref: "OpaqueRef:x", vdi: vdiTest, volume: v, baseVDI: baseTest, base: base}
	d.extents = func(ctx context.Context) iter.Seq2[storage.Extent, error] {
		if base != nil {
			return repo.(storage.Differ).Diff(ctx, base, v, 0)
		}
		return v.Extents(ctx, 0, v.Size())
	}
	return d
}
