package rpc

import (
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"math"
	"slices"
	"time"
)

// Encode writes a value to e. Besides the types that decoding produces it
// takes int, time.Time, []string and map[string]string; struct members are
// written in the order of their names.
func Encode(e Encoder, v any) error {
	switch v := v.(type) {
	case nil:
		e.Null()
	case bool:
		e.Bool(v)
	case int:
		e.Int(int64(v))
	case int64:
		e.Int(v)
	case float64:
		e.Float(v)
	case string:
		e.String(v)
	case time.Time:
		e.Time(v)
	case []string:
		strs(e, v)
	case map[string]string:
		e.BeginStruct()
		for _, k := range slices.Sorted(maps.Keys(v)) {
			e.Key(k)
			e.String(v[k])
		}
		e.EndStruct()
	case []any:
		e.BeginArray()
		for _, elem := range v {
			if err := Encode(e, elem); err != nil {
				return err
			}
		}
		e.EndArray()
	case map[string]any:
		e.BeginStruct()
		for _, k := range slices.Sorted(maps.Keys(v)) {
			e.Key(k)
			if err := Encode(e, v[k]); err != nil {
				return err
			}
		}
		e.EndStruct()
	default:
		return fmt.Errorf("rpc: cannot encode a value of type %T", v)
	}
	return nil
}

// WriteCall writes a call. The id is used by the JSON dialects only.
func WriteCall(w io.Writer, d Dialect, id int64, method string, params ...any) error {
	if d == XMLRPC {
		x := NewXML(w)
		x.buf = append(x.buf, xmlHeader+"<methodCall><methodName>"...)
		x.buf = appendXMLText(x.buf, method)
		x.buf = append(x.buf, "</methodName><params>"...)
		for _, p := range params {
			x.buf = append(x.buf, "<param>"...)
			if err := Encode(x, p); err != nil {
				return err
			}
			x.buf = append(x.buf, "</param>"...)
		}
		x.buf = append(x.buf, "</params></methodCall>"...)
		return x.Flush()
	}
	j := NewJSON(w)
	j.BeginStruct()
	if d == JSONRPC2 {
		j.Key("jsonrpc")
		j.String("2.0")
	}
	j.Key("method")
	j.String(method)
	j.Key("params")
	if err := Encode(j, params); err != nil {
		return err
	}
	j.Key("id")
	j.Int(id)
	j.EndStruct()
	return j.Flush()
}

// ReadResponse reads the answer to a call, at most limit bytes of it, and
// returns its value. A failure that the server reported is a [*Fault];
// XML-RPC's own <fault> becomes one with the code "Fault".
func ReadResponse(d Dialect, r io.Reader, limit int64) (any, error) {
	b, err := readAll(r, limit)
	if err != nil {
		return nil, err
	}
	if d == XMLRPC {
		return parseXMLResponse(b)
	}
	return parseJSONResponse(d, b)
}

// statusResult takes the value out of a Status struct. A value that is no
// such struct is a bare one (see WriteBare).
func statusResult(v any) (any, error) {
	m, ok := v.(map[string]any)
	if !ok {
		return v, nil
	}
	switch m["Status"] {
	case "Success":
		val, ok := m["Value"]
		if !ok {
			return nil, &SyntaxError{Msg: "response without a Value"}
		}
		return val, nil
	case "Failure":
		desc, ok := m["ErrorDescription"].([]any)
		if !ok {
			return nil, &SyntaxError{Msg: "failure without an ErrorDescription"}
		}
		return nil, newFault(desc)
	}
	return nil, &SyntaxError{Msg: "response without a Status"}
}

func newFault(desc []any) error {
	if len(desc) == 0 {
		return &SyntaxError{Msg: "empty error description"}
	}
	text := make([]string, len(desc))
	for i, v := range desc {
		text[i] = fmt.Sprint(v)
	}
	return &Fault{Code: text[0], Params: text[1:]}
}

func parseJSONResponse(d Dialect, b []byte) (any, error) {
	members, err := jsonMembers(b)
	if err != nil {
		return nil, err
	}
	bad := func(msg string) error { return &SyntaxError{Msg: msg} }
	if raw, ok := members["error"]; ok && string(raw) != "null" {
		if d == JSONRPC1 {
			var desc []any
			if json.Unmarshal(raw, &desc) != nil {
				return nil, bad("error is not an array")
			}
			return nil, newFault(desc)
		}
		var obj struct {
			Message string `json:"message"`
			Data    []any  `json:"data"`
		}
		if json.Unmarshal(raw, &obj) != nil {
			return nil, bad("malformed error object")
		}
		return nil, newFault(append([]any{obj.Message}, obj.Data...))
	}
	raw, ok := members["result"]
	if !ok {
		return nil, bad("response without a result")
	}
	return jsonValue(raw, math.MaxInt)
}
