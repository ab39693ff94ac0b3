// Package bolt keeps the rows of the object database in a bbolt file.
//
// # Format
//
// Version 1, the only one:
//
//	bucket "meta"
//	    "format"    version of the format, 8 bytes big-endian
//	    "revision"  revision of the last commit, 8 bytes big-endian
//	bucket "class"
//	    bucket <class name>
//	        <reference>  JSON object of the persistent fields, by field name
//	    bucket "coppice:history"
//	        <slot, 4 digits>  which objects a commit has changed; see package db. Without it, or when its last
//	                          entry is not of the stored revision, nothing is known of earlier changes
//
// A file of a newer version is refused with a *FormatError. A commit is one bbolt transaction: it is durable,
// or after a crash it never happened. Rows of classes that the program does not know stay where they are.
package bolt

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"iter"
	"os"
	"path/filepath"
	"runtime/debug"
	"time"

	"go.etcd.io/bbolt"
	boltErrors "go.etcd.io/bbolt/errors"
	"golang.org/x/sys/unix"

	"coppice/internal/db"
)

// formatVersion is what we write and the newest that we read.
const formatVersion = 1

// lockWait is how long Open waits for another process to close the file.
const lockWait = 2 * time.Second

var (
	metaBucket  = []byte("meta")
	classBucket = []byte("class")
	formatKey   = []byte("format")
	revisionKey = []byte("revision")
)

var (
	// ErrLocked says that another process has the file open.
	ErrLocked = errors.New("bolt: the file is in use by another process")
	// ErrCorrupt says that the structure of the file is damaged.
	ErrCorrupt = errors.New("bolt: the file is corrupt")
)

// FormatError says that a file cannot be read by this program.
type FormatError struct {
	Path    string
	Version uint64 // 0 when the file is a bbolt file of something else
}

func (e *FormatError) Error() string {
	if e.Version == 0 {
		return fmt.Sprintf("bolt: %s is not an object database", e.Path)
	}
	return fmt.Sprintf("bolt: %s has format version %d, this program knows versions up to %d", e.Path, e.Version, formatVersion)
}

// Store is a db.Store in a file.
type Store struct {
	file *bbolt.DB
	free func() (int64, error) // bytes that the file system has left for us
}

var _ db.Store = (*Store)(nil)

// Open opens the file, or creates it with permissions 0600. It returns ErrLocked when another process has it
// open, ErrCorrupt when it is damaged, and a *FormatError when it holds something else.
func Open(path string) (*Store, error) {
	var file *bbolt.DB
	err := guard(func() (err error) {
		file, err = bbolt.Open(path, 0o600, &bbolt.Options{Timeout: lockWait, FreelistType: bbolt.FreelistMapType})
		return err
	})
	if errors.Is(err, boltErrors.ErrTimeout) {
		return nil, fmt.Errorf("%w: %s", ErrLocked, path)
	}
	if err != nil {
		return nil, fmt.Errorf("bolt: open %s: %w", path, err)
	}
	s := &Store{file: file, free: func() (int64, error) { return freeBytes(path) }}
	err = guard(func() error {
		if err := s.prepare(path); err != nil {
			return err
		}
		return s.makeReserve()
	})
	if err != nil {
		_ = file.Close()
		return nil, err
	}
	return s, nil
}

// guard turns the panics and memory faults by which bbolt reports a damaged file into ErrCorrupt.
func guard(fn func() error) (err error) {
	defer debug.SetPanicOnFault(debug.SetPanicOnFault(true))
	defer func() {
		if r := recover(); r != nil {
			err = fmt.Errorf("%w: %v", ErrCorrupt, r)
		}
	}()
	return fn()
}

// prepare checks the format of the file and writes it to a new one, whose directory entry it makes durable.
func (s *Store) prepare(path string) error {
	var version uint64
	fresh := false
	err := s.file.View(func(tx *bbolt.Tx) error {
		if fi, err := os.Stat(path); err != nil {
			return err
		} else if fi.Size() < tx.Size() {
			return fmt.Errorf("%w: it was cut to %d of %d bytes", ErrCorrupt, fi.Size(), tx.Size())
		}
		if meta := tx.Bucket(metaBucket); meta != nil {
			version = number(meta.Get(formatKey))
			return nil
		}
		first, _ := tx.Cursor().First()
		fresh = first == nil
		return nil
	})
	if err != nil {
		return fmt.Errorf("bolt: open %s: %w", path, err)
	}
	if !fresh {
		if version == 0 || version > formatVersion {
			return &FormatError{Path: path, Version: version}
		}
		return nil
	}
	err = s.file.Update(func(tx *bbolt.Tx) error {
		meta, err := tx.CreateBucket(metaBucket)
		if err != nil {
			return err
		}
		if _, err := tx.CreateBucket(classBucket); err != nil {
			return err
		}
		return meta.Put(formatKey, bytesOf(formatVersion))
	})
	if err == nil {
		err = syncDir(filepath.Dir(path))
	}
	if err != nil {
		return fmt.Errorf("bolt: create %s: %w", path, err)
	}
	return nil
}

func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}

func number(b []byte) uint64 {
	if len(b) != 8 {
		return 0
	}
	return binary.BigEndian.Uint64(b)
}

func bytesOf(n uint64) []byte { return binary.BigEndian.AppendUint64(nil, n) }

// Load implements db.Store. The rows come in the order of class and reference.
func (s *Store) Load(ctx context.Context) (uint64, iter.Seq2[db.Row, error], error) {
	var revision uint64
	err := guard(func() error {
		return s.file.View(func(tx *bbolt.Tx) error {
			revision = number(tx.Bucket(metaBucket).Get(revisionKey))
			return nil
		})
	})
	if err != nil {
		return 0, nil, err
	}
	return revision, func(yield func(db.Row, error) bool) {
		err := s.file.View(func(tx *bbolt.Tx) error {
			defer s.release(tx)
			return loadRows(ctx, tx, yield)
		})
		if err != nil && !errors.Is(err, errStopped) {
			yield(db.Row{}, err)
		}
	}, nil
}

// errStopped ends a transaction whose caller wants no more rows.
var errStopped = errors.New("stopped")

// release has the system take back the memory with the pages of the file that have been read, all of them: from now on
// a few are needed, which come back by themselves. tx keeps the file where it is in memory.
func (s *Store) release(tx *bbolt.Tx) {
	_, _, _ = unix.Syscall(unix.SYS_MADVISE, s.file.Info().Data, uintptr(tx.Size()), unix.MADV_DONTNEED)
}

// loadRows yields the rows of all classes. The file is read under guard alone, so that nothing refers to it outside.
func loadRows(ctx context.Context, tx *bbolt.Tx, yield func(db.Row, error) bool) error {
	var classes *bbolt.Bucket
	err := guard(func() error {
		if classes = tx.Bucket(classBucket); classes == nil {
			return fmt.Errorf("%w: no bucket %q", ErrCorrupt, classBucket)
		}
		return nil
	})
	if err != nil {
		return err
	}
	class := ""
	for c := cursor(classes); ; {
		var rows *bbolt.Bucket
		err := guard(func() (err error) {
			name, _ := c()
			if name == nil {
				return nil
			}
			if class, err = nextKey(class, name); err != nil {
				return err
			}
			if rows = classes.Bucket(name); rows == nil {
				return fmt.Errorf("%w: %q is not a bucket", ErrCorrupt, class)
			}
			return nil
		})
		if err != nil || rows == nil {
			return err
		}
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		ref := ""
		for c := cursor(rows); ; {
			row, more := db.Row{Class: class}, false
			err := guard(func() (err error) {
				key, data := c()
				if key == nil {
					return nil
				}
				more = true
				ref, err = nextKey(ref, key)
				row.Ref, row.Data = ref, bytes.Clone(data)
				return err
			})
			if err != nil {
				return err
			}
			if !more {
				break
			}
			if !yield(row, nil) {
				return errStopped
			}
		}
	}
}

// nextKey returns the key of a bucket that comes after another one. Keys ascend, so that no damage of a file makes a
// bucket endless.
func nextKey(after string, key []byte) (string, error) {
	if string(key) <= after {
		return "", fmt.Errorf("%w: a key of %d bytes is out of order", ErrCorrupt, len(key))
	}
	return string(key), nil
}

// cursor returns a function that returns one key and value of a bucket after the other, then nil.
func cursor(b *bbolt.Bucket) func() (k, v []byte) {
	c := b.Cursor()
	step := c.First
	return func() (k, v []byte) {
		k, v = step()
		step = c.Next
		return k, v
	}
}

// Commit implements db.Store. It asks for room before it begins, because a transaction that runs out of it
// may have been written or not.
func (s *Store) Commit(_ context.Context, b db.Batch) error {
	if err := s.room(b); err != nil {
		return err
	}
	return guard(func() error {
		return s.file.Update(func(tx *bbolt.Tx) error { return commit(tx, b) })
	})
}

// slack is the room that a commit must leave to its neighbours, in bytes.
const slack = 1 << 20

// reservePages are free pages of the file, with host space behind them, that only a batch which deletes may
// take: on a full file system it must be possible to make room.
const reservePages = 64

// makeReserve sees to it that the file has its reserve, if there is room for it.
func (s *Store) makeReserve() error {
	page := s.file.Info().PageSize
	if s.file.Stats().FreePageN >= reservePages {
		return nil
	}
	junk := make([]byte, (reservePages+reservePages/4)*page)
	if free, err := s.free(); err != nil || free < slack+2*int64(len(junk)) {
		return err
	}
	// Pages that a value has been written to and deleted from have space behind them.
	name := []byte("reserve")
	err := s.file.Update(func(tx *bbolt.Tx) error {
		b, err := tx.CreateBucketIfNotExists(name)
		if err != nil {
			return err
		}
		return b.Put(name, junk)
	})
	if err != nil {
		return err
	}
	return s.file.Update(func(tx *bbolt.Tx) error { return tx.DeleteBucket(name) })
}

// room returns an error that matches db.ErrFull when a batch may not fit: neither into pages of the file that
// are free nor into the file system. A row changes a leaf and the branches above it.
func (s *Store) room(b db.Batch) error {
	page := int64(s.file.Info().PageSize)
	need, deletes := 32*page, false
	for _, r := range b.Rows {
		need += int64(len(r.Data)) + 4*page
		deletes = deletes || r.Data == nil
	}
	spare := int64(s.file.Stats().FreePageN)
	if !deletes {
		spare -= reservePages
	}
	if spare*page >= need {
		return nil
	}
	free, err := s.free()
	if err != nil {
		return fmt.Errorf("bolt: free space: %w", err)
	}
	if free < need+slack {
		return fmt.Errorf("%w of %s: a commit may need %d bytes, %d are free", db.ErrFull, s.file.Path(), need+slack, free)
	}
	return nil
}

func freeBytes(path string) (int64, error) {
	var st unix.Statfs_t
	if err := unix.Statfs(path, &st); err != nil {
		return 0, err
	}
	return int64(st.Bavail) * st.Bsize, nil
}

func commit(tx *bbolt.Tx, b db.Batch) error {
	classes := tx.Bucket(classBucket)
	for _, r := range b.Rows {
		rows, err := classes.CreateBucketIfNotExists([]byte(r.Class))
		if err != nil {
			return err
		}
		if r.Data == nil {
			err = rows.Delete([]byte(r.Ref))
		} else {
			err = rows.Put([]byte(r.Ref), r.Data)
		}
		if err != nil {
			return fmt.Errorf("%s %s: %w", r.Class, r.Ref, err)
		}
	}
	return tx.Bucket(metaBucket).Put(revisionKey, bytesOf(b.Revision))
}

// Check reads the whole file and returns every inconsistency in its structure.
func (s *Store) Check() error {
	return s.file.View(func(tx *bbolt.Tx) error {
		var all []error
		for err := range tx.Check() {
			all = append(all, err)
		}
		return errors.Join(all...)
	})
}

// Close implements db.Store.
func (s *Store) Close() error { return s.file.Close() }
