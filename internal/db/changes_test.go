package db_test

import (
	"context"
	"errors"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"

	"coppice/internal/db"
	"coppice/internal/xapi"
)

func TestTombstonesAreBounded(t *testing.T) {
	d := open(t, db.NewMemStore())
	c := xapi.ClassOf[xapi.Task]()
	churn := func(n int) {
		refs := make([]xapi.Ref[xapi.Task], n)
		update(t, d, func(tx *db.Tx) (err error) {
			for i := range refs {
				if refs[i], err = db.Insert(tx, &xapi.Task{}); err != nil {
					return err
				}
			}
			return nil
		})
		update(t, d, func(tx *db.Tx) error {
			for _, r := range refs {
				if err := db.Delete(tx, r); err != nil {
					return err
				}
			}
			return nil
		})
	}
	count := func(after uint64) (n int, complete bool) {
		view(t, d, func(tx *db.Tx) {
			var changes func(func(db.Change) bool)
			changes, complete = tx.Changes(c, after)
			for ch := range changes {
				if !ch.Deleted || ch.Rec != nil {
					t.Errorf("not a deletion: %+v", ch)
				}
				n++
			}
		})
		return n, complete
	}
	churn(10)
	created := d.Revision() - 1 // the revision after the insert
	if n, complete := count(created); n != 10 || !complete {
		t.Errorf("%d deletions, complete %v", n, complete)
	}
	if n, _ := count(created - 1); n != 0 {
		t.Errorf("%d deletions of objects that were not there before", n)
	}
	mark := d.Revision()
	churn(5000)
	if n, complete := count(mark + 1); n != 4096 || complete {
		t.Errorf("after 5000 deletions: %d, complete %v", n, complete)
	}
	if _, complete := count(d.Revision()); !complete {
		t.Error("nothing is missing after the present revision")
	}
	if _, complete := count(0); !complete {
		t.Error("nothing is missing from the beginning")
	}
}

func TestWait(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d, err := db.Open(t.Context(), xapi.Datamodel(), db.NewMemStore())
		if err != nil {
			t.Fatal(err)
		}
		start := d.Revision()
		var woken, wg sync.WaitGroup
		const n = 3000
		woken.Add(n)
		for range n {
			wg.Go(func() {
				if err := d.Wait(t.Context(), start); err != nil {
					t.Error(err)
				}
				woken.Done()
				if err := d.Wait(context.Background(), start+1); !errors.Is(err, db.ErrClosed) {
					t.Errorf("got %v, want ErrClosed", err)
				}
			})
		}
		ctx, cancel := context.WithCancelCause(t.Context())
		why := errors.New("why")
		wg.Go(func() {
			if err := d.Wait(ctx, start+100); !errors.Is(err, why) {
				t.Errorf("got %v, want the cause", err)
			}
		})
		synctest.Wait()
		update(t, d, func(tx *db.Tx) error { _, err := db.Insert(tx, &xapi.Task{}); return err })
		woken.Wait()
		cancel(why)
		synctest.Wait()
		if err := errors.Join(d.Close(), d.Close()); err != nil {
			t.Error(err)
		}
		wg.Wait()
		if err := d.Update(t.Context(), func(*db.Tx) error { return nil }); !errors.Is(err, db.ErrClosed) {
			t.Errorf("update after close: %v", err)
		}
		if d.Wait(t.Context(), start) != nil {
			t.Error("a revision that was reached must not wait, even after close")
		}
	})
}

func TestWaitForClasses(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d, err := db.Open(t.Context(), xapi.Datamodel(), db.NewMemStore())
		if err != nil {
			t.Fatal(err)
		}
		task, vm, vdi := xapi.ClassOf[xapi.Task](), xapi.ClassOf[xapi.VM](), xapi.ClassOf[xapi.VDI]()
		start := d.Revision()
		var wg sync.WaitGroup
		wait := func(classes ...*xapi.Class) *atomic.Bool {
			var woken atomic.Bool
			wg.Go(func() {
				if err := d.Wait(t.Context(), start, classes...); err == nil {
					woken.Store(true)
				} else if !errors.Is(err, db.ErrClosed) {
					t.Error(err)
				}
			})
			return &woken
		}
		one, either, neither, both := wait(vm), wait(vm, vdi), wait(task), wait(task, vdi)
		check := func(what string, want ...bool) {
			t.Helper()
			synctest.Wait()
			if got := []bool{one.Load(), either.Load(), neither.Load(), both.Load()}; !slices.Equal(got, want) {
				t.Errorf("%s: woken %v, want %v", what, got, want)
			}
		}
		var ref xapi.Ref[xapi.VM]
		update(t, d, func(tx *db.Tx) (err error) { _, err = db.Insert(tx, &xapi.SR{}); return err })
		check("another class", false, false, false, false)
		if err := d.Update(t.Context(), func(tx *db.Tx) error {
			_, _ = db.Insert(tx, &xapi.VM{})
			return errors.New("no")
		}); err == nil {
			t.Error("want the error")
		}
		check("an update that failed", false, false, false, false)
		update(t, d, func(tx *db.Tx) (err error) { ref, err = db.Insert(tx, &xapi.VM{}); return err })
		check("an insert", true, true, false, false)
		update(t, d, func(tx *db.Tx) (err error) { _, err = db.Insert(tx, &xapi.VDI{}); return err })
		check("a second class", true, true, false, true)

		start = d.Revision()
		one, either, neither, both = wait(vm), wait(vm, vdi), wait(task), wait(task, vdi)
		check("what has been seen", false, false, false, false)
		update(t, d, func(tx *db.Tx) error { return db.Delete(tx, ref) })
		check("a deletion", true, true, false, false)

		ctx, cancel := context.WithCancelCause(t.Context())
		why := errors.New("why")
		cancel(why)
		if err := d.Wait(ctx, start, task, vdi); !errors.Is(err, why) {
			t.Errorf("got %v, want the cause", err)
		}
		if err := d.Wait(ctx, start, task, vm); err != nil {
			t.Errorf("it has changed: %v", err)
		}
		if err := d.Close(); err != nil {
			t.Error(err)
		}
		wg.Wait()
	})
}
