package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"time"

	"coppice/internal/cow"
	"coppice/internal/vfs"
)

// unitSizes are the geometries that benchUnits compares: pages are one unit,
// so that the map of 16 KiB units is wider as well as four times smaller.
var unitSizes = []struct {
	name string
	geo  cow.Geometry
}{
	{"4 KiB", cow.DefaultGeometry()},
	{"16 KiB", cow.Geometry{UnitSize: 16 << 10, Fanout: 1024, PageCounters: 1024, RegionsPerFile: 1 << 13}},
}

// unitFigures are what a life of a store has shown, in the order of unitRows.
type unitFigures []float64

// unitRows are the rows of the table and how they are printed.
var unitRows = []struct{ name, format string }{
	{"fresh: 4 KiB random writes/s, QD 32, made durable", "%.0f"},
	{"fresh: bytes to the files per byte written", "%.2f"},
	{"fresh: 4 KiB random reads/s, QD 1, warm", "%.0f"},
	{"fresh: 4 KiB random reads/s, QD 1, cold", "%.0f"},
	{"fresh: 1 MiB sequential read, cold, MB/s", "%.0f"},
	{"after a snapshot: 4 KiB random writes/s, QD 32", "%.0f"},
	{"after a snapshot: bytes to the files per byte", "%.2f"},
	{"4 KiB write and flush, QD 1, writes/s", "%.0f"},
	{"4 KiB write and flush: bytes per byte", "%.2f"},
	{"aged: 4 KiB random writes/s, QD 32", "%.0f"},
	{"aged: bytes to the files per byte", "%.2f"},
	{"aged: 4 KiB random reads/s, QD 1, cold", "%.0f"},
	{"aged: 1 MiB sequential read, cold, MB/s", "%.0f"},
	{"aged: bytes in use per byte of the disk", "%.2f"},
}

// unitLife is a store with one disk, whose writes are counted.
type unitLife struct {
	path    string
	size    int64
	geo     cow.Geometry
	dir     *vfs.Dir
	counted vfs.FS
	written atomic.Int64 // bytes to all files
	store   *cow.Store
	disk    engineDisk
	figures unitFigures
}

// benchUnits compares sizes of the unit of mapping: each round lives the same
// life with each of them, fresh, after a snapshot, and aged.
func benchUnits(ctx context.Context, cfg config, _ *server) error {
	lives := make([][]unitFigures, len(unitSizes))
	for range cfg.rounds {
		for i, u := range unitSizes {
			f, err := liveUnits(ctx, cfg, u.geo)
			if err != nil {
				return fmt.Errorf("units of %s: %w", u.name, err)
			}
			lives[i] = append(lives[i], f)
		}
	}
	fmt.Printf("\nUnit of mapping, medians of %d rounds\n  %-52s", cfg.rounds, "")
	for _, u := range unitSizes {
		fmt.Printf(" %10s", u.name)
	}
	fmt.Println()
	for row, r := range unitRows {
		fmt.Printf("  %-52s", r.name)
		for i := range unitSizes {
			var all []float64
			for _, f := range lives[i] {
				all = append(all, f[row])
			}
			slices.Sort(all)
			fmt.Printf(" %10s", fmt.Sprintf(r.format, all[len(all)/2]))
		}
		fmt.Println()
	}
	return nil
}

func liveUnits(ctx context.Context, cfg config, geo cow.Geometry) (_ unitFigures, err error) {
	l := &unitLife{size: gib / 2, geo: geo}
	if l.path, err = os.MkdirTemp(cfg.scratch, "units-"); err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(l.path)) }()
	if l.dir, err = vfs.CreateDir(filepath.Join(l.path, "store")); err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, l.dir.Close()) }()
	l.counted = vfs.NewInject(l.dir, nil, func(c vfs.Call) error {
		if c.Op == vfs.OpWrite {
			l.written.Add(c.Len)
		}
		return nil
	})
	if l.store, err = cow.Create(ctx, l.counted, cow.Options{Geometry: geo, LogBytes: 32 << 20}); err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, l.store.Close()) }()
	if _, err := l.store.Create(ctx, cow.ID{1}, l.size, nil); err != nil {
		return nil, err
	}
	if err := l.open(ctx); err != nil {
		return nil, err
	}
	if err := sequential(ctx, l.disk, l.size, true); err != nil {
		return nil, err
	}
	if err := l.live(ctx); err != nil {
		return nil, err
	}
	return l.figures, nil
}

func (l *unitLife) open(ctx context.Context) error {
	d, err := l.store.OpenDisk(ctx, cow.ID{1}, cow.Live)
	l.disk = engineDisk{d}
	return err
}

// settle makes everything durable, in the trees, by closing the store, and
// opens it again.
func (l *unitLife) settle(ctx context.Context) (err error) {
	if err := l.store.Close(); err != nil {
		return err
	}
	if l.store, err = cow.Open(ctx, l.counted, cow.Options{}); err != nil {
		return err
	}
	return l.open(ctx)
}

// forget has neither the process nor the host remember the store.
func (l *unitLife) forget(ctx context.Context) error {
	if err := l.settle(ctx); err != nil {
		return err
	}
	names, err := filepath.Glob(filepath.Join(l.path, "store", "*"))
	for _, name := range names {
		if !strings.HasSuffix(name, "LOCK") {
			err = errors.Join(err, evictFile(name))
		}
	}
	return err
}

// writes notes the rate of n random writes, the checkpoint behind them
// included, and what they cost.
func (l *unitLife) writes(ctx context.Context, n, depth int, every bool) error {
	if err := l.settle(ctx); err != nil {
		return err
	}
	before, start := l.written.Load(), time.Now()
	if err := random(ctx, l.disk, l.size, n, depth, true, every); err != nil {
		return err
	}
	if err := l.settle(ctx); err != nil {
		return err
	}
	l.note(float64(n)/time.Since(start).Seconds(), float64(l.written.Load()-before)/float64(int64(n)*block))
	return nil
}

func (l *unitLife) reads(ctx context.Context, n int) error {
	start := time.Now()
	if err := random(ctx, l.disk, l.size, n, 1, false, false); err != nil {
		return err
	}
	l.note(float64(n) / time.Since(start).Seconds())
	return nil
}

// cold notes the rates of random and of sequential reads from the device.
func (l *unitLife) cold(ctx context.Context) error {
	if err := l.forget(ctx); err != nil {
		return err
	}
	if err := l.reads(ctx, 4000); err != nil {
		return err
	}
	if err := l.forget(ctx); err != nil {
		return err
	}
	start := time.Now()
	if err := sequential(ctx, l.disk, l.size, false); err != nil {
		return err
	}
	l.note(float64(l.size) / time.Since(start).Seconds() / 1e6)
	return nil
}

func (l *unitLife) note(f ...float64) { l.figures = append(l.figures, f...) }

// live measures in the order of unitRows.
func (l *unitLife) live(ctx context.Context) error {
	const many = 32 << 10
	snaps := byte(0)
	snapshot := func() error {
		snaps++
		_, err := l.store.Snapshot(ctx, []cow.Pair{{Src: cow.ID{1}, New: cow.ID{2, snaps}}})
		return err
	}
	if err := l.writes(ctx, many, 32, false); err != nil {
		return err
	}
	for range 2 { // the first one warms
		if err := l.reads(ctx, many); err != nil {
			return err
		}
	}
	l.figures = slices.Delete(l.figures, 2, 3)
	if err := l.cold(ctx); err != nil {
		return err
	}
	if err := snapshot(); err != nil {
		return err
	}
	if err := l.writes(ctx, many, 32, false); err != nil {
		return err
	}
	if err := l.writes(ctx, 2000, 1, true); err != nil {
		return err
	}
	const periods = 10
	for range periods {
		if err := random(ctx, l.disk, l.size, int(3*l.size/block/periods), 32, true, false); err != nil {
			return err
		}
		if err := snapshot(); err != nil {
			return err
		}
	}
	if err := l.writes(ctx, many, 32, false); err != nil {
		return err
	}
	if err := l.cold(ctx); err != nil {
		return err
	}
	l.note(float64(l.store.Usage().Used) / float64(l.size))
	return nil
}
