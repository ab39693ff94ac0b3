package db_test

import (
	"slices"
	"strings"

	"pgregory.net/rapid"

	"coppice/internal/db"
	"coppice/internal/xapi"
)

func (m *dbModel) check(t *rapid.T) {
	want := m.now.complete()
	_ = m.db.View(func(tx *db.Tx) error {
		if diff := diffRecords(want, actual(tx)); diff != "" {
			t.Fatalf("(-want +got)\n%s", diff)
		}
		for _, name := range modelClasses {
			m.checkIndexes(t, tx, class(name))
			m.checkChanges(t, tx, class(name), rapid.Uint64Range(m.opened, tx.Revision()).Draw(t, "after"))
		}
		return nil
	})
}

func (m *dbModel) checkIndexes(t *rapid.T, tx *db.Tx, c *xapi.Class) {
	if got, want := tx.Count(c), len(m.now[c.Name]); got != want {
		t.Fatalf("%d objects of class %s, want %d", got, c.Name, want)
	}
	byLabel := make(map[string][]string)
	for ref, rec := range m.now[c.Name] {
		if got, ok := tx.UUID(c, c.Field("uuid").Get(rec).(string)); !ok || got != ref {
			t.Fatalf("by uuid: got %q, want %q", got, ref)
		}
		if got, ok := tx.ClassOf(ref); !ok || got != c {
			t.Fatalf("class of %s: %v", ref, got)
		}
		if f := c.Field("name_label"); f != nil {
			label := f.Get(rec).(string)
			byLabel[label] = append(byLabel[label], ref)
		}
	}
	for _, label := range []string{"", "a", "ab", "é\x00\"<", "none"} {
		want := byLabel[label]
		slices.Sort(want)
		if got := tx.Named(c, label); !slices.Equal(got, want) {
			t.Fatalf("named %q: got %v, want %v", label, got, want)
		}
	}
}

func (m *dbModel) checkChanges(t *rapid.T, tx *db.Tx, c *xapi.Class, after uint64) {
	changes, complete := tx.Changes(c, after)
	if !complete {
		t.Fatalf("changes after %d are not complete", after)
	}
	seen := make(map[string]bool)
	for ch := range changes {
		if seen[ch.Ref] {
			t.Fatalf("%s appears twice", ch.Ref)
		}
		seen[ch.Ref] = true
		if ch.Deleted {
			got, want := stamp{ch.Created, ch.Modified}, m.deleted[ch.Ref]
			if m.again[ch.Ref] { // of the first of them
				want.created = min(want.created, got.created)
			}
			if got != want || ch.Created > after {
				t.Fatalf("deletion of %s after %d: %+v, want %+v", ch.Ref, after, got, want)
			}
			continue
		}
		s := m.changed[ch.Ref]
		if ch.Created != s.created || ch.Modified < s.modified || ch.Modified <= after || ch.Rec == nil {
			t.Fatalf("%s after %d: %+v, want %+v", ch.Ref, after, ch, s)
		}
		if s.modified <= after && m.touched[ch.Ref].written <= after {
			t.Fatalf("%s was not touched after %d", ch.Ref, after)
		}
	}
	for ref, s := range m.changed {
		if strings.HasPrefix(ref, "OpaqueRef:"+c.Name+"-") && s.modified > after && !seen[ref] {
			t.Fatalf("%s changed at %d, not reported after %d", ref, s.modified, after)
		}
	}
	for ref, s := range m.deleted {
		if strings.HasPrefix(ref, "OpaqueRef:"+c.Name+"-") && s.modified > after && s.created <= after && !seen[ref] {
			t.Fatalf("%s was deleted at %d, not reported after %d", ref, s.modified, after)
		}
	}
}
