package rpc

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"math"
	"strings"
	"testing"
	"testing/iotest"
	"time"

	"github.com/google/go-cmp/cmp"
)

func xmlCall(params string) string {
	return `<?xml version="1.0"?><methodCall><methodName>VDI.snapshot</methodName>` + params + `</methodCall>`
}

func xmlParam(value string) string {
	return xmlCall("<params><param>" + value + "</param></params>")
}

func TestXMLValues(t *testing.T) {
	for _, tc := range []struct {
		in   string
		want any
	}{
		{`<value>text</value>`, "text"},
		{`<value/>`, ""},
		{`<value></value>`, ""},
		{`<value> spaced </value>`, " spaced "},
		{"<value>\n</value>", "\n"},
		{`<value><string>text</string></value>`, "text"},
		{`<value><string/></value>`, ""},
		{"<value>\n  <string> text </string>\n</value>", " text "},
		{`<value>&lt;a&gt; &amp; &quot;b&quot; &apos;c&apos; &#233; &#x1F600;</value>`, `<a> & "b" 'c' é 😀`},
		{`<value>a<!-- no -->b<![CDATA[<c> & ]]>d<?pi ?>e</value>`, "ab<c> & de"},
		{"<value>a\r\nb\rc&#13;d</value>", "a\nb\nc\rd"},
		{"<value><![CDATA[a\r\nb\rc\r]]></value>", "a\nb\nc\n"},
		{`<value>a>b"c</value>`, `a>b"c`},
		{`<value><int>42</int></value>`, int64(42)},
		{`<value><i4> -7 </i4></value>`, int64(-7)},
		{`<value><i8>9223372036854775807</i8></value>`, int64(math.MaxInt64)},
		{`<value><boolean>1</boolean></value>`, true},
		{`<value><boolean>0</boolean></value>`, false},
		{`<value><double>60.1</double></value>`, 60.1},
		{`<value><double>1</double></value>`, 1.0},
		{`<value><dateTime.iso8601>20260131T23:59:59Z</dateTime.iso8601></value>`, "20260131T23:59:59Z"},
		{"<value><base64>aGVs\n bG8=</base64></value>", "hello"},
		{`<value><nil/></value>`, nil},
		{`<value><nil></nil></value>`, nil},
		{`<value><array><data/></array></value>`, []any{}},
		{`<value><array><data><value>a</value><value><int>1</int></value></data></array></value>`, []any{"a", int64(1)}},
		{`<value><struct/></value>`, map[string]any{}},
		{`<value><struct></struct></value>`, map[string]any{}},
		{
			`<value><struct><member><name>a&amp;b</name><value>c</value></member> <member><name/><value/></member></struct></value>`,
			map[string]any{"a&b": "c", "": ""},
		},
		{`<value type="x/y>"><string a='b'>s</string></value >`, "s"},
	} {
		req, err := ParseCall(XML, []byte(xmlParam(tc.in)))
		if err != nil {
			t.Errorf("%s: %v", tc.in, err)
			continue
		}
		if diff := cmp.Diff([]any{tc.want}, req.Params); diff != "" {
			t.Errorf("%s: (-want +got)\n%s", tc.in, diff)
		}
		if strings.ContainsAny(tc.in, "\r") {
			continue
		}
		x := NewXMLReader(iotest.OneByteReader(strings.NewReader(tc.in)), MaxValues)
		if got, err := x.Value(), x.End(); err != nil || !cmp.Equal(got, tc.want) {
			t.Errorf("XMLReader of %s: %v, %v, want %v", tc.in, got, err, tc.want)
		}
	}
}

func TestXMLCalls(t *testing.T) {
	for _, tc := range []struct {
		in   string
		want []any
	}{
		{xmlCall(``), nil},
		{xmlCall(`<params/>`), nil},
		{xmlCall(`<params></params>`), nil},
		{xmlCall(`<params><param><value>a</value></param><param><value>b</value></param></params>`), []any{"a", "b"}},
		{"\ufeff\r\n<?xml version='1.0' encoding='UTF-8' standalone=\"yes\"?>\n<!-- c -->" + xmlCall(``)[21:] + "\n", nil},
		{"<methodCall>\n <methodName> VDI.snapshot </methodName>\n <params>\n</params>\n</methodCall>", nil},
	} {
		req, err := ParseCall(XML, []byte(tc.in))
		if err != nil {
			t.Errorf("%s: %v", tc.in, err)
			continue
		}
		want := &Request{Dialect: XMLRPC, Method: "VDI.snapshot", Params: tc.want}
		if diff := cmp.Diff(want, req); diff != "" {
			t.Errorf("%s: (-want +got)\n%s", tc.in, diff)
		}
	}
}

func TestXMLMalformed(t *testing.T) {
	deep := strings.Repeat("<value><array><data>", MaxDepth+1) + strings.Repeat("</data></array></value>", MaxDepth+1)
	for _, in := range []string{
		``,
		`text`,
		`<methodCall>`,
		`<methodCall/>`,
		`<methodCall></methodCall>`,
		`<methodCall><methodName></methodName></methodCall>`,
		`<methodCall><methodName>a</methodName>`,
		`<methodCall><methodName>a</methodName></methodCal>`,
		`<methodCall><methodName>a</methodName></methodCall>more`,
		`<methodCall><methodName>a</methodName></methodCall><x/>`,
		`<methodResponse></methodResponse>`,
		`<!DOCTYPE x [<!ENTITY a "b">]>` + xmlCall(``)[21:],
		`<?xml version="1.0" encoding="iso-8859-1"?>` + xmlCall(``)[21:],
		xmlCall(`<params><value>a</value></params>`),
		xmlCall(`<params><param></param></params>`),
		xmlParam(`<value><int></int></value>`),
		xmlParam(`<value><int>1.5</int></value>`),
		xmlParam(`<value><i8>9223372036854775808</i8></value>`),
		xmlParam(`<value><boolean>true</boolean></value>`),
		xmlParam(`<value><double>0x1p4</double></value>`),
		xmlParam(`<value><double>1,5</double></value>`),
		xmlParam(`<value><double>nan</double></value>`),
		xmlParam(`<value><double>-inf</double></value>`),
		xmlParam(`<value><base64>!</base64></value>`),
		xmlParam(`<value><nil>x</nil></value>`),
		xmlParam(`<value><integer>1</integer></value>`),
		xmlParam(`<value>text<int>1</int></value>`),
		xmlParam(`<value><int>1</int>text</value>`),
		xmlParam(`<value><int>1</int><int>2</int></value>`),
		xmlParam(`<value><int>1</i4></value>`),
		xmlParam(`<value><array/></value>`),
		xmlParam(`<value><array><value>a</value></array></value>`),
		xmlParam(`<value><struct><member><value>a</value></member></struct></value>`),
		xmlParam(`<value><struct><member><name>a</name></member></struct></value>`),
		xmlParam(`<value><struct><member><name>a</name><value/></member><member><name>a</name><value/></member></struct></value>`),
		xmlParam(`<value>&nbsp;</value>`),
		xmlParam(`<value>&amp</value>`),
		xmlParam(`<value>&#0;</value>`),
		xmlParam(`<value>&#xd800;</value>`),
		xmlParam(`<value>&#-1;</value>`),
		xmlParam("<value>\x01</value>"),
		xmlParam(`<value><!ELEMENT a></value>`),
		xmlParam(`<value><![CDATA[a</value>`),
		xmlParam(`<value><!-- a</value>`),
		xmlParam(`<value<value>`),
		xmlParam(deep),
	} {
		req, err := ParseCall(XML, []byte(in))
		if _, ok := errors.AsType[*SyntaxError](err); !ok || req != nil {
			t.Errorf("%s: request %v, error %v, want a SyntaxError", in, req, err)
		}
	}
}

func TestDepthLimit(t *testing.T) {
	xml := strings.Repeat("<value><array><data>", MaxDepth) + strings.Repeat("</data></array></value>", MaxDepth)
	if _, err := ParseCall(XML, []byte(xmlParam(xml))); err != nil {
		t.Errorf("XML at the limit: %v", err)
	}
	json := func(n int) []byte {
		return []byte(`{"method":"a","id":1,"params":[` + strings.Repeat("[", n) + `"]]["` + strings.Repeat("]", n) + `]}`)
	}
	if _, err := ParseCall(JSON, json(MaxDepth)); err != nil {
		t.Errorf("JSON at the limit: %v", err)
	}
	if _, err := ParseCall(JSON, json(MaxDepth+1)); err == nil {
		t.Error("JSON beyond the limit was accepted")
	}
}

func TestSizeLimit(t *testing.T) {
	in := xmlCall(``)
	if _, err := ReadCall(XML, strings.NewReader(in), int64(len(in))); err != nil {
		t.Errorf("message of exactly the limit: %v", err)
	}
	if _, err := ReadCall(XML, strings.NewReader(in), int64(len(in))-1); !errors.Is(err, ErrTooLarge) {
		t.Errorf("message above the limit: error %v, want ErrTooLarge", err)
	}
	if _, err := ReadResponse(JSONRPC2, strings.NewReader(`{"result":1}`), 4); !errors.Is(err, ErrTooLarge) {
		t.Errorf("response above the limit: error %v, want ErrTooLarge", err)
	}
}

func TestInvalidUTF8(t *testing.T) {
	for _, tc := range []struct {
		syntax Syntax
		in     string
		want   string
	}{
		{XML, xmlParam("<value>a\xffb</value>"), "a\xffb"},
		{XML, xmlParam("<value><string>\xc3</string></value>"), "\xc3"},
		{XML, xmlParam("<value><struct><member><name>\xc3</name><value/></member></struct></value>"), "\xc3"},
		{XML, xmlParam("<value><base64>/w==</base64></value>"), "\xff"},
		{JSON, "{\"method\":\"VDI.snapshot\",\"id\":1,\"params\":[\"ok\",\"a\xffb\"]}", "a\xffb"},
	} {
		req, err := ParseCall(tc.syntax, []byte(tc.in))
		e, ok := errors.AsType[*EncodingError](err)
		if !ok || e.Value != tc.want {
			t.Errorf("%q: error %v, want an EncodingError about %q", tc.in, err, tc.want)
			continue
		}
		if req == nil || req.Method != "VDI.snapshot" {
			t.Errorf("%q: request %+v cannot answer", tc.in, req)
		}
	}
}

func TestJSONCalls(t *testing.T) {
	for _, tc := range []struct {
		in   string
		want Request
	}{
		{
			`{"method":"a","params":["s",1,-9223372036854775808,1.5,1e3,true,null,[],{}],"id":"x"}`,
			Request{JSONRPC1, "a", []any{"s", int64(1), int64(math.MinInt64), 1.5, 1000.0, true, nil, []any{}, map[string]any{}}, []byte(`"x"`)},
		},
		{`{"jsonrpc":"2.0","method":"a","params":[],"id":7}`, Request{JSONRPC2, "a", []any{}, []byte(`7`)}},
		{`{"jsonrpc":"2.0","method":"a","id":7}`, Request{JSONRPC2, "a", []any{}, []byte(`7`)}},
		{`{"jsonrpc":"2.0","method":"a","params":null,"id":7}`, Request{JSONRPC2, "a", []any{}, []byte(`7`)}},
		{
			`{"jsonrpc":"2.0","method":"a","params":{"k":[1,2.0]},"id":-7}`,
			Request{JSONRPC2, "a", []any{map[string]any{"k": []any{int64(1), 2.0}}}, []byte(`-7`)},
		},
		{`{"method":"a","params":[18446744073709551615],"id":1}`, Request{JSONRPC1, "a", []any{float64(1 << 63 * 2)}, []byte(`1`)}},
		{` {"extra":[],"method":"a","params":["\u00e9\n"],"id":1} `, Request{JSONRPC1, "a", []any{"é\n"}, []byte(`1`)}},
	} {
		req, err := ParseCall(JSON, []byte(tc.in))
		if err != nil {
			t.Errorf("%s: %v", tc.in, err)
			continue
		}
		if diff := cmp.Diff(&tc.want, req); diff != "" {
			t.Errorf("%s: (-want +got)\n%s", tc.in, diff)
		}
	}
}

func TestJSONMalformed(t *testing.T) {
	for _, in := range []string{
		``,
		`null`,
		`[]`,
		`[{"method":"a","params":[],"id":1}]`,
		`{"method":"a","params":[],"id":1`,
		`{"method":"a","params":[],"id":1}}`,
		`{"method":"a","params":[],"id":1} x`,
		`{"METHOD":"a","params":[],"id":1}`,
		`{"params":[],"id":1}`,
		`{"method":"","params":[],"id":1}`,
		`{"method":1,"params":[],"id":1}`,
		`{"method":"a","params":[]}`,
		`{"method":"a","params":[],"id":null}`,
		`{"method":"a","params":[],"id":1.5}`,
		`{"method":"a","params":[],"id":true}`,
		`{"method":"a","params":[],"id":[1]}`,
		`{"method":"a","id":1}`,
		`{"method":"a","params":null,"id":1}`,
		`{"method":"a","params":{},"id":1}`,
		`{"method":"a","params":"b","id":1}`,
		`{"method":"a","params":[1e999],"id":1}`,
		`{"jsonrpc":"1.0","method":"a","params":[],"id":1}`,
		`{"jsonrpc":2.0,"method":"a","params":[],"id":1}`,
		`{"jsonrpc":"2.0","method":"a","params":1,"id":1}`,
		`{"jsonrpc":"2.0","method":"a","params":[]}`,
	} {
		req, err := ParseCall(JSON, []byte(in))
		if _, ok := errors.AsType[*SyntaxError](err); !ok || req != nil {
			t.Errorf("%s: request %v, error %v, want a SyntaxError", in, req, err)
		}
	}
}

// everything writes one value of each kind.
func everything(e Encoder) error {
	e.BeginStruct()
	e.Key("a<b")
	e.String("<&\">\r\n\t\x01é")
	e.Key("int")
	e.Int(1 << 40)
	e.Key("float")
	e.Float(1)
	e.Key("bool")
	e.Bool(true)
	e.Key("time")
	e.Time(time.Date(2026, 1, 31, 23, 59, 59, 5, time.FixedZone("", 3600)))
	e.Key("null")
	e.Null()
	e.Key("set")
	e.BeginArray()
	e.String("x")
	e.Bool(false)
	e.BeginArray()
	e.EndArray()
	e.EndArray()
	e.Key("map")
	e.BeginStruct()
	e.EndStruct()
	e.Key("count")
	e.(Int4Encoder).Int4(3)
	e.EndStruct()
	return nil
}

func TestAnswers(t *testing.T) {
	const (
		xmlHead = `<?xml version="1.0"?><methodResponse><params><param><value>`
		xmlTail = `</value></param></params></methodResponse>`
		xmlAll  = `<struct><member><name>a&lt;b</name><value>&lt;&amp;&quot;&gt;&#13;` + "\n\té" + `</value></member>` +
			`<member><name>int</name><value>1099511627776</value></member>` +
			`<member><name>float</name><value><double>1</double></value></member>` +
			`<member><name>bool</name><value><boolean>1</boolean></value></member>` +
			`<member><name>time</name><value><dateTime.iso8601>20260131T22:59:59Z</dateTime.iso8601></value></member>` +
			`<member><name>null</name><value><nil/></value></member>` +
			`<member><name>set</name><value><array><data><value>x</value><value><boolean>0</boolean></value>` +
			`<value><array><data></data></array></value></data></array></value></member>` +
			`<member><name>map</name><value><struct></struct></value></member>` +
			`<member><name>count</name><value><i4>3</i4></value></member></struct>`
		jsonAll = `{"a<b":"<&\">\r\n\t\u0001é","int":1099511627776,"float":1.0,"bool":true,"time":"20260131T22:59:59Z",` +
			`"null":null,"set":["x",false,[]],"map":{},"count":3}`
	)
	id := []byte(`"x"`)
	success := func(r Request) func(io.Writer) error {
		return func(w io.Writer) error { return r.WriteSuccess(w, everything) }
	}
	failure := func(r Request, desc ...string) func(io.Writer) error {
		return func(w io.Writer) error { return r.WriteFailure(w, desc[0], desc[1:]...) }
	}
	bare := func(r Request) func(io.Writer) error {
		return func(w io.Writer) error {
			return r.WriteBare(w, func(e Encoder) error { return Encode(e, []string{"a.b"}) })
		}
	}
	for _, tc := range []struct {
		name  string
		write func(io.Writer) error
		want  string
	}{
		{
			"xml success", success(Request{}),
			xmlHead + `<struct><member><name>Status</name><value>Success</value></member><member><name>Value</name><value>` +
				xmlAll + `</value></member></struct>` + xmlTail,
		},
		{
			"xml failure", failure(Request{}, "UUID_INVALID", "VDI", "<x>"),
			xmlHead + `<struct><member><name>Status</name><value>Failure</value></member><member><name>ErrorDescription</name><value><array><data>` +
				`<value>UUID_INVALID</value><value>VDI</value><value>&lt;x&gt;</value></data></array></value></member></struct>` + xmlTail,
		},
		{"xml bare", bare(Request{}), xmlHead + `<array><data><value>a.b</value></data></array>` + xmlTail},
		{"json 1 success", success(Request{Dialect: JSONRPC1, ID: id}), `{"result":` + jsonAll + `,"error":null,"id":"x"}`},
		{"json 2 success", success(Request{Dialect: JSONRPC2, ID: id}), `{"jsonrpc":"2.0","result":` + jsonAll + `,"id":"x"}`},
		{"json 1 failure", failure(Request{Dialect: JSONRPC1, ID: id}, "A", "b"), `{"result":null,"error":["A","b"],"id":"x"}`},
		{
			"json 2 failure", failure(Request{Dialect: JSONRPC2, ID: id}, "A", "b", "c"),
			`{"jsonrpc":"2.0","error":{"code":1,"message":"A","data":["b","c"]},"id":"x"}`,
		},
		{
			"json 2 failure without parameters", failure(Request{Dialect: JSONRPC2, ID: id}, "A"),
			`{"jsonrpc":"2.0","error":{"code":1,"message":"A","data":[]},"id":"x"}`,
		},
		{"json bare", bare(Request{Dialect: JSONRPC2, ID: id}), `{"jsonrpc":"2.0","result":["a.b"],"id":"x"}`},
	} {
		var b bytes.Buffer
		if err := tc.write(&b); err != nil {
			t.Errorf("%s: %v", tc.name, err)
		}
		if diff := cmp.Diff(tc.want, b.String()); diff != "" {
			t.Errorf("%s: (-want +got)\n%s", tc.name, diff)
		}
	}
}

func TestFloats(t *testing.T) {
	for _, tc := range []struct {
		f         float64
		xml, json string
	}{
		{0, "0", "0.0"},
		{0.5, "0.5", "0.5"},
		{1.0 / 3, "0.3333333333333333", "0.3333333333333333"},
		{1e-7, "1e-07", "1e-07"},
		{1e21, "1e+21", "1e+21"},
		{-2, "-2", "-2.0"},
		{math.Inf(1), "inf", "null"},
		{math.Inf(-1), "-inf", "null"},
		{math.NaN(), "nan", "null"},
	} {
		got, err := XMLValue(func(e Encoder) error { e.Float(tc.f); return nil })
		if want := "<value><double>" + tc.xml + "</double></value>"; err != nil || got != want {
			t.Errorf("XML of %v = %s, %v, want %s", tc.f, got, err, want)
		}
		var b bytes.Buffer
		j := NewJSON(&b)
		j.Float(tc.f)
		if err := j.Flush(); err != nil || b.String() != tc.json {
			t.Errorf("JSON of %v = %s, %v, want %s", tc.f, b.String(), err, tc.json)
		}
	}
}

type brokenWriter struct{ left int }

func (w *brokenWriter) Write(p []byte) (int, error) {
	if w.left -= len(p); w.left < 0 {
		return 0, io.ErrClosedPipe
	}
	return len(p), nil
}

func TestWriteErrors(t *testing.T) {
	boom := errors.New("boom")
	for _, d := range []Dialect{XMLRPC, JSONRPC1, JSONRPC2} {
		r := Request{Dialect: d, ID: []byte("1")}
		if err := r.WriteSuccess(io.Discard, func(Encoder) error { return boom }); !errors.Is(err, boom) {
			t.Errorf("dialect %d: error %v, want that of the encoding function", d, err)
		}
		long := func(e Encoder) error { return Encode(e, strings.Repeat("x", 3*flushAt)) }
		if err := r.WriteSuccess(&brokenWriter{left: flushAt}, long); !errors.Is(err, io.ErrClosedPipe) {
			t.Errorf("dialect %d: error %v, want that of the writer", d, err)
		}
		if err := WriteCall(io.Discard, d, 1, "a", struct{}{}); err == nil {
			t.Errorf("dialect %d: a struct{} was encoded", d)
		}
	}
}

// A call has at most MaxValues values, wherever they are; one that has more
// can be answered.
func TestMaxValues(t *testing.T) {
	const half = MaxValues/2 - 1
	xml := func(n int) string {
		return "<value><array><data>" + strings.Repeat("<value/>", n) + "</data></array></value>"
	}
	xmlStruct := func(n int) string {
		var b strings.Builder
		for i := range n {
			fmt.Fprintf(&b, "<member><name>%d</name><value/></member>", i)
		}
		return "<value><struct>" + b.String() + "</struct></value>"
	}
	json := func(n int) string { return "[" + strings.TrimSuffix(strings.Repeat("0,", n), ",") + "]" }
	jsonObject := func(n int) string {
		return "{" + strings.TrimSuffix(strings.Repeat(`"a":0,`, n), ",") + "}"
	}
	call := func(s Syntax, values ...string) string {
		if s == XML {
			return xmlCall("<params><param>" + strings.Join(values, "</param><param>") + "</param></params>")
		}
		return `{"jsonrpc":"2.0","id":7,"method":"VDI.snapshot","params":[` + strings.Join(values, ",") + `]}`
	}
	for name, tt := range map[string]struct {
		syntax Syntax
		in     string
		fits   bool
	}{
		"XML":                {XML, call(XML, xml(half), xmlStruct(half)), true},
		"XML, an element":    {XML, call(XML, xml(half+1), xmlStruct(half)), false},
		"XML, a member":      {XML, call(XML, xml(half), xmlStruct(half+1)), false},
		"XML, a parameter":   {XML, call(XML, xml(half), xmlStruct(half), "<value/>"), false},
		"JSON":               {JSON, call(JSON, json(half), jsonObject(half)), true},
		"JSON, an element":   {JSON, call(JSON, json(half+1), jsonObject(half)), false},
		"JSON, a member":     {JSON, call(JSON, json(half), jsonObject(half+1)), false},
		"JSON, a parameter":  {JSON, call(JSON, json(half), jsonObject(half), "0"), false},
		"JSON, nested":       {JSON, call(JSON, strings.TrimSuffix(strings.Repeat("[],", MaxValues), ",")), true},
		"JSON, nested, more": {JSON, call(JSON, strings.TrimSuffix(strings.Repeat("[],", MaxValues+1), ",")), false},
	} {
		req, err := ParseCall(tt.syntax, []byte(tt.in))
		e, tooMany := errors.AsType[*TooManyValuesError](err)
		switch {
		case tooMany == tt.fits, err != nil && tt.fits:
			t.Errorf("%s: %v", name, err)
		case req == nil || req.Method != "VDI.snapshot":
			t.Errorf("%s: request %+v cannot answer", name, req)
		case tooMany && (e.Limit != MaxValues || req.Params != nil || tt.syntax == JSON && string(req.ID) != "7"):
			t.Errorf("%s: %v, request %+v", name, err, req)
		}
	}
	if _, err := ParseCall(JSON, []byte(`{"method":"a","id":1,"params":[]`+strings.Repeat(`,"a":0`, 100_000)+`}`)); err != nil {
		t.Errorf("a member again and again: %v", err)
	}
	var b strings.Builder
	for i := range maxMembers {
		fmt.Fprintf(&b, `,"%d":0`, i)
	}
	_, err := ParseCall(JSON, []byte(`{"method":"a","id":1,"params":[]`+b.String()+`}`))
	if _, ok := errors.AsType[*SyntaxError](err); !ok {
		t.Errorf("many members: %v, want a SyntaxError", err)
	}
}
