package cow

import (
	"errors"
	"fmt"
	"io/fs"
	"strings"

	"coppice/internal/vfs"
)

// Destroy removes the store in a directory that nobody has open, with all
// volumes in it. A crash in between leaves no store, at most files that a
// [Create] in the same place removes.
func Destroy(dir vfs.FS) (err error) {
	lock, err := dir.Lock()
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, lock.Close()) }()
	if err := dir.Remove(superName); errors.Is(err, fs.ErrNotExist) {
		return ErrNoStore
	} else if err != nil {
		return err
	}
	if err := dir.SyncDir(); err != nil {
		return err
	}
	if err := removeFiles(dir); err != nil {
		return err
	}
	return dir.SyncDir()
}

// removeFiles removes all files of a store but the superblock.
func removeFiles(dir vfs.FS) error {
	names, err := dir.List()
	if err != nil {
		return err
	}
	for _, n := range names {
		var i int
		base := strings.TrimSuffix(n, tempName(""))
		_, scanErr := fmt.Sscanf(base, "space-%04d", &i)
		isSpace := scanErr == nil && base == spaceName(i)
		if isSpace || base == regionsName(0) || base == regionsName(1) || base == logName || n == superTemp {
			if err := dir.Remove(n); err != nil {
				return err
			}
		}
	}
	return nil
}
