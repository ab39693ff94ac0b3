package cow

import "errors"

// treeWriter changes trees and counters on behalf of one checkpoint. It is
// the only code that does, and it knows two operations: merge takes over one
// reference to an old root and yields one to the new root; reap gives up the
// references of the queue.
type treeWriter struct {
	*pageReader
	space *space
	queue *reapQueue
	data  unitWriter // contents held in memory until now
	leafs unitWriter
	upper unitWriter
	twice unitWriter // units that have copies
	copy  unitWriter // and these

	// single is set when there has been no room for a copy; it is not looked
	// for again.
	single bool

	// table is set while the volume table is merged. All of it is written
	// twice, and none of it may get lost.
	table bool

	epoch   uint64 // of the layer being merged
	mapped  int64  // what the merge changes the number of mapped units by
	inexact bool   // mapped leaves out a subtree
	losses  []*CorruptError
	budget  int // pages that may still be read to keep mapped exact
	scratch [][]entry
}

func newTreeWriter(r *pageReader, s *space, q *reapQueue) *treeWriter {
	w := &treeWriter{pageReader: r, space: s, queue: q, budget: 1024}
	for _, u := range w.writers() {
		u.files = r.files
	}
	return w
}

func (w *treeWriter) writers() []*unitWriter {
	return []*unitWriter{&w.data, &w.leafs, &w.upper, &w.twice, &w.copy}
}

// ref counts n more references to what e refers to.
func (w *treeWriter) ref(e entry, n uint32) error {
	if !e.refers() {
		return nil
	}
	if err := w.space.add(e.addr, n); err != nil || !e.twice {
		return err
	}
	return w.space.add(w.geo.copyOf(e.addr), n)
}

// unref counts one reference less to what e refers to.
func (w *treeWriter) unref(e entry) error {
	if !e.refers() {
		return nil
	}
	if err := w.space.sub(e.addr); err != nil || !e.twice {
		return err
	}
	return w.space.sub(w.geo.copyOf(e.addr))
}

// mergeLayer applies a sealed layer to a tree.
func (w *treeWriter) mergeLayer(t tree, l *layer) (tree, error) {
	w.epoch, w.mapped, w.inexact = l.epoch, 0, t.inexact
	h := max(1, int(t.root.level))
	if last := l.lastChunk(); last >= 0 {
		h = max(h, w.geo.height(uint64(last+1)*uint64(w.geo.Fanout)))
	}
	root := t.root
	for !root.isHole() && int(root.level) < h {
		ents := w.entries(int(root.level) + 1)
		clear(ents)
		ents[0] = root
		var err error
		if root, err = w.writePage(ents, int(root.level)+1); err != nil {
			return t, err
		}
	}
	root, err := w.merge(root, h, 0, l)
	if err != nil {
		return t, err
	}
	rest, _ := l.occupies()
	w.space.unpromise(rest.promised)
	l.spend(rest.promised)
	t = tree{root: root, mapped: uint64(int64(t.mapped) + w.mapped), inexact: w.inexact}
	if root.isHole() {
		t.mapped, t.inexact = 0, false
	}
	return t, nil
}

// mergeVolume is mergeLayer for the tree of a volume, whose height never
// shrinks: units beyond a tree are holes of birth 0, so those that a root has
// stood for need it to keep their date.
func (w *treeWriter) mergeVolume(old tree, l *layer) (tree, error) {
	t, err := w.mergeLayer(old, l)
	if err != nil || !t.root.isHole() || old.root.level < 2 {
		return t, err
	}
	ents := w.entries(int(old.root.level))
	for i := range ents {
		ents[i] = t.root
	}
	t.root, err = w.storePage(ents, int(old.root.level))
	return t, err
}

// merge applies the changes that l has for the subtree e, a page of the given
// level or a hole, whose first chunk is lo.
func (w *treeWriter) merge(e entry, level int, lo uint64, l *layer) (entry, error) {
	n := w.geo.span(level - 1)
	if !l.touches(lo, lo+n) {
		return e, nil
	}
	if l.clears(lo, lo+n) {
		return hole(w.epoch), w.drop(e)
	}
	ents := w.entries(level)
	shared, err := w.open(e, ents)
	if err != nil {
		return e, err
	}
	if level == 1 {
		err = w.mergeUnits(ents, shared, lo, l)
	} else {
		err = w.mergeChildren(ents, shared, level, lo, l)
	}
	if err != nil {
		return e, err
	}
	if err := w.unref(e); err != nil { // a shared page stays for the others, an own one is replaced
		return e, err
	}
	return w.writePage(ents, level)
}

// open decodes the entries of a page and reports whether others refer to it,
// too. A hole opens into holes of its birth, something lost into its like.
//
// A page that cannot be read although it could when the changes below it were
// accepted is lost, for this volume: what is in the log of this and all other
// volumes has to get into the trees. What the page referred to stays counted,
// so nothing of it is reused before a repair has counted anew.
func (w *treeWriter) open(e entry, ents []entry) (shared bool, err error) {
	if !e.refers() {
		for i := range ents {
			ents[i] = e
		}
		return false, nil
	}
	b, err := w.readPage(e)
	switch ce, damaged := errors.AsType[*CorruptError](err); {
	case damaged && !w.table:
		w.inexact = true
		w.losses = append(w.losses, ce)
		for i := range ents {
			ents[i] = lost(e.birth)
		}
	case err != nil:
		return false, err
	default:
		for i := range ents {
			ents[i] = getEntry(b[i*entrySize:])
		}
	}
	c, err := w.space.count(e.addr)
	if err == nil && c == 0 {
		err = errShape(e, "page in use has no references")
	}
	return c > 1, err
}

// mergeChildren merges below a page. The children of a shared page gain a
// reference, from the copy that is being made, unless the copy drops them.
func (w *treeWriter) mergeChildren(ents []entry, shared bool, level int, lo uint64, l *layer) error {
	n := w.geo.span(level - 2)
	for i := range ents {
		from := lo + uint64(i)*n
		c := ents[i]
		switch {
		case l.clears(from, from+n):
			ents[i] = hole(w.epoch)
			if shared {
				if err := w.unmap(c); err != nil {
					return err
				}
			} else if err := w.drop(c); err != nil {
				return err
			}
		default:
			if shared {
				if err := w.ref(c, 1); err != nil {
					return err
				}
			}
			m, err := w.merge(c, level-1, from, l)
			if err != nil {
				return err
			}
			ents[i] = m
		}
	}
	return nil
}

// refUnit counts one more reference to what an entry of a leaf refers to, and
// returns that, or a copy when the unit has as many as can be counted. One that
// cannot be read for that is lost here.
func (w *treeWriter) refUnit(e entry) (entry, error) {
	err := w.ref(e, 1)
	if err != errMaxRefs {
		return e, err
	}
	if err := w.flush(); err != nil {
		return e, err
	}
	b := make([]byte, w.geo.UnitSize)
	if err := w.verified(b, e); err != nil {
		w.mapped--
		return lost(e.birth), nil
	}
	c, err := w.writeUnit(b, classData, &w.data, false)
	c.birth = e.birth
	return c, err
}

// mergeUnits replaces the units of a leaf that the layer has.
func (w *treeWriter) mergeUnits(ents []entry, shared bool, chunk uint64, l *layer) error {
	slots, rest := l.chunk(chunk)
	var placed []uint64
	var err error
	if !w.table {
		if placed, err = w.place(slots, l); err != nil {
			return err
		}
	}
	k := 0
	for i := range ents {
		var next entry
		switch {
		case k < len(slots) && int(slots[k].idx) == i:
			next = hole(w.epoch)
			if s := slots[k]; s.state != slotZero {
				next = entry{addr: s.addr, birth: w.epoch, crc: s.crc, kind: kindData}
				if s.state == slotBuf && w.table {
					if next, err = w.writeUnit(s.buf, classUpper, &w.upper, true); err != nil {
						return err
					}
				} else {
					if s.state == slotBuf {
						next.addr, placed = placed[0], placed[1:]
					}
					if next, err = w.refUnit(next); err != nil {
						return err
					}
				}
				w.mapped++
			}
			k++
		case rest:
			next = hole(w.epoch)
		case shared:
			if ents[i], err = w.refUnit(ents[i]); err != nil {
				return err
			}
			continue
		default:
			continue
		}
		if ents[i].refers() {
			w.mapped--
			if !shared {
				if err := w.unref(ents[i]); err != nil {
					return err
				}
			}
		}
		ents[i] = next
	}
	return nil
}

// place writes the contents that slots hold in memory to the space files and
// returns their units in order.
func (w *treeWriter) place(slots []slot, l *layer) ([]uint64, error) {
	n := 0
	for _, s := range slots {
		if s.state == slotBuf {
			n++
		}
	}
	if n == 0 {
		return nil, nil
	}
	units := make([]uint64, 0, n)
	for len(units) < n {
		addr, got, err := w.space.alloc(classData, n-len(units), n-len(units))
		if err != nil {
			return nil, err
		}
		l.spend(int64(got))
		for i := range got {
			units = append(units, addr+uint64(i))
		}
	}
	i := 0
	for _, s := range slots {
		if s.state == slotBuf {
			if err := w.data.write(units[i], s.buf); err != nil {
				return nil, err
			}
			i++
		}
	}
	return units, nil
}

// writePage writes a new page and returns its entry, which stands for the one
// reference to it. Nothing but holes is one hole.
func (w *treeWriter) writePage(ents []entry, level int) (entry, error) {
	holes, birth := true, uint64(0)
	for _, c := range ents {
		holes = holes && c.isHole()
		birth = max(birth, c.birth)
	}
	if holes {
		return hole(birth), nil
	}
	return w.storePage(ents, level)
}

// storePage is writePage whatever the entries are.
func (w *treeWriter) storePage(ents []entry, level int) (entry, error) {
	birth := uint64(0)
	for _, c := range ents {
		birth = max(birth, c.birth)
	}
	b := make([]byte, w.geo.UnitSize)
	for i, c := range ents {
		c.put(b[i*entrySize:])
	}
	to, c := &w.upper, classUpper
	if level == 1 {
		to, c = &w.leafs, classLeaf
	}
	e, err := w.writeUnit(b, c, to, level > 1 || w.table)
	if err != nil {
		return e, err
	}
	e.kind, e.level, e.birth = kindPage, uint8(level), birth
	w.cache.put(e, b)
	return e, nil
}

// writeUnit writes one new unit with one reference, and a copy of it if one
// is wanted and there is ample room. The entry it returns is of kind data.
func (w *treeWriter) writeUnit(b []byte, c class, to *unitWriter, twice bool) (e entry, err error) {
	e = entry{birth: w.epoch, crc: checksum(b), kind: kindData}
	if twice && !w.single {
		if e.addr, e.twice, err = w.space.allocTwice(); err != nil {
			return e, err
		}
		w.single = !e.twice
	}
	if e.twice {
		to = &w.twice
		if err := w.copy.write(w.geo.copyOf(e.addr), b); err != nil {
			return e, err
		}
	} else if e.addr, _, err = w.space.alloc(c, 1, 0); err != nil {
		return e, err
	}
	if err := w.ref(e, 1); err != nil {
		return e, err
	}
	return e, to.write(e.addr, b)
}

// drop gives up a reference. That of a page goes to the queue: nothing below
// it is read now.
func (w *treeWriter) drop(e entry) error {
	if err := w.unmap(e); err != nil {
		return err
	}
	if e.kind == kindPage {
		w.queue.push(e)
		return nil
	}
	return w.unref(e)
}

// unmap takes the data below e out of the number of mapped units, as long as
// the budget lasts.
func (w *treeWriter) unmap(e entry) error {
	switch {
	case !e.refers():
		return nil
	case e.kind == kindData:
		w.mapped--
		return nil
	case w.budget <= 0:
		w.inexact = true
		return nil
	}
	w.budget--
	b, err := w.readPage(e)
	if errors.Is(err, ErrCorrupt) {
		w.inexact = true
		return nil
	} else if err != nil {
		return err
	}
	for i := range w.geo.Fanout {
		if err := w.unmap(getEntry(b[i*entrySize:])); err != nil {
			return err
		}
	}
	return nil
}

// reapOne gives up the reference on top of the queue. When it refers to a
// page that cannot be read, nothing is changed and readable is false.
func (w *treeWriter) reapOne() (readable bool, err error) {
	e := w.queue.ents[len(w.queue.ents)-1]
	if e.kind == kindPage {
		c, err := w.space.count(e.addr)
		if err != nil {
			return false, err
		}
		if c == 1 { // nobody else refers to it: what it refers to goes as well
			b, err := w.readPage(e)
			if errors.Is(err, ErrCorrupt) {
				return false, nil
			} else if err != nil {
				return false, err
			}
			w.queue.pop()
			for i := range w.geo.Fanout {
				switch c := getEntry(b[i*entrySize:]); c.kind {
				case kindData:
					if err := w.unref(c); err != nil {
						return true, err
					}
				case kindPage:
					w.queue.push(c)
				}
			}
			return true, w.unref(e)
		}
	}
	w.queue.pop()
	return true, w.unref(e)
}

// saveQueue writes those blocks of the queue that have changed.
func (w *treeWriter) saveQueue() error {
	q, per := w.queue, w.geo.linksPerUnit()
	if !q.changed(per) {
		return nil
	}
	keep := q.stable / per // full blocks that stay as they are
	for _, e := range q.blocks[keep:] {
		if err := w.unref(e); err != nil {
			return err
		}
	}
	q.blocks = q.blocks[:keep]
	for i := keep * per; i < len(q.ents); i += per {
		b := encodeBlock(w.geo, q.top(), q.ents[i:min(i+per, len(q.ents))])
		e, err := w.writeUnit(b, classUpper, &w.upper, true)
		if err != nil {
			return err
		}
		q.blocks = append(q.blocks, e)
	}
	q.stable = len(q.ents)
	return nil
}

// readPage reads a page that may have been written by this very checkpoint.
func (w *treeWriter) readPage(e entry) ([]byte, error) {
	if b := w.cache.get(e); b != nil {
		return b, nil
	}
	for _, u := range w.writers() {
		if u.pending(e.addr) || e.twice && u.pending(w.geo.copyOf(e.addr)) {
			if err := u.flush(); err != nil {
				return nil, err
			}
		}
	}
	return w.page(e)
}

func (w *treeWriter) flush() error {
	for _, u := range w.writers() {
		if err := u.flush(); err != nil {
			return err
		}
	}
	return nil
}

// entries returns the decoded form of a page of the given level, to be
// overwritten. There is one for each level.
func (w *treeWriter) entries(level int) []entry {
	for len(w.scratch) <= level {
		w.scratch = append(w.scratch, make([]entry, w.geo.Fanout))
	}
	return w.scratch[level]
}

// maxBatch is how many bytes of adjoining units are written at once.
const maxBatch = 1 << 20

// unitWriter gathers adjoining units into large writes.
type unitWriter struct {
	files *spaceFiles
	first uint64
	buf   []byte
}

func (u *unitWriter) write(addr uint64, b []byte) error {
	n := uint64(len(u.buf) / u.files.geo.UnitSize)
	if n > 0 && (addr != u.first+n || len(u.buf)+len(b) > maxBatch || !u.files.contiguous(u.first, int(n)+1)) {
		if err := u.flush(); err != nil {
			return err
		}
	}
	if len(u.buf) == 0 {
		u.first = addr
	}
	u.buf = append(u.buf, b...)
	return nil
}

func (u *unitWriter) pending(addr uint64) bool {
	return addr >= u.first && addr < u.first+uint64(len(u.buf)/u.files.geo.UnitSize)
}

func (u *unitWriter) flush() error {
	if len(u.buf) == 0 {
		return nil
	}
	err := u.files.write(u.buf, u.first)
	u.buf = u.buf[:0]
	return err
}
