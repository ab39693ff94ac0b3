package db

import (
	"errors"
	"testing"

	"github.com/google/go-cmp/cmp"

	"coppice/internal/xapi"
)

// FuzzDecode reads rows of any content: each is refused with a *CorruptError, or is a record that can be
// written and read back.
func FuzzDecode(f *testing.F) {
	for _, s := range []string{
		`{}`, `[]`, `{"uuid":"a","virtual_size":5}`, `{"tags":null,"x":[{}]}`, `{"snapshot_time":"2026-01-31T23:59:59.5Z"}`,
		`{"tags":["a"],"tags":[]}`, `{"tags":[],"sm_config":{"a":"b","c":""},"virtual_size":-0}`, `{"is_a_snapshot":true,"virtual_size":7}`,
		`{"sm_config":{"a":"b"},"sm_config":{"c":"d"}}`, `{"name_label":"\ud800"}`, `{"uuid":"a"} junk`, `null`,
	} {
		f.Add(s)
	}
	c := xapi.ClassOf[xapi.VDI]()
	k := newCodec(c)
	f.Fuzz(func(t *testing.T, s string) {
		if quick, ok := k.quick([]byte(s), nil); ok {
			slow, unknown, err := k.decodeAny(Row{Data: []byte(s)})
			if err != nil || len(unknown) > 0 {
				t.Fatalf("read by the quick way only: %v, %d unknown fields", err, len(unknown))
			}
			if diff := cmp.Diff(slow, k.defaults(quick)); diff != "" {
				t.Fatalf("the quick way reads something else (-slow +quick)\n%s", diff)
			}
		}
		rec, unknown, err := k.decode(Row{Class: "VDI", Ref: "r", Data: []byte(s)}, nil)
		if err != nil {
			if _, ok := errors.AsType[*CorruptError](err); !ok {
				t.Fatalf("error is a %T", err)
			}
			return
		}
		c.Normalize(rec)
		data, err := k.encode(&object{rec: rec, unknown: unknown})
		if err != nil {
			t.Fatal(err)
		}
		again, kept, err := k.decode(Row{Data: data}, nil)
		if err != nil {
			t.Fatalf("%s: %v", data, err)
		}
		for _, field := range c.Fields {
			if !field.Persist {
				field.Set(rec, field.Get(again)) // not stored
			}
		}
		c.CopyComputed(rec, again)
		if diff := cmp.Diff(rec, again); diff != "" || len(kept) != len(unknown) {
			t.Errorf("(-first +again)\n%s%d and %d unknown fields", diff, len(unknown), len(kept))
		}
	})
}

// TestDefaultsAreNotMixedIn stores a map that has fewer members than its default, and one that is missing.
func TestDefaultsAreNotMixedIn(t *testing.T) {
	k := newCodec(xapi.ClassOf[xapi.Host]())
	for data, want := range map[string]map[string]string{
		`{}`:                      {"address": "localhost", "port": "27000"},
		`{"license_server":null}`: {"address": "localhost", "port": "27000"},
		`{"license_server":{}}`:   {},
		`{"license_server":{"port":"1"},"future":1}`: {"port": "1"},
	} {
		rec, _, err := k.decode(Row{Data: []byte(data)}, nil)
		if err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(want, rec.(*xapi.Host).LicenseServer); diff != "" {
			t.Errorf("%s (-want +got)\n%s", data, diff)
		}
	}
}

// TestEveryClassIsReadQuickly writes a record of each class, with its defaults and with more, and reads it back in the
// two ways.
func TestEveryClassIsReadQuickly(t *testing.T) {
	for _, c := range xapi.Datamodel().Ordered {
		k := newCodec(c)
		plain, full := c.New(), c.New()
		for _, f := range k.fields {
			switch p := f.Pointer(full).(type) {
			case *string:
				*p = "grün \"\\\n" + f.Name
			case *int64:
				*p = -1 << 62
			case *bool:
				*p = !*p
			case *map[string]string:
				*p = map[string]string{"": "x", "ключ": "y"}
			case *[]string:
				*p = []string{"a", "b\x01"}
			}
		}
		for _, rec := range []any{plain, full} {
			c.Normalize(rec)
			data, err := k.encode(&object{rec: rec})
			if err != nil {
				t.Fatal(err)
			}
			slow, _, err := k.decodeAny(Row{Data: data})
			if err != nil {
				t.Fatal(err)
			}
			for _, previous := range []any{nil, plain, full} {
				quick, ok := k.quick(data, previous)
				if !ok {
					t.Errorf("%s: not read quickly: %s", c.Name, data)
					continue
				}
				if diff := cmp.Diff(slow, k.defaults(quick)); diff != "" {
					t.Errorf("%s (-slow +quick)\n%s", c.Name, diff)
				}
			}
		}
		if diff := cmp.Diff(newCodec(c).model, k.model); diff != "" {
			t.Errorf("%s: the model has changed\n%s", c.Name, diff)
		}
	}
}
