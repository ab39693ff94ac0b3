package cow

import (
	"context"
	"math/rand/v2"
	"runtime"
	"sync"
	"sync/atomic"
	"testing"

	"coppice/internal/vfs"
)

// TestCrashUnderLoad takes the power away again and again while writers write
// and flush, snapshots are taken and checkpoints made, all at the same time.
// Each writer owns a unit and writes rising numbers; what it had flushed
// before a crash must be there after it.
func TestCrashUnderLoad(t *testing.T) {
	ctx := context.Background()
	const writers, rounds, maxCrashes = 5, 400, 300
	type crash struct {
		m         *vfs.Mem
		low, high [writers]uint64
		snaps     uint64
	}
	var (
		mu      sync.Mutex // guards rng, calls and crashes
		rng     = rand.New(rand.NewPCG(6, 6))
		calls   int
		crashes []crash

		begun, flushed [writers]atomic.Uint64
		snaps          atomic.Uint64
		armed          atomic.Bool
	)
	m := vfs.NewMem(0)
	counts := func(a *[writers]atomic.Uint64) (n [writers]uint64) {
		for i := range n {
			n[i] = a[i].Load()
		}
		return n
	}
	hook := func(vfs.Call) error {
		if !armed.Load() {
			return nil
		}
		for range 10 { // a device takes its time, in which others go on
			runtime.Gosched()
		}
		mu.Lock()
		defer mu.Unlock()
		if calls++; calls%11 != 0 || len(crashes) >= maxCrashes {
			return nil
		}
		c := crash{low: counts(&flushed), snaps: snaps.Load()}
		if c.m = m.Kill(); rng.IntN(4) > 0 {
			c.m = m.Crash(rng.IntN)
		}
		c.high = counts(&begun)
		crashes = append(crashes, c)
		return nil
	}
	s, err := Create(ctx, vfs.NewInject(m, nil, hook), tinyOptions())
	if err != nil {
		t.Fatal(err)
	}
	base := ID{1}
	u := tiny.UnitSize
	if _, err := s.Create(ctx, base, int64(2*writers*u), nil); err != nil {
		t.Fatal(err)
	}
	d, err := s.OpenDisk(ctx, base, Live)
	if err != nil {
		t.Fatal(err)
	}
	armed.Store(true)
	var wg, others sync.WaitGroup
	for i := range writers {
		wg.Go(func() {
			b := make([]byte, u)
			for n := uint64(1); n <= rounds; n++ {
				stamp(b, n)
				begun[i].Store(n)
				if _, err := d.WriteAt(b, int64(i*u)); err != nil {
					t.Error(err)
					return
				}
				if n%2 == 0 {
					for range n % 7 { // others may seal what is open
						runtime.Gosched()
					}
					if err := d.Flush(ctx); err != nil {
						t.Error(err)
						return
					}
					flushed[i].Store(n)
				}
			}
		})
	}
	stop := make(chan struct{})
	loop := func(f func(n uint64) error) {
		others.Go(func() {
			for n := uint64(1); ; n++ {
				select {
				case <-stop:
					return
				default:
				}
				if err := f(n); err != nil {
					t.Error(err)
					return
				}
			}
		})
	}
	loop(func(uint64) error { return s.sync(ctx) })
	loop(func(uint64) error {
		for _, v := range s.changedVolumes() {
			s.writeOut(v)
		}
		runtime.Gosched()
		return nil
	})
	loop(func(n uint64) error { // too large for a frame
		p := []Pair{{base, ID{4}, noise(4 << 10)}, {base, ID{5}, noise(4 << 10)}, {base, ID{6}, noise(4 << 10)}}
		if _, err := s.Snapshot(ctx, p); err != nil {
			return err
		}
		for _, p := range p {
			if err := s.Delete(ctx, p.New); err != nil {
				return err
			}
		}
		return nil
	})
	loop(func(n uint64) error {
		if n > 60 { // more of them, which nobody asks for after the crash
			if _, err := s.Snapshot(ctx, []Pair{{Src: base, New: ID{3}}}); err != nil {
				return err
			}
			return s.Delete(ctx, ID{3})
		}
		_, err := s.Snapshot(ctx, []Pair{{Src: base, New: ID{2, byte(n)}}})
		if err == nil {
			snaps.Store(n)
		}
		return err
	})
	wg.Wait()
	close(stop)
	others.Wait()
	armed.Store(false)
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	for i, c := range crashes {
		if err := checkClean(c.m); err != nil {
			t.Fatalf("crash %d: %v", i, err)
		}
		s, err := Open(ctx, c.m, tinyOptions())
		if err != nil {
			t.Fatalf("crash %d: %v", i, err)
		}
		d, err := s.OpenDisk(ctx, base, Live)
		if err != nil {
			t.Fatal(err)
		}
		got := make([]byte, writers*u)
		if _, err := d.ReadAt(got, 0); err != nil {
			t.Fatal(err)
		}
		for k := range writers {
			n, err := readStamp(got[k*u : (k+1)*u])
			if err != nil || n < c.low[k] || n > c.high[k] {
				t.Fatalf("crash %d: writer %d has %d, had flushed %d and begun %d (%v)", i, k, n, c.low[k], c.high[k], err)
			}
		}
		for n := uint64(1); n <= c.snaps; n++ {
			if _, err := s.Stat(ctx, ID{2, byte(n)}); err != nil {
				t.Fatalf("crash %d: snapshot %d of %d: %v", i, n, c.snaps, err)
			}
		}
		if err := s.Close(); err != nil {
			t.Fatal(err)
		}
		if err := checkClean(c.m); err != nil {
			t.Fatalf("crash %d, after recovery: %v", i, err)
		}
	}
	if len(crashes) < 20 {
		t.Errorf("only %d crashes", len(crashes))
	}
}
