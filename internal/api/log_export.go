package api

import (
	"context"

	"coppice/internal/xapi"
)

// LogRequest is what an HTTP handler knows about a client that wants a log of
// the server.
type LogRequest struct {
	Session, Task, SubtaskOf string // as in TransferRequest
	Action                   string // name of the HTTP action in the datamodel
	Label                    string // of the task that is made when Task is ""
}

// LogExport is a log that is being sent to a client, under a task.
type LogExport struct {
	Task xapi.Ref[xapi.Task]
	call *Call
}

// ExportLog begins to send a log. When it fails after the session was found
// valid, the client's task has been failed with the error. The caller calls
// Finish exactly once.
func (a *API) ExportLog(ctx context.Context, o Origin, r LogRequest) (*LogExport, error) {
	c, err := a.beginTransfer(ctx, o, transferStart{
		Session: r.Session, Task: r.Task, SubtaskOf: r.SubtaskOf, Action: r.Action, Label: r.Label,
	})
	if err != nil {
		return nil, err
	}
	return &LogExport{Task: c.Task(), call: c}, nil
}

// Context ends with a cancel of the task and with the server.
func (x *LogExport) Context() context.Context { return x.call.Context() }

// Progress tells watchers of the task how far it is.
func (x *LogExport) Progress(done, total int64) { x.call.Progress(done, total) }

// Finish completes the task and returns what it ended with: nil for success,
// else an *xapi.Error.
func (x *LogExport) Finish(err error) error { return x.call.finish(Result{}, err) }
