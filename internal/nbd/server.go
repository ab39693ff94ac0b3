package nbd

import (
	"bufio"
	"context"
	"crypto/tls"
	"errors"
	"io"
	"log/slog"
	"net"
	"runtime/debug"
	"sync"
	"time"
)

// Limits of a Server.
const (
	// DefaultHandshakeTimeout is how long a client may take from connecting
	// to the transmission phase.
	DefaultHandshakeTimeout = 30 * time.Second
	// DefaultMemory bounds the buffers of all connections, in bytes, beyond
	// one piece that each may always have.
	DefaultMemory = 256 << 20
	// DefaultMaxConns is how many connections may be open.
	DefaultMaxConns = 1024
)

// ErrServerClosed is what Serve returns after Shutdown.
var ErrServerClosed = errors.New("nbd: server closed")

// Options configures a Server. Backend is needed, the rest has defaults.
type Options struct {
	// Backend returns where the exports of a new connection come from.
	Backend func(c net.Conn) Backend

	Log              *slog.Logger  // nil: none
	HandshakeTimeout time.Duration // 0: DefaultHandshakeTimeout
	Memory           int64         // bytes; 0: DefaultMemory
	MaxConns         int           // 0: DefaultMaxConns; more are closed at once
}

// Server serves any number of listeners.
type Server struct {
	opts   Options
	log    *slog.Logger
	memory budget

	mu        sync.Mutex // guards what follows
	closed    bool
	listeners map[net.Listener]struct{}
	conns     map[*conn]struct{}
	running   sync.WaitGroup // connections
}

// NewServer returns a server that listens to nothing yet.
func NewServer(o Options) *Server {
	if o.HandshakeTimeout == 0 {
		o.HandshakeTimeout = DefaultHandshakeTimeout
	}
	if o.Memory == 0 {
		o.Memory = DefaultMemory
	}
	if o.MaxConns == 0 {
		o.MaxConns = DefaultMaxConns
	}
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	s := &Server{
		opts: o, log: o.Log,
		listeners: map[net.Listener]struct{}{}, conns: map[*conn]struct{}{},
	}
	s.memory.left.Store(o.Memory)
	return s
}

// Serve accepts connections until the listener fails or Shutdown is called,
// then returns ErrServerClosed in the latter case. With a TLS configuration
// clients must use TLS, without one they cannot. It closes the listener.
func (s *Server) Serve(l net.Listener, config *tls.Config) error {
	defer l.Close()
	s.mu.Lock()
	if s.closed {
		s.mu.Unlock()
		return ErrServerClosed
	}
	s.listeners[l] = struct{}{}
	s.mu.Unlock()
	defer func() {
		s.mu.Lock()
		delete(s.listeners, l)
		s.mu.Unlock()
	}()
	var pause time.Duration
	for {
		nc, err := l.Accept()
		if err == nil {
			pause = 0
			s.start(nc, config)
			continue
		}
		s.mu.Lock()
		closed := s.closed
		s.mu.Unlock()
		if closed {
			return ErrServerClosed
		}
		if ne, ok := errors.AsType[net.Error](err); !ok || !ne.Timeout() && !temporary(err) {
			return err
		}
		// Out of file descriptors: those in use will be given back.
		pause = min(max(2*pause, 5*time.Millisecond), time.Second)
		s.log.Warn("nbd: accept", "err", err, "again", pause)
		time.Sleep(pause)
	}
}

// temporary says that accepting may succeed later.
func temporary(err error) bool {
	t, ok := errors.AsType[interface {
		error
		Temporary() bool
	}](err)
	return ok && t.Temporary()
}

// start serves a connection in the background.
func (s *Server) start(nc net.Conn, config *tls.Config) {
	c := newConn(s, nc, config)
	if !s.enter(c) {
		s.log.Warn("nbd: connection refused", "peer", nc.RemoteAddr(), "open", s.opts.MaxConns)
		nc.Close()
		return
	}
	go func() {
		defer s.leave(c)
		c.serve()
	}()
}

// ServeConn serves one connection until it ends, and closes it.
func (s *Server) ServeConn(nc net.Conn, config *tls.Config) {
	c := newConn(s, nc, config)
	if !s.enter(c) {
		nc.Close()
		return
	}
	defer s.leave(c)
	c.serve()
}

func (s *Server) enter(c *conn) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed || len(s.conns) >= s.opts.MaxConns {
		return false
	}
	s.conns[c] = struct{}{}
	s.running.Add(1)
	return true
}

func (s *Server) leave(c *conn) {
	s.mu.Lock()
	delete(s.conns, c)
	s.mu.Unlock()
	s.running.Done()
}

// Shutdown stops the server: it closes the listeners, lets requests that are
// being worked on end, and cuts the connections; at the end of ctx it cuts
// those that have not come that far. It returns when every connection has
// ended, nil or the cause of ctx.
func (s *Server) Shutdown(ctx context.Context) error {
	s.mu.Lock()
	s.closed = true
	for l := range s.listeners {
		l.Close()
	}
	open := make([]*conn, 0, len(s.conns))
	for c := range s.conns {
		open = append(open, c)
	}
	s.mu.Unlock()
	for _, c := range open {
		c.stop()
	}
	done := make(chan struct{})
	go func() {
		s.running.Wait()
		close(done)
	}()
	select {
	case <-done:
		return nil
	case <-ctx.Done():
	}
	for _, c := range open {
		c.cut()
	}
	<-done
	return context.Cause(ctx)
}

// Connections returns how many connections are open.
func (s *Server) Connections() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.conns)
}

// conn is one connection.
type conn struct {
	srv    *Server
	raw    *socket     // as accepted
	tls    *tls.Config // nil: no TLS
	log    *slog.Logger
	ctx    context.Context // ends when the connection is cut
	cancel context.CancelFunc

	// Of the handshake, then constant.
	nc      net.Conn // raw, or TLS over it
	in      *bufio.Reader
	backend Backend
	secure  bool // TLS is up
	wire    wire
	meta    selection
	export  *Export
	size    int64 // of the export, as the client was told

	transmission
}

// inputBuffer is how much may be read ahead of the requests, in bytes: with
// one call about as many writes of 4 KiB as clients have under way.
const inputBuffer = 128 << 10

func newConn(s *Server, nc net.Conn, config *tls.Config) *conn {
	c := &conn{srv: s, raw: &socket{Conn: nc}, tls: config, log: s.log}
	c.nc = c.raw
	if a := nc.RemoteAddr(); a != nil {
		c.log = s.log.With("peer", a.String())
	}
	c.ctx, c.cancel = context.WithCancel(context.Background())
	c.in = bufio.NewReaderSize(c.nc, inputBuffer)
	return c
}

// stop makes the connection end after the requests that are being worked on.
func (c *conn) stop() {
	c.stopping.Store(true)
	_ = c.raw.SetReadDeadline(time.Unix(1, 0)) // fails when it is closed already
}

// dismiss is stop for a client that may not go on: whether it takes its
// replies or not, it keeps the export from others for no longer than
// lastReplies and what the device takes.
func (c *conn) dismiss() {
	c.stop()
	_ = c.raw.SetWriteDeadline(time.Now().Add(lastReplies)) // as in stop
}

// cut ends the connection now.
func (c *conn) cut() {
	c.cancel()
	_ = c.raw.Close() // fails when it is closed already
}

// endTLS tells the client, if it uses TLS, that nothing more comes: without
// that it cannot tell the end from one that somebody in between has made. A
// client that takes nothing is given the few seconds that crypto/tls has for it.
func (c *conn) endTLS() {
	if t, ok := c.nc.(*tls.Conn); ok {
		_ = t.CloseWrite() // fails when the connection has
	}
}

// serve runs the connection from beginning to end.
func (c *conn) serve() {
	defer c.cut()
	defer c.endTLS()
	defer func() {
		if p := recover(); p != nil {
			c.log.Error("nbd: panic", "panic", p, "stack", string(debug.Stack()))
		}
	}()
	deadline := time.Now().Add(c.srv.opts.HandshakeTimeout)
	_ = c.raw.SetDeadline(deadline) // fails when it is closed, which the first read tells
	if c.stopping.Load() {
		return // stop came first, and its deadline is gone now
	}
	c.backend = c.srv.opts.Backend(c.raw.Conn)
	ctx, cancel := context.WithDeadline(c.ctx, deadline)
	err := c.handshake(ctx)
	cancel()
	if c.export != nil {
		if c.export.Close != nil {
			defer c.export.Close()
		}
		if err == nil {
			err = c.transmit()
		}
	}
	if err != nil && !errors.Is(err, io.EOF) && !c.stopping.Load() {
		c.log.Info("nbd: connection ended", "err", err)
	}
}
