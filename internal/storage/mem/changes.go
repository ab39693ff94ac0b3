package mem

import (
	"cmp"
	"context"
	"fmt"
	"iter"
	"weak"

	"coppice/internal/storage"

	"github.com/tidwall/btree"
)

// ghost remembers which pages a volume had, by their addresses, without
// keeping them: weak pointers stay equal or not after what they point to is
// gone.
type ghost struct {
	size  int64
	pages btree.Map[int64, weak.Pointer[page]]
}

func (c contents) ghost() *ghost {
	g := &ghost{size: c.size}
	c.pages.Scan(func(unit int64, p *page) bool {
		g.pages.Set(unit, weak.Make(p))
		return true
	})
	return g
}

func (r *repo) DestroyData(ctx context.Context, id storage.ID) error {
	return r.update(ctx, "destroy the data of", id, func() error {
		v, err := r.find(id)
		switch {
		case err != nil:
			return err
		case !v.readOnly:
			return fmt.Errorf("%w: the volume is writable", storage.ErrInvalid)
		case v.ghost != nil:
			return nil
		}
		v.mu.Lock()
		defer v.mu.Unlock()
		v.ghost, v.data = v.data.ghost(), newContents(v.data.size)
		return nil
	})
}

func (r *repo) CloneRanges(ctx context.Context, to, from storage.Volume, ranges []storage.RangeClone) error {
	err := r.usable(ctx)
	var src contents
	if err == nil {
		src, err = r.viewOf(from)
	}
	if err != nil {
		return fmt.Errorf("clone ranges: %w", err)
	}
	switch dst := to.(type) {
	case *live:
		if dst.repo == r {
			return dst.cloneRanges(src, ranges)
		}
	case *pinned:
		return dst.refuse()
	}
	return fmt.Errorf("clone ranges: %w: volume of another repository", storage.ErrInvalid)
}

// cloneRanges takes ranges over from what is another volume's, or was its own.
func (l *live) cloneRanges(src contents, ranges []storage.RangeClone) error {
	return l.change("clone ranges into", 0, 0, func(c contents) error {
		left := int64(storage.MaxRangeClone)
		for _, r := range ranges {
			if err := cmp.Or(c.within(r.To, r.Len), src.within(r.From, r.Len)); err != nil {
				return err
			}
			if left -= r.Len; (r.To|r.From|r.Len)%storage.Unit != 0 || left < 0 {
				return fmt.Errorf("%w: %d bytes from %d to %d, in units of %d", storage.ErrInvalid, r.Len, r.From, r.To, storage.Unit)
			}
		}
		for _, r := range ranges {
			c.drop(r.To/storage.Unit, (r.To+r.Len)/storage.Unit)
			first, last := r.From/storage.Unit, (r.From+r.Len)/storage.Unit
			src.pages.Ascend(first, func(unit int64, p *page) bool {
				if unit < last {
					c.pages.Set(unit-first+r.To/storage.Unit, p)
				}
				return unit < last
			})
		}
		return nil
	})
}

func (r *repo) Diff(ctx context.Context, from, to storage.Volume, off int64) iter.Seq2[storage.Extent, error] {
	return func(yield func(storage.Extent, error) bool) {
		a, err := r.viewOf(from)
		var b contents
		if err == nil {
			b, err = r.viewOf(to)
		}
		if err == nil {
			err = b.within(off, 0)
		}
		if err != nil {
			yield(storage.Extent{}, fmt.Errorf("diff: %w", err))
			return
		}
		b.diff(ctx, a, off)(yield)
	}
}

func (r *repo) ChangedSince(ctx context.Context, from storage.ID, to storage.Volume, off int64) iter.Seq2[storage.Extent, error] {
	return func(yield func(storage.Extent, error) bool) {
		fail := func(err error) {
			yield(storage.Extent{}, fmt.Errorf("changes since volume %s: %w", from, err))
		}
		b, err := r.viewOf(to)
		if err == nil {
			err = b.within(off, 0)
		}
		if err != nil {
			fail(err)
			return
		}
		a, old, err := r.past(ctx, from, to.(viewer))
		switch {
		case err != nil:
			fail(err)
		case old != nil:
			b.since(ctx, old, off)(yield)
		default:
			b.diff(ctx, a, off)(yield)
		}
	}
}

// past returns what a volume holds, or, if to descends from it, what it held
// before its data was destroyed.
func (r *repo) past(ctx context.Context, from storage.ID, to viewer) (contents, *ghost, error) {
	r.store.mu.RLock()
	defer r.store.mu.RUnlock()
	if err := r.usable(ctx); err != nil {
		return contents{}, nil, err
	}
	v, err := r.find(from)
	if err != nil {
		return contents{}, nil, err
	}
	if v.ghost == nil {
		v.mu.Lock()
		defer v.mu.Unlock()
		return v.data.copy(), nil, nil
	}
	for id := to.origin(); id != from; {
		up, ok := r.store.volumes.Get(id)
		if !ok {
			return contents{}, nil, storage.ErrNoLineage
		}
		id = up.parent
	}
	return contents{}, v.ghost, nil
}

// since yields where c differs from what has become a ghost. Nobody else uses
// c.
func (c contents) since(ctx context.Context, old *ghost, off int64) iter.Seq2[storage.Extent, error] {
	return func(yield func(storage.Extent, error) bool) {
		a := old.pages.Iter()
		ok := a.Seek(off / storage.Unit)
		differ(ctx, c, off, &a, ok, func(was weak.Pointer[page], is *page) bool { return was == weak.Make(is) }, yield)
	}
}

func (r *repo) viewOf(v storage.Volume) (contents, error) {
	mine, ok := v.(viewer)
	if !ok {
		return contents{}, fmt.Errorf("%w: volume of another driver", storage.ErrInvalid)
	}
	return mine.view(r)
}
