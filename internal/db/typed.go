package db

import (
	"iter"

	"coppice/internal/xapi"
)

// Get returns the record of an object. It is shared: read only. The error is HANDLE_INVALID when there is no
// such object.
func Get[T any](tx *Tx, r xapi.Ref[T]) (*T, error) {
	c := xapi.ClassOf[T]()
	rec, ok := tx.Lookup(c, string(r))
	if !ok {
		return nil, xapi.NewError(xapi.ErrHandleInvalid, c.Name, string(r))
	}
	return rec.(*T), nil
}

// ByUUID returns the object with the given uuid. The error is UUID_INVALID when there is none.
func ByUUID[T any](tx *Tx, uuid string) (xapi.Ref[T], *T, error) {
	c := xapi.ClassOf[T]()
	if ref, ok := tx.UUID(c, uuid); ok {
		rec, err := Get(tx, xapi.Ref[T](ref))
		return xapi.Ref[T](ref), rec, err
	}
	return xapi.NullRef, nil, xapi.NewError(xapi.ErrUUIDInvalid, c.Name, uuid)
}

// ByName returns the references of all objects with the given name_label.
func ByName[T any](tx *Tx, label string) []xapi.Ref[T] {
	refs := []xapi.Ref[T]{}
	for _, ref := range tx.Named(xapi.ClassOf[T](), label) {
		refs = append(refs, xapi.Ref[T](ref))
	}
	return refs
}

// All returns all objects of a class; see Tx.Each.
func All[T any](tx *Tx) iter.Seq2[xapi.Ref[T], *T] {
	return func(yield func(xapi.Ref[T], *T) bool) {
		for ref, rec := range tx.Each(xapi.ClassOf[T]()) {
			if !yield(xapi.Ref[T](ref), rec.(*T)) {
				return
			}
		}
	}
}

// Insert adds an object under a new reference; see Tx.InsertAny.
func Insert[T any](tx *Tx, rec *T) (xapi.Ref[T], error) {
	r := xapi.NewRef[T]()
	if err := InsertAs(tx, r, rec); err != nil {
		return xapi.NullRef, err
	}
	return r, nil
}

// InsertAs adds an object under the given reference; see Tx.InsertAny.
func InsertAs[T any](tx *Tx, r xapi.Ref[T], rec *T) error {
	return tx.InsertAny(xapi.ClassOf[T](), string(r), rec)
}

// Modify changes an object; see Tx.ModifyAny.
func Modify[T any](tx *Tx, r xapi.Ref[T], fn func(*T)) error {
	return tx.ModifyAny(xapi.ClassOf[T](), string(r), func(rec any) { fn(rec.(*T)) })
}

// Delete removes an object; see Tx.DeleteAny.
func Delete[T any](tx *Tx, r xapi.Ref[T]) error {
	return tx.DeleteAny(xapi.ClassOf[T](), string(r))
}
