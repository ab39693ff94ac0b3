package rpc

import (
	"bytes"
	"errors"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"pgregory.net/rapid"
)

var dialects = []Dialect{XMLRPC, JSONRPC1, JSONRPC2}

func TestWriteCall(t *testing.T) {
	when := time.Date(2026, 1, 31, 23, 59, 59, 0, time.UTC)
	params := []any{"s", 1, int64(2), 60.0, true, nil, when, []string{"a"}, map[string]string{"k": "v", "j": "w"}}
	for _, tc := range []struct {
		d    Dialect
		want string
	}{
		{XMLRPC, `<?xml version="1.0"?><methodCall><methodName>a.b</methodName><params><param><value>s</value></param>` +
			`<param><value>1</value></param><param><value>2</value></param><param><value><double>60</double></value></param>` +
			`<param><value><boolean>1</boolean></value></param><param><value><nil/></value></param>` +
			`<param><value><dateTime.iso8601>20260131T23:59:59Z</dateTime.iso8601></value></param>` +
			`<param><value><array><data><value>a</value></data></array></value></param>` +
			`<param><value><struct><member><name>j</name><value>w</value></member><member><name>k</name><value>v</value></member></struct></value></param>` +
			`</params></methodCall>`},
		{JSONRPC1, `{"method":"a.b","params":["s",1,2,60.0,true,null,"20260131T23:59:59Z",["a"],{"j":"w","k":"v"}],"id":9}`},
		{JSONRPC2, `{"jsonrpc":"2.0","method":"a.b","params":["s",1,2,60.0,true,null,"20260131T23:59:59Z",["a"],{"j":"w","k":"v"}],"id":9}`},
	} {
		var b bytes.Buffer
		if err := WriteCall(&b, tc.d, 9, "a.b", params...); err != nil {
			t.Errorf("dialect %d: %v", tc.d, err)
		}
		if diff := cmp.Diff(tc.want, b.String()); diff != "" {
			t.Errorf("dialect %d: (-want +got)\n%s", tc.d, diff)
		}
	}
}

func TestReadResponse(t *testing.T) {
	const head, tail = `<methodResponse><params><param><value>`, `</value></param></params></methodResponse>`
	fault := func(code string, params ...string) error { return &Fault{code, params} }
	for _, tc := range []struct {
		d    Dialect
		in   string
		want any
		err  error
	}{
		{XMLRPC, head + `<array><data><value>a</value></data></array>` + tail, []any{"a"}, nil},
		{XMLRPC, `<methodResponse><fault><value><struct><member><name>faultCode</name><value><int>4</int></value></member>` +
			`<member><name>faultString</name><value>no</value></member></struct></value></fault></methodResponse>`, nil, fault("Fault", "no")},
		{JSONRPC1, `{"result":[1],"error":null,"id":1}`, []any{int64(1)}, nil},
		{JSONRPC1, `{"result":null,"error":["A","b"],"id":1}`, nil, fault("A", "b")},
		{JSONRPC2, `{"jsonrpc":"2.0","result":"","id":1}`, "", nil},
		{JSONRPC2, `{"jsonrpc":"2.0","error":{"code":1,"message":"A","data":["b"]},"id":1}`, nil, fault("A", "b")},
		{JSONRPC2, `{"jsonrpc":"2.0","error":{"code":1,"message":"A"},"id":1}`, nil, fault("A")},
	} {
		got, err := ReadResponse(tc.d, strings.NewReader(tc.in), 1<<20)
		if diff := cmp.Diff(tc.want, got); diff != "" {
			t.Errorf("%s: (-want +got)\n%s", tc.in, diff)
		}
		want, _ := errors.AsType[*Fault](tc.err)
		if f, _ := errors.AsType[*Fault](err); (err == nil) != (tc.err == nil) || f != nil && f.Error() != want.Error() {
			t.Errorf("%s: error %v, want %v", tc.in, err, tc.err)
		}
	}
	for _, tc := range []struct {
		d  Dialect
		in string
	}{
		{XMLRPC, ``},
		{XMLRPC, `<html>`},
		{XMLRPC, `<methodResponse><params/></methodResponse>`},
		{XMLRPC, head + `<struct/>` + tail},
		{XMLRPC, head + `<struct><member><name>Status</name><value>Success</value></member></struct>` + tail},
		{XMLRPC, head + `<struct><member><name>Status</name><value>Failure</value></member></struct>` + tail},
		{XMLRPC, head + `<struct><member><name>Status</name><value>Failure</value></member><member><name>ErrorDescription</name>` +
			`<value><array><data/></array></value></member></struct>` + tail},
		{JSONRPC1, `{}`},
		{JSONRPC1, `{"error":"x"}`},
		{JSONRPC2, `{"error":["x"]}`},
		{JSONRPC2, `{"result":}`},
	} {
		_, err := ReadResponse(tc.d, strings.NewReader(tc.in), 1<<20)
		if _, ok := errors.AsType[*SyntaxError](err); !ok {
			t.Errorf("%s: error %v, want a SyntaxError", tc.in, err)
		}
	}
}

// text draws strings that survive XML: no control characters.
var text = rapid.StringOf(rapid.RuneFrom([]rune("ab<>&\"'\r\n\t]é日😀 ")))

func value(depth int) *rapid.Generator[any] {
	gens := []*rapid.Generator[any]{
		text.AsAny(),
		rapid.Bool().AsAny(),
		rapid.Just[any](nil),
		rapid.Map(rapid.Int32(), func(n int32) float64 { return float64(n) / 8 }).AsAny(),
	}
	if depth > 0 {
		gens = append(gens,
			rapid.Map(rapid.SliceOfN(value(depth-1), 0, 4), func(v []any) any { return v }),
			rapid.Map(rapid.MapOfN(text, value(depth-1), 0, 4), func(v map[string]any) any { return v }))
	}
	return rapid.OneOf(gens...)
}

// What one end writes the other reads: calls, results and failures, in every dialect.
func TestRoundTrip(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		d := rapid.SampledFrom(dialects).Draw(t, "dialect")
		params := rapid.SliceOfN(value(3), 1, 4).Draw(t, "params")
		if d != XMLRPC {
			params = append(params, rapid.Int64().Draw(t, "integer")) // a string in XML
		}
		var b bytes.Buffer
		if err := WriteCall(&b, d, 1, "Class.method", params...); err != nil {
			t.Fatal(err)
		}
		req, err := ReadCall(d.Syntax(), &b, 1<<20)
		if err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(params, req.Params); diff != "" || req.Method != "Class.method" || req.Dialect != d {
			t.Fatalf("call %+v: (-want +got)\n%s", req, diff)
		}

		if err := req.WriteSuccess(&b, func(e Encoder) error { return Encode(e, params) }); err != nil {
			t.Fatal(err)
		}
		got, err := ReadResponse(d, &b, 1<<20)
		if err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(any(params), got); diff != "" {
			t.Fatalf("result: (-want +got)\n%s", diff)
		}

		desc := rapid.SliceOfN(text, 1, 4).Draw(t, "failure")
		if err := req.WriteFailure(&b, desc[0], desc[1:]...); err != nil {
			t.Fatal(err)
		}
		_, err = ReadResponse(d, &b, 1<<20)
		f, ok := errors.AsType[*Fault](err)
		if !ok {
			t.Fatalf("failure: error %v", err)
		}
		if diff := cmp.Diff(desc, append([]string{f.Code}, f.Params...)); diff != "" {
			t.Fatalf("failure: (-want +got)\n%s", diff)
		}
	})
}

// fuzzCall checks that whatever is accepted can be written and read again unchanged.
func fuzzCall(f *testing.F, s Syntax, seeds ...string) {
	for _, seed := range seeds {
		f.Add([]byte(seed))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		req, err := ParseCall(s, b)
		if err != nil {
			return
		}
		var out bytes.Buffer
		if err := WriteCall(&out, req.Dialect, 1, req.Method, req.Params...); err != nil {
			t.Fatal(err)
		}
		again, err := ParseCall(s, out.Bytes())
		if s == XML {
			// A method or a member may hold only white space or characters that
			// writing drops; what matters is that the output is well formed.
			if _, ok := errors.AsType[*SyntaxError](err); ok && strings.TrimSpace(req.Method) != "" && !hasMap(req.Params) {
				t.Fatalf("%s: %v", out.Bytes(), err)
			}
			return
		}
		if err != nil {
			t.Fatalf("%s: %v", out.Bytes(), err)
		}
		if diff := cmp.Diff(req.Params, again.Params); diff != "" {
			t.Fatalf("(-want +got)\n%s", diff)
		}
	})
}

func hasMap(v any) bool {
	switch v := v.(type) {
	case map[string]any:
		return true
	case []any:
		if slices.ContainsFunc(v, hasMap) {
			return true
		}
	}
	return false
}

func FuzzXMLCall(f *testing.F) {
	fuzzCall(
		f, XML, xmlCall(``),
		xmlParam(`<value><struct><member><name>a</name><value><array><data><value><i4>1</i4></value></data></array></value></member></struct></value>`),
		xmlParam(`<value>&lt;&#x41;<![CDATA[x]]><!-- c --></value>`),
		xmlParam(`<value><dateTime.iso8601>20260131T23:59:59Z</dateTime.iso8601></value>`),
		xmlParam(`<value><base64>aGVsbG8=</base64></value>`),
		"<?xml version='1.0' encoding='utf-8'?><methodCall><methodName>a</methodName><params/></methodCall>",
		xmlParam("<value>\xff\r\n</value>"),
	)
}

func FuzzJSONCall(f *testing.F) {
	fuzzCall(
		f, JSON,
		`{"jsonrpc":"2.0","method":"a","params":["s",1,1.5,true,null,[{}]],"id":"x"}`,
		`{"method":"a","params":[[["\ud800\u00e9"]]],"id":-1}`,
		`{"jsonrpc":"2.0","method":"a","params":{"k":18446744073709551615},"id":1}`,
		"{\"method\":\"\xff\",\"params\":[],\"id\":1}",
	)
}

func FuzzResponse(f *testing.F) {
	for i, seed := range []string{
		`<methodResponse><params><param><value><struct><member><name>Status</name><value>Success</value></member><member><name>Value</name><value/></member></struct></value></param></params></methodResponse>`,
		`{"result":null,"error":["A","b"],"id":1}`,
		`{"jsonrpc":"2.0","error":{"code":1,"message":"A","data":["b"]},"id":1}`,
	} {
		f.Add(uint8(i), []byte(seed))
	}
	f.Fuzz(func(t *testing.T, d uint8, b []byte) {
		v, err := ReadResponse(Dialect(d%3), bytes.NewReader(b), 1<<20)
		if err == nil {
			if err := Encode(NewJSON(&bytes.Buffer{}), v); err != nil {
				t.Fatal(err)
			}
		}
	})
}

// record resembles a VDI record: what servers encode most.
func record(e Encoder) {
	e.BeginStruct()
	for _, k := range []string{"uuid", "name_label", "name_description", "SR", "location", "snapshot_of", "parent"} {
		e.Key(k)
		e.String("OpaqueRef:3f1d2c4b-5a69-4788-9c0d-1e2f3a4b5c6d")
	}
	for _, k := range []string{"virtual_size", "physical_utilisation"} {
		e.Key(k)
		e.Int(25769803776)
	}
	for _, k := range []string{"managed", "missing", "sharable", "read_only"} {
		e.Key(k)
		e.Bool(false)
	}
	e.Key("snapshot_time")
	e.Time(time.Unix(1769903999, 0))
	e.Key("other_config")
	e.BeginStruct()
	e.Key("content_id")
	e.String("3f1d2c4b-5a69-4788-9c0d-1e2f3a4b5c6d")
	e.EndStruct()
	e.EndStruct()
}

func benchmarkEncode(b *testing.B, d Dialect) {
	var out bytes.Buffer
	req := Request{Dialect: d, ID: []byte("1")}
	encode := func() {
		out.Reset()
		err := req.WriteSuccess(&out, func(e Encoder) error {
			e.BeginArray()
			for range 1000 {
				record(e)
			}
			e.EndArray()
			return nil
		})
		if err != nil {
			b.Fatal(err)
		}
	}
	encode()
	b.SetBytes(int64(out.Len()))
	b.ReportAllocs()
	for b.Loop() {
		encode()
	}
}

func BenchmarkEncodeXML(b *testing.B)  { benchmarkEncode(b, XMLRPC) }
func BenchmarkEncodeJSON(b *testing.B) { benchmarkEncode(b, JSONRPC2) }

func benchmarkDecode(b *testing.B, d Dialect) {
	var out bytes.Buffer
	req := Request{Dialect: d, ID: []byte("1")}
	err := req.WriteSuccess(&out, func(e Encoder) error {
		e.BeginArray()
		for range 1000 {
			record(e)
		}
		e.EndArray()
		return nil
	})
	if err != nil {
		b.Fatal(err)
	}
	b.SetBytes(int64(out.Len()))
	b.ReportAllocs()
	for b.Loop() {
		if _, err := ReadResponse(d, bytes.NewReader(out.Bytes()), 1<<30); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkDecodeXML(b *testing.B)  { benchmarkDecode(b, XMLRPC) }
func BenchmarkDecodeJSON(b *testing.B) { benchmarkDecode(b, JSONRPC2) }
