package api

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"coppice/internal/claim"
	"coppice/internal/db"
	"coppice/internal/xapi"
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

func TestClaimPatience(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newCore(t)
		holder := c.begun()
		if _, err := holder.Claim(t.Context(), nil, claim.On(c.host, evacuate)); err != nil {
			t.Fatal(err)
		}
		want := fmt.Sprintf("OTHER_OPERATION_IN_PROGRESS|host|%s|evacuate|%s", c.host, holder.Task())
		for _, tt := range []struct {
			patience time.Duration
			claim    func(*Call) (func(), error)
		}{
			{2 * time.Hour, func(call *Call) (func(), error) {
				return call.Claim(call.Context(), c.exclusive(c.host), claim.On(c.host, reboot))
			}},
			{2 * time.Minute, func(call *Call) (func(), error) {
				return call.ClaimWithin(call.Context(), transferPatience, c.exclusive(c.host), claim.On(c.host, reboot))
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
		if _, err := holder.Claim(holder.Context(), c.exclusive(c.host), claim.On(c.host, reboot)); description(err) != want || time.Since(begin) != 0 {
			t.Errorf("a call that is in its own way: %v after %v", err, time.Since(begin))
		}
		holder.end(Result{}, nil)
	})
}

func TestClaimCancelled(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newCore(t)
		holder, first, second := c.begun(), c.begun(), c.begun()
		if _, err := holder.Claim(t.Context(), nil, claim.On(c.host, evacuate)); err != nil {
			t.Fatal(err)
		}
		go func() {
			_, err := first.Claim(first.Context(), c.exclusive(c.host), claim.On(c.host, reboot))
			if got, want := description(first.end(Result{}, err)), "TASK_CANCELLED|"+string(first.Task()); got != want {
				t.Errorf("got %q, want %q", got, want)
			}
		}()
		synctest.Wait()
		begin := time.Now()
		go func() {
			// Goes along with evacuate, but must not overtake the first.
			_, err := second.Claim(second.Context(), c.exclusive(c.host, evacuate), claim.On(c.host, reboot))
			if err != nil || time.Since(begin) != time.Minute {
				t.Errorf("second: %v after %v", err, time.Since(begin))
			}
			second.end(Result{}, nil)
		}()
		time.Sleep(time.Minute)
		c.call("task.cancel", first.Task()) // the hidden task of a synchronous call
		synctest.Wait()
		if c.claims.Waiting() != 0 {
			t.Errorf("%d still wait", c.claims.Waiting())
		}
		holder.end(Result{}, nil)
	})
}

// The end of a call gives back what it has claimed.
func TestClaimsEndWithTheCall(t *testing.T) {
	c := newCore(t)
	call := c.begun()
	release, err := call.Claim(t.Context(), nil, claim.On(c.host, evacuate), claim.On(c.pool, xapi.PoolAllowedOperationsHAEnable))
	if err != nil {
		t.Fatal(err)
	}
	if got := record(c, c.host).CurrentOperations; got[string(call.Task())] != evacuate {
		t.Errorf("while it is claimed: %v", got)
	}
	call.end(Result{}, nil)
	revision := c.db.Revision()
	release()
	if c.db.Revision() != revision {
		t.Error("a release after the end does something")
	}
	if got, pool := record(c, c.host).CurrentOperations, record(c, c.pool).CurrentOperations; len(got)+len(pool) != 0 {
		t.Errorf("after the end: %v, %v", got, pool)
	}
}
