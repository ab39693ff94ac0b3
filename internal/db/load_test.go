package db_test

import (
	"context"
	"errors"
	"fmt"
	"iter"
	"testing"

	"coppice/internal/db"
	"coppice/internal/xapi"
)

// rowStore has given rows and notes whether they are being read.
type rowStore struct {
	rows    []db.Row
	reading bool
	t       *testing.T
}

func (s *rowStore) Load(context.Context) (uint64, iter.Seq2[db.Row, error], error) {
	return 1, func(yield func(db.Row, error) bool) {
		s.reading = true
		defer func() { s.reading = false }()
		for _, r := range s.rows {
			if !yield(r, nil) {
				return
			}
		}
	}, nil
}

func (s *rowStore) Commit(context.Context, db.Batch) error { return nil }

func (s *rowStore) Close() error {
	if s.reading {
		s.t.Error("the store is closed while its rows are read")
	}
	return nil
}

func TestLoadManyRows(t *testing.T) {
	const n = 3000
	s := &rowStore{t: t}
	for i := range n {
		s.rows = append(s.rows, db.Row{Class: "VDI", Ref: string(diskRef(i)), Data: fmt.Appendf(nil,
			`{"uuid":"%08d-0000-0000-0000-000000000000","name_label":"disk %d","SR":"%s"}`, i, i, benchSR)})
	}
	s.rows = append(s.rows, db.Row{Class: "SR", Ref: string(benchSR), Data: []byte(`{"uuid":"10000000-0000-0000-0000-000000000000"}`)})
	d, err := db.Open(t.Context(), xapi.Datamodel(), s)
	if err != nil {
		t.Fatal(err)
	}
	err = d.View(func(tx *db.Tx) error {
		for i := range n {
			disk, err := db.Get(tx, diskRef(i))
			if err != nil {
				return err
			}
			if want := fmt.Sprint("disk ", i); disk.NameLabel != want {
				t.Fatalf("got %q, want %q", disk.NameLabel, want)
			}
		}
		sr, err := db.Get(tx, benchSR)
		if err == nil && len(sr.VDIs) != n {
			t.Errorf("the SR has %d disks, want %d", len(sr.VDIs), n)
		}
		return err
	})
	if err := errors.Join(err, d.Close()); err != nil {
		t.Fatal(err)
	}

	// The first of two bad rows is named, and nobody reads the store any more
	// when it is closed.
	s.rows[700].Data, s.rows[2500].Data = []byte(`{"name_label":7}`), []byte(`{`)
	_, err = db.Open(t.Context(), xapi.Datamodel(), s)
	if ce, ok := errors.AsType[*db.CorruptError](err); !ok || ce.Ref != string(diskRef(700)) {
		t.Errorf("got %v, want a corrupt row %s", err, diskRef(700))
	}
}
