package server

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httputil"
	"strings"
	"sync"
	"syscall"
	"time"

	"coppice/internal/api"
	"coppice/internal/xapi"
)

// A transfer is answered on the connection itself, not through net/http: an
// upload is answered before it is read and may have no length, a download
// ends by closing, and either is cut when it fails after its 200. A
// client may be as slow as it likes; only one that is silent for longer than
// Config.TransferIdle is given up.

// transferRequest collects the parameters that both directions have.
func transferRequest(r *request, action, session string) api.TransferRequest {
	vdi, _ := r.param("vdi")
	name, _ := r.param("format")
	return api.TransferRequest{
		Session:   session,
		Task:      r.auth("task_id"),
		SubtaskOf: r.auth("subtask_of"),
		Action:    action,
		VDI:       vdi,
		Format:    name,
		Length:    -1,
	}
}

// namedSR returns the SR that an import names, "" when it names none.
func (p params) namedSR() string {
	for _, key := range []string{"sr_id", "sr_uuid"} {
		if sr, _ := p.param(key); sr != "" {
			return sr
		}
	}
	return ""
}

// head is the reply that begins a transfer. The version is 1.1 whatever the
// client speaks: that is what all of them have always got. task is "" when
// there is none yet.
func head(status int, task, contentType string, more ...string) []byte {
	lines := []string{
		fmt.Sprintf("HTTP/1.1 %d %s", status, http.StatusText(status)),
		"Connection: close",
		"Cache-Control: no-cache, no-store",
	}
	if task != "" {
		lines = append(lines, "task-id: "+task)
	}
	lines = append(lines, "content-type: "+contentType)
	lines = append(lines, more...)
	return []byte(strings.Join(lines, "\r\n") + "\r\n\r\n")
}

// transfer is what exports and imports have in common once api has opened
// them. Finish ends the task and releases everything; it returns the error
// that the task ended with.
type transfer interface {
	Context() context.Context
	Progress(done, total int64)
	Finish(err error) error
}

// either returns a context that ends with the first of two, and how to
// release it. It carries the values of ctx.
func either(ctx, other context.Context) (context.Context, func()) {
	ctx, cancel := context.WithCancelCause(ctx)
	stop := context.AfterFunc(other, func() { cancel(context.Cause(other)) })
	return ctx, func() {
		stop()
		cancel(nil)
	}
}

// refuse ends a transfer that fails before its first byte.
func (s *Server) refuse(w http.ResponseWriter, r *request, t transfer, err error) {
	s.fail(w, r, finish(t, err))
}

// finish ends a transfer and returns what to tell the client: the error that
// its task ended with, under the status of err if that has one.
func finish(t transfer, err error) error {
	shown := t.Finish(apiError(err))
	if e, ok := errors.AsType[*statusError](err); ok {
		shown = &statusError{e.Status, shown}
	}
	return shown
}

// run takes the connection over, carries a transfer out, ends its task and
// then the connection: in order when it succeeded, with a reset when not. A
// cancelled task and a stop of the server interrupt it wherever it waits for
// the client.
func (s *Server) run(ctx context.Context, w http.ResponseWriter, r *request, t transfer, work func(context.Context, *stream) error) {
	conn, err := s.hijack(w, s.idle)
	if err != nil {
		s.refuse(w, r, t, err)
		return
	}
	s.carry(ctx, conn, r, t, work)
}

// carry is run on a connection that has been taken over.
func (s *Server) carry(ctx context.Context, conn *stream, r *request, t transfer, work func(context.Context, *stream) error) {
	defer context.AfterFunc(ctx, conn.interrupt)()

	err := work(ctx, conn)
	if err != nil && ctx.Err() != nil {
		err = context.Cause(ctx)
	}
	if err = t.Finish(apiError(err)); err != nil {
		s.log.Info("transfer failed", "path", r.URL.Path, "peer", r.origin.Peer, "error", err)
		err = conn.Abort()
	} else {
		err = conn.Close()
	}
	if err != nil {
		s.log.Debug("closing the connection of a transfer", "error", err)
	}
}

// apiError names what only this side knows the reason of: a client that sent
// something wrong, or went away. Everything else is api's to name.
func apiError(err error) error {
	if e, ok := errors.AsType[*bodyError](err); ok {
		return xapi.NewError(xapi.ErrVDIIOError, e.Error()).WithCause(err)
	}
	if e, ok := errors.AsType[*clientError](err); ok {
		return xapi.NewError(xapi.ErrClientError, e.Error()).WithCause(err)
	}
	return err
}

// begin sends the head of a reply, which goes into the access log.
func begin(w http.ResponseWriter, conn *stream, status int, head []byte) error {
	if rep, ok := w.(*reply); ok {
		rep.status = status
	}
	_, err := conn.Write(head)
	return err
}

// interrupt makes every call that waits for the peer fail at once.
func (c *stream) interrupt() {
	c.interrupted.Store(true)
	// A connection that is closed already waits for nobody.
	_ = c.SetDeadline(time.Unix(1, 0))
}

// meter passes progress on in at most 200 steps. It is safe for concurrent use.
type meter struct {
	report func(done, total int64)
	mu     struct {
		sync.Mutex
		next int64
	}
}

func (m *meter) set(done, total int64) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if done >= m.mu.next {
		m.report(done, total)
		m.mu.next = done + max(1, total/200)
	}
}

// unknownLength is the Content-Length that some clients give when they do not
// know it (1 PiB); they cut the connection when everything is sent.
const unknownLength = 1 << 50

// body is the body of a PUT on a connection that has been taken over.
type body struct {
	r      io.Reader
	length int64 // -1 when the body ends where the connection does
	read   int64
}

// newBody frames the body of r, which comes on conn.
func newBody(r *request, conn *stream) *body {
	b := &body{r: conn, length: bodyLength(r)}
	switch {
	case len(r.TransferEncoding) > 0:
		b.r = chunks{httputil.NewChunkedReader(b.r)}
	case r.ContentLength == unknownLength:
		b.r = cutting{b.r}
	}
	return b
}

// bodyLength is the length of the body of r in bytes, -1 when it is not known.
// Without any framing a body extends to the end of the connection, whatever
// the version of HTTP: that is how this handler has always been used.
func bodyLength(r *request) int64 {
	if len(r.TransferEncoding) > 0 || r.Header.Get("Content-Length") == "" || r.ContentLength == unknownLength {
		return -1
	}
	return r.ContentLength
}

func (b *body) Read(p []byte) (int, error) {
	if b.length >= 0 {
		if b.read == b.length {
			return 0, io.EOF
		}
		p = p[:min(int64(len(p)), b.length-b.read)]
	}
	n, err := b.r.Read(p)
	b.read += int64(n)
	if err == io.EOF && b.read < b.length {
		err = fmt.Errorf("body ends after %d of %d bytes: %w", b.read, b.length, io.ErrUnexpectedEOF)
	}
	return n, err
}

// chunks reads the chunks of a transfer encoding. An end within them is told
// from that of a body which is merely shorter than what it is read for.
type chunks struct{ io.Reader }

func (c chunks) Read(p []byte) (int, error) {
	n, err := c.Reader.Read(p)
	if errors.Is(err, io.ErrUnexpectedEOF) {
		err = fmt.Errorf("body ends before its last chunk: %w", err)
	}
	return n, err
}

// cutting reads from a client that may end its body with a reset.
type cutting struct{ io.Reader }

func (c cutting) Read(p []byte) (int, error) {
	n, err := c.Reader.Read(p)
	if errors.Is(err, syscall.ECONNRESET) {
		err = io.EOF
	}
	return n, err
}
