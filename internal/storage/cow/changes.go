package cow

import (
	"context"
	"fmt"
	"iter"

	engine "coppice/internal/cow"
	"coppice/internal/storage"
)

func (r *repo) Diff(ctx context.Context, from, to storage.Volume, off int64) iter.Seq2[storage.Extent, error] {
	a, ok := r.own(from)
	if !ok {
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
	b, ok := r.own(to)
	if !ok {
		return foreign(doing)
	}
	return b.convert(ctx, doing, func() (iter.Seq2[engine.Extent, error], error) {
		return find(b.d), b.within(off, 0)
	})
}

// own returns an open volume of this repo; ok is false for one of another.
func (r *repo) own(v storage.Volume) (mine *volume, ok bool) {
	mine, ok = v.(*volume)
	return mine, ok && mine.r == r
}

// errForeign is the answer about a volume that is not of this repo.
func errForeign(doing string) error {
	return fmt.Errorf("%s: %w: volume of another repository", doing, storage.ErrInvalid)
}

// foreign is errForeign where extents are asked for.
func foreign(doing string) iter.Seq2[storage.Extent, error] {
	return func(yield func(storage.Extent, error) bool) { yield(storage.Extent{}, errForeign(doing)) }
}

func (r *repo) CloneRanges(ctx context.Context, to, from storage.Volume, ranges []storage.RangeClone) error {
	a, mine := r.own(to)
	b, too := r.own(from)
	if !mine || !too {
		return errForeign("clone ranges")
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
