package thincli

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"slices"
	"strconv"
	"strings"
	"syscall"
)

// received are the files that a run makes out of what comes. None has its name
// before the whole run has succeeded: half an image looks like a disk, and the
// end of one whose length nobody told looks like its end. Where a file cannot be
// without a name it has it from the start, and is removed if the run fails; then
// an end by force (SIGKILL, SIGQUIT) leaves a part.
type received struct {
	env    *Env
	files  []*receivedFile
	broken bool // not all of one has come
}

// receivedFile is open until the run keeps or drops it.
type receivedFile struct {
	*os.File
	name    string       // as the command line has it
	unnamed *unnamedFile // the file, unless it has its name already
}

// create makes a new file. One of that name that is there already stays as it
// is, whatever it is: a device or a pipe, too (fs.ErrExist). So does one that the
// run itself has made.
func (r *received) create(name string) (*os.File, error) {
	path := r.env.path(name)
	if slices.ContainsFunc(r.files, func(f *receivedFile) bool { return f.Name() == path }) {
		return nil, syscall.EEXIST
	}
	if _, err := os.Lstat(path); errors.Is(err, fs.ErrNotExist) {
		if u, err := createUnnamed(path); err == nil {
			r.files = append(r.files, &receivedFile{u.File, name, u})
			return u.File, nil
		}
	}
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return nil, err
	}
	r.files = append(r.files, &receivedFile{f, name, nil})
	return f, nil
}

// keep ends a run that has succeeded: the files get their names. Its error says
// what has become of those that do not; what came is kept as long as there is a
// name for it.
func (r *received) keep() error {
	var troubles strings.Builder
	for _, f := range r.files {
		if f.unnamed != nil {
			troubles.WriteString(f.unnamed.keep(f.name))
		}
		f.close()
	}
	r.files = nil
	if troubles.Len() > 0 {
		return failf("%s", troubles.String())
	}
	return nil
}

// maxOtherNames bounds the search for a name, as that of wget and curl.
const maxOtherNames = 100

// keep gives the file its name, or another if that has been taken since the run
// began: name.1, name.2 and so on. It returns what the user has to know about it.
func (u *unnamedFile) keep(name string) (text string) {
	err := u.link("")
	for n := 1; errors.Is(err, fs.ErrExist) && n <= maxOtherNames; n++ {
		suffix := "." + strconv.Itoa(n)
		if err = u.link(suffix); err == nil {
			text = fmt.Sprintf("%s was made by another program meanwhile and stays as it is. What was received is complete; its name is %s.\n", name, name+suffix)
			name += suffix
		}
	}
	if err != nil {
		return fmt.Sprintf("%s was complete, but could not get its name and is lost: %s\n", name, reason(err))
	}
	if err := u.syncDir(); err != nil {
		text += fmt.Sprintf("%s is complete, but may lose its name if the power fails: %s\n", name, reason(err))
	}
	return text
}

// drop ends a run that has failed. Files that have their names are removed, as far
// as they are still those that were made. It returns what the user has to know.
func (r *received) drop() (text string) {
	for _, f := range r.files {
		if f.unnamed == nil {
			text += f.remove()
		} else {
			text += fmt.Sprintf("%s was not complete and has not been kept.\n", f.name)
		}
		f.close()
	}
	r.files = nil
	return text
}

func (f *receivedFile) close() {
	f.Close()
	if f.unnamed != nil {
		f.unnamed.closeDir()
	}
}

func (f *receivedFile) remove() (text string) {
	path := f.Name()
	made, err := f.Stat()
	if err != nil {
		return fmt.Sprintf("%s is not complete.\n", f.name)
	}
	switch info, err := os.Lstat(path); {
	case err != nil || !os.SameFile(info, made):
		return "" // somebody has moved it
	case os.Remove(path) != nil:
		return fmt.Sprintf("%s is not complete.\n", f.name)
	}
	return fmt.Sprintf("%s was not complete and has not been kept.\n", f.name)
}
