// Package where is the language in which get_all_where and get_all_records_where say which objects are wanted. It
// hides its syntax and how values of every type of the datamodel are compared; it knows nothing of where the objects
// are.
//
//	expr  = term  { "or" term }
//	term  = factor { "and" factor }
//	factor = "not" factor | "(" expr ")" | "true" | "false" | value "=" value
//	value = "field" string | string
//
// A string is quoted by " or ', with \ before a quote or a \. Comparison is by
// text: numbers in decimal, dates as 20260131T23:59:59Z, sets and maps as
// s-expressions, ('a' 'b') and (('k' 'v')). A field may be spelt with __ for
// the _ between its parts, as in name__label; _ref is the reference.
package where

import (
	"fmt"
	"reflect"
	"slices"
	"strconv"
	"strings"

	"coppice/internal/xapi"
)

// Expr says whether an object is wanted. It may be called by several goroutines.
type Expr func(ref string, rec any) bool

// Parse reads an expression about objects of a class.
//
// Bad syntax, or a text longer than maxLength, is INVALID_VALUE [expression,
// detail]. So is a field that the class does not have, unless lenient: then
// the comparison is false.
func Parse(class *xapi.Class, expr string, lenient bool) (Expr, error) {
	if len(expr) > maxLength {
		return nil, invalid(xapi.Shorten(expr, maxLength/64), fmt.Sprintf("the expression has %d bytes, %d are the most", len(expr), maxLength))
	}
	p := parser{class: class, lenient: lenient, rest: expr}
	p.next()
	cond := p.expr(0)
	if p.err == nil && p.tok.kind != tokEnd {
		p.fail("unexpected " + p.tok.String())
	}
	if p.err != nil {
		return nil, invalid(expr, p.err.Error())
	}
	return cond, nil
}

func invalid(expr, detail string) error { return xapi.NewError(xapi.ErrInvalidValue, expr, detail) }

// maxDepth bounds the nesting of expressions, and maxLength their text, in
// bytes: it is compared with every object of a class.
const (
	maxDepth  = 100
	maxLength = 16 << 10
)

type tokKind int

const (
	tokEnd tokKind = iota
	tokWord
	tokText
	tokMark // ( ) =
)

type token struct {
	kind tokKind
	text string
}

func (t token) String() string {
	if t.kind == tokEnd {
		return "end"
	}
	return strconv.Quote(t.text)
}

type parser struct {
	class   *xapi.Class
	lenient bool
	rest    string
	tok     token
	err     error
}

// fail keeps the first error and ends the input.
func (p *parser) fail(msg string) Expr {
	if p.err == nil {
		p.err = fmt.Errorf("%s", msg)
	}
	p.rest, p.tok = "", token{}
	return nil
}

// next reads a token into p.tok.
func (p *parser) next() {
	p.rest = strings.TrimLeft(p.rest, " \t\r\n")
	if p.rest == "" {
		p.tok = token{}
		return
	}
	switch ch := p.rest[0]; {
	case strings.IndexByte("()=", ch) >= 0:
		p.tok, p.rest = token{tokMark, p.rest[:1]}, p.rest[1:]
	case ch == '"' || ch == '\'':
		p.quoted(ch)
	default:
		n := strings.IndexFunc(p.rest, func(r rune) bool { return (r < 'a' || r > 'z') && (r < 'A' || r > 'Z') })
		switch n {
		case 0:
			p.fail(fmt.Sprintf("unexpected %q", []rune(p.rest)[0]))
			return
		case -1:
			n = len(p.rest)
		}
		p.tok, p.rest = token{tokWord, strings.ToLower(p.rest[:n])}, p.rest[n:]
	}
}

func (p *parser) quoted(quote byte) {
	var text []byte
	for i := 1; i < len(p.rest); i++ {
		switch ch := p.rest[i]; {
		case ch == quote:
			p.tok, p.rest = token{tokText, string(text)}, p.rest[i+1:]
			return
		case ch == '\\' && i+1 < len(p.rest) && strings.IndexByte(`\"'`, p.rest[i+1]) >= 0:
			i++
			text = append(text, p.rest[i])
		default:
			text = append(text, ch)
		}
	}
	p.fail("string without end")
}

func (p *parser) isWord(w string) bool { return p.tok.kind == tokWord && p.tok.text == w }
func (p *parser) isMark(m string) bool { return p.tok.kind == tokMark && p.tok.text == m }

func (p *parser) expr(depth int) Expr {
	cond := p.term(depth)
	for p.isWord("or") {
		p.next()
		l, r := cond, p.term(depth)
		cond = func(ref string, rec any) bool { return l(ref, rec) || r(ref, rec) }
	}
	return cond
}

func (p *parser) term(depth int) Expr {
	cond := p.factor(depth)
	for p.isWord("and") {
		p.next()
		l, r := cond, p.factor(depth)
		cond = func(ref string, rec any) bool { return l(ref, rec) && r(ref, rec) }
	}
	return cond
}

func (p *parser) factor(depth int) Expr {
	if depth > maxDepth {
		return p.fail("nested too deeply")
	}
	switch {
	case p.isWord("not"):
		p.next()
		cond := p.factor(depth + 1)
		return func(ref string, rec any) bool { return !cond(ref, rec) }
	case p.isWord("true"), p.isWord("false"):
		yes := p.tok.text == "true"
		p.next()
		return func(string, any) bool { return yes }
	case p.isMark("("):
		p.next()
		cond := p.expr(depth + 1)
		if !p.isMark(")") {
			return p.fail("want ) instead of " + p.tok.String())
		}
		p.next()
		return cond
	}
	l := p.value()
	if !p.isMark("=") {
		return p.fail("want = instead of " + p.tok.String())
	}
	p.next()
	r := p.value()
	return func(ref string, rec any) bool {
		a, ok := l(ref, rec)
		b, also := r(ref, rec)
		return ok && also && a == b
	}
}

// operand is one side of a comparison; ok is false for an unknown field.
type operand func(ref string, rec any) (text string, ok bool)

func (p *parser) value() operand {
	if p.isWord("field") {
		p.next()
		if p.tok.kind != tokText {
			p.fail("want the name of a field in quotes instead of " + p.tok.String())
			return nil
		}
		name := p.tok.text
		p.next()
		return p.field(name)
	}
	if p.tok.kind != tokText {
		p.fail("want field or a string instead of " + p.tok.String())
		return nil
	}
	text := p.tok.text
	p.next()
	return func(string, any) (string, bool) { return text, true }
}

func (p *parser) field(name string) operand {
	if name == "_ref" {
		return func(ref string, _ any) (string, bool) { return ref, true }
	}
	f := p.class.Field(name)
	if f == nil {
		f = p.class.Field(strings.ReplaceAll(name, "__", "_"))
	}
	switch {
	case f != nil && !f.Internal:
		return func(_ string, rec any) (string, bool) { return textOf(f.Type, reflect.ValueOf(f.Get(rec))), true }
	case p.lenient:
		return func(string, any) (string, bool) { return "", false }
	}
	p.fail("class " + p.class.Name + " has no field " + strconv.Quote(name))
	return nil
}

// textOf is the text with which a value is compared.
func textOf(t *xapi.Type, v reflect.Value) string {
	switch t.Kind {
	case xapi.KindFloat:
		s := strconv.FormatFloat(v.Float(), 'g', 12, 64)
		if !strings.ContainsAny(s, ".eEnI") {
			s += "."
		}
		return s
	case xapi.KindSet:
		items := make([]string, v.Len())
		for i := range items {
			items[i] = quoteText(textOf(t.Elem, v.Index(i)))
		}
		return "(" + strings.Join(items, " ") + ")"
	case xapi.KindMap:
		items := make([]string, 0, v.Len())
		for k, x := range v.Seq2() {
			items = append(items, "("+quoteText(textOf(t.Key, k))+" "+quoteText(textOf(t.Elem, x))+")")
		}
		slices.Sort(items)
		return "(" + strings.Join(items, " ") + ")"
	default:
		return t.Text(v.Interface())
	}
}

var textQuoter = strings.NewReplacer(`\`, `\\`, `'`, `\'`, `"`, `\"`)

func quoteText(s string) string { return "'" + textQuoter.Replace(s) + "'" }
