package claim

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"coppice/internal/db"
	"coppice/internal/db/dbtest"
	"coppice/internal/xapi"

	"github.com/google/go-cmp/cmp"
)

// patience is how long the calls of these tests wait.
const patience = 2 * time.Hour

// harness is the queue of a database that has a pool and a host, and its calls.
type harness struct {
	t     *testing.T
	db    *dbtest.DB
	queue *Queue
	pool  xapi.Ref[xapi.Pool]
	host  xapi.Ref[xapi.Host]

	mu        sync.Mutex
	running   map[xapi.Ref[xapi.Task]]bool
	refreshed []string // references, in the order in which the rules were asked
}

// call is a holder while its call runs.
type call struct {
	*Holder
	h *harness
}

func newHarness(t *testing.T) *harness {
	t.Helper()
	d := dbtest.Open(t)
	h := &harness{t: t, db: d, running: map[xapi.Ref[xapi.Task]]bool{}}
	h.queue = New(d.DB, xapi.Datamodel(), slog.New(slog.DiscardHandler), Rules{
		Runs: func(task xapi.Ref[xapi.Task]) bool {
			h.mu.Lock()
			defer h.mu.Unlock()
			return h.running[task]
		},
		Refresh: func(_ *db.Tx, class, ref string) error {
			h.mu.Lock()
			defer h.mu.Unlock()
			h.refreshed = append(h.refreshed, ref)
			return nil
		},
	})
	h.host = dbtest.Insert(h.db, xapi.New[xapi.Host]())
	h.pool = dbtest.Insert(h.db, xapi.New[xapi.Pool]())
	return h
}

// begun is a call that runs.
func (h *harness) begun() call {
	c := call{h.queue.Holder(xapi.NewRef[xapi.Task](), "host.evacuate"), h}
	h.mu.Lock()
	defer h.mu.Unlock()
	h.running[c.task] = true
	return c
}

// evacuates has the call take a host, which must be free, and returns what gives it back.
func (c call) evacuates(host xapi.Ref[xapi.Host]) (release func()) {
	c.h.t.Helper()
	release, err := c.Take(c.h.t.Context(), patience, nil, On(host, evacuate))
	if err != nil {
		c.h.t.Fatal(err)
	}
	return release
}

// wantIdle expects that nobody waits.
func (h *harness) wantIdle() {
	h.t.Helper()
	if n := h.queue.Waiting(); n != 0 {
		h.t.Errorf("%d still wait", n)
	}
}

func (c call) end() {
	c.End(nil)
	c.h.mu.Lock()
	defer c.h.mu.Unlock()
	delete(c.h.running, c.task)
}

// record reads an object.
func record[T any](h *harness, ref xapi.Ref[T]) (rec *T) {
	h.t.Helper()
	err := h.db.View(func(tx *db.Tx) (err error) {
		rec, err = db.Get(tx, ref)
		return err
	})
	if err != nil {
		h.t.Fatal(err)
	}
	return rec
}

// description is the code and the parameters of an API error, joined; the text of any other.
func description(err error) string {
	if e, ok := errors.AsType[*xapi.Error](err); ok {
		return strings.Join(e.Description(), "|")
	}
	return fmt.Sprint(err)
}

// exclusive is a check that lets one operation at a time happen to a host,
// apart from "shared" ones.
func (h *harness) exclusive(host xapi.Ref[xapi.Host], shared ...xapi.HostAllowedOperations) func(*db.Tx) error {
	return func(tx *db.Tx) error {
		rec, err := db.Get(tx, host)
		if err != nil {
			return err
		}
		for _, task := range slices.Sorted(maps.Keys(rec.CurrentOperations)) {
			if op := rec.CurrentOperations[task]; !slices.Contains(shared, op) {
				return xapi.NewError(xapi.ErrOtherOperationInProgress, "host", string(host), string(op), task)
			}
		}
		return nil
	}
}

const (
	evacuate = xapi.HostAllowedOperationsEvacuate
	reboot   = xapi.HostAllowedOperationsReboot
)

func TestTakeShowsAndReleaseHides(t *testing.T) {
	h := newHarness(t)
	call := h.begun()
	release, err := call.Take(t.Context(), patience, nil, On(h.host, evacuate), On(h.pool, xapi.PoolAllowedOperationsHAEnable))
	if err != nil {
		t.Fatal(err)
	}
	want := map[string]xapi.HostAllowedOperations{string(call.task): evacuate}
	if diff := cmp.Diff(want, record(h, h.host).CurrentOperations); diff != "" {
		t.Error(diff)
	}
	if got := record(h, h.pool).CurrentOperations; got[string(call.task)] != xapi.PoolAllowedOperationsHAEnable {
		t.Errorf("pool: %v", got)
	}
	again, err := call.Take(t.Context(), patience, nil, On(h.host, reboot))
	if err != nil {
		t.Fatal(err)
	}
	again()
	if diff := cmp.Diff(want, record(h, h.host).CurrentOperations); diff != "" {
		t.Errorf("the inner claim took the outer one with it: %s", diff)
	}
	release()
	revision := h.db.Revision()
	release()
	if h.db.Revision() != revision {
		t.Error("a second release does something")
	}
	if got := record(h, h.host).CurrentOperations; len(got) != 0 {
		t.Errorf("after the release: %v", got)
	}
	if _, err := call.Take(t.Context(), patience, nil, On(h.host, reboot)); err != nil {
		t.Fatal(err)
	}
	call.end()
	if got := record(h, h.host).CurrentOperations; len(got) != 0 {
		t.Errorf("after the end of the call: %v", got)
	}
}

func TestTakeIsAllOrNothing(t *testing.T) {
	h := newHarness(t)
	call := h.begun()
	defer call.end()
	_, err := call.Take(t.Context(), patience, nil, On(h.host, reboot), On(xapi.Ref[xapi.Pool]("OpaqueRef:x"), xapi.PoolAllowedOperationsHAEnable))
	if got, want := description(err), "HANDLE_INVALID|pool|OpaqueRef:x"; got != want {
		t.Errorf("got %q, want %q", got, want)
	}
	if got := record(h, h.host).CurrentOperations; len(got) != 0 {
		t.Errorf("half a claim: %v", got)
	}
	no := errors.New("no")
	if _, err := call.Take(t.Context(), patience, func(*db.Tx) error { return no }, On(h.host, reboot)); !errors.Is(err, no) {
		t.Errorf("the check's error became %v", err)
	}
}

func TestClaimsAreFair(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := newHarness(t)
		holder := h.begun()
		release := holder.evacuates(h.host)
		var order []int
		for i := range 20 {
			go func() {
				call := h.begun()
				// The first waits for everything to end, the others go along with
				// evacuate and yet must not overtake it.
				check := h.exclusive(h.host)
				if i > 0 {
					check = h.exclusive(h.host, evacuate)
				}
				release, err := call.Take(t.Context(), patience, check, On(h.host, reboot))
				if err != nil {
					t.Error(i, err)
				}
				order = append(order, i) // under the claim
				time.Sleep(time.Second)
				release()
				call.end()
			}()
			synctest.Wait()
		}
		if len(order) != 0 {
			t.Errorf("%v overtook", order)
		}
		release()
		holder.end()
		time.Sleep(time.Minute)
		synctest.Wait()
		want := make([]int, 20)
		for i := range want {
			want[i] = i
		}
		if !slices.Equal(order, want) {
			t.Errorf("order %v", order)
		}
		h.wantIdle()
	})
}

// Those who go along with each other are granted by one release.
func TestClaimsAreGrantedTogether(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := newHarness(t)
		holder := h.begun()
		release := holder.evacuates(h.host)
		granted := make(chan int, 6)
		work := make(chan struct{})
		for i := range 5 {
			go func() {
				call := h.begun()
				if _, err := call.Take(t.Context(), patience, h.exclusive(h.host, reboot), On(h.host, reboot)); err != nil {
					t.Error(err)
				}
				granted <- i
				<-work
				call.end()
			}()
			synctest.Wait()
		}
		// The last goes along with everything: only the queue holds it up.
		last := h.begun()
		go func() {
			if _, err := last.Take(t.Context(), patience, nil, On(h.host, reboot)); err != nil {
				t.Error(err)
			}
			granted <- 5
		}()
		synctest.Wait()
		if len(granted) != 0 {
			t.Error("granted before the release")
		}
		revision := h.db.Revision()
		release()
		synctest.Wait()
		if len(granted) != 6 {
			t.Errorf("%d granted, want 6", len(granted))
		}
		if n := len(record(h, h.host).CurrentOperations); n != 6 {
			t.Errorf("%d claims on the host, want 6", n)
		}
		if n := h.db.Revision() - revision; n != 1 {
			t.Errorf("the release and its grants took %d commits", n)
		}
		close(work)
		last.end()
		holder.end()
		synctest.Wait()
	})
}

func TestClaimOnAnotherObjectOvertakes(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := newHarness(t)
		other := dbtest.Insert(h.db, xapi.New[xapi.Host]())
		holder, waiting, free := h.begun(), h.begun(), h.begun()
		release := holder.evacuates(h.host)
		go func() {
			_, err := waiting.Take(t.Context(), patience, h.exclusive(h.host), On(h.host, reboot), On(h.pool, xapi.PoolAllowedOperationsHAEnable))
			if err != nil {
				t.Error(err)
			}
			waiting.end()
		}()
		synctest.Wait()
		// The pool is not what the other one waits for.
		begin := time.Now()
		_, err := free.Take(t.Context(), patience, h.exclusive(other), On(other, reboot), On(h.pool, xapi.PoolAllowedOperationsHAEnable))
		if err != nil || time.Since(begin) != 0 {
			t.Errorf("claim on free objects: %v after %v", err, time.Since(begin))
		}
		free.end()
		release()
		holder.end()
		synctest.Wait()
	})
}

func TestClaimFailsWhenTheObjectGoes(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := newHarness(t)
		host := dbtest.Insert(h.db, xapi.New[xapi.Host]())
		holder, waiting := h.begun(), h.begun()
		release, err := holder.Take(t.Context(), patience, nil, On(host, evacuate))
		if err != nil {
			t.Fatal(err)
		}
		go func() {
			_, err := waiting.Take(t.Context(), patience, h.exclusive(host), On(host, reboot))
			if got, want := description(err), "HANDLE_INVALID|host|"+string(host); got != want {
				t.Errorf("got %q, want %q", got, want)
			}
			waiting.end()
		}()
		synctest.Wait()
		h.db.Change(func(tx *db.Tx) error { return db.Delete(tx, host) })
		release()
		holder.end()
		synctest.Wait()
	})
}

// A claim without objects waits like any other, and its release lets others
// look again.
func TestClaimOfNothing(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := newHarness(t)
		busy := false // guarded by the checks' transactions
		check := func(*db.Tx) error {
			if busy {
				return xapi.NewError(xapi.ErrOtherOperationInProgress, "VDI", "OpaqueRef:x", "import", "OpaqueRef:t")
			}
			busy = true
			return nil
		}
		first, second := h.begun(), h.begun()
		release, err := first.Take(t.Context(), patience, check)
		if err != nil {
			t.Fatal(err)
		}
		go func() {
			if _, err := second.Take(t.Context(), patience, check); err != nil {
				t.Error(err)
			}
			second.end()
		}()
		synctest.Wait()
		busy = false
		release()
		synctest.Wait()
		if !busy || h.queue.Waiting() != 0 {
			t.Error("the second is not served")
		}
		first.end()
	})
}

// Many calls on few objects: claims exclude each other and none is left.
func TestClaimsUnderLoad(t *testing.T) {
	h := newHarness(t)
	hosts := []xapi.Ref[xapi.Host]{h.host, dbtest.Insert(h.db, xapi.New[xapi.Host]()), dbtest.Insert(h.db, xapi.New[xapi.Host]())}
	inside := make([]int, len(hosts))
	done := make(chan error)
	const calls = 300
	for i := range calls {
		go func() {
			call := h.begun()
			n := i % len(hosts)
			ctx, cancel := context.WithCancel(t.Context())
			defer cancel()
			if i%7 == 0 {
				go cancel()
			}
			release, err := call.Take(ctx, patience, h.exclusive(hosts[n]), On(hosts[n], reboot))
			if err == nil {
				if inside[n]++; inside[n] != 1 {
					err = fmt.Errorf("%d calls inside", inside[n])
				}
				inside[n]--
				release()
			} else if errors.Is(err, context.Canceled) {
				err = nil
			}
			call.end()
			done <- err
		}()
	}
	for range calls {
		if err := <-done; err != nil {
			t.Error(err)
		}
	}
	for _, host := range hosts {
		if got := record(h, host).CurrentOperations; len(got) != 0 {
			t.Errorf("left: %v", got)
		}
	}
	h.wantIdle()
}

// When the database is gone nobody waits for a release that cannot come.
func TestClaimsEndWithTheDatabase(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := newHarness(t)
		holder, waiting := h.begun(), h.begun()
		release := holder.evacuates(h.host)
		go func() {
			begin := time.Now()
			_, err := waiting.Take(t.Context(), patience, h.exclusive(h.host), On(h.host, reboot))
			if !errors.Is(err, db.ErrClosed) || time.Since(begin) != 0 {
				t.Errorf("got %v after %v, want %v", err, time.Since(begin), db.ErrClosed)
			}
			waiting.end()
		}()
		synctest.Wait()
		if err := h.db.Close(); err != nil {
			t.Fatal(err)
		}
		release()
		holder.end()
		synctest.Wait()
	})
}

// Who does not get a turn in time is told what was in the way, or why it was not to wait any longer; those behind go
// on.
func TestTakeGivesUp(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := newHarness(t)
		holder, first, second := h.begun(), h.begun(), h.begun()
		if _, err := holder.Take(t.Context(), patience, nil, On(h.host, evacuate)); err != nil {
			t.Fatal(err)
		}
		want := fmt.Sprintf("OTHER_OPERATION_IN_PROGRESS|host|%s|evacuate|%s", h.host, holder.task)
		begin := time.Now()
		if _, err := first.Take(t.Context(), time.Minute, h.exclusive(h.host), On(h.host, reboot)); description(err) != want || time.Since(begin) != time.Minute {
			t.Errorf("got %q after %v, want %q", description(err), time.Since(begin), want)
		}
		if _, err := holder.Take(t.Context(), patience, h.exclusive(h.host), On(h.host, reboot)); description(err) != want || time.Since(begin) != time.Minute {
			t.Errorf("a call that is in its own way: %v after %v", err, time.Since(begin))
		}
		gone := errors.New("gone")
		ctx, cancel := context.WithCancelCause(t.Context())
		go func() {
			if _, err := first.Take(ctx, patience, h.exclusive(h.host), On(h.host, reboot)); err != gone {
				t.Errorf("got %v, want %v", err, gone)
			}
			first.end()
		}()
		synctest.Wait()
		begin = time.Now()
		go func() {
			// Goes along with evacuate, but must not overtake the first.
			_, err := second.Take(t.Context(), patience, h.exclusive(h.host, evacuate), On(h.host, reboot))
			if err != nil || time.Since(begin) != time.Minute {
				t.Errorf("second: %v after %v", err, time.Since(begin))
			}
			second.end()
		}()
		time.Sleep(time.Minute)
		cancel(gone)
		synctest.Wait()
		h.wantIdle()
		holder.end()
	})
}

// What a call has to say at its end is in the commit of its releases, and said without any, too.
func TestEnd(t *testing.T) {
	h := newHarness(t)
	said := 0
	also := func(*db.Tx) error { said++; return nil }
	c := h.begun()
	if _, err := c.Take(t.Context(), patience, nil, On(h.host, evacuate), On(h.pool, xapi.PoolAllowedOperationsHAEnable)); err != nil {
		t.Fatal(err)
	}
	if want := []string{string(h.host), string(h.pool)}; !slices.Equal(h.refreshed, want) {
		t.Errorf("refreshed %q, want %q", h.refreshed, want)
	}
	revision := h.db.Revision()
	c.End(also)
	if n := h.db.Revision() - revision; n != 1 || said != 1 {
		t.Errorf("the end took %d commits and said %d things", n, said)
	}
	if len(h.refreshed) != 4 {
		t.Errorf("refreshed %q", h.refreshed)
	}
	c.End(also)
	if said != 2 {
		t.Error("the last words are lost when nothing is held")
	}
}
