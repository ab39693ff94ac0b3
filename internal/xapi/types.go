package xapi

import (
	"fmt"
	"reflect"
	"slices"
	"strings"
	"time"
)

// Kind is the outermost constructor of a Type.
type Kind uint8

const (
	KindString Kind = iota
	KindInt
	KindFloat
	KindBool
	KindDateTime
	KindEnum
	KindRef
	KindRecord
	KindSet
	KindMap
	KindOption
	KindVoid
	KindEventBatch
)

var kindNames = [...]string{
	"string", "int", "float", "bool", "datetime", "enum", "ref", "record", "set", "map", "option", "void", "event_batch",
}

// String returns the name of the kind in the type grammar.
func (k Kind) String() string { return kindNames[k] }

// Type is a type of the model.
type Type struct {
	Kind  Kind
	Elem  *Type  // of sets, maps (the value) and options
	Key   *Type  // of maps
	Class string // of refs and records
	Enum  string // of enums

	text   string
	goType reflect.Type
	class  *Class   // of refs and records
	values []string // of enums
}

// EventBatch is the Go value of type event_batch, the result of event.from.
type EventBatch struct {
	Events         []*Event
	ValidRefCounts map[string]int64 // number of objects by lower-case class name
	Token          string
}

// String returns the type in the grammar of the model, such as "(string -> VDI ref) map".
func (t *Type) String() string { return t.text }

// GoType returns the Go type of the values: string, Ref[VDI], *VDI, []Ref[VBD] … For void it is nil.
func (t *Type) GoType() reflect.Type { return t.goType }

// Values returns the values of an enum in declaration order. Read only.
func (t *Type) Values() []string { return t.values }

// Type returns the type that s names in the grammar of the model. Equal names give the same pointer.
func (m *Model) Type(s string) (*Type, error) {
	if t, ok := m.types.Load(s); ok {
		return t.(*Type), nil
	}
	t, err := m.parseType(s)
	if err != nil {
		return nil, err
	}
	t.text = s
	known, _ := m.types.LoadOrStore(s, t)
	return known.(*Type), nil
}

func (m *Model) parseType(s string) (*Type, error) {
	for kind, typ := range map[Kind]reflect.Type{
		KindString:     reflect.TypeFor[string](),
		KindInt:        reflect.TypeFor[int64](),
		KindFloat:      reflect.TypeFor[float64](),
		KindBool:       reflect.TypeFor[bool](),
		KindDateTime:   timeType,
		KindVoid:       nil,
		KindEventBatch: reflect.TypeFor[*EventBatch](),
	} {
		if s == kind.String() {
			return &Type{Kind: kind, goType: typ}, nil
		}
	}
	if name, ok := strings.CutPrefix(s, "enum "); ok && !strings.Contains(name, " ") {
		typ := m.enums[name]
		if typ == nil {
			return nil, fmt.Errorf("enum %q is not known", name)
		}
		return &Type{Kind: KindEnum, Enum: name, goType: typ, values: m.Enums[name]}, nil
	}
	body, word := s, ""
	if i := strings.LastIndexByte(s, ' '); i > 0 {
		body, word = s[:i], s[i+1:]
	}
	switch word {
	case "set", "option":
		return m.parseContainer(word, body)
	case "map":
		return m.parseMap(body)
	case "ref", "record":
		c := m.Classes[body]
		if c == nil {
			return nil, fmt.Errorf("class %q is not known", body)
		}
		if word == "ref" {
			return &Type{Kind: KindRef, Class: body, class: c, goType: m.records[body].ref}, nil
		}
		return &Type{Kind: KindRecord, Class: body, class: c, goType: reflect.PointerTo(c.GoType)}, nil
	}
	return nil, fmt.Errorf("type %q is not known", s)
}

func (m *Model) parseContainer(word, body string) (*Type, error) {
	elem, err := m.Type(body)
	if err != nil {
		return nil, err
	}
	if elem.goType == nil {
		return nil, fmt.Errorf("%s of %s", word, elem)
	}
	t := &Type{Kind: KindSet, Elem: elem}
	switch {
	case word == "set":
		t.goType = reflect.SliceOf(elem.goType)
	case elem.Kind == KindRecord:
		t.Kind, t.goType = KindOption, elem.goType
	default:
		t.Kind, t.goType = KindOption, reflect.PointerTo(elem.goType)
	}
	return t, nil
}

func (m *Model) parseMap(body string) (*Type, error) {
	inner, ok := strings.CutPrefix(body, "(")
	if ok {
		inner, ok = strings.CutSuffix(inner, ")")
	}
	k, v, arrow := strings.Cut(inner, " -> ")
	if !ok || !arrow {
		return nil, fmt.Errorf("map type %q is malformed", body)
	}
	key, err := m.Type(k)
	if err != nil {
		return nil, err
	}
	if !slices.Contains([]Kind{KindString, KindInt, KindEnum, KindRef}, key.Kind) {
		return nil, fmt.Errorf("map key of type %s", key)
	}
	elem, err := m.Type(v)
	if err != nil {
		return nil, err
	}
	if elem.goType == nil {
		return nil, fmt.Errorf("map of %s", elem)
	}
	return &Type{Kind: KindMap, Key: key, Elem: elem, goType: reflect.MapOf(key.goType, elem.goType)}, nil
}

var timeType = reflect.TypeFor[time.Time]()

// Zero returns the value of a field of this type that has no default and was never set: sets and maps are
// empty and fresh, references null, dates the epoch, enums their first value. For void it is nil.
func (t *Type) Zero() any {
	switch t.Kind {
	case KindVoid:
		return nil
	case KindDateTime:
		return Epoch
	case KindRef:
		return reflect.ValueOf(NullRef).Convert(t.goType).Interface()
	case KindEnum:
		return reflect.ValueOf(t.values[0]).Convert(t.goType).Interface()
	case KindSet:
		return reflect.MakeSlice(t.goType, 0, 0).Interface()
	case KindMap:
		return reflect.MakeMap(t.goType).Interface()
	default:
		return reflect.Zero(t.goType).Interface()
	}
}
