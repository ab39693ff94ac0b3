package api

import (
	"context"
	"errors"
	"fmt"
	"log/slog"

	"coppice/internal/db"
	"coppice/internal/storage"
	"coppice/internal/xapi"
)

// apiError makes of any error what a client is told. An *xapi.Error anywhere
// in err's chain is passed on as it is; errors of the storage contract become
// the codes of a storage back end; the rest is INTERNAL_ERROR with the
// error's text. What was translated stays reachable by Unwrap.
//
// This is the only translation. Handlers return storage errors wrapped with
// what they were doing, and API errors only for what they decided themselves.
func (a *API) apiError(err error) *xapi.Error {
	if e, ok := errors.AsType[*xapi.Error](err); ok {
		return e
	}
	if e, ok := errors.AsType[*storage.SpaceError](err); ok {
		text := fmt.Sprintf("There is insufficient space [opterr=%d bytes needed, %d free]", e.Needed, e.Free)
		return backendFailure(44, text).WithCause(err)
	}
	if e, ok := errors.AsType[*storage.CorruptError](err); ok && e.Volume != "" {
		return xapi.NewError(xapi.ErrVDIIOError, fmt.Sprintf("Device I/O errors at byte %d of VDI %s", e.Off, e.Volume)).WithCause(err)
	}
	for _, t := range storageErrors {
		switch {
		case !errors.Is(err, t.is):
		case t.number == 0:
			return xapi.NewError(t.code, t.params...).WithCause(err)
		default:
			return backendFailure(t.number, fmt.Sprintf("%s [opterr=%v]", t.text, err)).WithCause(err)
		}
	}
	if errors.Is(err, context.Canceled) && a.ctx.Err() != nil {
		return errStopping
	}
	return xapi.InternalError(err)
}

// outcome is apiError for the end of a call. An error that nobody decided to
// tell a client loses detail on the way to it, so it is logged whole, here and
// nowhere else. A client that did not wait for its answer, as those of events
// do, is no failure; client is the context that says so.
func (a *API) outcome(ctx, client context.Context, method string, err error) *xapi.Error {
	err = causeOf(ctx, err)
	told := a.apiError(err)
	if _, decided := errors.AsType[*xapi.Error](err); !decided && told != errStopping {
		level := slog.LevelError
		if gone := context.Cause(client); gone != nil && errors.Is(err, gone) {
			level = slog.LevelDebug
		}
		a.log.Log(ctx, level, "call failed", "method", method, "told", told.Code, "err", err)
	}
	return told
}

// causeOf replaces the bare error of a cancelled context by the reason it was
// cancelled for.
func causeOf(ctx context.Context, err error) error {
	if errors.Is(err, context.Canceled) && ctx.Err() != nil {
		if cause, ok := errors.AsType[*xapi.Error](context.Cause(ctx)); ok {
			return cause
		}
	}
	return err
}

// storageErrors, and the one of the database, are tried in order. number is the n of SR_BACKEND_FAILURE_n;
// where it is 0, code and params are the whole answer.
var storageErrors = []struct {
	is     error
	number int
	text   string
	code   string
	params []string
}{
	{is: db.ErrFull, code: xapi.ErrOutOfSpace, params: []string{"the data directory"}},
	{is: storage.ErrCorrupt, code: xapi.ErrVDIIOError, params: []string{"Device I/O errors"}},
	{is: storage.ErrNoSpace, number: 44, text: "There is insufficient space"},
	{is: storage.ErrNotFound, number: 46, text: "The VDI is not available"},
	{is: storage.ErrExists, number: 43, text: "The VDI already exists"},
	{is: storage.ErrReadOnly, number: 46, text: "The VDI is read-only"},
	{is: storage.ErrRepoReadOnly, number: 47, text: "The SR has become read-only after a failure"},
	{is: storage.ErrLocked, number: 47, text: "The SR is in use by another process"},
	{is: storage.ErrOccupied, number: 16, text: "The SR cannot be made there"},
	{is: storage.ErrNoRepo, number: 47, text: "The SR is not available"},
	{is: storage.ErrClosed, number: 47, text: "The SR is not available"},
	{is: storage.ErrInvalid, number: 79, text: "VDI Invalid size or argument"},
}

// backendFailure is SR_BACKEND_FAILURE_n with its three parameters, of which
// only the middle one carries text.
func backendFailure(n int, text string) *xapi.Error {
	return xapi.NewError(fmt.Sprintf("SR_BACKEND_FAILURE_%d", n), "", text, "")
}

// invalidValue is INVALID_VALUE for a field or parameter.
func invalidValue(field, value string) *xapi.Error {
	return xapi.NewError(xapi.ErrInvalidValue, field, value)
}

// permissionDenied is the refusal of messages that only the storage layer may
// use.
func permissionDenied(message string) *xapi.Error {
	return xapi.NewError(xapi.ErrPermissionDenied, message)
}

// cmpErr returns the first error that is not nil.
func cmpErr(errs ...error) error {
	for _, err := range errs {
		if err != nil {
			return err
		}
	}
	return nil
}
