package server

import (
	"errors"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"strings"
	"syscall"
	"testing"
	"testing/synctest"
	"time"
)

// takeover runs handle on a connection taken over from net/http, and returns
// the client's end after it has sent a request with extra bytes behind it.
func takeover(t *testing.T, idle time.Duration, handle func(*stream)) net.Conn {
	t.Helper()
	s := New(Config{})
	ts := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		c, err := s.hijack(w, idle)
		if err != nil {
			t.Error(err)
			return
		}
		handle(c)
		if n := len(s.streams.mu.open); n != 0 {
			t.Errorf("%d connections are still listed", n)
		}
	}))
	t.Cleanup(ts.Close)
	conn, err := net.Dial("tcp", ts.Listener.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	if _, err := io.WriteString(conn, "PUT / HTTP/1.0\r\n\r\nbody without a length"); err != nil {
		t.Fatal(err)
	}
	return conn
}

// TestStreamReadsToTheEnd: the body of an HTTP/1.0 PUT without a length ends
// when the client says so, and starts with what net/http had read ahead.
func TestStreamReadsToTheEnd(t *testing.T) {
	got := make(chan string, 1)
	conn := takeover(t, time.Minute, func(c *stream) {
		b, err := io.ReadAll(c)
		if err != nil {
			t.Error(err)
		}
		got <- string(b)
		_ = c.Close()
	})
	if _, err := io.WriteString(conn, ", in two parts"); err != nil {
		t.Fatal(err)
	}
	if err := conn.(*net.TCPConn).CloseWrite(); err != nil {
		t.Fatal(err)
	}
	if want := "body without a length, in two parts"; <-got != want {
		t.Errorf("want %q", want)
	}
}

// TestStreamCloseDelivers: what was written arrives although input is left.
func TestStreamCloseDelivers(t *testing.T) {
	answer := strings.Repeat("x", 1<<20)
	conn := takeover(t, 0, func(c *stream) {
		if _, err := io.WriteString(c, answer); err != nil {
			t.Error(err)
		}
		_ = c.Close()
	})
	go func() { _, _ = io.WriteString(conn, strings.Repeat("unread", 1000)) }()
	b, err := io.ReadAll(conn)
	if err != nil || string(b) != answer {
		t.Errorf("got %d bytes and %v, want %d", len(b), err, len(answer))
	}
}

// TestStreamAbort: a client that was cut off cannot take what it got for all.
func TestStreamAbort(t *testing.T) {
	conn := takeover(t, 0, func(c *stream) {
		_, _ = io.WriteString(c, "the beginning")
		_ = c.Abort()
	})
	if _, err := io.ReadAll(conn); !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("got %v, want a reset", err)
	}
}

func TestStreamIdle(t *testing.T) {
	done := make(chan struct{})
	takeover(t, time.Millisecond, func(c *stream) {
		defer close(done)
		_, err := io.Copy(io.Discard, c)
		if !errors.Is(err, os.ErrDeadlineExceeded) {
			t.Errorf("got %v, want a deadline", err)
		}
		_ = c.Abort()
	})
	<-done
}

// A peer that takes something now and then is not silent, however slow it is.
func TestStreamIdleWrites(t *testing.T) {
	const size = 8 * writePiece
	failed := make(chan error, 1)
	conn := takeover(t, time.Minute, func(c *stream) {
		_, err := c.Write(make([]byte, size))
		failed <- errors.Join(err, c.Close())
	})
	if got, err := io.ReadAll(conn); err != nil || len(got) != size {
		t.Errorf("%d bytes, %v; want %d", len(got), err, size)
	}
	if err := <-failed; err != nil {
		t.Error(err)
	}
}

// A write ends when the peer has taken less than a piece in the idle time, and not
// before.
func TestStreamSlowWrites(t *testing.T) {
	const size = 5*writePiece + 1
	for _, c := range []struct {
		takes []int64       // one after each 50 seconds
		ends  time.Duration // of the write
		fails bool
	}{
		{[]int64{writePiece, writePiece, writePiece, writePiece, writePiece, 1}, 300 * time.Second, false},
		{[]int64{size}, 50 * time.Second, false},
		{nil, time.Minute, true},
		{[]int64{writePiece - 1}, time.Minute, true},
		{[]int64{writePiece}, 2 * time.Minute, true},
		{[]int64{writePiece, 2 * writePiece}, 3 * time.Minute, true},
	} {
		synctest.Test(t, func(t *testing.T) {
			ours, theirs := net.Pipe()
			defer ours.Close()
			defer theirs.Close()
			go func() {
				for _, n := range c.takes {
					time.Sleep(50 * time.Second)
					_, _ = io.CopyN(io.Discard, theirs, n) // which the other side would notice
				}
			}()
			start, want := time.Now(), int64(0)
			for _, n := range c.takes {
				want += n
			}
			n, err := (&stream{Conn: ours, idle: time.Minute}).Write(make([]byte, size))
			if int64(n) != want || c.fails != errors.Is(err, os.ErrDeadlineExceeded) || !c.fails && err != nil {
				t.Errorf("a peer that takes %v: %d bytes written, error %v", c.takes, n, err)
			}
			if took := time.Since(start); took != c.ends {
				t.Errorf("a peer that takes %v: ended after %v, want %v", c.takes, took, c.ends)
			}
		})
	}
}

// An interrupt lasts: the next call does not begin to wait again.
func TestStreamInterrupt(t *testing.T) {
	for _, idle := range []time.Duration{0, time.Hour} {
		done := make(chan struct{})
		takeover(t, idle, func(c *stream) {
			defer close(done)
			if _, err := io.ReadFull(c, make([]byte, len("body without a length"))); err != nil {
				t.Error(err)
			}
			c.interrupt()
			for range 2 {
				if _, err := c.Read(make([]byte, 1)); !errors.Is(err, os.ErrDeadlineExceeded) {
					t.Errorf("idle %v: Read says %v", idle, err)
				}
				if _, err := c.Write([]byte("x")); !errors.Is(err, os.ErrDeadlineExceeded) {
					t.Errorf("idle %v: Write says %v", idle, err)
				}
			}
			_ = c.Abort()
		})
		<-done
	}
}

func TestActivityWait(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var a activity
		if !a.wait(t.Context()) {
			t.Error("nothing runs, yet wait says otherwise")
		}
		a.enter()
		a.enter()
		waited := make(chan bool)
		for range 2 {
			go func() { waited <- a.wait(t.Context()) }()
		}
		synctest.Wait()
		a.leave()
		synctest.Wait()
		select {
		case <-waited:
			t.Error("wait ended with a handler still running")
		default:
		}
		a.leave()
		for range 2 {
			if !<-waited {
				t.Error("wait gave up")
			}
		}
	})
}
