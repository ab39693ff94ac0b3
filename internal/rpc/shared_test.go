package rpc

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
)

// sharedAnswer answers with [before, the shared value, {"k": the shared value}].
func sharedAnswer(r *Request, w io.Writer, s *Shared, enc func(Encoder) error) error {
	return r.WriteSuccess(w, func(e Encoder) error {
		share := func() error {
			if s == nil {
				return enc(e)
			}
			return e.(Sharer).Shared(s, enc)
		}
		e.BeginArray()
		e.String("before")
		if err := share(); err != nil {
			return err
		}
		e.BeginStruct()
		e.Key("k")
		if err := share(); err != nil {
			return err
		}
		e.Key("l")
		e.Int(1)
		e.EndStruct()
		e.EndArray()
		return nil
	})
}

func sharedDialects() []*Request {
	return []*Request{
		{Dialect: XMLRPC},
		{Dialect: JSONRPC1, ID: []byte("7")},
		{Dialect: JSONRPC2, ID: []byte(`"x"`)},
	}
}

// What is shared is written as it is when it is not, whatever its length, and
// encoded once for each syntax.
func TestSharedText(t *testing.T) {
	for _, n := range []int{0, 100, verbatimAt - 40, verbatimAt, flushAt, 3 * flushAt} {
		value := strings.Repeat("<\"é", n/4)
		encoded := 0
		enc := func(e Encoder) error {
			encoded++
			e.BeginStruct()
			e.Key("value")
			e.String(value)
			e.EndStruct()
			return nil
		}
		s := NewTextPool(1<<20, 1<<20).New()
		var keep [][]byte // so that no text is collected between two uses
		for i := range s.texts {
			text, err := s.take(Syntax(i), enc)
			if err != nil || text == nil {
				t.Fatal(text, err)
			}
			keep = append(keep, text)
		}
		encoded = 0
		for _, r := range sharedDialects() {
			var want, got bytes.Buffer
			if err := errors.Join(sharedAnswer(r, &want, nil, enc), sharedAnswer(r, &got, s, enc)); err != nil {
				t.Fatal(err)
			}
			if got.String() != want.String() {
				t.Errorf("%d bytes, dialect %d: got %.200q, want %.200q", n, r.Dialect, got.String(), want.String())
			}
		}
		if encoded != 2*len(sharedDialects()) { // of want
			t.Errorf("encoded %d times", encoded)
		}
		if used := s.pool.Used(); used != int64(len(keep[0])+len(keep[1])) {
			t.Errorf("%d bytes in use, want %d", used, len(keep[0])+len(keep[1]))
		}
		for i := range s.texts {
			s.give(Syntax(i))
		}
		if used := s.pool.Used(); used != 0 {
			t.Errorf("%d bytes in use at the end", used)
		}
	}
}

// pieceWriter notes the longest piece that it is given.
type pieceWriter struct{ longest int }

func (w *pieceWriter) Write(p []byte) (int, error) {
	w.longest = max(w.longest, len(p))
	return len(p), nil
}

// A long text goes out in pieces, like what is encoded: for each the client of
// a server gets time of its own.
func TestSharedTextInPieces(t *testing.T) {
	enc := func(e Encoder) error {
		e.String(strings.Repeat("x", 5*flushAt))
		return nil
	}
	for _, r := range sharedDialects() {
		var w pieceWriter
		if err := sharedAnswer(r, &w, NewTextPool(1<<20, 1<<20).New(), enc); err != nil || w.longest > flushAt {
			t.Errorf("dialect %d: a piece of %d bytes, %v", r.Dialect, w.longest, err)
		}
	}
}

// What there is no room for is written all the same, and an error of the value
// is one of the answer.
func TestSharedTextBounds(t *testing.T) {
	short, long := strings.Repeat("s", 100), strings.Repeat("l", 2*flushAt)
	enc := func(v string) func(Encoder) error {
		return func(e Encoder) error {
			e.String(v)
			return nil
		}
	}
	pool := NewTextPool(flushAt, flushAt+100)
	held := pool.New()
	if text, err := held.take(JSON, enc(strings.Repeat("h", flushAt-2))); err != nil || len(text) != flushAt {
		t.Fatalf("%d bytes, %v", len(text), err)
	}
	for _, tt := range []struct{ name, value string }{{"too long", long}, {"no room", short}} {
		for _, r := range sharedDialects() {
			s := pool.New()
			for range 2 {
				var want, got bytes.Buffer
				if err := errors.Join(sharedAnswer(r, &want, nil, enc(tt.value)), sharedAnswer(r, &got, s, enc(tt.value))); err != nil {
					t.Fatal(err)
				}
				if got.String() != want.String() {
					t.Errorf("%s, dialect %d: another answer", tt.name, r.Dialect)
				}
			}
			if text, err := s.take(r.Dialect.Syntax(), enc(tt.value)); text != nil || err != nil {
				t.Errorf("%s: a text of %d bytes, %v", tt.name, len(text), err)
			}
		}
	}
	if used := pool.Used(); used != flushAt {
		t.Errorf("%d bytes in use, want those of the text that is held", used)
	}
	held.give(JSON)
	s := pool.New()
	if text, err := s.take(JSON, enc(short)); string(text) != `"`+short+`"` || err != nil {
		t.Errorf("with room again: %q, %v", text, err)
	}
	s.give(JSON)

	failure := errors.New("failure")
	for _, r := range sharedDialects() {
		err := sharedAnswer(r, io.Discard, pool.New(), func(e Encoder) error {
			e.String(short)
			return failure
		})
		if !errors.Is(err, failure) {
			t.Errorf("dialect %d: %v", r.Dialect, err)
		}
	}
	if used := pool.Used(); used != 0 {
		t.Errorf("%d bytes in use at the end", used)
	}
}

// Many at once write the same; one encodes it.
func TestSharedTextConcurrently(t *testing.T) {
	pool := NewTextPool(1<<20, 1<<20)
	s := pool.New()
	var encoded atomic.Int64
	enc := func(e Encoder) error {
		encoded.Add(1)
		for range 100 {
			e.String("value")
		}
		return nil
	}
	text, err := s.take(XML, enc)
	if err != nil {
		t.Fatal(err)
	}
	var all sync.WaitGroup
	for range 50 {
		all.Go(func() {
			var b bytes.Buffer
			x := NewXML(&b)
			if err := x.Shared(s, enc); err != nil {
				t.Error(err)
			}
			if err := x.Flush(); err != nil || !bytes.Equal(b.Bytes(), text) {
				t.Errorf("%d bytes, %v", b.Len(), err)
			}
		})
	}
	all.Wait()
	s.give(XML)
	if n, used := encoded.Load(), pool.Used(); n != 1 || used != 0 {
		t.Errorf("encoded %d times, %d bytes in use", n, used)
	}
}

// BenchmarkShared compares writing a value of some length with encoding it.
func BenchmarkShared(b *testing.B) {
	for _, members := range []int{100, 10000} {
		enc := func(e Encoder) error {
			e.BeginArray()
			for range members {
				e.String("OpaqueRef:8ee6a1d2-4f5a-4a6f-a7d2-0d8a0b2fb8a6")
			}
			e.EndArray()
			return nil
		}
		s := NewTextPool(1<<30, 1<<30).New()
		if _, err := s.take(JSON, enc); err != nil {
			b.Fatal(err)
		}
		for name, write := range map[string]func(*JSONWriter) error{
			"encoded": func(j *JSONWriter) error { return enc(j) },
			"shared":  func(j *JSONWriter) error { return j.Shared(s, enc) },
		} {
			b.Run(fmt.Sprintf("%s/%d", name, members), func(b *testing.B) {
				b.ReportAllocs()
				for b.Loop() {
					j := NewJSON(io.Discard)
					if err := errors.Join(write(j), j.Flush()); err != nil {
						b.Fatal(err)
					}
				}
			})
		}
		s.give(JSON)
	}
}
