package nbd

import (
	"sync"
	"sync/atomic"
)

// flushes is how a connection deals with flushes.
//
// Those that come while a worker beside the leader is at one wait for it, and
// that worker does all of them together, behind its own: clients that keep a
// queue full send many at a time, and after the first there is little left to
// be made durable.
type flushes struct {
	changed atomic.Bool   // there may be something to be flushed
	others  atomic.Uint64 // requests read that are no flushes
	calm    atomic.Int32  // flushes, the last ones, during each of which nothing but flushes came
	behind  bool          // something came while the leader was at one; only the leader uses it

	mu      sync.Mutex // guards what follows
	going   bool       // a worker beside the leader is at one
	waiting []request  // at most maxFlying
}

// heard takes note of a request that has been read.
func (f *flushes) heard(r *request) {
	if r.cmd != cmdFlush {
		f.others.Add(1)
		if f.behind {
			f.calm.Store(0)
		}
	}
	f.behind = false
}

// notice takes note of whether nothing but flushes came during one.
func (f *flushes) notice(calm bool) {
	if !calm {
		f.calm.Store(0)
	} else if f.calm.Load() < aloneFrom {
		f.calm.Add(1)
	}
}

// begin says that the caller is to be the worker for those that come meanwhile.
func (f *flushes) begin() bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.going {
		return false
	}
	f.going = true
	return true
}

// join leaves a flush to the worker that is at another one. What was written
// before is covered, since the device is asked once more, behind that one.
func (f *flushes) join(r *request) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	if !f.going || len(f.waiting) >= maxFlying {
		return false
	}
	f.waiting = append(f.waiting, *r)
	return true
}

// next appends those that wait to to[:0]; when there are none, the caller is
// the worker no more.
func (f *flushes) next(to []request) []request {
	f.mu.Lock()
	defer f.mu.Unlock()
	to = append(to[:0], f.waiting...)
	f.waiting = f.waiting[:0]
	f.going = len(to) > 0
	return to
}

// flushOthers carries out what has come while the caller was at a flush, until
// there is nothing. x has sent what it had to say.
func (x *worker) flushOthers() {
	c := x.c
	var rs []request
	for rs = c.flushes.next(rs); len(rs) > 0; rs = c.flushes.next(rs) {
		err := c.export.Flush(c.ctx)
		x.out = x.out[:0]
		for i := range rs {
			x.answer(&rs[i], err)
		}
		c.sent(c.out.post(x.out))
	}
}

// keepsFlush says that a flush is the leader's even if it is expected to take its
// time: there is nothing to be flushed, or all that is going to wait is other
// flushes.
func (c *conn) keepsFlush(r *request) bool {
	if r.cmd != cmdFlush || c.flying.Load() > 0 {
		return false
	}
	if !c.flushes.changed.Load() {
		return true
	}
	if c.flushes.calm.Load() < aloneFrom {
		return false
	}
	n := c.wire.requestSize()
	if c.in.Buffered() < n {
		return true
	}
	b, err := c.in.Peek(n)
	if err != nil {
		return false
	}
	next, ok := c.wire.decode(b)
	return ok && next.cmd == cmdFlush
}
