package db

import (
	"context"
	"errors"
	"fmt"
	"iter"
	"maps"
	"slices"
	"sync"
)

// Store keeps rows and one revision. It is used by one database at a time; Commit is never called
// concurrently, nor together with Load or Close.
type Store interface {
	// Load returns the revision and all rows as of the last commit, in any order. A new store has revision 0
	// and no rows. The data of the rows is the caller's to keep.
	Load(ctx context.Context) (revision uint64, rows iter.Seq2[Row, error], err error)

	// Commit applies a batch, all or nothing, and returns when it is durable. An error that matches ErrFull
	// says that it has not been applied and that the store is as it was. After any other it is not known
	// whether the batch was applied, and the store is not used again except to be closed.
	Commit(ctx context.Context, b Batch) error

	// Close releases the store.
	Close() error
}

// Row is the stored form of an object: its persistent fields as a JSON object by field name. Rows of class
// "coppice:history" are something else: entries of the history, by slot.
type Row struct {
	Class string
	Ref   string
	Data  []byte // in a Batch nil deletes the row
}

// Batch is what a commit changes.
type Batch struct {
	Revision uint64
	Rows     []Row // a later row of the same object wins
}

var (
	// ErrClosed is returned by a database that was closed.
	ErrClosed = errors.New("db: closed")
	// ErrExists is returned by an insert whose reference or uuid is taken.
	ErrExists = errors.New("db: object exists")
	// ErrFull says that the store has no room for a commit: the update did not happen, and later ones may.
	ErrFull = errors.New("db: no room on the file system")
	// ErrReadTx is returned by a change in a View.
	ErrReadTx = errors.New("db: the transaction is read-only")
)

// StoreError says that the store failed. The update it answers did not happen, and the database accepts no
// further updates until it is opened again, unless it matches ErrFull.
type StoreError struct{ Err error }

func (e *StoreError) Error() string {
	if errors.Is(e.Err, ErrFull) {
		return e.Err.Error()
	}
	return fmt.Sprintf("db: the store failed, the database is read-only: %v", e.Err)
}
func (e *StoreError) Unwrap() error { return e.Err }

// CorruptError says that a stored row cannot be read.
type CorruptError struct {
	Class, Ref string
	Field      string // empty when the row as a whole is malformed
	Err        error
}

func (e *CorruptError) Error() string {
	where := e.Class + " " + e.Ref
	if e.Field != "" {
		where += " field " + e.Field
	}
	return fmt.Sprintf("db: corrupt row: %s: %v", where, e.Err)
}
func (e *CorruptError) Unwrap() error { return e.Err }

// MemStore is a store in memory. It survives Close, so that a database can be opened on it again.
type MemStore struct {
	mu struct {
		sync.Mutex
		revision uint64
		rows     map[[2]string][]byte
		commits  int
	}
}

var _ Store = (*MemStore)(nil)

// NewMemStore returns an empty store.
func NewMemStore() *MemStore {
	s := new(MemStore)
	s.mu.rows = make(map[[2]string][]byte)
	return s
}

// CopyStore returns a store in memory with what another one has: what a backup of it, or a crash now, would leave.
func CopyStore(ctx context.Context, from Store) (*MemStore, error) {
	revision, rows, err := from.Load(ctx)
	if err != nil {
		return nil, err
	}
	b := Batch{Revision: revision}
	for row, err := range rows {
		if err != nil {
			return nil, err
		}
		b.Rows = append(b.Rows, row)
	}
	s := NewMemStore()
	return s, s.Commit(ctx, b)
}

// Load implements Store.
func (s *MemStore) Load(context.Context) (uint64, iter.Seq2[Row, error], error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	rows := maps.Clone(s.mu.rows)
	return s.mu.revision, func(yield func(Row, error) bool) {
		for k, data := range rows {
			if !yield(Row{Class: k[0], Ref: k[1], Data: data}, nil) {
				return
			}
		}
	}, nil
}

// Commit implements Store.
func (s *MemStore) Commit(_ context.Context, b Batch) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.mu.revision = b.Revision
	s.mu.commits++
	for _, r := range b.Rows {
		if key := [2]string{r.Class, r.Ref}; r.Data == nil {
			delete(s.mu.rows, key)
		} else {
			s.mu.rows[key] = slices.Clone(r.Data)
		}
	}
	return nil
}

// Close implements Store.
func (s *MemStore) Close() error { return nil }

// Commits returns how many commits there were.
func (s *MemStore) Commits() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.mu.commits
}
