package rpc

import (
	"errors"
	"slices"
	"sync"
	"sync/atomic"
	"weak"
)

// Shared is a value that many answers contain. In each syntax it is encoded
// once for all who write it at the same time, and until the memory of the
// text is collected after that. All who use a Shared must mean the same value
// by it.
type Shared struct {
	pool  *TextPool
	texts [2]sharedText // by Syntax
}

// TextPool bounds the texts of all Shared values that it has made. What it has
// no room for everybody encodes for himself, straight into the answer.
type TextPool struct {
	each, all int64 // bytes
	used      atomic.Int64
}

// NewTextPool returns a pool for texts of at most each bytes, and of all bytes
// together at any time.
func NewTextPool(each, all int64) *TextPool { return &TextPool{each: each, all: all} }

// New returns a Shared that no text has been made of.
func (p *TextPool) New() *Shared { return &Shared{pool: p} }

// Used says how many bytes the texts have that are being made or written.
func (p *TextPool) Used() int64 { return p.used.Load() }

// reserve takes n bytes, if there are so many.
func (p *TextPool) reserve(n int64) bool {
	if p.used.Add(n) > p.all {
		p.used.Add(-n)
		return false
	}
	return true
}

// Sharer is implemented by both writers. Shared writes the value that enc
// encodes, from the text of s when there is one. Errors are those of enc.
type Sharer interface {
	Shared(s *Shared, enc func(Encoder) error) error
}

var (
	_ Sharer = (*JSONWriter)(nil)
	_ Sharer = (*XMLWriter)(nil)
)

// Shared writes a value that others write, too.
func (j *JSONWriter) Shared(s *Shared, enc func(Encoder) error) error {
	text, err := s.take(JSON, enc)
	switch {
	case err != nil:
		return err
	case text == nil:
		return enc(j)
	}
	defer s.give(JSON)
	j.comma()
	j.verbatim(text)
	return nil
}

// Shared writes a value that others write, too.
func (x *XMLWriter) Shared(s *Shared, enc func(Encoder) error) error {
	text, err := s.take(XML, enc)
	switch {
	case err != nil:
		return err
	case text == nil:
		return enc(x)
	}
	defer s.give(XML)
	x.verbatim(text)
	x.end("")
	return nil
}

// verbatimAt is the length from which on a text is not copied into the buffer.
const verbatimAt = 1 << 10

// verbatim writes b as it is, in pieces as long as those of the buffer: a slow
// reader gets time for each.
func (o *output) verbatim(b []byte) {
	if len(b) < verbatimAt {
		o.buf = append(o.buf, b...)
		return
	}
	o.flush()
	for piece := range slices.Chunk(b, flushAt) {
		if o.err == nil {
			_, o.err = o.w.Write(piece)
		}
	}
}

// sharedText is the text of a Shared in one syntax.
type sharedText struct {
	mu    sync.Mutex
	users int // who write it at the moment
	text  *pooledText
	idle  weak.Pointer[pooledText] // what text was when the last of them had written it
	long  bool                     // longer than the pool allows
}

// take returns the text in one syntax, after which give must be called; nil
// when there is no room for it. Of several callers one encodes, and the others
// wait for it.
func (s *Shared) take(syntax Syntax, enc func(Encoder) error) ([]byte, error) {
	t := &s.texts[syntax]
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.text == nil {
		if t.long {
			return nil, nil
		}
		found := t.idle.Value()
		switch {
		case found == nil:
			made, err := s.pool.encode(syntax, enc)
			if made == nil {
				t.long = errors.Is(err, errLong)
				return nil, unlessNoRoom(err)
			}
			t.text, t.idle = made, weak.Make(made)
		case s.pool.reserve(int64(len(found.b))):
			t.text = found
		default:
			return nil, nil
		}
	}
	t.users++
	return t.text.b, nil
}

// give says that what take returned has been written.
func (s *Shared) give(syntax Syntax) {
	t := &s.texts[syntax]
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.users--; t.users == 0 {
		s.pool.used.Add(-int64(len(t.text.b)))
		t.text = nil
	}
}

var (
	errLong   = errors.New("rpc: too long to be shared")
	errNoRoom = errors.New("rpc: no room to share it")
)

// unlessNoRoom is err, or nil for what is no failure of the value.
func unlessNoRoom(err error) error {
	if errors.Is(err, errLong) || errors.Is(err, errNoRoom) {
		return nil
	}
	return err
}

// encode makes the text of a value. Its bytes count as used.
func (p *TextPool) encode(syntax Syntax, enc func(Encoder) error) (made *pooledText, err error) {
	t := &pooledText{pool: p}
	defer func() {
		if made == nil {
			p.used.Add(-int64(len(t.b)))
		}
	}()
	var w interface {
		Encoder
		Flush() error
	}
	if syntax == JSON {
		w = NewJSON(t)
	} else {
		w = NewXML(t)
	}
	if err := enc(w); err != nil {
		return nil, err
	}
	if err := w.Flush(); err != nil {
		return nil, err
	}
	return t, nil
}

// pooledText is what a value became. Written to, it takes what the pool has room for.
type pooledText struct {
	pool *TextPool
	b    []byte
}

func (t *pooledText) Write(b []byte) (int, error) {
	switch {
	case int64(len(t.b)+len(b)) > t.pool.each:
		return 0, errLong
	case !t.pool.reserve(int64(len(b))):
		return 0, errNoRoom
	}
	t.b = append(t.b, b...)
	return len(b), nil
}
