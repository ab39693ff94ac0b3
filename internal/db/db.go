package db

import (
	"context"
	"fmt"
	"math/rand/v2"
	"slices"
	"sync"
	"sync/atomic"

	"coppice/internal/xapi"
)

// DB is an object database. It is safe for concurrent use.
type DB struct {
	store   Store
	classes map[*xapi.Class]int // ordinal of the table

	visible atomic.Pointer[state] // what View shows

	// writer is a lock, held while the function of an Update runs and until its result has queued. It guards
	// head, the state after all queued updates.
	writer chan struct{}
	head   *state

	commits   commitQueue
	committer sync.WaitGroup
	history   *history // the committer's

	opened uint64 // the revision at which the database was opened
	past   past   // what is known of earlier runs

	// told are the digests of what clients may have seen, before the restart, of the fields that do not survive one,
	// until Settle has compared them. The writer lock guards it.
	told map[rowKey]uint32

	closed   chan struct{} // closed by Close
	closing  sync.Once
	closeErr error
}

// state is a version of the whole database. It is immutable.
type state struct {
	revision uint64
	renewed  uint64 // the latest revision at which everything counts as created anew
	lasting  uint64 // the revision of the last change to objects of classes that survive a restart
	tables   []*table
	next     chan struct{} // closed when a newer state is visible
}

// Open loads the database that s holds. The DB owns s from now on and closes it. A row that cannot be read is
// a *CorruptError; rows of classes that the model does not know are kept and ignored.
func Open(ctx context.Context, m *xapi.Model, s Store) (*DB, error) {
	d, err := open(ctx, m, s)
	if err != nil {
		_ = s.Close()
		return nil, fmt.Errorf("db: open: %w", err)
	}
	return d, nil
}

func open(ctx context.Context, m *xapi.Model, s Store) (*DB, error) {
	stored, rows, err := s.Load(ctx)
	if err != nil {
		return nil, err
	}
	d := &DB{
		store:   s,
		classes: make(map[*xapi.Class]int, len(m.Ordered)),
		writer:  make(chan struct{}, 1),
		closed:  make(chan struct{}),
	}
	// The stored revision is not below any that was handed out.
	d.opened = stored + 1 + rand.Uint64N(openingJump)
	tx := &Tx{
		classes: d.classes, tables: make([]*table, len(m.Ordered)), revision: d.opened,
		writable: true, owned: make([]bool, len(m.Ordered)),
	}
	for i, c := range m.Ordered {
		d.classes[c] = i
		tx.tables[i], tx.owned[i] = newTable(c, tx.revision), true
	}
	l := loader{tx: tx, model: m, stored: stored}
	if err := l.load(rows); err != nil {
		return nil, err
	}
	d.past, d.told = l.past, l.told
	d.history = &d.past.ring // not l's, with which the first state of all tables would stay
	d.history.logged, d.history.first = d.opened, true
	d.head = &state{revision: tx.revision, lasting: d.history.logged, tables: tx.tables, next: make(chan struct{})}
	d.past.stamps = nil
	d.visible.Store(d.head)
	d.commits.init(stored)
	d.committer.Go(d.commitLoop)
	return d, nil
}

// openingJump is by how much the first revision of a run may exceed the last that may have been handed out. The jump is
// random, so that two continuations of one database do not use the same revisions.
const openingJump = 1 << 32

// Close waits for the updates that have begun, then closes the store. Later updates return ErrClosed; the
// last visible state can still be viewed.
func (d *DB) Close() error {
	d.closing.Do(func() {
		d.writer <- struct{}{}
		close(d.closed)
		<-d.writer
		d.commits.close()
		d.committer.Wait()
		d.conclude()
		d.closeErr = d.store.Close()
	})
	return d.closeErr
}

// View calls fn with the visible state and returns its error.
func (d *DB) View(fn func(*Tx) error) error {
	s := d.visible.Load()
	return fn(&Tx{classes: d.classes, tables: s.tables, revision: s.revision, lasting: s.lasting})
}

// Update calls fn once with a transaction that it may change. When fn returns an error nothing has happened,
// and Update returns it. When Update returns nil the changes are visible, and those of persistent classes and
// fields are durable. When it returns a *StoreError they are not visible and never will be in this process,
// and only one that matches ErrFull leaves later updates a chance.
//
// Cancelling ctx ends the wait for other updates; once fn has returned the commit is carried through. fn must
// not wait for another update, because there can be none until it returns.
func (d *DB) Update(ctx context.Context, fn func(*Tx) error) error {
	c, err := d.apply(ctx, 0, fn)
	if err != nil {
		return err
	}
	return <-c.done
}

// Stored returns the revision that the store has. It grows with every durable commit, and over restarts: of two
// copies of a database the one that has the greater one has seen more.
func (d *DB) Stored() uint64 {
	d.commits.mu.Lock()
	defer d.commits.mu.Unlock()
	return d.commits.mu.ceiling
}

// Advance makes all revisions from now on, and Stored, greater than a given one. It is for a copy of a database
// that others have continued: everything counts as created anew, as after a restart, so that tokens from
// there select everything. It does nothing when revisions are greater already.
func (d *DB) Advance(ctx context.Context, beyond uint64) error {
	if d.Stored() > beyond {
		return nil
	}
	c, err := d.apply(ctx, beyond, func(tx *Tx) error {
		tx.Renew()
		return nil
	})
	if err != nil {
		return err
	}
	return <-c.done
}

// Settle is the Update with which whoever opened the database brings back what does not survive a restart, before
// anybody else uses it. What fn restores makes no object modified; but those count as modified of which that differs,
// when fn has returned, from what the history says that clients were told.
func (d *DB) Settle(ctx context.Context, fn func(*Tx) error) error {
	return d.Update(ctx, func(tx *Tx) error {
		tx.settling = d.opened
		if err := fn(tx); err != nil {
			return err
		}
		for key, told := range d.told {
			t := tx.tables[key.class]
			if o, ok := t.objects.Get(key.ref); ok && o.modified < d.opened && t.digest(o.rec) != told {
				tx.replace(tx.own(t.class), o, o.rec)
			}
		}
		d.told = nil
		return nil
	})
}

// Sync makes the positions of all visible states known to later runs, even when the process is killed. Every commit of
// what survives a restart implies it, and so does Close.
func (d *DB) Sync(ctx context.Context) error {
	c, err := d.apply(ctx, 0, func(tx *Tx) error {
		tx.sync = true
		return nil
	})
	if err != nil {
		return err
	}
	return <-c.done
}

// conclude has the history tell of the last state. When it cannot, later runs know less of positions, nothing else. A
// database in which nothing has changed stays as it is, with the revision that the store has: who only looks does not
// make a copy look newer than it is.
func (d *DB) conclude() {
	if s := d.visible.Load(); d.commits.mu.err == nil && s.lasting > d.history.logged {
		_, _ = d.write([]*commit{{state: s, sync: true}}, d.commits.mu.ceiling)
	}
}

// apply runs fn at a revision greater than beyond, and queues its result.
func (d *DB) apply(ctx context.Context, beyond uint64, fn func(*Tx) error) (*commit, error) {
	if ctx.Err() != nil {
		return nil, context.Cause(ctx)
	}
	select {
	case d.writer <- struct{}{}:
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
	defer func() { <-d.writer }()
	select {
	case <-d.closed:
		return nil, ErrClosed
	default:
	}
	again, err := d.commits.failure()
	if err != nil {
		return nil, err
	}
	if again {
		d.head = d.visible.Load()
	}
	tx := &Tx{
		classes: d.classes, tables: slices.Clone(d.head.tables), revision: max(d.head.revision, beyond) + 1,
		lasting: d.head.lasting, writable: true, owned: make([]bool, len(d.head.tables)),
	}
	err = fn(tx)
	tx.writable = false
	if err != nil {
		return nil, err
	}
	c := &commit{state: d.head, sync: tx.sync || tx.renewed, done: make(chan error, 1)}
	if tx.changed {
		if c.rows, err = tx.rows(); err != nil {
			return nil, err
		}
		c.state = &state{
			revision: tx.revision, renewed: d.head.renewed, lasting: d.head.lasting,
			tables: tx.tables, next: make(chan struct{}),
		}
		for i, t := range tx.tables {
			if tx.owned[i] && t.class.Persist {
				c.state.lasting = tx.revision
			}
		}
		if tx.renewed {
			c.state.renewed = tx.revision
		}
	}
	if err := d.enqueue(c); err != nil {
		return nil, err
	}
	d.head = c.state
	return c, nil
}
