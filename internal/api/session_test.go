package api

import (
	"context"
	"errors"
	"testing"
	"testing/synctest"
	"time"

	"coppice/internal/login"
	"coppice/internal/xapi"
)

func TestLogin(t *testing.T) {
	c := newCore(t, func(cfg *Config) { cfg.RootPassword = cheapVerifier("secret") })
	login := func(params ...any) (xapi.Ref[xapi.Session], error) {
		res, err := c.Invoke(t.Context(), Origin{Originator: "tool"}, "session.login_with_password", params)
		if err != nil {
			return "", err
		}
		return res.Value.(xapi.Ref[xapi.Session]), nil
	}
	two, err := login("root", "secret")
	if err != nil {
		t.Fatal(err)
	}
	four, err := login("root", "secret", "1.0", "me")
	if err != nil {
		t.Fatal(err)
	}
	for ref, originator := range map[xapi.Ref[xapi.Session]]string{two: "tool", four: "me"} {
		res, err := c.try(ref, "session.get_record", ref)
		if err != nil {
			t.Fatal(err)
		}
		r := res.Value.(*xapi.Session)
		if !r.IsLocalSuperuser || r.AuthUserName != "root" || r.Pool || r.ThisHost != c.host || r.Originator != originator || !r.Parent.IsNull() {
			t.Errorf("record: %+v", r)
		}
	}
	if _, err := login("root"); code(err) != xapi.ErrMessageParameterCountMismatch {
		t.Errorf("one parameter: %v", err)
	}

	if _, err := c.try(two, "session.logout"); err != nil {
		t.Fatal(err)
	}
	c.wantFailure("SESSION_INVALID|"+string(two), two, "pool.get_all")
	c.wantFailure("SESSION_INVALID|"+string(two), two, "session.logout")
	c.wantFailure("HANDLE_INVALID|session|"+string(two), c.root, "session.get_uuid", two)
	c.wantFailure("SESSION_INVALID", four, "session.local_logout")

	res, err := c.Invoke(t.Context(), Origin{}, "session.slave_local_login_with_password", []any{"root", "secret"})
	if err != nil {
		t.Fatal(err)
	}
	local := res.Value.(xapi.Ref[xapi.Session])
	if _, err := c.try(local, "pool.get_all"); err != nil {
		t.Errorf("emergency session: %v", err)
	}
	if _, err := c.try(local, "session.local_logout"); err != nil {
		t.Errorf("local_logout: %v", err)
	}
	c.wantFailure("SESSION_INVALID", local, "pool.get_all")
}

func TestLoginsAreRefusedLate(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newCore(t, func(cfg *Config) { cfg.RootPassword = cheapVerifier("secret") })
		begin := time.Now()
		_, err := c.Login(t.Context(), Origin{}, "root", "wrong")
		if got, want := description(err), "SESSION_AUTHENTICATION_FAILED|root|Authentication failure"; got != want {
			t.Fatalf("got %q, want %q", got, want)
		}
		if d := time.Since(begin); d != login.FirstPause {
			t.Errorf("a wrong password is refused after %v, want %v", d, login.FirstPause)
		}
		begin = time.Now()
		if _, err := c.Login(t.Context(), Origin{}, "root", "secret"); err != nil {
			t.Fatal(err)
		}
		if d := time.Since(begin); d != 0 {
			t.Errorf("the right password waits for %v", d)
		}
		if _, err := c.Login(t.Context(), Origin{}, "nobody", "secret"); code(err) != xapi.ErrSessionAuthenticationFailed {
			t.Errorf("unknown user: %v", err)
		}
		// a client that goes away does not keep its goroutine
		ctx, cancel := context.WithCancelCause(t.Context())
		gone := errors.New("gone")
		done := make(chan error)
		go func() {
			_, err := c.Invoke(ctx, Origin{}, "session.login_with_password", []any{"root", "wrong"})
			done <- err
		}()
		synctest.Wait()
		begin = time.Now()
		cancel(gone)
		<-done
		if d := time.Since(begin); d != 0 {
			t.Errorf("the login of a client that is gone ends after %v", d)
		}
	})
}

func TestSessionsExpire(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newCore(t)
		used := c.as("read-only")
		idle := c.as("read-only")
		busy, err := c.session(c.as("read-only"))
		if err != nil {
			t.Fatal(err)
		}
		call, err := c.begin(t.Context(), Origin{}, busy, "VDI.copy")
		if err != nil {
			t.Fatal(err)
		}
		first := record(c, used).LastActive
		time.Sleep(9 * time.Minute)
		c.session(used)
		if got := record(c, used).LastActive; !got.Equal(first) {
			t.Errorf("last_active moved after 9 minutes: %v", got)
		}
		time.Sleep(time.Minute)
		c.session(used)
		if got := record(c, used).LastActive; got.Sub(first) != 10*time.Minute {
			t.Errorf("last_active moved by %v after 10 minutes", got.Sub(first))
		}
		time.Sleep(24 * time.Hour)
		c.session(used)
		time.Sleep(time.Minute)
		c.trimSessions(c.now())
		if _, err := c.session(idle); code(err) != xapi.ErrSessionInvalid {
			t.Errorf("an idle session after a day: %v", err)
		}
		for _, ref := range []xapi.Ref[xapi.Session]{used, busy.ref} {
			if _, err := c.session(ref); err != nil {
				t.Errorf("a session in use ended: %v", err)
			}
		}
		call.end(Result{}, nil)
		c.trimSessions(c.now())
		if _, err := c.session(busy.ref); err != nil {
			t.Errorf("the end of a call is not a use: %v", err)
		}
	})
}

func TestSessionLimits(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newCore(t)
		var refs []xapi.Ref[xapi.Session]
		for i := range sessionsPerUser + 20 {
			ref, err := c.Login(t.Context(), Origin{Trusted: true}, "flood", "")
			if err != nil {
				t.Fatal(i, err)
			}
			refs = append(refs, ref)
			time.Sleep(time.Millisecond)
		}
		alive := 0
		for i, ref := range refs {
			if c.sessions.get(ref) != nil {
				alive++
			} else if i >= 20 {
				t.Fatalf("session %d ended although it is not among the oldest", i)
			}
		}
		if alive != sessionsPerUser {
			t.Errorf("%d sessions of one user, want %d", alive, sessionsPerUser)
		}
		if _, err := c.session(c.root); err != nil {
			t.Errorf("the session of another user: %v", err)
		}
	})
}

func TestChangePassword(t *testing.T) {
	var saved []string
	var refuse error
	c := newCore(t, func(cfg *Config) {
		cfg.RootPassword = cheapVerifier("old")
		cfg.SavePassword = func(user, verifier string) error {
			saved = append(saved, user)
			return refuse
		}
	})
	refuse = errors.New("disk full")
	c.wantFailure("INTERNAL_ERROR|disk full", c.root, "session.change_password", "old", "new")
	if _, err := c.Login(t.Context(), Origin{}, "root", "old"); err != nil {
		t.Errorf("the password changed although it was not saved: %v", err)
	}
	refuse = nil
	c.call("session.change_password", "old", "new")
	if _, err := c.Login(t.Context(), Origin{}, "root", "new"); err != nil {
		t.Errorf("new password: %v", err)
	}
	if len(saved) != 2 || saved[0] != "root" {
		t.Errorf("saved for %q", saved)
	}
	c.wantFailure("SESSION_AUTHENTICATION_FAILED|root", c.root, "session.change_password", "old", "newer")
	c.wantFailure("CHANGE_PASSWORD_REJECTED|The new password is empty", c.root, "session.change_password", "new", "")
	// Who came over the server's own socket is root, whatever the name.
	res, err := c.Login(t.Context(), trusted, "somebody", "")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := c.try(res, "session.change_password", "new", "newest"); err != nil || saved[len(saved)-1] != "root" {
		t.Errorf("saved for %q: %v", saved, err)
	}
}
