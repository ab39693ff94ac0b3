package cow

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"slices"
	"sync"
	"sync/atomic"

	"coppice/internal/vfs"
)

// spaceFiles is the store's units as one address space over the space files.
type spaceFiles struct {
	geo Geometry
	dir vfs.FS

	mu     sync.Mutex // serialises growth and sync
	files  atomic.Pointer[[]*spaceFile]
	newDir bool  // a file was created since the last sync; guarded by mu
	failed error // of the first sync that failed: later ones must not seem to succeed; guarded by mu
}

type spaceFile struct {
	vfs.File
	dirty atomic.Bool // written since the last sync began
}

func spaceName(i int) string { return fmt.Sprintf("space-%04d", i) }

// openSpace opens the files that hold the given number of regions.
func openSpace(dir vfs.FS, g Geometry, regions int) (*spaceFiles, error) {
	sf := &spaceFiles{geo: g, dir: dir}
	var list []*spaceFile
	for i := range g.spaceFiles(regions) {
		f, err := dir.Open(spaceName(i))
		if err != nil {
			sf.files.Store(&list)
			err = &CorruptError{Detail: "opening " + spaceName(i), Cause: err}
			return nil, errors.Join(err, sf.close())
		}
		list = append(list, &spaceFile{File: f})
	}
	sf.files.Store(&list)
	return sf, nil
}

// reach opens the files up to that of a unit: the log may name units of a file
// that no checkpoint has recorded.
func (sf *spaceFiles) reach(addr uint64) error {
	sf.mu.Lock()
	defer sf.mu.Unlock()
	perFile := uint64(sf.geo.RegionsPerFile) * uint64(sf.geo.regionUnits())
	for list := *sf.files.Load(); addr/perFile >= uint64(len(list)); {
		name := spaceName(len(list))
		f, err := sf.dir.Open(name)
		if err != nil {
			return &CorruptError{Addr: addr, Detail: "opening " + name, Cause: err}
		}
		list = append(slices.Clone(list), &spaceFile{File: f})
		sf.files.Store(&list)
	}
	return nil
}

// at returns the file of a unit and the unit's byte in it.
func (sf *spaceFiles) at(addr uint64) (*spaceFile, int64) {
	perFile := uint64(sf.geo.RegionsPerFile) * uint64(sf.geo.regionUnits())
	list := *sf.files.Load()
	i := addr / perFile
	if i >= uint64(len(list)) {
		return nil, 0
	}
	return list[i], int64(addr%perFile) * int64(sf.geo.UnitSize)
}

// contiguous reports whether the n units from addr lie in one file.
func (sf *spaceFiles) contiguous(addr uint64, n int) bool {
	perFile := uint64(sf.geo.RegionsPerFile) * uint64(sf.geo.regionUnits())
	return addr/perFile == (addr+uint64(n)-1)/perFile
}

// read fills p from addr on. The units lie in one file.
func (sf *spaceFiles) read(p []byte, addr uint64) error {
	f, off := sf.at(addr)
	if f == nil {
		return fmt.Errorf("unit %d is outside the store", addr)
	}
	n, err := f.ReadAt(p, off)
	if n == len(p) {
		return nil
	}
	if errors.Is(err, io.EOF) {
		err = io.ErrUnexpectedEOF
	}
	return err
}

// readAhead has the host start reading n units. They lie in one file.
func (sf *spaceFiles) readAhead(addr uint64, n int) {
	if f, off := sf.at(addr); f != nil {
		f.ReadAhead(off, int64(n)*int64(sf.geo.UnitSize))
	}
}

// write stores p at addr. The units lie in one file.
func (sf *spaceFiles) write(p []byte, addr uint64) error {
	f, off := sf.at(addr)
	if f == nil {
		return fmt.Errorf("unit %d is outside the store", addr)
	}
	n, err := f.WriteAt(p, off)
	f.dirty.Store(true)
	if err == nil && n != len(p) {
		err = io.ErrShortWrite
	}
	if err != nil {
		return fmt.Errorf("writing %d bytes at unit %d: %w", len(p), addr, err)
	}
	return nil
}

// writeBehind has the host start writing n units back.
func (sf *spaceFiles) writeBehind(addr uint64, n int) {
	if f, off := sf.at(addr); f != nil {
		f.WriteBehind(off, int64(n)*int64(sf.geo.UnitSize))
	}
}

// evict waits until n units are on the device, and has the host forget them.
func (sf *spaceFiles) evict(addr uint64, n int) {
	if f, off := sf.at(addr); f != nil {
		f.Evict(off, int64(n)*int64(sf.geo.UnitSize))
	}
}

// allocate has the host provide the space of a region, creating its file if
// it is the first one there.
func (sf *spaceFiles) allocate(region int) error {
	sf.mu.Lock()
	defer sf.mu.Unlock()
	list := *sf.files.Load()
	if i := region / sf.geo.RegionsPerFile; i == len(list) {
		f, err := sf.dir.Create(spaceName(i))
		if errors.Is(err, fs.ErrExist) { // left by a growth that no checkpoint has recorded
			f, err = sf.dir.Open(spaceName(i))
		}
		if err != nil {
			return err
		}
		sf.newDir = true
		grown := append(append([]*spaceFile(nil), list...), &spaceFile{File: f})
		sf.files.Store(&grown)
		list = grown
	}
	f := list[region/sf.geo.RegionsPerFile]
	err := f.Allocate(int64(region%sf.geo.RegionsPerFile)*sf.geo.regionBytes(), sf.geo.regionBytes())
	f.dirty.Store(true)
	return err
}

// punch gives the host space of n units from addr back.
func (sf *spaceFiles) punch(addr uint64, n int) error {
	f, off := sf.at(addr)
	err := f.PunchHole(off, int64(n)*int64(sf.geo.UnitSize))
	f.dirty.Store(true)
	return err
}

// sync makes every write that has returned durable, and the files' existence.
// An error is final: see [vfs.File.Datasync].
func (sf *spaceFiles) sync() error {
	sf.mu.Lock()
	defer sf.mu.Unlock()
	if sf.failed == nil {
		sf.failed = sf.syncAll()
	}
	return sf.failed
}

func (sf *spaceFiles) syncAll() error {
	for i, f := range *sf.files.Load() {
		if !f.dirty.Swap(false) {
			continue
		}
		if err := f.Datasync(); err != nil {
			return fmt.Errorf("syncing %s: %w", spaceName(i), err)
		}
	}
	if sf.newDir {
		if err := sf.dir.SyncDir(); err != nil {
			return fmt.Errorf("syncing directory: %w", err)
		}
		sf.newDir = false
	}
	return nil
}

func (sf *spaceFiles) close() error {
	var errs []error
	for _, f := range *sf.files.Load() {
		errs = append(errs, f.Close())
	}
	return errors.Join(errs...)
}
