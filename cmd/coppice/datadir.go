package main

import (
	"cmp"
	"errors"
	"flag"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"

	"coppice/internal/vfs"
)

// dataDir is the path of a data directory; its methods name what is inside.
type dataDir string

func (d dataDir) database() string     { return filepath.Join(string(d), "coppice.db") }
func (d dataDir) users() string        { return filepath.Join(string(d), "users.json") }
func (d dataDir) tls() string          { return filepath.Join(string(d), "tls") }
func (d dataDir) defaultStore() string { return filepath.Join(string(d), "store") }
func (d dataDir) socket() string       { return filepath.Join(string(d), "coppice.sock") }
func (d dataDir) nbdSocket() string    { return filepath.Join(string(d), "nbd.sock") }

// passwordFile is the name of the file with root's password verifier.
const passwordFile = "root.password"

// passwordSource is the name of the file that tells from which file of the operator's that verifier is.
const passwordSource = "root.password.source"

// dataFlag adds --data to the flags of a command. The value is for env.dataDir.
func dataFlag(flags *flag.FlagSet) *string {
	value := new(string)
	flags.Func("data", "data `directory` (default $XDG_STATE_HOME/coppice or ~/.local/state/coppice)", func(s string) error {
		if s == "" {
			return errors.New("it is empty, like the value of a variable that is not set")
		}
		*value = s
		return nil
	})
	return value
}

// dataDir is the directory that --data names; without the flag, "", it is the
// default place.
func (e env) dataDir(flagValue string) (dataDir, error) {
	if flagValue != "" {
		abs, err := filepath.Abs(flagValue)
		return dataDir(abs), err
	}
	state := e.getenv("XDG_STATE_HOME")
	if !filepath.IsAbs(state) {
		home := e.getenv("HOME")
		if home == "" {
			return "", &hinted{errors.New("no data directory: neither XDG_STATE_HOME nor HOME is set"), "name one with --data DIR"}
		}
		state = filepath.Join(home, ".local", "state")
	}
	return dataDir(filepath.Join(state, "coppice")), nil
}

// openDir opens the directory and takes its lock. The caller closes both,
// the lock first. With create a missing directory is made.
func (d dataDir) open(create bool) (*vfs.Dir, io.Closer, error) {
	open := vfs.OpenDir
	if create {
		open = vfs.CreateDir
	}
	dir, err := open(string(d))
	if err != nil {
		return nil, nil, d.explain(err)
	}
	lock, err := dir.Lock()
	if err != nil {
		return nil, nil, errors.Join(d.explain(err), dir.Close())
	}
	return dir, lock, nil
}

// explain adds to an error about the directory what can be done.
func (d dataDir) explain(err error) error {
	if errors.Is(err, vfs.ErrLocked) {
		return &hinted{lockedError{"data directory " + string(d)}, "A coppice server, or a tool, is using it. Stop it first, or use another directory with --data DIR."}
	}
	err = fmt.Errorf("data directory %s: %w", string(d), err)
	switch {
	case errors.Is(err, syscall.ENOTDIR):
		return &hinted{err, "Name a directory, or where one can be made, with --data DIR."}
	case errors.Is(err, fs.ErrNotExist):
		return &hinted{err, "\"coppice serve\" makes it where there is a directory to make it in; or name another one with --data DIR."}
	case errors.Is(err, fs.ErrPermission):
		return &hinted{err, fmt.Sprintf("User id %d may not write there. Change its owner, or use another directory with --data DIR.", os.Geteuid())}
	}
	return err
}

// lockedError is vfs.ErrLocked in words for people who know what is locked.
type lockedError struct{ what string }

func (e lockedError) Error() string { return e.what + " is in use by another process" }
func (e lockedError) Unwrap() error { return vfs.ErrLocked }

// readSmall returns the contents of a small file without the white space
// around them, "" and fs.ErrNotExist when there is none.
func readSmall(dir vfs.FS, name string) (_ string, err error) {
	f, err := dir.Open(name)
	if err != nil {
		return "", err
	}
	defer func() { err = cmp.Or(err, f.Close()) }()
	b, err := io.ReadAll(io.NewSectionReader(f, 0, 64<<10))
	return strings.TrimSpace(string(b)), err
}

// writeSmall replaces a small file durably: after a crash there is the old
// one or the new one.
func writeSmall(dir vfs.FS, name, contents string) error {
	tmp := name + ".new"
	if err := dir.Remove(tmp); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	f, err := dir.Create(tmp) // 0600
	if err != nil {
		return err
	}
	_, err = f.WriteAt([]byte(contents+"\n"), 0)
	if err == nil {
		err = f.Datasync()
	}
	if err = errors.Join(err, f.Close()); err != nil {
		return err
	}
	if err := dir.Rename(tmp, name); err != nil {
		return err
	}
	return dir.SyncDir()
}
