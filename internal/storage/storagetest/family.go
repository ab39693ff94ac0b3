package storagetest

import (
	"bytes"
	"maps"
	"math/rand/v2"
	"slices"

	"coppice/internal/storage"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
)

// ignoreUsed compares infos of which drivers may only estimate the space.
var ignoreUsed = cmpopts.IgnoreFields(storage.Info{}, "Used")

func testSnapshot(s *suite) {
	id, data := s.filled(1, 64*kib)
	d := storage.Derived{Source: id, ID: s.newID(), Attrs: []byte("snap")}
	info, err := s.Repo.Snapshot(s.ctx, d)
	s.must(err)
	want := storage.Info{ID: d.ID, Size: 64 * kib, ReadOnly: true, Attrs: d.Attrs}
	if d := cmp.Diff(want, info, ignoreUsed, cmpopts.IgnoreFields(storage.Info{}, "Parent")); d != "" {
		s.Errorf("Snapshot (-want +got):\n%s", d)
	}
	_, err = s.Repo.Snapshot(s.ctx, d)
	s.wantErr(err, storage.ErrExists)
	v := s.live(id)
	s.write(v, noise(2, 10*kib), 5000)
	s.wantContents(d.ID, data)
	again := s.snapshot(d.ID)
	if !s.stat(again).ReadOnly {
		s.Error("a snapshot of a snapshot is writable")
	}
	s.wantContents(again, data)
	copy(data[5000:], noise(2, 10*kib))
	s.wantVolume(v, data)
}

func testClone(s *suite) {
	id, data := s.filled(1, 64*kib)
	snap := s.snapshot(id)
	for _, src := range []storage.ID{id, snap} {
		d := storage.Derived{Source: src, ID: s.newID(), Attrs: []byte("clone")}
		info, err := s.Repo.Clone(s.ctx, d)
		s.must(err)
		if info.ReadOnly || info.Size != 64*kib || info.ID != d.ID {
			s.Errorf("Clone = %+v", info)
		}
		_, err = s.Repo.Clone(s.ctx, d)
		s.wantErr(err, storage.ErrExists)
		v := s.live(d.ID)
		changed := slices.Clone(data)
		s.write(v, noise(3, 9000), 100)
		copy(changed[100:], noise(3, 9000))
		s.zero(v, 20*kib, 30*kib)
		clear(changed[20*kib : 50*kib])
		s.wantVolume(v, changed)
		s.wantContents(id, data)
		s.wantContents(snap, data)
	}
}

// testIndependence builds a family, writes to all of it and deletes its
// members in random order.
func testIndependence(s *suite) {
	const size = 100 * unit
	rng := rand.New(rand.NewPCG(4, 4))
	root, data := s.filled(1, size)
	family := map[storage.ID][]byte{root: data}
	writable := []storage.ID{root}
	for i := range 60 {
		src := writable[rng.IntN(len(writable))]
		switch rng.IntN(3) {
		case 0:
			family[s.snapshot(src)] = slices.Clone(family[src])
		case 1:
			id := s.clone(src)
			family[id] = slices.Clone(family[src])
			writable = append(writable, id)
		default:
			off := rng.Int64N(size - 5*unit)
			p := noise(i, 1+rng.IntN(5*unit))
			s.write(s.live(src), p, off)
			copy(family[src][off:], p)
		}
	}
	for len(family) > 0 {
		ids := slices.Sorted(maps.Keys(family))
		id := ids[rng.IntN(len(ids))]
		s.wantContents(id, family[id])
		s.delete(id)
		delete(family, id)
		if len(family) > 0 {
			ids = slices.Sorted(maps.Keys(family))
			id = ids[rng.IntN(len(ids))]
			s.wantContents(id, family[id])
		}
	}
	s.check()
}

func testLineage(s *suite) {
	parent := func(id, want storage.ID) {
		s.Helper()
		if got := s.stat(id).Parent; got != want {
			s.Errorf("the parent of %.8s is %.8q, want %.8q", id, got, want)
		}
	}
	d := s.create(64 * kib)
	v := s.live(d)
	parent(d, "")
	s1 := s.snapshot(d)
	parent(d, s1)
	parent(s1, "")
	s.write(v, noise(1, 100), 0)
	s2 := s.snapshot(d)
	parent(d, s2)
	parent(s2, s1)
	c1, c2 := s.clone(s1), s.clone(d)
	parent(c1, s1)
	parent(c2, s2)
	parent(s.snapshot(s1), s1)
	if r, ok := s.Repo.(storage.Reverter); ok {
		s.must(r.Revert(s.ctx, d, s1))
		parent(d, s1)
		s.must(r.Revert(s.ctx, d, c2))
		parent(d, s2)
	}
	s.delete(s2)
	parent(c2, s1)
	s.delete(s1)
	parent(c1, "")
	parent(c2, "")
}

// testDeepHistory takes many snapshots of one volume with a change between
// them.
func testDeepHistory(s *suite) {
	const size = 32 * unit
	id, data := s.filled(1, size)
	v := s.live(id)
	type version struct {
		id   storage.ID
		data []byte
	}
	var versions []version
	for i := range 150 {
		off := (i * 7 % 31) * unit
		p := noise(i, unit+i)
		s.write(v, p, int64(off))
		copy(data[off:], p)
		versions = append(versions, version{s.snapshot(id), slices.Clone(data)})
	}
	s.delete(id)
	for i := range versions {
		k := versions[i*67%len(versions)]
		s.wantContents(k.id, k.data)
		s.delete(k.id)
	}
}

func testPinned(s *suite) {
	id, data := s.filled(1, 100*kib)
	pin := s.open(id, storage.Pinned)
	still := func(after string) {
		s.Helper()
		s.Logf("pinned volume after %s", after)
		s.wantVolume(pin, data)
		s.wantExtents(pin, data, 0)
	}
	v := s.live(id)
	s.write(v, noise(2, 50*kib), 1234)
	still("a write")
	s.flush(v)
	still("a flush")
	s.zero(v, 0, 60*kib)
	still("zeroing")
	snap := s.snapshot(id)
	s.write(v, noise(3, 50*kib), 0)
	pin2 := s.open(snap, storage.Pinned)
	snapData := s.read(pin2, 0, pin2.Size())
	still("a snapshot")
	if r, ok := s.Repo.(storage.Resizer); ok {
		_, err := r.Resize(s.ctx, id, 20*kib)
		s.must(err)
		still("a shrink")
	}
	if r, ok := s.Repo.(storage.Reverter); ok {
		s.must(r.Revert(s.ctx, id, snap))
		still("a revert")
	}
	s.delete(id)
	s.delete(snap)
	still("a delete")
	s.wantVolume(pin2, snapData)
	for range 5 { // whatever is written now must not land in what is pinned
		other, _ := s.filled(9, 200*kib)
		s.flush(s.live(other))
		s.delete(other)
	}
	still("other writes")
	s.wantVolume(pin2, snapData)
	s.must(pin.Close())
	s.wantVolume(pin2, snapData)
}

func testLiveAfterDelete(s *suite) {
	id, _ := s.filled(1, 64*kib)
	v := s.live(id)
	s.delete(id)
	_, err := v.ReadAt(make([]byte, 10), 0)
	s.wantErr(err, storage.ErrNotFound)
	_, err = v.WriteAt(make([]byte, 10), 0)
	s.wantErr(err, storage.ErrNotFound)
	s.wantErr(v.Zero(s.ctx, 0, 10), storage.ErrNotFound)
	s.wantErr(v.Flush(s.ctx), storage.ErrNotFound)
	for _, err := range v.Extents(s.ctx, 0, unit) {
		s.wantErr(err, storage.ErrNotFound)
	}
	s.must(v.Close())
}

func testResize(s *suite) {
	r := power[storage.Resizer](s)
	id, data := s.filled(1, 100*kib)
	v := s.live(id)
	snap := s.snapshot(id)
	before := slices.Clone(data)
	resize := func(size int) {
		s.Helper()
		info, err := r.Resize(s.ctx, id, int64(size))
		s.must(err)
		if info.Size != int64(size) || v.Size() != int64(size) || s.stat(id).Size != int64(size) {
			s.Errorf("size %d, open %d, want %d", info.Size, v.Size(), size)
		}
		data = append(data, make([]byte, max(0, size-len(data)))...)
		data = data[:size]
		s.wantVolume(v, data)
		s.wantContents(id, data)
		s.wantExtents(v, data, 0)
	}
	resize(200 * kib)
	s.write(v, noise(2, 50*kib), 150*kib)
	copy(data[150*kib:], noise(2, 50*kib))
	s.wantVolume(v, data)
	resize(200 * kib)
	resize(60 * kib)
	_, err := v.WriteAt([]byte("x"), 60*kib)
	s.wantErr(err, storage.ErrInvalid)
	resize(8 * unit)
	s.flush(v)
	resize(5 * mib) // what was cut off does not come back
	resize(unit)
	resize(100 * kib)
	s.wantContents(snap, before)
	for _, size := range []int64{0, -unit, unit + 1, storage.MaxSize + unit} {
		_, err := r.Resize(s.ctx, id, size)
		s.wantErr(err, storage.ErrInvalid)
	}
	_, err = r.Resize(s.ctx, snap, unit)
	s.wantErr(err, storage.ErrReadOnly)
	_, err = r.Resize(s.ctx, id, storage.MaxSize)
	s.must(err)
	s.write(v, noise(3, 5000), storage.MaxSize-5000)
	s.wantBytes(s.read(v, storage.MaxSize-5000, 5000), noise(3, 5000))
	s.wantBytes(s.read(v, 0, 100*kib), data)
	_, err = r.Resize(s.ctx, id, 100*kib)
	s.must(err)
	s.wantContents(id, data)
}

func testRevert(s *suite) {
	r := power[storage.Reverter](s)
	id, old := s.filled(1, 100*kib)
	s.must(s.setAttrs(id, "own"))
	v, pin := s.live(id), s.open(id, storage.Pinned)
	snap := s.snapshot(id)
	s.write(v, noise(2, 70*kib), 999)
	young := s.read(v, 0, v.Size())
	later := s.snapshot(id)
	s.must(r.Revert(s.ctx, id, snap))
	s.wantVolume(v, old)
	s.wantContents(id, old)
	s.wantContents(later, young)
	s.wantVolume(pin, old)
	if info := s.stat(id); info.ReadOnly || info.ID != id || len(info.Attrs) > 0 && string(info.Attrs) != "own" {
		s.Errorf("after a revert: %+v", info)
	}
	// Forward again, and the volume goes on to be writable by itself.
	s.must(r.Revert(s.ctx, id, later))
	s.wantVolume(v, young)
	s.write(v, []byte("mine"), 0)
	s.wantContents(later, young)
	s.must(r.Revert(s.ctx, id, id))
	copy(young, "mine")
	s.wantVolume(v, young)
	// To a writable volume, of another size, and unrelated.
	other, data := s.filled(3, 32*kib)
	s.must(r.Revert(s.ctx, id, other))
	s.wantVolume(v, data)
	s.write(s.live(other), []byte("theirs"), 0)
	s.wantVolume(v, data)
	s.wantErr(r.Revert(s.ctx, snap, id), storage.ErrReadOnly)
	s.wantContents(snap, old)
	// Data written and never flushed is gone as well.
	s.write(v, noise(4, 300), 0)
	s.must(r.Revert(s.ctx, id, snap))
	s.delete(snap)
	s.wantVolume(v, old)
	s.check()
}

// setAttrs sets attributes where the driver can.
func (s *suite) setAttrs(id storage.ID, blob string) error {
	if r, ok := s.Repo.(storage.Attributer); ok {
		return r.SetAttrs(s.ctx, id, []byte(blob))
	}
	return nil
}

func testGroup(s *suite) {
	r := power[storage.GroupSnapshotter](s)
	var ds []storage.Derived
	var want [][]byte
	for i := range 5 {
		id, data := s.filled(i, (1+i)*20*kib)
		ds = append(ds, storage.Derived{Source: id, ID: s.newID(), Attrs: []byte{byte(i)}})
		want = append(want, data)
	}
	slices.Reverse(ds) // of descending IDs
	slices.Reverse(want)
	infos, err := r.SnapshotGroup(s.ctx, ds)
	s.must(err)
	if len(infos) != len(ds) {
		s.Fatalf("%d infos for %d volumes", len(infos), len(ds))
	}
	for i, d := range ds {
		info := infos[i]
		if info.ID != d.ID || !info.ReadOnly || info.Size != int64(len(want[i])) || !bytes.Equal(info.Attrs, d.Attrs) {
			s.Errorf("info %d = %+v for %+v", i, info, d)
		}
		s.write(s.live(d.Source), noise(77, 100), 0)
		s.wantContents(d.ID, want[i])
	}
	infos, err = r.SnapshotGroup(s.ctx, nil)
	if len(infos) != 0 || err != nil {
		s.Errorf("an empty group gives %v, %v", infos, err)
	}
}

func testGroupAllOrNone(s *suite) {
	r := power[storage.GroupSnapshotter](s)
	a, b, taken := s.create(unit), s.create(unit), s.create(unit)
	x, y := s.newID(), s.newID()
	before := s.list()
	for _, c := range []struct {
		name string
		ds   []storage.Derived
		err  error
	}{
		{"no source", []storage.Derived{{Source: a, ID: x}, {Source: testID(999), ID: y}}, storage.ErrNotFound},
		{"taken ID", []storage.Derived{{Source: a, ID: x}, {Source: b, ID: taken}}, storage.ErrExists},
		{"ID twice", []storage.Derived{{Source: a, ID: x}, {Source: b, ID: x}}, storage.ErrInvalid},
		{"source twice", []storage.Derived{{Source: a, ID: x}, {Source: a, ID: y}}, storage.ErrInvalid},
		{"bad ID", []storage.Derived{{Source: a, ID: x}, {Source: b, ID: "?"}}, storage.ErrInvalid},
		{"large attributes", []storage.Derived{{Source: a, ID: x}, {Source: b, ID: y, Attrs: make([]byte, storage.MaxAttrs+1)}}, storage.ErrInvalid},
	} {
		_, err := r.SnapshotGroup(s.ctx, c.ds)
		if s.wantErr(err, c.err); s.Failed() {
			s.Fatalf("in the case %q", c.name)
		}
		if d := cmp.Diff(before, s.list()); d != "" {
			s.Errorf("%s: List (-before +after):\n%s", c.name, d)
		}
	}
}

// testVersions checks that a version of a volume never stands for two
// contents, and that it is the same for contents that nobody has touched.
func testVersions(s *suite) {
	id, _ := s.filled(1, 20*kib)
	v := s.live(id)
	seen := map[string]string{}
	version := func() string {
		s.Helper()
		pin, err := s.Repo.Open(s.ctx, id, storage.Pinned)
		s.must(err)
		defer pin.Close()
		named, ok := pin.(storage.Versioned)
		if !ok {
			s.Skip("no storage.Versioned")
		}
		got, err := named.Version(s.ctx)
		s.must(err)
		data := string(s.read(pin, 0, pin.Size()))
		if old, ok := seen[got]; ok && old != data {
			s.Fatalf("version %q stands for two contents", got)
		}
		seen[got] = data
		return got
	}
	if a, b := version(), version(); a != b {
		s.Errorf("untouched contents have the versions %q and %q", a, b)
	}
	if named, ok := v.(storage.Versioned); ok {
		_, err := named.Version(s.ctx)
		s.wantErr(err, storage.ErrInvalid)
	}
	snap := s.snapshot(id)
	for i := range 12 {
		s.write(v, noise(i, 5000), int64(i*1000))
		version()
		if i%4 == 3 {
			s.zero(v, 0, 20*kib)
			version()
		}
		if r, ok := s.Repo.(storage.Reverter); ok && i%5 == 4 {
			s.must(r.Revert(s.ctx, id, snap))
			version()
		}
		if r, ok := s.Repo.(storage.Resizer); ok {
			_, err := r.Resize(s.ctx, id, int64(20+4*(i%3))*kib)
			s.must(err)
			version()
		}
	}
	s.flush(v)
	last := version()
	if r, ok := s.Repo.(storage.Reverter); ok {
		clone := s.clone(id)
		s.must(r.Revert(s.ctx, id, clone))
		if got := version(); got != last {
			s.Errorf("reverted to a clone of itself the version is %q, before it was %q", got, last)
		}
	}
	if s.Reopen != nil {
		s.Reopen()
		if got := version(); got != last {
			s.Errorf("after reopening the version is %q, before it was %q", got, last)
		}
	}
}
