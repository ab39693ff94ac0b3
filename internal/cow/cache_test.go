package cow

import (
	"fmt"
	"testing"
)

func TestSearchSlots(t *testing.T) {
	for _, have := range [][]int{nil, {0}, {7}, {0, 1, 2, 3}, {3, 4, 5}, {0, 2, 4, 9}, {1, 2, 3, 8, 9, 15}, {5, 15}} {
		var ss []slot
		for _, i := range have {
			ss = append(ss, slot{idx: uint16(i), state: slotZero})
		}
		for idx := range 16 {
			want := 0
			for want < len(have) && have[want] < idx {
				want++
			}
			if got := search(ss, idx); got != want {
				t.Errorf("unit %d in %v: got place %d, want %d", idx, have, got, want)
			}
		}
	}
}

// TestPageCacheBound fills a cache far beyond its size in both ways that keep
// a page, and counts what is kept.
func TestPageCacheBound(t *testing.T) {
	const unit, size = 512, 64 * 512
	c := newPageCache(size, unit)
	root := entry{addr: 1, kind: kindPage, level: 2}
	for i := range uint64(1000) {
		e := entry{addr: 100 + i, kind: kindPage, level: 1}
		c.putLeaf(root, i, c.put(e, fmt.Appendf(nil, "page %d", i)))
		if b, ok := c.leaf(root, i); !ok || string(b) != fmt.Sprint("page ", i) {
			t.Fatalf("chunk %d: got %q, %v", i, b, ok)
		}
		other := root
		other.birth++ // another tree at the same address
		if b, ok := c.leaf(other, i); ok {
			t.Fatalf("chunk %d of another root: got %q", i, b)
		}
	}
	kept := map[*cachedPage]bool{}
	for i := range c.shards {
		for _, p := range c.shards[i].pages {
			kept[p] = true
		}
	}
	for i := range c.leafs {
		if ref := c.leafs[i].Load(); ref != nil {
			kept[ref.page] = true
		}
	}
	if most := max(size/unit, 4*cacheShards+len(c.leafs)); len(kept) > most {
		t.Errorf("the cache keeps %d pages, want at most %d", len(kept), most)
	}
	c.putLeaf(root, 5, nil)
	if b, ok := c.leaf(root, 5); !ok || b != nil {
		t.Errorf("hole: got %q, %v", b, ok)
	}
}
