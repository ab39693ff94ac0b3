package xapi

import (
	"bytes"
	"encoding/json"
	"fmt"
	"maps"
	"reflect"
	"slices"
	"strings"
)

// Class describes a class of the API.
type Class struct {
	Name       string
	Introduced string // release code name or version number
	State      string // published, deprecated, removed or prototyped
	Stored     bool   // kept in the database, with the generic methods
	Events     bool   // appears in event.from
	Persist    bool   // survives a restart
	CtorDtor   bool   // generic create and destroy are exposed
	GetAll     bool   // get_all and its relatives are exposed

	Fields  []*Field // in the order of the model, which is by name
	Methods map[string]*Method
	Forward []*Relation // relations whose stored side is a field of this class

	GoType reflect.Type // the struct; records are pointers to it

	refType, recordType *Type
	byName              map[string]*Field
	visible             []*Field // not internal
	computed            []*Field // computed sides of relations
	deep                []*Field // cloned deeply: sets, maps and options that are not computed
	template            any
}

// Qualifier says who may write a field.
type Qualifier string

const (
	RW        Qualifier = "RW"        // constructor argument and generic setter
	StaticRO  Qualifier = "StaticRO"  // constructor argument only
	DynamicRO Qualifier = "DynamicRO" // neither
)

// Field describes a field of a class.
type Field struct {
	Class      *Class
	Name       string
	Type       *Type
	Qualifier  Qualifier
	HasDefault bool
	Default    any // typed; without HasDefault the zero value of the type. Shared: read only
	Introduced string
	State      string // empty when published
	Persist    bool   // survives a restart
	Internal   bool   // never sent to clients
	Computed   bool   // the computed side of a relation
	SetterRole string
	GetterRole string            // empty means read-only
	KeyRoles   map[string]string // role by pattern of the map key, instead of SetterRole

	index int // in the struct
}

// Field returns the field with the given name on the wire, or nil.
func (c *Class) Field(name string) *Field { return c.byName[name] }

// RefType returns the type of a reference to an object of c.
func (c *Class) RefType() *Type { return c.refType }

// RecordType returns the type of a record of c.
func (c *Class) RecordType() *Type { return c.recordType }

// New returns a record with every field at its default; see the function New.
func (c *Class) New() any { return c.Clone(c.template) }

// Clone returns a copy of rec that shares nothing with it but the computed sides of relations, which nobody
// assigns.
func (c *Class) Clone(rec any) any {
	dst := reflect.New(c.GoType)
	to := dst.Elem()
	to.Set(reflect.ValueOf(rec).Elem())
	for _, f := range c.deep {
		cloneInPlace(to.Field(f.index))
	}
	return dst.Interface()
}

// cloneInPlace replaces the set, map or pointer in v, which is addressable, by a copy.
func cloneInPlace(v reflect.Value) {
	switch p := v.Addr().Interface().(type) {
	case *map[string]string:
		*p = maps.Clone(*p)
	case *[]string:
		*p = slices.Clone(*p)
	default:
		v.Set(deepCopy(v))
	}
}

// deepCopy copies the sets and maps in v. Records in it are shared, being immutable.
func deepCopy(v reflect.Value) reflect.Value {
	switch v.Kind() {
	case reflect.Slice:
		if v.IsNil() {
			return v
		}
		out := reflect.MakeSlice(v.Type(), v.Len(), v.Len())
		for i := range v.Len() {
			out.Index(i).Set(deepCopy(v.Index(i)))
		}
		return out
	case reflect.Map:
		if v.IsNil() {
			return v
		}
		out := reflect.MakeMapWithSize(v.Type(), v.Len())
		for it := v.MapRange(); it.Next(); {
			out.SetMapIndex(it.Key(), deepCopy(it.Value()))
		}
		return out
	default:
		return v
	}
}

// Normalize gives the fields of rec that a struct literal leaves at Go's zero value a value that may be sent:
// nil sets and maps become empty, empty references null, zero times the epoch, empty enums their default.
func (c *Class) Normalize(rec any) {
	r := reflect.ValueOf(rec).Elem()
	for _, f := range c.Fields {
		v := r.Field(f.index)
		switch f.Type.Kind {
		case KindSet, KindMap, KindRef, KindEnum, KindDateTime:
			if v.IsZero() {
				v.Set(deepCopy(reflect.ValueOf(f.emptyValue())))
			}
		}
	}
}

// emptyValue is what Go's zero value stands for. The default of a set or map may hold members, but a set that
// was left out of a struct literal is empty.
func (f *Field) emptyValue() any {
	if f.Type.Kind == KindEnum {
		return f.Default
	}
	return f.Type.Zero()
}

// Diff returns the fields in which two records of c differ.
func (c *Class) Diff(a, b any) []*Field {
	va, vb := reflect.ValueOf(a).Elem(), reflect.ValueOf(b).Elem()
	var out []*Field
	for _, f := range c.Fields {
		if !equalValues(va.Field(f.index), vb.Field(f.index)) {
			out = append(out, f)
		}
	}
	return out
}

// equalValues compares two addressable values of one field.
func equalValues(a, b reflect.Value) bool {
	switch a.Kind() {
	case reflect.String:
		return a.String() == b.String()
	case reflect.Int64:
		return a.Int() == b.Int()
	case reflect.Bool:
		return a.Bool() == b.Bool()
	case reflect.Float64:
		return a.Float() == b.Float()
	}
	switch p := a.Addr().Interface().(type) {
	case *map[string]string:
		return maps.Equal(*p, *b.Addr().Interface().(*map[string]string))
	case *[]string:
		return slices.Equal(*p, *b.Addr().Interface().(*[]string))
	default:
		return reflect.DeepEqual(p, b.Addr().Interface())
	}
}

// Get returns the value of the field in rec. It shares sets and maps with the record.
func (f *Field) Get(rec any) any {
	return reflect.ValueOf(rec).Elem().Field(f.index).Interface()
}

// Set assigns a typed value, as Type.Parse returns it, to the field in rec.
func (f *Field) Set(rec, v any) {
	reflect.ValueOf(rec).Elem().Field(f.index).Set(reflect.ValueOf(v))
}

// Pointer returns a pointer to the field in rec, such as *string or *[]Ref[VBD].
func (f *Field) Pointer(rec any) any {
	return reflect.ValueOf(rec).Elem().Field(f.index).Addr().Interface()
}

// String returns Class.field.
func (f *Field) String() string { return f.Class.Name + "." + f.Name }

type classJSON struct {
	Introduced string        `json:"introduced"`
	State      string        `json:"state"`
	InDatabase bool          `json:"in_database"`
	GenEvents  bool          `json:"gen_events"`
	Persist    bool          `json:"persist"`
	CtorDtor   bool          `json:"default_ctor_dtor"`
	GetAll     bool          `json:"get_all"`
	Fields     []fieldJSON   `json:"fields"`
	Methods    []*methodJSON `json:"messages"`
}

type fieldJSON struct {
	Name       string            `json:"name"`
	Type       string            `json:"type"`
	Qualifier  Qualifier         `json:"qualifier"`
	Default    json.RawMessage   `json:"default"`
	Introduced string            `json:"introduced"`
	State      string            `json:"state"`
	Persist    *bool             `json:"persist"`
	Internal   bool              `json:"internal"`
	SetterRole string            `json:"setter_role"`
	GetterRole string            `json:"getter_role"`
	KeyRoles   map[string]string `json:"key_roles"`
}

// kept are the classes that the model keeps outside its database but not in memory: they survive a restart all
// the same.
var kept = []string{"message"}

// addClasses makes all classes before the first field, because types refer to classes.
func (m *Model) addClasses(in map[string]*classJSON) error {
	for _, name := range slices.Sorted(maps.Keys(in)) {
		j := in[name]
		gt, ok := m.records[name]
		if !ok {
			return fmt.Errorf("class %s has no generated struct", name)
		}
		c := &Class{
			Name: name, Introduced: j.Introduced, State: j.State,
			Stored: j.InDatabase, Events: j.GenEvents, Persist: j.Persist || slices.Contains(kept, name),
			CtorDtor: j.CtorDtor, GetAll: j.GetAll,
			Methods: make(map[string]*Method, len(j.Methods)),
			GoType:  gt.record,
			byName:  make(map[string]*Field, len(j.Fields)),
		}
		m.Classes[name] = c
		m.Ordered = append(m.Ordered, c)
		m.byType[gt.record] = c
	}
	for _, c := range m.Ordered {
		var err error
		if c.refType, err = m.Type(c.Name + " ref"); err != nil {
			return err
		}
		if c.recordType, err = m.Type(c.Name + " record"); err != nil {
			return err
		}
		for _, j := range in[c.Name].Fields {
			if err := m.addField(c, j); err != nil {
				return fmt.Errorf("%s.%s: %w", c.Name, j.Name, err)
			}
		}
		for _, j := range in[c.Name].Methods {
			if err := m.addMethod(c, j); err != nil {
				return fmt.Errorf("%s.%s: %w", c.Name, j.Name, err)
			}
		}
	}
	return nil
}

func (m *Model) addField(c *Class, j fieldJSON) error {
	typ, err := m.Type(j.Type)
	if err != nil {
		return err
	}
	f := &Field{
		Class: c, Name: j.Name, Type: typ, Qualifier: j.Qualifier,
		HasDefault: len(j.Default) > 0, Introduced: j.Introduced, State: j.State,
		Persist:  c.Persist && (j.Persist == nil || *j.Persist),
		Internal: j.Internal, SetterRole: j.SetterRole, GetterRole: j.GetterRole, KeyRoles: j.KeyRoles,
	}
	if f.Default, err = typ.defaultValue(j.Default); err != nil {
		return err
	}
	sf, ok := fieldByTag(c.GoType, j.Name)
	if !ok || sf.Type != typ.goType {
		return fmt.Errorf("the generated struct has no such field of type %v", typ.goType)
	}
	f.index = sf.Index[0]
	c.Fields = append(c.Fields, f)
	c.byName[f.Name] = f
	return nil
}

func fieldByTag(t reflect.Type, name string) (reflect.StructField, bool) {
	for sf := range t.Fields() {
		if sf.Tag.Get("xapi") == name {
			return sf, true
		}
	}
	return reflect.StructField{}, false
}

// defaultValue parses a default of the model. Without one, or with an empty list in the place of a scalar, it
// is the zero value of the type.
func (t *Type) defaultValue(raw json.RawMessage) (any, error) {
	if len(raw) == 0 || string(raw) == "[]" {
		return t.Zero(), nil
	}
	d := json.NewDecoder(bytes.NewReader(raw))
	d.UseNumber()
	var v any
	if err := d.Decode(&v); err != nil {
		return nil, err
	}
	if n, ok := v.(json.Number); ok {
		v = wireNumber(n)
	}
	if list, ok := v.([]any); ok {
		for i := range list {
			if n, ok := list[i].(json.Number); ok {
				list[i] = wireNumber(n)
			}
		}
	}
	return t.Parse(v)
}

func wireNumber(n json.Number) any {
	if !strings.ContainsAny(n.String(), ".eE") {
		if i, err := n.Int64(); err == nil {
			return i
		}
	}
	f, _ := n.Float64()
	return f
}

// plan prepares what the record operations of c need, once all its fields and relations are known.
func (c *Class) plan() {
	for _, f := range c.Fields {
		if !f.Internal {
			c.visible = append(c.visible, f)
		}
		if f.Computed {
			c.computed = append(c.computed, f)
			continue
		}
		switch f.Type.Kind {
		case KindSet, KindMap, KindOption:
			c.deep = append(c.deep, f)
		}
	}
	rec := reflect.New(c.GoType)
	for _, f := range c.Fields {
		rec.Elem().Field(f.index).Set(reflect.ValueOf(f.Default))
	}
	c.template = rec.Interface()
}
