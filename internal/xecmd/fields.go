package xecmd

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"time"

	"coppice/internal/xapi"
)

const (
	notInDatabase    = "<not in database>"
	unknownTime      = "<unknown time>"
	invalidReference = "<invalid reference>"
	expensiveField   = "<expensive field>"
)

// shape is what a field looks like to xe.
type shape uint8

const (
	scalar shape = iota
	set
	mapping
)

// field is a field as xe shows it.
type field struct {
	name       string
	shape      shape
	rw         bool
	clearable  bool // by param-clear, though not rw
	deprecated bool
	hidden     bool

	path    []*xapi.Field                                                 // from the record; nil for the two below
	compute func(v view, rec any) string                                  // from what is in the database
	measure func(ctx context.Context, r *run, ref string) (string, error) // by asking the server: an expensive field
}

// model is the field of the datamodel that messages about f are named after.
func (f *field) model() *xapi.Field { return f.path[len(f.path)-1] }

func (f *field) key() string {
	tag := [...]string{"( RO)", "( RW)", "(SRO)", "(SRW)", "(MRO)", "(MRW)"}[2*int(f.shape)+btoi(f.rw)]
	if f.deprecated {
		return f.name + " " + tag + " [DEPRECATED]"
	}
	return f.name + " " + tag
}

func btoi(b bool) int {
	if b {
		return 1
	}
	return 0
}

// resolve follows the path. It returns false where a reference on it leads nowhere.
func (f *field) resolve(v view, rec any) (any, bool) {
	for _, step := range f.path[:len(f.path)-1] {
		class := xapi.Datamodel().Classes[step.Type.Class]
		next, ok := v.Lookup(class, step.Type.Text(step.Get(rec)))
		if !ok {
			return nil, false
		}
		rec = next
	}
	return f.model().Get(rec), true
}

// text is the value as it is shown.
func (f *field) text(v view, rec any) string {
	switch {
	case f.measure != nil:
		return expensiveField
	case f.compute != nil:
		return f.compute(v, rec)
	}
	val, ok := f.resolve(v, rec)
	if !ok {
		if f.model().Type.Kind == xapi.KindDateTime {
			return unknownTime
		}
		return notInDatabase
	}
	t := f.model().Type
	switch t.Kind {
	case xapi.KindSet:
		separator := "; "
		if f.name == "tags" {
			separator = ", "
		}
		return strings.Join(items(v, t, val), separator)
	case xapi.KindMap:
		if f.shape == set { // current-operations: what goes on, not for whom
			return strings.Join(members(f, v, rec), "; ")
		}
		var out []string
		for _, e := range entries(v, t, val) {
			out = append(out, e.key+": "+e.value)
		}
		return strings.Join(out, "; ")
	}
	return show(v, t, reflect.ValueOf(val))
}

// members are the elements of a set field; operations for a map shown as one.
func members(f *field, v view, rec any) []string {
	if f.path == nil {
		return nil
	}
	val, ok := f.resolve(v, rec)
	if !ok {
		return nil
	}
	if t := f.model().Type; t.Kind == xapi.KindMap {
		var out []string
		for _, e := range entries(v, t, val) {
			out = append(out, e.value)
		}
		return out
	}
	return items(v, f.model().Type, val)
}

// pairs are the entries of a map field, sorted by key.
func pairs(f *field, v view, rec any) []parameter {
	if f.path == nil {
		return nil
	}
	val, ok := f.resolve(v, rec)
	if !ok {
		return nil
	}
	return entries(v, f.model().Type, val)
}

func items(v view, t *xapi.Type, val any) []string {
	rv := reflect.ValueOf(val)
	out := make([]string, rv.Len())
	for i := range out {
		out[i] = show(v, t.Elem, rv.Index(i))
	}
	return out
}

func entries(v view, t *xapi.Type, val any) []parameter {
	rv := reflect.ValueOf(val)
	out := make([]parameter, 0, rv.Len())
	for it := rv.MapRange(); it.Next(); {
		out = append(out, parameter{show(v, t.Key, it.Key()), show(v, t.Elem, it.Value())})
	}
	slices.SortFunc(out, func(a, b parameter) int { return cmp.Compare(a.key, b.key) })
	return out
}

// show renders a value that is not a set or a map. A reference becomes the
// uuid of what it refers to.
func show(v view, t *xapi.Type, val reflect.Value) string {
	switch t.Kind {
	case xapi.KindRef:
		class := xapi.Datamodel().Classes[t.Class]
		rec, ok := v.Lookup(class, val.String())
		uuid := class.Field("uuid")
		if !ok || uuid == nil {
			return notInDatabase
		}
		return uuid.Type.Text(uuid.Get(rec))
	case xapi.KindFloat:
		return strconv.FormatFloat(val.Float(), 'f', 3, 64)
	case xapi.KindEnum:
		return enumText(t.Enum, val.String())
	}
	return t.Text(val.Interface())
}

// enumWords are the enumeration values that xe spells in its own way.
var enumWords = map[string]map[string]string{
	"vdi_type": {
		"system": "System", "user": "User", "ephemeral": "Ephemeral", "suspend": "Suspend", "crashdump": "Crashdump",
		"ha_statefile": "HA statefile", "metadata": "Metadata", "redo_log": "Redo log", "pvs_cache": "PVS cache",
		"cbt_metadata": "CBT metadata",
	},
	"on_normal_exit": {"destroy": "Destroy", "restart": "Restart"},
	"on_softreboot_behavior": {
		"soft_reboot": "Soft reboot", "destroy": "Destroy", "restart": "Restart", "preserve": "Preserve",
	},
	"on_crash_behaviour": {
		"destroy": "Destroy", "coredump_and_destroy": "Core dump and destroy", "restart": "Restart",
		"coredump_and_restart": "Core dump and restart", "preserve": "Preserve", "rename_restart": "Rename restart",
	},
	"task_allowed_operations": {"cancel": "Cancel", "destroy": "Destroy"},
	"console_protocol":        {"rfb": "RFB", "vt100": "VT100", "rdp": "RDP"},
	"vm_power_state":          {"Halted": "halted", "Paused": "paused", "Running": "running", "Suspended": "suspended"},
	"vm_operations":           {"assert_operation_valid": "assertoperationvalid"},
}

func enumText(enum, value string) string {
	if w, ok := enumWords[enum][value]; ok {
		return w
	}
	if enum == "storage_operations" {
		for _, object := range []string{"vdi", "pbd"} {
			if rest, ok := strings.CutPrefix(value, object+"_"); ok {
				return strings.ToUpper(object) + "." + rest
			}
		}
	}
	return value
}

// enumValue finds the API's value for what the user typed: its own spelling or
// that of xe, in any case.
func enumValue(t *xapi.Type, typed string) (string, error) {
	for _, v := range t.Values() {
		if strings.EqualFold(v, typed) || strings.EqualFold(enumText(t.Enum, v), typed) {
			return v, nil
		}
	}
	var quoted []string
	for _, v := range t.Values() {
		quoted = append(quoted, "'"+v+"'")
	}
	return "", failf("Expected one of %s, got %s", strings.Join(quoted, ", "), typed)
}

// computed are fields that take more than a path.
var computed = map[string]func(v view, rec any) string{
	"VBD.vdi-name-label": func(v view, rec any) string {
		vbd := rec.(*xapi.VBD)
		if vbd.Empty {
			return "<EMPTY>"
		}
		vdi, ok := v.Lookup(xapi.ClassOf[xapi.VDI](), string(vbd.VDI))
		if !ok {
			return notInDatabase
		}
		return vdi.(*xapi.VDI).NameLabel
	},
	"SR.host": func(v view, rec any) string {
		pbds := rec.(*xapi.SR).PBDs
		if len(pbds) > 1 {
			return "<shared>"
		}
		for _, ref := range pbds {
			pbd, ok := v.Lookup(xapi.ClassOf[xapi.PBD](), string(ref))
			if !ok {
				continue
			}
			if host, ok := v.Lookup(xapi.ClassOf[xapi.Host](), string(pbd.(*xapi.PBD).Host)); ok {
				return host.(*xapi.Host).NameLabel
			}
		}
		return notInDatabase
	},
	// The datamodel has a message for it, but nothing stands behind it without guest firmware.
	"VM.secureboot-certificates-state": func(view, any) string { return notInDatabase },
}

// measured are the expensive fields.
var measured = map[string]func(ctx context.Context, r *run, ref string) (string, error){
	"VBD.attachable": func(ctx context.Context, r *run, ref string) (string, error) {
		err := r.do(ctx, "VBD.assert_attachable", ref)
		if e, ok := errors.AsType[*xapi.Error](err); ok {
			return fmt.Sprintf("false (error: %s)", strings.Join(e.Description(), ", ")), nil
		}
		return "true", err
	},
	"metric":                 func(context.Context, *run, string) (string, error) { return notInDatabase, nil },
	"VM.memory-target":       ask("VM.get_memory_target"),
	"VM.allowed-VBD-devices": ask("VM.get_allowed_VBD_devices"),
	"VM.allowed-VIF-devices": ask("VM.get_allowed_VIF_devices"),
	"VM.possible-hosts":      ask("VM.get_possible_hosts"),
	"VM.last-boot-record":    ask("VM.get_last_booted_record"),
	"VM.cooperative":         ask("VM.get_cooperative"),
}

// ask makes an expensive field of a message that takes the object alone.
func ask(method string) func(ctx context.Context, r *run, ref string) (string, error) {
	return func(ctx context.Context, r *run, ref string) (string, error) {
		text, err := r.callText(ctx, method, ref)
		if e, ok := errors.AsType[*xapi.Error](err); ok {
			switch e.Code {
			case xapi.ErrHandleInvalid:
				return invalidReference, nil
			case xapi.ErrNotImplemented:
				return notInDatabase, nil
			}
		}
		return text, err
	}
}

// parseLayout builds the fields of a class from its layout, or from the
// datamodel alone. It panics on a layout that the datamodel does not bear out.
func parseLayout(class *xapi.Class) []*field {
	layout, ok := layouts[class.Name]
	if !ok {
		layout = "*"
		for _, name := range []string{"name-description", "name-label", "uuid"} {
			if f := class.Field(strings.ReplaceAll(name, "-", "_")); f != nil {
				layout = name + " " + generic(f).tag() + "\n" + layout
			}
		}
	}
	var fields []*field
	used := map[*xapi.Field]bool{}
	for line := range strings.Lines(strings.TrimSpace(layout)) {
		words := strings.Fields(line)
		if words[0] == "*" {
			for _, f := range class.Fields {
				if !used[f] && !f.Internal && f.State != "removed" {
					fields = append(fields, generic(f))
				}
			}
			break
		}
		f := parseLine(class, words)
		if len(f.path) > 0 {
			used[f.path[0]] = true
		}
		fields = append(fields, f)
	}
	return fields
}

func (f *field) tag() string {
	return [...]string{"", "S", "M"}[f.shape] + [...]string{"RO", "RW"}[btoi(f.rw)]
}

func parseLine(class *xapi.Class, words []string) *field {
	f := &field{name: words[0], rw: strings.HasSuffix(words[1], "RW")}
	switch words[1][0] {
	case 'S':
		f.shape = set
	case 'M':
		f.shape = mapping
	}
	path := strings.ReplaceAll(f.name, "-", "_")
	for _, w := range words[2:] {
		switch w {
		case "d":
			f.deprecated = true
		case "h":
			f.hidden = true
		case "c":
			f.clearable = true
		case "e": // said by its function
		default:
			path = w[1:]
		}
	}
	if name, ok := strings.CutPrefix(path, "!"); ok {
		f.compute, f.measure = computed[name], measured[name]
		if f.compute == nil && f.measure == nil {
			panic("xecmd: no function for field " + class.Name + "." + f.name)
		}
		return f
	}
	for step := range strings.SplitSeq(path, ".") {
		if class == nil || class.Field(step) == nil {
			panic("xecmd: no field for " + f.name + " =" + path)
		}
		field := class.Field(step)
		f.path = append(f.path, field)
		class = xapi.Datamodel().Classes[field.Type.Class]
	}
	return f
}

// generic makes a field of one of the datamodel.
func generic(m *xapi.Field) *field {
	f := &field{
		name:       strings.ReplaceAll(m.Name, "_", "-"),
		path:       []*xapi.Field{m},
		deprecated: m.State == "deprecated",
	}
	prefix := "set_"
	switch m.Type.Kind {
	case xapi.KindSet:
		f.shape, prefix = set, "add_"
	case xapi.KindMap:
		f.shape, prefix = mapping, "add_to_"
	}
	setter := m.Class.Methods[prefix+m.Name]
	f.rw = setter != nil && !setter.Hidden && !setter.PoolInternal && setter.State == ""
	return f
}

// parseValue turns what the user typed into a wire value for a field's setter.
func (r *run) parseValue(ctx context.Context, f *field, typed string) (any, error) {
	t := f.model().Type
	switch t.Kind {
	case xapi.KindBool:
		switch typed {
		case "true", "false":
			return typed == "true", nil
		}
		return nil, failf("Failed to parse parameter '%s': expecting a boolean (true or false)", f.name)
	case xapi.KindInt:
		n, ok := parseSize(typed)
		if !ok {
			return nil, failf("Failed to parse parameter '%s': expecting an integer", f.name)
		}
		return n, nil
	case xapi.KindFloat:
		x, err := strconv.ParseFloat(typed, 64)
		if err != nil {
			return nil, failf("Failed to parse parameter '%s': expecting a floating point number", f.name)
		}
		return x, nil
	case xapi.KindDateTime:
		if _, err := xapi.ParseTime(typed); err != nil {
			return nil, failf("Failed to parse parameter '%s': expecting a date like %s", f.name, xapi.FormatTime(time.Unix(0, 0)))
		}
		return typed, nil
	case xapi.KindEnum:
		return enumValue(t, typed)
	case xapi.KindRef:
		if typed == "" {
			return xapi.NullRef, nil
		}
		return r.byUUID(ctx, t.Class, typed)
	case xapi.KindSet: // shown as plain text: uuids, separated by commas
		members := []any{}
		for m := range strings.SplitSeq(typed, ",") {
			member, err := r.parseMember(ctx, f, strings.TrimSpace(m))
			if err != nil {
				return nil, err
			}
			members = append(members, member)
		}
		return members, nil
	}
	return typed, nil
}
