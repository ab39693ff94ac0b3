package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"coppice/internal/cow"
	"coppice/internal/vfs"
)

// crashWriter is the argument that makes the program the writer that benchOpen
// kills; the directory of the store follows it.
const crashWriter = "write-until-killed"

// writeUntilKilled writes flushed blocks to a disk of the store in dir, 32 at a
// time.
func writeUntilKilled(ctx context.Context, path string) error {
	dir, err := vfs.OpenDir(path)
	if err != nil {
		return err
	}
	s, err := cow.Open(ctx, dir, cow.Options{})
	if err != nil {
		return err
	}
	id := cow.ID{1}
	if _, err := s.Create(ctx, id, gib, nil); err != nil && !errors.Is(err, cow.ErrExists) {
		return err
	}
	d, err := s.OpenDisk(ctx, id, cow.Live)
	if err != nil {
		return err
	}
	fmt.Println("writing")
	for ctx.Err() == nil {
		if err := random(ctx, engineDisk{d}, gib, 32_000, 32, true, true); err != nil {
			return err
		}
	}
	return ctx.Err()
}

// benchOpen opens stores whose process has been killed while it wrote as fast
// as it could, and such as have been closed.
func benchOpen(ctx context.Context, cfg config, _ *server) (err error) {
	self, err := os.Executable()
	if err != nil {
		return err
	}
	for _, logBytes := range []int64{32 * mib, 256 * mib} {
		path := filepath.Join(cfg.scratch, fmt.Sprintf("crash-%d", logBytes))
		dir, err := vfs.CreateDir(path)
		if err != nil {
			return err
		}
		s, err := cow.Create(ctx, dir, cow.Options{LogBytes: logBytes})
		if err != nil {
			return err
		}
		if err := s.Close(); err != nil {
			return err
		}
		open := func() (time.Duration, error) {
			start := time.Now()
			s, err := cow.Open(ctx, dir, cow.Options{})
			if err != nil {
				return 0, err
			}
			return time.Since(start), s.Close()
		}
		var crashed, closed []time.Duration
		for range cfg.rounds {
			if err := killWriter(ctx, self, path); err != nil {
				return err
			}
			for _, times := range []*[]time.Duration{&crashed, &closed} {
				d, err := open()
				if err != nil {
					return err
				}
				*times = append(*times, d)
			}
		}
		fmt.Printf("\nOpen of a store with a log of %d MiB: %v after a kill of the busy process (%v at most), %v after a close\n",
			logBytes/mib, round(median(crashed)), round(slices.Max(crashed)), round(median(closed)))
		if err := errors.Join(dir.Close(), os.RemoveAll(path)); err != nil {
			return err
		}
	}
	return nil
}

// killWriter has a process write to the store for three seconds and kills it.
func killWriter(ctx context.Context, self, path string) error {
	cmd := exec.CommandContext(ctx, self, crashWriter, path)
	cmd.Stderr = os.Stderr
	out, err := cmd.StdoutPipe()
	if err != nil {
		return err
	}
	if err := cmd.Start(); err != nil {
		return err
	}
	if _, err := out.Read(make([]byte, 16)); err != nil {
		return errors.Join(fmt.Errorf("the writer has not begun: %w", err), cmd.Wait())
	}
	time.Sleep(3 * time.Second)
	if err := cmd.Process.Kill(); err != nil {
		return err
	}
	_ = cmd.Wait() // killed
	return ctx.Err()
}

// openDisks says what a thousand open disks take of memory.
func (b *engineBench) openDisks(ctx context.Context, _ config) error {
	const n = 1000
	before, memory, err := b.memory()
	if err != nil {
		return err
	}
	for range n {
		_, d, err := b.create(ctx, 10*gib)
		if err != nil {
			return err
		}
		if err := random(ctx, d, 10*gib, 64, 1, true, false); err != nil {
			return err
		}
		if err := d.flush(ctx); err != nil {
			return err
		}
	}
	if err := b.checkpoint(ctx); err != nil {
		return err
	}
	after, grown, err := b.memory()
	if err != nil {
		return err
	}
	fmt.Printf("\n%d disks of 10 GiB open, 64 blocks written to each: resident memory %s, from %s; %d bytes of heap each\n",
		n, after, before, (grown-memory)/n)
	return nil
}

// memory returns the resident memory of this process and what its objects
// take.
func (b *engineBench) memory() (resident string, objects int64, err error) {
	objects = heap()
	status, err := os.ReadFile("/proc/self/status")
	if err != nil {
		return "", 0, err
	}
	_, rest, _ := strings.Cut(string(status), "VmRSS:")
	resident, _, _ = strings.Cut(strings.TrimSpace(rest), "\n")
	return resident, objects, nil
}
