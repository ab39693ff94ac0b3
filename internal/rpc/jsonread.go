package rpc

import (
	"bytes"
	"encoding/json"
	"errors"
	"strconv"
	"strings"
	"unicode/utf8"
)

// parseJSONCall reads a JSON-RPC request object. There are no batches and no
// notifications: an id is mandatory, and it must be a string or an integer.
func parseJSONCall(b []byte) (*Request, error) {
	members, err := jsonMembers(b)
	if err != nil {
		return nil, err
	}
	bad := func(msg string) (*Request, error) { return nil, &SyntaxError{Msg: msg} }

	req := &Request{Dialect: JSONRPC1}
	if raw, ok := members["jsonrpc"]; ok {
		if v, err := jsonValue(raw, 0); err != nil || v != "2.0" {
			return bad(`jsonrpc is not "2.0"`)
		}
		req.Dialect = JSONRPC2
	}
	if req.ID = members["id"]; !validID(req.ID) {
		return bad("id is neither a string nor an integer")
	}
	if json.Unmarshal(members["method"], &req.Method) != nil || req.Method == "" {
		return bad("method is not a string")
	}

	raw, present := members["params"]
	if !present || string(raw) == "null" {
		if req.Dialect == JSONRPC1 {
			return bad("params is missing")
		}
		raw = json.RawMessage("[]")
	}
	params, err := jsonValue(raw, MaxValues)
	if _, tooMany := errors.AsType[*TooManyValuesError](err); tooMany {
		return req, err
	}
	if err != nil {
		return nil, err
	}
	switch params := params.(type) {
	case []any:
		req.Params = params
	case map[string]any:
		if req.Dialect == JSONRPC1 {
			return bad("params is not an array")
		}
		req.Params = []any{params}
	default:
		return bad("params is not an array")
	}

	if !utf8.Valid(b) {
		return req, &EncodingError{Value: firstInvalid(b)}
	}
	return req, nil
}

func validID(raw json.RawMessage) bool {
	if len(raw) == 0 {
		return false
	}
	if raw[0] == '"' {
		return true
	}
	_, err := strconv.ParseInt(string(raw), 10, 64)
	return err == nil
}

// firstInvalid returns the JSON string literal around the first invalid byte.
func firstInvalid(b []byte) string {
	i := 0
	for i < len(b) {
		r, n := utf8.DecodeRune(b[i:])
		if r == utf8.RuneError && n == 1 {
			break
		}
		i += n
	}
	start := bytes.LastIndexByte(b[:i], '"') + 1
	end := len(b)
	if n := bytes.IndexByte(b[i:], '"'); n >= 0 {
		end = i + n
	}
	return string(b[start:end])
}

// maxMembers is how many members a message may have. No dialect knows more than
// four; others are left alone.
const maxMembers = 64

// jsonMembers splits the top-level object. Member names match exactly.
func jsonMembers(b []byte) (map[string]json.RawMessage, error) {
	// One level for the message, one for the parameters.
	if err := checkJSONDepth(b, MaxDepth+2); err != nil {
		return nil, err
	}
	if !json.Valid(b) {
		var v any
		return nil, jsonError(json.Unmarshal(b, &v))
	}
	p := jsonReader{rest: b}
	if p.next() != '{' {
		return nil, &SyntaxError{Msg: "message is not an object"}
	}
	p.rest = p.rest[1:]
	members := map[string]json.RawMessage{}
	for p.next() != '}' {
		name, err := p.text()
		if err != nil {
			return nil, err
		}
		if members[name] = p.raw(); len(members) > maxMembers {
			return nil, &SyntaxError{Offset: int64(len(b) - len(p.rest)), Msg: "too many members"}
		}
	}
	return members, nil
}

// checkJSONDepth bounds the nesting before encoding/json recurses into it.
func checkJSONDepth(b []byte, limit int) error {
	depth, inString := 0, false
	for i := 0; i < len(b); i++ {
		switch c := b[i]; {
		case inString && c == '\\':
			i++
		case c == '"':
			inString = !inString
		case inString:
		case c == '[' || c == '{':
			if depth++; depth > limit {
				return &SyntaxError{Offset: int64(i), Msg: "nested too deep"}
			}
		case c == ']' || c == '}':
			depth--
		}
	}
	return nil
}

// jsonValue reads a value that is known to be valid JSON, with at most so many
// values in it.
func jsonValue(raw json.RawMessage, values int) (any, error) {
	p := jsonReader{rest: raw, values: values, limit: values}
	return p.value()
}

// jsonReader is what is left of valid JSON.
type jsonReader struct {
	rest   []byte
	values int // how many may still come
	limit  int // how many were possible
}

// count counts a value: an element or a member.
func (p *jsonReader) count() error {
	if p.values--; p.values < 0 {
		return &TooManyValuesError{p.limit}
	}
	return nil
}

// next drops white space and the separators of members, and returns the first
// byte of what comes then.
func (p *jsonReader) next() byte {
	p.rest = bytes.TrimLeft(p.rest, " \t\r\n,:")
	return p.rest[0]
}

// raw takes a value as it is written.
func (p *jsonReader) raw() json.RawMessage {
	p.next()
	whole, depth := p.rest, 0
	for {
		switch p.rest[0] {
		case '"':
			p.skip()
		case '[', '{':
			depth++
			p.rest = p.rest[1:]
		case ']', '}':
			depth--
			p.rest = p.rest[1:]
		default:
			p.word()
		}
		if depth == 0 {
			return json.RawMessage(whole[:len(whole)-len(p.rest)])
		}
		p.next()
	}
}

func (p *jsonReader) value() (any, error) {
	switch p.next() {
	case '"':
		return p.text()
	case '[':
		p.rest = p.rest[1:]
		array := []any{}
		for p.next() != ']' {
			if err := p.count(); err != nil {
				return nil, err
			}
			v, err := p.value()
			if err != nil {
				return nil, err
			}
			array = append(array, v)
		}
		p.rest = p.rest[1:]
		return array, nil
	case '{':
		p.rest = p.rest[1:]
		object := map[string]any{}
		for p.next() != '}' {
			if err := p.count(); err != nil {
				return nil, err
			}
			name, err := p.text()
			if err != nil {
				return nil, err
			}
			if object[name], err = p.value(); err != nil {
				return nil, err
			}
		}
		p.rest = p.rest[1:]
		return object, nil
	}
	word := string(p.word())
	switch word {
	case "null":
		return nil, nil
	case "true", "false":
		return word == "true", nil
	}
	return jsonNumber(word)
}

// word takes a number, true, false or null.
func (p *jsonReader) word() []byte {
	n := bytes.IndexAny(p.rest, " \t\r\n,]}")
	if n < 0 {
		n = len(p.rest)
	}
	w := p.rest[:n]
	p.rest = p.rest[n:]
	return w
}

// skip takes a string with its quotes. It is plain when it stands for itself:
// without escapes, and ASCII, so that it is UTF-8.
func (p *jsonReader) skip() (literal []byte, plain bool) {
	plain = true
	for i := 1; ; i++ {
		switch c := p.rest[i]; {
		case c == '\\':
			plain = false
			i++
		case c >= utf8.RuneSelf:
			plain = false
		case c == '"':
			literal = p.rest[:i+1]
			p.rest = p.rest[i+1:]
			return literal, plain
		}
	}
}

// text takes a string. One that is not plain is left to encoding/json.
func (p *jsonReader) text() (s string, err error) {
	literal, plain := p.skip()
	if plain {
		return string(literal[1 : len(literal)-1]), nil
	}
	if err := json.Unmarshal(literal, &s); err != nil {
		return "", jsonError(err)
	}
	return s, nil
}

func jsonNumber(s string) (any, error) {
	if !strings.ContainsAny(s, ".eE") {
		if n, err := strconv.ParseInt(s, 10, 64); err == nil {
			return n, nil
		}
	}
	f, err := strconv.ParseFloat(s, 64)
	if err != nil {
		return nil, &SyntaxError{Msg: "number out of range: " + s}
	}
	return f, nil
}

func jsonError(err error) error {
	if e, ok := errors.AsType[*json.SyntaxError](err); ok {
		return &SyntaxError{Offset: e.Offset, Msg: e.Error()}
	}
	return &SyntaxError{Msg: err.Error()}
}
