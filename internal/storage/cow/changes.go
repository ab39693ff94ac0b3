package cow

import (
	"context"
	"fmt"
	"iter"

	engine "coppice/internal/cow"
	"coppice/internal/storage"
)

func (r *repo) Diff(ctx context.Context, from, to storage.Volume, off int64) iter.Seq2[storage.Extent, error] {
	a, ok := from.(*volume)
	if !ok || a.r != r {
		return foreign("diff")
	}
	return r.changes(ctx, "diff to", to, off, func(b *engine.Disk) iter.Seq2[engine.Extent, error] {
		return r.s.Diff(ctx, a.d, b, off)
	})
}

func (r *repo) ChangedSince(ctx context.Context, from storage.ID, to storage.Volume, off int64) iter.Seq2[storage.Extent, error] {
	return r.changes(ctx, "changes since "+string(from)+" of", to, off, func(b *engine.Disk) iter.Seq2[engine.Extent, error] {
		return r.s.ChangedSince(ctx, engineID(from), b, off)
	})
}

// changes passes on what find yields of an open volume of this repo.
func (r *repo) changes(ctx context.Context, doing string, to storage.Volume, off int64, find func(*engine.Disk) iter.Seq2[engine.Extent, error]) iter.Seq2[storage.Extent, error] {
	b, ok := to.(*volume)
	if !ok || b.r != r {
		return foreign(doing)
	}
	return b.convert(ctx, doing, func() (iter.Seq2[engine.Extent, error], error) {
		return find(b.d), b.within(off, 0)
	})
}

// foreign is the answer about a volume that is not of this repo.
func foreign(doing string) iter.Seq2[storage.Extent, error] {
	return func(yield func(storage.Extent, error) bool) {
		yield(storage.Extent{}, fmt.Errorf("%s: %w: volume of another repository", doing, storage.ErrInvalid))
	}
}

func (r *repo) CloneRanges(ctx context.Context, to, from storage.Volume, ranges []storage.RangeClone) error {
	a, ok := to.(*volume)
	if !ok || a.r != r {
		return fmt.Errorf("clone ranges: %w: volume of another repository", storage.ErrInvalid)
	}
	b, ok := from.(*volume)
	if !ok || b.r != r {
		return fmt.Errorf("clone ranges: %w: volume of another repository", storage.ErrInvalid)
	}
	err := r.usable(ctx)
	if err == nil {
		list := make([]engine.RangeClone, len(ranges))
		for i, c := range ranges {
			list[i] = engine.RangeClone(c)
		}
		err = r.s.CloneRanges(ctx, a.d, b.d, list)
	}
	return a.fail("clone ranges into", err)
}

func (r *repo) DestroyData(ctx context.Context, id storage.ID) error {
	err := r.usable(ctx)
	if err == nil {
		err = r.s.DestroyData(ctx, engineID(id))
	}
	return translate("destroy the data of", id, err)
}
