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
	return relayLent(ctx, buffers, produce, func(b B, release func()) error {
		defer release()
		return consume(b)
	})
}

// relayLent is relay with a consume that may hold on to a buffer when it
// returns: it has release called once, by whatever goroutine, also when it
// fails, and maybe after relayLent has returned.
func relayLent[B any](
	ctx context.Context,
	buffers []B,
	produce func(ctx context.Context, next func() (B, error), send func(B)) error,
	consume func(b B, release func()) error,
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
		release := func() { free <- b }
		if err == nil {
			err = context.Cause(ctx)
		}
		if err != nil {
			release()
			continue
		}
		if err = consume(b, release); err != nil {
			cancel(err)
		}
	}
	return cmp.Or(err, <-produced)
}
