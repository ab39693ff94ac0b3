package xapi

import (
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestRelationSides(t *testing.T) {
	c := ClassOf[VDI]()
	vbds, sr := c.Field("VBDs"), c.Field("SR")
	a := New[VDI]()
	if c.HasComputed(a) {
		t.Error("a new record has computed references")
	}
	vbds.AddRef(a, "1")
	vbds.AddRef(a, "2")
	b := c.Clone(a).(*VDI)
	vbds.AddRef(b, "3")
	if !vbds.RemoveRef(b, "1") || vbds.RemoveRef(b, "1") {
		t.Error("RemoveRef must report that 1 was there once")
	}
	if diff := cmp.Diff([]Ref[VBD]{"1", "2"}, a.VBDs); diff != "" {
		t.Errorf("the older record changed (-want +got)\n%s", diff)
	}
	if diff := cmp.Diff([]Ref[VBD]{"2", "3"}, b.VBDs); diff != "" {
		t.Errorf("(-want +got)\n%s", diff)
	}
	a.SR = "s"
	got := vbds.AppendRefs(sr.AppendRefs(nil, a), a)
	if diff := cmp.Diff([]string{"s", "1", "2"}, got); diff != "" {
		t.Errorf("AppendRefs (-want +got)\n%s", diff)
	}
	a.SR = NullRef
	if got := sr.AppendRefs(nil, a); len(got) != 0 {
		t.Errorf("AppendRefs of a null reference: %v", got)
	}
	n := New[VDI]()
	c.CopyComputed(n, b)
	if !c.HasComputed(n) || len(n.VBDs) != 2 {
		t.Errorf("CopyComputed: %v", n.VBDs)
	}
	if c.CopyComputed(n, nil); c.HasComputed(n) || n.VBDs == nil {
		t.Errorf("CopyComputed from nothing: %v", n.VBDs)
	}
}
