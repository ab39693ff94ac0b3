// Package users keeps the accounts of a server in one small file: who may log in, with which roles, and the verifier
// of each password. It hides how the file is written and shared. It knows nothing of sessions, of what roles allow, or
// of how a password is verified.
//
// # Format
//
// A JSON document, mode 0600, which is replaced as a whole:
//
//	{"version": 1, "users": [{"name": "alice", "uuid": "…", "roles": ["vm-admin"], "verifier": "$argon2id$…"}]}
//
// A file of another version is refused.
//
// # Sharing
//
// The server and the command line may use the file at the same time: a change happens under the lock of a second
// file, NAME.lock, and ends with a rename, so that readers need no lock and a crash leaves the old users or the new.
package users

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"

	"golang.org/x/sys/unix"
)

// version is what we write and the newest that we read.
const version = 1

// maxFile bounds the file, in bytes.
const maxFile = 16 << 20

// User is one account.
type User struct {
	Name        string            `json:"name"`
	UUID        string            `json:"uuid"`
	Roles       []string          `json:"roles"`
	Verifier    string            `json:"verifier,omitempty"` // empty: cannot log in yet
	OtherConfig map[string]string `json:"other_config,omitempty"`
}

var (
	// ErrExists says that there is a user of the name already.
	ErrExists = errors.New("users: the user exists")
	// ErrNotFound says that there is no such user.
	ErrNotFound = errors.New("users: no such user")
	// ErrName says that a name cannot be one.
	ErrName = errors.New("users: a name has 1 to 256 bytes of printable text, no space at its ends, and is not root")
)

// ValidName says whether a name can be one: nil or ErrName.
func ValidName(name string) error {
	if name == "" || len(name) > 256 || name == "root" || !utf8.ValidString(name) || strings.TrimSpace(name) != name ||
		strings.ContainsFunc(name, func(r rune) bool { return !unicode.IsPrint(r) }) {
		return fmt.Errorf("%w: %q", ErrName, name)
	}
	return nil
}

// Stamp tells versions of the file apart. The zero Stamp is that of no file.
type Stamp struct {
	inode uint64
	size  int64
	at    time.Time
}

// File is the file. It is safe for concurrent use, also by several processes.
type File struct{ path string }

// At returns the file of that path, which need not exist: then there are no users.
func At(path string) *File { return &File{path} }

// document is the whole file.
type document struct {
	Version int    `json:"version"`
	Users   []User `json:"users"`
}

// Stamp returns the stamp of the file as it is now.
func (f *File) Stamp() (Stamp, error) {
	var st unix.Stat_t
	err := unix.Stat(f.path, &st)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return Stamp{}, nil
	case err != nil:
		return Stamp{}, &fs.PathError{Op: "stat", Path: f.path, Err: err}
	}
	return Stamp{st.Ino, st.Size, time.Unix(st.Mtim.Unix())}, nil
}

// Load returns the users in the order of their names, and a stamp that is not newer than they are.
func (f *File) Load() ([]User, Stamp, error) {
	stamp, err := f.Stamp()
	if err != nil {
		return nil, stamp, err
	}
	if stamp == (Stamp{}) {
		return nil, stamp, nil
	}
	if stamp.size > maxFile {
		return nil, stamp, fmt.Errorf("users: %s has %d bytes, %d are the most", f.path, stamp.size, maxFile)
	}
	data, err := os.ReadFile(f.path)
	if err != nil {
		return nil, stamp, err
	}
	list, err := decode(data)
	if err != nil {
		return nil, stamp, fmt.Errorf("users: %s: %w", f.path, err)
	}
	return list, stamp, nil
}

func decode(data []byte) ([]User, error) {
	var d document
	if err := json.Unmarshal(data, &d); err != nil {
		return nil, err
	}
	if d.Version != version {
		return nil, fmt.Errorf("format version %d is not known, only %d", d.Version, version)
	}
	slices.SortFunc(d.Users, func(x, y User) int { return strings.Compare(x.Name, y.Name) })
	for i, u := range d.Users {
		if err := ValidName(u.Name); err != nil {
			return nil, err
		}
		if i > 0 && d.Users[i-1].Name == u.Name {
			return nil, fmt.Errorf("%w: %q is there twice", ErrExists, u.Name)
		}
	}
	return d.Users, nil
}

// Add adds a user: ErrExists or ErrName when that cannot be.
func (f *File) Add(u User) error {
	if err := ValidName(u.Name); err != nil {
		return err
	}
	return f.update(func(list []User) ([]User, error) {
		if find(list, u.Name) >= 0 {
			return nil, fmt.Errorf("%w: %q", ErrExists, u.Name)
		}
		return append(list, u), nil
	})
}

// Remove removes a user: ErrNotFound when there is none.
func (f *File) Remove(name string) error {
	return f.update(func(list []User) ([]User, error) {
		i := find(list, name)
		if i < 0 {
			return nil, fmt.Errorf("%w: %q", ErrNotFound, name)
		}
		return slices.Delete(list, i, i+1), nil
	})
}

// Change changes a user: ErrNotFound when there is none. An error of change leaves the file as it is. The name and
// the uuid of a user stay.
func (f *File) Change(name string, change func(*User) error) error {
	return f.update(func(list []User) ([]User, error) {
		i := find(list, name)
		if i < 0 {
			return nil, fmt.Errorf("%w: %q", ErrNotFound, name)
		}
		u := list[i]
		if err := change(&u); err != nil {
			return nil, err
		}
		u.Name, u.UUID = list[i].Name, list[i].UUID
		list[i] = u
		return list, nil
	})
}

func find(list []User, name string) int {
	return slices.IndexFunc(list, func(u User) bool { return u.Name == name })
}

// update replaces the users under the lock.
func (f *File) update(change func([]User) ([]User, error)) (err error) {
	lock, err := os.OpenFile(f.path+".lock", os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, lock.Close()) }() // which unlocks it
	if err := unix.Flock(int(lock.Fd()), unix.LOCK_EX); err != nil {
		return &fs.PathError{Op: "lock", Path: lock.Name(), Err: err}
	}
	list, _, err := f.Load()
	if err != nil {
		return err
	}
	if list, err = change(list); err != nil {
		return err
	}
	slices.SortFunc(list, func(x, y User) int { return strings.Compare(x.Name, y.Name) })
	data, err := json.MarshalIndent(document{version, list}, "", "  ")
	if err != nil {
		return err
	}
	if len(data) > maxFile {
		return fmt.Errorf("users: %s would have %d bytes, %d are the most", f.path, len(data), maxFile)
	}
	return f.replace(append(data, '\n'))
}

// replace replaces the file durably. What is left of an earlier attempt is overwritten; the lock is held.
func (f *File) replace(data []byte) (err error) {
	tmp, err := os.OpenFile(f.path+".new", os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return err
	}
	_, err = tmp.Write(data)
	if err == nil {
		err = tmp.Sync()
	}
	if err = errors.Join(err, tmp.Close()); err != nil {
		return errors.Join(err, os.Remove(tmp.Name()))
	}
	if err := os.Rename(tmp.Name(), f.path); err != nil {
		return err
	}
	dir, err := os.Open(filepath.Dir(f.path))
	if err != nil {
		return err
	}
	return errors.Join(dir.Sync(), dir.Close())
}
