package cow

import (
	"context"
	"errors"
	"fmt"
	"iter"

	"coppice/internal/vfs"
)

// Check examines the store in a directory that nobody has open, and yields
// every problem: it reads and verifies each unit that is referred to, counts
// the references anew and compares them with the counters, so it finds units
// that could be lost as well as units that leak. It writes nothing. The error
// says why the check could not go on.
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
		defer func() { _ = im.close() }() // nothing was written
		c := &checker{
			image: im, ctx: ctx, yield: yield,
			refs: make([][]uint32, len(im.space.regions)), below: map[uint64]uint64{},
		}
		im.pageReader = im.newReader(32 << 20)
		if err := c.run(); err != nil && !errors.Is(err, errStopped) {
			yield(Problem{}, err)
		}
	}
}

// errStopped ends a check whose consumer has gone.
var errStopped = errors.New("stopped")

// checker is one exact check.
type checker struct {
	*image
	ctx   context.Context
	yield func(Problem, error) bool

	refs  [][]uint32        // references found, by region and unit
	below map[uint64]uint64 // data units below each page that has been seen
	vol   ID                // being walked
}

func (c *checker) report(p Problem) error {
	if p.Volume == (ID{}) {
		p.Volume = c.vol
	}
	if !c.yield(p, nil) {
		return errStopped
	}
	return nil
}

func (c *checker) run() error {
	var recs []record
	nums := map[uint64]*record{}
	for r, err := range c.records() {
		if err != nil {
			return err
		}
		recs = append(recs, r)
	}
	for i := range recs {
		nums[recs[i].num] = &recs[i]
	}
	if _, err := c.walk(c.super.table, 0, maxEpoch); err != nil {
		return err
	}
	for _, r := range recs {
		if err := c.checkVolume(r, nums); err != nil {
			return err
		}
	}
	c.vol = ID{}
	if err := c.checkQueue(); err != nil {
		return err
	}
	return c.checkCounters()
}

func (c *checker) checkVolume(r record, nums map[uint64]*record) error {
	c.vol = r.id
	n, err := c.walk(r.root, 0, maxEpoch)
	if err != nil {
		return err
	}
	exact := r.flags&flagInexact == 0
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
	if r.parent != 0 && (nums[r.parent] == nil || nums[r.parent].flags&(flagReadOnly|flagPin) != flagReadOnly) {
		if err := c.report(Problem{Detail: fmt.Sprintf("parent %d is not a snapshot", r.parent)}); err != nil {
			return err
		}
	}
	if r.attrLen > 0 {
		if _, err := c.walk(r.attrs, 0, maxEpoch); err != nil {
			return err
		}
	}
	return nil
}

// ref counts a reference and reports whether it is the first to the unit.
func (c *checker) ref(e entry) (bool, error) {
	n := uint64(c.geo.regionUnits())
	region, u := e.addr/n, int(e.addr%n)
	if region >= uint64(len(c.refs)) || u < c.geo.metaUnits() {
		return false, c.report(Problem{Addr: e.addr, Detail: "reference to a unit that cannot be allocated"})
	}
	if c.refs[region] == nil {
		c.refs[region] = make([]uint32, n)
	}
	c.refs[region][u]++
	return c.refs[region][u] == 1, nil
}

// walk counts the reference e to a subtree that begins at unit lo, and on the
// first one everything below. It returns the number of data units below.
func (c *checker) walk(e entry, lo, birth uint64) (uint64, error) {
	if e.birth > birth || e.birth > c.super.epoch {
		if err := c.report(Problem{Off: int64(lo) * int64(c.geo.UnitSize), Addr: e.addr, Detail: fmt.Sprintf("epoch %d is later than that of its page (%d) or of the store (%d)", e.birth, birth, c.super.epoch)}); err != nil {
			return 0, err
		}
	}
	if e.isHole() {
		return 0, nil
	}
	first, err := c.ref(e)
	if err != nil {
		return 0, err
	}
	if e.kind == kindData {
		if !first {
			return 1, nil
		}
		return 1, c.checkUnit(e, lo)
	}
	if !first {
		return c.below[e.addr], nil
	}
	if err := c.ctx.Err(); err != nil {
		return 0, context.Cause(c.ctx)
	}
	b, err := c.page(e)
	if err != nil {
		return 0, c.damage(err, lo)
	}
	total := uint64(0)
	for i := range c.geo.Fanout {
		n, err := c.walk(getEntry(b[i*entrySize:]), lo+uint64(i)*c.geo.span(int(e.level)-1), e.birth)
		if err != nil {
			return 0, err
		}
		total += n
	}
	c.below[e.addr] = total
	return total, nil
}

func (c *checker) checkUnit(e entry, lo uint64) error {
	b := make([]byte, c.geo.UnitSize)
	if err := c.verified(b, e); err != nil {
		return c.damage(err, lo)
	}
	return nil
}

// damage reports a damaged unit.
func (c *checker) damage(err error, lo uint64) error {
	ce, ok := errors.AsType[*CorruptError](err)
	if !ok {
		return err
	}
	return c.report(Problem{Off: int64(lo) * int64(c.geo.UnitSize), Addr: ce.Addr, Detail: ce.Detail})
}

func (c *checker) checkQueue() error {
	q, err := loadQueue(c.pageReader, c.super.queue, c.super.queueLen)
	if err != nil {
		return err
	}
	for _, e := range q.blocks {
		if _, err := c.ref(e); err != nil {
			return err
		}
	}
	for _, e := range q.ents {
		if _, err := c.walk(e, 0, maxEpoch); err != nil {
			return err
		}
	}
	return nil
}

// checkCounters compares the references found with the counters.
func (c *checker) checkCounters() error {
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
