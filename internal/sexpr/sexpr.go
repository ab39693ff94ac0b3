// Package sexpr writes records of the datamodel as the s-expressions of field snapshot_metadata of class VM, and reads
// them back. It knows nothing of what is in a record.
//
// snapshot_metadata is the record of a VM at the time of a snapshot, as the
// field's documentation leaves it to the server: a list of ('key' 'value')
// pairs of strings, where a set is written as ('a' 'b') and a map as
// (('k' 'v') …) inside its value. Backslash and quote are escaped with a
// backslash.
package sexpr

import (
	"maps"
	"strconv"
	"strings"
	"time"

	"coppice/internal/xapi"
)

// writer writes values of the datamodel in that notation. The value of a
// field that is neither a set nor a map is its bare text.
type writer struct {
	text  strings.Builder
	depth int
}

var _ xapi.Encoder = (*writer)(nil)

func (w *writer) atom(s string) {
	if w.depth == 0 {
		w.text.WriteString(s)
		return
	}
	w.space()
	writeQuoted(&w.text, s)
}

// space separates what follows from its neighbour.
func (w *writer) space() {
	if s := w.text.String(); s != "" && !strings.HasSuffix(s, "(") {
		w.text.WriteByte(' ')
	}
}

func writeQuoted(b *strings.Builder, s string) {
	b.WriteByte('\'')
	for i := range len(s) {
		if s[i] == '\'' || s[i] == '\\' {
			b.WriteByte('\\')
		}
		b.WriteByte(s[i])
	}
	b.WriteByte('\'')
}

func (w *writer) Null()            { w.atom("") }
func (w *writer) Bool(b bool)      { w.atom(strconv.FormatBool(b)) }
func (w *writer) Int(n int64)      { w.atom(strconv.FormatInt(n, 10)) }
func (w *writer) Float(f float64)  { w.atom(strconv.FormatFloat(f, 'g', -1, 64)) }
func (w *writer) String(s string)  { w.atom(s) }
func (w *writer) Time(t time.Time) { w.atom(xapi.FormatTime(t)) }

func (w *writer) open() {
	w.space()
	w.text.WriteByte('(')
	w.depth++
}

func (w *writer) close() {
	w.text.WriteByte(')')
	w.depth--
}

func (w *writer) BeginArray()  { w.open() }
func (w *writer) EndArray()    { w.close() }
func (w *writer) BeginStruct() { w.open() }

// Key begins a pair; the one before it ends.
func (w *writer) Key(k string) {
	w.endPair()
	w.open()
	w.atom(k)
}

func (w *writer) EndStruct() {
	w.endPair()
	w.close()
}

// endPair closes a pair of a map that has its value.
func (w *writer) endPair() {
	if strings.HasSuffix(w.text.String(), "'") {
		w.close()
	}
}

// Record writes the fields of a record that the datamodel stores.
func Record[T any](rec *T) (string, error) {
	var out strings.Builder
	out.WriteByte('(')
	for _, f := range xapi.ClassOf[T]().Fields {
		var w writer
		if err := f.Type.Encode(&w, f.Get(rec)); err != nil {
			return "", err
		}
		if out.Len() > 1 {
			out.WriteByte(' ')
		}
		out.WriteByte('(')
		writeQuoted(&out, f.Name)
		out.WriteByte(' ')
		writeQuoted(&out, w.text.String())
		out.WriteByte(')')
	}
	out.WriteByte(')')
	return out.String(), nil
}

// Fields reads what Record wrote, by field name. Fields that it
// does not know and values that do not fit their type are left out: the text
// may be from another version, or from anybody.
func Fields[T any](text string) map[string]any {
	class := xapi.ClassOf[T]()
	pairs, ok := parse(text)
	if !ok {
		return nil
	}
	fields := map[string]any{}
	for key, value := range pairsOf(pairs) {
		f := class.Field(key)
		s, plain := value.(string)
		if f == nil || !plain {
			continue
		}
		if v, err := f.Type.Parse(wireValue(f.Type, s)); err == nil {
			fields[key] = v
		}
	}
	return fields
}

// wireValue makes a wire value of a field's text.
func wireValue(t *xapi.Type, s string) any {
	switch t.Kind {
	case xapi.KindBool:
		return s == "true"
	case xapi.KindSet:
		list, _ := parse(s)
		if list == nil {
			list = []any{}
		}
		return list
	case xapi.KindMap:
		m := map[string]any{}
		list, _ := parse(s)
		maps.Copy(m, pairsOf(list))
		return m
	}
	return s
}

// pairsOf are those elements of a list that are pairs with a name first.
func pairsOf(list []any) map[string]any {
	pairs := map[string]any{}
	for _, e := range list {
		pair, ok := e.([]any)
		if !ok || len(pair) != 2 {
			continue
		}
		if key, ok := pair[0].(string); ok {
			pairs[key] = pair[1]
		}
	}
	return pairs
}

// maxDepth is how deep lists may be nested; what we write has three levels.
const maxDepth = 8

// parse reads a list of quoted strings and lists. ok is false for anything
// else.
func parse(s string) (list []any, ok bool) {
	p := parser{rest: strings.TrimSpace(s)}
	if !strings.HasPrefix(p.rest, "(") {
		return nil, false
	}
	list, ok = p.list(0)
	return list, ok && p.rest == ""
}

type parser struct{ rest string }

func (p *parser) list(depth int) (list []any, ok bool) {
	if depth > maxDepth {
		return nil, false
	}
	p.rest = p.rest[1:]
	list = []any{}
	for {
		p.rest = strings.TrimLeft(p.rest, " \n\t")
		if p.rest == "" {
			return nil, false
		}
		switch p.rest[0] {
		case ')':
			p.rest = p.rest[1:]
			return list, true
		case '(':
			sub, ok := p.list(depth + 1)
			if !ok {
				return nil, false
			}
			list = append(list, sub)
		case '\'':
			s, ok := p.quoted()
			if !ok {
				return nil, false
			}
			list = append(list, s)
		default:
			return nil, false
		}
	}
}

func (p *parser) quoted() (string, bool) {
	var b strings.Builder
	for i := 1; i < len(p.rest); i++ {
		switch p.rest[i] {
		case '\'':
			p.rest = p.rest[i+1:]
			return b.String(), true
		case '\\':
			if i++; i == len(p.rest) {
				return "", false
			}
		}
		b.WriteByte(p.rest[i])
	}
	return "", false
}
