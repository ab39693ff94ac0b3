package cow

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"math/rand/v2"
	"testing"
	"time"

	"coppice/internal/vfs"
)

// bigRot is a store of the geometry that people have, with what is in it.
type bigRot struct {
	mem  *vfs.Mem
	want map[ID][][32]byte // checksums of each 256 KiB
	live []fileRange       // where there is something
}

type fileRange struct {
	name   string
	off, n int64
}

const rotPiece = 256 << 10

func makeBigRot(t *testing.T) *bigRot {
	t.Helper()
	ctx := context.Background()
	r := &bigRot{mem: vfs.NewMem(0), want: map[ID][][32]byte{}}
	o := Options{LogBytes: 1 << 20}
	s, err := Create(ctx, r.mem, o)
	if err != nil {
		t.Fatal(err)
	}
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	_, err = s.Create(ctx, ID{1}, 1<<40, []byte("attributes"))
	must(err)
	d, err := s.OpenDisk(ctx, ID{1}, Live)
	must(err)
	rng := rand.New(rand.NewPCG(1, 9))
	write := func(n int) {
		t.Helper()
		for range n {
			_, err := d.WriteAt(noise(1+rng.IntN(64<<10)), rng.Int64N(16<<20-64<<10))
			must(err)
		}
		must(d.Flush(ctx))
	}
	write(150)
	_, err = s.Snapshot(ctx, []Pair{{Src: ID{1}, New: ID{2}}})
	must(err)
	write(40)
	_, err = s.Clone(ctx, Pair{Src: ID{2}, New: ID{3}})
	must(err)
	must(s.sync(ctx))
	write(3) // in the log
	u := int64(s.geo.UnitSize)
	for i, reg := range s.space.regions {
		must(s.space.loadUsed(i))
		base := int64(i%s.geo.RegionsPerFile) * s.geo.regionBytes()
		r.live = append(r.live, fileRange{spaceName(0), base, int64(s.geo.metaUnits()) * u})
		for a := s.geo.metaUnits(); a < s.geo.regionUnits(); a++ {
			if reg.used[a/64]>>(a%64)&1 != 0 {
				r.live = append(r.live, fileRange{spaceName(0), base + int64(a)*u, u})
			}
		}
	}
	r.live = append(r.live, fileRange{superName, 0, superSlots * slotSize}, fileRange{regionsName(0), 0, 256}, fileRange{regionsName(1), 0, 256},
		fileRange{logName, 0, int64(s.log.head.off)})
	for _, id := range []ID{{1}, {2}, {3}} {
		d, err := s.OpenDisk(ctx, id, Live)
		must(err)
		buf := make([]byte, rotPiece)
		for off := int64(0); off < 17<<20; off += rotPiece {
			_, err := d.ReadAt(buf, off)
			must(err)
			r.want[id] = append(r.want[id], sha256.Sum256(buf))
		}
	}
	r.mem = r.mem.Kill()
	must(s.Close())
	must(checkClean(r.mem.Kill()))
	return r
}

// try flips bits in n places and reads everything.
func (r *bigRot) try(rng *rand.Rand, n int) (err error) {
	defer func() {
		if p := recover(); p != nil {
			err = fmt.Errorf("panic: %v", p)
		}
	}()
	m := r.mem.Kill()
	logged := false
	for range n {
		at := r.live[rng.IntN(len(r.live))]
		if rng.IntN(4) == 0 { // the other files are small, and matter
			at = r.live[len(r.live)-1-rng.IntN(4)]
		}
		logged = logged || at.name == logName
		if err := flip(m, at.name, at.off+rng.Int64N(at.n), byte(1<<rng.IntN(8))); err != nil {
			return err
		}
	}
	ctx := context.Background()
	s, err := Open(ctx, m, Options{})
	if errors.Is(err, ErrCorrupt) {
		return nil
	} else if err != nil {
		return fmt.Errorf("open: %w", err)
	}
	defer func() { _ = s.Close() }() // may have failed
	buf := make([]byte, rotPiece)
	for id, sums := range r.want {
		d, err := s.OpenDisk(ctx, id, Live)
		if err != nil {
			return err
		}
		for i, want := range sums {
			off := int64(i) * rotPiece
			k, err := d.ReadAt(buf, off)
			ce, damaged := errors.AsType[*CorruptError](err)
			switch {
			case damaged && (ce.Volume != id || ce.Off != off+int64(k)):
				return fmt.Errorf("%d bytes at %d of %v, and then %w", k, off, id, err)
			case damaged:
			case err != nil:
				return err
			case sha256.Sum256(buf) != want && !(logged && id == ID{1}): // the last frame may be gone, as after a power cut
				return fmt.Errorf("volume %v: wrong data at %d", id, off)
			}
		}
	}
	return nil
}

// TestRotAtFullGeometry flips bits here and there in a store of the ordinary
// geometry, one or some at a time: what is read is right, or refused.
func TestRotAtFullGeometry(t *testing.T) {
	t.Parallel()
	r := makeBigRot(t)
	seed := uint64(time.Now().UnixNano())
	rng := rand.New(rand.NewPCG(seed, 2))
	rounds, end := 150, time.Time{}
	switch {
	case *soakTime > 0:
		end = time.Now().Add(*soakTime)
	case invariants:
		rounds = 20
	}
	flips := 0
	for i := 0; end.IsZero() && i < rounds || !end.IsZero() && time.Now().Before(end); i++ {
		n := 1
		if i%2 == 1 {
			n = 2 + rng.IntN(60)
		}
		if err := r.try(rng, n); err != nil {
			t.Fatalf("seed %d, round %d, %d flips: %v", seed, i, n, err)
		}
		flips += n
	}
	t.Logf("%d flips at full geometry", flips)
}

// TestReadBeforeDamage reads across a map page that is damaged: what lies
// before it is read, and counted.
func TestReadBeforeDamage(t *testing.T) {
	ctx := context.Background()
	m := vfs.NewMem(0)
	s, err := Create(ctx, m, tinyOptions())
	if err != nil {
		t.Fatal(err)
	}
	d := sparse(t, s, ID{1}, 20, nil)
	want := make([]byte, d.Size())
	if _, err := d.ReadAt(want, 0); err != nil {
		t.Fatal(err)
	}
	chunk := int64(tiny.Fanout * tiny.UnitSize)
	leaf, err := s.leaf(s.byID[ID{1}].view.Load().base.root, 11)
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	damageUnit(t, m, tiny, leaf.addr)
	if s, err = Open(ctx, m, tinyOptions()); err != nil {
		t.Fatal(err)
	}
	if d, err = s.OpenDisk(ctx, ID{1}, Live); err != nil {
		t.Fatal(err)
	}
	got := bytes.Repeat([]byte{0xee}, len(want))
	n, err := d.ReadAt(got, 0)
	if ce, ok := errors.AsType[*CorruptError](err); !ok || int64(n) != 11*chunk || ce.Off != 11*chunk || !bytes.Equal(got[:n], want[:n]) {
		t.Errorf("%d bytes, %v; want the %d before the damage", n, err, 11*chunk)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
}
