package cow

import (
	"hash/maphash"
	"math/bits"
	"sync"
	"sync/atomic"
)

const cacheShards = 16

// pageCache keeps map pages by their whole entry, so that a stale page can
// never be taken for the one that was written to the same unit later. Pages
// are immutable. Within a shard the CLOCK rule decides what goes.
//
// Beside that it remembers, without locks, at which leaf the way from a root
// to a chunk has ended. What a root leads to never changes, so nothing has to
// be invalidated; a place is overwritten by the next way that falls on it.
type pageCache struct {
	seed   maphash.Seed
	shards [cacheShards]cacheShard
	leafs  []atomic.Pointer[leafRef] // as many as a power of two
}

// leafRef is where the way from a root to a chunk ends.
type leafRef struct {
	root  entry
	chunk uint64
	page  *cachedPage // nil for a hole
}

// leafShare is the share of the cache that the pages at the ends of ways may
// keep from being given up.
const leafShare = 8

type cacheShard struct {
	mu    sync.RWMutex // guards what follows
	pages map[entry]*cachedPage
	ring  []*cachedPage
	hand  int
	max   int
}

type cachedPage struct {
	key  entry
	data []byte
	used atomic.Bool // since the hand last passed
}

func newPageCache(size int64, unitSize int) *pageCache {
	pages := size / int64(unitSize)
	leafs := 1 << max(0, bits.Len64(uint64(pages/leafShare))-1)
	c := &pageCache{seed: maphash.MakeSeed(), leafs: make([]atomic.Pointer[leafRef], leafs)}
	for i := range c.shards {
		c.shards[i].pages = map[entry]*cachedPage{}
		c.shards[i].max = int(max(4, (pages-int64(leafs))/cacheShards))
	}
	return c
}

func (c *pageCache) shard(e entry) *cacheShard {
	return &c.shards[maphash.Comparable(c.seed, e.addr)%cacheShards]
}

// get returns the contents of a page, nil when it is not there.
func (c *pageCache) get(e entry) []byte {
	p := c.find(e)
	if p == nil {
		return nil
	}
	return p.data
}

func (c *pageCache) find(e entry) *cachedPage {
	s := c.shard(e)
	s.mu.RLock()
	p := s.pages[e]
	s.mu.RUnlock()
	if p != nil {
		p.use()
	}
	return p
}

// use keeps the page for another round of the hand.
func (p *cachedPage) use() {
	if !p.used.Load() {
		p.used.Store(true)
	}
}

// put takes a page over, unless it is there already, and returns it.
func (c *pageCache) put(e entry, data []byte) *cachedPage {
	s := c.shard(e)
	s.mu.Lock()
	defer s.mu.Unlock()
	if p := s.pages[e]; p != nil {
		return p
	}
	p := &cachedPage{key: e, data: data}
	s.pages[e] = p
	if len(s.ring) < s.max {
		s.ring = append(s.ring, p)
		return p
	}
	for s.ring[s.hand].used.Swap(false) {
		s.hand = (s.hand + 1) % len(s.ring)
	}
	delete(s.pages, s.ring[s.hand].key)
	s.ring[s.hand] = p
	s.hand = (s.hand + 1) % len(s.ring)
	return p
}

// way is the place for the end of the way from root to chunk.
func (c *pageCache) way(root entry, chunk uint64) *atomic.Pointer[leafRef] {
	// Neighbouring chunks have neighbouring places, roots are scattered.
	h := chunk + (root.addr*0x9e3779b97f4a7c15)>>20
	return &c.leafs[h&uint64(len(c.leafs)-1)]
}

// leaf returns the end of the way from root to chunk, if it is remembered: nil
// for a hole.
func (c *pageCache) leaf(root entry, chunk uint64) (page []byte, ok bool) {
	ref := c.way(root, chunk).Load()
	if ref == nil || ref.chunk != chunk || ref.root != root {
		return nil, false
	}
	if ref.page == nil {
		return nil, true
	}
	ref.page.use()
	return ref.page.data, true
}

func (c *pageCache) putLeaf(root entry, chunk uint64, p *cachedPage) {
	c.way(root, chunk).Store(&leafRef{root: root, chunk: chunk, page: p})
}
