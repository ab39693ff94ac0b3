package server

import (
	"bytes"
	"context"
	"io"
	"net"
	"net/http"
	"runtime"
	"strings"
	"testing"
	"time"

	"coppice/internal/rpc"
)

// waiting returns once n handlers run.
func (f *fixture) waiting(n int) {
	for {
		f.handlers.mu.Lock()
		running := f.handlers.mu.n
		f.handlers.mu.Unlock()
		if running == n {
			return
		}
		runtime.Gosched()
	}
}

// waitForEvents starts an event.from that has nothing to report.
func (f *fixture) waitForEvents(t *testing.T) net.Conn {
	t.Helper()
	session := f.login(t)
	batch, err := f.call("event.from", session, []any{"pool"}, "", 0.0)
	if err != nil {
		t.Fatal(err)
	}
	var body bytes.Buffer
	if err := rpc.WriteCall(&body, rpc.JSONRPC2, 1, "event.from", session, []any{"pool"}, batch.(map[string]any)["token"], 3600.0); err != nil {
		t.Fatal(err)
	}
	f.waiting(0)
	conn := f.dial(t, "tcp")
	if _, err := io.WriteString(conn, post("/jsonrpc", body.String())); err != nil {
		t.Fatal(err)
	}
	f.waiting(1)
	return conn
}

// TestStopWakesWaiters: a client that waits for events gets an answer at once
// and does not use the grace period up.
func TestStopWakesWaiters(t *testing.T) {
	f := start(t, 24*time.Hour)
	conn := f.waitForEvents(t)
	f.stop()
	b, err := io.ReadAll(conn)
	if err != nil || !strings.HasPrefix(string(b), "HTTP/1.0 200 OK") {
		t.Errorf("got %v:\n%s", err, b)
	}
	if err := f.stopped(); err != nil {
		t.Error(err)
	}
}

// TestDisconnectEndsWaiting: nobody waits for a client that has gone.
func TestDisconnectEndsWaiting(t *testing.T) {
	f := start(t, 0)
	f.waitForEvents(t).Close()
	f.waiting(0)
}

// TestStopCuts: what does not end within the grace period is told so, and
// its connection cut.
func TestStopCuts(t *testing.T) {
	cause := make(chan error, 1)
	f := start(t, time.Millisecond, route{http.MethodGet, "/slow", func(s *Server, w http.ResponseWriter, r *request) {
		conn, err := s.hijack(w, 0)
		if err != nil {
			t.Error(err)
			return
		}
		defer func() { _ = conn.Close() }()
		_, _ = io.Copy(io.Discard, conn) // until it is cut
		cause <- context.Cause(r.Context())
	}})
	conn := f.dial(t, "tcp")
	if _, err := io.WriteString(conn, "GET /slow HTTP/1.0\r\n\r\n"); err != nil {
		t.Fatal(err)
	}
	f.waiting(1)
	f.stop()
	if err := f.stopped(); err != nil {
		t.Error(err)
	}
	if got := <-cause; got != ErrStopping {
		t.Errorf("cause %v, want %v", got, ErrStopping)
	}
}

// TestServeReportsListener: a listener that fails ends the server.
func TestServeReportsListener(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	l.Close()
	if err := New(Config{}).Serve(t.Context(), l); err == nil {
		t.Error("no error from a closed listener")
	}
}
