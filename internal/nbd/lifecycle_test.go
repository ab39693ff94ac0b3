package nbd

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/binary"
	"errors"
	"io"
	"math/big"
	"net"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"coppice/internal/storage"
)

// testTLS returns a server's and a client's configuration.
func testTLS(t *testing.T) (server, client *tls.Config) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	now := time.Now()
	tmpl := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "nbd"}, DNSNames: []string{"nbd"},
		NotBefore: now.Add(-time.Hour), NotAfter: now.Add(time.Hour),
	}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, tmpl, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	leaf, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	pool := x509.NewCertPool()
	pool.AddCert(leaf)
	return &tls.Config{Certificates: []tls.Certificate{{Certificate: [][]byte{der}, PrivateKey: key}}},
		&tls.Config{RootCAs: pool, ServerName: "nbd"}
}

func TestTLS(t *testing.T) {
	_, v := newVolume(t, 8<<20)
	server, client := testTLS(t)
	r := newRig(t, map[string]*Export{"disk": {Device: v}}, Options{}, server)
	d := r.begin()
	for _, do := range []func() error{
		d.Structured, d.Extended,
		func() error { _, err := d.List(); return err },
		func() error { _, err := d.Info("disk"); return err },
		func() error { _, err := d.Go("disk"); return err },
		func() error { _, err := d.SetContexts("disk", ContextAllocation); return err },
		func() error { _, err := d.Option(99, nil); return err },
	} {
		wantRefusal(t, "in the clear", do(), repErrTLSRequired)
	}
	if err := d.StartTLS(t.Context(), client); err != nil {
		t.Fatal(err)
	}
	wantRefusal(t, "again", d.StartTLS(t.Context(), client), repErrInvalid)
	upgrade(t, d, wireStructured)
	c, err := d.Go("disk")
	if err != nil {
		t.Fatal(err)
	}
	p := make([]byte, 5<<20)
	if _, err := rand.Read(p); err != nil {
		t.Fatal(err)
	}
	if _, err := c.WriteAt(p, 100); err != nil {
		t.Fatal(err)
	}
	got := make([]byte, len(p))
	if _, err := c.ReadAt(got, 100); err != nil || string(got) != string(p) {
		t.Errorf("read over TLS: %v", err)
	}
	if err := c.Close(); err != nil {
		t.Error(err)
	}

	// The end is said over TLS, in either phase.
	for phase, end := range map[string]func(d *Dialogue) error{
		"negotiation": func(d *Dialogue) error { _, err := d.Option(optAbort, nil); return err },
		"transmission": func(d *Dialogue) error {
			if _, err := d.info(optGo, "disk"); err != nil {
				return err
			}
			_, err := d.nc.Write(wireSimple.appendRequest(nil, request{cmd: cmdDisconnect}))
			return err
		},
	} {
		d := r.begin()
		if err := d.StartTLS(t.Context(), client); err != nil {
			t.Fatal(err)
		}
		if err := end(d); err != nil {
			t.Errorf("%s: %v", phase, err)
		}
		if _, err := d.in.ReadByte(); err != io.EOF {
			t.Errorf("%s: %v behind the last answer, want the end of TLS", phase, err)
		}
		d.nc.Close()
	}

	d = r.begin()
	if _, err := d.ExportName("disk"); !errors.Is(err, io.EOF) {
		t.Errorf("export in the clear: %v, want the end", err)
	}
	// An option smuggled in behind STARTTLS is not taken for one said over TLS.
	nc := r.dial()
	defer nc.Close()
	if _, err := Begin(nc); err != nil {
		t.Fatal(err)
	}
	var b []byte
	for _, opt := range []uint32{optStartTLS, optStructuredReply} {
		b = binary.BigEndian.AppendUint64(b, magicOption)
		b = binary.BigEndian.AppendUint64(b, uint64(opt)<<32)
	}
	if _, err := nc.Write(b); err != nil {
		t.Fatal(err)
	}
	if n, err := nc.Read(make([]byte, 100)); err == nil {
		t.Errorf("%d bytes answer to a smuggled option", n)
	}
}

// slow blocks reads at 0 until it is let go.
type slow struct {
	storage.Volume
	gate    chan struct{}
	entered atomic.Int32
}

func (s *slow) ReadAt(p []byte, off int64) (int, error) {
	if off == 0 {
		s.entered.Add(1)
		<-s.gate
	}
	return s.Volume.ReadAt(p, off)
}

// TestSlowRequest has others overtake a request that takes for ever.
func TestSlowRequest(t *testing.T) {
	_, v := newVolume(t, 1<<20)
	dev := &slow{Volume: v, gate: make(chan struct{})}
	overPipe(t, &shelf{exports: map[string]*Export{"": {Device: dev}}}, Options{}, func(s *Server, nc net.Conn) {
		dev.gate = make(chan struct{})
		d, err := Begin(nc)
		if err != nil {
			t.Fatal(err)
		}
		c, err := d.Go("")
		if err != nil {
			t.Fatal(err)
		}
		for range maxFlying - 1 {
			if _, err := c.send(request{cmd: cmdRead, length: 512}, nil, make([]byte, 512)); err != nil {
				t.Fatal(err)
			}
			if _, err := c.ReadAt(make([]byte, 512), 4096); err != nil {
				t.Fatal(err)
			}
		}
		if n := dev.entered.Load(); n != maxFlying-1 {
			t.Errorf("%d requests are being worked on, want %d", n, maxFlying-1)
		}
		close(dev.gate)
		if _, err := c.ReadAt(make([]byte, 512), 0); err != nil {
			t.Error(err)
		}
		synctest.Wait()
		c.mu.Lock()
		if n := len(c.waiting); n != 0 {
			t.Errorf("%d requests were never answered", n)
		}
		c.mu.Unlock()
		c.Abort()
		if left := s.memory.left.Load(); left != DefaultMemory {
			t.Errorf("%d bytes of the budget are lost", DefaultMemory-left)
		}
	})
}

// slowWrites takes its time for writes at 0, and for ever for others until it
// is let go.
type slowWrites struct {
	slow
}

func (s *slowWrites) WriteAt(p []byte, off int64) (int, error) {
	if off == 0 {
		time.Sleep(time.Millisecond)
	} else {
		s.entered.Add(1)
		<-s.gate
	}
	return s.Volume.WriteAt(p, off)
}

// TestMemoryOfSlowWrites has short writes held up: there are no more of them
// under way than the memory that they really take allows.
func TestMemoryOfSlowWrites(t *testing.T) {
	_, v := newVolume(t, 1<<20)
	dev := &slowWrites{slow{Volume: v}}
	const buffers, memory = 5, 5 * (headroom + smallSize)
	overPipe(t, &shelf{exports: map[string]*Export{"": {Device: dev}}}, Options{Memory: memory}, func(s *Server, nc net.Conn) {
		dev.gate = make(chan struct{})
		d, err := Begin(nc)
		if err != nil {
			t.Fatal(err)
		}
		c, err := d.Go("")
		if err != nil {
			t.Fatal(err)
		}
		p := make([]byte, 512)
		for range 20 { // until they are expected to be slow
			if _, err := c.WriteAt(p, 0); err != nil {
				t.Fatal(err)
			}
		}
		sent := make(chan error)
		go func() {
			for range 4 * buffers {
				if _, err := c.send(request{cmd: cmdWrite, off: 4096, length: 512}, p, nil); err != nil {
					sent <- err
					return
				}
			}
			_, err := c.WriteAt(p, 8192)
			sent <- err
		}()
		time.Sleep(time.Second)
		if n := dev.entered.Load(); n != buffers+1 { // and the one that every connection may have
			t.Errorf("%d writes are under way, want %d", n, buffers+1)
		}
		close(dev.gate)
		if err := <-sent; err != nil {
			t.Error(err)
		}
		c.Abort()
		synctest.Wait()
		if left := s.memory.left.Load(); left != memory {
			t.Errorf("%d bytes of the budget of %d are left", left, memory)
		}
	})
}

func TestHandshakeTimeout(t *testing.T) {
	_, v := newVolume(t, 1<<20)
	b := &shelf{exports: map[string]*Export{"": {Device: v}}}
	overPipe(t, b, Options{}, func(s *Server, nc net.Conn) {
		d, err := Begin(nc)
		if err != nil {
			t.Fatal(err)
		}
		begun := time.Now()
		const pause = 700 * time.Millisecond // never at the same instant as the end
		for err == nil {                     // a client that keeps talking gets no further
			time.Sleep(pause)
			_, err = d.List()
		}
		if took := time.Since(begun); took < DefaultHandshakeTimeout || took > DefaultHandshakeTimeout+pause {
			t.Errorf("the handshake was cut before %v, want %v", took, DefaultHandshakeTimeout)
		}
	})
	overPipe(t, b, Options{}, func(s *Server, nc net.Conn) {
		d, err := Begin(nc)
		if err != nil {
			t.Fatal(err)
		}
		c, err := d.Go("")
		if err != nil {
			t.Fatal(err)
		}
		time.Sleep(48 * time.Hour) // a disk may be idle
		if _, err := c.ReadAt(make([]byte, 5), 5); err != nil {
			t.Errorf("after two idle days: %v", err)
		}
		c.Abort()
	})
}

func TestShutdown(t *testing.T) {
	_, v := newVolume(t, 1<<20)
	dev := &slow{Volume: v}
	b := &shelf{exports: map[string]*Export{"": {Device: dev}}}
	overPipe(t, b, Options{}, func(s *Server, nc net.Conn) {
		dev.gate = make(chan struct{})
		d, err := Begin(nc)
		if err != nil {
			t.Fatal(err)
		}
		c, err := d.Go("")
		if err != nil {
			t.Fatal(err)
		}
		p, err := c.send(request{cmd: cmdRead, length: 512}, nil, make([]byte, 512))
		if err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Second)
		done := make(chan error, 1)
		go func() {
			ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
			defer cancel()
			done <- s.Shutdown(ctx)
		}()
		time.Sleep(time.Second)
		close(dev.gate)
		<-p.done
		if p.err != nil || p.errno != 0 {
			t.Errorf("a request that was being worked on: %v, %v", p.err, p.errno)
		}
		if err := <-done; err != nil {
			t.Errorf("shutdown: %v", err)
		}
		if _, err := c.ReadAt(make([]byte, 1), 5); !errors.Is(err, ErrDisconnected) {
			t.Errorf("after the shutdown: %v", err)
		}
		if o, c := b.opened.Load(), b.closed.Load(); o != c {
			t.Errorf("%d exports opened and %d closed", o, c)
		}
		c.Abort()
	})
}

// TestExportEnds has the permission to use an export withdrawn.
func TestExportEnds(t *testing.T) {
	_, v := newVolume(t, 1<<20)
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithCancel(context.Background())
		b := &shelf{exports: map[string]*Export{"": {Device: v, Context: ctx}}}
		s := NewServer(Options{Backend: func(net.Conn) Backend { return b }})
		here, there := net.Pipe()
		go s.ServeConn(there, nil)
		d, err := Begin(here)
		if err != nil {
			t.Fatal(err)
		}
		c, err := d.Go("")
		if err != nil {
			t.Fatal(err)
		}
		if _, err := c.ReadAt(make([]byte, 1), 0); err != nil {
			t.Fatal(err)
		}
		cancel()
		synctest.Wait()
		if _, err := c.ReadAt(make([]byte, 1), 0); !errors.Is(err, ErrDisconnected) {
			t.Errorf("read after the end: %v", err)
		}
		if n := b.closed.Load(); n != 1 {
			t.Errorf("the export was closed %d times", n)
		}
		c.Abort()
	})
}

// TestExportEndsStalled has the permission withdrawn from a client that does
// not take its replies: nobody waits for it for ever.
func TestExportEndsStalled(t *testing.T) {
	_, v := newVolume(t, 1<<20)
	for _, w := range []wire{wireSimple, wireStructured} {
		for _, length := range []uint64{512, 1 << 20} {
			synctest.Test(t, func(t *testing.T) {
				ctx, cancel := context.WithCancel(context.Background())
				b := &shelf{exports: map[string]*Export{"": {Device: v, Context: ctx}}}
				s := NewServer(Options{Backend: func(net.Conn) Backend { return b }})
				here, there := net.Pipe()
				defer here.Close()
				ended := make(chan struct{})
				go func() {
					s.ServeConn(there, nil)
					close(ended)
				}()
				d, err := Begin(here)
				if err != nil {
					t.Fatal(err)
				}
				upgrade(t, d, w)
				if _, err := d.info(optGo, ""); err != nil {
					t.Fatal(err)
				}
				if _, err := here.Write(w.appendRequest(nil, request{cmd: cmdRead, length: length})); err != nil {
					t.Fatal(err)
				}
				synctest.Wait()
				cancel()
				select {
				case <-ended:
				case <-time.After(time.Hour):
					t.Errorf("wire %d: the client is still waited for", w)
					here.Close()
					<-ended
				}
				if n := b.closed.Load(); n != 1 {
					t.Errorf("the export was closed %d times", n)
				}
			})
		}
	}
}

// TestManyClients has a hundred at once, some of which stall, break off or
// talk nonsense.
func TestManyClients(t *testing.T) {
	_, v := newVolume(t, 64<<20)
	r := newRig(t, map[string]*Export{"disk": {Device: v}}, Options{MaxConns: 100}, nil)
	var stalled []net.Conn
	for i := range 20 {
		nc := r.dial()
		stalled = append(stalled, nc)
		d, err := Begin(nc)
		if err != nil {
			t.Fatal(err)
		}
		if i%2 == 0 {
			continue // in the middle of the handshake
		}
		c, err := d.Go("disk")
		if err != nil {
			t.Fatal(err)
		}
		c.nc.Write(c.wire.appendRequest(nil, request{cmd: cmdWrite, length: 1 << 20})[:20+i%8])
	}
	var wg sync.WaitGroup
	for i := range 80 {
		c := r.connect(wire(i%3), "disk")
		wg.Go(func() {
			b := make([]byte, 100<<10)
			for k := range 20 {
				if _, err := c.WriteAt(b, int64(i+k)<<16); err != nil {
					t.Error(err)
				}
				if _, err := c.ReadAt(b, int64(i+k)<<16); err != nil {
					t.Error(err)
				}
			}
		})
	}
	nc := r.dial()
	if _, err := Begin(nc); err == nil {
		t.Error("one client too many was let in")
	}
	nc.Close()
	wg.Wait()
	for _, nc := range stalled {
		nc.Close()
	}
}
