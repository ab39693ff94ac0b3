package main

import (
	"context"
	"fmt"
	"path/filepath"
)

// peer is an image that qemu's block layer reads and writes, driven by
// "qemu-img bench" in a process of its own, whose start takes some 15 ms of
// each round.
type peer struct {
	name   string
	format string
	path   string
}

// peers makes images of the raw file's contents.
func (b *engineBench) peers(ctx context.Context) ([]peer, error) {
	ps := []peer{
		{"qcow2 (qemu-img bench)", "qcow2", filepath.Join(b.path, "peer.qcow2")},
		{"VHD (qemu-img bench)", "vpc", filepath.Join(b.path, "peer.vhd")},
	}
	for _, p := range ps {
		if err := command("qemu-img", "convert", "-t", "writeback", "-f", "raw", "-O", p.format, filepath.Join(b.path, "raw"), p.path)(ctx); err != nil {
			return nil, err
		}
	}
	return ps, nil
}

// scatter is the step between two accesses that stand for random ones: it
// comes back to where it began after all blocks of an image of 1 GiB.
const scatter = 40503 * block

func (p peer) bench(args ...string) func(context.Context) error {
	return command("qemu-img", append(append([]string{"bench", "-t", "writeback", "-f", p.format}, args...), p.path)...)
}

// evict drops the image from the host's cache.
func (p peer) evict() error { return evictFile(p.path) }

// reads makes n reads of size bytes, scattered when they are blocks.
func (p peer) reads(n, depth, size int) func(context.Context) error {
	step := size
	if size == block {
		step = scatter
	}
	return p.bench("-c", fmt.Sprint(n), "-d", fmt.Sprint(depth), "-s", fmt.Sprint(size), "-S", fmt.Sprint(step))
}

// writes are contestants that write n scattered blocks and flush after each
// flush of them, and at the end. A qcow2 image does it right after a snapshot,
// too.
func (p peer) writes(ctx context.Context, n, depth, flush int) []contestant {
	run := p.bench("-w", "--pattern=85", "-c", fmt.Sprint(n), "-d", fmt.Sprint(depth), "-s", fmt.Sprint(block), "-S", fmt.Sprint(scatter),
		fmt.Sprintf("--flush-interval=%d", flush))
	bytes := int64(n) * block
	if p.format != "qcow2" {
		return []contestant{{p.name, bytes, run, nil}}
	}
	snapshot := func(flag string) func() error {
		return func() error { return command("qemu-img", "snapshot", flag, "s", p.path)(ctx) }
	}
	return []contestant{
		{p.name, bytes, run, snapshot("-c")},
		{p.name + ", after a snapshot", bytes, run, snapshot("-d")},
	}
}
