package api

import (
	"context"
	"fmt"
	"log/slog"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"coppice/internal/db"
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

func TestEventFromSeesEveryChangeOnce(t *testing.T) {
	c := newCore(t)
	a, b := insert(c, xapi.New[xapi.VM]()), insert(c, xapi.New[xapi.VM]())
	batch := c.from("", 0, "vm")
	if got, want := summary(batch), fmt.Sprintf("add vm %s\nadd vm %s", a, b); got != want {
		t.Errorf("from the beginning:\n%s\nwant\n%s", got, want)
	}
	token := batch.Token

	if batch = c.from(token, 0, "vm"); len(batch.Events) != 0 {
		t.Errorf("nothing happened, and yet %s", summary(batch))
	}
	c.call("VM.set_name_description", b, "x")
	c.call("pool.set_name_label", c.pool, "x")
	if got, want := summary(c.from(token, 0, "vm")), "mod vm "+string(b); got != want {
		t.Errorf("got %s, want %s", got, want)
	}
	added := insert(c, xapi.New[xapi.VM]())
	c.call("VM.set_name_description", added, "x") // still an add
	passing := insert(c, xapi.New[xapi.VM]())
	c.update(func(tx *db.Tx) error { return db.Delete(tx, passing) })
	c.update(func(tx *db.Tx) error { return db.Delete(tx, a) })
	batch = c.from(token, 0, "VM")
	want := fmt.Sprintf("add vm %s\nmod vm %s\ndel vm %s", added, b, a)
	if got := summary(batch); got != want {
		t.Errorf("got\n%s\nwant\n%s", got, want)
	}
	if vm := batch.Events[0].Snapshot.(*xapi.VM); vm.NameDescription != "x" {
		t.Errorf("snapshot is not the latest state: %+v", vm)
	}
	if n := batch.ValidRefCounts["vm"]; n != 2 {
		t.Errorf("valid_ref_counts says %d VMs, want 2", n)
	}
	if batch = c.from(batch.Token, 0, "vm"); len(batch.Events) != 0 {
		t.Errorf("the next batch repeats %s", summary(batch))
	}
}

func TestEventFromSubscriptions(t *testing.T) {
	c := newCore(t)
	vm, other := insert(c, xapi.New[xapi.VM]()), insert(c, xapi.New[xapi.VM]())
	for _, tt := range []struct {
		classes []string
		want    []string // "class ref"
	}{
		{[]string{"vm"}, []string{"vm " + string(vm), "vm " + string(other)}},
		{[]string{"VM/" + string(vm)}, []string{"vm " + string(vm)}}, // QT-EV-5
		{[]string{"vm/" + string(vm), "POOL"}, []string{"pool " + string(c.pool), "vm " + string(vm)}},
		{[]string{"*"}, []string{"host " + string(c.host), "pool " + string(c.pool), "vm " + string(vm), "vm " + string(other)}},
		{[]string{"nothing", "session", "secret", "user"}, nil},
		{nil, nil},
	} {
		var got []string
		for _, ev := range c.from("", 0, tt.classes...).Events {
			got = append(got, ev.Class+" "+ev.Ref)
		}
		slices.Sort(got)
		slices.Sort(tt.want)
		if !slices.Equal(got, tt.want) {
			t.Errorf("%q: got %q, want %q", tt.classes, got, tt.want)
		}
	}
	for _, bad := range []string{"", "/", "/x", "vm/", "vm/a/b"} {
		c.wantFailure("EVENT_SUBSCRIPTION_PARSE_FAILURE|"+bad, c.root, "event.from", []string{"vm", bad}, "", 0.0)
	}
	for _, bad := range []string{"x", "1", "1,", ",1", "1,x", "-1,0", "1,2,3", "99999999999999999999,0"} {
		c.wantFailure("EVENT_FROM_TOKEN_PARSE_FAILURE|"+bad, c.root, "event.from", []string{"vm"}, bad, 0.0)
	}
	c.wantFailure("FIELD_TYPE_ERROR|timeout", c.root, "event.from", []string{"vm"}, "", []any{})
	// A token of a revision that is not reached yet is of another database.
	if batch := c.from(formatToken(db.Position{Revision: 1 << 40}), 0, "vm"); len(batch.Events) != 2 {
		t.Errorf("a token of the future: %s", summary(batch))
	}
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

// QT-EV-3 and QT-EV-7: a waiting event.from returns soon after the change.
func TestEventFromWaits(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newCore(t)
		token := c.from("", 0, "pool").Token
		for name, change := range map[string]func(){
			"add_to_other_config": func() { c.call("pool.add_to_other_config", c.pool, "k", "v") },
			"inject":              func() { c.call("event.inject", "pool", c.pool) },
		} {
			begin := time.Now()
			go func() {
				time.Sleep(2 * time.Second)
				change()
			}()
			batch := c.from(token, 10, "pool")
			if got, want := summary(batch), "mod pool "+string(c.pool); got != want {
				t.Errorf("%s: got %s, want %s", name, got, want)
			}
			if d := time.Since(begin); d < 2*time.Second || d > 2*time.Second+100*time.Millisecond {
				t.Errorf("%s: returned after %v", name, d)
			}
			token = batch.Token
		}
		// Other classes do not end the wait, the timeout does, with a token to
		// go on from.
		begin := time.Now()
		go func() {
			for range 20 {
				time.Sleep(100 * time.Millisecond)
				c.call("host.set_name_label", c.host, time.Now().String())
			}
		}()
		batch := c.from(token, 5, "pool")
		if len(batch.Events) != 0 || time.Since(begin) != 5*time.Second {
			t.Errorf("got %q after %v, want nothing after 5 s", summary(batch), time.Since(begin))
		}
		if batch.Token <= token || batch.ValidRefCounts["host"] != 1 {
			t.Errorf("batch of a timeout: %+v", batch)
		}
	})
}

// A change that is alone is told soon; of many in a row a call collects some.
func TestEventFromCollects(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newCore(t)
		token := c.from("", 0, "pool").Token
		for _, test := range []struct {
			calm    time.Duration // until the first one
			changes int           // one a millisecond
			want    time.Duration // from the first one
		}{
			{eventQuiet, 1, eventBrief},
			{eventQuiet, 200, eventBrief},
			{eventQuiet - 1, 1, eventQuiet},
			{time.Millisecond, 10, 9*time.Millisecond + eventQuiet},
			{time.Millisecond, 200, eventPause},
		} {
			begin := time.Now()
			done := make(chan struct{})
			go func() {
				defer close(done)
				time.Sleep(test.calm)
				for i := range test.changes {
					if i > 0 {
						time.Sleep(time.Millisecond)
					}
					c.call("pool.set_name_label", c.pool, strconv.Itoa(i)+" of "+strconv.Itoa(test.changes))
				}
			}()
			batch := c.from(token, 10, "pool", "host")
			if got, want := summary(batch), "mod pool "+string(c.pool); got != want {
				t.Errorf("%d changes: got %s, want %s", test.changes, got, want)
			}
			if d := time.Since(begin) - test.calm; d != test.want {
				t.Errorf("%d changes: told after %v, want %v", test.changes, d, test.want)
			}
			<-done
			token = c.from("", 0, "pool").Token
		}
		// Who watches nothing waits for nothing but the end.
		begin := time.Now()
		if batch := c.from(token, 3); len(batch.Events) != 0 || time.Since(begin) != 3*time.Second {
			t.Errorf("got %q after %v, want nothing after 3 s", summary(batch), time.Since(begin))
		}
	})
}

// QT-EV-4: concurrent calls of one session are independent.
func TestEventFromConcurrently(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newCore(t)
		token := c.from("", 0, "pool").Token
		begin := time.Now()
		done := make(chan time.Duration)
		go func() {
			if batch := c.from("", 10); len(batch.Events) != 0 {
				t.Errorf("no classes: %s", summary(batch))
			}
			done <- time.Since(begin)
		}()
		go func() {
			c.from(token, 10, "pool")
			done <- time.Since(begin)
		}()
		time.Sleep(time.Second)
		c.call("pool.set_name_label", c.pool, "x")
		if d := <-done; d > 1100*time.Millisecond {
			t.Errorf("the one with a class returned after %v", d)
		}
		if d := <-done; d != 10*time.Second {
			t.Errorf("the empty one returned after %v", d)
		}
	})
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

func TestEventInject(t *testing.T) {
	c := newCore(t)
	token := c.call("event.inject", "pool", c.pool).(string)
	if got, want := summary(c.from(token, 0, "pool")), "mod pool "+string(c.pool); got != want {
		t.Errorf("got %q, want %q", got, want)
	}
	for _, class := range []string{"Pool", "host", "nothing", ""} {
		c.wantFailure("HANDLE_INVALID|"+class+"|"+string(c.pool), c.root, "event.inject", class, c.pool)
	}
	c.wantFailure("HANDLE_INVALID|pool|OpaqueRef:x", c.root, "event.inject", "pool", "OpaqueRef:x")
}

// QT-EV-6, as far as events go: messages come and go but do not change.
func TestMessageEvents(t *testing.T) {
	c := newCore(t)
	token := c.from("", 0, "message").Token
	m := insert(c, xapi.New[xapi.Message]())
	batch := c.from(token, 0, "message")
	if got, want := summary(batch), "add message "+string(m); got != want {
		t.Errorf("got %q, want %q", got, want)
	}
	c.update(func(tx *db.Tx) error { return tx.Touch(c.model.Classes["message"], string(m)) })
	next := c.from(batch.Token, 0, "message")
	if len(next.Events) != 0 {
		t.Errorf("a message changed: %s", summary(next))
	}
	c.update(func(tx *db.Tx) error { return db.Delete(tx, m) })
	if got, want := summary(c.from(next.Token, 0, "message")), "del message "+string(m); got != want {
		t.Errorf("got %q, want %q", got, want)
	}
	if got := c.from("", 0, "message"); len(got.Events) != 0 {
		t.Errorf("a destroyed message from the beginning: %s", summary(got))
	}
}

func TestLegacyEvents(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newCore(t)
		c.wantFailure("SESSION_NOT_REGISTERED|"+string(c.root), c.root, "event.next")
		c.call("event.register", []string{"pool", "vm"})
		c.wantFailure("EVENT_SUBSCRIPTION_PARSE_FAILURE|", c.root, "event.register", []string{""})
		next := func() string {
			t.Helper()
			events := c.call("event.next").([]*xapi.Event)
			id := int64(0)
			for _, ev := range events {
				if ev.ID < id || !ev.Timestamp.Equal(c.now()) {
					t.Errorf("event %+v after id %d", ev, id)
				}
				id = ev.ID
			}
			return summary(&xapi.EventBatch{Events: events})
		}
		// QT-EV-2
		begin := time.Now()
		go func() {
			time.Sleep(2 * time.Second)
			c.call("pool.add_to_other_config", c.pool, "k", "v")
		}()
		if got, want := next(), "mod pool "+string(c.pool); got != want || time.Since(begin) > 2100*time.Millisecond {
			t.Errorf("got %q after %v, want %q", got, time.Since(begin), want)
		}
		vm := insert(c, xapi.New[xapi.VM]())
		if got, want := next(), "add vm "+string(vm); got != want {
			t.Errorf("got %q, want %q", got, want)
		}
		c.update(func(tx *db.Tx) error { return db.Delete(tx, vm) })
		if got, want := next(), "del vm "+string(vm); got != want {
			t.Errorf("got %q, want %q", got, want)
		}
		// The pool has a heartbeat, however much happens elsewhere.
		begin = time.Now()
		go func() {
			for range 10 {
				time.Sleep(4 * time.Second)
				c.call("host.set_name_label", c.host, time.Now().String())
			}
		}()
		if got, want := next(), "mod pool "+string(c.pool); got != want || time.Since(begin) != heartbeat {
			t.Errorf("got %q after %v, want %q", got, time.Since(begin), want)
		}
		c.call("event.unregister", []string{"POOL"})
		go func() {
			time.Sleep(time.Hour)
			c.call("pool.set_name_label", c.pool, "x")
			insert(c, xapi.New[xapi.VM]())
		}()
		begin = time.Now()
		if got := next(); !strings.HasPrefix(got, "add vm ") || strings.Contains(got, "pool") || time.Since(begin) < time.Hour {
			t.Errorf("after unregister: %q after %v", got, time.Since(begin))
		}
		if got, want := c.call("event.get_current_id").(int64), int64(c.db.Revision()); got != want {
			t.Errorf("current id %d, want %d", got, want)
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

// Deletions that the database no longer knows are lost for event.next, and
// show in the counts of event.from.
func TestEventsLost(t *testing.T) {
	c := newCore(t)
	vm := insert(c, xapi.New[xapi.VM]())
	c.call("event.register", []string{"vm"})
	token := c.from("", 0, "vm").Token
	c.update(func(tx *db.Tx) error { return db.Delete(tx, vm) })
	c.update(func(tx *db.Tx) error {
		for range 4200 {
			if _, err := db.Insert(tx, xapi.New[xapi.VM]()); err != nil {
				return err
			}
		}
		return nil
	})
	c.update(func(tx *db.Tx) error {
		for ref := range db.All[xapi.VM](tx) {
			if err := db.Delete(tx, ref); err != nil {
				return err
			}
		}
		return nil
	})
	c.wantFailure("EVENTS_LOST", c.root, "event.next")
	last := insert(c, xapi.New[xapi.VM]())
	if got, want := summary(&xapi.EventBatch{Events: c.call("event.next").([]*xapi.Event)}), "add vm "+string(last); got != want {
		t.Errorf("after EVENTS_LOST: %q, want %q", got, want)
	}
	batch := c.from(token, 0, "vm")
	if got := summary(batch); !strings.Contains(got, "add vm "+string(last)) || batch.ValidRefCounts["vm"] != 1 {
		t.Errorf("an old token: %d events, %v", len(batch.Events), batch.ValidRefCounts["vm"])
	}
}

func FuzzEventFrom(f *testing.F) {
	for _, s := range []string{"*", "vm", "VM/OpaqueRef:x", "", "/", "00000000000000000001,00000000000000000001", "1,1"} {
		f.Add(s, s)
	}
	a := &API{model: xapi.Datamodel()}
	f.Fuzz(func(t *testing.T, class, token string) {
		if _, _, err := a.parseSubscription(class); err != nil && description(err) != "EVENT_SUBSCRIPTION_PARSE_FAILURE|"+class {
			t.Errorf("%q: %v", class, err)
		}
		revision, err := parseToken(token)
		if err != nil && description(err) != "EVENT_FROM_TOKEN_PARSE_FAILURE|"+token {
			t.Errorf("%q: %v", token, err)
		}
		if again, err2 := parseToken(formatToken(revision)); err2 != nil || again != revision {
			t.Errorf("%q: %d becomes %d, %v", token, revision, again, err2)
		}
	})
}

// Thousands may wait, each for something else, at some KiB each.
func TestThousandsOfWatchers(t *testing.T) {
	const watchers = 5000
	synctest.Test(t, func(t *testing.T) {
		c := newCore(t)
		vm, other := insert(c, xapi.New[xapi.VM]()), insert(c, xapi.New[xapi.VM]())
		token := c.from("", 0, "*").Token
		heap := func() int64 {
			var m runtime.MemStats
			runtime.GC()
			runtime.ReadMemStats(&m)
			return int64(m.HeapAlloc + m.StackInuse)
		}
		before := heap()
		var all sync.WaitGroup
		var heard, idle atomic.Int64
		for i := range watchers {
			all.Go(func() {
				classes := []string{"vm/" + string(vm)}
				if i%2 == 1 {
					classes = []string{"vm/" + string(other)}
				}
				res, err := c.try(c.root, "event.from", classes, token, 600.0)
				switch {
				case err != nil:
					t.Error(err)
				case len(res.Value.(*xapi.EventBatch).Events) == 1:
					heard.Add(1)
				default:
					idle.Add(1)
				}
			})
		}
		synctest.Wait()
		if each := (heap() - before) / watchers; each > 64<<10 {
			t.Errorf("a watcher takes %d bytes", each)
		}
		for i := range 100 { // what nobody watches wakes nobody for good
			c.call("pool.set_name_label", c.pool, fmt.Sprint(i))
		}
		c.call("VM.set_name_label", vm, "changed")
		time.Sleep(time.Second)
		if n := heard.Load(); n != watchers/2 {
			t.Errorf("%d have heard of it, want %d", n, watchers/2)
		}
		all.Wait()
		if n := idle.Load(); n != watchers/2 {
			t.Errorf("%d waited in vain, want %d", n, watchers/2)
		}
	})
}
