package rpc

import (
	"bytes"
	"errors"
	"io"
	"slices"
	"strings"
	"testing"
	"testing/iotest"

	"github.com/google/go-cmp/cmp"
)

// repeated is a text that is made while it is read.
func repeated(head, middle string, n int, tail string) io.Reader {
	all := []io.Reader{strings.NewReader(head)}
	if n > 1000 {
		block := strings.Repeat(middle, 1000)
		for ; n > 1000; n -= 1000 {
			all = append(all, strings.NewReader(block))
		}
	}
	return io.MultiReader(append(all, strings.NewReader(strings.Repeat(middle, n)+tail))...)
}

func TestXMLReader(t *testing.T) {
	const in = ` <value> <struct><member><name>a</name><value><array> <data><value>1</value>
		<value><array><data><value>x</value></data></array></value></data></array></value></member>
		<member><name>b</name><value><struct/></value></member><member><name>c</name><value><array><data/></array></value></member>
		<member><name>d</name><value><i4>7</i4></value></member></struct></value> `
	x := NewXMLReader(iotest.OneByteReader(strings.NewReader(in)), 7)
	var got []any
	for name := range x.Members() {
		got = append(got, name)
		switch name {
		case "a", "c":
			for i := range x.Elements() {
				got = append(got, i, x.Value())
			}
		case "b":
			for name := range x.Members() {
				got = append(got, name)
			}
		default:
			got = append(got, x.Value())
		}
	}
	if err := x.End(); err != nil {
		t.Fatal(err)
	}
	want := []any{"a", 0, "1", 1, []any{"x"}, "b", "c", "d", int64(7)}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("(-want +got)\n%s", diff)
	}
}

// The pieces of a value may have as many values as a call each, and all of
// them together what the caller allows.
func TestXMLReaderValues(t *testing.T) {
	const head, tail = "<value><array><data>", "</data></array></value>"
	read := func(pieces, elements, values int) error {
		inner := strings.Repeat("<value/>", elements)
		x := NewXMLReader(repeated(head, head+inner+tail, pieces, tail), values)
		n := 0
		for range x.Elements() {
			if got, _ := x.Value().([]any); len(got) == elements {
				n++
			}
		}
		if err := x.End(); err != nil {
			return err
		}
		if n != pieces {
			t.Errorf("%d pieces, want %d", n, pieces)
		}
		return nil
	}
	for _, tt := range []struct {
		pieces, elements, values int
		limit                    int // 0: it is read
	}{
		{2, MaxValues, 2*MaxValues + 2, 0},
		{2, MaxValues, 2*MaxValues + 1, 2*MaxValues + 1},
		{1, MaxValues + 1, 3 * MaxValues, MaxValues},
		{10, 9, 100, 0},
		{10, 9, 99, 99},
		{10, 0, 9, 9},
	} {
		err := read(tt.pieces, tt.elements, tt.values)
		e, ok := errors.AsType[*TooManyValuesError](err)
		if ok != (tt.limit > 0) || ok && e.Limit != tt.limit || !ok && err != nil {
			t.Errorf("%d pieces of %d values, %d possible: %v, want limit %d", tt.pieces, tt.elements, tt.values, err, tt.limit)
		}
	}
}

// Nothing makes the reader hold more of the text than the longest piece.
func TestXMLReaderHolds(t *testing.T) {
	for name, tt := range map[string]struct {
		in   io.Reader
		fits bool
	}{
		"elements":           {repeated("<value><array><data>", "<value>some text</value>\n", 50_000, "</data></array></value>"), true},
		"a long text":        {repeated("<value><array><data><value>", "text", maxPiece/4-1000, "</value></data></array></value>"), true},
		"too long a text":    {repeated("<value><array><data><value>", "text", maxPiece, "</value></data></array></value>"), false},
		"too long a name":    {repeated("<value><", "text", maxPiece, "/></value>"), false},
		"too long a comment": {repeated("<value><!--", "text", maxPiece, "--></value>"), false},
		"much space":         {repeated("<value>", "    ", maxPiece, "<array><data></data></array></value>"), true},
		"space after tags":   {repeated("<value><array><data>", "    ", maxPiece, "<value>a</value></data></array></value>"), true},
		"many comments":      {repeated("<value><!-- a --><?b ?><array><data>", "<!-- text -->", maxPiece/4, "</data></array></value>"), true},
	} {
		x := NewXMLReader(tt.in, 1_000_000)
		for range x.Elements() {
			x.Value()
		}
		err := x.End()
		if _, ok := errors.AsType[*SyntaxError](err); ok == tt.fits || tt.fits && err != nil {
			t.Errorf("%s: %v", name, err)
		}
		if held := cap(x.p.b); held > 2*maxPiece || name == "elements" && held > 4*pieceSize {
			t.Errorf("%s: %d bytes held", name, held)
		}
	}
}

// What the source says ends the reading, and is no fault of the text.
func TestXMLReaderError(t *testing.T) {
	boom := errors.New("boom")
	const in = "<value><array><data><value>a</value></data></array></value>"
	for n := range len(in) {
		x := NewXMLReader(io.MultiReader(strings.NewReader(in[:n]), iotest.ErrReader(boom)), 10)
		for range x.Elements() {
			x.Value()
		}
		if err := x.End(); !errors.Is(err, boom) {
			t.Errorf("after %d bytes: %v", n, err)
		}
	}
}

// FuzzXMLReader compares what is read in pieces with what is read from memory.
func FuzzXMLReader(f *testing.F) {
	for _, seed := range []string{
		"<value/>", "<value>a&amp;&#233;<!-- c --><![CDATA[d\r\n]]>\r</value>", "<value>\r", "<value>a]]>\xff",
		`<value><struct><member><name>a</name><value><array><data><value><i4>1</i4></value></data></array></value></member></struct></value> `,
		`<?x ?><value a="/>"><base64>aGVs</base64></value><!--`, "<value><string>&lt</string></value>",
	} {
		f.Add([]byte(seed))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		p := newXMLParser(slices.Clone(b), 8)
		want := p.value(0)
		p.epilog()
		for _, src := range []io.Reader{bytes.NewReader(b), iotest.OneByteReader(bytes.NewReader(b)), iotest.DataErrReader(bytes.NewReader(b))} {
			x := NewXMLReader(src, 8)
			got, err := x.Value(), x.End()
			if diff := cmp.Diff(p.err, err); diff != "" {
				t.Fatalf("%q: errors (-want +got)\n%s", b, diff)
			}
			if diff := cmp.Diff(want, got); err == nil && diff != "" {
				t.Fatalf("%q: (-want +got)\n%s", b, diff)
			}
		}
	})
}
