package nbd

import (
	"errors"
	"net"
	"os"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// socket is a connection that, once requests come in, waits in the kernel
// and not in the poller of the runtime.
//
// The poller hears of every reply that the client takes as well as of every
// request, and what it hears goes through two or three threads before the
// goroutine that waits runs. A thread that sleeps in the read call itself is
// woken once, by requests only; that halves the processor time of short ones.
// The price is a thread for each connection, so one on which nothing has
// happened for the time of patience waits in the poller until something does.
type socket struct {
	net.Conn // as accepted, until take

	// Set by take, then constant.
	file *os.File        // nil: nothing has been taken
	raw  syscall.RawConn // of file

	until [2]atomic.Int64 // deadlines in nanoseconds since 1970, 0 for none

	mu     sync.Mutex  // guards what follows, the change of file, and of until
	parked [2]net.Conn // what waits in the poller
	closed bool
}

// Directions.
const (
	reading = iota
	writing
)

// patience is how long a thread waits for a client.
const patience = 10 * time.Millisecond

// take takes the connection out of the poller, if it is one of the network.
// Nothing may be reading or writing.
func (s *socket) take() {
	var raw syscall.RawConn
	var err error
	switch c := s.Conn.(type) { // what wraps these has reasons to
	case *net.UnixConn:
		raw, err = c.SyscallConn()
	case *net.TCPConn:
		raw, err = c.SyscallConn()
	default:
		return
	}
	var file *os.File
	if err == nil {
		file, err = duplicate(raw)
	}
	if err != nil {
		return // it is closed, or there are no more descriptors
	}
	if raw, err = file.SyscallConn(); err == nil {
		err = control(raw, makeBlocking)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if err != nil || s.closed {
		_ = file.Close() // a copy
		return
	}
	s.file, s.raw = file, raw
	_ = s.Conn.Close() // file is what counts now
}

// makeBlocking has calls on a socket wait, but not for longer than patience.
func makeBlocking(fd int) error {
	t := unix.NsecToTimeval(int64(patience))
	if d, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_DOMAIN); err == nil && d == unix.AF_UNIX {
		// TCP finds out by itself what the network takes.
		_ = unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_SNDBUF, portionSize) // as much as the system allows
	}
	return errors.Join(
		unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &t),
		unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_SNDTIMEO, &t),
		unix.SetNonblock(fd, false),
	)
}

// duplicate returns another descriptor of the same socket, which is not in
// the poller when the socket is blocking.
func duplicate(raw syscall.RawConn) (f *os.File, err error) {
	err = control(raw, func(fd int) error {
		d, err := unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 0)
		if err == nil {
			err = unix.SetNonblock(d, false)
			f = os.NewFile(uintptr(d), "nbd")
		}
		return err
	})
	return f, err
}

// control runs call on a descriptor that is not closed meanwhile.
func control(raw syscall.RawConn, call func(fd int) error) error {
	var err error
	if cerr := raw.Control(func(fd uintptr) { err = call(int(fd)) }); cerr != nil {
		return cerr
	}
	return err
}

func (s *socket) Read(p []byte) (int, error) {
	if s.file == nil {
		return s.Conn.Read(p)
	}
	for {
		if s.expired(reading) {
			return 0, os.ErrDeadlineExceeded
		}
		n, err := s.file.Read(p)
		if !errors.Is(err, unix.EAGAIN) {
			return n, err
		}
		if err := s.park(reading); err != nil {
			return 0, err
		}
	}
}

func (s *socket) Write(p []byte) (n int, err error) {
	if s.file == nil {
		return s.Conn.Write(p)
	}
	for n < len(p) {
		if s.expired(writing) {
			return n, os.ErrDeadlineExceeded
		}
		k, err := s.file.Write(p[n:])
		n += k
		if errors.Is(err, unix.EAGAIN) {
			err = s.park(writing)
		}
		if err != nil {
			return n, err
		}
	}
	return n, nil
}

// writeAll writes parts one behind the other, with one call if that takes them.
func (s *socket) writeAll(parts net.Buffers) error {
	if s.file == nil {
		_, err := parts.WriteTo(s.Conn)
		return err
	}
	var n int
	var err error
	for n == 0 && err == nil {
		cerr := s.raw.Write(func(fd uintptr) bool {
			n, err = unix.Writev(int(fd), parts)
			return true
		})
		switch {
		case cerr != nil:
			err = cerr
		case errors.Is(err, unix.EINTR):
			n, err = 0, nil
		case errors.Is(err, unix.EAGAIN):
			n, err = 0, s.park(writing)
		}
	}
	for _, p := range parts {
		k := min(n, len(p))
		n -= k
		if err == nil && k < len(p) {
			_, err = s.Write(p[k:])
		}
	}
	return err
}

// expired tells whether the deadline of a direction has passed.
func (s *socket) expired(dir int) bool {
	t := s.until[dir].Load()
	return t != 0 && time.Now().UnixNano() >= t
}

// park waits in the poller until the socket is ready or the deadline has
// passed, which is an error. Without a free descriptor it returns at once:
// the caller waits with its thread.
func (s *socket) park(dir int) error {
	c := s.polled()
	if c == nil {
		return nil
	}
	defer c.Close()
	raw, err := c.(syscall.Conn).SyscallConn()
	if err != nil {
		return err
	}
	s.mu.Lock()
	s.parked[dir] = c
	err = c.SetDeadline(deadline(s.until[dir].Load()))
	s.mu.Unlock()
	switch {
	case err != nil:
	case dir == reading:
		err = raw.Read(func(fd uintptr) bool { return ready(int(fd), unix.POLLIN) })
	default:
		err = raw.Write(func(fd uintptr) bool { return ready(int(fd), unix.POLLOUT) })
	}
	s.mu.Lock()
	s.parked[dir] = nil
	s.mu.Unlock()
	return err
}

// polled returns another descriptor of the socket, in the poller; nil when
// there is none to be had.
func (s *socket) polled() net.Conn {
	f, err := duplicate(s.raw)
	if err != nil {
		return nil
	}
	defer f.Close()
	c, err := net.FileConn(f)
	if err != nil {
		return nil
	}
	// FileConn has made the socket non-blocking, for all its descriptors. One
	// that was called in between has got EAGAIN, and parks as well.
	if err := control(s.raw, func(fd int) error { return unix.SetNonblock(fd, false) }); err != nil {
		_ = c.Close() // a copy
		return nil
	}
	return c
}

// ready asks, without waiting, for an event; that the connection has ended is
// one.
func ready(fd int, event int16) bool {
	for {
		n, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: event}}, 0)
		if !errors.Is(err, unix.EINTR) {
			return n > 0 || err != nil
		}
	}
}

// readable says that there is, or may be, something to be read already.
func (s *socket) readable() bool {
	if s.file == nil {
		return true
	}
	yes := true
	_ = control(s.raw, func(fd int) error { yes = ready(fd, unix.POLLIN); return nil }) // fails when it is closed
	return yes
}

// deadline is the time that nanoseconds since 1970 stand for.
func deadline(ns int64) time.Time {
	if ns == 0 {
		return time.Time{}
	}
	return time.Unix(0, ns)
}

func (s *socket) SetDeadline(t time.Time) error {
	return errors.Join(s.SetReadDeadline(t), s.SetWriteDeadline(t))
}

func (s *socket) SetReadDeadline(t time.Time) error {
	return s.setDeadline(reading, t, net.Conn.SetReadDeadline)
}

func (s *socket) SetWriteDeadline(t time.Time) error {
	return s.setDeadline(writing, t, net.Conn.SetWriteDeadline)
}

// setDeadline is noticed by a call that is under way after patience at the
// latest.
func (s *socket) setDeadline(dir int, t time.Time, set func(net.Conn, time.Time) error) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	ns := int64(0)
	if !t.IsZero() {
		ns = t.UnixNano()
	}
	s.until[dir].Store(ns)
	switch {
	case s.closed:
		return net.ErrClosed
	case s.file == nil:
		return set(s.Conn, t)
	case s.parked[dir] != nil:
		return set(s.parked[dir], t)
	}
	return nil
}

// Close ends calls that are under way.
func (s *socket) Close() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return net.ErrClosed
	}
	s.closed = true
	if s.file == nil {
		return s.Conn.Close()
	}
	err := control(s.raw, func(fd int) error { return unix.Shutdown(fd, unix.SHUT_RDWR) })
	if errors.Is(err, unix.ENOTCONN) { // the client was faster
		err = nil
	}
	return errors.Join(err, s.file.Close())
}
