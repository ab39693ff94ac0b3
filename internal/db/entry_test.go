package db

import (
	"bytes"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// sample is an entry with every kind of change.
var sample = entry{
	revision: 1000, prev: 990, basis: 1 << 20, ceiling: 1<<20 + 1000, first: true,
	changes: []change{
		{class: "VDI", ref: "OpaqueRef:3c30a500-a8c5-4c8a-afe5-25172f6c9d70", created: 995, modified: 1000, told: 7},
		{class: "VDI", ref: "OpaqueRef:3C30A500-a8c5-4c8a-afe5-25172f6c9d70", modified: 991},
		{class: "VDI", ref: "", modified: 999, deleted: true},
		{class: "VDI", ref: "again", created: 999, modified: 1000, born: 1, deleted: true},
		{class: "VM", ref: "any", told: 1<<32 - 1},
	},
}

func TestEntry(t *testing.T) {
	for _, e := range []entry{sample, {revision: 1, ceiling: 2, reset: true}} {
		got, err := decodeEntry(e.encode())
		if diff := cmp.Diff(e, got, cmp.AllowUnexported(entry{}, change{})); err != nil || diff != "" {
			t.Errorf("%v (-want +got)\n%s", err, diff)
		}
	}
	whole := sample.encode()
	for n := range whole {
		if e, err := decodeEntry(whole[:n]); err == nil && len(e.changes) == len(sample.changes) {
			t.Errorf("the first %d of %d bytes are an entry", n, len(whole))
		}
	}
}

func FuzzEntry(f *testing.F) {
	f.Add(sample.encode())
	f.Add([]byte{1, 2, 1, 0, 1, 2})
	f.Add([]byte{})
	f.Fuzz(func(t *testing.T, data []byte) {
		e, err := decodeEntry(data)
		if err != nil {
			return
		}
		b := e.encode()
		again, err := decodeEntry(b)
		if err != nil || !bytes.Equal(again.encode(), b) {
			t.Errorf("%v: %x becomes %x", err, b, again.encode())
		}
	})
}

// TestHistoryOfLargeCommits makes few entries of many changes: their sum is bounded, too, and the ring is found again as
// it was left.
func TestHistoryOfLargeCommits(t *testing.T) {
	rows := map[string][]byte{}
	var h history
	stored := uint64(0)
	for n := range 3 * historySlots {
		size := n % 7
		if n%100 == 0 {
			size = 10_000
		}
		e := &entry{revision: uint64(n + 1), prev: uint64(n), basis: stored, ceiling: stored + 1, changes: make([]change, size)}
		for i := range e.changes {
			e.changes[i] = change{class: "VDI", ref: "r", modified: e.revision}
		}
		stored++
		for _, r := range h.rows(e) {
			if r.Class != historyClass || r.Data == nil {
				t.Fatalf("row %+v", r)
			}
			rows[r.Ref] = r.Data
		}
		h.add(e)
		if h.total > historyChanges || h.count > historySlots {
			t.Fatalf("%d changes in %d entries", h.total, h.count)
		}
		if n%997 != 0 && n%100 != 1 {
			continue
		}
		p := remember(stored, rows)
		p.ring.logged = h.logged
		if p.ring != h {
			t.Fatalf("step %d: found %d changes in %d entries from %d, want %d in %d from %d",
				n, p.ring.total, p.ring.count, p.ring.oldest, h.total, h.count, h.oldest)
		}
		if want := (run{e.revision - uint64(h.count), e.revision}); len(p.runs) != 1 || p.runs[0] != want {
			t.Fatalf("step %d: runs %v, want %v", n, p.runs, want)
		}
	}
	if len(rows) != historySlots {
		t.Errorf("%d rows", len(rows))
	}
}
