package api

import (
	"bytes"
	"context"
	"fmt"
	"iter"
	"sync"

	"coppice/internal/storage"
)

const (
	// copyChunk is how much a copy moves at a time, and how often it looks
	// whether it has been cancelled, in bytes.
	copyChunk = 1 << 20
	// copyAhead is how many chunks are read ahead of what is written.
	copyAhead = 4
	// sector is the granularity of a copy against a base into an existing
	// disk, in bytes.
	sector = 512
)

// copyJob is what is to be copied.
type copyJob struct {
	call *Call
	src  *openDisk
	base *openDisk // nil for everything
	// sectors copies only sectors that differ from the base, for a
	// destination whose other sectors are its own.
	sectors bool
	zeroed  *zeroedText // of a copy to a new disk: collects what is zero in it on purpose; may be nil
}

// copyPiece is a part of the source on its way to the destination.
type copyPiece struct {
	off, n int64
	data   []byte // nil when all of it is zero
	old    []byte // of the base, when sectors are told apart; same length as data
}

// run hands every range to be copied to write or, where it is zero in the
// source and was not in the base, to zero, in ascending order. It reads ahead
// of them, and has stopped reading when it returns.
func (j copyJob) run(ctx context.Context, write func([]byte, int64) error, zero func(off, n int64) error) error {
	ctx, stop := context.WithCancel(ctx)
	pieces := make(chan copyPiece, copyAhead)
	free := make(chan copyPiece, copyAhead+2) // one is being filled, one written
	for range cap(free) {
		free <- copyPiece{}
	}
	var failed error // of the reader
	var reader sync.WaitGroup
	reader.Go(func() {
		defer close(pieces)
		failed = j.read(ctx, free, pieces)
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
		j.call.Progress(p.off+p.n, j.src.Size())
		free <- p
	}
	if failed != nil {
		return failed
	}
	return context.Cause(ctx)
}

// writeChanged writes the sectors of a piece that differ from the base.
func writeChanged(p copyPiece, write func([]byte, int64) error) error {
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
func (j copyJob) read(ctx context.Context, free <-chan copyPiece, pieces chan<- copyPiece) error {
	send := func(off, n int64, fill func(p *copyPiece) error) error {
		var p copyPiece
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
			return fmt.Errorf("find what to copy of VDI %s: %w", j.src.rec.UUID, err)
		}
		if e.Hole && !j.sectors {
			if err := send(e.Off, e.Len, func(p *copyPiece) error { p.data, p.old = nil, nil; return nil }); err != nil {
				return err
			}
			continue
		}
		for off := e.Off; off < e.End(); off += copyChunk {
			n := min(e.End()-off, copyChunk)
			err := send(off, n, func(p *copyPiece) error { return j.fill(p, e.Hole) })
			if err != nil {
				return err
			}
		}
	}
	return nil
}

// fill reads a piece, and the same of the base when sectors are told apart.
func (j copyJob) fill(p *copyPiece, hole bool) error {
	p.data = sized(p.data, p.n)
	if hole {
		clear(p.data)
	} else if n, err := j.src.ReadAt(p.data, p.off); n < len(p.data) {
		return fmt.Errorf("read VDI %s: %w", j.src.rec.UUID, err)
	}
	if !j.sectors {
		return nil
	}
	p.old = sized(p.old, p.n)
	if err := readOrZero(j.base.Volume, p.old, p.off); err != nil {
		return fmt.Errorf("read VDI %s: %w", j.base.rec.UUID, err)
	}
	return nil
}

// sized returns a buffer of n bytes, b if it is large enough.
func sized(b []byte, n int64) []byte {
	if int64(cap(b)) < n {
		return make([]byte, n, copyChunk)
	}
	return b[:n]
}

// extents yields what to copy: the source's data, and the holes of which it
// remembers that they were data of the base that it was a delta to; or what
// differs from the base.
func (j copyJob) extents(ctx context.Context) iter.Seq2[storage.Extent, error] {
	if j.base != nil {
		return changed(ctx, j.base.repo.Repo, j.base.Volume, j.src.repo.Repo, j.src.Volume)
	}
	zeroed := parseZeroed(j.src.rec.SMConfig[zeroedKey], j.src.Size())
	return func(yield func(storage.Extent, error) bool) {
		for e, err := range j.src.Extents(ctx, 0, j.src.Size()) {
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
