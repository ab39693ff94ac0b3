package db_test

import (
	"maps"
	"reflect"
	"slices"

	"github.com/google/go-cmp/cmp"

	"coppice/internal/db"
	"coppice/internal/xapi"
)

// records is a whole database as plain maps: record by class and reference.
type records map[string]map[string]any

// modelClasses are the classes that the test uses: persistent ones, one without persistent fields that matter,
// and one in memory only.
var modelClasses = []string{"SR", "VBD", "VDI", "VM", "VM_group", "task"}

func class(name string) *xapi.Class { return xapi.Datamodel().Classes[name] }

func (r records) clone() records {
	out := make(records)
	for name, objects := range r {
		out[name] = make(map[string]any)
		for ref, rec := range objects {
			out[name][ref] = class(name).Clone(rec)
		}
	}
	return out
}

// complete returns the records with their computed sides, each found by looking at every object.
func (r records) complete() records {
	out := r.clone()
	for name, objects := range out {
		for _, rec := range objects {
			class(name).CopyComputed(rec, nil)
		}
	}
	for _, rel := range xapi.Datamodel().Relations {
		for ref, rec := range r[rel.From.Class.Name] {
			targets := rel.From.AppendRefs(nil, rec)
			slices.Sort(targets)
			for _, target := range slices.Compact(targets) {
				if t := out[rel.To.Class.Name][target]; t != nil {
					rel.To.AddRef(t, ref)
				}
			}
		}
	}
	return out.sorted()
}

// sorted orders the members of the computed sides, which have no order of their own.
func (r records) sorted() records {
	for name, objects := range r {
		for _, f := range class(name).Fields {
			if !f.Computed {
				continue
			}
			for _, rec := range objects {
				refs := f.AppendRefs(nil, rec)
				slices.Sort(refs)
				f.Set(rec, f.Type.Zero())
				for _, ref := range refs {
					f.AddRef(rec, ref)
				}
			}
		}
	}
	return r
}

// actual reads the same from the database.
func actual(tx *db.Tx) records {
	out := make(records)
	for _, name := range modelClasses {
		out[name] = make(map[string]any)
		for ref, rec := range tx.Each(class(name)) {
			out[name][ref] = class(name).Clone(rec)
		}
	}
	return out.clone().sorted()
}

// diffRecords is cmp.Diff with a short cut, because it is called all the time.
func diffRecords(want, got records) string {
	if reflect.DeepEqual(want, got) {
		return ""
	}
	return cmp.Diff(want, got)
}

// persistent leaves out what does not survive a restart as a whole.
func (r records) persistent() records {
	out := maps.Clone(r)
	maps.DeleteFunc(out, func(name string, _ map[string]any) bool { return !class(name).Persist })
	return out
}
