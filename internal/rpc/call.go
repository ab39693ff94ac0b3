package rpc

import (
	"encoding/json"
	"io"
)

// Request is a call as it came over the wire.
type Request struct {
	Dialect Dialect
	Method  string
	Params  []any
	ID      json.RawMessage // JSON only: a string or an integer, echoed in the answer
}

// ReadCall reads one call of at most limit bytes.
//
// Errors: [*SyntaxError], [ErrTooLarge], the reader's own; the Request is nil
// then. With an [*EncodingError] the Request is complete except for the
// offending bytes, with a [*TooManyValuesError] except for its parameters, and
// can carry the failure back to the caller.
func ReadCall(s Syntax, r io.Reader, limit int64) (*Request, error) {
	b, err := readAll(r, limit)
	if err != nil {
		return nil, err
	}
	return ParseCall(s, b)
}

// ParseCall is ReadCall for a message already in memory.
func ParseCall(s Syntax, b []byte) (*Request, error) {
	if s == JSON {
		return parseJSONCall(b)
	}
	return parseXMLCall(b)
}

// WriteSuccess answers the request with the value that enc encodes. An error
// of enc or of w is returned; what was written until then is not an answer.
func (r *Request) WriteSuccess(w io.Writer, enc func(Encoder) error) error {
	if r.Dialect == XMLRPC {
		x := NewXML(w)
		x.beginResponse()
		x.BeginStruct()
		x.Key("Status")
		x.String("Success")
		x.Key("Value")
		if err := enc(x); err != nil {
			return err
		}
		x.EndStruct()
		x.endResponse()
		return x.Flush()
	}
	return r.writeJSONResult(w, enc)
}

// WriteBare is WriteSuccess without XML-RPC's Status struct around the value.
// XenAPI answers system.listMethods so.
func (r *Request) WriteBare(w io.Writer, enc func(Encoder) error) error {
	if r.Dialect == XMLRPC {
		x := NewXML(w)
		x.beginResponse()
		if err := enc(x); err != nil {
			return err
		}
		x.endResponse()
		return x.Flush()
	}
	return r.writeJSONResult(w, enc)
}

// WriteFailure answers the request with an error: its code, then its parameters.
func (r *Request) WriteFailure(w io.Writer, code string, params ...string) error {
	switch r.Dialect {
	case JSONRPC1:
		j := NewJSON(w)
		j.BeginStruct()
		j.Key("result")
		j.Null()
		j.Key("error")
		j.BeginArray()
		j.String(code)
		for _, p := range params {
			j.String(p)
		}
		j.EndArray()
		j.Key("id")
		j.raw(r.ID)
		j.EndStruct()
		return j.Flush()
	case JSONRPC2:
		j := NewJSON(w)
		j.BeginStruct()
		j.Key("jsonrpc")
		j.String("2.0")
		j.Key("error")
		j.BeginStruct()
		j.Key("code")
		j.Int(1)
		j.Key("message")
		j.String(code)
		j.Key("data")
		strs(j, params)
		j.EndStruct()
		j.Key("id")
		j.raw(r.ID)
		j.EndStruct()
		return j.Flush()
	}
	x := NewXML(w)
	x.beginResponse()
	x.BeginStruct()
	x.Key("Status")
	x.String("Failure")
	x.Key("ErrorDescription")
	x.BeginArray()
	x.String(code)
	for _, p := range params {
		x.String(p)
	}
	x.EndArray()
	x.EndStruct()
	x.endResponse()
	return x.Flush()
}

func (r *Request) writeJSONResult(w io.Writer, enc func(Encoder) error) error {
	j := NewJSON(w)
	j.BeginStruct()
	if r.Dialect == JSONRPC2 {
		j.Key("jsonrpc")
		j.String("2.0")
	}
	j.Key("result")
	if err := enc(j); err != nil {
		return err
	}
	if r.Dialect == JSONRPC1 {
		j.Key("error")
		j.Null()
	}
	j.Key("id")
	j.raw(r.ID)
	j.EndStruct()
	return j.Flush()
}

func strs(e Encoder, v []string) {
	e.BeginArray()
	for _, s := range v {
		e.String(s)
	}
	e.EndArray()
}
