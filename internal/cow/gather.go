package cow

import (
	"cmp"
	"slices"
	"sync"
	"sync/atomic"
)

const (
	// gatherMin is the number of pieces from which on a read gathers them;
	// fewer are read one behind the other.
	gatherMin = 8
	// gatherGap is how many bytes that nobody wants are read along to save a
	// call: what moves in the time that a call takes.
	gatherGap = 8 << 10
	// gatherWorkers is how many clusters a read works on at a time, with a
	// buffer of readPiece bytes each. The host has been told of all of them,
	// so it is for the sake of processors, and of hosts that take no advice.
	gatherWorkers = 4
	// compareWorkers is how many pieces a write compares at a time.
	compareWorkers = 32
)

// cluster is pieces that are read with one call: in the order of their places
// in a space file, with gaps of at most gatherGap bytes, readPiece bytes in all
// unless it is a single piece.
type cluster []piece

func (c cluster) first() uint64 { return c[0].units[0].addr }

// units is the number of units from the first to the last, gaps included.
func (c cluster) units() int { return int(c[len(c)-1].end() - c.first()) }

// end is the unit of the space files behind a piece.
func (pc piece) end() uint64 { return pc.units[0].addr + uint64(len(pc.units)) }

// readPieces reads and verifies the pieces of a read, which it reorders. The
// error is that of the damaged unit with the lowest offset; everything before
// that has been read.
//
// Many pieces are gathered by place: an old disk is scattered, but what one
// checkpoint wrote of a range of it lies together, in the order of offsets.
func (r *pageReader) readPieces(pieces []piece, p []byte, off int64) error {
	if len(pieces) < gatherMin {
		for _, pc := range pieces {
			if err := r.readPiece(pc, p, off); err != nil {
				return err
			}
		}
		return nil
	}
	clusters := r.clusters(pieces)
	if len(clusters) > 1 {
		for _, c := range clusters {
			r.files.readAhead(c.first(), c.units())
		}
	}
	var first firstError
	concurrently(clusters, gatherWorkers, func(c cluster) { r.readCluster(c, p, off, &first) })
	return first.err
}

// clusters sorts pieces by place and divides them.
func (r *pageReader) clusters(pieces []piece) []cluster {
	slices.SortFunc(pieces, func(a, b piece) int { return cmp.Compare(a.units[0].addr, b.units[0].addr) })
	gap, most := uint64(gatherGap/r.geo.UnitSize), readPiece/r.geo.UnitSize
	var out []cluster
	for from, i := 0, 1; i <= len(pieces); i++ {
		if i < len(pieces) {
			// A unit may be wanted twice: then it is in two clusters.
			last, next, c := pieces[i-1].end(), pieces[i].units[0].addr, cluster(pieces[from:i+1])
			if next >= last && next-last <= gap && c.units() <= most && r.files.contiguous(c.first(), c.units()) {
				continue
			}
		}
		out = append(out, pieces[from:i])
		from = i
	}
	return out
}

// readCluster reads the pieces of a cluster with one call, and those that are
// not what they should be again, each on its own.
func (r *pageReader) readCluster(c cluster, p []byte, off int64, first *firstError) {
	again := []piece(c)
	if len(c) > 1 {
		again = r.readTogether(c, p, off)
	}
	for _, pc := range again {
		if first.before(pc.off) {
			continue
		}
		if err := r.readPiece(pc, p, off); err != nil {
			first.set(err, pc.off)
		}
	}
}

// readTogether reads the pieces of a cluster and returns those that have not
// been read or verified. No byte that has not been verified reaches p.
func (r *pageReader) readTogether(c cluster, p []byte, off int64) (bad []piece) {
	buf := pieceBuffers.Get().(*[readPiece]byte)
	defer pieceBuffers.Put(buf)
	u := int64(r.geo.UnitSize)
	start := c.first()
	if r.files.read(buf[:int64(c.units())*u], start) != nil {
		return c // the fault may be in a gap
	}
pieces:
	for _, pc := range c {
		for i, s := range pc.units {
			b := buf[int64(s.addr-start)*u:][:u]
			if checksum(b) != s.crc {
				bad = append(bad, pc)
				continue pieces
			}
			from := pc.off + int64(i)*u - off
			copy(p[max(0, from):], b[max(0, -from):]) // p may begin and end within a unit
		}
	}
	return bad
}

// firstError is the error with the lowest offset of those that have been set.
type firstError struct {
	mu  sync.Mutex // guards what follows
	err error
	off int64
}

func (f *firstError) set(err error, off int64) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.err == nil || off < f.off {
		f.err, f.off = err, off
	}
}

// before reports whether an error has been set that is before off.
func (f *firstError) before(off int64) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.err != nil && f.off < off
}

// concurrently calls do for all of list, for many at most workers at a time,
// and returns when all calls have.
func concurrently[T any](list []T, workers int, do func(T)) {
	if workers = min(workers, len(list)/4); workers <= 1 {
		for _, t := range list {
			do(t)
		}
		return
	}
	var next atomic.Int64
	var wg sync.WaitGroup
	for range workers {
		wg.Go(func() {
			for i := int(next.Add(1)) - 1; i < len(list); i = int(next.Add(1)) - 1 {
				do(list[i])
			}
		})
	}
	wg.Wait()
}
