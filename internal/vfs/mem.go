package vfs

import (
	"io"
	"io/fs"
	"maps"
	"slices"
	"sync"
	"sync/atomic"
	"syscall"
)

// Mem is a directory in memory that knows what of it is durable. Files are
// sparse: only pages that hold something take memory, so a file may be as
// long as an int64 says.
//
// Everything written since the last sync is kept, version by version, so
// that [Mem.Crash] and [Mem.Crashes] can make every directory that a power
// cut may leave, and [Mem.Kill] the one that the death of the process leaves.
// All calls on a Mem and its files take effect one after the other, so a
// clone shows one instant of all files.
type Mem struct {
	capacity int64 // bytes; 0 is no limit

	mu      sync.RWMutex
	now     map[string]*inode // the directory as it is seen
	durable map[string]*inode // the directory as last synced
	pending []dirOp           // what leads from durable to now
	lastID  int64
	used    int64 // bytes, whole pages
	locked  bool
}

var (
	_ FS   = (*Mem)(nil)
	_ File = (*memFile)(nil)
)

// NewMem returns an empty directory in which all files together may take
// capacity bytes, counted in 4 KiB pages; 0 is no limit. When it is full,
// writes and allocations fail with syscall.ENOSPC.
func NewMem(capacity int64) *Mem {
	return &Mem{capacity: capacity, now: map[string]*inode{}, durable: map[string]*inode{}}
}

// Used returns the space that files take, in bytes: written or allocated and
// not punched out again.
func (m *Mem) Used() int64 {
	m.mu.RLock()
	defer m.mu.RUnlock()
	return m.used
}

// Free returns how many bytes may still be written or allocated: the capacity
// less what is used, or 1 PiB when there is none.
func (m *Mem) Free() (int64, error) {
	if m.capacity == 0 {
		return 1 << 50, nil
	}
	return m.capacity - m.Used(), nil
}

// dirOp is one change of the directory: name now means node (nil: nothing),
// and old, if any, no longer does.
type dirOp struct {
	name, old string
	node      *inode
}

func (o dirOp) apply(dir map[string]*inode) {
	if o.node == nil {
		delete(dir, o.name)
		return
	}
	if o.old != "" && dir[o.old] == o.node {
		delete(dir, o.old)
	}
	dir[o.name] = o.node
}

// change applies o to the directory as it is seen and lets go of the file
// that lost its name.
func (m *Mem) change(o dirOp) {
	lost := m.now[o.name]
	o.apply(m.now)
	m.pending = append(m.pending, o)
	if lost != nil && lost != o.node {
		lost.linked = false
		m.release(lost)
	}
}

// release returns the space of a file that nobody can reach any more.
func (m *Mem) release(n *inode) {
	if !n.linked && n.opens == 0 {
		m.used -= n.space.remove(0, maxOffset)
	}
}

func (m *Mem) Create(name string) (File, error) {
	if err := checkName("create", name); err != nil {
		return nil, err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.now[name] != nil {
		return nil, &fs.PathError{Op: "create", Path: name, Err: fs.ErrExist}
	}
	m.lastID++
	n := newInode(m.lastID)
	m.change(dirOp{name: name, node: n})
	return m.handle(n, name), nil
}

func (m *Mem) Open(name string) (File, error) {
	if err := checkName("open", name); err != nil {
		return nil, err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	n := m.now[name]
	if n == nil {
		return nil, &fs.PathError{Op: "open", Path: name, Err: fs.ErrNotExist}
	}
	return m.handle(n, name), nil
}

func (m *Mem) handle(n *inode, name string) *memFile {
	n.opens++
	return &memFile{m: m, n: n, name: name}
}

func (m *Mem) Remove(name string) error {
	if err := checkName("remove", name); err != nil {
		return err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.now[name] == nil {
		return &fs.PathError{Op: "remove", Path: name, Err: fs.ErrNotExist}
	}
	m.change(dirOp{name: name})
	return nil
}

func (m *Mem) Rename(oldName, newName string) error {
	for _, name := range []string{oldName, newName} {
		if err := checkName("rename", name); err != nil {
			return err
		}
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	n := m.now[oldName]
	if n == nil {
		return &fs.PathError{Op: "rename", Path: oldName, Err: fs.ErrNotExist}
	}
	if oldName != newName {
		m.change(dirOp{name: newName, old: oldName, node: n})
	}
	return nil
}

func (m *Mem) List() ([]string, error) {
	m.mu.RLock()
	defer m.mu.RUnlock()
	return slices.Sorted(maps.Keys(m.now)), nil
}

func (m *Mem) SyncDir() error {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.durable, m.pending = maps.Clone(m.now), nil
	return nil
}

func (m *Mem) Lock() (io.Closer, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.locked {
		return nil, ErrLocked
	}
	m.locked = true
	return &memLock{m: m}, nil
}

type memLock struct {
	m    *Mem
	once sync.Once
}

func (l *memLock) Close() error {
	l.once.Do(func() {
		l.m.mu.Lock()
		defer l.m.mu.Unlock()
		l.m.locked = false
	})
	return nil
}

// memFile is an open file of a Mem.
type memFile struct {
	m      *Mem
	n      *inode
	name   string
	closed atomic.Bool
}

// check refuses calls on a closed file and ranges that no file has.
func (f *memFile) check(op string, off, n int64) error {
	err := error(nil)
	switch {
	case f.closed.Load():
		err = fs.ErrClosed
	case off < 0 || n < 0 || off > maxOffset-n:
		err = syscall.EINVAL
	default:
		return nil
	}
	return &fs.PathError{Op: op, Path: f.name, Err: err}
}

func (f *memFile) ReadAt(p []byte, off int64) (int, error) {
	if err := f.check("read", off, int64(len(p))); err != nil {
		return 0, err
	}
	f.m.mu.RLock()
	defer f.m.mu.RUnlock()
	n := int(min(int64(len(p)), max(0, f.n.size()-off)))
	f.n.read(p[:n], off)
	if n < len(p) {
		return n, io.EOF
	}
	return n, nil
}

// WriteAt stores what there is room for, page by page.
func (f *memFile) WriteAt(p []byte, off int64) (int, error) {
	if err := f.check("write", off, int64(len(p))); err != nil {
		return 0, err
	}
	f.m.mu.Lock()
	defer f.m.mu.Unlock()
	done := 0
	for done < len(p) {
		at := off + int64(done)
		k := min(len(p)-done, int(pageSize-at%pageSize))
		if !f.m.reserve(f.n, at, int64(k)) {
			return done, &fs.PathError{Op: "write", Path: f.name, Err: syscall.ENOSPC}
		}
		f.n.write(p[done:done+k], at)
		done += k
	}
	return done, nil
}

// reserve gives [off, off+n) of the file its space, or tells that there is
// not enough.
func (m *Mem) reserve(node *inode, off, n int64) bool {
	from, to := off&^(pageSize-1), pageEnd(off+n)
	if m.capacity > 0 && node.space.missing(from, to) > m.capacity-m.used {
		return false
	}
	m.used += node.space.add(from, to)
	return true
}

func (f *memFile) Close() error {
	if f.closed.Swap(true) {
		return &fs.PathError{Op: "close", Path: f.name, Err: fs.ErrClosed}
	}
	f.m.mu.Lock()
	defer f.m.mu.Unlock()
	f.n.opens--
	f.m.release(f.n)
	return nil
}

func (f *memFile) Size() (int64, error) {
	if err := f.check("size", 0, 0); err != nil {
		return 0, err
	}
	f.m.mu.RLock()
	defer f.m.mu.RUnlock()
	return f.n.size(), nil
}

func (f *memFile) Truncate(size int64) error {
	if err := f.check("truncate", size, 0); err != nil {
		return err
	}
	f.m.mu.Lock()
	defer f.m.mu.Unlock()
	if size < f.n.size() {
		f.n.zero(size, f.n.size())
		f.m.used -= f.n.space.remove(pageEnd(size), maxOffset)
	}
	f.n.resize(size)
	return nil
}

func (f *memFile) Allocate(off, n int64) error {
	if err := f.check("allocate", off, n); err != nil {
		return err
	}
	f.m.mu.Lock()
	defer f.m.mu.Unlock()
	if !f.m.reserve(f.n, off, n) {
		return &fs.PathError{Op: "allocate", Path: f.name, Err: syscall.ENOSPC}
	}
	f.n.resize(max(f.n.size(), off+n))
	return nil
}

func (f *memFile) PunchHole(off, n int64) error {
	if err := f.check("punch", off, n); err != nil {
		return err
	}
	f.m.mu.Lock()
	defer f.m.mu.Unlock()
	f.n.zero(off, off+n)
	f.m.used -= f.n.space.remove(pageEnd(off), (off+n)&^(pageSize-1))
	return nil
}

func (f *memFile) Datasync() error {
	if err := f.check("datasync", 0, 0); err != nil {
		return err
	}
	f.m.mu.Lock()
	defer f.m.mu.Unlock()
	f.n.sync()
	return nil
}

// WriteSync is a write and a sync of what it wrote. A clone that is taken
// between the two has it torn.
func (f *memFile) WriteSync(p []byte, off int64) error {
	return f.writeSync(p, off, nil, func() error { return nil })
}

// writeSync is WriteSync that calls sync between the write and the sync. If
// that fails, what choose picks of each sector is on the device.
func (f *memFile) writeSync(p []byte, off int64, choose Choose, sync func() error) error {
	if _, err := f.WriteAt(p, off); err != nil {
		return err
	}
	err := sync()
	if cerr := f.check("write", off, int64(len(p))); cerr != nil {
		return cerr // closed meanwhile
	}
	f.m.mu.Lock()
	defer f.m.mu.Unlock()
	if err != nil {
		f.n.failRange(off, off+int64(len(p)), choose)
		return err
	}
	f.n.syncRange(off, off+int64(len(p)))
	return nil
}

// failDatasync is a sync that failed: of every sector some version, which
// choose picks, is on the device; the cache shows the newest and believes
// that it is clean.
func (f *memFile) failDatasync(choose Choose) {
	f.m.mu.Lock()
	defer f.m.mu.Unlock()
	f.n.failSync(choose)
}

func (f *memFile) WriteBehind(int64, int64) {}

func (f *memFile) ReadAhead(int64, int64) {}

func (f *memFile) Evict(off, n int64) {
	end := off + n
	if n == 0 {
		end = maxOffset
	}
	f.m.mu.Lock()
	defer f.m.mu.Unlock()
	f.n.evict(off, end)
}
