package main

import (
	"context"
	"errors"
	"fmt"

	"coppice/internal/cow"
)

// smallWrites compares 4 KiB random writes, before and right after a snapshot.
func (b *engineBench) smallWrites(ctx context.Context, cfg config) error {
	return b.compareWrites(ctx, cfg, nil, []writeCase{
		{"4 KiB random write, one at a time, not flushed", 20_000, 1, false},
		{"4 KiB random write, 32 at a time, not flushed", 20_000, 32, false},
		{"4 KiB random write, one at a time, each flushed", 1000, 1, true},
		{"4 KiB random write, 32 at a time, each flushed", 8000, 32, true},
	})
}

// peerWrites is smallWrites beside images that qemu writes. They are fewer,
// because a qcow2 image copies 64 KiB for each one after a snapshot.
func (b *engineBench) peerWrites(ctx context.Context, cfg config) error {
	peers, err := b.peers(ctx)
	if err != nil {
		return err
	}
	return b.compareWrites(ctx, cfg, peers, []writeCase{
		{"4 KiB random write, one at a time, flushed at the end", 2000, 1, false},
		{"4 KiB random write, one at a time, each flushed", 500, 1, true},
		{"4 KiB random write, 32 at a time, each flushed (qemu: each 32)", 2048, 32, true},
	})
}

// writeCase is a way to write blocks at random.
type writeCase struct {
	title    string
	n, depth int
	every    bool // write is flushed
}

func (b *engineBench) compareWrites(ctx context.Context, cfg config, peers []peer, cases []writeCase) error {
	for _, c := range cases {
		var snap cow.ID
		write := func(t ioTarget) func(context.Context) error {
			return func(ctx context.Context) error {
				err := random(ctx, t, b.size, c.n, c.depth, true, c.every)
				if err == nil && len(peers) > 0 { // which cannot end without
					err = t.flush(ctx)
				}
				return err
			}
		}
		settle := func() error { return errors.Join(b.disk.flush(ctx), b.checkpoint(ctx)) }
		bytes := int64(c.n) * block
		// A snapshot is taken when the plain writes are over and in the trees,
		// outside the measured time; the row after it pays for the sharing.
		cs := []contestant{
			{"engine", bytes, write(b.disk), func() (err error) {
				if err = settle(); err == nil {
					snap, err = b.snapshot(ctx, b.id)
				}
				return err
			}},
			{"engine, right after a snapshot", bytes, write(b.disk), func() error {
				return errors.Join(settle(), b.store.Delete(ctx, snap))
			}},
			{"raw file", bytes, write(b.file), func() error { return b.file.flush(ctx) }},
		}
		flush := 0
		if c.every {
			flush = c.depth // qemu-img flushes when all that run have ended
		}
		for _, p := range peers {
			cs = append(cs, p.writes(ctx, c.n, c.depth, flush)...)
		}
		if err := compare(ctx, cfg, c.title, cs...); err != nil {
			return err
		}
	}
	return nil
}

// reads compares 4 KiB random reads, of what is in the host's cache and of
// what is not.
func (b *engineBench) reads(ctx context.Context, cfg config) error {
	peers, err := b.peers(ctx)
	if err != nil {
		return err
	}
	for _, cold := range []bool{false, true} {
		for _, depth := range []int{1, 32} {
			n := 40_000
			if cold {
				n = 2000 * min(depth, 4)
			}
			bytes := int64(n) * block
			read := func(t ioTarget) func(context.Context) error {
				return func(ctx context.Context) error { return random(ctx, t, b.size, n, depth, false, false) }
			}
			cs := []contestant{
				{"engine", bytes, read(b.disk), b.evict},
				{"raw file", bytes, read(b.file), b.evict},
				{"raw file + CRC32C", bytes, read(b.checked()), b.evict},
			}
			for _, p := range peers {
				cs = append(cs, contestant{p.name, bytes, p.reads(n, depth, block), p.evict})
			}
			title := fmt.Sprintf("4 KiB random read, %%s, %d at a time", depth)
			if err := compareReads(ctx, cfg, title, cold, cs); err != nil {
				return err
			}
		}
	}
	return nil
}

// sequentials compares calls of 1 MiB. Writes are durable at the end.
func (b *engineBench) sequentials(ctx context.Context, cfg config) error {
	const size = 256 * mib
	peers, err := b.peers(ctx)
	if err != nil {
		return err
	}
	move := func(t ioTarget, write bool) func(context.Context) error {
		return func(ctx context.Context) error { return sequential(ctx, t, size, write) }
	}
	cs := []contestant{
		{"engine", size, move(b.disk, true), nil},
		{"raw file", size, move(b.file, true), nil},
	}
	for _, p := range peers {
		cs = append(cs, contestant{p.name, size, p.bench("-w", "--pattern=85", "-c", fmt.Sprint(size/mib), "-d", "1", "-s", fmt.Sprint(mib)), nil})
	}
	if err := compare(ctx, cfg, "1 MiB sequential write over old contents, flushed at the end", cs...); err != nil {
		return err
	}
	for _, cold := range []bool{false, true} {
		cs := []contestant{
			{"engine", size, move(b.disk, false), b.evict},
			{"raw file", size, move(b.file, false), b.evict},
			{"raw file + CRC32C", size, move(b.checked(), false), b.evict},
		}
		for _, p := range peers {
			cs = append(cs, contestant{p.name, size, p.reads(size/mib, 1, mib), p.evict})
		}
		if err := compareReads(ctx, cfg, "1 MiB sequential read, %s", cold, cs); err != nil {
			return err
		}
	}
	return nil
}

// compareReads compares reads of what is in the host's cache, or of what clean
// of each contestant has dropped from it.
func compareReads(ctx context.Context, cfg config, title string, cold bool, cs []contestant) error {
	if !cold {
		for i := range cs {
			cs[i].clean = nil
		}
		return compare(ctx, cfg, fmt.Sprintf(title, "warm"), cs...)
	}
	for _, c := range cs {
		if err := c.clean(); err != nil {
			return err
		}
	}
	return compare(ctx, cfg, fmt.Sprintf(title, "cold"), cs...)
}
