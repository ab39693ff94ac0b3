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
// and reads on. What to expect is a running mean of how long the device took
// for requests of the same class. Long reads that come from memory are the
// leader's too: two of them at once would only push each other's bytes out of
// the caches, and wait for each other to send.
//
// A client that waits for each answer gains nothing from a second goroutine.
// When nothing else has arrived beside its last few requests, the leader does
// the slow ones as well, and the timer that watches it runs slower. So it does
// with flushes, beside which only more flushes have been heard lately: a client
// that keeps a queue full waits for the first of them, and sends many.
//
// Expectations fail. While the leader works on a request of its own, a timer
// watches; if it is still at the same one after a tick, another goroutine takes
// the lead and sends the replies that were gathered, and the former leader
// ends with its request. So no request waits for the device on behalf of
// another one for longer than two ticks. When it is the client that is waited
// for, to take a reply, it takes longer: what follows could not be sent either,
// and all that is to be avoided is that both sides send and neither reads.

const (
	tick       = time.Millisecond
	manyTicks  = 10       // for a client that takes its time for a reply, or that waits for each
	aloneFrom  = 16       // requests in a row, beside which no other was heard, that make such a client
	maxFlying  = 64       // requests in progress beside the leader's
	maxLong    = 4        // of which more than smallSize long: more would only fall out of the caches
	batchBytes = 64 << 10 // of replies that are gathered
	batchCount = 32       // replies that are gathered

	lastReplies = 10 * time.Second // for a client that has to go to take the replies to what is in progress
)

// transmission is the state of a connection behind the handshake.
type transmission struct {
	stopping atomic.Bool // no more requests are read
	flying   atomic.Int32
	paces    [classes]pace
	out      sender
	flushes  flushes
	workers  sync.WaitGroup
	fault    atomic.Pointer[error] // why the connection ends
	dense    atomic.Int64          // long reads since one that met a hole

	// state counts the leader's steps: even while it reads, odd while it works
	// on a request, when the lead can be taken from it by counting on.
	state   atomic.Uint64
	current atomic.Pointer[worker] // the leader
	cost    atomic.Int64           // bytes of the budget that the leader's request is worth
	awaited atomic.Bool            // others are known to wait for the leader's request
	watched atomic.Bool            // the timer runs
	watch   *time.Timer
	seen    uint64 // state at the last tick; only the timer uses it
	stuck   int    // ticks for which it has been so; only the timer uses it

	heard  atomic.Uint64 // requests read
	single atomic.Int32  // of which so many, the last ones, came each when all others were answered

	// relieved gets a token for each new leader that runs. A former leader
	// takes one before it ends, so that there is always a worker to wait for.
	relieved chan struct{}
}

// Classes of requests that take about as long.
const (
	classRead     = iota
	classLongRead // measured by portionSize
	classWrite
	classLongWrite
	classSync
	classOther
	classes
)

// worth is the mean from which requests of a class are handed over.
func worth(class int) time.Duration {
	if class == classLongRead {
		return 400 * time.Microsecond // four times what memory takes
	}
	return 40 * time.Microsecond // what handing over takes
}

// pace is the running mean of the duration of requests of a class.
type pace struct{ ns atomic.Int64 }

// note counts a request of a class. One that the machine had no processor for
// says little about the next, so no request counts for more than a few.
func (c *conn) note(class int, d time.Duration) {
	p := &c.paces[class].ns
	old := p.Load()
	p.Store(old + (int64(min(d, 4*worth(class)))-old)/8)
}

// slow says that requests of a class are expected to be.
func (c *conn) slow(class int) bool { return c.paces[class].ns.Load() >= int64(worth(class)) }

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
	c.heard.Add(1)
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
	c.flushes.heard(r)
	if r.cmd == cmdWrite && n > pieceSize {
		w.flush()
		w.writeLong(r)
		return true
	}
	if r.cmd == cmdFlush && c.flushes.join(r) {
		c.notice(false)
		return true
	}
	class := r.class()
	cost := bufferSize(int(min(n+c.returns(r), pieceSize)))
	if c.parallel(class) && !c.keepsFlush(r) && c.srv.memory.take(cost) {
		x := &worker{c: c, held: cost}
		heard, others := c.heard.Load(), c.flushes.others.Load()
		p, err := x.receive(w, int(n))
		if err != nil {
			x.finish()
			return true
		}
		flushing := r.cmd == cmdFlush && c.flushes.begin()
		c.flying.Add(1)
		c.workers.Go(func() {
			c.timed(x, r, p, class)
			c.notice(c.heard.Load() == heard)
			if flushing {
				c.flushes.notice(c.flushes.others.Load() == others)
			}
			c.sent(c.out.post(x.out))
			if flushing {
				x.flushOthers()
			}
			x.finish()
			c.flying.Add(-1)
		})
		return true
	}
	p, err := w.receive(w, int(n))
	if err != nil {
		return true
	}
	return c.inline(w, r, p, class, cost)
}

// parallel says whether a request of a class is better handed over.
func (c *conn) parallel(class int) bool {
	limit := int32(maxFlying)
	if class == classLongRead || class == classLongWrite {
		limit = maxLong
	}
	flying := c.flying.Load()
	if !c.slow(class) || flying >= limit {
		return false
	}
	return !c.alone() || flying > 0 || c.in.Buffered() > 0
}

// notice takes note of whether a request was the only one.
func (c *conn) notice(single bool) {
	if !single {
		c.single.Store(0)
	} else if c.single.Load() < aloneFrom {
		c.single.Add(1)
	}
}

// alone says that the client waits for each answer before it goes on.
func (c *conn) alone() bool { return c.single.Load() >= aloneFrom }

// interval is how long the timer waits.
func (c *conn) interval() time.Duration {
	if c.alone() {
		return manyTicks * tick
	}
	return tick
}

// timed works on a request and returns how long that took.
func (c *conn) timed(w *worker, r *request, p []byte, class int) time.Duration {
	idle := false // a flush with nothing to do: it tells nothing about the next
	switch {
	case r.cmd == cmdFlush:
		idle = !c.flushes.changed.Swap(false)
	case r.cmd != cmdRead:
		c.flushes.changed.Store(true)
	}
	begun := time.Now()
	w.do(r, p)
	took := time.Since(begun)
	if idle && took >= worth(class) { // somebody else had written
		idle = false
		c.flushes.changed.Store(true)
	}
	if class != classLongRead && !idle { // of long reads most may be sending: readPiece takes the time
		c.note(class, took)
	}
	return took
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
func (c *conn) inline(w *worker, r *request, p []byte, class int, cost int64) (mine bool) {
	idle := r.cmd == cmdFlush && !c.flushes.changed.Load()
	if class == classLongRead || class == classSync && !idle {
		w.flush() // do sends by itself, or takes its time
	}
	w.ready = w.out
	c.cost.Store(cost)
	others := len(w.out) > 0 || c.in.Buffered() > 0
	c.notice(!others && c.flying.Load() == 0)
	c.awaited.Store(others || c.secure) // TLS may hold more
	at := c.state.Load()
	c.state.Store(at + 1)
	if !c.watched.Load() && c.watched.CompareAndSwap(false, true) {
		c.watch.Reset(c.interval())
	}
	took := c.timed(w, r, p, class)
	if !c.state.CompareAndSwap(at+1, at+2) {
		// Somebody has sent what was ready and counts w's request as flying.
		c.sent(c.out.post(w.out[len(w.ready):]))
		c.srv.memory.give(cost)
		c.flying.Add(-1)
		<-c.relieved
		return false
	}
	w.count++
	if r.cmd == cmdFlush && !idle {
		c.flushes.behind = c.in.Buffered() > 0 || c.raw.readable()
		c.flushes.notice(true) // until it is known what is behind
	}
	if c.alone() && took >= worth(class) && (class == classLongRead || c.raw.readable()) {
		c.notice(false) // or, as a long read is sent already, one cannot tell
	}
	if w.buf != nil && len(*w.buf) > headroom+smallSize {
		w.drop()
	}
	if took >= worth(class) {
		w.flush() // others have waited for long enough
	}
	return true
}

// relieve is called by the timer: it takes the lead from who has been working
// on the same request for a tick while others wait. The timer goes on for as
// long as there are requests, for to start it wakes a thread.
func (c *conn) relieve() {
	at := c.state.Load()
	if at != c.seen {
		c.seen, c.stuck = at, 0
		c.watch.Reset(c.interval())
		return
	}
	if at%2 == 0 {
		c.watched.Store(false)
		if c.state.Load()%2 == 1 && c.watched.CompareAndSwap(false, true) {
			c.watch.Reset(tick)
		}
		return
	}
	c.stuck++
	cost := c.cost.Load()
	switch {
	case c.out.busy.Load() && c.stuck < manyTicks,
		!c.awaited.Load() && !c.raw.readable(),
		c.flying.Load() >= maxFlying,
		!c.srv.memory.take(cost):
		c.watch.Reset(tick)
		return
	}
	former := c.current.Load()
	c.flying.Add(1)
	if !c.state.CompareAndSwap(at, at+1) {
		c.flying.Add(-1)
		c.srv.memory.give(cost)
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
