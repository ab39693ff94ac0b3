package main

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"math/rand/v2"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"coppice/internal/cow"
	"coppice/internal/vfs"
)

// block is a small read or write.
const block = 4096

// ioTarget is what the engine and a raw file have in common.
type ioTarget interface {
	ReadAt(p []byte, off int64) (int, error)
	WriteAt(p []byte, off int64) (int, error)
	flush(ctx context.Context) error
}

type engineDisk struct{ *cow.Disk }

func (d engineDisk) flush(ctx context.Context) error { return d.Flush(ctx) }

type rawFile struct{ *os.File }

func (f rawFile) flush(context.Context) error { return unix.Fdatasync(int(f.Fd())) }

// checkedFile is a raw file whose reads take the CRC32C of each block, as any
// reader that verifies must.
type checkedFile struct {
	rawFile
	sum *atomic.Uint32 // keeps the checksums from being optimised away
}

func (f checkedFile) ReadAt(p []byte, off int64) (int, error) {
	n, err := f.rawFile.ReadAt(p, off)
	for i := 0; i < n; i += block {
		f.sum.Store(crc32.Checksum(p[i:min(n, i+block)], castagnoli))
	}
	return n, err
}

// engineBench is a store in a real directory and a raw file beside it, both
// filled with the same number of bytes.
type engineBench struct {
	path  string // holds the store and the raw file
	store *cow.Store
	next  uint64 // of the volume to be made
	size  int64  // bytes of the disk and the file
	id    cow.ID
	disk  engineDisk
	file  rawFile
}

func (b *engineBench) checked() checkedFile { return checkedFile{b.file, new(atomic.Uint32)} }

func (b *engineBench) newID() cow.ID {
	b.next++
	id := cow.ID{0: 1}
	binary.BigEndian.PutUint64(id[8:], b.next)
	return id
}

// create makes a volume and opens it.
func (b *engineBench) create(ctx context.Context, size int64) (cow.ID, engineDisk, error) {
	id := b.newID()
	if _, err := b.store.Create(ctx, id, size, nil); err != nil {
		return id, engineDisk{}, err
	}
	d, err := b.store.OpenDisk(ctx, id, cow.Live)
	return id, engineDisk{d}, err
}

func (b *engineBench) snapshot(ctx context.Context, src cow.ID) (cow.ID, error) {
	id := b.newID()
	_, err := b.store.Snapshot(ctx, []cow.Pair{{Src: src, New: id}})
	return id, err
}

func startEngine(ctx context.Context, cfg config, size int64) (_ *engineBench, err error) {
	path, err := os.MkdirTemp(cfg.scratch, "engine-")
	if err != nil {
		return nil, err
	}
	dir, err := vfs.CreateDir(filepath.Join(path, "store"))
	if err != nil {
		return nil, err
	}
	b := &engineBench{path: path, size: size}
	if b.store, err = cow.Create(ctx, dir, cow.Options{}); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, b.store.Close())
		}
	}()
	if b.id, b.disk, err = b.create(ctx, size); err != nil {
		return nil, err
	}
	f, err := os.Create(filepath.Join(path, "raw"))
	if err != nil {
		return nil, err
	}
	b.file = rawFile{f}
	for _, t := range []ioTarget{b.disk, b.file} {
		if err := sequential(ctx, t, size, true); err != nil {
			return nil, err
		}
	}
	return b, nil
}

func (b *engineBench) stop() error {
	return errors.Join(b.file.Close(), b.store.Close(), os.RemoveAll(b.path))
}

var noiseSeed atomic.Uint64

// noise fills p with bytes that no call before has written.
func noise(p []byte) {
	var seed [32]byte
	binary.LittleEndian.PutUint64(seed[:], noiseSeed.Add(1))
	_, _ = rand.NewChaCha8(seed).Read(p) // cannot fail
}

// sequential reads or writes size bytes in calls of 1 MiB; writes are durable
// at the end.
func sequential(ctx context.Context, t ioTarget, size int64, write bool) error {
	p := make([]byte, mib)
	noise(p)
	for off := int64(0); off < size; off += mib {
		var err error
		if write {
			for i := 0; i < mib; i += block { // no two blocks alike, at no cost to speak of
				binary.LittleEndian.PutUint64(p[i:], noiseSeed.Add(1))
			}
			_, err = t.WriteAt(p, off)
		} else {
			_, err = t.ReadAt(p, off)
		}
		if err != nil {
			return err
		}
	}
	if !write {
		return nil
	}
	return t.flush(ctx)
}

// random makes n reads or writes of one block at random places, depth of them
// at a time, each write followed by a flush if every is set. Without, they are
// not flushed.
func random(ctx context.Context, t ioTarget, size int64, n, depth int, write, every bool) error {
	errs := make([]error, depth)
	var wg sync.WaitGroup
	for w := range depth {
		wg.Go(func() {
			p := make([]byte, block)
			noise(p)
			rng := rand.New(rand.NewPCG(noiseSeed.Add(1), 1))
			for range n / depth {
				off := rng.Int64N(size/block) * block
				var err error
				if write {
					binary.LittleEndian.PutUint64(p, noiseSeed.Add(1))
					if _, err = t.WriteAt(p, off); err == nil && every {
						err = t.flush(ctx)
					}
				} else {
					_, err = t.ReadAt(p, off)
				}
				if err != nil {
					errs[w] = err
					return
				}
			}
		})
	}
	wg.Wait()
	return errors.Join(errs...)
}

// engineSections measure the storage engine through its Go interface against
// a raw file that the same loops read and write.
var engineSections = []section{
	engineSection("engine/writes", gib, (*engineBench).smallWrites),
	engineSection("engine/reads", gib, (*engineBench).reads),
	engineSection("engine/sequential", gib, (*engineBench).sequentials),
	engineSection("engine/volumes", 64*mib, (*engineBench).volumeOps),
	engineSection("engine/clones", 64*mib, (*engineBench).clones),
}

// engineSection is a section with a store of its own, in which there is a
// disk filled with size bytes.
func engineSection(name string, size int64, run func(*engineBench, context.Context, config) error) section {
	return section{name: name, run: func(ctx context.Context, cfg config, _ *server) (err error) {
		b, err := startEngine(ctx, cfg, size)
		if err != nil {
			return err
		}
		defer func() { err = errors.Join(err, b.stop()) }()
		return run(b, ctx, cfg)
	}}
}

// smallWrites compares 4 KiB random writes, before and right after a snapshot.
func (b *engineBench) smallWrites(ctx context.Context, cfg config) error {
	for _, c := range []struct {
		title    string
		n, depth int
		every    bool
	}{
		{"4 KiB random write, one at a time, not flushed", 20_000, 1, false},
		{"4 KiB random write, 32 at a time, not flushed", 20_000, 32, false},
		{"4 KiB random write, one at a time, each flushed", 1000, 1, true},
		{"4 KiB random write, 32 at a time, each flushed", 8000, 32, true},
	} {
		var snap cow.ID
		write := func(t ioTarget) func(context.Context) error {
			return func(ctx context.Context) error { return random(ctx, t, b.size, c.n, c.depth, true, c.every) }
		}
		settle := func() error { return b.disk.flush(ctx) }
		bytes := int64(c.n) * block
		// A snapshot is taken when the plain writes are over, outside the
		// measured time; the row after it pays for the sharing.
		err := compare(ctx, cfg, c.title,
			contestant{"engine", bytes, write(b.disk), func() (err error) {
				if err = settle(); err == nil {
					snap, err = b.snapshot(ctx, b.id)
				}
				return err
			}},
			contestant{"engine, right after a snapshot", bytes, write(b.disk), func() error {
				return errors.Join(settle(), b.store.Delete(ctx, snap))
			}},
			contestant{"raw file", bytes, write(b.file), func() error { return b.file.flush(ctx) }},
		)
		if err != nil {
			return err
		}
	}
	return nil
}

// reads compares 4 KiB random reads of what is in the host's cache.
func (b *engineBench) reads(ctx context.Context, cfg config) error {
	const n = 40_000
	for _, depth := range []int{1, 32} {
		read := func(t ioTarget) func(context.Context) error {
			return func(ctx context.Context) error { return random(ctx, t, b.size, n, depth, false, false) }
		}
		err := compare(ctx, cfg, fmt.Sprintf("4 KiB random read, warm, %d at a time", depth),
			contestant{"engine", n * block, read(b.disk), nil},
			contestant{"raw file", n * block, read(b.file), nil},
			contestant{"raw file + CRC32C", n * block, read(b.checked()), nil},
		)
		if err != nil {
			return err
		}
	}
	return nil
}

// sequentials compares calls of 1 MiB. Writes are durable at the end.
func (b *engineBench) sequentials(ctx context.Context, cfg config) error {
	const size = 256 * mib
	for _, write := range []bool{true, false} {
		title := "1 MiB sequential read, warm"
		if write {
			title = "1 MiB sequential write, flushed at the end"
		}
		move := func(t ioTarget) func(context.Context) error {
			return func(ctx context.Context) error { return sequential(ctx, t, size, write) }
		}
		cs := []contestant{
			{"engine", size, move(b.disk), nil},
			{"raw file", size, move(b.file), nil},
		}
		if !write {
			cs = append(cs, contestant{"raw file + CRC32C", size, move(b.checked()), nil})
		}
		if err := compare(ctx, cfg, title, cs...); err != nil {
			return err
		}
	}
	return nil
}

// volumeOps times snapshot, clone and revert of idle disks of several sizes
// and depths, against two syncs of a file.
func (b *engineBench) volumeOps(ctx context.Context, cfg config) error {
	type subject struct {
		name  string
		size  int64
		depth int
		id    cow.ID
		snap  cow.ID
	}
	subjects := []*subject{
		{name: "1 GiB, depth 1", size: gib, depth: 1},
		{name: "1 GiB, depth 1,000", size: gib, depth: 1000},
		{name: "1 GiB, depth 10,000", size: gib, depth: 10_000},
		{name: "1 TiB, depth 1", size: tib, depth: 1},
		{name: "1 TiB, depth 1,000", size: tib, depth: 1000},
	}
	for _, s := range subjects {
		var d engineDisk
		var err error
		if s.id, d, err = b.create(ctx, s.size); err != nil {
			return err
		}
		p := make([]byte, block)
		for i := range s.depth {
			noise(p)
			if _, err := d.WriteAt(p, int64(i)*7919%(s.size/block)*block); err != nil {
				return err
			}
			if s.snap, err = b.snapshot(ctx, s.id); err != nil {
				return err
			}
		}
	}
	twoSyncs := contestant{"two writes of 4 KiB with fdatasync", 0, func(ctx context.Context) error {
		p := make([]byte, block)
		for range 2 {
			noise(p)
			if _, err := b.file.WriteAt(p, 0); err != nil {
				return err
			}
			if err := b.file.flush(ctx); err != nil {
				return err
			}
		}
		return nil
	}, nil}
	cfg.rounds *= 5
	for _, op := range []struct {
		name string
		run  func(context.Context, *subject) (made cow.ID, err error)
	}{
		{"snapshot", func(ctx context.Context, s *subject) (cow.ID, error) { return b.snapshot(ctx, s.id) }},
		{"clone", func(ctx context.Context, s *subject) (cow.ID, error) {
			id := b.newID()
			_, err := b.store.Clone(ctx, cow.Pair{Src: s.snap, New: id})
			return id, err
		}},
		{"revert", func(ctx context.Context, s *subject) (cow.ID, error) {
			return cow.ID{}, b.store.Revert(ctx, s.id, s.snap)
		}},
	} {
		var cs []contestant
		for _, s := range subjects {
			var made cow.ID
			cs = append(cs, contestant{op.name + ", " + s.name, 0, func(ctx context.Context) (err error) {
				made, err = op.run(ctx, s)
				return err
			}, func() error {
				if made == (cow.ID{}) {
					return nil
				}
				return b.store.Delete(ctx, made)
			}})
		}
		if err := compare(ctx, cfg, "Engine: "+op.name+" of an idle disk", append(cs, twoSyncs)...); err != nil {
			return err
		}
	}
	return nil
}

// used is the space of the store when everything is in its trees. Asking a
// pinned disk for its version brings a change there.
func (b *engineBench) used(ctx context.Context) (int64, error) {
	p := make([]byte, block)
	for range 3 { // the space of one checkpoint comes back with the next
		noise(p)
		if _, err := b.disk.WriteAt(p, 0); err != nil {
			return 0, err
		}
		pin, err := b.store.OpenDisk(ctx, b.id, cow.Pinned)
		if err != nil {
			return 0, err
		}
		_, err = pin.Version(ctx)
		if err := errors.Join(err, pin.Close()); err != nil {
			return 0, err
		}
	}
	return b.store.Usage().Used, nil
}

// clones makes a thousand clones of one snapshot and says what they take.
func (b *engineBench) clones(ctx context.Context, cfg config) error {
	const n = 1000
	snap, err := b.snapshot(ctx, b.id)
	if err != nil {
		return err
	}
	for _, workers := range []int{1, 32} {
		before, err := b.used(ctx)
		if err != nil {
			return err
		}
		ids := make([]cow.ID, n)
		for i := range ids {
			ids[i] = b.newID()
		}
		errs := make([]error, workers)
		start := time.Now()
		var wg sync.WaitGroup
		for w := range workers {
			wg.Go(func() {
				for i := w; i < n; i += workers {
					if _, err := b.store.Clone(ctx, cow.Pair{Src: snap, New: ids[i]}); err != nil {
						errs[w] = err
						return
					}
				}
			})
		}
		wg.Wait()
		elapsed := time.Since(start)
		if err := errors.Join(errs...); err != nil {
			return err
		}
		after, err := b.used(ctx)
		if err != nil {
			return err
		}
		fmt.Printf("\n%d clones of one snapshot, %d at a time: %v, %d bytes each\n",
			n, workers, round(elapsed), (after-before)/n)
		for _, id := range ids {
			if err := b.store.Delete(ctx, id); err != nil {
				return err
			}
		}
	}
	return b.store.Delete(ctx, snap)
}
