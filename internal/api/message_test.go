package api

import (
	"strings"
	"testing"
	"time"

	"coppice/internal/db"
	"coppice/internal/xapi"
)

func TestMessagesSurviveARestart(t *testing.T) {
	r := newRig(t)
	vm := record(r.core, r.dom0).UUID
	r.call("message.create", "kept", 3, "VM", vm, "body")
	gone := r.call("message.create", "gone", 3, "VM", vm, "").(xapi.Ref[xapi.Message])
	r.call("message.destroy", string(gone))
	want := r.call("message.get_all_records").(messages)
	r.restart()
	got := r.call("message.get_all_records").(messages)
	if len(got) != 1 || len(want) != 1 {
		t.Fatalf("%d messages, there were %d; want 1", len(got), len(want))
	}
	for ref, m := range want {
		if g := got[ref]; g == nil || *g != *m {
			t.Errorf("got %+v, want %+v", g, m)
		}
	}
	r.wantFailure("VALUE_NOT_SUPPORTED|body|65537 bytes", r.root, "message.create", "x", 1, "VM", vm, strings.Repeat("x", 64<<10))
}

func TestAlert(t *testing.T) {
	c := newCore(t)
	c.update(func(tx *db.Tx) error { return c.alert(tx, "VM_SNAPSHOTTED", xapi.ClsVM, "a-uuid", "body") })
	for _, m := range c.call("message.get_all_records").(messages) {
		if m.Name != "VM_SNAPSHOTTED" || m.Priority != 5 || m.ObjUUID != "a-uuid" {
			t.Errorf("message %+v", m)
		}
	}
	err := c.db.Update(t.Context(), func(tx *db.Tx) error { return c.alert(tx, "NO_SUCH_ALERT", xapi.ClsVM, "", "") })
	if code(err) != xapi.ErrInternalError {
		t.Errorf("an alert that nobody knows: %v", err)
	}
}

// Messages are bounded; the oldest make room.
func TestMessagesBounded(t *testing.T) {
	r := newRig(t)
	vm := record(r.core, r.dom0).UUID
	r.update(func(tx *db.Tx) error {
		for i := range maxMessages {
			m := xapi.New[xapi.Message]()
			m.Name, m.Timestamp = "old", time.Unix(int64(1000+i), 0)
			if _, err := db.Insert(tx, m); err != nil {
				return err
			}
		}
		return nil
	})
	r.call("message.create", "new", 1, "VM", vm, "")
	var oldest time.Time
	n := 0
	r.view(func(tx *db.Tx) {
		for _, m := range db.All[xapi.Message](tx) {
			if n++; oldest.IsZero() || m.Timestamp.Before(oldest) {
				oldest = m.Timestamp
			}
		}
	})
	if n != maxMessages || oldest.Unix() != 1001 {
		t.Errorf("%d messages, the oldest of %d", n, oldest.Unix())
	}
}

// All messages go, and no filter is guessed at.
func TestMessageDestroyAll(t *testing.T) {
	c := newCore(t)
	for _, body := range []string{"one", "two"} {
		c.update(func(tx *db.Tx) error { return c.alert(tx, "VM_SNAPSHOTTED", xapi.ClsVM, "a-uuid", body) })
	}
	c.wantFailure("VALUE_NOT_SUPPORTED|filters|priority", c.root, "message.destroy_all", map[string]string{"priority": "3"})
	if n := len(c.call("message.get_all").([]xapi.Ref[xapi.Message])); n != 2 {
		t.Errorf("%d messages, want 2", n)
	}
	c.call("message.destroy_all", map[string]string{})
	if n := len(c.call("message.get_all").([]xapi.Ref[xapi.Message])); n != 0 {
		t.Errorf("%d messages are left", n)
	}
}
