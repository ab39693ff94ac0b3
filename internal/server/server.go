// Package server is the HTTP face of Coppice: one handler that answers
// XML-RPC, JSON-RPC, the thin CLI, disk transfers and a welcome page, on any
// number of listeners at once, plain, TLS and Unix socket alike.
//
// The way of a request: [Server.ServeHTTP] notes who asks and writes the
// access log; the table in routes.go picks a handler by method and longest
// path; the handler turns HTTP into calls of package api and their results
// back into HTTP. Nothing here decides what a caller may do: sessions, roles
// and tasks are api's.
//
//	POST /, /RPC2, /xmlrpc, any other   XML-RPC           rpc.go
//	POST /jsonrpc, /json                JSON-RPC 1.0, 2.0 rpc.go
//	POST /cli                           thin CLI of xe    cli.go
//	GET  /export_raw_vdi                disk download     export.go
//	PUT  /import_raw_vdi                disk upload       import.go
//	GET  /                              welcome page      welcome.go
//	GET  /metrics                       Prometheus        metrics.go
//	GET  /healthz, /readyz              for monitors      health.go
//	OPTIONS                             CORS              routes.go
//
// # Connections that are not quite HTTP
//
// The thin CLI never sends an HTTP reply, and a transfer may answer before it
// reads its body, read until the client closes, or end by closing. Such a
// handler takes the connection over (stream.go); the server keeps a list of
// them, so that a stop reaches them too.
//
// # Stopping
//
// When the context of [Server.Serve] ends, listeners close, calls that only
// wait for events return at once, and everything else gets the grace period
// to end by itself. Then the API is closed, which cancels the calls that are
// left and fails their tasks, and soon after their connections are cut. Serve
// returns when the last handler has.
package server

import (
	"context"
	"errors"
	"log/slog"
	"net"
	"net/http"
	"runtime/debug"
	"strconv"
	"sync"
	"time"

	"coppice/internal/api"
)

// Limits of the HTTP side. All are larger than those of the original, so no
// client meets them that worked before.
const (
	maxHeader     = 64 << 10         // bytes of a request header
	maxRPC        = 16 << 20         // bytes of an RPC body
	maxCLI        = 200 << 10        // bytes of a command line
	headerTimeout = 10 * time.Second // for the TLS handshake and the header
	bodyTimeout   = 60 * time.Second // for an RPC or CLI body
	writeTimeout  = 5 * time.Minute  // for a client that takes no byte
	idleTimeout   = 10 * time.Minute // between requests of one connection
)

// lastWords is how long a handler that was cancelled may take to tell its
// client so.
const lastWords = time.Second

// DefaultGrace is how long a stop lets running work go on.
const DefaultGrace = 10 * time.Second

// ErrStopping is the cause with which a stop cancels what is left after the
// grace period.
var ErrStopping = errors.New("the server is stopping")

// Config is what a Server needs.
type Config struct {
	API     *api.API
	Log     *slog.Logger
	Version string        // shown on the welcome page
	Grace   time.Duration // 0: DefaultGrace
	Metrics *Metrics      // nil: the server makes its own
	Audit   *Audit        // what GET /audit_log sends; nil for none

	// TransferIdle is how long the client of a transfer may neither send nor
	// take a byte before it is given up; 0 for ever.
	TransferIdle time.Duration
}

// Server answers HTTP requests. It is an http.Handler; Serve adds listeners,
// limits and an orderly stop.
type Server struct {
	api     *api.API
	log     *slog.Logger
	version string
	grace   time.Duration
	metrics *Metrics
	audit   *Audit
	idle    time.Duration // of transfers
	router  router

	replies  sync.Pool // of *bytes.Buffer, see rpcWriter
	streams  streams
	digests  digests                                  // of exports
	turns    struct{ acquaintances, strangers turns } // to send long calls: with a session, without
	handlers activity
	draining context.Context // ends when a stop begins
	drain    context.CancelCauseFunc

	// cutting ends when the grace period of a stop does, with ErrStopping.
	// A handler that has taken its connection over goes by it: for net/http
	// the context of a request ends when the client closes its sending side,
	// but such a client may still be waiting for an answer.
	cutting context.Context
	cut     context.CancelCauseFunc
}

// New returns a Server that listens to nothing yet.
func New(cfg Config) *Server {
	s := &Server{
		api:     cfg.API,
		log:     cfg.Log,
		version: cfg.Version,
		grace:   cfg.Grace,
		idle:    cfg.TransferIdle,
		metrics: cfg.Metrics,
		audit:   cfg.Audit,
		router:  newRouter(routes()),
	}
	if s.log == nil {
		s.log = slog.New(slog.DiscardHandler)
	}
	if s.metrics == nil {
		s.metrics = NewMetrics(cfg.Version)
	}
	s.metrics.registry.MustRegister(figures{s.api})
	s.turns.acquaintances, s.turns.strangers = newTurns(acquaintedAtOnce), newTurns(strangersAtOnce)
	if s.grace == 0 {
		s.grace = DefaultGrace
	}
	s.draining, s.drain = context.WithCancelCause(context.Background())
	s.cutting, s.cut = context.WithCancelCause(context.Background())
	return s
}

// Serve answers requests from all the listeners until ctx ends or one of the
// listeners fails, then stops in order; see the package comment. It closes
// the listeners, and is called at most once. A stop that was asked for
// returns nil; it has closed the API only if something had to be cut.
func (s *Server) Serve(ctx context.Context, listeners ...net.Listener) error {
	defer s.cut(ErrStopping)
	hs := &http.Server{
		Handler:                      s,
		BaseContext:                  func(net.Listener) context.Context { return s.cutting },
		ConnContext:                  withPeer,
		ReadHeaderTimeout:            headerTimeout,
		IdleTimeout:                  idleTimeout,
		MaxHeaderBytes:               maxHeader,
		DisableGeneralOptionsHandler: true,
		ErrorLog:                     slog.NewLogLogger(s.log.Handler(), slog.LevelDebug),
	}
	failed := make(chan error, len(listeners))
	var accepting sync.WaitGroup
	for _, l := range listeners {
		accepting.Go(func() {
			if err := hs.Serve(l); !errors.Is(err, http.ErrServerClosed) {
				failed <- err
			}
		})
	}
	var err error
	select {
	case <-ctx.Done():
	case err = <-failed:
	}
	s.drain(ErrStopping)
	graceCtx, done := context.WithTimeout(s.cutting, s.grace)
	defer done()
	if hs.Shutdown(graceCtx) != nil || !s.handlers.wait(graceCtx) {
		s.log.Warn("cutting what did not end within the grace period", "grace", s.grace)
		err = errors.Join(err, s.endAll(hs))
	}
	accepting.Wait()
	return err
}

// endAll ends every handler that is left, and returns when they have ended.
func (s *Server) endAll(hs *http.Server) error {
	s.cut(ErrStopping)
	var closing sync.WaitGroup
	var closed error
	closing.Go(func() { closed = s.api.Close() })
	brief, done := context.WithTimeout(context.Background(), lastWords)
	defer done()
	s.handlers.wait(brief)
	err := errors.Join(s.streams.abort(), hs.Close())
	s.handlers.wait(context.Background())
	closing.Wait()
	return errors.Join(err, closed)
}

// ServeHTTP answers one request and writes its line of the access log.
func (s *Server) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	s.handlers.enter()
	defer s.handlers.leave()
	req := newRequest(r)
	reply := &reply{ResponseWriter: w, started: time.Now()}
	reply.Header().Set("Cache-Control", "no-cache, no-store")
	defer func() { s.metrics.request(req.Method, strconv.Itoa(reply.status), reply.bytes) }()
	defer s.logAccess(reply, req)
	defer s.recover(reply, req)

	handle, err := s.router.find(r.Method, r.URL.Path)
	if err != nil {
		s.fail(reply, req, err)
		return
	}
	handle(s, reply, req)
}

// recover answers a request whose handler panicked with a 500, if it can
// still be answered, and ends the connection otherwise.
func (s *Server) recover(w *reply, r *request) {
	p := recover()
	if p == nil {
		return
	}
	if p == http.ErrAbortHandler { //nolint:errorlint // the sentinel of net/http, compared as it does
		panic(p)
	}
	s.log.Error("panic in a handler", "method", r.Method, "path", r.URL.Path, "panic", p, "stack", string(debug.Stack()))
	if w.hijacked {
		return
	}
	if w.status != 0 {
		panic(http.ErrAbortHandler)
	}
	s.fail(w, r, &statusError{Status: http.StatusInternalServerError})
}

func (s *Server) logAccess(w *reply, r *request) {
	if !s.log.Enabled(r.Context(), slog.LevelDebug) {
		return
	}
	s.log.Debug("request",
		"method", r.Method, "uri", Redact(r.RequestURI), "call", w.call, "status", w.status, "bytes", w.bytes,
		"took", time.Since(w.started), "peer", r.origin.Peer, "trusted", r.origin.Trusted, "agent", r.origin.UserAgent)
}

// reply is the ResponseWriter that handlers see. It knows what was answered,
// for the access log, and cuts a client that takes no bytes.
type reply struct {
	http.ResponseWriter
	started  time.Time
	call     string // RPC method or command, when there is one
	status   int    // 0 until the header is written
	bytes    int64
	hijacked bool
	last     time.Time // by which the client has to have taken it; zero for as long as it takes something
}

// Unwrap lets an http.ResponseController reach what is below.
func (w *reply) Unwrap() http.ResponseWriter { return w.ResponseWriter }

func (w *reply) WriteHeader(status int) {
	w.status = status
	w.extend()
	w.ResponseWriter.WriteHeader(status)
}

func (w *reply) Write(p []byte) (int, error) {
	if w.status == 0 {
		w.WriteHeader(http.StatusOK)
	}
	w.extend()
	n, err := w.ResponseWriter.Write(p)
	w.bytes += int64(n)
	return n, err
}

// extend gives the client a new writeTimeout. Writers that know no deadline,
// as in tests, do without.
func (w *reply) extend() {
	until := time.Now().Add(writeTimeout)
	if !w.last.IsZero() && w.last.Before(until) {
		until = w.last
	}
	_ = http.NewResponseController(w.ResponseWriter).SetWriteDeadline(until)
}

// activity counts running handlers. Unlike a WaitGroup it may go up again
// while somebody waits.
type activity struct {
	mu struct {
		sync.Mutex
		n    int
		zero chan struct{} // closed when n returns to 0; nil when nobody waits
	}
}

func (a *activity) enter() {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.mu.n++
}

func (a *activity) leave() {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.mu.n--
	if a.mu.n == 0 && a.mu.zero != nil {
		close(a.mu.zero)
		a.mu.zero = nil
	}
}

// wait returns true when nothing runs, false when ctx ended first.
func (a *activity) wait(ctx context.Context) bool {
	a.mu.Lock()
	if a.mu.n == 0 {
		a.mu.Unlock()
		return true
	}
	if a.mu.zero == nil {
		a.mu.zero = make(chan struct{})
	}
	zero := a.mu.zero
	a.mu.Unlock()
	select {
	case <-zero:
		return true
	case <-ctx.Done():
		return false
	}
}
