package main

import (
	"crypto/rand"
	"errors"
	"fmt"
	"io/fs"
	"runtime"
	"strings"

	"coppice/internal/login"
	"coppice/internal/vfs"
)

// rootPassword is what a start knows of root's password.
type rootPassword struct {
	verifier string
	created  string        // the password itself, when this start made it up
	kept     bool          // the verifier is in the data directory already
	compared *passwordFrom // the operator's file, when its password has been compared with the verifier or made it
}

// findPassword takes the password from passwordPath when the operator names a
// file with it, else its verifier from the data directory. When there is
// neither it makes a password up. Nothing is written before keep: a start
// that fails later must not leave a password that nobody has seen.
func findPassword(dir vfs.FS, passwordPath string) (rootPassword, error) {
	verifier, err := readSmall(dir, passwordFile)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return rootPassword{}, err
	}
	if passwordPath != "" {
		from, err := readPasswordFile(passwordPath)
		if err != nil {
			return rootPassword{}, fmt.Errorf("--admin-password-file: %w", err)
		}
		if from.gave(dir, verifier) {
			return rootPassword{verifier: verifier, kept: true}, nil
		}
		defer runtime.GC() // see below
		if login.Matches(verifier, from.password) {
			return rootPassword{verifier: verifier, kept: true, compared: from}, nil
		}
		return rootPassword{verifier: login.Hash(from.password), compared: from}, nil
	}
	if verifier != "" {
		return rootPassword{verifier: verifier, kept: true}, nil
	}
	// To hash a password takes 64 MiB. The collector lets the heap grow by a multiple of what it finds in use, and is not
	// to find these.
	defer runtime.GC()
	created := newPassword()
	return rootPassword{verifier: login.Hash(created), created: created}, nil
}

// keep writes the verifier to the data directory, unless it came from there.
func (p rootPassword) keep(dir vfs.FS) error {
	if p.kept {
		return nil
	}
	return writeSmall(dir, passwordFile, p.verifier)
}

// newPassword makes up a password of 100 random bits that needs no quoting in
// a shell and no escaping in XE_EXTRA_ARGS.
func newPassword() string {
	s := strings.ToLower(rand.Text()[:20]) // 5 bits each
	return s[:5] + "-" + s[5:10] + "-" + s[10:15] + "-" + s[15:]
}
