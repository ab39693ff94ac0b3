package cow

import (
	"context"
	"errors"
	"os"
	"testing"

	engine "coppice/internal/cow"
	"coppice/internal/storage/storagetest"
	"coppice/internal/vfs"
)

// fixture is a store on a directory that can be reopened and crashed.
type fixture struct {
	storagetest.Fixture
	t    storagetest.TB
	fs   vfs.FS
	opts engine.Options
}

// open opens the store in f.fs into f.Repo.
func (f *fixture) open() {
	f.t.Helper()
	r, err := openStore(context.Background(), f.fs, f.opts, f.Repo == nil)
	if err != nil {
		f.t.Fatalf("open: %v", err)
	}
	f.Repo = r
}

func (f *fixture) close() {
	f.t.Helper()
	if err := f.Repo.Close(); err != nil {
		f.t.Errorf("close: %v", err)
	}
}

// onMem returns fixtures in memory, which can crash.
func onMem(o engine.Options) storagetest.Open {
	return func(t storagetest.TB) *storagetest.Fixture {
		t.Helper()
		mem := vfs.NewMem(0)
		f := &fixture{t: t, fs: mem, opts: o}
		f.open()
		f.Reopen = func() {
			f.close()
			f.open()
		}
		f.Crash = func(choose func(n int) int) {
			old := f.Repo
			mem = mem.Crash(choose)
			f.fs = mem
			_ = old.Close() // ends its goroutines; what it writes goes nowhere
			f.open()
		}
		t.Cleanup(func() {
			f.close()
			f.check()
		})
		return &f.Fixture
	}
}

// check recounts the closed store.
func (f *fixture) check() {
	f.t.Helper()
	for p, err := range engine.Check(context.Background(), f.fs) {
		if err != nil {
			f.t.Fatalf("check: %v", err)
		}
		f.t.Errorf("check: %v", p)
	}
}

// onDir returns fixtures in directories of the host.
func onDir(t storagetest.TB) *storagetest.Fixture {
	t.Helper()
	path, err := os.MkdirTemp("", "coppice-cow-")
	if err != nil {
		t.Fatalf("%v", err)
	}
	dir, err := vfs.OpenDir(path)
	if err != nil {
		t.Fatalf("%v", err)
	}
	f := &fixture{t: t, fs: dir}
	f.open()
	f.Reopen = func() {
		f.close()
		f.open()
	}
	t.Cleanup(func() {
		f.close()
		f.check()
		if err := errors.Join(dir.Close(), os.RemoveAll(path)); err != nil {
			t.Errorf("%v", err)
		}
	})
	return &f.Fixture
}

// tiny is a geometry in which every boundary is a few units away.
func tiny() engine.Options {
	return engine.Options{
		Geometry: engine.Geometry{UnitSize: 4096, Fanout: 4, PageCounters: 8, RegionsPerFile: 3},
		Limits:   engine.Limits{Buffers: 64 << 10, Entries: 200, PageCache: 32 << 10, DirectMin: 16 << 10, Chain: 3, ReapPages: 5},
		FirstFit: true,
	}
}

func TestSuite(t *testing.T)      { storagetest.Run(t, onMem(engine.Options{})) }
func TestSuiteOnDir(t *testing.T) { storagetest.Run(t, onDir) }
func TestModel(t *testing.T)      { storagetest.Model(t, onMem(engine.Options{})) }
func TestModelTiny(t *testing.T)  { storagetest.Model(t, onMem(tiny())) }

func BenchmarkDriver(b *testing.B) { storagetest.Bench(b, onDir) }
