package db

import (
	"cmp"
	"fmt"
	"reflect"
	"slices"
)

// The history is what lets a revision be understood by later runs. Every batch that goes to the store brings an entry:
// which objects of persistent classes have changed since the entry before, at which revisions. So it is as durable as
// the objects themselves and costs one more row in the same transaction, which also tells of changes that are in memory
// only. The entries are rows of a class that no model has, in a ring of slots of which each new entry takes the oldest;
// rows are never deleted for it, because a batch that deletes may take what a full file system keeps in reserve.
const (
	historyClass   = "coppice:history"
	historySlots   = 4096
	historyChanges = 32 << 10 // in all entries together
	historyFormat  = 2        // 1 was the same without changeBorn
)

// history is the ring of entries in the store. The committer owns it; before and after the committer's life, Open and
// Close do.
type history struct {
	sizes  [historySlots]int // changes in the entry of a slot
	oldest int               // slot of the oldest entry
	count  int               // entries
	total  int               // changes in all of them

	logged uint64 // the revision up to which the entries tell
	first  bool   // there is no entry of this run yet
}

// slot is the reference of the row of a slot.
func slot(n int) string { return fmt.Sprintf("%04d", n%historySlots) }

// next returns the entry that leads to s, in a batch with which the revision of the store goes from basis to ceiling.
func (h *history) next(s *state, basis, ceiling uint64) *entry {
	e := &entry{revision: s.lasting, prev: h.logged, basis: basis, ceiling: ceiling, first: h.first}
	if e.reset = s.renewed > h.logged; e.reset {
		return e
	}
	for _, t := range s.tables {
		if t.class.Persist {
			e.changes = t.since(h.logged, e.changes)
		}
	}
	if len(e.changes) > historyChanges {
		e.reset, e.changes = true, nil
	}
	return e
}

// surplus returns how many of the oldest entries must go for one with n changes.
func (h *history) surplus(n int) int {
	gone, total := 0, h.total+n
	for h.count-gone == historySlots || h.count > gone && total > historyChanges {
		total -= h.sizes[(h.oldest+gone)%historySlots]
		gone++
	}
	return gone
}

// rows returns what adds e to the history in the store.
func (h *history) rows(e *entry) []Row {
	var rows []Row
	for i := range h.surplus(len(e.changes)) {
		rows = append(rows, Row{Class: historyClass, Ref: slot(h.oldest + i), Data: []byte{}})
	}
	return append(rows, Row{Class: historyClass, Ref: slot(h.oldest + h.count), Data: e.encode()})
}

// add takes note that e has been added.
func (h *history) add(e *entry) {
	for range h.surplus(len(e.changes)) {
		h.total -= h.sizes[h.oldest]
		h.sizes[h.oldest] = 0
		h.oldest = (h.oldest + 1) % historySlots
		h.count--
	}
	h.sizes[(h.oldest+h.count)%historySlots] = len(e.changes)
	h.count++
	h.total += len(e.changes)
	h.logged, h.first = e.revision, false
}

// since appends what has changed in the table after a revision, and the objects to which something is being done, in
// whatever entry that began: a crash ends it.
func (t *table) since(after uint64, to []change) []change {
	pivot := &object{modified: after + 1}
	came := func(o *object) change {
		c := change{class: t.class.Name, ref: o.ref}
		if o.created > after {
			c.created, c.born = o.created, o.born
		}
		return c
	}
	t.byStamp.Ascend(pivot, func(o *object) bool {
		c := came(o)
		c.modified, c.told = o.modified, t.digest(o.rec)
		to = append(to, c)
		return true
	})
	t.byTime.Ascend(pivot, func(o *object) bool {
		c := came(o)
		c.modified, c.deleted = o.modified, true
		to = append(to, c)
		return true
	})
	t.busy.Scan(func(ref string, _ struct{}) bool {
		if o, ok := t.objects.Get(ref); ok && o.modified <= after {
			to = append(to, change{class: t.class.Name, ref: ref, told: t.digest(o.rec)})
		}
		return true
	})
	return to
}

// stamp is what the history tells of an object.
type stamp struct {
	created, modified uint64
	born              uint64 // see object
	deleted           bool
	told              uint32
}

// past is the history as it was found in a store.
type past struct {
	ring   history
	base   uint64                       // what stamps do not tell of was not changed after it
	stamps map[string]map[string]*stamp // by class and reference; nil when nothing is known
	runs   []run                        // in ascending order
}

// run is what is known of one run of the program: all changes between two revisions.
type run struct{ from, until uint64 }

// remember makes the past of a store of the given revision from the rows of its history, by slot. What does not lead to
// that revision is not used: it is damaged, or the store was used by somebody who writes no history.
func remember(stored uint64, rows map[string][]byte) (p past) {
	var entries []entry
	newest := 0
	for n := range historySlots {
		e, err := decodeEntry(rows[slot(n)])
		if err != nil {
			continue
		}
		p.ring.sizes[n] = len(e.changes)
		p.ring.total += len(e.changes)
		if len(entries) == 0 || e.ceiling > entries[newest].ceiling {
			newest, p.ring.oldest = len(entries), n+1
		}
		entries = append(entries, e)
	}
	if len(entries) == 0 {
		return p
	}
	// The ring goes on after its newest entry, whatever is of use.
	for p.ring.count = historySlots; len(rows[slot(p.ring.oldest)]) == 0; p.ring.count-- {
		p.ring.oldest++
	}
	p.ring.oldest %= historySlots

	slices.SortFunc(entries, func(x, y entry) int { return cmp.Compare(x.ceiling, y.ceiling) })
	entries = chain(entries, stored)
	if len(entries) == 0 {
		return p
	}
	p.stamps = make(map[string]map[string]*stamp)
	p.base = entries[0].prev
	if entries[0].reset {
		p.base = entries[0].revision
	}
	for i, e := range entries {
		switch {
		case e.reset:
			p.runs = append(p.runs, run{e.revision, e.revision})
		case i == 0 || e.first:
			p.runs = append(p.runs, run{e.prev, e.revision})
		default:
			p.runs[len(p.runs)-1].until = e.revision
		}
		for _, c := range e.changes {
			p.note(c)
		}
	}
	return p
}

// chain returns the last of some entries, in order, that follow one another up to a stored revision.
func chain(entries []entry, stored uint64) []entry {
	from := len(entries)
	for i, e := range slices.Backward(entries) {
		if e.ceiling != stored || from < len(entries) && !entries[from].first && entries[from].prev != e.revision {
			break
		}
		from, stored = i, e.basis
		if e.reset {
			break
		}
	}
	return entries[from:]
}

// note takes over what a later change says of an object.
func (p *past) note(c change) {
	class := p.stamps[c.class]
	if class == nil {
		class = make(map[string]*stamp)
		p.stamps[c.class] = class
	}
	s := class[c.ref]
	if s == nil {
		s = &stamp{created: p.base, modified: p.base}
		class[c.ref] = s
	}
	if c.created > 0 {
		s.created, s.born = c.created, c.born
	}
	if c.modified > 0 {
		s.modified = c.modified
	}
	s.deleted, s.told = c.deleted, c.told
}

// knows says whether all that has changed after a revision of an earlier run is known.
func (p *past) knows(revision uint64) bool {
	return slices.ContainsFunc(p.runs, func(r run) bool { return r.from <= revision && revision <= r.until })
}

// FNV-1a, 64 bits wide: digests of this process and of later ones are compared.
const (
	digestOffset = 14695981039346656037
	digestPrime  = 1099511628211
)

// digest is a fingerprint of the fields of a record that do not survive a restart. Fields at their zero value do not
// count, so that it stays the same when the model gets more of them.
func (t *table) digest(rec any) uint32 {
	var sum uint64
	for _, f := range t.fleeting {
		v := reflect.ValueOf(f.Pointer(rec)).Elem()
		if v.IsZero() || (v.Kind() == reflect.Slice || v.Kind() == reflect.Map) && v.Len() == 0 {
			continue
		}
		sum += digestOf(f.Name, v)
	}
	return uint32(sum ^ sum>>32)
}

// digestOf is the part of a digest that one field makes.
func digestOf(name string, v reflect.Value) uint64 {
	h := hashText(digestOffset, name)
	switch {
	case v.Kind() == reflect.Slice && v.Type().Elem().Kind() == reflect.String:
		for i := range v.Len() {
			h = hashText(h, v.Index(i).String())
		}
	case v.Kind() == reflect.Map && v.Type().Key().Kind() == reflect.String && v.Type().Elem().Kind() == reflect.String:
		var sum uint64 // in any order
		for it := v.MapRange(); it.Next(); {
			sum += hashText(hashText(h, it.Key().String()), it.Value().String())
		}
		h ^= sum
	default:
		h = hashText(h, fmt.Sprint(v.Interface())) // maps are printed in the order of their keys
	}
	return h
}

// hashText continues h with a text and its end.
func hashText(h uint64, s string) uint64 {
	for i := range len(s) {
		h = (h ^ uint64(s[i])) * digestPrime
	}
	return (h ^ 0xff) * digestPrime
}
