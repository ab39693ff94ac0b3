package db

import (
	"bytes"
	"context"
	"encoding/json"
	"iter"
	"runtime"
	"sync"

	"coppice/internal/xapi"
)

// loadBatch is how many rows are decoded at a time.
const loadBatch = 256

// loaded is a row that has been decoded.
type loaded struct {
	row     Row
	codec   *codec
	rec     any
	unknown map[string]json.RawMessage
	err     error
}

// load fills the tables of tx, which nobody else has seen yet, with all rows.
func (tx *Tx) load(m *xapi.Model, rows iter.Seq2[Row, error]) error {
	tx.loading = true
	for l := range tx.decoded(m, rows) {
		if l.err != nil {
			return l.err
		}
		if err := tx.insert(l.codec.class, l.row.Ref, l.rec, l.unknown); err != nil {
			return &CorruptError{Class: l.row.Class, Ref: l.row.Ref, Err: err}
		}
	}
	tx.loading = false
	for _, t := range tx.tables { // links have changed records in place
		t.objects.Scan(func(_ string, o *object) bool {
			o.seal = sealOf(o.rec)
			return true
		})
	}
	return nil
}

// decoded yields the rows of classes that the model knows in their order, up to the first error. They are decoded on
// all processors, a few batches ahead of the caller.
func (tx *Tx) decoded(m *xapi.Model, rows iter.Seq2[Row, error]) iter.Seq[loaded] {
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
					var previous loaded
					for i := range b {
						l := &b[i]
						if l.codec != previous.codec {
							previous.rec = nil
						}
						if l.err == nil {
							l.rec, l.unknown, l.err = l.codec.decode(l.row, previous.rec)
						}
						previous = *l
					}
					out <- b
				})
				return true
			}
			for row, err := range rows {
				c := m.Classes[row.Class]
				switch {
				case err != nil:
					batch = append(batch, loaded{err: err})
				case c == nil:
					continue
				default:
					row.Data = bytes.Clone(row.Data)
					batch = append(batch, loaded{row: row, codec: tx.table(c).codec})
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
