package api

import (
	"testing"
	"testing/synctest"
	"time"

	"coppice/internal/login"
	"coppice/internal/xapi"
)

// Refused logins of an hour make one alert, an hour without makes none.
func TestFailedLoginAlert(t *testing.T) {
	verifier := login.Hash("right")
	synctest.Test(t, func(t *testing.T) {
		c := newCore(t, func(cfg *Config) { cfg.RootPassword = verifier })
		done := make(chan struct{})
		go func() { defer close(done); c.tellFailedLogins() }()
		from := Origin{Peer: "192.0.2.7:4711", UserAgent: `<"&>`, Originator: "test"}
		for range 2 {
			if _, err := c.Login(t.Context(), from, "root", "wrong"); code(err) != xapi.ErrSessionAuthenticationFailed {
				t.Errorf("a wrong password: %v", err)
			}
		}
		last := time.Now()
		if _, err := c.Login(t.Context(), from, "root", "right"); err != nil {
			t.Error(err)
		}
		for range 3 {
			time.Sleep(failedLoginInterval)
		}
		synctest.Wait()
		all := c.call("message.get_all_records").(messages)
		if len(all) != 1 {
			t.Errorf("%d messages, want 1", len(all))
		}
		for _, m := range all {
			if m.Name != "FAILED_LOGIN_ATTEMPTS" || m.Cls != xapi.ClsPool || m.ObjUUID != record(c, c.pool).UUID || m.Priority != 3 {
				t.Errorf("message %+v", m)
			}
			var want login.Refusals
			for range 2 {
				want.Add(login.Attempt{User: "root", Originator: "test", UserAgent: `<"&>`, Peer: from.Peer}, last)
			}
			if body := want.Take(); m.Body != body {
				t.Errorf("body %s, want %s", m.Body, body)
			}
		}
		c.stop(errStopping)
		<-done
	})
}
