package cow

import (
	"cmp"
	"slices"
	"sync"
)

// maxDamage is how many problems the table of damage holds.
const maxDamage = 1000

// damageTable is what is known to be damaged.
type damageTable struct {
	mu   sync.Mutex
	list []Problem // guarded by mu
}

// Damage lists what the store knows to be damaged: what the last complete
// [Store.Scrub] found, and what reads have met since, in the order of volumes
// and offsets. An entry stays until the next complete scrub, even if the range
// has been written anew. It holds the first thousand.
func (s *Store) Damage() []Problem {
	s.damage.mu.Lock()
	list := slices.Clone(s.damage.list)
	s.damage.mu.Unlock()
	slices.SortFunc(list, func(a, b Problem) int {
		return cmp.Or(slices.Compare(a.Volume[:], b.Volume[:]), cmp.Compare(a.Off, b.Off), cmp.Compare(a.Addr, b.Addr))
	})
	return list
}

// add notes damage that a read has met.
func (t *damageTable) add(e *CorruptError) {
	p := Problem{Volume: e.Volume, Off: e.Off, Addr: e.Addr, Detail: e.Detail}
	t.mu.Lock()
	defer t.mu.Unlock()
	same := func(o Problem) bool { return o.Volume == p.Volume && o.Addr == p.Addr }
	if len(t.list) < maxDamage && !slices.ContainsFunc(t.list, same) {
		t.list = append(t.list, p)
	}
}

// replace takes over the findings of a complete scrub.
func (t *damageTable) replace(found []Problem) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.list = nil
	for _, p := range found {
		if p.Done == "" && len(t.list) < maxDamage {
			t.list = append(t.list, p)
		}
	}
}
