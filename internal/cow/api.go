package cow

import (
	"encoding/hex"
	"errors"
	"fmt"
	"time"
)

// ID names a volume: sixteen bytes chosen by the caller, usually a UUID. The
// zero ID names nothing.
type ID [16]byte

// String returns the ID in the canonical form of a UUID, in lower case.
func (id ID) String() string {
	var b [36]byte
	hex.Encode(b[0:8], id[0:4])
	hex.Encode(b[9:13], id[4:6])
	hex.Encode(b[14:18], id[6:8])
	hex.Encode(b[19:23], id[8:10])
	hex.Encode(b[24:36], id[10:16])
	b[8], b[13], b[18], b[23] = '-', '-', '-', '-'
	return string(b[:])
}

// MaxAttrs is the largest attribute blob of a volume, in bytes. A geometry
// with small units may allow less.
const MaxAttrs = 64 << 10

// MaxSize is the largest size of a volume, in bytes (2 PiB).
const MaxSize = 2 << 50

// Options says how to create or open a store. The zero value is right for
// ordinary use.
type Options struct {
	// Geometry is used by [Create]; the zero value means [DefaultGeometry].
	// [Open] takes what the store was created with.
	Geometry Geometry

	// Limits bounds memory; zero fields mean the defaults.
	Limits Limits

	// MaxBytes bounds what the store may take of the host, in bytes of whole
	// regions; 0 leaves that to the host file system.
	MaxBytes int64

	// LogBytes is the size of the redo log, used by [Create]; 0 means that of
	// a region, 32 MiB with the default geometry.
	LogBytes int64

	// CheckpointAfter is how long a change may wait, without anybody having
	// asked for it to be durable, before it is written; 0 means 30 s.
	CheckpointAfter time.Duration

	// FirstFit makes every allocation take the lowest free unit of its
	// region, so that a unit freed too early is reused, and noticed, at once.
	// It is for tests: files fragment sooner.
	FirstFit bool
}

// validate reports what cannot be meant.
func (o Options) validate() error {
	l := o.Limits
	for name, n := range map[string]int64{
		"MaxBytes": o.MaxBytes, "LogBytes": o.LogBytes, "CheckpointAfter": int64(o.CheckpointAfter),
		"Buffers": l.Buffers, "Entries": l.Entries, "PageCache": l.PageCache, "DirectMin": l.DirectMin,
		"BulkCache": l.BulkCache, "Chain": int64(l.Chain), "ReapPages": int64(l.ReapPages),
	} {
		if n < 0 {
			return fmt.Errorf("%w: %s is %d", ErrInvalid, name, n)
		}
	}
	return nil
}

// Limits bounds the memory of an open store. At half of a limit a checkpoint
// starts; at the full limit writers wait for it.
type Limits struct {
	Buffers   int64 // bytes of written data held in memory; default 192 MiB
	Entries   int64 // units written since the last checkpoint; default 1 Mi
	PageCache int64 // bytes of map pages kept; default 128 MiB
	DirectMin int64 // bytes from which a write goes straight to the files; default 256 KiB
	BulkCache int64 // bytes of [Disk.WriteBulk] that stay in the host's cache; default 256 MiB
	Chain     int   // sealed layers under one volume; default 32
	ReapPages int   // map pages freed per checkpoint; default 4096
}

func (l Limits) withDefaults() Limits {
	def := func(p *int64, v int64) {
		if *p == 0 {
			*p = v
		}
	}
	def(&l.Buffers, 192<<20)
	def(&l.Entries, 1<<20)
	def(&l.PageCache, 128<<20)
	def(&l.DirectMin, 256<<10)
	def(&l.BulkCache, 256<<20)
	if l.Chain == 0 {
		l.Chain = 32
	}
	if l.ReapPages == 0 {
		l.ReapPages = 4096
	}
	return l
}

// Info describes a volume.
type Info struct {
	ID       ID
	Size     int64 // bytes, a multiple of the unit size
	ReadOnly bool  // a snapshot
	NoData   bool  // a snapshot whose contents have been given up
	Parent   ID    // the snapshot its contents descend from; zero when none is left
	Used     int64 // bytes of data mapped, shared or not; as of the last checkpoint
	AttrsLen int   // bytes of the attribute blob
}

// Pair names the source of a snapshot or clone and what is made of it.
type Pair struct {
	Src, New ID
	// Attrs is the attribute blob of the new volume; nil shares the blob of
	// the source, an empty slice means none.
	Attrs []byte
}

// Mode says how a volume is opened.
type Mode int

const (
	// Live reads and writes the volume itself, whatever happens to it.
	Live Mode = iota
	// Pinned reads the contents of the instant of the open until it is
	// closed, even if the volume is written, reverted or deleted.
	Pinned
)

// Extent is a range of a volume, in bytes.
type Extent struct {
	Off, Len int64
	Hole     bool // reads as zero and takes no space
}

// End returns the first byte behind the extent.
func (e Extent) End() int64 { return e.Off + e.Len }

// Usage is the space of a store, in bytes.
type Usage struct {
	Allocated int64 // taken of the host file system, free or not
	Used      int64 // holding data or metadata, or waiting to be released
	Free      int64 // what new data may take of Allocated, promises subtracted
	Reserve   int64 // kept back so that deletes always work; not in Free
	Max       int64 // what Allocated may grow to; 0 when only the host bounds it
	Reaping   bool  // deleted data is still being freed
}

// Problem is something a check found. Unset fields do not apply.
type Problem struct {
	Volume ID     // whose contents are hit
	Off    int64  // byte in the volume at which the damage begins
	Len    int64  // bytes that cannot be had, if it is known; they may go beyond the end of the volume
	Addr   uint64 // unit of the store
	Detail string
	Done   string // what has been done about it; empty when nothing has
}

func (p Problem) String() string {
	s := p.Detail
	if p.Addr != 0 {
		s = fmt.Sprintf("unit %d: %s", p.Addr, s)
	}
	switch {
	case p.Volume == (ID{}):
	case p.Len > 0:
		s = fmt.Sprintf("volume %v, %d bytes from %d: %s", p.Volume, p.Len, p.Off, s)
	default:
		s = fmt.Sprintf("volume %v at byte %d: %s", p.Volume, p.Off, s)
	}
	if p.Done != "" {
		s += ": " + p.Done
	}
	return s
}

// Errors, returned wrapped with what was being done.
var (
	ErrNotFound = errors.New("no such volume")
	ErrExists   = errors.New("volume exists")
	ErrInvalid  = errors.New("invalid argument")
	ErrReadOnly = errors.New("volume is read-only")
	ErrClosed   = errors.New("closed")

	// ErrNoData: see [Store.DestroyData].
	ErrNoData = errors.New("data of the volume has been destroyed")

	// ErrNoLineage: what has changed since a volume without data is known for
	// its descendants only.
	ErrNoLineage = errors.New("volume is no descendant")

	// ErrFailed: a write or sync of metadata failed, so nothing can be
	// promised any more. The store only reads until it is opened again.
	ErrFailed = errors.New("store has failed and is read-only until reopened")

	// ErrNoStore: the directory holds no store.
	ErrNoStore = errors.New("no store here")

	// ErrStoreExists: Create found a store.
	ErrStoreExists = errors.New("store exists")

	// ErrUnsupported: the store was made by a later version.
	ErrUnsupported = errors.New("store format is not supported")

	// ErrCorrupt: stored bytes fail their checksum. See [CorruptError].
	ErrCorrupt = errors.New("stored data is damaged")

	// ErrNoSpace: see [SpaceError].
	ErrNoSpace = errors.New("no space left in the store")
)

// SpaceError says how much room was missing. It matches [ErrNoSpace].
type SpaceError struct {
	Needed, Free int64 // bytes
	Cause        error // what the host said, if it was the host
}

func (e *SpaceError) Error() string {
	s := fmt.Sprintf("%v: %d bytes needed, %d free", ErrNoSpace, e.Needed, e.Free)
	if e.Cause != nil {
		s += ": " + e.Cause.Error()
	}
	return s
}

func (e *SpaceError) Is(target error) bool { return target == ErrNoSpace }
func (e *SpaceError) Unwrap() error        { return e.Cause }

// UnsupportedError says what a store has that this version does not know. It
// matches [ErrUnsupported].
type UnsupportedError struct {
	Version      uint32 // of the format
	Incompatible uint32 // feature bits without which the store cannot be read
	ReadOnly     uint32 // feature bits without which it must not be written
}

func (e *UnsupportedError) Error() string {
	switch s := ErrUnsupported.Error(); {
	case e.Version != formatVersion:
		return fmt.Sprintf("%s: version %d, this is for version %d", s, e.Version, formatVersion)
	case e.Incompatible != 0:
		return fmt.Sprintf("%s: it has features %#x", s, e.Incompatible)
	default:
		return fmt.Sprintf("%s for writing: it has features %#x", s, e.ReadOnly)
	}
}

func (e *UnsupportedError) Is(target error) bool { return target == ErrUnsupported }

// CorruptError says which bytes cannot be had. It matches [ErrCorrupt].
type CorruptError struct {
	Volume ID     // zero when the damage is in the store's own metadata
	Off    int64  // byte in the volume at which the unreadable range begins
	Addr   uint64 // unit of the store; 0 for a file that has no units
	Detail string
	Cause  error // what the host said, if anything
}

func (e *CorruptError) Error() string {
	s := ErrCorrupt.Error()
	if e.Volume != (ID{}) {
		s += fmt.Sprintf(": volume %v at byte %d", e.Volume, e.Off)
	}
	if e.Addr != 0 {
		s += fmt.Sprintf(": unit %d", e.Addr)
	}
	s += ": " + e.Detail
	if e.Cause != nil {
		s += ": " + e.Cause.Error()
	}
	return s
}

func (e *CorruptError) Is(target error) bool { return target == ErrCorrupt }
func (e *CorruptError) Unwrap() error        { return e.Cause }
