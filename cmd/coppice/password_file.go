package main

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"coppice/internal/vfs"
)

// passwordFrom is a file of the operator's with a password, as it was at one moment.
//
// To find out whether it has the password of a verifier costs as much as a guess is to cost whoever steals the
// verifier. So a start that has compared the two remembers the state of the file, and not the password in any form that
// would be cheaper to guess: a later start that finds the file in that state, beside that verifier, need not compare.
// All that writes to a file, or puts another in its place, changes its state; a new verifier, as from
// session.change_password, is not the one that is remembered.
type passwordFrom struct {
	path     string
	password string
	state    string    // what stat(2) says of it; "" when that does not tell whether it has changed
	changed  time.Time // the time of the last change, by the clock of its file system
}

// settled is how old the last change of a file must be for the next one to have another time: more than the step of the
// clock of any file system (2 s on FAT).
const settled = 3 * time.Second

// readPasswordFile reads a file that has one password, and no more than a line end after it.
func readPasswordFile(path string) (_ *passwordFrom, err error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	p := &passwordFrom{path: path}
	// Before it is read: a change meanwhile makes the state one that is not found again.
	if p.state, p.changed, err = fileState(f); err != nil {
		return nil, err
	}
	b, err := io.ReadAll(f)
	if err != nil {
		return nil, err
	}
	if p.password = strings.TrimRight(string(b), "\r\n"); p.password == "" {
		return nil, fmt.Errorf("%s is empty", path)
	}
	return p, nil
}

// fileState tells a state of a file from all others that it has had or will have, once it has settled. It is "" for what
// is no plain file, and in file systems of other programs (FUSE), which may say of any file what they like.
func fileState(f *os.File) (state string, changed time.Time, err error) {
	var st unix.Stat_t
	var system unix.Statfs_t
	if err := errors.Join(unix.Fstat(int(f.Fd()), &st), unix.Fstatfs(int(f.Fd()), &system)); err != nil {
		return "", time.Time{}, &os.PathError{Op: "stat", Path: f.Name(), Err: err}
	}
	changed = time.Unix(st.Ctim.Unix())
	if st.Mode&unix.S_IFMT != unix.S_IFREG || int64(system.Type) == unix.FUSE_SUPER_MAGIC || st.Ctim.Nano() <= 0 {
		return "", changed, nil
	}
	return fmt.Sprintf("dev=%d ino=%d size=%d mtime=%d ctime=%d", st.Dev, st.Ino, st.Size, st.Mtim.Nano(), st.Ctim.Nano()), changed, nil
}

// note is what passwordSource says when a verifier is of the password that the file has in its state.
func (p *passwordFrom) note(verifier string) string {
	return fmt.Sprintf("verifier=%x %s", sha256.Sum256([]byte(verifier)), p.state)
}

// gave reports whether an earlier start has found that verifier is of the password in the file.
func (p *passwordFrom) gave(dir vfs.FS, verifier string) bool {
	note, err := readSmall(dir, passwordSource)
	return err == nil && verifier != "" && p.state != "" && note == p.note(verifier)
}

// remember tells later starts which file has the password, when this start has found out: at once, or when the file has
// settled, if ctx does not end before. A file that has changed meanwhile is left to the next start. A crash leaves what
// was remembered before, or this.
func (r rootPassword) remember(ctx context.Context, dir vfs.FS) error {
	if r.compared == nil || r.compared.state == "" {
		return nil
	}
	wait := time.Until(r.compared.changed.Add(settled))
	if wait > settled {
		return nil // it is from the future: its clock says nothing about ours
	}
	timer := time.NewTimer(wait)
	defer timer.Stop()
	select {
	case <-timer.C:
		return r.rememberNow(dir)
	case <-ctx.Done():
		return nil
	}
}

// rememberNow is remember for a file that has settled.
func (r rootPassword) rememberNow(dir vfs.FS) error {
	now, err := readPasswordFile(r.compared.path) // what was read before may have been older than its state
	if err != nil || now.state != r.compared.state || now.password != r.compared.password {
		return err
	}
	return writeSmall(dir, passwordSource, now.note(r.verifier))
}
