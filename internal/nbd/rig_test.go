package nbd

import (
	"context"
	"crypto/tls"
	"fmt"
	"iter"
	"net"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"coppice/internal/storage"
	"coppice/internal/storage/mem"
)

const testDisk = "11111111-2222-4333-8444-555555555555"

// newVolume returns an empty volume of the memory driver.
func newVolume(t testing.TB, size int64) (storage.Repo, storage.Volume) {
	t.Helper()
	repo, err := mem.Driver().Open(context.Background(), nil, true)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := repo.Create(context.Background(), storage.Spec{ID: testDisk, Size: size}); err != nil {
		t.Fatal(err)
	}
	v, err := repo.Open(context.Background(), testDisk, storage.Live)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { v.Close(); repo.Close() })
	return repo, v
}

// shelf is a Backend with fixed exports.
type shelf struct {
	exports map[string]*Export
	hidden  bool
	broken  bool // List fails behind the last name
	opened  atomic.Int32
	closed  atomic.Int32
}

func (s *shelf) List(context.Context) iter.Seq2[string, error] {
	return func(yield func(string, error) bool) {
		if s.hidden {
			yield("", ErrPolicy)
			return
		}
		names := make([]string, 0, len(s.exports))
		for name := range s.exports {
			names = append(names, name)
		}
		slices.Sort(names)
		for _, name := range names {
			if !yield(name, nil) {
				return
			}
		}
		if s.broken {
			yield("", ErrPolicy)
		}
	}
}

func (s *shelf) Describe(_ context.Context, name string) (Description, error) {
	e := s.exports[name]
	if e == nil {
		return Description{}, ErrUnknown
	}
	return Description{e.Size(), e.ReadOnly, "the disk " + name}, nil
}

func (s *shelf) Contexts(_ context.Context, name, query string) ([]string, error) {
	e := s.exports[name]
	if e == nil {
		return nil, ErrUnknown
	}
	var found []string
	for c := range e.Changed {
		if c == query || query == "" || strings.HasSuffix(query, ":") && strings.HasPrefix(c, query) {
			found = append(found, c)
		}
	}
	slices.Sort(found)
	return found, nil
}

func (s *shelf) Open(_ context.Context, name string, contexts []string) (*Export, error) {
	e := s.exports[name]
	if e == nil {
		return nil, ErrUnknown.Because(fmt.Sprintf("no export %q", name))
	}
	s.opened.Add(1)
	x := *e
	x.Close = func() { s.closed.Add(1) }
	return &x, nil
}

// rig is a server on a Unix socket.
type rig struct {
	t      testing.TB
	server *Server
	shelf  *shelf
	socket string
}

func newRig(t testing.TB, exports map[string]*Export, o Options, config *tls.Config) *rig {
	t.Helper()
	r := &rig{t: t, shelf: &shelf{exports: exports}, socket: filepath.Join(t.TempDir(), "nbd.sock")}
	o.Backend = func(net.Conn) Backend { return r.shelf }
	r.server = NewServer(o)
	l, err := net.Listen("unix", r.socket)
	if err != nil {
		t.Fatal(err)
	}
	served := make(chan error, 1)
	go func() { served <- r.server.Serve(l, config) }()
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
		defer cancel()
		if err := r.server.Shutdown(ctx); err != nil {
			t.Errorf("shutdown: %v", err)
		}
		if err := <-served; err != ErrServerClosed {
			t.Errorf("Serve returned %v, want ErrServerClosed", err)
		}
		if o, c := r.shelf.opened.Load(), r.shelf.closed.Load(); o != c {
			t.Errorf("%d exports opened and %d closed", o, c)
		}
	})
	return r
}

func (r *rig) dial() net.Conn {
	r.t.Helper()
	nc, err := net.Dial("unix", r.socket)
	if err != nil {
		r.t.Fatal(err)
	}
	return nc
}

func (r *rig) begin() *Dialogue {
	r.t.Helper()
	d, err := Begin(r.dial())
	if err != nil {
		r.t.Fatal(err)
	}
	return d
}

var wires = map[string]wire{"simple": wireSimple, "structured": wireStructured, "extended": wireExtended}

// upgrade agrees on a wire.
func upgrade(t testing.TB, d *Dialogue, w wire) {
	t.Helper()
	var err error
	switch w {
	case wireStructured:
		err = d.Structured()
	case wireExtended:
		err = d.Extended()
	}
	if err != nil {
		t.Fatal(err)
	}
}

// connect opens an export.
func (r *rig) connect(w wire, name string, contexts ...string) *Client {
	r.t.Helper()
	d := r.begin()
	upgrade(r.t, d, w)
	if len(contexts) > 0 {
		got, err := d.SetContexts(name, contexts...)
		if err != nil || !slices.Equal(got, contexts) {
			r.t.Fatalf("contexts %q, %v, want %q", got, err, contexts)
		}
	}
	c, err := d.Go(name)
	if err != nil {
		r.t.Fatal(err)
	}
	r.t.Cleanup(func() { c.Abort() })
	return c
}

// overPipe runs fn with a server at the other end of a pipe, in a bubble.
func overPipe(t *testing.T, b Backend, o Options, fn func(s *Server, nc net.Conn)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		o.Backend = func(net.Conn) Backend { return b }
		s := NewServer(o)
		here, there := net.Pipe()
		go s.ServeConn(there, nil)
		fn(s, here)
		here.Close()
		synctest.Wait()
		if n := s.Connections(); n != 0 {
			t.Errorf("%d connections are left", n)
		}
	})
}
