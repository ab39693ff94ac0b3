package event

import (
	"context"
	"errors"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"coppice/internal/db"
	"coppice/internal/db/dbtest"
	"coppice/internal/xapi"
)

func TestNext(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := newHarness(t)
		var r Registration
		if _, err := h.Next(t.Context(), &r); err != ErrNotRegistered {
			t.Errorf("before the first Register: %v", err)
		}
		if err := h.Register(&r, []string{"pool", "vm"}); err != nil {
			t.Fatal(err)
		}
		h.wantError("EVENT_SUBSCRIPTION_PARSE_FAILURE|", h.Register(&r, []string{""}))
		h.wantError("EVENT_SUBSCRIPTION_PARSE_FAILURE|", h.Unregister(&r, []string{""}))
		next := func() string {
			t.Helper()
			events, err := h.Next(t.Context(), &r)
			if err != nil {
				t.Error(err)
			}
			id := int64(0)
			for _, ev := range events {
				if ev.ID < id || !ev.Timestamp.Equal(h.now()) {
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
			h.rename("x")
		}()
		if got, want := next(), "mod pool "+string(h.pool); got != want || time.Since(begin) > 2100*time.Millisecond {
			t.Errorf("got %q after %v, want %q", got, time.Since(begin), want)
		}
		vm := dbtest.Insert(h.objects, xapi.New[xapi.VM]())
		if got, want := next(), "add vm "+string(vm); got != want {
			t.Errorf("got %q, want %q", got, want)
		}
		h.objects.Change(func(tx *db.Tx) error { return db.Delete(tx, vm) })
		if got, want := next(), "del vm "+string(vm); got != want {
			t.Errorf("got %q, want %q", got, want)
		}
		// The pool has a heartbeat, however much happens elsewhere.
		begin = time.Now()
		go func() {
			for range 10 {
				time.Sleep(4 * time.Second)
				modify(h, h.host, func(r *xapi.Host) { r.NameLabel = time.Now().String() })
			}
		}()
		if got, want := next(), "mod pool "+string(h.pool); got != want || time.Since(begin) != heartbeat {
			t.Errorf("got %q after %v, want %q", got, time.Since(begin), want)
		}
		if err := h.Unregister(&r, []string{"POOL"}); err != nil {
			t.Fatal(err)
		}
		go func() {
			time.Sleep(time.Hour)
			h.rename("y")
			dbtest.Insert(h.objects, xapi.New[xapi.VM]())
		}()
		begin = time.Now()
		if got := next(); !strings.HasPrefix(got, "add vm ") || strings.Contains(got, "pool") || time.Since(begin) < time.Hour {
			t.Errorf("after unregister: %q after %v", got, time.Since(begin))
		}
		// It ends with its context, for its cause.
		gone := errors.New("gone")
		ctx, cancel := context.WithCancelCause(t.Context())
		time.AfterFunc(time.Hour, func() { cancel(gone) })
		begin = time.Now()
		if _, err := h.Next(ctx, &r); err != gone || time.Since(begin) != time.Hour {
			t.Errorf("%v after %v, want %v", err, time.Since(begin), gone)
		}
	})
}

// Deletions that the database no longer knows are lost for Next, and show
// in the counts of From.
func TestEventsLost(t *testing.T) {
	h := newHarness(t)
	vm := dbtest.Insert(h.objects, xapi.New[xapi.VM]())
	var r Registration
	if err := h.Register(&r, []string{"vm"}); err != nil {
		t.Fatal(err)
	}
	token := h.from("", 0, "vm").Token
	h.objects.Change(func(tx *db.Tx) error { return db.Delete(tx, vm) })
	h.objects.Change(func(tx *db.Tx) error {
		for range 4200 {
			if _, err := db.Insert(tx, xapi.New[xapi.VM]()); err != nil {
				return err
			}
		}
		return nil
	})
	h.objects.Change(func(tx *db.Tx) error {
		for ref := range db.All[xapi.VM](tx) {
			if err := db.Delete(tx, ref); err != nil {
				return err
			}
		}
		return nil
	})
	_, err := h.Next(t.Context(), &r)
	h.wantError("EVENTS_LOST", err)
	last := dbtest.Insert(h.objects, xapi.New[xapi.VM]())
	events, err := h.Next(t.Context(), &r)
	if got, want := summary(&xapi.EventBatch{Events: events}), "add vm "+string(last); err != nil || got != want {
		t.Errorf("after EVENTS_LOST: %q, %v, want %q", got, err, want)
	}
	batch := h.from(token, 0, "vm")
	if got := summary(batch); !strings.Contains(got, "add vm "+string(last)) || batch.ValidRefCounts["vm"] != 1 {
		t.Errorf("an old token: %d events, %v", len(batch.Events), batch.ValidRefCounts["vm"])
	}
}

// What a watcher waits for is short: it is kept all the time.
func TestLongSubscription(t *testing.T) {
	h := newHarness(t)
	for n, want := range map[int]string{maxSubscription: "", maxSubscription + 1: xapi.ErrEventSubscriptionParseFailure} {
		class := "VM/" + strings.Repeat("ü", n)[:n-len("VM/")]
		_, err := h.From(t.Context(), []string{class}, "", 0)
		e, _ := errors.AsType[*xapi.Error](err)
		if want == "" && err != nil || want != "" && (e == nil || e.Code != want || len(e.Params[0]) > maxSubscription+len("…")) {
			t.Errorf("%d bytes: %v, want %q", n, err, want)
		}
	}
}
