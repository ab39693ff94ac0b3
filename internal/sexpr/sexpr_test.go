package sexpr

import (
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"coppice/internal/xapi"
)

func TestRecord(t *testing.T) {
	vm := xapi.New[xapi.VM]()
	vm.NameLabel = `it's a "test" \ with (parens) and 'quotes'`
	vm.OtherConfig = map[string]string{"a'b": `c\d`, "": "", "x": "(('y' 'z'))"}
	vm.Tags = []string{"one", "it's"}
	vm.VCPUsMax, vm.IsATemplate, vm.HVMShadowMultiplier = 1<<60, true, 1.5
	vm.SnapshotTime = time.Unix(1_700_000_000, 0).UTC()
	text, err := Record(vm)
	if err != nil {
		t.Fatal(err)
	}
	got := Fields[xapi.VM](text)
	for _, f := range xapi.ClassOf[xapi.VM]().Fields {
		want := f.Get(vm)
		if diff := cmp.Diff(want, got[f.Name]); diff != "" && got[f.Name] != nil {
			t.Errorf("%s: %s", f.Name, diff)
		}
	}
	for _, name := range []string{"name_label", "other_config", "tags", "VCPUs_max", "is_a_template", "HVM_shadow_multiplier", "snapshot_time"} {
		if got[name] == nil {
			t.Errorf("%s is lost in %s", name, text)
		}
	}
	for _, bad := range []string{"", "x", "(", "('a'", "('a' 'b'", "(('a' 'b)", `(('a' 'b\`, "('a')x", strings.Repeat("(", 100)} {
		if got := Fields[xapi.VM](bad); len(got) != 0 {
			t.Errorf("%q gives %v", bad, got)
		}
	}
}

// Whatever a snapshot's metadata says, reading it ends and gives values of the
// fields' types.
func FuzzFields(f *testing.F) {
	text, err := Record(xapi.New[xapi.VM]())
	if err != nil {
		f.Fatal(err)
	}
	f.Add(text)
	f.Add("(('name_label' 'x') ('other_config' '((\\'a\\' \\'b\\'))') ('tags' '(\\'t\\')'))")
	f.Add("((('a' 'b')))")
	f.Fuzz(func(t *testing.T, text string) {
		vm := xapi.New[xapi.VM]()
		for name, v := range Fields[xapi.VM](text) {
			xapi.ClassOf[xapi.VM]().Field(name).Set(vm, v)
		}
		if _, err := Record(vm); err != nil {
			t.Error(err)
		}
	})
}
