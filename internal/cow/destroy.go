package cow

import (
	"errors"
	"fmt"
	"io/fs"
	"slices"
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

// Present reports whether there is a store in a directory, and leaves nothing
// there: [Open] leaves the file of its lock, also where it finds no store.
func Present(dir vfs.FS) (bool, error) {
	names, err := dir.List()
	return slices.Contains(names, superName), err
}

// Foreign returns the names of the files in a directory without a store that
// are not what a [Create] or a [Destroy] that was cut off has left there, in
// order. Create would leave them alone, but not all of those that only seem to
// be a store's: a log is one beside the other files of a store, and the file of
// somebody else where it is alone.
func Foreign(dir vfs.FS) ([]string, error) {
	names, err := dir.List()
	if err != nil {
		return nil, err
	}
	onlyLog := !slices.ContainsFunc(names, func(n string) bool { return isStoreFile(n) && n != logName })
	foreign := slices.DeleteFunc(names, func(n string) bool {
		return isStoreFile(n) && !(onlyLog && n == logName)
	})
	slices.Sort(foreign)
	return foreign, nil
}

// isStoreFile reports whether a file of a store has that name, for ever or
// while it is made, but for the superblock.
func isStoreFile(name string) bool {
	var i int
	base := strings.TrimSuffix(name, tempName(""))
	_, err := fmt.Sscanf(base, "space-%04d", &i)
	isSpace := err == nil && base == spaceName(i)
	return isSpace || base == regionsName(0) || base == regionsName(1) || base == logName || name == superTemp
}

// removeFiles removes all files of a store but the superblock.
func removeFiles(dir vfs.FS) error {
	names, err := dir.List()
	if err != nil {
		return err
	}
	for _, n := range names {
		if !isStoreFile(n) {
			continue
		}
		if err := dir.Remove(n); err != nil {
			return err
		}
	}
	return nil
}
