package db

import (
	"cmp"
	"encoding/json"
	"reflect"
	"strings"

	"github.com/tidwall/btree"

	"coppice/internal/xapi"
)

// maxTombstones is how many deletions of a class are remembered.
const maxTombstones = 4096

// degree of the trees. Small nodes make a commit cheap, which copies the path to each object that it touches.
const degree = 16

// object is one version of an object, or its tombstone. It is immutable.
type object struct {
	ref      string
	rec      any // nil in a tombstone
	created  uint64
	modified uint64                     // in a tombstone: the revision of the deletion
	born     uint64                     // when objects before this one had its reference: the creation of the first; otherwise 0
	unknown  map[string]json.RawMessage // stored fields that the model does not know
	seal     seal
}

// first returns the revision from which on clients may have seen an object under the reference.
func (o *object) first() uint64 {
	if o.born > 0 {
		return o.born
	}
	return o.created
}

// table holds the objects of a class with their indexes. The trees are copy-on-write: a table that became
// visible never changes, the writer works on a copy that shares all nodes it does not touch.
type table struct {
	class *xapi.Class
	codec *codec
	uuid  *xapi.Field // nil when the class has no such field
	label *xapi.Field

	fleeting   []*xapi.Field // fields of a persistent class that do not survive a restart
	operations *xapi.Field   // what is being done to an object; nil when the class has no such field

	objects btree.Map[string, *object] // by reference
	byUUID  btree.Map[string, string]  // reference by uuid
	byLabel *btree.BTreeG[textKey]
	byStamp *btree.BTreeG[*object] // by revision of the last modification

	busy btree.Map[string, struct{}] // references of the objects to which something is being done

	graves btree.Map[string, *object] // tombstones by reference
	byTime *btree.BTreeG[*object]     // tombstones by revision of the deletion
	floor  uint64                     // deletions at or before this revision may be forgotten

	changed uint64        // the revision of this version of the table
	next    chan struct{} // closed when a newer version is visible

	// ghosts are records of objects that do not exist but are referred to. Only their computed sides count.
	ghosts btree.Map[string, any]
}

// textKey orders references by a text of their objects, such as name_label.
type textKey struct{ text, ref string }

func compareKeys(a, b textKey) int {
	return cmp.Or(strings.Compare(a.text, b.text), strings.Compare(a.ref, b.ref))
}

func lessKey(a, b textKey) bool { return compareKeys(a, b) < 0 }

func compareStamps(a, b *object) int {
	return cmp.Or(cmp.Compare(a.modified, b.modified), strings.Compare(a.ref, b.ref))
}

func lessStamp(a, b *object) bool { return compareStamps(a, b) < 0 }

func newTable(c *xapi.Class, floor uint64) *table {
	noLocks := btree.Options{NoLocks: true, Degree: degree}
	t := &table{
		class:   c,
		codec:   newCodec(c),
		uuid:    c.Field("uuid"),
		label:   c.Field("name_label"),
		busy:    *btree.NewMap[string, struct{}](degree),
		byLabel: btree.NewBTreeGOptions(lessKey, noLocks),
		byStamp: btree.NewBTreeGOptions(lessStamp, noLocks),
		byTime:  btree.NewBTreeGOptions(lessStamp, noLocks),
		floor:   floor,
		changed: floor,
		next:    make(chan struct{}),
		objects: *btree.NewMap[string, *object](degree),
		byUUID:  *btree.NewMap[string, string](degree),
		graves:  *btree.NewMap[string, *object](degree),
		ghosts:  *btree.NewMap[string, any](degree),
	}
	if !c.Persist {
		return t
	}
	t.operations = c.Field("current_operations")
	for _, f := range c.Fields {
		if !f.Persist && !f.Computed {
			t.fleeting = append(t.fleeting, f)
		}
	}
	return t
}

// clone returns a table of the given revision that can be changed without changing t. Only the writer may call it.
func (t *table) clone(revision uint64) *table {
	return &table{
		class: t.class, codec: t.codec, uuid: t.uuid, label: t.label, floor: t.floor,
		fleeting: t.fleeting, operations: t.operations,
		changed: revision,
		next:    make(chan struct{}),
		objects: *t.objects.Copy(),
		byUUID:  *t.byUUID.Copy(),
		byLabel: t.byLabel.Copy(),
		byStamp: t.byStamp.Copy(),
		busy:    *t.busy.Copy(),
		graves:  *t.graves.Copy(),
		byTime:  t.byTime.Copy(),
		ghosts:  *t.ghosts.Copy(),
	}
}

// text reads a string field of a record; it is empty when the class has no such field.
func text(f *xapi.Field, rec any) string {
	if f == nil {
		return ""
	}
	return *f.Pointer(rec).(*string)
}

// put makes o the current version of its object.
func (t *table) put(o *object) {
	old, had := t.objects.Set(o.ref, o)
	t.byStamp.Set(o)
	uuid, label := text(t.uuid, o.rec), text(t.label, o.rec)
	if had {
		if old.modified != o.modified {
			t.byStamp.Delete(old)
		}
		if was := text(t.uuid, old.rec); was != uuid {
			t.byUUID.Delete(was)
		}
		if was := text(t.label, old.rec); was != label {
			t.byLabel.Delete(textKey{was, o.ref})
		}
	} else if grave, ok := t.graves.Delete(o.ref); ok {
		t.byTime.Delete(grave)
	}
	switch {
	case t.operations == nil:
	case reflect.ValueOf(t.operations.Pointer(o.rec)).Elem().Len() > 0:
		t.busy.Set(o.ref, struct{}{})
	default:
		t.busy.Delete(o.ref)
	}
	if t.uuid != nil {
		t.byUUID.Set(uuid, o.ref)
	}
	if t.label != nil {
		t.byLabel.Set(textKey{label, o.ref})
	}
}

// bury deletes o and leaves a tombstone of the given revision.
func (t *table) bury(o *object, revision uint64) {
	t.objects.Delete(o.ref)
	t.byStamp.Delete(o)
	if t.uuid != nil {
		t.byUUID.Delete(text(t.uuid, o.rec))
	}
	if t.label != nil {
		t.byLabel.Delete(textKey{text(t.label, o.rec), o.ref})
	}
	t.busy.Delete(o.ref)
	t.entomb(&object{ref: o.ref, created: o.created, modified: revision, born: o.born})
}

// entomb adds a tombstone. The oldest ones are dropped.
func (t *table) entomb(grave *object) {
	t.graves.Set(grave.ref, grave)
	t.byTime.Set(grave)
	for t.byTime.Len() > maxTombstones {
		oldest, _ := t.byTime.PopMin()
		t.graves.Delete(oldest.ref)
		t.floor = oldest.modified
	}
}
