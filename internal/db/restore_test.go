package db_test

import (
	"fmt"
	"testing"

	"coppice/internal/db"
	"coppice/internal/xapi"
)

// TestRestoreEachOfMany finds what many objects have while none has it yet, though each looks at others, and gives each
// its own.
func TestRestoreEachOfMany(t *testing.T) {
	const n = 1100 // no whole number of batches
	s := &rowStore{t: t}
	for i := range n {
		s.rows = append(s.rows, db.Row{Class: "VDI", Ref: string(diskRef(i)), Data: fmt.Appendf(nil,
			`{"uuid":"%08d-0000-0000-0000-000000000000","name_label":"disk %d"}`, i, i)})
	}
	d := open(t, s)
	err := d.Settle(t.Context(), func(tx *db.Tx) error {
		return db.RestoreEach(tx, func(tx *db.Tx, ref xapi.Ref[xapi.VDI], v *xapi.VDI) string {
			for other, record := range db.All[xapi.VDI](tx) {
				if len(record.AllowedOperations) > 0 {
					t.Errorf("%s has something while it is found for %s", other, ref)
				}
				break
			}
			if err := db.Modify(tx, ref, func(*xapi.VDI) {}); err == nil {
				t.Errorf("%s was modified while others are looked at", ref)
			}
			return v.NameLabel
		}, func(v *xapi.VDI, label string) { v.AllowedOperations = []xapi.VDIOperations{xapi.VDIOperations(label)} })
	})
	if err != nil {
		t.Fatal(err)
	}
	view(t, d, func(tx *db.Tx) {
		for i := range n {
			v, err := db.Get(tx, diskRef(i))
			if err != nil || len(v.AllowedOperations) != 1 || string(v.AllowedOperations[0]) != fmt.Sprint("disk ", i) {
				t.Fatalf("disk %d: %+v, %v", i, v, err)
			}
		}
	})
}
