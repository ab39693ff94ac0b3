package mem

import (
	"context"
	"fmt"
	"iter"
	"strconv"
	"sync/atomic"

	"coppice/internal/storage"
)

// handle is what open volumes have in common.
type handle struct {
	repo   *repo
	closed atomic.Bool
}

func (h *handle) usable() error {
	if h.closed.Load() || h.repo.closed.Load() {
		return storage.ErrClosed
	}
	return nil
}

func (h *handle) Close() error {
	h.closed.Store(true)
	return nil
}

// viewer is an open volume of this driver.
type viewer interface {
	storage.Volume
	// view returns what the volume holds now, for the caller alone.
	view(r *repo) (contents, error)
	// origin is the volume that the contents are of or descend from. The
	// caller holds the store's lock.
	origin() storage.ID
}

// live is a volume opened Live.
type live struct {
	handle
	v *volume
}

var _ viewer = (*live)(nil)

// check refuses work on what is closed or gone. The caller holds v.mu.
func (l *live) check() error {
	if err := l.usable(); err != nil {
		return err
	}
	switch {
	case l.v.gone:
		return storage.ErrNotFound
	case l.v.ghost != nil:
		return storage.ErrNoData
	}
	return nil
}

// fail says which volume an error is about.
func (l *live) fail(doing string, err error) error {
	return fmt.Errorf("%s volume %s: %w", doing, l.v.id, err)
}

func (l *live) Size() int64 {
	l.v.mu.RLock()
	defer l.v.mu.RUnlock()
	return l.v.data.size
}

func (l *live) ReadAt(p []byte, off int64) (int, error) {
	l.v.mu.RLock()
	defer l.v.mu.RUnlock()
	if err := l.check(); err != nil {
		return 0, l.fail("read", err)
	}
	return l.v.data.read(p, off)
}

// change runs fn, which changes [off, off+n), or nothing when it fails, if the
// volume may be written.
func (l *live) change(doing string, off, n int64, fn func(contents) error) error {
	l.v.mu.Lock()
	defer l.v.mu.Unlock()
	err := l.check()
	if err == nil && l.v.readOnly {
		err = storage.ErrReadOnly
	}
	if err == nil {
		err = l.v.data.within(off, n)
	}
	if err == nil {
		err = fn(l.v.data)
	}
	if err != nil {
		return l.fail(doing, err)
	}
	l.repo.store.stamp(&l.v.data)
	return nil
}

func (l *live) WriteAt(p []byte, off int64) (int, error) {
	err := l.change("write", off, int64(len(p)), func(c contents) error {
		c.write(p, off)
		return nil
	})
	if err != nil {
		return 0, err
	}
	return len(p), nil
}

func (l *live) Zero(ctx context.Context, off, n int64) error {
	if ctx.Err() != nil {
		return l.fail("zero", context.Cause(ctx))
	}
	return l.change("zero", off, n, func(c contents) error {
		c.zero(off, n)
		return nil
	})
}

func (l *live) Flush(ctx context.Context) error {
	l.v.mu.RLock()
	defer l.v.mu.RUnlock()
	err := l.check()
	if err == nil && ctx.Err() != nil {
		err = context.Cause(ctx)
	}
	if err != nil {
		return l.fail("flush", err)
	}
	return nil
}

func (l *live) view(r *repo) (contents, error) {
	if l.repo != r {
		return contents{}, fmt.Errorf("%w: volume of another repository", storage.ErrInvalid)
	}
	l.v.mu.Lock()
	defer l.v.mu.Unlock()
	if err := l.check(); err != nil {
		return contents{}, err
	}
	return l.v.data.copy(), nil
}

func (l *live) origin() storage.ID { return l.v.id }

func (l *live) Extents(ctx context.Context, off, n int64) iter.Seq2[storage.Extent, error] {
	return extents(ctx, l.repo, l, off, n)
}

// pinned is a volume opened Pinned.
type pinned struct {
	handle
	data   contents   // never changes
	parent storage.ID // guarded by store.mu: what the data descends from, or is of
}

var (
	_ viewer            = (*pinned)(nil)
	_ storage.Versioned = (*pinned)(nil)
)

func (p *pinned) Close() error {
	p.repo.store.mu.Lock()
	defer p.repo.store.mu.Unlock()
	delete(p.repo.store.pins, p)
	return p.handle.Close()
}

func (p *pinned) Size() int64 { return p.data.size }

func (p *pinned) ReadAt(b []byte, off int64) (int, error) {
	if err := p.usable(); err != nil {
		return 0, err
	}
	return p.data.read(b, off)
}

// refuse is the answer to every write.
func (p *pinned) refuse() error {
	if err := p.usable(); err != nil {
		return err
	}
	return fmt.Errorf("pinned volume: %w", storage.ErrReadOnly)
}

func (p *pinned) WriteAt([]byte, int64) (int, error)       { return 0, p.refuse() }
func (p *pinned) Zero(context.Context, int64, int64) error { return p.refuse() }
func (p *pinned) Flush(context.Context) error              { return p.usable() }

func (p *pinned) Version(ctx context.Context) (string, error) {
	if ctx.Err() != nil {
		return "", context.Cause(ctx)
	}
	return strconv.FormatUint(p.data.version, 10), p.usable()
}

func (p *pinned) view(r *repo) (contents, error) {
	if p.repo != r {
		return contents{}, fmt.Errorf("%w: volume of another repository", storage.ErrInvalid)
	}
	return p.data, p.usable()
}

func (p *pinned) origin() storage.ID { return p.parent }

func (p *pinned) Extents(ctx context.Context, off, n int64) iter.Seq2[storage.Extent, error] {
	return extents(ctx, p.repo, p, off, n)
}

func extents(ctx context.Context, r *repo, v viewer, off, n int64) iter.Seq2[storage.Extent, error] {
	return func(yield func(storage.Extent, error) bool) {
		data, err := v.view(r)
		if err == nil {
			err = data.within(off, n)
		}
		if err != nil {
			yield(storage.Extent{}, fmt.Errorf("extents: %w", err))
			return
		}
		data.extents(ctx, off, n)(yield)
	}
}
