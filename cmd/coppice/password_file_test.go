package main

import (
	"context"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"coppice/internal/login"
	"coppice/internal/vfs"
)

// passwordWorld is a data directory whose verifier is of another password than the file has, though it is remembered as
// the one of the file: a start that keeps it has not compared them.
type passwordWorld struct {
	*testing.T
	dir  *vfs.Dir
	file string
}

const givenPassword = "given"

// Verifiers of other passwords than that, cheap to compare with.
const (
	otherVerifier = "$argon2id$v=19$m=8,t=1,p=1$b3RoZXI$AAAAAAAAAAAAAAAAAAAAAA"
	laterVerifier = "$argon2id$v=19$m=8,t=1,p=1$bGF0ZXI$AAAAAAAAAAAAAAAAAAAAAA"
)

func newPasswordWorld(t *testing.T) *passwordWorld {
	dir, err := vfs.CreateDir(filepath.Join(t.TempDir(), "data"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = dir.Close() })
	w := &passwordWorld{T: t, dir: dir, file: filepath.Join(t.TempDir(), "password")}
	w.write(givenPassword)
	w.remember()
	return w
}

func (w *passwordWorld) write(password string) {
	w.Helper()
	if err := os.WriteFile(w.file, []byte(password+"\n"), 0o600); err != nil {
		w.Fatal(err)
	}
}

// remember makes the present state of the file that of the verifier.
func (w *passwordWorld) remember() {
	w.Helper()
	from, err := readPasswordFile(w.file)
	if err != nil {
		w.Fatal(err)
	}
	p := rootPassword{verifier: otherVerifier, compared: from}
	if err := errors.Join(p.keep(w.dir), p.rememberNow(w.dir)); err != nil {
		w.Fatal(err)
	}
}

// compares reports whether a start compares the password in the file with the verifier.
func (w *passwordWorld) compares() bool {
	w.Helper()
	p, err := findPassword(w.dir, w.file)
	if err != nil {
		w.Fatal(err)
	}
	if compared := p.compared != nil; compared == p.kept || compared == (p.verifier == otherVerifier) {
		w.Fatalf("the start has %+v", p)
	}
	return p.compared != nil
}

func TestPasswordFileIsKnown(t *testing.T) {
	w := newPasswordWorld(t)
	if w.compares() {
		t.Fatal("a file that has not changed was compared with its verifier")
	}
	info, err := os.Stat(filepath.Join(w.dir.Path(), passwordSource))
	if err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("%v, %v; want mode 0600", info.Mode(), err)
	}
	when, err := os.Stat(w.file)
	if err != nil {
		t.Fatal(err)
	}
	for name, change := range map[string]func() error{
		"touched":  func() error { return os.Chtimes(w.file, time.Time{}, time.Now().Add(time.Hour)) },
		"the mode": func() error { return os.Chmod(w.file, 0o400) },
		"replaced by one of the same time": func() error {
			other := w.file + ".new"
			return errors.Join(os.WriteFile(other, []byte(givenPassword+"\n"), 0o600),
				os.Chtimes(other, time.Time{}, when.ModTime()), os.Rename(other, w.file))
		},
		"another verifier, as after session.change_password": func() error {
			return savePassword(w.dir)("root", laterVerifier)
		},
		"the note is damaged": func() error { return writeSmall(w.dir, passwordSource, "verifier=") },
		"the note is lost":    func() error { return w.dir.Remove(passwordSource) },
	} {
		if err := change(); err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		if !w.compares() {
			t.Errorf("%s: the file was not compared with the verifier", name)
		}
		w.remember()
	}
	if err := os.Truncate(w.file, 0); err != nil {
		t.Fatal(err)
	}
	if _, err := findPassword(w.dir, w.file); err == nil {
		t.Error("an empty file was accepted for one that is known")
	}
}

// TestPasswordFileIsNotRemembered has files of which nothing can be said.
func TestPasswordFileIsNotRemembered(t *testing.T) {
	w := newPasswordWorld(t)
	if err := w.dir.Remove(passwordSource); err != nil {
		t.Fatal(err)
	}
	unknown := func(name string, p rootPassword) {
		t.Helper()
		if err := p.rememberNow(w.dir); err != nil {
			t.Errorf("%s: %v", name, err)
		}
		if _, err := readSmall(w.dir, passwordSource); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("%s: it was remembered, %v", name, err)
		}
	}
	before, err := readPasswordFile(w.file)
	if err != nil {
		t.Fatal(err)
	}
	w.write("later")
	unknown("changed since it was read", rootPassword{verifier: otherVerifier, compared: before})

	now, err := readPasswordFile(w.file)
	if err != nil {
		t.Fatal(err)
	}
	now.password = givenPassword
	unknown("changed within a step of the clock", rootPassword{verifier: otherVerifier, compared: now})

	now.changed = time.Now().Add(time.Hour)
	ctx, stop := context.WithCancel(t.Context())
	stop()
	for name, changed := range map[string]time.Time{"from the future": now.changed, "the server stops": time.Now()} {
		now.password, now.changed = "later", changed
		if err := (rootPassword{verifier: otherVerifier, compared: now}).remember(ctx, w.dir); err != nil {
			t.Errorf("%s: %v", name, err)
		}
		if _, err := readSmall(w.dir, passwordSource); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("%s: it was remembered, %v", name, err)
		}
	}
}

func TestPasswordFromAPipe(t *testing.T) {
	w := newPasswordWorld(t)
	if err := errors.Join(os.Remove(w.file), unix.Mkfifo(w.file, 0o600)); err != nil {
		t.Fatal(err)
	}
	written := make(chan error, 1)
	go func() { written <- os.WriteFile(w.file, []byte(givenPassword+"\n"), 0o600) }()
	p, err := findPassword(w.dir, w.file)
	if err != nil || !login.Matches(p.verifier, givenPassword) || p.compared.state != "" {
		t.Errorf("%+v, %v", p, err)
	}
	if err := <-written; err != nil {
		t.Error(err)
	}
	if err := p.remember(t.Context(), w.dir); err != nil { // and it does not read the pipe once more
		t.Error(err)
	}
}
