package api

import (
	"cmp"
	"context"
	"errors"
	"slices"
	"sync"
	"time"

	"coppice/internal/db"
	"coppice/internal/rpc"
	"coppice/internal/xapi"
)

// taskMethods binds the custom messages of class task.
func taskMethods() map[string]any {
	return map[string]any{
		"task.create":                   (*API).taskCreate,
		"task.destroy":                  (*API).taskDestroy,
		"task.cancel":                   (*API).taskCancel,
		"task.set_status":               (*API).taskSetStatus,
		"task.set_progress":             (*API).taskSetProgress,
		"task.set_result":               (*API).taskSetResult,
		"task.set_error_info":           (*API).taskSetErrorInfo,
		"task.set_other_config":         (*API).taskSetOtherConfig,
		"task.add_to_other_config":      (*API).taskAddToOtherConfig,
		"task.remove_from_other_config": (*API).taskRemoveFromOtherConfig,
	}
}

// How long tasks stay in the database.
const (
	taskKept    = 65 * time.Minute // after it finished
	taskIdle    = 24 * time.Hour   // pending, with nobody working on it
	tasksAtMost = 200              // finished ones
)

// tasksMost bounds the pending tasks: instead of another one a client gets
// TOO_MANY_PENDING_TASKS.
const tasksMost = 10_000

// taskTable knows the calls in progress and, of every task row, what the row
// does not say.
type taskTable struct {
	mu    sync.Mutex
	calls map[xapi.Ref[xapi.Task]]*Call
	rows  map[xapi.Ref[xapi.Task]]*taskRow

	closed bool
	active int
	idle   chan struct{} // closed when closed is set and active is 0
}

// taskRow goes with a row of class task. The owner's session may end before
// the task does, so the owner is remembered by name.
type taskRow struct {
	owner   string
	touched time.Time
}

func (t *taskTable) init() {
	t.calls = map[xapi.Ref[xapi.Task]]*Call{}
	t.rows = map[xapi.Ref[xapi.Task]]*taskRow{}
	t.idle = make(chan struct{})
}

// enter counts a call in; it fails once the table is closed.
func (t *taskTable) enter() error {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.closed {
		return errStopping
	}
	t.active++
	return nil
}

func (t *taskTable) leave() {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.active--; t.active == 0 && t.closed {
		close(t.idle)
	}
}

// close lets nobody in any more and waits for those inside.
func (t *taskTable) close() {
	t.mu.Lock()
	if !t.closed {
		t.closed = true
		if t.active == 0 {
			close(t.idle)
		}
	}
	t.mu.Unlock()
	<-t.idle
}

func (t *taskTable) add(ref xapi.Ref[xapi.Task], c *Call) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.calls[ref] = c
}

// attach makes c the call that works on the task; false when another one does.
func (t *taskTable) attach(ref xapi.Ref[xapi.Task], c *Call) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.calls[ref] != nil {
		return false
	}
	t.calls[ref] = c
	return true
}

func (t *taskTable) remove(ref xapi.Ref[xapi.Task]) {
	t.mu.Lock()
	defer t.mu.Unlock()
	delete(t.calls, ref)
}

func (t *taskTable) call(ref xapi.Ref[xapi.Task]) *Call {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.calls[ref]
}

func (t *taskTable) own(ref xapi.Ref[xapi.Task], owner string, now time.Time) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.rows[ref] = &taskRow{owner: owner, touched: now}
}

func (t *taskTable) row(ref xapi.Ref[xapi.Task]) (taskRow, bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	r := t.rows[ref]
	if r == nil {
		return taskRow{}, false
	}
	return *r, true
}

func (t *taskTable) touch(ref xapi.Ref[xapi.Task], now time.Time) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if r := t.rows[ref]; r != nil {
		r.touched = now
	}
}

func (t *taskTable) forget(refs ...xapi.Ref[xapi.Task]) {
	t.mu.Lock()
	defer t.mu.Unlock()
	for _, ref := range refs {
		delete(t.rows, ref)
	}
}

// newTask makes a pending row.
func (a *API) newTask(tx *db.Tx, s *session, label, description string, parent xapi.Ref[xapi.Task]) *xapi.Task {
	t := xapi.New[xapi.Task]()
	t.NameLabel, t.NameDescription = label, description
	t.Status = xapi.TaskStatusTypePending
	t.AllowedOperations = []xapi.TaskAllowedOperations{xapi.TaskAllowedOperationsCancel}
	t.Type = "<none/>"
	t.Backtrace = "()"
	t.Externalpid, t.Stunnelpid = -1, -1
	t.Created = a.now()
	t.ResidentOn = thisHost(tx)
	if s != nil && !s.local {
		t.Session = s.ref
	}
	if !parent.IsNull() {
		t.SubtaskOf = parent
	}
	return t
}

// recordTask gives the call a row in the database, which everybody sees.
func (a *API) recordTask(c *Call, label, description string, parent xapi.Ref[xapi.Task]) error {
	ref := c.Task()
	owner := ""
	if c.Session != nil {
		owner = c.Session.user
	}
	a.running.own(ref, owner, a.now())
	err := a.db.Update(c.ctx, func(tx *db.Tx) error {
		return a.insertTask(tx, ref, a.newTask(tx, c.Session, label, description, parent))
	})
	if err != nil {
		a.running.forget(ref)
		return err
	}
	c.mu.Lock()
	c.recorded = true
	c.mu.Unlock()
	return nil
}

// transferStart says what an HTTP transfer is about to do.
type transferStart struct {
	Session   string
	Task      string // the client's task, or ""
	SubtaskOf string // the parent of the task that is made when Task is ""
	Action    string // name of the HTTP action in the datamodel: its role is checked
	Label     string // of the task that is made
	About     string // which objects, for those who ask who did what
}

// beginTransfer makes the Call of an HTTP transfer. With a task of the client
// the transfer becomes that task's work: its end completes the task. Errors
// about the session leave the client's task alone; a refused role fails it.
// The caller ends the call with finish. ctx is the client's connection.
func (a *API) beginTransfer(ctx context.Context, o Origin, t transferStart) (*Call, error) {
	s, err := a.session(xapi.Ref[xapi.Session](t.Session))
	if err != nil {
		return nil, err
	}
	task := xapi.Ref[xapi.Task](t.Task)
	if !task.IsNull() {
		if err := a.mayModify(s, task, "task.adopt"); err != nil {
			return nil, err
		}
	}
	if err := a.authorizeHTTP(s, t.Action); err != nil {
		if !task.IsNull() {
			a.failTask(task, a.apiError(err))
		}
		a.report(CallReport{Name: t.Action, Detail: t.About, Origin: o, Task: t.Task, Begun: time.Now()}, s, err)
		return nil, err
	}
	c, err := a.begin(ctx, o, s, t.Action)
	if err != nil {
		return nil, err
	}
	c.detail = t.About
	if task.IsNull() {
		err = a.recordTask(c, t.Label, "", xapi.Ref[xapi.Task](t.SubtaskOf))
	} else {
		err = a.adopt(c, task)
	}
	if err != nil {
		return nil, c.end(Result{}, err)
	}
	return c, nil
}

// RefuseTransfer fails a client's task, "" for none, because the request of a transfer
// asks for what there is not. It returns an error when that is for the client to know
// instead: its session is none, or its task is no task that it may complete.
func (a *API) RefuseTransfer(ctx context.Context, o Origin, session, task, action string, why error) error {
	if task == "" {
		_, err := a.session(xapi.Ref[xapi.Session](session))
		return err
	}
	c, err := a.beginTransfer(ctx, o, transferStart{Session: session, Task: task, Action: action})
	if err == nil {
		_ = c.finish(Result{}, why) // which is what the client is told
	}
	return err
}

// adopt makes a pending task of a client the task of the call.
func (a *API) adopt(c *Call, ref xapi.Ref[xapi.Task]) error {
	if !a.running.attach(ref, c) {
		return xapi.NewError(xapi.ErrOperationNotAllowed, "Another transfer works on the task "+string(ref))
	}
	err := a.db.View(func(tx *db.Tx) error {
		t, err := db.Get(tx, ref)
		switch {
		case err != nil:
			return err
		case t.Status == xapi.TaskStatusTypeCancelled:
			return xapi.NewError(xapi.ErrTaskCancelled, string(ref))
		case finished(t):
			return xapi.NewError(xapi.ErrOperationNotAllowed, "The task is finished: "+string(ref))
		}
		return nil
	})
	if err != nil {
		a.running.remove(ref)
		return err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.task, c.recorded = ref, true
	return nil
}

func finished(t *xapi.Task) bool {
	return t.Status != xapi.TaskStatusTypePending && t.Status != xapi.TaskStatusTypeCancelling
}

// completeTask puts the outcome into a pending row; a row that is finished
// keeps its first outcome. A row that was destroyed while pending goes now.
func (a *API) completeTask(tx *db.Tx, ref xapi.Ref[xapi.Task], res Result, told *xapi.Error) error {
	t, err := db.Get(tx, ref)
	if err != nil {
		return nil // destroyed
	}
	if finished(t) {
		return nil
	}
	text := ""
	if told == nil && res.Type != nil {
		text, err = rpc.XMLValue(func(e rpc.Encoder) error { return res.Encode(e) })
		if err != nil {
			told = a.apiError(err)
		}
	}
	return a.finishRow(tx, ref, t, func(t *xapi.Task) {
		switch {
		case told == nil:
			t.Status, t.Result = xapi.TaskStatusTypeSuccess, text
		case told.Code == xapi.ErrTaskCancelled:
			t.Status, t.ErrorInfo = xapi.TaskStatusTypeCancelled, []string{told.Code, string(ref)}
		default:
			t.Status, t.ErrorInfo = xapi.TaskStatusTypeFailure, told.Description()
		}
	})
}

// finishRow applies outcome and what every finished task has in common to the
// pending task t, or removes it when that was asked for while it was pending.
func (a *API) finishRow(tx *db.Tx, ref xapi.Ref[xapi.Task], t *xapi.Task, outcome func(*xapi.Task)) error {
	for _, op := range t.CurrentOperations {
		if op == xapi.TaskAllowedOperationsDestroy {
			a.running.forget(ref)
			return db.Delete(tx, ref)
		}
	}
	return db.Modify(tx, ref, func(t *xapi.Task) {
		outcome(t)
		t.Progress = 1
		t.Finished = a.now()
		t.AllowedOperations = []xapi.TaskAllowedOperations{}
	})
}

// failTask completes a pending task that no call works on.
func (a *API) failTask(ref xapi.Ref[xapi.Task], told *xapi.Error) {
	err := a.db.Update(context.WithoutCancel(a.ctx), func(tx *db.Tx) error {
		return a.completeTask(tx, ref, Result{}, told)
	})
	if err != nil {
		a.log.Error("task: outcome not recorded", "task", ref, "err", err)
	}
}

// setProgress shows how far the work of a task is.
func (a *API) setProgress(ref xapi.Ref[xapi.Task], p float64) {
	a.running.touch(ref, a.now())
	err := a.db.Update(a.ctx, func(tx *db.Tx) error {
		if t, err := db.Get(tx, ref); err != nil || finished(t) {
			return nil
		}
		return db.Modify(tx, ref, func(t *xapi.Task) { t.Progress = p })
	})
	if err != nil && a.ctx.Err() == nil {
		a.log.Warn("task: progress not recorded", "task", ref, "err", err)
	}
}

// oldTasks returns the rows that have been finished for long, the oldest
// finished ones beyond tasksAtMost, and those that wait for a client that does
// not come back.
func (a *API) oldTasks(tx *db.Tx, now time.Time) (gone []xapi.Ref[xapi.Task]) {
	type old struct {
		ref      xapi.Ref[xapi.Task]
		finished time.Time
	}
	var done []old
	for ref, t := range db.All[xapi.Task](tx) {
		if finished(t) {
			done = append(done, old{ref, t.Finished})
		} else if row, ok := a.running.row(ref); a.running.call(ref) == nil && (!ok || now.Sub(row.touched) > taskIdle) {
			gone = append(gone, ref)
		}
	}
	slices.SortFunc(done, func(x, y old) int { return cmp.Or(y.finished.Compare(x.finished), cmp.Compare(x.ref, y.ref)) })
	for i, t := range done {
		if i >= tasksAtMost || now.Sub(t.finished) > taskKept {
			gone = append(gone, t.ref)
		}
	}
	return gone
}

// collectTasks removes the oldTasks.
func (a *API) collectTasks(now time.Time) {
	var gone []xapi.Ref[xapi.Task]
	err := a.db.Update(a.ctx, func(tx *db.Tx) error {
		if gone = a.oldTasks(tx, now); len(gone) == 0 {
			return errNothing
		}
		return deleteEach(tx, gone)
	})
	switch {
	case errors.Is(err, errNothing):
	case err == nil:
		a.running.forget(gone...)
	case a.ctx.Err() == nil:
		a.log.Error("task: collector failed", "err", err)
	}
}

// insertTask adds a row, if there is room for it. Finished ones that the
// collector has not come to yet make room.
func (a *API) insertTask(tx *db.Tx, ref xapi.Ref[xapi.Task], t *xapi.Task) error {
	class := xapi.ClassOf[xapi.Task]()
	if tx.Count(class) >= tasksMost+tasksAtMost {
		gone := a.oldTasks(tx, a.now())
		if err := deleteEach(tx, gone); err != nil {
			return err
		}
		a.running.forget(gone...)
		if tx.Count(class) >= tasksMost+tasksAtMost {
			return xapi.NewError(xapi.ErrTooManyPendingTasks)
		}
	}
	return db.InsertAs(tx, ref, t)
}

// errNothing makes an Update that has nothing to say roll back.
var errNothing = errors.New("nothing to do")

// mayModify says whether the session may change a task: as its owner, or from
// pool-operator upwards. permission is what the refusal names.
func (a *API) mayModify(s *session, ref xapi.Ref[xapi.Task], permission string) error {
	if a.roles.Allows(s.rights(), "pool-operator") {
		return nil
	}
	if row, ok := a.running.row(ref); ok && row.owner != s.user {
		return a.roles.Denied(permission+"/any", "pool-operator")
	}
	if c := a.running.call(ref); c != nil && c.Session != nil && c.Session.user != s.user {
		return a.roles.Denied(permission+"/any", "pool-operator")
	}
	return nil
}

// modifyTask changes a task for a client that may do so.
func (a *API) modifyTask(c *Call, ref xapi.Ref[xapi.Task], change func(*xapi.Task) error) error {
	if err := a.mayModify(c.Session, ref, c.Method); err != nil {
		return err
	}
	a.running.touch(ref, a.now())
	return a.db.Update(a.ctx, func(tx *db.Tx) error {
		var failed error
		err := db.Modify(tx, ref, func(t *xapi.Task) { failed = change(t) })
		return cmpErr(err, failed)
	})
}

func (a *API) taskCreate(ctx context.Context, c *Call, label, description string) (xapi.Ref[xapi.Task], error) {
	ref := xapi.NewRef[xapi.Task]()
	a.running.own(ref, c.Session.user, a.now())
	err := a.db.Update(ctx, func(tx *db.Tx) error {
		return a.insertTask(tx, ref, a.newTask(tx, c.Session, label, description, xapi.NullRef))
	})
	if err != nil {
		a.running.forget(ref)
	}
	return ref, err
}

// taskDestroy removes a finished task. A pending one goes when it finishes:
// destroying a task never stops its work.
func (a *API) taskDestroy(ctx context.Context, c *Call, ref xapi.Ref[xapi.Task]) error {
	if err := a.mayModify(c.Session, ref, c.Method); err != nil {
		return err
	}
	return a.db.Update(ctx, func(tx *db.Tx) error {
		t, err := db.Get(tx, ref)
		if err != nil {
			return err
		}
		if finished(t) {
			a.running.forget(ref)
			return db.Delete(tx, ref)
		}
		return db.Modify(tx, ref, func(t *xapi.Task) {
			t.CurrentOperations[string(c.Task())] = xapi.TaskAllowedOperationsDestroy
		})
	})
}

// taskCancel asks the call behind a task to stop; it completes the task as
// cancelled when it does. A pending task that nobody works on is cancelled
// here. Cancelling a finished task does nothing.
func (a *API) taskCancel(ctx context.Context, c *Call, ref xapi.Ref[xapi.Task]) error {
	if err := a.mayModify(c.Session, ref, c.Method); err != nil {
		return err
	}
	cancelled := xapi.NewError(xapi.ErrTaskCancelled, string(ref))
	work := a.running.call(ref)
	err := a.db.Update(ctx, func(tx *db.Tx) error {
		t, err := db.Get(tx, ref)
		switch {
		case err != nil && work != nil:
			return nil // the hidden task of a synchronous call
		case err != nil:
			return err
		case finished(t):
			return nil
		}
		err = db.Modify(tx, ref, func(t *xapi.Task) {
			t.CurrentOperations[string(c.Task())] = xapi.TaskAllowedOperationsCancel
			t.AllowedOperations = []xapi.TaskAllowedOperations{}
		})
		if err == nil && work == nil {
			err = a.completeTask(tx, ref, Result{}, cancelled)
		}
		return err
	})
	if err != nil {
		return err
	}
	if work == nil {
		work = a.running.call(ref) // a transfer that adopted it meanwhile
	}
	if work != nil {
		work.cancel(cancelled)
	}
	return nil
}

// taskSetStatus is how a client ends a task of its own.
func (a *API) taskSetStatus(ctx context.Context, c *Call, ref xapi.Ref[xapi.Task], status xapi.TaskStatusType) error {
	if err := a.mayModify(c.Session, ref, c.Method); err != nil {
		return err
	}
	return a.db.Update(ctx, func(tx *db.Tx) error {
		t, err := db.Get(tx, ref)
		if err != nil || finished(t) { // the first outcome stays
			return err
		}
		if status == xapi.TaskStatusTypePending || status == xapi.TaskStatusTypeCancelling {
			return db.Modify(tx, ref, func(t *xapi.Task) { t.Status = status })
		}
		return a.finishRow(tx, ref, t, func(t *xapi.Task) { t.Status = status })
	})
}

func (a *API) taskSetProgress(ctx context.Context, c *Call, ref xapi.Ref[xapi.Task], p float64) error {
	if p < 0 || p > 1 {
		return invalidValue("progress", a.model.Classes["task"].Field("progress").Type.Text(p))
	}
	return a.modifyTask(c, ref, func(t *xapi.Task) error {
		if !finished(t) {
			t.Progress = p
		}
		return nil
	})
}

func (a *API) taskSetResult(ctx context.Context, c *Call, ref xapi.Ref[xapi.Task], text string) error {
	return a.modifyTask(c, ref, func(t *xapi.Task) error {
		t.Result = text
		return nil
	})
}

func (a *API) taskSetErrorInfo(ctx context.Context, c *Call, ref xapi.Ref[xapi.Task], info []string) error {
	return a.modifyTask(c, ref, func(t *xapi.Task) error {
		t.ErrorInfo = info
		return nil
	})
}

func (a *API) taskSetOtherConfig(ctx context.Context, c *Call, ref xapi.Ref[xapi.Task], m map[string]string) error {
	return a.modifyTask(c, ref, func(t *xapi.Task) error {
		t.OtherConfig = m
		return nil
	})
}

func (a *API) taskAddToOtherConfig(ctx context.Context, c *Call, ref xapi.Ref[xapi.Task], key, value string) error {
	return a.modifyTask(c, ref, func(t *xapi.Task) error {
		if _, dup := t.OtherConfig[key]; dup {
			return duplicateKey("task", "other_config", string(ref), key)
		}
		t.OtherConfig[key] = value
		return nil
	})
}

func (a *API) taskRemoveFromOtherConfig(ctx context.Context, c *Call, ref xapi.Ref[xapi.Task], key string) error {
	return a.modifyTask(c, ref, func(t *xapi.Task) error {
		delete(t.OtherConfig, key)
		return nil
	})
}
