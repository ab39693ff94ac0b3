package cow

import (
	"context"
	"errors"
	"fmt"
	"iter"
	"maps"
	"slices"
	"time"
)

// ScrubOptions says how a scrub goes about it.
type ScrubOptions struct {
	// BytesPerSecond bounds what is read on average; 0 means no bound.
	BytesPerSecond int64

	// Progress, unless nil, is called by the goroutine that iterates, after
	// each step: how many bytes have been verified, of about how many. It ends
	// with the two equal when the scrub comes to its end.
	Progress func(done, total int64)
}

const (
	scrubPages      = 256     // map pages read while a checkpoint waits
	scrubBytes      = 1 << 20 // of contents gathered meanwhile, and read afterwards
	maxTreeProblems = 1000    // listed of one volume
)

// Scrub verifies the whole store while it is in use, and yields every problem:
// contents and map pages that cannot be read, and units in use whose counter
// is zero, which would be lost to whoever is given them next. Each unit is read
// and verified once, however many volumes share it; a damaged one is reported
// for each volume. Of a unit that has a copy both are verified, and if one of
// them is damaged, it is written anew from the other: such a problem says so in
// Done. What has been written before the call is looked at, except
// what is deleted or overwritten meanwhile. The walk goes in short steps, each
// on the last checkpoint; a checkpoint waits no longer than for one. It takes
// one bit of memory for each unit of the store. The error says why the scrub
// could not go on.
//
// A scrub that comes to its end replaces the table of [Store.Damage].
func (s *Store) Scrub(ctx context.Context, o ScrubOptions) iter.Seq2[Problem, error] {
	return func(yield func(Problem, error) bool) {
		if err := s.begin(); err != nil {
			yield(Problem{}, err)
			return
		}
		defer s.end()
		c := &scrub{
			s: s, ctx: ctx, yield: yield, rate: o.BytesPerSecond, due: time.Now(), seen: map[int][]uint64{},
			progress: o.Progress, total: s.Usage().Used,
		}
		if err := c.run(); err == nil {
			s.damage.replace(c.found)
			c.tell(c.total)
		} else if !errors.Is(err, errStopped) {
			yield(Problem{}, fmt.Errorf("scrub: %w", err))
		}
	}
}

// Check is Scrub at full speed.
func (s *Store) Check(ctx context.Context) iter.Seq2[Problem, error] {
	return s.Scrub(ctx, ScrubOptions{})
}

// scrub is one scrub.
type scrub struct {
	s     *Store
	ctx   context.Context
	yield func(Problem, error) bool
	rate  int64
	due   time.Time        // when what has been read so far should have been read
	seen  map[int][]uint64 // bit per unit that is verified, with all below it; by region
	epoch uint64           // of the checkpoint at the beginning
	found []Problem

	progress    func(done, total int64) // may be nil
	done, total int64                   // bytes

	// The tree being walked. The walk begins anew with each step, from the root
	// that the tree has then, and passes over what lies before at.
	vol  ID
	what string // it is, "" for the map of a volume
	at   uint64 // first unit that is not done
	bad  []uint64
	step scrubStep
}

// scrubStep is what one step gathers.
type scrubStep struct {
	pages    int
	stopped  bool // there is more of the tree
	units    []unit
	done     []scrubbed
	problems []Problem
}

// scrubbed is a page below which all has been walked.
type scrubbed struct {
	page  entry
	lo, n uint64 // units
}

func (c *scrub) run() error {
	if err := c.s.sync(c.ctx); err != nil {
		return err
	}
	var nums []uint64
	err := c.s.withTrees(c.ctx, func() error {
		nums, c.epoch = slices.Sorted(maps.Keys(c.s.durable)), c.s.super.epoch
		return nil
	})
	if err != nil {
		return err
	}
	err = c.tree("volume table", func() (entry, ID) { return c.s.super.table, ID{} })
	for _, n := range nums {
		of := func(root func(*record) entry) func() (entry, ID) {
			return func() (entry, ID) {
				if r := c.s.durable[n]; r != nil {
					return root(r), r.id
				}
				return entry{}, ID{} // deleted meanwhile
			}
		}
		if err == nil {
			err = c.tree("", of(func(r *record) entry { return r.root }))
		}
		if err == nil {
			err = c.tree("attributes", of(func(r *record) entry { return r.attrs }))
		}
	}
	if err == nil {
		err = c.queue()
	}
	if err != nil {
		return err
	}
	return c.counters()
}

// queue verifies the blocks of the reap queue.
func (c *scrub) queue() error {
	c.vol, c.what, c.step = ID{}, "reap queue", scrubStep{}
	err := c.s.withTrees(c.ctx, func() error {
		b := make([]byte, c.s.geo.UnitSize)
		for _, e := range c.s.queue.blocks {
			c.step.pages++
			err := c.both(b, e)
			if ce, ok := errors.AsType[*CorruptError](err); ok {
				c.problem(0, 0, ce.Addr, ce.Detail)
			} else if err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		return err
	}
	return c.settle()
}

// tree verifies one tree. root tells its root and whose it is.
func (c *scrub) tree(what string, root func() (entry, ID)) error {
	c.what, c.at, c.bad = what, 0, c.bad[:0]
	for more := true; more && len(c.bad) < maxTreeProblems; more = c.step.stopped {
		c.step = scrubStep{units: c.step.units[:0], done: c.step.done[:0]}
		var in *era
		err := c.s.withTrees(c.ctx, func() error {
			in = c.s.eras.enter() // what has been gathered is not reused before it is read
			var e entry
			e, c.vol = root()
			n := uint64(1)
			if e.kind == kindPage {
				n = c.s.geo.span(int(e.level))
			}
			err := c.walk(e, 0, n)
			c.s.space.trimCounters()
			return err
		})
		if in == nil {
			return err
		}
		if err == nil {
			err = c.contents()
		}
		in.leave()
		if err == nil {
			err = c.settle()
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// walk gathers what is to be verified below e, which stands for n units from
// lo on.
func (c *scrub) walk(e entry, lo, n uint64) error {
	g := c.s.geo
	switch {
	case e.isHole(), lo+n <= c.at:
		return nil
	case e.kind == kindLost:
		c.problem(lo, n, 0, errLost().Detail)
		c.at = lo + n
		return nil
	case c.verified(e):
		c.at = lo + n
		return nil
	case c.step.pages >= scrubPages || len(c.step.units)*g.UnitSize >= scrubBytes:
		c.step.stopped = true
		return nil
	}
	if c.at <= lo {
		if err := c.counted(e, lo); err != nil {
			return err
		}
	}
	if e.kind == kindData {
		c.step.units = append(c.step.units, unit{lo, e})
		c.at = lo + 1
		return nil
	}
	var b []byte
	var err error
	if c.at > lo { // has been verified by an earlier step
		b, err = c.s.page(e)
	} else {
		c.step.pages++
		b = make([]byte, g.UnitSize)
		if err = c.both(b, e); err == nil {
			err = c.s.checkEntries(b, e)
		}
	}
	if ce, ok := errors.AsType[*CorruptError](err); ok {
		c.problem(lo, n, ce.Addr, ce.Detail)
		c.at = lo + n
		return nil
	} else if err != nil {
		return err
	}
	for i := range g.Fanout {
		each := n / uint64(g.Fanout)
		if err := c.walk(getEntry(b[i*entrySize:]), lo+uint64(i)*each, each); err != nil || c.step.stopped {
			return err
		}
	}
	c.at = lo + n
	c.step.done = append(c.step.done, scrubbed{e, lo, n})
	return nil
}

// counted looks at the counters of what e refers to.
func (c *scrub) counted(e entry, lo uint64) error {
	addrs := []uint64{e.addr}
	if e.twice {
		addrs = append(addrs, c.s.geo.copyOf(e.addr))
	}
	var first uint32
	for i, addr := range addrs {
		refs, err := c.s.space.count(addr)
		switch {
		case errors.Is(err, ErrCorrupt): // damaged counters are reported on their own
			return nil
		case errors.Is(err, errCount): // a superblock may name fewer regions than there are
			c.problem(lo, 0, addr, "unit in use lies where there is none")
			return nil
		case err != nil:
			return err
		case refs == 0:
			c.problem(lo, 0, addr, "unit in use has no references")
		case i > 0 && refs != first && first > 0:
			c.problem(lo, 0, addr, fmt.Sprintf("a copy has %d references, its original %d", refs, first))
		}
		first = refs
	}
	return nil
}

// both reads and verifies a unit and its copy. If one of the two is damaged,
// it is written anew from the other one.
func (c *scrub) both(p []byte, e entry) error {
	half, err := c.s.verifyBoth(p, e, true)
	if half != nil {
		half.Volume = c.vol
		if c.what != "" {
			half.Detail = c.what + ": " + half.Detail
		}
		c.step.problems = append(c.step.problems, *half)
	}
	return err
}

// contents reads and verifies the units that a step has gathered, adjoining
// ones together.
func (c *scrub) contents() error {
	u := c.s.geo.UnitSize
	buf := pieceBuffers.Get().(*[readPiece]byte)
	defer pieceBuffers.Put(buf)
	for units := c.step.units; len(units) > 0; {
		if c.ctx.Err() != nil {
			return context.Cause(c.ctx)
		}
		first, n := units[0].entry.addr, 1
		for n < len(units) && n < readPiece/u && units[n].entry.addr == first+uint64(n) && c.s.files.contiguous(first, n+1) {
			n++
		}
		err := c.s.files.read(buf[:n*u], first)
		for i, x := range units[:n] {
			b := buf[i*u : (i+1)*u]
			if err == nil && !x.entry.twice && checksum(b) == x.entry.crc {
				c.mark(x.entry)
				continue
			}
			err := c.both(b, x.entry)
			if ce, ok := errors.AsType[*CorruptError](err); ok {
				c.problem(x.index, 1, ce.Addr, ce.Detail)
			} else if err != nil {
				return err
			} else {
				c.mark(x.entry)
			}
		}
		units = units[n:]
	}
	return nil
}

// settle ends a step: pages without damage below count as verified, problems
// are reported, and the rate is kept. No locks are held.
func (c *scrub) settle() error {
	for _, p := range c.step.done {
		if !slices.ContainsFunc(c.bad, func(at uint64) bool { return at >= p.lo && at-p.lo < p.n }) {
			c.mark(p.page)
		}
	}
	for _, p := range c.step.problems {
		c.found = append(c.found, p)
		if !c.yield(p, nil) {
			return errStopped
		}
	}
	n := int64(c.step.pages+len(c.step.units)) * int64(c.s.geo.UnitSize)
	c.done += n
	c.tell(min(c.done, c.total))
	return c.pace(n)
}

// tell says how far the scrub has come.
func (c *scrub) tell(done int64) {
	if c.progress != nil {
		c.progress(done, c.total)
	}
}

// pace waits until n more bytes may have been read.
func (c *scrub) pace(n int64) error {
	if c.rate <= 0 {
		return nil
	}
	c.due = c.due.Add(time.Duration(float64(n) / float64(c.rate) * float64(time.Second)))
	t := time.NewTimer(time.Until(c.due))
	defer t.Stop()
	select {
	case <-t.C:
		return nil
	case <-c.ctx.Done():
		return context.Cause(c.ctx)
	}
}

// problem notes a problem of n units of the tree, from lo on.
func (c *scrub) problem(lo, n, addr uint64, detail string) {
	p := Problem{Volume: c.vol, Addr: addr, Detail: detail}
	if c.what == "" {
		u := int64(c.s.geo.UnitSize)
		p.Off, p.Len = int64(lo)*u, int64(n)*u
	} else {
		p.Detail = c.what + ": " + detail
	}
	c.bad = append(c.bad, lo)
	c.step.problems = append(c.step.problems, p)
}

// counters verifies the counter pages of one region after the other.
func (c *scrub) counters() error {
	c.vol, c.what = ID{}, "counters"
	for i, more := 0, true; more; i++ {
		c.step = scrubStep{}
		err := c.s.withTrees(c.ctx, func() error {
			sp := c.s.space
			sp.mu.Lock()
			more = i+1 < len(sp.regions)
			if i >= len(sp.regions) {
				sp.mu.Unlock()
				return nil
			}
			rec := sp.regions[i].rec
			sp.mu.Unlock()
			for k := range pagesPerRegion {
				_, err := loadCounters(c.s.files, i, k, &rec)
				if ce, ok := errors.AsType[*CorruptError](err); ok {
					c.problem(0, 0, ce.Addr, ce.Detail)
				} else if err != nil {
					return err
				}
				if rec.zero>>k&1 == 0 {
					c.step.pages++
				}
			}
			return nil
		})
		if err == nil {
			err = c.settle()
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// place is where seen has the bit of a unit.
func (c *scrub) place(addr uint64) (region int, word, bit uint64) {
	n := uint64(c.s.geo.regionUnits())
	return int(addr / n), addr % n / 64, addr % n % 64
}

// verified reports whether e, and all below it, has been verified. What is
// younger than the scrub may be where something else has been before.
func (c *scrub) verified(e entry) bool {
	r, w, b := c.place(e.addr)
	bits := c.seen[r]
	return e.birth < c.epoch && bits != nil && bits[w]>>b&1 != 0
}

func (c *scrub) mark(e entry) {
	if e.birth >= c.epoch {
		return
	}
	r, w, b := c.place(e.addr)
	if c.seen[r] == nil {
		c.seen[r] = make([]uint64, (c.s.geo.regionUnits()+63)/64)
	}
	c.seen[r][w] |= 1 << b
}
