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

// heldFlush counts flushes, which take their time, or, once it holds them,
// end when they get an error, or nil, from outcome.
type heldFlush struct {
	storage.Volume
	holds   atomic.Bool
	count   atomic.Int32
	entered chan struct{}
	outcome chan error
}

func (f *heldFlush) Flush(ctx context.Context) error {
	f.count.Add(1)
	if f.holds.Load() {
		f.entered <- struct{}{}
		return <-f.outcome
	}
	for begun := time.Now(); time.Since(begun) < 4*worth(classSync); {
	}
	return f.Volume.Flush(ctx)
}

// burst sends n flushes without waiting for the answers.
func burst(t *testing.T, c *Client, n int) []*pendingCall {
	t.Helper()
	ps := make([]*pendingCall, n)
	for i := range ps {
		var err error
		if ps[i], err = c.send(request{cmd: cmdFlush}, nil, nil); err != nil {
			t.Fatal(err)
		}
	}
	return ps
}

// heldAfter returns a device that holds its flushes, and a client that has sent
// so many bursts of n flushes, each behind a write, and has written since.
func heldAfter(t *testing.T, bursts, n int) (*heldFlush, *Client) {
	_, v := newVolume(t, 1<<20)
	dev := &heldFlush{Volume: v, entered: make(chan struct{}, 64), outcome: make(chan error, 64)}
	r := newRig(t, map[string]*Export{"disk": {Device: dev}}, Options{}, nil)
	c := r.connect(wireStructured, "disk")
	for i := range bursts + 1 {
		if _, err := c.WriteAt([]byte{byte(i)}, 0); err != nil {
			t.Fatal(err)
		}
		if i == bursts {
			break
		}
		for _, p := range burst(t, c, n) {
			if <-p.done; p.errno != 0 {
				t.Fatal(p.errno)
			}
		}
	}
	dev.holds.Store(true)
	dev.count.Store(0)
	return dev, c
}

// TestFlushesTogether sends many flushes while one is in progress: the device
// is asked once more, for all of them, and not before that one has ended.
func TestFlushesTogether(t *testing.T) {
	for _, second := range []error{nil, storage.ErrCorrupt} {
		dev, c := heldAfter(t, aloneFrom/4, 1) // enough to be expected to be slow
		first := burst(t, c, 1)[0]
		<-dev.entered
		rest := burst(t, c, 20)
		// The answer says that what was sent before has been received.
		if _, err := c.ReadAt(make([]byte, 512), 0); err != nil {
			t.Fatal(err)
		}
		dev.outcome <- nil
		<-dev.entered
		if <-first.done; first.errno != 0 {
			t.Errorf("the first flush returned %v", first.errno)
		}
		for _, p := range rest {
			select {
			case <-p.done:
				t.Error("a flush was answered before the device was asked for it")
			default:
			}
		}
		dev.outcome <- second
		for _, p := range rest {
			if <-p.done; (p.errno != 0) != (second != nil) {
				t.Errorf("a flush returned %v, the device %v", p.errno, second)
			}
		}
		if n := dev.count.Load(); n != 2 {
			t.Errorf("the device was flushed %d times instead of 2", n)
		}
	}
}

// TestFlushKept has a client that has sent nothing but flushes beside flushes
// send a read behind one that never ends.
func TestFlushKept(t *testing.T) {
	dev, c := heldAfter(t, 2*aloneFrom, 3)
	ps := burst(t, c, 3)
	<-dev.entered
	if _, err := c.ReadAt(make([]byte, 512), 0); err != nil {
		t.Errorf("read behind a flush that does not end: %v", err)
	}
	for range 3 {
		dev.outcome <- nil // as many as there are flushes at most
	}
	for _, p := range ps {
		if <-p.done; p.errno != 0 {
			t.Error(p.errno)
		}
	}
}
