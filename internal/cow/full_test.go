package cow

import (
	"bytes"
	"context"
	"errors"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"

	"coppice/internal/vfs"
)

// TestFullStore fills a store, bounded by itself or by its host, and expects
// that it reads, flushes, deletes and reverts, refuses writes with the sizes,
// and has its space back at the end.
func TestFullStore(t *testing.T) {
	tests := []struct {
		name     string
		capacity int64 // of the host
		max      int64
	}{
		{"own limit", 0, 9 * tiny.regionBytes()},
		{"host", 9*tiny.regionBytes() + 100<<10, 0},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			ctx := context.Background()
			o := tinyOptions()
			o.MaxBytes = tt.max
			w := &world{opts: o, vols: map[ID]*mvol{}, disks: map[ID]*Disk{}}
			w.use(vfs.NewMem(tt.capacity))
			s, err := Create(ctx, w.inj, o)
			if err != nil {
				t.Fatal(err)
			}
			w.s = s
			var ids []ID
			filled := false
			for i := byte(1); !filled; i++ {
				id := ID{i}
				_, err := s.Create(ctx, id, 40<<10, nil)
				if errors.Is(err, ErrNoSpace) {
					break
				} else if err != nil {
					t.Fatal(err)
				}
				ids = append(ids, id)
				d, err := s.OpenDisk(ctx, id, Live)
				if err != nil {
					t.Fatal(err)
				}
				rng := rand.New(rand.NewPCG(uint64(i), 6))
				for off := int64(0); off < 40<<10; off += 1 << 10 {
					p := bytes.Repeat([]byte{byte(rng.IntN(255) + 1)}, 1<<10)
					if _, err := d.WriteAt(p, off); errors.Is(err, ErrNoSpace) {
						se, ok := errors.AsType[*SpaceError](err)
						if !ok || se.Needed <= 0 || se.Free >= se.Needed {
							t.Errorf("error %v does not say what is needed", err)
						}
						filled = true
						break
					} else if err != nil {
						t.Fatal(err)
					}
				}
				if err := d.Flush(ctx); err != nil {
					t.Fatalf("flush on a full store: %v", err)
				}
			}
			if len(ids) < 3 {
				t.Fatalf("only %d volumes fit", len(ids))
			}
			if err := s.Revert(ctx, ids[0], ids[1]); err != nil {
				t.Errorf("revert on a full store: %v", err)
			}
			for _, id := range ids {
				d, err := s.OpenDisk(ctx, id, Live)
				if err != nil {
					t.Fatal(err)
				}
				if _, err := d.ReadAt(make([]byte, 40<<10), 0); err != nil {
					t.Errorf("read on a full store: %v", err)
				}
				if _, err := s.Resize(ctx, id, 20<<10); err != nil {
					t.Errorf("shrink on a full store: %v", err)
				}
				w.vols[id] = &mvol{id: id}
			}
			if err := checkClean(w.mem.Kill()); err != nil {
				t.Error(err)
			}
			if err := w.emptied(0); err != nil {
				t.Error(err)
			}
			if _, err := s.Create(ctx, ID{200}, 40<<10, nil); err != nil {
				t.Errorf("create after everything is deleted: %v", err)
			}
			if err := s.Close(); err != nil {
				t.Fatal(err)
			}
		})
	}
}

// TestWriteWaitsForCheckpoint writes what there is room for as soon as a
// checkpoint that is being made has freed what was deleted before it.
func TestWriteWaitsForCheckpoint(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx := context.Background()
		o := tinyOptions()
		o.MaxBytes = 9 * tiny.regionBytes()
		var armed atomic.Bool
		reached, release := make(chan struct{}), make(chan struct{})
		s, err := Create(ctx, vfs.NewInject(vfs.NewMem(0), nil, func(c vfs.Call) error {
			if c.Name == superName && c.Op == vfs.OpWrite && armed.CompareAndSwap(true, false) {
				close(reached)
				<-release
			}
			return nil
		}), o)
		if err != nil {
			t.Fatal(err)
		}
		const size = 40 << 10
		contents := noise(size)
		last := byte(1)
		for ; ; last++ {
			if _, err := newDisk(t, s, last, size, nil).WriteAt(contents, 0); errors.Is(err, ErrNoSpace) {
				break
			} else if err != nil {
				t.Fatal(err)
			}
		}
		d, err := s.OpenDisk(ctx, ID{last}, Live)
		if err != nil {
			t.Fatal(err)
		}
		if err := s.sync(ctx); err != nil {
			t.Fatal(err)
		}
		for n := byte(1); n < last; n++ {
			if err := s.Delete(ctx, ID{n}); err != nil {
				t.Fatal(err)
			}
		}
		armed.Store(true)
		s.kick()
		<-reached
		var wg sync.WaitGroup
		wg.Go(func() {
			if _, err := d.WriteAt(contents, 0); err != nil {
				t.Errorf("write beside the checkpoint that makes room: %v", err)
			}
		})
		synctest.Wait()
		close(release)
		wg.Wait()
		if err := s.Close(); err != nil {
			t.Fatal(err)
		}
	})
}

// TestHostSpaceComesBack expects that deleting a large volume gives the host
// most of the space back.
func TestHostSpaceComesBack(t *testing.T) {
	ctx := context.Background()
	w, err := newWorld(tinyOptions())
	if err != nil {
		t.Fatal(err)
	}
	const size = 1 << 20
	if _, err := w.s.Create(ctx, ID{1}, size, nil); err != nil {
		t.Fatal(err)
	}
	d, err := w.s.OpenDisk(ctx, ID{1}, Live)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := d.WriteAt(noise(size), 0); err != nil {
		t.Fatal(err)
	}
	if err := d.Flush(ctx); err != nil {
		t.Fatal(err)
	}
	peak := w.s.Usage().Allocated
	w.vols[ID{1}] = &mvol{id: ID{1}}
	if err := w.emptied(0); err != nil {
		t.Fatal(err)
	}
	if err := w.s.sync(ctx); err != nil { // the last release is behind the checkpoint before
		t.Fatal(err)
	}
	if _, err := w.s.Create(ctx, ID{2}, size, nil); err != nil {
		t.Fatal(err)
	}
	left := w.s.Usage()
	if left.Allocated > peak/2 {
		t.Errorf("%d bytes allocated after the delete, %d before", left.Allocated, peak)
	}
	s := w.s.space
	s.mu.Lock() // counter pages are never given back
	counters := int64(len(s.regions)*s.geo.metaUnits()*s.geo.UnitSize) + 64<<10
	s.mu.Unlock()
	if used := w.mem.Used(); used > left.Allocated+counters {
		t.Errorf("files take %d bytes of the host for %d allocated and %d of counters", used, left.Allocated, counters)
	}
	if d, err = w.s.OpenDisk(ctx, ID{2}, Live); err != nil { // and it can be taken again
		t.Fatal(err)
	}
	p := noise(size)
	if _, err := d.WriteAt(p, 0); err != nil {
		t.Fatal(err)
	}
	if err := w.s.Close(); err != nil {
		t.Fatal(err)
	}
	if err := checkClean(w.mem); err != nil {
		t.Fatal(err)
	}
}

// TestFailedSyncIsRemembered lets one of two syncs of the same file fail: the
// other one must not succeed after it.
func TestFailedSyncIsRemembered(t *testing.T) {
	m := vfs.NewMem(0)
	f := &vfs.Fault{Ops: []vfs.Op{vfs.OpDatasync}, Nth: 1, Err: errors.New("lost")}
	sf, err := openSpace(vfs.NewInject(m, nil, f.Hook), tiny, 0)
	if err != nil {
		t.Fatal(err)
	}
	if err := sf.allocate(0); err != nil {
		t.Fatal(err)
	}
	for i := range 2 {
		if err := sf.sync(); !errors.Is(err, f.Err) {
			t.Errorf("sync %d after a failed one: %v", i, err)
		}
	}
	if err := sf.close(); err != nil {
		t.Fatal(err)
	}
}

// TestHostFilledByOthers fills the host behind a young store's back: whatever
// needs no new region goes on, generation after generation.
func TestHostFilledByOthers(t *testing.T) {
	ctx := context.Background()
	m := vfs.NewMem(4 << 20)
	s, err := Create(ctx, m, tinyOptions())
	if err != nil {
		t.Fatal(err)
	}
	a, b := ID{1}, ID{2}
	for _, id := range []ID{a, b} {
		if _, err := s.Create(ctx, id, 40<<10, nil); err != nil {
			t.Fatal(err)
		}
	}
	filler, err := m.Create("filler")
	if err != nil {
		t.Fatal(err)
	}
	for off := int64(0); ; off += 512 {
		if _, err := filler.WriteAt(make([]byte, 512), off); errors.Is(err, syscall.ENOSPC) {
			break
		} else if err != nil {
			t.Fatal(err)
		}
	}
	if err := s.Delete(ctx, a); err != nil {
		t.Errorf("delete: %v", err)
	}
	for round := range byte(6) {
		d, err := s.OpenDisk(ctx, b, Live)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := d.WriteAt([]byte{round + 1}, int64(round)*1000); err != nil {
			t.Errorf("round %d: write: %v", round, err)
		}
		if err := errors.Join(d.Flush(ctx), d.Close(), s.Close()); err != nil {
			t.Fatalf("round %d: %v", round, err)
		}
		if err := checkClean(m.Kill()); err != nil {
			t.Errorf("round %d: %v", round, err)
		}
		if s, err = Open(ctx, m, tinyOptions()); err != nil {
			t.Fatalf("round %d: open: %v", round, err)
		}
	}
	if err := s.Close(); err != nil {
		t.Error(err)
	}
}
