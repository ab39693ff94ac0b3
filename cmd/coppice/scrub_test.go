package main

import (
	"bytes"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"coppice/internal/cow"
	"coppice/internal/vfs"
)

// TestScrubAndRepair damages the contents of a disk and its map, and has the
// commands find, name and repair that.
func TestScrubAndRepair(t *testing.T) {
	ctx := t.Context()
	path := filepath.Join(t.TempDir(), "store")
	dir, err := vfs.CreateDir(path)
	if err != nil {
		t.Fatal(err)
	}
	s, err := cow.Create(ctx, dir, cow.Options{})
	if err != nil {
		t.Fatal(err)
	}
	id := cow.ID{1, 15: 2}
	if _, err := s.Create(ctx, id, 1<<30, nil); err != nil {
		t.Fatal(err)
	}
	d, err := s.OpenDisk(ctx, id, cow.Live)
	if err != nil {
		t.Fatal(err)
	}
	mark := func(n byte) []byte { return bytes.Repeat([]byte("unit "+string('a'+rune(n))), 4096/6+1)[:4096] }
	for i := range byte(3) {
		if _, err := d.WriteAt(mark(i), 8<<20+int64(i)*4096); err != nil {
			t.Fatal(err)
		}
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(path, "space-0000")
	damage := func(find []byte) { // a byte of each place that has it
		t.Helper()
		b, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		n := 0
		for at := 0; ; n++ {
			i := bytes.Index(b[at:], find)
			if i < 0 {
				break
			}
			b[at+i] ^= 1
			at += i + 1
		}
		if n == 0 {
			t.Fatalf("%q is nowhere", find[:8])
		}
		if err := os.WriteFile(file, b, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	expect := func(code int, want string, args ...string) {
		t.Helper()
		got := runCommand(t, append(args, path)...)
		if got.code != code || !strings.Contains(got.stdout+got.stderr, want) {
			t.Errorf("coppice %v: exit code %d, want %d; want %q in:\n%s%s", args, got.code, code, want, got.stdout, got.stderr)
		}
	}
	expect(exitOK, "all of it can be read", "scrub", "--rate", "1000")
	expect(exitOK, "0 problems", "check", "--repair")
	damage(mark(0))
	damage(mark(1))
	where := "volume 01000000-0000-0000-0000-000000000002, "
	expect(exitBadNews, where+"8192 bytes from 8388608: unit ", "scrub")
	expect(exitBadNews, where+"8192 bytes from 8388608: unit ", "check")
	expect(exitBadNews, "1 problem, 0 put right", "check", "--repair", "--accept-loss")

	// All of the volume table is there twice: damage
	// the record of the volume in one of its two copies.
	b, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	first := bytes.Index(b, id[:])
	if first < 0 || !bytes.Contains(b[first+1:], id[:]) {
		t.Fatal("the record is not there twice")
	}
	b[first] ^= 1
	if err := os.WriteFile(file, b, 0o600); err != nil {
		t.Fatal(err)
	}
	expect(exitBadNews, "its copy is whole", "check")
	expect(exitBadNews, "its copy is whole: restored", "scrub")
	expect(exitBadNews, "1 problem found", "check")

	if err := os.Remove(filepath.Join(path, "log")); err != nil {
		t.Fatal(err)
	}
	for _, args := range [][]string{{"check"}, {"check", "--repair"}, {"scrub"}} {
		expect(exitUnusable, "--accept-loss if what was in it may be given up", args...)
	}
	expect(exitBadNews, "log is missing: given up", "check", "--repair", "--accept-loss")
	expect(exitBadNews, "1 problem found", "check")
}
