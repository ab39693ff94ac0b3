package mem

import (
	"context"
	"fmt"
	"iter"
	"slices"
	"time"

	"coppice/internal/storage"
)

// WouldFree counts the pages that only the volumes have.
func (r *repo) WouldFree(ctx context.Context, ids ...storage.ID) (storage.Freed, error) {
	const doing = "estimate space"
	f := storage.Freed{At: time.Now(), Exact: true}
	for _, id := range ids {
		if _, err := r.Stat(ctx, id); err != nil {
			return storage.Freed{}, fmt.Errorf("%s: %w", doing, err)
		}
	}
	kept, freed := map[*page]bool{}, map[*page]bool{}
	err := r.everyVolume(ctx, func(id storage.ID, data contents) bool {
		pages := kept
		if slices.Contains(ids, id) {
			pages = freed
		}
		data.pages.Scan(func(_ int64, p *page) bool {
			pages[p] = true
			return true
		})
		return true
	})
	if err != nil {
		return storage.Freed{}, fmt.Errorf("%s: %w", doing, err)
	}
	for p := range freed {
		if !kept[p] {
			f.Bytes += storage.Unit
		}
	}
	return f, nil
}

// Check is a scrub at full speed.
func (r *repo) Check(ctx context.Context) iter.Seq2[storage.Problem, error] {
	return r.Scrub(ctx, storage.ScrubOptions{})
}

// Scrub looks for pages that should not be there, volume by volume at the rate
// that is asked for.
func (r *repo) Scrub(ctx context.Context, o storage.ScrubOptions) iter.Seq2[storage.Problem, error] {
	return func(yield func(storage.Problem, error) bool) {
		var done, total int64
		progress := func(n int64) {
			if done += n; o.Progress != nil {
				o.Progress(done, max(done, total))
			}
		}
		for info, err := range r.List(ctx) {
			if err != nil {
				yield(storage.Problem{}, fmt.Errorf("scrub: %w", err))
				return
			}
			total += info.Used
		}
		due, stopped := time.Now(), false
		var late error
		err := r.everyVolume(ctx, func(id storage.ID, data contents) bool {
			data.pages.Scan(func(unit int64, p *page) bool {
				problem := storage.Problem{Volume: id, Off: unit * storage.Unit}
				switch {
				case problem.Off < 0 || problem.Off >= data.size:
					problem.Detail = "page outside of the volume"
				case *p == zeroPage:
					problem.Detail = "page of zeros"
				default:
					return true
				}
				stopped = !yield(problem, nil)
				return !stopped
			})
			n := int64(data.pages.Len()) * storage.Unit
			progress(n)
			if o.BytesPerSecond > 0 && !stopped {
				due = due.Add(time.Duration(float64(n) / float64(o.BytesPerSecond) * float64(time.Second)))
				late = waitUntil(ctx, due)
			}
			return !stopped && late == nil
		})
		if err == nil {
			err = late
		}
		switch {
		case stopped:
		case err != nil:
			yield(storage.Problem{}, fmt.Errorf("scrub: %w", err))
		default:
			total = done
			progress(0)
		}
	}
}

func waitUntil(ctx context.Context, due time.Time) error {
	t := time.NewTimer(time.Until(due))
	defer t.Stop()
	select {
	case <-t.C:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

func (r *repo) RepoAttrs(ctx context.Context) ([]byte, error) {
	r.store.mu.RLock()
	defer r.store.mu.RUnlock()
	if err := r.usable(ctx); err != nil {
		return nil, fmt.Errorf("attributes of the repository: %w", err)
	}
	return slices.Clone(r.store.attrs), nil
}

func (r *repo) SetRepoAttrs(ctx context.Context, attrs []byte) error {
	r.store.mu.Lock()
	defer r.store.mu.Unlock()
	err := r.usable(ctx)
	if err == nil {
		err = storage.ValidateAttrs(attrs)
	}
	if err != nil {
		return fmt.Errorf("set the attributes of the repository: %w", err)
	}
	r.store.attrs = slices.Clone(attrs)
	return nil
}
