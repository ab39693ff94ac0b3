package cow

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"coppice/internal/vfs"
)

// repaired runs a repair and returns what it found.
func repaired(m vfs.FS, o RepairOptions) (list []Problem, err error) {
	for p, err := range Repair(context.Background(), m, o) {
		if err != nil {
			return list, err
		}
		list = append(list, p)
	}
	return list, nil
}

func checked(m vfs.FS) (list []Problem, err error) {
	for p, err := range Check(context.Background(), m) {
		if err != nil {
			return list, err
		}
		list = append(list, p)
	}
	return list, nil
}

// onlyContents reports whether problems are no more than contents of volumes
// that cannot be read.
func onlyContents(list []Problem) error {
	for _, p := range list {
		if p.Volume == (ID{}) || p.Done != "" || p.Detail != "checksum mismatch" && p.Detail != "checksum mismatch, of a unit that the log names" && p.Detail != errLost().Detail &&
			p.Detail != "attributes: checksum mismatch" {
			return fmt.Errorf("%v", p)
		}
	}
	return nil
}

// usable opens a repaired store: what can be read of its volumes is as it was.
func usable(m *vfs.Mem, want map[ID][]byte) error {
	s, err := Open(context.Background(), m.Kill(), tinyOptions())
	if err != nil {
		return fmt.Errorf("open: %w", err)
	}
	if err := s.Close(); err != nil {
		return fmt.Errorf("close: %w", err)
	}
	return useDamaged(m, want)
}

// repairFlip flips bits of one byte, and repairs: first as far as it goes
// without a loss, then for good.
func (r *rotten) repairFlip(name string, off int64, bits byte) (err error) {
	defer func() {
		if p := recover(); p != nil {
			err = fmt.Errorf("panic: %v", p)
		}
		if err != nil {
			err = fmt.Errorf("%s, byte %d, bits %#x: %w", name, off, bits, err)
		}
	}()
	m := r.mem.Kill()
	if err := flip(m, name, off, bits); err != nil {
		return err
	}
	want := r.data
	if name == logName && off >= r.lastFrame[0] && off < r.lastFrame[1] {
		want = r.before
	}
	before, err := checked(m.Kill())
	if err == nil && len(before) == 0 { // it hit nothing, or the last frame of the log
		return nil
	}
	first, err := repaired(m, RepairOptions{})
	if err != nil && !errors.Is(err, ErrCorrupt) {
		return err
	}
	after, err := checked(m.Kill())
	if err == nil && len(after) > len(before) {
		return fmt.Errorf("the repair left %v of %v", after, before)
	}
	undone := false
	for _, p := range first {
		undone = undone || p.Done == ""
	}
	if !undone && (err != nil || len(after) > 0) {
		return fmt.Errorf("the repair did %v, and yet: %v, %v", first, after, err)
	}
	second, err := repaired(m, RepairOptions{AcceptLoss: true})
	if err != nil {
		return err
	}
	after, err = checked(m.Kill())
	if err == nil {
		err = onlyContents(after)
	}
	if err != nil {
		return fmt.Errorf("after the repair %v: %w", second, err)
	}
	// What is behind a damage of the log is gone, and so are the volumes of a
	// part of the table of which there was no room for a copy.
	gone := name == logName
	for _, p := range second {
		gone = gone || strings.HasPrefix(p.Detail, "volume table: checksum mismatch") && p.Done == "given up"
	}
	if gone {
		s, err := Open(context.Background(), m, tinyOptions())
		if err != nil {
			return err
		}
		return s.Close()
	}
	return usable(m, want)
}

// TestRepairEveryByte damages one byte of a store at a time and repairs it.
func TestRepairEveryByte(t *testing.T) {
	t.Parallel()
	r := makeRotten(t)
	names, err := r.mem.List()
	if err != nil {
		t.Fatal(err)
	}
	seed := uint64(time.Now().UnixNano())
	rng := rand.New(rand.NewPCG(seed, 6))
	n, end := 1200, time.Time{}
	switch {
	case *soakTime > 0:
		end = time.Now().Add(*soakTime)
	case invariants:
		n = 200
	}
	done := 0
	defer func() { t.Logf("%d flips repaired", done) }()
	for ; end.IsZero() && done < n || !end.IsZero() && time.Now().Before(end); done++ {
		name := names[rng.IntN(len(names))]
		f, err := r.mem.Open(name)
		if err != nil {
			t.Fatal(err)
		}
		size, err := f.Size()
		if err != nil {
			t.Fatal(err)
		}
		if err := f.Close(); err != nil {
			t.Fatal(err)
		}
		if size == 0 {
			continue
		}
		if err := r.repairFlip(name, rng.Int64N(size), byte(1+rng.IntN(255))); err != nil {
			t.Fatal(err)
		}
	}
}

// TestRepairOfASoundStore writes nothing.
func TestRepairOfASoundStore(t *testing.T) {
	r := makeRotten(t)
	c := &calls{}
	list, err := repaired(vfs.NewInject(r.mem, nil, c.hook), RepairOptions{AcceptLoss: true})
	if err != nil || len(list) > 0 {
		t.Fatalf("%v, %v", list, err)
	}
	for _, call := range c.take() {
		if call[:5] == "write" {
			t.Errorf("a sound store: %s", call)
		}
	}
}

// TestLogCutShort takes a part of the file of the log away: what it had was
// acknowledged, so the store is refused until its loss is accepted.
func TestLogCutShort(t *testing.T) {
	ctx := context.Background()
	m := vfs.NewMem(0)
	s, err := Create(ctx, m, tinyOptions())
	if err != nil {
		t.Fatal(err)
	}
	if _, err := s.Create(ctx, ID{1}, 1<<10, nil); err != nil {
		t.Fatal(err)
	}
	size := int64(s.log.size)
	killed := m.Kill()
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	for _, n := range []int64{0, int64(tiny.UnitSize), size - 1} {
		c := killed.Kill()
		f, err := c.Open(logName)
		if err == nil {
			err = errors.Join(f.Truncate(n), f.Close())
		}
		if err != nil {
			t.Fatal(err)
		}
		want := fmt.Sprintf("log: the file has %d bytes instead of %d", n, size)
		if _, err := Open(ctx, c, tinyOptions()); !errors.Is(err, ErrCorrupt) || !strings.Contains(err.Error(), want) {
			t.Fatalf("open with %d of %d bytes: %v", n, size, err)
		}
		for _, done := range []string{"", "given up"} {
			if list, err := checked(c); err != nil || len(list) != 1 || list[0].Detail != want {
				t.Errorf("check with %d of %d bytes: %v, %v", n, size, list, err)
			}
			list, err := repaired(c, RepairOptions{AcceptLoss: done != ""})
			if err != nil || len(list) != 1 || list[0].Detail != want || list[0].Done != done {
				t.Errorf("repair with %d of %d bytes: %v, %v", n, size, list, err)
			}
		}
		if err := checkClean(c); err != nil {
			t.Errorf("after the repair: %v", err)
		}
		if s, err = Open(ctx, c, tinyOptions()); err == nil {
			_, err = s.Create(ctx, ID{2}, 1<<10, nil)
			err = errors.Join(err, s.Close())
		}
		if err != nil {
			t.Errorf("after the repair: %v", err)
		}
	}
}

// TestRepairOfAMissingTable takes either file of the region table away, which
// says nothing that the trees do not.
func TestRepairOfAMissingTable(t *testing.T) {
	ctx := context.Background()
	m, data := sample(t)
	for gen := range uint64(2) {
		c := m.Kill()
		if err := errors.Join(c.Remove(regionsName(gen)), c.SyncDir()); err != nil {
			t.Fatal(err)
		}
		if _, err := Open(ctx, c, tinyOptions()); !errors.Is(err, ErrCorrupt) {
			t.Fatalf("open without %s: %v", regionsName(gen), err)
		}
		list, err := repaired(c, RepairOptions{})
		want := Problem{Detail: regionsName(gen) + " is missing", Done: "made anew"}
		if err != nil || !slices.Contains(list, want) || slices.ContainsFunc(list, func(p Problem) bool { return p.Done == "" }) {
			t.Errorf("repair: %v, %v", list, err)
		}
		c = c.Crash(func(int) int { return 0 })
		if err := errors.Join(checkClean(c), usable(c, data)); err != nil {
			t.Errorf("after the repair: %v", err)
		}
	}
}

// TestRepairOfMissingFiles takes a file away whose contents are nowhere else:
// the store is repaired only with leave to lose them, and then has all that was
// in the other files.
func TestRepairOfMissingFiles(t *testing.T) {
	ctx := context.Background()
	m, data := sample(t)
	names, err := m.List()
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range names {
		if name != logName && !strings.HasPrefix(name, "space-") {
			continue
		}
		c := m.Kill()
		if err := errors.Join(c.Remove(name), c.SyncDir()); err != nil {
			t.Fatal(err)
		}
		if _, err := Open(ctx, c.Kill(), tinyOptions()); !errors.Is(err, ErrCorrupt) {
			t.Fatalf("open without %s: %v", name, err)
		}
		if list, err := repaired(c, RepairOptions{}); !errors.Is(err, ErrCorrupt) || !errors.Is(err, fs.ErrNotExist) || len(list) > 0 {
			t.Fatalf("repair without %s: %v, %v", name, list, err)
		}
		if _, err := c.Open(name); !errors.Is(err, fs.ErrNotExist) {
			t.Fatalf("%s is back: %v", name, err)
		}
		list, err := repaired(c, RepairOptions{AcceptLoss: true})
		if err != nil || !slices.Contains(list, Problem{Detail: name + " is missing", Done: "given up"}) {
			t.Fatalf("repair without %s: %v, %v", name, list, err)
		}
		c = c.Crash(func(int) int { return 0 })
		list, err = checked(c)
		if err == nil {
			err = onlyContents(list)
		}
		if err = errors.Join(err, usable(c, data)); err != nil {
			t.Errorf("after the repair of %s: %v", name, err)
		}
	}
}

// TestCheckOfTheLog damages a unit that nothing but the log refers to, in a file
// that no checkpoint has recorded.
func TestCheckOfTheLog(t *testing.T) {
	ctx := context.Background()
	m := vfs.NewMem(0)
	s, err := Create(ctx, m, tinyOptions())
	if err != nil {
		t.Fatal(err)
	}
	files := len(*s.files.files.Load())
	id, size := ID{1}, 4*tiny.regionBytes()
	if _, err := s.Create(ctx, id, size, nil); err != nil {
		t.Fatal(err)
	}
	d, err := s.OpenDisk(ctx, id, Live)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := d.WriteAt(noise(int(size)), 0); err != nil {
		t.Fatal(err)
	}
	if err := d.Flush(ctx); err != nil {
		t.Fatal(err)
	}
	c := m.Kill()
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	if err := checkClean(c); err != nil {
		t.Fatal(err)
	}
	im, err := readImage(c, Options{})
	if err != nil {
		t.Fatal(err)
	}
	var last logRecord
	ch := newChecker(ctx, im, func(Problem, error) bool { return true })
	if err := errors.Join(ch.scanLog(func(r logRecord) {
		if r.kind == recMap {
			last = r
		}
	}), im.close()); err != nil {
		t.Fatal(err)
	}
	if perFile := uint64(tiny.RegionsPerFile * tiny.regionUnits()); last.addr/perFile < uint64(files) {
		t.Fatalf("unit %d is in one of the first %d files", last.addr, files)
	}
	damageUnit(t, c, tiny, last.addr)
	want := Problem{
		Volume: id, Off: int64(last.first) * int64(tiny.UnitSize), Len: int64(tiny.UnitSize), Addr: last.addr,
		Detail: "checksum mismatch, of a unit that the log names",
	}
	if list, err := checked(c); err != nil || !slices.Equal(list, []Problem{want}) {
		t.Errorf("check: %v, %v, want %v", list, err, want)
	}
	if list, err := repaired(c, RepairOptions{AcceptLoss: true}); err != nil || !slices.Equal(list, []Problem{want}) {
		t.Errorf("repair: %v, %v, want %v", list, err, want)
	}
	s, err = Open(ctx, c, tinyOptions())
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	want.Detail = "checksum mismatch"
	if list, err := checked(c); err != nil || !slices.Equal(list, []Problem{want}) {
		t.Errorf("check after a recovery: %v, %v, want %v", list, err, want)
	}
}

// wreck damages all kinds of things at once, in a store with a snapshot and a
// clone that share a leaf: the leaf, the region table, counters, one of two
// copies, and a slot of the superblock.
func wreck(t *testing.T) (m *vfs.Mem, want map[ID][]byte, lostChunk int64) {
	t.Helper()
	ctx := context.Background()
	m = vfs.NewMem(0)
	s, err := Create(ctx, m, tinyOptions())
	if err != nil {
		t.Fatal(err)
	}
	size := 64 * tiny.UnitSize
	d := newDisk(t, s, 1, int64(size), []byte("one"))
	data := noise(size)
	write := func(p []byte, off int) {
		t.Helper()
		copy(data[off:], p)
		if _, err := d.WriteAt(p, int64(off)); err != nil {
			t.Fatal(err)
		}
	}
	write(data, 0)
	if _, err := s.Snapshot(ctx, []Pair{{Src: ID{1}, New: ID{2}}}); err != nil {
		t.Fatal(err)
	}
	snap := bytes.Clone(data)
	if _, err := s.Clone(ctx, Pair{Src: ID{2}, New: ID{3}}); err != nil {
		t.Fatal(err)
	}
	if err := s.sync(ctx); err != nil {
		t.Fatal(err)
	}
	chunk := tiny.Fanout * tiny.UnitSize
	write(noise(chunk), 5*chunk)
	if err := s.sync(ctx); err != nil {
		t.Fatal(err)
	}
	write(noise(100), 0) // stays in the log
	if err := d.Flush(ctx); err != nil {
		t.Fatal(err)
	}
	want = map[ID][]byte{{1}: data, {2}: snap, {3}: snap}
	const lostAt = 9
	leaf, err := s.leaf(s.byID[ID{2}].view.Load().base.root, lostAt)
	if err != nil {
		t.Fatal(err)
	}
	root := s.byID[ID{2}].view.Load().base.root
	if !root.twice {
		t.Fatal("the root has no copy")
	}
	gen := s.super.gen
	m2 := m.Kill()
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	perFile := uint64(tiny.RegionsPerFile * tiny.regionUnits())
	for _, addr := range []uint64{leaf.addr, root.addr} {
		if err := flip(m2, spaceName(int(addr/perFile)), int64(addr%perFile)*int64(tiny.UnitSize)+3, 0x40); err != nil {
			t.Fatal(err)
		}
	}
	if err := flip(m2, regionsName(gen), 5, 1); err != nil {
		t.Fatal(err)
	}
	if err := flip(m2, superName, int64(gen%2)*slotSize+100, 1); err != nil {
		t.Fatal(err)
	}
	return m2, want, int64(lostAt * chunk)
}

// TestRepair follows a repair of much damage: without leave to lose anything it
// restores copies only; with it the lost range is lost in each volume that had
// it, and nothing else is, and a write heals it.
func TestRepair(t *testing.T) {
	ctx := context.Background()
	m, want, lostChunk := wreck(t)
	if s, err := Open(ctx, m.Kill(), tinyOptions()); !errors.Is(err, ErrCorrupt) {
		t.Fatalf("open: %v, %v", s, err)
	}
	find := func(list []Problem, detail, done string) (n int) {
		for _, p := range list {
			if p.Detail == detail && p.Done == done {
				n++
			}
		}
		return n
	}
	list, err := repaired(m, RepairOptions{})
	if err != nil || find(list, "superblock: slot 0 is damaged", "restored")+find(list, "superblock: slot 1 is damaged", "restored") != 1 ||
		find(list, "checksum mismatch, its copy is whole", "restored") != 1 || find(list, "region table: checksum mismatch", "") != 0 {
		t.Fatalf("first repair: %v, %v", list, err)
	}
	if s, err := Open(ctx, m.Kill(), tinyOptions()); !errors.Is(err, ErrCorrupt) {
		t.Fatalf("open after a repair that could not go on: %v, %v", s, err)
	}
	if list, err = repaired(m, RepairOptions{AcceptLoss: true}); err != nil || find(list, "checksum mismatch", "given up") != 1 {
		t.Fatalf("second repair: %v, %v", list, err)
	}
	if list, err = repaired(m, RepairOptions{AcceptLoss: true}); err != nil {
		t.Fatal(err)
	}
	chunk := int64(tiny.Fanout * tiny.UnitSize)
	seen := map[ID]int64{}
	for _, p := range list {
		if p.Detail != errLost().Detail || p.Off < lostChunk || p.Off+p.Len > lostChunk+chunk {
			t.Errorf("third repair: %v", p)
		}
		seen[p.Volume] += p.Len
	}
	s, err := Open(ctx, m, tinyOptions())
	if err != nil {
		t.Fatal(err)
	}
	for id, data := range want {
		d, err := s.OpenDisk(ctx, id, Live)
		if err != nil {
			t.Fatal(err)
		}
		got := make([]byte, len(data))
		n, err := d.ReadAt(got, 0)
		ce, ok := errors.AsType[*CorruptError](err)
		if !ok || ce.Volume != id || ce.Off != lostChunk || int64(n) != lostChunk || !bytes.Equal(got[:n], data[:n]) {
			t.Errorf("volume %v: %d bytes, %v", id, n, err)
		}
		rest := lostChunk + chunk
		if n, err := d.ReadAt(got[rest:], rest); err != nil || !bytes.Equal(got[rest:], data[rest:]) {
			t.Errorf("volume %v behind the lost range: %d bytes, %v", id, n, err)
		}
		if id == (ID{2}) {
			continue
		}
		if _, err := d.WriteAt([]byte("part"), lostChunk); !errors.Is(err, ErrCorrupt) {
			t.Errorf("a part of a lost unit is written: %v", err)
		}
		if _, err := d.WriteAt(data[lostChunk:rest], lostChunk); err != nil {
			t.Fatal(err)
		}
		if _, err := d.ReadAt(got, 0); err != nil || !bytes.Equal(got, data) {
			t.Errorf("volume %v is not healed: %v", id, err)
		}
	}
	if err := s.sync(ctx); err != nil {
		t.Fatal(err)
	}
	for p, err := range s.Check(ctx) {
		if err != nil || p.Volume != (ID{2}) || p.Off < lostChunk || p.Off+p.Len > lostChunk+chunk {
			t.Errorf("online: %v, %v", p, err)
		}
	}
	if err := s.Delete(ctx, ID{2}); err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(drain(s), s.Close()); err != nil {
		t.Fatal(err)
	}
	if err := checkClean(m); err != nil {
		t.Fatal(err)
	}
}

// TestRepairAfterCrash takes the power away, or kills, at every write of a
// repair: the next repair ends where an undisturbed one does.
func TestRepairAfterCrash(t *testing.T) {
	t.Parallel()
	m, want, _ := wreck(t)
	rng := rand.New(rand.NewPCG(3, 3))
	var mu sync.Mutex
	var crashed []*vfs.Mem
	inj := vfs.NewInject(m, nil, func(vfs.Call) error {
		mu.Lock()
		defer mu.Unlock()
		crashed = append(crashed, m.Kill(), m.Crash(func(int) int { return 0 }), m.Crash(rng.IntN), m.Crash(rng.IntN))
		return nil
	})
	if _, err := repaired(inj, RepairOptions{AcceptLoss: true}); err != nil {
		t.Fatal(err)
	}
	crashed = append(crashed, m.Kill(), m.Crash(func(int) int { return 0 }))
	for i, c := range crashed {
		if _, err := repaired(c, RepairOptions{AcceptLoss: true}); err != nil {
			t.Fatalf("crash %d of %d: %v", i, len(crashed), err)
		}
		list, err := checked(c.Kill())
		if err == nil {
			err = onlyContents(list)
		}
		if err == nil {
			err = usable(c, want)
		}
		if err != nil {
			t.Fatalf("crash %d of %d: %v", i, len(crashed), err)
		}
	}
	t.Logf("%d crashes", len(crashed))
}

// TestRepairOfMissingFilesInterrupted takes a file away and the power at every
// call of the repair. Until the file has its space it is not there; the next
// repair ends where an undisturbed one does, with as much of the host's space.
func TestRepairOfMissingFilesInterrupted(t *testing.T) {
	t.Parallel()
	ctx := context.Background()
	m, data := sample(t)
	names, err := m.List()
	if err != nil {
		t.Fatal(err)
	}
	crashes := 0
	for _, name := range names {
		if name == superName {
			continue
		}
		c := m.Kill()
		if err := errors.Join(c.Remove(name), c.SyncDir()); err != nil {
			t.Fatal(err)
		}
		whole := c.Crash(func(int) int { return 0 })
		if _, err := repaired(whole, RepairOptions{AcceptLoss: true}); err != nil {
			t.Fatal(err)
		}
		rng := rand.New(rand.NewPCG(4, 4))
		var mu sync.Mutex
		var calls int
		var crashed []*vfs.Mem
		inj := vfs.NewInject(c, nil, func(vfs.Call) error {
			mu.Lock()
			defer mu.Unlock()
			switch calls++; calls % 3 {
			case 0:
				crashed = append(crashed, c.Kill())
			case 1:
				crashed = append(crashed, c.Crash(func(int) int { return 0 }))
			default:
				crashed = append(crashed, c.Crash(rng.IntN))
			}
			return nil
		})
		if _, err := repaired(inj, RepairOptions{AcceptLoss: true}); err != nil {
			t.Fatal(err)
		}
		for i, c := range crashed {
			fail := func(err error) { t.Fatalf("%s, crash %d of %d: %v", name, i, len(crashed), err) }
			if s, err := Open(ctx, c.Kill(), tinyOptions()); err == nil { // then it has its space
				if used := c.Used(); used < whole.Used()-int64(8*tiny.UnitSize) {
					fail(fmt.Errorf("the store opens and has %d bytes of host space instead of %d", used, whole.Used()))
				}
				if err := s.Close(); err != nil {
					fail(err)
				}
			}
			if _, err := repaired(c, RepairOptions{AcceptLoss: true}); err != nil {
				fail(err)
			}
			if list, err := c.List(); err != nil || slices.Contains(list, tempName(name)) {
				fail(fmt.Errorf("files %v, %v", list, err))
			}
			if used := c.Used(); used < whole.Used()-int64(8*tiny.UnitSize) {
				fail(fmt.Errorf("%d bytes of host space instead of %d", used, whole.Used()))
			}
			list, err := checked(c)
			if err == nil {
				err = onlyContents(list)
			}
			if err = errors.Join(err, usable(c, data)); err != nil {
				fail(err)
			}
		}
		crashes += len(crashed)
	}
	t.Logf("%d crashes", crashes)
}
