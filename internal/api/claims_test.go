package api

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"coppice/internal/db"
	"coppice/internal/xapi"

	"github.com/google/go-cmp/cmp"
)

// exclusive is a check that lets one operation at a time happen to a host,
// apart from "shared" ones.
func (c *core) exclusive(host xapi.Ref[xapi.Host], shared ...xapi.HostAllowedOperations) func(*db.Tx) error {
	return func(tx *db.Tx) error {
		h, err := db.Get(tx, host)
		if err != nil {
			return err
		}
		for _, task := range slices.Sorted(maps.Keys(h.CurrentOperations)) {
			if op := h.CurrentOperations[task]; !slices.Contains(shared, op) {
				return xapi.NewError(xapi.ErrOtherOperationInProgress, "host", string(host), string(op), task)
			}
		}
		return nil
	}
}

func (c *core) begun() *Call {
	c.t.Helper()
	s, err := c.session(c.root)
	if err != nil {
		c.t.Fatal(err)
	}
	call, err := c.begin(context.Background(), Origin{}, s, "host.evacuate")
	if err != nil {
		c.t.Fatal(err)
	}
	return call
}

const (
	evacuate = xapi.HostAllowedOperationsEvacuate
	reboot   = xapi.HostAllowedOperationsReboot
)

func TestClaimShowsAndHides(t *testing.T) {
	c := newCore(t)
	call := c.begun()
	release, err := call.Claim(t.Context(), nil, claimOn(c.host, evacuate), claimOn(c.pool, xapi.PoolAllowedOperationsHAEnable))
	if err != nil {
		t.Fatal(err)
	}
	want := map[string]xapi.HostAllowedOperations{string(call.Task()): evacuate}
	if diff := cmp.Diff(want, record(c, c.host).CurrentOperations); diff != "" {
		t.Error(diff)
	}
	if got := record(c, c.pool).CurrentOperations; got[string(call.Task())] != xapi.PoolAllowedOperationsHAEnable {
		t.Errorf("pool: %v", got)
	}
	again, err := call.Claim(t.Context(), nil, claimOn(c.host, reboot))
	if err != nil {
		t.Fatal(err)
	}
	again()
	if diff := cmp.Diff(want, record(c, c.host).CurrentOperations); diff != "" {
		t.Errorf("the inner claim took the outer one with it: %s", diff)
	}
	release()
	revision := c.db.Revision()
	release()
	if c.db.Revision() != revision {
		t.Error("a second release does something")
	}
	if got := record(c, c.host).CurrentOperations; len(got) != 0 {
		t.Errorf("after the release: %v", got)
	}
	if _, err := call.Claim(t.Context(), nil, claimOn(c.host, reboot)); err != nil {
		t.Fatal(err)
	}
	call.end(Result{}, nil)
	if got := record(c, c.host).CurrentOperations; len(got) != 0 {
		t.Errorf("after the end of the call: %v", got)
	}
}

func TestClaimIsAllOrNothing(t *testing.T) {
	c := newCore(t)
	call := c.begun()
	defer call.end(Result{}, nil)
	_, err := call.Claim(t.Context(), nil, claimOn(c.host, reboot), claimOn(xapi.Ref[xapi.Pool]("OpaqueRef:x"), xapi.PoolAllowedOperationsHAEnable))
	if got, want := description(err), "HANDLE_INVALID|pool|OpaqueRef:x"; got != want {
		t.Errorf("got %q, want %q", got, want)
	}
	if got := record(c, c.host).CurrentOperations; len(got) != 0 {
		t.Errorf("half a claim: %v", got)
	}
	no := errors.New("no")
	if _, err := call.Claim(t.Context(), func(*db.Tx) error { return no }, claimOn(c.host, reboot)); !errors.Is(err, no) {
		t.Errorf("the check's error became %v", err)
	}
}

func TestClaimsAreFair(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newCore(t)
		holder := c.begun()
		release, err := holder.Claim(t.Context(), nil, claimOn(c.host, evacuate))
		if err != nil {
			t.Fatal(err)
		}
		var order []int
		for i := range 20 {
			go func() {
				call := c.begun()
				// The first waits for everything to end, the others go along with
				// evacuate and yet must not overtake it.
				check := c.exclusive(c.host)
				if i > 0 {
					check = c.exclusive(c.host, evacuate)
				}
				release, err := call.Claim(t.Context(), check, claimOn(c.host, reboot))
				if err != nil {
					t.Error(i, err)
				}
				order = append(order, i) // under the claim
				time.Sleep(time.Second)
				release()
				call.end(Result{}, nil)
			}()
			synctest.Wait()
		}
		if len(order) != 0 {
			t.Errorf("%v overtook", order)
		}
		release()
		holder.end(Result{}, nil)
		time.Sleep(time.Minute)
		synctest.Wait()
		want := make([]int, 20)
		for i := range want {
			want[i] = i
		}
		if !slices.Equal(order, want) {
			t.Errorf("order %v", order)
		}
		if len(c.claims.waiting) != 0 {
			t.Errorf("%d still wait", len(c.claims.waiting))
		}
	})
}

// Those who go along with each other are granted by one release.
func TestClaimsAreGrantedTogether(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newCore(t)
		holder := c.begun()
		release, err := holder.Claim(t.Context(), nil, claimOn(c.host, evacuate))
		if err != nil {
			t.Fatal(err)
		}
		granted := make(chan int, 6)
		work := make(chan struct{})
		for i := range 5 {
			go func() {
				call := c.begun()
				if _, err := call.Claim(t.Context(), c.exclusive(c.host, reboot), claimOn(c.host, reboot)); err != nil {
					t.Error(err)
				}
				granted <- i
				<-work
				call.end(Result{}, nil)
			}()
			synctest.Wait()
		}
		// The last goes along with everything: only the queue holds it up.
		last := c.begun()
		go func() {
			if _, err := last.Claim(t.Context(), nil, claimOn(c.host, reboot)); err != nil {
				t.Error(err)
			}
			granted <- 5
		}()
		synctest.Wait()
		if len(granted) != 0 {
			t.Error("granted before the release")
		}
		revision := c.db.Revision()
		release()
		synctest.Wait()
		if len(granted) != 6 {
			t.Errorf("%d granted, want 6", len(granted))
		}
		if n := len(record(c, c.host).CurrentOperations); n != 6 {
			t.Errorf("%d claims on the host, want 6", n)
		}
		if n := c.db.Revision() - revision; n != 1 {
			t.Errorf("the release and its grants took %d commits", n)
		}
		close(work)
		last.end(Result{}, nil)
		holder.end(Result{}, nil)
		synctest.Wait()
	})
}

func TestClaimOnAnotherObjectOvertakes(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newCore(t)
		other := insert(c, xapi.New[xapi.Host]())
		holder, waiting, free := c.begun(), c.begun(), c.begun()
		release, err := holder.Claim(t.Context(), nil, claimOn(c.host, evacuate))
		if err != nil {
			t.Fatal(err)
		}
		go func() {
			_, err := waiting.Claim(t.Context(), c.exclusive(c.host), claimOn(c.host, reboot), claimOn(c.pool, xapi.PoolAllowedOperationsHAEnable))
			if err != nil {
				t.Error(err)
			}
			waiting.end(Result{}, nil)
		}()
		synctest.Wait()
		// The pool is not what the other one waits for.
		begin := time.Now()
		_, err = free.Claim(t.Context(), c.exclusive(other), claimOn(other, reboot), claimOn(c.pool, xapi.PoolAllowedOperationsHAEnable))
		if err != nil || time.Since(begin) != 0 {
			t.Errorf("claim on free objects: %v after %v", err, time.Since(begin))
		}
		free.end(Result{}, nil)
		release()
		holder.end(Result{}, nil)
		synctest.Wait()
	})
}

func TestClaimPatience(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newCore(t)
		holder := c.begun()
		if _, err := holder.Claim(t.Context(), nil, claimOn(c.host, evacuate)); err != nil {
			t.Fatal(err)
		}
		want := fmt.Sprintf("OTHER_OPERATION_IN_PROGRESS|host|%s|evacuate|%s", c.host, holder.Task())
		for _, tt := range []struct {
			patience time.Duration
			claim    func(*Call) (func(), error)
		}{
			{2 * time.Hour, func(call *Call) (func(), error) {
				return call.Claim(call.Context(), c.exclusive(c.host), claimOn(c.host, reboot))
			}},
			{2 * time.Minute, func(call *Call) (func(), error) {
				return call.ClaimWithin(call.Context(), transferPatience, c.exclusive(c.host), claimOn(c.host, reboot))
			}},
		} {
			call := c.begun()
			begin := time.Now()
			_, err := tt.claim(call)
			if got := description(err); got != want || time.Since(begin) != tt.patience {
				t.Errorf("got %q after %v, want %q after %v", got, time.Since(begin), want, tt.patience)
			}
			call.end(Result{}, err)
		}
		// A call never waits for itself.
		begin := time.Now()
		if _, err := holder.Claim(holder.Context(), c.exclusive(c.host), claimOn(c.host, reboot)); description(err) != want || time.Since(begin) != 0 {
			t.Errorf("a call that is in its own way: %v after %v", err, time.Since(begin))
		}
		holder.end(Result{}, nil)
	})
}

func TestClaimCancelled(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newCore(t)
		holder, first, second := c.begun(), c.begun(), c.begun()
		if _, err := holder.Claim(t.Context(), nil, claimOn(c.host, evacuate)); err != nil {
			t.Fatal(err)
		}
		go func() {
			_, err := first.Claim(first.Context(), c.exclusive(c.host), claimOn(c.host, reboot))
			if got, want := description(first.end(Result{}, err)), "TASK_CANCELLED|"+string(first.Task()); got != want {
				t.Errorf("got %q, want %q", got, want)
			}
		}()
		synctest.Wait()
		begin := time.Now()
		go func() {
			// Goes along with evacuate, but must not overtake the first.
			_, err := second.Claim(second.Context(), c.exclusive(c.host, evacuate), claimOn(c.host, reboot))
			if err != nil || time.Since(begin) != time.Minute {
				t.Errorf("second: %v after %v", err, time.Since(begin))
			}
			second.end(Result{}, nil)
		}()
		time.Sleep(time.Minute)
		c.call("task.cancel", first.Task()) // the hidden task of a synchronous call
		synctest.Wait()
		if len(c.claims.waiting) != 0 {
			t.Errorf("%d still wait", len(c.claims.waiting))
		}
		holder.end(Result{}, nil)
	})
}

func TestClaimFailsWhenTheObjectGoes(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newCore(t)
		host := insert(c, xapi.New[xapi.Host]())
		holder, waiting := c.begun(), c.begun()
		release, err := holder.Claim(t.Context(), nil, claimOn(host, evacuate))
		if err != nil {
			t.Fatal(err)
		}
		go func() {
			_, err := waiting.Claim(t.Context(), c.exclusive(host), claimOn(host, reboot))
			if got, want := description(err), "HANDLE_INVALID|host|"+string(host); got != want {
				t.Errorf("got %q, want %q", got, want)
			}
			waiting.end(Result{}, err)
		}()
		synctest.Wait()
		c.update(func(tx *db.Tx) error { return db.Delete(tx, host) })
		release()
		holder.end(Result{}, nil)
		synctest.Wait()
	})
}

// A claim without objects waits like any other, and its release lets others
// look again.
func TestClaimOfNothing(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newCore(t)
		busy := false // guarded by the checks' transactions
		check := func(*db.Tx) error {
			if busy {
				return xapi.NewError(xapi.ErrOtherOperationInProgress, "VDI", "OpaqueRef:x", "import", "OpaqueRef:t")
			}
			busy = true
			return nil
		}
		first, second := c.begun(), c.begun()
		release, err := first.Claim(t.Context(), check)
		if err != nil {
			t.Fatal(err)
		}
		go func() {
			if _, err := second.Claim(t.Context(), check); err != nil {
				t.Error(err)
			}
			second.end(Result{}, nil)
		}()
		synctest.Wait()
		busy = false
		release()
		synctest.Wait()
		if !busy || len(c.claims.waiting) != 0 {
			t.Error("the second is not served")
		}
		first.end(Result{}, nil)
	})
}

// Many calls on few objects: claims exclude each other and none is left.
func TestClaimsUnderLoad(t *testing.T) {
	c := newCore(t)
	hosts := []xapi.Ref[xapi.Host]{c.host, insert(c, xapi.New[xapi.Host]()), insert(c, xapi.New[xapi.Host]())}
	inside := make([]int, len(hosts))
	done := make(chan error)
	const calls = 300
	for i := range calls {
		go func() {
			call := c.begun()
			n := i % len(hosts)
			ctx, cancel := context.WithCancel(call.Context())
			defer cancel()
			if i%7 == 0 {
				go cancel()
			}
			release, err := call.Claim(ctx, c.exclusive(hosts[n]), claimOn(hosts[n], reboot))
			if err == nil {
				if inside[n]++; inside[n] != 1 {
					err = fmt.Errorf("%d calls inside", inside[n])
				}
				inside[n]--
				release()
			} else if errors.Is(err, context.Canceled) {
				err = nil
			}
			call.end(Result{}, nil)
			done <- err
		}()
	}
	for range calls {
		if err := <-done; err != nil {
			t.Error(err)
		}
	}
	for _, h := range hosts {
		if got := record(c, h).CurrentOperations; len(got) != 0 {
			t.Errorf("left: %v", got)
		}
	}
	if len(c.claims.waiting) != 0 {
		t.Errorf("%d still wait", len(c.claims.waiting))
	}
}

// When the database is gone nobody waits for a release that cannot come.
func TestClaimsEndWithTheDatabase(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newCore(t)
		holder, waiting := c.begun(), c.begun()
		release, err := holder.Claim(t.Context(), nil, claimOn(c.host, evacuate))
		if err != nil {
			t.Fatal(err)
		}
		go func() {
			begin := time.Now()
			_, err := waiting.Claim(t.Context(), c.exclusive(c.host), claimOn(c.host, reboot))
			if !errors.Is(err, db.ErrClosed) || time.Since(begin) != 0 {
				t.Errorf("got %v after %v, want %v", err, time.Since(begin), db.ErrClosed)
			}
			waiting.end(Result{}, nil)
		}()
		synctest.Wait()
		if err := c.db.Close(); err != nil {
			t.Fatal(err)
		}
		release()
		holder.end(Result{}, nil)
		synctest.Wait()
	})
}
