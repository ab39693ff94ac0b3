package cow

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"

	"coppice/internal/vfs"
)

// Dump writes the metadata of a store that nobody has open as text: the
// superblock, the regions and the volume table, or, with a volume that is not
// the zero ID, the record and the map of that volume. It is for people; the
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
	case kindPage:
		return fmt.Sprintf("page of level %d at %d, epoch %d, crc %08x", e.level, e.addr, e.birth, e.crc)
	}
	return fmt.Sprintf("data at %d, epoch %d, crc %08x", e.addr, e.birth, e.crc)
}

func (d *dumper) store() error {
	s := d.super
	fmt.Fprintf(d.w, "superblock\n  version %d, features %#x %#x\n", formatVersion, s.compat, s.incompat)
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
	return nil
}

func (d *dumper) record(r record) {
	kind := "writable"
	switch {
	case r.flags&flagPin != 0:
		kind = "pin"
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
	if e.isHole() || r.e.isHole() {
		return e == r.e
	}
	return e.kind == kindData && r.e.kind == kindData && e.addr == r.e.addr+r.n && e.birth == r.e.birth
}

// tree writes a subtree, a page per line with what it holds below.
func (d *dumper) tree(e entry, first uint64, depth int) error {
	if e.isHole() {
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

// Destroy removes the store in a directory that nobody has open, with all
// volumes in it. A crash in between leaves no store, at most files that a
// [Create] in the same place removes.
func Destroy(dir vfs.FS) (err error) {
	lock, err := dir.Lock()
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, lock.Close()) }()
	if err := dir.Remove(superName); errors.Is(err, fs.ErrNotExist) {
		return ErrNoStore
	} else if err != nil {
		return err
	}
	if err := dir.SyncDir(); err != nil {
		return err
	}
	if err := removeFiles(dir); err != nil {
		return err
	}
	return dir.SyncDir()
}

// removeFiles removes all files of a store but the superblock.
func removeFiles(dir vfs.FS) error {
	names, err := dir.List()
	if err != nil {
		return err
	}
	for _, n := range names {
		var i int
		_, scanErr := fmt.Sscanf(n, "space-%04d", &i)
		isSpace := scanErr == nil && n == spaceName(i)
		if isSpace || n == regionsName(0) || n == regionsName(1) || n == logName || n == superTemp {
			if err := dir.Remove(n); err != nil {
				return err
			}
		}
	}
	return nil
}
