package qcow2

import (
	"iter"
	"math/bits"
)

// perTable is how many clusters of the disk an L2 table of a written image
// describes: 512 MiB of the disk.
const perTable = ClusterSize / 8

// ClusterSet is a set of clusters of one disk. It takes a bit for each cluster
// of those parts of the disk, 512 MiB each, that are neither empty nor full.
type ClusterSet struct {
	size   int64 // of the disk in bytes
	tables []*tableSet
	count  int64 // clusters in the set
	used   int64 // tables with any
}

// tableSet holds the clusters of one L2 table. It is immutable when full.
type tableSet struct {
	words [perTable / 64]uint64
	count int
}

// fullTable stands for every table that has all of its clusters.
var fullTable = func() *tableSet {
	t := &tableSet{count: perTable}
	for i := range t.words {
		t.words[i] = ^uint64(0)
	}
	return t
}()

// NewClusterSet returns an empty set for a disk of size bytes.
func NewClusterSet(size int64) *ClusterSet {
	return &ClusterSet{size: size, tables: make([]*tableSet, ceilDiv(size, ClusterSize*perTable))}
}

// Add puts every cluster into the set that the bytes [off, off+n) of the disk
// touch.
func (s *ClusterSet) Add(off, n int64) {
	if n <= 0 {
		return
	}
	first, last := off/ClusterSize, (off+n-1)/ClusterSize
	for i := first; i <= last; {
		at := i / perTable
		end := min(last+1, (at+1)*perTable)
		s.addTo(at, int(i%perTable), int(end-at*perTable))
		i = end
	}
}

// addTo adds the clusters [from, to) of a table.
func (s *ClusterSet) addTo(at int64, from, to int) {
	t := s.tables[at]
	switch {
	case t == nil:
		t = new(tableSet)
		s.used++
	case t.count == perTable:
		return
	}
	before := t.count
	for i := from; i < to; {
		word := i >> 6
		end := min(to, (word+1)<<6)
		mask := ^uint64(0) << (i & 63) & (^uint64(0) >> (63 - (end-1)&63))
		t.count += bits.OnesCount64(mask &^ t.words[word])
		t.words[word] |= mask
		i = end
	}
	s.count += int64(t.count - before)
	if t.count == perTable {
		t = fullTable
	}
	s.tables[at] = t
}

// Len is the number of clusters in the set.
func (s *ClusterSet) Len() int64 { return s.count }

// Runs yields the set as ranges of the disk in ascending order, each in whole
// clusters, neighbours joined. The last one may reach past the end of the
// disk.
func (s *ClusterSet) Runs() iter.Seq[Run] {
	return func(yield func(Run) bool) {
		var run Run
		for at, t := range s.tables {
			if t == nil {
				continue
			}
			base := int64(at) * perTable
			for from, to := range t.runs() {
				off, end := (base+int64(from))*ClusterSize, (base+int64(to))*ClusterSize
				if run.Len > 0 && run.End() == off {
					run.Len += end - off
					continue
				}
				if run.Len > 0 && !yield(run) {
					return
				}
				run = Run{Off: off, Len: end - off}
			}
		}
		if run.Len > 0 {
			yield(run)
		}
	}
}

// runs yields the clusters of a table as ranges [from, to).
func (t *tableSet) runs() iter.Seq2[int, int] {
	return func(yield func(int, int) bool) {
		if t.count == perTable {
			yield(0, perTable)
			return
		}
		for from := t.next(0, true); from < perTable; {
			to := t.next(from, false)
			if !yield(from, to) {
				return
			}
			from = t.next(to, true)
		}
	}
}

// next returns the first cluster from i on that is in the table, or not;
// perTable when there is none.
func (t *tableSet) next(i int, in bool) int {
	for i < perTable {
		word := t.words[i>>6]
		if !in {
			word = ^word
		}
		if word >>= i & 63; word != 0 {
			return i + bits.TrailingZeros64(word)
		}
		i = (i>>6 + 1) << 6
	}
	return perTable
}
