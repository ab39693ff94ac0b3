package cow

import (
	"cmp"
	"errors"
	"fmt"
	"io/fs"
	"iter"
	"slices"

	"coppice/internal/vfs"
)

// image is the durable state of a store, as its newest superblock has it.
type image struct {
	*pageReader
	super  *super
	superF vfs.File
	logF   vfs.File
	space  *space

	slots    *slots
	superErr error    // why super may not be the newest
	tableErr error    // of the region table, when it is damaged and need not be read
	made     []string // files that were gone and are there under the name of tempName
}

// tempName is the name of a file that is being made in place of one that is gone.
func tempName(name string) string { return name + ".new" }

// standIns is a directory in which some files have the names of tempName.
type standIns struct {
	vfs.FS
	names *[]string
}

func (d standIns) Open(name string) (vfs.File, error) {
	if slices.Contains(*d.names, name) {
		name = tempName(name)
	}
	return d.FS.Open(name)
}

// readImage reads superblock and region table.
func readImage(dir vfs.FS, o Options) (*image, error) {
	im, err := readDamaged(dir, o, nil)
	if err != nil {
		return nil, err
	}
	if err := cmp.Or(im.superErr, im.tableErr); err != nil {
		return nil, errors.Join(err, im.close())
	}
	return im, nil
}

// readDamaged is readImage for a store whose region table, which says nothing
// that the trees do not, may be damaged, and whose newest superblock may be
// lost with both of its slots. Files that are gone and whose names remake
// approves of are made anew, empty and under another name until [image.keep].
// Everything is synced before it is read: after a crash of the process, but not of the host, the page cache
// may show a state that the device does not have, and nothing may be built
// on that.
func readDamaged(dir vfs.FS, o Options, remake func(name string) bool) (_ *image, err error) {
	im := &image{}
	defer func() {
		if err != nil {
			err = errors.Join(err, im.close())
		}
	}()
	if im.superF, err = dir.Open(superName); errors.Is(err, fs.ErrNotExist) {
		return nil, ErrNoStore
	} else if err != nil {
		return nil, err
	}
	if err = settle(im.superF, superName); err != nil {
		return nil, err
	}
	if im.slots, err = readSlots(im.superF); err != nil {
		return nil, err
	}
	if im.super, err = im.slots.newest(); err != nil {
		return nil, err
	}
	im.superErr = im.slots.certain()
	if remake != nil && im.super.writable() == nil {
		if err = im.remake(dir, remake); err != nil {
			return nil, err
		}
		dir = standIns{dir, &im.made}
	}
	files, err := openSpace(dir, im.super.geo, int(im.super.regions))
	if err != nil {
		return nil, err
	}
	im.space = newSpace(files, o)
	for _, f := range *files.files.Load() {
		if err = f.Datasync(); err != nil {
			return nil, fmt.Errorf("syncing space: %w", err)
		}
	}
	for i := range im.space.table.file {
		name := regionsName(uint64(i))
		if im.space.table.file[i], err = dir.Open(name); err != nil {
			return nil, &CorruptError{Detail: "opening " + name, Cause: err}
		}
		if err = settle(im.space.table.file[i], name); err != nil {
			return nil, err
		}
	}
	if im.logF, err = dir.Open(logName); err != nil {
		return nil, &CorruptError{Detail: "opening " + logName, Cause: err}
	}
	if err = settle(im.logF, logName); err != nil {
		return nil, err
	}
	recs, err := im.space.table.read(im.super.gen, int(im.super.regions), im.super.tableCRC, im.super.geo)
	if errors.Is(err, ErrCorrupt) {
		im.tableErr = err
		return im, nil
	} else if err != nil {
		return nil, err
	}
	im.space.load(recs)
	return im, nil
}

// remake creates the files of the store that are gone and that want approves
// of. What an interrupted one has left is removed.
func (im *image) remake(dir vfs.FS, want func(name string) bool) error {
	names := []string{regionsName(0), regionsName(1), logName}
	for i := range im.super.geo.spaceFiles(int(im.super.regions)) {
		names = append(names, spaceName(i))
	}
	there, err := dir.List()
	if err != nil {
		return err
	}
	for _, name := range names {
		if slices.Contains(there, tempName(name)) {
			if err := dir.Remove(tempName(name)); err != nil {
				return err
			}
		}
		if slices.Contains(there, name) || !want(name) {
			continue // opening it will say so
		}
		f, err := dir.Create(tempName(name))
		if err == nil {
			err = f.Close()
		}
		if err != nil {
			return err
		}
		im.made = append(im.made, name)
	}
	return nil
}

// keep gives what was made anew its name, once it has its space: after a crash
// before that the file is gone as it was.
func (im *image) keep(dir vfs.FS) error {
	for _, name := range im.made {
		if err := dir.Rename(tempName(name), name); err != nil {
			return err
		}
	}
	if len(im.made) == 0 {
		return nil
	}
	return dir.SyncDir()
}

// settle makes what the page cache shows of a file and what the device has
// the same.
func settle(f vfs.File, name string) error {
	if err := f.Datasync(); err != nil {
		return fmt.Errorf("syncing %s: %w", name, err)
	}
	f.Evict(0, 0)
	return nil
}

func (im *image) newReader(cache int64) *pageReader {
	return &pageReader{geo: im.super.geo, files: im.space.files, cache: newPageCache(cache, im.super.geo.UnitSize)}
}

// newLog is the log with its head where replay starts.
func (im *image) newLog() redoLog {
	return redoLog{
		file: im.logF, codec: newFrameCodec(im.super), size: im.super.logSize,
		align: im.super.geo.frameAlign(), head: im.super.log,
	}
}

func (im *image) close() error {
	var errs []error
	for _, f := range []vfs.File{im.superF, im.logF} {
		if f != nil {
			errs = append(errs, f.Close())
		}
	}
	if im.space != nil {
		errs = append(errs, im.space.table.close(), im.space.files.close())
	}
	return errors.Join(errs...)
}

// records yields the volumes of the table by number, and an error for each
// part of it that cannot be read. The volume table is an ordinary tree whose
// units are leaves of records.
func (im *image) records() iter.Seq2[record, error] {
	return func(yield func(record, error) bool) {
		g := im.super.geo
		root := im.super.table
		if err := checkRoot(root, g); err != nil {
			yield(record{}, &CorruptError{Detail: "volume table: " + err.Error()})
			return
		}
		b := make([]byte, g.UnitSize)
		for u, err := range im.data(root) {
			if err == nil {
				err = im.verified(b, u.entry)
			}
			if err != nil {
				if !yield(record{}, fmt.Errorf("volume table: %w", err)) {
					return
				}
				continue
			}
			for i := range g.recordsPerUnit() {
				r, err := getRecord(b[i*recordSize:], g)
				if err == nil && r.num != 0 && r.num != u.index*uint64(g.recordsPerUnit())+uint64(i) {
					err = fmt.Errorf("volume %d is in the wrong place", r.num)
				}
				if err != nil {
					if !yield(record{}, &CorruptError{Addr: u.entry.addr, Detail: "volume table: " + err.Error()}) {
						return
					}
					continue
				}
				if r.num != 0 && !yield(r, nil) {
					return
				}
			}
		}
	}
}

// unit is a data unit of a tree.
type unit struct {
	index uint64
	entry entry
}

// data yields the data units of a tree in order.
func (r *pageReader) data(root entry) iter.Seq2[unit, error] {
	return func(yield func(unit, error) bool) {
		var walk func(e entry, first uint64) bool
		walk = func(e entry, first uint64) bool {
			switch {
			case e.isHole():
				return true
			case e.kind == kindLost:
				return yield(unit{}, errLost())
			case e.kind == kindData:
				return yield(unit{first, e}, nil)
			}
			b, err := r.page(e)
			if err != nil {
				return yield(unit{}, err)
			}
			for i := range r.geo.Fanout {
				if !walk(getEntry(b[i*entrySize:]), first+uint64(i)*r.geo.span(int(e.level)-1)) {
					return false
				}
			}
			return true
		}
		walk(root, 0)
	}
}
