package vfs

import (
	"errors"
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
	reopened
	refuse atomic.Bool // the host has a descriptor for direct writes and takes none
}

// write reports whether the host takes such a write; false is one that has
// not happened.
func (d *directWriter) write(f *dirFile, p []byte, off int64) (taken bool, err error) {
	if d.refuse.Load() || !isAligned(p, off) {
		return false, nil
	}
	file := d.of(f, unix.O_DIRECT|unix.O_DSYNC)
	if file == nil {
		return false, nil
	}
	_, err = file.WriteAt(p, off)
	if errors.Is(err, syscall.EINVAL) || errors.Is(err, syscall.EOPNOTSUPP) {
		d.refuse.Store(true)
		return false, nil
	}
	return true, err
}

func (f *dirFile) WriteSync(p []byte, off int64) error {
	if taken, err := f.direct.write(f, p, off); taken {
		return err
	}
	if _, err := f.WriteAt(p, off); err != nil {
		return err
	}
	return f.Datasync()
}
