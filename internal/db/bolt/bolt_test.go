package bolt_test

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"testing"

	"github.com/google/go-cmp/cmp"
	"go.etcd.io/bbolt"

	"coppice/internal/db"
	"coppice/internal/db/bolt"
)

func open(t *testing.T, path string) *bolt.Store {
	t.Helper()
	s, err := bolt.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func closeStore(t *testing.T, s *bolt.Store) {
	t.Helper()
	if err := s.Close(); err != nil {
		t.Error(err)
	}
}

// reopen checks the structure of the file, closes it and opens it again.
func reopen(t *testing.T, s *bolt.Store, path string) *bolt.Store {
	t.Helper()
	if err := errors.Join(s.Check(), s.Close()); err != nil {
		t.Fatal(err)
	}
	return open(t, path)
}

func load(t *testing.T, s *bolt.Store) (uint64, []db.Row) {
	t.Helper()
	revision, rows, err := s.Load(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	var out []db.Row
	for row, err := range rows {
		if err != nil {
			t.Fatal(err)
		}
		row.Data = append([]byte(nil), row.Data...)
		out = append(out, row)
	}
	return revision, out
}

func TestStore(t *testing.T) {
	path := filepath.Join(t.TempDir(), "objects.db")
	s := open(t, path)
	if revision, rows := load(t, s); revision != 0 || len(rows) != 0 {
		t.Errorf("a new store has revision %d and rows %v", revision, rows)
	}
	row := func(class, ref, data string) db.Row { return db.Row{Class: class, Ref: ref, Data: []byte(data)} }
	for _, b := range []db.Batch{
		{Revision: 7, Rows: []db.Row{row("VDI", "b", "1"), row("VDI", "a", "2"), row("host", "h", "3")}},
		{Revision: 9, Rows: []db.Row{row("VDI", "b", "4"), {Class: "VDI", Ref: "a"}, {Class: "VM", Ref: "none"}}},
		{Revision: 12, Rows: []db.Row{row("VDI", "c", "5"), {Class: "VDI", Ref: "c"}, row("VDI", "d", "")}},
	} {
		if err := s.Commit(t.Context(), b); err != nil {
			t.Fatal(err)
		}
		s = reopen(t, s, path)
	}
	revision, rows := load(t, s)
	want := []db.Row{row("VDI", "b", "4"), {Class: "VDI", Ref: "d"}, row("host", "h", "3")}
	if diff := cmp.Diff(want, rows); diff != "" || revision != 12 {
		t.Errorf("revision %d, rows (-want +got)\n%s", revision, diff)
	}

	// A failed batch leaves nothing behind.
	err := s.Commit(t.Context(), db.Batch{Revision: 13, Rows: []db.Row{row("VDI", "e", "6"), row("VDI", "", "7")}})
	if err == nil {
		t.Error("a row without reference was accepted")
	}
	if revision, again := load(t, s); revision != 12 || len(again) != len(rows) {
		t.Errorf("after a failed batch: revision %d, %d rows", revision, len(again))
	}
	if fi, err := os.Stat(path); err != nil || fi.Mode().Perm() != 0o600 {
		t.Errorf("permissions: %v, %v", fi.Mode(), err)
	}
	if err := errors.Join(s.Check(), s.Close()); err != nil {
		t.Error(err)
	}
}

// TestFullFileSystem refuses batches before it begins them, takes those that delete into the reserve, and goes
// on when there is room again.
func TestFullFileSystem(t *testing.T) {
	path := filepath.Join(t.TempDir(), "objects.db")
	s := open(t, path)
	room := int64(1 << 30)
	s.SetFree(func() (int64, error) { return room, nil })
	revision := uint64(0)
	commit := func(rows ...db.Row) error {
		revision++
		return s.Commit(t.Context(), db.Batch{Revision: revision, Rows: rows})
	}
	put := func(ref string, size int) db.Row {
		return db.Row{Class: "VDI", Ref: ref, Data: bytes.Repeat([]byte("x"), size)}
	}
	for i := range 20 {
		if err := commit(put(fmt.Sprint(i), 100)); err != nil {
			t.Fatal(err)
		}
	}
	room = 0
	for range 50 { // free pages that are nobody's reserve may be taken
		if err := commit(put("big", 64<<10)); err != nil && !errors.Is(err, db.ErrFull) {
			t.Fatal(err)
		}
		if err := commit(db.Row{Class: "VDI", Ref: "big"}); err != nil {
			t.Fatal(err)
		}
	}
	if err := commit(put("huge", 4<<20)); !errors.Is(err, db.ErrFull) {
		t.Errorf("without room: got %v, want ErrFull", err)
	}
	if err := commit(db.Row{Class: "VDI", Ref: "0"}, put("huge", 4<<20)); !errors.Is(err, db.ErrFull) {
		t.Errorf("deleting a little and putting much without room: got %v, want ErrFull", err)
	}
	for i := range 20 {
		if err := commit(db.Row{Class: "VDI", Ref: fmt.Sprint(i)}, put("SR", 100)); err != nil {
			t.Errorf("deleting row %d without room: %v", i, err)
		}
	}
	if _, rows := load(t, s); len(rows) != 1 {
		t.Errorf("%d rows are left, want 1", len(rows))
	}
	room = 1 << 30
	if err := commit(put("huge", 4<<20)); err != nil {
		t.Errorf("with room again: %v", err)
	}
	if err := errors.Join(s.Check(), s.Close()); err != nil {
		t.Error(err)
	}
}

func TestLoadStops(t *testing.T) {
	s := open(t, filepath.Join(t.TempDir(), "db"))
	defer closeStore(t, s)
	var b db.Batch
	for i := range 10 {
		b.Rows = append(b.Rows, db.Row{Class: "c" + strconv.Itoa(i%2), Ref: strconv.Itoa(i), Data: []byte("x")})
	}
	if err := s.Commit(t.Context(), b); err != nil {
		t.Fatal(err)
	}
	_, rows, err := s.Load(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	n := 0
	for _, err := range rows {
		if err != nil {
			t.Fatal(err)
		}
		if n++; n == 3 {
			break
		}
	}
	if n != 3 {
		t.Errorf("%d rows before the break", n)
	}

	ctx, cancel := context.WithCancelCause(t.Context())
	why := errors.New("why")
	_, rows, err = s.Load(ctx)
	if err != nil {
		t.Fatal(err)
	}
	cancel(why)
	for _, err := range rows {
		if !errors.Is(err, why) {
			t.Errorf("cancelled load: %v", err)
		}
	}
}

func TestOpenRefuses(t *testing.T) {
	dir := t.TempDir()
	locked := filepath.Join(dir, "locked")
	s := open(t, locked)
	defer closeStore(t, s)
	if _, err := bolt.Open(locked); !errors.Is(err, bolt.ErrLocked) {
		t.Errorf("a locked file: %v", err)
	}

	other := filepath.Join(dir, "other")
	write := func(path string, fn func(tx *bbolt.Tx) error) {
		t.Helper()
		file, err := bbolt.Open(path, 0o600, nil)
		if err != nil {
			t.Fatal(err)
		}
		if err := errors.Join(file.Update(fn), file.Close()); err != nil {
			t.Fatal(err)
		}
	}
	write(other, func(tx *bbolt.Tx) error { _, err := tx.CreateBucket([]byte("x")); return err })
	newer := filepath.Join(dir, "newer")
	if err := open(t, newer).Close(); err != nil {
		t.Fatal(err)
	}
	write(newer, func(tx *bbolt.Tx) error {
		return tx.Bucket([]byte("meta")).Put([]byte("format"), []byte{0, 0, 0, 0, 0, 0, 0, 2})
	})
	for path, version := range map[string]uint64{other: 0, newer: 2} {
		before, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		_, err = bolt.Open(path)
		if after, e := os.ReadFile(path); e != nil || !bytes.Equal(before, after) {
			t.Errorf("%s: refusing it changed it (%v)", path, e)
		}
		if f, ok := errors.AsType[*bolt.FormatError](err); !ok || f.Version != version || f.Path != path {
			t.Errorf("%s: got %v", path, err)
		}
	}

	junk := filepath.Join(dir, "junk")
	if err := os.WriteFile(junk, make([]byte, 1<<16), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, path := range []string{junk, filepath.Join(dir, "no", "such", "directory")} {
		if _, err := bolt.Open(path); err == nil {
			t.Errorf("%s was opened", path)
		}
	}
}

// written returns the bytes of a database file to be damaged, and the rows that were committed to it.
func written(t *testing.T) (whole []byte, b db.Batch) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "db")
	s := open(t, path)
	for i := range 300 {
		b.Rows = append(b.Rows, db.Row{Class: "VDI", Ref: strconv.Itoa(i), Data: make([]byte, 100)})
	}
	if err := errors.Join(s.Commit(t.Context(), b), s.Close()); err != nil {
		t.Fatal(err)
	}
	whole, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return whole, b
}

// TestDamage writes junk over each page of a file in turn, and cuts the file at each page: opening, loading,
// checking and committing end with an error or with rows, never with a crash.
func TestDamage(t *testing.T) {
	dir := t.TempDir()
	whole, b := written(t)
	page := os.Getpagesize()
	failures := 0
	try := func(name string, data []byte) {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, data, 0o600); err != nil {
			t.Fatal(err)
		}
		err := func() (err error) {
			s, err := bolt.Open(path)
			if err != nil {
				return err
			}
			defer func() { err = errors.Join(err, s.Close()) }()
			_, rows, err := s.Load(t.Context())
			if err != nil {
				return err
			}
			for _, err := range rows {
				if err != nil {
					return err
				}
			}
			return errors.Join(s.Check(), s.Commit(t.Context(), b))
		}()
		if err != nil {
			failures++
		}
	}
	for i := 0; i < len(whole); i += page {
		bad := append([]byte(nil), whole...)
		for j := range page {
			bad[i+j] = byte(j * 7)
		}
		try("junk"+strconv.Itoa(i), bad)
		try("cut"+strconv.Itoa(i), whole[:i+page/2])
	}
	if failures == 0 {
		t.Error("no damage was found")
	}
}

// TestDamagedKeys makes the first key of each leaf reach beyond the file, and the second one the same as the first: either
// is found while rows are loaded, if not before.
func TestDamagedKeys(t *testing.T) {
	dir := t.TempDir()
	whole, _ := written(t)
	const ( // of bbolt's pages
		flags, leaf     = 8, 2
		count           = 10
		header, element = 16, 16
		pos, size       = 4, 8 // in an element
	)
	load := func(data []byte) error {
		path := filepath.Join(dir, "bad")
		if err := os.WriteFile(path, data, 0o600); err != nil {
			t.Fatal(err)
		}
		s, err := bolt.Open(path)
		if err != nil {
			return err
		}
		_, rows, err := s.Load(t.Context())
		if err != nil {
			return errors.Join(err, s.Close())
		}
		for _, err = range rows {
			if err != nil {
				break
			}
		}
		return errors.Join(err, s.Close())
	}
	long, again := 0, 0
	for at := 0; at < len(whole); at += os.Getpagesize() {
		if whole[at+flags] != leaf || whole[at+count] < 3 {
			continue
		}
		first := at + header
		bad := bytes.Clone(whole)
		binary.LittleEndian.PutUint32(bad[first+size:], 1<<24)
		if errors.Is(load(bad), bolt.ErrCorrupt) {
			long++
		}
		bad = bytes.Clone(whole)
		second := first + element
		binary.LittleEndian.PutUint32(bad[second+pos:], binary.LittleEndian.Uint32(bad[first+pos:])-element)
		copy(bad[second+size:], bad[first+size:first+element])
		if errors.Is(load(bad), bolt.ErrCorrupt) {
			again++
		}
	}
	if long == 0 || again == 0 {
		t.Errorf("%d keys that are too long and %d that come twice were found", long, again)
	}
}
