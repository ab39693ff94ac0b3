package xapi

import (
	"slices"
	"strings"
	"testing"
)

func TestModelCounts(t *testing.T) {
	m := Datamodel()
	var fields, methods, custom int
	for _, c := range m.Ordered {
		fields += len(c.Fields)
		methods += len(c.Methods)
		for _, me := range c.Methods {
			if me.Kind == Custom {
				custom++
			}
		}
	}
	for _, tt := range []struct {
		what      string
		got, want int
	}{
		{"classes", len(m.Classes), 73},
		{"fields", fields, 950},
		{"methods", methods, 2258},
		{"custom methods", custom, 678},
		{"enums", len(m.Enums), 75},
		{"errors", len(m.Errors), 605 + 29},
		{"relations", len(m.Relations), 64 - 2}, // two fields are listed as their own inverse
		{"HTTP actions", len(m.HTTP), 57},
		{"alerts", len(m.Alerts), 108},
		{"roles", len(m.Roles), 6},
	} {
		if tt.got != tt.want {
			t.Errorf("%s: got %d, want %d", tt.what, tt.got, tt.want)
		}
	}
}

func TestNewHasDefaults(t *testing.T) {
	v := New[VDI]()
	if v.VBDs == nil || v.OtherConfig == nil || v.Tags == nil {
		t.Error("a set or map of a new VDI is nil")
	}
	if v.SR != NullRef || v.OnBoot != OnBootPersist || v.Type != VDITypeSystem || !v.SnapshotTime.Equal(Epoch) {
		t.Errorf("got SR %q, on_boot %q, type %q, snapshot_time %v", v.SR, v.OnBoot, v.Type, v.SnapshotTime)
	}
	h1, h2 := New[Host](), New[Host]()
	h1.LicenseServer["port"] = "1"
	if h2.LicenseServer["port"] != "27000" {
		t.Error("two new hosts share the default of a map")
	}
}

func TestAllows(t *testing.T) {
	m := Datamodel()
	for _, tt := range []struct {
		have, need string
		want       bool
	}{
		{"pool-admin", "vm-admin", true},
		{"vm-admin", "vm-admin", true},
		{"vm-operator", "vm-admin", false},
		{"read-only", "read-only", true},
		{"pool-admin", "local-root", false},
		{"local-root", "local-root", true},
		{"client-cert", "read-only", false},
		{"", "read-only", false},
	} {
		if got := m.Allows(tt.have, tt.need); got != tt.want {
			t.Errorf("Allows(%q, %q) = %v, want %v", tt.have, tt.need, got, tt.want)
		}
	}
}

func TestMethods(t *testing.T) {
	m := Datamodel()
	login := m.Classes["session"].Methods["login_with_password"]
	if login.Session || login.Required() != 2 || len(login.Params) != 4 {
		t.Errorf("login_with_password: session %v, required %d, params %d", login.Session, login.Required(), len(login.Params))
	}
	add := m.Classes["VDI"].Methods["add_to_other_config"]
	if !add.Session || add.Field != m.Classes["VDI"].Field("other_config") || add.KeyRoles["folder"] != "vm-operator" {
		t.Errorf("add_to_other_config: %+v", add)
	}
	if got := m.Classes["VDI"].Methods["snapshot"]; got.Required() != 1 || got.FullName() != "VDI.snapshot" || got.Field != nil {
		t.Errorf("snapshot: %+v", got)
	}
	for _, c := range m.Ordered {
		for _, me := range c.Methods {
			optional := slices.IndexFunc(me.Params, func(p Param) bool { return p.HasDefault })
			for i, p := range me.Params {
				if optional >= 0 && i > optional && !p.HasDefault {
					t.Errorf("%s: mandatory parameter %s after an optional one", me.FullName(), p.Name)
				}
			}
		}
	}
}

func TestRelations(t *testing.T) {
	m := Datamodel()
	vdi := m.Classes["VDI"]
	if !vdi.Field("VBDs").Computed || vdi.Field("SR").Computed {
		t.Error("VDI.VBDs must be computed and VDI.SR stored")
	}
	if m.Classes["subject"].Field("roles").Computed {
		t.Error("subject.roles is its own inverse and must be stored")
	}
	for _, r := range m.Relations {
		if r.To.Type.Kind != KindSet || r.To.Type.Elem.Class != r.From.Class.Name {
			t.Errorf("%s is computed from %s but is a %s", r.To, r.From, r.To.Type)
		}
		from := r.From.Type
		if from.Kind == KindSet {
			from = from.Elem
		}
		if from.Kind != KindRef || from.Class != r.To.Class.Name {
			t.Errorf("%s -> %s: stored side is a %s", r.From, r.To, r.From.Type)
		}
	}
}

func TestLoadRefusesBadModels(t *testing.T) {
	class := func(fields, messages string) string {
		return `{"format": 1, "classes": {"VDI": {"fields": [` + fields + `], "messages": [` + messages + `]}}}`
	}
	for name, tt := range map[string]struct{ in, want string }{
		"not JSON":          {`{`, "unexpected end"},
		"format":            {`{"format": 2}`, "format 2"},
		"unknown class":     {`{"format": 1, "classes": {"Nothing": {}}}`, "no generated struct"},
		"unknown type":      {class(`{"name": "uuid", "type": "text"}`, ""), `type "text" is not known`},
		"wrong type":        {class(`{"name": "uuid", "type": "int"}`, ""), "no such field of type int64"},
		"unknown field":     {class(`{"name": "x", "type": "int"}`, ""), "no such field"},
		"bad default":       {class(`{"name": "uuid", "type": "string", "default": 1}`, ""), "FIELD_TYPE_ERROR"},
		"unknown enum":      {class(`{"name": "type", "type": "enum nothing"}`, ""), `enum "nothing"`},
		"map of void":       {class(`{"name": "type", "type": "(string -> void) map"}`, ""), "map of void"},
		"set of void":       {class(`{"name": "type", "type": "void set"}`, ""), "set of void"},
		"map without arrow": {class(`{"name": "type", "type": "(string) map"}`, ""), "malformed"},
		"record key":        {class(`{"name": "type", "type": "(VDI record -> int) map"}`, ""), "map key"},
		"ref of nothing":    {class(`{"name": "type", "type": "X ref"}`, ""), `class "X"`},
		"method type":       {class("", `{"name": "get", "kind": "custom", "result": "x"}`), `type "x"`},
		"param type":        {class("", `{"name": "get", "kind": "custom", "result": "void", "params": [{"name": "a", "type": "x"}]}`), `type "x"`},
		"getter of nothing": {class("", `{"name": "get_x", "kind": "field_getter", "result": "void"}`), "no field"},
		"relation":          {`{"format": 1, "classes": {"VDI": {}}, "relations": [["VDI", "SR", "SR", "VDIs"]]}`, "does not exist"},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := load([]byte(tt.in))
			if err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("got %v, want an error with %q", err, tt.want)
			}
		})
	}
}
