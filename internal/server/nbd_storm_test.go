package server

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"slices"
	"sync"
	"sync/atomic"
	"testing"

	"coppice/internal/nbd"
	"coppice/internal/rpc"
	"coppice/internal/xapi"
)

const (
	lane  = 64   // blocks of a writer
	lanes = 4    // writers
	brick = 4096 // bytes of a block
)

// laneWriter writes to its own blocks, one after the other and round again. Write
// n, counted from 1, puts n into block (n-1) mod lane.
type laneWriter struct {
	index int
	acked atomic.Uint64 // the last write that was answered
	after chan struct{} // gets a token behind it, if there is room
}

func (w *laneWriter) offset(n uint64) int64 {
	return (int64(w.index)*lane + int64((n-1)%lane)) * brick
}

// run writes until the client is cut off or done is closed.
func (w *laneWriter) run(c *nbd.Client, done <-chan struct{}) error {
	p := make([]byte, brick)
	for n := w.acked.Load() + 1; ; n++ {
		select {
		case <-done:
			return nil
		default:
		}
		for i := 0; i < brick; i += 8 {
			binary.LittleEndian.PutUint64(p[i:], n)
		}
		if _, err := c.WriteAt(p, w.offset(n)); err != nil {
			return err
		}
		w.acked.Store(n)
		select {
		case w.after <- struct{}{}:
		default:
		}
	}
}

// check reads the blocks of the writer: they must be what there was after some
// write from min on, without a gap.
func (w *laneWriter) check(d io.ReaderAt, least uint64) error {
	p := make([]byte, lane*brick)
	if _, err := d.ReadAt(p, int64(w.index)*lane*brick); err != nil {
		return err
	}
	var seen [lane]uint64
	for b := range seen {
		one := p[b*brick : (b+1)*brick]
		seen[b] = binary.LittleEndian.Uint64(one)
		if !bytes.Equal(one, bytes.Repeat(one[:8], brick/8)) {
			return fmt.Errorf("writer %d: block %d is a mixture", w.index, b)
		}
	}
	last := slices.Max(seen[:])
	if last < least {
		return fmt.Errorf("writer %d: write %d is the last one there, %d was answered", w.index, last, least)
	}
	for b, n := range seen {
		// The last write to block b of those up to last.
		want := uint64(0)
		if k := uint64(b) + 1; last >= k {
			want = last - (last-k)%lane
		}
		if n != want {
			return fmt.Errorf("writer %d: block %d holds write %d beside write %d, want %d", w.index, b, n, last, want)
		}
	}
	return nil
}

// storm is writers on one disk.
type storm struct {
	writers [lanes]laneWriter
	done    chan struct{}
	running sync.WaitGroup
	ended   [lanes]error
}

// start has each writer write on a connection of its own.
func (s *storm) start(open func() *nbd.Client) {
	s.done = make(chan struct{})
	for i := range s.writers {
		w := &s.writers[i]
		w.index, w.after = i, make(chan struct{}, 1)
		c := open()
		s.running.Go(func() {
			s.ended[i] = w.run(c, s.done)
			c.Abort()
		})
	}
}

// end stops the writers and returns the first error.
func (s *storm) end() error {
	close(s.done)
	s.running.Wait()
	return errors.Join(s.ended[:]...)
}

// answered returns what has been answered to each writer.
func (s *storm) answered() (n [lanes]uint64) {
	for i := range s.writers {
		n[i] = s.writers[i].acked.Load()
	}
	return n
}

// more waits until each writer has been answered n more writes.
func (s *storm) more(t *testing.T, n uint64) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	from := s.answered()
	for i := range s.writers {
		for s.writers[i].acked.Load() < from[i]+n {
			select {
			case <-s.writers[i].after:
			case <-ctx.Done():
				t.Fatalf("writer %d stands still", i)
			}
		}
	}
}

func (s *storm) check(t *testing.T, what string, d io.ReaderAt, least [lanes]uint64) {
	t.Helper()
	for i := range s.writers {
		if err := s.writers[i].check(d, least[i]); err != nil {
			t.Errorf("%s: %v", what, err)
		}
	}
}

// wantCode calls a method that must be refused.
func (r *faultRig) wantCode(code, method string, params ...any) {
	r.t.Helper()
	_, err := r.call(method, append([]any{r.session}, params...)...)
	if f, ok := errors.AsType[*rpc.Fault](err); !ok || f.Code != code {
		r.t.Errorf("%s: %v, want %s", method, err, code)
	}
}

// TestNBDBesideOperations does to a disk what the API offers while clients
// write to it. Copies show one instant, and nothing that was answered before
// is missing in them; what would pull the disk away is refused.
func TestNBDBesideOperations(t *testing.T) {
	r := newFaultRig(t, &faultHost{options: smallRegions()})
	sr := r.defaultSR()
	ref, uuid := r.newDisk(sr, 8<<20)
	r.must("VDI.enable_cbt", ref)
	old := r.must("VDI.snapshot", ref).(string)
	s := &storm{}
	s.start(func() *nbd.Client { return r.open("rw/" + uuid) })
	s.more(t, 10)
	for round := range 4 {
		for _, method := range []string{"VDI.snapshot", "VDI.clone"} {
			before := s.answered()
			copied := r.must(method, ref).(string)
			id := r.must("VDI.get_uuid", copied).(string)
			c := r.open(id)
			s.check(t, fmt.Sprintf("%s %d", method, round), c, before)
			if round%2 == 0 {
				continue // goes on being read while the disk is written to
			}
			if err := c.Close(); err != nil {
				t.Error(err)
			}
			r.must("VDI.destroy", copied)
		}
		r.wantCode(xapi.ErrVDIInUse, "VDI.destroy", ref)
		r.wantCode(xapi.ErrVDIInUse, "VDI.resize", ref, "16777216")
		r.must("VDI.set_name_label", ref, fmt.Sprint("round ", round))
		s.more(t, 5)
	}
	r.wantCode(xapi.ErrVDIInUse, "VDI.forget", ref)
	r.wantCode(xapi.ErrSRHasPBD, "SR.forget", sr)
	r.wantCode(xapi.ErrSRHasPBD, "SR.destroy", sr)
	for _, pbd := range r.must("SR.get_PBDs", sr).([]any) {
		r.wantCode(xapi.ErrVDIInUse, "PBD.unplug", pbd)
	}
	r.wantCode(xapi.ErrVDIInUse, "VDI.revert", old)
	// Who has a snapshot attached keeps what it showed; who comes later is told
	// that it is gone, and can still compare with it.
	oldUUID := r.must("VDI.get_uuid", old).(string)
	reader := r.open(oldUUID)
	r.must("VDI.data_destroy", old)
	got := make([]byte, 1<<20)
	if _, err := reader.ReadAt(got, 0); err != nil || !bytes.Equal(got, make([]byte, 1<<20)) {
		t.Errorf("read of a snapshot that was attached before its data went: %v", err)
	}
	_, err := r.onSocket(t).Go(oldUUID)
	wantRefusal(t, "a disk without data", err, nbd.ErrPolicy)
	d := r.onSocket(t)
	if err := d.Structured(); err != nil {
		t.Fatal(err)
	}
	if names, err := d.SetContexts("rw/"+uuid, "coppice:changed:"+oldUUID); err != nil || len(names) != 1 {
		t.Errorf("contexts %q, %v", names, err)
	}
	if err := s.end(); err != nil {
		t.Fatalf("a writer was cut off: %v", err)
	}
	s.check(t, "the disk itself", r.open(uuid), s.answered())
	r.close()
	r.host.check(t)
}

// TestNBDLogoutBesideWrites ends a session while its clients write. They are cut
// off, everything that was answered is there, and the disk is free.
func TestNBDLogoutBesideWrites(t *testing.T) {
	r := newFaultRig(t, &faultHost{options: smallRegions()})
	ref, uuid := r.newDisk(r.defaultSR(), 8<<20)
	s := &storm{}
	for round := range 3 {
		session := r.login(t)
		s.start(func() *nbd.Client {
			d := r.overTLS(t)
			if round%2 == 0 {
				if err := d.Structured(); err != nil {
					t.Fatal(err)
				}
			}
			c, err := d.Go("rw/" + uuid + "?session_id=" + session)
			if err != nil {
				t.Fatal(err)
			}
			return c
		})
		s.more(t, 20)
		if _, err := r.call("session.logout", session); err != nil {
			t.Fatal(err)
		}
		s.running.Wait()
		for i, err := range s.ended {
			if !errors.Is(err, nbd.ErrDisconnected) {
				t.Errorf("writer %d after the logout: %v", i, err)
			}
		}
		// A write that was not answered may have been done. The next round
		// begins with it.
		c := r.open("rw/" + uuid)
		s.check(t, "after the logout", c, s.answered())
		if err := c.Close(); err != nil {
			t.Error(err)
		}
	}
	r.must("VDI.destroy", ref)
}

// TestNBDStopBesideWrites stops the server while clients write: each write is
// answered or the connection ends, and what was answered is there after the
// next start.
func TestNBDStopBesideWrites(t *testing.T) {
	r := newFaultRig(t, &faultHost{options: smallRegions()})
	_, uuid := r.newDisk(r.defaultSR(), 8<<20)
	s := &storm{}
	s.start(func() *nbd.Client { return r.open("rw/" + uuid) })
	idle := r.open(uuid)
	s.more(t, 20)
	r.close()
	s.running.Wait()
	for i, err := range append(s.ended[:], func() error { _, err := idle.ReadAt(make([]byte, 1), 0); return err }()) {
		if !errors.Is(err, nbd.ErrDisconnected) {
			t.Errorf("client %d after the stop: %v", i, err)
		}
	}
	r.host.cutPower() // the stop has made everything durable
	r.host.check(t)
	r.start()
	s.check(t, "after the next start", r.open(uuid), s.answered())
}
