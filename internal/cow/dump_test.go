package cow

import (
	"bytes"
	"context"
	"errors"
	"strings"
	"testing"

	"coppice/internal/vfs"
)

// loggedStore returns a store as a kill leaves it: two volumes in its tables
// and one operation of each kind in its log.
func loggedStore(t *testing.T) *vfs.Mem {
	t.Helper()
	ctx := context.Background()
	m := vfs.NewMem(0)
	s, err := Create(ctx, m, tinyOptions())
	if err != nil {
		t.Fatal(err)
	}
	u := int64(tiny.UnitSize)
	d := newDisk(t, s, 1, 32*u, []byte("blob"))
	write := func(off, n int64) {
		t.Helper()
		if _, err := d.WriteAt(noise(int(n)), off); err != nil {
			t.Fatal(err)
		}
		if err := d.Flush(ctx); err != nil {
			t.Fatal(err)
		}
	}
	write(0, 2*u)
	if _, err := s.Snapshot(ctx, []Pair{{Src: ID{1}, New: ID{2}}}); err != nil {
		t.Fatal(err)
	}
	if err := s.sync(ctx); err != nil {
		t.Fatal(err)
	}
	write(4*u, u)
	write(8*u, 8*u)
	if err := d.Zero(ctx, 0, 4*u); err != nil {
		t.Fatal(err)
	}
	_, errCreate := s.Create(ctx, ID{3}, 16*u, nil)
	_, errSnapshot := s.Snapshot(ctx, []Pair{{Src: ID{1}, New: ID{4}}})
	_, errClone := s.Clone(ctx, Pair{Src: ID{2}, New: ID{5}, Attrs: []byte("more")})
	_, errResize := s.Resize(ctx, ID{3}, 8*u)
	err = errors.Join(errCreate, errSnapshot, errClone, errResize,
		s.Revert(ctx, ID{5}, ID{4}), s.SetAttrs(ctx, ID{2}, []byte("abc")), s.Delete(ctx, ID{3}))
	if err != nil {
		t.Fatal(err)
	}
	killed := m.Kill()
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	return killed
}

func dumped(t *testing.T, m *vfs.Mem, volume ID) string {
	t.Helper()
	var b bytes.Buffer
	if err := Dump(context.Background(), m, &b, volume); err != nil {
		t.Fatal(err)
	}
	return b.String()
}

// TestDump looks for every part of a store in what Dump writes.
func TestDump(t *testing.T) {
	m := loggedStore(t)
	text := dumped(t, m, ID{})
	at := 0
	for _, want := range []string{
		"superblock", "version 1", "unit 1024 bytes, 4 entries per page", "generation 2", "replay from frame 4",
		"regions", "volumes",
		"1 01000000-0000-0000-0000-000000000000: writable, 32768 bytes, 2 units mapped, parent 2, 4 bytes of attributes",
		"2 02000000-0000-0000-0000-000000000000: snapshot of epoch ",
		"log", "frame 4 at byte ", ", generation 2, ",
		"volume 1: units 4-4 with their contents",
		"volume 1: units 8-15 at ",
		"volume 3: create 03000000-0000-0000-0000-000000000000, 16384 bytes, 0 bytes of attributes",
		"volume 1: units 0-3 zero",
		"volume 4: snapshot 04000000-0000-0000-0000-000000000000 of volume 1 at epoch ", "attributes of the source",
		"volume 5: clone 05000000-0000-0000-0000-000000000000 of volume 2 at epoch ", "4 bytes of attributes",
		"volume 3: resize to 8192 bytes at epoch ",
		"volume 5: revert to volume 4 at epoch ",
		"volume 2: 3 bytes of attributes",
		"volume 3: delete",
		"ends before frame ",
	} {
		i := strings.Index(text[at:], want)
		if i < 0 {
			t.Fatalf("no %q in its place in\n%s", want, text)
		}
		at += i
	}
	tree := dumped(t, m, ID{2})
	for _, want := range []string{"snapshot of epoch", "units from 0: page of level", "2 references", "units 0-1: data at ", "units 2-3: hole"} {
		if !strings.Contains(tree, want) {
			t.Errorf("no %q in\n%s", want, tree)
		}
	}
	if err := Dump(context.Background(), m, &bytes.Buffer{}, ID{9}); !errors.Is(err, ErrNotFound) {
		t.Errorf("dump of a volume that is not there: %v", err)
	}
}

// TestDumpOfDamage shows as much of a damaged log as there is.
func TestDumpOfDamage(t *testing.T) {
	m := loggedStore(t)
	first := strings.Index(dumped(t, m, ID{}), "frame 5 at byte 7168")
	if first < 0 {
		t.Fatalf("frame 5 is elsewhere in\n%s", dumped(t, m, ID{}))
	}
	if err := flip(m, logName, 7168+frameHeader+9, 1); err != nil {
		t.Fatal(err)
	}
	text := dumped(t, m, ID{})
	if !strings.Contains(text, "frame 4 at byte") || !strings.Contains(text, "log: ends before frame 5, but there is frame") {
		t.Errorf("the damage does not show in\n%s", text)
	}
}
