package event

import (
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"coppice/internal/db"
	"coppice/internal/db/dbtest"
	"coppice/internal/xapi"
)

// harness is the feed of a database that has a pool and a host.
type harness struct {
	*Feed
	t       *testing.T
	objects *dbtest.DB
	pool    xapi.Ref[xapi.Pool]
	host    xapi.Ref[xapi.Host]
}

func newHarness(t *testing.T) *harness {
	t.Helper()
	d := dbtest.Open(t)
	h := &harness{Feed: New(d.DB, xapi.Datamodel(), func() time.Time { return time.Now().UTC() }), t: t, objects: d}
	h.host = dbtest.Insert(h.objects, xapi.New[xapi.Host]())
	h.pool = dbtest.Insert(h.objects, xapi.New[xapi.Pool]())
	return h
}

// modify changes an object.
func modify[T any](h *harness, ref xapi.Ref[T], change func(*T)) {
	h.t.Helper()
	h.objects.Change(func(tx *db.Tx) error { return db.Modify(tx, ref, change) })
}

// rename changes the pool.
func (h *harness) rename(name string) {
	h.t.Helper()
	modify(h, h.pool, func(p *xapi.Pool) { p.NameLabel = name })
}

// describe changes a VM.
func (h *harness) describe(vm xapi.Ref[xapi.VM], text string) {
	h.t.Helper()
	modify(h, vm, func(v *xapi.VM) { v.NameDescription = text })
}

// from is From, which must not fail.
func (h *harness) from(token string, timeout float64, classes ...string) *xapi.EventBatch {
	h.t.Helper()
	told, err := h.From(h.t.Context(), classes, token, timeout)
	if err != nil {
		h.t.Errorf("%q after %q: %v", classes, token, err)
		return &xapi.EventBatch{Token: token}
	}
	return told.Batch
}

// wantError checks an API error, parameters joined by |.
func (h *harness) wantError(want string, err error) {
	h.t.Helper()
	if got := description(err); got != want {
		h.t.Errorf("got %q, want %q", got, want)
	}
}

// description is the code and the parameters of an API error, joined; the text of any other.
func description(err error) string {
	if e, ok := errors.AsType[*xapi.Error](err); ok {
		return strings.Join(e.Description(), "|")
	}
	return fmt.Sprint(err)
}

// summary is "op class ref" of every event, in order.
func summary(b *xapi.EventBatch) string {
	var s []string
	for _, ev := range b.Events {
		s = append(s, fmt.Sprintf("%s %s %s", ev.Operation, ev.Class, ev.Ref))
	}
	return strings.Join(s, "\n")
}

func TestFromSeesEveryChangeOnce(t *testing.T) {
	h := newHarness(t)
	a, b := dbtest.Insert(h.objects, xapi.New[xapi.VM]()), dbtest.Insert(h.objects, xapi.New[xapi.VM]())
	batch := h.from("", 0, "vm")
	if got, want := summary(batch), fmt.Sprintf("add vm %s\nadd vm %s", a, b); got != want {
		t.Errorf("from the beginning:\n%s\nwant\n%s", got, want)
	}
	token := batch.Token

	if batch = h.from(token, 0, "vm"); len(batch.Events) != 0 {
		t.Errorf("nothing happened, and yet %s", summary(batch))
	}
	h.describe(b, "x")
	h.rename("x")
	if got, want := summary(h.from(token, 0, "vm")), "mod vm "+string(b); got != want {
		t.Errorf("got %s, want %s", got, want)
	}
	added := dbtest.Insert(h.objects, xapi.New[xapi.VM]())
	h.describe(added, "x") // still an add
	passing := dbtest.Insert(h.objects, xapi.New[xapi.VM]())
	h.objects.Change(func(tx *db.Tx) error { return db.Delete(tx, passing) })
	h.objects.Change(func(tx *db.Tx) error { return db.Delete(tx, a) })
	batch = h.from(token, 0, "VM")
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
	if batch = h.from(batch.Token, 0, "vm"); len(batch.Events) != 0 {
		t.Errorf("the next batch repeats %s", summary(batch))
	}
}

func TestFromSubscriptions(t *testing.T) {
	h := newHarness(t)
	vm, other := dbtest.Insert(h.objects, xapi.New[xapi.VM]()), dbtest.Insert(h.objects, xapi.New[xapi.VM]())
	for _, tt := range []struct {
		classes []string
		want    []string // "class ref"
	}{
		{[]string{"vm"}, []string{"vm " + string(vm), "vm " + string(other)}},
		{[]string{"VM/" + string(vm)}, []string{"vm " + string(vm)}}, // QT-EV-5
		{[]string{"vm/" + string(vm), "POOL"}, []string{"pool " + string(h.pool), "vm " + string(vm)}},
		{[]string{"*"}, []string{"host " + string(h.host), "pool " + string(h.pool), "vm " + string(vm), "vm " + string(other)}},
		{[]string{"nothing", "session", "secret", "user"}, nil},
		{nil, nil},
	} {
		var got []string
		for _, ev := range h.from("", 0, tt.classes...).Events {
			got = append(got, ev.Class+" "+ev.Ref)
		}
		slices.Sort(got)
		slices.Sort(tt.want)
		if !slices.Equal(got, tt.want) {
			t.Errorf("%q: got %q, want %q", tt.classes, got, tt.want)
		}
	}
	for _, bad := range []string{"", "/", "/x", "vm/", "vm/a/b"} {
		_, err := h.From(t.Context(), []string{"vm", bad}, "", 0)
		h.wantError("EVENT_SUBSCRIPTION_PARSE_FAILURE|"+bad, err)
	}
	for _, bad := range []string{"x", "1", "1,", ",1", "1,x", "-1,0", "1,2,3", "99999999999999999999,0"} {
		_, err := h.From(t.Context(), []string{"vm"}, bad, 0)
		h.wantError("EVENT_FROM_TOKEN_PARSE_FAILURE|"+bad, err)
	}
	// A token of a revision that is not reached yet is of another database.
	if batch := h.from(formatToken(db.Position{Revision: 1 << 40}), 0, "vm"); len(batch.Events) != 2 {
		t.Errorf("a token of the future: %s", summary(batch))
	}
}

// QT-EV-3 and QT-EV-7: a waiting event.from returns soon after the change.
func TestFromWaits(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := newHarness(t)
		token := h.from("", 0, "pool").Token
		for name, change := range map[string]func(){
			"modify": func() { h.rename("x") },
			"inject": func() {
				if _, err := h.Inject(t.Context(), "pool", string(h.pool)); err != nil {
					t.Error(err)
				}
			},
		} {
			begin := time.Now()
			go func() {
				time.Sleep(2 * time.Second)
				change()
			}()
			batch := h.from(token, 10, "pool")
			if got, want := summary(batch), "mod pool "+string(h.pool); got != want {
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
				modify(h, h.host, func(r *xapi.Host) { r.NameLabel = time.Now().String() })
			}
		}()
		batch := h.from(token, 5, "pool")
		if len(batch.Events) != 0 || time.Since(begin) != 5*time.Second {
			t.Errorf("got %q after %v, want nothing after 5 s", summary(batch), time.Since(begin))
		}
		if batch.Token <= token || batch.ValidRefCounts["host"] != 1 {
			t.Errorf("batch of a timeout: %+v", batch)
		}
	})
}

// A change that is alone is told soon; of many in a row a call collects some.
func TestFromCollects(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := newHarness(t)
		token := h.from("", 0, "pool").Token
		for _, test := range []struct {
			calm    time.Duration // until the first one
			changes int           // one a millisecond
			want    time.Duration // from the first one
		}{
			{calmPause, 1, briefPause},
			{calmPause, 200, briefPause},
			{calmPause - 1, 1, calmPause},
			{time.Millisecond, 10, 9*time.Millisecond + calmPause},
			{time.Millisecond, 200, fullPause},
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
					h.rename(strconv.Itoa(i) + " of " + strconv.Itoa(test.changes))
				}
			}()
			batch := h.from(token, 10, "pool", "host")
			if got, want := summary(batch), "mod pool "+string(h.pool); got != want {
				t.Errorf("%d changes: got %s, want %s", test.changes, got, want)
			}
			if d := time.Since(begin) - test.calm; d != test.want {
				t.Errorf("%d changes: told after %v, want %v", test.changes, d, test.want)
			}
			<-done
			token = h.from("", 0, "pool").Token
		}
		// Who watches nothing waits for nothing but the end.
		begin := time.Now()
		if batch := h.from(token, 3); len(batch.Events) != 0 || time.Since(begin) != 3*time.Second {
			t.Errorf("got %q after %v, want nothing after 3 s", summary(batch), time.Since(begin))
		}
	})
}

// QT-EV-4: concurrent calls of one session are independent.
func TestFromConcurrently(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := newHarness(t)
		token := h.from("", 0, "pool").Token
		begin := time.Now()
		done := make(chan time.Duration)
		go func() {
			if batch := h.from("", 10); len(batch.Events) != 0 {
				t.Errorf("no classes: %s", summary(batch))
			}
			done <- time.Since(begin)
		}()
		go func() {
			h.from(token, 10, "pool")
			done <- time.Since(begin)
		}()
		time.Sleep(time.Second)
		h.rename("x")
		if d := <-done; d > 1100*time.Millisecond {
			t.Errorf("the one with a class returned after %v", d)
		}
		if d := <-done; d != 10*time.Second {
			t.Errorf("the empty one returned after %v", d)
		}
	})
}

func TestInject(t *testing.T) {
	h := newHarness(t)
	token, err := h.Inject(t.Context(), "pool", string(h.pool))
	if err != nil {
		t.Fatal(err)
	}
	if got, want := summary(h.from(token, 0, "pool")), "mod pool "+string(h.pool); got != want {
		t.Errorf("got %q, want %q", got, want)
	}
	for _, class := range []string{"Pool", "host", "nothing", ""} {
		_, err := h.Inject(t.Context(), class, string(h.pool))
		h.wantError("HANDLE_INVALID|"+class+"|"+string(h.pool), err)
	}
	_, err = h.Inject(t.Context(), "pool", "OpaqueRef:x")
	h.wantError("HANDLE_INVALID|pool|OpaqueRef:x", err)
}

// QT-EV-6, as far as events go: messages come and go but do not change.
func TestMessageEvents(t *testing.T) {
	h := newHarness(t)
	token := h.from("", 0, "message").Token
	m := dbtest.Insert(h.objects, xapi.New[xapi.Message]())
	batch := h.from(token, 0, "message")
	if got, want := summary(batch), "add message "+string(m); got != want {
		t.Errorf("got %q, want %q", got, want)
	}
	h.objects.Change(func(tx *db.Tx) error { return tx.Touch(h.model.Classes["message"], string(m)) })
	next := h.from(batch.Token, 0, "message")
	if len(next.Events) != 0 {
		t.Errorf("a message changed: %s", summary(next))
	}
	h.objects.Change(func(tx *db.Tx) error { return db.Delete(tx, m) })
	if got, want := summary(h.from(next.Token, 0, "message")), "del message "+string(m); got != want {
		t.Errorf("got %q, want %q", got, want)
	}
	if got := h.from("", 0, "message"); len(got.Events) != 0 {
		t.Errorf("a destroyed message from the beginning: %s", summary(got))
	}
}

func FuzzFrom(f *testing.F) {
	for _, s := range []string{"*", "vm", "VM/OpaqueRef:x", "", "/", "00000000000000000001,00000000000000000001", "1,1"} {
		f.Add(s, s)
	}
	feed := &Feed{model: xapi.Datamodel()}
	f.Fuzz(func(t *testing.T, class, token string) {
		shown := class
		if len(class) > maxSubscription {
			shown = strings.ToValidUTF8(class[:maxSubscription], "") + "…"
		}
		if _, _, err := feed.subscription(class); err != nil && description(err) != "EVENT_SUBSCRIPTION_PARSE_FAILURE|"+shown {
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
