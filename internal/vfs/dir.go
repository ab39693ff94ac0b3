package vfs

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// lockName is the file in a real directory that carries the lock. It is never
// removed and not listed.
const lockName = "LOCK"

// Dir is a real directory. Everything goes through one descriptor of the
// directory, so it keeps working when the directory is moved. Files are made
// with mode 0600.
type Dir struct {
	path string
	root *os.Root
}

var (
	_ FS   = (*Dir)(nil)
	_ File = (*dirFile)(nil)
)

// OpenDir opens an existing directory. Close releases the descriptor; files
// that are open stay usable.
func OpenDir(path string) (*Dir, error) {
	root, err := os.OpenRoot(path)
	if err != nil {
		return nil, err
	}
	return &Dir{path: path, root: root}, nil
}

// CreateDir makes the directory with mode 0700, missing parents included,
// unless it exists, makes it durable and opens it.
func CreateDir(path string) (*Dir, error) {
	path, err := filepath.Abs(path)
	if err != nil {
		return nil, err
	}
	if err := mkdirDurable(path); err != nil {
		return nil, err
	}
	return OpenDir(path)
}

// mkdirDurable is os.MkdirAll that syncs the parent of every directory it
// makes.
func mkdirDurable(path string) error {
	err := os.Mkdir(path, 0o700)
	if errors.Is(err, fs.ErrNotExist) {
		if err := mkdirDurable(filepath.Dir(path)); err != nil {
			return err
		}
		err = os.Mkdir(path, 0o700)
	}
	if errors.Is(err, fs.ErrExist) {
		return nil // OpenDir tells whether it is a directory
	}
	if err != nil {
		return err
	}
	return syncParent(path)
}

// syncParent makes the existence of path, or its absence, durable.
func syncParent(path string) error {
	parent, err := os.Open(filepath.Dir(path))
	if err != nil {
		return err
	}
	return errors.Join(parent.Sync(), parent.Close())
}

// RemoveDir removes a directory that holds nothing but perhaps a lock file
// that nobody has locked, durably. A directory with anything else in it, or
// where a file system is mounted, stays, which is no error; one that is locked
// is [ErrLocked].
func RemoveDir(path string) error {
	path, err := filepath.Abs(path)
	if err != nil {
		return err
	}
	d, err := OpenDir(path)
	if err != nil {
		return err
	}
	defer d.Close()
	names, err := d.List()
	if err != nil || len(names) > 0 {
		return err
	}
	lock, err := d.Lock()
	if err != nil {
		return err
	}
	defer lock.Close()
	if err := d.root.Remove(lockName); err != nil {
		return err
	}
	if err := os.Remove(path); err != nil && !errors.Is(err, unix.ENOTEMPTY) && !errors.Is(err, unix.EBUSY) {
		return err
	}
	return syncParent(path)
}

// Path returns the path the directory was opened with.
func (d *Dir) Path() string { return d.path }

// Close releases the directory.
func (d *Dir) Close() error { return d.root.Close() }

func (d *Dir) Create(name string) (File, error) {
	return d.open("create", name, os.O_RDWR|os.O_CREATE|os.O_EXCL)
}

func (d *Dir) Open(name string) (File, error) {
	return d.open("open", name, os.O_RDWR)
}

func (d *Dir) open(op, name string, flag int) (File, error) {
	if err := checkName(op, name); err != nil {
		return nil, err
	}
	f, err := d.root.OpenFile(name, flag, 0o600)
	if err != nil {
		return nil, err
	}
	raw, err := f.SyscallConn()
	if err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return &dirFile{dir: d.root, name: name, f: f, raw: raw}, nil
}

func (d *Dir) Remove(name string) error {
	if err := checkName("remove", name); err != nil {
		return err
	}
	return d.root.Remove(name)
}

func (d *Dir) Rename(oldName, newName string) error {
	if err := errors.Join(checkName("rename", oldName), checkName("rename", newName)); err != nil {
		return err
	}
	return d.root.Rename(oldName, newName)
}

func (d *Dir) List() ([]string, error) {
	f, err := d.root.Open(".")
	if err != nil {
		return nil, err
	}
	defer f.Close()
	names, err := f.Readdirnames(-1)
	if err != nil {
		return nil, err
	}
	slices.Sort(names)
	return slices.DeleteFunc(names, func(n string) bool { return n == lockName }), nil
}

func (d *Dir) SyncDir() error {
	f, err := d.root.Open(".")
	if err != nil {
		return err
	}
	return errors.Join(f.Sync(), f.Close())
}

// Free returns how many bytes the host has left for this directory.
func (d *Dir) Free() (int64, error) {
	f, err := d.root.Open(".")
	if err != nil {
		return 0, err
	}
	defer f.Close()
	raw, err := f.SyscallConn()
	if err != nil {
		return 0, err
	}
	var st unix.Statfs_t
	err = control(raw, "statfs", ".", func(fd int) error { return unix.Fstatfs(fd, &st) })
	return int64(st.Bavail) * st.Bsize, err
}

// Lock is a flock(2) on the file LOCK of the directory.
func (d *Dir) Lock() (io.Closer, error) {
	f, err := d.root.OpenFile(lockName, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, err
	}
	raw, err := f.SyscallConn()
	if err != nil {
		return nil, errors.Join(err, f.Close())
	}
	err = control(raw, "flock", lockName, func(fd int) error {
		return unix.Flock(fd, unix.LOCK_EX|unix.LOCK_NB)
	})
	if errors.Is(err, unix.EWOULDBLOCK) {
		err = fmt.Errorf("%w: %s", ErrLocked, d.path)
	}
	if err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return f, nil
}

// dirFile is a file of a Dir. os.File keeps the descriptor alive while a call
// runs, so that a Close beside it cannot hit a reused number, and repeats
// interrupted and short calls.
type dirFile struct {
	dir    *os.Root
	name   string
	f      *os.File
	raw    syscall.RawConn
	direct directWriter
	waits  reopened // of Evict
}

func (f *dirFile) ReadAt(p []byte, off int64) (int, error)  { return f.f.ReadAt(p, off) }
func (f *dirFile) WriteAt(p []byte, off int64) (int, error) { return f.f.WriteAt(p, off) }
func (f *dirFile) Close() error                             { return errors.Join(f.f.Close(), f.direct.close(), f.waits.close()) }
func (f *dirFile) Truncate(size int64) error                { return f.f.Truncate(size) }

func (f *dirFile) Size() (int64, error) {
	fi, err := f.f.Stat()
	if err != nil {
		return 0, err
	}
	return fi.Size(), nil
}

func (f *dirFile) Allocate(off, n int64) error {
	before, err := f.Size()
	if err != nil {
		return err
	}
	err = f.control("fallocate", func(fd int) error { return unix.Fallocate(fd, 0, off, n) })
	if errors.Is(err, unix.EOPNOTSUPP) {
		err = f.extend(before, off+n)
	}
	if err == nil {
		return nil
	}
	// What has been grown before the host was found to be full goes back.
	if after, serr := f.Size(); serr == nil && after > before {
		err = errors.Join(err, f.Truncate(before))
	}
	return err
}

// extend writes zeros from the end of the file up to end: what Allocate does
// on a host without fallocate. Such a host does not punch holes either, so
// everything before the end has its space already.
func (f *dirFile) extend(from, end int64) error {
	zeros := make([]byte, 1<<20)
	for from < end {
		n, err := f.f.WriteAt(zeros[:min(int64(len(zeros)), end-from)], from)
		if err != nil {
			return err
		}
		from += int64(n)
	}
	return nil
}

func (f *dirFile) PunchHole(off, n int64) error {
	err := f.control("punch", func(fd int) error {
		return unix.Fallocate(fd, unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, off, n)
	})
	if errors.Is(err, unix.EOPNOTSUPP) {
		return nil
	}
	return err
}

func (f *dirFile) Datasync() error { return f.control("fdatasync", unix.Fdatasync) }

func (f *dirFile) WriteBehind(off, n int64) {
	// Advice: the errors of the writes it starts belong to Datasync.
	_ = f.control("sync_file_range", func(fd int) error {
		return unix.SyncFileRange(fd, off, n, unix.SYNC_FILE_RANGE_WRITE)
	})
}

func (f *dirFile) ReadAhead(off, n int64) {
	// Advice: the errors of the reads it starts belong to those that follow.
	_ = f.control("fadvise", func(fd int) error {
		return unix.Fadvise(fd, off, n, unix.FADV_WILLNEED)
	})
}

// Evict waits with a descriptor of its own: an error of writing back is told
// once to each, and that of this one must be left for Datasync.
func (f *dirFile) Evict(off, n int64) {
	if file := f.waits.of(f, 0); file != nil {
		if raw, err := file.SyscallConn(); err == nil {
			const wait = unix.SYNC_FILE_RANGE_WAIT_BEFORE | unix.SYNC_FILE_RANGE_WRITE | unix.SYNC_FILE_RANGE_WAIT_AFTER
			_ = control(raw, "sync_file_range", f.name, func(fd int) error {
				return unix.SyncFileRange(fd, off, n, wait)
			})
		}
	}
	_ = f.control("fadvise", func(fd int) error {
		return unix.Fadvise(fd, off, n, unix.FADV_DONTNEED)
	})
}

func (f *dirFile) control(op string, call func(fd int) error) error {
	return control(f.raw, op, f.name, call)
}

// control runs call on the descriptor, again when a signal interrupts it.
func control(raw syscall.RawConn, op, name string, call func(fd int) error) error {
	var err error
	cerr := raw.Control(func(fd uintptr) {
		for {
			if err = call(int(fd)); !errors.Is(err, unix.EINTR) {
				return
			}
		}
	})
	if cerr != nil {
		err = fs.ErrClosed // its only reason
	}
	if err != nil {
		return &fs.PathError{Op: op, Path: name, Err: err}
	}
	return nil
}

// checkName accepts plain file names. The name of the lock file is taken.
func checkName(op, name string) error {
	if name == "" || name == "." || name == ".." || name == lockName || strings.ContainsAny(name, "/\x00") {
		return &fs.PathError{Op: op, Path: name, Err: fs.ErrInvalid}
	}
	return nil
}
