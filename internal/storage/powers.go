package storage

import (
	"context"
	"iter"
	"time"
)

// BareLister is List without the attributes, for drivers that have to read them
// one by one: the Attrs of what it yields are nil.
type BareLister interface {
	ListBare(ctx context.Context) iter.Seq2[Info, error]
}

// BulkWriter is the power of a Volume to take much that nobody reads soon, as the
// contents of an image, without pushing what is read often out of the host's memory.
// WriteBulk is WriteAt otherwise; it may wait for the device. [WriteBulk] uses
// it where it is.
type BulkWriter interface {
	WriteBulk(p []byte, off int64) (n int, err error)
}

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

// RangeCloner makes ranges of one volume read as ranges of another do, or of
// itself, at one instant and without copying: the two share the units from then
// on, as after a clone. Both are open volumes of this repo, to opened Live, from
// either way. Ranges are multiples of [Unit], at most MaxRangeClone in all, and
// where they overlap the last one counts; else the error is ErrInvalid.
// ErrReadOnly for a to that cannot be written, a *SpaceError when there is no room
// for the map, a *CorruptError when that of from is damaged: after an error, a
// cancel or a crash nothing has changed, or all of it. It is durable on return.
type RangeCloner interface {
	CloneRanges(ctx context.Context, to, from Volume, ranges []RangeClone) error
}

// MaxRangeClone is how many bytes one call of a [RangeCloner] may clone.
const MaxRangeClone = 1 << 30

// RangeClone says which bytes of one volume become those of another.
type RangeClone struct {
	To, From int64 // bytes into the volumes
	Len      int64 // bytes
}

// Versioned is the power of a Volume opened Pinned to name its contents: equal
// versions of one volume ID stand for equal bytes, as long as the repo exists.
// Different versions may stand for equal bytes, too; but a volume that is
// reverted to another has the version of that, until one of them is written. It
// may have to make the contents durable first. A volume opened Live answers with
// ErrInvalid.
type Versioned interface {
	Version(ctx context.Context) (string, error)
}

// Attributer replaces the attribute blob of a volume, of a read-only one too.
type Attributer interface {
	SetAttrs(ctx context.Context, id ID, attrs []byte) error
}

// DataDestroyer gives up the contents of a read-only volume and keeps the
// rest: its name, size, attributes and place among its relatives, so that a
// [ChangeTracker] can still tell what has changed since. From then on whatever
// wants the contents fails with ErrNoData; volumes opened Pinned before stay
// readable. Space that was the volume's alone comes back in the background. It
// is durable on return. ErrInvalid for a writable volume; doing it again
// changes nothing.
type DataDestroyer interface {
	DestroyData(ctx context.Context, id ID) error
}

// ChangeTracker is [Differ] from a volume that is named rather than open, and
// whose data may be destroyed. Then it yields every range of to that differs
// from what the volume had, and may yield one that was written with the bytes
// it had; to must descend from the volume, or the error is ErrNoLineage.
type ChangeTracker interface {
	ChangedSince(ctx context.Context, from ID, to Volume, off int64) iter.Seq2[Extent, error]
}

// SpaceEstimator tells what deleting all of the volumes would give back: for
// one volume, what it has of its own; for a set more than the sum, by what only
// its members share. What open volumes hold does not come back before they are
// closed, and is counted all the same. It changes nothing, takes time in
// proportion to what would be freed, and may answer from a moment ago: see
// Freed.At. ErrNotFound when one of them does not exist; nothing for none.
type SpaceEstimator interface {
	WouldFree(ctx context.Context, ids ...ID) (Freed, error)
}

// WriteCounter counts the bytes of data that a volume has and that are younger
// than its parent, or all of its data when it has none: what has been written
// since and is not zero now, whether it differs or not. It takes time in
// proportion to that. ErrNotFound when there is no such volume, ErrNoData when
// its data has been destroyed.
type WriteCounter interface {
	WrittenSinceParent(ctx context.Context, id ID) (int64, error)
}

// Freed is what a deletion would give back.
type Freed struct {
	Bytes int64
	At    time.Time // of the state that has been looked at: later changes are not in it
	Exact bool      // false when the state changed while it was looked at
}

// Scrubber verifies everything that is stored, while the repo is in use, and
// yields every problem. Only a scrub that comes to its end changes what a
// [DamageLister] says; a caller may stop at any time.
type Scrubber interface {
	Scrub(ctx context.Context, o ScrubOptions) iter.Seq2[Problem, error]
}

// ScrubOptions says how a scrub goes about it.
type ScrubOptions struct {
	// BytesPerSecond bounds what is read on average; 0 means no bound.
	BytesPerSecond int64
	// Progress, unless nil, is told now and then, by the goroutine that
	// scrubs, how many bytes of about how many have been verified. It ends
	// with the two equal when the scrub comes to its end.
	Progress func(done, total int64)
}

// DamageLister lists what is known to be damaged, from the last complete scrub
// and from reads since, in the order of volumes and offsets. It may stop at a
// bound; it costs next to nothing.
type DamageLister interface {
	Damage(ctx context.Context) ([]Problem, error)
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
	Len    int64 // bytes from Off on that cannot be had; 0 when that is not known or nothing is lost
	Detail string
	Done   string // what the driver has done to make it good; "" when nothing
}

// Labeled is a repo that keeps a blob of its own, at most MaxAttrs bytes,
// opaque to the driver like those of volumes. It begins empty, and a failed or
// interrupted SetRepoAttrs leaves the old one or the new one.
type Labeled interface {
	RepoAttrs(ctx context.Context) ([]byte, error)
	SetRepoAttrs(ctx context.Context, attrs []byte) error
}
