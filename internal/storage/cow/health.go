package cow

import (
	"context"
	"fmt"
	"iter"

	engine "coppice/internal/cow"
	"coppice/internal/storage"
)

// WouldFree answers from the last checkpoint, which is at most as old as the
// engine lets a change wait.
func (r *repo) WouldFree(ctx context.Context, ids ...storage.ID) (storage.Freed, error) {
	const doing = "estimate the space of"
	if err := r.usable(ctx); err != nil {
		return storage.Freed{}, translate(doing, "", err)
	}
	names := make([]engine.ID, len(ids))
	for i, id := range ids {
		names[i] = engineID(id)
	}
	f, err := r.s.WouldFree(ctx, names...)
	if err != nil {
		return storage.Freed{}, translate(doing, "", err)
	}
	return storage.Freed{Bytes: f.Bytes, At: f.At, Exact: f.Exact}, nil
}

func (r *repo) WrittenSinceParent(ctx context.Context, id storage.ID) (int64, error) {
	err := r.usable(ctx)
	if err == nil {
		var n int64
		if n, err = r.s.Written(ctx, engineID(id)); err == nil {
			return n, nil
		}
	}
	return 0, translate("count what has been written to", id, err)
}

// Check is a scrub at full speed.
func (r *repo) Check(ctx context.Context) iter.Seq2[storage.Problem, error] {
	return r.Scrub(ctx, storage.ScrubOptions{})
}

func (r *repo) Scrub(ctx context.Context, o storage.ScrubOptions) iter.Seq2[storage.Problem, error] {
	return func(yield func(storage.Problem, error) bool) {
		if err := r.usable(ctx); err != nil {
			yield(storage.Problem{}, translate("scrub", "", err))
			return
		}
		for p, err := range r.s.Scrub(ctx, engine.ScrubOptions{BytesPerSecond: o.BytesPerSecond, Progress: o.Progress}) {
			if err != nil {
				yield(storage.Problem{}, translate("scrub", "", err))
				return
			}
			if !yield(problem(p), nil) {
				return
			}
		}
	}
}

func (r *repo) Damage(ctx context.Context) ([]storage.Problem, error) {
	if err := r.usable(ctx); err != nil {
		return nil, translate("list damage", "", err)
	}
	found := r.s.Damage()
	list := make([]storage.Problem, len(found))
	for i, p := range found {
		list[i] = problem(p)
	}
	return list, nil
}

// problem is p with the place in the store as text.
func problem(p engine.Problem) storage.Problem {
	out := storage.Problem{Off: p.Off, Len: p.Len, Detail: p.Detail, Done: p.Done}
	if p.Addr != 0 {
		out.Detail = fmt.Sprintf("unit %d: %s", p.Addr, p.Detail)
	}
	if p.Volume != (engine.ID{}) {
		out.Volume = volumeID(p.Volume)
	}
	return out
}
