package api

import (
	"context"
	"fmt"
	"runtime/debug"
	"strings"
	"time"

	"coppice/internal/xapi"
)

// Invoke executes a message. params are wire values, the session reference
// first where the message needs one. Names are "Class.method" or, for
// synchronous calls, "Class_method"; "Async.Class.method" returns a task at
// once, after which only the task tells what became of the call. The error is
// always an *xapi.Error.
//
// ctx is the client's connection. It bounds the waiting of event calls and
// logins; everything else runs to its end without the client.
func (a *API) Invoke(ctx context.Context, o Origin, name string, params []any) (Result, error) {
	res, err := a.invoke(ctx, o, name, params)
	if err != nil {
		return Result{}, a.apiError(err)
	}
	return res, nil
}

// Methods returns the names of the messages that can be called, sorted.
func (a *API) Methods() []string { return a.listed }

func (a *API) invoke(ctx context.Context, o Origin, name string, params []any) (Result, error) {
	bare, async := strings.CutPrefix(name, "Async.")
	m := a.methods[bare]
	if m == nil || async && (!m.msg.Async || bare != m.name) {
		return a.invokeSystem(name, params)
	}
	var ref string
	if m.msg.Session {
		if len(params) == 0 {
			return Result{}, xapi.NewError(xapi.ErrMessageParameterCountMismatch, m.name, fmt.Sprint(m.required), "-1")
		}
		var ok bool
		if ref, ok = params[0].(string); !ok {
			return Result{}, xapi.NewError(xapi.ErrFieldTypeError, "session_id")
		}
		params = params[1:]
	}
	args, err := m.parse(params)
	if err != nil {
		return Result{}, err
	}
	var s *session
	if m.msg.Session {
		if s, err = a.session(xapi.Ref[xapi.Session](ref)); err != nil {
			return Result{}, err
		}
	}
	if async {
		return a.invokeAsync(ctx, o, s, m, args)
	}
	// Before it is admitted a call is nothing that could be waited for or
	// cancelled, and a mechanical one never is: no task.
	brief := &Call{Origin: o, Session: s, Method: m.name, message: m.msg, args: args, api: a, begun: time.Now(), client: ctx, ctx: a.ctx}
	if err := a.admit(s, m, args); err != nil {
		a.report(brief.reported(), s, err)
		return Result{}, err
	}
	if m.how == Mechanical {
		res, err := a.execute(a.ctx, brief, m, args)
		if err != nil {
			err = a.outcome(a.ctx, ctx, m.name, err)
		}
		a.report(brief.reported(), s, err)
		return res, err
	}
	c, err := a.begin(ctx, o, s, m.name)
	if err != nil {
		return Result{}, err
	}
	c.message, c.args = m.msg, args
	res, err := a.execute(c.ctx, c, m, args)
	if told := c.end(res, err); told != nil {
		return Result{}, told
	}
	return res, nil
}

// invokeSystem answers the names that belong to no class.
func (a *API) invokeSystem(name string, params []any) (Result, error) {
	switch {
	case name == "system.listMethods":
		return Result{Type: a.types.stringSet, Value: a.listed}, nil
	case strings.HasPrefix(name, "system.isAlive"):
		if len(params) == 0 {
			return Result{}, xapi.NewError(xapi.ErrMessageParameterCountMismatch, name, "1", "0")
		}
		text, ok := params[0].(string)
		if !ok {
			return Result{}, xapi.NewError(xapi.ErrFieldTypeError, "message")
		}
		return Result{Type: a.types.text, Value: text}, nil
	}
	return Result{}, xapi.NewError(xapi.ErrMessageMethodUnknown, name)
}

// admit is what stands between a valid session and a handler: the session's
// role, and whether it belongs to the pool where only the pool may call.
func (a *API) admit(s *session, m *method, args []any) error {
	if s == nil {
		return nil
	}
	if err := a.authorize(s, m, args); err != nil {
		return err
	}
	if m.msg.PoolInternal && !s.pool {
		return xapi.NewError(xapi.ErrInternalError, m.name+" is reserved for members of the pool")
	}
	return nil
}

// invokeAsync makes the task, starts the call and returns the task. Whether
// the session may do it is for the task to tell.
func (a *API) invokeAsync(ctx context.Context, o Origin, s *session, m *method, args []any) (Result, error) {
	c, err := a.begin(context.WithoutCancel(ctx), o, s, m.name)
	if err != nil {
		return Result{}, err
	}
	c.message, c.args, c.async = m.msg, args, true
	if err := a.recordTask(c, "Async."+m.name, "", xapi.NullRef); err != nil {
		return Result{}, c.end(Result{}, err)
	}
	go func() {
		var res Result
		err := a.admit(s, m, args)
		if err == nil {
			res, err = a.execute(c.ctx, c, m, args)
		}
		_ = c.end(res, err) // the task tells it
	}()
	return Result{Type: a.types.taskRef, Value: c.Task()}, nil
}

// execute runs the handler. A panic is an INTERNAL_ERROR, with the stack in
// the log: it ends the call and nothing else.
func (a *API) execute(ctx context.Context, c *Call, m *method, args []any) (res Result, err error) {
	defer func() {
		if p := recover(); p != nil {
			a.log.Error("handler panicked", "method", m.name, "panic", p, "stack", string(debug.Stack()))
			res, err = Result{}, xapi.NewError(xapi.ErrInternalError, fmt.Sprint(p))
		}
	}()
	if m.run == nil {
		return Result{}, xapi.NewError(xapi.ErrNotImplemented, m.name)
	}
	v, err := m.run(a, ctx, c, args)
	if err != nil {
		return Result{}, err
	}
	return Result{Type: m.msg.Result, Value: v, text: c.text}, nil
}
