package vfs_test

import (
	"bytes"
	"errors"
	"io"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"sync"
	"syscall"
	"testing"

	"coppice/internal/vfs"

	"github.com/google/go-cmp/cmp"
)

// each runs test on an empty directory of every kind.
func each(t *testing.T, test func(t *testing.T, fsys vfs.FS)) {
	t.Run("Dir", func(t *testing.T) { test(t, newDir(t)) })
	t.Run("Mem", func(t *testing.T) { test(t, vfs.NewMem(0)) })
	t.Run("Wrapped", func(t *testing.T) {
		none := func(vfs.Call) error { return nil }
		test(t, vfs.NewTrace(vfs.NewInject(vfs.NewMem(0), nil, none), io.Discard))
	})
}

func newDir(t *testing.T) *vfs.Dir {
	t.Helper()
	d, err := vfs.CreateDir(filepath.Join(t.TempDir(), "a", "b"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { ok(t, d.Close()) })
	return d
}

func ok(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func fails(t *testing.T, err, want error) {
	t.Helper()
	if !errors.Is(err, want) {
		t.Errorf("error %v, want %v", err, want)
	}
}

func create(t *testing.T, fsys vfs.FS, name string) vfs.File {
	t.Helper()
	f, err := fsys.Create(name)
	ok(t, err)
	return f
}

func write(t *testing.T, f vfs.File, s string, off int64) {
	t.Helper()
	if n, err := f.WriteAt([]byte(s), off); n != len(s) || err != nil {
		t.Fatalf("WriteAt = %d, %v; want %d", n, err, len(s))
	}
}

func contents(t *testing.T, fsys vfs.FS, name string) string {
	t.Helper()
	f, err := fsys.Open(name)
	ok(t, err)
	defer f.Close()
	size, err := f.Size()
	ok(t, err)
	b := make([]byte, size)
	if n, err := f.ReadAt(b, 0); int64(n) != size || err != nil && err != io.EOF {
		t.Fatalf("ReadAt = %d, %v; want %d", n, err, size)
	}
	return string(b)
}

func list(t *testing.T, fsys vfs.FS) []string {
	t.Helper()
	names, err := fsys.List()
	ok(t, err)
	return names
}

func TestNames(t *testing.T) {
	each(t, func(t *testing.T, fsys vfs.FS) {
		for _, name := range []string{"b", "a"} {
			f := create(t, fsys, name)
			write(t, f, "file "+name, 0)
			ok(t, f.Close())
		}
		_, err := fsys.Create("a")
		fails(t, err, fs.ErrExist)
		_, err = fsys.Open("c")
		fails(t, err, fs.ErrNotExist)
		fails(t, fsys.Remove("c"), fs.ErrNotExist)
		fails(t, fsys.Rename("c", "d"), fs.ErrNotExist)
		for _, name := range []string{"", ".", "..", "a/b", "LOCK"} {
			_, err := fsys.Create(name)
			fails(t, err, fs.ErrInvalid)
			_, err = fsys.Open(name)
			fails(t, err, fs.ErrInvalid)
			fails(t, fsys.Remove(name), fs.ErrInvalid)
			fails(t, fsys.Rename("a", name), fs.ErrInvalid)
		}
		l, err := fsys.Lock()
		ok(t, err)
		if d := cmp.Diff([]string{"a", "b"}, list(t, fsys)); d != "" {
			t.Errorf("List (-want +got):\n%s", d)
		}
		ok(t, l.Close())
		ok(t, fsys.Rename("b", "a"))
		ok(t, fsys.SyncDir())
		if got := contents(t, fsys, "a"); got != "file b" {
			t.Errorf("after rename: %q", got)
		}
		if d := cmp.Diff([]string{"a"}, list(t, fsys)); d != "" {
			t.Errorf("List (-want +got):\n%s", d)
		}
	})
}

func TestRemovedFileStaysUsable(t *testing.T) {
	each(t, func(t *testing.T, fsys vfs.FS) {
		f := create(t, fsys, "f")
		write(t, f, "before", 0)
		ok(t, fsys.Remove("f"))
		write(t, f, "after", 1)
		b := make([]byte, 6)
		_, err := f.ReadAt(b, 0)
		ok(t, err)
		if string(b) != "bafter" {
			t.Errorf("read %q", b)
		}
		ok(t, f.Datasync())
		ok(t, f.Close())
		if got := list(t, fsys); len(got) != 0 {
			t.Errorf("List = %v", got)
		}
	})
}

func TestLock(t *testing.T) {
	each(t, func(t *testing.T, fsys vfs.FS) {
		l, err := fsys.Lock()
		ok(t, err)
		_, err = fsys.Lock()
		fails(t, err, vfs.ErrLocked)
		ok(t, l.Close())
		l, err = fsys.Lock()
		ok(t, err)
		ok(t, l.Close())
	})
}

func TestReadBehindEnd(t *testing.T) {
	each(t, func(t *testing.T, fsys vfs.FS) {
		f := create(t, fsys, "f")
		defer f.Close()
		write(t, f, "abc", 5000)
		for _, c := range []struct {
			off  int64
			len  int
			want string
			err  error
		}{
			{4998, 5, "\x00\x00abc", nil},
			{5000, 9, "abc", io.EOF},
			{5003, 1, "", io.EOF},
			{99999, 1, "", io.EOF},
			{5001, 2, "bc", nil},
		} {
			b := make([]byte, c.len)
			n, err := f.ReadAt(b, c.off)
			if string(b[:n]) != c.want || err != c.err {
				t.Errorf("ReadAt(%d, %d) = %q, %v; want %q, %v", c.off, c.len, b[:n], err, c.want, c.err)
			}
		}
	})
}

func TestClosedFile(t *testing.T) {
	each(t, func(t *testing.T, fsys vfs.FS) {
		f := create(t, fsys, "f")
		ok(t, f.Close())
		_, err := f.ReadAt(make([]byte, 1), 0)
		fails(t, err, fs.ErrClosed)
		_, err = f.WriteAt(make([]byte, 1), 0)
		fails(t, err, fs.ErrClosed)
		_, err = f.Size()
		fails(t, err, fs.ErrClosed)
		fails(t, f.Truncate(1), fs.ErrClosed)
		fails(t, f.Allocate(0, 1), fs.ErrClosed)
		fails(t, f.PunchHole(0, 1), fs.ErrClosed)
		fails(t, f.Datasync(), fs.ErrClosed)
		fails(t, f.WriteSync(make([]byte, 1), 0), fs.ErrClosed)
		fails(t, f.Close(), fs.ErrClosed)
		g := create(t, fsys, "g")
		page := vfs.Aligned(4096)
		ok(t, g.WriteSync(page, 0))
		ok(t, g.Close())
		fails(t, g.WriteSync(page, 0), fs.ErrClosed)
	})
}

func TestSizes(t *testing.T) {
	each(t, func(t *testing.T, fsys vfs.FS) {
		f := create(t, fsys, "f")
		defer f.Close()
		size := func(want int64) {
			t.Helper()
			if got, err := f.Size(); got != want || err != nil {
				t.Errorf("Size = %d, %v; want %d", got, err, want)
			}
		}
		write(t, f, string(bytes.Repeat([]byte{1}, 9000)), 0)
		size(9000)
		ok(t, f.Allocate(4096, 4096))
		size(9000)
		ok(t, f.Truncate(4100))
		ok(t, f.Truncate(1<<40))
		size(1 << 40)
		ok(t, f.Allocate(0, 1<<16))
		size(1 << 40)
		ok(t, f.Truncate(10000))
		ok(t, f.Allocate(10000, 1000))
		size(11000)
		ok(t, f.PunchHole(1, 4097))
		f.WriteBehind(0, 11000)
		ok(t, f.Datasync())
		f.ReadAhead(0, 11000)
		f.Evict(0, 0)
		want := make([]byte, 11000)
		want[0], want[4098], want[4099] = 1, 1, 1
		if got := contents(t, fsys, "f"); got != string(want) {
			t.Error("wrong contents after truncate, grow and punch")
		}
	})
}

// TestRandom compares random reads, writes, truncations and holes with a
// plain byte slice.
func TestRandom(t *testing.T) {
	each(t, func(t *testing.T, fsys vfs.FS) {
		rng := rand.New(rand.NewPCG(1, 2))
		f := create(t, fsys, "f")
		defer f.Close()
		var model []byte
		grow := func(n int) {
			if n > len(model) {
				model = append(model, make([]byte, n-len(model))...)
			}
		}
		for i := range 2000 {
			off, n := rng.IntN(40000), rng.IntN(9000)
			switch rng.IntN(14) {
			case 0:
				if off < len(model) {
					clear(model[off:])
					model = model[:off]
				}
				grow(off)
				ok(t, f.Truncate(int64(off)))
			case 1:
				ok(t, f.PunchHole(int64(off), int64(n)+1))
				clear(model[min(off, len(model)):min(off+n+1, len(model))])
			case 2:
				ok(t, f.Allocate(int64(off), int64(n)+1))
				grow(off + n + 1)
			case 3:
				if rng.IntN(2) == 0 {
					ok(t, f.Datasync())
				}
				f.Evict(int64(off), int64(n))
			case 4: // past the cache of the host, if it lets us
				off, n = off&^4095, n&^4095+4096
				b := vfs.Aligned(n)
				copy(b, bytes.Repeat([]byte{byte(i)}, n))
				grow(off + n)
				ok(t, f.WriteSync(b, int64(off)))
				copy(model[off:], b)
			case 5:
				b := bytes.Repeat([]byte{byte(i)}, n+1)
				grow(off + n + 1)
				ok(t, f.WriteSync(b, int64(off)))
				copy(model[off:], b)
			default:
				b := bytes.Repeat([]byte{byte(i)}, n)
				if n > 0 {
					grow(off + n)
				}
				write(t, f, string(b), int64(off))
				copy(model[min(off, len(model)):], b)
			}
			from := rng.IntN(len(model) + 1)
			b := make([]byte, rng.IntN(9000))
			k, err := f.ReadAt(b, int64(from))
			if err != nil && err != io.EOF {
				t.Fatal(err)
			}
			if want := min(len(b), len(model)-from); k != want || !bytes.Equal(b[:k], model[from:from+k]) {
				t.Fatalf("step %d: read of %d at %d gave %d bytes, or wrong ones; want %d", i, len(b), from, k, want)
			}
		}
	})
}

func TestConcurrent(t *testing.T) {
	each(t, func(t *testing.T, fsys vfs.FS) {
		f := create(t, fsys, "f")
		var wg sync.WaitGroup
		for w := range 4 {
			wg.Go(func() {
				b, got := bytes.Repeat([]byte{byte(w + 1)}, 3000), make([]byte, 3000)
				for i := range 50 {
					off := int64(i*4+w) * 3000
					if _, err := f.WriteAt(b, off); err != nil {
						t.Error(err)
					}
					if _, err := f.ReadAt(got, off); err != nil || !bytes.Equal(b, got) {
						t.Errorf("writer %d reads something else: %v", w, err)
					}
					if i%10 == 0 {
						if err := f.Datasync(); err != nil {
							t.Error(err)
						}
					}
				}
			})
		}
		wg.Wait()
		ok(t, f.Close())
	})
}

func TestDirErrors(t *testing.T) {
	_, err := vfs.OpenDir(filepath.Join(t.TempDir(), "none"))
	fails(t, err, fs.ErrNotExist)
	file := filepath.Join(t.TempDir(), "file")
	ok(t, os.WriteFile(file, nil, 0o600))
	if d, err := vfs.CreateDir(file); err == nil {
		t.Errorf("a file opened as the directory %v", d)
	}
	_, err = vfs.CreateDir(filepath.Join(file, "sub"))
	fails(t, err, syscall.ENOTDIR)
}

func TestRemoveDir(t *testing.T) {
	d := newDir(t)
	ok(t, create(t, d, "f").Close())
	ok(t, vfs.RemoveDir(d.Path()))
	if got := list(t, d); len(got) != 1 {
		t.Errorf("a directory that is not empty holds %v after RemoveDir", got)
	}
	ok(t, d.Remove("f"))
	l, err := d.Lock()
	ok(t, err)
	fails(t, vfs.RemoveDir(d.Path()), vfs.ErrLocked)
	ok(t, l.Close())
	ok(t, vfs.RemoveDir(d.Path()))
	_, err = os.Stat(d.Path())
	fails(t, err, fs.ErrNotExist)
}

// The root of a mounted file system cannot be removed, and need not be.
func TestRemoveMountPoint(t *testing.T) {
	d := newDir(t)
	if err := syscall.Mount("none", d.Path(), "tmpfs", 0, "size=64k"); errors.Is(err, syscall.EPERM) {
		t.Skip("mounting is not permitted")
	} else if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { ok(t, syscall.Unmount(d.Path(), 0)) })
	ok(t, vfs.RemoveDir(d.Path()))
	_, err := os.Stat(d.Path())
	ok(t, err)
}

// TestDirSpace checks that Allocate takes host space and PunchHole gives it
// back, where the file system can.
func TestDirSpace(t *testing.T) {
	d := newDir(t)
	f := create(t, d, "f")
	defer f.Close()
	blocks := func() int64 {
		var st syscall.Stat_t
		ok(t, syscall.Stat(filepath.Join(d.Path(), "f"), &st))
		return st.Blocks * 512
	}
	if free, err := d.Free(); free <= 0 || err != nil {
		t.Fatalf("Free = %d, %v", free, err)
	}
	ok(t, f.Allocate(0, 1<<20))
	if got := blocks(); got < 1<<20 {
		t.Errorf("%d bytes of host space after Allocate", got)
	}
	before := blocks()
	ok(t, f.PunchHole(0, 1<<19))
	if got := blocks(); got > before {
		t.Errorf("%d bytes of host space after PunchHole, %d before", got, before)
	}
}

func TestDirFull(t *testing.T) {
	f := create(t, newDir(t), "f")
	defer f.Close()
	write(t, f, "kept", 0)
	var host syscall.Statfs_t
	ok(t, syscall.Statfs(t.TempDir(), &host))
	// More than any host has, less than any file may be.
	if err := f.Allocate(0, int64(host.Blocks)*host.Bsize+(1<<30)); !errors.Is(err, syscall.ENOSPC) && !errors.Is(err, syscall.EFBIG) {
		t.Fatalf("Allocate of more than the host has: %v", err)
	}
	if size, err := f.Size(); size != 4 || err != nil {
		t.Errorf("Size = %d, %v after a failed Allocate; want 4", size, err)
	}
}
