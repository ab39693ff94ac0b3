package api

import (
	"fmt"
	"maps"
	"regexp"
	"slices"
	"strings"
	"testing"

	"coppice/internal/rpc"
)

// onDialects runs a test that has nothing to do with storage in each syntax.
func onDialects(t *testing.T, test func(t *testing.T, w *wire)) {
	for name, dialect := range map[string]rpc.Dialect{"XML-RPC": rpc.XMLRPC, "JSON-RPC": rpc.JSONRPC2} {
		t.Run(name, func(t *testing.T) { test(t, &wire{newRig(t), dialect}) })
	}
}

// wireEvent is an event as it comes over the wire.
type wireEvent struct{ op, class, ref string }

// batch is what event.from answers.
type batch struct {
	events []wireEvent
	counts map[string]any
	token  string
}

// batchOf reads the answer of event.from.
func batchOf(t *testing.T, v any) batch {
	t.Helper()
	m := v.(map[string]any)
	return batch{events: eventsOf(t, m["events"]), counts: m["valid_ref_counts"].(map[string]any), token: m["token"].(string)}
}

func eventsOf(t *testing.T, v any) (events []wireEvent) {
	t.Helper()
	for _, e := range v.([]any) {
		m := e.(map[string]any)
		events = append(events, wireEvent{m["operation"].(string), m["class"].(string), m["ref"].(string)})
		if _, has := m["snapshot"]; has != (m["operation"] != "del") {
			t.Errorf("a snapshot in %v: %v", m["operation"], has)
		}
	}
	return events
}

// from calls event.from.
func (w *wire) from(token string, timeout float64, classes ...string) batch {
	w.t.Helper()
	return batchOf(w.t, w.call("event.from", classes, token, timeout))
}

// session logs somebody in.
func (w *wire) session() string {
	w.t.Helper()
	s, err := w.Login(w.t.Context(), trusted, "root", "any")
	if err != nil {
		w.t.Fatal(err)
	}
	return string(s)
}

// later makes a call that is going to wait, in a session; what it returns waits
// for the answer.
func (w *wire) later(session, name string, params ...any) (answer func() (any, error)) {
	type outcome struct {
		v   any
		err error
	}
	done := make(chan outcome, 1)
	go func() {
		v, err := w.sendIn(session, name, params...)
		done <- outcome{v, err}
	}()
	return func() (any, error) {
		o := <-done
		return o.v, o.err
	}
}

func TestQT_EV_1(t *testing.T) {
	onDialects(t, func(t *testing.T, w *wire) {
		s := w.session()
		if _, err := w.sendIn(s, "event.register", []string{}); err != nil {
			t.Fatal(err)
		}
		next := w.later(s, "event.next")
		if _, err := w.sendIn(s, "session.logout"); err != nil {
			t.Fatal(err)
		}
		if v, err := next(); err == nil || !strings.Contains(err.Error(), "SESSION_INVALID") {
			t.Errorf("event.next after the end of its session: %v, %v", v, err)
		}
	})
}

func TestQT_EV_2(t *testing.T) {
	onDialects(t, func(t *testing.T, w *wire) {
		w.call("event.register", []string{"pool"})
		next := w.later(string(w.root), "event.next")
		w.call("pool.add_to_other_config", w.pool, "qt", "ev2")
		v, err := next()
		if err != nil {
			t.Fatal(err)
		}
		if got := eventsOf(t, v); !slices.Equal(got, []wireEvent{{"mod", "pool", string(w.pool)}}) {
			t.Errorf("events %v", got)
		}
		if m := w.call("pool.get_other_config", w.pool).(map[string]any); m["qt"] != "ev2" {
			t.Errorf("other_config %v", m)
		}
		w.call("event.unregister", []string{"pool"})
	})
}

func TestQT_EV_3(t *testing.T) {
	onDialects(t, func(t *testing.T, w *wire) {
		b := w.from("", 10, "pool")
		if !slices.Contains(b.events, wireEvent{"add", "pool", string(w.pool)}) {
			t.Errorf("from the beginning: %v", b.events)
		}
		from := w.later(string(w.root), "event.from", []string{"pool"}, b.token, 3600.0)
		w.call("pool.add_to_other_config", w.pool, "qt", "ev3")
		v, err := from()
		if err != nil {
			t.Fatal(err)
		}
		if got := batchOf(t, v); !slices.Equal(got.events, []wireEvent{{"mod", "pool", string(w.pool)}}) || got.token <= b.token {
			t.Errorf("events %v, token %s after %s", got.events, got.token, b.token)
		}
	})
}

func TestQT_EV_4(t *testing.T) {
	onDialects(t, func(t *testing.T, w *wire) {
		token := w.from("", 0, "pool").token
		nothing := w.later(string(w.root), "event.from", []string{}, "", 0.3)
		pool := w.later(string(w.root), "event.from", []string{"pool"}, token, 3600.0)
		w.call("pool.add_to_other_config", w.pool, "qt", "ev4")
		for name, answer := range map[string]func() (any, error){"nothing": nothing, "pool": pool} {
			v, err := answer()
			if err != nil {
				t.Fatalf("%s: %v", name, err)
			}
			want := map[string]int{"nothing": 0, "pool": 1}[name]
			if got := batchOf(t, v); len(got.events) != want || got.token == "" {
				t.Errorf("%s: %v, token %q", name, got.events, got.token)
			}
		}
	})
}

func TestQT_EV_5(t *testing.T) {
	onDialects(t, func(t *testing.T, w *wire) {
		one, other := w.vm("one"), w.vm("other")
		watched := "vm/" + string(one)
		b := w.from("", 10, watched)
		seen := b.events
		for i := range 3 {
			w.call("VM.set_name_description", other, fmt.Sprint(i))
			w.call("VM.set_name_description", one, fmt.Sprint(i))
			w.call("VM.set_name_description", other, fmt.Sprint(-i))
			b = w.from(b.token, 10, watched)
			seen = append(seen, b.events...)
		}
		if n := len(seen); n < 4 {
			t.Errorf("%d events", n)
		}
		for _, e := range seen {
			if e.ref != string(one) {
				t.Errorf("event %v", e)
			}
		}
		w.call("VM.destroy", one)
		w.call("VM.destroy", other)
	})
}

func TestQT_EV_6(t *testing.T) {
	onDialects(t, func(t *testing.T, w *wire) {
		vm := w.text("VM.get_uuid", w.dom0)
		b := w.from("", 0, "message")
		var refs []string
		for i := range 3 {
			ref := w.text("message.create", fmt.Sprint("m", i), 1, "VM", vm, "")
			refs = append(refs, ref)
			b = w.from(b.token, 10, "message")
			if !slices.Equal(b.events, []wireEvent{{"add", "message", ref}}) {
				t.Errorf("after create: %v", b.events)
			}
		}
		all := w.call("message.get", "VM", vm, "19700101T00:00:00Z").(map[string]any)
		for _, ref := range refs {
			if all[ref] == nil {
				t.Errorf("message.get has not %s", ref)
			}
		}
		w.call("message.destroy", refs[1])
		b = w.from(b.token, 10, "message")
		if !slices.Equal(b.events, []wireEvent{{"del", "message", refs[1]}}) {
			t.Errorf("after destroy: %v", b.events)
		}
		if again := w.from(b.token, 0, "message"); len(again.events) != 0 {
			t.Errorf("again: %v", again.events)
		}
		for _, e := range w.from("", 0, "message").events {
			if e.ref == refs[1] && e.op != "del" {
				t.Errorf("from the beginning: %v", e)
			}
		}
		one := w.call("message.get_record", refs[0]).(map[string]any)
		if one["name"] != "m0" || one["obj_uuid"] != vm || w.text("message.get_by_uuid", one["uuid"]) != refs[0] {
			t.Errorf("message %v", one)
		}
		w.refuses("HANDLE_INVALID|message|OpaqueRef:no", "message.destroy_many", []string{refs[0], "OpaqueRef:no"})
		w.call("message.destroy_many", []string{refs[0], refs[2]})
		if left := w.list("message.get_all"); len(left) != 0 {
			t.Errorf("left: %q", left)
		}
	})
}

func TestQT_EV_7(t *testing.T) {
	onDialects(t, func(t *testing.T, w *wire) {
		token := w.from("", 0, "pool").token
		from := w.later(string(w.root), "event.from", []string{"pool"}, token, 3600.0)
		before := w.text("event.inject", "pool", string(w.pool))
		v, err := from()
		if err != nil {
			t.Fatal(err)
		}
		if got := batchOf(t, v).events; !slices.Equal(got, []wireEvent{{"mod", "pool", string(w.pool)}}) {
			t.Errorf("events %v", got)
		}
		if got := w.from(before, 3600, "pool").events; len(got) != 1 { // the barrier of clients
			t.Errorf("from the token of the injection: %v", got)
		}
		w.refuses("HANDLE_INVALID|POOL|"+string(w.pool), "event.inject", "POOL", string(w.pool))
		w.refuses("HANDLE_INVALID|pool|OpaqueRef:x", "event.inject", "pool", "OpaqueRef:x")
	})
}

func TestQT_EV_8(t *testing.T) {
	onDialects(t, func(t *testing.T, w *wire) {
		vm := w.vm("vm")
		for i := range 5 {
			w.call("VM.set_name_description", vm, fmt.Sprint(i))
		}
		b := w.from("", 10, "vm")
		seen := map[string]int{}
		for _, e := range b.events {
			seen[e.ref]++
		}
		if len(seen) != len(w.list("VM.get_all")) || slices.Max(slices.Collect(maps.Values(seen))) != 1 {
			t.Errorf("events %v", b.events)
		}
		if n := fmt.Sprint(b.counts["vm"]); n != fmt.Sprint(len(seen)) {
			t.Errorf("valid_ref_counts %s, %d VMs", n, len(seen))
		}
		w.call("VM.destroy", vm)
	})
}

func TestQT_MSG_1(t *testing.T) {
	onDialects(t, func(t *testing.T, w *wire) {
		vm := w.text("VM.get_uuid", w.dom0)
		ref := w.text("message.create", "X", 100, "VM", vm, "body")
		for expr, want := range map[string]int{
			`field "name" = "X"`: 1, `field "priority" = "100"`: 1, `field "cls" = "VM"`: 1,
			`field "name" = "X" and field "priority" = "100"`: 1, `field "name" = "Y" or field "cls" = "VM"`: 1,
			`field "name" = "Y"`: 0, `field "class" = "VM"`: 0,
		} {
			if got := w.call("message.get_all_records_where", expr).(map[string]any); len(got) != want {
				t.Errorf("%s: %d messages, want %d", expr, len(got), want)
			}
		}
		w.call("message.destroy", ref)
		w.refuses("HANDLE_INVALID|message|"+ref, "message.destroy", ref)
		w.refuses("UUID_INVALID|VM|nobody", "message.create", "X", 1, "VM", "nobody", "")
		w.refuses("UUID_INVALID|VM|nobody", "message.get", "VM", "nobody", "19700101T00:00:00Z")
	})
}

func TestQT_DATE_1(t *testing.T) {
	onDialects(t, func(t *testing.T, w *wire) {
		if v, err := w.send("host.get_server_localtime", w.host); err != nil {
			t.Errorf("host.get_server_localtime: %v, %v", v, err)
		}
	})
}

func TestQT_DATE_2(t *testing.T) {
	onDialects(t, func(t *testing.T, w *wire) {
		vm := w.text("VM.get_uuid", w.dom0)
		ref := w.text("message.create", "X", 1, "VM", vm, "")
		for _, since := range []string{
			"2026-01-01T00:00:00Z", "2026-01-01T00:00:00", "20260101T00:00:00Z", "20260101T00:00:00", "20260101T00:00:00-12:00",
		} {
			if got := w.call("message.get_since", since).(map[string]any); got[ref] == nil {
				t.Errorf("since %s: %d messages, without the one of now", since, len(got))
			}
		}
		w.refuses("INVALID_VALUE|since|yesterday", "message.get_since", "yesterday")
		w.call("message.destroy", ref)
	})
}

func TestQT_OBJ_1(t *testing.T) {
	onDialects(t, func(t *testing.T, w *wire) {
		for _, pbd := range w.list("PBD.get_all") {
			if got := w.text("PBD.get_by_uuid", w.text("PBD.get_uuid", pbd)); got != pbd {
				t.Errorf("got %s, want %s", got, pbd)
			}
		}
	})
}

func TestQT_ASYNC_1(t *testing.T) {
	onDialects(t, func(t *testing.T, w *wire) {
		source := w.disk(4 << 20)
		task := w.text("Async.VDI.copy", source, string(w.sr), "OpaqueRef:NULL", "OpaqueRef:NULL")
		b := w.from("", 0, "task")
		for w.text("task.get_status", task) == "pending" {
			b = w.from(b.token, 3600, "task/"+task)
		}
		if got := w.text("task.get_status", task); got != "success" {
			t.Fatalf("status %s, %v", got, w.call("task.get_error_info", task))
		}
		result := w.text("task.get_result", task)
		m := regexp.MustCompile(`^<value>(OpaqueRef:[-0-9a-f]+)</value>$`).FindStringSubmatch(result)
		if m == nil {
			t.Fatalf("result %q", result)
		}
		w.call("VDI.destroy", m[1])
		w.refuses("HANDLE_INVALID|VDI|"+m[1], "VDI.destroy", m[1])
		w.call("VDI.destroy", source)
		w.call("task.destroy", task)
		w.refuses("HANDLE_INVALID|task|"+task, "task.get_status", task)
	})
}
