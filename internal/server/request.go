package server

import (
	"context"
	"errors"
	"net"
	"net/http"
	"net/url"
	"strings"

	"coppice/internal/api"
	"coppice/internal/xapi"
)

// request is one HTTP request with what every handler needs to know of it:
// where it came from and its parameters.
type request struct {
	*http.Request
	origin api.Origin
	params
}

func newRequest(r *http.Request) *request {
	return &request{
		Request: r,
		origin: api.Origin{
			Peer:       peerName(r.RemoteAddr),
			Trusted:    trusted(r.Context()),
			UserAgent:  r.UserAgent(),
			Originator: r.Header.Get("Originator"),
		},
		params: parseParams(r),
	}
}

// peerName names the other end of a connection; those through the Unix socket
// have no address.
func peerName(addr string) string {
	if addr == "" || addr == "@" {
		return "unix"
	}
	return addr
}

// params are the parameters of a request. They may come in the query, in the
// cookie or, for a few, in a header of their own.
type params struct {
	query, cookie, header map[string]string
}

// headerParams are the headers that carry a parameter, and its name.
var headerParams = map[string]string{
	"Task-Id":    "task_id",
	"Subtask-Of": "subtask_of",
}

func parseParams(r *http.Request) params {
	p := params{
		query:  pairs(r.URL.RawQuery, "&"),
		cookie: make(map[string]string),
		header: make(map[string]string),
	}
	for _, line := range r.Header["Cookie"] {
		for k, v := range pairs(line, ";&") {
			if _, ok := p.cookie[k]; !ok {
				p.cookie[k] = v
			}
		}
	}
	for header, name := range headerParams {
		if v := r.Header.Get(header); v != "" {
			p.header[name] = v
		}
	}
	return p
}

// auth returns a parameter that says who asks or on whose behalf: session_id,
// task_id, subtask_of. The cookie wins, then the query, then the header;
// "" when it is absent.
func (p params) auth(key string) string {
	for _, m := range []map[string]string{p.cookie, p.query, p.header} {
		if v, ok := m[key]; ok {
			return v
		}
	}
	return ""
}

// param returns a parameter of the handler itself, such as vdi or format. The
// query wins, then the cookie.
func (p params) param(key string) (string, bool) {
	if v, ok := p.query[key]; ok {
		return v, true
	}
	v, ok := p.cookie[key]
	return v, ok
}

// pairs splits key=value pairs at any of the characters of seps. The first of
// repeated keys wins, a comma is part of the value, and percent escapes are
// decoded; a plus sign stands for itself, because clients copy values into
// these strings as they are.
func pairs(s, seps string) map[string]string {
	m := make(map[string]string)
	for part := range strings.FieldsFuncSeq(s, func(r rune) bool { return strings.ContainsRune(seps, r) }) {
		k, v, _ := strings.Cut(strings.TrimSpace(part), "=")
		k = unescape(k)
		if _, ok := m[k]; !ok && k != "" {
			m[k] = unescape(v)
		}
	}
	return m
}

// unescape decodes percent escapes and leaves what is not one alone.
func unescape(s string) string {
	if d, err := url.PathUnescape(s); err == nil {
		return d
	}
	return s
}

// session finds the session of a handler request: the session_id parameter,
// or else one made from the Basic credentials for as long as the request
// lasts. Release must be called when the request is done. An error is an
// *xapi.Error that says why nobody is logged in, or a *statusError.
func (s *Server) session(r *request) (session string, release func(), err error) {
	if id := r.auth("session_id"); id != "" {
		return id, func() {}, nil
	}
	header := r.Header.Get("Authorization")
	if header == "" {
		return "", nil, xapi.NewError(xapi.ErrSessionAuthenticationFailed)
	}
	user, password, ok := r.BasicAuth()
	if !ok {
		return "", nil, &statusError{
			http.StatusInternalServerError,
			errors.New("only Basic credentials are understood in the Authorization header"),
		}
	}
	ref, err := s.api.Login(r.Context(), r.origin, user, password)
	if err != nil {
		return "", nil, err
	}
	return string(ref), func() {
		if err := s.api.Logout(ref); err != nil { // expired, or the client did it
			s.log.Debug("logout after a request", "error", err)
		}
	}, nil
}

// trustedKey marks the context of connections whose peer needs no password.
type trustedKey struct{}

func trusted(ctx context.Context) bool {
	t, _ := ctx.Value(trustedKey{}).(bool)
	return t
}

// withPeer notes in a connection's context whether its peer is trusted: it
// came through the Unix socket and runs under the server's own user id.
func withPeer(ctx context.Context, c net.Conn) context.Context {
	return context.WithValue(ctx, trustedKey{}, ownPeer(c))
}
