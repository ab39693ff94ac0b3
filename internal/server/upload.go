package server

import (
	"bufio"
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"

	"coppice/internal/storage"
	"coppice/internal/vhd"
	"coppice/internal/xapi"

	"github.com/google/uuid"
)

const (
	// writeBehind is how many buffers of an upload are received before they
	// are stored, and uploadChunk the size of each in bytes.
	writeBehind = 4
	uploadChunk = 1 << 20
)

// upload is a disk to be written.
type upload struct {
	size    int64 // of the disk in bytes
	offset  int64 // where the contents of a raw body begin
	overlay *storage.Overlay
	stored  int64 // end of what was written last
	wants   imageKind
	parent  string                  // what a delta must be to, the UUID of a snapshot; "" for anything
	done    func(done, total int64) // told after each write; safe for concurrent use

	// interrupt makes reading from the body fail at once.
	interrupt func()

	// scratch makes a volume of a size for parts of the body that have to
	// wait, which goes with the upload, and what moves them on to the disk; that
	// is nil when they have to be copied.
	scratch func(size int64) (storage.Volume, *storage.CloneBatch, error)

	// atomic makes everything that is written from now on, which must be
	// everything, appear at once in the end or not at all.
	atomic func() error
}

// imageKind is what kind of image may come.
type imageKind int

const (
	anyImage imageKind = iota
	wholeImage
	deltaImage
)

// bodyError is a fault of what the client sends: not an image, not for this
// disk, not complete.
type bodyError struct{ err error }

func (e *bodyError) Error() string { return e.err.Error() }
func (e *bodyError) Unwrap() error { return e.err }

// bodyError makes an error of a decoder one of the body, unless it is one of
// the storage that the decoder used as scratch space.
func (u *upload) bodyError(err error) error {
	for _, ours := range []error{
		storage.ErrNoSpace, storage.ErrCorrupt, storage.ErrClosed, storage.ErrReadOnly, storage.ErrRepoReadOnly, storage.ErrNotFound, storage.ErrInvalid,
	} {
		if errors.Is(err, ours) {
			return err
		}
	}
	if _, ok := errors.AsType[*xapi.Error](err); ok {
		return err
	}
	return &bodyError{err}
}

// holds checks that an image of a disk of size bytes fits.
func (u *upload) holds(size int64) error {
	if size > u.size {
		return badBody("the image is of a disk of %d bytes, this one has %d", size, u.size)
	}
	return nil
}

// whole checks that an image that is no delta may come.
func (u *upload) whole() error {
	switch {
	case u.parent != "":
		return badBody("the data does not say that it is a delta to %s", u.parent)
	case u.wants == deltaImage:
		return badBody("the image is no delta")
	}
	return nil
}

// delta checks that an image that is one may come. parent is what the image
// says that it is a delta to, nil when its format does not tell.
func (u *upload) delta(parent *uuid.UUID) error {
	if u.wants == wholeImage {
		return badBody("the image is a delta")
	}
	if u.parent == "" || parent == nil {
		return nil
	}
	want, err := uuid.Parse(u.parent)
	if err != nil {
		return err
	}
	if *parent != vhd.WellFormed(want) {
		return badBody("the image is a delta to %s, not to %s", parent, u.parent)
	}
	return nil
}

func badBody(format string, args ...any) error { return &bodyError{fmt.Errorf(format, args...)} }

// piece is a range of a disk on its way from the client to the volume.
type piece struct {
	off         int64
	data        []byte
	zero        int64 // bytes that become zero, instead of data
	done, total int64 // progress when it is stored

	// What is cloned instead, nil for nothing.
	clone *storage.CloneBatch
	from  storage.RangeClone
}

// size is how much of the disk a piece covers, in bytes.
func (p *piece) size() int64 {
	switch {
	case p.clone != nil:
		return p.from.Len
	case p.zero > 0:
		return p.zero
	}
	return int64(len(p.data))
}

// receive stores the pieces that read cuts out of the body, each one while
// the next is being received. read gets buffers of uploadChunk bytes and
// reslices them; its context ends when a write fails, too.
func (u *upload) receive(ctx context.Context, read func(ctx context.Context, next func() (*piece, error), send func(*piece)) error) error {
	buffers := make([]*piece, writeBehind)
	for i := range buffers {
		buffers[i] = &piece{data: make([]byte, uploadChunk)}
	}
	produce := func(ctx context.Context, next func() (*piece, error), send func(*piece)) error {
		// When a write fails, the client may be sending nothing for long.
		defer context.AfterFunc(ctx, u.interrupt)()
		return read(ctx, func() (*piece, error) {
			p, err := next()
			if err == nil {
				p.data, p.zero, p.clone = p.data[:uploadChunk], 0, nil
			}
			return p, err
		}, send)
	}
	return relay(ctx, buffers, produce, func(p *piece) error {
		var err error
		switch {
		case p.clone != nil:
			err = p.clone.Add(ctx, p.from)
		case p.zero > 0:
			err = u.overlay.Zero(ctx, p.off, p.zero)
		default:
			err = u.overlay.WriteAt(ctx, p.data, p.off)
		}
		if err != nil {
			return err
		}
		u.stored = p.off + p.size()
		u.done(p.done, p.total)
		return nil
	})
}

// readRaw writes the body from the start of the disk, or an offset, on. What lies behind the
// end of a shorter body stays as it is; a longer one is a fault.
func readRaw(ctx context.Context, body io.Reader, length int64, u *upload) error {
	if err := u.whole(); err != nil {
		return err
	}
	total := u.offset + length
	if length < 0 {
		total = u.size
	}
	return u.receive(ctx, func(_ context.Context, next func() (*piece, error), send func(*piece)) error {
		for off := u.offset; off < u.size; {
			p, err := next()
			if err != nil {
				return err
			}
			n, err := io.ReadFull(body, p.data[:min(uploadChunk, u.size-off)])
			if n > 0 {
				p.off, p.data = off, p.data[:n]
				off += int64(n)
				p.done, p.total = off, total
				send(p)
			}
			switch {
			case err == io.EOF, err == io.ErrUnexpectedEOF: // of ReadFull: the body has its end here
				return nil
			case err != nil:
				return &bodyError{err}
			}
		}
		switch n, err := io.ReadFull(body, make([]byte, 1)); {
		case n > 0:
			return badBody("more bytes than the disk has, which are %d", u.size)
		case err != io.EOF:
			return &bodyError{err}
		}
		return nil
	})
}

// readVHD writes the sectors that a VHD holds and leaves all others as they
// are. Whether the image is a delta makes no difference, and neither does the
// size of its disk as long as no sector lies behind the end of this one.
func readVHD(ctx context.Context, body io.Reader, length int64, u *upload) error {
	body, length, err := skipLineEnd(body, length)
	if err != nil {
		return &bodyError{err}
	}
	start := bufio.NewReaderSize(body, 4096)
	if b, _ := start.Peek(vhd.FixedPeek); len(b) >= 8 && vhd.IsFixed(b) { // an error comes again
		return readFixedVHD(ctx, start, length, u)
	}
	body = start
	r, err := vhd.NewReader(body, vhd.ReaderOptions{Length: length})
	if err != nil {
		return &bodyError{err}
	}
	if r.Footer().Type() == vhd.TypeDifferencing {
		parent := uuid.UUID(r.Header().ParentUUID())
		err = u.delta(&parent)
	} else {
		err = u.whole()
	}
	if err != nil {
		return err
	}
	if r.LastBlock() >= u.size {
		return badBody("the image has data at byte %d, the disk ends at %d", r.LastBlock(), u.size)
	}
	return u.receive(ctx, func(_ context.Context, next func() (*piece, error), send func(*piece)) error {
		for {
			run, err := r.Next()
			switch {
			case err == io.EOF:
				return nil
			case err != nil:
				return &bodyError{err}
			case run.Off+run.Len > u.size:
				return badBody("the image has data up to byte %d, the disk ends at %d", run.Off+run.Len, u.size)
			}
			for run.Len > 0 {
				p, err := next()
				if err != nil {
					return err
				}
				p.off, p.data = run.Off, p.data[:min(uploadChunk, run.Len)]
				if _, err := io.ReadFull(r, p.data); err != nil {
					return &bodyError{err}
				}
				run.Off += int64(len(p.data))
				run.Len -= int64(len(p.data))
				p.done, p.total = int64(r.Done()), int64(r.Blocks())
				send(p)
			}
		}
	})
}

// readFixedVHD writes the contents of a fixed VHD. Only its footer, at the end,
// tells that it is one, so everything is written at once or not at all.
func readFixedVHD(ctx context.Context, body io.Reader, length int64, u *upload) error {
	r, err := vhd.NewFixedReader(body, vhd.ReaderOptions{Length: length})
	if err != nil {
		return &bodyError{err}
	}
	if err := cmp.Or(u.holds(r.Size()), u.whole()); err != nil {
		return err
	}
	if err := u.atomic(); err != nil {
		return err
	}
	return readRaw(ctx, r, r.Size(), u)
}

// skipLineEnd drops one CRLF in front of a VHD: a request that ends in an
// empty line too many puts one there, and a VHD never begins like that.
func skipLineEnd(body io.Reader, length int64) (io.Reader, int64, error) {
	var start [2]byte
	n, err := io.ReadFull(body, start[:])
	if err != nil && err != io.EOF && !errors.Is(err, io.ErrUnexpectedEOF) {
		return nil, 0, err
	}
	if string(start[:n]) != "\r\n" {
		return io.MultiReader(bytes.NewReader(start[:n]), body), length, nil
	}
	return body, max(length-2, -1), nil
}
