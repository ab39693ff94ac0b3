// Package diskcopy copies the contents of one volume to another: all of it, or what differs from a third. It hides how
// that is found out, reading ahead, and which zeros are written. It knows nothing of disks' records, calls and tasks.
package diskcopy

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"iter"
	"sync"

	"coppice/internal/storage"
)

const (
	// chunk is how much a copy moves at a time, and how often it looks
	// whether it has been cancelled, in bytes.
	chunk = 1 << 20
	// ahead is how many chunks are read ahead of what is written.
	ahead = 4
	// sector is the granularity of a copy against a base into an existing
	// disk, in bytes.
	sector = 512
)

// Disk is a volume that is read.
type Disk struct {
	storage.Volume
	Repo storage.Repo // where it is
	Name string       // what errors call it
}

// Job is what is to be copied.
type Job struct {
	From Disk
	// Base limits the copy to what differs from it. Nil: everything is copied
	// that was ever written.
	Base *Disk
	// Zeroed is what From remembers of a copy with a base that made it, as
	// [Zeroed.String] has written it: where its holes mean zeros.
	Zeroed string
	// Progress is told how far the copy is, in bytes, if it is not nil.
	Progress func(done, total int64)
}

// Create makes a volume in repo as spec says, whose size is that of the
// source, and copies into it. Its ranges that are zero in the source but not in
// the base are noted in zeroed, which may be nil. An error, or the end of ctx,
// leaves a volume with a part of the contents, or none.
func (j Job) Create(ctx context.Context, repo storage.Repo, spec storage.Spec, zeroed *Zeroed) (storage.Info, error) {
	spec.Size = j.From.Size()
	if _, err := repo.Create(ctx, spec); err != nil {
		return storage.Info{}, fmt.Errorf("create VDI %s: %w", spec.ID, err)
	}
	dst, err := repo.Open(ctx, spec.ID, storage.Live)
	if err != nil {
		return storage.Info{}, fmt.Errorf("open VDI %s: %w", spec.ID, err)
	}
	defer func() { _ = dst.Close() }() // Flush tells what matters
	write := func(p []byte, off int64) error {
		_, err := dst.WriteAt(p, off)
		return err
	}
	if err = j.run(ctx, false, write, zeroed.add); err != nil {
		return storage.Info{}, err
	}
	if err := dst.Flush(ctx); err != nil {
		return storage.Info{}, fmt.Errorf("flush VDI %s: %w", spec.ID, err)
	}
	return repo.Stat(ctx, spec.ID)
}

// Into copies into a volume that is as large as the source, or larger. With a
// base it writes only sectors that differ from that: the others of dst are its
// own. What has been written stays, and is durable, also after an error or the
// end of ctx.
func (j Job) Into(ctx context.Context, dst storage.Volume) error {
	over := storage.NewOverlay(dst)
	err := j.run(ctx, j.Base != nil, func(p []byte, off int64) error { return over.WriteAt(ctx, p, off) },
		func(off, n int64) error { return over.Zero(ctx, off, n) })
	return errors.Join(err, dst.Flush(context.WithoutCancel(ctx)))
}

// piece is a part of the source on its way to the destination.
type piece struct {
	off, n int64
	data   []byte // nil when all of it is zero
	old    []byte // of the base, when sectors are told apart; same length as data
}

// run hands every range to be copied to write or, where it is zero in the
// source and was not in the base, to zero, in ascending order. With sectors, only
// those that differ from the base. It reads ahead of them, and has stopped
// reading when it returns.
func (j Job) run(ctx context.Context, sectors bool, write func([]byte, int64) error, zero func(off, n int64) error) error {
	ctx, stop := context.WithCancel(ctx)
	pieces := make(chan piece, ahead)
	free := make(chan piece, ahead+2) // one is being filled, one written
	for range cap(free) {
		free <- piece{}
	}
	var failed error // of the reader
	var reader sync.WaitGroup
	reader.Go(func() {
		defer close(pieces)
		failed = j.read(ctx, sectors, free, pieces)
	})
	defer reader.Wait()
	defer stop()
	for p := range pieces {
		if err := context.Cause(ctx); err != nil {
			return err
		}
		var err error
		switch {
		case p.data == nil:
			err = zero(p.off, p.n)
		case p.old == nil:
			err = write(p.data, p.off)
		default:
			err = writeChanged(p, write)
		}
		if err != nil {
			return fmt.Errorf("write copy: %w", err)
		}
		if j.Progress != nil {
			j.Progress(p.off+p.n, j.From.Size())
		}
		free <- p
	}
	if failed != nil {
		return failed
	}
	return context.Cause(ctx)
}

// writeChanged writes the sectors of a piece that differ from the base.
func writeChanged(p piece, write func([]byte, int64) error) error {
	differs := func(i int) bool {
		end := min(i+sector, len(p.data))
		return !bytes.Equal(p.data[i:end], p.old[i:end])
	}
	for i := 0; i < len(p.data); i += sector {
		if !differs(i) {
			continue
		}
		end := i + sector
		for end < len(p.data) && differs(end) {
			end += sector
		}
		end = min(end, len(p.data))
		if err := write(p.data[i:end], p.off+int64(i)); err != nil {
			return err
		}
		i = end
	}
	return nil
}

// read sends the pieces of the source, with buffers from free.
func (j Job) read(ctx context.Context, sectors bool, free <-chan piece, pieces chan<- piece) error {
	send := func(off, n int64, fill func(p *piece) error) error {
		var p piece
		select {
		case p = <-free:
		case <-ctx.Done():
			return context.Cause(ctx)
		}
		p.off, p.n = off, n
		if err := fill(&p); err != nil {
			return err
		}
		select {
		case pieces <- p:
			return nil
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
	for e, err := range j.extents(ctx) {
		if err != nil {
			return fmt.Errorf("find what to copy of VDI %s: %w", j.From.Name, err)
		}
		if e.Hole && !sectors {
			if err := send(e.Off, e.Len, func(p *piece) error { p.data, p.old = nil, nil; return nil }); err != nil {
				return err
			}
			continue
		}
		for off := e.Off; off < e.End(); off += chunk {
			n := min(e.End()-off, chunk)
			err := send(off, n, func(p *piece) error { return j.fill(p, sectors, e.Hole) })
			if err != nil {
				return err
			}
		}
	}
	return nil
}

// fill reads a piece, and the same of the base when sectors are told apart.
func (j Job) fill(p *piece, sectors, hole bool) error {
	p.data = sized(p.data, p.n)
	if hole {
		clear(p.data)
	} else if n, err := j.From.ReadAt(p.data, p.off); n < len(p.data) {
		return fmt.Errorf("read VDI %s: %w", j.From.Name, err)
	}
	if !sectors {
		return nil
	}
	p.old = sized(p.old, p.n)
	if err := readOrZero(j.Base.Volume, p.old, p.off); err != nil {
		return fmt.Errorf("read VDI %s: %w", j.Base.Name, err)
	}
	return nil
}

// sized returns a buffer of n bytes, b if it is large enough.
func sized(b []byte, n int64) []byte {
	if int64(cap(b)) < n {
		return make([]byte, n, chunk)
	}
	return b[:n]
}

// extents yields what to copy: the source's data, and the holes of which it
// remembers that they were data of the base that it was a delta to; or what
// differs from the base.
func (j Job) extents(ctx context.Context) iter.Seq2[storage.Extent, error] {
	if j.Base != nil {
		return changed(ctx, j.Base.Repo, j.Base.Volume, j.From.Repo, j.From.Volume)
	}
	zeroed := parseZeroed(j.Zeroed, j.From.Size())
	return func(yield func(storage.Extent, error) bool) {
		for e, err := range j.From.Extents(ctx, 0, j.From.Size()) {
			if err != nil || !e.Hole {
				if !yield(e, err) {
					return
				}
				continue
			}
			for len(zeroed) > 0 && zeroed[0].End() <= e.Off {
				zeroed = zeroed[1:]
			}
			for _, z := range zeroed {
				from, to := max(z.Off, e.Off), min(z.End(), e.End())
				if from >= e.End() {
					break
				}
				if from < to && !yield(storage.Extent{Off: from, Len: to - from, Hole: true}, nil) {
					return
				}
			}
		}
	}
}
