package cow

import (
	"context"
	"errors"
	"fmt"
	"iter"
)

// Written counts the bytes of data that a volume has and that are younger than
// its parent: what has been written since and is not zero now, whether it
// differs or not. Of a volume without a parent it is all of its data. Writes
// that are going on may or may not be counted.
//
// It costs in proportion to what has been written since the parent.
func (s *Store) Written(ctx context.Context, id ID) (int64, error) {
	for {
		n, err := s.written(ctx, id)
		if !errors.Is(err, errParentGone) {
			return n, err
		}
	}
}

// errParentGone says that the parent of a volume has been deleted meanwhile.
var errParentGone = errors.New("the parent has been deleted")

func (s *Store) written(ctx context.Context, id ID) (n int64, err error) {
	d, err := s.OpenDisk(ctx, id, Live)
	if err != nil {
		return 0, err
	}
	defer func() { err = errors.Join(err, d.Close()) }()
	s.mu.Lock()
	parent := s.byNum[d.v.parent]
	s.mu.Unlock()
	var extents iter.Seq2[Extent, error]
	if parent == nil {
		extents = d.Extents(ctx, 0, d.Size())
	} else {
		extents = func(yield func(Extent, error) bool) {
			walkSteps(0, MaxSize, yield, func(off int64) ([]Extent, int64, error) {
				return s.sinceStep(ctx, parent, d, off)
			})
		}
	}
	for e, err := range extents {
		if err != nil {
			if s.parentGone(parent) {
				return 0, errParentGone
			}
			return 0, fmt.Errorf("counting what has been written to %v: %w", id, err)
		}
		if !e.Hole {
			n += e.Len
		}
	}
	return n, nil
}

// parentGone reports whether a volume has been deleted.
func (s *Store) parentGone(v *volume) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return v != nil && v.removed
}
