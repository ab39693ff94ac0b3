package cow

import (
	"bytes"
	"context"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"coppice/internal/vfs"
)

// TestPatchesDoNotPassEachOther holds a patch that has read the unit it
// changes until another patch of the same unit has ended: both must be there.
func TestPatchesDoNotPassEachOther(t *testing.T) {
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
	s, err := Create(ctx, vfs.NewInject(vfs.NewMem(0), nil, hook), tinyOptions())
	if err != nil {
		t.Fatal(err)
	}
	u := tiny.UnitSize
	d := newDisk(t, s, 1, int64(u), nil)
	want := noise(u)
	if _, err := d.WriteAt(want, 0); err != nil {
		t.Fatal(err)
	}
	if err := s.sync(ctx); err != nil {
		t.Fatal(err)
	}
	armed.Store(true)
	done := make(chan error)
	go func() {
		_, err := d.WriteAt([]byte("first"), 10)
		done <- err
	}()
	<-reading
	if _, err := d.WriteAt([]byte("second"), 100); err != nil {
		t.Fatal(err)
	}
	close(goOn)
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	copy(want[10:], "first")
	copy(want[100:], "second")
	got := make([]byte, u)
	if _, err := d.ReadAt(got, 0); err != nil || !bytes.Equal(got, want) {
		t.Errorf("a patch is lost (%v)", err)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
}

// TestLargeGroupIsOneInstant is TestGroupIsOneInstant with many volumes between
// the two that a writer alternates between, so that there is time for it.
func TestLargeGroupIsOneInstant(t *testing.T) {
	ctx := context.Background()
	o := tinyOptions()
	o.LogBytes = 1 << 20
	s, err := Create(ctx, vfs.NewMem(0), o)
	if err != nil {
		t.Fatal(err)
	}
	const volumes = 30
	u := tiny.UnitSize
	disks := make([]*Disk, volumes)
	for i := range disks {
		id := ID{byte(i + 1)}
		if _, err := s.Create(ctx, id, int64(u), nil); err != nil {
			t.Fatal(err)
		}
		if disks[i], err = s.OpenDisk(ctx, id, Live); err != nil {
			t.Fatal(err)
		}
	}
	first, last := disks[0], disks[volumes-1]
	stop := make(chan struct{})
	var wg sync.WaitGroup
	wg.Go(func() {
		b := make([]byte, u)
		for n := uint64(1); ; n++ {
			stamp(b, n)
			for _, d := range []*Disk{first, last} {
				if _, err := d.WriteAt(b, 0); err != nil {
					t.Error(err)
					return
				}
			}
			select {
			case <-stop:
				return
			default:
			}
		}
	})
	for i := range byte(60) {
		var pairs []Pair
		for k := volumes; k > 0; k-- { // the one that is written last first
			pairs = append(pairs, Pair{Src: ID{byte(k)}, New: ID{100, byte(k), i}})
		}
		if _, err := s.Snapshot(ctx, pairs); err != nil {
			t.Fatal(err)
		}
		var n [2]uint64
		for j, k := range []int{1, volumes} {
			d, err := s.OpenDisk(ctx, ID{100, byte(k), i}, Live)
			if err != nil {
				t.Fatal(err)
			}
			got := make([]byte, u)
			if _, err := d.ReadAt(got, 0); err != nil {
				t.Fatal(err)
			}
			if n[j], err = readStamp(got); err != nil {
				t.Fatal(err)
			}
		}
		if n[0] != n[1] && n[0] != n[1]+1 {
			t.Fatalf("the disk that is written first has %d, the other one %d", n[0], n[1])
		}
		for _, p := range pairs {
			if err := s.Delete(ctx, p.New); err != nil {
				t.Fatal(err)
			}
		}
	}
	close(stop)
	wg.Wait()
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
}

// TestChangesAreYounger expects what is written after a snapshot to be younger
// than it, whether or not a checkpoint came between.
func TestChangesAreYounger(t *testing.T) {
	ctx := context.Background()
	s, err := Create(ctx, vfs.NewMem(0), tinyOptions())
	if err != nil {
		t.Fatal(err)
	}
	u := tiny.UnitSize
	d := newDisk(t, s, 1, int64(4*u), nil)
	var sealed []uint64
	for i := range 3 {
		if _, err := d.WriteAt(noise(u), int64(i*u)); err != nil {
			t.Fatal(err)
		}
		id := ID{2, byte(i)}
		if _, err := s.Snapshot(ctx, []Pair{{Src: ID{1}, New: id}}); err != nil {
			t.Fatal(err)
		}
		s.mu.Lock()
		sealed = append(sealed, s.byID[id].sealedAt)
		s.mu.Unlock()
	}
	if err := s.sync(ctx); err != nil {
		t.Fatal(err)
	}
	leaf, err := s.leaf(d.v.view.Load().base.root, 0)
	if err != nil {
		t.Fatal(err)
	}
	for i, at := range sealed {
		e, err := s.child(leaf, i)
		if err != nil {
			t.Fatal(err)
		}
		if e.birth > at || i > 0 && e.birth <= sealed[i-1] {
			t.Errorf("unit %d has birth %d; snapshots were sealed at %d", i, e.birth, sealed)
		}
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
}
