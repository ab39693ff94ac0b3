package cow

import (
	"flag"
	"math/rand/v2"
	"slices"
	"testing"
	"time"
)

var (
	modelRuns = flag.Int("cow.runs", 120, "random runs of TestModel")
	modelOps  = flag.Int("cow.ops", 120, "operations of a run of TestModel")
	modelSeed = flag.Uint64("cow.seed", 0, "seed of the first run of TestModel; 0 takes the time")
)

// shrink removes operations as long as the run still fails.
func shrink(o Options, ops []op, deadline time.Time) []op {
	for n := len(ops) / 2; n > 0; n /= 2 {
		for i := 0; i+n <= len(ops) && time.Now().Before(deadline); {
			less := slices.Delete(slices.Clone(ops), i, i+n)
			if run(o, less) != nil {
				ops = less
			} else {
				i += n
			}
		}
	}
	return ops
}

// TestModel compares random operations, crashes among them, with a model of
// byte slices.
func TestModel(t *testing.T) {
	seed := *modelSeed
	if seed == 0 {
		seed = uint64(time.Now().UnixNano())
	}
	for i := range uint64(*modelRuns) {
		rng := rand.New(rand.NewPCG(seed+i, 0))
		o := tinyOptions()
		if i%3 == 1 {
			o.MaxBytes = int64(5+rng.IntN(6)) * tiny.regionBytes()
		}
		if i%4 == 3 {
			o.Limits.Entries = 40
		}
		ops := randomOps(rng, *modelOps)
		if err := run(o, ops); err != nil {
			small := shrink(o, ops, time.Now().Add(20*time.Second))
			for _, o := range small {
				t.Logf("%+v", o)
			}
			t.Fatalf("-cow.seed=%d: %v\nshrunk to %d operations: %v", seed+i, err, len(small), run(o, small))
		}
	}
}
