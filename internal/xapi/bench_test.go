package xapi

import (
	"testing"
	"time"
)

// countEncoder only counts, so that the benchmark shows the cost of the descriptors.
type countEncoder struct{ n int }

func (e *countEncoder) Null()           { e.n++ }
func (e *countEncoder) Bool(bool)       { e.n++ }
func (e *countEncoder) Int(int64)       { e.n++ }
func (e *countEncoder) Float(float64)   { e.n++ }
func (e *countEncoder) String(s string) { e.n += len(s) }
func (e *countEncoder) Time(time.Time)  { e.n++ }
func (e *countEncoder) BeginArray()     { e.n++ }
func (e *countEncoder) EndArray()       { e.n++ }
func (e *countEncoder) BeginStruct()    { e.n++ }
func (e *countEncoder) Key(k string)    { e.n += len(k) }
func (e *countEncoder) EndStruct()      { e.n++ }

func benchVDI() *VDI {
	v := New[VDI]()
	v.NameLabel, v.UUID, v.SR = "a disk", "0165f154-ba3e-034e-6b27-5d271af109ba", NewRef[SR]()
	v.VBDs = []Ref[VBD]{NewRef[VBD]()}
	v.OtherConfig = map[string]string{"xo:backup:job": "1", "content_id": "2"}
	v.AllowedOperations = []VDIOperations{VDIOperationsSnapshot, VDIOperationsClone, VDIOperationsDestroy}
	return v
}

func BenchmarkEncodeVDI(b *testing.B) {
	typ := ClassOf[VDI]().RecordType()
	rec := benchVDI()
	var e countEncoder
	b.ReportAllocs()
	for b.Loop() {
		if err := typ.Encode(&e, rec); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkEncodeVM(b *testing.B) {
	typ := ClassOf[VM]().RecordType()
	rec := New[VM]()
	var e countEncoder
	b.ReportAllocs()
	for b.Loop() {
		if err := typ.Encode(&e, rec); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkCloneVDI(b *testing.B) {
	c, rec := ClassOf[VDI](), benchVDI()
	b.ReportAllocs()
	for b.Loop() {
		c.Clone(rec)
	}
}

func BenchmarkDiffVDI(b *testing.B) {
	c, rec := ClassOf[VDI](), benchVDI()
	other := c.Clone(rec)
	b.ReportAllocs()
	for b.Loop() {
		c.Diff(rec, other)
	}
}

func BenchmarkLoad(b *testing.B) {
	b.ReportAllocs()
	for b.Loop() {
		if _, err := load(datamodelJSON); err != nil {
			b.Fatal(err)
		}
	}
}
