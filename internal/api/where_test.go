package api

import (
	"slices"
	"strings"
	"testing"

	"coppice/internal/xapi"
)

func TestWhere(t *testing.T) {
	c := newCore(t)
	add := func(name string, change func(*xapi.VM)) string {
		vm := xapi.New[xapi.VM]()
		vm.NameLabel = name
		change(vm)
		return string(insert(c, vm))
	}
	names := map[string]string{}
	for name, change := range map[string]func(*xapi.VM){
		"plain":  func(vm *xapi.VM) {},
		"tagged": func(vm *xapi.VM) { vm.Tags = []string{"it's", "b"} },
		"big":    func(vm *xapi.VM) { vm.MemoryStaticMax = 100; vm.HVMShadowMultiplier = 1.5; vm.IsATemplate = true },
		"mapped": func(vm *xapi.VM) { vm.OtherConfig = map[string]string{"k": "v", "a": `q"`} },
		`q"q\`:   func(vm *xapi.VM) {},
	} {
		names[add(name, change)] = name
	}
	tests := []struct {
		expr string
		want string // names, sorted, joined
	}{
		{`true`, `big mapped plain q"q\ tagged`},
		{`FALSE`, ``},
		{`field "name__label" = "plain"`, "plain"},
		{`field "name_label" = "plain"`, "plain"},
		{`field 'name_label' = 'plain'`, "plain"},
		{`"plain" = field "name_label"`, "plain"},
		{`field"name_label"="plain"`, "plain"},
		{`field "name_label" = "q\"q\\"`, `q"q\`},
		{`field "name_label" = 'q"q\\'`, `q"q\`},
		{`field "name_label" = "Plain"`, ""},
		{`field "memory_static_max" = "100"`, "big"},
		{`field "HVM_shadow_multiplier" = "1.5"`, "big"},
		{`field "HVM_shadow_multiplier" = "1."`, `mapped plain q"q\ tagged`},
		{`field "is_a_template" = "true"`, "big"},
		{`not field "is_a_template" = "true" and not field "name_label" = "plain"`, `mapped q"q\ tagged`},
		{`not (field "is_a_template" = "true" or field "name_label" = "plain")`, `mapped q"q\ tagged`},
		{`field "name_label" = "plain" or field "name_label" = "big" and false`, "plain"},
		{`(field "name_label" = "plain" or field "name_label" = "big") and false`, ""},
		{`field "tags" = "('it\\'s' 'b')"`, "tagged"},
		{`field "tags" = "()" and field "is_a_template" = "true"`, "big"},
		{`field "other_config" = '((\'a\' \'q\\\"\') (\'k\' \'v\'))'`, "mapped"},
		{`field "snapshot_time" = "19700101T00:00:00Z" and field "name_label" = "big"`, "big"},
		{`field "name_label" = field "name_description"`, ""},
		{`field "power_state" = "Halted" and field "name_label" = "big"`, "big"},
	}
	for _, tt := range tests {
		var got []string
		for _, ref := range c.call("VM.get_all_where", tt.expr).([]string) {
			got = append(got, names[ref])
		}
		slices.Sort(got)
		if s := strings.Join(got, " "); s != tt.want {
			t.Errorf("%s: got %q, want %q", tt.expr, s, tt.want)
		}
	}
	for ref, name := range names {
		if got := c.call("VM.get_all_where", `field "_ref" = "`+ref+`"`).([]string); !slices.Equal(got, []string{ref}) {
			t.Errorf("_ref of %s: %q", name, got)
		}
	}
	res, err := c.try(c.root, "VM.get_all_records_where", `field "name_label" = "big"`)
	if err != nil {
		t.Fatal(err)
	}
	if text := asJSON(t, res); strings.Count(text, `"name_label"`) != 1 {
		t.Errorf("get_all_records_where: %s", text)
	}
}

func TestWhereRefusesBadSyntax(t *testing.T) {
	c := newCore(t)
	for _, expr := range []string{
		``, ` `, `field`, `field name = "x"`, `field "name_label"`, `field "name_label" =`, `"a" "b"`, `= "a"`,
		`true true`, `true and`, `and true`, `(true`, `true)`, `()`, `not`, `field "name_label" == "x"`, `"open`, `"open\"`,
		`field "no_such_field" = "x"`, `field "recommended_guidances" = "x"`, `1 = 1`, `true & true`, "\x00", `é`,
		strings.Repeat("(", 5000) + "true" + strings.Repeat(")", 5000), strings.Repeat("not ", 4000) + "true",
	} {
		_, err := c.try(c.root, "VM.get_all_where", expr)
		if got := description(err); !strings.HasPrefix(got, "INVALID_VALUE|"+expr+"|") {
			t.Errorf("%.40q: got %.80q, want INVALID_VALUE", expr, got)
		}
	}
	cond, err := parseWhere(xapi.Datamodel().Classes["message"], `field "class" = "VM" or not field "class" = "VM"`, true)
	if err != nil {
		t.Fatal(err)
	}
	if !cond("", xapi.New[xapi.Message]()) {
		t.Error("an unknown field of a lenient class makes more than its comparison false")
	}
}

func FuzzWhere(f *testing.F) {
	for _, expr := range []string{
		`field "name__label" = "plain" and not (true or false)`, `field 'tags' = "('a')"`, `"a\"b" = 'c'`, `not not true`, `((`, `field`,
	} {
		f.Add(expr)
	}
	class := xapi.Datamodel().Classes["VM"]
	rec := class.New()
	f.Fuzz(func(t *testing.T, expr string) {
		cond, err := parseWhere(class, expr, false)
		if (cond == nil) == (err == nil) {
			t.Fatalf("%q: condition and error %v", expr, err)
		}
		if err != nil {
			if code(err) != "INVALID_VALUE" {
				t.Fatalf("%q: %v", expr, err)
			}
			return
		}
		yes := cond("OpaqueRef:x", rec)
		not, err := parseWhere(class, "not ("+expr+")", false)
		if err != nil {
			return // at the limit of nesting
		}
		if not("OpaqueRef:x", rec) == yes {
			t.Fatalf("%q: not does not negate", expr)
		}
	})
}

func TestWhereLength(t *testing.T) {
	class := xapi.ClassOf[xapi.Pool]()
	long := "true" + strings.Repeat(" or true", whereLength/8)
	_, err := parseWhere(class, long, false)
	if got := description(err); !strings.HasPrefix(got, "INVALID_VALUE|true or ") || len(got) > 1000 {
		t.Errorf("an expression of %d bytes: %.200q", len(long), got)
	}
	if _, err := parseWhere(class, long[:whereLength/8*8-4], false); err != nil {
		t.Errorf("an expression of %d bytes: %v", whereLength/8*8-4, err)
	}
}
