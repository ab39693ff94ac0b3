package thincli

import (
	"fmt"
	"io/fs"
	"os"
)

// received are the files that a run has made out of what came. None stays
// unless the whole run succeeds: half an image looks like a disk, and the end of
// one whose length nobody told looks like its end.
type received struct {
	env    *Env
	files  []receivedFile
	broken bool // not all of one has come
}

type receivedFile struct {
	name string // as the command line has it
	info fs.FileInfo
}

// create makes a new file.
func (r *received) create(name string) (*os.File, error) {
	f, err := r.env.open(name, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return nil, err
	}
	info, err := f.Stat()
	if err != nil {
		f.Close()
		return nil, err
	}
	r.files = append(r.files, receivedFile{name, info})
	return f, nil
}

// drop removes the files, as far as they are still those that were made, and
// says so.
func (r *received) drop() (text string) {
	for _, f := range r.files {
		path := r.env.path(f.name)
		if info, err := os.Lstat(path); err != nil || !os.SameFile(info, f.info) {
			continue // somebody has moved it
		}
		if err := os.Remove(path); err != nil {
			text += fmt.Sprintf("%s is not complete.\n", f.name)
		} else {
			text += fmt.Sprintf("%s was not complete and has been removed.\n", f.name)
		}
	}
	r.files = nil
	return text
}
