package api

import "context"

// undoStack takes back the finished steps of an operation that fails later.
// Each step pushes how to undo it; success disarms the stack:
//
//	var undo undoStack
//	defer undo.run(ctx)
//	…
//	undo.push(func(ctx context.Context) { … })
//	…
//	undo.disarm()
type undoStack []func(context.Context)

func (u *undoStack) push(step func(context.Context)) { *u = append(*u, step) }

func (u *undoStack) disarm() { *u = nil }

// run undoes the newest step first. A cancelled operation is still undone:
// the steps do not see its cancellation.
func (u *undoStack) run(ctx context.Context) {
	ctx = context.WithoutCancel(ctx)
	for i := len(*u) - 1; i >= 0; i-- {
		(*u)[i](ctx)
	}
	*u = nil
}
