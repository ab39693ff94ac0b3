// Package storage is the contract between the XenAPI layer and whatever keeps
// the bytes of disks. A driver implements [Repo] and [Volume]; what it can do
// beyond that it says by implementing the one-method interfaces of powers.go,
// from which [Features] derives what clients are told. Nothing here knows
// sessions, tasks, VDIs or references.
//
// # Life of a volume
//
// A volume is named by an [ID] that the caller chose (a lower-case UUID), so
// a creation that is repeated after a crash is recognised rather than
// doubled. Create, Snapshot and Clone return after the new volume is durable;
// Delete returns after the name is durably gone. Space comes back
// afterwards, in the background, without anybody's help.
//
// A snapshot and a clone never copy data. Volumes are independent for their
// users: any one may be deleted at any time, whatever was derived from it.
//
// # Open volumes
//
// [Repo.Open] may be called any number of times for the same volume. A
// Volume opened with [Live] sees every write, revert and resize; one opened
// with [Pinned] sees the contents of the instant it was opened, for as long as
// it stays open, even after the volume is written, reverted, resized or
// deleted. Volumes are safe for concurrent use. A closed Volume, and every
// Volume of a closed Repo, fails with [ErrClosed].
//
// An ID may be used again once its volume is deleted; what was open of the
// old volume never shows the new one.
//
// # Durability
//
// A write is visible to other readers of the volume when it returns, and
// durable after the next successful [Volume.Flush] on the same volume.
// Create, Snapshot, Clone, Revert, Resize, SetAttrs and Delete are durable when
// they return. A snapshot contains every write that returned before it was
// called, flushed or not.
//
// # Cancellation
//
// A cancelled context makes a call return early with an error that matches the
// context's cause. A mutating call is then either done completely or not at
// all; which of the two Stat tells. A call that starts with a cancelled
// context does nothing.
//
// # Writing over contents
//
// [Overlay] writes a stream over a volume and touches only what changes.
package storage

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"iter"
)

// ID names a volume inside one Repo: a lower-case UUID chosen by the caller.
type ID string

const (
	// Unit is what sizes are multiples of, in bytes, and what drivers map,
	// share and compare.
	Unit = 4096
	// MaxSize is the largest size of a volume, in bytes.
	MaxSize = 2 << 50
	// MaxAttrs is the largest attribute blob of a volume, in bytes.
	MaxAttrs = 64 << 10
)

// Valid tells whether the ID is a UUID in lower case.
func (id ID) Valid() bool {
	if len(id) != 36 {
		return false
	}
	for i := range len(id) {
		switch c := id[i]; {
		case i == 8 || i == 13 || i == 18 || i == 23:
			if c != '-' {
				return false
			}
		case '0' <= c && c <= '9' || 'a' <= c && c <= 'f':
		default:
			return false
		}
	}
	return true
}

// Spec describes a volume to create.
type Spec struct {
	ID    ID
	Size  int64  // bytes, a positive multiple of Unit, at most MaxSize; contents are zero
	Attrs []byte // opaque to drivers, at most MaxAttrs
}

// Validate returns an error that matches ErrInvalid when no driver could
// create the volume.
func (s Spec) Validate() error {
	if err := ValidateSize(s.Size); err != nil {
		return err
	}
	return validate(s.ID, s.Attrs)
}

// ValidateSize returns an error that matches ErrInvalid for a size, in bytes,
// that no volume can have.
func ValidateSize(size int64) error {
	if size <= 0 || size%Unit != 0 || size > MaxSize {
		return fmt.Errorf("%w: size %d is not a multiple of %d from %[3]d to %d", ErrInvalid, size, Unit, int64(MaxSize))
	}
	return nil
}

func validate(id ID, attrs []byte) error {
	if !id.Valid() {
		return fmt.Errorf("%w: volume ID %q is not a lower-case UUID", ErrInvalid, id)
	}
	return ValidateAttrs(attrs)
}

// ValidateAttrs returns an error that matches ErrInvalid when the attribute
// blob is too large.
func ValidateAttrs(attrs []byte) error {
	if len(attrs) > MaxAttrs {
		return fmt.Errorf("%w: %d bytes of attributes, at most %d", ErrInvalid, len(attrs), MaxAttrs)
	}
	return nil
}

// Derived names what a snapshot or clone makes.
type Derived struct {
	Source ID
	ID     ID
	Attrs  []byte // of the new volume; nothing is inherited
}

// Validate returns an error that matches ErrInvalid when no driver could
// make the volume.
func (d Derived) Validate() error { return validate(d.ID, d.Attrs) }

// Info is what a driver knows about a volume.
type Info struct {
	ID       ID
	Size     int64 // bytes
	ReadOnly bool  // a snapshot: never writable
	NoData   bool  // its contents have been destroyed, see [DataDestroyer]
	Parent   ID    // the read-only volume its contents descend from, "" when none
	Used     int64 // bytes of data it maps, shared or not
	Attrs    []byte
}

// Usage is the space of a Repo, in bytes.
type Usage struct {
	Total int64 // what the repo may grow to
	Used  int64 // occupied, metadata included
	Free  int64 // what new data may take now
}

// Mode says how a volume is opened.
type Mode int

const (
	// Live reads and writes the volume itself; a read-only volume opened
	// Live refuses writes with ErrReadOnly.
	Live Mode = iota
	// Pinned reads the contents of the instant of Open, for ever.
	Pinned
)

// Repo is one storage repository. It is safe for concurrent use; no method
// holds another up for longer than a metadata commit takes.
//
// Parents follow the data: a snapshot takes the parent of its source and, when
// that is writable, becomes the source's parent; what is derived from a
// read-only volume has that as parent, a clone of a writable one has its
// source's; a revert makes the read-only volume it went to the parent, or takes
// the parent of a writable one; what a deleted volume was parent of gets the
// parent it had.
type Repo interface {
	// Create makes a zero-filled writable volume. ErrExists when the ID is
	// taken, ErrInvalid for a bad spec, a *SpaceError when there is no room.
	Create(ctx context.Context, spec Spec) (Info, error)

	// Stat describes one volume; ErrNotFound when there is none.
	Stat(ctx context.Context, id ID) (Info, error)

	// List yields every volume in the order of their IDs. Volumes created or
	// deleted meanwhile may or may not be seen.
	List(ctx context.Context) iter.Seq2[Info, error]

	// Open opens a volume. See Mode.
	Open(ctx context.Context, id ID, m Mode) (Volume, error)

	// Snapshot makes a read-only volume with the contents of d.Source as
	// they are at one instant during the call. ErrNotFound when there is no
	// source, ErrExists when the ID is taken. The source may be read-only.
	Snapshot(ctx context.Context, d Derived) (Info, error)

	// Clone makes a writable volume with the contents of d.Source. Errors as
	// for Snapshot.
	Clone(ctx context.Context, d Derived) (Info, error)

	// Delete removes the name at once. Pinned volumes stay readable until
	// closed; Live ones fail with ErrNotFound from now on. ErrNotFound when
	// there is none.
	Delete(ctx context.Context, id ID) error

	// Usage tells the space of the repo.
	Usage(ctx context.Context) (Usage, error)

	// Close flushes everything and releases the repo. Calls that run are
	// waited for or fail with ErrClosed. A second Close does nothing.
	Close() error
}

// Volume is an open volume. Offsets and lengths are bytes and need no
// alignment; a range that is not within the volume is ErrInvalid, except for
// ReadAt. Writes to a read-only or Pinned volume are ErrReadOnly.
type Volume interface {
	// Size returns the size in bytes: the current one of a Live volume.
	Size() int64

	// ReadAt fills p from off. A read that goes past the end returns io.EOF
	// with what there was, as io.ReaderAt says. Bytes are verified: an
	// error matching ErrCorrupt instead of wrong data.
	ReadAt(p []byte, off int64) (int, error)

	// WriteAt stores p at off. Past the end nothing is written and the
	// error matches ErrInvalid; a *SpaceError when there is no room. After
	// an error the n bytes returned are stored, and unless it is one of
	// these two, any part of the rest may be.
	WriteAt(p []byte, off int64) (int, error)

	// Zero makes [off, off+n) read as zero and gives its space back.
	Zero(ctx context.Context, off, n int64) error

	// Flush makes every write that returned before it durable. It does
	// nothing for a volume that cannot be written.
	Flush(ctx context.Context) error

	// Extents describes [off, off+n) as adjoining extents in ascending order:
	// Data where there may be data, Hole where all is known to be zero.
	// Neighbours may be of the same kind. What is written meanwhile may
	// show or not.
	Extents(ctx context.Context, off, n int64) iter.Seq2[Extent, error]

	// Close releases the volume; it does not flush.
	Close() error
}

// ReadFull fills p from off, which lies within the volume.
func ReadFull(v Volume, p []byte, off int64) error {
	if n, err := v.ReadAt(p, off); n < len(p) {
		return cmp.Or(err, io.ErrUnexpectedEOF)
	}
	return nil
}

// WriteBulk stores p at off, as a [BulkWriter] does if v is one.
func WriteBulk(v Volume, p []byte, off int64) (int, error) {
	if b, ok := v.(BulkWriter); ok {
		return b.WriteBulk(p, off)
	}
	return v.WriteAt(p, off)
}

// Extent is a range of a volume.
type Extent struct {
	Off, Len int64 // bytes
	Hole     bool  // reads as zero
}

// End returns the first byte behind the extent.
func (e Extent) End() int64 { return e.Off + e.Len }

// Errors that drivers return, wrapped with what was being done.
var (
	ErrNoRepo       = errors.New("no such repository")                   // of Driver.Open
	ErrOccupied     = errors.New("the place is used for something else") // of Driver.Open that is to create
	ErrNotFound     = errors.New("no such volume")
	ErrExists       = errors.New("volume exists")
	ErrInvalid      = errors.New("invalid argument")
	ErrReadOnly     = errors.New("volume is read-only")
	ErrNoData       = errors.New("data of the volume has been destroyed")
	ErrNoLineage    = errors.New("volume does not descend from the other")
	ErrRepoReadOnly = errors.New("repository has become read-only after a failure")
	ErrClosed       = errors.New("closed")
	ErrCorrupt      = errors.New("stored data is damaged")
	ErrNoSpace      = errors.New("no space left in the repository")
	ErrLocked       = errors.New("repository is in use by another process")
)

// SpaceError says how much room was missing. It matches ErrNoSpace.
type SpaceError struct {
	Needed, Free int64 // bytes
}

func (e *SpaceError) Error() string {
	return fmt.Sprintf("%v: %d bytes needed, %d free", ErrNoSpace, e.Needed, e.Free)
}

func (e *SpaceError) Is(target error) bool { return target == ErrNoSpace }

// CorruptError says which bytes of which volume cannot be had. It matches
// ErrCorrupt.
type CorruptError struct {
	Volume ID
	Off    int64 // bytes into the volume
	Detail string
}

func (e *CorruptError) Error() string {
	return fmt.Sprintf("%v: volume %s at byte %d: %s", ErrCorrupt, e.Volume, e.Off, e.Detail)
}

func (e *CorruptError) Is(target error) bool { return target == ErrCorrupt }
