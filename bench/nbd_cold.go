package main

import (
	"context"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

// forgetNBD drops the files of all contestants from the host's cache. What a
// server keeps in its own memory stays there: ours has pages of the map, qemu's
// has tables of its format.
func forgetNBD(cfg config) error {
	unix.Sync()
	store, err := filepath.Glob(filepath.Join(cfg.scratch, "data", "store", "*"))
	if err != nil {
		return err
	}
	images, err := filepath.Glob(filepath.Join(cfg.scratch, "nbd.*"))
	if err != nil {
		return err
	}
	for _, name := range append(store, images...) {
		if strings.HasSuffix(name, "LOCK") {
			continue
		}
		if err := evictFile(name); err != nil {
			return err
		}
	}
	return nil
}

// benchNBDCold reads what is not in the host's cache.
func benchNBDCold(ctx context.Context, cfg config, s *server) error {
	return withNBD(ctx, cfg, s, func(ds []*device) error {
		forget := func(*device) error { return forgetNBD(cfg) }
		for _, job := range []struct {
			title string
			args  []string
		}{
			{"NBD: 4 KiB random read, one at a time, cold", []string{"--rw=randread", "--bs=4k", "--iodepth=1"}},
			{"NBD: 4 KiB random read, 32 at a time, cold", []string{"--rw=randread", "--bs=4k", "--iodepth=32"}},
			// No longer than until all of it has been read once.
			{"NBD: 1 MiB sequential read, 4 at a time, cold", []string{"--rw=read", "--bs=1m", "--iodepth=4", "--time_based=0"}},
		} {
			if err := compareFIO(ctx, cfg, job.title, ds, forget, job.args...); err != nil {
				return err
			}
		}
		return nil
	})
}
