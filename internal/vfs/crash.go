package vfs

import (
	"cmp"
	"iter"
	"maps"
	"slices"
)

// Choose decides one thing that a power cut leaves open: it returns the index
// of one of n ≥ 2 outcomes, ordered in time, of which 0 is what was last made
// durable and n-1 what was last written. The IntN method of a seeded
// math/rand/v2 generator is one.
type Choose func(n int) int

// Crash returns a new directory as a power cut at this instant may leave it:
// each directory operation since the last SyncDir has happened or not; each
// file has one of the sizes, and each 512-byte sector of it one of the
// contents, that it had since its last Datasync. choose is asked about the
// directory operations in order, then file by file in the order of creation,
// about the size and then about the sectors in ascending order, whenever
// there is more than one outcome. The result is all durable and unlocked, and
// shares nothing that changes with m, which goes on as before.
func (m *Mem) Crash(choose Choose) *Mem {
	m.mu.RLock()
	defer m.mu.RUnlock()
	dir := maps.Clone(m.durable)
	for _, op := range m.pending {
		if choose(2) == 1 {
			op.apply(dir)
		}
	}
	return m.rebuild(func(c *Mem, kept map[*inode]*inode) {
		nodes := slices.SortedFunc(maps.Values(dir), func(a, b *inode) int { return cmp.Compare(a.id, b.id) })
		for _, n := range slices.Compact(nodes) {
			kept[n] = n.crash(n.id, choose)
		}
		c.now = renamed(dir, kept)
		c.durable = maps.Clone(c.now)
	})
}

// Crashes yields every directory that a power cut at this instant may leave,
// the one with nothing but durable contents first. There may be very many;
// a caller stops when it has seen enough.
func (m *Mem) Crashes() iter.Seq[*Mem] {
	return func(yield func(*Mem) bool) {
		type choice struct{ picked, of int }
		var path []choice
		for {
			depth := 0
			c := m.Crash(func(n int) int {
				if depth == len(path) {
					path = append(path, choice{0, n})
				}
				depth++
				return path[depth-1].picked
			})
			if !yield(c) {
				return
			}
			for len(path) > 0 && path[len(path)-1].picked == path[len(path)-1].of-1 {
				path = path[:len(path)-1]
			}
			if len(path) == 0 {
				return
			}
			path[len(path)-1].picked++
		}
	}
}

// Kill returns a new, unlocked directory as the end of the process at this
// instant leaves it: everything written is there to read, and what was not
// synced still is not, so that a later Crash of the result may take it. m
// goes on as before.
func (m *Mem) Kill() *Mem {
	m.mu.RLock()
	defer m.mu.RUnlock()
	return m.rebuild(func(c *Mem, kept map[*inode]*inode) {
		keep := func(n *inode, linked bool) {
			if n != nil && kept[n] == nil {
				kept[n] = n.kill()
				kept[n].linked = linked
			}
		}
		for _, n := range m.now {
			keep(n, true)
		}
		// A removed file has no readers, but its removal may yet be undone.
		for _, n := range m.durable {
			keep(n, false)
		}
		for _, op := range m.pending {
			keep(op.node, false)
		}
		c.now, c.durable = renamed(m.now, kept), renamed(m.durable, kept)
		for _, op := range m.pending {
			c.pending = append(c.pending, dirOp{op.name, op.old, kept[op.node]})
		}
	})
}

// rebuild makes a clone whose files fill puts into kept, by their originals.
func (m *Mem) rebuild(fill func(c *Mem, kept map[*inode]*inode)) *Mem {
	c := NewMem(m.capacity)
	c.lastID = m.lastID
	kept := map[*inode]*inode{}
	fill(c, kept)
	for _, n := range kept {
		if n.linked {
			c.used += n.space.total()
		}
	}
	return c
}

// renamed returns dir with each file replaced by its clone.
func renamed(dir map[string]*inode, kept map[*inode]*inode) map[string]*inode {
	out := make(map[string]*inode, len(dir))
	for name, n := range dir {
		out[name] = kept[n]
	}
	return out
}
