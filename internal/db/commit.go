package db

import (
	"context"
	"errors"
	"sync"
)

// reserve is by how much the stored revision runs ahead, so that a commit without rows rarely needs the
// store: once in a million.
const reserve = 1 << 20

// commit is an update whose function has run. An update that changed nothing is a commit of the state it
// read, because that may have to become durable first.
type commit struct {
	state *state
	rows  []Row
	sync  bool       // the history shall tell of the state, too
	done  chan error // receives the outcome once
}

// commitQueue holds the commits that are not yet durable, in the order of their revisions.
type commitQueue struct {
	wake sync.Cond
	mu   struct {
		sync.Mutex
		waiting []*commit
		busy    bool   // the committer is writing a batch
		ceiling uint64 // the stored revision: up to it a commit without rows needs no store
		err     error  // of the store; sticky, but for ErrFull
		closed  bool
	}
}

func (q *commitQueue) init(ceiling uint64) {
	q.wake.L = &q.mu
	q.mu.ceiling = ceiling
}

// failure returns why no commit can be taken. A store that was only full gets another chance: then again is
// true, and what was queued after the last visible state is gone. The caller keeps others from queueing.
func (q *commitQueue) failure() (again bool, err error) {
	q.mu.Lock()
	defer q.mu.Unlock()
	if errors.Is(q.mu.err, ErrFull) {
		q.mu.err = nil
		return true, nil
	}
	return false, q.mu.err
}

func (q *commitQueue) close() {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.mu.closed = true
	q.wake.Signal()
}

// enqueue hands a commit to the committer. A commit that needs no store and waits for nobody is published at
// once.
func (d *DB) enqueue(c *commit) error {
	q := &d.commits
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.mu.err != nil {
		return q.mu.err
	}
	if !q.mu.busy && len(q.mu.waiting) == 0 && len(c.rows) == 0 && !c.sync && c.state.revision <= q.mu.ceiling {
		d.publish(c.state)
		c.done <- nil
		return nil
	}
	q.mu.waiting = append(q.mu.waiting, c)
	q.wake.Signal()
	return nil
}

// publish makes s visible, unless it is already. The lock of the queue is held.
func (d *DB) publish(s *state) {
	old := d.visible.Swap(s)
	if old == s {
		return
	}
	close(old.next)
	for i, t := range old.tables {
		if t != s.tables[i] {
			close(t.next)
		}
	}
}

// commitLoop writes batch after batch until the queue is closed and empty.
func (d *DB) commitLoop() {
	q := &d.commits
	q.mu.Lock()
	defer q.mu.Unlock()
	for {
		for len(q.mu.waiting) == 0 {
			if q.mu.closed {
				return
			}
			q.wake.Wait()
		}
		group := q.mu.waiting
		q.mu.waiting = nil
		q.mu.busy = true
		ceiling := q.mu.ceiling
		q.mu.Unlock()

		ceiling, err := d.write(group, ceiling)

		q.mu.Lock()
		q.mu.busy = false
		if err != nil {
			q.mu.err = &StoreError{Err: err}
			group = append(group, q.mu.waiting...)
			q.mu.waiting = nil
		} else {
			q.mu.ceiling = ceiling
			d.publish(group[len(group)-1].state)
		}
		for _, c := range group {
			c.done <- q.mu.err
		}
	}
}

// write makes a group of commits durable in one batch and returns the revision that is stored then.
func (d *DB) write(group []*commit, ceiling uint64) (uint64, error) {
	last := group[len(group)-1].state
	var rows []Row
	sync := false
	for _, c := range group {
		rows = append(rows, c.rows...)
		sync = sync || c.sync
	}
	if len(rows) == 0 && last.revision <= ceiling && !(sync && last.lasting > d.history.logged) {
		return ceiling, nil
	}
	reserved := last.revision + reserve
	e := d.history.next(last, ceiling, reserved)
	err := d.store.Commit(context.Background(), Batch{Revision: reserved, Rows: append(rows, d.history.rows(e)...)})
	if err != nil {
		return ceiling, err
	}
	d.history.add(e)
	return reserved, nil
}
