package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// contestant is one way to do a job.
type contestant struct {
	name string
	// bytes that it moves, 0 where a rate would say nothing.
	bytes int64
	run   func(ctx context.Context) error
	// clean removes what run left behind; it is not timed.
	clean func() error
}

// compare runs the contestants in turn, one warm-up round and then the
// counted ones, and prints a row for each: the median time, the rate, the
// processor time of everybody who takes part, and the median over the rounds of
// the first one's speed relative to it.
func compare(ctx context.Context, cfg config, title string, cs ...contestant) error {
	times, cpus := make([][]time.Duration, len(cs)), make([][]time.Duration, len(cs))
	for round := range cfg.rounds + 1 {
		for i, c := range cs {
			before, err := spent()
			if err != nil {
				return err
			}
			start := time.Now()
			if err := c.run(ctx); err != nil {
				return fmt.Errorf("%s: %w", c.name, err)
			}
			elapsed := time.Since(start)
			after, err := spent()
			if err != nil {
				return err
			}
			if c.clean != nil {
				if err := c.clean(); err != nil {
					return fmt.Errorf("%s: %w", c.name, err)
				}
			}
			unix.Sync() // nobody pays for the dirty pages of the one before
			if round > 0 {
				times[i] = append(times[i], elapsed)
				cpus[i] = append(cpus[i], after-before)
			}
		}
	}
	fmt.Printf("\n%s\n", title)
	fmt.Printf("  %-44s %12s %12s %10s   %s\n", "", "median", "rate", "CPU", "speed of "+cs[0].name+" against it")
	for i, c := range cs {
		rate := ""
		if c.bytes > 0 {
			rate = fmt.Sprintf("%.0f MB/s", float64(c.bytes)/median(times[i]).Seconds()/1e6)
		}
		ratio := ""
		if i > 0 {
			ratio = fmt.Sprintf("%.2fx", medianRatio(times[i], times[0]))
		}
		fmt.Printf("  %-44s %12s %12s %10s   %s\n", c.name, round(median(times[i])), rate, round(median(cpus[i])), ratio)
	}
	return nil
}

// spent is the processor time so far of the bench itself, which is the client
// and the limit, and of all processes that it has started. On a busy machine it
// says more than the time that has passed.
func spent() (time.Duration, error) {
	var sum time.Duration
	for _, who := range []int{unix.RUSAGE_SELF, unix.RUSAGE_CHILDREN} { // the latter of those that have ended
		var u unix.Rusage
		if err := unix.Getrusage(who, &u); err != nil {
			return 0, err
		}
		sum += time.Duration(u.Utime.Nano() + u.Stime.Nano())
	}
	lists, err := filepath.Glob("/proc/self/task/*/children")
	if err != nil {
		return 0, err
	}
	for _, list := range lists {
		children, err := os.ReadFile(list)
		if errors.Is(err, fs.ErrNotExist) {
			continue // the thread has ended
		}
		if err != nil {
			return 0, err
		}
		for pid := range strings.FieldsSeq(string(children)) {
			n, err := strconv.Atoi(pid)
			if err != nil {
				return 0, err
			}
			cpu, err := cpuTime(n)
			if err != nil {
				return 0, err
			}
			sum += cpu
		}
	}
	return sum, nil
}

func round(d time.Duration) time.Duration {
	switch {
	case d > time.Second:
		return d.Round(10 * time.Millisecond)
	case d > 10*time.Millisecond:
		return d.Round(100 * time.Microsecond)
	default:
		return d.Round(time.Microsecond)
	}
}

func median(ds []time.Duration) time.Duration {
	s := slices.Sorted(slices.Values(ds))
	return s[len(s)/2]
}

// medianRatio is the median over the rounds of a/b.
func medianRatio(a, b []time.Duration) float64 {
	rs := make([]float64, len(a))
	for i := range a {
		rs[i] = float64(a[i]) / float64(b[i])
	}
	slices.Sort(rs)
	return rs[len(rs)/2]
}

// command is a contestant's run that is a whole process.
func command(name string, args ...string) func(context.Context) error {
	return func(ctx context.Context) error {
		out, err := exec.CommandContext(ctx, name, args...).CombinedOutput()
		if err != nil {
			return fmt.Errorf("%s %s: %w: %s", name, strings.Join(args, " "), err, out)
		}
		return nil
	}
}

// remove is a contestant's clean.
func remove(path string) func() error {
	return func() error { return os.Remove(path) }
}
