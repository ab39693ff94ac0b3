package cow

import (
	"bytes"
	"context"
	"errors"
	"sync/atomic"
	"testing"

	"coppice/internal/vfs"
)

// scattered is a disk whose every fourth unit has been written anew by each of
// two checkpoints, so that it is in many pieces that lie together by place.
type scattered struct {
	mem   *vfs.Mem
	s     *Store
	d     *Disk
	want  []byte
	reads atomic.Int64                         // of the space files
	fail  atomic.Pointer[func(vfs.Call) error] // of a read of them
}

func newScattered(t *testing.T, units int) *scattered {
	t.Helper()
	ctx := context.Background()
	sc := &scattered{mem: vfs.NewMem(0)}
	s, err := Create(ctx, vfs.NewInject(sc.mem, nil, func(c vfs.Call) error {
		if c.Op != vfs.OpRead || c.Name != spaceName(0) {
			return nil
		}
		sc.reads.Add(1)
		if f := sc.fail.Load(); f != nil {
			return (*f)(c)
		}
		return nil
	}), Options{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	})
	u := s.geo.UnitSize
	d := newDisk(t, s, 1, int64(units*u), nil)
	sc.s, sc.d, sc.want = s, d, noise(units*u)
	if _, err := d.WriteAt(sc.want, 0); err != nil {
		t.Fatal(err)
	}
	for round := range 2 {
		if err := s.sync(ctx); err != nil {
			t.Fatal(err)
		}
		for i := round; i < units; i += 4 {
			sc.want[i*u] ^= 1
			if _, err := d.WriteAt(sc.want[i*u:(i+1)*u], int64(i*u)); err != nil {
				t.Fatal(err)
			}
		}
	}
	if err := s.sync(ctx); err != nil {
		t.Fatal(err)
	}
	return sc
}

// addr is where a unit is.
func (sc *scattered) addr(t *testing.T, unit int) uint64 {
	t.Helper()
	fan := sc.s.geo.Fanout
	s, err := sc.s.pageReader.lookup(sc.d.v.view.Load(), uint64(unit/fan), unit%fan)
	if err != nil || s.state != slotAddr {
		t.Fatalf("unit %d is not in the space files: %v", unit, err)
	}
	return s.addr
}

// flip damages the unit at addr.
func (sc *scattered) flip(t *testing.T, addr uint64) {
	t.Helper()
	if err := flip(sc.mem, spaceName(0), int64(addr)*int64(sc.s.geo.UnitSize)+5, 1); err != nil {
		t.Fatal(err)
	}
}

// TestGather reads a scattered disk with few calls, from within a unit to
// within a unit, too.
func TestGather(t *testing.T) {
	const units = 400
	sc := newScattered(t, units)
	u := sc.s.geo.UnitSize
	for _, r := range []struct{ from, to int }{{0, units * u}, {1, units*u - 1}, {u + 7, 300*u + 100}, {2 * u, 40 * u}} {
		got := make([]byte, r.to-r.from)
		if _, err := sc.d.ReadAt(got, int64(r.from)); err != nil { // and the map pages
			t.Fatal(err)
		}
		sc.reads.Store(0)
		clear(got)
		if _, err := sc.d.ReadAt(got, int64(r.from)); err != nil || !bytes.Equal(got, sc.want[r.from:r.to]) {
			t.Errorf("wrong contents from %d to %d (%v)", r.from, r.to, err)
		}
		// The first contents, 1.6 MiB in pieces of at most 512 KiB, what each
		// checkpoint wrote, and the edges of regions.
		if n := sc.reads.Load(); n > 10 {
			t.Errorf("%d reads of the files for %d bytes of scattered units", n, len(got))
		}
	}
}

// TestGatherDamage damages units that are read together: the read ends at the
// one with the lowest offset, with everything before it, whatever their order
// by place. What is damaged in a gap is nobody's.
func TestGatherDamage(t *testing.T) {
	const units = 400
	sc := newScattered(t, units)
	u := sc.s.geo.UnitSize
	read := func(from, want int) {
		t.Helper()
		got := make([]byte, units*u-from)
		n, err := sc.d.ReadAt(got, int64(from))
		if want < 0 {
			if err != nil || !bytes.Equal(got, sc.want[from:]) {
				t.Errorf("wrong contents (%v)", err)
			}
			return
		}
		ce, ok := errors.AsType[*CorruptError](err)
		if !ok || ce.Volume != (ID{1}) || ce.Off != int64(max(from, want*u)) || n != max(0, want*u-from) {
			t.Fatalf("%d bytes from %d, error %v; want them up to unit %d", n, from, err, want)
		}
		if !bytes.Equal(got[:n], sc.want[from:from+n]) {
			t.Error("wrong contents before the damage")
		}
		if bytes.Contains(got, sc.want[want*u+u/2:][:u/2]) {
			t.Error("bytes of a damaged unit have been handed out")
		}
	}
	sc.flip(t, sc.addr(t, 3)+1) // the first version of unit 4
	read(0, -1)
	damaged := []int{320, 200, 41, 3} // the pieces of one cluster, and of others
	for _, unit := range damaged {
		sc.flip(t, sc.addr(t, unit))
		read(0, unit)
		read(unit*u+9, unit)
	}
	if n := len(sc.s.Damage()); n != len(damaged) {
		t.Errorf("%d units are known to be damaged, want %d", n, len(damaged))
	}
}

// TestGatherFault fails reads of several pieces at a time: they are read one
// by one.
func TestGatherFault(t *testing.T) {
	const units = 100
	sc := newScattered(t, units)
	u := sc.s.geo.UnitSize
	long := func(c vfs.Call) error {
		if c.Len > int64(2*u) { // no piece is longer
			return errors.New("unreadable sector")
		}
		return nil
	}
	sc.fail.Store(&long)
	got := make([]byte, units*u)
	if _, err := sc.d.ReadAt(got, 0); err != nil || !bytes.Equal(got, sc.want) {
		t.Errorf("wrong contents (%v)", err)
	}
	if n := sc.reads.Load(); n < units/2 {
		t.Errorf("%d reads", n)
	}
}
