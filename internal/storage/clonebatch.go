package storage

import (
	"bytes"
	"cmp"
	"context"
)

// A batch is cloned when it has so many bytes, or ranges: each costs a commit,
// which holds up flushes of other volumes the longer the more it has.
const (
	cloneBatchBytes  = MaxRangeClone / 8
	cloneBatchRanges = 64 << 10
)

// CloneBatch gathers ranges of one volume that are to be cloned to another, and
// leaves those [Unit]s out that the other has already, as an [Overlay] does:
// holes over holes, and equal bytes. Ranges must not overlap in the volume that
// gets them; nobody else may write to either. It is not safe for concurrent use.
type CloneBatch struct {
	repo     RangeCloner
	to, from Volume
	ranges   []RangeClone
	bytes    int64
	have     [2][]byte // of the two, to be compared
}

// NewCloneBatch returns a batch of clones to a volume from another of the same
// repo, nil when that does not clone ranges. The volumes stay the caller's to
// close.
func NewCloneBatch(r Repo, to, from Volume) *CloneBatch {
	cloner, ok := r.(RangeCloner)
	if !ok {
		return nil
	}
	return &CloneBatch{repo: cloner, to: to, from: from}
}

// Add has a range cloned, by this call or a later one, by Flush at the latest.
func (b *CloneBatch) Add(ctx context.Context, c RangeClone) error {
	for theirs, err := range b.from.Extents(ctx, c.From, c.Len) {
		if err != nil {
			return err
		}
		shift := c.To - c.From
		for mine, err := range b.to.Extents(ctx, theirs.Off+shift, theirs.Len) {
			if err == nil {
				err = b.overlay(ctx, RangeClone{To: mine.Off, From: mine.Off - shift, Len: mine.Len}, mine.Hole, theirs.Hole)
			}
			if err != nil {
				return err
			}
		}
	}
	return nil
}

// overlay adds what changes of a range, all of which is holes, or may be data,
// in each of the volumes.
func (b *CloneBatch) overlay(ctx context.Context, c RangeClone, mine, theirs bool) error {
	switch {
	case mine && theirs:
		return nil
	case !mine && !theirs:
		return b.compare(ctx, c)
	}
	for c.Len > 0 {
		n := min(c.Len, cloneBatchBytes)
		if err := b.put(ctx, RangeClone{To: c.To, From: c.From, Len: n}); err != nil {
			return err
		}
		c = RangeClone{To: c.To + n, From: c.From + n, Len: c.Len - n}
	}
	return nil
}

// compare puts those units of a range that differ, which both volumes may have
// data in.
func (b *CloneBatch) compare(ctx context.Context, c RangeClone) error {
	if b.have[0] == nil {
		b.have = [2][]byte{make([]byte, overlayReadMax), make([]byte, overlayReadMax)}
	}
	for c.Len > 0 {
		n := min(c.Len, overlayReadMax)
		mine, theirs := b.have[0][:n], b.have[1][:n]
		if err := cmp.Or(ReadFull(b.to, mine, c.To), ReadFull(b.from, theirs, c.From)); err != nil {
			return err
		}
		for len(mine) > 0 {
			k, same := split(mine, 0, func(p []byte, at int) bool { return bytes.Equal(p, theirs[at:at+len(p)]) })
			if !same {
				if err := b.put(ctx, RangeClone{To: c.To, From: c.From, Len: int64(k)}); err != nil {
					return err
				}
			}
			mine, theirs = mine[k:], theirs[k:]
			c = RangeClone{To: c.To + int64(k), From: c.From + int64(k), Len: c.Len - int64(k)}
		}
	}
	return nil
}

// put adds a range to the batch.
func (b *CloneBatch) put(ctx context.Context, c RangeClone) error {
	if last := len(b.ranges) - 1; last >= 0 && b.ranges[last].To+b.ranges[last].Len == c.To && b.ranges[last].From+b.ranges[last].Len == c.From {
		b.ranges[last].Len += c.Len
	} else {
		b.ranges = append(b.ranges, c)
	}
	b.bytes += c.Len
	if b.bytes < cloneBatchBytes && len(b.ranges) < cloneBatchRanges {
		return nil
	}
	return b.Flush(ctx)
}

// Flush clones what has been added. It is durable on return.
func (b *CloneBatch) Flush(ctx context.Context) error {
	if len(b.ranges) == 0 {
		return nil
	}
	err := b.repo.CloneRanges(ctx, b.to, b.from, b.ranges)
	b.ranges, b.bytes = b.ranges[:0], 0
	return err
}
