package cow

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"

	"coppice/internal/vfs"
)

// TestReadersKeepUnits holds a read between the moment it has looked up where
// its bytes are and the moment it reads them, while these are overwritten and
// their space is wanted by others.
func TestReadersKeepUnits(t *testing.T) {
	ctx := context.Background()
	var armed atomic.Bool
	reading, goOn := make(chan struct{}), make(chan struct{})
	hook := func(c vfs.Call) error {
		if c.Op == vfs.OpRead && strings.HasPrefix(c.Name, "space-") && armed.CompareAndSwap(true, false) {
			close(reading)
			<-goOn
		}
		return nil
	}
	m := vfs.NewMem(0)
	s, err := Create(ctx, vfs.NewInject(m, nil, hook), tinyOptions())
	if err != nil {
		t.Fatal(err)
	}
	const size = 8 << 10 // written directly, all in one class of units
	d := newDisk(t, s, 1, size, nil)
	write := func(b byte) []byte {
		t.Helper()
		p := bytes.Repeat([]byte{b}, size)
		if _, err := d.WriteAt(p, 0); err != nil {
			t.Fatal(err)
		}
		if err := s.sync(ctx); err != nil {
			t.Fatal(err)
		}
		return p
	}
	want := write(1)
	got := make([]byte, size)
	done := make(chan error)
	armed.Store(true)
	go func() {
		_, err := d.ReadAt(got, 0)
		done <- err
	}()
	<-reading
	for i := byte(2); i < 12; i++ {
		write(i)
	}
	close(goOn)
	if err := <-done; err != nil || !bytes.Equal(got, want) {
		t.Errorf("the read gave %x…, %v, want what was there when it began", got[:4], err)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	if err := checkClean(m); err != nil {
		t.Fatal(err)
	}
}

// TestFramesAreKeyed offers frames that somebody who knows everything but the
// key of the log could have written into a volume, and from there into the log.
func TestFramesAreKeyed(t *testing.T) {
	sb := &super{uuid: [16]byte{1}, logKey: [16]byte{2}}
	own := newFrameCodec(sb)
	sb.logKey[0]++
	foreign := newFrameCodec(sb)
	payload := []byte("payload")
	f := frameInfo{gen: 3, seq: 4, n: uint32(len(payload)), crc: foreign.sum(payload)}
	b := make([]byte, frameHeader)
	foreign.put(b, f)
	if got, ok := own.get(b); ok {
		t.Errorf("a header of another key passes: %+v", got)
	}
	if own.sum(payload) == f.crc {
		t.Error("a payload of another key passes")
	}
	own.put(b, f)
	if got, ok := own.get(b); !ok || got != f {
		t.Errorf("own header: %+v, %v", got, ok)
	}
	for i := range b {
		c := bytes.Clone(b)
		c[i] ^= 0x10
		if got, ok := own.get(c); ok && got != f {
			t.Errorf("a header damaged in byte %d passes: %+v", i, got)
		}
	}
}

// TestFramesFollowEachOther puts a frame of the right number behind another one
// than it was written for: it is not a part of the log.
func TestFramesFollowEachOther(t *testing.T) {
	m := vfs.NewMem(0)
	file, err := m.Create(logName)
	if err != nil {
		t.Fatal(err)
	}
	size := uint64(minLogBytes(tiny))
	if err := file.Allocate(0, int64(size)); err != nil {
		t.Fatal(err)
	}
	fresh := func() *redoLog {
		return &redoLog{
			file: file, codec: newFrameCodec(&super{logKey: [16]byte{2}}), size: size,
			align: tiny.frameAlign(), head: logPos{seq: 1},
		}
	}
	write := func(l *redoLog, s string) {
		t.Helper()
		if err := l.write(1, []byte(s)); err != nil {
			t.Fatal(err)
		}
	}
	read := func() (out []string) {
		t.Helper()
		if err := fresh().scan(1, func(f frame) error {
			out = append(out, string(f.payload))
			return nil
		}); err != nil {
			t.Fatal(err)
		}
		return out
	}
	l := fresh()
	l.head.seq = 0 // a frame of the lap before
	write(l, "old")
	if got := read(); len(got) != 0 {
		t.Errorf("frames %q, want none: the frame has another number", got)
	}
	l = fresh()
	write(l, "one")
	write(l, "two")
	if got := read(); len(got) != 2 {
		t.Fatalf("frames %q, want two", got)
	}
	l = fresh() // the first frame is written again, with other contents
	write(l, "ONE")
	if got := read(); len(got) != 1 || got[0] != "ONE" {
		t.Errorf("frames %q, want only the first: the second was written behind another one", got)
	}
	if err := file.Close(); err != nil {
		t.Fatal(err)
	}
}

// TestUnitsOfTheLogAreKept has units written, named in the log and overwritten
// while a checkpoint is being made: the log that the next recovery replays
// names them, so that they must not be reused before the checkpoint after.
func TestUnitsOfTheLogAreKept(t *testing.T) {
	ctx := context.Background()
	var armed atomic.Bool
	held, goOn := make(chan struct{}), make(chan struct{})
	hook := func(c vfs.Call) error {
		if c.Op == vfs.OpWrite && c.Name == superName && armed.CompareAndSwap(true, false) {
			close(held)
			<-goOn
		}
		return nil
	}
	m := vfs.NewMem(0)
	s, err := Create(ctx, vfs.NewInject(m, nil, hook), tinyOptions())
	if err != nil {
		t.Fatal(err)
	}
	const size = 8 << 10
	d := newDisk(t, s, 1, 4*size, nil)
	want := make([]byte, 4*size)
	write := func(b byte, off int) {
		t.Helper()
		p := bytes.Repeat([]byte{b}, size)
		copy(want[off:], p)
		if _, err := d.WriteAt(p, int64(off)); err != nil {
			t.Fatal(err)
		}
		if err := d.Flush(ctx); err != nil {
			t.Fatal(err)
		}
	}
	write(1, 3*size)
	armed.Store(true)
	synced := make(chan error)
	go func() { synced <- s.sync(ctx) }()
	<-held
	write(2, 0)
	write(3, 0)
	close(goOn)
	if err := <-synced; err != nil {
		t.Fatal(err)
	}
	if err := s.awaitReleases(ctx); err != nil {
		t.Fatal(err)
	}
	write(4, size)
	write(5, 2*size)
	r, err := Open(ctx, m.Kill(), tinyOptions())
	if err != nil {
		t.Fatal(err)
	}
	rd, err := r.OpenDisk(ctx, ID{1}, Live)
	if err != nil {
		t.Fatal(err)
	}
	got := make([]byte, len(want))
	if _, err := rd.ReadAt(got, 0); err != nil || !bytes.Equal(got, want) {
		t.Errorf("after a kill: not what was flushed (%v)", err)
	}
	for _, s := range []*Store{r, s} {
		if err := s.Close(); err != nil {
			t.Fatal(err)
		}
	}
}

// TestFrameNumbersAreNotReused tears the last frame and expects the recovery to
// leave its number out.
func TestFrameNumbersAreNotReused(t *testing.T) {
	ctx := context.Background()
	m := vfs.NewMem(0)
	s, err := Create(ctx, m, tinyOptions())
	if err != nil {
		t.Fatal(err)
	}
	for i := range byte(3) {
		if _, err := s.Create(ctx, ID{i + 1}, 1<<10, nil); err != nil {
			t.Fatal(err)
		}
	}
	torn := s.log.head // behind the last frame
	c := m.Kill()
	if err := flip(c, logName, int64(torn.off)-int64(tiny.UnitSize)+frameHeader, 1); err != nil {
		t.Fatal(err)
	}
	r, err := Open(ctx, c, tinyOptions())
	if err != nil {
		t.Fatal(err)
	}
	if n := r.super.log.seq; n != torn.seq {
		t.Errorf("the next frame has number %d, want %d: the torn one had %d", n, torn.seq, torn.seq-1)
	}
	for _, s := range []*Store{r, s} {
		if err := s.Close(); err != nil {
			t.Fatal(err)
		}
	}
}

// TestFailedSyncThenPowerCut lets syncs fail, after which the page cache shows
// what the device does not have, kills the process, and takes the power away in
// the recovery.
func TestFailedSyncThenPowerCut(t *testing.T) {
	rng := rand.New(rand.NewPCG(12, 1))
	ops := []op{{kind: "create", a: 12, b: 1}}
	for range 12 {
		for _, kind := range []string{"write", "flush", "big", "snapshot", "sync", "delete"} {
			ops = append(ops, op{kind, rng.Uint32(), rng.Uint32(), rng.Uint32(), rng.Uint64()})
		}
	}
	for _, name := range []string{superName, logName, "regions-*", "space-*"} {
		for n := 1; n <= 8; n++ {
			f := &vfs.Fault{Ops: []vfs.Op{vfs.OpDatasync}, Name: name, Nth: n, Err: syscall.EIO}
			w, err := newWorld(tinyOptions())
			if err != nil {
				t.Fatal(err)
			}
			c := &cutter{w: w, rng: rng, st: &cutStats{}}
			w.inj = vfs.NewInject(w.mem, nil, func(call vfs.Call) error {
				if w.s == nil {
					return nil // opening
				}
				return f.Hook(call)
			})
			s := w.s
			w.s = nil
			if err := s.Close(); err != nil {
				t.Fatal(err)
			}
			if s, err = Open(context.Background(), w.inj, w.opts); err != nil {
				t.Fatal(err)
			}
			w.s = s
			var before map[ID]*mvol
			for _, o := range ops {
				before = cloneModel(w.vols)
				if err = w.step(o); err != nil {
					break
				}
			}
			if err != nil && expected(err) != nil {
				t.Fatal(err)
			}
			for range 30 {
				if err := c.verify(w.mem.Kill(), before, true); err != nil {
					t.Fatalf("sync %d of %s failed: %v", n, name, err)
				}
			}
			w.abandon()
		}
	}
}

// TestSuperblockIsVerified damages each byte of a superblock.
func TestSuperblockIsVerified(t *testing.T) {
	b := (&super{geo: tiny, gen: 3, epoch: 9, nextID: 4, regions: 2, logSize: 64 << 10}).encode()
	if _, err := decodeSuper(b); err != nil {
		t.Fatal(err)
	}
	for i := range b {
		c := bytes.Clone(b)
		c[i] ^= 1 << (i % 8)
		if _, err := decodeSuper(c); !errors.Is(err, errNoSlot) {
			t.Errorf("damaged in byte %d: %v", i, err)
		}
	}
}

// TestRegionTableIsVerified damages the region table.
func TestRegionTableIsVerified(t *testing.T) {
	m, _ := sample(t)
	_, sb := storedSuper(t, m)
	for off := int64(0); off < tablePageSize; off += 7 {
		c := m.Kill()
		if err := flip(c, regionsName(sb.gen), off, 1<<(off%8)); err != nil {
			t.Fatal(err)
		}
		if _, err := Open(context.Background(), c, tinyOptions()); !errors.Is(err, ErrCorrupt) {
			t.Errorf("damaged in byte %d: %v", off, err)
		}
	}
}

// TestSlotsAlternate expects the superblock of the generation before to be there
// still when a new one has been written.
func TestSlotsAlternate(t *testing.T) {
	ctx := context.Background()
	m := vfs.NewMem(0)
	s, err := Create(ctx, m, tinyOptions())
	if err != nil {
		t.Fatal(err)
	}
	for i := range byte(4) {
		if _, err := s.Create(ctx, ID{i + 1}, 1<<10, nil); err != nil {
			t.Fatal(err)
		}
		if err := s.sync(ctx); err != nil {
			t.Fatal(err)
		}
		gen := s.durableGen.Load()
		b := make([]byte, superSize)
		for slot := range uint64(superSlots) {
			if _, err := s.superF.ReadAt(b, int64(slot)*slotSize); err != nil {
				t.Fatal(err)
			}
			want := gen
			if slot%2 != gen%2 {
				want--
			}
			if sb, err := decodeSuper(b); err != nil || sb.gen != want {
				t.Errorf("generation %d: slot %d has %+v, %v, want generation %d", gen, slot, sb, err, want)
			}
		}
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
}

// TestOpenSettles expects a recovery to sync every file, and to drop the cached
// pages of those whose newest state it goes by, before it writes anything.
func TestOpenSettles(t *testing.T) {
	m, _ := sample(t)
	var lines bytes.Buffer
	s, err := Open(context.Background(), vfs.NewTrace(m, &lines), tinyOptions())
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	before, _, _ := strings.Cut(lines.String(), "\nwrite ")
	for _, want := range []string{
		"datasync super\nevict super 0+0\n", "datasync regions-0\nevict regions-0 0+0\n",
		"datasync regions-1\nevict regions-1 0+0\n", "datasync log\nevict log 0+0\n", "datasync space-0000\n",
	} {
		if !strings.Contains(before, want) {
			t.Errorf("no %q in\n%s", want, before)
		}
	}
}

// TestLongQueue deletes so many volumes that the reap queue takes several
// blocks, and checks every generation while it becomes shorter: queue and
// counters must be of one generation.
func TestLongQueue(t *testing.T) {
	ctx := context.Background()
	m := vfs.NewMem(0)
	var mu sync.Mutex
	var taken []*vfs.Mem // guarded by mu
	var armed atomic.Bool
	held, goOn := make(chan struct{}), make(chan struct{})
	hook := func(c vfs.Call) error {
		if c.Op != vfs.OpWrite || c.Name != superName {
			return nil
		}
		if armed.CompareAndSwap(true, false) { // the deletes share the next checkpoint
			close(held)
			<-goOn
		}
		mu.Lock()
		defer mu.Unlock()
		taken = append(taken, m.Kill())
		return nil
	}
	o := tinyOptions()
	o.Limits.ReapPages = 5
	o.LogBytes = 16 << 20 // room for everything until the deletes are over
	s, err := Create(ctx, vfs.NewInject(m, nil, hook), o)
	if err != nil {
		t.Fatal(err)
	}
	n := byte(3 * tiny.linksPerUnit())
	for i := range n {
		if _, err := s.Create(ctx, ID{i + 1}, 8<<10, nil); err != nil {
			t.Fatal(err)
		}
		d, err := s.OpenDisk(ctx, ID{i + 1}, Live)
		if err != nil {
			t.Fatal(err)
		}
		for off := range int64(2) { // two leaves, which the reaper puts on the queue
			if _, err := d.WriteAt(bytes.Repeat([]byte{i + 1}, 1<<10), off*4<<10); err != nil {
				t.Fatal(err)
			}
		}
	}
	armed.Store(true)
	synced := make(chan error)
	go func() { synced <- s.sync(ctx) }()
	<-held
	for i := range n {
		if err := s.Delete(ctx, ID{i + 1}); err != nil {
			t.Fatal(err)
		}
	}
	close(goOn)
	if err := <-synced; err != nil {
		t.Fatal(err)
	}
	for more := true; more; more = s.Usage().Reaping {
		if err := s.sync(ctx); err != nil {
			t.Fatal(err)
		}
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	long := 0
	for i, c := range append(taken, m) {
		if err := checkClean(c); err != nil {
			t.Fatalf("call %d of %d: %v", i, len(taken), err)
		}
		f, err := c.Open(superName)
		if err != nil {
			t.Fatal(err)
		}
		if sb, err := newestSuper(f); err != nil {
			t.Fatal(err)
		} else if sb.queueLen > uint64(tiny.linksPerUnit()) {
			long++
		}
	}
	if long < 10 {
		t.Errorf("only %d of %d generations had a queue of more than a block", long, len(taken))
	}
}

// TestPunchAfterFlag expects the durable region table to say that a region has no
// host space before that is given back: after a crash the store must not count
// on it.
func TestPunchAfterFlag(t *testing.T) {
	ctx := context.Background()
	m := vfs.NewMem(0)
	var mu sync.Mutex
	punched := 0 // guarded by mu
	hook := func(c vfs.Call) error {
		if c.Op != vfs.OpPunch {
			return nil
		}
		mu.Lock()
		defer mu.Unlock()
		punched++
		im, err := readImage(m.Crash(func(int) int { return 0 }), Options{})
		if err != nil {
			t.Error(err)
			return nil
		}
		var file int
		if _, err := fmt.Sscanf(c.Name, "space-%d", &file); err != nil {
			t.Error(err)
		}
		i := file*tiny.RegionsPerFile + int(c.Off/tiny.regionBytes())
		if i >= len(im.space.regions) || !im.space.regions[i].rec.unbacked {
			t.Errorf("region %d is punched out, and the durable table of %d does not say so", i, len(im.space.regions))
		}
		if err := im.close(); err != nil {
			t.Error(err)
		}
		return nil
	}
	s, err := Create(ctx, vfs.NewInject(m, nil, hook), tinyOptions())
	if err != nil {
		t.Fatal(err)
	}
	const size = 1 << 20
	d := newDisk(t, s, 1, size, nil)
	if _, err := d.WriteAt(noise(size), 0); err != nil {
		t.Fatal(err)
	}
	if err := s.sync(ctx); err != nil {
		t.Fatal(err)
	}
	if err := s.Delete(ctx, ID{1}); err != nil {
		t.Fatal(err)
	}
	for more := true; more; more = s.Usage().Reaping || s.reclaimable() || s.space.hasSpare() {
		if err := s.sync(ctx); err != nil {
			t.Fatal(err)
		}
		if err := s.awaitReleases(ctx); err != nil {
			t.Fatal(err)
		}
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	if punched < 5 {
		t.Errorf("%d regions were punched out", punched)
	}
}
