package vfs_test

import (
	"errors"
	"strings"
	"syscall"
	"testing"

	"coppice/internal/vfs"

	"github.com/google/go-cmp/cmp"
)

// busy does one of everything and returns the first error.
func busy(fsys vfs.FS) error {
	l, err := fsys.Lock()
	if err != nil {
		return err
	}
	defer l.Close()
	f, err := fsys.Create("f")
	if err != nil {
		return err
	}
	defer f.Close()
	for _, step := range []func() error{
		func() error { return f.Allocate(0, 8192) },
		func() error { _, err := f.WriteAt([]byte("hello"), 4096); return err },
		f.Datasync,
		func() error { return f.WriteSync([]byte("world"), 4096) },
		fsys.SyncDir,
		func() error { return f.PunchHole(0, 4096) },
		func() error { return f.Truncate(4096) },
		func() error { return fsys.Rename("f", "g") },
		func() error { _, err := f.ReadAt(make([]byte, 1), 0); return err },
		func() error { _, err := fsys.List(); return err },
		func() error { g, err := fsys.Open("g"); return errors.Join(err, closeFile(g)) },
		func() error { return fsys.Remove("g") },
	} {
		if err := step(); err != nil {
			return err
		}
	}
	f.Evict(0, 0)
	return nil
}

func closeFile(f vfs.File) error {
	if f == nil {
		return nil
	}
	return f.Close()
}

func TestTrace(t *testing.T) {
	var out strings.Builder
	fault := vfs.Fault{Ops: []vfs.Op{vfs.OpRename}, Nth: 2, Err: syscall.EIO}
	tr := vfs.NewTrace(vfs.NewInject(vfs.NewMem(0), nil, fault.Hook), &out)
	ok(t, busy(tr))
	_, err := tr.Create("x")
	ok(t, err)
	fails(t, tr.Rename("x", "y"), syscall.EIO)
	want := `lock
create f
allocate f 0+8192
write f 4096+5
datasync f
writesync f 4096+5
syncdir
punch f 0+4096
truncate f 4096
rename f g
open g
close g
remove g
evict f 0+0
close f
unlock
create x
rename x y: input/output error
`
	if d := cmp.Diff(want, out.String()); d != "" {
		t.Errorf("trace (-want +got):\n%s", d)
	}
}

// TestFaultSweep fails every call of busy in turn.
func TestFaultSweep(t *testing.T) {
	for n := 1; ; n++ {
		fault := vfs.Fault{Nth: n, Err: syscall.EIO}
		err := busy(vfs.NewInject(vfs.NewMem(0), nil, fault.Hook))
		if fault.Calls() < n {
			ok(t, err)
			if n != 16 { // a WriteSync is two
				t.Errorf("%d calls seen, want 15", n-1)
			}
			return
		}
		fails(t, err, syscall.EIO)
	}
}

func TestFaultMatches(t *testing.T) {
	m := vfs.NewMem(0)
	fault := vfs.Fault{Ops: []vfs.Op{vfs.OpWrite}, Name: "space-*", Nth: 2, Sticky: true, Err: syscall.ENOSPC}
	in := vfs.NewInject(m, nil, fault.Hook)
	log, space := create(t, in, "log"), create(t, in, "space-0")
	write(t, log, "x", 0)
	write(t, space, "x", 0)
	for range 2 {
		n, err := space.WriteAt([]byte("y"), 0)
		if n != 0 || !errors.Is(err, syscall.ENOSPC) {
			t.Errorf("WriteAt = %d, %v", n, err)
		}
	}
	write(t, log, "y", 0)
	ok(t, space.Datasync())
}

func TestShortWrite(t *testing.T) {
	m := vfs.NewMem(0)
	fault := vfs.Fault{Ops: []vfs.Op{vfs.OpWrite}, Nth: 1, Err: &vfs.ShortWrite{N: 3, Err: syscall.EIO}}
	f := create(t, vfs.NewInject(m, nil, fault.Hook), "f")
	n, err := f.WriteAt([]byte("hello"), 0)
	if n != 3 || !errors.Is(err, syscall.EIO) {
		t.Errorf("WriteAt = %d, %v", n, err)
	}
	if got := contents(t, m, "f"); got != "hel" {
		t.Errorf("contents %q", got)
	}
}

// TestFailedSync checks the trap of failed syncs: the next one succeeds, the
// cache shows the data, and the device does not have it.
func TestFailedSync(t *testing.T) {
	m, f := durable(t, "ab")
	ok(t, f.Close())
	fault := vfs.Fault{Ops: []vfs.Op{vfs.OpDatasync}, Nth: 1, Err: syscall.EIO}
	f, err := vfs.NewTrace(vfs.NewInject(m, nil, fault.Hook), t.Output()).Open("f")
	ok(t, err)
	write(t, f, run("x"), 0)
	fails(t, f.Datasync(), syscall.EIO)
	ok(t, f.Datasync())
	if got := sectors(t, "f")(m); got != "xb" {
		t.Errorf("the cache shows %q", got)
	}
	same(t, outcomes(t, m, sectors(t, "f")), "ab")
	same(t, outcomes(t, m.Kill(), sectors(t, "f")), "ab")

	// Writing to the page again takes all of it to the device.
	k := m.Kill()
	kf, err := k.Open("f")
	ok(t, err)
	write(t, kf, run("y"), 512)
	ok(t, kf.Datasync())
	same(t, outcomes(t, k, sectors(t, "f")), "xy")

	f.Evict(0, 0)
	if got := sectors(t, "f")(m); got != "ab" {
		t.Errorf("without its cache the file is %q", got)
	}
}

func TestFailedSyncKeepsSome(t *testing.T) {
	m, f := durable(t, "ab")
	fault := vfs.Fault{Ops: []vfs.Op{vfs.OpDatasync}, Nth: 1, Err: syscall.EIO}
	picks := []int{1, 0}
	choose := func(int) int { p := picks[0]; picks = picks[1:]; return p }
	g, err := vfs.NewInject(m, choose, fault.Hook).Open("f")
	ok(t, err)
	write(t, f, run("xy"), 0)
	fails(t, g.Datasync(), syscall.EIO)
	g.Evict(0, 0)
	if got := sectors(t, "f")(m); got != "xb" {
		t.Errorf("the device has %q", got)
	}
}

// TestFailedWriteSync fails the two steps of a WriteSync: what the device has
// of the range is anything, and of the rest nothing that was not synced.
func TestFailedWriteSync(t *testing.T) {
	for _, step := range []vfs.Op{vfs.OpWrite, vfs.OpDatasync} {
		m, f := durable(t, "abc")
		ok(t, f.Close())
		fault := vfs.Fault{Ops: []vfs.Op{step}, Nth: 2, Err: syscall.EIO}
		if step == vfs.OpDatasync {
			fault.Nth = 1
		}
		last := func(n int) int { return n - 1 }
		f, err := vfs.NewTrace(vfs.NewInject(m, last, fault.Hook), t.Output()).Open("f")
		ok(t, err)
		write(t, f, run("z"), 1024)
		fails(t, f.WriteSync([]byte(run("x")), 0), syscall.EIO)
		f.Evict(0, 0)
		want := map[vfs.Op][]string{vfs.OpWrite: {"abc", "abz"}, vfs.OpDatasync: {"xbc", "xbz"}}[step]
		same(t, outcomes(t, m, sectors(t, "f")), want...)
	}

	// A short write says how much of it there may be.
	m, f := durable(t, "ab")
	fault := vfs.Fault{Ops: []vfs.Op{vfs.OpWrite}, Nth: 1, Err: &vfs.ShortWrite{N: 512, Err: syscall.EIO}}
	g, err := vfs.NewInject(m, nil, fault.Hook).Open("f")
	ok(t, err)
	fails(t, g.WriteSync([]byte(run("xy")), 0), syscall.EIO)
	same(t, outcomes(t, m, sectors(t, "f")), "ab", "xb")
	ok(t, f.Close())
}

// TestWriteSyncIsTorn takes the power away between the write and its end, and
// after it.
func TestWriteSyncIsTorn(t *testing.T) {
	m, f := durable(t, "abc")
	ok(t, f.Close())
	var torn []string
	hook := func(c vfs.Call) error {
		if c.Op == vfs.OpDatasync && c.Off == 0 && c.Len == 1024 {
			torn = outcomes(t, m, sectors(t, "f"))
		}
		return nil
	}
	f, err := vfs.NewTrace(vfs.NewInject(m, nil, hook), t.Output()).Open("f")
	ok(t, err)
	write(t, f, run("z"), 1024)
	ok(t, f.WriteSync([]byte(run("xy")), 0))
	same(t, torn, "abc", "abz", "ayc", "ayz", "xbc", "xbz", "xyc", "xyz")
	same(t, outcomes(t, m, sectors(t, "f")), "xyc", "xyz")
	same(t, outcomes(t, m.Kill(), sectors(t, "f")), "xyc", "xyz")

	// Growth that it needs is durable as well.
	ok(t, f.WriteSync([]byte(run("ghi")), 1536))
	same(t, outcomes(t, m, sectors(t, "f")), "xycghi", "xyzghi")
}
