package db

import (
	"runtime"
	"sync"
	"sync/atomic"

	"coppice/internal/xapi"
)

// restoreBatch is for how many objects a goroutine of RestoreEach finds values at a time.
const restoreBatch = 256

// RestoreEach brings back, in the record of each object of a class, what does not survive a restart, other than
// current_operations: find says what it is, and set puts it into the record. All are found, on all processors at once and
// in a transaction to read, before any is set. The objects do not count as modified, unless they have been since the
// database was opened. Only the function of Settle may call it, and what was set stays when Settle fails.
func RestoreEach[T, V any](tx *Tx, find func(*Tx, xapi.Ref[T], *T) V, set func(*T, V)) error {
	if tx.settling == 0 {
		return ErrReadTx
	}
	c := xapi.ClassOf[T]()
	objects := tx.table(c).objects.Values()
	values := make([]V, len(objects))
	var next atomic.Int64
	work := func() {
		reader := &Tx{classes: tx.classes, tables: tx.tables, revision: tx.revision, lasting: tx.lasting}
		for {
			end := int(next.Add(restoreBatch))
			for i := end - restoreBatch; i < min(end, len(objects)); i++ {
				o := objects[i]
				o.verify()
				values[i] = find(reader, xapi.Ref[T](o.ref), o.rec.(*T))
			}
			if end >= len(objects) {
				return
			}
		}
	}
	var wg sync.WaitGroup
	for range min(runtime.GOMAXPROCS(0)-1, len(objects)/restoreBatch) {
		wg.Go(work)
	}
	work()
	wg.Wait()
	for i, o := range objects {
		set(o.rec.(*T), values[i])
		o.seal = sealOf(o.rec)
		if o.modified >= tx.settling { // what the history says of it is from before
			tx.replace(tx.own(c), o, o.rec)
		}
	}
	return nil
}
