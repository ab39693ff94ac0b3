package cow

import (
	"context"
	"fmt"
	"io"
	"iter"
	"sync/atomic"

	engine "coppice/internal/cow"
	"coppice/internal/storage"
)

// volume is an open volume.
type volume struct {
	d      *engine.Disk
	r      *repo
	id     storage.ID
	closed atomic.Bool
}

var (
	_ storage.Volume     = (*volume)(nil)
	_ storage.Versioned  = (*volume)(nil)
	_ storage.BulkWriter = (*volume)(nil)
)

func (v *volume) fail(doing string, err error) error { return translate(doing, v.id, err) }

func (v *volume) Size() int64 { return v.d.Size() }

func (v *volume) ReadAt(p []byte, off int64) (int, error) {
	n, err := v.d.ReadAt(p, off)
	if err != nil && err != io.EOF {
		err = v.fail("read", err)
	}
	return n, err
}

func (v *volume) WriteAt(p []byte, off int64) (int, error) {
	n, err := v.d.WriteAt(p, off)
	return n, v.fail("write", err)
}

func (v *volume) WriteBulk(p []byte, off int64) (int, error) {
	n, err := v.d.WriteBulk(p, off)
	return n, v.fail("write", err)
}

func (v *volume) Zero(ctx context.Context, off, n int64) error {
	err := v.r.usable(ctx)
	if err == nil {
		err = v.d.Zero(ctx, off, n)
	}
	return v.fail("zero", err)
}

func (v *volume) Flush(ctx context.Context) error {
	err := v.r.usable(ctx)
	if err == nil {
		err = v.d.Flush(ctx)
	}
	return v.fail("flush", err)
}

func (v *volume) Extents(ctx context.Context, off, n int64) iter.Seq2[storage.Extent, error] {
	return v.convert(ctx, "extents of", func() (iter.Seq2[engine.Extent, error], error) {
		return v.d.Extents(ctx, off, n), v.within(off, n)
	})
}

func (v *volume) Version(ctx context.Context) (string, error) {
	err := v.r.usable(ctx)
	if err == nil {
		var version string
		if version, err = v.d.Version(ctx); err == nil {
			return version, nil
		}
	}
	return "", v.fail("version of", err)
}

func (v *volume) Close() error {
	if v.closed.Swap(true) {
		return nil
	}
	return v.fail("close", v.d.Close())
}

// convert passes extents of the engine on. ask is called when the iteration
// begins.
func (v *volume) convert(ctx context.Context, doing string, ask func() (iter.Seq2[engine.Extent, error], error)) iter.Seq2[storage.Extent, error] {
	return func(yield func(storage.Extent, error) bool) {
		err := v.r.usable(ctx)
		var extents iter.Seq2[engine.Extent, error]
		if err == nil {
			extents, err = ask()
		}
		if err != nil {
			yield(storage.Extent{}, v.fail(doing, err))
			return
		}
		for e, err := range extents {
			if err == nil && ctx.Err() != nil {
				err = context.Cause(ctx)
			}
			if err != nil {
				yield(storage.Extent{}, v.fail(doing, err))
				return
			}
			if !yield(storage.Extent{Off: e.Off, Len: e.Len, Hole: e.Hole}, nil) {
				return
			}
		}
	}
}

// within refuses a range that is not in the volume.
func (v *volume) within(off, n int64) error {
	if size := v.Size(); off < 0 || n < 0 || off > size-n {
		return fmt.Errorf("%w: [%d, +%d) is not within a volume of %d bytes", storage.ErrInvalid, off, n, size)
	}
	return nil
}
