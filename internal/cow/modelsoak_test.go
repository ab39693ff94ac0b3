package cow

import (
	"flag"
	"math/rand/v2"
	"runtime"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

var manyOps = flag.Int64("cow.manyops", 0, "operations of TestModelManyRuns; 0 is the ordinary number")

// TestModelManyRuns is TestModel at length: runs on all processors, each with a
// random geometry of limits, until there have been enough operations. Together
// with TestModel they are 100,000 in an ordinary run.
func TestModelManyRuns(t *testing.T) {
	t.Parallel()
	want := *manyOps
	switch {
	case want > 0:
	case invariants:
		want = 8000
	default:
		want = 86_000
	}
	var end time.Time
	if *soakTime > 0 {
		end = time.Now().Add(*soakTime)
	}
	first := *modelSeed
	if first == 0 {
		first = uint64(time.Now().UnixNano())
	}
	t.Logf("-cow.seed=%d", first)
	var next atomic.Uint64
	var done atomic.Int64
	var wg sync.WaitGroup
	for range runtime.GOMAXPROCS(0) {
		wg.Go(func() {
			for !t.Failed() {
				if end.IsZero() && done.Load() >= want || !end.IsZero() && time.Now().After(end) {
					return
				}
				seed := first + next.Add(1) - 1
				rng := rand.New(rand.NewPCG(seed, 11))
				o := tinyOptions()
				if rng.IntN(3) == 0 {
					o.MaxBytes = int64(5+rng.IntN(6)) * tiny.regionBytes()
				}
				if rng.IntN(4) == 0 {
					o.Limits.Entries = 40
				}
				o.FirstFit = rng.IntN(4) > 0
				o.Limits.Chain = 1 + rng.IntN(5)
				o.Limits.ReapPages = 1 + rng.IntN(12)
				o.LogBytes += int64(rng.IntN(24)) * int64(tiny.UnitSize)
				ops := randomOps(rng, 60+rng.IntN(200))
				if err := run(o, ops); err != nil {
					small := shrink(o, ops, time.Now().Add(20*time.Second))
					for _, o := range small {
						t.Logf("%+v", o)
					}
					t.Errorf("-cow.seed=%d: %v\noptions %+v\nshrunk to %d operations: %v", seed, err, o, len(small), run(o, small))
				}
				done.Add(int64(len(ops)))
			}
		})
	}
	wg.Wait()
	t.Logf("%d operations in %d runs", done.Load(), next.Load())
}
