package nbd

import (
	"bytes"
	"errors"
	"io"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// sockets returns both ends of a connection, ours taken.
func sockets(t *testing.T, network string) (*socket, net.Conn) {
	t.Helper()
	address := "127.0.0.1:0"
	if network == "unix" {
		address = filepath.Join(t.TempDir(), "sock")
	}
	l, err := net.Listen(network, address)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	there, err := net.Dial(network, l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { there.Close() })
	here, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	s := &socket{Conn: here}
	s.take()
	t.Cleanup(func() { s.Close() })
	if s.file == nil {
		t.Fatal("the connection was not taken")
	}
	return s, there
}

// forEachNetwork runs a test on a socket of each kind.
func forEachNetwork(t *testing.T, test func(t *testing.T, s *socket, there net.Conn)) {
	for _, network := range []string{"unix", "tcp"} {
		t.Run(network, func(t *testing.T) {
			s, there := sockets(t, network)
			test(t, s, there)
		})
	}
}

// awaitParked returns when a call of a direction waits in the poller.
func (s *socket) awaitParked(t *testing.T, dir int) {
	t.Helper()
	for deadline := time.Now().Add(time.Minute); !s.isParked(dir); {
		if time.Now().After(deadline) {
			t.Fatal("the call does not wait in the poller")
		}
		runtime.Gosched() // for as long as the patience of the call
	}
}

// isParked tells whether a call of a direction waits in the poller.
func (s *socket) isParked(dir int) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.parked[dir] != nil
}

// TestSocketParked has a read that waits in the poller go on when there is
// something to be read, and read with its thread again.
func TestSocketParked(t *testing.T) {
	forEachNetwork(t, func(t *testing.T, s *socket, there net.Conn) {
		for _, word := range []string{"one", "two"} {
			got := make(chan string, 1)
			go func() {
				b := make([]byte, 8)
				n, err := s.Read(b)
				if err != nil {
					got <- err.Error()
					return
				}
				got <- string(b[:n])
			}()
			s.awaitParked(t, reading)
			if _, err := there.Write([]byte(word)); err != nil {
				t.Fatal(err)
			}
			if g := <-got; g != word {
				t.Fatalf("read %q, want %q", g, word)
			}
		}
	})
}

// TestSocketSlowReader writes more than the host buffers to somebody who
// takes it late, while something else is being read.
func TestSocketSlowReader(t *testing.T) {
	forEachNetwork(t, func(t *testing.T, s *socket, there net.Conn) {
		parts := net.Buffers{noise(3 << 20), noise(3), nil, noise(9 << 20)}
		want := bytes.Join(parts, nil)
		wrote := make(chan error, 1)
		go func() { wrote <- s.writeAll(parts) }()
		read := make(chan error, 1)
		go func() {
			_, err := io.ReadFull(s, make([]byte, 3))
			read <- err
		}()
		s.awaitParked(t, writing)
		s.awaitParked(t, reading)
		got := make([]byte, len(want))
		if _, err := io.ReadFull(there, got); err != nil {
			t.Fatal(err)
		}
		if err := <-wrote; err != nil || !bytes.Equal(got, want) {
			t.Fatalf("wrote %v; what came is what was written: %v", err, bytes.Equal(got, want))
		}
		if _, err := there.Write([]byte("end")); err != nil {
			t.Fatal(err)
		}
		if err := <-read; err != nil {
			t.Fatal(err)
		}
	})
}

// TestSocketInterrupted sends signals, as the runtime does before it collects
// garbage, to a thread that waits for a client to take something.
func TestSocketInterrupted(t *testing.T) {
	s, there := sockets(t, "unix") // whose room does not grow by itself
	filled := make(chan int, 1)
	go func() {
		n, _ := s.Write(make([]byte, 16<<20)) // until the deadline
		filled <- n
	}()
	s.awaitParked(t, writing)
	if err := s.SetWriteDeadline(time.Unix(1, 0)); err != nil {
		t.Fatal(err)
	}
	n := <-filled
	if err := s.SetWriteDeadline(time.Time{}); err != nil {
		t.Fatal(err)
	}
	thread, wrote := make(chan int, 1), make(chan error, 1)
	go func() {
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		thread <- unix.Gettid()
		wrote <- s.writeAll(net.Buffers{[]byte("one"), []byte("two")})
	}()
	for tid := <-thread; !s.isParked(writing); {
		if err := unix.Tgkill(unix.Getpid(), tid, unix.SIGURG); err != nil {
			t.Fatal(err)
		}
		select {
		case err := <-wrote:
			t.Fatalf("nobody has taken anything, and the end is %v", err)
		default:
		}
	}
	got := make([]byte, n+6)
	if _, err := io.ReadFull(there, got); err != nil {
		t.Fatal(err)
	}
	if err := <-wrote; err != nil || string(got[n:]) != "onetwo" {
		t.Fatalf("came %q, %v", got[n:], err)
	}
}

// TestSocketDeadline ends reads and writes by a deadline that comes while
// they wait, and does not let a later one begin.
func TestSocketDeadline(t *testing.T) {
	forEachNetwork(t, func(t *testing.T, s *socket, _ net.Conn) {
		ended := make(chan error, 2)
		go func() { ended <- onlyErr(s.Read(make([]byte, 1))) }()
		go func() { ended <- onlyErr(s.Write(make([]byte, 16<<20))) }()
		s.awaitParked(t, reading)
		s.awaitParked(t, writing)
		if err := s.SetDeadline(time.Unix(1, 0)); err != nil {
			t.Fatal(err)
		}
		for _, err := range []error{<-ended, <-ended, onlyErr(s.Read(make([]byte, 1))), onlyErr(s.Write([]byte("x")))} {
			if !errors.Is(err, os.ErrDeadlineExceeded) {
				t.Errorf("got %v, want that the deadline has passed", err)
			}
		}
	})
}

// TestSocketClose ends what waits, in the poller or with its thread.
func TestSocketClose(t *testing.T) {
	for _, parked := range []bool{true, false} {
		forEachNetwork(t, func(t *testing.T, s *socket, _ net.Conn) {
			ended := make(chan error, 2)
			go func() { ended <- onlyErr(s.Read(make([]byte, 1))) }()
			go func() { ended <- onlyErr(s.Write(make([]byte, 16<<20))) }()
			if parked {
				s.awaitParked(t, reading)
				s.awaitParked(t, writing)
			}
			if err := s.Close(); err != nil {
				t.Fatal(err)
			}
			for range 2 {
				if err := <-ended; err == nil {
					t.Error("a call on a closed socket has succeeded")
				}
			}
			if err := s.SetReadDeadline(time.Now()); !errors.Is(err, net.ErrClosed) {
				t.Errorf("deadline of a closed socket: %v, want %v", err, net.ErrClosed)
			}
		})
	}
}

func onlyErr(_ int, err error) error { return err }

// noise is n bytes with a period that no buffer has.
func noise(n int) []byte {
	period := make([]byte, 65521)
	for i := range period {
		period[i] = byte(i * i >> 7)
	}
	return bytes.Repeat(period, n/len(period)+1)[:n]
}
