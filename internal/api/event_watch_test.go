package api

import (
	"context"
	"fmt"
	"maps"
	"math/rand/v2"
	"strconv"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"coppice/internal/db"
	"coppice/internal/rpc"
	"coppice/internal/xapi"
)

// follower is a client that keeps what events tell it.
type follower struct {
	c       *core
	session xapi.Ref[xapi.Session]
	classes []string
	token   string
	seen    map[string]any // records by reference
}

// follow makes one call and returns how many events came.
func (f *follower) follow(timeout float64) int {
	res, err := f.c.try(f.session, "event.from", f.classes, f.token, timeout)
	if err != nil {
		f.c.t.Errorf("%v: %v", f.classes, err)
		return 0
	}
	batch := res.Value.(*xapi.EventBatch)
	order := map[xapi.EventOperation]int{xapi.EventOperationAdd: 0, xapi.EventOperationMod: 1, xapi.EventOperationDel: 2}
	last := 0
	for _, ev := range batch.Events {
		_, known := f.seen[ev.Ref]
		if known != (ev.Operation != xapi.EventOperationAdd) {
			f.c.t.Errorf("%v after %s: %s of %s, which was known: %v", f.classes, f.token, ev.Operation, ev.Ref, known)
		}
		if order[ev.Operation] < last {
			f.c.t.Errorf("%v: %s comes late", f.classes, ev.Operation)
		}
		last = order[ev.Operation]
		if ev.Operation == xapi.EventOperationDel {
			delete(f.seen, ev.Ref)
		} else {
			f.seen[ev.Ref] = ev.Snapshot
		}
	}
	if batch.Token < f.token {
		f.c.t.Errorf("%v: token %s after %s", f.classes, batch.Token, f.token)
	}
	f.token = batch.Token
	return len(batch.Events)
}

// Clients of all kinds and speeds, many of which share their answers, hear of
// everything once, and of nothing that they did not ask for.
func TestWatchersOfAllSpeeds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newCore(t)
		var vms []xapi.Ref[xapi.VM]
		for range 3 {
			vms = append(vms, insert(c, xapi.New[xapi.VM]()))
		}
		kinds := [][]string{
			{"vm"}, {"VM", "pool"}, {"pool", "vm"}, {"*"}, {"vm/" + string(vms[0])}, {"vm/" + string(vms[1]), "host"}, {"vdi"},
		}
		sessions := []xapi.Ref[xapi.Session]{c.root, c.as("read-only")}
		ctx, stop := context.WithCancel(t.Context())
		var all sync.WaitGroup
		var followers []*follower
		for i := range 8 * len(kinds) {
			f := &follower{c, sessions[i%2], kinds[i%len(kinds)], "", map[string]any{}}
			followers = append(followers, f)
			pauses := rand.New(rand.NewPCG(1, uint64(i)))
			all.Go(func() {
				for ctx.Err() == nil {
					f.follow(float64(pauses.IntN(20)) / 10)
					time.Sleep(time.Duration(pauses.IntN(1+i*i)) * time.Millisecond)
				}
			})
		}
		random := rand.New(rand.NewPCG(2, 0))
		for i := range 400 {
			time.Sleep(time.Duration(random.IntN(60)) * time.Millisecond)
			vm := vms[random.IntN(len(vms))]
			switch random.IntN(6) {
			case 0:
				vms = append(vms, insert(c, xapi.New[xapi.VM]()))
			case 1:
				if at := 2 + random.IntN(len(vms)-1); at < len(vms) {
					c.update(func(tx *db.Tx) error { return db.Delete(tx, vms[at]) })
					vms[at] = vms[len(vms)-1]
					vms = vms[:len(vms)-1]
				}
			case 2:
				c.call("pool.set_name_label", c.pool, strconv.Itoa(i))
			default:
				c.call("VM.set_name_label", vm, strconv.Itoa(i))
			}
		}
		stop()
		all.Wait()
		_ = c.db.View(func(tx *db.Tx) error {
			for _, f := range followers {
				for f.follow(0) > 0 {
				}
				want := map[string]any{}
				subs, err := c.parseSubscriptions(f.classes)
				if err != nil {
					t.Fatal(err)
				}
				for _, class := range c.model.Ordered {
					for ref, rec := range tx.Each(class) {
						if class.Events && wants(subs, class, ref) {
							want[ref] = rec
						}
					}
				}
				if !maps.EqualFunc(f.seen, want, func(x, y any) bool { return x == y }) {
					t.Errorf("%v: knows %d objects, there are %d, or they are different ones", f.classes, len(f.seen), len(want))
				}
			}
			return nil
		})
		if n := len(c.watching.groups); n != 0 {
			t.Errorf("%d groups are left", n)
		}
	})
}

// Those that ask the same get the same answer, in each dialect the one that
// they would get alone.
func TestWatchersShareAnAnswer(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newCore(t)
		token := c.from("", 0, "*").Token
		const each = 20
		kinds := [][]string{{"pool"}, {"POOL", "pool"}, {"pool", "host"}, {"pool/" + string(c.pool)}, {"*"}}
		results := make([]Result, each*len(kinds))
		var all sync.WaitGroup
		for i := range results {
			all.Go(func() {
				var err error
				if results[i], err = c.try(c.root, "event.from", kinds[i/each], token, 60.0); err != nil {
					t.Error(err)
				}
			})
		}
		synctest.Wait()
		if n := len(c.watching.groups); n != len(kinds)-1 {
			t.Errorf("%d groups wait", n)
		}
		c.call("pool.set_name_label", c.pool, `a "name" & <more>`)
		all.Wait()
		for i, r := range results {
			if first := results[i/each*each]; r.Value != first.Value {
				t.Errorf("%v: an answer of its own", kinds[i/each])
			}
			all.Go(func() {
				alone := Result{Type: r.Type, Value: r.Value}
				if got, want := asXML(t, r), asXML(t, alone); got != want {
					t.Errorf("%v: got %s, want %s", kinds[i/each], got, want)
				}
				if got, want := asJSON(t, r), asJSON(t, alone); got != want {
					t.Errorf("%v: got %s, want %s", kinds[i/each], got, want)
				}
			})
		}
		all.Wait()
		if results[0].Value != results[each].Value {
			t.Error("the same classes in other words have another answer")
		}
		if n, used := len(c.watching.groups), c.watching.texts.Used(); n != 0 || used != 0 {
			t.Errorf("%d groups and %d bytes of texts are left", n, used)
		}
		// Those that need not wait share theirs as well.
		if first, second := c.from(token, 0, "pool"), c.from(token, 0, "pool"); first != second || len(first.Events) != 1 {
			t.Errorf("the same question has two answers: %s; %s", summary(first), summary(second))
		}
	})
}

// Whoever waits for the others may go: one of them takes over.
func TestWatchersOutliveWhoLeads(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newCore(t)
		token := c.from("", 0, "pool").Token
		begin := time.Now()
		var all sync.WaitGroup
		for i, wait := range []time.Duration{time.Second, 3 * time.Second, 3 * time.Second, time.Hour, time.Minute} {
			all.Go(func() {
				time.Sleep(time.Duration(i)) // in this order
				batch := c.from(token, wait.Seconds(), "pool")
				took, heard := time.Since(begin).Truncate(eventBrief), len(batch.Events)
				if wait < 10*time.Second && (heard != 0 || took != wait) || wait > 10*time.Second && (heard != 1 || took != 10*time.Second+eventBrief) {
					t.Errorf("%d events after %v of %v", heard, took, wait)
				}
			})
		}
		time.Sleep(10 * time.Second)
		c.call("pool.set_name_label", c.pool, "changed")
		all.Wait()
		if n := len(c.watching.groups); n != 0 {
			t.Errorf("%d groups are left", n)
		}
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
			token := formatToken(db.Position{Revision: a.db.Revision(), Lasting: a.db.Revision()})
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
