package cow

import (
	"context"
	"fmt"
	"math/rand/v2"
	"testing"

	"coppice/internal/vfs"
)

// benchStore makes a store of ordinary geometry in a real directory.
func benchStore(b *testing.B) *Store {
	b.Helper()
	dir, err := vfs.CreateDir(b.TempDir() + "/store")
	if err != nil {
		b.Fatal(err)
	}
	s, err := Create(context.Background(), dir, Options{})
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() {
		if err := s.Close(); err != nil {
			b.Error(err)
		}
	})
	return s
}

// newDisk makes the live volume ID{n} and opens it.
func newDisk(tb testing.TB, s *Store, n byte, size int64, attrs []byte) *Disk {
	tb.Helper()
	if _, err := s.Create(context.Background(), ID{n}, size, attrs); err != nil {
		tb.Fatal(err)
	}
	d, err := s.OpenDisk(context.Background(), ID{n}, Live)
	if err != nil {
		tb.Fatal(err)
	}
	return d
}

// noise is bytes without zero units.
func noise(n int) []byte {
	p := make([]byte, n)
	rng := rand.NewChaCha8([32]byte{1})
	_, _ = rng.Read(p)
	return p
}

const (
	benchSize = 1 << 30
	benchCall = 2 << 20
)

// BenchmarkSequentialWrite fills a disk of 1 GiB with calls of 2 MiB.
func BenchmarkSequentialWrite(b *testing.B) {
	s := benchStore(b)
	d := newDisk(b, s, 1, benchSize, nil)
	p := noise(benchCall)
	b.SetBytes(benchCall)
	off := int64(0)
	for b.Loop() {
		p[0]++ // contents that are there already would not be written
		for i := 0; i < len(p); i += 4096 {
			p[i+1]++
		}
		if _, err := d.WriteAt(p, off%benchSize); err != nil {
			b.Fatal(err)
		}
		off += benchCall
	}
}

// BenchmarkZeroWrite writes zeros over holes.
func BenchmarkZeroWrite(b *testing.B) {
	s := benchStore(b)
	d := newDisk(b, s, 1, benchSize, nil)
	p := make([]byte, benchCall)
	b.SetBytes(benchCall)
	off := int64(0)
	for b.Loop() {
		if _, err := d.WriteAt(p, off%benchSize); err != nil {
			b.Fatal(err)
		}
		off += benchCall
	}
}

// fill writes a whole disk of benchSize: p, again and again.
func fill(b *testing.B, d *Disk) (p []byte) {
	b.Helper()
	p = noise(benchCall)
	for off := int64(0); off < benchSize; off += benchCall {
		if _, err := d.WriteAt(p, off); err != nil {
			b.Fatal(err)
		}
	}
	if err := d.Flush(context.Background()); err != nil {
		b.Fatal(err)
	}
	return p
}

// BenchmarkSequentialRead reads what BenchmarkSequentialWrite wrote.
func BenchmarkSequentialRead(b *testing.B) {
	s := benchStore(b)
	d := newDisk(b, s, 1, benchSize, nil)
	p := fill(b, d)
	b.SetBytes(benchCall)
	off := int64(0)
	for b.Loop() {
		if _, err := d.ReadAt(p, off%benchSize); err != nil {
			b.Fatal(err)
		}
		off += benchCall
	}
}

// BenchmarkRandom reads and writes single units of a filled disk.
func BenchmarkRandom(b *testing.B) {
	s := benchStore(b)
	d := newDisk(b, s, 1, benchSize, nil)
	p := fill(b, d)
	rng := rand.New(rand.NewPCG(1, 1))
	unit := p[:4096]
	b.Run("read", func(b *testing.B) {
		b.SetBytes(4096)
		b.ReportAllocs()
		for b.Loop() {
			if _, err := d.ReadAt(unit, rng.Int64N(benchSize/4096)*4096); err != nil {
				b.Fatal(err)
			}
		}
	})
	b.Run("write", func(b *testing.B) {
		b.SetBytes(4096)
		b.ReportAllocs()
		for b.Loop() {
			if _, err := d.WriteAt(unit, rng.Int64N(benchSize/4096)*4096); err != nil {
				b.Fatal(err)
			}
		}
	})
	b.Run("write+flush", func(b *testing.B) {
		for b.Loop() {
			if _, err := d.WriteAt(unit, rng.Int64N(benchSize/4096)*4096); err != nil {
				b.Fatal(err)
			}
			if err := d.Flush(context.Background()); err != nil {
				b.Fatal(err)
			}
		}
	})
}

// BenchmarkSnapshot takes snapshots of a disk that has some already, one
// changed unit between two.
func BenchmarkSnapshot(b *testing.B) {
	for _, depth := range []int{1, 1000} {
		b.Run(fmt.Sprintf("depth=%d", depth), func(b *testing.B) {
			ctx := context.Background()
			s := benchStore(b)
			d := newDisk(b, s, 1, 1<<40, nil)
			n := uint32(0)
			snap := func() {
				n++
				id := ID{2, byte(n >> 24), byte(n >> 16), byte(n >> 8), byte(n)}
				if _, err := s.Snapshot(ctx, []Pair{{Src: d.ID(), New: id}}); err != nil {
					b.Fatal(err)
				}
			}
			p := noise(4096)
			for i := range depth {
				if _, err := d.WriteAt(p, int64(i)*1<<20); err != nil {
					b.Fatal(err)
				}
				snap()
			}
			for b.Loop() {
				if _, err := d.WriteAt(p, int64(n)*1<<20); err != nil {
					b.Fatal(err)
				}
				snap()
			}
		})
	}
}

// BenchmarkSmallFlush writes and flushes single units of a small disk: what
// the log costs.
func BenchmarkSmallFlush(b *testing.B) {
	const size = 64 << 20
	s := benchStore(b)
	d := newDisk(b, s, 1, size, nil)
	p := noise(4096)
	n := int64(0)
	for b.Loop() {
		n++
		p[0], p[1], p[2] = byte(n), byte(n>>8), byte(n>>16)
		if _, err := d.WriteAt(p, n*7919%(size/4096)*4096); err != nil {
			b.Fatal(err)
		}
		if err := d.Flush(context.Background()); err != nil {
			b.Fatal(err)
		}
	}
}

// BenchmarkCreate makes stores in a real directory.
func BenchmarkCreate(b *testing.B) {
	for b.Loop() {
		b.StopTimer()
		dir, err := vfs.CreateDir(b.TempDir() + "/store")
		if err != nil {
			b.Fatal(err)
		}
		b.StartTimer()
		s, err := Create(context.Background(), dir, Options{})
		if err != nil {
			b.Fatal(err)
		}
		b.StopTimer()
		if err := s.Close(); err != nil {
			b.Fatal(err)
		}
		if err := Destroy(dir); err != nil {
			b.Fatal(err)
		}
		b.StartTimer()
	}
}

// BenchmarkEqualWrite writes what the disk has already, as a second import of
// an image does. To be compared with BenchmarkSequentialRead.
func BenchmarkEqualWrite(b *testing.B) {
	s := benchStore(b)
	d := newDisk(b, s, 1, benchSize, nil)
	p := fill(b, d)
	b.SetBytes(benchCall)
	off := int64(0)
	for b.Loop() {
		if _, err := d.WriteAt(p, off%benchSize); err != nil {
			b.Fatal(err)
		}
		off += benchCall
	}
}

// BenchmarkExtents finds 256 stretches of 4 MiB in a disk of 1 TiB, as an
// export does that has to know its length before its first byte.
func BenchmarkExtents(b *testing.B) {
	ctx := context.Background()
	s := benchStore(b)
	d := newDisk(b, s, 1, 1<<40, nil)
	p := noise(4 << 20)
	for i := range int64(256) {
		if _, err := d.WriteAt(p, i<<32); err != nil {
			b.Fatal(err)
		}
	}
	if err := s.sync(ctx); err != nil {
		b.Fatal(err)
	}
	for b.Loop() {
		n := 0
		for e, err := range d.Extents(ctx, 0, d.Size()) {
			if err != nil {
				b.Fatal(err)
			}
			if !e.Hole {
				n++
			}
		}
		if n != 256 {
			b.Fatalf("%d stretches", n)
		}
	}
}

// BenchmarkCloneRanges gives 512 MiB in pieces of 64 KiB to another disk.
func BenchmarkCloneRanges(b *testing.B) {
	s := benchStore(b)
	src, dst := newDisk(b, s, 1, benchSize, nil), newDisk(b, s, 2, benchSize, nil)
	fill(b, src)
	const piece = 64 << 10
	var ranges []RangeClone
	for off := int64(0); off < benchSize/2; off += piece {
		ranges = append(ranges, RangeClone{To: benchSize - off - piece, From: off, Len: piece})
	}
	if err := s.sync(b.Context()); err != nil {
		b.Fatal(err)
	}
	for b.Loop() {
		if err := s.CloneRanges(b.Context(), dst, src, ranges); err != nil {
			b.Fatal(err)
		}
	}
}
