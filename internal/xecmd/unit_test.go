package xecmd

import (
	"errors"
	"strings"
	"testing"
	"time"

	"coppice/internal/xapi"

	"github.com/google/go-cmp/cmp"
)

func TestParseArgs(t *testing.T) {
	for _, tc := range []struct {
		in   string
		want *arguments // nil for a syntax error
	}{
		{"vdi-list", &arguments{command: "vdi-list"}},
		{"vdi-list --minimal a=b=c bare d=", &arguments{
			command: "vdi-list",
			params:  []parameter{{"minimal", "true"}, {"a", "b=c"}, {"bare", ""}, {"d", ""}},
		}},
		{"vdi-list --a=b", &arguments{command: "vdi-list", params: []parameter{{"a=b", "true"}}}},
		{"vdi-list -u me -pw x", &arguments{command: "vdi-list", params: []parameter{{"username", "me"}, {"password", "x"}}}},
		{"session_id=OpaqueRef:1 vdi-list a=b", &arguments{command: "vdi-list", session: "OpaqueRef:1", params: []parameter{{"a", "b"}}}},
		{"vdi-list - a=b", &arguments{command: "vdi-list", params: []parameter{{"-", ""}, {"a", "b"}}}},
		{"a=b", nil},
		{"", nil},
		{"session_id=x", nil},
		{"vdi-list -z", nil},
		{"vdi-list -u", nil},
	} {
		got, err := parseArgs(strings.Fields(tc.in))
		if tc.want == nil {
			if e, ok := errors.AsType[*usageError](err); !ok || !strings.HasPrefix(e.text, "Syntax error: ") {
				t.Errorf("%q: error %v, want a syntax error", tc.in, err)
			}
			continue
		}
		if diff := cmp.Diff(tc.want, got, cmp.AllowUnexported(arguments{}, parameter{})); diff != "" || err != nil {
			t.Errorf("%q: %v (-want +got)\n%s", tc.in, err, diff)
		}
	}
}

func FuzzParseArgs(f *testing.F) {
	f.Add("vdi-list\n--minimal\na=b\nusername=root\npassword=x")
	f.Add("session_id=x\nhelp\n-u")
	f.Add("a\n\n-\n--\n=")
	f.Fuzz(func(t *testing.T, body string) {
		a, err := parseArgs(strings.Split(body, "\n"))
		if err != nil {
			if e, ok := errors.AsType[*usageError](err); !ok || !strings.HasPrefix(e.text, "Syntax error: ") {
				t.Fatal(err)
			}
			return
		}
		if a.command == "" || strings.Contains(a.command, "=") {
			t.Fatalf("command %q", a.command)
		}
		first := map[string]string{}
		for _, p := range a.params {
			if _, dup := first[p.key]; !dup {
				first[p.key] = p.value
			}
		}
		for key, want := range first {
			if got, ok := a.lookup(key); !ok || got != want {
				t.Fatalf("%q is %q, %t, want %q", key, got, ok, want)
			}
		}
	})
}

func TestUnknownCommand(t *testing.T) {
	for name, want := range map[string]string{
		"vdi-lst": "Did you mean vdi-list?", "vm-instal": "Did you mean vm-install?", "sr-lists": "Did you mean sr-list?",
		"nosuch": "", "": "", "vmss-snapshotnow": "Did you mean vmss-snapshot-now?",
	} {
		e, ok := errors.AsType[*usageError](commands().unknown(name))
		if !ok || e.text != "Unknown command: "+name || e.hint != want {
			t.Errorf("%q: %+v, want %q", name, e, want)
		}
	}
}

// A parameter that nearly is one is not ignored; another that is none is, as
// scripts for other servers may have it.
func TestMisspeltParameter(t *testing.T) {
	for args, want := range map[string]string{
		"vdi-export uuid=1 filename=2 base=3": "", "vdi-export uuid=1 filename=2 bas=3": "base", "vdi-export uuid=1 filename=2 bsae=3": "base",
		"vdi-export uuid=1 filenme=2": "filename", "vdi-export uuid=1 filename=2 host-uuid=3 --trace": "", "vm-import filename=1 forc=true": "force",
		"vm-import filename=1 force=true": "", "vdi-list name-lable=x": "name-label", "vdi-param-set uuid=1 other-config=x": "", "vdi-create device-config:a=b tag:x=": "", "vm-copy vm-uid=1": "",
		"vdi-nbd uuid=1 mod=rw": "mode", "vm-import filename=1 restore=true": "preserve", "vm-import filename=1 sr=2": "sr-uuid", "vm-import filename=1 dry_run=true": "dry-run",
		"vdi-export uuid=1 filename=2 base-vdi-uuid=3": "base", "vdi-copy uuid=1 sr-uuid=2 base=3": "base-vdi-uuid", "vdi-copy uuid=1 sr-uuid=2 base_vdi_uuid=3": "base-vdi-uuid",
		"template-export template-uuid=1 filename=2 use_compression=zstd": "compress",
	} {
		a, err := parseArgs(strings.Fields(args))
		if err != nil {
			t.Fatal(err)
		}
		err = commands().byName[a.command].misspelt(a)
		switch e, ok := errors.AsType[*usageError](err); {
		case want == "" && err != nil, want != "" && (!ok || e.hint != "Did you mean "+want+"?"):
			t.Errorf("%s: %+v, want %q", args, err, want)
		}
	}
}

func TestParseSize(t *testing.T) {
	for in, want := range map[string]int64{
		"0": 0, "25769705472": 25769705472, "1b": 1, "2 bytes": 2, "1k": 1 << 10, "1kb": 1 << 10, "1KiB": 1 << 10,
		"3 MiB": 3 << 20, "4m": 4 << 20, "24GiB": 24 << 30, "1gb": 1 << 30, "2TiB": 2 << 40, "8388607t": 8388607 << 40, "-1": -1,
	} {
		if got, ok := parseSize(in); !ok || got != want {
			t.Errorf("%q is %d, %t, want %d", in, got, ok, want)
		}
	}
	for _, in := range []string{"", "x", "GiB", "1.5GiB", "1 PiB", "8388608t", "9223372036854775808", "1k1"} {
		if got, ok := parseSize(in); ok {
			t.Errorf("%q is %d", in, got)
		}
	}
}

func TestRecordLayout(t *testing.T) {
	rec := []cell{
		{"uuid ( RO)", diskUUID},
		{"name-label ( RW)", "disk"},
		{"name-description ( RW)", ""},
		{"sr-uuid ( RO)", "9d8e7f60-1b2c-4d3e-8f40-5a6b7c8d9e0f"},
		{"virtual-size ( RO)", "1073741824"},
		{"sharable ( RO)", "false"},
		{"read-only ( RO)", "false"},
	}
	const head = 16 // of the frame
	if diff := cmp.Diff(string(recorded(t, "list-print")[head:]), formatRecord(rec)); diff != "" {
		t.Errorf("(-want +got)\n%s", diff)
	}
}

func TestBar(t *testing.T) {
	start := time.Unix(0, 0)
	b := &bar{started: start}
	for _, tc := range []struct {
		progress float64
		after    time.Duration
		want     string
	}{
		{0, 0, ""},
		{0.01, time.Second, ""},
		{0.5, 12 * time.Second, "\r[-] " + strings.Repeat("#", 26) + ">" + strings.Repeat(" ", 28) + " ( 50% ETA 00:00:12) "},
		{0.501, 13 * time.Second, ""},
		{0.75, 3 * time.Hour, "\r[\\] " + strings.Repeat("#", 40) + ">" + strings.Repeat(" ", 14) + " ( 75% ETA 01:00:00) "},
		{0.02, 100 * time.Hour, "\r[|] >" + strings.Repeat(" ", 54) + " (  2% ETA  4900:00) "},
		{2, 100 * time.Hour, "\r[/] " + strings.Repeat("#", 54) + "> (100% ETA 00:00:00) "},
	} {
		if got := b.update(tc.progress, start.Add(tc.after)); got != tc.want {
			t.Errorf("at %v: %q, want %q", tc.progress, got, tc.want)
		} else if got != "" && len(got) != 81 {
			t.Errorf("at %v: %d columns", tc.progress, len(got)-1)
		}
	}
	if got := clock(200_000 * time.Hour); got != "++:++:++" {
		t.Errorf("%q for a very long time", got)
	}
}

func TestWrap(t *testing.T) {
	name := strings.Repeat("x", 34)
	if got, want := wrap([]string{name, name, name}), "    "+name+", "+name+"\n    "+name; got != want {
		t.Errorf("%q, want %q", got, want)
	}
	for line := range strings.Lines(wrap(commands().names(func(*command) bool { return true }))) {
		if len(strings.TrimRight(line, "\n")) > 74 {
			t.Errorf("line of %d columns: %q", len(line), line)
		}
	}
}

func TestLabelled(t *testing.T) {
	for _, tc := range []struct {
		names, values, want string
	}{
		{"a b", "1 2", "a: 1|b: 2"},
		{"a b", "1", "a: 1|b: <unknown>"},
		{"a", "1 2", "a: 1|<extra>: 2"},
		{"", "", ""},
	} {
		got := strings.Join(labelled(strings.Fields(tc.names), strings.Fields(tc.values)), "|")
		if got != tc.want {
			t.Errorf("%s for %s: %q, want %q", tc.values, tc.names, got, tc.want)
		}
	}
}

func TestEnums(t *testing.T) {
	model := xapi.Datamodel()
	kind := model.Classes["VDI"].Field("type").Type
	for _, typed := range []string{"ha_statefile", "HA statefile", "ha STATEFILE"} {
		if got, err := enumValue(kind, typed); got != "ha_statefile" || err != nil {
			t.Errorf("%q is %q, %v", typed, got, err)
		}
	}
	for enum, words := range enumWords {
		for value := range words {
			known := false
			for _, v := range model.Enums[enum] {
				known = known || v == value
			}
			if !known {
				t.Errorf("%s has no value %s", enum, value)
			}
		}
	}
	if got := enumText("storage_operations", "vdi_create"); got != "VDI.create" {
		t.Errorf("vdi_create is shown as %q", got)
	}
}

// Every noun begins with its uuid, so that --minimal lists uuids; every
// message behind a settable field exists; every command can be told apart
// from the fields that it selects by.
func TestTable(t *testing.T) {
	table := commands()
	for name, n := range table.nouns {
		if n.fields[0].name != "uuid" {
			t.Errorf("%s begins with %s", name, n.fields[0].name)
		}
		seen := map[string]bool{}
		for _, f := range n.fields {
			if seen[f.name] {
				t.Errorf("%s has two fields %s", name, f.name)
			}
			seen[f.name] = true
			verb := [...]string{"set_", "add_", "add_to_"}[f.shape]
			if f.rw && n.class.Methods[verb+f.model().Name] == nil {
				t.Errorf("%s.%s is settable, but there is no %s%s", name, f.name, verb, f.model().Name)
			}
			if f.rw && f.shape == scalar && f.path[0] != f.model() {
				t.Errorf("%s.%s is settable, but of another object", name, f.name)
			}
		}
		for _, d := range n.defaults {
			if !seen[d] {
				t.Errorf("%s-list shows %s by default, which does not exist", name, d)
			}
		}
		for _, p := range n.implicit {
			if !seen[p.key] {
				t.Errorf("%s-list filters by %s, which does not exist", name, p.key)
			}
		}
	}
	for name, c := range table.byName {
		if c.run == nil || c.help == "" || !strings.HasSuffix(c.help, ".") {
			t.Errorf("%s lacks a function or a description that ends in a full stop", name)
		}
	}
	for name := range strings.FieldsSeq(`
		vdi-list vdi-create vdi-destroy vdi-snapshot vdi-clone vdi-copy vdi-resize vdi-export vdi-import vdi-forget
		vdi-update vdi-introduce vdi-revert vdi-param-list vdi-param-get vdi-param-set vdi-param-add vdi-param-remove
		vdi-param-clear sr-list sr-create sr-destroy sr-forget sr-scan sr-param-set pbd-list pbd-plug pbd-unplug
		pool-list pool-param-set host-list task-list task-cancel task-param-get vm-list vm-create vm-destroy
		snapshot-list snapshot-param-list template-list template-param-set vbd-list vbd-create vbd-destroy event-wait
		sm-list sm-param-list message-list message-param-get secret-list secret-param-set vmss-list console-list
		network-list vif-list pif-list host-cpu-list appliance-list`) {
		if table.byName[name] == nil {
			t.Errorf("there is no %s", name)
		}
	}
	for _, name := range []string{"sm-param-set", "session-list", "vdi-param-", "message-param-set", "console-param-add-x"} {
		if table.byName[name] != nil {
			t.Errorf("there is a %s", name)
		}
	}
}

func TestSentences(t *testing.T) {
	known := xapi.Datamodel().Errors
	for code := range sentences {
		if _, ok := known[code]; !ok {
			t.Errorf("%s is no error of the datamodel", code)
		}
	}
	if got := sentence("HOST_NOT_LIVE"); got != "The operation failed: host not live." {
		t.Errorf("%q", got)
	}
}
