package cow

import (
	"bytes"
	"context"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"

	"coppice/internal/vfs"
)

// calls collects the writes and syncs of a store.
type calls struct {
	mu   sync.Mutex
	list []string
}

func (c *calls) hook(call vfs.Call) error {
	if call.Op == vfs.OpWrite || call.Op == vfs.OpDatasync || call.Op == vfs.OpSyncDir {
		c.mu.Lock()
		c.list = append(c.list, strings.TrimSpace(fmt.Sprintf("%s %s", call.Op, call.Name)))
		c.mu.Unlock()
	}
	return nil
}

func (c *calls) take() []string {
	c.mu.Lock()
	defer c.mu.Unlock()
	l := c.list
	c.list = nil
	return l
}

// TestOrderOfSyncs pins what each operation writes and syncs, in order.
func TestOrderOfSyncs(t *testing.T) {
	ctx := context.Background()
	c := &calls{}
	m := vfs.NewMem(0)
	s, err := Create(ctx, vfs.NewInject(m, nil, c.hook), tinyOptions())
	if err != nil {
		t.Fatal(err)
	}
	id := ID{1}
	if _, err := s.Create(ctx, id, 64<<10, nil); err != nil {
		t.Fatal(err)
	}
	d, err := s.OpenDisk(ctx, id, Live)
	if err != nil {
		t.Fatal(err)
	}
	frame := []string{"write log", "datasync log"}
	write := func(off, n int64) func() error {
		return func() error {
			_, err := d.WriteAt(noise(int(n)), off)
			return err
		}
	}
	flush := func() error { return d.Flush(ctx) }
	tests := []struct {
		name string
		do   func() error
		want []string
	}{
		{"small write", write(0, 2000), nil},
		{"flush", flush, frame},
		{"flush of nothing", flush, nil},
		{"large write", write(8<<10, 8<<10), []string{"write space-0000"}},
		{"flush of a large write", flush, append([]string{"datasync space-0000"}, frame...)},
		{"zero", func() error { return d.Zero(ctx, 0, 32<<10) }, nil},
		{"flush of zeros", flush, frame},
		{"snapshot", func() error {
			_, err := s.Snapshot(ctx, []Pair{{Src: id, New: ID{2}}, {Src: id, New: ID{3}}})
			return err
		}, frame},
		{"another small write", write(20<<10, 700), nil},
		{"snapshot of what is open", func() error {
			_, err := s.Snapshot(ctx, []Pair{{Src: id, New: ID{5}}})
			return err
		}, frame},
		{"clone", func() error {
			_, err := s.Clone(ctx, Pair{Src: id, New: ID{4}})
			return err
		}, frame},
		{"revert", func() error { return s.Revert(ctx, ID{4}, ID{2}) }, frame},
		{"delete", func() error { return s.Delete(ctx, ID{2}) }, frame},
		{"pin of a quiet disk", func() error {
			_, err := s.OpenDisk(ctx, id, Pinned)
			return err
		}, nil},
	}
	c.take()
	for _, tt := range tests {
		if err := tt.do(); err != nil {
			t.Fatalf("%s: %v", tt.name, err)
		}
		if got := c.take(); !slices.Equal(got, tt.want) {
			t.Errorf("%s: %q, want %q", tt.name, got, tt.want)
		}
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	got := c.take()
	super := []string{"write super", "write super", "datasync super"}
	at := slices.Index(got, super[0])
	if at < 0 || !slices.Equal(got[at:min(len(got), at+3)], super) {
		t.Fatalf("checkpoint: %q has no %q", got, super)
	}
	for _, want := range []string{"datasync space-0000", "datasync regions-0"} {
		if !slices.Contains(got[:at], want) {
			t.Errorf("checkpoint: %q has no %q before the superblock", got, want)
		}
	}
}

// TestReplay opens a store whose last checkpoint is older than everything in
// it.
func TestReplay(t *testing.T) {
	ctx := context.Background()
	m := vfs.NewMem(0)
	s, err := Create(ctx, m, tinyOptions())
	if err != nil {
		t.Fatal(err)
	}
	a, b := ID{1}, ID{2}
	if _, err := s.Create(ctx, a, 256<<10, []byte("attributes")); err != nil {
		t.Fatal(err)
	}
	d, err := s.OpenDisk(ctx, a, Live)
	if err != nil {
		t.Fatal(err)
	}
	p := noise(40 << 10)
	if _, err := d.WriteAt(p, 512); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Snapshot(ctx, []Pair{{Src: a, New: b}}); err != nil {
		t.Fatal(err)
	}
	if err := d.Zero(ctx, 0, 128<<10); err != nil {
		t.Fatal(err)
	}
	if _, err := d.WriteAt([]byte("small"), 100); err != nil {
		t.Fatal(err)
	}
	if err := d.Flush(ctx); err != nil {
		t.Fatal(err)
	}
	if s.durableGen.Load() != 1 {
		t.Fatalf("generation %d: there was a checkpoint", s.durableGen.Load())
	}
	m = m.Crash(func(int) int { return 0 }) // nothing but what was synced
	for range 2 {                           // the second time from a checkpoint
		if s, err = Open(ctx, m, tinyOptions()); err != nil {
			t.Fatal(err)
		}
		want := map[ID][]byte{b: append(make([]byte, 512), p...), a: make([]byte, len(p)+512)}
		copy(want[a][100:], "small")
		for id, want := range want {
			d, err := s.OpenDisk(ctx, id, Live)
			if err != nil {
				t.Fatal(err)
			}
			got := make([]byte, len(want))
			if _, err := d.ReadAt(got, 0); err != nil || !bytes.Equal(got, want) {
				t.Errorf("volume %v is not what was flushed (%v)", id, err)
			}
			if attrs, err := s.Attrs(ctx, id); err != nil || string(attrs) != "attributes" {
				t.Errorf("attributes %q, %v", attrs, err)
			}
		}
		if err := s.Close(); err != nil {
			t.Fatal(err)
		}
		if err := checkClean(m); err != nil {
			t.Fatal(err)
		}
	}
}

// TestLogLaps goes around the ring many times and crashes after each flush.
func TestLogLaps(t *testing.T) {
	ctx := context.Background()
	m := vfs.NewMem(0)
	s, err := Create(ctx, m, tinyOptions())
	if err != nil {
		t.Fatal(err)
	}
	d := newDisk(t, s, 1, 32<<10, nil)
	want := make([]byte, 32<<10)
	for i := range 300 {
		p := bytes.Repeat([]byte{byte(i + 1)}, 1+i%3000)
		off := i * 991 % (len(want) - len(p))
		copy(want[off:], p)
		if _, err := d.WriteAt(p, int64(off)); err != nil {
			t.Fatal(err)
		}
		if err := d.Flush(ctx); err != nil {
			t.Fatal(err)
		}
		c := m.Crash(func(int) int { return 0 })
		r, err := Open(ctx, c, tinyOptions())
		if err != nil {
			t.Fatalf("round %d: %v", i, err)
		}
		rd, err := r.OpenDisk(ctx, ID{1}, Live)
		if err != nil {
			t.Fatal(err)
		}
		got := make([]byte, len(want))
		if _, err := rd.ReadAt(got, 0); err != nil || !bytes.Equal(got, want) {
			t.Fatalf("round %d: not what was flushed (%v)", i, err)
		}
		if err := r.Close(); err != nil {
			t.Fatal(err)
		}
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
}

// TestLostFrame takes a frame out of the middle of the log: that is damage,
// not a crash, and must not pass for the end.
func TestLostFrame(t *testing.T) {
	ctx := context.Background()
	m := vfs.NewMem(0)
	s, err := Create(ctx, m, tinyOptions())
	if err != nil {
		t.Fatal(err)
	}
	for i := range byte(5) {
		if _, err := s.Create(ctx, ID{i + 1}, 1<<10, nil); err != nil {
			t.Fatal(err)
		}
	}
	c := m.Kill()
	if err := flip(c, logName, 2*int64(tiny.UnitSize)+frameHeader, 1); err != nil {
		t.Fatal(err)
	}
	if _, err := Open(ctx, c, tinyOptions()); !tolerable(err) || err == nil {
		t.Errorf("open with a frame lost: %v", err)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
}

func FuzzRecords(f *testing.F) {
	var b []byte
	for _, r := range []logRecord{
		{kind: recWrite, num: 1, first: 3, count: 1, data: make([]byte, tiny.UnitSize)},
		{kind: recMap, num: 1, first: 3, count: 2, addr: 20, crcs: []uint32{1, 2}},
		{kind: recZero, num: 1, first: 3, count: 7},
		{kind: recCreate, num: 2, id: ID{1}, size: 4096, attrs: []byte("a")},
		{kind: recDerive, epoch: 4, flags: 1, pairs: []logPair{{src: 1, num: 2, id: ID{3}, own: true, attrs: []byte("b")}}},
		{kind: recRevert, num: 1, to: 2, epoch: 5},
		{kind: recResize, num: 1, size: 8192, epoch: 6},
		{kind: recDelete, num: 1},
		{kind: recAttrs, num: 1, attrs: []byte("c")},
		{kind: recEmpty, num: 1},
	} {
		b = r.append(b)
	}
	f.Add(b)
	f.Fuzz(func(t *testing.T, b []byte) {
		recs, err := decodeRecords(b, tiny)
		if err != nil {
			return
		}
		var again []byte
		for i := range recs {
			again = recs[i].append(again)
		}
		if len(again) != len(b) {
			t.Errorf("%d bytes of records become %d", len(b), len(again))
		}
	})
}

// TestLargeOperation makes a group whose record is more than a frame takes: it
// is done within the cut of a checkpoint, and no frame may be written until
// that is durable.
func TestLargeOperation(t *testing.T) {
	ctx := context.Background()
	m := vfs.NewMem(0)
	var s *Store
	var held []int // holders of the commit role when a superblock is written
	watch := false
	s, err := Create(ctx, vfs.NewInject(m, nil, func(c vfs.Call) error {
		if watch && c.Op == vfs.OpWrite && c.Name == superName {
			held = append(held, len(s.commits.role))
		}
		return nil
	}), tinyOptions())
	if err != nil {
		t.Fatal(err)
	}
	if _, err := s.Create(ctx, ID{1}, 4<<10, nil); err != nil {
		t.Fatal(err)
	}
	if err := s.sync(ctx); err != nil {
		t.Fatal(err)
	}
	watch = true
	var pairs []Pair
	for i := range byte(4) {
		pairs = append(pairs, Pair{Src: ID{1}, New: ID{2, i}, Attrs: noise(4 << 10)})
	}
	if infos, err := s.Snapshot(ctx, pairs); err != nil || len(infos) != len(pairs) {
		t.Fatalf("%d snapshots, %v", len(infos), err)
	}
	if !slices.Equal(held, []int{1, 1}) {
		t.Errorf("holders of the role at the writes of the superblock: %d, want one at each of two", held)
	}
	c := m.Crash(func(int) int { return 0 })
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	if s, err = Open(ctx, c, tinyOptions()); err != nil {
		t.Fatal(err)
	}
	for _, p := range pairs {
		if attrs, err := s.Attrs(ctx, p.New); err != nil || !bytes.Equal(attrs, p.Attrs) {
			t.Errorf("snapshot %v after a crash: %v", p.New, err)
		}
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
}
