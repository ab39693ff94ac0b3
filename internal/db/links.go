package db

import (
	"slices"

	"coppice/internal/xapi"
)

// relink brings the computed sides up to date after the references of an object changed from those of old to
// those of rec. Either may be nil: the object is inserted or deleted.
func (tx *Tx) relink(c *xapi.Class, ref string, old, rec any) {
	for _, r := range c.Forward {
		var a, b [4]string
		was, is := a[:0], b[:0]
		if old != nil {
			was = r.From.AppendRefs(was, old)
		}
		if rec != nil {
			is = r.From.AppendRefs(is, rec)
		}
		if slices.Equal(was, is) {
			continue
		}
		for i, target := range was {
			if !slices.Contains(is, target) && !slices.Contains(was[:i], target) {
				tx.unlink(r.To, target, ref)
			}
		}
		for i, target := range is {
			if !slices.Contains(was, target) && !slices.Contains(is[:i], target) {
				tx.link(r.To, target, ref)
			}
		}
	}
}

// link adds ref to a computed side of target, or of its ghost.
func (tx *Tx) link(side *xapi.Field, target, ref string) {
	t := tx.own(side.Class)
	if o, ok := t.objects.Get(target); ok {
		rec := side.Class.Clone(o.rec)
		side.AddRef(rec, ref)
		tx.replace(t, o, rec)
		return
	}
	ghost, ok := t.ghosts.Get(target)
	if ok {
		ghost = side.Class.Clone(ghost)
	} else {
		ghost = side.Class.New()
	}
	side.AddRef(ghost, ref)
	t.ghosts.Set(target, ghost)
}

// unlink removes ref from a computed side of target, or of its ghost, which vanishes with its last member.
func (tx *Tx) unlink(side *xapi.Field, target, ref string) {
	t := tx.own(side.Class)
	if o, ok := t.objects.Get(target); ok {
		rec := side.Class.Clone(o.rec)
		side.RemoveRef(rec, ref)
		tx.replace(t, o, rec)
		return
	}
	ghost, _ := t.ghosts.Get(target)
	ghost = side.Class.Clone(ghost)
	side.RemoveRef(ghost, ref)
	if side.Class.HasComputed(ghost) {
		t.ghosts.Set(target, ghost)
	} else {
		t.ghosts.Delete(target)
	}
}
