package storage

import (
	"context"
	"iter"
)

// Resizer changes the size of a volume, in bytes. Growth reads as zero; what a
// shrink cuts off is gone. ErrInvalid for a size that Create would refuse,
// ErrReadOnly for a read-only volume.
type Resizer interface {
	Resize(ctx context.Context, id ID, size int64) (Info, error)
}

// Reverter replaces the contents and size of volume id by those of volume to,
// keeping the identity and attributes of id. Open Live volumes of id see the
// new contents. ErrReadOnly when id is read-only; to may be any volume.
type Reverter interface {
	Revert(ctx context.Context, id, to ID) error
}

// GroupSnapshotter snapshots several volumes at one instant, all or none. The
// answers are in the order of ds. A source or new ID that occurs twice is
// ErrInvalid.
type GroupSnapshotter interface {
	SnapshotGroup(ctx context.Context, ds []Derived) ([]Info, error)
}

// Differ yields, in ascending order from byte off on, the ranges of to in
// which to may differ from from; a Hole extent reads as zero in to. Both are
// open volumes of this repo (else ErrInvalid), related or not, Live or Pinned;
// ranges behind the end of from count as zero there. What lies outside the
// extents is equal; what the two share, or is a hole in both, is never in
// them. The end of to is the end of the sequence. Bounded memory; a caller
// may stop at any time and continue at the end of the last extent it got.
type Differ interface {
	Diff(ctx context.Context, from, to Volume, off int64) iter.Seq2[Extent, error]
}

// Versioned is the power of a Volume opened Pinned to name its contents: equal
// versions of one volume ID stand for equal bytes, as long as the repo exists.
// Different versions may stand for equal bytes, too. It may have to make the
// contents durable first. A volume opened Live answers with ErrInvalid.
type Versioned interface {
	Version(ctx context.Context) (string, error)
}

// Attributer replaces the attribute blob of a volume, of a read-only one too.
type Attributer interface {
	SetAttrs(ctx context.Context, id ID, attrs []byte) error
}

// Checker verifies the whole repo while it is in use and reports every
// problem it finds; an error means the check itself could not go on.
type Checker interface {
	Check(ctx context.Context) iter.Seq2[Problem, error]
}

// Problem is something a check found.
type Problem struct {
	Volume ID    // "" when it concerns the repo
	Off    int64 // bytes into the volume
	Detail string
}
