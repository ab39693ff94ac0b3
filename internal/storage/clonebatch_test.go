package storage_test

import (
	"bytes"
	"context"
	"errors"
	"testing"

	"coppice/internal/storage"
	"coppice/internal/storage/mem"
)

// cloneCounter is a repository that notes what is cloned in it.
type cloneCounter struct {
	storage.Repo
	calls, units int
	fail         error
}

func (c *cloneCounter) CloneRanges(ctx context.Context, to, from storage.Volume, ranges []storage.RangeClone) error {
	if c.fail != nil {
		return c.fail
	}
	c.calls++
	for _, r := range ranges {
		c.units += int(r.Len / unit)
	}
	return c.Repo.(storage.RangeCloner).CloneRanges(ctx, to, from, ranges)
}

// pair is two volumes of a repository that counts.
func pair(t *testing.T, size int64) (c *cloneCounter, to, from storage.Volume) {
	t.Helper()
	repo, err := mem.Driver().Open(t.Context(), nil, true)
	must(t, err)
	t.Cleanup(func() { _ = repo.Close() })
	open := func(id storage.ID) storage.Volume {
		_, err := repo.Create(t.Context(), storage.Spec{ID: id, Size: size})
		must(t, err)
		v, err := repo.Open(t.Context(), id, storage.Live)
		must(t, err)
		return v
	}
	return &cloneCounter{Repo: repo}, open("00000001-c0de-4bad-8bee-0123456789ab"), open("00000002-c0de-4bad-8bee-0123456789ab")
}

func put(t *testing.T, v storage.Volume, p []byte, off int64) {
	t.Helper()
	_, err := v.WriteAt(p, off)
	must(t, err)
}

// Only units that would change are cloned.
func TestCloneBatchLeavesEqualUnits(t *testing.T) {
	const (
		have   = "..aacc.xx..aa.z"
		given  = "aaaabb...a..ayq"
		result = "aaaabb...a..ayz" // the last one is in no range
	)
	c, to, from := pair(t, int64(len(have)*unit))
	put(t, to, picture(have), 0)
	put(t, from, picture(given), 0)
	b := storage.NewCloneBatch(c, to, from)
	for _, units := range [][2]int64{{9, 14}, {0, 9}} {
		off := units[0] * unit
		must(t, b.Add(t.Context(), storage.RangeClone{To: off, From: off, Len: units[1]*unit - off}))
	}
	if c.calls > 0 {
		t.Errorf("%d calls before the batch is full", c.calls)
	}
	must(t, b.Flush(t.Context()))
	must(t, b.Flush(t.Context()))
	if changed := 9; c.calls != 1 || c.units != changed {
		t.Errorf("%d units in %d calls, want %d in one", c.units, c.calls, changed)
	}
	if !bytes.Equal(contents(t, to), picture(result)) {
		t.Error("other contents")
	}
}

// A large range is cloned in several calls, none of which is too much.
func TestCloneBatchDivides(t *testing.T) {
	const size = 5 * storage.MaxRangeClone / 4
	c, to, from := pair(t, size)
	put(t, from, bytes.Repeat([]byte("full"), 8<<20), 0)
	for n := int64(32 << 20); n < size; n *= 2 {
		part := min(n, size-n)
		must(t, c.Repo.(storage.RangeCloner).CloneRanges(t.Context(), from, from, []storage.RangeClone{{To: n, Len: part}}))
	}
	b := storage.NewCloneBatch(c, to, from)
	must(t, b.Add(t.Context(), storage.RangeClone{Len: size}))
	must(t, b.Flush(t.Context()))
	if c.calls != 10 || c.units != size/unit {
		t.Errorf("%d units in %d calls, want %d in 10", c.units, c.calls, size/unit)
	}
	c.units = 0
	if err := errors.Join(b.Add(t.Context(), storage.RangeClone{Len: size}), b.Flush(t.Context())); err != nil || c.units > 0 {
		t.Errorf("the same again: %d units, %v", c.units, err)
	}
}

// What fails is told; a repository that cannot clone has no batch.
func TestCloneBatchFails(t *testing.T) {
	c, to, from := pair(t, 4*unit)
	put(t, from, []byte("data"), 0)
	b := storage.NewCloneBatch(c, to, from)
	broken := errors.New("broken")
	c.fail = broken
	if err := errors.Join(b.Add(t.Context(), storage.RangeClone{Len: unit}), b.Flush(t.Context())); !errors.Is(err, broken) {
		t.Errorf("error %v", err)
	}
	if err := b.Add(t.Context(), storage.RangeClone{To: 2 * unit, Len: 3 * unit}); !errors.Is(err, storage.ErrInvalid) {
		t.Errorf("behind the end: %v", err)
	}
	if b := storage.NewCloneBatch(struct{ storage.Repo }{c}, to, from); b != nil {
		t.Error("a batch for a repository that cannot clone")
	}
}
