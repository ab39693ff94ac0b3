package db

import (
	"cmp"
	"fmt"
	"reflect"
	"slices"
	"strings"
	"sync"

	"coppice/internal/xapi"
)

// build fills the tables with all objects of a store, by class ordinal. Nobody has seen the records yet, so that the
// computed sides are made where they are, by all processors. An error is a *CorruptError.
func (l *loader) build(classes [][]*object) error {
	tables := l.tx.tables
	errs := make([]error, len(classes))
	byRef := make([]map[string]*object, len(classes))
	var wg sync.WaitGroup
	for i, objects := range classes {
		if len(objects) == 0 {
			continue
		}
		wg.Go(func() {
			slices.SortFunc(objects, func(a, b *object) int { return strings.Compare(a.ref, b.ref) })
			if errs[i] = tables[i].fill(objects); errs[i] != nil {
				return
			}
			byRef[i] = make(map[string]*object, len(objects))
			for _, o := range objects {
				byRef[i][o.ref] = o
			}
		})
	}
	wg.Wait()
	if err := cmp.Or(errs...); err != nil {
		return err
	}
	var ghosts sync.Mutex
	for i, objects := range classes {
		for _, r := range tables[i].class.Forward {
			if len(objects) > 0 {
				wg.Go(func() { l.connect(r, objects, byRef[l.tx.classes[r.To.Class]], &ghosts) })
			}
		}
	}
	wg.Wait()
	return nil
}

// connect makes the computed sides of one relation. No other relation has that side, so several may be made at once;
// mu guards the ghosts.
func (l *loader) connect(r *xapi.Relation, objects []*object, targets map[string]*object, mu *sync.Mutex) {
	var refs []string
	for _, o := range objects {
		refs = r.From.AppendRefs(refs[:0], o.rec)
		for i, target := range refs {
			if slices.Contains(refs[:i], target) {
				continue
			}
			if to := targets[target]; to != nil {
				r.To.AddRef(to.rec, o.ref)
				if r.From.Type.Kind == xapi.KindRef { // there is one copy of each reference
					reflect.ValueOf(r.From.Pointer(o.rec)).Elem().SetString(to.ref)
				}
				continue
			}
			mu.Lock()
			l.tx.link(r.To, target, o.ref)
			mu.Unlock()
		}
	}
}

// fill adds all objects of a store to an empty table, in the order of their references. Their stamps and seals come
// later.
func (t *table) fill(objects []*object) error {
	taken := func(ref, what, by string) error {
		return &CorruptError{Class: t.class.Name, Ref: ref, Err: fmt.Errorf("%w: the %s of %s", ErrExists, what, by)}
	}
	for i, o := range objects {
		if i > 0 && objects[i-1].ref == o.ref {
			return taken(o.ref, "reference", o.ref)
		}
		t.objects.Load(o.ref, o)
	}
	// Trees are fast to fill in order.
	if t.uuid != nil {
		ids := sortedKeys(objects, t.uuid)
		for i, k := range ids {
			if i > 0 && ids[i-1].text == k.text {
				return taken(k.ref, "uuid", ids[i-1].ref)
			}
			t.byUUID.Load(k.text, k.ref)
		}
	}
	if t.label != nil {
		for _, k := range sortedKeys(objects, t.label) {
			t.byLabel.Load(k)
		}
	}
	return nil
}

// sortedKeys are the references of objects in the order of a text that the objects have.
func sortedKeys(objects []*object, f *xapi.Field) []textKey {
	keys := make([]textKey, len(objects))
	for i, o := range objects {
		keys[i] = textKey{text(f, o.rec), o.ref}
	}
	slices.SortFunc(keys, compareKeys)
	return keys
}
