package rpc

import (
	"io"
	"math"
	"strconv"
	"time"
	"unicode/utf8"
)

// flushAt is the size at which a writer hands its buffer on.
const flushAt = 32 << 10

// output is the buffer under both writers.
type output struct {
	w   io.Writer
	buf []byte
	err error
}

func newOutput(w io.Writer) output {
	return output{w: w, buf: make([]byte, 0, 512)}
}

func (o *output) maybeFlush() {
	if len(o.buf) >= flushAt {
		o.flush()
	}
}

func (o *output) flush() {
	if o.err == nil && len(o.buf) > 0 {
		_, o.err = o.w.Write(o.buf)
	}
	o.buf = o.buf[:0]
}

// Flush writes what is buffered and returns the first error of the underlying writer.
func (o *output) Flush() error {
	o.flush()
	return o.err
}

// JSONWriter is an [Encoder] that writes JSON.
type JSONWriter struct {
	output
	more bool // a comma goes before the next value or key
}

var (
	_ Encoder     = (*JSONWriter)(nil)
	_ Int4Encoder = (*JSONWriter)(nil)
)

// NewJSON returns a writer to w; the caller calls Flush at the end.
func NewJSON(w io.Writer) *JSONWriter {
	return &JSONWriter{output: newOutput(w)}
}

func (j *JSONWriter) comma() {
	if j.more {
		j.buf = append(j.buf, ',')
	}
	j.more = true
}

func (j *JSONWriter) raw(b []byte) {
	j.comma()
	j.buf = append(j.buf, b...)
	j.maybeFlush()
}

// Null writes null.
func (j *JSONWriter) Null() {
	j.comma()
	j.buf = append(j.buf, "null"...)
}

// Bool writes true or false.
func (j *JSONWriter) Bool(v bool) {
	j.comma()
	j.buf = strconv.AppendBool(j.buf, v)
}

// Int writes a number.
func (j *JSONWriter) Int(v int64) {
	j.comma()
	j.buf = strconv.AppendInt(j.buf, v, 10)
	j.maybeFlush()
}

// Int4 is Int.
func (j *JSONWriter) Int4(v int64) { j.Int(v) }

// Float writes a number; JSON has none for infinities and NaN, they become null.
func (j *JSONWriter) Float(v float64) {
	j.comma()
	if math.IsInf(v, 0) || math.IsNaN(v) {
		j.buf = append(j.buf, "null"...)
		return
	}
	start := len(j.buf)
	j.buf = strconv.AppendFloat(j.buf, v, 'g', -1, 64)
	for _, c := range j.buf[start:] {
		if c == '.' || c == 'e' {
			return
		}
	}
	j.buf = append(j.buf, ".0"...)
}

// String writes a string; bytes that are not UTF-8 become U+FFFD.
func (j *JSONWriter) String(v string) {
	j.comma()
	j.buf = appendJSONString(j.buf, v)
	j.maybeFlush()
}

// Time writes a date as a string.
func (j *JSONWriter) Time(t time.Time) {
	j.comma()
	j.buf = append(j.buf, '"')
	j.buf = appendTime(j.buf, t)
	j.buf = append(j.buf, '"')
}

// BeginArray starts an array.
func (j *JSONWriter) BeginArray() {
	j.comma()
	j.buf = append(j.buf, '[')
	j.more = false
}

// EndArray ends an array.
func (j *JSONWriter) EndArray() {
	j.buf = append(j.buf, ']')
	j.more = true
	j.maybeFlush()
}

// BeginStruct starts an object.
func (j *JSONWriter) BeginStruct() {
	j.comma()
	j.buf = append(j.buf, '{')
	j.more = false
}

// Key writes the name of the member whose value follows.
func (j *JSONWriter) Key(k string) {
	j.comma()
	j.buf = appendJSONString(j.buf, k)
	j.buf = append(j.buf, ':')
	j.more = false
}

// EndStruct ends an object.
func (j *JSONWriter) EndStruct() {
	j.buf = append(j.buf, '}')
	j.more = true
	j.maybeFlush()
}

const hexDigits = "0123456789abcdef"

func appendJSONString(b []byte, s string) []byte {
	b = append(b, '"')
	start := 0
	for i := 0; i < len(s); {
		c := s[i]
		if c >= 0x20 && c != '"' && c != '\\' && c < utf8.RuneSelf {
			i++
			continue
		}
		if c >= utf8.RuneSelf {
			r, n := utf8.DecodeRuneInString(s[i:])
			if r != utf8.RuneError || n != 1 {
				i += n
				continue
			}
			b = append(b, s[start:i]...)
			b = append(b, "\uFFFD"...)
		} else {
			b = append(b, s[start:i]...)
			switch c {
			case '"', '\\':
				b = append(b, '\\', c)
			case '\n':
				b = append(b, '\\', 'n')
			case '\r':
				b = append(b, '\\', 'r')
			case '\t':
				b = append(b, '\\', 't')
			default:
				b = append(b, '\\', 'u', '0', '0', hexDigits[c>>4], hexDigits[c&15])
			}
		}
		i++
		start = i
	}
	b = append(b, s[start:]...)
	return append(b, '"')
}
