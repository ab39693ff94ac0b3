package claim

import (
	"context"
	"errors"
	"slices"
	"sync"
	"time"

	"coppice/internal/db"
	"coppice/internal/xapi"
)

// Holder is a call that may have claims. It is safe for concurrent use.
type Holder struct {
	queue  *Queue
	task   xapi.Ref[xapi.Task]
	method string

	mu   sync.Mutex
	held []*heldClaim
}

// heldClaim is a claim that is in current_operations.
type heldClaim struct{ Claim }

func heldOf(claims []Claim) []*heldClaim {
	held := make([]*heldClaim, len(claims))
	for i, cl := range claims {
		held[i] = &heldClaim{cl}
	}
	return held
}

// Holder makes the holder of a call: task is what shows in current_operations,
// method what others are told that it does while it waits without claims. The
// caller ends it with End.
func (q *Queue) Holder(task xapi.Ref[xapi.Task], method string) *Holder {
	return &Holder{queue: q, task: task, method: method}
}

// Take takes all of claims, or none. check, which may be nil, runs in the
// transaction that takes them, before it does, and may run several times.
// When it answers OTHER_OPERATION_IN_PROGRESS the call waits, for as long as
// patience, after which that is the error; ctx may end meanwhile, and the error
// is its cause. The returned function gives the claims back; it is idempotent,
// and End implies it. Without claims this is a wait for check to agree, and the
// release lets others look again.
func (h *Holder) Take(ctx context.Context, patience time.Duration, check func(*db.Tx) error, claims ...Claim) (release func(), err error) {
	w := &waiter{holder: h, check: check, claims: claims, done: make(chan struct{})}
	err = h.queue.db.Update(ctx, func(tx *db.Tx) error {
		return h.queue.enter(tx, w)
	})
	if errors.Is(err, errQueued) {
		err = h.queue.await(ctx, patience, w)
	}
	if err != nil {
		return nil, err
	}
	return h.hold(claims), nil
}

// hold records that the call has claims and returns their release.
func (h *Holder) hold(claims []Claim) (release func()) {
	held := heldOf(claims)
	h.mu.Lock()
	h.held = append(h.held, held...)
	h.mu.Unlock()
	return sync.OnceFunc(func() {
		var mine []*heldClaim
		h.mu.Lock()
		h.held = slices.DeleteFunc(h.held, func(cl *heldClaim) bool {
			if !slices.Contains(held, cl) {
				return false
			}
			mine = append(mine, cl)
			return true
		})
		h.mu.Unlock()
		if len(mine) == len(held) { // else the end of the call was first
			h.queue.letGo(h, mine, nil)
		}
	})
}

// other returns the operation of another claim that the call still holds on the
// object of cl, or "".
func (h *Holder) other(cl *heldClaim) string {
	h.mu.Lock()
	defer h.mu.Unlock()
	for _, x := range slices.Backward(h.held) {
		if x.Ref == cl.Ref {
			return x.Op
		}
	}
	return ""
}

// End gives back what the call still holds, in one commit to which also, which
// may be nil, adds the call's last words. Without either it does nothing.
func (h *Holder) End(also func(*db.Tx) error) {
	h.mu.Lock()
	held := h.held
	h.held = nil
	h.mu.Unlock()
	if len(held) > 0 || also != nil {
		h.queue.letGo(h, held, also)
	}
}
