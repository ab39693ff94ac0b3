package users

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
)

func names(t *testing.T, f *File) []string {
	t.Helper()
	list, _, err := f.Load()
	if err != nil {
		t.Fatal(err)
	}
	out := []string{}
	for _, u := range list {
		out = append(out, u.Name)
	}
	return out
}

func TestFile(t *testing.T) {
	path := filepath.Join(t.TempDir(), "users.json")
	f := At(path)
	list, stamp, err := f.Load()
	if len(list) != 0 || stamp != (Stamp{}) || err != nil {
		t.Errorf("no file: %v %v %v", list, stamp, err)
	}
	if err := f.Remove("bob"); !errors.Is(err, ErrNotFound) {
		t.Errorf("remove nobody: %v", err)
	}
	for _, name := range []string{"bob", "alice"} {
		if err := f.Add(User{Name: name, UUID: "u-" + name, Roles: []string{"vm-admin"}}); err != nil {
			t.Fatal(err)
		}
	}
	if err := f.Add(User{Name: "bob"}); !errors.Is(err, ErrExists) {
		t.Errorf("add bob again: %v", err)
	}
	_, before, err := f.Load()
	if err != nil {
		t.Fatal(err)
	}
	err = f.Change("bob", func(u *User) error {
		u.Verifier, u.Name, u.UUID = "v", "robert", "other"
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	refused := errors.New("refused")
	if err := f.Change("bob", func(u *User) error { u.Verifier = "w"; return refused }); !errors.Is(err, refused) {
		t.Errorf("refused change: %v", err)
	}
	list, after, err := At(path).Load()
	if err != nil || before == after || len(list) != 2 || list[1].Verifier != "v" || list[1].UUID != "u-bob" {
		t.Errorf("after a change: %+v, stamp %v then %v, %v", list, before, after, err)
	}
	if err := f.Remove("alice"); err != nil {
		t.Fatal(err)
	}
	if got := names(t, f); !slices.Equal(got, []string{"bob"}) {
		t.Errorf("left: %q", got)
	}
	info, err := os.Stat(path)
	if err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("mode %v, %v", info.Mode(), err)
	}
}

func TestNames(t *testing.T) {
	for _, name := range []string{"", "root", " a", "a ", "a\nb", "a\x00", "\xff", strings.Repeat("x", 257)} {
		if err := ValidName(name); !errors.Is(err, ErrName) {
			t.Errorf("%q: %v", name, err)
		}
	}
	for _, name := range []string{"a", "Jörg Müller", `DOM\user`, "u@example.org", "S-1-5-21-1", strings.Repeat("x", 256)} {
		if err := ValidName(name); err != nil {
			t.Errorf("%q: %v", name, err)
		}
	}
}

func TestDamagedFile(t *testing.T) {
	path := filepath.Join(t.TempDir(), "users.json")
	for _, text := range []string{
		"", "{", "null", `{"version":2,"users":[]}`, `{"version":1,"users":[{"name":"root"}]}`,
		`{"version":1,"users":[{"name":"a"},{"name":"a"}]}`, `{"version":1,"users":{}}`,
	} {
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		if _, _, err := At(path).Load(); err == nil {
			t.Errorf("%q is read", text)
		}
		if err := At(path).Add(User{Name: "b"}); err == nil {
			t.Errorf("%q is overwritten", text)
		}
		if got, _ := os.ReadFile(path); string(got) != text {
			t.Errorf("%q became %q", text, got)
		}
	}
}

func TestConcurrentChanges(t *testing.T) {
	path := filepath.Join(t.TempDir(), "users.json")
	var wg sync.WaitGroup
	for i := range 20 {
		wg.Go(func() {
			f := At(path) // as another process would
			if err := f.Add(User{Name: fmt.Sprintf("u%02d", i)}); err != nil {
				t.Error(err)
			}
			if _, _, err := f.Load(); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	if got := names(t, At(path)); len(got) != 20 {
		t.Errorf("%d users: %q", len(got), got)
	}
}

func FuzzDecode(f *testing.F) {
	f.Add([]byte(`{"version":1,"users":[{"name":"a","roles":["x"],"other_config":{"k":"v"}}]}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		list, err := decode(data)
		if err != nil {
			return
		}
		for i, u := range list {
			if ValidName(u.Name) != nil || i > 0 && list[i-1].Name >= u.Name {
				t.Errorf("%q lets %q in", data, u.Name)
			}
		}
	})
}
