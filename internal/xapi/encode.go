package xapi

import (
	"cmp"
	"fmt"
	"maps"
	"math"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"time"
)

// Encoder is what values are written to. Arrays hold values, structs hold a Key before each value. Errors of
// the underlying writer are sticky in it and reported there.
//
// An encoder may also have the method Int4(int64); it is then used for the few numbers that the XML dialect
// sends as <i4> instead of as text.
type Encoder interface {
	Null()
	Bool(bool)
	Int(int64)
	Float(float64)
	String(string)
	Time(time.Time)
	BeginArray()
	EndArray()
	BeginStruct()
	Key(string)
	EndStruct()
}

// Encode writes v, a value of type t.GoType(), to e. Where the kind is the same it also takes other Go types:
// a plain string for an enum or a reference, []any for a set. The error says that v is of the wrong type; what
// was written by then is an incomplete value.
func (t *Type) Encode(e Encoder, v any) error {
	if t.Kind == KindVoid {
		e.String("")
		return nil
	}
	if v == nil && t.Kind == KindOption {
		e.Null()
		return nil
	}
	return t.encode(e, reflect.ValueOf(v))
}

func (t *Type) encode(e Encoder, v reflect.Value) error {
	if v.Kind() == reflect.Interface {
		v = v.Elem()
	}
	switch t.Kind {
	case KindString, KindEnum:
		if v.Kind() == reflect.String {
			e.String(v.String())
			return nil
		}
	case KindRef:
		if v.Kind() == reflect.String {
			s := v.String()
			if s == "" {
				s = NullRef
			}
			e.String(s)
			return nil
		}
	case KindInt:
		if v.CanInt() {
			e.Int(v.Int())
			return nil
		}
	case KindFloat:
		if v.CanFloat() {
			e.Float(v.Float())
			return nil
		}
	case KindBool:
		if v.Kind() == reflect.Bool {
			e.Bool(v.Bool())
			return nil
		}
	case KindDateTime:
		if v.IsValid() && v.Type() == timeType {
			e.Time(timeOf(v))
			return nil
		}
	case KindSet:
		if v.Kind() == reflect.Slice {
			return t.encodeSet(e, v)
		}
	case KindMap:
		if v.Kind() == reflect.Map {
			return t.encodeMap(e, v)
		}
	case KindOption:
		if v.Kind() == reflect.Pointer {
			return t.encodeOption(e, v)
		}
	case KindRecord:
		if v.Kind() == reflect.Pointer && v.Type().Elem() == t.class.GoType && !v.IsNil() {
			if ev, ok := v.Interface().(*Event); ok {
				return encodeEvent(e, ev)
			}
			return t.class.encode(e, v.Elem())
		}
	case KindEventBatch:
		if b, ok := v.Interface().(*EventBatch); ok && b != nil {
			return encodeEventBatch(e, b)
		}
	}
	if !v.IsValid() {
		return fmt.Errorf("xapi: cannot encode nil as %s", t)
	}
	return fmt.Errorf("xapi: cannot encode %s as %s", v.Type(), t)
}

// timeOf reads a time without copying it to the heap when v is a field. The zero time counts as the epoch.
func timeOf(v reflect.Value) time.Time {
	var t time.Time
	if v.CanAddr() {
		t = *v.Addr().Interface().(*time.Time)
	} else {
		t = v.Interface().(time.Time)
	}
	if t.IsZero() {
		return Epoch
	}
	return t
}

func (t *Type) encodeSet(e Encoder, v reflect.Value) error {
	e.BeginArray()
	for i := range v.Len() {
		if err := t.Elem.encode(e, v.Index(i)); err != nil {
			return err
		}
	}
	e.EndArray()
	return nil
}

// encodeMap writes a map as a struct with its keys in order.
func (t *Type) encodeMap(e Encoder, v reflect.Value) error {
	e.BeginStruct()
	defer e.EndStruct()
	if v.Len() == 0 {
		return nil
	}
	if m, ok := v.Interface().(map[string]string); ok && t.Elem.Kind == KindString {
		var buf [16]string
		for _, k := range appendSorted(buf[:0], m) {
			e.Key(k)
			e.String(m[k])
		}
		return nil
	}
	keys := v.MapKeys()
	slices.SortFunc(keys, compareKeys)
	for _, k := range keys {
		e.Key(keyText(k))
		if err := t.Elem.encode(e, v.MapIndex(k)); err != nil {
			return err
		}
	}
	return nil
}

func appendSorted(buf []string, m map[string]string) []string {
	for k := range m {
		buf = append(buf, k)
	}
	slices.Sort(buf)
	return buf
}

// compareKeys orders integer keys by value and all others by text.
func compareKeys(a, b reflect.Value) int {
	if a.CanInt() && b.CanInt() {
		return cmp.Compare(a.Int(), b.Int())
	}
	return strings.Compare(keyText(a), keyText(b))
}

func keyText(k reflect.Value) string {
	if k.Kind() == reflect.Interface {
		k = k.Elem()
	}
	if k.CanInt() {
		return strconv.FormatInt(k.Int(), 10)
	}
	return k.String()
}

func (t *Type) encodeOption(e Encoder, v reflect.Value) error {
	if v.IsNil() {
		e.Null()
		return nil
	}
	if t.Elem.Kind == KindRecord {
		return t.Elem.encode(e, v)
	}
	return t.Elem.encode(e, v.Elem())
}

// encode writes a record: every field that is not internal, in the order of the model, except options that
// are not set.
func (c *Class) encode(e Encoder, rec reflect.Value) error {
	e.BeginStruct()
	for _, f := range c.visible {
		v := rec.Field(f.index)
		if f.Type.Kind == KindOption && v.IsNil() {
			continue
		}
		e.Key(f.Name)
		if err := f.Type.encode(e, v); err != nil {
			return fmt.Errorf("%s: %w", f, err)
		}
	}
	e.EndStruct()
	return nil
}

// encodeEvent writes an event the way clients have always received it: the id as a string, the timestamp as
// the text of a number of seconds, no uuid, and the record of the object unless it was deleted.
func encodeEvent(e Encoder, ev *Event) error {
	seconds := 0.0
	if !ev.Timestamp.IsZero() {
		seconds = float64(ev.Timestamp.UnixMilli()) / 1000
	}
	e.BeginStruct()
	e.Key("id")
	e.String(strconv.FormatInt(ev.ID, 10))
	e.Key("timestamp")
	e.String(strconv.FormatFloat(seconds, 'f', 1, 64))
	e.Key("class")
	e.String(ev.Class)
	e.Key("operation")
	e.String(string(ev.Operation))
	e.Key("ref")
	e.String(ev.Ref)
	if ev.Snapshot != nil {
		c := Datamodel().ClassOfRecord(ev.Snapshot)
		if c == nil {
			return fmt.Errorf("xapi: event.snapshot: %T is not a record", ev.Snapshot)
		}
		e.Key("snapshot")
		if err := c.recordType.Encode(e, ev.Snapshot); err != nil {
			return err
		}
	}
	e.EndStruct()
	return nil
}

func encodeEventBatch(e Encoder, b *EventBatch) error {
	e.BeginStruct()
	e.Key("events")
	e.BeginArray()
	for _, ev := range b.Events {
		if err := encodeEvent(e, ev); err != nil {
			return err
		}
	}
	e.EndArray()
	e.Key("valid_ref_counts")
	e.BeginStruct()
	small, _ := e.(interface{ Int4(int64) })
	for _, k := range slices.Sorted(maps.Keys(b.ValidRefCounts)) {
		e.Key(k)
		if n := b.ValidRefCounts[k]; small != nil && n <= math.MaxInt32 {
			small.Int4(n)
		} else {
			e.Int(n)
		}
	}
	e.EndStruct()
	e.Key("token")
	e.String(b.Token)
	e.EndStruct()
	return nil
}
