// Package storagetest checks that a driver keeps the contract of package
// storage. The test of a driver is a call of [Run], which goes through the
// contract rule by rule, one of [Model], which compares long random histories
// with plain byte slices, and one of [Bench]. The suite asks what a repository
// can do by the interfaces that it implements, never by its type.
package storagetest

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"testing"

	"coppice/internal/storage"
)

// TB is what a fixture may use of a test. *testing.T, *testing.B and
// *rapid.T are some.
type TB interface {
	Helper()
	Errorf(format string, args ...any)
	Fatalf(format string, args ...any)
	Cleanup(func())
}

// Fixture is a fresh, empty repository. Whoever makes it closes it with
// TB.Cleanup, and checks it where that is possible.
type Fixture struct {
	Repo storage.Repo

	// Reopen closes Repo and opens it again, and puts the result in Repo. It
	// is nil when contents end with Close.
	Reopen func()

	// Crash stops using Repo without closing it, as at a power cut, and opens
	// what is left of it into Repo. choose picks one of n outcomes where the
	// cut leaves something open. It is nil when that cannot be simulated.
	Crash func(choose func(n int) int)
}

// Open makes a fixture for one test.
type Open func(t TB) *Fixture

// Run goes through the contract. Each part runs on a repository of its own.
func Run(t *testing.T, open Open) {
	for _, part := range []struct {
		name string
		test func(*suite)
	}{
		{"Create", testCreate},
		{"CreateInvalid", testCreateInvalid},
		{"List", testList},
		{"Delete", testDelete},
		{"NotFound", testNotFound},
		{"IDReuse", testIDReuse},
		{"Attributes", testAttributes},
		{"Usage", testUsage},
		{"SpaceReturns", testSpaceReturns},
		{"Features", testFeatures},
		{"CloseRepo", testCloseRepo},
		{"CloseVolume", testCloseVolume},
		{"Cancelled", testCancelled},

		{"ReadWrite", testReadWrite},
		{"Bounds", testBounds},
		{"LargeIO", testLargeIO},
		{"WriteBulk", testWriteBulk},
		{"Sparse", testSparse},
		{"ZeroWrites", testZeroWrites},
		{"Zero", testZero},
		{"Extents", testExtents},
		{"ExtentsStop", testExtentsStop},

		{"Snapshot", testSnapshot},
		{"Clone", testClone},
		{"Independence", testIndependence},
		{"Lineage", testLineage},
		{"DeepHistory", testDeepHistory},
		{"Pinned", testPinned},
		{"LiveAfterDelete", testLiveAfterDelete},

		{"Resize", testResize},
		{"Revert", testRevert},
		{"SetAttrs", testSetAttrs},
		{"Versions", testVersions},
		{"Group", testGroup},
		{"GroupAllOrNone", testGroupAllOrNone},
		{"Check", testCheck},

		{"DiffRelated", testDiffRelated},
		{"DiffUnrelated", testDiffUnrelated},
		{"DiffResized", testDiffResized},
		{"DiffResume", testDiffResume},
		{"DiffInvalid", testDiffInvalid},

		{"CloneRanges", testCloneRanges},
		{"CloneRangesInvalid", testCloneRangesInvalid},

		{"DestroyData", testDestroyData},
		{"ChangedSince", testChangedSince},
		{"ChangedSinceLineage", testChangedSinceLineage},
		{"ChangedSinceInvalid", testChangedSinceInvalid},
		{"WouldFree", testWouldFree},
		{"WrittenSinceParent", testWrittenSinceParent},
		{"Scrub", testScrub},
		{"Undamaged", testUndamaged},
		{"RepoAttrs", testRepoAttrs},

		{"ConcurrentIO", testConcurrentIO},
		{"ConcurrentVolumes", testConcurrentVolumes},
		{"SnapshotsUnderWrites", testSnapshotsUnderWrites},
		{"GroupInstant", testGroupInstant},
		{"CloseUnderLoad", testCloseUnderLoad},

		{"Reopen", testReopen},
		{"Crash", testCrash},
	} {
		t.Run(part.name, func(t *testing.T) {
			part.test(&suite{T: t, Fixture: open(t), ctx: t.Context()})
		})
	}
}

// suite is one test with its repository.
type suite struct {
	*testing.T
	*Fixture
	ctx    context.Context
	lastID int
}

// power returns the repository as something that can do more, or skips the
// test.
func power[P any](s *suite) P {
	s.Helper()
	p, ok := s.Repo.(P)
	if !ok {
		s.Skipf("no %T", (*P)(nil))
	}
	return p
}

// newID returns an ID that is larger than the one before.
func (s *suite) newID() storage.ID {
	s.lastID++
	return testID(s.lastID)
}

func testID(n int) storage.ID {
	return storage.ID(fmt.Sprintf("%08x-c0de-4bad-8bee-0123456789ab", n))
}

func (s *suite) must(err error) {
	s.Helper()
	if err != nil {
		s.Fatal(err)
	}
}

func (s *suite) wantErr(err, want error) {
	s.Helper()
	if !errors.Is(err, want) {
		s.Errorf("error %v, want %v", err, want)
	}
}

func (s *suite) create(size int64) storage.ID {
	s.Helper()
	id := s.newID()
	_, err := s.Repo.Create(s.ctx, storage.Spec{ID: id, Size: size})
	s.must(err)
	return id
}

func (s *suite) snapshot(of storage.ID) storage.ID {
	s.Helper()
	id := s.newID()
	_, err := s.Repo.Snapshot(s.ctx, storage.Derived{Source: of, ID: id})
	s.must(err)
	return id
}

func (s *suite) clone(of storage.ID) storage.ID {
	s.Helper()
	id := s.newID()
	_, err := s.Repo.Clone(s.ctx, storage.Derived{Source: of, ID: id})
	s.must(err)
	return id
}

func (s *suite) delete(id storage.ID) {
	s.Helper()
	s.must(s.Repo.Delete(s.ctx, id))
}

func (s *suite) stat(id storage.ID) storage.Info {
	s.Helper()
	info, err := s.Repo.Stat(s.ctx, id)
	s.must(err)
	return info
}

// open opens a volume until the end of the test.
func (s *suite) open(id storage.ID, m storage.Mode) storage.Volume {
	s.Helper()
	v, err := s.Repo.Open(s.ctx, id, m)
	s.must(err)
	s.Cleanup(func() { _ = v.Close() })
	return v
}

func (s *suite) live(id storage.ID) storage.Volume {
	s.Helper()
	return s.open(id, storage.Live)
}

func (s *suite) write(v storage.Volume, p []byte, off int64) {
	s.Helper()
	if n, err := v.WriteAt(p, off); n != len(p) || err != nil {
		s.Fatalf("WriteAt of %d bytes at %d = %d, %v", len(p), off, n, err)
	}
}

func (s *suite) zero(v storage.Volume, off, n int64) {
	s.Helper()
	s.must(v.Zero(s.ctx, off, n))
}

func (s *suite) flush(v storage.Volume) {
	s.Helper()
	s.must(v.Flush(s.ctx))
}

// read returns n bytes of a volume.
func (s *suite) read(v io.ReaderAt, off, n int64) []byte {
	s.Helper()
	p := make([]byte, n)
	if k, err := v.ReadAt(p, off); int64(k) != n || err != nil && err != io.EOF {
		s.Fatalf("ReadAt of %d bytes at %d = %d, %v", n, off, k, err)
	}
	return p
}

// wantBytes compares bytes and says where they differ first.
func (s *suite) wantBytes(got, want []byte) {
	s.Helper()
	if len(got) != len(want) {
		s.Fatalf("%d bytes, want %d", len(got), len(want))
	}
	if i := firstDifference(got, want); i >= 0 {
		s.Fatalf("byte %d of %d is %#x, want %#x", i, len(got), got[i], want[i])
	}
}

// wantVolume compares all of a volume.
func (s *suite) wantVolume(v storage.Volume, want []byte) {
	s.Helper()
	if v.Size() != int64(len(want)) {
		s.Fatalf("size %d, want %d", v.Size(), len(want))
	}
	s.wantBytes(s.read(v, 0, v.Size()), want)
}

// wantContents opens a volume and compares all of it.
func (s *suite) wantContents(id storage.ID, want []byte) {
	s.Helper()
	for _, m := range []storage.Mode{storage.Live, storage.Pinned} {
		v, err := s.Repo.Open(s.ctx, id, m)
		s.must(err)
		s.wantVolume(v, want)
		s.must(v.Close())
	}
}

func firstDifference(a, b []byte) int {
	if bytes.Equal(a, b) {
		return -1
	}
	for i := range a {
		if a[i] != b[i] {
			return i
		}
	}
	return -1
}

// isZero tells whether p is all zero.
func isZero(p []byte) bool {
	return len(p) == 0 || p[0] == 0 && bytes.Equal(p[1:], p[:len(p)-1])
}

// noise returns n bytes that depend on seed and hold no zeros.
func noise(seed, n int) []byte {
	rng := rand.New(rand.NewPCG(uint64(seed), 0))
	p := make([]byte, 0, n+7)
	for len(p) < n {
		p = binary.LittleEndian.AppendUint64(p, rng.Uint64()|0x0101010101010101)
	}
	return p[:n:n]
}

// filled makes a volume with noise in it.
func (s *suite) filled(seed, size int) (storage.ID, []byte) {
	s.Helper()
	id := s.create(int64(size))
	data := noise(seed, size)
	v := s.live(id)
	s.write(v, data, 0)
	s.must(v.Close())
	return id, data
}
