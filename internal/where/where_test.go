package where

import (
	"errors"
	"slices"
	"strings"
	"testing"

	"coppice/internal/xapi"
)

// description is the code and the parameters of an API error, joined; "" for any other.
func description(err error) string {
	if e, ok := errors.AsType[*xapi.Error](err); ok {
		return strings.Join(e.Description(), "|")
	}
	return ""
}

func TestMatches(t *testing.T) {
	class := xapi.ClassOf[xapi.VM]()
	vms := map[string]*xapi.VM{} // by name, which is the reference too
	for name, change := range map[string]func(*xapi.VM){
		"plain":  func(vm *xapi.VM) {},
		"tagged": func(vm *xapi.VM) { vm.Tags = []string{"it's", "b"} },
		"big":    func(vm *xapi.VM) { vm.MemoryStaticMax = 100; vm.HVMShadowMultiplier = 1.5; vm.IsATemplate = true },
		"mapped": func(vm *xapi.VM) { vm.OtherConfig = map[string]string{"k": "v", "a": `q"`} },
		`q"q\`:   func(vm *xapi.VM) {},
	} {
		vm := xapi.New[xapi.VM]()
		vm.NameLabel = name
		change(vm)
		vms[name] = vm
	}
	matches := func(expr string) (names []string) {
		t.Helper()
		wanted, err := Parse(class, expr, false)
		if err != nil {
			t.Fatalf("%s: %v", expr, err)
		}
		for name, vm := range vms {
			if wanted("OpaqueRef:"+name, vm) {
				names = append(names, name)
			}
		}
		slices.Sort(names)
		return names
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
		if got := strings.Join(matches(tt.expr), " "); got != tt.want {
			t.Errorf("%s: got %q, want %q", tt.expr, got, tt.want)
		}
	}
	for _, name := range []string{"plain", "tagged", "big", "mapped"} {
		if got := matches(`field "_ref" = "OpaqueRef:` + name + `"`); !slices.Equal(got, []string{name}) {
			t.Errorf("_ref of %s: %q", name, got)
		}
	}
}

func TestBadSyntax(t *testing.T) {
	class := xapi.ClassOf[xapi.VM]()
	for _, expr := range []string{
		``, ` `, `field`, `field name = "x"`, `field "name_label"`, `field "name_label" =`, `"a" "b"`, `= "a"`,
		`true true`, `true and`, `and true`, `(true`, `true)`, `()`, `not`, `field "name_label" == "x"`, `"open`, `"open\"`,
		`field "no_such_field" = "x"`, `field "recommended_guidances" = "x"`, `1 = 1`, `true & true`, "\x00", `é`,
		strings.Repeat("(", 5000) + "true" + strings.Repeat(")", 5000), strings.Repeat("not ", 4000) + "true",
	} {
		_, err := Parse(class, expr, false)
		if got := description(err); !strings.HasPrefix(got, "INVALID_VALUE|"+expr+"|") {
			t.Errorf("%.40q: got %.80q, want INVALID_VALUE", expr, got)
		}
	}
	cond, err := Parse(xapi.Datamodel().Classes["message"], `field "class" = "VM" or not field "class" = "VM"`, true)
	if err != nil {
		t.Fatal(err)
	}
	if !cond("", xapi.New[xapi.Message]()) {
		t.Error("an unknown field of a lenient class makes more than its comparison false")
	}
}

func FuzzParse(f *testing.F) {
	for _, expr := range []string{
		`field "name__label" = "plain" and not (true or false)`, `field 'tags' = "('a')"`, `"a\"b" = 'c'`, `not not true`, `((`, `field`,
	} {
		f.Add(expr)
	}
	class := xapi.Datamodel().Classes["VM"]
	rec := class.New()
	f.Fuzz(func(t *testing.T, expr string) {
		cond, err := Parse(class, expr, false)
		if (cond == nil) == (err == nil) {
			t.Fatalf("%q: condition and error %v", expr, err)
		}
		if err != nil {
			if !strings.HasPrefix(description(err), "INVALID_VALUE|") {
				t.Fatalf("%q: %v", expr, err)
			}
			return
		}
		yes := cond("OpaqueRef:x", rec)
		not, err := Parse(class, "not ("+expr+")", false)
		if err != nil {
			return // at the limit of nesting
		}
		if not("OpaqueRef:x", rec) == yes {
			t.Fatalf("%q: not does not negate", expr)
		}
	})
}

func TestLength(t *testing.T) {
	class := xapi.ClassOf[xapi.Pool]()
	long := "true" + strings.Repeat(" or true", maxLength/8)
	_, err := Parse(class, long, false)
	if got := description(err); !strings.HasPrefix(got, "INVALID_VALUE|true or ") || len(got) > 1000 {
		t.Errorf("an expression of %d bytes: %.200q", len(long), got)
	}
	if _, err := Parse(class, long[:maxLength/8*8-4], false); err != nil {
		t.Errorf("an expression of %d bytes: %v", maxLength/8*8-4, err)
	}
}
