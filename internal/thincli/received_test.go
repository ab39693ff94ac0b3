package thincli

import (
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"testing"
)

// contentsOf reads the files of a directory.
func contentsOf(t *testing.T, dir string) map[string]string {
	t.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	contents := make(map[string]string)
	for _, e := range entries {
		b, err := os.ReadFile(filepath.Join(dir, e.Name()))
		if err != nil {
			t.Fatal(err)
		}
		contents[e.Name()] = string(b)
	}
	return contents
}

// TestReceivedName: a file has no name before the run has succeeded, and
// whatever has happened to its directory by then, what came is kept if that is
// possible at all, and the user is told.
func TestReceivedName(t *testing.T) {
	const taken = "new was made by another program meanwhile and stays as it is. What was received is complete; its name is "
	for _, tc := range []struct {
		name      string
		meanwhile func(dir string) error // when the server has been told that all has come
		code      int
		stderr    string
		files     map[string]string // in the end
	}{
		{"", func(string) error { return nil }, 0, "", map[string]string{"new": "data"}},
		{
			"taken",
			func(dir string) error { return os.WriteFile(filepath.Join(dir, "new"), []byte("other"), 0o600) },
			1, taken + "new.1.\n",
			map[string]string{"new": "other", "new.1": "data"},
		},
		{
			"taken by a link", // which is not followed
			func(dir string) error {
				return errors.Join(os.Symlink("there", filepath.Join(dir, "new")), os.WriteFile(filepath.Join(dir, "there"), nil, 0o600))
			},
			1, taken + "new.1.\n",
			map[string]string{"new": "", "there": "", "new.1": "data"},
		},
		{
			"taken twice",
			func(dir string) error {
				return errors.Join(os.WriteFile(filepath.Join(dir, "new"), nil, 0o600), os.WriteFile(filepath.Join(dir, "new.1"), nil, 0o600))
			},
			1, taken + "new.2.\n",
			map[string]string{"new": "", "new.1": "", "new.2": "data"},
		},
		{
			"all are taken",
			func(dir string) error {
				err := os.WriteFile(filepath.Join(dir, "new"), nil, 0o600)
				for n := 1; n <= maxOtherNames; n++ {
					err = errors.Join(err, os.Symlink("new", filepath.Join(dir, fmt.Sprintf("new.%d", n))))
				}
				return err
			},
			1, "new was complete, but could not get its name and is lost: File exists\n", nil,
		},
		{
			"the directory has moved",
			func(dir string) error {
				return errors.Join(os.Rename(dir, dir+".moved"), os.Symlink(dir+".moved", dir))
			},
			0, "",
			map[string]string{"new": "data"},
		},
		{
			"the directory is gone",
			func(dir string) error { return errors.Join(os.Remove(dir), os.Mkdir(dir, 0o700)) },
			1, "new was complete, but could not get its name and is lost: No such file or directory\n",
			map[string]string{},
		},
	} {
		t.Run(tc.name, func(t *testing.T) {
			var dir string
			p := newPeer(t, func(w *wire) {
				w.hello()
				w.send(HTTPGet{"new", "/ok"})
				w.expectMessage(OK)
				if got := contentsOf(t, dir); len(got) > 0 {
					t.Errorf("before the end there is %v", got)
				}
				if err := tc.meanwhile(dir); err != nil {
					t.Error(err)
				}
				w.send(Exit{0})
			}, func(w *wire) {
				w.head()
				w.send("HTTP/1.1 200 OK\r\n\r\ndata")
			})
			p.dir = filepath.Join(p.dir, "sub")
			if err := os.Mkdir(p.dir, 0o700); err != nil {
				t.Fatal(err)
			}
			dir = p.dir
			p.check(p.run("x", "f=new"), tc.code, "", tc.stderr)
			if got := contentsOf(t, dir); tc.files != nil && !maps.Equal(got, tc.files) {
				t.Errorf("in the end there is %v, want %v", got, tc.files)
			}
			if tc.code != 0 {
				return
			}
			if info, err := os.Stat(filepath.Join(dir, "new")); err != nil {
				t.Error(err)
			} else if info.Mode()&^0o600 != 0 {
				t.Errorf("mode %v", info.Mode())
			}
		})
	}
}

// TestReceivedNamed has files that had their names from the start, as on file
// systems that know no others.
func TestReceivedNamed(t *testing.T) {
	dir := t.TempDir()
	path := func(name string) string { return filepath.Join(dir, name) }
	receive := func(names ...string) *received {
		r := &received{env: &Env{Dir: dir}}
		for _, name := range names {
			f, err := os.Create(path(name))
			if err != nil {
				t.Fatal(err)
			}
			r.files = append(r.files, &receivedFile{f, name, nil})
		}
		return r
	}
	if err := receive("kept").keep(); err != nil {
		t.Error(err)
	}
	r := receive("part", "moved", "replaced")
	if err := errors.Join(
		os.Rename(path("moved"), path("elsewhere")),
		os.Rename(path("replaced"), path("old")), os.WriteFile(path("replaced"), []byte("other"), 0o600),
	); err != nil {
		t.Fatal(err)
	}
	if got, want := r.drop(), "part was not complete and has not been kept.\n"; got != want {
		t.Errorf("says %q, want %q", got, want)
	}
	if got, want := contentsOf(t, dir), (map[string]string{"kept": "", "elsewhere": "", "old": "", "replaced": "other"}); !maps.Equal(got, want) {
		t.Errorf("there is %v, want %v", got, want)
	}
}
