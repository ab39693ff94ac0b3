package cow

import (
	"encoding/binary"
	"errors"
	"fmt"
)

// errCount is a violated rule of reference counting: a bug, never a state of
// the disk. Whoever meets it stops the store before the error can spread.
var errCount = errors.New("reference count error")

// errMaxRefs says that a counter cannot count more references.
var errMaxRefs = fmt.Errorf("%w: too many references to a unit", errCount)

// counterPage is a counter page in memory.
type counterPage struct {
	n     []uint32
	dirty bool // differs from the valid copy on disk
}

// maxCleanCounters is how many counter pages are kept beyond a checkpoint.
const maxCleanCounters = 8192

// counterAddr is the unit of copy 0 or 1 of counter page k of a region.
func (g Geometry) counterAddr(region, k, copy int) uint64 {
	return uint64(region)*uint64(g.regionUnits()) + uint64(copy*pagesPerRegion+k)
}

// loadCounters reads counter page k of a region as rec says.
func loadCounters(files *spaceFiles, region, k int, rec *regionRecord) (*counterPage, error) {
	g := files.geo
	p := &counterPage{n: make([]uint32, g.PageCounters)}
	if rec.zero&(1<<k) != 0 {
		return p, nil
	}
	addr := g.counterAddr(region, k, int(rec.second>>k&1))
	b := make([]byte, g.UnitSize)
	if err := files.read(b, addr); err != nil {
		return nil, &CorruptError{Addr: addr, Detail: "counter page", Cause: err}
	}
	if checksum(b) != rec.crc[k] {
		return nil, &CorruptError{Addr: addr, Detail: "counter page: checksum mismatch"}
	}
	for i := range p.n {
		p.n[i] = binary.LittleEndian.Uint32(b[4*i:])
	}
	return p, nil
}

// counter returns the page that holds the counter of a unit and its index
// there. s.mu is held.
func (s *space) counter(addr uint64) (*counterPage, int, error) {
	i := int(addr / uint64(s.geo.PageCounters))
	if region := i / pagesPerRegion; region >= len(s.regions) || int(addr%uint64(s.geo.regionUnits())) < s.geo.metaUnits() {
		return nil, 0, fmt.Errorf("%w: unit %d cannot be referenced", errCount, addr)
	}
	p, ok := s.counters[i]
	if !ok {
		var err error
		p, err = loadCounters(s.files, i/pagesPerRegion, i%pagesPerRegion, &s.regions[i/pagesPerRegion].rec)
		if err != nil {
			return nil, 0, err
		}
		s.counters[i] = p
	}
	return p, int(addr % uint64(s.geo.PageCounters)), nil
}

// count returns the number of references to a unit.
func (s *space) count(addr uint64) (uint32, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	p, i, err := s.counter(addr)
	if err != nil {
		return 0, err
	}
	return p.n[i], nil
}

// add counts n new references to a unit that is referenced or has just been
// allocated. It fails with errMaxRefs when they are too many for a counter.
func (s *space) add(addr uint64, n uint32) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	p, i, err := s.counter(addr)
	if err != nil {
		return err
	}
	if p.n[i] == 0 {
		r, u := s.locate(addr)
		if !r.isHeld(u) {
			return fmt.Errorf("%w: unit %d gains a reference while free", errCount, addr)
		}
		r.unhold(u)
		r.rec.free--
		s.held--
		if r.used != nil {
			r.used[u/64] |= 1 << (u % 64)
		}
	} else if p.n[i]+n < n {
		return errMaxRefs
	}
	p.n[i] += n
	s.touch(p, addr)
	return nil
}

// sub counts one reference to a unit less. A unit that loses its last one is
// held until the checkpoint that is being made is durable and the reads begun
// before have ended; it is appended to s.freed.
func (s *space) sub(addr uint64) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	p, i, err := s.counter(addr)
	if err != nil {
		return err
	}
	if p.n[i] == 0 {
		return fmt.Errorf("%w: unit %d loses a reference it does not have", errCount, addr)
	}
	p.n[i]--
	s.touch(p, addr)
	if p.n[i] == 0 {
		r, u := s.locate(addr)
		r.hold(u)
		r.rec.free++
		s.held++
		if r.used != nil {
			r.used[u/64] &^= 1 << (u % 64)
		}
		s.freed = append(s.freed, addr)
	}
	return nil
}

func (s *space) touch(p *counterPage, addr uint64) {
	if !p.dirty {
		p.dirty = true
		s.dirty = append(s.dirty, int(addr/uint64(s.geo.PageCounters)))
		s.table.mark(int(addr / uint64(s.geo.regionUnits())))
	}
}

// writeCounters writes every counter page changed since the last checkpoint
// over the copy that the durable generation does not read.
func (s *space) writeCounters() error {
	s.mu.Lock()
	dirty := s.dirty
	s.dirty = nil
	s.mu.Unlock()
	b := make([]byte, s.geo.UnitSize)
	for _, i := range dirty {
		region, k := i/pagesPerRegion, i%pagesPerRegion
		s.mu.Lock()
		p, rec := s.counters[i], &s.regions[region].rec
		p.dirty = false
		clear(b)
		zero := true
		for j, n := range p.n {
			binary.LittleEndian.PutUint32(b[4*j:], n)
			zero = zero && n == 0
		}
		if zero {
			rec.zero |= 1 << k
			s.mu.Unlock()
			continue
		}
		rec.zero &^= 1 << k
		rec.second ^= 1 << k
		rec.crc[k] = checksum(b)
		addr := s.geo.counterAddr(region, k, int(rec.second>>k&1))
		s.mu.Unlock()
		if err := s.files.write(b, addr); err != nil {
			return err
		}
	}
	s.trimCounters()
	return nil
}

// trimCounters forgets unchanged counter pages beyond those that are kept.
// [space.writeCounters] must not be running.
func (s *space) trimCounters() {
	s.mu.Lock()
	defer s.mu.Unlock()
	for i, p := range s.counters {
		if len(s.counters) <= maxCleanCounters {
			break
		}
		if !p.dirty {
			delete(s.counters, i)
		}
	}
}
