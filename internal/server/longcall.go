package server

import (
	"bytes"
	"context"
	"errors"
	"net/http"
)

// A call of up to shortCall bytes is read whoever sends it; a login has a few
// hundred. Of longer ones, of up to maxRPC bytes and rpc.MaxValues values each, only
// so many are read and parsed at a time. Strangers have a turn of their own, which
// ends with their answer, so that they keep nobody waiting who has a session.
const (
	shortCall        = 64 << 10
	acquaintedAtOnce = 4
	strangersAtOnce  = 1

	// waitingAtMost is how many wait for either kind of turn, with shortCall bytes
	// each and for bodyTimeout at most. More are turned away: who has gone while
	// waiting is not noticed before.
	waitingAtMost = 32
)

var errManyCalls = &statusError{http.StatusServiceUnavailable, errors.New("other long calls are being read: try again later")}

// turns are given to so many at a time, and so many wait for one.
type turns struct{ taken, waiting chan struct{} }

func newTurns(atOnce int) turns {
	return turns{make(chan struct{}, atOnce), make(chan struct{}, waitingAtMost)}
}

// take waits for a turn, which the function it returns ends.
func (t turns) take(ctx context.Context) (end func(), err error) {
	select {
	case t.waiting <- struct{}{}:
		defer func() { <-t.waiting }()
	default:
		return nil, errManyCalls
	}
	ctx, cancel := context.WithTimeoutCause(ctx, bodyTimeout, errManyCalls)
	defer cancel()
	select {
	case t.taken <- struct{}{}:
		return func() { <-t.taken }, nil
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
}

// namesSession tells whether the start of a call has the reference of a session
// in it. A session is the first parameter, far from the end of shortCall bytes.
func (s *Server) namesSession(start []byte) bool {
	const prefix, length = "OpaqueRef:", len("OpaqueRef:00000000-0000-0000-0000-000000000000")
	for {
		at := bytes.Index(start, []byte(prefix))
		if at < 0 || len(start)-at < length {
			return false
		}
		if s.api.LoggedIn(string(start[at : at+length])) {
			return true
		}
		start = start[at+len(prefix):]
	}
}
