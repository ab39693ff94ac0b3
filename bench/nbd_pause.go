package main

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"coppice/internal/nbd"
)

const (
	pauseWriters   = 32                     // requests under way
	pauseSnapshots = 50                     // of each round
	pauseInterval  = 100 * time.Millisecond // between them
	pauseRange     = 128 << 20              // bytes of the disk that are written to: a snapshot keeps no more
)

// pauseWriter is one request at a time of a load.
type pauseWriter struct {
	since   atomic.Int64 // when the request under way began, in ns since the load did; 0 for none
	longest atomic.Int64 // that has ended since the last look, in ns
	writes  atomic.Int64
}

// pauseLoad writes 4 KiB at random places, as much as it can.
type pauseLoad struct {
	client  *nbd.Client
	writers [pauseWriters]pauseWriter
	begun   time.Time
	stop    atomic.Bool
	running sync.WaitGroup
	err     atomic.Pointer[error]
}

// startPauseLoad begins to write to an export of ours.
func startPauseLoad(d *device) (*pauseLoad, error) {
	c, err := d.dial()
	if err != nil {
		return nil, err
	}
	l := &pauseLoad{client: c, begun: time.Now()}
	for i := range l.writers {
		l.running.Go(func() {
			if err := l.write(&l.writers[i], uint64(i)); err != nil {
				l.err.CompareAndSwap(nil, &err)
			}
		})
	}
	return l, nil
}

func (l *pauseLoad) write(w *pauseWriter, seed uint64) error {
	rng := rand.New(rand.NewPCG(seed, 5))
	p := make([]byte, block)
	for i := range p {
		p[i] = byte(rng.Uint32())
	}
	for !l.stop.Load() {
		begun := time.Since(l.begun)
		w.since.Store(int64(begun))
		if _, err := l.client.WriteAt(p, rng.Int64N(pauseRange/block)*block); err != nil {
			return err
		}
		took := int64(time.Since(l.begun) - begun)
		w.since.Store(0)
		for {
			old := w.longest.Load()
			if took <= old || w.longest.CompareAndSwap(old, took) {
				break
			}
		}
		w.writes.Add(1)
	}
	return nil
}

// end stops writing.
func (l *pauseLoad) end() error {
	l.stop.Store(true)
	l.running.Wait()
	err := l.client.Close()
	if first := l.err.Load(); first != nil {
		err = errors.Join(*first, err)
	}
	return err
}

// longest is how long the longest write took of those that were under way at
// some time while do ran.
func (l *pauseLoad) longest(do func() error) (time.Duration, error) {
	for i := range l.writers {
		l.writers[i].longest.Store(0)
	}
	err := do()
	now := int64(time.Since(l.begun))
	longest := int64(0)
	for i := range l.writers {
		w := &l.writers[i]
		longest = max(longest, w.longest.Load())
		if since := w.since.Load(); since > 0 {
			longest = max(longest, now-since)
		}
	}
	return time.Duration(longest), err
}

// benchNBDPause takes snapshots of a disk that is written to as fast as can be,
// and compares the longest write beside each with the longest one of as long a
// time without. No peer takes snapshots of what it serves.
func benchNBDPause(ctx context.Context, cfg config, s *server) (err error) {
	d, err := s.ownDevice(ctx, cfg)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, d.stop()) }()
	if _, err := d.fio(ctx, "--rw=write", "--bs=1m", "--iodepth=4", "--end_fsync=1"); err != nil {
		return err
	}
	var calls, beside, without []time.Duration
	var writes int64
	var busy time.Duration
	for range cfg.rounds {
		l, err := startPauseLoad(d)
		if err != nil {
			return err
		}
		err = func() error {
			for range pauseSnapshots {
				time.Sleep(pauseInterval)
				var took time.Duration
				var snapshot string
				with, err := l.longest(func() (err error) {
					begun := time.Now()
					snapshot, err = s.snapshotVDI(ctx, d.vdi)
					took = time.Since(begun)
					return err
				})
				if err != nil {
					return err
				}
				quiet, err := l.longest(func() error { time.Sleep(took); return nil })
				if err := errors.Join(err, s.destroyVDI(ctx, snapshot)); err != nil {
					return err
				}
				calls, beside, without = append(calls, took), append(beside, with), append(without, quiet)
			}
			return nil
		}()
		busy += time.Since(l.begun)
		if err := errors.Join(err, l.end()); err != nil {
			return err
		}
		for i := range l.writers {
			writes += l.writers[i].writes.Load()
		}
	}
	fmt.Printf("\nNBD: %d snapshots under %d writes of 4 KiB at a time, %.0f writes/s; the p99 of the pause is to be under 20 ms\n",
		len(calls), pauseWriters, float64(writes)/busy.Seconds())
	fmt.Printf("  %-44s %10s %10s %10s\n", "", "median", "p99", "longest")
	for _, row := range []struct {
		name  string
		times []time.Duration
	}{
		{"VDI.snapshot, the call", calls},
		{"longest write beside it", beside},
		{"longest write of as long a time after it", without},
	} {
		slices.Sort(row.times)
		fmt.Printf("  %-44s %10s %10s %10s\n", row.name, round(percentile(row.times, 50)), round(percentile(row.times, 99)), round(row.times[len(row.times)-1]))
	}
	return nil
}
