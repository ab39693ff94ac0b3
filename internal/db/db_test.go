package db_test

import (
	"context"
	"errors"
	"slices"
	"strconv"
	"sync"
	"testing"

	"github.com/google/go-cmp/cmp"

	"coppice/internal/db"
	"coppice/internal/xapi"
)

func open(t testing.TB, s db.Store) *db.DB {
	t.Helper()
	d, err := db.Open(context.Background(), xapi.Datamodel(), s)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := d.Close(); err != nil {
			t.Error(err)
		}
	})
	return d
}

func update(t testing.TB, d *db.DB, fn func(tx *db.Tx) error) {
	t.Helper()
	if err := d.Update(context.Background(), fn); err != nil {
		t.Fatal(err)
	}
}

func view(t testing.TB, d *db.DB, fn func(tx *db.Tx)) {
	t.Helper()
	if err := d.View(func(tx *db.Tx) error { fn(tx); return nil }); err != nil {
		t.Fatal(err)
	}
}

func wantCode(t testing.TB, err error, code string, params ...string) {
	t.Helper()
	if !errors.Is(err, xapi.NewError(code, params...)) {
		t.Errorf("got %v, want %s %q", err, code, params)
	}
}

func TestLookups(t *testing.T) {
	d := open(t, db.NewMemStore())
	var ref xapi.Ref[xapi.VDI]
	update(t, d, func(tx *db.Tx) error {
		rec := &xapi.VDI{NameLabel: "disk"}
		var err error
		if ref, err = db.Insert(tx, rec); err != nil {
			return err
		}
		if rec.UUID == "" || rec.OtherConfig == nil || rec.SR != xapi.NullRef {
			t.Errorf("the inserted record was not completed: %+v", rec)
		}
		_, err = db.Insert(tx, &xapi.VDI{UUID: rec.UUID})
		if !errors.Is(err, db.ErrExists) {
			t.Errorf("second object with the same uuid: %v", err)
		}
		if err := db.InsertAs(tx, ref, &xapi.VDI{}); !errors.Is(err, db.ErrExists) {
			t.Errorf("second object with the same ref: %v", err)
		}
		return nil
	})
	view(t, d, func(tx *db.Tx) {
		rec, err := db.Get(tx, ref)
		if err != nil {
			t.Fatal(err)
		}
		byUUID, same, err := db.ByUUID[xapi.VDI](tx, rec.UUID)
		if err != nil || byUUID != ref || same != rec {
			t.Errorf("ByUUID: %v, %v", byUUID, err)
		}
		if diff := cmp.Diff([]xapi.Ref[xapi.VDI]{ref}, db.ByName[xapi.VDI](tx, "disk")); diff != "" {
			t.Errorf("ByName (-want +got)\n%s", diff)
		}
		if c, ok := tx.ClassOf(string(ref)); !ok || c.Name != "VDI" {
			t.Errorf("ClassOf: %v, %v", c, ok)
		}
		if _, ok := tx.ClassOf("OpaqueRef:none"); ok {
			t.Error("ClassOf an unknown reference succeeded")
		}
		_, err = db.Get(tx, xapi.Ref[xapi.Host]("x"))
		wantCode(t, err, xapi.ErrHandleInvalid, "host", "x")
		_, _, err = db.ByUUID[xapi.Pool](tx, "u")
		wantCode(t, err, xapi.ErrUUIDInvalid, "pool", "u")
		if got := db.ByName[xapi.VDI](tx, "dis"); len(got) != 0 {
			t.Errorf("ByName of a prefix: %v", got)
		}
	})
	update(t, d, func(tx *db.Tx) error {
		return db.Modify(tx, ref, func(v *xapi.VDI) { v.NameLabel, v.UUID = "renamed", "new" })
	})
	view(t, d, func(tx *db.Tx) {
		if got := db.ByName[xapi.VDI](tx, "disk"); len(got) != 0 {
			t.Errorf("the old name still finds %v", got)
		}
		if got, _, err := db.ByUUID[xapi.VDI](tx, "new"); err != nil || got != ref {
			t.Errorf("the new uuid finds %v, %v", got, err)
		}
	})
}

func TestChangesNeedAnUpdate(t *testing.T) {
	d := open(t, db.NewMemStore())
	c := xapi.ClassOf[xapi.VDI]()
	var leaked *db.Tx
	update(t, d, func(tx *db.Tx) error {
		leaked = tx
		return tx.InsertAny(c, "a", xapi.New[xapi.VDI]())
	})
	check := func(tx *db.Tx) {
		for what, err := range map[string]error{
			"insert": tx.InsertAny(c, "b", xapi.New[xapi.VDI]()),
			"modify": tx.ModifyAny(c, "a", func(any) { t.Error("the function was called") }),
			"touch":  tx.Touch(c, "a"),
			"delete": tx.DeleteAny(c, "a"),
		} {
			if !errors.Is(err, db.ErrReadTx) {
				t.Errorf("%s: got %v", what, err)
			}
		}
	}
	view(t, d, check)
	check(leaked)
}

func TestMissingObjects(t *testing.T) {
	d := open(t, db.NewMemStore())
	opened := d.Revision()
	update(t, d, func(tx *db.Tx) error {
		none := xapi.Ref[xapi.VDI]("none")
		wantCode(t, db.Modify(tx, none, func(*xapi.VDI) {}), xapi.ErrHandleInvalid, "VDI", "none")
		wantCode(t, db.Delete(tx, none), xapi.ErrHandleInvalid, "VDI", "none")
		wantCode(t, tx.Touch(xapi.ClassOf[xapi.VDI](), "none"), xapi.ErrHandleInvalid, "VDI", "none")
		return nil
	})
	if d.Revision() != opened {
		t.Errorf("an update without changes made revision %d", d.Revision())
	}
}

func TestRollback(t *testing.T) {
	d := open(t, db.NewMemStore())
	var vdi xapi.Ref[xapi.VDI]
	update(t, d, func(tx *db.Tx) error {
		var err error
		vdi, err = db.Insert(tx, &xapi.VDI{NameLabel: "before"})
		return err
	})
	revision := d.Revision()
	stop := errors.New("stop")
	change := func(tx *db.Tx) {
		if err := db.Modify(tx, vdi, func(v *xapi.VDI) { v.NameLabel = "after" }); err != nil {
			t.Error(err)
		}
		if _, err := db.Insert(tx, &xapi.VBD{VDI: vdi}); err != nil {
			t.Error(err)
		}
	}
	err := d.Update(context.Background(), func(tx *db.Tx) error { change(tx); return stop })
	if !errors.Is(err, stop) {
		t.Errorf("got %v, want the error of the function", err)
	}
	func() {
		defer func() { _ = recover() }()
		_ = d.Update(context.Background(), func(tx *db.Tx) error { change(tx); panic("bug") })
	}()
	cancelled, cancel := context.WithCancelCause(context.Background())
	cancel(stop)
	if err := d.Update(cancelled, func(*db.Tx) error { t.Error("the function was called"); return nil }); !errors.Is(err, stop) {
		t.Errorf("cancelled: got %v", err)
	}
	view(t, d, func(tx *db.Tx) {
		v, err := db.Get(tx, vdi)
		if err != nil || v.NameLabel != "before" || len(v.VBDs) != 0 || len(db.ByName[xapi.VDI](tx, "after")) != 0 {
			t.Errorf("after a failed update: %+v, %v", v, err)
		}
		if tx.Count(xapi.ClassOf[xapi.VBD]()) != 0 || tx.Revision() != revision {
			t.Error("something of a failed update is visible")
		}
	})
}

func TestModifyWithoutEffect(t *testing.T) {
	s := db.NewMemStore()
	d := open(t, s)
	var vdi xapi.Ref[xapi.VDI]
	update(t, d, func(tx *db.Tx) error {
		var err error
		vdi, err = db.Insert(tx, &xapi.VDI{})
		return err
	})
	revision, commits := d.Revision(), s.Commits()
	update(t, d, func(tx *db.Tx) error {
		return db.Modify(tx, vdi, func(v *xapi.VDI) { v.VBDs = append(v.VBDs, "x"); v.Tags = nil })
	})
	if d.Revision() != revision {
		t.Error("a change of nothing but a computed side made a revision")
	}
	update(t, d, func(tx *db.Tx) error {
		return db.Modify(tx, vdi, func(v *xapi.VDI) { v.CurrentOperations["t"] = xapi.VDIOperationsCopy })
	})
	update(t, d, func(tx *db.Tx) error { return tx.Touch(xapi.ClassOf[xapi.VDI](), string(vdi)) })
	update(t, d, func(tx *db.Tx) error { _, err := db.Insert(tx, &xapi.Task{}); return err })
	if d.Revision() != revision+3 || s.Commits() != commits {
		t.Errorf("three changes in memory made %d revisions and %d commits", d.Revision()-revision, s.Commits()-commits)
	}
	update(t, d, func(tx *db.Tx) error { return db.Modify(tx, vdi, func(v *xapi.VDI) { v.Managed = true }) })
	if s.Commits() != commits+1 {
		t.Error("a change of a persistent field was not committed")
	}
}

func TestRelations(t *testing.T) {
	d := open(t, db.NewMemStore())
	const vdi, other = xapi.Ref[xapi.VDI]("OpaqueRef:vdi"), xapi.Ref[xapi.VDI]("OpaqueRef:other")
	var vbd xapi.Ref[xapi.VBD]
	vbdsOf := func(r xapi.Ref[xapi.VDI]) (got []xapi.Ref[xapi.VBD]) {
		view(t, d, func(tx *db.Tx) {
			v, err := db.Get(tx, r)
			if err != nil {
				t.Fatal(err)
			}
			got = v.VBDs
		})
		return got
	}
	update(t, d, func(tx *db.Tx) error { // the reference dangles at first
		var err error
		vbd, err = db.Insert(tx, &xapi.VBD{VDI: vdi})
		return err
	})
	update(t, d, func(tx *db.Tx) error {
		return errors.Join(db.InsertAs(tx, vdi, &xapi.VDI{VBDs: []xapi.Ref[xapi.VBD]{"junk"}}), db.InsertAs(tx, other, &xapi.VDI{}))
	})
	if got := vbdsOf(vdi); !slices.Equal(got, []xapi.Ref[xapi.VBD]{vbd}) {
		t.Errorf("VBDs of the late VDI: %v", got)
	}
	before := d.Revision()
	update(t, d, func(tx *db.Tx) error { return db.Modify(tx, vbd, func(b *xapi.VBD) { b.VDI = other }) })
	if a, b := vbdsOf(vdi), vbdsOf(other); len(a) != 0 || !slices.Equal(b, []xapi.Ref[xapi.VBD]{vbd}) {
		t.Errorf("after the move: %v and %v", a, b)
	}
	view(t, d, func(tx *db.Tx) {
		changes, _ := tx.Changes(xapi.ClassOf[xapi.VDI](), before)
		var refs []string
		for c := range changes {
			refs = append(refs, c.Ref)
		}
		slices.Sort(refs)
		if !slices.Equal(refs, []string{string(other), string(vdi)}) {
			t.Errorf("modified by the move: %v", refs)
		}
	})
	update(t, d, func(tx *db.Tx) error { return db.Delete(tx, other) })
	view(t, d, func(tx *db.Tx) {
		if b, err := db.Get(tx, vbd); err != nil || b.VDI != other {
			t.Errorf("the reference must dangle: %v, %v", b, err)
		}
	})
	update(t, d, func(tx *db.Tx) error { return db.InsertAs(tx, other, &xapi.VDI{}) })
	if got := vbdsOf(other); len(got) != 1 {
		t.Errorf("a VDI that came back has VBDs %v", got)
	}
	update(t, d, func(tx *db.Tx) error { return db.Delete(tx, vbd) })
	if got := vbdsOf(other); len(got) != 0 || got == nil {
		t.Errorf("after the VBD was deleted: %v", got)
	}
	// many to many, an object that refers to itself, and its deletion
	const vm, g1, g2 = xapi.Ref[xapi.VM]("vm"), xapi.Ref[xapi.VMGroup]("g1"), xapi.Ref[xapi.VMGroup]("g2")
	update(t, d, func(tx *db.Tx) error {
		return errors.Join(
			db.InsertAs(tx, g1, &xapi.VMGroup{}), db.InsertAs(tx, g2, &xapi.VMGroup{}),
			db.InsertAs(tx, vm, &xapi.VM{Groups: []xapi.Ref[xapi.VMGroup]{g1, g1}, Parent: vm}),
			db.Modify(tx, vm, func(v *xapi.VM) { v.Groups = []xapi.Ref[xapi.VMGroup]{g2} }),
		)
	})
	view(t, d, func(tx *db.Tx) {
		a, _ := db.Get(tx, g1)
		b, _ := db.Get(tx, g2)
		v, _ := db.Get(tx, vm)
		if len(a.VMs) != 0 || !slices.Equal(b.VMs, []xapi.Ref[xapi.VM]{vm}) || !slices.Equal(v.Children, []xapi.Ref[xapi.VM]{vm}) {
			t.Errorf("got %v, %v, children %v", a.VMs, b.VMs, v.Children)
		}
	})
	update(t, d, func(tx *db.Tx) error { return db.Delete(tx, vm) })
	update(t, d, func(tx *db.Tx) error { return db.InsertAs(tx, vm, &xapi.VM{}) })
	view(t, d, func(tx *db.Tx) {
		if v, _ := db.Get(tx, vm); len(v.Children) != 0 {
			t.Errorf("a deleted object still refers to itself: %v", v.Children)
		}
	})
}

func TestIterationShowsTheStart(t *testing.T) {
	d := open(t, db.NewMemStore())
	update(t, d, func(tx *db.Tx) error {
		for i := range 200 {
			if err := db.InsertAs(tx, xapi.Ref[xapi.VDI]("r"+strconv.Itoa(i)), &xapi.VDI{}); err != nil {
				return err
			}
		}
		return nil
	})
	update(t, d, func(tx *db.Tx) error {
		n := 0
		for r := range db.All[xapi.VDI](tx) {
			n++
			if err := db.Delete(tx, r); err != nil {
				return err
			}
			if _, err := db.Insert(tx, &xapi.VDI{}); err != nil {
				return err
			}
		}
		if n != 200 {
			t.Errorf("iterated over %d objects, want 200", n)
		}
		changes, complete := tx.Changes(xapi.ClassOf[xapi.VDI](), tx.Revision()-1)
		for c := range changes {
			if n--; c.Deleted {
				break
			}
		}
		if n != -1 || !complete {
			t.Errorf("changes of this transaction: %d left, complete %v", n, complete)
		}
		return nil
	})
	view(t, d, func(tx *db.Tx) {
		for range db.All[xapi.VDI](tx) {
			break
		}
		changes, _ := tx.Changes(xapi.ClassOf[xapi.VDI](), 0)
		for range changes {
			break
		}
	})
}

// TestReadersAndWriters runs both at once; each reader checks that what it sees belongs together.
func TestReadersAndWriters(t *testing.T) {
	d := open(t, db.NewMemStore())
	const sr = xapi.Ref[xapi.SR]("sr")
	update(t, d, func(tx *db.Tx) error { return db.InsertAs(tx, sr, &xapi.SR{}) })
	const writers, each = 8, 50
	var wg, readers sync.WaitGroup
	stop := make(chan struct{})
	for range 4 {
		readers.Go(func() {
			last := uint64(0)
			for {
				select {
				case <-stop:
					return
				default:
				}
				view(t, d, func(tx *db.Tx) {
					s, err := db.Get(tx, sr)
					if err != nil || len(s.VDIs) != tx.Count(xapi.ClassOf[xapi.VDI]()) || int64(len(s.VDIs)) != s.VirtualAllocation {
						t.Errorf("a reader saw %d VDIs of %d: %v", len(s.VDIs), tx.Count(xapi.ClassOf[xapi.VDI]()), err)
					}
					changes, _ := tx.Changes(xapi.ClassOf[xapi.VDI](), last)
					for c := range changes {
						if c.Modified > tx.Revision() {
							t.Errorf("an object of revision %d in revision %d", c.Modified, tx.Revision())
						}
					}
					last = tx.Revision()
				})
			}
		})
	}
	for range writers {
		wg.Go(func() {
			for i := range each {
				update(t, d, func(tx *db.Tx) error {
					r, err := db.Insert(tx, &xapi.VDI{SR: sr})
					if err != nil {
						return err
					}
					if i%2 == 1 {
						if err := db.Delete(tx, r); err != nil {
							return err
						}
					}
					return db.Modify(tx, sr, func(s *xapi.SR) { s.VirtualAllocation = int64(len(s.VDIs)) })
				})
			}
		})
	}
	wg.Wait()
	close(stop)
	readers.Wait()
	view(t, d, func(tx *db.Tx) {
		if got := tx.Count(xapi.ClassOf[xapi.VDI]()); got != writers*each/2 {
			t.Errorf("%d VDIs, want %d", got, writers*each/2)
		}
	})
}

// A copy of a database that the original has outrun is told from it, and
// advances beyond it: then tokens of the original select everything.
func TestAdvance(t *testing.T) {
	store := db.NewMemStore()
	d := open(t, store)
	add := func(d *db.DB, label string) {
		update(t, d, func(tx *db.Tx) error {
			_, err := db.Insert(tx, &xapi.VDI{NameLabel: label})
			return err
		})
	}
	add(d, "old")
	before := d.Stored()
	if revision, _, err := store.Load(t.Context()); err != nil || revision != before {
		t.Fatalf("the store has revision %d, %v, want %d", revision, err, before)
	}
	old, err := db.CopyStore(t.Context(), store)
	if err != nil {
		t.Fatal(err)
	}
	for range 3 {
		add(d, "new")
	}
	newer, token := d.Stored(), d.Revision()
	if newer <= before {
		t.Fatalf("three commits brought the stored revision from %d to %d", before, newer)
	}

	dup := open(t, old)
	if got := dup.Stored(); got != before {
		t.Errorf("the copy has revision %d, want %d", got, before)
	}
	for range 2 { // the second time there is nothing to do
		if err := dup.Advance(t.Context(), newer); err != nil {
			t.Fatal(err)
		}
	}
	if got := dup.Stored(); got <= newer {
		t.Errorf("advanced to %d, the original is at %d", got, newer)
	}
	vdi := xapi.ClassOf[xapi.VDI]()
	view(t, dup, func(tx *db.Tx) {
		if tx.Revision() <= newer {
			t.Errorf("revision %d after advancing beyond %d", tx.Revision(), newer)
		}
		if len(db.ByName[xapi.VDI](tx, "old")) != 1 || tx.Count(vdi) != 1 {
			t.Error("the object is lost")
		}
		changes, complete := tx.Changes(vdi, token)
		n := 0
		for c := range changes {
			n++
			if c.Created <= token || c.Deleted {
				t.Errorf("change %+v after %d", c, token)
			}
		}
		if n != 1 || complete {
			t.Errorf("%d changes after the token, complete: %v", n, complete)
		}
	})
	add(dup, "later")
	stored := dup.Stored()
	if err := dup.Close(); err != nil {
		t.Fatal(err)
	}
	again := open(t, old)
	if got := again.Stored(); got != stored || got <= newer {
		t.Errorf("opened again at %d, was at %d", got, stored)
	}
}
