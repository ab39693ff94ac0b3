package vfs

import (
	"errors"
	"io"
	"path"
	"slices"
	"sync"
)

// Op names an operation of [FS] or [File] to the wrappers of this package.
type Op string

// The operations. Size, Close, WriteBehind, ReadAhead and Evict cannot fail in
// a way that matters and are not among them.
const (
	OpCreate   Op = "create"
	OpOpen     Op = "open"
	OpRemove   Op = "remove"
	OpRename   Op = "rename"
	OpList     Op = "list"
	OpSyncDir  Op = "syncdir"
	OpLock     Op = "lock"
	OpRead     Op = "read"
	OpWrite    Op = "write"
	OpTruncate Op = "truncate"
	OpAllocate Op = "allocate"
	OpPunch    Op = "punch"
	OpDatasync Op = "datasync"
)

// Call is one call that is about to be made.
type Call struct {
	Op   Op
	Name string // the file; the old name of a rename; "" for the directory
	To   string // the new name of a rename
	Off  int64  // bytes; the new size of a truncate
	Len  int64  // bytes; of a datasync 0, or what a WriteSync makes durable
}

// ShortWrite, returned by the hook of an [Inject] for a write, lets the first
// N bytes through before the write fails with Err.
type ShortWrite struct {
	N   int
	Err error
}

func (e *ShortWrite) Error() string { return "short write: " + e.Err.Error() }
func (e *ShortWrite) Unwrap() error { return e.Err }

// Inject makes calls fail. A hook sees every call before it is made; the
// error it returns, if any, is the call's result and the call is not made.
// The hook may be entered by several goroutines at once and may use the
// wrapped directory, say to take a crash clone of it at that point. A WriteSync
// is two calls to it, a write and then a datasync of the same range.
//
// A failing Datasync on a [Mem] does what a real one does: of each sector
// some version reaches the device, the cache goes on showing the newest, and
// a later Datasync succeeds without writing it again.
type Inject struct {
	fs     FS
	choose Choose
	hook   func(Call) error
}

var (
	_ FS   = (*Inject)(nil)
	_ File = (*injectFile)(nil)
)

// NewInject wraps fs. choose decides what failed syncs leave on the device;
// nil is nothing.
func NewInject(fs FS, choose Choose, hook func(Call) error) *Inject {
	if choose == nil {
		choose = func(int) int { return 0 }
	}
	return &Inject{fs: fs, choose: choose, hook: hook}
}

func (i *Inject) Create(name string) (File, error) {
	if err := i.hook(Call{Op: OpCreate, Name: name}); err != nil {
		return nil, err
	}
	return i.file(name)(i.fs.Create(name))
}

func (i *Inject) Open(name string) (File, error) {
	if err := i.hook(Call{Op: OpOpen, Name: name}); err != nil {
		return nil, err
	}
	return i.file(name)(i.fs.Open(name))
}

func (i *Inject) file(name string) func(File, error) (File, error) {
	return func(f File, err error) (File, error) {
		if err != nil {
			return nil, err
		}
		return &injectFile{File: f, i: i, name: name}, nil
	}
}

func (i *Inject) Remove(name string) error {
	if err := i.hook(Call{Op: OpRemove, Name: name}); err != nil {
		return err
	}
	return i.fs.Remove(name)
}

func (i *Inject) Rename(oldName, newName string) error {
	if err := i.hook(Call{Op: OpRename, Name: oldName, To: newName}); err != nil {
		return err
	}
	return i.fs.Rename(oldName, newName)
}

func (i *Inject) List() ([]string, error) {
	if err := i.hook(Call{Op: OpList}); err != nil {
		return nil, err
	}
	return i.fs.List()
}

func (i *Inject) SyncDir() error {
	if err := i.hook(Call{Op: OpSyncDir}); err != nil {
		return err
	}
	return i.fs.SyncDir()
}

func (i *Inject) Lock() (io.Closer, error) {
	if err := i.hook(Call{Op: OpLock}); err != nil {
		return nil, err
	}
	return i.fs.Lock()
}

type injectFile struct {
	File
	i    *Inject
	name string
}

func (f *injectFile) ReadAt(p []byte, off int64) (int, error) {
	if err := f.i.hook(Call{Op: OpRead, Name: f.name, Off: off, Len: int64(len(p))}); err != nil {
		return 0, err
	}
	return f.File.ReadAt(p, off)
}

func (f *injectFile) WriteAt(p []byte, off int64) (int, error) {
	err := f.i.hook(Call{Op: OpWrite, Name: f.name, Off: off, Len: int64(len(p))})
	if short, ok := errors.AsType[*ShortWrite](err); ok {
		n, werr := f.File.WriteAt(p[:min(short.N, len(p))], off)
		return n, errors.Join(werr, err)
	}
	if err != nil {
		return 0, err
	}
	return f.File.WriteAt(p, off)
}

func (f *injectFile) Truncate(size int64) error {
	if err := f.i.hook(Call{Op: OpTruncate, Name: f.name, Off: size}); err != nil {
		return err
	}
	return f.File.Truncate(size)
}

func (f *injectFile) Allocate(off, n int64) error {
	if err := f.i.hook(Call{Op: OpAllocate, Name: f.name, Off: off, Len: n}); err != nil {
		return err
	}
	return f.File.Allocate(off, n)
}

func (f *injectFile) PunchHole(off, n int64) error {
	if err := f.i.hook(Call{Op: OpPunch, Name: f.name, Off: off, Len: n}); err != nil {
		return err
	}
	return f.File.PunchHole(off, n)
}

func (f *injectFile) Datasync() error {
	if err := f.i.hook(Call{Op: OpDatasync, Name: f.name}); err != nil {
		f.failDatasync(f.i.choose)
		return err
	}
	return f.File.Datasync()
}

// WriteSync lets the hook see the time between the write and its end.
func (f *injectFile) WriteSync(p []byte, off int64) error {
	call := Call{Op: OpWrite, Name: f.name, Off: off, Len: int64(len(p))}
	err := f.i.hook(call)
	if short, ok := errors.AsType[*ShortWrite](err); ok {
		_, werr := f.File.WriteAt(p[:min(short.N, len(p))], off)
		return errors.Join(werr, err)
	}
	if err != nil {
		return err
	}
	call.Op = OpDatasync
	if s, ok := f.File.(simulated); ok {
		return s.writeSync(p, off, f.i.choose, func() error { return f.i.hook(call) })
	}
	if err := f.i.hook(call); err != nil {
		return err
	}
	return f.File.WriteSync(p, off)
}

// simulated is a file that can act out a sync that fails, and a WriteSync step
// by step.
type simulated interface {
	failDatasync(Choose)
	writeSync(p []byte, off int64, choose Choose, sync func() error) error
}

func (f *injectFile) failDatasync(choose Choose) {
	if s, ok := f.File.(simulated); ok {
		s.failDatasync(choose)
	}
}

// Fault is a hook that fails the Nth call (from 1) of those that match, and
// with Sticky all later ones as well. A zero Nth never fails and only counts.
// It is safe for concurrent use; the fields are set before.
type Fault struct {
	Ops    []Op   // empty: every operation
	Name   string // a path.Match pattern for Call.Name; "": every name
	Nth    int
	Sticky bool
	Err    error // a *ShortWrite lets part of a write through

	mu    sync.Mutex
	calls int // matching calls so far
}

// Hook is the hook for [NewInject].
func (f *Fault) Hook(c Call) error {
	if len(f.Ops) > 0 && !slices.Contains(f.Ops, c.Op) {
		return nil
	}
	if f.Name != "" {
		if ok, err := path.Match(f.Name, c.Name); err != nil || !ok {
			return err
		}
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	f.calls++
	if f.Nth > 0 && (f.calls == f.Nth || f.Sticky && f.calls > f.Nth) {
		return f.Err
	}
	return nil
}

// Calls returns the number of matching calls so far. A sweep over every call
// ends when it is below Nth after a run.
func (f *Fault) Calls() int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.calls
}
