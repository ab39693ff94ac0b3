package vfs

import (
	"errors"
	"os"
	"sync"
	"sync/atomic"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// directAlign is what the address, the offset and the length of a direct write
// are multiples of: no file system that has direct writes asks for more.
const directAlign = 4096

// Aligned returns n zero bytes at an address from which [File.WriteSync]
// writes without a copy.
func Aligned(n int) []byte {
	b := make([]byte, n+directAlign)
	skip := -int(uintptr(unsafe.Pointer(unsafe.SliceData(b)))) & (directAlign - 1)
	return b[skip : skip+n : skip+n]
}

func isAligned(p []byte, off int64) bool {
	return (uint64(uintptr(unsafe.Pointer(unsafe.SliceData(p))))|uint64(off)|uint64(len(p)))%directAlign == 0
}

// directWriter writes past the host's cache, each call durable when it
// returns: the device is asked once, where a write and a sync go through the
// cache, and wait for each other, with more of the processor.
//
// It has a descriptor of its own, which is opened by the first write, since
// reads and other writes of the same file go through the cache; the host
// drops what that has of a range that is written here.
type directWriter struct {
	once   sync.Once
	file   *os.File    // nil: there is none
	refuse atomic.Bool // the host has a descriptor for direct writes and takes none
}

// open opens the file of that name in root for direct writes if it is still
// the same as f. What fails means that there are none.
func (d *directWriter) open(root *os.Root, name string, f *os.File) {
	file, err := root.OpenFile(name, os.O_RDWR|unix.O_DIRECT|unix.O_DSYNC, 0)
	if err != nil {
		return // such as on a file system without, or after Close of the directory
	}
	was, err := f.Stat()
	if err == nil {
		var is os.FileInfo
		if is, err = file.Stat(); err == nil && os.SameFile(was, is) {
			d.file = file
			return
		}
	}
	_ = file.Close() // nothing has been written
}

// write reports whether the host takes such a write; false is one that has
// not happened.
func (d *directWriter) write(p []byte, off int64) (taken bool, err error) {
	if d.file == nil || d.refuse.Load() || !isAligned(p, off) {
		return false, nil
	}
	_, err = d.file.WriteAt(p, off)
	if errors.Is(err, syscall.EINVAL) || errors.Is(err, syscall.EOPNOTSUPP) {
		d.refuse.Store(true)
		return false, nil
	}
	return true, err
}

// close closes what has been opened, and nothing is opened later.
func (d *directWriter) close() error {
	d.once.Do(func() {})
	if d.file == nil {
		return nil
	}
	return d.file.Close()
}

func (f *dirFile) WriteSync(p []byte, off int64) error {
	f.direct.once.Do(func() { f.direct.open(f.dir, f.name, f.f) })
	if taken, err := f.direct.write(p, off); taken {
		return err
	}
	if _, err := f.WriteAt(p, off); err != nil {
		return err
	}
	return f.Datasync()
}
