package api

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"

	"coppice/internal/storage"
	"coppice/internal/xapi"
)

func TestDispatchChecks(t *testing.T) {
	c := newCore(t)
	vmOperator := c.as("vm-operator")
	root, pool := string(c.root), string(c.pool)
	tests := []struct {
		name   string
		method string
		params []any
		want   string // description of the error, "" for success
	}{
		{"ok", "pool.get_name_label", []any{root, pool}, ""},
		{"other spelling", "pool_get_name_label", []any{root, pool}, ""},
		{"other spelling of a class with _", "VM_metrics_get_all", []any{root}, ""},
		{"no such class", "nothing.get_all", []any{root}, "MESSAGE_METHOD_UNKNOWN|nothing.get_all"},
		{"no such message", "pool.get_nothing", []any{root}, "MESSAGE_METHOD_UNKNOWN|pool.get_nothing"},
		{"case counts", "Pool.get_all", []any{root}, "MESSAGE_METHOD_UNKNOWN|Pool.get_all"},
		{"empty name", "", nil, "MESSAGE_METHOD_UNKNOWN|"},
		{"not async", "Async.pool.get_all", []any{root}, "MESSAGE_METHOD_UNKNOWN|Async.pool.get_all"},
		{"async in the other spelling", "Async.VDI_copy", []any{root}, "MESSAGE_METHOD_UNKNOWN|Async.VDI_copy"},
		{"no parameters at all", "pool.get_all", nil, "MESSAGE_PARAMETER_COUNT_MISMATCH|pool.get_all|0|-1"},
		{"too few", "pool.get_name_label", []any{root}, "MESSAGE_PARAMETER_COUNT_MISMATCH|pool.get_name_label|1|0"},
		{"too many", "pool.get_name_label", []any{root, pool, "x"}, "MESSAGE_PARAMETER_COUNT_MISMATCH|pool.get_name_label|1|2"},
		{"count before session", "pool.get_name_label", []any{"OpaqueRef:NULL"}, "MESSAGE_PARAMETER_COUNT_MISMATCH|pool.get_name_label|1|0"},
		{"too few with optional ones", "VM.snapshot", []any{root, "x"}, "MESSAGE_PARAMETER_COUNT_MISMATCH|VM.snapshot|2|1"},
		{"extra ones after optional ones", "session.login_with_password", []any{"root", "wrong", "1.1", "me", "x", "y"}, "SESSION_AUTHENTICATION_FAILED|root|Authentication failure"},
		{"session of the wrong type", "pool.get_all", []any{int64(1)}, "FIELD_TYPE_ERROR|session_id"},
		{"unknown session", "pool.get_all", []any{"OpaqueRef:x"}, "SESSION_INVALID|OpaqueRef:x"},
		{"null session", "pool.get_all", []any{"OpaqueRef:NULL"}, "SESSION_INVALID|OpaqueRef:NULL"},
		{"parameter of the wrong type", "pool.get_name_label", []any{root, int64(3)}, "FIELD_TYPE_ERROR|self"},
		{"value of the wrong type", "pool.set_name_label", []any{root, pool, []any{}}, "FIELD_TYPE_ERROR|name_label"},
		{"type before session", "pool.get_name_label", []any{"OpaqueRef:x", nil}, "FIELD_TYPE_ERROR|self"},
		{"enum", "task.set_status", []any{root, pool, "done"}, "INVALID_VALUE|value|done"},
		{"session before role", "pool.set_name_label", []any{"OpaqueRef:x", pool, "n"}, "SESSION_INVALID|OpaqueRef:x"},
		{"role before handle", "pool.set_name_label", []any{string(vmOperator), "OpaqueRef:gone", "n"}, "RBAC_PERMISSION_DENIED|pool.set_name_label|No permission in user session. (Roles with this permission: pool-admin, pool-operator)"},
		{"handle", "pool.set_name_label", []any{root, "OpaqueRef:gone", "n"}, "HANDLE_INVALID|pool|OpaqueRef:gone"},
		{"handle of another class", "VM.get_name_label", []any{root, pool}, "HANDLE_INVALID|VM|" + pool},
		{"removed", "VM.snapshot_with_quiesce", []any{root, pool, "n"}, "MESSAGE_REMOVED"},
		{"removed mechanical", "VBD_metrics.get_all", []any{root}, "MESSAGE_REMOVED"},
		{"deprecated without code", "SR.make", []any{root, string(c.host), map[string]any{}, "0", "n", "d", "t", "c"}, "MESSAGE_DEPRECATED"},
		{"deprecated mechanical", "host_cpu.get_all", []any{root}, ""},
		{"not written", "VM.csvm", []any{root, "OpaqueRef:x"}, "MESSAGE_DEPRECATED"},
		{"not implemented", "pool.enable_ha", []any{root, []any{}, map[string]any{}}, "NOT_IMPLEMENTED|pool.enable_ha"},
		{"storage layer only", "VDI.db_forget", []any{root, "OpaqueRef:x"}, "PERMISSION_DENIED|"},
		{"storage layer only, admin role", "VDI.set_sharable", []any{root, "OpaqueRef:x", true}, "PERMISSION_DENIED|"},
		{"isAlive", "system.isAlive:42", []any{"hello"}, ""},
		{"isAlive without parameter", "system.isAlive", nil, "MESSAGE_PARAMETER_COUNT_MISMATCH|system.isAlive|1|0"},
		{"pool only", "host.propose_new_master", []any{root, "x", false}, "INTERNAL_ERROR|host.propose_new_master is reserved for members of the pool"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			_, err := c.Invoke(t.Context(), Origin{}, tt.method, tt.params)
			if got := description(err); got != tt.want {
				t.Errorf("%s: got %q, want %q", tt.method, got, tt.want)
			}
		})
	}
}

func TestListMethods(t *testing.T) {
	c := newCore(t)
	res, err := c.Invoke(t.Context(), Origin{}, "system.listMethods", nil)
	if err != nil {
		t.Fatal(err)
	}
	names := res.Value.([]string)
	if !slices.IsSorted(names) {
		t.Error("not sorted")
	}
	for _, name := range []string{"pool.get_all_records", "VM_guest_metrics.get_all_records", "VDI.get_all_records", "event.from", "session.logout", "Async.VDI.copy"} {
		if _, ok := slices.BinarySearch(names, name); !ok {
			t.Errorf("%s is missing", name)
		}
	}
	for _, name := range []string{"session.get_all_records", "VBD_metrics.get_all_records", "pool.enable_ha", "VDI.db_forget", "pool_get_all"} {
		if _, ok := slices.BinarySearch(names, name); ok {
			t.Errorf("%s is listed", name)
		}
	}
	if got := asJSON(t, res); !strings.HasPrefix(got, `["`) {
		t.Errorf("JSON is not a bare array: %.20s", got)
	}
}

// Every name is dispatched under both spellings, and no spelling means two
// messages.
func TestSpellingsAreUnique(t *testing.T) {
	seen := map[string]string{}
	for _, class := range xapi.Datamodel().Ordered {
		for name := range class.Methods {
			full := class.Name + "." + name
			for _, spelling := range []string{full, class.Name + "_" + name} {
				if other, dup := seen[spelling]; dup {
					t.Errorf("%s means %s and %s", spelling, other, full)
				}
				seen[spelling] = full
			}
		}
	}
}

func TestBindRefusesMismatches(t *testing.T) {
	ok := func(*API, context.Context, *Call, xapi.Ref[xapi.VDI]) error { return nil }
	tests := []struct {
		name, method string
		fn           any
		want         string
	}{
		{"right", "VDI.update", ok, ""},
		{"no such message", "VDI.nothing", ok, "not in the datamodel"},
		{"not a function", "VDI.update", 3, "not to a function"},
		{"no parameter", "VDI.update", func(*API, context.Context, *Call) error { return nil }, "the datamodel wants"},
		{"another class", "VDI.update", func(*API, context.Context, *Call, xapi.Ref[xapi.VM]) error { return nil }, "the datamodel wants"},
		{"result of a void message", "VDI.update", func(*API, context.Context, *Call, xapi.Ref[xapi.VDI]) (string, error) { return "", nil }, "the datamodel wants"},
		{"removed message", "VM.snapshot_with_quiesce", func(*API, context.Context, *Call, xapi.Ref[xapi.VM], string) (xapi.Ref[xapi.VM], error) {
			return "", nil
		}, "the datamodel says removed"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			_, err := bind(xapi.Datamodel(), map[string]any{tt.method: tt.fn})
			if tt.want == "" && err != nil || tt.want != "" && (err == nil || !strings.Contains(err.Error(), tt.want)) {
				t.Errorf("got %v, want %q", err, tt.want)
			}
		})
	}
	if _, err := bind(xapi.Datamodel(), map[string]any{"VDI.update": ok}, map[string]any{"VDI.update": ok}); err == nil {
		t.Error("a message may be bound twice")
	}
}

// with binds another function to a message of c.
func (c *core) with(name string, fn any) {
	c.t.Helper()
	m := *c.methods[name]
	run, err := adapt(m.msg, fn)
	if err != nil {
		c.t.Fatal(err)
	}
	m.how, m.run = Written, run
	c.methods[name] = &m
}

// outcomes are ways a handler ends, and what the client is told.
var outcomes = []struct {
	name    string
	handler func() error
	want    string
	logged  bool
}{
	{"success", func() error { return nil }, "", false},
	{"API error", func() error { return xapi.NewError(xapi.ErrVDIInUse, "OpaqueRef:x", "update") }, "VDI_IN_USE|OpaqueRef:x|update", false},
	{"wrapped API error", func() error { return fmt.Errorf("updating: %w", xapi.NewError(xapi.ErrVDIInUse, "x")) }, "VDI_IN_USE|x", false},
	{"other error", func() error { return errors.New("it is odd") }, "INTERNAL_ERROR|it is odd", true},
	{"panic", func() error { panic("out of hand") }, "INTERNAL_ERROR|out of hand", true},
	{"no space", func() error { return fmt.Errorf("x: %w", &storage.SpaceError{Needed: 7, Free: 3}) }, "SR_BACKEND_FAILURE_44||There is insufficient space [opterr=7 bytes needed, 3 free]|", true},
	{"damage", func() error { return &storage.CorruptError{Volume: "v", Off: 4096, Detail: "d"} }, "VDI_IO_ERROR|Device I/O errors at byte 4096 of VDI v", true},
	{"no volume", func() error { return fmt.Errorf("x: %w", storage.ErrNotFound) }, "SR_BACKEND_FAILURE_46||The VDI is not available [opterr=x: no such volume]|", true},
	{"repo closed", func() error { return storage.ErrClosed }, "SR_BACKEND_FAILURE_47||The SR is not available [opterr=closed]|", true},
	{"repo read-only", func() error { return storage.ErrRepoReadOnly }, "SR_BACKEND_FAILURE_47||The SR has become read-only after a failure [opterr=repository has become read-only after a failure]|", true},
}

func TestHandlerOutcomes(t *testing.T) {
	c := newCore(t)
	var outcome func() error
	c.with("VDI.update", func(*API, context.Context, *Call, xapi.Ref[xapi.VDI]) error { return outcome() })
	for _, tt := range outcomes {
		t.Run(tt.name, func(t *testing.T) {
			outcome = tt.handler
			c.records.Reset()
			_, err := c.try(c.root, "VDI.update", "OpaqueRef:x")
			if got := description(err); got != tt.want {
				t.Errorf("got %q, want %q", got, tt.want)
			}
			if logged := c.records.Len() > 0; logged != tt.logged {
				t.Errorf("logged: %v, want %v: %s", logged, tt.logged, c.records)
			}
			if s := c.sessions.get(c.root); s.running.Load() != 0 || c.running.active != 0 {
				t.Error("the call has not ended")
			}
		})
	}
}

func TestResultsInBothDialects(t *testing.T) {
	c := newCore(t)
	vm := xapi.New[xapi.VM]()
	vm.NameLabel, vm.MemoryStaticMax, vm.Tags = "a <b>", 1<<40, []string{"x", "y"}
	ref := insert(c, vm)
	tests := []struct{ method, xml, json string }{
		{"VM.get_name_label", "<value>a &lt;b&gt;</value>", `"a <b>"`},
		{"VM.get_memory_static_max", "<value>1099511627776</value>", "1099511627776"},
		{"VM.get_is_a_template", "<value><boolean>0</boolean></value>", "false"},
		{"VM.get_snapshot_time", "<value><dateTime.iso8601>19700101T00:00:00Z</dateTime.iso8601></value>", `"19700101T00:00:00Z"`},
		{"VM.get_tags", "<value><array><data><value>x</value><value>y</value></data></array></value>", `["x","y"]`},
		{"VM.get_other_config", "<value><struct></struct></value>", "{}"},
		{"VM.get_snapshot_of", "<value>OpaqueRef:NULL</value>", `"OpaqueRef:NULL"`},
		{"VM.get_VBDs", "<value><array><data></data></array></value>", "[]"},
	}
	for _, tt := range tests {
		res, err := c.try(c.root, tt.method, ref)
		if err != nil {
			t.Fatal(err)
		}
		if got := asXML(t, res); got != tt.xml {
			t.Errorf("%s: XML %s, want %s", tt.method, got, tt.xml)
		}
		if got := asJSON(t, res); got != tt.json {
			t.Errorf("%s: JSON %s, want %s", tt.method, got, tt.json)
		}
	}
	res, err := c.try(c.root, "VM.set_name_label", ref, "n")
	if err != nil {
		t.Fatal(err)
	}
	if x, j := asXML(t, res), asJSON(t, res); x != "<value></value>" || j != `""` {
		t.Errorf("void: %s and %s", x, j)
	}
}
