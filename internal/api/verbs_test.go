package api

import (
	"context"
	"errors"
	"slices"
	"strings"
	"testing"

	"coppice/internal/xapi"

	"github.com/google/go-cmp/cmp"
)

func TestLookups(t *testing.T) {
	c := newCore(t)
	vm := xapi.New[xapi.VM]()
	vm.NameLabel = "twin"
	a := insert(c, vm)
	other := xapi.New[xapi.VM]()
	other.NameLabel = "twin"
	b := insert(c, other)
	both := []string{string(a), string(b)}
	slices.Sort(both)

	if got := sortedStrings(c.call("VM.get_all")); !slices.Equal(got, both) {
		t.Errorf("get_all: %q, want %q", got, both)
	}
	if got := sortedStrings(c.call("VM.get_by_name_label", "twin")); !slices.Equal(got, both) {
		t.Errorf("get_by_name_label: %q, want %q", got, both)
	}
	if got := c.call("VM.get_by_name_label", "nobody").([]string); got == nil || len(got) != 0 {
		t.Errorf("get_by_name_label of nobody: %#v", got)
	}
	uuid := c.call("VM.get_uuid", a).(string)
	if got := c.call("VM.get_by_uuid", uuid); got != string(a) {
		t.Errorf("get_by_uuid: %v, want %v", got, a)
	}
	c.wantFailure("UUID_INVALID|VM|"+string(a), c.root, "VM.get_by_uuid", a)
	c.wantFailure("UUID_INVALID|network|"+uuid, c.root, "network.get_by_uuid", uuid)
	if got := c.call("VM.get_record", a).(*xapi.VM); got.NameLabel != "twin" || got.UUID != uuid {
		t.Errorf("get_record: %+v", got)
	}
	c.wantFailure("HANDLE_INVALID|VM|OpaqueRef:x", c.root, "VM.get_record", "OpaqueRef:x")
	c.wantFailure("HANDLE_INVALID|VM|OpaqueRef:NULL", c.root, "VM.get_record", "")

	res, err := c.try(c.root, "VM.get_all_records")
	if err != nil {
		t.Fatal(err)
	}
	if text := asJSON(t, res); strings.Count(text, `"name_label":"twin"`) != 2 || !strings.Contains(text, `"`+string(a)+`":{`) {
		t.Errorf("get_all_records: %s", text)
	}
	if text := asXML(t, res); strings.Count(text, "<name>name_label</name><value>twin</value>") != 2 {
		t.Errorf("get_all_records: %s", text)
	}
	third := xapi.New[xapi.VM]()
	third.NameLabel = "single"
	single := string(insert(c, third))
	if got := c.call("VM.get_all_where", `field "name__label" = "single"`).([]string); !slices.Equal(got, []string{single}) {
		t.Errorf("get_all_where: %q, want %q", got, single)
	}
	if res, err = c.try(c.root, "VM.get_all_records_where", `not field "name__label" = "twin"`); err != nil {
		t.Fatal(err)
	}
	if text := asJSON(t, res); strings.Count(text, `"name_label"`) != 1 || !strings.Contains(text, `"`+single+`":{`) {
		t.Errorf("get_all_records_where: %s", text)
	}
	for _, m := range []string{"VM.get_all_where", "VM.get_all_records_where"} {
		c.wantFailure(`INVALID_VALUE|field "no_such_field" = "x"`, c.root, m, `field "no_such_field" = "x"`)
	}
	empty, err := c.try(c.root, "VTPM.get_all_records")
	if err != nil {
		t.Fatal(err)
	}
	if x, j := asXML(t, empty), asJSON(t, empty); x != "<value><struct></struct></value>" || j != "{}" {
		t.Errorf("no records: %s and %s", x, j)
	}
}

func TestSetters(t *testing.T) {
	c := newCore(t)
	// scalar
	c.call("pool.set_name_label", c.pool, "new")
	if got := c.call("pool.get_name_label", c.pool); got != "new" {
		t.Errorf("name_label: %v", got)
	}
	// map
	c.call("pool.add_to_other_config", c.pool, "k", "v")
	c.wantFailure("MAP_DUPLICATE_KEY|pool|other_config|"+string(c.pool)+"|k", c.root, "pool.add_to_other_config", c.pool, "k", "w")
	want := map[string]string{"a": "1", "k": "v"}
	if diff := cmp.Diff(want, c.call("pool.get_other_config", c.pool)); diff != "" {
		t.Error(diff)
	}
	c.call("pool.remove_from_other_config", c.pool, "a")
	before := c.db.Revision()
	c.call("pool.remove_from_other_config", c.pool, "a")
	if now := c.db.Revision(); now != before {
		t.Error("removing an absent key is an event")
	}
	c.call("pool.set_other_config", c.pool, map[string]string{"z": ""})
	if diff := cmp.Diff(map[string]string{"z": ""}, c.call("pool.get_other_config", c.pool)); diff != "" {
		t.Error(diff)
	}
	// set
	for _, tag := range []string{"x", "y", "x"} {
		c.call("pool.add_tags", c.pool, tag)
	}
	if diff := cmp.Diff([]string{"x", "y"}, c.call("pool.get_tags", c.pool)); diff != "" {
		t.Error(diff)
	}
	for range 2 {
		c.call("pool.remove_tags", c.pool, "x")
	}
	if diff := cmp.Diff([]string{"y"}, c.call("pool.get_tags", c.pool)); diff != "" {
		t.Error(diff)
	}
	c.call("pool.set_tags", c.pool, []string{})
	if diff := cmp.Diff([]string{}, c.call("pool.get_tags", c.pool)); diff != "" {
		t.Error(diff)
	}
	// nothing changes in records that were handed out
	rec := record(c, c.pool)
	c.call("pool.add_to_other_config", c.pool, "later", "1")
	c.call("pool.add_tags", c.pool, "later")
	if len(rec.OtherConfig) != 1 || len(rec.Tags) != 0 {
		t.Errorf("a record changed under its reader: %v %v", rec.OtherConfig, rec.Tags)
	}
	for _, m := range []string{"pool.set_name_label", "pool.add_tags", "pool.remove_tags", "pool.remove_from_other_config"} {
		c.wantFailure("HANDLE_INVALID|pool|OpaqueRef:x", c.root, m, "OpaqueRef:x", "v")
	}
}

func TestFieldHook(t *testing.T) {
	c := newCore(t)
	var calls []string
	var answer error
	c.hooks = map[string]fieldHook{"pool": func(_ *API, _ context.Context, call *Call, ref, field string) error {
		calls = append(calls, call.Method+" "+field)
		return answer
	}}
	c.call("pool.add_tags", c.pool, "t")
	c.call("pool.add_tags", c.pool, "t") // changes nothing
	answer = errors.New("no")
	c.wantFailure("INTERNAL_ERROR|no", c.root, "pool.set_name_label", c.pool, "n")
	want := []string{"pool.add_tags tags", "pool.set_name_label name_label"}
	if !slices.Equal(calls, want) {
		t.Errorf("hook got %q, want %q", calls, want)
	}
}

func TestConstructors(t *testing.T) {
	c := newCore(t)
	ref := c.call("VM_appliance.create", map[string]any{"name_label": "a", "unknown": int64(1), "uuid": "mine", "VMs": "not a set"}).(string)
	if got := c.call("VM_appliance.get_name_label", ref); got != "a" {
		t.Errorf("name_label: %v", got)
	}
	if got := c.call("VM_appliance.get_uuid", ref); got == "mine" || got == "" {
		t.Errorf("uuid: %v", got)
	}
	c.wantFailure("FIELD_TYPE_ERROR|name_label", c.root, "VM_appliance.create", map[string]any{"name_label": int64(1)})
	c.wantFailure("FIELD_TYPE_ERROR|args", c.root, "VM_appliance.create", "no struct")
	_, err := c.try(c.root, "secret.create", map[string]any{})
	if got := description(err); !strings.HasPrefix(got, "INTERNAL_ERROR|") || !strings.Contains(got, "value") {
		t.Errorf("missing mandatory member: %q", got)
	}
	c.call("VM_appliance.destroy", ref)
	c.wantFailure("HANDLE_INVALID|VM_appliance|"+ref, c.root, "VM_appliance.destroy", ref)
}

func TestRead(t *testing.T) {
	c := newCore(t)
	secret := xapi.New[xapi.Secret]()
	secret.Value = "s"
	ref := insert(c, secret)
	pools, secrets := c.model.Classes["pool"], c.model.Classes["secret"]
	for _, tt := range []struct {
		session xapi.Ref[xapi.Session]
		sees    bool
	}{{c.root, true}, {c.as("pool-operator"), true}, {c.as("vm-power-admin"), false}} {
		err := c.Read(tt.session, func(v View) error {
			if rec, ok := v.Lookup(pools, string(c.pool)); !ok || rec.(*xapi.Pool).Master != c.host {
				t.Errorf("pool: %v", rec)
			}
			if class, ok := v.ClassOf(string(c.pool)); !ok || class != pools {
				t.Errorf("class of the pool: %v", class)
			}
			_, found := v.Lookup(secrets, string(ref))
			_, byUUID := v.UUID(secrets, record(c, ref).UUID)
			n := 0
			for range v.Each(secrets) {
				n++
			}
			if found != tt.sees || byUUID != tt.sees || n > 0 != tt.sees {
				t.Errorf("secret: %v, %v, %d; want %v", found, byUUID, n, tt.sees)
			}
			return nil
		})
		if err != nil {
			t.Error(err)
		}
	}
	if err := c.Read("OpaqueRef:x", nil); code(err) != xapi.ErrSessionInvalid {
		t.Errorf("no session: %v", err)
	}
	if err := c.Read(c.root, func(View) error { return errors.New("no") }); description(err) != "INTERNAL_ERROR|no" {
		t.Errorf("error of the function: %v", err)
	}
}
