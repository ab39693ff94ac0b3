package cow

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"sync"
	"syscall"
	"testing"

	"coppice/internal/vfs"
)

// faultKinds excludes what a fault sweep does itself.
var notInFaultRuns = map[string]bool{"crash": true, "midcrash": true, "kill": true, "reopen": true, "check": true, "scrub": true}

// faultRun runs operations until the first one fails, then takes the power
// away, or only the process, and expects everything acknowledged to be there.
func faultRun(f *vfs.Fault, ops []op, seed uint64) (err error) {
	rng := rand.New(rand.NewPCG(seed, 9))
	w, err := newWorld(tinyOptions())
	if err != nil {
		return err
	}
	defer w.abandon()
	if err := w.s.Close(); err != nil {
		return err
	}
	w.use(w.mem)
	var mu sync.Mutex // syncs fail in several goroutines
	choose := func(n int) int {
		mu.Lock()
		defer mu.Unlock()
		return rng.IntN(n)
	}
	w.inj = vfs.NewInject(w.mem, choose, f.Hook)
	if w.s, err = Open(context.Background(), w.inj, w.opts); err != nil {
		w.s = nil
		return expected(err)
	}
	for i, o := range ops {
		err := w.step(o)
		if err == nil {
			continue
		}
		if err := expected(err); err != nil {
			return fmt.Errorf("operation %d, %+v: %w", i, o, err)
		}
		break
	}
	if failed := w.s.Failed(); failed != nil {
		if _, err := w.s.Create(context.Background(), ID{255}, 0, nil); !errors.Is(err, ErrFailed) {
			return fmt.Errorf("create on a failed store: %v", err)
		}
	}
	m := w.mem.Kill()
	if choose(2) == 0 {
		m = w.mem.Crash(choose)
	}
	w.crashed.Store(m)
	if err := w.recoverFrom(w.maybe); err != nil {
		return fmt.Errorf("after the fault: %w", err)
	}
	return nil
}

// expected returns nil for the errors that an injected fault may cause.
func expected(err error) error {
	if errors.Is(err, syscall.EIO) || errors.Is(err, ErrFailed) || errors.Is(err, ErrNoSpace) || errors.Is(err, syscall.ENOSPC) {
		return nil
	}
	return err
}

// TestFaultSweep fails every call of a run in turn, in every way it can fail.
func TestFaultSweep(t *testing.T) {
	kinds := []struct {
		name string
		ops  []vfs.Op
		err  error
	}{
		{"EIO", nil, &fs.PathError{Op: "io", Err: syscall.EIO}},
		{"ENOSPC", []vfs.Op{vfs.OpWrite, vfs.OpAllocate, vfs.OpCreate}, syscall.ENOSPC},
		{"short", []vfs.Op{vfs.OpWrite}, &vfs.ShortWrite{N: 700, Err: syscall.EIO}},
		{"sync", []vfs.Op{vfs.OpDatasync, vfs.OpSyncDir}, syscall.EIO},
	}
	for _, k := range kinds {
		t.Run(k.name, func(t *testing.T) {
			for seed := range uint64(3) {
				rng := rand.New(rand.NewPCG(seed, 8))
				var ops []op
				for _, o := range randomOps(rng, 60) {
					if !notInFaultRuns[o.kind] {
						ops = append(ops, o)
					}
				}
				step := 1
				if k.ops == nil || testing.Short() {
					step = 3
				}
				for n := 1; ; n += step {
					f := &vfs.Fault{Ops: k.ops, Nth: n, Err: k.err}
					if err := faultRun(f, ops, seed<<32+uint64(n)); err != nil {
						t.Fatalf("seed %d, call %d: %v", seed, n, err)
					}
					if f.Calls() < n {
						break
					}
				}
			}
		})
	}
}
