package server

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"path/filepath"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"

	engine "coppice/internal/cow"
	"coppice/internal/db"
	"coppice/internal/nbd"
	"coppice/internal/rpc"
	"coppice/internal/storage/cow"
	"coppice/internal/vfs"
	"coppice/internal/xapi"
)

// faultHost is the directories of a host in memory, in which calls can be made
// to fail and the power can be cut.
type faultHost struct {
	capacity int64 // bytes of each directory, 0 for no limit
	options  engine.Options

	mu   sync.Mutex
	dirs map[string]*vfs.Mem // by name, the last element of the path

	hook atomic.Pointer[func(dir string, c vfs.Call) error]
}

// smallRegions are stores that grow by 2 MiB.
func smallRegions() engine.Options {
	g := engine.DefaultGeometry()
	g.PageCounters = 64
	return engine.Options{Geometry: g, LogBytes: 2 << 20}
}

// faultyDir is an open directory of a faultHost.
type faultyDir struct{ vfs.FS }

func (faultyDir) Close() error { return nil }

func (h *faultHost) find(path string, _ bool) (cow.Dir, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	name := filepath.Base(path)
	m := h.dirs[name]
	if m == nil {
		m = vfs.NewMem(h.capacity)
		if h.dirs == nil {
			h.dirs = map[string]*vfs.Mem{}
		}
		h.dirs[name] = m
	}
	return faultyDir{vfs.NewInject(m, rand.IntN, func(c vfs.Call) error {
		if hook := h.hook.Load(); hook != nil {
			return (*hook)(name, c)
		}
		return nil
	})}, nil
}

// fail has calls fail for which fn returns an error.
func (h *faultHost) fail(fn func(dir string, c vfs.Call) error) { h.hook.Store(&fn) }

// heal ends that.
func (h *faultHost) heal() { h.hook.Store(nil) }

// cutPower leaves of each directory what a power cut may leave.
func (h *faultHost) cutPower() {
	h.mu.Lock()
	defer h.mu.Unlock()
	for name, m := range h.dirs {
		h.dirs[name] = m.Crash(rand.IntN)
	}
}

// check recounts all stores, which must be closed.
func (h *faultHost) check(t *testing.T) {
	t.Helper()
	h.mu.Lock()
	defer h.mu.Unlock()
	for name, m := range h.dirs {
		for p, err := range engine.Check(t.Context(), m) {
			t.Errorf("store %s: %v, %v", name, p, err)
		}
	}
}

// faultRig is a server for NBD on a faultHost.
type faultRig struct {
	*nbdFixture
	t       *testing.T
	host    *faultHost
	records *db.MemStore
	session string
}

func newFaultRig(t *testing.T, h *faultHost) *faultRig {
	t.Helper()
	r := &faultRig{t: t, host: h, records: db.NewMemStore()}
	r.start()
	return r
}

func (r *faultRig) start() {
	r.t.Helper()
	r.nbdFixture = serveNBD(r.t, startOn(r.t, cow.DriverIn(r.host.find, r.host.options), r.records, 0))
	r.session = r.login(r.t)
}

// must calls a method with the rig's session. The server takes note in its own
// time of clients that have gone, so until then their disks may be in use.
func (r *faultRig) must(method string, params ...any) any {
	r.t.Helper()
	ctx, cancel := context.WithTimeout(r.t.Context(), patience)
	defer cancel()
	for {
		result, err := r.call(method, append([]any{r.session}, params...)...)
		if err == nil {
			return result
		}
		if f, ok := errors.AsType[*rpc.Fault](err); !ok || f.Code != xapi.ErrVDIInUse || ctx.Err() != nil {
			r.t.Fatalf("%s: %v", method, err)
		}
	}
}

// defaultSR returns the reference of the SR that every server has.
func (r *faultRig) defaultSR() string {
	r.t.Helper()
	for _, p := range r.must("pool.get_all_records").(map[string]any) {
		return p.(map[string]any)["default_SR"].(string)
	}
	r.t.Fatal("no pool")
	return ""
}

// newDisk makes a disk of an SR.
func (r *faultRig) newDisk(sr string, size int64) (ref, uuid string) {
	r.t.Helper()
	ref = r.must("VDI.create", map[string]any{
		"SR": sr, "virtual_size": size, "type": "user", "sharable": false, "read_only": false,
		"other_config": map[string]any{}, "name_label": "disk",
	}).(string)
	return ref, r.must("VDI.get_uuid", ref).(string)
}

// open opens an export on the socket, with extended headers.
func (r *faultRig) open(export string) *nbd.Client {
	r.t.Helper()
	c, err := r.tryOpen(export)
	if err != nil {
		r.t.Fatalf("open %s: %v", export, err)
	}
	r.t.Cleanup(func() { c.Abort() })
	return c
}

// tryOpen is open for any goroutine.
func (r *faultRig) tryOpen(export string) (*nbd.Client, error) {
	nc, err := net.Dial("unix", r.socket)
	if err != nil {
		return nil, err
	}
	d, err := nbd.Begin(nc)
	if err != nil {
		return nil, errors.Join(err, nc.Close())
	}
	if err := d.Extended(); err != nil {
		return nil, errors.Join(err, nc.Close())
	}
	c, err := d.Go(export)
	if err != nil {
		return nil, errors.Join(err, nc.Close())
	}
	return c, nil
}

func wantErrno(t *testing.T, what string, err error, want nbd.Errno) {
	t.Helper()
	if !errors.Is(err, want) {
		t.Errorf("%s: %v, want %v", what, err, want)
	}
}

const step = 256 << 10 // bytes of a write of these tests

// content is what write n puts at its place; it does not compress.
func content(n uint64) []byte {
	p := make([]byte, step)
	_, _ = rand.NewChaCha8([32]byte{byte(n), byte(n >> 8), byte(n >> 16), 1}).Read(p) // never fails
	return p
}

// shadow is what a disk must hold, by write.
type shadow map[int64][]byte

// check compares a disk with it.
func (s shadow) check(t *testing.T, what string, d io.ReaderAt) {
	t.Helper()
	got := make([]byte, step)
	for off, want := range s {
		if _, err := d.ReadAt(got, off); err != nil {
			t.Fatalf("%s: read at %d: %v", what, off, err)
		}
		if !bytes.Equal(got, want) {
			t.Fatalf("%s: what was written at %d is not there", what, off)
		}
	}
}

// fillUp writes to a disk until it is full, which must end with ENOSPC, and
// returns where.
func fillUp(t *testing.T, c *nbd.Client, s shadow) (full int64) {
	t.Helper()
	for off := int64(0); off < c.Size(); off += step {
		p := content(uint64(off / step))
		if _, err := c.WriteAt(p, off); err != nil {
			wantErrno(t, fmt.Sprintf("write at %d", off), err, nbd.ENOSPC)
			return off
		}
		s[off] = p
	}
	t.Fatalf("%d bytes were written and the store is not full", c.Size())
	return 0
}

// until tries something again that a change of the store, which works in the
// background, makes possible.
func until(t *testing.T, what string, try func() error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	for {
		err := try()
		if err == nil {
			return
		}
		if !errors.Is(err, nbd.ENOSPC) || ctx.Err() != nil {
			t.Fatalf("%s: %v", what, err)
		}
	}
}

// TestNBDFull fills a store through the wire, up to a limit of its own and up
// to the end of the host's space. A client that is refused a write loses
// nothing else by it, and gets on once there is room.
func TestNBDFull(t *testing.T) {
	limited := smallRegions()
	limited.MaxBytes = 24 << 20
	for name, h := range map[string]*faultHost{
		"limit": {options: limited},
		"host":  {options: smallRegions(), capacity: 24 << 20},
	} {
		t.Run(name, func(t *testing.T) {
			r := newFaultRig(t, h)
			sr := r.defaultSR()
			spare, spareUUID := r.newDisk(sr, 64<<20)
			_, uuid := r.newDisk(sr, 64<<20)
			kept := shadow{}
			other := r.open("rw/" + spareUUID)
			for off := int64(0); off < 4<<20; off += step {
				kept[off] = content(1000 + uint64(off))
				if _, err := other.WriteAt(kept[off], off); err != nil {
					t.Fatal(err)
				}
			}
			c, s := r.open("rw/"+uuid), shadow{}
			full := fillUp(t, c, s)

			// Long writes, zeroes that have to be written, writes through.
			_, err := c.WriteAt(bytes.Repeat([]byte{1}, 8<<20), full)
			wantErrno(t, "long write", err, nbd.ENOSPC)
			_, err = c.Write(bytes.Repeat([]byte{1}, 1<<20), full, nbd.CmdFUA)
			wantErrno(t, "write through", err, nbd.ENOSPC)
			s.check(t, "a full disk", c)
			kept.check(t, "another disk", other)
			if err := c.Flush(t.Context()); err != nil {
				t.Fatalf("flush of a full disk: %v", err)
			}
			// The refusal is no reason to refuse what needs no room.
			if _, err := c.BlockStatus(0, 1<<20, 0); err == nil {
				t.Error("block status without a context")
			}
			if err := c.Trim(0, 1<<20, 0); err != nil {
				t.Fatalf("trim of a full disk: %v", err)
			}
			for off := int64(0); off < 1<<20; off += step {
				s[off] = make([]byte, step)
			}
			s.check(t, "after the trim", c)
			until(t, "write after a trim", func() error {
				if err := c.Flush(t.Context()); err != nil {
					t.Fatal(err)
				}
				s[full] = content(77)
				_, err := c.WriteAt(s[full], full)
				return err
			})

			// Full again: what a deletion gives back is there for others.
			delete(s, full)
			full = fillUp(t, c, s)
			if err := other.Close(); err != nil {
				t.Fatal(err)
			}
			r.must("VDI.destroy", spare)
			until(t, "write after a deletion", func() error {
				s[full] = content(78)
				_, err := c.WriteAt(s[full], full)
				return err
			})
			if err := c.Flush(t.Context()); err != nil {
				t.Fatal(err)
			}
			r.close()
			h.cutPower()
			h.check(t)
			r.start()
			s.check(t, "after a power cut", r.open(uuid))
		})
	}
}

// TestNBDStoreFails has a store fail in ways after which it only reads: the
// client learns it, other SRs and the API go on, and nothing that was flushed
// is lost.
func TestNBDStoreFails(t *testing.T) {
	for name, strike := range map[string]*vfs.Fault{
		"sync":             {Ops: []vfs.Op{vfs.OpDatasync}, Err: syscall.EIO, Nth: 1, Sticky: true},
		"write of the log": {Ops: []vfs.Op{vfs.OpWrite}, Name: "log", Err: syscall.EIO, Nth: 1, Sticky: true},
		"log on full host": {Ops: []vfs.Op{vfs.OpWrite}, Name: "log", Err: &vfs.ShortWrite{N: 700, Err: syscall.ENOSPC}, Nth: 1, Sticky: true},
	} {
		t.Run(name, func(t *testing.T) {
			h := &faultHost{options: smallRegions()}
			r := newFaultRig(t, h)
			bad := r.defaultSR()
			hosts := r.must("host.get_all").([]any)
			good := r.must("SR.create", hosts[0], map[string]any{}, "0", "second", "", "cow", "user", false, map[string]any{}).(string)
			_, uuid := r.newDisk(bad, 8<<20)
			_, otherUUID := r.newDisk(good, 8<<20)
			c, other := r.open("rw/"+uuid), r.open("rw/"+otherUUID)
			flushed, newer := shadow{}, shadow{}
			for off := int64(0); off < 2<<20; off += step {
				flushed[off] = content(uint64(off / step))
				if _, err := c.WriteAt(flushed[off], off); err != nil {
					t.Fatal(err)
				}
			}
			if err := c.Flush(t.Context()); err != nil {
				t.Fatal(err)
			}
			h.fail(func(dir string, call vfs.Call) error {
				if dir != "store" {
					return nil
				}
				return strike.Hook(call)
			})
			newer[4<<20] = content(500)
			if _, err := c.WriteAt(newer[4<<20], 4<<20); err != nil {
				t.Fatalf("a write that nobody wants durable: %v", err)
			}
			wantErrno(t, "flush", c.Flush(t.Context()), nbd.EIO)
			wantErrno(t, "flush again", c.Flush(t.Context()), nbd.EIO)
			h.heal() // too late: what is on the device now, nobody knows
			wantErrno(t, "flush after the device is well again", c.Flush(t.Context()), nbd.EIO)
			_, err := c.WriteAt(newer[4<<20], 5<<20)
			wantErrno(t, "write", err, nbd.EIO)
			_, err = c.Write(newer[4<<20], 5<<20, nbd.CmdFUA)
			wantErrno(t, "write through", err, nbd.EIO)
			wantErrno(t, "trim", c.Trim(0, 1<<20, 0), nbd.EIO)
			wantErrno(t, "zeroes", c.WriteZeroes(0, 1<<20, 0), nbd.EIO)
			flushed.check(t, "reads go on", c)
			newer.check(t, "reads go on", c)
			flushed.check(t, "a new reader", r.open(uuid))

			if _, err := r.call("VDI.create", r.session, map[string]any{
				"SR": bad, "virtual_size": int64(1 << 20), "type": "user", "sharable": false, "read_only": false,
				"other_config": map[string]any{}, "name_label": "disk",
			}); err == nil {
				t.Error("a disk was made in a store that only reads")
			}
			r.newDisk(good, 1<<20)
			if _, err := other.Write(content(9), 0, nbd.CmdFUA); err != nil {
				t.Errorf("a disk of another SR: %v", err)
			}
			r.broken = true
			r.close()
			h.cutPower()
			r.start()
			again := r.open("rw/" + uuid)
			flushed.check(t, "after a restart", again)
			if _, err := again.Write(newer[4<<20], 4<<20, nbd.CmdFUA); err != nil {
				t.Errorf("write after a restart: %v", err)
			}
			shadow{0: content(9)}.check(t, "the other SR after a restart", r.open(otherUUID))
			r.close()
			h.check(t)
		})
	}
}

// TestNBDDataFault has the host refuse data, once: the client is told which
// way, and the store goes on.
func TestNBDDataFault(t *testing.T) {
	for name, c := range map[string]struct {
		err  error
		want nbd.Errno
	}{
		"device": {syscall.EIO, nbd.EIO},
		"full":   {syscall.ENOSPC, nbd.ENOSPC},
		"quota":  {syscall.EDQUOT, nbd.ENOSPC},
		"short":  {&vfs.ShortWrite{N: 4096, Err: syscall.ENOSPC}, nbd.ENOSPC},
	} {
		t.Run(name, func(t *testing.T) {
			h := &faultHost{options: smallRegions()}
			r := newFaultRig(t, h)
			_, uuid := r.newDisk(r.defaultSR(), 8<<20)
			d := r.open("rw/" + uuid)
			s := shadow{0: content(1)}
			if _, err := d.Write(s[0], 0, nbd.CmdFUA); err != nil {
				t.Fatal(err)
			}
			strike := &vfs.Fault{Ops: []vfs.Op{vfs.OpWrite}, Name: "space-*", Nth: 1, Sticky: true, Err: c.err}
			h.fail(func(_ string, call vfs.Call) error { return strike.Hook(call) })
			big := bytes.Repeat(content(2), 16) // goes to the space files at once
			_, err := d.WriteAt(big, 1<<20)
			wantErrno(t, "write", err, c.want)
			if strike.Calls() == 0 {
				t.Fatal("nothing was written to the space files")
			}
			s.check(t, "after the refusal", d)
			h.heal()
			if _, err := d.Write(big, 1<<20, nbd.CmdFUA); err != nil {
				t.Errorf("the same write, later: %v", err)
			}
			s[2<<20] = big[:step]
			s.check(t, "later", d)
			r.close()
			h.check(t)
		})
	}
}
