package cow

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"testing"

	"coppice/internal/vfs"
)

// stamp fills a unit with a number, 0 being a hole.
func stamp(b []byte, n uint64) {
	for i := 0; i+8 <= len(b); i += 8 {
		binary.LittleEndian.PutUint64(b[i:], n)
	}
}

func readStamp(b []byte) (uint64, error) {
	n := binary.LittleEndian.Uint64(b)
	for i := 0; i+8 <= len(b); i += 8 {
		if binary.LittleEndian.Uint64(b[i:]) != n {
			return 0, fmt.Errorf("unit holds a mixture at %d: %x", i, b[:32])
		}
	}
	return n, nil
}

// TestConcurrent runs writers, readers, snapshots, clones, pins and deletes
// at the same time. Each writer owns a unit and writes rising numbers; a
// snapshot must hold everything acknowledged before it was asked for and
// nothing begun after it was acknowledged.
func TestConcurrent(t *testing.T) {
	ctx := context.Background()
	m := vfs.NewMem(0)
	s, err := Create(ctx, m, tinyOptions())
	if err != nil {
		t.Fatal(err)
	}
	const writers, rounds, snaps = 6, 250, 40
	base := ID{1}
	if _, err := s.Create(ctx, base, writers*int64(tiny.UnitSize), nil); err != nil {
		t.Fatal(err)
	}
	d, err := s.OpenDisk(ctx, base, Live)
	if err != nil {
		t.Fatal(err)
	}
	var begun, acked [writers]atomic.Uint64
	var wg sync.WaitGroup
	for i := range writers {
		wg.Go(func() {
			b := make([]byte, tiny.UnitSize)
			rng := rand.New(rand.NewPCG(uint64(i), 1))
			for n := uint64(1); n <= rounds; n++ {
				stamp(b, n)
				begun[i].Store(n)
				if _, err := d.WriteAt(b, int64(i*tiny.UnitSize)); err != nil {
					t.Error(err)
					return
				}
				acked[i].Store(n)
				if rng.IntN(20) == 0 {
					if err := d.Flush(ctx); err != nil {
						t.Error(err)
						return
					}
				}
			}
		})
	}
	check := func(d *Disk, low, high [writers]uint64) {
		got := make([]byte, writers*tiny.UnitSize)
		if _, err := d.ReadAt(got, 0); err != nil {
			t.Error(err)
			return
		}
		for i := range writers {
			n, err := readStamp(got[i*tiny.UnitSize : (i+1)*tiny.UnitSize])
			if err != nil || n < low[i] || n > high[i] {
				t.Errorf("writer %d: snapshot has %d, want %d to %d: %v", i, n, low[i], high[i], err)
			}
		}
	}
	counts := func(a *[writers]atomic.Uint64) (n [writers]uint64) {
		for i := range n {
			n[i] = a[i].Load()
		}
		return n
	}
	for k := range 3 {
		wg.Go(func() {
			for j := range snaps {
				id := ID{byte(k + 2), byte(j)}
				low := counts(&acked)
				var err error
				var snap *Disk
				switch k {
				case 0:
					_, err = s.Snapshot(ctx, []Pair{{Src: base, New: id}})
				case 1:
					_, err = s.Clone(ctx, Pair{Src: base, New: id})
				case 2:
					snap, err = s.OpenDisk(ctx, base, Pinned)
				}
				high := counts(&begun)
				if err == nil && snap == nil {
					snap, err = s.OpenDisk(ctx, id, Live)
				}
				if err != nil {
					t.Error(err)
					return
				}
				check(snap, low, high)
				if k != 2 {
					pin, err := s.OpenDisk(ctx, id, Pinned)
					if err != nil {
						t.Error(err)
						return
					}
					if err := s.Delete(ctx, id); err != nil {
						t.Error(err)
						return
					}
					check(pin, low, high)
					if _, err := snap.ReadAt(make([]byte, 1), 0); !errors.Is(err, ErrNotFound) {
						t.Errorf("read of a deleted volume: %v", err)
					}
					if err := pin.Close(); err != nil {
						t.Error(err)
					}
				}
				if err := snap.Close(); err != nil {
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	if err := checkClean(m); err != nil {
		t.Fatal(err)
	}
}

// TestPatchesOfOneUnit has goroutines write single bytes of the same unit
// while checkpoints and snapshots go on: no byte may be lost.
func TestPatchesOfOneUnit(t *testing.T) {
	ctx := context.Background()
	m := vfs.NewMem(0)
	s, err := Create(ctx, m, tinyOptions())
	if err != nil {
		t.Fatal(err)
	}
	d := newDisk(t, s, 1, int64(tiny.UnitSize), nil)
	var wg sync.WaitGroup
	for i := range 8 {
		wg.Go(func() {
			for n := range 64 {
				if _, err := d.WriteAt([]byte{byte(n + 1)}, int64(i+8*n)); err != nil {
					t.Error(err)
				}
				if n%16 == i {
					if err := d.Flush(ctx); err != nil {
						t.Error(err)
					}
				}
			}
		})
	}
	wg.Wait()
	got := make([]byte, 512)
	if _, err := d.ReadAt(got, 0); err != nil {
		t.Fatal(err)
	}
	for i, b := range got {
		if int(b) != i/8+1 {
			t.Fatalf("byte %d is %d, want %d", i, b, i/8+1)
		}
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
}

// TestRelations checks relations between volumes at ordinary geometry, where
// no model is needed.
func TestRelations(t *testing.T) {
	ctx := context.Background()
	m := vfs.NewMem(0)
	s, err := Create(ctx, m, Options{})
	if err != nil {
		t.Fatal(err)
	}
	const size = 300 << 20
	rng := rand.New(rand.NewPCG(3, 3))
	x := ID{1}
	if _, err := s.Create(ctx, x, size, nil); err != nil {
		t.Fatal(err)
	}
	dx, err := s.OpenDisk(ctx, x, Live)
	if err != nil {
		t.Fatal(err)
	}
	scribble := func(d *Disk, n int) {
		t.Helper()
		for range n {
			p := noise(1 + rng.IntN(40<<10))
			if rng.IntN(10) == 0 {
				p = noise(600 << 10)
			}
			if _, err := d.WriteAt(p, rng.Int64N(size-int64(len(p)))); err != nil {
				t.Fatal(err)
			}
			if rng.IntN(5) == 0 {
				if err := d.Zero(ctx, rng.Int64N(size/2), rng.Int64N(2<<20)); err != nil {
					t.Fatal(err)
				}
			}
		}
	}
	open := func(id ID) *Disk {
		t.Helper()
		d, err := s.OpenDisk(ctx, id, Live)
		if err != nil {
			t.Fatal(err)
		}
		return d
	}
	snap := func(src, id ID) *Disk {
		t.Helper()
		if _, err := s.Snapshot(ctx, []Pair{{Src: src, New: id}}); err != nil {
			t.Fatal(err)
		}
		return open(id)
	}
	bytesOf := func(a, b *Disk) (n int64) {
		t.Helper()
		for e, err := range s.Diff(ctx, a, b, 0) {
			if err != nil {
				t.Fatal(err)
			}
			n += e.Len
		}
		return n
	}
	equal := func(a, b *Disk, from, to int64) {
		t.Helper()
		p, q := make([]byte, 1<<20), make([]byte, 1<<20)
		for off := from; off < to; off += int64(len(p)) {
			k := min(int64(len(p)), to-off)
			if _, err := a.ReadAt(p[:k], off); err != nil {
				t.Fatal(err)
			}
			if _, err := b.ReadAt(q[:k], off); err != nil {
				t.Fatal(err)
			}
			if !bytes.Equal(p[:k], q[:k]) {
				t.Fatalf("volumes %v and %v differ in %d bytes from %d", a.ID(), b.ID(), k, off)
			}
		}
	}
	scribble(dx, 60)
	a := snap(x, ID{2})
	scribble(dx, 20)
	b := snap(x, ID{3})
	scribble(dx, 20)
	c := snap(x, ID{4})
	if n := bytesOf(a, a); n != 0 {
		t.Errorf("a volume differs from itself in %d bytes", n)
	}
	if ac, ab, bc := bytesOf(a, c), bytesOf(a, b), bytesOf(b, c); ac > ab+bc || ac == 0 {
		t.Errorf("diffs of %d, %d and %d bytes break the triangle", ac, ab, bc)
	}
	if _, err := s.Clone(ctx, Pair{Src: a.ID(), New: ID{5}}); err != nil {
		t.Fatal(err)
	}
	y := open(ID{5})
	equal(a, y, 0, size)
	for e, err := range s.Diff(ctx, a, c, 0) { // applied to a copy of a, it makes c
		if err != nil {
			t.Fatal(err)
		}
		p := make([]byte, e.Len)
		if _, err := c.ReadAt(p, e.Off); err != nil {
			t.Fatal(err)
		}
		if _, err := y.WriteAt(p, e.Off); err != nil {
			t.Fatal(err)
		}
	}
	equal(c, y, 0, size)
	for _, id := range []ID{a.ID(), b.ID()} {
		if err := s.Delete(ctx, id); err != nil {
			t.Fatal(err)
		}
	}
	equal(c, y, 0, size)
	if err := s.Revert(ctx, x, y.ID()); err != nil {
		t.Fatal(err)
	}
	equal(c, dx, 0, size)
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	if err := checkClean(m); err != nil {
		t.Fatal(err)
	}
}

// TestGroupIsOneInstant snapshots two disks while a writer alternates between
// them: the second may lag behind the first by one write, never lead.
func TestGroupIsOneInstant(t *testing.T) {
	ctx := context.Background()
	m := vfs.NewMem(0)
	s, err := Create(ctx, m, tinyOptions())
	if err != nil {
		t.Fatal(err)
	}
	var disks [2]*Disk
	for i := range disks {
		id := ID{byte(i + 1)}
		if _, err := s.Create(ctx, id, int64(tiny.UnitSize), nil); err != nil {
			t.Fatal(err)
		}
		if disks[i], err = s.OpenDisk(ctx, id, Live); err != nil {
			t.Fatal(err)
		}
	}
	stop := make(chan struct{})
	var wg sync.WaitGroup
	wg.Go(func() {
		b := make([]byte, tiny.UnitSize)
		for n := uint64(1); ; n++ {
			stamp(b, n)
			for _, d := range disks {
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
	wg.Go(func() { // flushes of one of them, to share frames with the snapshots
		for {
			select {
			case <-stop:
				return
			default:
			}
			if err := disks[0].Flush(ctx); err != nil {
				t.Error(err)
				return
			}
		}
	})
	for i := range byte(100) {
		pairs := []Pair{{Src: ID{2}, New: ID{20, i}}, {Src: ID{1}, New: ID{10, i}}}
		if _, err := s.Snapshot(ctx, pairs); err != nil {
			t.Fatal(err)
		}
		var n [2]uint64
		for k, p := range pairs {
			d, err := s.OpenDisk(ctx, p.New, Live)
			if err != nil {
				t.Fatal(err)
			}
			got := make([]byte, tiny.UnitSize)
			if _, err := d.ReadAt(got, 0); err != nil {
				t.Fatal(err)
			}
			if n[k], err = readStamp(got); err != nil {
				t.Fatal(err)
			}
			if err := s.Delete(ctx, p.New); err != nil {
				t.Fatal(err)
			}
		}
		if n[1] != n[0] && n[1] != n[0]+1 {
			t.Fatalf("the disk that is written first has %d, the other one %d", n[1], n[0])
		}
	}
	close(stop)
	wg.Wait()
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	if err := checkClean(m); err != nil {
		t.Fatal(err)
	}
}

// TestDeleteUnderWriters deletes volumes that are being written, flushed and
// reverted; nothing of them may stay behind.
func TestDeleteUnderWriters(t *testing.T) {
	ctx := context.Background()
	w, err := newWorld(tinyOptions())
	if err != nil {
		t.Fatal(err)
	}
	s := w.s
	for i := range byte(30) {
		id := ID{1, i}
		if _, err := s.Create(ctx, id, 64<<10, nil); err != nil {
			t.Fatal(err)
		}
		d, err := s.OpenDisk(ctx, id, Live)
		if err != nil {
			t.Fatal(err)
		}
		gone := func(err error) bool {
			if err != nil && !errors.Is(err, ErrNotFound) {
				t.Error(err)
			}
			return err != nil
		}
		var wg sync.WaitGroup
		started := make(chan struct{}, 4)
		for k := range 4 {
			wg.Go(func() {
				rng := rand.New(rand.NewPCG(uint64(i), uint64(k)))
				for n := 0; ; n++ {
					if n == 3 {
						started <- struct{}{}
					}
					var err error
					switch size := []int{100, 2 << 10, 9 << 10, 0}[k]; size {
					case 0:
						err = d.Flush(ctx)
					default:
						_, err = d.WriteAt(noise(size), rng.Int64N(64<<10-int64(size)))
					}
					if gone(err) {
						return
					}
				}
			})
		}
		for range 4 {
			<-started
		}
		if err := s.Delete(ctx, id); err != nil {
			t.Fatal(err)
		}
		wg.Wait()
	}
	if err := w.emptied(0); err != nil {
		t.Fatal(err)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	if err := checkClean(w.mem); err != nil {
		t.Fatal(err)
	}
}

// TestHolesAreDated expects that a hole made by zeroing keeps the epoch of its
// making in every unit when it is opened again, and that the tree keeps its
// height meanwhile: what lies beyond a tree has no date.
func TestHolesAreDated(t *testing.T) {
	ctx := context.Background()
	s, err := Create(ctx, vfs.NewMem(0), tinyOptions())
	if err != nil {
		t.Fatal(err)
	}
	d := newDisk(t, s, 1, 256<<10, nil)
	do := func(_ int, err error) {
		t.Helper()
		if err == nil {
			err = s.sync(ctx)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	do(d.WriteAt(noise(256<<10), 0))
	do(0, d.Zero(ctx, 0, 256<<10))
	root := d.v.view.Load().base.root
	if root.level != 4 || root.birth == 0 {
		t.Fatalf("root after zeroing everything: %v", root)
	}
	for i := range 4 {
		if e, err := s.child(root, i); err != nil || e != hole(root.birth) {
			t.Errorf("entry %d of the root: %v, %v", i, e, err)
		}
	}
	do(d.WriteAt(noise(1<<10), 37<<10))
	leaf, err := s.leaf(d.v.view.Load().base.root, 37/4)
	if err != nil {
		t.Fatal(err)
	}
	for i := range 4 {
		e, err := s.child(leaf, i)
		if err != nil {
			t.Fatal(err)
		}
		if i != 37%4 && (!e.isHole() || e.birth != root.birth) {
			t.Errorf("unit %d beside the new one: %v, want a hole of epoch %d", i, e, root.birth)
		}
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
}

// TestPunchUnderWriters gives host space back while a writer fills regions that
// no checkpoint knows yet.
func TestPunchUnderWriters(t *testing.T) {
	ctx := context.Background()
	w, err := newWorld(tinyOptions())
	if err != nil {
		t.Fatal(err)
	}
	s := w.s
	const size = 512 << 10
	d := newDisk(t, s, 1, size, nil)
	stop := make(chan struct{})
	var wg sync.WaitGroup
	wg.Go(func() {
		const n = 24 << 10
		got := make([]byte, n)
		for i := int64(0); ; i++ {
			select {
			case <-stop:
				return
			default:
			}
			p := bytes.Repeat([]byte{byte(i%255 + 1)}, n)
			off := i * n % (size - n)
			if _, err := d.WriteAt(p, off); err != nil {
				t.Error(err)
				return
			}
			if _, err := d.ReadAt(got, off); err != nil || !bytes.Equal(got, p) {
				t.Errorf("write %d is not what it was: %v", i, err)
				return
			}
		}
	})
	for i := range byte(40) {
		id := ID{2, i}
		if _, err := s.Create(ctx, id, size, nil); err != nil {
			t.Fatal(err)
		}
		o, err := s.OpenDisk(ctx, id, Live)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := o.WriteAt(noise(size), 0); err != nil {
			t.Fatal(err)
		}
		if err := s.Delete(ctx, id); err != nil {
			t.Fatal(err)
		}
		for range 3 {
			if err := s.sync(ctx); err != nil {
				t.Fatal(err)
			}
		}
	}
	close(stop)
	wg.Wait()
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	if err := checkClean(w.mem); err != nil {
		t.Fatal(err)
	}
}

// TestEqualChecksums writes a unit over one with the same checksum and other
// bytes: a checksum alone must not make a write look needless.
func TestEqualChecksums(t *testing.T) {
	ctx := context.Background()
	s, err := Create(ctx, vfs.NewMem(0), Options{})
	if err != nil {
		t.Fatal(err)
	}
	const n = 128 << 10
	d := newDisk(t, s, 1, n, nil)
	p := noise(n)
	if _, err := d.WriteAt(p, 0); err != nil {
		t.Fatal(err)
	}
	if err := s.sync(ctx); err != nil {
		t.Fatal(err)
	}
	q := bytes.Clone(p)
	q[10] ^= 1
	forge(q[:4096], checksum(p[:4096]))
	if bytes.Equal(p, q) || checksum(p[:4096]) != checksum(q[:4096]) {
		t.Fatal("the test has no equal checksums")
	}
	if _, err := d.WriteAt(q, 0); err != nil {
		t.Fatal(err)
	}
	got := make([]byte, n)
	if _, err := d.ReadAt(got, 0); err != nil || !bytes.Equal(got, q) {
		t.Errorf("the second write is lost (%v)", err)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
}

// forge changes the last four bytes of b so that it has the given checksum,
// which depends on them linearly.
func forge(b []byte, want uint32) {
	tail := b[len(b)-4:]
	clear(tail)
	base := checksum(b)
	type row struct{ sum, bits uint32 }
	var rows [32]row
	for i := range rows {
		binary.LittleEndian.PutUint32(tail, 1<<i)
		rows[i] = row{checksum(b) ^ base, 1 << i}
	}
	need, bits := base^want, uint32(0)
	for col := range uint32(32) { // elimination over GF(2)
		for i := range rows {
			if rows[i].sum>>col&1 == 0 || rows[i].sum&(1<<col-1) != 0 {
				continue
			}
			for j := range rows {
				if j != i && rows[j].sum>>col&1 == 1 {
					rows[j].sum ^= rows[i].sum
					rows[j].bits ^= rows[i].bits
				}
			}
			if need>>col&1 == 1 {
				need ^= rows[i].sum
				bits ^= rows[i].bits
			}
			break
		}
	}
	binary.LittleEndian.PutUint32(tail, bits)
}
