package server

import (
	"bytes"
	"context"
)

// A call of up to shortCall bytes is read whoever sends it; a login has a few
// hundred. Of longer ones only so many are in memory at a time, up to maxRPC
// bytes and rpc.MaxValues values each, and strangers have a turn of their own, so that
// they keep nobody waiting who has a session.
const (
	shortCall        = 64 << 10
	acquaintedAtOnce = 4
	strangersAtOnce  = 1
)

// turns are given to as many at a time as the channel has room for.
type turns chan struct{}

// take waits for a turn, which the function it returns ends. The context is
// released in any case.
func (t turns) take(ctx context.Context, release context.CancelFunc) (end func(), err error) {
	defer release()
	select {
	case t <- struct{}{}:
		return func() { <-t }, nil
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
