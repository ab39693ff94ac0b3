package cow

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"maps"
	"slices"
	"sync"
	"time"
)

// Freed is what the deletion of some volumes would give back.
type Freed struct {
	Bytes int64 // of data, map pages and attributes

	// At is when the checkpoint was made whose state has been looked at, or
	// the store opened, if there has been none since.
	At time.Time

	// Exact is false when checkpoints followed each other faster than the
	// volumes could be walked: then some parts are from before and some from
	// after a change.
	Exact bool
}

const (
	freeTries = 3                     // walks that may be overtaken by a checkpoint before one goes on regardless
	freeSlice = 10 * time.Millisecond // how long a walk keeps a checkpoint waiting
	maxFreed  = 4096                  // results kept
)

// freeCache keeps the results of one generation by the numbers of the
// volumes.
type freeCache struct {
	mu      sync.Mutex // guards what follows
	gen     uint64
	at      time.Time
	results map[string]Freed
}

// WouldFree tells what deleting all of the volumes would give back: every unit
// to which nothing refers but them. For one volume that is what it has of its
// own; for a set it is more than the sum, by what only its members share.
//
// It looks at the last checkpoint: later changes do not count, a volume that
// is younger counts as nothing, and neither does what deleted volumes have and
// the reaper has not come to yet. What an open pinned disk holds would not
// come back. It changes nothing, costs in proportion to what would be freed,
// and keeps in memory what it meets of units that others share. A result is
// kept until the next checkpoint. Errors: [ErrNotFound]; a *CorruptError;
// [ErrFailed], as the counters of a failed store cannot be trusted.
func (s *Store) WouldFree(ctx context.Context, ids ...ID) (Freed, error) {
	if err := s.begin(); err != nil {
		return Freed{}, err
	}
	defer s.end()
	vols := map[uint64]ID{}
	s.mu.Lock()
	for _, id := range ids {
		v, err := s.lookup(id)
		if err != nil {
			s.mu.Unlock()
			return Freed{}, err
		}
		vols[v.num] = id
	}
	s.mu.Unlock()
	nums := slices.Sorted(maps.Keys(vols))
	for try := 1; ; try++ {
		w := &freeWalk{s: s, stay: try > freeTries, shared: map[uint64]uint32{}}
		f, err := w.run(ctx, nums)
		if err == errOvertaken {
			continue
		}
		if err != nil {
			return Freed{}, fmt.Errorf("counting what %d volumes have of their own: %w", len(nums), err)
		}
		return f, nil
	}
}

// withTrees calls f while trees and counters are those of the last checkpoint.
// The next one waits for it.
func (s *Store) withTrees(ctx context.Context, f func() error) error {
	select {
	case s.trees <- struct{}{}:
	case <-ctx.Done():
		return context.Cause(ctx)
	}
	defer func() { <-s.trees }()
	if err := s.failure(); err != nil {
		return err
	}
	return f()
}

// errOvertaken ends a walk that a checkpoint has overtaken.
var errOvertaken = errors.New("overtaken by a checkpoint")

// freeWalk is what the reaper would do if it got the roots of some volumes,
// without doing it.
type freeWalk struct {
	s        *Store
	stay     bool // go on when a checkpoint has overtaken the walk
	gen      uint64
	overtook bool
	shared   map[uint64]uint32 // references found to units that have more
	stack    []entry
	units    int64
}

func (w *freeWalk) run(ctx context.Context, nums []uint64) (Freed, error) {
	s := w.s
	var key []byte
	for _, n := range nums {
		key = binary.LittleEndian.AppendUint64(key, n)
	}
	var f Freed
	known := false
	err := s.withTrees(ctx, func() error {
		w.gen = s.durableGen.Load()
		if f, known = s.freeable.get(string(key)); known {
			return nil
		}
		for _, n := range nums {
			if r := s.durable[n]; r != nil {
				w.push(r.root)
				w.push(r.attrs)
			}
		}
		return w.slice(ctx)
	})
	if known || err != nil {
		return f, err
	}
	for len(w.stack) > 0 {
		err := s.withTrees(ctx, func() error {
			if s.durableGen.Load() != w.gen {
				if w.overtook = true; !w.stay {
					return errOvertaken
				}
			}
			return w.slice(ctx)
		})
		if err != nil {
			return f, err
		}
	}
	f.Bytes, f.Exact = w.units*int64(s.geo.UnitSize), !w.overtook
	if f.Exact {
		s.freeable.put(w.gen, string(key), f)
	}
	return f, nil
}

// push notes a reference that would be given up.
func (w *freeWalk) push(e entry) {
	if e.refers() {
		w.stack = append(w.stack, e)
	}
}

// slice works off the stack for a while. trees is held.
func (w *freeWalk) slice(ctx context.Context) error {
	defer w.s.space.trimCounters()
	until := time.Now().Add(freeSlice)
	for n := 0; len(w.stack) > 0; n++ {
		if n%64 == 63 {
			if ctx.Err() != nil {
				return context.Cause(ctx)
			}
			if time.Now().After(until) {
				return nil
			}
		}
		e := w.stack[len(w.stack)-1]
		w.stack = w.stack[:len(w.stack)-1]
		if err := w.giveUp(e); err != nil {
			return err
		}
	}
	return nil
}

// giveUp counts one reference less. With the last one the unit goes, and what
// it refers to follows.
func (w *freeWalk) giveUp(e entry) error {
	c, err := w.s.space.count(e.addr)
	if err != nil {
		return err
	}
	if n := w.shared[e.addr] + 1; n < c {
		w.shared[e.addr] = n
		return nil
	} else if n > c {
		if w.overtook {
			return nil
		}
		return errShape(e, "unit in use has %d references, %d have been found", c, n)
	}
	delete(w.shared, e.addr)
	w.units++
	if e.twice {
		w.units++
	}
	if e.kind != kindPage {
		return nil
	}
	b, err := w.s.page(e)
	if errors.Is(err, ErrCorrupt) && w.overtook {
		return nil // it may have been reused
	} else if err != nil {
		return err
	}
	for i := range w.s.geo.Fanout {
		w.push(getEntry(b[i*entrySize:]))
	}
	return nil
}

// begin starts a generation. trees is held, or the store is being opened.
func (c *freeCache) begin(gen uint64) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.gen, c.at, c.results = gen, time.Now(), map[string]Freed{}
}

// get returns the result for a key, or one to be filled in.
func (c *freeCache) get(key string) (f Freed, known bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if f, known = c.results[key]; known {
		return f, true
	}
	return Freed{At: c.at}, false
}

// put keeps a result if it is of the current generation.
func (c *freeCache) put(gen uint64, key string, f Freed) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if gen != c.gen {
		return
	}
	if len(c.results) >= maxFreed {
		clear(c.results)
	}
	c.results[key] = f
}
