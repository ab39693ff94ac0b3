package nbd

import (
	"context"
	"errors"
	"fmt"
	"io"
	"sync"
	"sync/atomic"
	"time"
)

// How a connection works on its requests.
//
// One goroutine, the leader, reads them. What is expected to take as long as
// handing it over would, it does itself, and gathers the replies until
// nothing more is to be read; a request from memory costs no switch and no
// system call of its own. Everything else it gives to a goroutine of its own
// and reads on. What to expect is a running mean of how long requests of the
// same class took.
//
// Expectations fail. While the leader works on a request of its own, a timer
// watches; if it is still at the same one after a tick, another goroutine takes
// the lead and sends the replies that were gathered, and the former leader
// ends with its request. So no request waits for another one for longer than
// two ticks.

const (
	tick        = time.Millisecond
	worthHandle = 40 * time.Microsecond // mean from which requests of a class are handed over
	maxFlying   = 64                    // requests in progress beside the leader's
	maxLong     = 4                     // of which more than smallSize long: more would only fall out of the caches
	batchBytes  = 64 << 10              // of replies that are gathered
	batchCount  = 32                    // replies that are gathered

	lastReplies = 10 * time.Second // for a client that has to go to take the replies to what is in progress
)

// transmission is the state of a connection behind the handshake.
type transmission struct {
	stopping atomic.Bool // no more requests are read
	flying   atomic.Int32
	paces    [classes]pace
	out      sender
	workers  sync.WaitGroup
	fault    atomic.Pointer[error] // why the connection ends
	dense    atomic.Int64          // long reads since one that met a hole

	// state counts the leader's steps: even while it reads, odd while it works
	// on a request, when the lead can be taken from it by counting on.
	state   atomic.Uint64
	current atomic.Pointer[worker] // the leader
	watched atomic.Bool            // the timer runs
	watch   *time.Timer
	seen    uint64 // state at the last tick; only the timer uses it

	// relieved gets a token for each new leader that runs. A former leader
	// takes one before it ends, so that there is always a worker to wait for.
	relieved chan struct{}
}

// pace is the running mean of the duration of requests.
type pace struct{ ns atomic.Int64 }

// note counts a request. One that the machine had no processor for says
// little about the next, so no request counts for more than a few.
func (p *pace) note(d time.Duration) {
	old := p.ns.Load()
	p.ns.Store(old + (int64(min(d, 4*worthHandle))-old)/8)
}

func (p *pace) slow() bool { return p.ns.Load() >= int64(worthHandle) }

// Classes of requests that take about as long.
const (
	classRead = iota
	classLongRead
	classWrite
	classLongWrite
	classSync
	classOther
	classes
)

func (r *request) class() int {
	switch {
	case r.cmd == cmdFlush, r.flags&CmdFUA != 0:
		return classSync
	case r.cmd == cmdRead && r.length <= smallSize:
		return classRead
	case r.cmd == cmdRead:
		return classLongRead
	case r.cmd == cmdWrite && r.length <= smallSize:
		return classWrite
	case r.cmd == cmdWrite:
		return classLongWrite
	}
	return classOther
}

// worker is who works on a request: its memory.
type worker struct {
	c     *conn
	out   []byte // replies not sent yet
	count int    // how many
	ready []byte // the front of out that is complete: what a new leader sends
	buf   *[]byte
	held  int64 // bytes of the budget
}

// grab returns n bytes, at most pieceSize, behind headroom bytes, that stay
// until the next grab or drop.
func (w *worker) grab(n int) []byte {
	if w.buf == nil || len(*w.buf) < headroom+n {
		w.drop()
		w.buf = getBuffer(n)
	}
	return (*w.buf)[:headroom+n]
}

func (w *worker) drop() {
	if w.buf != nil {
		putBuffer(w.buf)
		w.buf = nil
	}
}

// flush sends the replies gathered.
func (w *worker) flush() {
	if len(w.out) == 0 {
		return
	}
	w.c.sent(w.c.out.send(w.out, nil))
	w.out, w.count = w.out[:0], 0
}

// sent takes note of the outcome of sending. A client that cannot be answered
// is not listened to either.
func (c *conn) sent(err error) {
	if err != nil {
		c.fail(fmt.Errorf("reply: %w", err))
		c.cut()
	}
}

// fail notes the first reason for which the connection ends.
func (c *conn) fail(err error) { c.fault.CompareAndSwap(nil, &err) }

// transmit answers requests until the client disconnects (nil), the
// connection fails, or it is stopped. It returns when no request is in
// progress any more.
func (c *conn) transmit() error {
	if !c.begin() {
		return nil
	}
	c.raw.take()
	c.out.w = c.nc
	c.relieved = make(chan struct{}, maxFlying+1)
	c.watch = time.AfterFunc(time.Hour, c.relieve)
	c.watch.Stop()
	if ctx := c.export.Context; ctx != nil {
		unhook := context.AfterFunc(ctx, c.dismiss)
		defer unhook()
	}
	c.workers.Go(c.lead)
	c.workers.Wait()
	c.watch.Stop()
	if err := c.fault.Load(); err != nil {
		return *err
	}
	return nil
}

// lead reads requests until there are no more or somebody else takes the
// lead.
func (c *conn) lead() {
	w := &worker{c: c}
	defer w.drop()
	c.current.Store(w)
	for {
		r, err := c.next(w)
		if err != nil {
			w.flush()
			if !errors.Is(err, errDisconnect) && !c.stopping.Load() {
				c.fail(err)
			}
			return
		}
		if mine := c.dispatch(w, &r); !mine {
			return
		}
	}
}

// errDisconnect is the end that the client wants.
var errDisconnect = errors.New("disconnect")

// next reads a request header. Before it has to wait, and once enough have
// come together, it sends the replies gathered.
func (c *conn) next(w *worker) (r request, err error) {
	n := c.wire.requestSize()
	if c.in.Buffered() < n || len(w.out) >= batchBytes || w.count >= batchCount {
		w.flush()
	}
	if c.stopping.Load() {
		return r, errDisconnect
	}
	b, err := c.in.Peek(n)
	if err != nil {
		if err == io.EOF && len(b) > 0 {
			err = io.ErrUnexpectedEOF
		}
		return r, err
	}
	r, ok := c.wire.decode(b)
	if !ok {
		return r, fmt.Errorf("request with magic %#x", b[:4])
	}
	if _, err := c.in.Discard(n); err != nil {
		return r, err
	}
	if r.cmd == cmdDisconnect {
		return r, errDisconnect
	}
	return r, nil
}

// payload returns how many bytes follow a request.
func (c *conn) payload(r *request) uint64 {
	if r.cmd == cmdWrite || (c.wire == wireExtended && r.flags&cmdPayloadLen != 0) {
		return r.length
	}
	return 0
}

// dispatch has a request worked on. It returns false when the lead was taken
// from w meanwhile.
func (c *conn) dispatch(w *worker, r *request) (mine bool) {
	n := c.payload(r)
	if e, text := c.check(r); e != 0 {
		if n > 1<<32 {
			c.fail(fmt.Errorf("request with a payload of %d bytes", n))
			c.cut()
			return true // the next read says the rest
		}
		w.discard(int64(n))
		w.out = c.wire.appendError(w.out, r, e, text)
		w.count++
		return true
	}
	if r.cmd == cmdWrite && n > pieceSize {
		w.flush()
		w.writeLong(r)
		return true
	}
	class := r.class()
	if cost := bufferSize(int(min(n+c.returns(r), pieceSize))); c.parallel(class) && c.srv.memory.take(cost) {
		x := &worker{c: c, held: cost}
		p, err := x.receive(w, int(n))
		if err != nil {
			x.finish()
			return true
		}
		c.flying.Add(1)
		c.workers.Go(func() {
			begun := time.Now()
			x.do(r, p)
			c.paces[class].note(time.Since(begun))
			c.sent(c.out.post(x.out))
			x.finish()
			c.flying.Add(-1)
		})
		return true
	}
	p, err := w.receive(w, int(n))
	if err != nil {
		return true
	}
	return c.inline(w, r, p, class)
}

// parallel says whether a request of a class is better handed over.
func (c *conn) parallel(class int) bool {
	limit := int32(maxFlying)
	if class == classLongRead || class == classLongWrite {
		limit = maxLong
	}
	return c.paces[class].slow() && c.flying.Load() < limit
}

// returns is how many bytes of data the answer to a request has at most.
func (c *conn) returns(r *request) uint64 {
	if r.cmd == cmdRead {
		return r.length
	}
	return 0
}

// finish gives back what a worker beside the leader has.
func (w *worker) finish() {
	w.drop()
	w.c.srv.memory.give(w.held)
}

// receive reads a payload of n bytes, at most pieceSize, into the memory of
// w. l is the leader.
func (w *worker) receive(l *worker, n int) ([]byte, error) {
	if n == 0 {
		return nil, nil
	}
	c := w.c
	if c.in.Buffered() < n {
		l.flush()
	}
	p := w.grab(n)[headroom:]
	if _, err := io.ReadFull(c.in, p); err != nil {
		c.fail(fmt.Errorf("payload: %w", err))
		return nil, err
	}
	return p, nil
}

// discard reads past n bytes.
func (w *worker) discard(n int64) {
	if n > int64(w.c.in.Buffered()) {
		w.flush()
	}
	if _, err := io.CopyN(io.Discard, w.c.in, n); err != nil {
		w.c.fail(fmt.Errorf("payload: %w", err))
	}
}

// inline works on a request in the leader. It returns false when the lead was
// taken from it meanwhile.
func (c *conn) inline(w *worker, r *request, p []byte, class int) (mine bool) {
	if class == classLongRead || class == classSync {
		w.flush() // do sends by itself, or takes its time
	}
	w.ready = w.out
	at := c.state.Load()
	c.state.Store(at + 1)
	if !c.watched.Load() && c.watched.CompareAndSwap(false, true) {
		c.watch.Reset(tick)
	}
	begun := time.Now()
	w.do(r, p)
	took := time.Since(begun)
	c.paces[class].note(took)
	if !c.state.CompareAndSwap(at+1, at+2) {
		// Somebody has sent what was ready and counts w's request as flying.
		c.sent(c.out.post(w.out[len(w.ready):]))
		c.srv.memory.give(pieceSize)
		c.flying.Add(-1)
		<-c.relieved
		return false
	}
	w.count++
	if w.buf != nil && len(*w.buf) > headroom+smallSize {
		w.drop()
	}
	if took >= worthHandle {
		w.flush() // others have waited for long enough
	}
	return true
}

// relieve is called by the timer: it takes the lead from who has been working
// on the same request for a tick.
func (c *conn) relieve() {
	at := c.state.Load()
	if at%2 == 0 {
		c.watched.Store(false)
		if c.state.Load()%2 == 1 && c.watched.CompareAndSwap(false, true) {
			c.watch.Reset(tick)
		}
		return
	}
	if at != c.seen || c.flying.Load() >= maxFlying || !c.srv.memory.take(pieceSize) {
		c.seen = at
		c.watch.Reset(tick)
		return
	}
	former := c.current.Load()
	c.flying.Add(1)
	if !c.state.CompareAndSwap(at, at+1) {
		c.flying.Add(-1)
		c.srv.memory.give(pieceSize)
		c.watch.Reset(tick)
		return
	}
	ready := former.ready
	c.workers.Go(func() {
		if len(ready) > 0 {
			c.sent(c.out.send(ready, nil))
		}
		c.lead()
	})
	c.relieved <- struct{}{}
	c.watch.Reset(tick)
}
