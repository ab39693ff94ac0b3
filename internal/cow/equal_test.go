package cow

import (
	"bytes"
	"context"
	"fmt"
	"sync/atomic"
	"testing"

	"coppice/internal/vfs"
)

// TestEqualWrite writes a disk over its own contents but for some units: no
// more than those count as changed, and what lies together is read together.
func TestEqualWrite(t *testing.T) {
	ctx := context.Background()
	const units = 3*256 + 17
	const u = 4096
	tests := []struct {
		name    string
		changed []int // units
		scatter bool  // every third unit has been written on its own before
		reads   int64 // of the space files, at most
	}{
		{"nothing", nil, false, units*u/readPiece + 5},
		{"ends and middle", []int{0, 1, 300, units - 1}, false, units*u/readPiece + 10},
		{"every other unit", everyOther(units), false, units},
		{"scattered", []int{7, 300}, true, units},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			var reads atomic.Int64
			s, err := Create(ctx, vfs.NewInject(vfs.NewMem(0), nil, func(c vfs.Call) error {
				if c.Op == vfs.OpRead && c.Name == spaceName(0) {
					reads.Add(1)
				}
				return nil
			}), Options{})
			if err != nil {
				t.Fatal(err)
			}
			d := newDisk(t, s, 1, units*u, nil)
			p := noise(units * u)
			if _, err := d.WriteAt(p, 0); err != nil {
				t.Fatal(err)
			}
			for i := 0; tt.scatter && i < units; i += 3 {
				p[i*u] ^= 1
				if _, err := d.WriteAt(p[i*u:(i+1)*u], int64(i*u)); err != nil {
					t.Fatal(err)
				}
			}
			if err := s.sync(ctx); err != nil {
				t.Fatal(err)
			}
			if _, err := s.Snapshot(ctx, []Pair{{Src: ID{1}, New: ID{2}}}); err != nil {
				t.Fatal(err)
			}
			for _, i := range tt.changed {
				p[i*u+99] ^= 1
			}
			reads.Store(0)
			if _, err := d.WriteAt(p, 0); err != nil {
				t.Fatal(err)
			}
			if n := reads.Load(); n > tt.reads {
				t.Errorf("%d reads, want at most %d", n, tt.reads)
			}
			got := make([]byte, len(p))
			if _, err := d.ReadAt(got, 0); err != nil || !bytes.Equal(got, p) {
				t.Errorf("the disk has something else (%v)", err)
			}
			from, err := s.OpenDisk(ctx, ID{2}, Pinned)
			if err != nil {
				t.Fatal(err)
			}
			var differ []int
			for e, err := range s.Diff(ctx, from, d, 0) {
				if err != nil {
					t.Fatal(err)
				}
				for at := e.Off; at < e.End(); at += u {
					differ = append(differ, int(at/u))
				}
			}
			if fmt.Sprint(differ) != fmt.Sprint(tt.changed) {
				t.Errorf("units %v differ, want %v", differ, tt.changed)
			}
			if err := s.Close(); err != nil {
				t.Fatal(err)
			}
		})
	}
}

func everyOther(n int) (list []int) {
	for i := 0; i < n; i += 2 {
		list = append(list, i)
	}
	return list
}

// TestEqualWriteHeals writes over damaged units what they had: the volume is
// whole again.
func TestEqualWriteHeals(t *testing.T) {
	ctx := context.Background()
	m := vfs.NewMem(0)
	s, err := Create(ctx, m, Options{})
	if err != nil {
		t.Fatal(err)
	}
	const n = 256 << 10
	d := newDisk(t, s, 1, n, nil)
	p := noise(n)
	if _, err := d.WriteAt(p, 0); err != nil {
		t.Fatal(err)
	}
	if err := s.sync(ctx); err != nil {
		t.Fatal(err)
	}
	slots := make([]slot, 2)
	if err := s.resolve(d.v.view.Load(), 0, 30, slots); err != nil {
		t.Fatal(err)
	}
	if err := flip(m, spaceName(0), int64(slots[1].addr)*4096+5, 1); err != nil {
		t.Fatal(err)
	}
	got := make([]byte, n)
	if _, err := d.ReadAt(got, 0); err == nil {
		t.Fatal("the damage does not show")
	}
	if _, err := d.WriteAt(p, 0); err != nil {
		t.Fatal(err)
	}
	if _, err := d.ReadAt(got, 0); err != nil || !bytes.Equal(got, p) {
		t.Errorf("not healed (%v)", err)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
}
