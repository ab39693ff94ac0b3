package xapi

import (
	"errors"
	"fmt"
	"math"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"unicode/utf8"
)

// Parse turns a wire value into a value of type t.GoType(). The error is an *Error: FIELD_TYPE_ERROR with an
// empty field name when the value has the wrong shape, INVALID_VALUE with an empty field name when it has the
// right shape but cannot be.
func (t *Type) Parse(v any) (any, error) { return t.ParseAs("", v) }

// ParseAs is Parse with the name of the parameter or field for the error. A fault inside a record names the
// field of that record instead.
func (t *Type) ParseAs(name string, v any) (any, error) {
	if t.Kind == KindVoid {
		return nil, nil
	}
	dst := reflect.New(t.goType).Elem()
	if err := t.parse(name, v, dst); err != nil {
		return nil, err
	}
	return dst.Interface(), nil
}

// mismatch reports a value of the wrong shape.
func (t *Type) mismatch(name string, v any) *Error {
	return NewError(ErrFieldTypeError, name).WithCause(fmt.Errorf("got %s, want %s", wireName(v), t))
}

// invalid reports a value of the right shape that is not a value of t.
func (t *Type) invalid(name, v, reason string) *Error {
	e := NewError(ErrInvalidValue, name, strings.ToValidUTF8(v, "\uFFFD"))
	return e.WithCause(fmt.Errorf("%s: %s", t, reason))
}

func wireName(v any) string {
	switch v.(type) {
	case nil:
		return "nothing"
	case []any:
		return "an array"
	case map[string]any:
		return "a struct"
	default:
		return fmt.Sprintf("%T %v", v, v)
	}
}

func (t *Type) parse(name string, v any, dst reflect.Value) error {
	switch t.Kind {
	case KindInt:
		return t.parseInt(name, v, dst)
	case KindFloat:
		return t.parseFloat(name, v, dst)
	case KindBool:
		return t.parseBool(name, v, dst)
	case KindString, KindEnum, KindRef, KindDateTime:
		s, ok := v.(string)
		if !ok {
			return t.mismatch(name, v)
		}
		return t.parseText(name, s, dst)
	case KindSet:
		return t.parseSet(name, v, dst)
	case KindMap:
		return t.parseMap(name, v, dst)
	case KindOption:
		return t.parseOption(name, v, dst)
	case KindRecord:
		m, ok := v.(map[string]any)
		if !ok {
			return t.mismatch(name, v)
		}
		rec, err := t.class.Decode(m)
		if err != nil {
			return err
		}
		dst.Set(reflect.ValueOf(rec))
		return nil
	default:
		return t.mismatch(name, v)
	}
}

// parseText reads a type whose values are strings on the wire.
func (t *Type) parseText(name, s string, dst reflect.Value) error {
	switch t.Kind {
	case KindEnum:
		if !slices.Contains(t.values, s) {
			return t.invalid(name, s, "want one of "+strings.Join(t.values, ", "))
		}
	case KindRef:
		if s == "" {
			s = NullRef
		}
	case KindDateTime:
		d, err := ParseTime(s)
		if err != nil {
			return t.invalid(name, s, err.Error())
		}
		dst.Set(reflect.ValueOf(d))
		return nil
	}
	if !utf8.ValidString(s) {
		return t.invalid("Invalid UTF-8 string in parameter", s, "not UTF-8")
	}
	dst.SetString(s)
	return nil
}

func (t *Type) parseInt(name string, v any, dst reflect.Value) error {
	switch v := v.(type) {
	case int64:
		dst.SetInt(v)
	case float64:
		if v != math.Trunc(v) || math.Abs(v) > 1<<53 {
			return t.invalid(name, strconv.FormatFloat(v, 'g', -1, 64), "not a whole number")
		}
		dst.SetInt(int64(v))
	case string:
		n, err := strconv.ParseInt(v, 10, 64)
		if err != nil {
			return t.invalid(name, v, "want a 64-bit decimal number")
		}
		dst.SetInt(n)
	default:
		return t.mismatch(name, v)
	}
	return nil
}

func (t *Type) parseFloat(name string, v any, dst reflect.Value) error {
	switch v := v.(type) {
	case float64:
		dst.SetFloat(v)
	case int64:
		dst.SetFloat(float64(v))
	case string:
		f, err := strconv.ParseFloat(v, 64)
		if err != nil || math.IsNaN(f) || math.IsInf(f, 0) {
			return t.invalid(name, v, "want a decimal number")
		}
		dst.SetFloat(f)
	default:
		return t.mismatch(name, v)
	}
	return nil
}

func (t *Type) parseBool(name string, v any, dst reflect.Value) error {
	switch v := v.(type) {
	case bool:
		dst.SetBool(v)
	case int64:
		if v != 0 && v != 1 {
			return t.invalid(name, strconv.FormatInt(v, 10), "want true or false")
		}
		dst.SetBool(v == 1)
	default:
		return t.mismatch(name, v)
	}
	return nil
}

func (t *Type) parseSet(name string, v any, dst reflect.Value) error {
	list, ok := v.([]any)
	if !ok {
		return t.mismatch(name, v)
	}
	out := reflect.MakeSlice(t.goType, len(list), len(list))
	for i, x := range list {
		if err := t.Elem.parse(name, x, out.Index(i)); err != nil {
			return err
		}
	}
	dst.Set(out)
	return nil
}

func (t *Type) parseMap(name string, v any, dst reflect.Value) error {
	m, ok := v.(map[string]any)
	if !ok {
		return t.mismatch(name, v)
	}
	out := reflect.MakeMapWithSize(t.goType, len(m))
	for k, x := range m {
		key, elem := reflect.New(t.Key.goType).Elem(), reflect.New(t.Elem.goType).Elem()
		if err := t.Key.parse(name, k, key); err != nil {
			return err
		}
		if err := t.Elem.parse(name, x, elem); err != nil {
			return err
		}
		out.SetMapIndex(key, elem)
	}
	dst.Set(out)
	return nil
}

func (t *Type) parseOption(name string, v any, dst reflect.Value) error {
	if v == nil {
		dst.SetZero()
		return nil
	}
	if t.Elem.Kind == KindRecord {
		return t.Elem.parse(name, v, dst)
	}
	p := reflect.New(t.Elem.goType)
	if err := t.Elem.parse(name, v, p.Elem()); err != nil {
		return err
	}
	dst.Set(p)
	return nil
}

// Decode reads the argument of a constructor. Members that are fields of qualifier StaticRO or RW are taken;
// others, known or not, are ignored, because clients send whole records back. A field that is left out gets
// its default; without default it is mandatory, and the error is INTERNAL_ERROR with the name of the field.
// A field with a default also gets it for an empty enum or a malformed date, which are the zero values that
// some clients send.
func (c *Class) Decode(args map[string]any) (any, error) {
	rec := c.New()
	r := reflect.ValueOf(rec).Elem()
	for _, f := range c.Fields {
		if f.Qualifier == DynamicRO {
			continue
		}
		v, ok := args[f.Name]
		switch {
		case !ok && f.HasDefault:
		case !ok:
			return nil, InternalError(fmt.Errorf("%w: %s of class %s", errMissing, f.Name, c.Name))
		default:
			err := f.Type.parse(f.Name, v, r.Field(f.index))
			if err != nil && !f.forgives(v) {
				return nil, err
			}
		}
	}
	return rec, nil
}

var errMissing = errors.New("a mandatory field is missing")

// forgives says that a bad value of a constructor argument stands for "not given".
func (f *Field) forgives(v any) bool {
	s, ok := v.(string)
	return ok && f.HasDefault && (f.Type.Kind == KindDateTime || f.Type.Kind == KindEnum && s == "")
}
