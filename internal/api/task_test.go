package api

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"coppice/internal/claim"
	"coppice/internal/db"
	"coppice/internal/xapi"

	"github.com/google/go-cmp/cmp"
)

// async starts a message as root and returns its task.
func (c *core) async(name string, params ...any) xapi.Ref[xapi.Task] {
	c.t.Helper()
	return c.call("Async."+name, params...).(xapi.Ref[xapi.Task])
}

// tasks counts the rows.
func (c *core) tasks() int { return len(c.call("task.get_all").([]string)) }

func TestAsyncOutcomes(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newCore(t)
		var result xapi.Ref[xapi.VDI]
		var fail error
		c.with("VDI.snapshot", func(_ *API, ctx context.Context, call *Call, vdi xapi.Ref[xapi.VDI], params map[string]string) (xapi.Ref[xapi.VDI], error) {
			time.Sleep(time.Minute)
			return result, fail
		})
		c.with("VDI.update", func(*API, context.Context, *Call, xapi.Ref[xapi.VDI]) error { panic("out of hand") })

		result = xapi.NewRef[xapi.VDI]()
		ref := c.async("VDI.snapshot", "OpaqueRef:x")
		task := record(c, ref)
		want := xapi.New[xapi.Task]()
		*want = xapi.Task{
			UUID: task.UUID, NameLabel: "Async.VDI.snapshot", Status: "pending", Type: "<none/>", Backtrace: "()", Externalpid: -1, Stunnelpid: -1,
			AllowedOperations: []xapi.TaskAllowedOperations{"cancel"}, Created: time.Now().UTC(), ResidentOn: c.host, Session: c.root,
		}
		c.model.Classes["task"].Normalize(want)
		if diff := cmp.Diff(want, task); diff != "" {
			t.Errorf("a pending task: %s", diff)
		}
		if got := record(c, c.root).Tasks; !slices.Equal(got, []xapi.Ref[xapi.Task]{ref}) {
			t.Errorf("tasks of the session: %q", got)
		}
		time.Sleep(2 * time.Minute)
		want.Status, want.Progress, want.Result = "success", 1, "<value>"+string(result)+"</value>" // QT-ASYNC-1
		want.Finished, want.AllowedOperations = want.Created.Add(time.Minute), []xapi.TaskAllowedOperations{}
		if diff := cmp.Diff(want, record(c, ref)); diff != "" {
			t.Errorf("a finished task: %s", diff)
		}

		fail = xapi.NewError(xapi.ErrVDIInUse, "OpaqueRef:x", "snapshot")
		failed := c.async("VDI.snapshot", "OpaqueRef:x")
		panicked := c.async("VDI.update", "OpaqueRef:x")
		missing := c.async("pool.enable_ha", []string{}, map[string]string{})
		refused, err := c.try(c.as("read-only"), "Async.VDI.snapshot", "OpaqueRef:x")
		if err != nil {
			t.Fatal(err)
		}
		time.Sleep(2 * time.Minute)
		for ref, want := range map[xapi.Ref[xapi.Task]][]string{
			failed:   {"VDI_IN_USE", "OpaqueRef:x", "snapshot"},
			panicked: {"INTERNAL_ERROR", "out of hand"},
			missing:  {"NOT_IMPLEMENTED", "pool.enable_ha"},
			refused.Value.(xapi.Ref[xapi.Task]): {
				"RBAC_PERMISSION_DENIED", "VDI.snapshot",
				"No permission in user session. (Roles with this permission: pool-admin, pool-operator, vm-power-admin, vm-admin)",
			},
		} {
			task := record(c, ref)
			if task.Status != "failure" || task.Progress != 1 || task.Result != "" || !slices.Equal(task.ErrorInfo, want) {
				t.Errorf("got %s %q, want %q", task.Status, task.ErrorInfo, want)
			}
		}
		rows := c.tasks()
		c.wantFailure("MESSAGE_PARAMETER_COUNT_MISMATCH", c.root, "Async.VDI.snapshot")
		c.wantFailure("FIELD_TYPE_ERROR", c.root, "Async.VDI.snapshot", 1)
		c.wantFailure("SESSION_INVALID", "OpaqueRef:x", "Async.VDI.snapshot", "OpaqueRef:x")
		if c.tasks() != rows {
			t.Error("an error that is told at once leaves a task")
		}
	})
}

func TestVoidResultOfTask(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newCore(t)
		c.with("VDI.update", func(*API, context.Context, *Call, xapi.Ref[xapi.VDI]) error { return nil })
		ref := c.async("VDI.update", "OpaqueRef:x")
		synctest.Wait()
		if got := record(c, ref); got.Status != "success" || got.Result != "<value></value>" {
			t.Errorf("got %s %q", got.Status, got.Result)
		}
	})
}

func TestSynchronousCallsLeaveNoTask(t *testing.T) {
	c := newCore(t)
	c.with("VDI.update", func(a *API, ctx context.Context, call *Call, vdi xapi.Ref[xapi.VDI]) error {
		call.Progress(1, 2)
		_, err := call.Claim(ctx, nil, claim.On(c.host, reboot))
		return err
	})
	c.call("VDI.update", "OpaqueRef:x")
	if n := c.tasks(); n != 0 || len(c.running.calls) != 0 {
		t.Errorf("%d rows and %d calls left", n, len(c.running.calls))
	}
}

func TestProgress(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newCore(t)
		c.with("VDI.update", func(a *API, ctx context.Context, call *Call, vdi xapi.Ref[xapi.VDI]) error {
			call.Progress(1, 0)
			for i := range int64(1000) {
				call.Progress(i, 1000)
				time.Sleep(10 * time.Millisecond)
			}
			call.Progress(1000, 1000)
			time.Sleep(10 * time.Second)
			return nil
		})
		ref := c.async("VDI.update", "OpaqueRef:x")
		begin := c.db.Revision()
		time.Sleep(5 * time.Second)
		if p := record(c, ref).Progress; p < 0.45 || p > 0.5 {
			t.Errorf("progress %v after half of the work", p)
		}
		time.Sleep(10 * time.Second)
		if p := record(c, ref).Progress; p < 0.95 || p >= 1 {
			t.Errorf("progress %v before the end", p)
		}
		time.Sleep(10 * time.Second)
		if p := record(c, ref).Progress; p != 1 {
			t.Errorf("progress %v at the end", p)
		}
		if n := c.db.Revision() - begin; n > 50 {
			t.Errorf("%d commits for 1000 reports of progress", n)
		}
	})
}

// blockingUpdate makes VDI.update wait until its task is cancelled.
func blockingUpdate(c *core) {
	c.with("VDI.update", func(a *API, ctx context.Context, call *Call, vdi xapi.Ref[xapi.VDI]) error {
		<-ctx.Done()
		return fmt.Errorf("copying: %w", ctx.Err())
	})
}

func TestCancel(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newCore(t)
		blockingUpdate(c)
		ref := c.async("VDI.update", "OpaqueRef:x")
		c.call("task.cancel", ref)
		synctest.Wait()
		task := record(c, ref)
		if task.Status != "cancelled" || !slices.Equal(task.ErrorInfo, []string{"TASK_CANCELLED", string(ref)}) || task.Progress != 1 || len(task.AllowedOperations) != 0 {
			t.Errorf("cancelled task: %+v", task)
		}
		for _, op := range task.CurrentOperations {
			if op != "cancel" {
				t.Errorf("current operation %s", op)
			}
		}
		if len(task.CurrentOperations) != 1 {
			t.Errorf("current operations %v", task.CurrentOperations)
		}
		c.call("task.cancel", ref) // harmless
		if diff := cmp.Diff(task, record(c, ref)); diff != "" {
			t.Errorf("cancelling again: %s", diff)
		}

		// a synchronous call, by the reference its claims show
		c.with("VDI.update", func(a *API, ctx context.Context, call *Call, vdi xapi.Ref[xapi.VDI]) error {
			if _, err := call.Claim(ctx, nil, claim.On(c.host, reboot)); err != nil {
				return err
			}
			<-ctx.Done()
			return context.Cause(ctx)
		})
		done := make(chan error)
		go func() {
			_, err := c.try(c.root, "VDI.update", "OpaqueRef:x")
			done <- err
		}()
		synctest.Wait()
		for hidden := range record(c, c.host).CurrentOperations {
			c.call("task.cancel", hidden)
			if got, want := description(<-done), "TASK_CANCELLED|"+hidden; got != want {
				t.Errorf("got %q, want %q", got, want)
			}
		}

		// nobody works on it
		own := c.call("task.create", "label", "description").(xapi.Ref[xapi.Task])
		c.call("task.cancel", own)
		if got := record(c, own); got.Status != "cancelled" || got.Progress != 1 || got.NameLabel != "label" || got.NameDescription != "description" {
			t.Errorf("cancelled task of a client: %+v", got)
		}
		c.wantFailure("HANDLE_INVALID|task|OpaqueRef:x", c.root, "task.cancel", "OpaqueRef:x")
	})
}

func TestCloseCancelsCalls(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newCore(t)
		blockingUpdate(c)
		ref := c.async("VDI.update", "OpaqueRef:x")
		c.stop(errStopping)
		c.running.close()
		if got := record(c, ref); got.Status != "failure" || !slices.Equal(got.ErrorInfo, []string{"INTERNAL_ERROR", "The server is stopping"}) {
			t.Errorf("got %s %q", got.Status, got.ErrorInfo)
		}
		c.wantFailure("INTERNAL_ERROR|The server is stopping", c.root, "VDI.update", "OpaqueRef:x")
	})
}

func TestDestroy(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newCore(t)
		work := make(chan struct{})
		c.with("VDI.update", func(a *API, ctx context.Context, call *Call, vdi xapi.Ref[xapi.VDI]) error {
			<-work
			return ctx.Err()
		})
		ref := c.async("VDI.update", "OpaqueRef:x")
		c.call("task.destroy", ref)
		if got := record(c, ref); got.Status != "pending" {
			t.Errorf("destroying a pending task makes it %s", got.Status)
		}
		close(work)
		synctest.Wait()
		c.wantFailure("HANDLE_INVALID|task|"+string(ref), c.root, "task.get_status", ref)

		own := c.call("task.create", "l", "").(xapi.Ref[xapi.Task])
		c.call("task.destroy", own)
		c.call("task.set_status", own, "success")
		c.wantFailure("HANDLE_INVALID", c.root, "task.get_status", own)
		c.wantFailure("HANDLE_INVALID|task|"+string(own), c.root, "task.destroy", own)
		if len(c.running.rows) != 0 {
			t.Errorf("%d rows remembered", len(c.running.rows))
		}
	})
}

func TestClientsOwnTask(t *testing.T) {
	c := newCore(t)
	ref := c.call("task.create", "l", "d").(xapi.Ref[xapi.Task])
	c.call("task.set_progress", ref, 0.5)
	c.call("task.add_to_other_config", ref, "k", "v")
	c.wantFailure("MAP_DUPLICATE_KEY|task|other_config|"+string(ref)+"|k", c.root, "task.add_to_other_config", ref, "k", "w")
	c.call("task.add_to_other_config", ref, "gone", "v")
	c.call("task.remove_from_other_config", ref, "gone")
	c.call("task.set_result", ref, "r")
	c.call("task.set_error_info", ref, []string{"E", "p"})
	got := record(c, ref)
	if got.Status != "pending" || got.Progress != 0.5 || got.Result != "r" || !slices.Equal(got.ErrorInfo, []string{"E", "p"}) || len(got.OtherConfig) != 1 {
		t.Errorf("%+v", got)
	}
	c.call("task.set_status", ref, "failure")
	c.call("task.set_status", ref, "success") // too late
	c.call("task.set_progress", ref, 0.1)
	got = record(c, ref)
	if got.Status != "failure" || got.Progress != 1 || got.Finished.Equal(xapi.Epoch) {
		t.Errorf("%+v", got)
	}
	c.wantFailure("INVALID_VALUE|progress|2", c.root, "task.set_progress", ref, 2.0)
	c.wantFailure("INVALID_VALUE|value|done", c.root, "task.set_status", ref, "done")
	for _, m := range []string{"task.set_result", "task.destroy", "task.cancel"} {
		params := []any{"OpaqueRef:x"}
		if m == "task.set_result" {
			params = append(params, "r")
		}
		c.wantFailure("HANDLE_INVALID|task|OpaqueRef:x", c.root, m, params...)
	}
}

func TestTaskOwner(t *testing.T) {
	c := newCore(t)
	owner, stranger, operator := c.as("read-only"), c.as("vm-admin"), c.as("pool-operator")
	create := func() xapi.Ref[xapi.Task] {
		res, err := c.try(owner, "task.create", "l", "d")
		if err != nil {
			t.Fatal(err)
		}
		return res.Value.(xapi.Ref[xapi.Task])
	}
	for m, params := range map[string][]any{
		"task.cancel": nil, "task.destroy": nil, "task.set_status": {"success"}, "task.set_progress": {0.5}, "task.set_result": {"r"},
		"task.set_error_info": {[]string{}}, "task.set_other_config": {map[string]string{}}, "task.add_to_other_config": {"k", "v"},
		"task.remove_from_other_config": {"k"},
	} {
		ref := create()
		c.wantFailure("RBAC_PERMISSION_DENIED|"+m+"/any", stranger, m, append([]any{ref}, params...)...)
		for _, session := range []xapi.Ref[xapi.Session]{owner, operator} {
			if _, err := c.try(session, m, append([]any{create()}, params...)...); err != nil {
				t.Errorf("%s: %v", m, err)
			}
		}
	}
}

func TestTaskCollector(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newCore(t)
		blockingUpdate(c)
		running := c.async("VDI.update", "OpaqueRef:x")
		forgotten := c.call("task.create", "l", "").(xapi.Ref[xapi.Task])
		alive := c.call("task.create", "l", "").(xapi.Ref[xapi.Task])
		done := c.call("task.create", "l", "").(xapi.Ref[xapi.Task])
		c.call("task.set_status", done, "success")
		has := func(ref xapi.Ref[xapi.Task]) bool {
			_, err := c.try(c.root, "task.get_status", ref)
			return err == nil
		}
		time.Sleep(65 * time.Minute)
		c.collectTasks(c.now())
		if !has(done) {
			t.Error("a finished task is gone after 65 minutes")
		}
		time.Sleep(time.Second)
		c.collectTasks(c.now())
		if has(done) || !has(forgotten) {
			t.Error("after more than 65 minutes the finished task is there, or the pending one is not")
		}
		c.call("task.set_progress", alive, 0.1)
		time.Sleep(24 * time.Hour)
		c.collectTasks(c.now())
		if has(forgotten) || !has(alive) || !has(running) {
			t.Errorf("after a day: forgotten %v, alive %v, running %v", has(forgotten), has(alive), has(running))
		}
		c.call("task.set_progress", alive, 0.2)
		var newest xapi.Ref[xapi.Task]
		for range tasksAtMost + 10 {
			newest = c.call("task.create", "l", "").(xapi.Ref[xapi.Task])
			c.call("task.set_status", newest, "success")
			time.Sleep(time.Millisecond)
		}
		c.collectTasks(c.now())
		if n := c.tasks(); n != tasksAtMost+2 || !has(newest) {
			t.Errorf("%d tasks kept, want %d finished and 2 pending", n, tasksAtMost)
		}
		if len(c.running.rows) != c.tasks() {
			t.Errorf("%d rows remembered, %d tasks", len(c.running.rows), c.tasks())
		}
		c.call("task.cancel", running)
	})
}

func TestTransferTasks(t *testing.T) {
	c := newCore(t)
	start := transferStart{Session: string(c.root), Action: "get_export_raw_vdi", Label: "Export"}
	begin := func(s transferStart) (*Call, error) { return c.beginTransfer(t.Context(), Origin{}, s) }

	call, err := begin(start)
	if err != nil {
		t.Fatal(err)
	}
	if got := record(c, call.Task()); got.NameLabel != "Export" || got.Status != "pending" {
		t.Errorf("made task: %+v", got)
	}
	parent := call.Task()
	child := start
	child.SubtaskOf = string(parent)
	sub, err := begin(child)
	if err != nil {
		t.Fatal(err)
	}
	if got := record(c, parent).Subtasks; !slices.Equal(got, []xapi.Ref[xapi.Task]{sub.Task()}) {
		t.Errorf("subtasks: %q", got)
	}
	sub.finish(Result{}, errors.New("odd"))
	if err := call.finish(Result{}, nil); err != nil {
		t.Error(err)
	}
	if got := record(c, call.Task()); got.Status != "success" || got.Result != "" {
		t.Errorf("finished: %s %q", got.Status, got.Result)
	}

	// the client's task
	own := c.call("task.create", "l", "d").(xapi.Ref[xapi.Task])
	start.Task = string(own)
	if call, err = begin(start); err != nil {
		t.Fatal(err)
	}
	if _, err := begin(start); code(err) != xapi.ErrOperationNotAllowed {
		t.Errorf("two transfers with one task: %v", err)
	}
	if err := call.finish(Result{}, xapi.NewError(xapi.ErrVDIIOError, "Device I/O errors")); code(err) != xapi.ErrVDIIOError {
		t.Errorf("finish returned %v", err)
	}
	if got := record(c, own); got.Status != "failure" || !slices.Equal(got.ErrorInfo, []string{"VDI_IO_ERROR", "Device I/O errors"}) {
		t.Errorf("failed: %+v", got)
	}
	if _, err := begin(start); code(err) != xapi.ErrOperationNotAllowed {
		t.Errorf("a finished task: %v", err)
	}
	start.Task = "OpaqueRef:x"
	if _, err := begin(start); description(err) != "HANDLE_INVALID|task|OpaqueRef:x" {
		t.Errorf("no such task: %v", err)
	}
	cancelled := c.call("task.create", "l", "d").(xapi.Ref[xapi.Task])
	c.call("task.cancel", cancelled)
	start.Task = string(cancelled)
	if _, err := begin(start); description(err) != "TASK_CANCELLED|"+string(cancelled) {
		t.Errorf("a cancelled task: %v", err)
	}

	// a bad session leaves the task alone, a low role fails it
	untouched := c.call("task.create", "l", "d").(xapi.Ref[xapi.Task])
	if _, err := begin(transferStart{Session: "OpaqueRef:x", Task: string(untouched), Action: start.Action}); code(err) != xapi.ErrSessionInvalid {
		t.Errorf("bad session: %v", err)
	}
	if got := record(c, untouched); got.Status != "pending" {
		t.Errorf("bad session: %s", got.Status)
	}
	low := c.as("vm-operator")
	res, err := c.try(low, "task.create", "l", "d")
	if err != nil {
		t.Fatal(err)
	}
	mine := res.Value.(xapi.Ref[xapi.Task])
	if _, err := begin(transferStart{Session: string(low), Task: string(mine), Action: start.Action}); code(err) != xapi.ErrRBACPermissionDenied {
		t.Errorf("low role: %v", err)
	}
	if got := record(c, mine); got.Status != "failure" || got.ErrorInfo[0] != "RBAC_PERMISSION_DENIED" {
		t.Errorf("low role: %s %q", got.Status, got.ErrorInfo)
	}
	if len(c.running.calls) != 0 || c.running.active != 0 {
		t.Errorf("%d calls left, %d active", len(c.running.calls), c.running.active)
	}
}

func TestTooManyPendingTasks(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newCore(t)
		fill := func(status xapi.TaskStatusType, n int) {
			c.update(func(tx *db.Tx) error {
				for range n {
					task := xapi.New[xapi.Task]()
					task.Status, task.Finished = status, c.now()
					ref, err := db.Insert(tx, task)
					if err != nil {
						return err
					}
					c.running.own(ref, "root", c.now())
				}
				return nil
			})
		}
		fill(xapi.TaskStatusTypeSuccess, tasksMost/2+tasksAtMost)
		fill(xapi.TaskStatusTypePending, tasksMost/2)
		first := c.call("task.create", "finished ones make room", "").(xapi.Ref[xapi.Task])
		if n := c.tasks(); n != tasksMost/2+tasksAtMost+1 {
			t.Errorf("%d tasks", n)
		}
		fill(xapi.TaskStatusTypePending, tasksMost/2-1)
		c.with("VDI.update", func(*API, context.Context, *Call, xapi.Ref[xapi.VDI]) error {
			t.Error("called without its task")
			return nil
		})
		for _, name := range []string{"task.create", "Async.VDI.update"} {
			params := []any{"OpaqueRef:x"}
			if name == "task.create" {
				params = []any{"one too many", ""}
			}
			c.wantFailure("TOO_MANY_PENDING_TASKS", c.root, name, params...)
		}
		if n := len(c.running.calls); n != 0 {
			t.Errorf("%d calls left", n)
		}
		// What is cancelled makes room again.
		c.call("task.cancel", first)
		time.Sleep(2 * taskKept)
		c.call("task.create", "again", "")
	})
}
