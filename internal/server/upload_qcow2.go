package server

import (
	"cmp"
	"context"
	"io"

	"coppice/internal/qcow2"
	"coppice/internal/storage"
)

// spool is a scratch volume from which what has been read goes at once.
type spool struct {
	storage.Volume
	zero func(off, n int64) error
}

func (s spool) Discard(off, n int64) error {
	first := (off + storage.Unit - 1) / storage.Unit * storage.Unit
	end := min(off+n, s.Size()) / storage.Unit * storage.Unit
	if first >= end {
		return nil
	}
	return s.zero(first, end-first)
}

// readQcow2 writes the clusters that a qcow2 image holds and leaves all others
// as they are, whether or not the image names a backing file. Data that comes
// before its table lands in a scratch volume of the SR first, and leaves it as it
// moves on to the disk, so that it takes the room of the SR once.
func readQcow2(ctx context.Context, body io.Reader, length int64, u *upload) error {
	scratch := func() (qcow2.Spool, error) {
		size := length
		if size < 0 {
			size = storage.MaxSize
		}
		v, err := u.scratch(size)
		if err != nil {
			return nil, err
		}
		return spool{v, func(off, n int64) error { return v.Zero(ctx, off, n) }}, nil
	}
	reading := ctx // ends early when a write fails
	r, err := qcow2.NewReader(body, qcow2.ReaderOptions{
		Length: length, Spool: scratch, Check: func() error { return context.Cause(reading) },
	})
	if err != nil {
		return &bodyError{err}
	}
	if r.Delta() {
		err = u.delta(nil)
	} else {
		err = u.whole()
	}
	if err := cmp.Or(err, u.holds(r.Size())); err != nil {
		return err
	}
	total := length
	if length < 0 {
		total = r.Size()
	}
	return u.receive(ctx, func(ctx context.Context, next func() (*piece, error), send func(*piece)) error {
		reading = ctx
		for {
			run, err := r.Next()
			if err == io.EOF {
				return nil
			}
			if err != nil {
				return u.bodyError(err)
			}
			for run.Len > 0 {
				p, err := next()
				if err != nil {
					return err
				}
				p.off = run.Off
				n := min(uploadChunk, run.Len)
				if run.Zero {
					n = run.Len
					p.zero = n
				} else {
					p.data = p.data[:n]
					if _, err := io.ReadFull(r, p.data); err != nil {
						return u.bodyError(err)
					}
				}
				run.Off, run.Len = run.Off+n, run.Len-n
				p.done, p.total = min(r.Consumed(), total), total
				send(p)
			}
		}
	})
}
