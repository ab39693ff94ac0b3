package db_test

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"runtime"
	"testing"
	"weak"

	"coppice/internal/db"
	"coppice/internal/xapi"
)

// run opens a database on s, brings it to where a server may use it, calls fn, and closes it.
func run(t *testing.T, s db.Store, fn func(*db.DB)) {
	t.Helper()
	d, err := db.Open(t.Context(), xapi.Datamodel(), s)
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := d.Close(); err != nil {
			t.Error(err)
		}
	}()
	if err := d.Settle(t.Context(), func(*db.Tx) error { return nil }); err != nil {
		t.Fatal(err)
	}
	fn(d)
}

// position is where the database is now.
func position(t *testing.T, d *db.DB) (p db.Position) {
	view(t, d, func(tx *db.Tx) { p = tx.Position() })
	return p
}

// since returns what has become of the VDIs since a position, and whether that is all that is told.
func since(t *testing.T, d *db.DB, p db.Position) (changes map[string]string, known bool) {
	changes = map[string]string{}
	view(t, d, func(tx *db.Tx) {
		after := d.Since(tx, p)
		known = after > 0
		seq, _ := tx.Changes(xapi.ClassOf[xapi.VDI](), after)
		for ch := range seq {
			switch {
			case ch.Deleted:
				changes[ch.Ref] = "del"
			case ch.Created > after:
				changes[ch.Ref] = "add"
			default:
				changes[ch.Ref] = "mod"
			}
		}
	})
	return changes, known
}

func wantSince(t *testing.T, d *db.DB, p db.Position, want map[string]string) {
	t.Helper()
	if got, known := since(t, d, p); !known || !maps.Equal(got, want) {
		t.Errorf("since %+v: %v, known %v, want %v", p, got, known, want)
	}
}

func vdi(tx *db.Tx, ref string) error { return db.InsertAs(tx, xapi.Ref[xapi.VDI](ref), &xapi.VDI{}) }

func rename(ref xapi.Ref[xapi.VDI], label string) func(*db.Tx) error {
	return func(tx *db.Tx) error { return db.Modify(tx, ref, func(v *xapi.VDI) { v.NameLabel = label }) }
}

// historyRows returns the rows of a store that hold its history, by reference.
func historyRows(t *testing.T, s db.Store) map[string][]byte {
	t.Helper()
	_, rows, err := s.Load(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	out := map[string][]byte{}
	for row, err := range rows {
		if err != nil {
			t.Fatal(err)
		}
		if row.Class == "coppice:history" {
			out[row.Ref] = row.Data
		}
	}
	return out
}

// TestHistoryIsBounded makes more entries than there are slots, in several runs: the last ones are known, the first
// ones are not, and the rows are never more than the slots.
func TestHistoryIsBounded(t *testing.T) {
	const slots, steps = 4096, 2100
	s := db.NewMemStore()
	var at []db.Position
	n := 0
	for range 3 {
		run(t, s, func(d *db.DB) {
			if n == 0 {
				update(t, d, func(tx *db.Tx) error { return vdi(tx, "v") })
			}
			for range steps {
				at = append(at, position(t, d))
				n++
				update(t, d, rename("v", fmt.Sprint(n)))
			}
		})
	}
	if rows := historyRows(t, s); len(rows) != slots {
		t.Errorf("%d rows of history, want %d", len(rows), slots)
	}
	run(t, s, func(d *db.DB) {
		// The start of a run counts as a state of its own, and so does the one before the oldest entry.
		oldest := len(at) - slots + 10
		for _, i := range []int{oldest, oldest + 1, 2*steps - 1, 2 * steps, 2*steps + 1, len(at) - 1} {
			wantSince(t, d, at[i], map[string]string{"v": "mod"})
		}
		for _, i := range []int{0, 1, steps, len(at) - slots - 10} {
			if got, known := since(t, d, at[i]); known || !maps.Equal(got, map[string]string{"v": "add"}) {
				t.Errorf("since step %d: %v, known %v", i, got, known)
			}
		}
	})
}

// TestSettle brings back what does not survive a restart: nobody is told of what is as it was, everybody of what is not.
func TestSettle(t *testing.T) {
	s := db.NewMemStore()
	allow := func(tx *db.Tx, ref xapi.Ref[xapi.VDI], ops ...xapi.VDIOperations) error {
		return db.Modify(tx, ref, func(v *xapi.VDI) { v.AllowedOperations = ops })
	}
	operate := func(ref xapi.Ref[xapi.VDI]) func(*db.Tx) error {
		return func(tx *db.Tx) error {
			return db.Modify(tx, ref, func(v *xapi.VDI) {
				v.CurrentOperations = map[string]xapi.VDIOperations{"task": xapi.VDIOperationsCopy}
			})
		}
	}
	var at db.Position
	run(t, s, func(d *db.DB) {
		update(t, d, func(tx *db.Tx) error {
			for _, ref := range []string{"same", "other", "busy", "none"} {
				if err := vdi(tx, ref); err != nil {
					return err
				}
			}
			return cmpErr(allow(tx, "same", "copy"), allow(tx, "other", "copy"), allow(tx, "busy", "copy"))
		})
		update(t, d, operate("busy"))
		at = position(t, d)
		// The operation is older than what the history has room for.
		for i := range 4100 {
			update(t, d, rename("none", fmt.Sprint(i)))
		}
		at = position(t, d)
	})
	d := open(t, s)
	restore := func(tx *db.Tx) error {
		return db.RestoreEach(tx, func(_ *db.Tx, ref xapi.Ref[xapi.VDI], _ *xapi.VDI) []xapi.VDIOperations {
			return map[xapi.Ref[xapi.VDI]][]xapi.VDIOperations{"same": {"copy"}, "other": {"clone"}, "busy": {"copy"}}[ref]
		}, func(v *xapi.VDI, allowed []xapi.VDIOperations) { v.AllowedOperations = allowed })
	}
	err := d.Settle(context.Background(), func(tx *db.Tx) error {
		return cmpErr(rename("none", "4099")(tx), restore(tx))
	})
	if err != nil {
		t.Fatal(err)
	}
	if err := d.Update(t.Context(), restore); !errors.Is(err, db.ErrReadTx) {
		t.Errorf("restoring while the database is in use: %v", err)
	}
	got, known := since(t, d, at)
	delete(got, "other") // which has not changed for so long that it is not known what was told of it
	if want := map[string]string{"busy": "mod"}; !known || !maps.Equal(got, want) {
		t.Errorf("after the restart: %v, known %v, want %v", got, known, want)
	}
	view(t, d, func(tx *db.Tx) {
		if v, err := db.Get[xapi.VDI](tx, "same"); err != nil || len(v.AllowedOperations) != 1 {
			t.Errorf("%+v, %v", v, err)
		}
	})
	at = position(t, d)
	update(t, d, func(tx *db.Tx) error { return allow(tx, "same", "copy", "clone") })
	if got, _ := since(t, d, at); got["same"] != "mod" {
		t.Errorf("after a change that does not survive a restart: %v", got)
	}
}

func cmpErr(errs ...error) error {
	for _, err := range errs {
		if err != nil {
			return err
		}
	}
	return nil
}

// TestHistoryThatCannotBeUsed has others write to a store, or damage its history: then everything counts as created, and
// the history goes on from there.
func TestHistoryThatCannotBeUsed(t *testing.T) {
	for name, spoil := range map[string]func(*testing.T, db.Store){
		"a writer that knows no history": func(t *testing.T, s db.Store) {
			revision, _, err := s.Load(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			err = s.Commit(t.Context(), db.Batch{Revision: revision + 10, Rows: []db.Row{{Class: "VDI", Ref: "w", Data: []byte(`{"uuid":"w"}`)}}})
			if err != nil {
				t.Fatal(err)
			}
		},
		"the last entry is damaged": func(t *testing.T, s db.Store) {
			revision, _, err := s.Load(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			last := fmt.Sprintf("%04d", len(historyRows(t, s))-1)
			if err := s.Commit(t.Context(), db.Batch{Revision: revision, Rows: []db.Row{{Class: "coppice:history", Ref: last, Data: []byte{1, 2}}}}); err != nil {
				t.Fatal(err)
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			s := db.NewMemStore()
			var at db.Position
			run(t, s, func(d *db.DB) {
				update(t, d, func(tx *db.Tx) error { return vdi(tx, "v") })
				at = position(t, d)
				update(t, d, rename("v", "new"))
			})
			spoil(t, s)
			run(t, s, func(d *db.DB) {
				if got, known := since(t, d, at); known || got["v"] != "add" {
					t.Errorf("%v, known %v", got, known)
				}
				at = position(t, d)
				update(t, d, rename("v", "newer"))
			})
			run(t, s, func(d *db.DB) { wantSince(t, d, at, map[string]string{"v": "mod"}) })
		})
	}
}

// TestLookingChangesNothing opens a database, reads it and closes it: the store is as it was, above all its revision, by
// which a copy is recognised that is older than what was made with the original since.
func TestLookingChangesNothing(t *testing.T) {
	s := db.NewMemStore()
	run(t, s, func(d *db.DB) { update(t, d, func(tx *db.Tx) error { return vdi(tx, "v") }) })
	commits := s.Commits()
	before, _, err := s.Load(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	d, err := db.Open(t.Context(), xapi.Datamodel(), s)
	if err != nil {
		t.Fatal(err)
	}
	position(t, d)
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
	after, _, err := s.Load(t.Context())
	if err != nil || after != before || s.Commits() != commits {
		t.Errorf("revision %d and %d commits, want %d and %d; %v", after, s.Commits(), before, commits, err)
	}
}

// TestReplacedRecordsGo replaces a record that was loaded: nothing keeps the old one in memory.
func TestReplacedRecordsGo(t *testing.T) {
	s := db.NewMemStore()
	run(t, s, func(d *db.DB) { update(t, d, func(tx *db.Tx) error { return vdi(tx, "v") }) })
	run(t, s, func(d *db.DB) {
		var loaded weak.Pointer[xapi.VDI]
		view(t, d, func(tx *db.Tx) {
			v, err := db.Get[xapi.VDI](tx, "v")
			if err != nil {
				t.Fatal(err)
			}
			loaded = weak.Make(v)
		})
		update(t, d, rename("v", "new"))
		for range 10 { // what goroutines that have just ended refer to may need more than one
			if runtime.GC(); loaded.Value() == nil {
				return
			}
		}
		t.Error("the record that was replaced is still in memory")
	})
}

// TestRenew makes everything count as created anew, for tokens of this run and of earlier ones.
func TestRenew(t *testing.T) {
	s := db.NewMemStore()
	var at db.Position
	run(t, s, func(d *db.DB) {
		update(t, d, func(tx *db.Tx) error { return vdi(tx, "v") })
		at = position(t, d)
		update(t, d, func(tx *db.Tx) error { tx.Renew(); return nil })
		wantSince(t, d, at, map[string]string{"v": "add"})
	})
	run(t, s, func(d *db.DB) {
		if got, known := since(t, d, at); known || got["v"] != "add" {
			t.Errorf("in the next run: %v, known %v", got, known)
		}
	})
}

// TestCopiesOfADatabase continues two copies of one database: positions of one are unknown to the other.
func TestCopiesOfADatabase(t *testing.T) {
	s := db.NewMemStore()
	run(t, s, func(d *db.DB) { update(t, d, func(tx *db.Tx) error { return vdi(tx, "v") }) })
	dup, err := db.CopyStore(t.Context(), s)
	if err != nil {
		t.Fatal(err)
	}
	var lost db.Position
	run(t, s, func(d *db.DB) {
		update(t, d, rename("v", "lost"))
		lost = position(t, d)
	})
	for range 2 {
		run(t, dup, func(d *db.DB) {
			update(t, d, func(tx *db.Tx) error {
				return db.Modify(tx, "v", func(v *xapi.VDI) { v.NameDescription += "x" })
			})
		})
	}
	run(t, dup, func(d *db.DB) {
		if got, known := since(t, d, lost); known && d.Revision() > lost.Revision || got["v"] != "add" {
			t.Errorf("a position of the other copy: %v, known %v", got, known)
		}
	})
}
