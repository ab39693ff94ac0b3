package server

import (
	"cmp"
	"context"
	"io"

	"coppice/internal/qcow2"
	"coppice/internal/storage"
)

// readQcow2 writes the clusters that a qcow2 image holds and leaves all others
// as they are, whether or not the image names a backing file. Data that comes
// before its table lands in a scratch volume of the SR first, from where the
// disk takes it over without copying it.
func readQcow2(ctx context.Context, body io.Reader, length int64, u *upload) error {
	work := lateWork{total: length, report: u.done}
	var moved *storage.CloneBatch // from the scratch volume, nil when data is copied
	scratch := func() (qcow2.Spool, error) {
		size := length
		if size < 0 {
			size = storage.MaxSize
		}
		v, batch, err := u.scratch(size)
		moved, work.clones = batch, batch != nil
		return &spooled{v, &work}, err
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
	if length < 0 {
		work.total = r.Size()
	}
	err = u.receive(ctx, func(ctx context.Context, next func() (*piece, error), send func(*piece)) error {
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
				switch {
				case run.Zero:
					n = run.Len
					p.zero = n
				case moved != nil && run.Spooled && (run.Off|run.From|run.Len)%storage.Unit == 0:
					n = run.Len
					p.clone, p.from = moved, storage.RangeClone{To: run.Off, From: run.From, Len: n}
				default:
					p.data = p.data[:n]
					if _, err := io.ReadFull(r, p.data); err != nil {
						return u.bodyError(err)
					}
				}
				run.Off, run.Len = run.Off+n, run.Len-n
				if run.Spooled {
					work.moved += n
				}
				p.done, p.total = work.done(r.Consumed())
				send(p)
			}
		}
	})
	if err == nil && moved != nil {
		err = moved.Flush(ctx)
	}
	return err
}

// lateWork is what there is to do for an image parts of which have to wait: to
// receive it, and to move them, in bytes.
type lateWork struct {
	total  int64 // to receive, or a guess
	late   int64 // of it, to be moved
	moved  int64
	clones bool // moving does not copy
	report func(done, total int64)
}

// clonedPart is which part of receiving a byte it takes at most to clone one.
const clonedPart = 4

// done is how much has been done of how much, after so many bytes have come. The
// quotient does not fall when parts turn out to be late, but for a wrong guess.
func (w *lateWork) done(received int64) (done, total int64) {
	late, moved := w.late, min(w.moved, w.late) // parts may be named twice
	if w.clones {
		late, moved = late/clonedPart, moved/clonedPart
	}
	return received + moved, max(w.total, received) + late
}

// spooled is scratch space for parts that are late. While they come nothing else
// tells how far the image is.
type spooled struct {
	storage.Volume
	work *lateWork
}

// WriteAt implements [qcow2.Spool]; off is a place in the image.
func (s *spooled) WriteAt(p []byte, off int64) (int, error) {
	n, err := storage.WriteBulk(s.Volume, p, off)
	s.work.late += int64(n)
	s.work.report(s.work.done(off + int64(n)))
	return n, err
}
