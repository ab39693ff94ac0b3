package nbd

import (
	"bufio"
	"bytes"
	"context"
	"io"
	"sync/atomic"
	"testing"
	"time"

	"coppice/internal/storage"
)

// slowFlush takes its time for a flush, or, once it is shut, for ever.
type slowFlush struct {
	storage.Volume
	shut    atomic.Bool
	entered chan struct{}
	gate    chan struct{}
}

func (s *slowFlush) Flush(ctx context.Context) error {
	if s.shut.Load() {
		s.entered <- struct{}{}
		<-s.gate
		return nil
	}
	for begun := time.Now(); time.Since(begun) < worth(classSync); {
	}
	return s.Volume.Flush(ctx)
}

// TestAlone has a client that has waited for each flush send a request behind
// one that never ends.
func TestAlone(t *testing.T) {
	_, v := newVolume(t, 1<<20)
	dev := &slowFlush{Volume: v, entered: make(chan struct{}), gate: make(chan struct{})}
	r := newRig(t, map[string]*Export{"disk": {Device: dev}}, Options{}, nil)
	c := r.connect(wireStructured, "disk")
	for range 2 * aloneFrom {
		if err := c.Flush(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	dev.shut.Store(true)
	flushed := make(chan error, 1)
	go func() { flushed <- c.Flush(t.Context()) }()
	<-dev.entered
	if _, err := c.ReadAt(make([]byte, 512), 0); err != nil {
		t.Errorf("read behind a flush that does not end: %v", err)
	}
	close(dev.gate)
	if err := <-flushed; err != nil {
		t.Error(err)
	}
}

// TestSendingBothWays has a client send more than the host buffers before it
// takes the replies, which are more than that as well.
func TestSendingBothWays(t *testing.T) {
	_, v := newVolume(t, 32<<20)
	data := noise(8 << 20)
	if _, err := v.WriteAt(data, 0); err != nil {
		t.Fatal(err)
	}
	r := newRig(t, map[string]*Export{"disk": {Device: v}}, Options{}, nil)
	nc := r.dial()
	defer nc.Close()
	if err := handshakeByHand(nc, "disk"); err != nil {
		t.Fatal(err)
	}
	var out []byte
	for i := range 8 {
		out = wireSimple.appendRequest(out, request{cmd: cmdRead, cookie: uint64(i), off: uint64(i) << 20, length: 1 << 20})
	}
	out = append(wireSimple.appendRequest(out, request{cmd: cmdWrite, cookie: 8, off: 16 << 20, length: 8 << 20}), data...)
	if _, err := nc.Write(out); err != nil {
		t.Fatal(err)
	}
	in := bufio.NewReader(nc)
	for range 9 {
		var head [simpleReplySize]byte
		if _, err := io.ReadFull(in, head[:]); err != nil {
			t.Fatal(err)
		}
		i := int(head[15])
		if !bytes.Equal(head[:15], appendSimple(nil, 0, 0)[:15]) || i > 8 {
			t.Fatalf("reply %x", head)
		}
		if i == 8 {
			continue
		}
		got := make([]byte, 1<<20)
		if _, err := io.ReadFull(in, got); err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(got, data[i<<20:(i+1)<<20]) {
			t.Errorf("read %d returned something else", i)
		}
	}
	got := make([]byte, len(data))
	if _, err := v.ReadAt(got, 16<<20); err != nil || !bytes.Equal(got, data) {
		t.Errorf("what was written is not there: %v", err)
	}
}
