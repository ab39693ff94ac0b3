package cow

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"coppice/internal/vfs"
)

// sparse makes a volume with a unit of data in each of n chunks, whose
// contents differ.
func sparse(t *testing.T, s *Store, id ID, n int, attrs []byte) *Disk {
	t.Helper()
	ctx := context.Background()
	chunk := int64(s.geo.Fanout * s.geo.UnitSize)
	if _, err := s.Create(ctx, id, int64(n)*chunk, attrs); err != nil {
		t.Fatal(err)
	}
	d, err := s.OpenDisk(ctx, id, Live)
	if err != nil {
		t.Fatal(err)
	}
	p := noise(s.geo.UnitSize)
	for i := range n {
		p[0], p[1] = byte(i), byte(i>>8)
		if _, err := d.WriteAt(p, int64(i)*chunk); err != nil {
			t.Fatal(err)
		}
	}
	if err := s.sync(ctx); err != nil {
		t.Fatal(err)
	}
	return d
}

func scrubbedProblems(t *testing.T, s *Store) (list []string) {
	t.Helper()
	for p, err := range s.Scrub(context.Background(), ScrubOptions{}) {
		if err != nil {
			t.Fatal(err)
		}
		list = append(list, fmt.Sprintf("%d at %d: %s", p.Volume[0], p.Off, p.Detail))
	}
	slices.Sort(list)
	return list
}

// TestScrub damages one thing after the other in a store of many steps: each
// shows, for every volume that has it, and what is whole is read once.
func TestScrub(t *testing.T) {
	ctx := context.Background()
	const chunks = 700
	var read atomic.Int64
	m := vfs.NewMem(0)
	s, err := Create(ctx, vfs.NewInject(m, nil, func(c vfs.Call) error {
		if c.Op == vfs.OpRead && c.Name == spaceName(0) {
			read.Add(c.Len)
		}
		return nil
	}), Options{})
	if err != nil {
		t.Fatal(err)
	}
	d := sparse(t, s, ID{1}, chunks, []byte("attributes"))
	if _, err := s.Snapshot(ctx, []Pair{{Src: ID{1}, New: ID{2}}}); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Clone(ctx, Pair{Src: ID{2}, New: ID{3}}); err != nil {
		t.Fatal(err)
	}
	if _, err := d.WriteAt([]byte("own"), 0); err != nil { // has a root, a page and a leaf of its own
		t.Fatal(err)
	}
	if err := s.sync(ctx); err != nil {
		t.Fatal(err)
	}
	read.Store(0)
	if list := scrubbedProblems(t, s); list != nil {
		t.Fatalf("a whole store: %q", list)
	}
	// Data and leaves, a root and a page above them in two versions, and little
	// more: table, attributes, counters, and pages read again on the way.
	if n, most := read.Load()/4096, int64(2*chunks+64); n < 2*chunks || n > most {
		t.Errorf("%d units read, want %d to %d", n, 2*chunks, most)
	}

	unitAt := func(id ID, chunk uint64) entry {
		v := s.byID[id].view.Load()
		slots := make([]slot, 1)
		if err := s.resolve(v, chunk, 0, slots); err != nil {
			t.Fatal(err)
		}
		return slots[0].entry()
	}
	leafAt := func(id ID, chunk uint64) entry {
		e, err := s.leaf(s.byID[id].view.Load().base.root, chunk)
		if err != nil {
			t.Fatal(err)
		}
		return e
	}
	rec := s.space.regions[0].rec
	tests := []struct {
		name string
		addr uint64
		want []string
	}{
		{"shared unit of the first step", unitAt(ID{2}, 3).addr, []string{
			"1 at 3145728: checksum mismatch", "2 at 3145728: checksum mismatch", "3 at 3145728: checksum mismatch",
		}},
		{"shared leaf of the last step", leafAt(ID{2}, chunks-1).addr, []string{
			"1 at 732954624: checksum mismatch", "2 at 732954624: checksum mismatch", "3 at 732954624: checksum mismatch",
		}},
		{"own unit", unitAt(ID{1}, 0).addr, []string{"1 at 0: checksum mismatch"}},
		{"root of two", s.byID[ID{2}].view.Load().base.root.addr, []string{"2 at 0: checksum mismatch, its copy is whole"}},
		{"its copy", s.geo.copyOf(s.byID[ID{2}].view.Load().base.root.addr), []string{"2 at 0: checksum mismatch, its copy is whole"}},
		{"attributes", s.byID[ID{1}].attrs.root.addr, []string{
			"1 at 0: attributes: checksum mismatch", "2 at 0: attributes: checksum mismatch", "3 at 0: attributes: checksum mismatch",
		}},
		{"volume table", s.super.table.addr, []string{"0 at 0: volume table: checksum mismatch, its copy is whole"}},
		{"counters", s.geo.counterAddr(0, 0, int(rec.second&1)), []string{"0 at 0: counters: counter page: checksum mismatch"}},
	}
	for _, tt := range tests {
		if err := flip(m, spaceName(0), int64(tt.addr)*4096+77, 1); err != nil {
			t.Fatal(err)
		}
		if got := scrubbedProblems(t, s); !slices.Equal(got, tt.want) {
			t.Errorf("%s: %q, want %q", tt.name, got, tt.want)
		}
		mended := strings.Contains(tt.want[0], "whole")
		if got := s.Damage(); mended && len(got) != 0 || !mended && len(got) != len(tt.want) {
			t.Errorf("%s: table of damage %v", tt.name, got)
		}
		if mended {
			continue
		}
		if err := flip(m, spaceName(0), int64(tt.addr)*4096+77, 1); err != nil {
			t.Fatal(err)
		}
	}
	if list := scrubbedProblems(t, s); list != nil || len(s.Damage()) != 0 {
		t.Errorf("whole again: %q, %v", list, s.Damage())
	}

	// The worst error: a unit in use that counts as free.
	e := unitAt(ID{2}, 5)
	s.space.mu.Lock()
	p, k, err := s.space.counter(e.addr)
	if err != nil {
		t.Fatal(err)
	}
	was := p.n[k]
	p.n[k] = 0
	s.space.mu.Unlock()
	if got := scrubbedProblems(t, s); len(got) == 0 || !strings.Contains(got[0], "1 at 5242880: unit in use has no references") {
		t.Errorf("a unit without references: %q", got)
	}
	s.space.mu.Lock()
	p.n[k] = was
	s.space.mu.Unlock()

	gone, cancel := context.WithCancel(ctx)
	cancel()
	for _, err := range s.Scrub(gone, ScrubOptions{}) {
		if !errors.Is(err, context.Canceled) {
			t.Errorf("cancelled: %v", err)
		}
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
}

// TestDamageFromReads: what a read meets is in the table until a scrub finds
// it healed.
func TestDamageFromReads(t *testing.T) {
	ctx := context.Background()
	m := vfs.NewMem(0)
	s, err := Create(ctx, m, Options{})
	if err != nil {
		t.Fatal(err)
	}
	d := sparse(t, s, ID{1}, 2, nil)
	slots := make([]slot, 1)
	if err := s.resolve(d.v.view.Load(), 1, 0, slots); err != nil {
		t.Fatal(err)
	}
	if err := flip(m, spaceName(0), int64(slots[0].addr)*4096, 1); err != nil {
		t.Fatal(err)
	}
	p := make([]byte, 10)
	for range 3 {
		if _, err := d.ReadAt(p, 1<<20); !errors.Is(err, ErrCorrupt) {
			t.Fatalf("read of damage: %v", err)
		}
	}
	if _, err := d.WriteAt(p[:1], 1<<20+5); !errors.Is(err, ErrCorrupt) {
		t.Fatalf("patch of damage: %v", err)
	}
	want := Problem{Volume: ID{1}, Off: 1 << 20, Addr: slots[0].addr, Detail: "checksum mismatch"}
	if got := s.Damage(); len(got) != 1 || got[0] != want {
		t.Errorf("table of damage %v, want %v", got, want)
	}
	if _, err := d.WriteAt(noise(4096), 1<<20); err != nil {
		t.Fatal(err)
	}
	if list := scrubbedProblems(t, s); list != nil || len(s.Damage()) != 0 {
		t.Errorf("healed: %q, %v", list, s.Damage())
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
}

// TestScrubRate bounds what a scrub reads in a second.
func TestScrubRate(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s, err := Create(t.Context(), vfs.NewMem(0), Options{})
		if err != nil {
			t.Fatal(err)
		}
		sparse(t, s, ID{1}, 600, nil)
		begin := time.Now()
		for p, err := range s.Scrub(t.Context(), ScrubOptions{BytesPerSecond: 1 << 20}) {
			t.Error(p, err)
		}
		least := time.Duration(2*600) * 4096 * time.Second >> 20
		if took := time.Since(begin); took < least || took > least+time.Second {
			t.Errorf("took %v, want a little more than %v", took, least)
		}
		if err := s.Close(); err != nil {
			t.Fatal(err)
		}
	})
}

// TestScrubUnderLoad scrubs while everything changes: nothing looks damaged.
func TestScrubUnderLoad(t *testing.T) {
	ctx := context.Background()
	m := vfs.NewMem(0)
	o := tinyOptions()
	o.MaxBytes = 16 << 20 // a scrub takes the longer the larger the store is, and the writers do not wait for it
	s, err := Create(ctx, m, o)
	if err != nil {
		t.Fatal(err)
	}
	const size = 128 << 10
	d := newDisk(t, s, 1, size, []byte("a"))
	var stop atomic.Bool
	var wg sync.WaitGroup
	for w := range byte(2) {
		wg.Go(func() {
			rng := rand.New(rand.NewPCG(uint64(w), 1))
			p := noise(16 << 10)
			for n := 0; !stop.Load(); n++ {
				k := rng.IntN(len(p)) + 1
				if _, err := d.WriteAt(p[:k], rng.Int64N(size-int64(k))); err != nil && !full(err) {
					t.Error(err)
				}
				if n%7 == 0 {
					id := ID{2, w, byte(n), byte(n >> 8)}
					_, err := s.Snapshot(ctx, []Pair{{Src: ID{1}, New: id}})
					if full(err) {
						continue
					}
					if err := errors.Join(err, s.sync(ctx), s.Delete(ctx, id)); err != nil {
						t.Error(err)
					}
				}
			}
		})
	}
	for range 100 {
		for p, err := range s.Scrub(ctx, ScrubOptions{}) {
			t.Error(p, err)
		}
	}
	stop.Store(true)
	wg.Wait()
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	if err := checkClean(m); err != nil {
		t.Fatal(err)
	}
}
