// Package vfs is the file seam of the storage engine: the few file operations
// a store needs, behind two small interfaces, so that the same engine code
// runs on a real directory, in memory, under injected errors and through
// simulated power cuts.
//
// An [FS] is rooted in one directory and knows only plain file names. A
// [File] is addressed by absolute offsets; nothing in this package has a
// cursor. Durability has three verbs: [File.Datasync] makes a file's contents
// and size durable, [File.WriteSync] what it writes itself, and [FS.SyncDir]
// creations, removals and renames. Everything not covered by one of them may be lost, kept or
// torn at 512-byte granularity by a crash, in any order, per file. The death
// of the process alone loses nothing that was written, but makes nothing
// durable either.
//
// Implementations: [Dir] (a real directory), [Mem] (memory, with crash
// clones), and the wrappers [Inject] (errors) and [Trace] (the sequence of
// calls, for tests that pin the order of syncs). Errors are *fs.PathError, so
// errors.Is finds fs.ErrNotExist, syscall.ENOSPC and the like in them. A test
// of crash safety is a loop:
//
//	m := vfs.NewMem(0)
//	// work on m, remember what was synced; then, at any point
//	for c := range m.Crashes() { // or m.Crash(rng.IntN), or m.Kill()
//		// open a store on c and compare
//	}
package vfs

import (
	"errors"
	"io"
)

// ErrLocked is returned by [FS.Lock] when another owner holds the lock.
var ErrLocked = errors.New("vfs: directory is locked by another process")

// FS is one directory of plain files. It is safe for concurrent use. A name
// that is no plain file name, or is LOCK, is an error matching fs.ErrInvalid.
type FS interface {
	// Create makes a new, empty file open for reading and writing. It fails
	// with an error matching fs.ErrExist when the name is taken.
	Create(name string) (File, error)

	// Open opens an existing file for reading and writing. A missing file
	// is an error matching fs.ErrNotExist.
	Open(name string) (File, error)

	// Remove deletes a name. Open files stay usable.
	Remove(name string) error

	// Rename replaces newName by oldName atomically.
	Rename(oldName, newName string) error

	// List returns the names in the directory, sorted.
	List() ([]string, error)

	// SyncDir makes every create, remove and rename that returned before it
	// durable.
	SyncDir() error

	// Lock takes the exclusive lock of the directory without waiting, or
	// fails with [ErrLocked]. Closing the result releases it; so does the
	// death of the process.
	Lock() (io.Closer, error)
}

// File is an open file. Reads and writes may run concurrently; writes that
// overlap each other, and changes of the size, are the caller's to order.
// After Close all methods fail with
// an error matching fs.ErrClosed.
type File interface {
	io.ReaderAt
	io.WriterAt
	io.Closer

	// Size returns the current length in bytes.
	Size() (int64, error)

	// Truncate sets the length in bytes; growth reads as zero.
	Truncate(size int64) error

	// Allocate reserves host space for [off, off+n) and grows the file to
	// cover it, so that later writes there cannot fail for lack of space.
	// It fails with an error matching syscall.ENOSPC or syscall.EDQUOT when
	// the host is full, and leaves the file usable as it was.
	Allocate(off, n int64) error

	// PunchHole gives the host space of [off, off+n) back; the range reads
	// as zero and the size stays. Where the host cannot, it is a no-op and
	// the range keeps what it had.
	PunchHole(off, n int64) error

	// Datasync makes the contents and size durable. After an error nothing
	// is known about any write since the last success: the caller must not
	// retry and must stop trusting the file.
	Datasync() error

	// WriteSync is WriteAt that returns when what it wrote is durable, and
	// the size as far as that needs it; it says nothing of other writes. Until
	// then a crash may keep any of its sectors. After an error nothing is
	// known about the range: see Datasync. It is quickest where the address of p, its length
	// and off are multiples of 4096: see [Aligned].
	WriteSync(p []byte, off int64) error

	// WriteBehind asks the host to start writing [off, off+n) back, without
	// waiting and without any promise. It keeps a later Datasync short.
	WriteBehind(off, n int64)

	// ReadAhead asks the host to start reading [off, off+n), without waiting
	// and without any promise. It is for ranges that lie apart: reads one
	// behind the other are noticed by the host itself.
	ReadAhead(off, n int64)

	// Evict writes [off, off+n) back, waits for that, and drops the range from
	// the host's cache, so that the next read shows what the device has. An n
	// of 0 reaches to the end of the file. It is advice on a real file and
	// makes nothing durable: what goes wrong is for Datasync to tell.
	Evict(off, n int64)
}
