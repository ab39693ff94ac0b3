package xapi

import (
	"fmt"
	"strings"
)

// Error is a failure as a client sees it: a code of the model and its parameters. Its cause, if any, is for
// the log and is never sent.
type Error struct {
	Code   string
	Params []string

	cause error
}

// NewError returns an error with the given code and parameters.
func NewError(code string, params ...string) *Error {
	return &Error{Code: code, Params: params}
}

// InternalError returns an INTERNAL_ERROR with the text of cause, which stays reachable by Unwrap.
func InternalError(cause error) *Error {
	return NewError(ErrInternalError, cause.Error()).WithCause(cause)
}

// WithCause returns a copy of e that unwraps to cause.
func (e *Error) WithCause(cause error) *Error {
	c := *e
	c.cause = cause
	return &c
}

// Error returns the code, its parameters and the cause.
func (e *Error) Error() string {
	var b strings.Builder
	b.WriteString(e.Code)
	if len(e.Params) > 0 {
		fmt.Fprintf(&b, " %q", e.Params)
	}
	if e.cause != nil && (len(e.Params) == 0 || e.cause.Error() != e.Params[0]) {
		fmt.Fprintf(&b, ": %v", e.cause)
	}
	return b.String()
}

// Unwrap returns the cause, or nil.
func (e *Error) Unwrap() error { return e.cause }

// Is reports whether target is an Error of the same code. A target without parameters matches any.
func (e *Error) Is(target error) bool {
	t, ok := target.(*Error)
	if !ok || t.Code != e.Code {
		return false
	}
	if len(t.Params) == 0 {
		return true
	}
	if len(t.Params) != len(e.Params) {
		return false
	}
	for i := range t.Params {
		if t.Params[i] != e.Params[i] {
			return false
		}
	}
	return true
}

// Description returns the code followed by the parameters, which is how an error is sent.
func (e *Error) Description() []string {
	return append([]string{e.Code}, e.Params...)
}
