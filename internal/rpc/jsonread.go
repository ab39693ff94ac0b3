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
		if v, err := jsonValue(raw); err != nil || v != "2.0" {
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
	params, err := jsonValue(raw)
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

// jsonMembers splits the top-level object. Member names match exactly.
func jsonMembers(b []byte) (map[string]json.RawMessage, error) {
	// One level for the message, one for the parameters.
	if err := checkJSONDepth(b, MaxDepth+2); err != nil {
		return nil, err
	}
	var members map[string]json.RawMessage
	if err := json.Unmarshal(b, &members); err != nil {
		return nil, jsonError(err)
	}
	if members == nil {
		return nil, &SyntaxError{Msg: "message is not an object"}
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

func jsonValue(raw json.RawMessage) (any, error) {
	dec := json.NewDecoder(bytes.NewReader(raw))
	dec.UseNumber()
	var v any
	if err := dec.Decode(&v); err != nil {
		return nil, jsonError(err)
	}
	return jsonNumbers(v)
}

// jsonNumbers replaces every json.Number in v by an int64 or a float64.
func jsonNumbers(v any) (any, error) {
	var err error
	switch v := v.(type) {
	case json.Number:
		return jsonNumber(string(v))
	case []any:
		for i := range v {
			if v[i], err = jsonNumbers(v[i]); err != nil {
				return nil, err
			}
		}
	case map[string]any:
		for k := range v {
			if v[k], err = jsonNumbers(v[k]); err != nil {
				return nil, err
			}
		}
	}
	return v, nil
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
