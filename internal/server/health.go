package server

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"strings"
	"time"

	"coppice/internal/xapi"
)

// metricsAction is the HTTP action of the datamodel whose role lets a session see figures.
const metricsAction = "get_host_rrds"

// readyPatience is how long a database that does not answer is waited for.
const readyPatience = 5 * time.Second

// healthz answers GET /healthz: the process lives. It looks at nothing, so that trouble with disks makes nobody
// restart a server that is the only one who can tell about it.
func (s *Server) healthz(w http.ResponseWriter, r *request) { plain(w, http.StatusOK, "ok") }

// readyz answers GET /readyz: whether the server can do its work. Why not is for this machine and the log only; the
// text may name paths.
func (s *Server) readyz(w http.ResponseWriter, r *request) {
	ctx, done := context.WithTimeout(r.Context(), readyPatience)
	defer done()
	err := s.draining.Err()
	if err == nil {
		err = s.api.Ready(ctx)
	}
	switch {
	case err == nil:
		plain(w, http.StatusOK, "ready")
	case r.local():
		plain(w, http.StatusServiceUnavailable, "not ready: "+err.Error())
	default:
		plain(w, http.StatusServiceUnavailable, "not ready")
	}
	if err != nil {
		s.log.Debug("not ready", "err", err)
	}
}

// plain answers with one line of text.
func plain(w http.ResponseWriter, status int, line string) {
	h := w.Header()
	h.Set("Content-Type", "text/plain; charset=utf-8")
	h.Set("Content-Length", fmt.Sprint(len(line)+1))
	w.WriteHeader(status)
	_, _ = io.WriteString(w, line+"\n") // a client that is gone has no use for it
}

// local reports whether a request comes from this machine: over the Unix socket or a loopback address.
func (r *request) local() bool {
	if r.origin.Trusted || r.RemoteAddr == "" || r.RemoteAddr == "@" {
		return true
	}
	host, _, err := net.SplitHostPort(r.RemoteAddr)
	if err != nil {
		return false
	}
	ip := net.ParseIP(host)
	return ip != nil && ip.IsLoopback()
}

// xapiSession is a session reference as the API has it.
func xapiSession(ref string) xapi.Ref[xapi.Session] { return xapi.Ref[xapi.Session](ref) }

// slogErrors is a logger for libraries that have their own idea of one.
type slogErrors struct{ log *slog.Logger }

// Println logs a line.
func (l slogErrors) Println(v ...any) {
	l.log.Error("metrics", "err", strings.TrimSpace(fmt.Sprintln(v...)))
}
