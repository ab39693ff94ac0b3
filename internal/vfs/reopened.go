package vfs

import (
	"os"
	"sync"
)

// reopened is a further descriptor of a file, made when it is first needed: the
// flags, and which errors of writing back have been told, are a descriptor's own.
type reopened struct {
	once sync.Once
	file *os.File // nil: there is none
}

// of returns the descriptor, opened for reading and writing with further flags,
// or nil when there is none: where the host has no such flags, when the
// directory has been closed, or when something else has the name of f.
func (r *reopened) of(f *dirFile, flags int) *os.File {
	r.once.Do(func() {
		file, err := f.dir.OpenFile(f.name, os.O_RDWR|flags, 0)
		if err != nil {
			return
		}
		was, err := f.f.Stat()
		if err == nil {
			var is os.FileInfo
			if is, err = file.Stat(); err == nil && os.SameFile(was, is) {
				r.file = file
				return
			}
		}
		_ = file.Close() // nothing has been written
	})
	return r.file
}

// close closes what has been opened, and nothing is opened later.
func (r *reopened) close() error {
	r.once.Do(func() {})
	if r.file == nil {
		return nil
	}
	return r.file.Close()
}
