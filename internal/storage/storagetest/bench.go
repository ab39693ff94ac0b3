package storagetest

import (
	"bytes"
	"context"
	"math/rand/v2"
	"testing"

	"coppice/internal/storage"
)

// Bench measures a driver. The names are stable, so that results can be
// compared over time.
func Bench(b *testing.B, open Open) {
	for _, part := range []struct {
		name string
		run  func(*bench)
	}{
		{"Write1M", func(s *bench) { s.writes(mib, false) }},
		{"Write4K", func(s *bench) { s.writes(unit, false) }},
		{"Write4KRandom", func(s *bench) { s.writes(unit, true) }},
		{"Read1M", func(s *bench) { s.reads(mib, false) }},
		{"Read4K", func(s *bench) { s.reads(unit, false) }},
		{"Read4KRandom", func(s *bench) { s.reads(unit, true) }},
		{"Read1MScattered", (*bench).scattered},
		{"Flush4K", (*bench).flushes},
		{"Snapshot", (*bench).snapshots},
		{"SnapshotWritten", (*bench).snapshotsWritten},
		{"Clone", (*bench).clones},
		{"CreateDelete", (*bench).createDelete},
		{"Diff", (*bench).diffs},
		{"ExtentsScattered", (*bench).extents},
		{"OverlayNew", (*bench).overlayNew},
		{"OverlayUnchanged", (*bench).overlayUnchanged},
		{"OverlayZeros", (*bench).overlayZeros},
	} {
		b.Run(part.name, func(b *testing.B) {
			part.run(&bench{B: b, Fixture: open(b), ctx: b.Context()})
		})
	}
}

type bench struct {
	*testing.B
	*Fixture
	ctx  context.Context
	next int
}

const benchSize = 256 * mib

func (s *bench) must(err error) {
	s.Helper()
	if err != nil {
		s.Fatal(err)
	}
}

func (s *bench) id() storage.ID {
	s.next++
	return testID(s.next)
}

// disk makes a volume, full of data unless empty.
func (s *bench) disk(size int64, empty bool) (storage.ID, storage.Volume) {
	s.Helper()
	id := s.id()
	_, err := s.Repo.Create(s.ctx, storage.Spec{ID: id, Size: size})
	s.must(err)
	v, err := s.Repo.Open(s.ctx, id, storage.Live)
	s.must(err)
	s.Cleanup(func() { _ = v.Close() })
	if !empty {
		p := noise(1, mib)
		for off := int64(0); off < size; off += mib {
			s.write(v, p, off)
		}
		s.must(v.Flush(s.ctx))
	}
	return id, v
}

func (s *bench) write(v storage.Volume, p []byte, off int64) {
	if _, err := v.WriteAt(p, off); err != nil {
		s.Fatal(err)
	}
}

// offsets returns a sequence of places for n bytes in a volume of benchSize.
func offsets(n int64, random bool) func() int64 {
	rng := rand.New(rand.NewPCG(1, 1))
	next := int64(-n)
	return func() int64 {
		if random {
			return rng.Int64N(benchSize/n) * n
		}
		next = (next + n) % benchSize
		return next
	}
}

func (s *bench) writes(n int64, random bool) {
	_, v := s.disk(benchSize, false)
	next, off := fresh(int(n)), offsets(n, random)
	s.SetBytes(n)
	for s.Loop() {
		s.write(v, next(), off())
	}
}

// fresh returns a source of n bytes that differ from those before, so that no
// write is one that changes nothing.
func fresh(n int) func() []byte {
	p, at := noise(2, n+unit), 0
	return func() []byte {
		at = (at + 8) % unit
		return p[at:][:n]
	}
}

func (s *bench) readLoop(v storage.Volume, n int64, random bool) {
	p, off := make([]byte, n), offsets(n, random)
	s.SetBytes(n)
	for s.Loop() {
		if _, err := v.ReadAt(p, off()); err != nil {
			s.Fatal(err)
		}
	}
}

func (s *bench) reads(n int64, random bool) {
	_, v := s.disk(benchSize, false)
	s.readLoop(v, n, random)
}

// scattered reads in order what was written in random order.
func (s *bench) scattered() {
	_, v := s.disk(benchSize, true)
	p := noise(1, unit)
	for i, u := range rand.New(rand.NewPCG(1, 1)).Perm(benchSize / unit) {
		s.write(v, p, int64(u)*unit)
		if i%8192 == 0 {
			s.must(v.Flush(s.ctx))
		}
	}
	s.must(v.Flush(s.ctx))
	s.readLoop(v, mib, false)
}

func (s *bench) flushes() {
	_, v := s.disk(benchSize, false)
	next, off := fresh(unit), offsets(unit, true)
	for s.Loop() {
		s.write(v, next(), off())
		s.must(v.Flush(s.ctx))
	}
}

func (s *bench) snapshot(of storage.ID) storage.ID {
	id := s.id()
	_, err := s.Repo.Snapshot(s.ctx, storage.Derived{Source: of, ID: id})
	s.must(err)
	return id
}

// snapshots are of an idle volume: the depth grows by one each time.
func (s *bench) snapshots() {
	id, _ := s.disk(benchSize, false)
	for s.Loop() {
		s.snapshot(id)
	}
}

func (s *bench) snapshotsWritten() {
	id, v := s.disk(benchSize, false)
	next, off := fresh(unit), offsets(unit, true)
	for s.Loop() {
		s.write(v, next(), off())
		s.snapshot(id)
	}
}

func (s *bench) clones() {
	id, _ := s.disk(benchSize, false)
	snap := s.snapshot(id)
	for s.Loop() {
		_, err := s.Repo.Clone(s.ctx, storage.Derived{Source: snap, ID: s.id()})
		s.must(err)
	}
}

func (s *bench) createDelete() {
	for s.Loop() {
		id := s.id()
		_, err := s.Repo.Create(s.ctx, storage.Spec{ID: id, Size: 1 << 30})
		s.must(err)
		s.must(s.Repo.Delete(s.ctx, id))
	}
}

// diffs find 1000 changed units in a volume of 256 MiB.
func (s *bench) diffs() {
	r, ok := s.Repo.(storage.Differ)
	if !ok {
		s.Skip("no storage.Differ")
	}
	id, v := s.disk(benchSize, false)
	from, err := s.Repo.Open(s.ctx, s.snapshot(id), storage.Pinned)
	s.must(err)
	defer from.Close()
	p, off := noise(2, unit), offsets(unit, true)
	for range 1000 {
		s.write(v, p, off())
	}
	s.must(v.Flush(s.ctx))
	for s.Loop() {
		var n int64
		for e, err := range r.Diff(s.ctx, from, v, 0) {
			s.must(err)
			n += e.Len
		}
		if n > 1000*unit || n < 900*unit {
			s.Fatalf("the diff has %d bytes", n)
		}
	}
}

// extents lists 16 Ki pieces of data.
func (s *bench) extents() {
	_, v := s.disk(benchSize, true)
	p := noise(1, unit)
	for off := int64(0); off < benchSize; off += 4 * unit {
		s.write(v, p, off)
	}
	s.must(v.Flush(s.ctx))
	for s.Loop() {
		n := 0
		for e, err := range v.Extents(s.ctx, 0, benchSize) {
			s.must(err)
			if !e.Hole {
				n++
			}
		}
		if n != benchSize/unit/4 {
			s.Fatalf("%d pieces of data", n)
		}
	}
}

// overlay writes p over and over a whole volume.
func (s *bench) overlay(v storage.Volume, p []byte) {
	o := storage.NewOverlay(v)
	for off := int64(0); off < v.Size(); off += int64(len(p)) {
		s.must(o.WriteAt(s.ctx, p, off))
	}
}

func (s *bench) overlayNew() {
	s.SetBytes(benchSize)
	p := noise(1, mib)
	for s.Loop() {
		s.StopTimer()
		id, v := s.disk(benchSize, true)
		s.StartTimer()
		s.overlay(v, p)
		s.must(v.Flush(s.ctx))
		s.StopTimer()
		s.must(s.Repo.Delete(s.ctx, id))
		s.StartTimer()
	}
}

func (s *bench) overlayUnchanged() {
	_, v := s.disk(benchSize, false)
	p := noise(1, mib)
	s.SetBytes(benchSize)
	for s.Loop() {
		s.overlay(v, p)
	}
}

func (s *bench) overlayZeros() {
	_, v := s.disk(benchSize, true)
	p := bytes.Repeat([]byte{0}, mib)
	s.SetBytes(benchSize)
	for s.Loop() {
		s.overlay(v, p)
	}
}
