package cow

import (
	"context"
	"errors"
	"fmt"
	"iter"

	"coppice/internal/vfs"
)

// Check examines the store in a directory that nobody has open, and yields
// every problem: it reads and verifies each unit that is referred to, copies
// and what the log names as well, counts the references anew and compares them with the counters, so
// it finds units that could be lost as well as units that leak. It writes
// nothing. The error says why the check could not go on.
//
// It takes 4 bytes of memory for each unit of the store.
func Check(ctx context.Context, dir vfs.FS) iter.Seq2[Problem, error] {
	return func(yield func(Problem, error) bool) {
		lock, err := dir.Lock()
		if err != nil {
			yield(Problem{}, err)
			return
		}
		defer lock.Close()
		im, err := readImage(dir, Options{})
		if err != nil {
			yield(Problem{}, err)
			return
		}
		defer func() { _ = im.close() }()           // nothing was written
		if err := im.super.writable(); err != nil { // there may be references that are not known here
			yield(Problem{}, err)
			return
		}
		c := newChecker(ctx, im, yield)
		if err := c.run(); err != nil && !errors.Is(err, errStopped) {
			yield(Problem{}, err)
		}
	}
}

const whatTable = "volume table"

// errStopped ends a check whose consumer has gone.
var errStopped = errors.New("stopped")

// checker is one exact check.
type checker struct {
	*image
	ctx   context.Context
	yield func(Problem, error) bool
	mend  bool   // write what is damaged anew from its copy
	lossy string // what is done about pages that cannot be read; empty for nothing

	names map[uint64]ID     // of the volumes, by number
	refs  [][]uint32        // references found, by region and unit
	below map[uint64]uint64 // data units below each page that has been seen
	torn  map[uint64]bool   // pages that cannot be read, or with such a one below
	blind map[uint64]bool   // pages with something lost below, or torn
	vol   ID                // being walked
	what  string            // is walked; "" for the contents of a volume
	hurt  int               // units and pages that cannot be read
}

func newChecker(ctx context.Context, im *image, yield func(Problem, error) bool) *checker {
	im.pageReader = im.newReader(32 << 20)
	return &checker{
		image: im, ctx: ctx, yield: yield, names: map[uint64]ID{},
		refs: make([][]uint32, im.super.regions), below: map[uint64]uint64{}, torn: map[uint64]bool{}, blind: map[uint64]bool{},
	}
}

func (c *checker) report(p Problem) error {
	if p.Volume == (ID{}) {
		p.Volume = c.vol
	}
	if c.what != "" {
		p.Detail, p.Off, p.Len = c.what+": "+p.Detail, 0, 0
	}
	if !c.yield(p, nil) {
		return errStopped
	}
	return nil
}

func (c *checker) run() error {
	if err := c.checkSlots(); err != nil {
		return err
	}
	if err := c.checkTable(); err != nil {
		return err
	}
	var recs []record
	for r, err := range c.records() {
		if err == nil {
			recs = append(recs, r)
			c.names[r.num] = r.id
		} else if !errors.Is(err, ErrCorrupt) { // damage has been reported
			return err
		}
	}
	for i := range recs {
		if err := c.checkVolume(&recs[i], recs); err != nil {
			return err
		}
	}
	c.vol = ID{}
	if _, err := c.checkQueue(); err != nil {
		return err
	}
	if err := c.checkLog(); err != nil {
		return err
	}
	return c.checkCounters()
}

// checkSlots looks for slots that hold neither a superblock nor nothing.
func (c *checker) checkSlots() error {
	c.vol, c.what = ID{}, "superblock"
	for _, slot := range c.slots.bad {
		if err := c.report(Problem{Detail: fmt.Sprintf("slot %d is damaged", slot)}); err != nil {
			return err
		}
	}
	return nil
}

// checkTable walks the volume table.
func (c *checker) checkTable() error {
	c.vol, c.what = ID{}, whatTable
	if err := checkRoot(c.super.table, c.geo); err != nil {
		return c.report(Problem{Addr: c.super.table.addr, Detail: err.Error()})
	}
	_, err := c.walkRoot(c.super.table)
	return err
}

// checkVolume walks one volume and its attributes. mapped is corrected.
func (c *checker) checkVolume(r *record, recs []record) error {
	c.vol, c.what = r.id, ""
	n, err := c.walkRoot(r.root)
	if err != nil {
		return err
	}
	exact := r.flags&flagInexact == 0 && !c.isBlind(r.root)
	if n != r.mapped && exact || n > r.mapped {
		if err := c.report(Problem{Detail: fmt.Sprintf("%d units are mapped, the record says %d", n, r.mapped)}); err != nil {
			return err
		}
	}
	if r.flags&flagReadOnly != 0 && r.root.birth > r.sealed {
		if err := c.report(Problem{Detail: fmt.Sprintf("contents of epoch %d in a snapshot of epoch %d", r.root.birth, r.sealed)}); err != nil {
			return err
		}
	}
	if r.parent != 0 && !isSnapshot(recs, r.parent) {
		if err := c.report(Problem{Detail: fmt.Sprintf("parent %d is not a snapshot", r.parent)}); err != nil {
			return err
		}
	}
	if r.attrLen == 0 {
		return nil
	}
	c.what = "attributes"
	_, err = c.walkRoot(r.attrs)
	return err
}

// isSnapshot reports whether a record, found by its number in a sorted list,
// is one of a snapshot.
func isSnapshot(recs []record, num uint64) bool {
	r := findRecord(recs, num)
	return r != nil && r.flags&(flagReadOnly|flagPin) == flagReadOnly
}

// ref counts a reference, to the copy as well, and reports whether it is the
// first to the unit.
func (c *checker) ref(e entry) (bool, error) {
	if e.twice {
		if _, err := c.refUnit(c.geo.copyOf(e.addr)); err != nil {
			return false, err
		}
	}
	return c.refUnit(e.addr)
}

func (c *checker) refUnit(addr uint64) (bool, error) {
	n := uint64(c.geo.regionUnits())
	region, u := addr/n, int(addr%n)
	if region >= uint64(len(c.refs)) || u < c.geo.metaUnits() {
		return false, c.report(Problem{Addr: addr, Detail: "reference to a unit that cannot be allocated"})
	}
	if c.refs[region] == nil {
		c.refs[region] = make([]uint32, n)
	}
	c.refs[region][u]++
	return c.refs[region][u] == 1, nil
}

// walkRoot walks a whole tree and returns the number of data units in it.
func (c *checker) walkRoot(e entry) (uint64, error) {
	n := uint64(1)
	if e.kind == kindPage {
		n = c.geo.span(int(e.level))
	}
	return c.walk(e, 0, n, maxEpoch)
}

// walk counts the reference e to a subtree of n units that begins at unit lo,
// and on the first one everything below. It returns the number of data units
// below.
func (c *checker) walk(e entry, lo, n, birth uint64) (uint64, error) {
	if e.birth > birth || e.birth > c.super.epoch {
		if err := c.report(Problem{Off: int64(lo) * int64(c.geo.UnitSize), Addr: e.addr, Detail: fmt.Sprintf("epoch %d is later than that of its page (%d) or of the store (%d)", e.birth, birth, c.super.epoch)}); err != nil {
			return 0, err
		}
	}
	switch e.kind {
	case kindHole:
		return 0, nil
	case kindLost:
		return 0, c.damage(errLost(), lo, n, "")
	}
	first, err := c.ref(e)
	if err != nil {
		return 0, err
	}
	if e.kind == kindData && !first {
		return 1, nil
	}
	if !first {
		return c.below[e.addr], nil
	}
	if err := c.ctx.Err(); err != nil {
		return 0, context.Cause(c.ctx)
	}
	b := make([]byte, c.geo.UnitSize)
	half, err := c.verifyBoth(b, e, c.mend)
	if half != nil {
		if err := c.report(*half); err != nil {
			return 0, err
		}
	}
	if e.kind == kindData {
		if err != nil {
			done := ""
			if c.what == whatTable { // contents can be lived without, records cannot
				done = c.lossy
			}
			return 1, c.damage(err, lo, n, done)
		}
		return 1, nil
	}
	if err == nil {
		err = c.checkEntries(b, e)
	}
	if err != nil {
		c.torn[e.addr], c.blind[e.addr] = true, true
		return 0, c.damage(err, lo, n, c.lossy)
	}
	total, each := uint64(0), n/uint64(c.geo.Fanout)
	for i := range c.geo.Fanout {
		child := getEntry(b[i*entrySize:])
		n, err := c.walk(child, lo+uint64(i)*each, each, e.birth)
		if err != nil {
			return 0, err
		}
		if c.isBlind(child) {
			c.blind[e.addr] = true
		}
		if c.isTorn(child) {
			c.torn[e.addr] = true
		}
		total += n
	}
	c.below[e.addr] = total
	return total, nil
}

// isBlind reports whether there is something below e that cannot be read.
func (c *checker) isBlind(e entry) bool {
	return e.kind == kindLost || e.kind == kindPage && c.blind[e.addr]
}

func (c *checker) isTorn(e entry) bool { return e.kind == kindPage && c.torn[e.addr] }

// damage reports n units from lo that cannot be read.
func (c *checker) damage(err error, lo, n uint64, done string) error {
	ce, ok := errors.AsType[*CorruptError](err)
	if !ok {
		return err
	}
	c.hurt++
	u := int64(c.geo.UnitSize)
	return c.report(Problem{Off: int64(lo) * u, Len: int64(n) * u, Addr: ce.Addr, Detail: ce.Detail, Done: done})
}

// checkQueue walks what waits to be reaped. The queue is nil when it cannot
// be read.
func (c *checker) checkQueue() (*reapQueue, error) {
	c.vol, c.what = ID{}, ""
	q, err := loadQueue(c.pageReader, c.super.queue, c.super.queueLen)
	if ce, ok := errors.AsType[*CorruptError](err); ok {
		return nil, c.report(Problem{Addr: ce.Addr, Detail: err.Error(), Done: c.lossy})
	} else if err != nil {
		return nil, err
	}
	c.what = "reap queue"
	for _, e := range q.blocks {
		if _, err := c.walkRoot(e); err != nil {
			return nil, err
		}
	}
	for _, e := range q.ents {
		if _, err := c.walkRoot(e); err != nil {
			return nil, err
		}
	}
	return q, nil
}

// checkLog looks at what an open would replay.
func (c *checker) checkLog() error {
	c.vol, c.what = ID{}, ""
	var placed []logRecord
	err := c.scanLog(func(r logRecord) {
		if r.kind == recMap {
			placed = append(placed, r)
		}
	})
	if ce, ok := errors.AsType[*CorruptError](err); ok {
		err = c.report(Problem{Detail: ce.Detail})
	}
	if err != nil {
		return err
	}
	return c.checkPlaced(placed)
}

// checkPlaced verifies the units that records of the log name. No tree refers
// to them yet, but they are contents of volumes, unless the log goes on to
// overwrite them.
func (c *checker) checkPlaced(placed []logRecord) error {
	b := make([]byte, c.geo.UnitSize)
	u := int64(c.geo.UnitSize)
	for _, r := range placed {
		if err := c.ctx.Err(); err != nil {
			return context.Cause(c.ctx)
		}
		err := c.files.reach(r.addr + r.count - 1)
		for i := range r.count {
			if err == nil {
				err = c.verifiedAt(b, r.addr+i, r.crcs[i])
			}
			if ce, ok := errors.AsType[*CorruptError](err); ok {
				p := Problem{
					Volume: c.names[r.num], Off: int64(r.first+i) * u, Len: u, Addr: r.addr + i,
					Detail: ce.Detail + ", of a unit that the log names",
				}
				if err := c.report(p); err != nil {
					return err
				}
				err = nil
			}
		}
	}
	return nil
}

// scanLog calls f with every record that an open would replay.
func (c *checker) scanLog(f func(logRecord)) error {
	l := c.newLog()
	return l.scan(c.super.gen, func(fr frame) error {
		recs, err := decodeRecords(fr.payload, c.geo)
		if err != nil {
			return &CorruptError{Detail: fmt.Sprintf("log: frame %d: %v", fr.seq, err)}
		}
		for _, r := range recs {
			if r.kind == recCreate {
				c.names[r.num] = r.id
			}
			for _, p := range r.pairs {
				c.names[p.num] = p.id
			}
			f(r)
		}
		return nil
	})
}

// checkCounters compares the references found with the counters.
func (c *checker) checkCounters() error {
	c.vol, c.what = ID{}, ""
	if c.tableErr != nil {
		return c.report(Problem{Detail: c.tableErr.Error()})
	}
	for i, r := range c.space.regions {
		refs := c.refs[i]
		if refs == nil {
			refs = make([]uint32, c.geo.regionUnits())
		}
		free := 0
		for k := range pagesPerRegion {
			p, err := loadCounters(c.files, i, k, &r.rec)
			if ce, ok := errors.AsType[*CorruptError](err); ok {
				if err := c.report(Problem{Addr: ce.Addr, Detail: ce.Detail}); err != nil {
					return err
				}
				continue
			} else if err != nil {
				return err
			}
			for j, n := range p.n {
				u := k*c.geo.PageCounters + j
				if u < c.geo.metaUnits() {
					continue
				}
				if n == 0 {
					free++
				}
				if n != refs[u] {
					addr := uint64(i)*uint64(c.geo.regionUnits()) + uint64(u)
					if err := c.report(Problem{Addr: addr, Detail: fmt.Sprintf("%d references, the counter says %d", refs[u], n)}); err != nil {
						return err
					}
				}
			}
		}
		if free != int(r.rec.free) {
			if err := c.report(Problem{Detail: fmt.Sprintf("region %d has %d free units, its record says %d", i, free, r.rec.free)}); err != nil {
				return err
			}
		}
	}
	return nil
}
