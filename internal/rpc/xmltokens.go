package rpc

import (
	"bytes"
	"fmt"
	"io"
	"slices"
	"strconv"
	"strings"
	"unicode/utf8"
)

// xmlParser reads the subset of XML that XML-RPC needs: elements, text,
// character references, the five predefined entities, CDATA, comments and
// processing instructions. Attributes are skipped. Document type
// declarations are refused, and with them every entity that could expand.
//
// The first error sticks; after it every method is harmless and returns zero values.
type xmlParser struct {
	b         []byte // the message, or the part of it that is in memory
	i         int    // where in b it goes on
	err       error
	checkUTF8 bool    // b as a whole is not UTF-8
	badText   *string // the first string that is not UTF-8
	values    int     // how many may still come
	limit     int     // how many were possible

	src  io.Reader // what follows b; nil when nothing does
	base int64     // where b begins in the message
}

// newXMLParser returns a parser of a message with at most so many values.
func newXMLParser(b []byte, values int) *xmlParser {
	return &xmlParser{b: b, values: values, limit: values, checkUTF8: !utf8.Valid(b)}
}

func (p *xmlParser) fail(msg string) {
	p.stop(&SyntaxError{Offset: p.base + int64(p.i), Msg: msg})
}

func (p *xmlParser) stop(err error) {
	if p.err == nil {
		p.err = err
		p.i = len(p.b)
	}
}

// count counts a value: a parameter, an element or a member.
func (p *xmlParser) count() {
	if p.values--; p.values < 0 {
		p.stop(&TooManyValuesError{p.limit})
	}
}

// at tells whether there is a byte at p.b[i], for which it may have to be read.
// Where it matters it is only asked at the end of p.b.
// Only space forgets what lies before p.i.
func (p *xmlParser) at(i int) bool {
	for i >= len(p.b) {
		if !p.more() {
			return false
		}
	}
	return true
}

// more appends some of what follows to p.b.
func (p *xmlParser) more() bool {
	switch {
	case p.src == nil || p.err != nil:
		return false
	case len(p.b) >= maxPiece:
		p.fail(fmt.Sprintf("a text or tag of more than %d bytes", maxPiece))
		return false
	}
	p.b = slices.Grow(p.b, pieceSize)
	n, err := io.ReadAtLeast(p.src, p.b[len(p.b):len(p.b)+pieceSize], 1)
	p.b = p.b[:len(p.b)+n]
	switch {
	case err == io.EOF:
		p.src = nil
	case err != nil:
		p.stop(fmt.Errorf("rpc: reading message: %w", err))
	}
	return n > 0 && p.err == nil
}

// forget gives up what lies before p.i, if there is more to come.
func (p *xmlParser) forget() {
	if p.src == nil || p.i < pieceSize {
		return
	}
	p.base += int64(p.i)
	p.b = p.b[:copy(p.b, p.b[p.i:])]
	p.i = 0
}

func (p *xmlParser) has(prefix string) bool {
	if len(p.b)-p.i < len(prefix) && !p.at(p.i+len(prefix)-1) {
		return false
	}
	return string(p.b[p.i:p.i+len(prefix)]) == prefix
}

func isSpace(c byte) bool { return c == ' ' || c == '\t' || c == '\n' || c == '\r' }

// through moves past the next occurrence of end and returns what lay before it.
func (p *xmlParser) through(end string) []byte {
	for from := p.i; ; {
		if n := bytes.Index(p.b[from:], []byte(end)); n >= 0 {
			s := p.b[p.i : from+n]
			p.i = from + n + len(end)
			return s
		}
		from = max(p.i, len(p.b)-len(end)+1)
		if !p.at(len(p.b)) {
			p.fail("missing " + end)
			return nil
		}
	}
}

// tagNext tells that a tag comes next, when the bytes that say so are in p.b.
func (p *xmlParser) tagNext() bool {
	return p.i+1 < len(p.b) && p.b[p.i] == '<' && p.b[p.i+1] != '!' && p.b[p.i+1] != '?'
}

// space skips white space, comments and processing instructions.
func (p *xmlParser) space() {
	for {
		p.forget()
		if p.i >= len(p.b) && !p.at(p.i) {
			return
		}
		switch {
		case isSpace(p.b[p.i]):
			p.i++
		case p.tagNext():
			return
		case p.has("<!--"):
			p.i += len("<!--")
			p.through("-->")
		case p.has("<?"):
			p.through("?>")
		default:
			return
		}
	}
}

// prolog reads what may stand before the root element. The only encodings
// are UTF-8 and its subset ASCII.
func (p *xmlParser) prolog() {
	p.i += len(p.b) - len(bytes.TrimLeft(p.b, "\ufeff \t\r\n"))
	if p.has("<?xml") {
		if enc := declaredEncoding(p.through("?>")); enc != "" && enc != "utf-8" && enc != "us-ascii" {
			p.fail("unsupported encoding " + enc)
		}
	}
	p.space()
	if p.has("<!") {
		p.fail("document type declaration")
	}
}

// declaredEncoding returns the encoding named in an XML declaration, in lower case.
func declaredEncoding(decl []byte) string {
	_, rest, _ := strings.Cut(strings.ToLower(string(decl)), "encoding")
	rest = strings.TrimLeft(rest, "= \t\r\n")
	if rest == "" {
		return ""
	}
	enc, _, _ := strings.Cut(rest[1:], rest[:1]) // rest starts with a quotation mark
	return enc
}

func (p *xmlParser) epilog() {
	p.space()
	if p.err == nil && p.i < len(p.b) {
		p.fail("text after the end")
	}
}

// tag reads <name …>, <name …/> or </name>.
func (p *xmlParser) tag() (name []byte, closing, empty bool) {
	if p.i >= len(p.b) && !p.at(p.i) || p.b[p.i] != '<' {
		p.fail("expected an element")
		return
	}
	i := p.i + 1
	if (i < len(p.b) || p.at(i)) && p.b[i] == '/' {
		closing = true
		i++
	}
	start := i
	for (i < len(p.b) || p.at(i)) && !isSpace(p.b[i]) && p.b[i] != '>' && p.b[i] != '/' && p.b[i] != '<' {
		i++
	}
	name = p.b[start:min(i, len(p.b))]
	var quote byte
	for ; i < len(p.b) || p.at(i); i++ {
		c := p.b[i]
		switch {
		case quote != 0:
			if c == quote {
				quote = 0
			}
		case c == '"' || c == '\'':
			quote = c
		case c == '<':
			p.fail("unterminated tag <" + string(name))
			return nil, false, false
		case c == '>':
			empty = p.b[i-1] == '/' && !closing
			p.i = i + 1
			return name, closing, empty
		}
	}
	p.fail("unterminated tag <" + string(name))
	return nil, false, false
}

// open consumes the start tag of the named element.
func (p *xmlParser) open(name string) {
	p.space()
	got, closing, empty := p.tag()
	if string(got) != name || closing || empty {
		p.fail("expected <" + name + ">")
	}
}

// close consumes the end tag of the named element.
func (p *xmlParser) close(name string) {
	p.space()
	got, closing, _ := p.tag()
	if string(got) != name || !closing {
		p.fail("expected </" + name + ">")
	}
}

// peek returns the next tag without consuming it.
func (p *xmlParser) peek() (name []byte, closing, empty bool) {
	p.space()
	i := p.i
	name, closing, empty = p.tag()
	if p.err == nil {
		p.i = i
	}
	return
}

func (p *xmlParser) peekOpen(name string) bool {
	got, closing, _ := p.peek()
	return string(got) == name && !closing
}

// emptyElement consumes <name/> if it is next.
func (p *xmlParser) emptyElement(name string) bool {
	got, closing, empty := p.peek()
	if string(got) == name && !closing && empty {
		p.tag()
		return true
	}
	return false
}

// text reads character data up to the next tag, with references replaced and
// line ends normalised.
func (p *xmlParser) text() string {
	var out []byte // nil while the text is one plain run
	start := p.i
	flush := func() {
		out = append(out, p.b[start:p.i]...)
	}
	for p.i < len(p.b) || p.at(p.i) {
		c := p.b[p.i]
		switch {
		case c < utf8.RuneSelf && c != '<' && xmlPlain[c] || c == '"' || c == '>' || c >= utf8.RuneSelf || c == 0x7f:
			p.i++
		case c == '<':
			switch {
			case p.has("<![CDATA["):
				flush()
				p.i += len("<![CDATA[")
				out = appendLines(out, p.through("]]>"))
				start = p.i
			case p.has("<!--"):
				flush()
				p.i += len("<!--")
				p.through("-->")
				start = p.i
			case p.has("<?"):
				flush()
				p.through("?>")
				start = p.i
			case p.has("<!"):
				p.fail("declaration inside an element")
			default:
				if out == nil {
					return string(p.b[start:p.i])
				}
				flush()
				return string(out)
			}
		case c == '&':
			flush()
			out = p.reference(out)
			start = p.i
		case c == '\r':
			flush()
			out = append(out, '\n')
			if p.i++; p.has("\n") {
				p.i++
			}
			start = p.i
		default:
			p.fail("control character in text")
		}
	}
	p.fail("unexpected end")
	return ""
}

// appendLines appends b with CR LF and CR turned into LF.
func appendLines(dst, b []byte) []byte {
	for i, c := range b {
		switch {
		case c != '\r':
			dst = append(dst, c)
		case i+1 == len(b) || b[i+1] != '\n':
			dst = append(dst, '\n')
		}
	}
	return dst
}

// reference reads &name; or &#n; at p.i.
func (p *xmlParser) reference(dst []byte) []byte {
	p.at(p.i + 11)
	end := bytes.IndexByte(p.b[p.i:min(len(p.b), p.i+12)], ';')
	if end < 0 {
		p.fail("unterminated reference")
		return dst
	}
	name := string(p.b[p.i+1 : p.i+end])
	switch name {
	case "lt":
		dst = append(dst, '<')
	case "gt":
		dst = append(dst, '>')
	case "amp":
		dst = append(dst, '&')
	case "quot":
		dst = append(dst, '"')
	case "apos":
		dst = append(dst, '\'')
	default:
		digits, base := strings.TrimPrefix(name, "#"), 10
		if strings.HasPrefix(digits, "x") {
			digits, base = digits[1:], 16
		}
		n, err := strconv.ParseUint(digits, base, 32)
		if !strings.HasPrefix(name, "#") || err != nil || !isXMLChar(rune(n)) {
			p.fail("unknown reference &" + name + ";")
			return dst
		}
		dst = utf8.AppendRune(dst, rune(n))
	}
	p.i += end + 1
	return dst
}
