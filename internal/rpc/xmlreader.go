package rpc

import (
	"io"
	"iter"
)

const (
	// pieceSize is how much is read of a value that does not have to be in
	// memory at once, in bytes.
	pieceSize = 32 << 10

	// maxPiece is how long a text, a tag or a comment of it may be, in bytes.
	maxPiece = 4 << 20
)

// XMLReader reads the text of one <value>, as made by [XMLValue], that is too
// large to be in memory, text or value. Of a struct or an array that Members
// or Elements is called for, only the member or the element is held that is
// read with Value; the text is read as it is needed.
//
// The first error sticks; after it loops end and values are nil.
type XMLReader struct{ p *xmlParser }

// NewXMLReader reads a value of at most so many values: elements of arrays and
// members of structs. Each piece of it may have [MaxValues].
func NewXMLReader(r io.Reader, values int) *XMLReader {
	return &XMLReader{&xmlParser{src: r, values: values, limit: values, checkUTF8: true}}
}

// Members yields the names of the members of the value that comes next, a
// struct. Each one's value must be read before the loop goes on. A name may
// come twice.
func (x *XMLReader) Members() iter.Seq[string] {
	return func(yield func(string) bool) {
		p := x.p
		p.open("value")
		if !p.emptyElement("struct") {
			p.open("struct")
			for name := range p.names {
				if p.err != nil || !yield(name) {
					return
				}
			}
		}
		p.close("value")
	}
}

// Elements yields for each element of the value that comes next, an array. It
// must be read before the loop goes on.
func (x *XMLReader) Elements() iter.Seq[int] {
	return func(yield func(int) bool) {
		p := x.p
		p.open("value")
		p.open("array")
		n := 0
		for range p.elements {
			if p.err != nil || !yield(n) {
				return
			}
			n++
		}
		p.close("value")
	}
}

// Value reads the value that comes next.
func (x *XMLReader) Value() any {
	p := x.p
	if beyond := p.values - MaxValues; beyond > 0 {
		limit := p.limit
		p.values, p.limit = MaxValues, MaxValues
		defer func() { p.values, p.limit = p.values+beyond, limit }()
	}
	v := p.value(0)
	if p.err != nil {
		return nil
	}
	return v
}

// End reads to the end, and returns the first error there was: a [*SyntaxError],
// a [*TooManyValuesError], or what the reader said.
func (x *XMLReader) End() error {
	x.p.epilog()
	return x.p.err
}

// Err returns the first error there was.
func (x *XMLReader) Err() error { return x.p.err }
