package vfs_test

import (
	"errors"
	"math/rand/v2"
	"slices"
	"strings"
	"syscall"
	"testing"

	"coppice/internal/vfs"

	"github.com/google/go-cmp/cmp"
)

// outcomes returns what every crash of m shows through describe, without
// repetitions.
func outcomes(t *testing.T, m *vfs.Mem, describe func(*vfs.Mem) string) []string {
	t.Helper()
	var out []string
	for c := range m.Crashes() {
		out = append(out, describe(c))
	}
	slices.Sort(out)
	return slices.Compact(out)
}

// sectors shows a file as one letter per sector, "." for zeros and "?" for a
// torn one.
func sectors(t *testing.T, name string) func(*vfs.Mem) string {
	return func(m *vfs.Mem) string {
		if !slices.Contains(list(t, m), name) {
			return "missing"
		}
		var out strings.Builder
		for c := range slices.Chunk([]byte(contents(t, m, name)), 512) {
			switch {
			case strings.Count(string(c), string(c[:1])) != len(c):
				out.WriteByte('?')
			case c[0] == 0:
				out.WriteByte('.')
			default:
				out.WriteByte(c[0])
			}
		}
		return out.String()
	}
}

func run(letters string) string {
	var b strings.Builder
	for _, l := range letters {
		b.WriteString(strings.Repeat(string(l), 512))
	}
	return b.String()
}

func same(t *testing.T, got []string, want ...string) {
	t.Helper()
	slices.Sort(want)
	if d := cmp.Diff(want, got); d != "" {
		t.Errorf("outcomes (-want +got):\n%s", d)
	}
}

// durable returns a Mem with the durable file f.
func durable(t *testing.T, letters string) (*vfs.Mem, vfs.File) {
	t.Helper()
	m := vfs.NewMem(0)
	f := create(t, m, "f")
	write(t, f, run(letters), 0)
	ok(t, f.Datasync())
	ok(t, m.SyncDir())
	return m, f
}

func TestCrashKeepsWhatIsDurable(t *testing.T) {
	m, f := durable(t, "ab")
	same(t, outcomes(t, m, sectors(t, "f")), "ab")
	write(t, f, run("c"), 512)
	ok(t, f.Datasync())
	same(t, outcomes(t, m, sectors(t, "f")), "ac")
}

func TestCrashTearsBySector(t *testing.T) {
	m, f := durable(t, "abc")
	write(t, f, run("xy"), 0)
	same(t, outcomes(t, m, sectors(t, "f")), "abc", "xbc", "ayc", "xyc")
}

func TestCrashMayKeepAnOlderVersion(t *testing.T) {
	m, f := durable(t, "a")
	write(t, f, run("x"), 0)
	write(t, f, run("y"), 0)
	write(t, f, "z", 0) // a sector is never torn, so part of a write is seen as part of it
	same(t, outcomes(t, m, sectors(t, "f")), "a", "x", "y", "?")
}

func TestCrashLosesGrowth(t *testing.T) {
	m, f := durable(t, "a")
	write(t, f, run("bc"), 512)
	same(t, outcomes(t, m, sectors(t, "f")), "a", "a..", "ab.", "a.c", "abc")
}

func TestCrashOfAllocateAndTruncate(t *testing.T) {
	m, f := durable(t, "ab")
	ok(t, f.Allocate(0, 2048))
	same(t, outcomes(t, m, sectors(t, "f")), "ab", "ab..")
	ok(t, f.Datasync())
	ok(t, f.Truncate(512))
	same(t, outcomes(t, m, sectors(t, "f")), "ab..", "a...", "a")
}

func TestCrashOfPunch(t *testing.T) {
	m, f := durable(t, "abc")
	ok(t, f.PunchHole(512, 512))
	same(t, outcomes(t, m, sectors(t, "f")), "abc", "a.c")
}

func TestCrashOfUnalignedEnd(t *testing.T) {
	m := vfs.NewMem(0)
	f := create(t, m, "f")
	write(t, f, "12", 0)
	ok(t, f.Datasync())
	ok(t, m.SyncDir())
	write(t, f, "34", 2)
	same(t, outcomes(t, m, func(m *vfs.Mem) string { return contents(t, m, "f") }), "12", "12\x00\x00", "1234")
}

func TestCrashOfDirectoryOperations(t *testing.T) {
	names := func(m *vfs.Mem) string {
		var out []string
		for _, n := range list(t, m) {
			out = append(out, n+"="+contents(t, m, n))
		}
		return strings.Join(out, " ")
	}
	file := func(m *vfs.Mem, name, s string) {
		f := create(t, m, name)
		write(t, f, s, 0)
		ok(t, f.Datasync())
		ok(t, f.Close())
	}
	m := vfs.NewMem(0)
	file(m, "a", "1")
	ok(t, m.SyncDir())
	file(m, "b", "2")
	same(t, outcomes(t, m, names), "a=1", "a=1 b=2")
	ok(t, m.Remove("a"))
	same(t, outcomes(t, m, names), "", "a=1", "b=2", "a=1 b=2")
	ok(t, m.SyncDir())
	same(t, outcomes(t, m, names), "b=2")
	file(m, "tmp", "3")
	ok(t, m.SyncDir())
	ok(t, m.Rename("tmp", "b"))
	same(t, outcomes(t, m, names), "b=2 tmp=3", "b=3")
}

// TestCrashes checks that the enumeration is complete and without
// repetitions, from the durable state to the one last seen.
func TestCrashes(t *testing.T) {
	m, f := durable(t, "abc")
	write(t, f, run("xyz"), 0)
	write(t, f, run("q"), 512)
	var all []string
	for c := range m.Crashes() {
		all = append(all, sectors(t, "f")(c))
	}
	if len(all) != 12 || all[0] != "abc" || all[11] != "xqz" || len(slices.Compact(slices.Sorted(slices.Values(all)))) != 12 {
		t.Errorf("Crashes = %v", all)
	}
	n := 0
	for range m.Crashes() {
		if n++; n == 3 {
			break
		}
	}
	if n != 3 {
		t.Errorf("stopped after %d", n)
	}
}

// TestCrashPicks checks that random crashes are among those enumerated.
func TestCrashPicks(t *testing.T) {
	m, f := durable(t, "abcd")
	write(t, f, run("xy"), 512)
	write(t, f, run("z"), 2048)
	all := outcomes(t, m, sectors(t, "f"))
	rng := rand.New(rand.NewPCG(3, 4))
	seen := map[string]bool{}
	for range 200 {
		got := sectors(t, "f")(m.Crash(rng.IntN))
		if !slices.Contains(all, got) {
			t.Fatalf("Crash gave %q, Crashes only %v", got, all)
		}
		seen[got] = true
	}
	if len(seen) != len(all) {
		t.Errorf("%d of %d outcomes in 200 crashes", len(seen), len(all))
	}
}

func TestKillKeepsWhatWasWritten(t *testing.T) {
	m, f := durable(t, "ab")
	g := create(t, m, "g")
	write(t, g, "g", 0)
	write(t, f, run("x"), 0)
	k := m.Kill()
	if got := sectors(t, "f")(k); got != "xb" {
		t.Errorf("after a kill: %q", got)
	}
	if got := contents(t, k, "g"); got != "g" {
		t.Errorf("after a kill: %q", got)
	}
	same(t, outcomes(t, k, sectors(t, "f")), "ab", "xb")
	// The two go their own ways.
	write(t, f, run("y"), 512)
	same(t, outcomes(t, k, sectors(t, "f")), "ab", "xb")
	kf, err := k.Open("f")
	ok(t, err)
	ok(t, kf.Datasync())
	same(t, outcomes(t, k, sectors(t, "f")), "xb")
	same(t, outcomes(t, m, sectors(t, "f")), "ab", "xb", "ay", "xy")
}

func TestKillThenCrashUndoesRemoval(t *testing.T) {
	m, f := durable(t, "ab")
	ok(t, f.Close())
	ok(t, m.Remove("f"))
	same(t, outcomes(t, m.Kill(), sectors(t, "f")), "ab", "missing")
}

func TestCloneIsUnlocked(t *testing.T) {
	m, _ := durable(t, "a")
	_, err := m.Lock()
	ok(t, err)
	for _, c := range []*vfs.Mem{m.Kill(), m.Crash(func(int) int { return 0 })} {
		_, err := c.Lock()
		ok(t, err)
	}
}

func TestMemCapacity(t *testing.T) {
	m := vfs.NewMem(4 * 4096)
	f := create(t, m, "f")
	write(t, f, strings.Repeat("a", 4097), 0)
	if got := m.Used(); got != 2*4096 {
		t.Errorf("Used = %d", got)
	}
	if free, err := m.Free(); free != 2*4096 || err != nil {
		t.Errorf("Free = %d, %v", free, err)
	}
	fails(t, f.Allocate(0, 5*4096), syscall.ENOSPC)
	if size, err := f.Size(); size != 4097 || err != nil {
		t.Errorf("Size = %d, %v after a failed Allocate", size, err)
	}
	n, err := f.WriteAt(make([]byte, 3*4096), 4096)
	if n != 3*4096 || err != nil {
		t.Errorf("WriteAt = %d, %v", n, err)
	}
	n, err = f.WriteAt(make([]byte, 2*4096), 3*4096)
	if n != 4096 || !errors.Is(err, syscall.ENOSPC) {
		t.Errorf("WriteAt over the limit = %d, %v", n, err)
	}
	if got, want := m.Crash(func(n int) int { return n - 1 }).Used(), int64(4*4096); got != want {
		t.Errorf("Used after a crash = %d, want %d", got, want)
	}
	ok(t, f.PunchHole(100, 3*4096))
	if got := m.Used(); got != 2*4096 {
		t.Errorf("Used after a punch = %d", got)
	}
	ok(t, f.Truncate(10))
	if got := m.Used(); got != 4096 {
		t.Errorf("Used after a truncate = %d", got)
	}
	ok(t, m.Remove("f"))
	if got := m.Used(); got != 4096 {
		t.Errorf("Used while a removed file is open = %d", got)
	}
	ok(t, f.Close())
	if got := m.Used(); got != 0 {
		t.Errorf("Used at the end = %d", got)
	}
}

// TestMemHuge checks that holes cost nothing.
func TestMemHuge(t *testing.T) {
	m := vfs.NewMem(0)
	f := create(t, m, "f")
	ok(t, f.Allocate(0, 64<<40))
	write(t, f, "end", 60<<40)
	ok(t, f.PunchHole(0, 64<<40))
	write(t, f, "end", 64<<40-3)
	ok(t, f.Datasync())
	c := m.Crash(func(n int) int { return n - 1 })
	g, err := c.Open("f")
	ok(t, err)
	b := make([]byte, 4)
	_, err = g.ReadAt(b, 64<<40-4)
	ok(t, err)
	if string(b) != "\x00end" {
		t.Errorf("read %q", b)
	}
}
