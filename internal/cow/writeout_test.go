package cow

import (
	"bytes"
	"context"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"

	"coppice/internal/vfs"
)

// onSpaceWrite is a hook that calls do once, before the first write to a space
// file after it has been armed.
func onSpaceWrite(armed *atomic.Bool, do func()) func(vfs.Call) error {
	return func(c vfs.Call) error {
		if c.Op == vfs.OpWrite && strings.HasPrefix(c.Name, "space-") && armed.CompareAndSwap(true, false) {
			do()
		}
		return nil
	}
}

// TestWriteOut has something happen to a volume while its open contents are
// written to the space files.
func TestWriteOut(t *testing.T) {
	ctx := context.Background()
	u := int64(tiny.UnitSize)
	const units = 12
	for name, meanwhile := range map[string]func(t *testing.T, s *Store, d *Disk, want []byte){
		"nothing": func(*testing.T, *Store, *Disk, []byte) {},
		"a write": func(t *testing.T, _ *Store, d *Disk, want []byte) {
			p := noise(int(2 * u))
			if _, err := d.WriteAt(p, 3*u); err != nil {
				t.Error(err)
			}
			copy(want[3*u:], p)
		},
		"a patch": func(t *testing.T, _ *Store, d *Disk, want []byte) {
			if _, err := d.WriteAt([]byte("patch"), 5*u+7); err != nil {
				t.Error(err)
			}
			copy(want[5*u+7:], "patch")
		},
		"zeros": func(t *testing.T, _ *Store, d *Disk, want []byte) {
			if err := d.Zero(ctx, 2*u, 7*u); err != nil { // whole chunks as well
				t.Error(err)
			}
			clear(want[2*u : 9*u])
		},
		"a flush": func(t *testing.T, s *Store, d *Disk, _ []byte) {
			if err := s.commit(ctx, nil, func(b *batch) error { return s.catch(b, d.v) }); err != nil {
				t.Error(err)
			}
		},
		"a delete": func(t *testing.T, s *Store, d *Disk, want []byte) {
			if err := s.Delete(ctx, d.ID()); err != nil {
				t.Error(err)
			}
			clear(want)
		},
	} {
		t.Run(name, func(t *testing.T) {
			var armed atomic.Bool
			var do func()
			m := vfs.NewMem(0)
			s, err := Create(ctx, vfs.NewInject(m, nil, onSpaceWrite(&armed, func() { do() })), tinyOptions())
			if err != nil {
				t.Fatal(err)
			}
			d := newDisk(t, s, 1, units*u, nil)
			want := make([]byte, units*u)
			for i := int64(0); i < units; i += 2 { // small writes stay in memory
				p := noise(int(2 * u))
				if _, err := d.WriteAt(p, i*u); err != nil {
					t.Fatal(err)
				}
				copy(want[i*u:], p)
			}
			do = func() { meanwhile(t, s, d, want) }
			armed.Store(true)
			s.writeOut(d.v)
			if armed.Load() {
				t.Fatal("nothing was written")
			}
			gone := name == "a delete"
			verify := func(d *Disk) {
				t.Helper()
				got := make([]byte, len(want))
				if _, err := d.ReadAt(got, 0); err != nil || !bytes.Equal(got, want) {
					t.Errorf("wrong contents (%v)", err)
				}
			}
			if l, _ := d.v.open(); name == "nothing" && l.buffers != 0 {
				t.Errorf("%d bytes are in memory", l.buffers)
			}
			if !gone {
				verify(d)
				if err := d.Flush(ctx); err != nil {
					t.Fatal(err)
				}
				verify(d)
			}
			crashed := m.Crash(func(int) int { return 0 })
			if err := s.sync(ctx); err != nil {
				t.Fatal(err)
			}
			if err := s.awaitReleases(ctx); err != nil {
				t.Fatal(err)
			}
			s.space.mu.Lock()
			if s.space.held != 0 {
				t.Errorf("%d units are held that nobody refers to", s.space.held)
			}
			s.space.mu.Unlock()
			if err := s.Close(); err != nil {
				t.Fatal(err)
			}
			for _, m := range []*vfs.Mem{m, crashed} {
				if err := checkClean(m); err != nil {
					t.Fatal(err)
				}
				s, err := Open(ctx, m, tinyOptions())
				if err != nil {
					t.Fatal(err)
				}
				if !gone {
					d, err := s.OpenDisk(ctx, ID{1}, Live)
					if err != nil {
						t.Fatal(err)
					}
					verify(d)
				}
				if err := s.Close(); err != nil {
					t.Fatal(err)
				}
			}
		})
	}
}

// TestWriteOutFails fails the writes of it: what is open stays in memory, and the
// flush behind it works.
func TestWriteOutFails(t *testing.T) {
	ctx := context.Background()
	fault := vfs.Fault{Ops: []vfs.Op{vfs.OpWrite}, Name: spaceName(0), Err: syscall.EIO}
	var armed atomic.Bool
	hook := func(c vfs.Call) error {
		if armed.Load() {
			return fault.Hook(c)
		}
		return nil
	}
	fault.Nth = 1
	m := vfs.NewMem(0)
	s, err := Create(ctx, vfs.NewInject(m, nil, hook), tinyOptions())
	if err != nil {
		t.Fatal(err)
	}
	d := newDisk(t, s, 1, 16<<10, nil)
	want := noise(16 << 10)
	for off := 0; off < len(want); off += 2 << 10 {
		if _, err := d.WriteAt(want[off:off+2<<10], int64(off)); err != nil {
			t.Fatal(err)
		}
	}
	armed.Store(true)
	s.writeOut(d.v)
	if fault.Calls() != 1 {
		t.Fatalf("%d writes, want the one that fails", fault.Calls())
	}
	if l, _ := d.v.open(); l.buffers != int64(len(want)) {
		t.Errorf("%d bytes are in memory, want all %d", l.buffers, len(want))
	}
	if err := d.Flush(ctx); err != nil {
		t.Fatal(err)
	}
	got := make([]byte, len(want))
	if _, err := d.ReadAt(got, 0); err != nil || !bytes.Equal(got, want) {
		t.Errorf("wrong contents (%v)", err)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	if err := checkClean(m); err != nil {
		t.Fatal(err)
	}
}

// TestSnapshotWritesOut writes much to a disk after the flush that a snapshot
// begins with: that does not go into the log with its contents.
func TestSnapshotWritesOut(t *testing.T) {
	ctx := context.Background()
	var armed atomic.Bool
	var logged atomic.Int64
	var do func()
	hook := func(c vfs.Call) error {
		if c.Name != logName || c.Op != vfs.OpDatasync {
			return nil
		}
		logged.Add(c.Len)
		if armed.CompareAndSwap(true, false) {
			do()
		}
		return nil
	}
	o := tinyOptions()
	o.LogBytes = 256 << 10
	m := vfs.NewMem(0)
	s, err := Create(ctx, vfs.NewInject(m, nil, hook), o)
	if err != nil {
		t.Fatal(err)
	}
	want := noise(32 << 10)
	d := newDisk(t, s, 1, int64(len(want)), nil)
	write := func() {
		for off := 0; off < len(want); off += 2 << 10 {
			if _, err := d.WriteAt(want[off:off+2<<10], int64(off)); err != nil {
				t.Error(err)
			}
		}
	}
	write()
	do = func() {
		want = noise(len(want))
		write()
	}
	logged.Store(0)
	armed.Store(true)
	if _, err := s.Snapshot(ctx, []Pair{{Src: ID{1}, New: ID{2}}}); err != nil {
		t.Fatal(err)
	}
	if n := logged.Load(); armed.Load() || n > 8<<10 {
		t.Errorf("%d bytes of log for two times %d written", n, len(want))
	}
	snap, err := s.OpenDisk(ctx, ID{2}, Live)
	if err != nil {
		t.Fatal(err)
	}
	got := make([]byte, len(want))
	if _, err := snap.ReadAt(got, 0); err != nil || !bytes.Equal(got, want) {
		t.Errorf("wrong contents (%v)", err)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	if err := checkClean(m); err != nil {
		t.Fatal(err)
	}
}

// TestGroupSnapshotOfMuch has one volume of a group written to while the open
// contents of another are written out, with more than the log has room for.
func TestGroupSnapshotOfMuch(t *testing.T) {
	ctx := context.Background()
	const size = 64 << 10
	contents := [2][]byte{noise(size), noise(size)}
	var disks [2]*Disk
	write := func(i int) {
		for off := 0; off < size; off += 2 << 10 { // small writes stay in memory
			if _, err := disks[i].WriteAt(contents[i][off:off+2<<10], int64(off)); err != nil {
				t.Error(err)
			}
		}
	}
	var flushed, writing atomic.Bool
	onSpace := onSpaceWrite(&writing, func() { write(0) })
	hook := func(c vfs.Call) error {
		if c.Name == logName && c.Op == vfs.OpDatasync && flushed.CompareAndSwap(true, false) {
			write(1) // behind the flush that the snapshot begins with
			writing.Store(true)
		}
		return onSpace(c)
	}
	m := vfs.NewMem(0)
	s, err := Create(ctx, vfs.NewInject(m, nil, hook), tinyOptions())
	if err != nil {
		t.Fatal(err)
	}
	for i := range disks {
		disks[i] = newDisk(t, s, byte(i+1), size, nil)
	}
	write(1)
	flushed.Store(true)
	if _, err := s.Snapshot(ctx, []Pair{{Src: ID{1}, New: ID{3}}, {Src: ID{2}, New: ID{4}}}); err != nil {
		t.Fatal(err)
	}
	if flushed.Load() || writing.Load() {
		t.Fatal("not all has been written")
	}
	for i := range disks {
		snap, err := s.OpenDisk(ctx, ID{byte(i + 3)}, Live)
		if err != nil {
			t.Fatal(err)
		}
		got := make([]byte, size)
		if _, err := snap.ReadAt(got, 0); err != nil || !bytes.Equal(got, contents[i]) {
			t.Errorf("snapshot %d: wrong contents (%v)", i, err)
		}
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	if err := checkClean(m); err != nil {
		t.Fatal(err)
	}
}
