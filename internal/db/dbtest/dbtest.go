// Package dbtest gives tests databases in memory. A call that fails ends the test.
package dbtest

import (
	"testing"

	"coppice/internal/db"
	"coppice/internal/xapi"
)

// DB is a database that is closed when its test ends.
type DB struct {
	*db.DB
	t testing.TB
}

// Open returns an empty database.
func Open(t testing.TB) *DB {
	t.Helper()
	d, err := db.Open(t.Context(), xapi.Datamodel(), db.NewMemStore())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := d.Close(); err != nil {
			t.Error(err)
		}
	})
	return &DB{d, t}
}

// Change commits what f changes.
func (d *DB) Change(f func(*db.Tx) error) {
	d.t.Helper()
	if err := d.Update(d.t.Context(), f); err != nil {
		d.t.Fatal(err)
	}
}

// Insert adds an object in a transaction of its own.
func Insert[T any](d *DB, rec *T) (ref xapi.Ref[T]) {
	d.t.Helper()
	d.Change(func(tx *db.Tx) (err error) {
		ref, err = db.Insert(tx, rec)
		return err
	})
	return ref
}
