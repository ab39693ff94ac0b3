package cow

import (
	"fmt"
	"math/bits"
	"sync"
)

// class says what a unit is allocated for. Each class fills a region of its
// own, so that what is written together lies together.
type class int

const (
	classData   class = iota // contents, written out by a checkpoint
	classDirect              // contents, written by their writer in long runs
	classLeaf                // map pages that point to contents
	classUpper               // all other metadata
	classTwice               // metadata with a copy in the region behind
	numClasses
)

// region is a region in memory.
//
// A unit is free when its counter is zero and it is not held. Held is what
// has been allocated and not counted yet, and what has lost its last
// reference and may not be reused yet.
type region struct {
	rec      regionRecord // as of the checkpoint in progress
	words    int          // of a bitmap
	used     []uint64     // bit per unit: counter is not zero; nil when not loaded
	held     []uint64     // bit per unit; nil when none is
	numHeld  int
	punching bool // the host is being given its space; not to be used meanwhile
}

func (r *region) isHeld(u int) bool { return r.held != nil && r.held[u/64]>>(u%64)&1 != 0 }

func (r *region) hold(u int) {
	if r.held == nil {
		r.held = make([]uint64, r.words)
	}
	r.held[u/64] |= 1 << (u % 64)
	r.numHeld++
}

func (r *region) unhold(u int) {
	r.held[u/64] &^= 1 << (u % 64)
	if r.numHeld--; r.numHeld == 0 {
		r.held = nil
	}
}

// busy is a word of the units that cannot be allocated. used is loaded.
func (r *region) busy(w int) uint64 {
	if r.held != nil {
		return r.used[w] | r.held[w]
	}
	return r.used[w]
}

// avail is the number of free units of a region.
func (r *region) avail() int { return int(r.rec.free) - r.numHeld }

// space is the store's units: reference counters, allocation, and the promises
// made to writers. The counting methods (counters.go) are for the tree writer
// only; all others are safe for concurrent use.
type space struct {
	geo      Geometry
	files    *spaceFiles
	maxBytes int64
	firstFit bool

	mu       sync.Mutex // guards everything below; held across reads of counter pages and growth, never across a sync
	table    regionTable
	regions  []*region
	counters map[int]*counterPage // by region * pagesPerRegion + page
	dirty    []int                // counter pages to write
	freed    []uint64             // lost their last reference in the checkpoint in progress
	free     int64                // free units with host space behind them
	held     int64                // units not released yet that no counter stands for
	reserved int64                // free units promised to writers
	backed   int                  // regions with host space behind them
	cursor   [numClasses]cursor
}

// cursor is where a class allocates.
type cursor struct {
	region int // -1: none
	next   int // first unit of the region to look at
}

func newSpace(files *spaceFiles, o Options) *space {
	s := &space{geo: files.geo, files: files, maxBytes: o.MaxBytes, firstFit: o.FirstFit, counters: map[int]*counterPage{}}
	s.table.dirty = [2]map[int]struct{}{{}, {}}
	for c := range s.cursor {
		s.cursor[c].region = -1
	}
	return s
}

// load takes over the records of an existing region table.
func (s *space) load(recs []regionRecord) {
	for _, rec := range recs {
		s.regions = append(s.regions, s.newRegion(rec))
		if !rec.unbacked {
			s.backed++
			s.free += int64(rec.free)
		}
	}
}

func (s *space) newRegion(rec regionRecord) *region {
	return &region{rec: rec, words: (s.geo.regionUnits() + 63) / 64}
}

// locate returns the region of a unit and the unit's index there.
func (s *space) locate(addr uint64) (*region, int) {
	n := uint64(s.geo.regionUnits())
	return s.regions[addr/n], int(addr % n)
}

// reserve is the number of units that ordinary writes leave alone, so that
// deletes and checkpoints always find room.
func (s *space) reserve() int64 {
	total := int64(s.backed) * int64(s.geo.dataUnits())
	return max(2*int64(s.geo.dataUnits()), total/100)
}

// floor says how far into the reserve a promise may go.
type floor int64

const (
	floorWrite   floor = 1 // leaves the whole reserve
	floorDiscard floor = 2 // leaves half of it
)

// promise sets n free units aside for the caller, growing the store if need
// be. It fails with a *SpaceError.
func (s *space) promise(n int64, f floor) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	for {
		avail := s.free - s.reserved - s.reserve()/int64(f)
		if avail >= n {
			s.reserved += n
			return nil
		}
		if err := s.grow(); err != nil {
			u := int64(s.geo.UnitSize)
			return &SpaceError{Needed: n * u, Free: max(0, avail) * u, Cause: err}
		}
	}
}

// unpromise takes back n units of a promise.
func (s *space) unpromise(n int64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.reserved -= n
	if s.reserved < 0 {
		panic("cow: more space given back than was promised")
	}
}

// errMax is the growth limit of [Options.MaxBytes] or of the address width.
var errMax = fmt.Errorf("the store has its greatest size")

// grow adds a region with host space behind it. s.mu is held.
func (s *space) grow() error {
	if s.maxBytes > 0 && int64(s.backed+1)*s.geo.regionBytes() > s.maxBytes {
		return errMax
	}
	for i, r := range s.regions {
		if r.rec.unbacked && !r.punching {
			return s.back(i)
		}
	}
	return s.append()
}

// back has the host provide the space of a region again.
func (s *space) back(i int) error {
	if err := s.files.allocate(i); err != nil {
		return err
	}
	s.regions[i].rec.unbacked = false
	s.gained(i)
	return nil
}

// append adds a region at the end.
func (s *space) append() error {
	i := len(s.regions)
	if i >= s.geo.maxRegions() {
		return errMax
	}
	if i%tablePageRecords == 0 {
		if err := s.table.allocate(i); err != nil {
			return err
		}
	}
	if err := s.files.allocate(i); err != nil {
		return err
	}
	s.regions = append(s.regions, s.newRegion(regionRecord{zero: 1<<pagesPerRegion - 1, free: uint32(s.geo.dataUnits())}))
	s.gained(i)
	return nil
}

func (s *space) gained(i int) {
	s.backed++
	s.free += int64(s.geo.dataUnits())
	s.table.mark(i)
}

// alloc takes up to n adjoining free units of one region and holds them. Of
// these, promised are paid for by an earlier promise. It returns the first
// unit and how many there are.
func (s *space) alloc(c class, n, promised int) (addr uint64, got int, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for {
		cur := &s.cursor[c]
		if cur.region >= 0 {
			r := s.regions[cur.region]
			if s.firstFit {
				cur.next = s.geo.metaUnits()
			}
			if r.avail() > 0 && !r.rec.unbacked {
				if err := s.loadUsed(cur.region); err != nil {
					return 0, 0, err
				}
				if u, k := s.findRun(r, cur.next, n); k > 0 {
					for i := range k {
						r.hold(u + i)
					}
					s.free -= int64(k)
					s.held += int64(k)
					s.reserved -= int64(min(k, promised))
					cur.next = u + k
					return uint64(cur.region)*uint64(s.geo.regionUnits()) + uint64(u), k, nil
				}
			}
		}
		if !s.pick(c) {
			if err := s.grow(); err != nil {
				return 0, 0, &SpaceError{Needed: int64(n) * int64(s.geo.UnitSize), Cause: err}
			}
		}
	}
}

// allocTwice takes a unit and the one that is to have its copy, and holds
// both. Nobody has been promised them: the store grows for them if it can, and
// the reserve is left alone; ok is false when there is no room or no such pair.
func (s *space) allocTwice() (addr uint64, ok bool, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for s.free-s.reserved-s.reserve() < 2 {
		if s.grow() != nil {
			return 0, false, nil
		}
	}
	cur := &s.cursor[classTwice]
	for picked := false; ; picked = true {
		if i := cur.region; i >= 0 && s.pairAvail(i) > 0 {
			if s.firstFit {
				cur.next = s.geo.metaUnits()
			}
			u, err := s.findPair(i, cur.next)
			if err != nil {
				return 0, false, err
			}
			if u < s.geo.regionUnits() {
				s.regions[i].hold(u)
				s.regions[i+1].hold(u)
				s.free -= 2
				s.held += 2
				cur.next = u + 1
				return uint64(i)*uint64(s.geo.regionUnits()) + uint64(u), true, nil
			}
		}
		if picked || !s.pickPair() {
			return 0, false, nil
		}
	}
}

// pairAvail is how many pairs of units region i and the next one may have.
func (s *space) pairAvail(i int) int {
	if i+1 >= len(s.regions) || s.regions[i].rec.unbacked || s.regions[i+1].rec.unbacked {
		return 0
	}
	return min(s.regions[i].avail(), s.regions[i+1].avail())
}

// findPair returns the first unit at or behind from that is free in region i
// and the next one, or the number of units of a region.
func (s *space) findPair(i, from int) (int, error) {
	for r := i; r <= i+1; r++ {
		if err := s.loadUsed(r); err != nil {
			return 0, err
		}
	}
	a, b := s.regions[i], s.regions[i+1]
	for u := from; u < s.geo.regionUnits(); u = (u/64 + 1) * 64 {
		if free := ^(a.busy(u/64) | b.busy(u/64)) >> (u % 64); free != 0 {
			return u + bits.TrailingZeros64(free), nil
		}
	}
	return s.geo.regionUnits(), nil
}

// pickPair moves the cursor of copied units to the pair of regions with most
// room and reports whether there is any.
func (s *space) pickPair() bool {
	best, most := -1, 0
	for i := range s.regions {
		if n := s.pairAvail(i); n > most {
			best, most = i, n
		}
	}
	s.cursor[classTwice] = cursor{region: best, next: s.geo.metaUnits()}
	return best >= 0
}

// pick moves the cursor of a class to the region with most free units,
// rather one in which no other class allocates. It reports whether there is
// a free unit.
func (s *space) pick(c class) bool {
	taken := func(i int) bool {
		for o, cur := range s.cursor {
			if class(o) != c && cur.region == i {
				return true
			}
		}
		return false
	}
	best, bestAvail, bestTaken := -1, 0, true
	for i, r := range s.regions {
		if r.rec.unbacked || r.avail() <= 0 {
			continue
		}
		t := taken(i)
		if best < 0 || bestTaken && !t || bestTaken == t && r.avail() > bestAvail {
			best, bestAvail, bestTaken = i, r.avail(), t
		}
	}
	if old := s.cursor[c].region; old >= 0 && old != best {
		s.regions[old].used = nil
	}
	s.cursor[c] = cursor{region: best, next: s.geo.metaUnits()}
	return best >= 0
}

// loadUsed makes the used bitmap of a region from its counters.
func (s *space) loadUsed(i int) error {
	r := s.regions[i]
	if r.used != nil {
		return nil
	}
	used := make([]uint64, r.words)
	base := uint64(i) * uint64(s.geo.regionUnits())
	for k := range pagesPerRegion {
		first := k * s.geo.PageCounters
		if first+s.geo.PageCounters <= s.geo.metaUnits() {
			continue
		}
		u := max(first, s.geo.metaUnits())
		p, _, err := s.counter(base + uint64(u))
		if err != nil {
			return err
		}
		for ; u < first+s.geo.PageCounters; u++ {
			if p.n[u-first] != 0 {
				used[u/64] |= 1 << (u % 64)
			}
		}
	}
	r.used = used
	return nil
}

// findRun returns the first run of free units of a region at or behind from,
// cut at n units.
func (s *space) findRun(r *region, from, n int) (u, k int) {
	end := s.geo.regionUnits()
	u = from
	for u < end { // to the first free unit
		if free := ^r.busy(u/64) >> (u % 64); free != 0 {
			u += bits.TrailingZeros64(free)
			break
		}
		u = (u/64 + 1) * 64
	}
	for u+k < end && k < n {
		w := r.busy((u+k)/64) >> ((u + k) % 64)
		step := min(bits.TrailingZeros64(w), 64-(u+k)%64)
		if step == 0 {
			break
		}
		k += step
	}
	return u, max(0, min(k, n, end-u))
}

// release ends the hold on units: they are free.
func (s *space) release(addrs []uint64) error {
	if invariants {
		poison := make([]byte, s.geo.UnitSize)
		for i := range poison {
			poison[i] = 0xdb
		}
		for _, a := range addrs {
			if err := s.files.write(poison, a); err != nil {
				return err
			}
		}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, a := range addrs {
		r, u := s.locate(a)
		if !r.isHeld(u) {
			return fmt.Errorf("%w: unit %d is released and not held", errCount, a)
		}
		r.unhold(u)
	}
	s.free += int64(len(addrs))
	s.held -= int64(len(addrs))
	return nil
}

// takeFreed returns the units that lost their last reference since it was
// last called.
func (s *space) takeFreed() []uint64 {
	s.mu.Lock()
	defer s.mu.Unlock()
	f := s.freed
	s.freed = nil
	return f
}

// spare returns the last wholly free region before the given one that is not
// needed soon, -1 when there is none. s.mu is held.
func (s *space) spare(before int) int {
	n := int64(s.geo.dataUnits())
	if s.free-s.reserved < 2*s.reserve()+2*n {
		return -1
	}
	for i := before - 1; i >= 0; i-- {
		if r := s.regions[i]; !r.rec.unbacked && r.numHeld == 0 && int64(r.rec.free) == n {
			return i
		}
	}
	return -1
}

// hasSpare reports whether a checkpoint would give host space back.
func (s *space) hasSpare() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.spare(len(s.regions)) >= 0
}

// unback picks wholly free regions that are not needed soon and flags them as
// having no host space; [space.punch] makes that true once the flags are
// durable.
func (s *space) unback() []int {
	s.mu.Lock()
	defer s.mu.Unlock()
	var out []int
	for i := s.spare(len(s.regions)); i >= 0; i = s.spare(i) {
		r := s.regions[i]
		for c := range s.cursor {
			if s.cursor[c].region == i {
				s.cursor[c].region = -1
			}
		}
		r.used = nil
		r.rec.unbacked, r.punching = true, true
		s.free -= int64(s.geo.dataUnits())
		s.backed--
		s.table.mark(i)
		out = append(out, i)
	}
	return out
}

// punch gives the host the space of regions that unback returned. A host that
// fails to take it costs space, not data.
func (s *space) punch(regions []int) {
	for _, i := range regions {
		first := uint64(i)*uint64(s.geo.regionUnits()) + uint64(s.geo.metaUnits())
		_ = s.files.punch(first, s.geo.dataUnits())
		s.mu.Lock()
		s.regions[i].punching = false
		s.mu.Unlock()
	}
}

// usage returns the state of the space in units.
func (s *space) usage() (allocated, free, reserve int64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	r := s.reserve()
	return int64(s.backed) * int64(s.geo.regionUnits()), max(0, s.free-s.reserved-r), r
}
