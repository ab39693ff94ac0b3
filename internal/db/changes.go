package db

import (
	"context"
	"iter"
	"reflect"
	"slices"

	"coppice/internal/xapi"
)

// Change is what became of an object.
type Change struct {
	Ref      string
	Created  uint64 // when deleted: of the first object that had the reference
	Modified uint64 // or the revision of the deletion
	Deleted  bool
	Rec      any // shared: read only; nil when deleted
}

// Changes returns the objects of a class that were created, modified or deleted after a revision: first the
// living ones in the order of their last modification, then the deleted ones in the order of deletion. Each
// object appears once, with its present state; one that was both created and deleted after the revision does
// not appear, unless there was another one before it under its reference. It costs only what it returns.
//
// It is not complete when deletions after that revision may have been forgotten: too many happened, or the
// revision is older than the last restart. After revision 0, at which there were no objects, it always is.
func (tx *Tx) Changes(c *xapi.Class, after uint64) (changes iter.Seq[Change], complete bool) {
	t := tx.table(c)
	if tx.writable {
		t = tx.own(c).clone(tx.revision)
	}
	pivot := &object{modified: after + 1}
	seq := func(yield func(Change) bool) {
		more := true
		t.byStamp.Ascend(pivot, func(o *object) bool {
			o.verify()
			more = yield(Change{Ref: o.ref, Created: o.created, Modified: o.modified, Rec: o.rec})
			return more
		})
		if !more {
			return
		}
		t.byTime.Ascend(pivot, func(o *object) bool {
			if o.first() > after {
				return true
			}
			return yield(Change{Ref: o.ref, Created: o.first(), Modified: o.modified, Deleted: true})
		})
	}
	return seq, after == 0 || after >= t.floor
}

// LastChange returns the revision after which nothing has happened to some classes; with none of them, to any. Changes
// after it and after any later revision up to that of the state are the same in all later states.
func (tx *Tx) LastChange(classes ...*xapi.Class) (last uint64) {
	if len(classes) == 0 {
		for _, t := range tx.tables {
			last = max(last, t.changed)
		}
	}
	for _, c := range classes {
		last = max(last, tx.table(c).changed)
	}
	return last
}

// Position names a state of the database so that this run and later ones know what has changed since.
type Position struct {
	Revision uint64 // of the state
	Lasting  uint64 // of the last change to what later runs have, too
}

// Position returns the position of the state; in an Update, of the one that it builds on.
func (tx *Tx) Position() Position {
	if tx.writable {
		return Position{tx.revision - 1, tx.lasting}
	}
	return Position{tx.revision, tx.lasting}
}

// Since returns the revision to ask Changes for when p is all that the client knows. It is 0, the beginning, when not
// everything that has happened since p is known: p is of another database or of a state of this one that was given up
// for an older copy, or from so long ago that it is forgotten, or from the last moments before a crash.
func (d *DB) Since(tx *Tx, p Position) (after uint64) {
	switch {
	case p.Revision > tx.revision:
		return 0
	case p.Revision >= d.opened:
		return p.Revision
	case d.past.knows(p.Lasting):
		return p.Lasting
	}
	return 0
}

// Revision returns the revision of the visible state.
func (d *DB) Revision() uint64 { return d.visible.Load().revision }

// Wait returns when the revision is greater than after; with classes, when one of them has changed after that
// revision, so that the waiting are not woken by what does not concern them. It returns the cause of ctx when that
// ends first, or ErrClosed when the database is closed. Any number of goroutines may wait.
func (d *DB) Wait(ctx context.Context, after uint64, classes ...*xapi.Class) error {
	for {
		s := d.visible.Load()
		if s.revision <= after {
			// Nothing has changed, whatever the class.
		} else if len(classes) == 0 || slices.ContainsFunc(classes, func(c *xapi.Class) bool {
			return s.tables[d.classes[c]].changed > after
		}) {
			return nil
		}
		var newer <-chan struct{}
		switch len(classes) {
		case 0:
			newer = s.next
		case 1:
			newer = s.tables[d.classes[classes[0]]].next
		default:
			if err := d.waitAny(ctx, s, classes); err != nil {
				return err
			}
			continue
		}
		select {
		case <-newer:
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-d.closed:
			return ErrClosed
		}
	}
}

// waitAny waits until one of several classes has a newer version than in s.
func (d *DB) waitAny(ctx context.Context, s *state, classes []*xapi.Class) error {
	receive := func(c <-chan struct{}) reflect.SelectCase {
		return reflect.SelectCase{Dir: reflect.SelectRecv, Chan: reflect.ValueOf(c)}
	}
	cases := []reflect.SelectCase{receive(ctx.Done()), receive(d.closed)}
	for _, c := range classes {
		cases = append(cases, receive(s.tables[d.classes[c]].next))
	}
	switch chosen, _, _ := reflect.Select(cases); chosen {
	case 0:
		return context.Cause(ctx)
	case 1:
		return ErrClosed
	default:
		return nil
	}
}
