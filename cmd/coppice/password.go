package main

import (
	"crypto/rand"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strings"

	"coppice/internal/api"
	"coppice/internal/vfs"
)

// rootPassword returns the verifier of root's password. It comes from
// passwordPath when the operator names a file with the password in it, else
// from the data directory. When there is neither, a password is made up,
// kept as a verifier, and returned as created, to be shown this once.
func rootPassword(dir vfs.FS, passwordPath string) (verifier, created string, err error) {
	if passwordPath != "" {
		b, err := os.ReadFile(passwordPath)
		if err != nil {
			return "", "", fmt.Errorf("--admin-password-file: %w", err)
		}
		password := strings.TrimRight(string(b), "\r\n")
		if password == "" {
			return "", "", fmt.Errorf("--admin-password-file: %s is empty", passwordPath)
		}
		verifier, err = keepPassword(dir, password)
		return verifier, "", err
	}
	verifier, err = readSmall(dir, passwordFile)
	if err == nil && verifier != "" {
		return verifier, "", nil
	}
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return "", "", err
	}
	created = newPassword()
	verifier, err = keepPassword(dir, created)
	return verifier, created, err
}

func keepPassword(dir vfs.FS, password string) (verifier string, err error) {
	verifier = api.HashPassword(password)
	return verifier, writeSmall(dir, passwordFile, verifier)
}

// newPassword makes up a password of 100 random bits that needs no quoting in
// a shell and no escaping in XE_EXTRA_ARGS.
func newPassword() string {
	s := strings.ToLower(rand.Text()[:20]) // 5 bits each
	return s[:5] + "-" + s[5:10] + "-" + s[10:15] + "-" + s[15:]
}
