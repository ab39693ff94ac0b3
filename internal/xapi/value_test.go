package xapi

import (
	"errors"
	"fmt"
	"math"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

func mustType(t testing.TB, s string) *Type {
	t.Helper()
	typ, err := Datamodel().Type(s)
	if err != nil {
		t.Fatal(err)
	}
	return typ
}

func TestParse(t *testing.T) {
	some := "x"
	for _, tt := range []struct {
		typ  string
		in   any
		want any
		code string // of the error; empty: success
	}{
		{"string", "abc", "abc", ""},
		{"string", "", "", ""},
		{"string", int64(1), nil, ErrFieldTypeError},
		{"string", nil, nil, ErrFieldTypeError},
		{"string", "\xff", nil, ErrInvalidValue},
		{"int", int64(-7), int64(-7), ""},
		{"int", "9223372036854775807", int64(math.MaxInt64), ""},
		{"int", "9223372036854775808", nil, ErrInvalidValue},
		{"int", "", nil, ErrInvalidValue},
		{"int", "0x10", nil, ErrInvalidValue},
		{"int", 1e9, int64(1000000000), ""},
		{"int", 1.5, nil, ErrInvalidValue},
		{"int", math.NaN(), nil, ErrInvalidValue},
		{"int", true, nil, ErrFieldTypeError},
		{"float", 0.5, 0.5, ""},
		{"float", int64(60), 60.0, ""},
		{"float", "60.1", 60.1, ""},
		{"float", "NaN", nil, ErrInvalidValue},
		{"float", "", nil, ErrInvalidValue},
		{"bool", true, true, ""},
		{"bool", int64(1), true, ""},
		{"bool", int64(2), nil, ErrInvalidValue},
		{"bool", "true", nil, ErrFieldTypeError},
		{"datetime", "20260131T23:59:59Z", time.Date(2026, 1, 31, 23, 59, 59, 0, time.UTC), ""},
		{"datetime", "111T0:0:0", nil, ErrInvalidValue},
		{"enum vdi_type", "user", VDITypeUser, ""},
		{"enum vdi_type", "", nil, ErrInvalidValue},
		{"enum vdi_type", "User", nil, ErrInvalidValue},
		{"VDI ref", "OpaqueRef:1", Ref[VDI]("OpaqueRef:1"), ""},
		{"VDI ref", "", Ref[VDI](NullRef), ""},
		{"VDI ref set", []any{"a", ""}, []Ref[VDI]{"a", NullRef}, ""},
		{"VDI ref set", []any{}, []Ref[VDI]{}, ""},
		{"VDI ref set", "a", nil, ErrFieldTypeError},
		{"VDI ref set", []any{int64(1)}, nil, ErrFieldTypeError},
		{"(string -> string) map", map[string]any{"a": "b"}, map[string]string{"a": "b"}, ""},
		{"(string -> string) map", map[string]any{"a": int64(1)}, nil, ErrFieldTypeError},
		{"(string -> string) map", []any{}, nil, ErrFieldTypeError},
		{"(int -> float) map", map[string]any{"3": int64(1)}, map[int64]float64{3: 1}, ""},
		{"(int -> float) map", map[string]any{"x": int64(1)}, nil, ErrInvalidValue},
		{"(VDI ref -> SR ref) map", map[string]any{"v": "s"}, map[Ref[VDI]]Ref[SR]{"v": "s"}, ""},
		{"(enum vm_operations -> string) map", map[string]any{"bogus": ""}, nil, ErrInvalidValue},
		{"string option", nil, (*string)(nil), ""},
		{"string option", "x", &some, ""},
		{"sr_stat record option", nil, (*SRStat)(nil), ""},
		{"void", "anything", nil, ""},
		{"VDI record", "x", nil, ErrFieldTypeError},
		{"event_batch", map[string]any{}, nil, ErrFieldTypeError},
	} {
		t.Run(fmt.Sprintf("%s/%v", tt.typ, tt.in), func(t *testing.T) {
			typ := mustType(t, tt.typ)
			got, err := typ.ParseAs("p", tt.in)
			if tt.code != "" {
				e, ok := errors.AsType[*Error](err)
				if !ok || e.Code != tt.code {
					t.Fatalf("got %v, %v, want %s", got, err, tt.code)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(tt.want, got); diff != "" {
				t.Errorf("(-want +got)\n%s", diff)
			}
			if typ.GoType() != reflect.TypeOf(got) {
				t.Errorf("Go type is %T, GoType says %v", got, typ.GoType())
			}
		})
	}
}

func TestDecode(t *testing.T) {
	c := Datamodel().Classes["VDI"]
	args := func(extra ...any) map[string]any {
		m := map[string]any{
			"SR": "OpaqueRef:s", "virtual_size": "2097152", "type": "user",
			"sharable": false, "read_only": int64(0), "other_config": map[string]any{"k": "v"},
		}
		for i := 0; i < len(extra); i += 2 {
			if extra[i+1] == nil {
				delete(m, extra[i].(string))
			} else {
				m[extra[i].(string)] = extra[i+1]
			}
		}
		return m
	}
	rec, err := c.Decode(args("name_label", "disk", "uuid", "mine", "nonsense", true, "snapshot_time", "111T0:0:0"))
	if err != nil {
		t.Fatal(err)
	}
	want := New[VDI]()
	want.SR, want.VirtualSize, want.Type, want.NameLabel = "OpaqueRef:s", 2<<20, VDITypeUser, "disk"
	want.OtherConfig = map[string]string{"k": "v"}
	if diff := cmp.Diff(want, rec); diff != "" {
		t.Errorf("(-want +got)\n%s", diff)
	}

	for name, tt := range map[string]struct {
		in   map[string]any
		want string
	}{
		"missing":       {args("virtual_size", nil), "virtual_size of class VDI"},
		"wrong shape":   {args("sm_config", "x"), `FIELD_TYPE_ERROR ["sm_config"]`},
		"empty enum":    {args("type", ""), `INVALID_VALUE ["type" ""]`},
		"negative text": {args("virtual_size", "-"), `INVALID_VALUE ["virtual_size" "-"]`},
	} {
		if _, err := c.Decode(tt.in); err == nil || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%s: got %v, want %s", name, err, tt.want)
		}
	}
	cert := Datamodel().Classes["Certificate"]
	if _, err := cert.Decode(map[string]any{"not_after": "111T0:0:0", "type": ""}); err != nil {
		t.Errorf("zero values of other clients: %v", err)
	}
}

// textEncoder writes one line of text that shows every call.
type textEncoder struct {
	strings.Builder
	comma bool
}

func (e *textEncoder) put(format string, args ...any) {
	if e.comma {
		e.WriteByte(',')
	}
	fmt.Fprintf(e, format, args...)
	e.comma = true
}
func (e *textEncoder) Null()            { e.put("null") }
func (e *textEncoder) Bool(b bool)      { e.put("%v", b) }
func (e *textEncoder) Int(n int64)      { e.put("%d", n) }
func (e *textEncoder) Float(f float64)  { e.put("%gf", f) }
func (e *textEncoder) String(s string)  { e.put("%q", s) }
func (e *textEncoder) Time(d time.Time) { e.put("%s", FormatTime(d)) }
func (e *textEncoder) BeginArray()      { e.put("["); e.comma = false }
func (e *textEncoder) EndArray()        { e.WriteByte(']'); e.comma = true }
func (e *textEncoder) BeginStruct()     { e.put("{"); e.comma = false }
func (e *textEncoder) EndStruct()       { e.WriteByte('}'); e.comma = true }
func (e *textEncoder) Key(k string)     { e.put("%s:", k); e.comma = false }

type text32 struct{ textEncoder }

func (e *text32) Int4(n int64) { e.put("i4:%d", n) }

func encodeText(t testing.TB, typ *Type, v any) string {
	t.Helper()
	var e text32
	if err := typ.Encode(&e, v); err != nil {
		t.Fatal(err)
	}
	return e.Builder.String()
}

func TestEncode(t *testing.T) {
	some := "x"
	for _, tt := range []struct {
		typ  string
		in   any
		want string
	}{
		{"string", "a", `"a"`},
		{"int", int64(5), `5`},
		{"float", 1.0, `1f`},
		{"bool", true, `true`},
		{"datetime", Epoch, `19700101T00:00:00Z`},
		{"datetime", time.Time{}, `19700101T00:00:00Z`},
		{"enum vdi_type", VDITypeUser, `"user"`},
		{"enum vdi_type", "user", `"user"`},
		{"VDI ref", Ref[VDI](""), `"OpaqueRef:NULL"`},
		{"VDI ref", "OpaqueRef:1", `"OpaqueRef:1"`},
		{"VDI ref set", []Ref[VDI](nil), `[]`},
		{"VDI ref set", []string{"b", "a"}, `["b","a"]`},
		{"VDI ref set", []any{"b", Ref[VDI]("a")}, `["b","a"]`},
		{"(string -> string) map", map[string]string(nil), `{}`},
		{"(string -> string) map", map[string]string{"b": "1", "a": "2"}, `{a:"2",b:"1"}`},
		{"(int -> float) map", map[int64]float64{10: 1, 9: 2}, `{9:2f,10:1f}`},
		{"(host ref -> string set) map", map[Ref[Host]][]string{"h": {"x"}}, `{h:["x"]}`},
		{"(VM ref -> (string -> string) map) map", map[Ref[VM]]map[string]string{"v": {"a": "b"}}, `{v:{a:"b"}}`},
		{"string option", (*string)(nil), `null`},
		{"string option", nil, `null`},
		{"string option", &some, `"x"`},
		{"void", nil, `""`},
		{"sr_stat record", &SRStat{Health: SRHealthHealthy}, `{clustered:false,free_space:0,health:"healthy",name_description:"",name_label:"",total_space:0}`},
		{"probe_result record", &ProbeResult{SR: &SRStat{UUID: &some}}, `{complete:false,configuration:{},extra_info:{},` +
			`sr:{clustered:false,free_space:0,health:"",name_description:"",name_label:"",total_space:0,uuid:"x"}}`},
		{"probe_result record", &ProbeResult{}, `{complete:false,configuration:{},extra_info:{}}`},
		{"event_batch", &EventBatch{
			Events: []*Event{
				{ID: 3, Class: "sr_stat", Operation: EventOperationMod, Ref: "r", Snapshot: &SRStat{}},
				{ID: 4, Class: "vdi", Operation: EventOperationDel, Ref: "q", Timestamp: time.Unix(2, 5e8)},
			},
			ValidRefCounts: map[string]int64{"vdi": 1, "host": math.MaxInt32 + 1},
			Token:          "t",
		}, `{events:[{id:"3",timestamp:"0.0",class:"sr_stat",operation:"mod",ref:"r",` +
			`snapshot:{clustered:false,free_space:0,health:"",name_description:"",name_label:"",total_space:0}},` +
			`{id:"4",timestamp:"2.5",class:"vdi",operation:"del",ref:"q"}],valid_ref_counts:{host:2147483648,vdi:i4:1},token:"t"}`},
	} {
		t.Run(tt.typ, func(t *testing.T) {
			if got := encodeText(t, mustType(t, tt.typ), tt.in); got != tt.want {
				t.Errorf("got  %s\nwant %s", got, tt.want)
			}
		})
	}
}

func TestEncodeRefusesWrongTypes(t *testing.T) {
	for _, tt := range []struct {
		typ string
		in  any
	}{
		{"string", 1},
		{"string", nil},
		{"int", "1"},
		{"float", int64(1)},
		{"bool", "true"},
		{"datetime", "20260131T23:59:59Z"},
		{"VDI ref set", []any{1}},
		{"(string -> string) map", map[string]any{"a": 1}},
		{"(string -> string) map", map[string]bool{"a": true}},
		{"VDI record", VDI{}},
		{"VDI record", (*VDI)(nil)},
		{"VDI record", &VM{}},
		{"event record", &Event{Snapshot: 1}},
		{"event_batch", &Event{}},
	} {
		var e textEncoder
		if err := mustType(t, tt.typ).Encode(&e, tt.in); err == nil {
			t.Errorf("%s from %T: no error, wrote %s", tt.typ, tt.in, e.Builder.String())
		}
	}
}

// TestEveryClassEncodes checks for every class that a record has all fields that are not internal, in order.
func TestEveryClassEncodes(t *testing.T) {
	for _, c := range Datamodel().Ordered {
		got := encodeText(t, c.RecordType(), c.New())
		if c.Name == "event" {
			continue
		}
		at := 0
		for _, f := range c.Fields {
			i := strings.Index(got[at:], f.Name+":")
			switch {
			case f.Internal || f.Type.Kind == KindOption:
				if strings.Contains(got, ","+f.Name+":") || strings.HasPrefix(got, "{"+f.Name+":") {
					t.Errorf("%s must not be sent: %s", f, got)
				}
			case i < 0:
				t.Errorf("%s is missing or out of order", f)
			default:
				at += i
			}
		}
		if strings.Contains(got, "null") {
			t.Errorf("class %s has a null: %s", c.Name, got)
		}
	}
}

func TestText(t *testing.T) {
	some := "x"
	for _, tt := range []struct {
		typ  string
		in   any
		want string
	}{
		{"string", "a", "a"},
		{"int", int64(-5), "-5"},
		{"float", 0.25, "0.25"},
		{"bool", false, "false"},
		{"datetime", Epoch, "19700101T00:00:00Z"},
		{"enum vdi_type", VDITypeUser, "user"},
		{"VDI ref", Ref[VDI]("r"), "r"},
		{"string set", []string{"b", "a"}, "b; a"},
		{"(int -> int) map", map[int64]int64{10: 1, 2: 3}, "2: 3; 10: 1"},
		{"string option", &some, "x"},
		{"string option", (*string)(nil), ""},
		{"void", nil, ""},
		{"VDI record", &VDI{}, ""},
	} {
		if got := mustType(t, tt.typ).Text(tt.in); got != tt.want {
			t.Errorf("%s: got %q, want %q", tt.typ, got, tt.want)
		}
	}
}

func TestCloneDiffNormalize(t *testing.T) {
	c := Datamodel().Classes["VDI"]
	a := &VDI{NameLabel: "a", VBDs: []Ref[VBD]{"v"}}
	c.Normalize(a)
	want := New[VDI]()
	want.NameLabel, want.VBDs = "a", []Ref[VBD]{"v"}
	if diff := cmp.Diff(want, a); diff != "" {
		t.Errorf("Normalize (-want +got)\n%s", diff)
	}
	b := c.Clone(a).(*VDI)
	if diff := cmp.Diff(a, b); diff != "" {
		t.Errorf("Clone (-want +got)\n%s", diff)
	}
	if d := c.Diff(a, b); len(d) != 0 {
		t.Errorf("clones differ in %v", d)
	}
	b.OtherConfig["k"] = "v"
	b.CurrentOperations["t"] = VDIOperationsCopy
	b.Tags = append(b.Tags, "t")
	b.VirtualSize, b.Managed, b.SnapshotTime = 1, true, Epoch.Add(time.Second)
	if len(a.OtherConfig) != 0 || len(a.CurrentOperations) != 0 {
		t.Error("the clone shares a map")
	}
	var names []string
	for _, f := range c.Diff(a, b) {
		names = append(names, f.Name)
	}
	if diff := cmp.Diff([]string{"current_operations", "managed", "other_config", "snapshot_time", "tags", "virtual_size"}, names); diff != "" {
		t.Errorf("Diff (-want +got)\n%s", diff)
	}
	f := c.Field("virtual_size")
	f.Set(b, int64(7))
	if f.Get(b) != int64(7) || *f.Pointer(b).(*int64) != 7 {
		t.Errorf("Set then Get: %v", f.Get(b))
	}
}

func TestError(t *testing.T) {
	cause := errors.New("why")
	err := fmt.Errorf("doing: %w", NewError(ErrHandleInvalid, "VDI", "r").WithCause(cause))
	for _, tt := range []struct {
		target error
		want   bool
	}{
		{NewError(ErrHandleInvalid), true},
		{NewError(ErrHandleInvalid, "VDI", "r"), true},
		{NewError(ErrHandleInvalid, "VDI", "s"), false},
		{NewError(ErrHandleInvalid, "VDI"), false},
		{NewError(ErrUUIDInvalid), false},
		{cause, true},
	} {
		if got := errors.Is(err, tt.target); got != tt.want {
			t.Errorf("errors.Is(_, %v) = %v", tt.target, got)
		}
	}
	if got, want := err.Error(), `doing: HANDLE_INVALID ["VDI" "r"]: why`; got != want {
		t.Errorf("got %s, want %s", got, want)
	}
	if got, want := InternalError(cause).Error(), `INTERNAL_ERROR ["why"]`; got != want {
		t.Errorf("got %s, want %s", got, want)
	}
	if diff := cmp.Diff([]string{"INTERNAL_ERROR", "why"}, InternalError(cause).Description()); diff != "" {
		t.Error(diff)
	}
}
