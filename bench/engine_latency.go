package main

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"time"

	"coppice/internal/cow"
)

// disturbance is work that goes on beside the writes of a client.
type disturbance struct {
	name    string
	prepare func(context.Context) error // not measured; nil for none
	run     func(context.Context) error
	report  func() // nil for none
}

// latencies compares how long flushed writes of one client take while the
// store is quiet and while it does something else.
func (b *engineBench) latencies(ctx context.Context, cfg config) error {
	fg := &foreground{size: 64 * mib}
	var err error
	if _, fg.disk, err = b.create(ctx, fg.size); err != nil {
		return err
	}
	if err := sequential(ctx, fg.disk, fg.size, true); err != nil {
		return err
	}
	deletion, err := b.deletion(ctx, cfg.rounds)
	if err != nil {
		return err
	}
	scrub := func(ctx context.Context) error {
		for p, err := range b.store.Scrub(ctx, cow.ScrubOptions{}) {
			if err == nil {
				err = errors.New(p.String())
			}
			return err
		}
		return nil
	}
	for _, d := range []disturbance{
		deletion,
		{name: "a checkpoint of 20,000 random writes", prepare: func(ctx context.Context) error {
			return random(ctx, b.disk, b.size, 20_000, 1, true, false)
		}, run: b.checkpoint},
		{name: "a scrub, as fast as it can", run: scrub},
	} {
		if err := fg.measure(ctx, cfg, d); err != nil {
			return fmt.Errorf("%s: %w", d.name, err)
		}
	}
	return nil
}

// deletion prepares the delete of one snapshot out of ten thousand, one for
// each round, that has 256 MiB of its own.
func (b *engineBench) deletion(ctx context.Context, rounds int) (disturbance, error) {
	const total, own = 10_000, 256 * mib
	var victims []cow.ID
	p := make([]byte, block)
	for i := range total {
		var err error
		special := i%(total/(rounds+1)) == total/(rounds+1)/2 && len(victims) < rounds
		if special { // what it alone has is written before, and again after it
			err = sequential(ctx, b.disk, own, true)
		} else {
			noise(p)
			_, err = b.disk.WriteAt(p, int64(i)*7919%(b.size/block)*block)
		}
		if err != nil {
			return disturbance{}, err
		}
		id, err := b.snapshot(ctx, b.id)
		if err != nil {
			return disturbance{}, err
		}
		if special {
			victims = append(victims, id)
			if err := sequential(ctx, b.disk, own, true); err != nil {
				return disturbance{}, err
			}
		}
	}
	var acks, frees []time.Duration
	return disturbance{
		name: "the delete of one snapshot of 10,000, with 256 MiB of its own",
		run: func(ctx context.Context) error {
			before := b.store.Usage().Used
			start := time.Now()
			if err := b.store.Delete(ctx, victims[0]); err != nil {
				return err
			}
			victims = victims[1:]
			acks = append(acks, time.Since(start))
			for b.store.Usage().Used > before-own*9/10 && ctx.Err() == nil {
				time.Sleep(time.Millisecond)
			}
			frees = append(frees, time.Since(start))
			return ctx.Err()
		},
		report: func() {
			f := median(frees)
			fmt.Printf("  acknowledged after %v, space back after %v: %.0f MB/s\n", round(median(acks)), round(f), own/f.Seconds()/1e6)
		},
	}, nil
}

// foreground is a client that writes one block after the other and flushes
// each.
type foreground struct {
	disk engineDisk
	size int64
}

// until writes until stop reports true, which is asked with the number of
// writes so far, and returns how long each took, in ascending order.
func (fg *foreground) until(ctx context.Context, stop func(n int) bool) ([]time.Duration, error) {
	var times []time.Duration
	p := make([]byte, block)
	for !stop(len(times)) {
		noise(p)
		off := rand.Int64N(fg.size/block) * block
		start := time.Now()
		if _, err := fg.disk.WriteAt(p, off); err != nil {
			return nil, err
		}
		if err := fg.disk.flush(ctx); err != nil {
			return nil, err
		}
		times = append(times, time.Since(start))
	}
	slices.Sort(times)
	return times, nil
}

// measure alternates quiet rounds with disturbed ones and prints percentiles.
// A disturbed round lasts as long as the disturbance.
func (fg *foreground) measure(ctx context.Context, cfg config, d disturbance) error {
	const quiet = 1500
	var all [2][]time.Duration
	var ratios []float64
	for range cfg.rounds {
		if d.prepare != nil {
			if err := d.prepare(ctx); err != nil {
				return err
			}
		}
		alone, err := fg.until(ctx, func(n int) bool { return n == quiet })
		if err != nil {
			return err
		}
		ended := make(chan error, 1)
		go func() { ended <- d.run(ctx) }()
		over := false
		var derr error
		beside, err := fg.until(ctx, func(n int) bool {
			if !over {
				select {
				case derr = <-ended:
					over = true
				default:
				}
			}
			return over && n > 0
		})
		if !over {
			derr = <-ended
		}
		if err := errors.Join(err, derr); err != nil {
			return err
		}
		all[0], all[1] = append(all[0], alone...), append(all[1], beside...)
		ratios = append(ratios, float64(percentile(beside, 99))/float64(percentile(alone, 99)))
	}
	fmt.Printf("\n4 KiB write and flush beside %s\n", d.name)
	fmt.Printf("  %-44s %10s %10s %10s %10s\n", "", "writes", "p50", "p99", "longest")
	for i, name := range []string{"quiet", "meanwhile"} {
		slices.Sort(all[i])
		fmt.Printf("  %-44s %10d %10s %10s %10s\n", name, len(all[i]), round(percentile(all[i], 50)), round(percentile(all[i], 99)), round(all[i][len(all[i])-1]))
	}
	slices.Sort(ratios)
	fmt.Printf("  p99 meanwhile is %.1f times the quiet one, the median of %d rounds\n", ratios[len(ratios)/2], len(ratios))
	if d.report != nil {
		d.report()
	}
	return nil
}

// percentile of ascending times.
func percentile(sorted []time.Duration, p int) time.Duration {
	return sorted[min(len(sorted)-1, len(sorted)*p/100)]
}
