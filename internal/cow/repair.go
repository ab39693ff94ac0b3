package cow

import (
	"context"
	"errors"
	"fmt"
	"io"
	"iter"
	"slices"

	"coppice/internal/vfs"
)

// RepairOptions says how far a repair may go.
type RepairOptions struct {
	// AcceptLoss gives up what cannot be read, so that the rest can be used.
	// The ranges below a lost map page then fail with a *CorruptError until
	// they are written anew; volumes whose records are lost are gone, and so is
	// what the log has behind a place where it cannot be read.
	AcceptLoss bool
}

// Repair puts right what [Check] finds in the store in a directory that nobody
// has open. It yields every problem, with what has been done about it:
//
//   - units, and slots of the superblock, of which a copy is whole are written
//     anew from it;
//   - counters and region table, which say nothing that the trees do not, are
//     made anew, unless there is something in the trees that cannot be read;
//   - that, and files of contents or of the log that are gone, is given up with
//     [RepairOptions.AcceptLoss] only.
//
// Contents that cannot be read stay as they are: reading them is an error,
// writing them heals. A sound store is not written. A crash leaves the store
// as it was or repaired, or something in between that can be repaired.
//
// It takes 8 bytes of memory for each unit of the store.
func Repair(ctx context.Context, dir vfs.FS, o RepairOptions) iter.Seq2[Problem, error] {
	return func(yield func(Problem, error) bool) {
		if err := repairStore(ctx, dir, o, yield); err != nil && !errors.Is(err, errStopped) {
			yield(Problem{}, fmt.Errorf("repair: %w", err))
		}
	}
}

func repairStore(ctx context.Context, dir vfs.FS, o RepairOptions, yield func(Problem, error) bool) (err error) {
	lock, err := dir.Lock()
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, lock.Close()) }()
	im, err := readDamaged(dir, Options{}, func(name string) bool {
		return o.AcceptLoss || name == regionsName(0) || name == regionsName(1)
	})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, im.close()) }()
	if err := im.super.writable(); err != nil {
		return err
	}
	r := &repair{dir: dir, checker: newChecker(ctx, im, yield), accept: o.AcceptLoss, recs: map[uint64]*record{}, mended: map[uint64]entry{}}
	r.mend = true
	if r.accept {
		r.lossy = "given up"
	}
	if err := r.run(); err != nil {
		return err
	}
	if r.blocked || !r.changed {
		return r.files.sync() // the copies
	}
	return r.write()
}

// repair is one repair. It first looks at everything, as a check does, and
// restores copies in passing; then it writes a new generation beside the old.
type repair struct {
	*checker
	dir    vfs.FS
	accept bool

	blocked bool // something that cannot be read keeps a new generation from being made
	changed bool // one is needed

	recs   map[uint64]*record
	fixed  []uint64    // numbers of the records to be written
	gone   bool        // the volume table cannot be read as a whole
	old    [][]uint32  // references of such a table
	queue  *reapQueue  // nil when it cannot be read
	placed []logRecord // units that the log names
	logEnd *logPos     // where the log is to go on when it cannot be replayed
	mended map[uint64]entry
}

// lose notes that something cannot be read.
func (r *repair) lose() {
	r.changed = true
	r.blocked = r.blocked || !r.accept
}

func (r *repair) run() error {
	for _, step := range []func() error{r.missing, r.mendSlots, r.table, r.volumes, r.reapQueue, r.log, r.counters} {
		if err := step(); err != nil {
			return err
		}
	}
	return nil
}

// missing reports the files that reading the image has made anew, has the
// host provide their space and gives them their names.
func (r *repair) missing() error {
	for _, name := range r.made {
		r.changed = true // the new generation has the table
		done := "made anew"
		if name != regionsName(0) && name != regionsName(1) {
			done = r.lossy
		}
		if err := r.report(Problem{Detail: name + " is missing", Done: done}); err != nil {
			return err
		}
	}
	for i := range r.space.table.file {
		if slices.Contains(r.made, regionsName(uint64(i))) {
			pages := (int64(r.super.regions) + tablePageRecords - 1) / tablePageRecords
			if err := r.space.table.file[i].Allocate(0, pages*tablePageSize); err != nil {
				return err
			}
		}
	}
	for i, reg := range r.space.regions {
		if !reg.rec.unbacked && slices.Contains(r.made, spaceName(i/r.geo.RegionsPerFile)) {
			if err := r.files.allocate(i); err != nil {
				return err
			}
		}
	}
	if slices.Contains(r.made, logName) {
		if err := fillLog(r.logF, 0, int64(r.super.logSize)); err != nil {
			return err
		}
	}
	for i, f := range r.space.table.file {
		if err := f.Datasync(); err != nil {
			return fmt.Errorf("syncing %s: %w", regionsName(uint64(i)), err)
		}
	}
	if err := r.files.sync(); err != nil {
		return err
	}
	return r.keep(r.dir)
}

// mendSlots writes damaged slots of the superblock anew from their twins. When
// both slots of a generation are gone the one before is built upon, which may
// be a step back: that is a loss to be accepted.
func (r *repair) mendSlots() error {
	r.vol, r.what = ID{}, "superblock"
	for _, slot := range r.slots.bad {
		p := Problem{Detail: fmt.Sprintf("slot %d is damaged", slot)}
		if twin := r.slots.super[(slot+superSlots/2)%superSlots]; twin != nil {
			if _, err := r.superF.WriteAt(twin.encode(), int64(slot)*slotSize); err != nil {
				return err
			}
			p.Done = "restored"
		} else if r.superErr == nil { // the next generation goes there
			r.changed = true
			p.Done = "written anew"
		}
		if err := r.report(p); err != nil {
			return err
		}
	}
	if ce, ok := errors.AsType[*CorruptError](r.superErr); ok {
		r.what = ""
		r.lose()
		if err := r.report(Problem{Detail: ce.Detail, Done: r.lossy}); err != nil {
			return err
		}
	}
	return r.superF.Datasync()
}

// table reads the volume table. One that has lost parts is not counted: it
// will be written anew.
func (r *repair) table() error {
	if err := r.checkTable(); err != nil {
		return err
	}
	r.gone = checkRoot(r.super.table, r.geo) != nil || r.hurt > 0
	for rec, err := range r.records() {
		switch {
		case err == nil:
			r.recs[rec.num], r.names[rec.num] = &rec, rec.id
		case !errors.Is(err, ErrCorrupt):
			return err
		default:
			if r.hurt == 0 { // a record that cannot be one
				if err := r.report(Problem{Detail: err.Error(), Done: r.lossy}); err != nil {
					return err
				}
			}
			r.gone = true
		}
	}
	if r.gone {
		r.lose()
		r.old, r.refs = r.refs, make([][]uint32, len(r.refs))
	}
	return nil
}

// numbers lists the volumes.
func (r *repair) numbers() []uint64 {
	nums := make([]uint64, 0, len(r.recs))
	for n := range r.recs {
		nums = append(nums, n)
	}
	slices.Sort(nums)
	return nums
}

// volumes walks the volumes and corrects their records.
func (r *repair) volumes() error {
	for _, num := range r.numbers() {
		rec := r.recs[num]
		was := *rec
		r.vol, r.what = rec.id, ""
		n, err := r.walkRoot(rec.root)
		if err != nil {
			return err
		}
		torn := r.isTorn(rec.root)
		if n > rec.mapped || n < rec.mapped && rec.flags&flagInexact == 0 && !r.isBlind(rec.root) {
			if err := r.report(Problem{Detail: fmt.Sprintf("%d units are mapped, the record says %d", n, rec.mapped), Done: "corrected"}); err != nil {
				return err
			}
			rec.mapped = n
		}
		if torn {
			rec.mapped = n
		}
		if p := r.recs[rec.parent]; rec.parent != 0 && (p == nil || p.flags&(flagReadOnly|flagPin) != flagReadOnly) {
			if err := r.report(Problem{Detail: fmt.Sprintf("parent %d is not a snapshot", rec.parent), Done: "corrected"}); err != nil {
				return err
			}
			rec.parent = 0
		}
		if rec.attrLen > 0 {
			r.what = "attributes"
			if _, err := r.walkRoot(rec.attrs); err != nil {
				return err
			}
			if r.isTorn(rec.attrs) {
				r.lose()
			}
		}
		if torn {
			r.lose()
		}
		if *rec != was {
			r.changed = true
			r.fixed = append(r.fixed, num)
		}
	}
	return nil
}

// reapQueue walks the queue. One that cannot be read is given up: what it
// names is not counted, and so it is free.
func (r *repair) reapQueue() (err error) {
	if r.queue, err = r.checkQueue(); err != nil {
		return err
	}
	if r.queue == nil {
		r.lose()
		return nil
	}
	for _, e := range append(slices.Clone(r.queue.blocks), r.queue.ents...) {
		if r.isTorn(e) {
			r.lose()
		}
	}
	return nil
}

// log notes the units that the log names, and where it ends if it cannot be
// replayed.
func (r *repair) log() error {
	r.vol, r.what = ID{}, ""
	if slices.Contains(r.made, logName) {
		return r.dropLog()
	}
	err := r.scanLog(func(rec logRecord) {
		if rec.kind == recMap {
			r.placed = append(r.placed, rec)
		}
	})
	if ce, ok := errors.AsType[*CorruptError](err); ok {
		r.lose()
		if err := r.report(Problem{Detail: ce.Detail, Done: r.lossy}); err != nil {
			return err
		}
	} else if err != nil {
		return err
	} else if !r.gone {
		return r.checkPlaced(r.placed)
	}
	// What is behind the damage may build on what is lost, and so may what
	// the log has of volumes that are gone.
	return r.dropLog()
}

// dropLog has the log begin behind all that is in it.
func (r *repair) dropLog() error {
	l := r.newLog()
	last := l.head.seq
	b := make([]byte, l.align)
	for off := uint64(0); off < l.size; off += l.align {
		if _, err := l.file.ReadAt(b, int64(off)); err != nil && !errors.Is(err, io.EOF) {
			continue
		}
		if h, ok := l.codec.get(b); ok {
			last = max(last, h.seq)
		}
	}
	r.logEnd, r.placed = &logPos{seq: last + 2}, nil
	return nil
}

// counters compares the references found with the counters.
func (r *repair) counters() error {
	r.vol, r.what = ID{}, ""
	done := "counted anew"
	if r.blocked {
		done = ""
	}
	if r.tableErr != nil {
		r.changed = true
		return r.report(Problem{Detail: r.tableErr.Error(), Done: done})
	}
	for i, reg := range r.space.regions {
		wrong, free := 0, 0
		for k := range pagesPerRegion {
			p, err := loadCounters(r.files, i, k, &reg.rec)
			if err != nil {
				wrong += r.geo.PageCounters
				continue
			}
			for j, n := range p.n {
				if u := k*r.geo.PageCounters + j; u >= r.geo.metaUnits() {
					want := r.found(i, u)
					if want != n {
						wrong++
					}
					if n == 0 {
						free++
					}
				}
			}
		}
		if wrong > 0 || free != int(reg.rec.free) {
			r.changed = true
			if err := r.report(Problem{Detail: fmt.Sprintf("region %d: %d counters are wrong", i, wrong), Done: done}); err != nil {
				return err
			}
		}
	}
	return nil
}

// found is the number of references found to a unit of a region.
func (r *repair) found(region, u int) uint32 {
	if region >= len(r.refs) || r.refs[region] == nil {
		return 0
	}
	return r.refs[region][u]
}

// write makes a generation of what has been found.
func (r *repair) write() error {
	if err := r.recount(); err != nil {
		return err
	}
	if r.queue == nil {
		r.queue = &reapQueue{}
	}
	w := newTreeWriter(r.pageReader, r.space, r.queue)
	w.epoch = r.super.epoch
	next := *r.super
	next.gen++
	for _, num := range r.numbers() {
		rec := r.recs[num]
		was := *rec
		var err error
		if rec.root, err = r.mendTree(w, rec.root); err != nil {
			return err
		}
		if r.isTorn(was.attrs) {
			if err := w.unref(was.attrs); err != nil {
				return err
			}
			rec.attrs, rec.attrLen = entry{}, 0
		}
		if *rec != was {
			r.fixed = append(r.fixed, num)
		}
	}
	for i, e := range r.queue.ents {
		m, err := r.mendTree(w, e)
		if err != nil {
			return err
		}
		if m != e {
			r.queue.ents[i], r.queue.stable = m, min(r.queue.stable, i)
		}
	}
	if r.gone {
		next.table, r.fixed = entry{}, r.numbers()
	}
	if r.logEnd != nil {
		next.log = *r.logEnd
	}
	var err error
	if next.table, err = w.mergeRecords(next.table, r.fixed, r.recs); err != nil {
		return err
	}
	if err := w.saveQueue(); err != nil {
		return err
	}
	next.queue, next.queueLen = r.queue.top(), uint64(len(r.queue.ents))
	if err := w.flush(); err != nil {
		return err
	}
	punch, err := r.space.commit(&next)
	if err != nil {
		return err
	}
	if err := writeSuper(r.superF, &next); err != nil {
		return err
	}
	if r.logEnd != nil { // not before: a log that was cut short would be as one that ends there
		size, err := r.logF.Size()
		if err != nil {
			return err
		}
		if err := fillLog(r.logF, size, int64(next.logSize)); err != nil {
			return err
		}
	}
	r.space.punch(punch)
	return r.files.sync()
}

// recount makes the counters in memory those that have been found. What is not
// referred to is free, but neither what the log names nor a volume table that
// is to be replaced is used before the new generation is durable.
func (r *repair) recount() error {
	sp := r.space
	if r.tableErr != nil {
		recs := make([]regionRecord, r.super.regions)
		for i := range recs {
			recs[i] = regionRecord{zero: 1<<pagesPerRegion - 1, free: uint32(r.geo.dataUnits()), unbacked: true}
		}
		sp.load(recs)
	}
	for i, reg := range sp.regions {
		sp.table.mark(i)
		was := int(reg.rec.free)
		free := 0
		for k := range pagesPerRegion {
			have, err := loadCounters(r.files, i, k, &reg.rec)
			p := &counterPage{n: make([]uint32, r.geo.PageCounters)}
			for j := range p.n {
				u := k*r.geo.PageCounters + j
				if u < r.geo.metaUnits() {
					continue
				}
				if p.n[j] = r.found(i, u); p.n[j] == 0 {
					free++
				}
			}
			if err == nil && slices.Equal(p.n, have.n) {
				continue
			}
			idx := i*pagesPerRegion + k
			sp.counters[idx] = p
			sp.touch(p, uint64(idx)*uint64(r.geo.PageCounters))
		}
		reg.rec.free = uint32(free)
		if !reg.rec.unbacked {
			sp.free += int64(free - was)
		} else if free < r.geo.dataUnits() {
			if err := sp.files.allocate(i); err != nil {
				return err
			}
			reg.rec.unbacked = false
			sp.backed++
			sp.free += int64(free)
		}
	}
	for _, rec := range r.placed {
		if err := sp.adopt(rec.addr, rec.count); err != nil {
			return err
		}
	}
	for i, refs := range r.old {
		for u, n := range refs {
			if reg := sp.regions[i]; n > 0 && r.found(i, u) == 0 && !reg.isHeld(u) {
				reg.hold(u)
				sp.held++
				if !reg.rec.unbacked {
					sp.free--
				}
			}
		}
	}
	return nil
}

// mendTree takes over a reference to a tree and yields one to a tree of what
// can be read of it.
func (r *repair) mendTree(w *treeWriter, e entry) (entry, error) {
	if !r.isTorn(e) {
		return e, nil
	}
	m, done := r.mended[e.addr]
	if done {
		if err := w.ref(m, 1); err != nil {
			return e, err
		}
		return m, w.unref(e)
	}
	ents := make([]entry, r.geo.Fanout)
	b, err := r.storedPage(e)
	switch {
	case errors.Is(err, ErrCorrupt):
		for i := range ents {
			ents[i] = lost(e.birth)
		}
	case err != nil:
		return e, err
	default:
		for i := range ents {
			if ents[i], err = r.mendTree(w, getEntry(b[i*entrySize:])); err != nil {
				return e, err
			}
		}
	}
	if m, err = w.storePage(ents, int(e.level)); err != nil {
		return e, err
	}
	r.mended[e.addr] = m
	return m, w.unref(e)
}
