// Package rpc is the syntax of XenAPI's remote procedure calls: XML-RPC and
// JSON-RPC 1.0 and 2.0, both ends. It knows nothing about methods, sessions
// or types; package xapi gives meaning to what passes through here.
//
// # Values
//
// A decoded value is one of
//
//	nil             <nil/>, null
//	bool            <boolean>, true, false
//	int64           <int> <i4> <i8>, a JSON number without fraction or exponent
//	float64         <double>, any other JSON number
//	string          text, <string>, <dateTime.iso8601> as it was written, <base64> decoded
//	[]any           <array>, a JSON array
//	map[string]any  <struct>, a JSON object
//
// Two conventions of XenAPI are applied while encoding: in XML a 64-bit
// integer travels as an untyped decimal string, and a void result is the
// empty string. Everything else that looks like a number, a date or a
// reference is left to the reader to interpret.
//
// # Serving
//
// [ReadCall] reads a request in a given [Syntax]; the [Request] that it
// returns writes its own answer in the dialect the caller spoke. A caller
// that sent something unparsable gets no answer in any dialect: ReadCall
// returns a [*SyntaxError] or [ErrTooLarge], which HTTP servers report as
// status 500. A string that is not UTF-8 is reported as an [*EncodingError],
// and more values than a call may have as a [*TooManyValuesError], each next to a
// usable Request, for an ordinary failure.
//
// # Calling
//
// [WriteCall] writes a request, [ReadResponse] reads the answer and turns
// a failure into a [*Fault].
//
// All decoding is bounded: by the byte limit the caller gives, by a nesting
// depth of [MaxDepth], and that of a call by [MaxValues]. A value that may be larger than what
// should be in memory is read piece by piece with an [XMLReader]. Nothing here starts a goroutine or keeps a reference to its input.
package rpc

import (
	"errors"
	"fmt"
	"io"
	"strings"
	"time"
)

// MaxDepth is how deep arrays and structs may nest within a parameter or a result.
const MaxDepth = 64

// MaxValues is how many values the parameters of a call may have: each
// parameter, each element of an array and each member of a struct is one. A
// value takes up to some 200 bytes beside its text, and as few as two in a message.
const MaxValues = 100_000

// Syntax is one of the two grammars. The JSON-RPC version is chosen by each request.
type Syntax uint8

// The two grammars.
const (
	XML Syntax = iota
	JSON
)

// ContentType is the exact value of the Content-Type header for messages in
// this syntax. Clients compare it for equality, so it carries no charset.
func (s Syntax) ContentType() string {
	if s == JSON {
		return "application/json"
	}
	return "text/xml"
}

// Dialect is the protocol a caller speaks.
type Dialect uint8

// The three dialects.
const (
	XMLRPC Dialect = iota
	JSONRPC1
	JSONRPC2
)

// Syntax returns the grammar of the dialect.
func (d Dialect) Syntax() Syntax {
	if d == XMLRPC {
		return XML
	}
	return JSON
}

// ErrTooLarge is returned for a message longer than the limit given by the caller.
var ErrTooLarge = errors.New("rpc: message too large")

// A SyntaxError says what is wrong with a message and where.
type SyntaxError struct {
	Offset int64 // in bytes from the start of the message
	Msg    string
}

func (e *SyntaxError) Error() string {
	return fmt.Sprintf("rpc: %s at byte %d", e.Msg, e.Offset)
}

// A TooManyValuesError reports a message with more values than it may have.
type TooManyValuesError struct{ Limit int }

func (e *TooManyValuesError) Error() string {
	return fmt.Sprintf("rpc: more than %d values", e.Limit)
}

// An EncodingError reports a string that is not valid UTF-8.
type EncodingError struct {
	Value string // as received
}

func (e *EncodingError) Error() string {
	return fmt.Sprintf("rpc: invalid UTF-8 in string %q", e.Value)
}

// A Fault is the failure that a server reported: a XenAPI error code and its parameters.
type Fault struct {
	Code   string
	Params []string
}

func (e *Fault) Error() string {
	return e.Code + "(" + strings.Join(e.Params, ", ") + ")"
}

// Encoder is what a value is written to, piece by piece: every value is one
// call of a scalar method, or a Begin, its contents, and the matching End.
// Inside a struct, Key precedes each value. A method called out of order
// makes an invalid document; it is not detected. Write errors are sticky and
// surface from Flush or from the function that made the Encoder.
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

// Int4Encoder is implemented by both writers. Int4 writes a number that is a
// typed <i4> in XML, where Int would write a string; event.from wants it for
// valid_ref_counts.
type Int4Encoder interface {
	Int4(int64)
}

const timeLayout = "20060102T15:04:05Z"

// appendTime appends t in the form of the API: UTC, whole seconds.
func appendTime(b []byte, t time.Time) []byte {
	return t.UTC().AppendFormat(b, timeLayout)
}

// readAll reads at most limit bytes and fails with ErrTooLarge if there are more.
func readAll(r io.Reader, limit int64) ([]byte, error) {
	b, err := io.ReadAll(io.LimitReader(r, limit+1))
	if err != nil {
		return nil, fmt.Errorf("rpc: reading message: %w", err)
	}
	if int64(len(b)) > limit {
		return nil, ErrTooLarge
	}
	return b, nil
}
