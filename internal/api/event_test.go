package api

import (
	"context"
	"fmt"
	"log/slog"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"coppice/internal/xapi"
)

// from calls event.from as root.
func (c *core) from(token string, timeout float64, classes ...string) *xapi.EventBatch {
	c.t.Helper()
	return c.call("event.from", classes, token, timeout).(*xapi.EventBatch)
}

// summary is "op class ref" of every event, in order.
func summary(b *xapi.EventBatch) string {
	var s []string
	for _, ev := range b.Events {
		s = append(s, fmt.Sprintf("%s %s %s", ev.Operation, ev.Class, ev.Ref))
	}
	return strings.Join(s, "\n")
}

func TestEventFromEncoding(t *testing.T) {
	c := newCore(t)
	res, err := c.try(c.root, "event.from", []string{"pool"}, "", 0)
	if err != nil {
		t.Fatal(err)
	}
	revision := fmt.Sprintf("%020d", c.db.Revision())
	x, j := asXML(t, res), asJSON(t, res)
	for _, want := range []string{
		"<name>class</name><value>pool</value>", "<name>operation</name><value>add</value>", "<name>timestamp</name><value>0.0</value>",
		"<name>pool</name><value><i4>1</i4></value>", "<name>vm_guest_metrics</name><value><i4>0</i4></value>",
		"<name>token</name><value>" + revision + ",", "<name>snapshot</name><value><struct>",
	} {
		if !strings.Contains(x, want) {
			t.Errorf("XML lacks %s: %s", want, x)
		}
	}
	for _, want := range []string{`"class":"pool"`, `"timestamp":"0.0"`, `"pool":1`, `"token":"` + revision} {
		if !strings.Contains(j, want) {
			t.Errorf("JSON lacks %s: %s", want, j)
		}
	}
}

func TestEventFromEndsEarly(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		log := new(lockedBuffer)
		c := newCore(t, func(cfg *Config) { cfg.Log = slog.New(slog.NewTextHandler(log, nil)) })
		session := c.as("read-only")
		token := c.from("", 0, "pool").Token
		begin := time.Now()
		logout := make(chan error)
		go func() {
			_, err := c.try(session, "event.from", []string{"pool"}, token, 60)
			logout <- err
		}()
		ctx, cancel := context.WithCancel(t.Context())
		gone := make(chan error)
		go func() {
			_, err := c.Invoke(ctx, Origin{}, "event.from", []any{string(c.root), []any{"pool"}, token, 60.0})
			gone <- err
		}()
		stopped := make(chan error)
		go func() {
			_, err := c.try(c.root, "event.from", []string{"pool"}, token, 60)
			stopped <- err
		}()
		time.Sleep(time.Second)
		if _, err := c.try(session, "session.logout"); err != nil {
			t.Fatal(err)
		}
		if got, want := description(<-logout), "SESSION_INVALID|"+string(session); got != want {
			t.Errorf("logout: got %q, want %q", got, want)
		}
		cancel()
		if err := <-gone; err == nil {
			t.Error("a client that is gone gets a batch")
		}
		if strings.Contains(log.String(), "call failed") {
			t.Errorf("that is logged as a failure: %s", log)
		}
		c.stop(errStopping)
		if err := <-stopped; code(err) != xapi.ErrInternalError {
			t.Errorf("the server's stop: %v", err)
		}
		if d := time.Since(begin); d != time.Second {
			t.Errorf("it took %v", d)
		}
	})
}

// QT-EV-1
func TestLegacyNextEndsWithItsSession(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newCore(t)
		session := c.as("read-only")
		if _, err := c.try(session, "event.register", []string{}); err != nil {
			t.Fatal(err)
		}
		done := make(chan error)
		go func() {
			_, err := c.try(session, "event.next")
			done <- err
		}()
		time.Sleep(time.Hour)
		begin := time.Now()
		if _, err := c.try(session, "session.logout"); err != nil {
			t.Fatal(err)
		}
		if got, want := description(<-done), "SESSION_INVALID|"+string(session); got != want || time.Since(begin) != 0 {
			t.Errorf("got %q after %v, want %q", got, time.Since(begin), want)
		}
	})
}

// The older calls say what is wrong with them, and keep what the session watches.
func TestLegacyEvents(t *testing.T) {
	c := newCore(t)
	c.wantFailure("SESSION_NOT_REGISTERED|"+string(c.root), c.root, "event.next")
	c.wantFailure("EVENT_SUBSCRIPTION_PARSE_FAILURE|", c.root, "event.register", []string{""})
	c.call("event.register", []string{"pool", "vm"})
	c.call("event.unregister", []string{"VM"})
	insert(c, xapi.New[xapi.VM]())
	c.call("pool.add_to_other_config", c.pool, "k", "v")
	if got, want := summary(&xapi.EventBatch{Events: c.call("event.next").([]*xapi.Event)}), "mod pool "+string(c.pool); got != want {
		t.Errorf("got %q, want %q", got, want)
	}
	if got, want := c.call("event.get_current_id").(int64), int64(c.db.Revision()); got != want {
		t.Errorf("current id %d, want %d", got, want)
	}
}

func TestEventCallsAreChecked(t *testing.T) {
	c := newCore(t)
	c.wantFailure("EVENT_SUBSCRIPTION_PARSE_FAILURE|/", c.root, "event.from", []string{"vm", "/"}, "", 0.0)
	c.wantFailure("EVENT_FROM_TOKEN_PARSE_FAILURE|x", c.root, "event.from", []string{"vm"}, "x", 0.0)
	c.wantFailure("FIELD_TYPE_ERROR|timeout", c.root, "event.from", []string{"vm"}, "", []any{})
	c.wantFailure("HANDLE_INVALID|host|"+string(c.pool), c.root, "event.inject", "host", c.pool)
	token := c.call("event.inject", "pool", c.pool).(string)
	if got, want := summary(c.from(token, 0, "pool")), "mod pool "+string(c.pool); got != want {
		t.Errorf("got %q, want %q", got, want)
	}
}
