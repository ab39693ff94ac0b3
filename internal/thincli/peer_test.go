package thincli

import (
	"bufio"
	"bytes"
	"context"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
)

// peer plays the server against a client: it answers the client's
// connections, in order, with its handlers.
type peer struct {
	t       *testing.T
	ln      net.Listener
	dir     string
	rc      string
	environ map[string]string
	stdin   string
	stdout  syncBuffer
	stderr  syncBuffer

	mu     sync.Mutex
	dialed []string
	served sync.WaitGroup
}

// syncBuffer is a buffer that others may look at while it is written to.
type syncBuffer struct {
	mu      sync.Mutex
	b       bytes.Buffer
	written func(all string) // called after each write
}

func (s *syncBuffer) Write(p []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.b.Write(p)
	if s.written != nil {
		s.written(s.b.String())
	}
	return len(p), nil
}

func (s *syncBuffer) String() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.b.String()
}

func newPeer(t *testing.T, handlers ...func(*wire)) *peer {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	p := &peer{t: t, ln: ln, dir: t.TempDir(), environ: map[string]string{}}
	p.served.Go(func() {
		for _, h := range handlers {
			conn, err := ln.Accept()
			if err != nil {
				return
			}
			p.served.Go(func() {
				defer conn.Close()
				h(&wire{t: t, Conn: conn, r: bufio.NewReader(conn)})
			})
		}
	})
	t.Cleanup(func() {
		ln.Close()
		p.served.Wait()
	})
	return p
}

// run runs the client and waits for all handlers.
func (p *peer) run(args ...string) int {
	p.t.Helper()
	home := p.t.TempDir()
	if p.rc != "" {
		if err := os.WriteFile(filepath.Join(home, ".xe"), []byte(p.rc), 0o600); err != nil {
			p.t.Fatal(err)
		}
	}
	env := Env{
		Stdin:  strings.NewReader(p.stdin),
		Stdout: &p.stdout,
		Stderr: &p.stderr,
		Dir:    p.dir,
		Getenv: func(k string) string {
			if k == "HOME" {
				return home
			}
			return p.environ[k]
		},
		Dial: func(ctx context.Context, network, address string) (net.Conn, error) {
			if network == "unix" {
				return nil, os.ErrNotExist
			}
			p.mu.Lock()
			p.dialed = append(p.dialed, address)
			p.mu.Unlock()
			return new(net.Dialer).DialContext(ctx, "tcp", p.ln.Addr().String())
		},
	}
	code := Run(p.t.Context(), env, args)
	p.ln.Close()
	p.served.Wait()
	return code
}

func (p *peer) check(code, wantCode int, stdout, stderr string) {
	p.t.Helper()
	if code != wantCode {
		p.t.Errorf("exit code %d, want %d", code, wantCode)
	}
	if got := p.stdout.String(); got != stdout {
		p.t.Errorf("stdout %q, want %q", got, stdout)
	}
	if got := p.stderr.String(); got != stderr {
		p.t.Errorf("stderr %q, want %q", got, stderr)
	}
}

// wire is the server's end of a connection, byte by byte.
type wire struct {
	t *testing.T
	net.Conn
	r *bufio.Reader
}

func (w *wire) send(parts ...any) {
	w.t.Helper()
	var b []byte
	for _, p := range parts {
		switch p := p.(type) {
		case Message:
			b = AppendMessage(b, p)
		case []byte:
			b = append(b, p...)
		case string:
			b = append(b, p...)
		}
	}
	if _, err := w.Write(b); err != nil {
		w.t.Errorf("peer: %v", err)
	}
}

// expect reads exactly these bytes.
func (w *wire) expect(want []byte) {
	w.t.Helper()
	got := make([]byte, len(want))
	n, err := io.ReadFull(w.r, got)
	if err != nil || !bytes.Equal(got, want) {
		w.t.Errorf("peer read %q, %v, want %q", got[:n], err, want)
	}
}

func (w *wire) expectMessage(m Message) {
	w.t.Helper()
	w.expect(AppendMessage(nil, m))
}

// expectEnd reads up to the client's end of the connection.
func (w *wire) expectEnd() {
	w.t.Helper()
	if rest, err := io.ReadAll(w.r); len(rest) > 0 {
		w.t.Errorf("peer read %q, %v, want the end", rest, err)
	}
}

// head reads up to and including an empty line.
func (w *wire) head() string {
	w.t.Helper()
	var b strings.Builder
	for {
		line, err := w.r.ReadString('\n')
		b.WriteString(line)
		if err != nil {
			w.t.Errorf("peer: %v after %q", err, b.String())
			return b.String()
		}
		if line == "\r\n" {
			return b.String()
		}
	}
}

// hello reads a request, exchanges banners and returns the request's body.
func (w *wire) hello() string {
	w.t.Helper()
	head := w.head()
	_, length, _ := strings.Cut(head, "content-length: ")
	var n int
	for _, c := range strings.TrimSpace(length) {
		n = n*10 + int(c-'0')
	}
	body := make([]byte, n)
	if _, err := io.ReadFull(w.r, body); err != nil {
		w.t.Errorf("peer: %v", err)
	}
	w.send(appendBanner(nil))
	w.expect(appendBanner(nil))
	return string(body)
}
