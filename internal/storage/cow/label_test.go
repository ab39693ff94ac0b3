package cow

import (
	"bytes"
	"errors"
	"syscall"
	"testing"

	engine "coppice/internal/cow"
	"coppice/internal/vfs"
)

// However a change of the repository's attributes is cut off, they are the old
// or the new ones, and new once it has returned; the next change works.
func TestLabelCutOff(t *testing.T) {
	before, after := []byte("before"), bytes.Repeat([]byte("after "), 100)
	either := func(m vfs.FS, when string) {
		t.Helper()
		got, err := readLabel(m)
		if err != nil || !bytes.Equal(got, before) && !bytes.Equal(got, after) {
			t.Errorf("%s: attributes %.20q, %v", when, got, err)
		}
	}
	crashes, calls := 0, 0
	for _, fail := range []bool{false, true} {
		for n := 1; ; n++ {
			m := vfs.NewMem(0)
			if err := writeLabel(m, before); err != nil {
				t.Fatal(err)
			}
			call := 0
			err := writeLabel(vfs.NewInject(m, nil, func(c vfs.Call) error {
				if call++; call != n {
					return nil
				}
				if fail {
					return &vfs.ShortWrite{N: int(c.Len / 2), Err: syscall.ENOSPC}
				}
				for cut := range m.Crashes() {
					crashes++
					either(cut, "power cut before "+string(c.Op))
				}
				return nil
			}), after)
			if call < n {
				if err != nil {
					t.Fatal(err)
				}
				for cut := range m.Crashes() {
					if got, err := readLabel(cut); err != nil || !bytes.Equal(got, after) {
						t.Errorf("a change that was acknowledged is lost: %.20q, %v", got, err)
					}
				}
				break
			}
			calls++
			if fail {
				if !errors.Is(err, syscall.ENOSPC) {
					t.Errorf("call %d failed, and the change returned %v", n, err)
				}
				either(m, "after a failure")
			}
			if err := writeLabel(m, before); err != nil {
				t.Errorf("the next change: %v", err)
			}
		}
	}
	if crashes == 0 || calls == 0 {
		t.Errorf("%d crashes, %d calls", crashes, calls)
	}
}

// A file that is not as it was written is told, not believed.
func TestLabelDamaged(t *testing.T) {
	for _, damage := range []func(b []byte) []byte{
		func(b []byte) []byte { b[0] ^= 1; return b },
		func(b []byte) []byte { b[len(b)-1] ^= 1; return b },
		func(b []byte) []byte { return b[:len(b)-1] },
		func(b []byte) []byte { return b[:3] },
		func(b []byte) []byte { return nil },
		func(b []byte) []byte { return make([]byte, 1<<20) },
	} {
		m := vfs.NewMem(0)
		if err := writeLabel(m, []byte("attributes")); err != nil {
			t.Fatal(err)
		}
		f, err := m.Open(labelName)
		if err != nil {
			t.Fatal(err)
		}
		b := make([]byte, len("attributes")+4)
		if _, err := f.ReadAt(b, 0); err != nil {
			t.Fatal(err)
		}
		b = damage(b)
		if err := f.Truncate(int64(len(b))); err != nil {
			t.Fatal(err)
		}
		if _, err := f.WriteAt(b, 0); err != nil {
			t.Fatal(err)
		}
		if err := f.Close(); err != nil {
			t.Fatal(err)
		}
		if got, err := readLabel(m); !errors.Is(err, engine.ErrCorrupt) {
			t.Errorf("%d bytes: %q, %v", len(b), got, err)
		}
	}
}
