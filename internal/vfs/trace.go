package vfs

import (
	"fmt"
	"io"
	"sync"
)

// Trace records what is done to a directory and its files, one line per
// call in the order in which the calls ended, such as
//
//	create log
//	allocate log 0+65536
//	write log 0+4096
//	datasync log
//	syncdir
//
// Reads, ReadAhead, Size, List and WriteBehind leave no trace. The line of a
// call that failed ends with its error.
type Trace struct {
	fs FS

	mu sync.Mutex
	w  io.Writer // guarded by mu
}

var (
	_ FS   = (*Trace)(nil)
	_ File = (*traceFile)(nil)
)

// NewTrace wraps fs and writes the lines to w.
func NewTrace(fs FS, w io.Writer) *Trace { return &Trace{fs: fs, w: w} }

// log writes one line and returns err.
func (t *Trace) log(err error, format string, args ...any) error {
	line := fmt.Sprintf(format, args...)
	if err != nil {
		line += ": " + err.Error()
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	_, _ = fmt.Fprintln(t.w, line)
	return err
}

func (t *Trace) Create(name string) (File, error) { return t.file("create", name, t.fs.Create) }
func (t *Trace) Open(name string) (File, error)   { return t.file("open", name, t.fs.Open) }

func (t *Trace) file(op, name string, open func(string) (File, error)) (File, error) {
	f, err := open(name)
	if t.log(err, "%s %s", op, name) != nil {
		return nil, err
	}
	return &traceFile{File: f, t: t, name: name}, nil
}

func (t *Trace) Remove(name string) error { return t.log(t.fs.Remove(name), "remove %s", name) }

func (t *Trace) Rename(oldName, newName string) error {
	return t.log(t.fs.Rename(oldName, newName), "rename %s %s", oldName, newName)
}

func (t *Trace) List() ([]string, error) { return t.fs.List() }
func (t *Trace) SyncDir() error          { return t.log(t.fs.SyncDir(), "syncdir") }

func (t *Trace) Lock() (io.Closer, error) {
	c, err := t.fs.Lock()
	if t.log(err, "lock") != nil {
		return nil, err
	}
	return &traceLock{c: c, t: t}, nil
}

type traceLock struct {
	c io.Closer
	t *Trace
}

func (l *traceLock) Close() error { return l.t.log(l.c.Close(), "unlock") }

type traceFile struct {
	File
	t    *Trace
	name string
}

func (f *traceFile) WriteAt(p []byte, off int64) (int, error) {
	n, err := f.File.WriteAt(p, off)
	return n, f.t.log(err, "write %s %d+%d", f.name, off, len(p))
}

func (f *traceFile) Truncate(size int64) error {
	return f.t.log(f.File.Truncate(size), "truncate %s %d", f.name, size)
}

func (f *traceFile) Allocate(off, n int64) error {
	return f.t.log(f.File.Allocate(off, n), "allocate %s %d+%d", f.name, off, n)
}

func (f *traceFile) PunchHole(off, n int64) error {
	return f.t.log(f.File.PunchHole(off, n), "punch %s %d+%d", f.name, off, n)
}

func (f *traceFile) Datasync() error { return f.t.log(f.File.Datasync(), "datasync %s", f.name) }

func (f *traceFile) WriteSync(p []byte, off int64) error {
	return f.t.log(f.File.WriteSync(p, off), "writesync %s %d+%d", f.name, off, len(p))
}

func (f *traceFile) Evict(off, n int64) {
	f.File.Evict(off, n)
	_ = f.t.log(nil, "evict %s %d+%d", f.name, off, n)
}

func (f *traceFile) Close() error { return f.t.log(f.File.Close(), "close %s", f.name) }

func (f *traceFile) failDatasync(choose Choose) {
	if s, ok := f.File.(simulated); ok {
		s.failDatasync(choose)
	}
}

func (f *traceFile) writeSync(p []byte, off int64, choose Choose, sync func() error) error {
	var err error
	if s, ok := f.File.(simulated); ok {
		err = s.writeSync(p, off, choose, sync)
	} else if err = sync(); err == nil {
		err = f.File.WriteSync(p, off)
	}
	return f.t.log(err, "writesync %s %d+%d", f.name, off, len(p))
}
