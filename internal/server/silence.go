package server

import (
	"math"
	"net"
	"os"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// writePiece is how many bytes are written at a time to a peer whose kernel does
// not count what it takes. Each piece costs: all of them a fifth of the speed of
// TCP.
const writePiece = 64 << 10

// Write sends p. With an idle time it goes on for as long as the peer takes
// something in each, and fails once it has not: after one to two idle times of
// silence. What counts is what the peer's kernel has acknowledged, and not that
// Write could go on, which happens late: a socket has room again when a third of
// its buffer is free. The peer's kernel takes bytes in steps, too, as it gives
// received packets back whole and opens its window by parts of its buffer: of 64 KiB
// often, and of some MB where that has grown.
func (c *stream) Write(p []byte) (n int, err error) {
	if c.idle <= 0 {
		return c.Conn.Write(p)
	}
	if c.interrupted.Load() {
		return 0, os.ErrDeadlineExceeded
	}
	w := c.watch()
	defer w.stop()
	for n < len(p) && err == nil {
		var k int
		k, err = c.Conn.Write(p[n:][:min(len(p)-n, w.piece)])
		n += k
		w.wrote(k)
	}
	return n, err
}

// watch looks at a write once in each idle time, and makes it fail when the
// peer has taken nothing since the last time.
type watch struct {
	c     *stream
	piece int // how much is to be written at a time, in bytes
	mu    struct {
		sync.Mutex
		written int // bytes of pieces that are done
		last    taken
		timer   *time.Timer
		over    bool
	}
}

// taken changes when the peer takes something.
type taken struct {
	written int
	kernel  uint64 // see kernelTaken
}

// watch begins to look at a write. The stop of the watch must be called.
func (c *stream) watch() *watch {
	w := &watch{c: c, piece: writePiece}
	w.mu.Lock()
	defer w.mu.Unlock()
	w.mu.last = taken{0, kernelTaken(c.socket())}
	if _, ok := c.socket().(*net.TCPConn); ok && w.mu.last.kernel > 0 {
		w.piece = math.MaxInt
	}
	w.mu.timer = time.AfterFunc(c.idle, w.look)
	return w
}

func (w *watch) wrote(n int) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.mu.written += n
}

func (w *watch) stop() {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.mu.over = true
	w.mu.timer.Stop()
}

// look ends the write if the peer has been silent since the last look.
func (w *watch) look() {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.mu.over {
		return
	}
	now := taken{w.mu.written, kernelTaken(w.c.socket())}
	if now == w.mu.last {
		_ = w.c.SetWriteDeadline(time.Unix(1, 0)) // one that is closed waits for nobody
		return
	}
	w.mu.last = now
	w.mu.timer.Reset(w.c.idle)
}

// socket is the connection below TLS, or else the connection.
func (c *stream) socket() net.Conn {
	if t, ok := c.Conn.(interface{ NetConn() net.Conn }); ok {
		return t.NetConn()
	}
	return c.Conn
}

// kernelTaken is a figure that changes when the other end of a connection takes
// bytes, also when no write has been able to go on: those acknowledged on a TCP
// connection, those that wait on a Unix socket. It stays 0 where there is none.
func kernelTaken(conn net.Conn) (n uint64) {
	sc, ok := conn.(syscall.Conn)
	if !ok {
		return 0
	}
	raw, err := sc.SyscallConn()
	if err != nil {
		return 0
	}
	_, tcp := conn.(*net.TCPConn)
	_ = raw.Control(func(fd uintptr) { // fails when the connection is closed
		if tcp {
			if info, err := unix.GetsockoptTCPInfo(int(fd), unix.IPPROTO_TCP, unix.TCP_INFO); err == nil {
				n = info.Bytes_acked
			}
			return
		}
		if queued, err := unix.IoctlGetInt(int(fd), unix.SIOCOUTQ); err == nil {
			n = uint64(queued)
		}
	})
	return n
}
