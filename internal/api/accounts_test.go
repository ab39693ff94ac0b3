package api

import (
	"encoding/base64"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/crypto/argon2"

	"coppice/internal/db"
	"coppice/internal/login"
	"coppice/internal/rbac"
	"coppice/internal/users"
	"coppice/internal/xapi"
)

// cheapVerifier is login.Hash with the least cost.
func cheapVerifier(password string) string {
	salt := []byte("0123456789abcdef")
	b64 := base64.RawStdEncoding
	return fmt.Sprintf("$argon2id$v=%d$m=8,t=1,p=1$%s$%s", argon2.Version,
		b64.EncodeToString(salt), b64.EncodeToString(argon2.IDKey([]byte(password), salt, 1, 8, 1, 32)))
}

// withUsers is a core with a file of users, which has alice, a vm-admin.
func withUsers(t *testing.T) (*core, *users.File) {
	t.Helper()
	file := users.At(filepath.Join(t.TempDir(), "users.json"))
	err := file.Add(users.User{Name: "alice", UUID: "alice-uuid", Roles: []string{"read-only", "vm-admin"}, Verifier: cheapVerifier("secret")})
	if err != nil {
		t.Fatal(err)
	}
	c := newCore(t, func(cfg *Config) {
		cfg.Users, cfg.RootPassword = file, cheapVerifier("root's")
	})
	c.update(c.refreshRoles)
	return c, file
}

func (c *core) login(user, password string) (xapi.Ref[xapi.Session], error) {
	return c.Login(c.t.Context(), Origin{Peer: "test"}, user, password)
}

func TestUsersLogIn(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c, file := withUsers(t)
		for _, as := range [][2]string{{"alice", "wrong"}, {"bob", "secret"}, {"alice", ""}, {"alice", "root's"}} {
			begin := time.Now()
			if _, err := c.login(as[0], as[1]); code(err) != xapi.ErrSessionAuthenticationFailed {
				t.Errorf("%q: %v", as, err)
			}
			if time.Since(begin) < login.FirstPause {
				t.Errorf("%q is refused after %v", as, time.Since(begin))
			}
		}
		alice, err := c.login("alice", "secret")
		if err != nil {
			t.Fatal(err)
		}
		s := record(c, alice)
		if s.IsLocalSuperuser || s.AuthUserName != "alice" || s.AuthUserSID != "alice" || s.Subject.IsNull() ||
			!slices.Contains(s.RBACPermissions, "VDI.snapshot") || slices.Contains(s.RBACPermissions, "SR.create") {
			t.Errorf("session of alice: %+v", s)
		}
		if _, err := c.try(alice, "VDI.get_all"); err != nil {
			t.Error(err)
		}
		c.wantFailure("RBAC_PERMISSION_DENIED|pool.sync_database", alice, "pool.sync_database")
		c.wantFailure("RBAC_PERMISSION_DENIED|subject.create", alice, "subject.create", map[string]any{})
		if got := c.call("session.get_all_subject_identifiers").([]string); !slices.Equal(got, []string{"alice"}) {
			t.Errorf("logged in: %q", got)
		}

		// Her own password, and her sessions stay.
		c.wantFailure("SESSION_AUTHENTICATION_FAILED|alice", alice, "session.change_password", "no", "new")
		if _, err := c.try(alice, "session.change_password", "secret", "new"); err != nil {
			t.Fatal(err)
		}
		if _, err := c.login("alice", "secret"); err == nil {
			t.Error("the old password is still good")
		}
		if _, err := c.login("alice", "new"); err != nil {
			t.Errorf("the new password: %v", err)
		}
		if _, err := c.try(alice, "VDI.get_all"); err != nil {
			t.Errorf("her session after she changed her password: %v", err)
		}
		if _, err := c.login("root", "root's"); err != nil {
			t.Errorf("root: %v", err)
		}

		// Reset by somebody else, they end.
		if err := file.Change("alice", func(u *users.User) error { u.Verifier = cheapVerifier("reset"); return nil }); err != nil {
			t.Fatal(err)
		}
		again, err := c.login("alice", "reset")
		if err != nil {
			t.Fatal(err)
		}
		c.wantFailure("SESSION_INVALID", alice, "VDI.get_all")

		// Without a role she cannot log in; without an account neither.
		if err := file.Change("alice", func(u *users.User) error { u.Roles = nil; return nil }); err != nil {
			t.Fatal(err)
		}
		if _, err := c.login("alice", "reset"); code(err) != xapi.ErrSessionAuthorizationFailed {
			t.Errorf("without a role: %v", err)
		}
		c.wantFailure("SESSION_INVALID", again, "VDI.get_all")
		if err := file.Remove("alice"); err != nil {
			t.Fatal(err)
		}
		if _, err := c.login("alice", "reset"); code(err) != xapi.ErrSessionAuthenticationFailed {
			t.Errorf("removed: %v", err)
		}
		if n := len(c.call("subject.get_all").([]string)); n != 0 {
			t.Errorf("%d subjects are left", n)
		}
	})
}

// A damaged file changes nothing, and says so.
func TestUsersFileDamaged(t *testing.T) {
	file := filepath.Join(t.TempDir(), "users.json")
	c := newCore(t, func(cfg *Config) { cfg.Users = users.At(file) })
	if err := users.At(file).Add(users.User{Name: "alice", Roles: []string{"read-only"}, Verifier: cheapVerifier("a")}); err != nil {
		t.Fatal(err)
	}
	alice, err := c.login("alice", "a")
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(file, []byte("{"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := c.login("alice", "a"); err != nil {
		t.Errorf("login: %v", err)
	}
	if _, err := c.try(alice, "VDI.get_all"); err != nil {
		t.Errorf("session: %v", err)
	}
	if !strings.Contains(c.records.String(), "the users are those of before") {
		t.Errorf("log: %s", c.records)
	}
}

func TestSubjects(t *testing.T) {
	c, file := withUsers(t)
	ref := c.call("subject.create", map[string]any{"subject_identifier": "bob", "other_config": map[string]any{"subject-name": "Bob"}}).(xapi.Ref[xapi.Subject])
	bob := string(ref)
	rec := record(c, ref)
	if rec.SubjectIdentifier != "bob" || rec.OtherConfig["subject-name"] != "Bob" || !slices.Equal(rec.Roles, []xapi.Ref[xapi.Role]{rbac.Ref("pool-admin")}) {
		t.Errorf("bob: %+v", rec)
	}
	c.wantFailure("SUBJECT_ALREADY_EXISTS", c.root, "subject.create", map[string]any{"subject_identifier": "bob"})
	for _, name := range []string{"", "root", "x\n"} {
		c.wantFailure("INVALID_VALUE|subject_identifier|"+name, c.root, "subject.create", map[string]any{"subject_identifier": name})
	}
	if _, err := c.Login(t.Context(), Origin{}, "bob", ""); code(err) != xapi.ErrSessionAuthenticationFailed {
		t.Errorf("bob has no password: %v", err)
	}
	c.wantFailure("ROLE_ALREADY_EXISTS", c.root, "subject.add_to_roles", bob, string(rbac.Ref("pool-admin")))
	c.wantFailure("ROLE_NOT_FOUND", c.root, "subject.add_to_roles", bob, "OpaqueRef:x")
	c.wantFailure("ROLE_NOT_FOUND", c.root, "subject.add_to_roles", bob, string(rbac.Ref("VDI.snapshot")))
	c.wantFailure("ROLE_NOT_FOUND", c.root, "subject.remove_from_roles", bob, string(rbac.Ref("read-only")))
	c.call("subject.add_to_roles", bob, string(rbac.Ref("vm-operator")))
	if err := file.Change("bob", func(u *users.User) error { u.Verifier = cheapVerifier("b"); return nil }); err != nil {
		t.Fatal(err)
	}
	one, err := c.login("bob", "b")
	if err != nil {
		t.Fatal(err)
	}
	c.call("subject.remove_from_roles", bob, string(rbac.Ref("pool-admin")))
	c.wantFailure("SESSION_INVALID", one, "VM.get_all")
	if got := c.call("subject.get_permissions_name_label", bob).([]string); !slices.Contains(got, "VM.start") || slices.Contains(got, "VDI.create") {
		t.Errorf("permissions of bob: %q", got)
	}
	if got := c.call("auth.get_subject_identifier", "bob"); got != "bob" {
		t.Errorf("identifier %v", got)
	}
	if got := c.call("auth.get_subject_information_from_identifier", "bob").(map[string]string); got["subject-name"] != "Bob" || got["subject-is-group"] != "false" {
		t.Errorf("information %v", got)
	}
	c.wantFailure("SUBJECT_CANNOT_BE_RESOLVED", c.root, "auth.get_group_membership", "carol")

	two, err := c.login("bob", "b")
	if err != nil {
		t.Fatal(err)
	}
	c.call("session.logout_subject_identifier", "bob")
	c.wantFailure("SESSION_INVALID", two, "VM.get_all")
	three, err := c.login("bob", "b")
	if err != nil {
		t.Fatal(err)
	}
	c.call("subject.destroy", bob)
	c.wantFailure("SESSION_INVALID", three, "VM.get_all")
	c.wantFailure("HANDLE_INVALID|subject|"+bob, c.root, "subject.destroy", bob)

	// The command line was first.
	var alice xapi.Ref[xapi.Subject]
	if err := c.db.View(func(tx *db.Tx) error {
		for ref := range db.All[xapi.Subject](tx) {
			alice = ref
		}
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	if err := file.Remove("alice"); err != nil {
		t.Fatal(err)
	}
	c.wantFailure("HANDLE_INVALID|subject|"+string(alice), c.root, "subject.add_to_roles", string(alice), string(rbac.Ref("pool-admin")))
}

func TestSubjectsWithoutAFile(t *testing.T) {
	c := newCore(t)
	c.wantFailure("AUTH_IS_DISABLED", c.root, "subject.create", map[string]any{"subject_identifier": "x"})
}

// A subject keeps its reference over a restart.
func TestSubjectsSurviveARestart(t *testing.T) {
	r := newRig(t)
	file := users.At(filepath.Join(r.dir, "users.json"))
	r.adjust = func(cfg *Config) { cfg.Users = file }
	r.restart()
	ref := r.call("subject.create", map[string]any{"subject_identifier": "bob"}).(xapi.Ref[xapi.Subject])
	want := record(r.core, ref)
	r.restart()
	if got := record(r.core, ref); got.UUID != want.UUID || got.SubjectIdentifier != "bob" {
		t.Errorf("got %+v, want %+v", got, want)
	}
}

func TestRoles(t *testing.T) {
	c, _ := withUsers(t)
	if got := len(c.call("role.get_all").([]string)); got != len(line) {
		t.Errorf("%d roles, want %d", got, len(line))
	}
	admin := c.call("role.get_by_name_label", "pool-admin").([]xapi.Ref[xapi.Role])
	// What the datamodel calls the default role of a subject.
	if want := xapi.New[xapi.Subject]().Roles; !slices.Equal(admin, want) || len(admin) != 1 {
		t.Fatalf("pool-admin is %q, want %q", admin, want)
	}
	rec := c.call("role.get_record", string(admin[0])).(*xapi.Role)
	if rec.NameLabel != "pool-admin" || !slices.Equal(rec.Subroles, []xapi.Ref[xapi.Role]{rbac.Ref("pool-operator")}) {
		t.Errorf("pool-admin: %+v", rec)
	}
	names := c.call("role.get_permissions_name_label", string(admin[0])).([]string)
	refs := c.call("role.get_permissions", string(admin[0])).([]xapi.Ref[xapi.Role])
	if len(names) != len(refs) || len(names) < 2000 {
		t.Fatalf("%d names and %d references of permissions", len(names), len(refs))
	}
	for i := range names {
		if got := c.call("role.get_name_label", string(refs[i])); got != names[i] {
			t.Errorf("permission %s is %v", names[i], got)
		}
	}
	snapshot := c.call("role.get_by_name_label", "VDI.snapshot").([]xapi.Ref[xapi.Role])[0]
	want := []xapi.Ref[xapi.Role]{rbac.Ref("pool-admin"), rbac.Ref("pool-operator"), rbac.Ref("vm-power-admin"), rbac.Ref("vm-admin")}
	for _, got := range []any{
		c.call("role.get_by_permission", string(snapshot)), c.call("role.get_by_permission_name_label", "VDI.snapshot"),
	} {
		if !slices.Equal(got.([]xapi.Ref[xapi.Role]), want) {
			t.Errorf("VDI.snapshot is for %q, want %q", got, want)
		}
	}
	// Each role has what it may do and nothing else.
	for _, role := range line {
		has := c.roles.Permissions(role)
		everyMessage(func(name string, msg *xapi.Method) {
			want := permitted(role, msg.Role, msg.ExtraRoles) || name == "session.change_password"
			if slices.Contains(has, name) != want {
				t.Errorf("%s has %s: %v", role, name, !want)
			}
		})
	}
	if uuid := c.call("role.get_uuid", string(snapshot)).(string); c.call("role.get_by_uuid", uuid) != snapshot {
		t.Errorf("uuid %s", uuid)
	}
	c.wantFailure("HANDLE_INVALID|role|OpaqueRef:x", c.root, "role.get_permissions", "OpaqueRef:x")
	c.wantFailure("UUID_INVALID|role|x", c.root, "role.get_by_uuid", "x")
}

func TestSlaveLogin(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newCore(t)
		for name, params := range map[string][]any{
			"session.slave_login": {string(c.host), "secret"}, "session.slave_local_login": {"secret"},
		} {
			begin := time.Now()
			_, err := c.Invoke(t.Context(), Origin{}, name, params)
			if code(err) != xapi.ErrSessionAuthenticationFailed || time.Since(begin) < login.FirstPause {
				t.Errorf("%s: %v after %v", name, err, time.Since(begin))
			}
		}
	})
}

// What happens between the check of a password and the opening of the session
// ends the login if it concerns the user, and only then.
func TestUsersChangeInLogin(t *testing.T) {
	verifier := func(text string) func(*users.User) error {
		return func(u *users.User) error { u.Verifier = text; return nil }
	}
	for name, c := range map[string]struct {
		change func(*users.File) error
		code   string
	}{
		"another user":   {func(f *users.File) error { return f.Add(users.User{Name: "bob", UUID: "bob-uuid"}) }, ""},
		"the same again": {func(f *users.File) error { return f.Change("alice", verifier(cheapVerifier("secret"))) }, ""},
		"the password":   {func(f *users.File) error { return f.Change("alice", verifier(cheapVerifier("other"))) }, xapi.ErrSessionAuthenticationFailed},
		"the roles": {func(f *users.File) error {
			return f.Change("alice", func(u *users.User) error { u.Roles = []string{"pool-admin"}; return nil })
		}, xapi.ErrSessionAuthenticationFailed},
		"the user": {func(f *users.File) error { return f.Remove("alice") }, xapi.ErrSessionAuthenticationFailed},
	} {
		t.Run(name, func(t *testing.T) {
			a, file := withUsers(t)
			s, err := a.authenticate(t.Context(), Origin{Peer: "test"}, "alice", "secret")
			if err != nil {
				t.Fatal(err)
			}
			if err := errors.Join(c.change(file), a.ReloadUsers(t.Context())); err != nil {
				t.Fatal(err)
			}
			if err := a.openSession(s); code(err) != c.code || (err == nil) != (c.code == "") {
				t.Errorf("open the session: %v, want %q", err, c.code)
			}
			if _, err := a.try(s.ref, "VDI.get_all"); (err == nil) != (c.code == "") {
				t.Errorf("use the session: %v", err)
			}
		})
	}
}

// Changes by several at once lose nothing.
func TestUsersRace(t *testing.T) {
	c, file := withUsers(t)
	done := make(chan error, 3)
	go func() { // the command line
		for range 20 {
			if err := file.Change("alice", func(u *users.User) error { u.Verifier = cheapVerifier("secret"); return nil }); err != nil {
				done <- err
				return
			}
		}
		done <- nil
	}()
	go func() { // an administrator
		for i := range 20 {
			name := strings.Repeat("x", i+1)
			if _, err := c.try(c.root, "subject.create", map[string]any{"subject_identifier": name}); err != nil {
				done <- err
				return
			}
		}
		done <- nil
	}()
	go func() { // a user
		for range 20 {
			s, err := c.login("alice", "secret")
			if err == nil {
				_, err = c.try(s, "VDI.get_all")
			}
			if err != nil && code(err) != xapi.ErrSessionInvalid {
				done <- err
				return
			}
		}
		done <- nil
	}()
	if err := errors.Join(<-done, <-done, <-done); err != nil {
		t.Error(err)
	}
	if n := len(c.call("subject.get_all").([]string)); n != 21 {
		t.Errorf("%d subjects, want 21", n)
	}
}
