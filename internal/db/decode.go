package db

import (
	"bytes"
	"encoding/json"
	"reflect"
	"strconv"
	"time"
	"unicode/utf8"

	"coppice/internal/xapi"
)

// quick reads what encode writes, and nothing else: the fields in their order, without white space. It says false for
// everything that is not as expected, be it right or wrong, and leaves it to decode to look closer. previous, which may
// be nil, is another record of the class: texts that are the same are shared with it, because most of what a disk
// refers to is what its neighbour refers to.
//
// The sets and maps of the record that are empty are those of k.model: like all stored records it is never changed.
func (k *codec) quick(data []byte, previous any) (rec any, ok bool) {
	v := reflect.New(k.class.GoType)
	to := v.Elem()
	to.Set(reflect.ValueOf(k.model).Elem())
	rec = v.Interface()
	var from reflect.Value
	if previous != nil {
		from = reflect.ValueOf(previous).Elem()
	}
	p := parser{data}
	if !p.skip('{') {
		return nil, false
	}
	next := 0
	for first := true; !p.skip('}'); first = false {
		if !first && !p.skip(',') {
			return nil, false
		}
		name, plain := p.text()
		if !plain || !p.skip(':') {
			return nil, false
		}
		for next < len(k.fields) && k.fields[next].Name != string(name) {
			next++
		}
		if next == len(k.fields) {
			return nil, false
		}
		i := k.index[next]
		var like string
		if to.Field(i).Kind() == reflect.String && previous != nil {
			like = from.Field(i).String()
		}
		if !p.field(k.fields[next].Type, to.Field(i), like) {
			return nil, false
		}
		next++
	}
	return rec, len(p.rest) == 0
}

// parser is what is left of a row.
type parser struct{ rest []byte }

// skip takes c, if that is what comes next.
func (p *parser) skip(c byte) bool {
	if len(p.rest) == 0 || p.rest[0] != c {
		return false
	}
	p.rest = p.rest[1:]
	return true
}

// text takes a string without escapes. Without such a string it says false and takes nothing.
func (p *parser) text() (s []byte, ok bool) {
	if len(p.rest) == 0 || p.rest[0] != '"' {
		return nil, false
	}
	ascii := true
	for i := 1; i < len(p.rest); i++ {
		switch c := p.rest[i]; {
		case c == '"':
			s = p.rest[1:i]
			if !ascii && !utf8.Valid(s) {
				return nil, false
			}
			p.rest = p.rest[i+1:]
			return s, true
		case c == '\\' || c < ' ':
			return nil, false
		case c >= utf8.RuneSelf:
			ascii = false
		}
	}
	return nil, false
}

// quoted takes a string that may have escapes. Without a string it says false.
func (p *parser) quoted() (s []byte, ok bool) {
	if s, ok := p.text(); ok || len(p.rest) == 0 || p.rest[0] != '"' {
		return s, ok
	}
	for i := 1; i < len(p.rest); i++ {
		switch p.rest[i] {
		case '\\':
			i++
		case '"':
			var value string
			if json.Unmarshal(p.rest[:i+1], &value) != nil {
				return nil, false
			}
			p.rest = p.rest[i+1:]
			return []byte(value), true
		}
	}
	return nil, false
}

// word takes what belongs to a number, true, false or null.
func (p *parser) word() []byte {
	n := bytes.IndexAny(p.rest, ",]}")
	if n < 0 {
		n = len(p.rest)
	}
	w := p.rest[:n]
	p.rest = p.rest[n:]
	return w
}

// field takes a value of a type. A text that is like another one shares its bytes.
func (p *parser) field(t *xapi.Type, to reflect.Value, like string) bool {
	switch t.Kind {
	case xapi.KindString, xapi.KindEnum, xapi.KindRef:
		s, ok := p.quoted()
		switch {
		case !ok:
			return false
		case like == string(s):
			to.SetString(like)
		default:
			to.SetString(string(s))
		}
		return true
	case xapi.KindInt:
		w := p.word()
		n, err := strconv.ParseInt(string(w), 10, 64)
		to.SetInt(n)
		return err == nil && string(strconv.AppendInt(nil, n, 10)) == string(w)
	case xapi.KindFloat:
		w := p.word()
		n, err := strconv.ParseFloat(string(w), 64)
		to.SetFloat(n)
		return err == nil && json.Valid(w)
	case xapi.KindBool:
		w := p.word()
		to.SetBool(string(w) == "true")
		return string(w) == "true" || string(w) == "false"
	case xapi.KindSet:
		if bytes.HasPrefix(p.rest, []byte("[]")) {
			p.rest = p.rest[len("[]"):]
			if to.Len() > 0 {
				to.Set(reflect.MakeSlice(to.Type(), 0, 0))
			}
			return true
		}
	case xapi.KindMap:
		if bytes.HasPrefix(p.rest, []byte("{}")) {
			p.rest = p.rest[len("{}"):]
			if to.IsNil() || to.Len() > 0 {
				to.Set(reflect.MakeMap(to.Type()))
			}
			return true
		}
		if m, ok := to.Addr().Interface().(*map[string]string); ok {
			return p.texts(m)
		}
	case xapi.KindDateTime:
		s, ok := p.text()
		return ok && to.Addr().Interface().(*time.Time).UnmarshalText(s) == nil
	}
	return p.other(to)
}

// texts takes a map of strings.
func (p *parser) texts(to *map[string]string) bool {
	m := map[string]string{}
	if !p.skip('{') {
		return false
	}
	for first := true; !p.skip('}'); first = false {
		if !first && !p.skip(',') {
			return false
		}
		key, ok := p.quoted()
		if !ok || !p.skip(':') {
			return false
		}
		value, ok := p.quoted()
		if !ok {
			return false
		}
		m[string(key)] = string(value)
	}
	*to = m
	return true
}

// other takes a value of any kind, the common way.
func (p *parser) other(to reflect.Value) bool {
	d := json.NewDecoder(bytes.NewReader(p.rest))
	value := reflect.New(to.Type()) // what is in the record is shared
	if d.Decode(value.Interface()) != nil {
		return false
	}
	p.rest = p.rest[d.InputOffset():]
	if v := value.Elem(); v.Kind() != reflect.Slice && v.Kind() != reflect.Map || !v.IsNil() {
		to.Set(v)
		return true
	}
	return false // null is not written
}
