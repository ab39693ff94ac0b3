package xecmd

import (
	"context"
	"time"
)

// follow sends a message as a task, shows its progress if the user wants that,
// and returns its result, in XML, when it has ended. When the client goes
// first, the task is cancelled.
func (r *run) follow(ctx context.Context, method string, params ...any) (result string, err error) {
	progress, err := r.args.boolean("progress", false)
	if err != nil {
		return "", err
	}
	w := &watch{r: r, ended: make(chan struct{})}
	if w.task, err = r.callText(ctx, "Async."+method, params...); err != nil {
		return "", err
	}
	defer w.dispose(ctx)
	if progress {
		w.bar = &bar{started: time.Now()}
	}
	w.run(ctx)
	return w.result, w.err
}

// copying are the messages that make an object and may take long over it.
var copying = map[string]bool{"VDI.copy": true, "VDI.pool_migrate": true, "VM.copy": true}

// made sends a message that makes an object and returns its reference. One that
// copies disks is followed, so that it ends when the client goes.
func (r *run) made(ctx context.Context, method string, params ...any) (ref string, err error) {
	if !copying[method] {
		return r.callText(ctx, method, params...)
	}
	result, err := r.follow(ctx, method, params...)
	return reference.FindString(result), err
}
