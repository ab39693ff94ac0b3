package api

import (
	"context"
	"errors"

	"coppice/internal/event"
	"coppice/internal/xapi"
)

// eventMethods binds the messages of class event.
func eventMethods() map[string]any {
	return map[string]any{
		"event.from":           (*API).eventFrom,
		"event.inject":         (*API).eventInject,
		"event.register":       (*API).eventRegister,
		"event.unregister":     (*API).eventUnregister,
		"event.next":           (*API).eventNext,
		"event.get_current_id": (*API).eventGetCurrentID,
	}
}

// watching derives from ctx that of a call which does nothing but wait: it also
// ends when the client goes away and when the session ends, for their causes.
func (c *Call) watching(ctx context.Context) (context.Context, context.CancelFunc) {
	ctx, stop := context.WithCancelCause(ctx)
	detach := context.AfterFunc(c.client, func() { stop(context.Cause(c.client)) })
	unlink := context.AfterFunc(c.Session.ctx, func() { stop(context.Cause(c.Session.ctx)) })
	return ctx, func() {
		unlink()
		detach()
		stop(nil)
	}
}

// eventFrom sends those who are told the same the same text. Every role may
// read every class that has events, so that an answer does not depend on who
// gets it.
func (a *API) eventFrom(ctx context.Context, c *Call, classes []string, token string, timeout float64) (*xapi.EventBatch, error) {
	ctx, cancel := c.watching(ctx)
	defer cancel()
	told, err := a.events.From(ctx, classes, token, timeout)
	if err != nil {
		return nil, err
	}
	c.text = told.Text
	return told.Batch, nil
}

func (a *API) eventInject(ctx context.Context, c *Call, class, ref string) (string, error) {
	return a.events.Inject(ctx, class, ref)
}

func (a *API) eventRegister(ctx context.Context, c *Call, classes []string) error {
	return a.events.Register(&c.Session.registered, classes)
}

func (a *API) eventUnregister(ctx context.Context, c *Call, classes []string) error {
	return a.events.Unregister(&c.Session.registered, classes)
}

func (a *API) eventNext(ctx context.Context, c *Call) ([]*xapi.Event, error) {
	ctx, cancel := c.watching(ctx)
	defer cancel()
	events, err := a.events.Next(ctx, &c.Session.registered)
	if errors.Is(err, event.ErrNotRegistered) {
		err = xapi.NewError(xapi.ErrSessionNotRegistered, string(c.Session.ref))
	}
	return events, err
}

func (a *API) eventGetCurrentID(ctx context.Context, c *Call) (int64, error) {
	return int64(a.db.Revision()), nil
}
