package rpc

import (
	"encoding/base64"
	"errors"
	"math"
	"strconv"
	"strings"
	"unicode/utf8"
)

// parseXMLCall reads a <methodCall>.
func parseXMLCall(b []byte) (*Request, error) {
	p := newXMLParser(b, MaxValues)
	req := &Request{Dialect: XMLRPC}
	p.prolog()
	p.open("methodCall")
	p.open("methodName")
	if req.Method = strings.TrimSpace(p.text()); req.Method == "" {
		p.fail("empty method name")
	}
	p.close("methodName")
	if p.peekOpen("params") {
		req.Params = p.params()
	}
	p.close("methodCall")
	p.epilog()
	if _, tooMany := errors.AsType[*TooManyValuesError](p.err); tooMany {
		req.Params = nil
		return req, p.err
	}
	if p.err != nil {
		return nil, p.err
	}
	if p.badText != nil {
		return req, &EncodingError{Value: *p.badText}
	}
	return req, nil
}

// parseXMLResponse reads a <methodResponse> and takes the result out of it.
func parseXMLResponse(b []byte) (any, error) {
	p := newXMLParser(b, math.MaxInt)
	p.prolog()
	p.open("methodResponse")
	var v any
	isFault := p.peekOpen("fault")
	if isFault {
		p.open("fault")
		v = p.value(0)
		p.close("fault")
	} else if params := p.params(); len(params) == 1 {
		v = params[0]
	} else {
		p.fail("response without exactly one value")
	}
	p.close("methodResponse")
	p.epilog()
	switch {
	case p.err != nil:
		return nil, p.err
	case isFault:
		m, _ := v.(map[string]any)
		text, _ := m["faultString"].(string)
		return nil, &Fault{Code: "Fault", Params: []string{text}}
	}
	return statusResult(v)
}

func (p *xmlParser) params() []any {
	if p.emptyElement("params") {
		return nil
	}
	var out []any
	p.open("params")
	for p.peekOpen("param") {
		p.count()
		p.open("param")
		out = append(out, p.value(0))
		p.close("param")
	}
	p.close("params")
	return out
}

// value reads a <value> that lies in depth arrays and structs.
func (p *xmlParser) value(depth int) any {
	if p.emptyElement("value") {
		return ""
	}
	p.open("value")
	s := p.text()
	name, closing, empty := p.tag()
	if closing && string(name) == "value" {
		return p.str(s)
	}
	if strings.TrimLeft(s, " \t\r\n") != "" {
		p.fail("text beside <" + string(name) + ">")
		return nil
	}
	if closing {
		p.fail("expected </value>")
		return nil
	}
	v := p.typed(string(name), empty, depth)
	p.close("value")
	return v
}

// typed reads the rest of a type element whose start tag has been consumed.
func (p *xmlParser) typed(name string, empty bool, depth int) any {
	if name == "array" || name == "struct" {
		if depth == MaxDepth {
			p.fail("nested too deep")
			return nil
		}
		if name == "array" {
			return p.array(empty, depth+1)
		}
		return p.members(empty, depth+1)
	}
	var s string
	if !empty {
		s = p.text()
		p.close(name)
	}
	bad := func() any {
		p.fail("malformed <" + name + ">")
		return nil
	}
	switch name {
	case "string":
		return p.str(s)
	case "int", "i4", "i8":
		n, err := strconv.ParseInt(strings.TrimSpace(s), 10, 64)
		if err != nil {
			return bad()
		}
		return n
	case "boolean":
		switch strings.TrimSpace(s) {
		case "0":
			return false
		case "1":
			return true
		}
		return bad()
	case "double":
		s = strings.TrimSpace(s)
		f, err := strconv.ParseFloat(s, 64)
		if err != nil || math.IsNaN(f) || math.IsInf(f, 0) || strings.ContainsAny(s, "xX_") {
			return bad()
		}
		return f
	case "dateTime.iso8601":
		return p.str(strings.TrimSpace(s))
	case "base64":
		b, err := base64.StdEncoding.DecodeString(strings.Map(dropSpace, s))
		if err != nil {
			return bad()
		}
		if !utf8.Valid(b) {
			p.noteBad(string(b))
		}
		return string(b)
	case "nil":
		if s != "" {
			return bad()
		}
		return nil
	}
	p.fail("unknown type <" + name + ">")
	return nil
}

func dropSpace(r rune) rune {
	if r < utf8.RuneSelf && isSpace(byte(r)) {
		return -1
	}
	return r
}

func (p *xmlParser) array(empty bool, depth int) []any {
	out := []any{}
	if empty {
		p.fail("<array> without <data>")
		return nil
	}
	for range p.elements {
		out = append(out, p.value(depth))
	}
	return out
}

// elements reads the rest of an array whose start tag has been consumed, but
// for its elements.
func (p *xmlParser) elements(yield func() bool) {
	if !p.emptyElement("data") {
		p.open("data")
		for p.peekOpen("value") {
			if p.count(); !yield() {
				return
			}
		}
		p.close("data")
	}
	p.close("array")
}

func (p *xmlParser) members(empty bool, depth int) map[string]any {
	out := map[string]any{}
	if empty {
		return out
	}
	for name := range p.names {
		v := p.value(depth)
		if _, dup := out[name]; dup {
			p.fail("duplicate member " + strconv.Quote(name))
		}
		out[name] = v
	}
	return out
}

// names reads the rest of a struct whose start tag has been consumed, but for
// the values of its members.
func (p *xmlParser) names(yield func(string) bool) {
	for p.peekOpen("member") {
		p.count()
		p.open("member")
		var name string
		if !p.emptyElement("name") {
			p.open("name")
			name = p.str(p.text())
			p.close("name")
		}
		if !yield(name) {
			return
		}
		p.close("member")
	}
	p.close("struct")
}

// str notes strings that are not UTF-8.
func (p *xmlParser) str(s string) string {
	if p.checkUTF8 && !utf8.ValidString(s) {
		p.noteBad(s)
	}
	return s
}

func (p *xmlParser) noteBad(s string) {
	if p.badText == nil {
		p.badText = &s
	}
}
