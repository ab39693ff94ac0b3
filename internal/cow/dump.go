package cow

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"

	"coppice/internal/vfs"
)

// Dump writes the metadata of a store that nobody has open as text: the
// superblock, the regions, the volume table and what would be replayed of the
// log, or, with a volume that is not the zero ID, the record and the map of
// that volume, both without what is in the log. It is for people; the
// form may change.
func Dump(ctx context.Context, dir vfs.FS, w io.Writer, volume ID) (err error) {
	lock, err := dir.Lock()
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, lock.Close()) }()
	im, err := readImage(dir, Options{})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, im.close()) }()
	im.pageReader = im.newReader(32 << 20)
	b := bufio.NewWriter(w)
	d := &dumper{image: im, ctx: ctx, w: b}
	if volume == (ID{}) {
		err = d.store()
	} else {
		err = d.volume(volume)
	}
	return errors.Join(err, b.Flush())
}

type dumper struct {
	*image
	ctx context.Context
	w   *bufio.Writer
}

func (e entry) String() string {
	switch e.kind {
	case kindHole:
		return fmt.Sprintf("hole, epoch %d", e.birth)
	case kindLost:
		return fmt.Sprintf("lost, epoch %d", e.birth)
	}
	what, where := "data", fmt.Sprint(e.addr)
	if e.kind == kindPage {
		what = fmt.Sprintf("page of level %d", e.level)
	}
	if e.twice {
		where += " and in the next region"
	}
	return fmt.Sprintf("%s at %s, epoch %d, crc %08x", what, where, e.birth, e.crc)
}

func (d *dumper) store() error {
	s := d.super
	fmt.Fprintf(d.w, "superblock\n  version %d, features %#x, read-only %#x, incompatible %#x\n", formatVersion, s.compat, s.readOnly, s.incompat)
	fmt.Fprintf(d.w, "  store %v\n", ID(s.uuid))
	fmt.Fprintf(d.w, "  unit %d bytes, %d entries per page, region %d units, %d regions per file\n",
		s.geo.UnitSize, s.geo.Fanout, s.geo.regionUnits(), s.geo.RegionsPerFile)
	fmt.Fprintf(d.w, "  generation %d, epoch %d, next volume %d\n", s.gen, s.epoch, s.nextID)
	fmt.Fprintf(d.w, "  volume table: %v\n  reap queue: %d entries, %v\n", s.table, s.queueLen, s.queue)
	fmt.Fprintf(d.w, "  log: %d bytes, replay from frame %d at byte %d\n", s.logSize, s.log.seq, s.log.off)
	free, unbacked := 0, 0
	for _, r := range d.space.regions {
		free += int(r.rec.free)
		if r.rec.unbacked {
			unbacked++
		}
	}
	fmt.Fprintf(d.w, "regions\n  %d, of which %d without host space; %d units, %d free\n",
		len(d.space.regions), unbacked, len(d.space.regions)*s.geo.dataUnits(), free)
	fmt.Fprintln(d.w, "volumes")
	for r, err := range d.records() {
		if err != nil {
			return err
		}
		d.record(r)
	}
	return d.log()
}

// log writes the frames that an open would replay, with their records. A log
// that it would refuse is written up to there.
func (d *dumper) log() error {
	fmt.Fprintln(d.w, "log")
	l := d.newLog()
	err := l.scan(d.super.gen, func(f frame) error {
		if err := d.ctx.Err(); err != nil {
			return context.Cause(d.ctx)
		}
		fmt.Fprintf(d.w, "  frame %d at byte %d, generation %d, %d bytes of records\n", f.seq, f.off, f.gen, f.n)
		recs, err := decodeRecords(f.payload, d.geo)
		if err != nil {
			return &CorruptError{Detail: fmt.Sprintf("log: frame %d: %v", f.seq, err)}
		}
		for i := range recs {
			for _, line := range recs[i].describe() {
				fmt.Fprintf(d.w, "    %s\n", line)
			}
		}
		return nil
	})
	if errors.Is(err, ErrCorrupt) {
		fmt.Fprintf(d.w, "  %v\n", err)
		return nil
	} else if err != nil {
		return err
	}
	fmt.Fprintf(d.w, "  ends before frame %d\n", l.head.seq)
	return nil
}

// describe says in words what a record does, in one line or, for several
// volumes, more.
func (r *logRecord) describe() (lines []string) {
	line := func(format string, args ...any) { lines = append(lines, fmt.Sprintf(format, args...)) }
	units := fmt.Sprintf("units %d-%d", r.first, r.first+r.count-1)
	switch r.kind {
	case recWrite:
		line("volume %d: %s with their contents", r.num, units)
	case recMap:
		line("volume %d: %s at %d", r.num, units, r.addr)
	case recZero:
		line("volume %d: %s zero", r.num, units)
	case recCreate:
		line("volume %d: create %v, %d bytes, %d bytes of attributes", r.num, r.id, r.size, len(r.attrs))
	case recDerive:
		what := "clone"
		if r.flags&flagReadOnly != 0 {
			what = "snapshot"
		}
		for _, p := range r.pairs {
			attrs := "attributes of the source"
			if p.own {
				attrs = fmt.Sprintf("%d bytes of attributes", len(p.attrs))
			}
			line("volume %d: %s %v of volume %d at epoch %d, %s", p.num, what, p.id, p.src, r.epoch, attrs)
		}
	case recRevert:
		line("volume %d: revert to volume %d at epoch %d", r.num, r.to, r.epoch)
	case recResize:
		line("volume %d: resize to %d bytes at epoch %d", r.num, r.size, r.epoch)
	case recDelete:
		line("volume %d: delete", r.num)
	case recEmpty:
		line("volume %d: destroy the data", r.num)
	case recAttrs:
		line("volume %d: %d bytes of attributes", r.num, len(r.attrs))
	}
	return lines
}

func (d *dumper) record(r record) {
	kind := "writable"
	switch {
	case r.flags&flagPin != 0:
		kind = "pin"
	case r.flags&flagNoData != 0:
		kind = fmt.Sprintf("snapshot of epoch %d without its data", r.sealed)
	case r.flags&flagReadOnly != 0:
		kind = fmt.Sprintf("snapshot of epoch %d", r.sealed)
	}
	approx := ""
	if r.flags&flagInexact != 0 {
		approx = "at most "
	}
	fmt.Fprintf(d.w, "  %d %v: %s, %d bytes, %s%d units mapped, parent %d, %d bytes of attributes, root %v\n",
		r.num, r.id, kind, r.size, approx, r.mapped, r.parent, r.attrLen, r.root)
}

func (d *dumper) volume(id ID) error {
	for r, err := range d.records() {
		if err != nil {
			return err
		}
		if r.id == id && r.flags&flagPin == 0 {
			d.record(r)
			return d.tree(r.root, 0, 1)
		}
	}
	return fmt.Errorf("%w: %v", ErrNotFound, id)
}

// fold is adjoining entries of a page that are folded into one line.
type fold struct {
	first, n uint64 // units
	e        entry
}

func (r *fold) takes(e entry) bool {
	if !e.refers() || !r.e.refers() {
		return e == r.e
	}
	return e.kind == kindData && r.e.kind == kindData && e.addr == r.e.addr+r.n && e.birth == r.e.birth
}

// tree writes a subtree, a page per line with what it holds below.
func (d *dumper) tree(e entry, first uint64, depth int) error {
	if !e.refers() {
		return nil
	}
	if err := d.ctx.Err(); err != nil {
		return context.Cause(d.ctx)
	}
	indent := func() { fmt.Fprintf(d.w, "%*s", 2*depth+2, "") }
	b, err := d.page(e)
	if err != nil {
		indent()
		fmt.Fprintf(d.w, "%v: %v\n", e, err)
		return nil
	}
	refs, err := d.space.count(e.addr)
	if err != nil {
		return err
	}
	indent()
	fmt.Fprintf(d.w, "units from %d: %v, %d references\n", first, e, refs)
	span := d.geo.span(int(e.level) - 1)
	var r *fold
	flush := func() {
		if r != nil {
			indent()
			fmt.Fprintf(d.w, "  units %d-%d: %v\n", r.first, r.first+r.n-1, r.e)
			r = nil
		}
	}
	for i := range d.geo.Fanout {
		c, at := getEntry(b[i*entrySize:]), first+uint64(i)*span
		switch {
		case c.kind == kindPage:
			flush()
			if err := d.tree(c, at, depth+1); err != nil {
				return err
			}
		case r != nil && r.takes(c):
			r.n += span
		default:
			flush()
			r = &fold{first: at, n: span, e: c}
		}
	}
	flush()
	return nil
}
