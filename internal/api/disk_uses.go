package api

import (
	"context"
	"slices"
	"sync"
	"time"

	"coppice/internal/xapi"
)

// diskUse says what the server itself does with a disk it has open: a copy
// or an export reads a pinned version, an import or a copy into it writes. What
// a client of NBD writes is told apart, because a sharable disk bears several
// of those, but nobody beside an import.
type diskUse int

const (
	reading diskUse = iota
	writing
	lending // to a client that writes
	diskUseKinds
)

// diskUses counts the disks the server has open. Writers count as attached
// read-write in the rules; readers hold pinned versions and hinder nobody,
// except that their SR cannot be detached. The zero value is empty.
type diskUses struct {
	mu   sync.Mutex // guards the following
	n    map[xapi.Ref[xapi.VDI]][diskUseKinds]int
	left chan struct{} // closed, and made anew, when a writer ends; nil when nobody waits
}

// add notes a use; drop takes it back.
func (u *diskUses) add(v xapi.Ref[xapi.VDI], how diskUse) (drop func()) {
	u.mu.Lock()
	defer u.mu.Unlock()
	if u.n == nil {
		u.n = map[xapi.Ref[xapi.VDI]][diskUseKinds]int{}
	}
	n := u.n[v]
	n[how]++
	u.n[v] = n
	return sync.OnceFunc(func() {
		u.mu.Lock()
		defer u.mu.Unlock()
		n := u.n[v]
		if n[how]--; n == [diskUseKinds]int{} {
			delete(u.n, v)
		} else {
			u.n[v] = n
		}
		if how == writing && u.left != nil {
			close(u.left)
			u.left = nil
		}
	})
}

// written says whether a disk is open for writing, by whomever.
func (u *diskUses) written(v xapi.Ref[xapi.VDI]) bool {
	return u.count(v, writing) > 0 || u.count(v, lending) > 0
}

// count returns how many uses of a kind a disk has now.
func (u *diskUses) count(v xapi.Ref[xapi.VDI], how diskUse) int {
	u.mu.Lock()
	defer u.mu.Unlock()
	return u.n[v][how]
}

// writerPatience is how long is waited for writers that may be about to end:
// whoever interrupts an import, or whose connection breaks in it, may come again
// before the server has taken note, and has stored what had come until then.
const writerPatience = time.Second

// awaitWriters waits until none of disks is written, by clients of NBD or by the
// server itself, for as long as a writer that is about to end may still count.
// Whether the disks can be had then is for the rules to say.
func (a *API) awaitWriters(ctx context.Context, disks ...xapi.Ref[xapi.VDI]) {
	a.nbdSettle(ctx, func(t *nbdTable) bool {
		return slices.ContainsFunc(disks, func(d xapi.Ref[xapi.VDI]) bool { return nbdWritten(d, "")(t) })
	})
	ctx, cancel := context.WithTimeout(ctx, writerPatience)
	defer cancel()
	for {
		left := a.repos.uses.writerLeft(disks)
		if left == nil {
			return
		}
		select {
		case <-left:
		case <-ctx.Done():
			return
		}
	}
}

// writerLeft returns a channel that is closed when some writer ends, nil when
// the server writes none of disks.
func (u *diskUses) writerLeft(disks []xapi.Ref[xapi.VDI]) <-chan struct{} {
	u.mu.Lock()
	defer u.mu.Unlock()
	if !slices.ContainsFunc(disks, func(d xapi.Ref[xapi.VDI]) bool { return u.n[d][writing] > 0 }) {
		return nil
	}
	if u.left == nil {
		u.left = make(chan struct{})
	}
	return u.left
}
