package main

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"coppice/internal/login"
	"coppice/internal/users"
)

func TestUserCommand(t *testing.T) {
	data := t.TempDir()
	password := filepath.Join(t.TempDir(), "password")
	if err := os.WriteFile(password, []byte("secret\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	user := func(args ...string) output {
		t.Helper()
		return runCommand(t, append([]string{"user", "--data", data}, args...)...)
	}
	for _, tt := range []struct {
		args string
		code int
		want string // in what it prints
	}{
		{"", exitUnusable, "what should be done?"},
		{"fly", exitUnusable, `"fly" is nothing that can be done`},
		{"list", exitOK, "(local superuser)"},
		{"list alice", exitUnusable, "list takes no name, not 1"},
		{"add alice", exitUnusable, "a user needs a role"},
		{"add alice --role king", exitUnusable, "there is no such role"},
		{"add --role vm-admin", exitUnusable, "add takes one name, not 0"},
		{"add alice --role vm-admin", exitUnusable, "the password is empty"},
		{"add root --role vm-admin --password-file " + password, exitUnusable, "is not root"},
		{"add alice --role vm-admin --password-file " + password + ".no", exitUnusable, "no such file"},
		{"add alice --role vm-admin --password-file " + password, exitOK, ""},
		{"add --password-file " + password + " alice --role vm-admin", exitUnusable, "the user exists"},
		{"list", exitOK, "alice  vm-admin           set"},
		{"role alice", exitUnusable, "role needs a role"},
		{"role alice --role read-only --role vm-operator", exitOK, ""},
		{"list", exitOK, "alice  read-only,vm-operator  set"},
		{"passwd bob --password-file " + password, exitUnusable, "no such user"},
		{"passwd alice --password-file " + password, exitOK, ""},
		{"remove bob", exitUnusable, "coppice user list shows them"},
		{"remove root", exitUnusable, "root is always there"},
	} {
		got := user(strings.Fields(tt.args)...)
		if got.code != tt.code || !strings.Contains(got.stdout+got.stderr, tt.want) {
			t.Errorf("user %s: exit code %d, want %d; want %q in:\n%s%s", tt.args, got.code, tt.code, tt.want, got.stdout, got.stderr)
		}
	}
	list, _, err := users.At(filepath.Join(data, "users.json")).Load()
	if err != nil || len(list) != 1 || list[0].UUID == "" || !login.Matches(list[0].Verifier, "secret") {
		t.Fatalf("users %+v, %v", list, err)
	}
	if got := user("remove", "alice"); got.code != exitOK {
		t.Errorf("remove: %+v", got)
	}
	if got := user("list"); strings.Contains(got.stdout, "alice") {
		t.Errorf("alice is left: %s", got.stdout)
	}
	if got := runCommand(t, "user", "list", "--data", filepath.Join(data, "nowhere")); got.code != exitUnusable || !strings.Contains(got.stderr, `"coppice serve" makes it`) {
		t.Errorf("no data directory: %+v", got)
	}
}

// Roles that are taken away while somebody still types a password stay away.
func TestPasswordLeavesRoles(t *testing.T) {
	file := users.At(filepath.Join(t.TempDir(), "users.json"))
	if err := file.Add(users.User{Name: "alice", Roles: []string{"pool-admin"}}); err != nil {
		t.Fatal(err)
	}
	err := changeUser(file, "alice", func() (func(*users.User), error) {
		return func(u *users.User) { u.Verifier = "v" }, file.Change("alice", func(u *users.User) error {
			u.Roles = []string{"read-only"}
			return nil
		})
	})
	list, _, loadErr := file.Load()
	if err != nil || loadErr != nil || len(list) != 1 || list[0].Verifier != "v" || !slices.Equal(list[0].Roles, []string{"read-only"}) {
		t.Errorf("users %+v, %v, %v", list, err, loadErr)
	}
}
