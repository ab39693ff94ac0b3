package rpc

import (
	"io"
	"math"
	"strconv"
	"strings"
	"time"
	"unicode/utf8"
)

const xmlHeader = `<?xml version="1.0"?>`

// XMLWriter is an [Encoder] that writes XML-RPC values, each in its <value> element.
type XMLWriter struct {
	output
	inStruct []bool // for each open container, innermost last
}

var (
	_ Encoder     = (*XMLWriter)(nil)
	_ Int4Encoder = (*XMLWriter)(nil)
)

// NewXML returns a writer to w; the caller calls Flush at the end.
func NewXML(w io.Writer) *XMLWriter {
	return &XMLWriter{output: newOutput(w)}
}

func (x *XMLWriter) beginResponse() {
	x.buf = append(x.buf, xmlHeader+"<methodResponse><params><param>"...)
}

func (x *XMLWriter) endResponse() {
	x.buf = append(x.buf, "</param></params></methodResponse>"...)
}

func (x *XMLWriter) end(closing string) {
	x.buf = append(x.buf, closing...)
	if n := len(x.inStruct); n > 0 && x.inStruct[n-1] {
		x.buf = append(x.buf, "</member>"...)
	}
	x.maybeFlush()
}

// Null writes <nil/>.
func (x *XMLWriter) Null() {
	x.end("<value><nil/></value>")
}

// Bool writes a <boolean>, 0 or 1.
func (x *XMLWriter) Bool(v bool) {
	if v {
		x.end("<value><boolean>1</boolean></value>")
	} else {
		x.end("<value><boolean>0</boolean></value>")
	}
}

// Int writes an integer the way XenAPI does: as an untyped string.
func (x *XMLWriter) Int(v int64) {
	x.buf = append(x.buf, "<value>"...)
	x.buf = strconv.AppendInt(x.buf, v, 10)
	x.end("</value>")
}

// Int4 writes an integer as a typed <i4>.
func (x *XMLWriter) Int4(v int64) {
	x.buf = append(x.buf, "<value><i4>"...)
	x.buf = strconv.AppendInt(x.buf, v, 10)
	x.end("</i4></value>")
}

// Float writes a <double> with up to 16 significant digits.
func (x *XMLWriter) Float(v float64) {
	x.buf = append(x.buf, "<value><double>"...)
	switch { // the names that C's printf gives them
	case math.IsInf(v, 1):
		x.buf = append(x.buf, "inf"...)
	case math.IsInf(v, -1):
		x.buf = append(x.buf, "-inf"...)
	case math.IsNaN(v):
		x.buf = append(x.buf, "nan"...)
	default:
		x.buf = strconv.AppendFloat(x.buf, v, 'g', 16, 64)
	}
	x.end("</double></value>")
}

// String writes an untyped string. Characters that XML cannot hold are
// dropped; bytes that are not UTF-8 become U+FFFD.
func (x *XMLWriter) String(v string) {
	x.buf = append(x.buf, "<value>"...)
	x.buf = appendXMLText(x.buf, v)
	x.end("</value>")
}

// Time writes a <dateTime.iso8601>.
func (x *XMLWriter) Time(t time.Time) {
	x.buf = append(x.buf, "<value><dateTime.iso8601>"...)
	x.buf = appendTime(x.buf, t)
	x.end("</dateTime.iso8601></value>")
}

// BeginArray starts an array.
func (x *XMLWriter) BeginArray() {
	x.buf = append(x.buf, "<value><array><data>"...)
	x.inStruct = append(x.inStruct, false)
}

// EndArray ends an array.
func (x *XMLWriter) EndArray() {
	x.inStruct = x.inStruct[:len(x.inStruct)-1]
	x.end("</data></array></value>")
}

// BeginStruct starts a struct.
func (x *XMLWriter) BeginStruct() {
	x.buf = append(x.buf, "<value><struct>"...)
	x.inStruct = append(x.inStruct, true)
}

// Key writes the name of the member whose value follows.
func (x *XMLWriter) Key(k string) {
	x.buf = append(x.buf, "<member><name>"...)
	x.buf = appendXMLText(x.buf, k)
	x.buf = append(x.buf, "</name>"...)
}

// EndStruct ends a struct.
func (x *XMLWriter) EndStruct() {
	x.inStruct = x.inStruct[:len(x.inStruct)-1]
	x.end("</struct></value>")
}

// XMLValue encodes one value as the text <value>…</value>, the form in which
// tasks keep their results.
func XMLValue(enc func(Encoder) error) (string, error) {
	var b strings.Builder
	x := NewXML(&b)
	if err := enc(x); err != nil {
		return "", err
	}
	if err := x.Flush(); err != nil {
		return "", err
	}
	return b.String(), nil
}

// xmlPlain marks the ASCII bytes that stand for themselves in XML text.
var xmlPlain = func() (t [utf8.RuneSelf]bool) {
	for c := range t {
		t[c] = c >= 0x20 && c != '<' && c != '>' && c != '&' && c != '"' && c != 0x7f || c == '\t' || c == '\n'
	}
	return
}()

// appendXMLText escapes s. A carriage return is written as a character
// reference, because XML parsers turn a bare one into a line feed.
func appendXMLText(b []byte, s string) []byte {
	start := 0
	for i := 0; i < len(s); {
		c := s[i]
		if c < utf8.RuneSelf && xmlPlain[c] {
			i++
			continue
		}
		n, repl := 1, ""
		switch c {
		case '<':
			repl = "&lt;"
		case '>':
			repl = "&gt;"
		case '&':
			repl = "&amp;"
		case '"':
			repl = "&quot;"
		case '\r':
			repl = "&#13;"
		default:
			if c < utf8.RuneSelf {
				break // a control character: dropped
			}
			var r rune
			if r, n = utf8.DecodeRuneInString(s[i:]); r == utf8.RuneError && n == 1 {
				repl = "\uFFFD"
			} else if isXMLChar(r) {
				i += n
				continue
			}
		}
		b = append(b, s[start:i]...)
		b = append(b, repl...)
		i += n
		start = i
	}
	return append(b, s[start:]...)
}

// isXMLChar reports whether XML 1.0 allows r in a document.
func isXMLChar(r rune) bool {
	return r == '\t' || r == '\n' || r == '\r' ||
		r >= 0x20 && r <= 0xd7ff || r >= 0xe000 && r <= 0xfffd || r >= 0x10000 && r <= 0x10ffff
}
