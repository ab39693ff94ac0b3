package rpc

import (
	"bytes"
	"encoding/json"
	"math"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// FuzzJSONValue compares what is read with what encoding/json makes of it.
func FuzzJSONValue(f *testing.F) {
	for _, seed := range []string{
		`["s",1,-1.5e3,true,false,null,{},[],{"a":{"b":[" , : "]},"":0}]`,
		` { "a" : [ 1 , 2 ] , "a" : "\u00e9\"\\" } `,
		"[\"\xff\", \"\u00e9\", \"\\ud800\", 18446744073709551615, -0, 0.0]",
		`12`, `"s"`, `null`, ` {"a" : [{"b":"}"}] , "a\u0062":null,"c": 1 } `,
	} {
		f.Add([]byte(seed))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		if !json.Valid(b) || checkJSONDepth(b, MaxDepth) != nil {
			t.Skip()
		}
		dec := json.NewDecoder(bytes.NewReader(b))
		dec.UseNumber()
		var want any
		if err := dec.Decode(&want); err != nil {
			t.Fatal(err)
		}
		got, err := jsonValue(b, math.MaxInt)
		want, wrong := withNumbers(want)
		if (err != nil) != wrong {
			t.Fatalf("%q: %v, want an error: %v", b, err, wrong)
		}
		if diff := cmp.Diff(want, got); err == nil && diff != "" {
			t.Errorf("%q: (-want +got)\n%s", b, diff)
		}

		var members map[string]json.RawMessage
		err = json.Unmarshal(b, &members)
		found, failed := jsonMembers(b)
		if (err != nil || members == nil || len(members) > maxMembers) != (failed != nil) {
			t.Fatalf("%q: %v, encoding/json says %v", b, failed, err)
		}
		if diff := cmp.Diff(members, found); failed == nil && diff != "" {
			t.Errorf("members of %q: (-want +got)\n%s", b, diff)
		}
	})
}

// withNumbers replaces every json.Number in v by what it stands for; wrong
// when one stands for nothing.
func withNumbers(v any) (_ any, wrong bool) {
	switch v := v.(type) {
	case json.Number:
		n, err := jsonNumber(string(v))
		return n, err != nil
	case []any:
		for i := range v {
			var bad bool
			v[i], bad = withNumbers(v[i])
			wrong = wrong || bad
		}
	case map[string]any:
		for k := range v {
			var bad bool
			v[k], bad = withNumbers(v[k])
			wrong = wrong || bad
		}
	}
	return v, wrong
}
