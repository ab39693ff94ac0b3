package api

import (
	"cmp"
	"context"
	"log/slog"
	"sync"
	"time"

	"coppice/internal/claim"
	"coppice/internal/db"
	"coppice/internal/rpc"
	"coppice/internal/xapi"
)

// Origin says where a call comes from.
type Origin struct {
	Peer string // address of the client, for the log
	// Trusted marks a peer that is as good as root: it came over the
	// server's own Unix socket under the server's own user id. Any password
	// logs it in.
	Trusted    bool
	UserAgent  string
	Originator string // what the client calls itself; goes into its sessions
	// Undo says whether VM.revert and VDI.revert take a snapshot first, "true"
	// or "false"; "" leaves it to the keys coppice:undo in other_config of the
	// session and the pool.
	Undo string
}

// Call is one invocation of a message, or one HTTP transfer, while it runs. It
// is also a task: Task names it, task.cancel ends its context.
type Call struct {
	Origin  Origin
	Session *session // nil for the messages that need none, as login
	Method  string   // "VDI.snapshot", or the HTTP action of a transfer

	message *xapi.Method // nil for a transfer
	args    []any
	detail  string // what a transfer is about
	async   bool
	opened  *session    // by a login
	text    *rpc.Shared // of the result, when others get the same

	api    *API
	begun  time.Time
	client context.Context // ends when the client's connection does
	ctx    context.Context // ends with task.cancel or the server's stop
	cancel context.CancelCauseFunc

	mu       sync.Mutex
	task     xapi.Ref[xapi.Task] // "" until somebody asks for it
	recorded bool                // the task has a row in db
	holder   *claim.Holder       // nil until a claim
	progress progress
}

// Context is done when the call's task is cancelled, with a TASK_CANCELLED
// error as its cause, or when the server stops. A client that goes away does
// not end it.
func (c *Call) Context() context.Context { return c.ctx }

// attended derives from ctx a context that also ends when the client goes
// away, for calls whose only point is to answer.
func (c *Call) attended(ctx context.Context) (context.Context, context.CancelFunc) {
	ctx, cancel := context.WithCancelCause(ctx)
	unlink := context.AfterFunc(c.client, func() { cancel(context.Cause(c.client)) })
	return ctx, func() {
		unlink()
		cancel(nil)
	}
}

// Task returns the reference under which the call appears in
// current_operations. Only Async calls and transfers have a row in the
// database behind it, but any can be cancelled by it.
func (c *Call) Task() xapi.Ref[xapi.Task] {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.task == "" {
		c.task = xapi.NewRef[xapi.Task]()
		c.api.running.add(c.task, c)
	}
	return c.task
}

// How long a claim waits for its turn before it fails with the
// OTHER_OPERATION_IN_PROGRESS that held it up.
const (
	claimPatience    = 2 * time.Hour
	transferPatience = 2 * time.Minute
)

// Claim takes all of claims, or none; see [claim.Holder.Take]. It waits for its
// turn for up to two hours. The end of the call gives them back.
func (c *Call) Claim(ctx context.Context, check func(*db.Tx) error, claims ...claim.Claim) (release func(), err error) {
	return c.claims().Take(ctx, claimPatience, check, claims...)
}

// ClaimWithin is Claim with another limit for the wait.
func (c *Call) ClaimWithin(ctx context.Context, patience time.Duration, check func(*db.Tx) error, claims ...claim.Claim) (release func(), err error) {
	return c.claims().Take(ctx, patience, check, claims...)
}

// claims is what the call has claimed.
func (c *Call) claims() *claim.Holder {
	task := c.Task()
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.holder == nil {
		c.holder = c.api.claims.Holder(task, c.Method)
	}
	return c.holder
}

// progress is what a task row says of a call's progress, and when it was told.
type progress struct {
	shown float64
	at    time.Time
}

// progressStep and progressPause limit how often a task row changes while its
// call makes progress: each change is a commit and an event.
const (
	progressStep  = 0.01
	progressPause = 250 * time.Millisecond
)

// progressMost is the most that a call shows before it has ended: clients take 1
// for the end, and what comes after the last byte is work, too.
const progressMost = 0.99

// Progress tells watchers of the task how far the call is. It is cheap and
// may be called for every chunk; done and total are in any one unit.
func (c *Call) Progress(done, total int64) {
	if total <= 0 {
		return
	}
	p := min(max(float64(done)/float64(total), 0), progressMost)
	c.mu.Lock()
	now := time.Now()
	if !c.recorded || p < c.progress.shown+progressStep || now.Sub(c.progress.at) < progressPause {
		c.mu.Unlock()
		return
	}
	c.progress = progress{shown: p, at: now}
	task := c.task
	c.mu.Unlock()
	c.api.setProgress(task, p)
}

// begin makes the Call of a message that has been let in. The caller ends it
// with end. It fails when the server stops.
func (a *API) begin(client context.Context, o Origin, s *session, method string) (*Call, error) {
	if err := a.running.enter(); err != nil {
		return nil, err
	}
	c := &Call{Origin: o, Session: s, Method: method, api: a, begun: time.Now(), client: client}
	c.ctx, c.cancel = context.WithCancelCause(a.ctx)
	if s != nil {
		s.running.Add(1)
	}
	return c, nil
}

// end gives back what the call still holds and completes its task row, if it
// has one, in a single commit. It returns err as what the client is told.
// Calling it twice is a bug.
func (c *Call) end(res Result, err error) (told *xapi.Error) {
	a := c.api
	// Whatever happens below, the server's stop must not wait for this call.
	defer a.running.leave()
	defer c.cancel(nil)
	if s := c.Session; s != nil {
		defer func() {
			s.active.Store(a.now().UnixNano())
			s.running.Add(-1)
		}()
	}
	if err != nil {
		told = a.outcome(c.ctx, c.client, c.Method, err)
	}
	c.mu.Lock()
	task, recorded, claimed := c.task, c.recorded, c.holder != nil
	c.mu.Unlock()

	if task != "" {
		defer a.running.remove(task)
	}
	switch {
	case recorded:
		c.claims().End(func(tx *db.Tx) error { return a.completeTask(tx, task, res, told) })
	case claimed:
		c.claims().End(nil)
	}
	c.logEnd(told)
	a.report(c.reported(), cmp.Or(c.Session, c.opened), reasonOf(told))
	return told
}

// reported is what a report says of the call itself.
func (c *Call) reported() CallReport {
	r := CallReport{
		Name: c.Method, Message: c.message, Args: c.args, Detail: c.detail, Async: c.async, Origin: c.Origin, Begun: c.begun,
	}
	if c.recorded {
		r.Task = string(c.task)
	}
	return r
}

// reasonOf is told as an error that is nil when told is.
func reasonOf(told *xapi.Error) error {
	if told == nil {
		return nil
	}
	return told
}

// logEnd is a line per call for whoever looks for what a client did. It has
// no parameters of the call: some are secrets.
func (c *Call) logEnd(told *xapi.Error) {
	log := c.api.log
	if !log.Enabled(context.Background(), slog.LevelDebug) {
		return
	}
	attrs := []any{"method", c.Method, "peer", c.Origin.Peer, "agent", c.Origin.UserAgent, "took", time.Since(c.begun)}
	if c.Session != nil {
		attrs = append(attrs, "user", c.Session.user)
	}
	if c.recorded {
		attrs = append(attrs, "task", c.task)
	}
	if told != nil {
		attrs = append(attrs, "told", told.Code)
	}
	log.Debug("call", attrs...)
}

// finish ends a call that is not run by Invoke; see end.
func (c *Call) finish(res Result, err error) error {
	return reasonOf(c.end(res, err))
}

// Result is what a message returned: a typed value that knows how to write
// itself. The zero Result is that of a transfer, whose task result stays "".
type Result struct {
	Type  *xapi.Type
	Value any

	text *rpc.Shared // of Value, when others get the same
}

// Encode writes the value to e.
func (r Result) Encode(e xapi.Encoder) error {
	if s, ok := r.Value.(streamed); ok {
		return s.encode(e)
	}
	if s, ok := e.(rpc.Sharer); ok && r.text != nil {
		return s.Shared(r.text, func(e rpc.Encoder) error { return r.Type.Encode(e, r.Value) })
	}
	return r.Type.Encode(e, r.Value)
}

// streamed is a result that is written record by record instead of being
// built as one value first.
type streamed interface {
	encode(e xapi.Encoder) error
}
