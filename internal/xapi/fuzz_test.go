package xapi

import (
	"encoding/json"
	"reflect"
	"testing"
)

// FuzzParse gives wire values of any shape to every type: a value is refused with an *Error or can be encoded.
func FuzzParse(f *testing.F) {
	types := []string{
		"string", "int", "float", "bool", "datetime", "enum vdi_type", "VDI ref", "string set", "VDI record",
		"(string -> string) map", "(int -> string set) map", "(enum vm_operations -> string) map",
		"string option", "sr_stat record option", "VM record set", "(VM ref -> (string -> string) map) map",
	}
	for i := range types {
		for _, s := range []string{
			`"x"`, `1`, `1.5`, `true`, `null`, `[]`, `{}`, `["a",1]`, `{"1":["a"]}`, `{"start":"x"}`, `"20260131T23:59:59Z"`,
			`{"SR":"s","virtual_size":"1","type":"user","sharable":false,"read_only":false,"other_config":{}}`,
		} {
			f.Add(uint8(i), s)
		}
	}
	f.Fuzz(func(t *testing.T, i uint8, s string) {
		typ := mustType(t, types[int(i)%len(types)])
		var wire any
		if json.Unmarshal([]byte(s), &wire) != nil {
			return
		}
		v, err := typ.Parse(wire)
		if err != nil {
			if _, ok := err.(*Error); !ok {
				t.Fatalf("%s from %s: error is a %T", typ, s, err)
			}
			return
		}
		if reflect.TypeOf(v) != typ.GoType() {
			t.Fatalf("%s from %s: got a %T", typ, s, v)
		}
		var e textEncoder
		if err := typ.Encode(&e, v); err != nil {
			t.Errorf("%s from %s: %v", typ, s, err)
		}
		typ.Text(v)
	})
}
