package cow

import "fmt"

// reapQueue is the references that are to be given up: a stack, kept whole in
// memory and, as of each checkpoint, in a chain of blocks. Only the tree
// writer uses it.
type reapQueue struct {
	ents   []entry
	blocks []entry // the chain as written, bottom first; block i holds entries from i*perBlock on
	stable int     // entries from the bottom that are as written
}

func (q *reapQueue) push(e entry) { q.ents = append(q.ents, e) }

func (q *reapQueue) pop() entry {
	e := q.ents[len(q.ents)-1]
	q.ents = q.ents[:len(q.ents)-1]
	q.stable = min(q.stable, len(q.ents))
	return e
}

// bury puts e below all others.
func (q *reapQueue) bury(e entry) {
	q.ents = append([]entry{e}, q.ents...)
	q.stable = 0
}

// changed reports whether the chain of blocks of per entries has to be written.
func (q *reapQueue) changed(per int) bool {
	return q.stable != len(q.ents) || len(q.blocks) != (len(q.ents)+per-1)/per
}

// top is the entry of the newest block.
func (q *reapQueue) top() entry {
	if len(q.blocks) == 0 {
		return entry{}
	}
	return q.blocks[len(q.blocks)-1]
}

// encodeBlock encodes one block: the entry of the block below, then up to
// linksPerUnit entries.
func encodeBlock(g Geometry, below entry, ents []entry) []byte {
	b := make([]byte, g.UnitSize)
	below.put(b)
	for i, e := range ents {
		e.put(b[(i+1)*entrySize:])
	}
	return b
}

// decodeBlock decodes a block with n entries.
func decodeBlock(g Geometry, b []byte, n int) (below entry, ents []entry, err error) {
	below = getEntry(b)
	if !below.isHole() && (below.kind != kindData || below.check(1) != nil) {
		return below, nil, fmt.Errorf("bad link %+v", below)
	}
	for i := range n {
		e := getEntry(b[(i+1)*entrySize:])
		if !e.refers() || e.kind == kindData && e.check(1) != nil || e.kind == kindPage && checkRoot(e, g) != nil {
			return below, nil, fmt.Errorf("bad queue entry %+v", e)
		}
		ents = append(ents, e)
	}
	return below, ents, nil
}

// loadQueue reads the chain of n entries that ends in top.
func loadQueue(r *pageReader, top entry, n uint64) (*reapQueue, error) {
	q := &reapQueue{stable: int(n)}
	per := uint64(r.geo.linksPerUnit())
	var parts [][]entry
	b := make([]byte, r.geo.UnitSize)
	for e := top; n > 0; {
		if e.kind != kindData || e.addr == 0 {
			return nil, &CorruptError{Detail: "reap queue: chain is short"}
		}
		if err := r.verified(b, e); err != nil {
			return nil, fmt.Errorf("reap queue: %w", err)
		}
		k := (n-1)%per + 1
		below, ents, err := decodeBlock(r.geo, b, int(k))
		if err != nil {
			return nil, &CorruptError{Addr: e.addr, Detail: "reap queue: " + err.Error()}
		}
		parts, q.blocks = append(parts, ents), append(q.blocks, e)
		n -= k
		if e = below; n == 0 && !e.isHole() {
			return nil, &CorruptError{Addr: e.addr, Detail: "reap queue: chain is long"}
		}
	}
	for i := len(parts) - 1; i >= 0; i-- {
		q.ents = append(q.ents, parts[i]...)
	}
	for i, j := 0, len(q.blocks)-1; i < j; i, j = i+1, j-1 {
		q.blocks[i], q.blocks[j] = q.blocks[j], q.blocks[i]
	}
	return q, nil
}
