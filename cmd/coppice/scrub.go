package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"math"
	"os"
	"os/signal"
	"syscall"
	"time"

	"golang.org/x/term"

	"coppice/internal/cow"
	"coppice/internal/vfs"
)

// scrub reads everything in stores that nobody has open, writes anew what has
// a good copy, and prints the ranges of disks that cannot be read.
func scrub(ctx context.Context, e env, args []string) error {
	ctx, unhook := signal.NotifyContext(ctx, os.Interrupt, syscall.SIGTERM)
	defer unhook()
	flags := flag.NewFlagSet("scrub", flag.ContinueOnError)
	place := dataFlag(flags)
	rate := flags.Float64("rate", 0, "read no more than this many `MiB/s` on average; 0 means no bound")
	if err := parse(e, flags, args, -1); err != nil {
		return err
	}
	if math.IsNaN(*rate) || *rate < 0 || *rate > 1<<20 {
		return fmt.Errorf("--rate %v is not a number of MiB/s", *rate)
	}
	return e.eachStore(ctx, *place, flags.Args(), func(ctx context.Context, path string) (int, error) {
		return scrubStore(ctx, e, path, int64(math.Ceil(*rate*(1<<20))))
	})
}

// scrubStore scrubs the store in one directory and returns the number of
// ranges and other things that are damaged, all of them printed.
func scrubStore(ctx context.Context, e env, path string, rate int64) (damaged int, err error) {
	dir, err := vfs.OpenDir(path)
	if err != nil {
		return 0, err
	}
	defer func() { err = errors.Join(err, dir.Close()) }()
	store, err := cow.Open(ctx, dir, cow.Options{})
	if err != nil {
		return 0, err
	}
	defer func() { err = errors.Join(err, store.Close()) }()
	bar := newProgress(e.stderr, path)
	for p, err := range ranges(store.Scrub(ctx, cow.ScrubOptions{BytesPerSecond: rate, Progress: bar.show})) {
		if err != nil {
			return damaged, err
		}
		bar.clear()
		fmt.Fprintf(e.stdout, "%s: %s\n", path, p)
		if p.Done == "" {
			damaged++
		}
	}
	bar.clear()
	if damaged == 0 {
		fmt.Fprintf(e.stdout, "%s: all of it can be read\n", path)
	}
	return damaged, nil
}

// progress is a line on a terminal that says how far something has come.
type progress struct {
	w     io.Writer // nil when it is no terminal
	what  string
	shown time.Time
}

func newProgress(w io.Writer, what string) *progress {
	if f, ok := w.(*os.File); !ok || !term.IsTerminal(int(f.Fd())) {
		return &progress{}
	}
	return &progress{w: w, what: what}
}

// show replaces the line, a few times a second.
func (p *progress) show(done, total int64) {
	if p.w == nil || time.Since(p.shown) < 200*time.Millisecond {
		return
	}
	p.shown = time.Now()
	fmt.Fprintf(p.w, "\r\x1b[K%s: %d of %d MiB", p.what, done>>20, total>>20)
}

func (p *progress) clear() {
	if p.w != nil {
		fmt.Fprint(p.w, "\r\x1b[K")
	}
}
