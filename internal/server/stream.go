package server

import (
	"bufio"
	"bytes"
	"errors"
	"io"
	"net"
	"net/http"
	"os"
	"sync"
	"sync/atomic"
	"time"
)

// lingerLimit bounds how long Close reads on to let the peer see the end.
const lingerLimit = 500 * time.Millisecond

// stream is a connection taken over from net/http, for the protocols it does
// not speak: the thin CLI, and transfers that answer before they read or that
// end by closing. It must be closed or aborted by whoever took it over. Read
// and Write may be used by different goroutines.
type stream struct {
	net.Conn
	r    *bufio.Reader // what net/http had read ahead comes first
	idle time.Duration // longest wait for a byte in or out, 0 for ever
	done func()        // tells the server that it is gone, once

	interrupted atomic.Bool // see interrupt
}

// hijack takes the connection of w over and enters it into the list of those
// that a stop waits for. With idle > 0 a peer that neither sends nor takes a
// byte for so long makes Read or Write fail. From here on s.cutting is the
// context to go by, not that of the request.
func (s *Server) hijack(w http.ResponseWriter, idle time.Duration) (*stream, error) {
	conn, rw, err := http.NewResponseController(w).Hijack()
	if err != nil {
		return nil, err
	}
	if reply, ok := w.(*reply); ok {
		reply.hijacked = true
	}
	c := &stream{Conn: conn, r: takeBuffered(rw.Reader, conn), idle: idle}
	c.done = sync.OnceFunc(func() { s.streams.remove(c) })
	s.streams.add(c)
	return c, nil
}

// takeBuffered returns a reader of what net/http had read ahead and then of
// conn itself, so that nothing of net/http is between them any more.
func takeBuffered(from *bufio.Reader, conn net.Conn) *bufio.Reader {
	n := from.Buffered()
	ahead, _ := from.Peek(n) // cannot fail for what is there
	r := bufio.NewReaderSize(io.MultiReader(bytes.NewReader(bytes.Clone(ahead)), conn), max(n, 4096))
	_, _ = r.Peek(n)
	return r
}

func (c *stream) Read(p []byte) (int, error) {
	if c.idle > 0 && c.r.Buffered() == 0 {
		if err := c.Conn.SetReadDeadline(time.Now().Add(c.idle)); err != nil {
			return 0, err
		}
		if c.interrupted.Load() { // whose deadline this may have replaced
			return 0, os.ErrDeadlineExceeded
		}
	}
	return c.r.Read(p)
}

// Close ends the connection so that the peer gets every byte written before
// it. A connection that is closed with unread input is reset by the kernel,
// and a reset overtakes data: so the sending side is shut first and input is
// read away until the peer closes too, for a moment at most. It must not run
// beside a Read.
func (c *stream) Close() error {
	defer c.done()
	if half, ok := c.Conn.(interface{ CloseWrite() error }); ok && half.CloseWrite() == nil {
		if c.Conn.SetReadDeadline(time.Now().Add(lingerLimit)) == nil {
			_, _ = io.Copy(io.Discard, c.r)
		}
	}
	return c.Conn.Close()
}

// Abort cuts the connection with a reset: the peer must not take what it has
// got for the whole.
func (c *stream) Abort() error {
	defer c.done()
	raw := c.socket()
	if tcp, ok := raw.(*net.TCPConn); ok {
		if err := tcp.SetLinger(0); err == nil {
			return tcp.Close()
		}
	}
	return raw.Close()
}

// streams is the set of connections taken over and not yet closed.
type streams struct {
	mu struct {
		sync.Mutex
		open map[*stream]struct{}
	}
}

func (ss *streams) add(c *stream) {
	ss.mu.Lock()
	defer ss.mu.Unlock()
	if ss.mu.open == nil {
		ss.mu.open = make(map[*stream]struct{})
	}
	ss.mu.open[c] = struct{}{}
}

func (ss *streams) remove(c *stream) {
	ss.mu.Lock()
	defer ss.mu.Unlock()
	delete(ss.mu.open, c)
}

// abort cuts every connection that is left.
func (ss *streams) abort() error {
	ss.mu.Lock()
	var left []*stream
	for c := range ss.mu.open {
		left = append(left, c)
	}
	ss.mu.Unlock()
	var errs []error
	for _, c := range left {
		errs = append(errs, c.Abort())
	}
	return errors.Join(errs...)
}
