package api

import (
	"iter"

	"coppice/internal/db"
	"coppice/internal/xapi"
)

// View is one consistent state of all objects that a session may read. Records
// are shared: read only. It is valid inside the function it was given to.
type View struct {
	a  *API
	s  *session
	tx *db.Tx
}

// Read calls fn with the present state and returns its error. It counts as a
// use of the session; SESSION_INVALID when there is none. Any role may read,
// except classes whose records the datamodel keeps from it, which look empty.
func (a *API) Read(ref xapi.Ref[xapi.Session], fn func(View) error) error {
	s, err := a.session(ref)
	if err != nil {
		return a.apiError(err)
	}
	if err := a.db.View(func(tx *db.Tx) error { return fn(View{a, s, tx}) }); err != nil {
		return a.apiError(err)
	}
	return nil
}

// readable says whether the session may see records of a class.
func (v View) readable(c *xapi.Class) bool {
	m := v.a.methods[c.Name+".get_record"]
	return m == nil || m.how != Mechanical || v.a.authorize(v.s, m, nil) == nil
}

// Lookup returns the record of an object.
func (v View) Lookup(c *xapi.Class, ref string) (rec any, ok bool) {
	if !v.readable(c) {
		return nil, false
	}
	return v.tx.Lookup(c, ref)
}

// Each yields the objects of a class.
func (v View) Each(c *xapi.Class) iter.Seq2[string, any] {
	if !v.readable(c) {
		return func(func(string, any) bool) {}
	}
	return v.tx.Each(c)
}

// UUID finds an object by its uuid.
func (v View) UUID(c *xapi.Class, uuid string) (ref string, ok bool) {
	if !v.readable(c) {
		return "", false
	}
	return v.tx.UUID(c, uuid)
}

// ClassOf tells the class of an object.
func (v View) ClassOf(ref string) (*xapi.Class, bool) { return v.tx.ClassOf(ref) }
