package storagetest

import (
	"bytes"
	"context"
	"errors"
	"math/rand/v2"
	"slices"

	"coppice/internal/storage"
)

// destroyData gives up the contents of a snapshot.
func (s *suite) destroyData(id storage.ID) {
	s.Helper()
	s.must(power[storage.DataDestroyer](s).DestroyData(s.ctx, id))
}

func testDestroyData(s *suite) {
	r := power[storage.DataDestroyer](s)
	id, data := s.filled(1, 16*unit)
	snap := storage.Derived{Source: id, ID: s.newID(), Attrs: []byte("kept")}
	_, err := s.Repo.Snapshot(s.ctx, snap)
	s.must(err)
	s.wantErr(r.DestroyData(s.ctx, id), storage.ErrInvalid)
	s.wantErr(r.DestroyData(s.ctx, s.newID()), storage.ErrNotFound)
	live, pin := s.live(snap.ID), s.open(snap.ID, storage.Pinned)
	for range 2 {
		s.destroyData(snap.ID)
	}
	s.wantVolume(pin, data)
	_, err = live.ReadAt(make([]byte, unit), 0)
	s.wantErr(err, storage.ErrNoData)
	for _, err := range live.Extents(s.ctx, 0, unit) {
		s.wantErr(err, storage.ErrNoData)
	}
	check := func() {
		s.Helper()
		for _, m := range []storage.Mode{storage.Live, storage.Pinned} {
			_, err := s.Repo.Open(s.ctx, snap.ID, m)
			s.wantErr(err, storage.ErrNoData)
		}
		_, err := s.Repo.Clone(s.ctx, storage.Derived{Source: snap.ID, ID: s.newID()})
		s.wantErr(err, storage.ErrNoData)
		_, err = s.Repo.Snapshot(s.ctx, storage.Derived{Source: snap.ID, ID: s.newID()})
		s.wantErr(err, storage.ErrNoData)
		if rev, ok := s.Repo.(storage.Reverter); ok {
			s.wantErr(rev.Revert(s.ctx, id, snap.ID), storage.ErrNoData)
		}
		info := s.stat(snap.ID)
		if !info.NoData || !info.ReadOnly || info.Size != 16*unit || info.Used != 0 || string(info.Attrs) != "kept" {
			s.Errorf("what is left is %+v", info)
		}
		if of := s.stat(id); of.NoData || of.Parent != snap.ID {
			s.Errorf("the source is %+v", of)
		}
		s.wantContents(id, data)
	}
	check()
	if s.Reopen != nil {
		s.must(live.Close())
		s.must(pin.Close())
		s.Reopen()
		check()
	}
	s.delete(snap.ID)
	s.wantContents(id, data)
}

// since gathers the changes and checks their order.
func (s *suite) since(from storage.ID, to storage.Volume, off int64) []storage.Extent {
	s.Helper()
	var out []storage.Extent
	next := off
	for e, err := range power[storage.ChangeTracker](s).ChangedSince(s.ctx, from, to, off) {
		s.must(err)
		if e.Off < next || e.Len <= 0 || e.End() > to.Size() {
			s.Fatalf("extent %+v when %d of %d is next", e, next, to.Size())
		}
		next = e.End()
		out = append(out, e)
	}
	return out
}

// testChangedSince compares what is told of a snapshot with its data and of one
// without with what was written.
func testChangedSince(s *suite) {
	power[storage.DataDestroyer](s)
	const size = 600 * unit
	id, old := s.filled(1, size)
	v := s.live(id)
	s.zero(v, 100*unit, 100*unit)
	clear(old[100*unit : 200*unit])
	full, bare := s.snapshot(id), s.snapshot(id)
	s.destroyData(bare)
	rng := rand.New(rand.NewPCG(7, 7))
	touched := map[int64]bool{}
	for round := range 6 {
		for i := range 8 {
			off := rng.Int64N(size)
			n := 1 + rng.Int64N(min(size-off, 3*unit))
			if i%4 == 3 {
				s.zero(v, off, n)
			} else {
				s.write(v, noise(10*round+i+2, int(n)), off)
			}
			for u := off / unit; u*unit < off+n; u++ {
				touched[u] = true
			}
		}
		if round%2 == 1 {
			s.flush(v)
		}
		for _, to := range []storage.Volume{
			v, s.open(id, storage.Pinned), s.live(s.snapshot(id)), s.live(s.clone(id)),
		} {
			now := s.read(to, 0, size)
			for _, from := range []storage.ID{full, bare} {
				told := map[int64]bool{}
				for _, e := range s.since(from, to, 0) {
					for u := e.Off / unit; u*unit < e.End(); u++ {
						told[u] = true
						if e.Hole && !isZero(now[u*unit:(u+1)*unit]) {
							s.Fatalf("the hole %+v is none", e)
						}
						if !touched[u] {
							s.Fatalf("unit %d is told and was not touched", u)
						}
					}
				}
				for u := range int64(size / unit) {
					if at := u * unit; !told[u] && !bytes.Equal(old[at:at+unit], now[at:at+unit]) {
						s.Fatalf("unit %d differs and is not told (from %s)", u, from)
					}
				}
			}
		}
	}
	whole := coverage(s.since(bare, v, 0))
	for _, off := range []int64{1, 5*unit + 100, size - 1, size} {
		var want []storage.Extent
		for _, e := range whole {
			if e.End() > off {
				start := max(e.Off, off)
				want = append(want, storage.Extent{Off: start, Len: e.End() - start})
			}
		}
		if got := coverage(s.since(bare, v, off)); !slices.Equal(got, want) {
			s.Errorf("from %d on the changes cover %v, want %v", off, got, want)
		}
	}
	if s.Reopen != nil {
		s.must(v.Close())
		s.Reopen()
		if got := coverage(s.since(bare, s.live(id), 0)); !slices.Equal(got, whole) {
			s.Errorf("after reopening the changes cover %v, before %v", got, whole)
		}
	}
}

func testChangedSinceLineage(s *suite) {
	r := power[storage.ChangeTracker](s)
	power[storage.DataDestroyer](s)
	lineage := func(from storage.ID, to storage.Volume) error {
		for _, err := range r.ChangedSince(s.ctx, from, to, 0) {
			if err != nil {
				return err
			}
		}
		return nil
	}
	id, _ := s.filled(1, 8*unit)
	older := s.snapshot(id)
	s.write(s.live(id), noise(2, unit), 0)
	newer := s.snapshot(id)
	pin := s.open(id, storage.Pinned)
	other, _ := s.filled(3, 8*unit)
	s.must(lineage(newer, s.live(older))) // with data everything has a difference
	s.must(lineage(newer, s.live(other)))
	s.destroyData(newer)
	s.must(lineage(newer, s.live(id)))
	s.must(lineage(newer, pin))
	s.must(lineage(newer, s.live(s.clone(s.snapshot(id)))))
	s.wantErr(lineage(newer, s.live(older)), storage.ErrNoLineage)
	s.wantErr(lineage(newer, s.live(other)), storage.ErrNoLineage)
	s.wantErr(lineage(newer, s.live(s.clone(older))), storage.ErrNoLineage)
	middle := s.snapshot(id)
	kept := s.open(id, storage.Pinned)
	s.delete(middle)
	s.must(lineage(newer, kept))
	s.destroyData(older)
	s.must(lineage(older, s.live(id)))
	if rev, ok := s.Repo.(storage.Reverter); ok {
		s.must(rev.Revert(s.ctx, id, other))
		s.wantErr(lineage(newer, s.live(id)), storage.ErrNoLineage)
		s.must(lineage(newer, kept))
	}
	s.delete(newer)
	s.wantErr(lineage(newer, kept), storage.ErrNotFound)
	s.must(lineage(older, kept))
}

func testChangedSinceInvalid(s *suite) {
	r := power[storage.ChangeTracker](s)
	power[storage.DataDestroyer](s)
	id := s.create(4 * unit)
	v, snap := s.live(id), s.snapshot(id)
	s.destroyData(snap)
	cause := errors.New("enough")
	cancelled, cancel := context.WithCancelCause(s.ctx)
	cancel(cause)
	for _, c := range []struct {
		ctx  context.Context
		from storage.ID
		to   storage.Volume
		off  int64
		err  error
	}{
		{s.ctx, snap, v, -1, storage.ErrInvalid},
		{s.ctx, snap, v, 4*unit + 1, storage.ErrInvalid},
		{s.ctx, snap, foreign{v}, 0, storage.ErrInvalid},
		{s.ctx, s.newID(), v, 0, storage.ErrNotFound},
		{cancelled, snap, v, 0, cause},
	} {
		var last error
		for _, last = range r.ChangedSince(c.ctx, c.from, c.to, c.off) {
		}
		s.wantErr(last, c.err)
	}
}

func testWouldFree(s *suite) {
	power[storage.SpaceEstimator](s)
	const size = 64 * unit
	id, _ := s.filled(1, size)
	v := s.live(id)
	snap := s.snapshot(id)
	s.write(v, noise(2, 16*unit), 0) // 16 units of each are its own
	twin := s.clone(id)
	s.settle()
	r := power[storage.SpaceEstimator](s)
	// A driver may count what it needs itself, at most a unit in two.
	about := func(want int64, ids ...storage.ID) {
		s.Helper()
		f, err := r.WouldFree(s.ctx, ids...)
		s.must(err)
		if f.Bytes < want || f.Bytes > want+size/2 || f.At.IsZero() || !f.Exact {
			s.Errorf("deleting %d volumes would free %+v, want %d bytes", len(ids), f, want)
		}
	}
	about(0)
	about(16*unit, snap)
	about(0, id)
	about(0, twin)
	about(16*unit, id, twin)
	about(80*unit, id, twin, snap)
	about(16*unit, snap, snap)
	_, err := r.WouldFree(s.ctx, snap, s.newID())
	s.wantErr(err, storage.ErrNotFound)
	before := s.stat(snap)
	s.wantContents(snap, noise(1, size))
	if got := s.stat(snap); got.Used != before.Used {
		s.Errorf("an estimate has changed %+v to %+v", before, got)
	}
	cause := errors.New("enough")
	ctx, cancel := context.WithCancelCause(s.ctx)
	cancel(cause)
	_, err = r.WouldFree(ctx, snap)
	s.wantErr(err, cause)
}

func testWrittenSinceParent(s *suite) {
	r := power[storage.WriteCounter](s)
	id, _ := s.filled(1, 64*unit)
	v := s.live(id)
	want := func(id storage.ID, units int64) {
		s.Helper()
		if n, err := r.WrittenSinceParent(s.ctx, id); err != nil || n != units*unit {
			s.Errorf("written: %d bytes, %v, want %d units", n, err, units)
		}
	}
	want(id, 64)
	snap := s.snapshot(id)
	want(id, 0)
	want(snap, 64) // it has no parent
	s.write(v, noise(2, 3*unit), 10*unit)
	s.zero(v, 20*unit, 5*unit)
	s.flush(v)
	want(id, 3)
	clone := s.clone(id) // of the snapshot, too
	want(clone, 3)
	s.write(s.live(clone), noise(3, unit), 40*unit+17)
	want(clone, 5)
	second := s.snapshot(id)
	want(second, 3)
	want(id, 0)
	s.write(v, noise(4, unit), 0)
	s.delete(second) // what it had is the disk's now
	want(id, 4)
	if d, ok := s.Repo.(storage.DataDestroyer); ok {
		s.must(d.DestroyData(s.ctx, snap))
		want(id, 4)
		_, err := r.WrittenSinceParent(s.ctx, snap)
		s.wantErr(err, storage.ErrNoData)
	}
	_, err := r.WrittenSinceParent(s.ctx, s.newID())
	s.wantErr(err, storage.ErrNotFound)
	cause := errors.New("enough")
	ctx, cancel := context.WithCancelCause(s.ctx)
	cancel(cause)
	_, err = r.WrittenSinceParent(ctx, id)
	s.wantErr(err, cause)
}

// settle makes a driver that looks at durable state only see everything.
func (s *suite) settle() {
	s.Helper()
	if s.Reopen != nil {
		s.Reopen()
	}
}

func testScrub(s *suite) {
	r := power[storage.Scrubber](s)
	for n := range 3 {
		id, _ := s.filled(n, 64*unit)
		s.clone(s.snapshot(id))
	}
	var done, total int64
	for p, err := range r.Scrub(s.ctx, storage.ScrubOptions{Progress: func(d, t int64) {
		if d < done || d > t {
			s.Errorf("progress %d of %d after %d", d, t, done)
		}
		done, total = d, t
	}}) {
		s.Fatalf("problem %+v, error %v", p, err)
	}
	if done == 0 || done != total {
		s.Errorf("a scrub that is done ends with %d of %d", done, total)
	}
	cause := errors.New("enough")
	ctx, cancel := context.WithCancelCause(s.ctx)
	var last error
	// At a byte per second it would take days.
	for _, last = range r.Scrub(ctx, storage.ScrubOptions{BytesPerSecond: 1, Progress: func(int64, int64) { cancel(cause) }}) {
	}
	s.wantErr(last, cause)
}

func testUndamaged(s *suite) {
	r := power[storage.DamageLister](s)
	s.filled(1, 16*unit)
	if list, err := r.Damage(s.ctx); err != nil || len(list) != 0 {
		s.Errorf("damage %v, %v", list, err)
	}
}

func testRepoAttrs(s *suite) {
	r := power[storage.Labeled](s)
	want := func(want []byte) {
		s.Helper()
		r := s.Repo.(storage.Labeled)
		if got, err := r.RepoAttrs(s.ctx); err != nil || !bytes.Equal(got, want) {
			s.Errorf("attributes of %d bytes, %v, want %d", len(got), err, len(want))
		}
	}
	want(nil)
	for _, attrs := range [][]byte{[]byte("one"), noise(1, storage.MaxAttrs), {}, []byte("two")} {
		s.must(r.SetRepoAttrs(s.ctx, attrs))
		want(attrs)
	}
	s.wantErr(r.SetRepoAttrs(s.ctx, make([]byte, storage.MaxAttrs+1)), storage.ErrInvalid)
	want([]byte("two"))
	for info, err := range s.Repo.List(s.ctx) {
		s.Errorf("volume %+v, %v", info, err)
	}
	s.settle()
	want([]byte("two"))
}
