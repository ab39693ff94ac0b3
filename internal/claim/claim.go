// Package claim is how calls take turns at objects. A call that is about to do something lasting to an object claims
// it: that shows in the object's current_operations, and whoever is not compatible with it waits. The package hides the
// queue of those that wait, and that taking and giving back happen in the commits that say so. It knows nothing of
// which operations are compatible, or of what calls are.
package claim

import (
	"context"
	"errors"
	"log/slog"
	"reflect"
	"slices"
	"sync"
	"time"

	"coppice/internal/db"
	"coppice/internal/xapi"
)

// Claim says that a call is doing Op to an object. While it is held, the
// object's current_operations has the call's task as a key and Op as its
// value.
type Claim struct {
	Class string // datamodel name
	Ref   string
	Op    string // a value of the enum of the class's current_operations
}

// On is the Claim on the object that ref names.
func On[T any, O ~string](ref xapi.Ref[T], op O) Claim {
	return Claim{Class: xapi.ClassOf[T]().Name, Ref: string(ref), Op: string(op)}
}

// Rules are what a Queue does not know.
type Rules struct {
	// Runs says whether the call whose task it is still runs. Whoever waits for
	// one that does not looks again.
	Runs func(xapi.Ref[xapi.Task]) bool
	// Refresh recomputes allowed_operations of an object whose
	// current_operations have changed. The class is a datamodel name.
	Refresh func(tx *db.Tx, class, ref string) error
}

// Queue has the calls that wait for a claim. It is safe for concurrent use.
//
// Which operations go
// together is not decided here but by the check that comes with a claim: it
// reads current_operations in the transaction that would add to them, and
// answers OTHER_OPERATION_IN_PROGRESS [class, ref, operation, task] when the
// claim has to wait. Every other answer of a check is final.
//
// Waiting is fair: the first to wait is the first to be granted, and nobody
// overtakes those who wait for an object that it claims itself. All the
// bookkeeping happens in the commits that change current_operations, so a
// release and the grants that it makes possible are one commit.
type Queue struct {
	db    *db.DB
	model *xapi.Model
	log   *slog.Logger
	rules Rules

	mu      sync.Mutex
	waiting []*waiter // in the order of arrival
}

// New makes the queue of a database. Log is told of releases that failed.
func New(d *db.DB, m *xapi.Model, log *slog.Logger, r Rules) *Queue {
	return &Queue{db: d, model: m, log: log, rules: r}
}

// Waiting is how many wait.
func (q *Queue) Waiting() int {
	q.mu.Lock()
	defer q.mu.Unlock()
	return len(q.waiting)
}

// waiter is a set of claims that waits to be taken.
type waiter struct {
	holder *Holder
	check  func(*db.Tx) error
	claims []Claim

	blocked *xapi.Error   // why it waits; what it fails with when patience ends
	decided bool          // taken off the queue, by a grant, an error or a give-up
	done    chan struct{} // closed by a grant or an error, after the commit
	err     error         // readable after done
}

// operation names what w waits to do.
func (w *waiter) operation() string {
	if len(w.claims) == 0 {
		return w.holder.method
	}
	return w.claims[0].Op
}

// obstacle is the task that w waits for, or "".
func (w *waiter) obstacle() string {
	if len(w.blocked.Params) < 4 {
		return ""
	}
	return w.blocked.Params[3]
}

// errQueued makes an Update roll back after its waiter has been queued.
var errQueued = errors.New("queued")

// enter takes w's claims, or queues w and returns errQueued, or returns why
// they can never be taken.
func (q *Queue) enter(tx *db.Tx, w *waiter) error {
	q.mu.Lock()
	defer q.mu.Unlock()
	err := q.take(tx, w, q.waiting)
	if err == errQueued {
		q.waiting = append(q.waiting, w)
	}
	return err
}

// take adds w's claims to current_operations unless its check or one of those
// that wait before it forbids; then it returns errQueued and w.blocked says
// what is in the way. q.mu is held.
func (q *Queue) take(tx *db.Tx, w *waiter, before []*waiter) error {
	for _, cl := range w.claims {
		if class := q.model.Classes[cl.Class]; class == nil {
			return xapi.NewError(xapi.ErrInternalError, "claim on class "+cl.Class)
		} else if _, ok := tx.Lookup(class, cl.Ref); !ok {
			return xapi.NewError(xapi.ErrHandleInvalid, cl.Class, cl.Ref)
		}
	}
	if w.check != nil {
		if err := w.check(tx); err != nil {
			busy, ok := errors.AsType[*xapi.Error](err)
			if !ok || busy.Code != xapi.ErrOtherOperationInProgress {
				return err
			}
			if len(busy.Params) > 3 && busy.Params[3] == string(w.holder.task) {
				return err // it would wait for itself
			}
			w.blocked = busy
			return errQueued
		}
	}
	for _, e := range before {
		if e.decided {
			continue
		}
		if i := slices.IndexFunc(w.claims, func(cl Claim) bool { return len(e.blocked.Params) > 1 && cl.Ref == e.blocked.Params[1] }); i >= 0 {
			cl := w.claims[i]
			w.blocked = xapi.NewError(xapi.ErrOtherOperationInProgress,
				cl.Class, cl.Ref, e.operation(), string(e.holder.task))
			return errQueued
		}
	}
	for _, cl := range w.claims {
		if err := q.setOperation(tx, cl.Class, cl.Ref, w.holder.task, cl.Op); err != nil {
			return err
		}
	}
	return nil
}

// settle takes the claims of every waiter whose turn has come, now that h
// gave claims back or no longer waits, and returns those that are no longer to
// wait. They are off the queue, and the caller closes their done after the
// commit. A waiter whose check fails for good leaves with that error.
//
// Only those that h was in the way of are looked at again, and those behind
// one that leaves: the cost of a release does not depend on who waits for
// something else.
func (q *Queue) settle(tx *db.Tx, h *Holder) (leaving []*waiter) {
	q.mu.Lock()
	defer q.mu.Unlock()
	if len(q.waiting) == 0 {
		return nil
	}
	moved := map[string]bool{string(h.task): true}
	for i, w := range q.waiting {
		if !moved[w.obstacle()] && q.rules.Runs(xapi.Ref[xapi.Task](w.obstacle())) {
			continue
		}
		if err := q.take(tx, w, q.waiting[:i]); err != errQueued {
			w.err, w.decided = err, true
			leaving = append(leaving, w)
			moved[string(w.holder.task)] = true
		}
	}
	q.waiting = slices.DeleteFunc(q.waiting, func(w *waiter) bool { return w.decided })
	return leaving
}

// await waits until w's claims are taken.
func (q *Queue) await(ctx context.Context, patience time.Duration, w *waiter) error {
	timer := time.NewTimer(patience)
	defer timer.Stop()
	var why error
	select {
	case <-w.done:
		return w.err
	case <-timer.C:
	case <-ctx.Done():
		why = context.Cause(ctx)
	}
	q.mu.Lock()
	left := !w.decided
	if left {
		w.decided = true
		q.waiting = slices.DeleteFunc(q.waiting, func(x *waiter) bool { return x == w })
		if why == nil {
			why = w.blocked
		}
	}
	q.mu.Unlock()
	if !left { // granted or refused at the last moment
		<-w.done
		if w.err != nil || why == nil {
			return w.err
		}
		q.letGo(w.holder, heldOf(w.claims), nil)
		return why
	}
	q.letGo(w.holder, nil, nil) // those behind it may go on
	return why
}

// letGo takes claims of h out of current_operations and grants what waited for
// them, in one commit to which also adds the call's last words. It happens
// whatever the state of the call's context.
func (q *Queue) letGo(h *Holder, claims []*heldClaim, also func(*db.Tx) error) {
	var leaving []*waiter
	err := q.db.Update(context.Background(), func(tx *db.Tx) error {
		for _, cl := range claims {
			if err := q.setOperation(tx, cl.Class, cl.Ref, h.task, h.other(cl)); err != nil {
				return err
			}
		}
		if also != nil {
			if err := also(tx); err != nil {
				return err
			}
		}
		leaving = q.settle(tx, h)
		return nil
	})
	if err != nil {
		// The database is closed or its store has failed: nobody's turn will
		// ever come.
		q.log.Error("releasing claims failed", "method", h.method, "err", err)
		leaving = append(leaving, q.dissolve()...)
	}
	for _, w := range leaving {
		if w.err == nil {
			w.err = err
		}
		close(w.done)
	}
}

// dissolve empties the queue and returns who was in it.
func (q *Queue) dissolve() []*waiter {
	q.mu.Lock()
	defer q.mu.Unlock()
	all := q.waiting
	q.waiting = nil
	for _, w := range all {
		w.decided = true
	}
	return all
}

// setOperation makes op what task does to an object, nothing when op is "",
// and has allowed_operations recomputed. An object that is gone is left
// alone.
func (q *Queue) setOperation(tx *db.Tx, class, ref string, task xapi.Ref[xapi.Task], op string) error {
	cl := q.model.Classes[class]
	if _, ok := tx.Lookup(cl, ref); !ok {
		return nil
	}
	f := cl.Field("current_operations")
	err := tx.ModifyAny(cl, ref, func(rec any) {
		ops := reflect.ValueOf(f.Get(rec))
		key := reflect.ValueOf(string(task)).Convert(ops.Type().Key())
		if op == "" {
			ops.SetMapIndex(key, reflect.Value{})
		} else {
			ops.SetMapIndex(key, reflect.ValueOf(op).Convert(ops.Type().Elem()))
		}
	})
	if err != nil {
		return err
	}
	return q.rules.Refresh(tx, class, ref)
}
