package db_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"

	"coppice/internal/db"
	"coppice/internal/xapi"
)

// gateStore lets each commit through when the test says so, and answers it with what the test says.
type gateStore struct {
	*db.MemStore
	entered chan db.Batch
	answer  chan error
}

func newGateStore() *gateStore {
	return &gateStore{db.NewMemStore(), make(chan db.Batch), make(chan error)}
}

func (s *gateStore) Commit(ctx context.Context, b db.Batch) error {
	s.entered <- b
	if err := <-s.answer; err != nil {
		return err
	}
	return s.MemStore.Commit(ctx, b)
}

func addVDI(tx *db.Tx) error { _, err := db.Insert(tx, &xapi.VDI{}); return err }

func addTask(tx *db.Tx) error { _, err := db.Insert(tx, &xapi.Task{}); return err }

func count[T any](t *testing.T, d *db.DB) (n int) {
	view(t, d, func(tx *db.Tx) { n = tx.Count(xapi.ClassOf[T]()) })
	return n
}

// objectRows counts the rows of a batch that are objects of the model.
func objectRows(b db.Batch) (n int) {
	for _, r := range b.Rows {
		if xapi.Datamodel().Classes[r.Class] != nil {
			n++
		}
	}
	return n
}

// TestGroupCommit holds the first commit in the store while more updates queue: they share the second, nothing
// is visible before it is durable, and updates in memory keep their place in the order.
func TestGroupCommit(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newGateStore()
		d, err := db.Open(t.Context(), xapi.Datamodel(), s)
		if err != nil {
			t.Fatal(err)
		}
		var wg sync.WaitGroup
		start := func(fn func(*db.Tx) error) {
			wg.Go(func() { update(t, d, fn) })
			synctest.Wait()
		}
		start(addVDI)
		if n := objectRows(<-s.entered); n != 1 {
			t.Errorf("first batch has %d rows", n)
		}
		for range 20 {
			start(addVDI)
		}
		start(addTask)
		start(func(tx *db.Tx) error { // reads what is not durable yet, so it must not return before it is
			if n := tx.Count(xapi.ClassOf[xapi.VDI]()); n != 21 {
				t.Errorf("an update saw %d VDIs, want 21", n)
			}
			return nil
		})
		if n, m := count[xapi.VDI](t, d), count[xapi.Task](t, d); n != 0 || m != 0 {
			t.Errorf("%d VDIs and %d tasks are visible before they are durable", n, m)
		}
		s.answer <- nil
		if n := objectRows(<-s.entered); n != 20 {
			t.Errorf("second batch has %d rows, want 20", n)
		}
		synctest.Wait()
		if n := count[xapi.VDI](t, d); n != 1 {
			t.Errorf("%d VDIs are visible after the first commit", n)
		}
		s.answer <- nil
		wg.Wait()
		if n, m := count[xapi.VDI](t, d), count[xapi.Task](t, d); n != 21 || m != 1 {
			t.Errorf("in the end %d VDIs and %d tasks are visible", n, m)
		}
		start(addVDI)
		<-s.entered
		start(addTask) // has nothing to write and nobody queues before it, but it builds on what is not durable
		if n, m := count[xapi.VDI](t, d), count[xapi.Task](t, d); n != 21 || m != 1 {
			t.Errorf("an update overtook a commit: %d VDIs and %d tasks are visible", n, m)
		}
		s.answer <- nil
		wg.Wait()
		if err := d.Close(); err != nil {
			t.Error(err)
		}
	})
}

// gated is a database on a gateStore, and the updates that a test has begun on it.
type gated struct {
	store   *gateStore
	db      *db.DB
	opened  uint64 // revision
	updates sync.WaitGroup
	errs    chan error // what they returned
}

func (g *gated) start(fn func(*db.Tx) error) {
	g.updates.Go(func() { g.errs <- g.db.Update(context.Background(), fn) })
	synctest.Wait()
}

// refused opens a database whose store answers the first commit with an error, when two more updates have been
// built on it.
func refused(t *testing.T, answer error) *gated {
	t.Helper()
	g := &gated{store: newGateStore(), errs: make(chan error, 10)}
	var err error
	if g.db, err = db.Open(t.Context(), xapi.Datamodel(), g.store); err != nil {
		t.Fatal(err)
	}
	g.opened = g.db.Revision()
	g.start(addVDI)
	<-g.store.entered
	g.start(addVDI)
	g.start(addTask)
	g.store.answer <- answer
	g.updates.Wait()
	return g
}

// TestStoreFailure fails a commit on which others have built: all of them fail, nothing becomes visible, and
// the database is read-only.
func TestStoreFailure(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := refused(t, errInjected)
		d := g.db
		g.start(addTask)
		g.updates.Wait()
		close(g.errs)
		for err := range g.errs {
			if _, ok := errors.AsType[*db.StoreError](err); !ok || !errors.Is(err, errInjected) {
				t.Errorf("got %v, want a StoreError", err)
			}
		}
		if n, m := count[xapi.VDI](t, d), count[xapi.Task](t, d); n != 0 || m != 0 || d.Revision() != g.opened {
			t.Errorf("%d VDIs and %d tasks of failed updates are visible at revision %d", n, m, d.Revision())
		}
		if err := d.Close(); err != nil {
			t.Error(err)
		}
	})
}

// TestFullStore refuses a commit on which others have built for want of room: all of them fail, nothing becomes
// visible, and the next update finds the database as it was.
func TestFullStore(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := refused(t, fmt.Errorf("commit: %w", db.ErrFull))
		s, d := g.store, g.db
		for range 3 {
			if err := <-g.errs; !errors.Is(err, db.ErrFull) {
				t.Errorf("got %v, want ErrFull", err)
			}
		}
		g.start(addVDI)
		if n := objectRows(<-s.entered); n != 1 {
			t.Errorf("a later batch has %d rows, want 1", n)
		}
		s.answer <- nil
		g.updates.Wait()
		if err := <-g.errs; err != nil {
			t.Errorf("a later update: %v", err)
		}
		if n, m := count[xapi.VDI](t, d), count[xapi.Task](t, d); n != 1 || m != 0 {
			t.Errorf("%d VDIs and %d tasks are visible, want 1 and 0", n, m)
		}
		if err := d.Close(); err != nil {
			t.Error(err)
		}
	})
}

// TestCloseWaits closes the database while an update is being written.
func TestCloseWaits(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newGateStore()
		d, err := db.Open(t.Context(), xapi.Datamodel(), s)
		if err != nil {
			t.Fatal(err)
		}
		var wg sync.WaitGroup
		wg.Go(func() { update(t, d, addVDI) })
		<-s.entered
		var closed atomic.Bool
		wg.Go(func() {
			if err := d.Close(); err != nil {
				t.Error(err)
			}
			closed.Store(true)
		})
		synctest.Wait()
		if closed.Load() {
			t.Error("closed before the commit ended")
		}
		s.answer <- nil
		wg.Wait()
		if n := count[xapi.VDI](t, d); n != 1 {
			t.Errorf("%d VDIs after close", n)
		}
	})
}

// TestRevisionSurvivesCrash leaves a database without closing it after commits that the store never saw.
func TestRevisionSurvivesCrash(t *testing.T) {
	s := db.NewMemStore()
	last := uint64(0)
	for range 3 {
		d, err := db.Open(t.Context(), xapi.Datamodel(), s)
		if err != nil {
			t.Fatal(err)
		}
		if d.Revision() <= last {
			t.Fatalf("opened at revision %d, but %d was handed out before", d.Revision(), last)
		}
		commits := s.Commits()
		for range 100 {
			update(t, d, addTask)
		}
		if got := s.Commits() - commits; got != 1 { // the first one reserves revisions
			t.Errorf("100 updates in memory made %d commits", got)
		}
		last = d.Revision()
	}
}

// TestCorruptRows checks that a row that cannot be read is reported with its place.
func TestCorruptRows(t *testing.T) {
	for data, field := range map[string]string{
		``:                                    "",
		`[]`:                                  "",
		`{`:                                   "",
		`{"uuid":"a"`:                         "",
		`{"virtual_size":"x"}`:                "virtual_size",
		`{"other_config":{"a":1}}`:            "other_config",
		`{"unknown":}`:                        "",
		`{"snapshot_time":"not a time"}`:      "snapshot_time",
		`{"uuid":"same"}`:                     "", // as of the other row
		`{"name_label":"a","uuid":"b" "c":1}`: "",
	} {
		s := db.NewMemStore()
		err := s.Commit(t.Context(), db.Batch{Rows: []db.Row{
			{Class: "VDI", Ref: "r", Data: []byte(data)}, {Class: "VDI", Ref: "q", Data: []byte(`{"uuid":"same"}`)},
		}})
		if err != nil {
			t.Fatal(err)
		}
		_, err = db.Open(t.Context(), xapi.Datamodel(), s)
		c, ok := errors.AsType[*db.CorruptError](err)
		if !ok || c.Class != "VDI" || c.Field != field {
			t.Errorf("%s: got %v, want a CorruptError of field %q", data, err, field)
		}
	}
}

// TestUnknownDataIsKept stores a field and a class of a newer model and an older spelling of others.
func TestUnknownDataIsKept(t *testing.T) {
	s := db.NewMemStore()
	err := s.Commit(t.Context(), db.Batch{Rows: []db.Row{
		{Class: "VDI", Ref: "v", Data: []byte(`{"uuid":"u","future \"field":{"a":[1]},"tags":null,"VBDs":["junk"]}`)},
		{Class: "Future", Ref: "f", Data: []byte(`whatever`)},
	}})
	if err != nil {
		t.Fatal(err)
	}
	d := open(t, s)
	update(t, d, func(tx *db.Tx) error {
		return db.Modify(tx, "v", func(v *xapi.VDI) {
			if v.Tags == nil || len(v.VBDs) != 0 || v.OnBoot != xapi.OnBootPersist {
				t.Errorf("loaded %+v", v)
			}
			v.NameLabel = "changed"
		})
	})
	_, rows, err := s.Load(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	n := 0
	for row, err := range rows {
		if err != nil {
			t.Fatal(err)
		}
		if row.Class != "coppice:history" {
			n++
		}
		const want = `"future \"field":{"a":[1]}`
		if row.Class == "VDI" && (!bytes.Contains(row.Data, []byte(want)) || !bytes.Contains(row.Data, []byte(`"name_label":"changed"`))) {
			t.Errorf("stored %s", row.Data)
		}
	}
	if n != 2 {
		t.Errorf("%d rows, want 2", n)
	}
}
