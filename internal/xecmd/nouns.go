package xecmd

import (
	"context"
	"fmt"
	"slices"
	"strings"

	"coppice/internal/xapi"
)

// noun is a kind of object as xe names it: a class, or some of its objects.
type noun struct {
	name     string
	class    *xapi.Class
	fields   []*field
	defaults []string // fields a list shows; nil for all
	implicit []parameter
}

// nouns returns the nouns of the datamodel: every class whose objects have a
// uuid and can be listed, and the two further kinds of VM.
func nouns(m *xapi.Model) []*noun {
	var out []*noun
	for _, class := range m.Ordered {
		if class.Field("uuid") == nil || class.State == "removed" || !class.GetAll && class.Name != "message" {
			continue
		}
		names := []string{nounName[class.Name]}
		if names[0] == "" {
			names[0] = strings.ToLower(strings.ReplaceAll(class.Name, "_", "-"))
		}
		if class.Name == "VM" {
			names = append(names, "template", "snapshot")
		}
		fields := parseLayout(class)
		for _, name := range names {
			n := &noun{name: name, class: class, fields: fields, implicit: implicitFilters[name]}
			var special bool
			if n.defaults, special = defaultFields[name]; !special && class.Field("name_label") != nil {
				n.defaults = []string{"uuid", "name-label", "name-description"}
			}
			out = append(out, n)
		}
	}
	return out
}

// field returns the field with a name, or nil.
func (n *noun) field(name string) *field {
	for _, f := range n.fields {
		if f.name == name {
			return f
		}
	}
	return nil
}

// row is an object in a list.
type row struct {
	ref   string
	rec   any
	cells []cell
}

// filter is a condition on one field.
type filter struct {
	f     *field
	key   string // of a map
	value string
}

func (flt filter) matches(v view, rec any) bool {
	switch {
	case flt.key != "" && flt.f.shape == mapping:
		for _, e := range pairs(flt.f, v, rec) {
			if e.key == flt.key {
				return e.value == flt.value
			}
		}
		return false
	case flt.key != "":
		return slices.Contains(members(flt.f, v, rec), flt.value)
	}
	return flt.f.text(v, rec) == flt.value
}

// filter finds the field that a parameter asks about.
func (n *noun) filter(p parameter) (filter, error) {
	if f := n.field(p.key); f != nil {
		return filter{f: f, value: p.value}, nil
	}
	for _, f := range n.fields {
		if f.shape == scalar {
			continue
		}
		sub, ok := subKey(p.key, f.name)
		switch {
		case !ok:
		case f.shape == mapping:
			return filter{f, sub, p.value}, nil
		case sub == "contains":
			return filter{f, sub, p.value}, nil
		case strings.Contains(p.key, ":"):
			return filter{}, failf("Invalid syntax for set filtering (should be set-param:contains=key)")
		}
	}
	return filter{}, failf("Unknown field '%s'", p.key)
}

// find returns the objects that satisfy all conditions, by name, with the
// cells of the fields to be shown. A field that does not exist is an error only while
// objects are left to look at. Expensive fields are asked for when a
// condition names them, and when measured says so.
func (n *noun) find(ctx context.Context, r *run, conditions []parameter, shown []*field, measured bool) ([]row, error) {
	var rows []row
	var later []filter
	err := r.read(func(v view) error {
		rows = n.candidates(v, conditions)
		for _, p := range conditions {
			if len(rows) == 0 {
				return nil
			}
			flt, err := n.filter(p)
			if err != nil {
				return err
			}
			if flt.f.measure != nil {
				later = append(later, flt)
				continue
			}
			rows = slices.DeleteFunc(rows, func(row row) bool { return !flt.matches(v, row.rec) })
		}
		n.sort(rows)
		for i := range rows {
			rows[i].cells = cells(v, rows[i].rec, shown)
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	for _, flt := range later {
		var failed error
		rows = slices.DeleteFunc(rows, func(row row) bool {
			text, err := flt.f.measure(ctx, r, row.ref)
			if err != nil {
				failed = err
			}
			return text != flt.value
		})
		if failed != nil {
			return nil, failed
		}
	}
	if measured {
		for i := range rows {
			if err := r.measure(ctx, rows[i].ref, rows[i].cells, shown); err != nil {
				return nil, err
			}
		}
	}
	return rows, nil
}

// candidates returns the objects to apply conditions to: all, or the one that
// a condition names by its uuid.
func (n *noun) candidates(v view, conditions []parameter) (rows []row) {
	for _, p := range conditions {
		if p.key != "uuid" {
			continue
		}
		if ref, ok := v.UUID(n.class, p.value); ok {
			if rec, ok := v.Lookup(n.class, ref); ok {
				rows = append(rows, row{ref: ref, rec: rec})
			}
		}
		return rows
	}
	for ref, rec := range v.Each(n.class) {
		rows = append(rows, row{ref: ref, rec: rec})
	}
	return rows
}

// sort orders objects by name, where they have one.
func (n *noun) sort(rows []row) {
	label := n.class.Field("name_label")
	if label == nil {
		return
	}
	slices.SortStableFunc(rows, func(a, b row) int {
		return strings.Compare(label.Get(a.rec).(string), label.Get(b.rec).(string))
	})
}

func cells(v view, rec any, shown []*field) []cell {
	out := make([]cell, len(shown))
	for i, f := range shown {
		out[i] = cell{f.key(), f.text(v, rec)}
	}
	return out
}

// measure fills in the expensive fields.
func (r *run) measure(ctx context.Context, ref string, cells []cell, shown []*field) error {
	for i, f := range shown {
		if f.measure != nil {
			text, err := f.measure(ctx, r, ref)
			if err != nil {
				return err
			}
			cells[i].value = text
		}
	}
	return nil
}

// visible returns the fields that are not hidden.
func (n *noun) visible() []*field {
	return slices.DeleteFunc(slices.Clone(n.fields), func(f *field) bool { return f.hidden })
}

// pick returns the named fields, in the order of the noun. Names that do not
// exist count for nothing; nil means all fields that are not hidden.
func (n *noun) pick(names []string) []*field {
	if names == nil {
		return n.visible()
	}
	return slices.DeleteFunc(slices.Clone(n.fields), func(f *field) bool { return !slices.Contains(names, f.name) })
}

// checkNames tells the user which names of params= are of no field, and what
// fields there are. It is an error only if nothing is left to be shown.
func (n *noun) checkNames(r *run, names []string) error {
	var unknown []string
	for _, name := range names {
		if n.field(name) == nil {
			unknown = append(unknown, "'"+name+"'")
		}
	}
	if len(unknown) == 0 {
		return nil
	}
	var known []string
	for _, f := range n.visible() {
		known = append(known, f.name)
	}
	text := fmt.Sprintf("Unknown field %s. Fields of a %s: %s", strings.Join(unknown, ", "), n.name, strings.Join(known, ", "))
	if len(unknown) == len(names) {
		return failf("%s", text)
	}
	return r.conn.PrintStderr(text + "\n")
}

// list is C-list.
func (n *noun) list(ctx context.Context, r *run) error {
	names := n.defaults
	if p, ok := r.args.lookup("params"); ok {
		if names = strings.Split(p, ","); p == "all" {
			names = nil
		}
		if err := n.checkNames(r, names); err != nil {
			return err
		}
	}
	conditions := slices.Clone(n.implicit)
	for _, p := range r.args.params {
		if strings.HasPrefix(p.key, "database:") {
			return failf("Saved databases are not supported by this server")
		}
		if !reserved[p.key] && p.key != "params" {
			conditions = append(conditions, p)
		}
	}
	if r.args.flag("all") {
		conditions = nil
	}
	rows, err := n.find(ctx, r, conditions, n.pick(names), false)
	if err != nil {
		return err
	}
	out := make([][]cell, len(rows))
	for i := range rows {
		out[i] = rows[i].cells
	}
	r.out.records(out...)
	return nil
}
