package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"coppice/internal/cow"
)

// ageing compares cold sequential reads of a fresh disk with those of one that
// has been overwritten three times over at random, with fifty snapshots taken
// on the way, and of a raw file that has been written in the same way.
func (b *engineBench) ageing(ctx context.Context, cfg config) (err error) {
	const snapshots = 50
	oldID, old, err := b.create(ctx, b.size)
	if err != nil {
		return err
	}
	f, err := os.Create(filepath.Join(b.path, "aged"))
	if err != nil {
		return err
	}
	oldFile := rawFile{f}
	defer func() { err = errors.Join(err, f.Close()) }()
	for _, t := range []ioTarget{old, oldFile} {
		if err := sequential(ctx, t, b.size, true); err != nil {
			return err
		}
	}
	for range snapshots {
		for _, t := range []ioTarget{old, oldFile} {
			if err := random(ctx, t, b.size, int(3*b.size/block/snapshots), 1, true, false); err != nil {
				return err
			}
			if err := t.flush(ctx); err != nil {
				return err
			}
		}
		if _, err := b.snapshot(ctx, oldID); err != nil {
			return err
		}
	}
	if err := b.checkpoint(ctx); err != nil {
		return err
	}
	// Nothing of the store is in the memory of the process, and none of the
	// files in the host's.
	forget := func() (err error) {
		if err := b.reopen(ctx); err != nil {
			return err
		}
		d, err := b.store.OpenDisk(ctx, oldID, cow.Live)
		old = engineDisk{d}
		return errors.Join(err, b.evict(), evictFile(f.Name()))
	}
	if err := forget(); err != nil {
		return err
	}
	read := func(t func() ioTarget) func(context.Context) error {
		return func(ctx context.Context) error { return sequential(ctx, t(), b.size, false) }
	}
	fmt.Printf("\nThe store has %d MiB in use\n", b.store.Usage().Used/mib)
	return compare(ctx, cfg, "1 MiB sequential read, cold, fresh and aged (300 % random overwrite, 50 snapshots)",
		contestant{"engine, aged", b.size, read(func() ioTarget { return old }), forget},
		contestant{"engine, fresh", b.size, read(func() ioTarget { return b.disk }), forget},
		contestant{"raw file, aged", b.size, read(func() ioTarget { return oldFile }), forget},
		contestant{"raw file, fresh", b.size, read(func() ioTarget { return b.file }), forget},
	)
}
