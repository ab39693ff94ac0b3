package thincli

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
)

func TestReadArgs(t *testing.T) {
	for _, tc := range []struct {
		body string
		want []string
	}{
		{"", nil},
		{"vdi-list\nusername=root\npassword=", []string{"vdi-list", "username=root", "password="}},
		{"a\r\nb\r\n", []string{"a", "b", ""}},
	} {
		got, err := ReadArgs(strings.NewReader(tc.body+"beyond"), int64(len(tc.body)))
		if diff := cmp.Diff(tc.want, got); diff != "" || err != nil {
			t.Errorf("%q: %v (-want +got)\n%s", tc.body, err, diff)
		}
	}
	for _, length := range []int64{-1, maxArgs + 1} {
		if _, err := ReadArgs(strings.NewReader(""), length); !errors.Is(err, ErrProtocol) {
			t.Errorf("length %d: error %v", length, err)
		}
	}
	if _, err := ReadArgs(strings.NewReader("ab"), 3); !errors.Is(err, io.ErrUnexpectedEOF) {
		t.Errorf("short body: error %v", err)
	}
}

// serve runs fn against a Server while client plays the other end.
func serve(t *testing.T, client func(*wire), fn func(context.Context, *Server)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		here, there := net.Pipe()
		done := make(chan struct{})
		go func() {
			defer close(done)
			defer there.Close()
			w := newWire(t, there)
			w.expect(appendBanner(nil))
			w.send(appendBanner(nil))
			client(w)
		}()
		s, err := Accept(here, nil)
		if err != nil {
			t.Error(err)
			return
		}
		fn(t.Context(), s)
		s.Close()
		<-done
	})
}

func TestServerTransfer(t *testing.T) {
	for _, tc := range []struct {
		name    string
		answers []any
		want    error
	}{
		{"success", []any{OK}, nil},
		{"failure", []any{Failed}, ErrFailed},
		{"heartbeats", []any{Wait, Wait, Wait, OK}, nil},
		{"hung up", nil, ErrGone},
		{"hung up after the answer", []any{Failed}, ErrFailed},
		{"speaks out of turn", []any{End{}}, ErrGone},
		{"sends a command", []any{Print{"x"}}, ErrGone},
		{"sends a huge frame", []any{unhex("ffffffff")}, ErrGone},
	} {
		t.Run(tc.name, func(t *testing.T) {
			serve(t, func(w *wire) {
				w.expectMessage(HTTPPut{"f", "/x"})
				w.send(tc.answers...)
			}, func(ctx context.Context, s *Server) {
				if err := s.HTTPPut("f", "/x"); err != nil {
					t.Error(err)
				}
				time.Sleep(time.Second)
				if err := s.Wait(ctx); !errors.Is(err, tc.want) {
					t.Errorf("error %v, want %v", err, tc.want)
				}
				<-s.Done()
			})
		})
	}
}

func TestServerWaitCancelled(t *testing.T) {
	boom := errors.New("boom")
	serve(t, func(w *wire) {
		w.expectMessage(HTTPGet{"f", "/x"})
		time.Sleep(time.Minute)
		w.send(OK)
		w.expectMessage(Exit{0})
		w.expectEnd()
	}, func(ctx context.Context, s *Server) {
		if err := s.HTTPGet("f", "/x"); err != nil {
			t.Error(err)
		}
		if err := s.HTTPGet("g", "/y"); !errors.Is(err, ErrProtocol) {
			t.Errorf("second transfer beside the first: error %v", err)
		}
		cancelled, cancel := context.WithCancelCause(ctx)
		cancel(boom)
		if err := s.Wait(cancelled); !errors.Is(err, boom) {
			t.Errorf("error %v, want the cause", err)
		}
		if err := s.Wait(ctx); err != nil {
			t.Errorf("second Wait: %v", err)
		}
		if err := s.Exit(0); err != nil {
			t.Error(err)
		}
		if err := s.Print("x"); !errors.Is(err, ErrProtocol) {
			t.Errorf("Print after Exit: error %v", err)
		}
	})
}

func TestServerLoad(t *testing.T) {
	for _, tc := range []struct {
		name   string
		answer []any
		want   string
		err    error
	}{
		{"one chunk", []any{OK, Chunk{3}, "abc", End{}}, "abc", nil},
		{"several", []any{OK, Chunk{1}, "a", Chunk{0}, Wait, Chunk{2}, "bc", End{}}, "abc", nil},
		{"nothing", []any{OK, End{}}, "", nil},
		{"no file", []any{Failed}, "", ErrFailed},
		{"cut short", []any{OK, Chunk{3}, "ab"}, "", ErrGone},
		{"no response", []any{Chunk{3}, "abc", End{}}, "", ErrGone},
		{"chunk too large", []any{OK, Chunk{maxLoad + 1}, "abc"}, "", ErrGone},
	} {
		t.Run(tc.name, func(t *testing.T) {
			serve(t, func(w *wire) {
				w.expectMessage(Load{"f"})
				w.send(tc.answer...)
			}, func(ctx context.Context, s *Server) {
				got, err := s.Load(ctx, "f")
				if string(got) != tc.want || !errors.Is(err, tc.err) {
					t.Errorf("%q, %v, want %q, %v", got, err, tc.want, tc.err)
				}
			})
		})
	}
}

func TestServerLoadTotal(t *testing.T) {
	serve(t, func(w *wire) {
		w.expectMessage(Load{"f"})
		half := make([]byte, maxLoad/2+1)
		w.send(OK)
		for range 2 {
			w.send(Chunk{uint32(len(half))}, half)
		}
	}, func(ctx context.Context, s *Server) {
		if _, err := s.Load(ctx, "f"); !errors.Is(err, ErrProtocol) {
			t.Errorf("error %v, want a protocol violation", err)
		}
	})
}

func TestServerPrompt(t *testing.T) {
	serve(t, func(w *wire) {
		w.expectMessage(Prompt{})
		w.send(Chunk{3}, "yes", End{})
	}, func(ctx context.Context, s *Server) {
		if got, err := s.Prompt(ctx); got != "yes" || err != nil {
			t.Errorf("%q, %v", got, err)
		}
	})
}

// A client that does not read cannot keep Close from ending things.
func TestServerCloseUnblocks(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		here, there := net.Pipe()
		w := newWire(t, there)
		go func() {
			w.expect(appendBanner(nil))
			w.send(appendBanner(nil))
		}()
		s, err := Accept(here, nil)
		if err != nil {
			t.Fatal(err)
		}
		blocked := make(chan error)
		go func() { blocked <- s.Print("nobody reads this") }()
		synctest.Wait()
		s.Close()
		if err := <-blocked; !errors.Is(err, ErrGone) {
			t.Errorf("error %v, want ErrGone", err)
		}
	})
}

func TestAcceptRefuses(t *testing.T) {
	for _, tc := range []struct {
		name, hello string
		want        error
	}{
		{"silence", "", io.EOF},
		{"half a banner", banner, io.ErrUnexpectedEOF},
		{"another protocol", strings.Repeat("x", bannerLen), ErrProtocol},
		{"another version", banner + "\x01\x00\x00\x00\x02\x00\x00\x00", ErrProtocol},
	} {
		here, there := net.Pipe()
		go func() {
			defer there.Close()
			w := newWire(t, there)
			w.expect(appendBanner(nil))
			w.send(tc.hello)
		}()
		if _, err := Accept(here, nil); !errors.Is(err, tc.want) {
			t.Errorf("%s: error %v, want %v", tc.name, err, tc.want)
		}
	}
}

func TestAcceptTimesOut(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		here, there := net.Pipe()
		defer there.Close()
		go func() { _, _ = io.Copy(io.Discard, there) }()
		if _, err := Accept(here, nil); err == nil {
			t.Error("a client without a banner was accepted")
		}
	})
}

// FuzzServer lets a client say anything while the server waits for a file.
func FuzzServer(f *testing.F) {
	for _, v := range vectors {
		f.Add(unhex(v.bytes))
	}
	f.Add(blob(AppendMessage(nil, OK), []byte("data")))
	f.Add(append(AppendMessage(nil, Wait), AppendMessage(nil, Failed)...))
	f.Fuzz(func(t *testing.T, b []byte) {
		conn := &cannedConn{Reader: io.MultiReader(bytes.NewReader(appendBanner(nil)), bytes.NewReader(b))}
		s, err := Accept(conn, nil)
		if err != nil {
			t.Fatal(err)
		}
		defer s.Close()
		if data, err := s.Load(t.Context(), "f"); err == nil && !bytes.Contains(b, data[:min(len(data), 1)]) {
			t.Fatalf("%q came out of %q", data, b)
		}
	})
}

// cannedConn is a connection whose other end has said everything.
type cannedConn struct {
	io.Reader
	net.Conn
}

func (c *cannedConn) Read(p []byte) (int, error)  { return c.Reader.Read(p) }
func (c *cannedConn) Write(p []byte) (int, error) { return len(p), nil }
func (c *cannedConn) Close() error                { return nil }
func (c *cannedConn) SetDeadline(time.Time) error { return nil }
