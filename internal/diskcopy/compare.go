package diskcopy

import (
	"bytes"
	"context"
	"errors"
	"io"
	"iter"

	"coppice/internal/storage"
)

// changed yields the ranges of to that may differ from from, in ascending
// order, as [storage.Differ] says. Volumes of one repo are compared by their
// maps, where its driver can; others by reading both.
func changed(ctx context.Context, fromRepo storage.Repo, from storage.Volume, toRepo storage.Repo, to storage.Volume) iter.Seq2[storage.Extent, error] {
	if d, ok := toRepo.(storage.Differ); ok && fromRepo == toRepo {
		return d.Diff(ctx, from, to, 0)
	}
	return compare(ctx, from, to)
}

// compareUnit is the granularity of a comparison by reading, in bytes.
const compareUnit = storage.Unit

// compare yields the units of to that have other bytes than from, which
// counts as zero behind its end.
func compare(ctx context.Context, from, to storage.Volume) iter.Seq2[storage.Extent, error] {
	return func(yield func(storage.Extent, error) bool) {
		old, cur := make([]byte, chunk), make([]byte, chunk)
		zeros := make([]byte, compareUnit)
		var run storage.Extent // grows while units are alike
		for off := int64(0); off < to.Size(); off += chunk {
			if err := context.Cause(ctx); err != nil {
				yield(storage.Extent{}, err)
				return
			}
			cur := cur[:min(chunk, to.Size()-off)]
			if err := readOrZero(to, cur, off); err != nil {
				yield(storage.Extent{}, err)
				return
			}
			old := old[:len(cur)]
			if err := readOrZero(from, old, off); err != nil {
				yield(storage.Extent{}, err)
				return
			}
			for i := 0; i < len(cur); i += compareUnit {
				j := min(i+compareUnit, len(cur))
				if bytes.Equal(old[i:j], cur[i:j]) {
					continue
				}
				e := storage.Extent{Off: off + int64(i), Len: int64(j - i), Hole: bytes.Equal(cur[i:j], zeros[:j-i])}
				if run.Len > 0 && run.End() == e.Off && run.Hole == e.Hole {
					run.Len += e.Len
					continue
				}
				if run.Len > 0 && !yield(run, nil) {
					return
				}
				run = e
			}
		}
		if run.Len > 0 {
			yield(run, nil)
		}
	}
}

// readOrZero fills p from off, with zeros behind the end of v.
func readOrZero(v storage.Volume, p []byte, off int64) error {
	n := 0
	if off < v.Size() {
		var err error
		n, err = v.ReadAt(p[:min(int64(len(p)), v.Size()-off)], off)
		if err != nil && !errors.Is(err, io.EOF) {
			return err
		}
	}
	clear(p[n:])
	return nil
}
