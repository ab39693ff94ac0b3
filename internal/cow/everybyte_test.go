package cow

import (
	"bytes"
	"context"
	"flag"
	"fmt"
	"math/rand/v2"
	"runtime"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"coppice/internal/vfs"
)

var rotEvery = flag.Bool("cow.everybyte", false, "TestEveryByte flips every byte, not a sample")

// rotten is a small store that was not closed: its newest state is in the
// log, volumes share trees, and something waits to be reaped.
type rotten struct {
	mem       *vfs.Mem
	data      map[ID][]byte // contents of the volumes
	before    map[ID][]byte // and before the last frame of the log
	lastFrame [2]int64      // bytes of the log
}

func makeRotten(tb testing.TB) *rotten {
	tb.Helper()
	ctx := context.Background()
	o := tinyOptions()
	o.Geometry.PageCounters = 4 // regions of 32 KiB, to stay small
	o.MaxBytes = 6 * o.Geometry.regionBytes()
	w, err := newWorld(o)
	if err != nil {
		tb.Fatal(err)
	}
	rng := rand.New(rand.NewPCG(8, 8))
	do := func(kinds ...string) {
		tb.Helper()
		for _, kind := range kinds {
			o := op{kind, rng.Uint32(), rng.Uint32(), rng.Uint32(), rng.Uint64()}
			if kind == "create" {
				o.a = o.a%4 + 4
			}
			if err := w.step(o); err != nil {
				tb.Fatal(kind, err)
			}
		}
	}
	do("create", "big", "write", "snapshot", "write", "attrs", "create", "big", "clone", "write", "zero", "flush", "sync",
		"snapshot", "write", "delete", "write", "flush", "write", "attrs", "flush")
	contents := func() map[ID][]byte {
		c := map[ID][]byte{}
		for id, m := range w.vols {
			if d, err := w.disk(m); err != nil {
				tb.Fatal(err)
			} else if err := d.Flush(ctx); err != nil {
				tb.Fatal(err)
			}
			c[id] = bytes.Clone(m.data)
		}
		return c
	}
	r := &rotten{before: contents()}
	m := w.pick(0, writableN)
	d, err := w.disk(m)
	if err != nil {
		tb.Fatal(err)
	}
	p := noise(tiny.UnitSize)
	copy(m.data, p)
	if _, err := d.WriteAt(p, 0); err != nil {
		tb.Fatal(err)
	}
	head := w.s.log.next(w.s.log.head)
	if err := d.Flush(ctx); err != nil {
		tb.Fatal(err)
	}
	r.lastFrame = [2]int64{int64(head.off), int64(w.s.log.head.off)}
	if r.lastFrame[0] >= r.lastFrame[1] {
		tb.Fatal("the flush wrote no frame")
	}
	r.data, r.mem = contents(), w.mem.Kill()
	if err := w.s.Close(); err != nil {
		tb.Fatal(err)
	}
	return r
}

// try flips bits of one byte and uses the store. The last frame of the log is
// the one place where damage looks like a power cut: what was in it may be
// missing, whole.
func (r *rotten) try(name string, off int64, bits byte) error {
	use := func(want map[ID][]byte) (err error) {
		defer func() {
			if p := recover(); p != nil {
				err = fmt.Errorf("panic: %v", p)
			}
		}()
		c := r.mem.Kill()
		if err := flip(c, name, off, bits); err != nil {
			return err
		}
		_ = checkClean(c) // must return
		return useDamaged(c, want)
	}
	err := use(r.data)
	if err != nil && name == logName && off >= r.lastFrame[0] && off < r.lastFrame[1] {
		err = use(r.before)
	}
	if err != nil {
		return fmt.Errorf("%s, byte %d, bits %#x: %w", name, off, bits, err)
	}
	return nil
}

// TestEveryByte damages one byte of a store at a time: what can be read is
// right, everything else is refused. With -cow.everybyte, or a soak, it is
// every byte.
func TestEveryByte(t *testing.T) {
	t.Parallel()
	r := makeRotten(t)
	if err := checkClean(r.mem.Kill()); err != nil {
		t.Fatal(err)
	}
	names, err := r.mem.List()
	if err != nil {
		t.Fatal(err)
	}
	type place struct {
		name string
		off  int64
	}
	var all []place
	for _, name := range names {
		f, err := r.mem.Open(name)
		if err != nil {
			t.Fatal(err)
		}
		size, err := f.Size()
		if err != nil {
			t.Fatal(err)
		}
		for off := range size {
			all = append(all, place{name, off})
		}
	}
	if len(all) > 256<<10 {
		t.Errorf("the store has %d bytes", len(all))
	}
	seed := uint64(time.Now().UnixNano())
	rng := rand.New(rand.NewPCG(seed, 1))
	rng.Shuffle(len(all), func(i, j int) { all[i], all[j] = all[j], all[i] })
	var end time.Time
	n := len(all)
	switch {
	case *soakTime > 0:
		end = time.Now().Add(*soakTime)
	case *rotEvery:
	case invariants:
		n = 300
	default:
		n = 1500
	}
	var next, flips atomic.Int64
	var wg sync.WaitGroup
	for range runtime.GOMAXPROCS(0) {
		wg.Go(func() {
			for {
				i := int(next.Add(1)) - 1
				if i >= n || t.Failed() || !end.IsZero() && time.Now().After(end) {
					return
				}
				bits := byte(1 + (seed+uint64(i))%255)
				if err := r.try(all[i].name, all[i].off, bits); err != nil {
					t.Error(err)
				}
				flips.Add(1)
			}
		})
	}
	wg.Wait()
	t.Logf("%d flips in a store of %d bytes", flips.Load(), len(all))
}
