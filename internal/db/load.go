package db

import (
	"context"
	"iter"
	"runtime"
	"slices"
	"sync"

	"coppice/internal/xapi"
)

// loadBatch is how many rows are decoded at a time.
const loadBatch = 256

// loaded is a row and what it says.
type loaded struct {
	row    Row
	codec  *codec
	object *object
	err    error
}

// loader fills the tables of a transaction, which nobody else has seen yet, with all rows of a store.
type loader struct {
	tx     *Tx
	model  *xapi.Model
	stored uint64 // revision of the store

	history map[string][]byte // rows by slot

	past past
	told map[rowKey]uint32 // see DB
}

func (l *loader) load(rows iter.Seq2[Row, error]) error {
	tx := l.tx
	l.history = make(map[string][]byte)
	classes := make([][]*object, len(tx.tables))
	for r := range l.decoded(rows) {
		if r.err != nil {
			return r.err
		}
		i := tx.classes[r.codec.class]
		classes[i] = append(classes[i], r.object)
	}
	var wg sync.WaitGroup
	wg.Go(func() { l.past = remember(l.stored, l.history) })
	err := l.build(classes)
	if wg.Wait(); err != nil {
		return err
	}
	l.told = make(map[rowKey]uint32)
	for i, t := range tx.tables {
		l.stamp(i, t)
	}
	return nil
}

// stamp gives the objects of a table, and its tombstones, the revisions that the history tells.
func (l *loader) stamp(ordinal int, t *table) {
	known := t.class.Persist && l.past.stamps != nil
	if known {
		t.floor = l.past.base
	}
	stamps := l.past.stamps[t.class.Name]
	objects := make([]*object, 0, t.objects.Len())
	t.objects.Scan(func(ref string, o *object) bool {
		o.created, o.modified = t.floor, t.floor
		if s := stamps[ref]; s != nil {
			o.created, o.modified, o.born = s.created, s.modified, s.born
			l.told[rowKey{ordinal, ref}] = s.told
			delete(stamps, ref)
		}
		o.seal = sealOf(o.rec) // links have changed it in place
		objects = append(objects, o)
		return true
	})
	slices.SortFunc(objects, compareStamps)
	for _, o := range objects {
		t.byStamp.Load(o)
	}
	graves := objects[:0]
	for ref, s := range stamps {
		if s.deleted {
			graves = append(graves, &object{ref: ref, created: s.created, modified: s.modified, born: s.born})
		}
	}
	slices.SortFunc(graves, compareStamps)
	for _, grave := range graves {
		t.entomb(grave)
	}
}

// decoded yields the rows of classes that the model knows in their order, up to the first error. They are decoded on
// all processors, a few batches ahead of the caller.
func (l *loader) decoded(rows iter.Seq2[Row, error]) iter.Seq[loaded] {
	return func(yield func(loaded) bool) {
		ctx, stop := context.WithCancel(context.Background())
		batches := make(chan chan []loaded, runtime.GOMAXPROCS(0)) // in order; each gets one batch
		var wg sync.WaitGroup
		defer wg.Wait()
		defer stop()
		wg.Go(func() {
			defer close(batches)
			var batch []loaded
			send := func() bool {
				b, out := batch, make(chan []loaded, 1)
				batch = nil
				select {
				case batches <- out:
				case <-ctx.Done():
					return false
				}
				wg.Go(func() {
					var codec *codec
					var previous any
					for i := range b {
						l := &b[i]
						if l.codec != codec {
							codec, previous = l.codec, nil
						}
						if l.err == nil {
							l.object, l.err = codec.object(l.row, previous)
						}
						if l.err == nil {
							previous = l.object.rec
						}
						l.row.Data = nil
					}
					out <- b
				})
				return true
			}
			for row, err := range rows {
				c := l.model.Classes[row.Class]
				switch {
				case err != nil:
					batch = append(batch, loaded{err: err})
				case row.Class == historyClass:
					l.history[row.Ref] = row.Data
					continue
				case c == nil:
					continue
				default:
					batch = append(batch, loaded{row: row, codec: l.tx.table(c).codec})
				}
				if (len(batch) == loadBatch || err != nil) && !send() || err != nil {
					return
				}
			}
			if len(batch) > 0 {
				send()
			}
		})
		for out := range batches {
			for _, l := range <-out {
				if !yield(l) || l.err != nil {
					return
				}
			}
		}
	}
}
