package rbac

import (
	"errors"
	"slices"
	"strings"
	"testing"

	"coppice/internal/xapi"
)

// line is the order of the roles, written down once more.
var line = []string{"pool-admin", "pool-operator", "vm-power-admin", "vm-admin", "vm-operator", "read-only"}

// description is the code and the parameters of an API error, joined; "" for none.
func description(err error) string {
	if e, ok := errors.AsType[*xapi.Error](err); ok {
		return strings.Join(e.Description(), "|")
	}
	return ""
}

// A role may send what its permissions say, use what they say, and nothing else; local root may do everything.
func TestPermissionsAreWhatIsChecked(t *testing.T) {
	model := xapi.Datamodel()
	table := New(model)
	for _, role := range line {
		has := table.Permissions(role)
		if !slices.IsSorted(has) {
			t.Errorf("the permissions of %s are not sorted", role)
		}
		check := func(permission string, refusal error) {
			t.Helper()
			_, found := slices.BinarySearch(has, permission)
			if holds := slices.Contains(table.Holders(permission), Ref(role)); found != (refusal == nil) || holds != found {
				t.Errorf("%s has %s: %v, is a holder: %v, is told %v", role, permission, found, holds, refusal)
			}
			if refusal != nil && !strings.HasPrefix(description(refusal), "RBAC_PERMISSION_DENIED|"+permission+"|") {
				t.Errorf("%s for %s: %v", permission, role, refusal)
			}
		}
		for _, class := range model.Ordered {
			for _, m := range class.Methods {
				name := class.Name + "." + m.Name
				check(name, table.MaySend(role, name, m, nil))
				if err := table.MaySend(All, name, m, nil); err != nil {
					t.Errorf("%s for everybody: %v", name, err)
				}
			}
		}
		for action := range model.HTTP {
			check("http/"+action, table.MayUse(role, action))
			if err := table.MayUse(All, action); err != nil {
				t.Errorf("%s for everybody: %v", action, err)
			}
		}
	}
	for _, role := range []string{"read-only", All} {
		if got := description(table.MayUse(role, "get_nothing")); got != "INTERNAL_ERROR|no HTTP action get_nothing" {
			t.Errorf("an action that there is not, for %s: %q", role, got)
		}
	}
}

// Some map keys have a role of their own, higher or lower than the field's.
func TestKeys(t *testing.T) {
	table := New(xapi.Datamodel())
	for _, tt := range []struct{ class, method, key, need, permission string }{
		{"pool", "add_to_other_config", "any", "pool-operator", ""},
		{"pool", "add_to_other_config", "folder", "vm-operator", "/key:folder"},
		{"pool", "add_to_other_config", "XenCenter.CustomFields.x", "vm-operator", "/key:XenCenter.CustomFields.*"},
		{"VM", "add_to_platform", "hvm_serial", "pool-admin", "/key:hvm_serial"},
		{"VM", "add_to_platform", "other", "vm-admin", ""},
	} {
		m := xapi.Datamodel().Classes[tt.class].Methods[tt.method]
		for i, role := range line {
			name := tt.class + "." + tt.method
			err := table.MaySend(role, name, m, []any{"OpaqueRef:x", tt.key, "v"})
			want := ""
			if holders := line[:slices.Index(line, tt.need)+1]; i >= len(holders) {
				want = "RBAC_PERMISSION_DENIED|" + name + tt.permission +
					"|No permission in user session. (Roles with this permission: " + strings.Join(holders, ", ") + ")"
			}
			if got := description(err); got != want {
				t.Errorf("%s %s as %s: got %q, want %q", name, tt.key, role, got, want)
			}
		}
	}
}

func TestRecords(t *testing.T) {
	table := New(xapi.Datamodel())
	for i, role := range line {
		r, err := table.Record(Ref(role))
		if err != nil || r.NameLabel != role || table.Named(Ref(role)) != role {
			t.Fatalf("%s: %+v, %v", role, r, err)
		}
		var below []xapi.Ref[xapi.Role]
		if i+1 < len(line) {
			below = append(below, Ref(line[i+1]))
		}
		if !slices.Equal(r.Subroles, below) {
			t.Errorf("%s has the subroles %q, want %q", role, r.Subroles, below)
		}
	}
	if r, err := table.Record(Ref("VDI.snapshot")); err != nil || r.NameLabel != "VDI.snapshot" || table.Named(Ref("VDI.snapshot")) != "" {
		t.Errorf("a permission: %+v, %v", r, err)
	}
	_, err := table.Record("OpaqueRef:x")
	if got := description(err); got != "HANDLE_INVALID|role|OpaqueRef:x" {
		t.Errorf("no role: %q", got)
	}
	if got := table.Strongest([]string{"read-only", "no role", "vm-admin"}); got != "vm-admin" {
		t.Errorf("the strongest is %q", got)
	}
	if got := table.Strongest([]string{"no role"}); got != "" {
		t.Errorf("the strongest of none is %q", got)
	}
	if !table.Allows(All, "pool-admin") || !table.Allows("vm-admin", "vm-operator") || table.Allows("vm-operator", "vm-admin") {
		t.Error("the order of the roles is wrong")
	}
}
