package storagetest

import (
	"context"
	"errors"
	"math"
	"slices"
	"time"

	"coppice/internal/storage"

	"github.com/google/go-cmp/cmp"
)

const (
	unit = storage.Unit
	kib  = 1 << 10
	mib  = 1 << 20
	tib  = 1 << 40
)

// patience bounds waits for what happens in the background; a test that
// passes never comes near it.
const patience = time.Minute

func testCreate(s *suite) {
	spec := storage.Spec{ID: s.newID(), Size: 3 * unit, Attrs: []byte("attributes")}
	info, err := s.Repo.Create(s.ctx, spec)
	s.must(err)
	want := storage.Info{ID: spec.ID, Size: spec.Size, Attrs: spec.Attrs}
	if d := cmp.Diff(want, info); d != "" {
		s.Errorf("Create (-want +got):\n%s", d)
	}
	if d := cmp.Diff(want, s.stat(spec.ID)); d != "" {
		s.Errorf("Stat (-want +got):\n%s", d)
	}
	s.wantContents(spec.ID, make([]byte, spec.Size))

	_, err = s.Repo.Create(s.ctx, storage.Spec{ID: spec.ID, Size: unit})
	s.wantErr(err, storage.ErrExists)
	if d := cmp.Diff(want, s.stat(spec.ID)); d != "" {
		s.Errorf("Stat after a second Create (-want +got):\n%s", d)
	}
}

func testCreateInvalid(s *suite) {
	for _, size := range []int64{0, -unit, 1, unit - 1, unit + 512, storage.MaxSize + unit, math.MaxInt64} {
		id := s.newID()
		_, err := s.Repo.Create(s.ctx, storage.Spec{ID: id, Size: size})
		s.wantErr(err, storage.ErrInvalid)
		_, err = s.Repo.Stat(s.ctx, id)
		s.wantErr(err, storage.ErrNotFound)
	}
	for _, id := range []storage.ID{
		"", "x", "0123456789abcdef0123456789abcdef",
		"0000000A-c0de-4bad-8bee-0123456789ab", "0000000g-c0de-4bad-8bee-0123456789ab",
		"00000001-c0de-4bad-8bee-0123456789ab0", "00000001-c0de-4bad-8bee+0123456789ab",
	} {
		_, err := s.Repo.Create(s.ctx, storage.Spec{ID: id, Size: unit})
		s.wantErr(err, storage.ErrInvalid)
	}
	_, err := s.Repo.Create(s.ctx, storage.Spec{ID: s.newID(), Size: unit, Attrs: make([]byte, storage.MaxAttrs+1)})
	s.wantErr(err, storage.ErrInvalid)
	src := s.create(unit)
	_, err = s.Repo.Snapshot(s.ctx, storage.Derived{Source: src, ID: "x"})
	s.wantErr(err, storage.ErrInvalid)
	_, err = s.Repo.Clone(s.ctx, storage.Derived{Source: src, ID: s.newID(), Attrs: make([]byte, storage.MaxAttrs+1)})
	s.wantErr(err, storage.ErrInvalid)
	if got := s.list(); !slices.Equal(got, []storage.ID{src}) {
		s.Errorf("List = %v, want only %v", got, src)
	}

	for _, size := range []int64{storage.MaxSize, unit} {
		_, err := s.Repo.Create(s.ctx, storage.Spec{ID: s.newID(), Size: size})
		s.must(err)
	}
}

// list returns the IDs that List yields.
func (s *suite) list() []storage.ID {
	s.Helper()
	var ids []storage.ID
	for info, err := range s.Repo.List(s.ctx) {
		s.must(err)
		ids = append(ids, info.ID)
	}
	return ids
}

func testList(s *suite) {
	if got := s.list(); len(got) != 0 {
		s.Errorf("an empty repo lists %v", got)
	}
	var want []storage.ID
	for i := range 40 {
		id := testID(i * 37 % 40)
		_, err := s.Repo.Create(s.ctx, storage.Spec{ID: id, Size: unit, Attrs: []byte(id)})
		s.must(err)
		want = append(want, id)
	}
	slices.Sort(want)
	if d := cmp.Diff(want, s.list()); d != "" {
		s.Errorf("List (-want +got):\n%s", d)
	}
	for info, err := range s.Repo.List(s.ctx) {
		s.must(err)
		if d := cmp.Diff(s.stat(info.ID), info); d != "" {
			s.Errorf("List and Stat (-stat +list):\n%s", d)
		}
	}
	if r, ok := s.Repo.(storage.BareLister); ok {
		got := want[:0:0]
		for info, err := range r.ListBare(s.ctx) {
			s.must(err)
			full := s.stat(info.ID)
			full.Attrs = nil
			if d := cmp.Diff(full, info); d != "" {
				s.Errorf("ListBare and Stat (-stat +list):\n%s", d)
			}
			got = append(got, info.ID)
		}
		if d := cmp.Diff(want, got); d != "" {
			s.Errorf("ListBare (-want +got):\n%s", d)
		}
	}
	n := 0
	for _, err := range s.Repo.List(s.ctx) {
		s.must(err)
		if n++; n == 3 {
			break
		}
	}
	// Every volume may be deleted while the list goes on.
	for info, err := range s.Repo.List(s.ctx) {
		s.must(err)
		s.delete(info.ID)
	}
	if got := s.list(); len(got) != 0 {
		s.Errorf("after deleting everything: %v", got)
	}
}

func testDelete(s *suite) {
	id, _ := s.filled(1, 64*kib)
	s.delete(id)
	_, err := s.Repo.Stat(s.ctx, id)
	s.wantErr(err, storage.ErrNotFound)
	_, err = s.Repo.Open(s.ctx, id, storage.Live)
	s.wantErr(err, storage.ErrNotFound)
	s.wantErr(s.Repo.Delete(s.ctx, id), storage.ErrNotFound)
}

func testNotFound(s *suite) {
	none, have := s.newID(), s.create(unit)
	derived := storage.Derived{Source: none, ID: s.newID()}
	for _, m := range []storage.Mode{storage.Live, storage.Pinned} {
		_, err := s.Repo.Open(s.ctx, none, m)
		s.wantErr(err, storage.ErrNotFound)
	}
	_, err := s.Repo.Stat(s.ctx, none)
	s.wantErr(err, storage.ErrNotFound)
	_, err = s.Repo.Snapshot(s.ctx, derived)
	s.wantErr(err, storage.ErrNotFound)
	_, err = s.Repo.Clone(s.ctx, derived)
	s.wantErr(err, storage.ErrNotFound)
	s.wantErr(s.Repo.Delete(s.ctx, none), storage.ErrNotFound)
	s.wantErr(s.Repo.Delete(s.ctx, "no-uuid"), storage.ErrNotFound)
	if r, ok := s.Repo.(storage.Resizer); ok {
		_, err := r.Resize(s.ctx, none, unit)
		s.wantErr(err, storage.ErrNotFound)
	}
	if r, ok := s.Repo.(storage.Reverter); ok {
		s.wantErr(r.Revert(s.ctx, none, have), storage.ErrNotFound)
		s.wantErr(r.Revert(s.ctx, have, none), storage.ErrNotFound)
	}
	if r, ok := s.Repo.(storage.Attributer); ok {
		s.wantErr(r.SetAttrs(s.ctx, none, nil), storage.ErrNotFound)
	}
	if got := s.list(); !slices.Equal(got, []storage.ID{have}) {
		s.Errorf("List = %v, want only %v", got, have)
	}
}

// testIDReuse deletes a volume and makes another of the same name.
func testIDReuse(s *suite) {
	id, data := s.filled(1, 64*kib)
	old, pin := s.live(id), s.open(id, storage.Pinned)
	s.delete(id)
	_, err := s.Repo.Create(s.ctx, storage.Spec{ID: id, Size: 32 * kib})
	s.must(err)
	s.wantContents(id, make([]byte, 32*kib))
	s.wantVolume(pin, data)
	_, err = old.WriteAt([]byte("old"), 0)
	s.wantErr(err, storage.ErrNotFound)
	_, err = old.ReadAt(make([]byte, 1), 0)
	s.wantErr(err, storage.ErrNotFound)
	s.wantContents(id, make([]byte, 32*kib))
}

// attrSizes go around the limits of one and of several units.
var attrSizes = []int{0, 1, 100, unit - 1, unit, unit + 1, 3 * unit, storage.MaxAttrs - 1, storage.MaxAttrs}

func testAttributes(s *suite) {
	for _, n := range attrSizes {
		blob := noise(n, n)
		id, snap, clone, bare := s.newID(), s.newID(), s.newID(), s.newID()
		info, err := s.Repo.Create(s.ctx, storage.Spec{ID: id, Size: unit, Attrs: blob})
		s.must(err)
		s.wantBytes(info.Attrs, blob)
		info, err = s.Repo.Snapshot(s.ctx, storage.Derived{Source: id, ID: snap, Attrs: append(blob[:n:n], 1)[1:]})
		s.must(err)
		s.wantBytes(info.Attrs, append(blob[:n:n], 1)[1:])
		_, err = s.Repo.Clone(s.ctx, storage.Derived{Source: snap, ID: clone, Attrs: blob})
		s.must(err)
		// Nothing is inherited.
		_, err = s.Repo.Clone(s.ctx, storage.Derived{Source: snap, ID: bare})
		s.must(err)
		clear(blob) // drivers keep a copy
		s.wantBytes(s.stat(id).Attrs, noise(n, n))
		s.wantBytes(s.stat(clone).Attrs, noise(n, n))
		s.wantBytes(s.stat(bare).Attrs, nil)
	}
}

func testUsage(s *suite) {
	usage := func() storage.Usage {
		s.Helper()
		u, err := s.Repo.Usage(s.ctx)
		s.must(err)
		if u.Used < 0 || u.Free <= 0 || u.Total < u.Used || u.Total < u.Free {
			s.Errorf("impossible usage: %+v", u)
		}
		return u
	}
	before := usage()
	id, _ := s.filled(1, 4*mib)
	v := s.live(id)
	s.flush(v)
	if u := usage(); u.Used < before.Used+4*mib {
		s.Errorf("4 MiB of data took %d bytes", u.Used-before.Used)
	}
	if u := s.stat(id).Used; u < 0 || u > 4*mib {
		s.Errorf("a volume of 4 MiB uses %d bytes", u)
	}
	// Size costs nothing, nor do copies.
	used := usage().Used
	s.create(storage.MaxSize)
	s.clone(s.snapshot(id))
	if u := usage(); u.Used > used+mib {
		s.Errorf("an empty volume, a snapshot and a clone took %d bytes", u.Used-used)
	}
}

// testSpaceReturns fills, shares, overwrites and deletes, and waits for the
// space to come back: all of it, without anything but ordinary use.
func testSpaceReturns(s *suite) {
	used := func() int64 {
		s.Helper()
		u, err := s.Repo.Usage(s.ctx)
		s.must(err)
		return u.Used
	}
	s.delete(s.create(unit))
	before := used()
	for round := range 3 {
		id, _ := s.filled(round, 3*mib)
		v := s.live(id)
		pin := s.open(id, storage.Pinned)
		for i := range 6 { // some flushed, some never
			s.write(v, noise(i, 300*kib), int64(i)*200*kib)
			s.write(v, noise(i, 5000), int64(i)*123)
			s.zero(v, int64(i)*100*kib, 70*kib)
			if i%2 == 0 {
				s.flush(v)
				s.snapshot(id)
			}
		}
		s.must(pin.Close())
		for _, id := range s.list() {
			s.delete(id)
		}
		const slack = 128 * kib
		for deadline := time.Now().Add(patience); used() > before+slack; {
			if time.Now().After(deadline) {
				s.Fatalf("round %d: %d bytes are used after everything has been deleted, %d before", round, used(), before)
			}
			s.delete(s.create(unit))
		}
	}
}

func testFeatures(s *suite) {
	for name, have := range map[string]bool{
		"VDI_RESIZE":     implements[storage.Resizer](s),
		"VDI_REVERT":     implements[storage.Reverter](s),
		"VDI_SNAPSHOT":   true,
		"VDI_CONFIG_CBT": implements[storage.DataDestroyer](s) && implements[storage.ChangeTracker](s),
	} {
		if slices.Contains(storage.Features(s.Repo), name) != have {
			s.Errorf("feature %s is advertised: %v", name, !have)
		}
	}
}

func implements[P any](s *suite) bool {
	_, ok := s.Repo.(P)
	return ok
}

func testCloseRepo(s *suite) {
	id := s.create(unit)
	v, pin := s.live(id), s.open(id, storage.Pinned)
	s.must(s.Repo.Close())
	s.must(s.Repo.Close())
	_, err := s.Repo.Create(s.ctx, storage.Spec{ID: s.newID(), Size: unit})
	s.wantErr(err, storage.ErrClosed)
	_, err = s.Repo.Stat(s.ctx, id)
	s.wantErr(err, storage.ErrClosed)
	_, err = s.Repo.Open(s.ctx, id, storage.Live)
	s.wantErr(err, storage.ErrClosed)
	_, err = s.Repo.Snapshot(s.ctx, storage.Derived{Source: id, ID: s.newID()})
	s.wantErr(err, storage.ErrClosed)
	s.wantErr(s.Repo.Delete(s.ctx, id), storage.ErrClosed)
	_, err = s.Repo.Usage(s.ctx)
	s.wantErr(err, storage.ErrClosed)
	for _, err := range s.Repo.List(s.ctx) {
		s.wantErr(err, storage.ErrClosed)
	}
	s.wantClosed(v)
	s.wantClosed(pin)
	s.must(v.Close())
	s.must(pin.Close())
}

// wantClosed checks that nothing works on v any more.
func (s *suite) wantClosed(v storage.Volume) {
	s.Helper()
	_, err := v.ReadAt(make([]byte, 1), 0)
	s.wantErr(err, storage.ErrClosed)
	_, err = v.WriteAt(make([]byte, 1), 0)
	s.wantErr(err, storage.ErrClosed)
	s.wantErr(v.Zero(s.ctx, 0, 1), storage.ErrClosed)
	s.wantErr(v.Flush(s.ctx), storage.ErrClosed)
	for _, err := range v.Extents(s.ctx, 0, unit) {
		s.wantErr(err, storage.ErrClosed)
	}
}

func testCloseVolume(s *suite) {
	id, data := s.filled(1, 64*kib)
	a, b, pin := s.live(id), s.live(id), s.open(id, storage.Pinned)
	s.write(a, []byte{0}, 0)
	s.must(a.Close())
	s.wantClosed(a)
	s.must(pin.Close())
	s.wantClosed(pin)
	data[0] = 0
	s.wantVolume(b, data)
	s.wantContents(id, data)
}

func testCancelled(s *suite) {
	id, data := s.filled(1, 64*kib)
	v, pin := s.live(id), s.open(id, storage.Pinned)
	s.flush(v)
	cause := errors.New("the user has changed his mind")
	ctx, cancel := context.WithCancelCause(s.ctx)
	cancel(cause)

	n := s.newID()
	_, err := s.Repo.Create(ctx, storage.Spec{ID: n, Size: unit})
	s.wantErr(err, cause)
	_, err = s.Repo.Snapshot(ctx, storage.Derived{Source: id, ID: n})
	s.wantErr(err, cause)
	_, err = s.Repo.Clone(ctx, storage.Derived{Source: id, ID: n})
	s.wantErr(err, cause)
	_, err = s.Repo.Open(ctx, id, storage.Pinned)
	s.wantErr(err, cause)
	s.wantErr(s.Repo.Delete(ctx, id), cause)
	s.wantErr(v.Zero(ctx, 0, 64*kib), cause)
	s.wantErr(v.Flush(ctx), cause)
	last := error(nil)
	for _, last = range s.Repo.List(ctx) {
	}
	s.wantErr(last, cause)
	for _, last = range v.Extents(ctx, 0, 64*kib) {
	}
	s.wantErr(last, cause)
	if r, ok := s.Repo.(storage.Differ); ok {
		for _, last = range r.Diff(ctx, pin, v, 0) {
		}
		s.wantErr(last, cause)
	}
	if r, ok := s.Repo.(storage.Resizer); ok {
		_, err := r.Resize(ctx, id, unit)
		s.wantErr(err, cause)
	}
	if r, ok := s.Repo.(storage.GroupSnapshotter); ok {
		_, err := r.SnapshotGroup(ctx, []storage.Derived{{Source: id, ID: n}})
		s.wantErr(err, cause)
	}
	if r, ok := s.Repo.(storage.Attributer); ok {
		s.wantErr(r.SetAttrs(ctx, id, []byte("x")), cause)
	}
	if r, ok := s.Repo.(storage.Reverter); ok {
		to := s.create(unit)
		s.wantErr(r.Revert(ctx, id, to), cause)
		s.delete(to)
	}
	if got := s.list(); !slices.Equal(got, []storage.ID{id}) {
		s.Errorf("List = %v, want only %v", got, id)
	}
	s.wantBytes(s.stat(id).Attrs, nil)
	s.wantContents(id, data)
}

func testSetAttrs(s *suite) {
	r := power[storage.Attributer](s)
	id, data := s.filled(1, 64*kib)
	snap := s.snapshot(id)
	for _, n := range append(attrSizes, 7) {
		s.must(r.SetAttrs(s.ctx, id, noise(n, n)))
		s.must(r.SetAttrs(s.ctx, snap, noise(n+1, n)))
		s.wantBytes(s.stat(id).Attrs, noise(n, n))
		s.wantBytes(s.stat(snap).Attrs, noise(n+1, n))
	}
	s.wantErr(r.SetAttrs(s.ctx, id, make([]byte, storage.MaxAttrs+1)), storage.ErrInvalid)
	s.wantBytes(s.stat(id).Attrs, noise(7, 7))
	s.wantContents(id, data)
	s.wantContents(snap, data)
}

func testCheck(s *suite) {
	power[storage.Checker](s)
	id, _ := s.filled(1, mib)
	s.write(s.live(s.clone(s.snapshot(id))), noise(2, 100*kib), 100)
	s.delete(id)
	s.check()
}

// check runs a check where the driver has one.
func (s *suite) check() {
	s.Helper()
	r, ok := s.Repo.(storage.Checker)
	if !ok {
		return
	}
	for p, err := range r.Check(s.ctx) {
		s.must(err)
		s.Errorf("check: volume %q at %d: %s", p.Volume, p.Off, p.Detail)
	}
}
