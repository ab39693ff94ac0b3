package xapi

import (
	"reflect"
	"slices"
)

// AppendRefs appends to buf the references that field f of rec holds, a ref or a set of refs, without null
// ones.
func (f *Field) AppendRefs(buf []string, rec any) []string {
	v := reflect.ValueOf(rec).Elem().Field(f.index)
	if f.Type.Kind != KindSet {
		return appendRef(buf, v.String())
	}
	for i := range v.Len() {
		buf = appendRef(buf, v.Index(i).String())
	}
	return buf
}

func appendRef(buf []string, ref string) []string {
	if Ref[any](ref).IsNull() {
		return buf
	}
	return append(buf, ref)
}

// AddRef appends ref to field f of rec, a set of refs. It may use spare capacity of the set, so two records
// that share the set must not both be added to: the one that was added to replaces the other.
func (f *Field) AddRef(rec any, ref string) {
	v := reflect.ValueOf(rec).Elem().Field(f.index)
	v.Set(reflect.Append(v, reflect.ValueOf(ref).Convert(v.Type().Elem())))
}

// RemoveRef removes ref from field f of rec, a set of refs, and says whether it was there. Records that share
// the set do not see the change.
func (f *Field) RemoveRef(rec any, ref string) bool {
	v := reflect.ValueOf(rec).Elem().Field(f.index)
	for i := range v.Len() {
		if v.Index(i).String() == ref {
			out := reflect.MakeSlice(v.Type(), 0, v.Len()-1)
			out = reflect.AppendSlice(out, v.Slice(0, i))
			v.Set(reflect.AppendSlice(out, v.Slice(i+1, v.Len())))
			return true
		}
	}
	return false
}

// CopyComputed replaces the computed sides of dst by those of src. Without src they become empty.
func (c *Class) CopyComputed(dst, src any) {
	to := reflect.ValueOf(dst).Elem()
	for _, f := range c.computed {
		if src == nil {
			to.Field(f.index).Set(reflect.ValueOf(f.Type.Zero()))
		} else {
			to.Field(f.index).Set(reflect.ValueOf(src).Elem().Field(f.index))
		}
	}
}

// HasComputed says whether a computed side of rec has members.
func (c *Class) HasComputed(rec any) bool {
	v := reflect.ValueOf(rec).Elem()
	return slices.ContainsFunc(c.computed, func(f *Field) bool { return v.Field(f.index).Len() > 0 })
}
