package event

import (
	"context"
	"fmt"
	"maps"
	"math/rand/v2"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"coppice/internal/db"
	"coppice/internal/db/dbtest"
	"coppice/internal/rpc"
	"coppice/internal/xapi"
)

// follower is a client that keeps what events tell it.
type follower struct {
	h       *harness
	classes []string
	token   string
	seen    map[string]any // records by reference
}

// follow makes one call and returns how many events came.
func (f *follower) follow(timeout float64) int {
	batch := f.h.from(f.token, timeout, f.classes...)
	order := map[xapi.EventOperation]int{xapi.EventOperationAdd: 0, xapi.EventOperationMod: 1, xapi.EventOperationDel: 2}
	last := 0
	for _, ev := range batch.Events {
		_, known := f.seen[ev.Ref]
		if known != (ev.Operation != xapi.EventOperationAdd) {
			f.h.t.Errorf("%v after %s: %s of %s, which was known: %v", f.classes, f.token, ev.Operation, ev.Ref, known)
		}
		if order[ev.Operation] < last {
			f.h.t.Errorf("%v: %s comes late", f.classes, ev.Operation)
		}
		last = order[ev.Operation]
		if ev.Operation == xapi.EventOperationDel {
			delete(f.seen, ev.Ref)
		} else {
			f.seen[ev.Ref] = ev.Snapshot
		}
	}
	if batch.Token < f.token {
		f.h.t.Errorf("%v: token %s after %s", f.classes, batch.Token, f.token)
	}
	f.token = batch.Token
	return len(batch.Events)
}

// Clients of all kinds and speeds, many of which share their answers, hear of
// everything once, and of nothing that they did not ask for.
func TestWatchersOfAllSpeeds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := newHarness(t)
		var vms []xapi.Ref[xapi.VM]
		for range 3 {
			vms = append(vms, dbtest.Insert(h.objects, xapi.New[xapi.VM]()))
		}
		kinds := [][]string{
			{"vm"}, {"VM", "pool"}, {"pool", "vm"}, {"*"}, {"vm/" + string(vms[0])}, {"vm/" + string(vms[1]), "host"}, {"vdi"},
		}
		ctx, stop := context.WithCancel(t.Context())
		var all sync.WaitGroup
		var followers []*follower
		for i := range 8 * len(kinds) {
			f := &follower{h, kinds[i%len(kinds)], "", map[string]any{}}
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
				vms = append(vms, dbtest.Insert(h.objects, xapi.New[xapi.VM]()))
			case 1:
				if at := 2 + random.IntN(len(vms)-1); at < len(vms) {
					h.objects.Change(func(tx *db.Tx) error { return db.Delete(tx, vms[at]) })
					vms[at] = vms[len(vms)-1]
					vms = vms[:len(vms)-1]
				}
			case 2:
				h.rename(strconv.Itoa(i))
			default:
				h.describe(vm, strconv.Itoa(i))
			}
		}
		stop()
		all.Wait()
		_ = h.db.View(func(tx *db.Tx) error {
			for _, f := range followers {
				for f.follow(0) > 0 {
				}
				want := map[string]any{}
				subs, err := h.subscriptions(f.classes)
				if err != nil {
					t.Fatal(err)
				}
				for _, class := range h.model.Ordered {
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
		if n := len(h.watchers.groups); n != 0 {
			t.Errorf("%d groups are left", n)
		}
	})
}

// Those that ask the same get the same answer, whose text is made once and kept
// no longer than it is sent.
func TestWatchersShareAnAnswer(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := newHarness(t)
		token := h.from("", 0, "*").Token
		const each = 20
		kinds := [][]string{{"pool"}, {"POOL", "pool"}, {"pool", "host"}, {"pool/" + string(h.pool)}, {"*"}}
		results := make([]*Answer, each*len(kinds))
		var all sync.WaitGroup
		for i := range results {
			all.Go(func() {
				var err error
				if results[i], err = h.From(t.Context(), kinds[i/each], token, 60); err != nil {
					t.Error(err)
				}
			})
		}
		synctest.Wait()
		if n := len(h.watchers.groups); n != len(kinds)-1 {
			t.Errorf("%d groups wait", n)
		}
		h.rename("a name")
		all.Wait()
		kind := h.model.Classes["event"].Methods["from"].Result
		for i, r := range results {
			if first := results[i/each*each]; r != first {
				t.Errorf("%v: an answer of its own", kinds[i/each])
			}
			all.Go(func() {
				text, err := rpc.XMLValue(func(e rpc.Encoder) error {
					return e.(rpc.Sharer).Shared(r.Text, func(e rpc.Encoder) error { return kind.Encode(e, r.Batch) })
				})
				if err != nil || !strings.Contains(text, "a name") {
					t.Errorf("%v: sent %q, %v", kinds[i/each], text, err)
				}
			})
		}
		all.Wait()
		if results[0] != results[each] {
			t.Error("the same classes in other words have another answer")
		}
		if n, used := len(h.watchers.groups), h.watchers.texts.Used(); n != 0 || used != 0 {
			t.Errorf("%d groups and %d bytes of texts are left", n, used)
		}
		// Those that need not wait share theirs as well.
		if first, second := h.from(token, 0, "pool"), h.from(token, 0, "pool"); first != second || len(first.Events) != 1 {
			t.Errorf("the same question has two answers: %s; %s", summary(first), summary(second))
		}
	})
}

// Whoever waits for the others may go: one of them takes over.
func TestWatchersOutliveWhoLeads(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := newHarness(t)
		token := h.from("", 0, "pool").Token
		begin := time.Now()
		var all sync.WaitGroup
		for i, wait := range []time.Duration{time.Second, 3 * time.Second, 3 * time.Second, time.Hour, time.Minute} {
			all.Go(func() {
				time.Sleep(time.Duration(i)) // in this order
				batch := h.from(token, wait.Seconds(), "pool")
				took, heard := time.Since(begin).Truncate(briefPause), len(batch.Events)
				if wait < 10*time.Second && (heard != 0 || took != wait) || wait > 10*time.Second && (heard != 1 || took != 10*time.Second+briefPause) {
					t.Errorf("%d events after %v of %v", heard, took, wait)
				}
			})
		}
		time.Sleep(10 * time.Second)
		h.rename("changed")
		all.Wait()
		if n := len(h.watchers.groups); n != 0 {
			t.Errorf("%d groups are left", n)
		}
	})
}

// Thousands may wait, each for something else, at some KiB each.
func TestThousandsOfWatchers(t *testing.T) {
	const watchers = 5000
	synctest.Test(t, func(t *testing.T) {
		h := newHarness(t)
		vm, other := dbtest.Insert(h.objects, xapi.New[xapi.VM]()), dbtest.Insert(h.objects, xapi.New[xapi.VM]())
		token := h.from("", 0, "*").Token
		heap := func() int64 {
			var m runtime.MemStats
			runtime.GC()
			runtime.ReadMemStats(&m)
			return int64(m.HeapAlloc + m.StackInuse)
		}
		before := heap()
		var all sync.WaitGroup
		var heard, idle atomic.Int64
		for i := range watchers {
			all.Go(func() {
				classes := []string{"vm/" + string(vm)}
				if i%2 == 1 {
					classes = []string{"vm/" + string(other)}
				}
				if batch := h.from(token, 600, classes...); len(batch.Events) == 1 {
					heard.Add(1)
				} else {
					idle.Add(1)
				}
			})
		}
		synctest.Wait()
		if each := (heap() - before) / watchers; each > 64<<10 {
			t.Errorf("a watcher takes %d bytes", each)
		}
		for i := range 100 { // what nobody watches wakes nobody for good
			h.rename(fmt.Sprint(i))
		}
		h.describe(vm, "changed")
		time.Sleep(time.Second)
		if n := heard.Load(); n != watchers/2 {
			t.Errorf("%d have heard of it, want %d", n, watchers/2)
		}
		all.Wait()
		if n := idle.Load(); n != watchers/2 {
			t.Errorf("%d waited in vain, want %d", n, watchers/2)
		}
	})
}
