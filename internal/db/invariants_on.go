//go:build invariants

package db

import (
	"fmt"
	"hash/fnv"
	"reflect"
)

// seal is the fingerprint of a stored record.
type seal uint64

func sealOf(rec any) seal {
	h := fnv.New64a()
	fmt.Fprintf(h, "%#v", reflect.ValueOf(rec).Elem().Interface())
	return seal(h.Sum64())
}

// verify panics when the record was changed after it was stored.
func (o *object) verify() {
	if o.seal != sealOf(o.rec) {
		panic(fmt.Sprintf("db: the shared record of %s was changed: %+v", o.ref, o.rec))
	}
}
