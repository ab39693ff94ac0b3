package db_test

import (
	"errors"
	"fmt"
	"slices"

	"pgregory.net/rapid"

	"coppice/internal/db"
	"coppice/internal/xapi"
)

// refs draws a reference to one of a few objects of a class, which may exist or not.
func refs(class string) *rapid.Generator[string] {
	return rapid.Custom(func(t *rapid.T) string {
		return fmt.Sprintf("OpaqueRef:%s-%d", class, rapid.IntRange(0, 2).Draw(t, class))
	})
}

// fill assigns random values to the fields of a record that matter for relations, indexes and persistence.
func fill(t *rapid.T, rec any) {
	c := xapi.Datamodel().ClassOfRecord(rec)
	for _, f := range c.Fields {
		if f.Computed || f.Name == "uuid" || rapid.Bool().Draw(t, f.Name) {
			continue
		}
		switch {
		case f.Type.Kind == xapi.KindRef && slices.Contains(modelClasses, f.Type.Class):
			ref := xapi.NullRef
			if rapid.Bool().Draw(t, "set") {
				ref = refs(f.Type.Class).Draw(t, f.Name)
			}
			v, err := f.Type.Parse(ref)
			if err != nil {
				t.Fatal(err)
			}
			f.Set(rec, v)
		case f.Type.Kind == xapi.KindSet && f.Type.Elem.Class == "VM_group":
			f.Set(rec, f.Type.Zero())
			for _, ref := range rapid.SliceOfN(refs("VM_group"), 0, 3).Draw(t, f.Name) {
				f.AddRef(rec, ref)
			}
		case f.Name == "name_label":
			f.Set(rec, rapid.SampledFrom([]string{"", "a", "ab", "é\x00\"<"}).Draw(t, "label"))
		case f.Name == "other_config":
			f.Set(rec, map[string]string{"k": rapid.SampledFrom([]string{"1", "2"}).Draw(t, "value")})
		case f.Name == "virtual_size" || f.Name == "user_version":
			f.Set(rec, rapid.Int64().Draw(t, f.Name))
		case f.Name == "current_operations":
			v, err := f.Type.Parse(map[string]any{"t": f.Type.Elem.Values()[0]})
			if err != nil {
				t.Fatal(err)
			}
			f.Set(rec, v)
		}
	}
}

// step makes one random change to both sides, or checks that it is refused.
func step(t *rapid.T, tx *db.Tx, now records, written map[string]touch) {
	name := rapid.SampledFrom(modelClasses).Draw(t, "class")
	c, ref := class(name), refs(name).Draw(t, "ref")
	old := now[name][ref]
	write := func(ref string) { written[ref] = touch{tx.Revision(), written[ref].inserted} }
	touchAll := func(rec any) {
		write(ref)
		for _, r := range c.Forward {
			for _, target := range r.From.AppendRefs(nil, rec) {
				write(target)
			}
		}
	}
	switch rapid.SampledFrom([]string{"insert", "modify", "modify", "delete", "touch"}).Draw(t, "op") {
	case "insert":
		rec := c.New()
		c.Field("uuid").Set(rec, "uuid of "+ref)
		fill(t, rec)
		want := c.Clone(rec)
		switch err := tx.InsertAny(c, ref, rec); {
		case old == nil && err == nil:
			now[name][ref] = want
			touchAll(want)
			written[ref] = touch{tx.Revision(), tx.Revision()}
		case old == nil || !errors.Is(err, db.ErrExists):
			t.Fatalf("insert %s, exists %v: %v", ref, old != nil, err)
		}
	case "modify":
		var want any
		err := tx.ModifyAny(c, ref, func(rec any) { fill(t, rec); want = c.Clone(rec) })
		if old != nil && err == nil {
			touchAll(old)
			touchAll(want)
			now[name][ref] = want
		} else if old != nil || !errors.Is(err, xapi.NewError(xapi.ErrHandleInvalid, name, ref)) {
			t.Fatalf("modify %s, exists %v: %v", ref, old != nil, err)
		}
	case "delete":
		if err := tx.DeleteAny(c, ref); (err == nil) != (old != nil) {
			t.Fatalf("delete %s, exists %v: %v", ref, old != nil, err)
		}
		if old != nil {
			touchAll(old)
			delete(now[name], ref)
		}
	case "touch":
		if err := tx.Touch(c, ref); (err == nil) != (old != nil) {
			t.Fatalf("touch %s, exists %v: %v", ref, old != nil, err)
		}
		write(ref)
	}
}
