package api

import (
	"context"
	"errors"
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

// claimOn is the Claim on the object that ref names.
func claimOn[T any, O ~string](ref xapi.Ref[T], op O) Claim {
	return Claim{Class: xapi.ClassOf[T]().Name, Ref: string(ref), Op: string(op)}
}

// How long a claim waits for its turn before it fails with the
// OTHER_OPERATION_IN_PROGRESS that held it up.
const (
	claimPatience    = 2 * time.Hour
	transferPatience = 2 * time.Minute
)

// claimTable queues the calls that wait for a claim. Which operations go
// together is not decided here but by the check that comes with a claim: it
// reads current_operations in the transaction that would add to them, and
// answers OTHER_OPERATION_IN_PROGRESS [class, ref, operation, task] when the
// claim has to wait. Every other answer of a check is final.
//
// Waiting is fair: the first to wait is the first to be granted, and nobody
// overtakes those who wait for an object that it claims itself. All the
// bookkeeping happens in the commits that change current_operations, so a
// release and the grants that it makes possible are one commit.
type claimTable struct {
	mu      sync.Mutex
	waiting []*waiter // in the order of arrival
}

// waiter is a set of claims that waits to be taken.
type waiter struct {
	call   *Call
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
		return w.call.Method
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

// Claim takes all of claims, or none. check, which may be nil, runs in the
// transaction that takes them, before it does, and may run several times.
// When it answers OTHER_OPERATION_IN_PROGRESS the call waits for up to two
// hours; it may be cancelled meanwhile. The returned function gives the
// claims back; it is idempotent, and the end of the call implies it. Without
// claims this is a wait for check to agree, and the release lets others look
// again.
func (c *Call) Claim(ctx context.Context, check func(*db.Tx) error, claims ...Claim) (release func(), err error) {
	return c.ClaimWithin(ctx, claimPatience, check, claims...)
}

// ClaimWithin is Claim with another limit for the wait.
func (c *Call) ClaimWithin(ctx context.Context, patience time.Duration, check func(*db.Tx) error, claims ...Claim) (release func(), err error) {
	c.Task() // current_operations needs its name
	w := &waiter{call: c, check: check, claims: claims, done: make(chan struct{})}
	err = c.api.db.Update(ctx, func(tx *db.Tx) error {
		return c.api.enter(tx, w)
	})
	if errors.Is(err, errQueued) {
		err = c.api.await(ctx, patience, w)
	}
	if err != nil {
		return nil, err
	}
	return c.hold(claims), nil
}

// hold records that the call has claims and returns their release.
func (c *Call) hold(claims []Claim) (release func()) {
	held := heldOf(claims)
	c.mu.Lock()
	c.held = append(c.held, held...)
	c.mu.Unlock()
	return sync.OnceFunc(func() {
		var mine []*heldClaim
		c.mu.Lock()
		c.held = slices.DeleteFunc(c.held, func(h *heldClaim) bool {
			if !slices.Contains(held, h) {
				return false
			}
			mine = append(mine, h)
			return true
		})
		c.mu.Unlock()
		if len(mine) == len(held) { // else the end of the call was first
			c.api.letGo(c, mine, nil)
		}
	})
}

// enter takes w's claims, or queues w and returns errQueued, or returns why
// they can never be taken.
func (a *API) enter(tx *db.Tx, w *waiter) error {
	t := &a.claims
	t.mu.Lock()
	defer t.mu.Unlock()
	err := a.take(tx, w, t.waiting)
	if err == errQueued {
		t.waiting = append(t.waiting, w)
	}
	return err
}

// take adds w's claims to current_operations unless its check or one of those
// that wait before it forbids; then it returns errQueued and w.blocked says
// what is in the way. t.mu is held.
func (a *API) take(tx *db.Tx, w *waiter, before []*waiter) error {
	for _, cl := range w.claims {
		if class := a.model.Classes[cl.Class]; class == nil {
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
			if len(busy.Params) > 3 && busy.Params[3] == string(w.call.Task()) {
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
				cl.Class, cl.Ref, e.operation(), string(e.call.Task()))
			return errQueued
		}
	}
	for _, cl := range w.claims {
		if err := a.setOperation(tx, cl.Class, cl.Ref, w.call.Task(), cl.Op); err != nil {
			return err
		}
	}
	return nil
}

// settle takes the claims of every waiter whose turn has come, now that call c
// gave claims back or no longer waits, and returns those that are no longer to
// wait. They are off the queue, and the caller closes their done after the
// commit. A waiter whose check fails for good leaves with that error.
//
// Only those that c was in the way of are looked at again, and those behind
// one that leaves: the cost of a release does not depend on who waits for
// something else.
func (a *API) settle(tx *db.Tx, c *Call) (leaving []*waiter) {
	t := &a.claims
	t.mu.Lock()
	defer t.mu.Unlock()
	if len(t.waiting) == 0 {
		return nil
	}
	moved := map[string]bool{string(c.Task()): true}
	for i, w := range t.waiting {
		if !moved[w.obstacle()] && a.running.call(xapi.Ref[xapi.Task](w.obstacle())) != nil {
			continue
		}
		if err := a.take(tx, w, t.waiting[:i]); err != errQueued {
			w.err, w.decided = err, true
			leaving = append(leaving, w)
			moved[string(w.call.Task())] = true
		}
	}
	t.waiting = slices.DeleteFunc(t.waiting, func(w *waiter) bool { return w.decided })
	return leaving
}

// await waits until w's claims are taken.
func (a *API) await(ctx context.Context, patience time.Duration, w *waiter) error {
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
	t := &a.claims
	t.mu.Lock()
	left := !w.decided
	if left {
		w.decided = true
		t.waiting = slices.DeleteFunc(t.waiting, func(x *waiter) bool { return x == w })
		if why == nil {
			why = w.blocked
		}
	}
	t.mu.Unlock()
	if !left { // granted or refused at the last moment
		<-w.done
		if w.err != nil || why == nil {
			return w.err
		}
		a.letGo(w.call, heldOf(w.claims), nil)
		return why
	}
	a.letGo(w.call, nil, nil) // those behind it may go on
	return why
}

func heldOf(claims []Claim) []*heldClaim {
	held := make([]*heldClaim, len(claims))
	for i, cl := range claims {
		held[i] = &heldClaim{cl}
	}
	return held
}

// letGo takes claims of c out of current_operations and grants what waited for
// them, in one commit to which also adds the call's last words. It happens
// whatever the state of the call's context.
func (a *API) letGo(c *Call, held []*heldClaim, also func(*db.Tx) error) {
	var leaving []*waiter
	err := a.db.Update(context.WithoutCancel(a.ctx), func(tx *db.Tx) error {
		for _, h := range held {
			if err := a.setOperation(tx, h.Class, h.Ref, c.Task(), c.otherOperation(h)); err != nil {
				return err
			}
		}
		if also != nil {
			if err := also(tx); err != nil {
				return err
			}
		}
		leaving = a.settle(tx, c)
		return nil
	})
	if err != nil {
		// The database is closed or its store has failed: nobody's turn will
		// ever come.
		a.log.Error("releasing claims failed", "method", c.Method, "err", err)
		leaving = append(leaving, a.claims.dissolve()...)
	}
	for _, w := range leaving {
		w.err = cmpErr(w.err, err)
		close(w.done)
	}
}

// dissolve empties the queue and returns who was in it.
func (t *claimTable) dissolve() []*waiter {
	t.mu.Lock()
	defer t.mu.Unlock()
	all := t.waiting
	t.waiting = nil
	for _, w := range all {
		w.decided = true
	}
	return all
}

// cmpErr returns the first error that is not nil.
func cmpErr(errs ...error) error {
	for _, err := range errs {
		if err != nil {
			return err
		}
	}
	return nil
}

// otherOperation returns the operation of another claim that the call still
// holds on the object of h, or "".
func (c *Call) otherOperation(h *heldClaim) string {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, x := range slices.Backward(c.held) {
		if x.Ref == h.Ref {
			return x.Op
		}
	}
	return ""
}

// setOperation makes op what task does to an object, nothing when op is "",
// and has allowed_operations recomputed. An object that is gone is left
// alone.
func (a *API) setOperation(tx *db.Tx, class, ref string, task xapi.Ref[xapi.Task], op string) error {
	cl := a.model.Classes[class]
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
	return a.refreshAllowed(tx, class, ref)
}
