package main

import (
	"context"
	"encoding/binary"
	"errors"
	"hash/crc32"
	"math/rand/v2"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"

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
	dir   *vfs.Dir
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

// reopen closes the store and opens it again, so that nothing of it is in the
// memory of the process.
func (b *engineBench) reopen(ctx context.Context) (err error) {
	s := b.store
	b.store = nil // stop has nothing to close if this fails
	if err := s.Close(); err != nil {
		return err
	}
	if b.store, err = cow.Open(ctx, b.dir, cow.Options{}); err != nil {
		return err
	}
	d, err := b.store.OpenDisk(ctx, b.id, cow.Live)
	b.disk = engineDisk{d}
	return err
}

// evict drops the files of the store and the raw file from the host's cache.
func (b *engineBench) evict() error {
	names, err := filepath.Glob(filepath.Join(b.path, "store", "space-*"))
	if err != nil {
		return err
	}
	for _, name := range append(names, filepath.Join(b.path, "raw")) {
		if err := evictFile(name); err != nil {
			return err
		}
	}
	return nil
}

// evictFile drops a file from the host's cache.
func evictFile(name string) (err error) {
	f, err := os.Open(name)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	if err := unix.Fsync(int(f.Fd())); err != nil { // dirty pages would stay
		return err
	}
	return unix.Fadvise(int(f.Fd()), 0, 0, unix.FADV_DONTNEED)
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
	b.dir = dir
	if b.store, err = cow.Create(ctx, dir, cow.Options{}); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, b.store.Close(), dir.Close())
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
	err := b.file.Close()
	if b.store != nil {
		err = errors.Join(err, b.store.Close())
	}
	return errors.Join(err, b.dir.Close(), os.RemoveAll(b.path))
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
	engineSection("engine/latency", gib, (*engineBench).latencies),
	engineSection("engine/memory", 64*mib, (*engineBench).openDisks),
	{name: "engine/open", run: benchOpen},
	long(engineSection("long/peers", gib, (*engineBench).peerWrites)),
	long(engineSection("long/depth", 64*mib, (*engineBench).deepVolumeOps)),
	{name: "long/units", long: true, run: benchUnits},
	long(engineSection("long/ageing", gib, (*engineBench).ageing)),
}

func long(s section) section {
	s.long = true
	return s
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
