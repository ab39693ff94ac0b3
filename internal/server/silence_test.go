package server

import (
	"crypto/tls"
	"errors"
	"net"
	"os"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// connected returns both ends of a connection with small buffers.
func connected(t *testing.T, network, address string) (ours, theirs net.Conn) {
	t.Helper()
	l, err := net.Listen(network, address)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	if theirs, err = net.Dial(network, l.Addr().String()); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { theirs.Close() })
	if ours, err = l.Accept(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { ours.Close() })
	type buffered interface {
		SetReadBuffer(bytes int) error
		SetWriteBuffer(bytes int) error
	}
	if err := errors.Join(ours.(buffered).SetWriteBuffer(128<<10), theirs.(buffered).SetReadBuffer(16<<10)); err != nil {
		t.Fatal(err)
	}
	return ours, theirs
}

// stuff writes to a connection until it takes no more.
func stuff(conn net.Conn) error {
	raw, err := conn.(syscall.Conn).SyscallConn()
	if err != nil {
		return err
	}
	return raw.Write(func(fd uintptr) bool {
		for {
			if _, err := unix.Write(int(fd), make([]byte, 4096)); err != nil {
				return true
			}
		}
	})
}

// writable tells whether a write that waits for a connection would go on.
func writable(t *testing.T, conn net.Conn) (yes bool) {
	t.Helper()
	raw, err := conn.(syscall.Conn).SyscallConn()
	if err == nil {
		err = raw.Control(func(fd uintptr) {
			n, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLOUT}}, 0)
			yes = err != nil || n > 0
		})
	}
	if err != nil {
		t.Fatal(err)
	}
	return yes
}

// A peer whose kernel takes bytes is not silent, although a write that waits for
// it cannot go on yet: in the clear, below TLS and on a Unix socket. One whose
// kernel takes none is.
func TestStreamTrickle(t *testing.T) {
	for _, tt := range []struct{ name, network, address string }{
		{"tcp", "tcp", "127.0.0.1:0"},
		{"tls", "tcp", "127.0.0.1:0"},
		{"unix", "unix", filepath.Join(t.TempDir(), "socket")},
	} {
		t.Run(tt.name, func(t *testing.T) {
			ours, theirs := connected(t, tt.network, tt.address)
			c := &stream{Conn: ours, idle: time.Hour}
			if tt.name == "tls" {
				c.Conn = tls.Server(ours, nil)
			}
			if err := stuff(ours); err != nil {
				t.Fatal(err)
			}
			w := c.watch()
			defer w.stop()
			for was := w.mu.last; was == w.mu.last; {
				if _, err := theirs.Read(make([]byte, 1024)); err != nil {
					t.Fatal(err)
				}
				if kernelTaken(ours) != was.kernel {
					w.look()
				}
			}
			if writable(t, ours) {
				t.Fatal("a write would go on, so this shows nothing")
			}
			if err := stuff(ours); err != nil {
				t.Fatalf("a peer that takes bytes: %v", err)
			}
			for range 1000 { // what is on its way comes
				w.look()
			}
			if err := stuff(ours); !errors.Is(err, os.ErrDeadlineExceeded) {
				t.Errorf("a peer that takes nothing: %v", err)
			}
		})
	}
}
