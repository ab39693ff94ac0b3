package cow

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"slices"
	"testing"

	"coppice/internal/vfs"
)

// sample is a small closed store with relatives of several kinds, and the
// contents of its volumes.
func sample(tb testing.TB) (*vfs.Mem, map[ID][]byte) {
	tb.Helper()
	w, err := newWorld(tinyOptions())
	if err != nil {
		tb.Fatal(err)
	}
	rng := rand.New(rand.NewPCG(4, 4))
	for _, kind := range []string{
		"create", "big", "write", "snapshot", "big", "create", "attrs", "clone", "write", "big", "flush",
		"snapshot", "zero", "write", "delete", "big", "group", "write", "resize", "sync",
	} {
		if err := w.step(op{kind, rng.Uint32(), rng.Uint32(), rng.Uint32(), rng.Uint64()}); err != nil {
			tb.Fatal(kind, err)
		}
	}
	if err := w.s.Close(); err != nil {
		tb.Fatal(err)
	}
	data := map[ID][]byte{}
	for id, m := range w.vols {
		data[id] = m.data
	}
	return w.mem.Kill(), data
}

// flip changes bits of one byte of a file.
func flip(m *vfs.Mem, name string, off int64, bits byte) error {
	f, err := m.Open(name)
	if err != nil {
		return err
	}
	defer f.Close()
	b := make([]byte, 1)
	if _, err := f.ReadAt(b, off); err != nil {
		return err
	}
	b[0] ^= bits
	_, err = f.WriteAt(b, off)
	return err
}

// tolerable reports whether damage may cause the error.
func tolerable(err error) bool {
	return err == nil || errors.Is(err, ErrCorrupt) || errors.Is(err, ErrFailed) || errors.Is(err, ErrUnsupported)
}

// useDamaged opens a damaged store, reads everything and works with it. All
// data must be right or refused.
func useDamaged(m *vfs.Mem, want map[ID][]byte) error {
	ctx := context.Background()
	s, err := Open(ctx, m, tinyOptions())
	if err != nil {
		if tolerable(err) {
			return nil
		}
		return fmt.Errorf("open: %w", err)
	}
	defer func() { _ = s.Close() }() // may have failed
	for id, data := range want {
		if _, err := s.Attrs(ctx, id); !tolerable(err) {
			return fmt.Errorf("attributes: %w", err)
		}
		d, err := s.OpenDisk(ctx, id, Live)
		if err != nil {
			return fmt.Errorf("volume is lost: %w", err)
		}
		if d.Size() != int64(len(data)) {
			return fmt.Errorf("size %d, want %d", d.Size(), len(data))
		}
		u := tiny.UnitSize
		got := make([]byte, u)
		for off := 0; off < len(data); off += u {
			n, err := d.ReadAt(got, int64(off))
			if ce, ok := errors.AsType[*CorruptError](err); ok && (ce.Volume != id || ce.Off != int64(off)) {
				return fmt.Errorf("error names volume %v byte %d, want %v byte %d: %w", ce.Volume, ce.Off, id, off, err)
			}
			if !tolerable(err) {
				return err
			}
			if !bytes.Equal(got[:n], data[off:off+n]) {
				return fmt.Errorf("volume %v: wrong data at %d", id, off)
			}
		}
		for _, err := range d.Extents(ctx, 0, int64(len(data))) {
			if !tolerable(err) {
				return err
			}
		}
	}
	for _, err := range s.Check(ctx) {
		if !tolerable(err) {
			return fmt.Errorf("online check: %w", err)
		}
	}
	n := 0
	for id, data := range want {
		d, err := s.OpenDisk(ctx, id, Live)
		if err == nil && len(data) > 0 {
			_, err = d.WriteAt([]byte("new"), int64(len(data)/2))
		}
		if err == nil {
			err = d.Flush(ctx)
		}
		if !tolerable(err) && !errors.Is(err, ErrReadOnly) {
			return fmt.Errorf("write: %w", err)
		}
		if n++; n%2 == 0 {
			if err := s.Delete(ctx, id); !tolerable(err) {
				return fmt.Errorf("delete: %w", err)
			}
		}
	}
	return nil
}

// TestBitRot flips single bits all over a store.
func TestBitRot(t *testing.T) {
	m, data := sample(t)
	if err := checkClean(m); err != nil {
		t.Fatal(err)
	}
	names, err := m.List()
	if err != nil {
		t.Fatal(err)
	}
	rng := rand.New(rand.NewPCG(5, 5))
	found, flips := 0, 0
	for _, name := range names {
		f, err := m.Open(name)
		if err != nil {
			t.Fatal(err)
		}
		size, err := f.Size()
		if err != nil {
			t.Fatal(err)
		}
		stride := max(1, size/250)
		for off := int64(0); off < size; off += stride {
			at := min(size-1, off+rng.Int64N(stride))
			bits := byte(1 << rng.IntN(8))
			c := m.Kill()
			if err := flip(c, name, at, bits); err != nil {
				t.Fatal(err)
			}
			flips++
			if checkClean(c) != nil {
				found++
			}
			if err := useDamaged(c, data); err != nil {
				t.Fatalf("%s, byte %d, bits %#x: %v", name, at, bits, err)
			}
		}
	}
	if found == 0 {
		t.Errorf("none of %d flips was noticed", flips)
	}
	t.Logf("%d of %d flips hit something in use", found, flips)
}

// storedSuper returns the newest superblock of a store, and the file that has it.
func storedSuper(t *testing.T, m *vfs.Mem) (vfs.File, *super) {
	t.Helper()
	f, err := m.Open(superName)
	if err != nil {
		t.Fatal(err)
	}
	sb, err := newestSuper(f)
	if err != nil {
		t.Fatal(err)
	}
	return f, sb
}

// newestSuper returns the newest superblock of a file.
func newestSuper(f vfs.File) (*super, error) {
	sl, err := readSlots(f)
	if err != nil {
		return nil, err
	}
	return sl.newest()
}

// TestSuperSlots takes one slot of the newest superblock away, by rot and by a
// medium that cannot be read there; the other one must do.
func TestSuperSlots(t *testing.T) {
	m, data := sample(t)
	_, sb := storedSuper(t, m)
	for i := range uint64(2) {
		c := m.Kill()
		off := int64(sb.gen%2+2*i) * slotSize
		unreadable := vfs.NewInject(c, nil, func(call vfs.Call) error {
			if call.Op == vfs.OpRead && call.Name == superName && call.Off == off {
				return io.ErrClosedPipe
			}
			return nil
		})
		want := fmt.Sprintf("superblock: slot %d is damaged", sb.gen%2+2*i)
		found := func(dir vfs.FS) {
			t.Helper()
			list, err := checked(dir)
			if err != nil || len(list) != 1 || list[0].String() != want {
				t.Errorf("the check found %v, %v, want %q", list, err, want)
			}
		}
		found(unreadable)
		if err := flip(c, superName, off+70, 0xff); err != nil {
			t.Fatal(err)
		}
		found(c)
		if err := useDamaged(c, data); err != nil {
			t.Errorf("slot %d damaged: %v", i, err)
		}
	}
}

// TestSuperSlotsOfAGeneration takes both slots of one generation away: nobody
// can tell whether it was the newest, so the store is refused, and only a
// repair that may lose something goes on with the other one.
func TestSuperSlotsOfAGeneration(t *testing.T) {
	ctx := context.Background()
	m, _ := sample(t)
	s, err := Open(ctx, m, tinyOptions())
	if err != nil {
		t.Fatal(err)
	}
	for i := range byte(2) {
		if _, err := s.Create(ctx, ID{0xf0 + i}, 1<<10, nil); err != nil {
			t.Fatal(err)
		}
		if err := s.sync(ctx); err != nil {
			t.Fatal(err)
		}
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	_, sb := storedSuper(t, m)
	clobber := func(c *vfs.Mem, parity int64, b []byte) {
		t.Helper()
		f, err := c.Open(superName)
		if err != nil {
			t.Fatal(err)
		}
		for _, slot := range []int64{parity, parity + 2} {
			if _, err := f.WriteAt(b, slot*slotSize); err != nil {
				t.Fatal(err)
			}
		}
	}
	tests := map[string]func(*vfs.Mem){
		"newest rotten": func(c *vfs.Mem) { clobber(c, int64(sb.gen%2), noise(superSize)) },
		"newest zeroed": func(c *vfs.Mem) { clobber(c, int64(sb.gen%2), make([]byte, superSize)) },
		"older rotten":  func(c *vfs.Mem) { clobber(c, int64(1-sb.gen%2), noise(superSize)) },
		"cut short": func(c *vfs.Mem) {
			f, err := c.Open(superName)
			if err == nil {
				err = f.Truncate(slotSize)
			}
			if err != nil {
				t.Fatal(err)
			}
		},
	}
	for name, damage := range tests {
		t.Run(name, func(t *testing.T) {
			c := m.Kill()
			damage(c)
			if _, err := Open(ctx, c, tinyOptions()); !errors.Is(err, ErrCorrupt) {
				t.Fatalf("open: %v", err)
			}
			if _, err := checked(c); !errors.Is(err, ErrCorrupt) {
				t.Errorf("check: %v", err)
			}
			list, err := repaired(c, RepairOptions{})
			undone := slices.ContainsFunc(list, func(p Problem) bool { return p.Done == "" })
			if err != nil || !undone {
				t.Errorf("repair: %v, %v", list, err)
			}
			if _, err := Open(ctx, c, tinyOptions()); !errors.Is(err, ErrCorrupt) {
				t.Fatalf("open after a repair that must not lose anything: %v", err)
			}
			if list, err := repaired(c, RepairOptions{AcceptLoss: true}); err != nil {
				t.Fatalf("repair: %v, %v", list, err)
			}
			if list, err := checked(c); err != nil || onlyContents(list) != nil {
				t.Errorf("check after the repair: %v, %v", list, err)
			}
			s, err := Open(ctx, c, tinyOptions())
			if err == nil {
				err = s.Close()
			}
			if err != nil {
				t.Errorf("open after the repair: %v", err)
			}
		})
	}
}

// TestDamageIsNotSilent damages each data unit of a volume and expects the
// error to name it, and a rewrite to heal it.
func TestDamageIsNotSilent(t *testing.T) {
	ctx := context.Background()
	m := vfs.NewMem(0)
	s, err := Create(ctx, m, tinyOptions())
	if err != nil {
		t.Fatal(err)
	}
	id := ID{7}
	if _, err := s.Create(ctx, id, 8<<10, nil); err != nil {
		t.Fatal(err)
	}
	d, err := s.OpenDisk(ctx, id, Live)
	if err != nil {
		t.Fatal(err)
	}
	p := noise(8 << 10)
	if _, err := d.WriteAt(p, 0); err != nil {
		t.Fatal(err)
	}
	if err := d.Flush(ctx); err != nil {
		t.Fatal(err)
	}
	slots := make([]slot, 1)
	if err := s.resolve(d.v.view.Load(), 0, 2, slots); err != nil {
		t.Fatal(err)
	}
	_, off := s.files.at(slots[0].addr)
	if err := flip(m, spaceName(0), off+5, 1); err != nil {
		t.Fatal(err)
	}
	got := make([]byte, len(p))
	n, err := d.ReadAt(got, 100)
	ce, ok := errors.AsType[*CorruptError](err)
	if !ok || ce.Volume != id || ce.Off != 2048 || ce.Addr != slots[0].addr {
		t.Fatalf("read: %v, want damage of %v at 2048", err, id)
	}
	if n != 2048-100 || !bytes.Equal(got[:n], p[100:2048]) {
		t.Errorf("read gave %d bytes before the damage, want %d right ones", n, 2048-100)
	}
	problems := 0
	for p, err := range s.Check(ctx) {
		if err != nil || p.Volume != id || p.Off != 2048 {
			t.Errorf("online check: %v %v", p, err)
		}
		problems++
	}
	if problems != 1 {
		t.Errorf("online check found %d problems, want 1", problems)
	}
	if _, err := d.WriteAt(p[2048:3072], 2048); err != nil {
		t.Fatal(err)
	}
	if _, err := d.ReadAt(got, 0); err != nil || !bytes.Equal(got, p) {
		t.Errorf("after the rewrite: %v", err)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
}
