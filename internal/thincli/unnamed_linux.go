package thincli

import (
	"os"
	"path/filepath"
	"strconv"

	"golang.org/x/sys/unix"
)

// unnamedFile is a new file that has no name yet: whatever ends the process
// before link, nothing is left of it.
type unnamedFile struct {
	*os.File          // says the name it is to have
	dir      *os.File // where that will be
}

// createUnnamed makes a file that is to be at path. It fails where the file system
// has none without a name (O_TMPFILE), and where link would not find it: without /proc.
func createUnnamed(path string) (*unnamedFile, error) {
	dir, err := os.Open(filepath.Dir(path))
	if err != nil {
		return nil, err
	}
	fd, err := unix.Openat(int(dir.Fd()), ".", unix.O_TMPFILE|unix.O_WRONLY|unix.O_CLOEXEC, 0o600)
	if err != nil {
		dir.Close()
		return nil, os.NewSyscallError("openat", err)
	}
	u := &unnamedFile{os.NewFile(uintptr(fd), path), dir}
	if _, err := os.Stat(u.magicLink()); err != nil {
		u.Close()
		dir.Close()
		return nil, err
	}
	return u, nil
}

// magicLink is a name of the open file in /proc (proc_pid_fd(5)).
func (u *unnamedFile) magicLink() string { return "/proc/self/fd/" + strconv.Itoa(int(u.Fd())) }

// link gives the file its name, with a suffix, in the directory of then, wherever that
// is now. If there is such a name already, the error is an fs.ErrExist.
func (u *unnamedFile) link(suffix string) error {
	// AT_EMPTY_PATH would do without /proc, but takes a privilege before Linux 6.10.
	err := unix.Linkat(unix.AT_FDCWD, u.magicLink(), int(u.dir.Fd()), filepath.Base(u.Name())+suffix, unix.AT_SYMLINK_FOLLOW)
	return os.NewSyscallError("linkat", err)
}

// syncDir makes the name durable.
func (u *unnamedFile) syncDir() error { return u.dir.Sync() }

func (u *unnamedFile) closeDir() { u.dir.Close() }
