package db

import (
	"fmt"
	"iter"
	"slices"

	"github.com/google/uuid"

	"coppice/internal/xapi"
)

// Tx is a transaction: a state of the database to read and, in an Update, to change. It is for the goroutine
// that runs the function, and only until the function returns. The records it returns stay valid.
type Tx struct {
	classes  map[*xapi.Class]int
	tables   []*table
	revision uint64
	lasting  uint64 // see state; in an Update, of the one that it builds on

	// Only in an Update:
	writable bool
	owned    []bool // tables that are already a copy of our own
	changed  bool
	sync     bool     // the history shall tell of the state
	renewed  bool     // everything counts as created by this transaction
	settling uint64   // in Settle, the revision at which the database was opened: older records may be changed where they are
	dirty    []rowKey // persistent objects that changed, in order of their first change
	isDirty  map[rowKey]struct{}
}

// rowKey names an object by class ordinal and reference.
type rowKey struct {
	class int
	ref   string
}

// Revision returns the revision of the state. In an Update it is the one that the commit will get.
func (tx *Tx) Revision() uint64 { return tx.revision }

func (tx *Tx) table(c *xapi.Class) *table { return tx.tables[tx.classes[c]] }

// own returns the table of c for writing.
func (tx *Tx) own(c *xapi.Class) *table {
	i := tx.classes[c]
	if !tx.owned[i] {
		tx.tables[i] = tx.tables[i].clone(tx.revision)
		tx.owned[i] = true
	}
	return tx.tables[i]
}

// Lookup returns the record of an object. It is shared: read only.
func (tx *Tx) Lookup(c *xapi.Class, ref string) (rec any, ok bool) {
	o, ok := tx.table(c).objects.Get(ref)
	if !ok {
		return nil, false
	}
	o.verify()
	return o.rec, true
}

// UUID returns the reference of the object with the given uuid.
func (tx *Tx) UUID(c *xapi.Class, uuid string) (ref string, ok bool) {
	return tx.table(c).byUUID.Get(uuid)
}

// Named returns the references of all objects with the given name_label, in order.
func (tx *Tx) Named(c *xapi.Class, label string) []string {
	refs := []string{}
	tx.table(c).byLabel.Ascend(textKey{text: label}, func(k textKey) bool {
		if k.text != label {
			return false
		}
		refs = append(refs, k.ref)
		return true
	})
	return refs
}

// Each returns all objects of a class in the order of their references. In an Update it shows the state at
// the time when the iteration starts, so its body may change the class.
func (tx *Tx) Each(c *xapi.Class) iter.Seq2[string, any] {
	return func(yield func(string, any) bool) {
		objects := &tx.table(c).objects
		if tx.writable {
			objects = objects.Copy()
		}
		objects.Scan(func(ref string, o *object) bool {
			o.verify()
			return yield(ref, o.rec)
		})
	}
}

// Count returns how many objects a class has.
func (tx *Tx) Count(c *xapi.Class) int { return tx.table(c).objects.Len() }

// ClassOf returns the class of the object with the given reference.
func (tx *Tx) ClassOf(ref string) (*xapi.Class, bool) {
	for _, t := range tx.tables {
		if _, ok := t.objects.Get(ref); ok {
			return t.class, true
		}
	}
	return nil, false
}

// InsertAny adds an object. The record belongs to the database from now on: it gets a uuid if it has none,
// is normalised (see xapi.Class.Normalize), and its computed sides are set to what refers to ref. The error
// is ErrExists when the reference or the uuid is taken.
func (tx *Tx) InsertAny(c *xapi.Class, ref string, rec any) error {
	if !tx.writable {
		return ErrReadTx
	}
	t := tx.table(c)
	if _, ok := t.objects.Get(ref); ok {
		return fmt.Errorf("%w: %s %s", ErrExists, c.Name, ref)
	}
	if t.uuid != nil && text(t.uuid, rec) == "" {
		t.uuid.Set(rec, uuid.NewString())
	}
	if taken, ok := t.byUUID.Get(text(t.uuid, rec)); ok && t.uuid != nil {
		return fmt.Errorf("%w: %s %s has the uuid of %s", ErrExists, c.Name, ref, taken)
	}
	c.Normalize(rec)
	t = tx.own(c)
	o := &object{ref: ref, rec: rec, created: tx.revision, modified: tx.revision}
	if grave, ok := t.graves.Get(ref); ok {
		o.born = grave.first()
	}
	ghost, _ := t.ghosts.Delete(ref)
	c.CopyComputed(rec, ghost)
	o.seal = sealOf(rec)
	t.put(o)
	tx.changed = true
	tx.mark(c, ref)
	tx.relink(c, ref, nil, rec)
	return nil
}

// ModifyAny replaces the record of an object by a clone that fn changed. When fn changes nothing, nothing
// happens: the object does not count as modified. Assignments to computed sides are undone. The error is
// HANDLE_INVALID when there is no such object, and ErrExists when fn assigns a uuid that is taken.
func (tx *Tx) ModifyAny(c *xapi.Class, ref string, fn func(rec any)) error {
	if !tx.writable {
		return ErrReadTx
	}
	old, ok := tx.table(c).objects.Get(ref)
	if !ok {
		return xapi.NewError(xapi.ErrHandleInvalid, c.Name, ref)
	}
	old.verify()
	rec := c.Clone(old.rec)
	fn(rec)
	c.Normalize(rec)
	c.CopyComputed(rec, old.rec)
	diff := c.Diff(old.rec, rec)
	if len(diff) == 0 {
		return nil
	}
	t := tx.own(c)
	if t.uuid != nil && slices.Contains(diff, t.uuid) {
		if taken, ok := t.byUUID.Get(text(t.uuid, rec)); ok {
			return fmt.Errorf("%w: %s %s would have the uuid of %s", ErrExists, c.Name, ref, taken)
		}
	}
	if slices.ContainsFunc(diff, func(f *xapi.Field) bool { return f.Persist }) {
		tx.mark(c, ref)
	}
	tx.replace(t, old, rec)
	tx.relink(c, ref, old.rec, rec)
	return nil
}

// Touch counts an object as modified without changing it. The error is HANDLE_INVALID when there is none.
func (tx *Tx) Touch(c *xapi.Class, ref string) error {
	if !tx.writable {
		return ErrReadTx
	}
	o, ok := tx.table(c).objects.Get(ref)
	if !ok {
		return xapi.NewError(xapi.ErrHandleInvalid, c.Name, ref)
	}
	tx.replace(tx.own(c), o, o.rec)
	return nil
}

// DeleteAny removes an object. References to it dangle. The error is HANDLE_INVALID when there is none.
func (tx *Tx) DeleteAny(c *xapi.Class, ref string) error {
	if !tx.writable {
		return ErrReadTx
	}
	o, ok := tx.table(c).objects.Get(ref)
	if !ok {
		return xapi.NewError(xapi.ErrHandleInvalid, c.Name, ref)
	}
	tx.relink(c, ref, o.rec, nil)
	t := tx.own(c)
	o, _ = t.objects.Get(ref) // it may have referred to itself
	t.bury(o, tx.revision)
	if c.HasComputed(o.rec) {
		ghost := c.New()
		c.CopyComputed(ghost, o.rec)
		t.ghosts.Set(ref, ghost)
	}
	tx.changed = true
	tx.mark(c, ref)
	return nil
}

// replace stores rec as the new version of old.
func (tx *Tx) replace(t *table, old *object, rec any) {
	t.put(&object{
		ref: old.ref, rec: rec, created: old.created, modified: tx.revision, born: old.born,
		unknown: old.unknown, seal: sealOf(rec),
	})
	tx.changed = true
}

// Renew makes everything count as created by this Update, so that older tokens select everything. It is for a program
// that makes something else of the same objects than the one that had them before.
func (tx *Tx) Renew() {
	for i, old := range tx.tables {
		t := newTable(old.class, tx.revision)
		t.codec, t.ghosts = old.codec, *old.ghosts.Copy()
		old.objects.Scan(func(_ string, o *object) bool {
			anew := *o
			anew.created, anew.modified, anew.born = tx.revision, tx.revision, 0
			t.put(&anew)
			return true
		})
		tx.tables[i], tx.owned[i] = t, true
	}
	tx.changed, tx.renewed = true, true
}

// mark remembers that the row of an object must be written, if its class has rows.
func (tx *Tx) mark(c *xapi.Class, ref string) {
	if !c.Persist {
		return
	}
	key := rowKey{tx.classes[c], ref}
	if _, ok := tx.isDirty[key]; ok {
		return
	}
	if tx.isDirty == nil {
		tx.isDirty = make(map[rowKey]struct{})
	}
	tx.isDirty[key] = struct{}{}
	tx.dirty = append(tx.dirty, key)
}

// rows encodes what the transaction changed in persistent classes.
func (tx *Tx) rows() ([]Row, error) {
	rows := make([]Row, 0, len(tx.dirty))
	for _, key := range tx.dirty {
		t := tx.tables[key.class]
		row := Row{Class: t.class.Name, Ref: key.ref}
		if o, ok := t.objects.Get(key.ref); ok {
			data, err := t.codec.encode(o)
			if err != nil {
				return nil, err
			}
			row.Data = data
		}
		rows = append(rows, row)
	}
	return rows, nil
}
