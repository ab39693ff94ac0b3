package server

import (
	"cmp"
	"context"
)

// relay runs produce in a goroutine of its own and consume here, and hands
// the buffers from one to the other and back: what one side of a transfer
// reads, the other one writes meanwhile, in memory that is bounded by the
// buffers.
//
// produce gets a free buffer from next, fills it and sends it on, until there
// is nothing more. consume sees the buffers in that order. The context that
// produce gets ends when consume fails, with its error as the cause, and when
// ctx does; next then returns the cause. relay returns after both have ended:
// the error of consume, or else that of produce.
func relay[B any](
	ctx context.Context,
	buffers []B,
	produce func(ctx context.Context, next func() (B, error), send func(B)) error,
	consume func(B) error,
) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	free, full := make(chan B, len(buffers)), make(chan B, len(buffers))
	for _, b := range buffers {
		free <- b
	}
	next := func() (b B, err error) {
		if ctx.Err() == nil {
			select {
			case b = <-free:
				return b, nil
			case <-ctx.Done():
			}
		}
		return b, context.Cause(ctx)
	}
	produced := make(chan error, 1)
	go func() {
		defer close(full)
		produced <- produce(ctx, next, func(b B) { full <- b })
	}()
	var err error
	for b := range full {
		if err == nil {
			if err = context.Cause(ctx); err == nil {
				err = consume(b)
			}
			if err != nil {
				cancel(err)
			}
		}
		free <- b
	}
	return cmp.Or(err, <-produced)
}
