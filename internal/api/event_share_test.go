package api

import (
	"context"
	"fmt"
	"strconv"
	"sync"
	"testing"
	"testing/synctest"

	"coppice/internal/db"
	"coppice/internal/rpc"
	"coppice/internal/xapi"
)

// Those that are told the same get, in each dialect, what each would get alone.
func TestWatchersShareAText(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newCore(t)
		token := c.from("", 0, "*").Token
		results := make([]Result, 40)
		var all sync.WaitGroup
		for i := range results {
			all.Go(func() {
				var err error
				if results[i], err = c.try(c.root, "event.from", []string{"pool"}, token, 60.0); err != nil {
					t.Error(err)
				}
			})
		}
		synctest.Wait()
		c.call("pool.set_name_label", c.pool, `a "name" & <more>`)
		all.Wait()
		for _, r := range results {
			if r.Value != results[0].Value || r.text == nil || r.text != results[0].text {
				t.Error("an answer or a text of its own")
			}
			all.Go(func() {
				alone := Result{Type: r.Type, Value: r.Value}
				if got, want := asXML(t, r), asXML(t, alone); got != want {
					t.Errorf("got %s, want %s", got, want)
				}
				if got, want := asJSON(t, r), asJSON(t, alone); got != want {
					t.Errorf("got %s, want %s", got, want)
				}
			})
		}
		all.Wait()
	})
}

// Answers do not depend on who asks because every role may read all that there
// are events of.
func TestEventsAreForEveryRole(t *testing.T) {
	c := newCore(t)
	for _, class := range c.model.Ordered {
		m := c.methods[class.Name+".get_record"]
		if !class.Events || m == nil {
			continue
		}
		for _, role := range c.model.Roles {
			if s := (&session{role: role}); c.authorize(s, m, nil) != nil {
				t.Errorf("%s has events, but %s may not read it", class.Name, role)
			}
		}
	}
}

// What one event costs for each of those that watch, from the commit to the
// bytes in JSON; and one of a disk with many snapshots.
func BenchmarkEvents(b *testing.B) {
	for _, bm := range []struct{ watchers, snapshots int }{{1, 0}, {200, 0}, {2000, 0}, {200, 5000}} {
		b.Run(fmt.Sprintf("watchers=%d/snapshots=%d", bm.watchers, bm.snapshots), func(b *testing.B) {
			a, session, _ := benchCore(b)
			ctx, stop := context.WithCancel(b.Context())
			var disk xapi.Ref[xapi.VDI]
			if err := a.db.Update(ctx, func(tx *db.Tx) (err error) {
				if disk, err = db.Insert(tx, xapi.New[xapi.VDI]()); err != nil {
					return err
				}
				for range bm.snapshots {
					snapshot := xapi.New[xapi.VDI]()
					snapshot.SnapshotOf = disk
					if _, err := db.Insert(tx, snapshot); err != nil {
						return err
					}
				}
				return nil
			}); err != nil {
				b.Fatal(err)
			}
			first, err := a.events.From(ctx, nil, "", 0)
			if err != nil {
				b.Fatal(err)
			}
			token := first.Batch.Token
			var all sync.WaitGroup
			heard := make(chan int, bm.watchers)
			for range bm.watchers {
				all.Go(func() {
					for token := token; ; {
						res, err := a.Invoke(ctx, Origin{}, "event.from", []any{string(session), []any{"vdi"}, token, 60.0})
						if err != nil {
							return
						}
						var n counter
						w := rpc.NewJSON(&n)
						if res.Encode(w) != nil || w.Flush() != nil {
							return
						}
						token = res.Value.(*xapi.EventBatch).Token
						heard <- int(n)
					}
				})
			}
			size := 0
			b.ReportAllocs()
			for i := 0; b.Loop(); i++ {
				if err := a.db.Update(ctx, func(tx *db.Tx) error {
					return db.Modify(tx, disk, func(d *xapi.VDI) { d.NameDescription = strconv.Itoa(i) })
				}); err != nil {
					b.Fatal(err)
				}
				for range bm.watchers {
					size = <-heard
				}
			}
			b.ReportMetric(float64(size), "B/answer")
			b.ReportMetric(float64(b.Elapsed().Microseconds())/float64(b.N*bm.watchers), "µs/watcher")
			stop()
			all.Wait()
		})
	}
}

// counter counts what is written to it.
type counter int

func (n *counter) Write(p []byte) (int, error) {
	*n += counter(len(p))
	return len(p), nil
}
