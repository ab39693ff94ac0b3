package db_test

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"path/filepath"
	"reflect"
	"testing"

	"pgregory.net/rapid"

	"coppice/internal/db"
	"coppice/internal/db/bolt"
	"coppice/internal/xapi"
)

var errInjected = errors.New("injected")

// faultyStore fails the commit after the next few ones, with or without applying it.
type faultyStore struct {
	db.Store
	left  int // commits until the failure; negative: never
	apply bool
	fired bool
}

func (s *faultyStore) Commit(ctx context.Context, b db.Batch) error {
	if s.left != 0 {
		s.left--
		return s.Store.Commit(ctx, b)
	}
	s.fired = true
	if s.apply {
		if err := s.Store.Commit(ctx, b); err != nil {
			return err
		}
	}
	return errInjected
}

type stamp struct{ created, modified uint64 }

// touch holds the revisions at which an object was last written to in any way, and last inserted.
type touch struct{ written, inserted uint64 }

// dbModel is the database and the model that it must equal.
type dbModel struct {
	store *faultyStore
	base  func() db.Store // opens the same store again
	db    *db.DB

	now     records
	touched map[string]touch // when an object was written to, by reference
	changed map[string]stamp // revisions of creation and last real change
	deleted map[string]stamp // modified: revision of the deletion
	opened  uint64           // revision at the last open
	used    map[string]bool  // references that objects have had
	again   map[string]bool  // those that more than one has had

	clients []*client
}

// client is somebody who has followed the changes of a database up to a position and then paused.
type client struct {
	at   db.Position
	seen records // of classes that survive a restart
}

// pause has a client stop here who has seen everything.
func (m *dbModel) pause(*rapid.T) {
	_ = m.db.View(func(tx *db.Tx) error {
		m.clients = append(m.clients, &client{tx.Position(), actual(tx).persistent()})
		return nil
	})
}

// resume has a paused client catch up: from what it has seen and what is told to it comes what is.
func (m *dbModel) resume(t *rapid.T) {
	if len(m.clients) == 0 {
		t.Skip("nobody has paused")
	}
	_ = m.db.View(func(tx *db.Tx) error {
		m.catchUp(t, tx, rapid.SampledFrom(m.clients).Draw(t, "client"))
		return nil
	})
}

func (m *dbModel) catchUp(t *rapid.T, tx *db.Tx, c *client) {
	after := m.db.Since(tx, c.at)
	if after != 0 && after != c.at.Revision && after != c.at.Lasting {
		t.Fatalf("since %+v is after %d", c.at, after)
	}
	got := make(records)
	for name, objects := range c.seen {
		got[name] = make(map[string]any)
		if after > 0 {
			got[name] = maps.Clone(objects)
		}
		changes, complete := tx.Changes(class(name), after)
		if !complete {
			t.Fatalf("%s: changes after %d are not complete", name, after)
		}
		for ch := range changes {
			_, had := objects[ch.Ref]
			switch {
			case ch.Deleted && after > 0 && !had && !m.again[ch.Ref]:
				t.Fatalf("%s is deleted, but the client has never seen it", ch.Ref)
			case ch.Deleted:
				delete(got[name], ch.Ref)
			case ch.Created <= after && !had:
				t.Fatalf("%s is only modified, but the client has never seen it", ch.Ref)
			default:
				got[name][ch.Ref] = class(name).Clone(ch.Rec)
			}
		}
	}
	if diff := diffRecords(actual(tx).persistent(), got.sorted()); diff != "" {
		t.Fatalf("a client of %+v, told what came after %d, has (-want +got)\n%s", c.at, after, diff)
	}
}

func (m *dbModel) open(t *rapid.T) {
	m.store = &faultyStore{Store: m.base(), left: -1}
	d, err := db.Open(context.Background(), xapi.Datamodel(), m.store)
	if err != nil {
		t.Fatal(err)
	}
	m.db, m.opened = d, d.Revision()
	if err := d.Settle(context.Background(), func(*db.Tx) error { return nil }); err != nil {
		t.Fatal(err)
	}
}

// reopen closes and opens the database: what is in memory only is gone. Whoever paused after something lasting had
// happened in the run goes on from there.
func (m *dbModel) reopen(t *rapid.T) {
	well, ran := m.store.left < 0, m.opened
	m.pause(t)
	last := m.clients[len(m.clients)-1].at
	if err := m.db.Close(); err != nil {
		t.Fatal(err)
	}
	m.open(t)
	if m.opened <= last.Revision {
		t.Fatalf("revision %d after %d", m.opened, last.Revision)
	}
	_ = m.db.View(func(tx *db.Tx) error {
		if well && last.Lasting >= ran && m.db.Since(tx, last) == 0 {
			t.Fatalf("position %+v of before an orderly restart is not known", last)
		}
		for _, c := range m.clients {
			m.catchUp(t, tx, c)
		}
		return nil
	})
	m.touched, m.changed, m.deleted = map[string]touch{}, map[string]stamp{}, map[string]stamp{}
	for _, name := range modelClasses {
		c := class(name)
		if !c.Persist {
			clear(m.now[name])
		}
		for _, rec := range m.now[name] {
			for _, f := range c.Fields {
				if !f.Persist {
					f.Set(rec, f.Get(c.New()))
				}
			}
		}
	}
	_ = m.db.View(func(tx *db.Tx) error { // catchUp has checked what these are good for
		for _, name := range modelClasses {
			changes, _ := tx.Changes(class(name), 0)
			for ch := range changes {
				if !ch.Deleted {
					m.changed[ch.Ref] = stamp{ch.Created, ch.Modified}
				}
			}
		}
		return nil
	})
}

// sync makes the position known to later runs.
func (m *dbModel) sync(t *rapid.T) {
	if m.store.left >= 0 {
		t.Skip("the store is about to fail")
	}
	if err := m.db.Sync(context.Background()); err != nil {
		t.Fatal(err)
	}
}

// update runs a few steps in one transaction, which may be given up or meet a failing store.
func (m *dbModel) update(t *rapid.T) {
	if rapid.IntRange(0, 9).Draw(t, "fault") == 0 {
		m.store.left, m.store.apply = rapid.IntRange(0, 2).Draw(t, "left"), rapid.Bool().Draw(t, "apply")
	}
	before := m.db.Revision()
	next, written := m.now.clone(), maps.Clone(m.touched)
	giveUp := errors.New("give up")
	err := m.db.Update(context.Background(), func(tx *db.Tx) error {
		for range rapid.IntRange(1, 4).Draw(t, "steps") {
			step(t, tx, next, written)
		}
		if diff := diffRecords(next.complete(), actual(tx)); diff != "" {
			t.Fatalf("inside the transaction (-want +got)\n%s", diff)
		}
		if rapid.IntRange(0, 4).Draw(t, "give up") == 0 {
			return giveUp
		}
		return nil
	})
	if err != nil && m.db.Revision() != before {
		t.Fatalf("a failed update made revision %d", m.db.Revision())
	}
	switch {
	case err == nil:
		if got := m.db.Revision(); got > before+1 {
			t.Fatalf("one update made revision %d after %d", got, before)
		}
		m.commit(next, written)
	case errors.Is(err, errInjected):
		if _, ok := errors.AsType[*db.StoreError](err); !ok || !m.store.fired {
			t.Fatalf("store failure reported as %T", err)
		}
		if err := m.db.Update(context.Background(), func(*db.Tx) error { return nil }); !errors.Is(err, errInjected) {
			t.Fatalf("update after a store failure: %v", err)
		}
		m.check(t)
		if m.store.apply {
			m.reuse(written)
			m.now = next
		}
		m.reopen(t)
	case !errors.Is(err, giveUp):
		t.Fatal(err)
	}
}

// commit takes over what an update has made and notes which objects really changed.
func (m *dbModel) commit(next records, written map[string]touch) {
	m.reuse(written)
	revision := m.db.Revision()
	was, is := m.now.complete(), next.complete()
	for _, name := range modelClasses {
		for ref := range was[name] {
			if is[name][ref] == nil {
				m.deleted[ref] = stamp{m.changed[ref].created, revision}
				delete(m.changed, ref)
			}
		}
		for ref, rec := range is[name] {
			s := m.changed[ref]
			if was[name][ref] == nil || written[ref].inserted == revision {
				s.created = revision
			}
			if s.created == revision || !reflect.DeepEqual(was[name][ref], rec) {
				s.modified = revision
			}
			m.changed[ref] = s
		}
	}
	for ref, w := range written {
		if _, lives := m.changed[ref]; !lives && w.inserted == revision && m.again[ref] { // and was deleted again
			m.deleted[ref] = stamp{revision, revision}
		}
	}
	m.now, m.touched = next, written
}

// reuse notes which references an update has used, and which of them not for the first time.
func (m *dbModel) reuse(written map[string]touch) {
	for ref, w := range written {
		if w.inserted == m.touched[ref].inserted {
			continue
		}
		delete(m.deleted, ref)
		m.again[ref] = m.again[ref] || m.used[ref]
		m.used[ref] = true
	}
}

// TestModel runs random transactions with failing stores and restarts against plain maps. A part of the runs
// is on disk.
func TestModel(t *testing.T) {
	dir, n := t.TempDir(), 0
	rapid.Check(t, func(t *rapid.T) {
		if rapid.IntRange(0, 9).Draw(t, "disk") > 0 {
			s := db.NewMemStore()
			runModel(t, func() db.Store { return s })
			return
		}
		n++
		path := filepath.Join(dir, fmt.Sprint(n))
		runModel(t, func() db.Store {
			s, err := bolt.Open(path)
			if err != nil {
				t.Fatal(err)
			}
			if err := s.Check(); err != nil {
				t.Fatal(err)
			}
			return s
		})
	})
}

func runModel(t *rapid.T, base func() db.Store) {
	m := &dbModel{
		base: base, now: make(records),
		touched: map[string]touch{}, changed: map[string]stamp{}, deleted: map[string]stamp{},
		used: map[string]bool{}, again: map[string]bool{},
	}
	for _, name := range modelClasses {
		m.now[name] = make(map[string]any)
	}
	m.open(t)
	defer func() { _ = m.db.Close() }()
	t.Repeat(map[string]func(*rapid.T){
		"":       m.check,
		"update": m.update,
		"again":  m.update,
		"reopen": m.reopen,
		"pause":  m.pause,
		"resume": m.resume,
		"sync":   m.sync,
	})
}
