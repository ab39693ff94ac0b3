package xecmd

import (
	"context"
	"errors"
	"slices"
	"strings"
	"sync"
	"time"

	"coppice/internal/thincli"
	"coppice/internal/xapi"
)

const (
	// taskPoll bounds one wait for news of a task, in seconds.
	taskPoll = 30.0
	// afterFailure is how long a task gets to say why the client failed.
	afterFailure = time.Second
	// lastAnswer is how long a client gets to notice that its transfer failed.
	lastAnswer = 10 * time.Second
	// cleanup bounds what is done about a task after its command has ended.
	cleanup = 10 * time.Second
)

// errClient is what is reported when the client failed and the server does not know why.
var errClient = xapi.NewError(xapi.ErrClientError)

func vdiExport(ctx context.Context, r *run) error {
	return r.transferVDI(ctx, "VDI export", "/export_raw_vdi", r.query("base"), r.conn.HTTPGet)
}

func vdiImport(ctx context.Context, r *run) error {
	return r.transferVDI(ctx, "VDI import", "/import_raw_vdi", "", r.conn.HTTPPut)
}

// query returns a parameter as a part of a URL.
func (r *run) query(param string) string {
	v, ok := r.args.lookup(param)
	if !ok {
		return ""
	}
	return "&" + param + "=" + escaped(v)
}

// escaped is a value as it can stand in a URL: what cannot stand in a request
// line, or would end the parameter, is escaped.
func escaped(v string) string {
	const hex = "0123456789ABCDEF"
	var b strings.Builder
	for _, c := range []byte(v) {
		if c <= ' ' || c >= 0x7f || strings.IndexByte("#%&+", c) >= 0 {
			b.WriteString(string([]byte{'%', hex[c>>4], hex[c&15]}))
		} else {
			b.WriteByte(c)
		}
	}
	return b.String()
}

// transferVDI makes the client move the contents of a VDI, as an image of the
// format that it asks for. The handler would not know the format, either, but has to answer
// as xapi does, that something is wrong with the server.
func (r *run) transferVDI(ctx context.Context, label, path, query string, start func(file, url string) error) error {
	if f := r.args.str("format"); f != "" && !slices.ContainsFunc(r.formats, func(known string) bool { return strings.EqualFold(f, known) }) {
		return failf("Unknown format %s (there are %s)", f, strings.Join(r.formats, ", "))
	}
	vdi, err := r.ref(ctx, "VDI", "uuid")
	if err != nil {
		return err
	}
	_, err = r.transfer(ctx, label, path, "&vdi="+vdi+r.query("format")+query, start)
	return err
}

// transfer makes the client move the file that it names over a connection of
// its own, under a task made for the purpose or given by task-uuid, and waits
// for both of them. It returns the result of the task.
//
// The command ends when the task and the client have said how it went, or
// when the client is gone. A transfer that is still going on then is cancelled.
func (r *run) transfer(ctx context.Context, label, path, query string, start func(file, url string) error) (result string, err error) {
	progress, err := r.args.boolean("progress", false)
	if err != nil {
		return "", err
	}
	w := &watch{r: r, ended: make(chan struct{})}
	if r.cmd.declares("task-uuid") && r.args.str("task-uuid") != "" {
		w.theirs = true
		w.task, err = r.ref(ctx, "task", "task-uuid")
	} else {
		w.task, err = r.callText(ctx, "task.create", label, "")
	}
	if err != nil {
		return "", err
	}
	if progress {
		w.bar = &bar{started: time.Now()}
	}
	watching, stop := context.WithCancel(ctx)
	var wg sync.WaitGroup
	defer func() {
		stop()
		wg.Wait()
		w.dispose(ctx)
	}()
	wg.Go(func() { w.run(watching) })
	url := path + "?session_id=" + string(r.session) + "&task_id=" + w.task + query
	if err := start(r.args.str("filename"), url); err != nil {
		return "", err
	}
	if err := w.settle(ctx); err != nil {
		return "", err
	}
	return w.result, nil
}

// watch follows a task to its end.
type watch struct {
	r      *run
	task   string
	theirs bool          // the task is the user's, who removes it
	bar    *bar          // nil for none
	ended  chan struct{} // closed when nothing more will come

	// Valid once ended is closed:
	done   bool   // the task has ended, or is gone
	err    error  // how: nil for success
	result string // of the task
}

// run waits for the task to leave pending. It prints progress as long as the
// task was seen pending before.
func (w *watch) run(ctx context.Context) {
	defer close(w.ended)
	token, seen := "", false
	for {
		res, err := w.r.call(ctx, "event.from", []any{"task/" + w.task}, token, taskPoll)
		if err != nil {
			w.err = err
			return
		}
		batch := res.Value.(*xapi.EventBatch)
		token = batch.Token
		for _, e := range batch.Events {
			task, ok := e.Snapshot.(*xapi.Task)
			if !ok {
				w.done, w.err = true, errClient // destroyed by somebody else
				return
			}
			if task.Status == xapi.TaskStatusTypePending {
				seen = true
				w.print(task.Progress)
				continue
			}
			w.done, w.err, w.result = true, outcome(task), task.Result
			if seen && w.bar != nil {
				if w.err == nil {
					w.print(1)
				}
				for _, text := range w.bar.done(time.Now()) {
					_ = w.r.conn.PrintStderr(text) // a client that is gone shows elsewhere
				}
			}
			return
		}
	}
}

func (w *watch) print(progress float64) {
	if w.bar == nil {
		return
	}
	if text := w.bar.update(progress, time.Now()); text != "" {
		_ = w.r.conn.PrintStderr(text) // a client that is gone shows elsewhere
	}
}

// outcome turns a task that has ended into an error, or nil.
func outcome(task *xapi.Task) error {
	switch {
	case task.Status == xapi.TaskStatusTypeSuccess:
		return nil
	case len(task.ErrorInfo) > 0:
		return xapi.NewError(task.ErrorInfo[0], task.ErrorInfo[1:]...)
	case task.Status == xapi.TaskStatusTypeCancelled || task.Status == xapi.TaskStatusTypeCancelling:
		return xapi.NewError(xapi.ErrTaskCancelled)
	}
	return errClient
}

// settle waits for the client's answer and for the task.
func (w *watch) settle(ctx context.Context) error {
	answer := make(chan error, 1)
	waiting, stop := context.WithCancel(ctx)
	var wg sync.WaitGroup
	defer wg.Wait()
	defer stop()
	wg.Go(func() { answer <- w.r.conn.Wait(waiting) })

	select {
	case err := <-answer:
		return w.answered(ctx, err)
	case <-w.ended:
	}
	if w.err == nil {
		// The server has sent or taken everything; the client may still be writing it down.
		return w.answered(ctx, <-answer)
	}
	t := time.NewTimer(lastAnswer)
	defer t.Stop()
	select {
	case err := <-answer:
		return w.answered(ctx, err)
	case <-t.C:
		return w.err
	}
}

// answered combines what the client said with what the task says.
func (w *watch) answered(ctx context.Context, client error) error {
	switch {
	case client == nil:
		select {
		case <-w.ended:
			return w.err
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	case !errors.Is(client, thincli.ErrFailed):
		return client
	}
	t := time.NewTimer(afterFailure)
	defer t.Stop()
	select {
	case <-w.ended:
	case <-t.C:
		return errClient
	case <-ctx.Done():
		return context.Cause(ctx)
	}
	if w.err == nil {
		return errClient
	}
	return w.err
}

// dispose cancels the task if it is still going on and removes it. It works
// also when ctx has ended. What it cannot remove the server will, in time.
func (w *watch) dispose(ctx context.Context) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), cleanup)
	defer cancel()
	if !w.done {
		_ = w.r.do(ctx, "task.cancel", w.task)
	}
	if !w.theirs {
		_ = w.r.do(ctx, "task.destroy", w.task)
	}
}
