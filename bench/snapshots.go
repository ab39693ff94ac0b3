package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
)

// benchSnapshot takes snapshots through the API, of disks with one and with a
// thousand snapshots.
func benchSnapshot(ctx context.Context, cfg config, srv *server) error {
	type disk struct {
		vdi   string
		snaps []string
	}
	prepare := func(size int64, depth int) (d disk, err error) {
		if d.vdi, err = srv.createVDI(ctx, size); err != nil {
			return d, err
		}
		for range depth {
			s, err := srv.snapshotVDI(ctx, d.vdi)
			if err != nil {
				return d, err
			}
			d.snaps = append(d.snaps, s)
		}
		return d, nil
	}
	var disks []disk
	var cs []contestant
	for _, c := range []struct {
		name  string
		size  int64
		depth int
	}{
		{"VDI.snapshot, 4 GiB disk, depth 1", 4 * gib, 1},
		{"VDI.snapshot, 4 GiB disk, depth 1000", 4 * gib, 1000},
		{"VDI.snapshot, 1 TiB disk, depth 1", tib, 1},
	} {
		d, err := prepare(c.size, c.depth)
		if err != nil {
			return err
		}
		var last string
		cs = append(cs, contestant{c.name, 0, func(ctx context.Context) (err error) {
			last, err = srv.snapshotVDI(ctx, d.vdi)
			return err
		}, func() error { return srv.destroyVDI(ctx, last) }})
		disks = append(disks, d)
	}

	chain := func(depth int) (string, error) {
		path := filepath.Join(cfg.scratch, fmt.Sprintf("chain%d-0.qcow2", depth))
		if err := command("qemu-img", "create", "-q", "-f", "qcow2", path, "4G")(ctx); err != nil {
			return "", err
		}
		for i := 1; i < depth; i++ {
			next := filepath.Join(cfg.scratch, fmt.Sprintf("chain%d-%d.qcow2", depth, i))
			if err := command("qemu-img", "create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", path, next)(ctx); err != nil {
				return "", err
			}
			path = next
		}
		return path, nil
	}
	overlay := filepath.Join(cfg.scratch, "overlay.qcow2")
	for _, depth := range []int{1, 100} {
		base, err := chain(depth)
		if err != nil {
			return err
		}
		cs = append(cs, contestant{
			fmt.Sprintf("qemu-img create -b, chain of %d", depth), 0,
			command("qemu-img", "create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", base, overlay), remove(overlay),
		})
	}
	more := cfg
	more.rounds = cfg.rounds * 5
	err := compare(ctx, more, "Snapshot of an idle disk (ours through the API, qemu-img as a process)", cs...)
	for _, d := range disks {
		for _, s := range append(d.snaps, d.vdi) {
			err = errors.Join(err, srv.destroyVDI(ctx, s))
		}
	}
	files, globErr := filepath.Glob(filepath.Join(cfg.scratch, "chain*"))
	for _, f := range files {
		err = errors.Join(err, os.Remove(f))
	}
	return errors.Join(err, globErr)
}
