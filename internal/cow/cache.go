package cow

import (
	"hash/maphash"
	"sync"
	"sync/atomic"
)

const cacheShards = 16

// pageCache keeps map pages by their whole entry, so that a stale page can
// never be taken for the one that was written to the same unit later. Pages
// are immutable. Within a shard the CLOCK rule decides what goes.
type pageCache struct {
	seed   maphash.Seed
	shards [cacheShards]cacheShard
}

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

func newPageCache(bytes int64, unitSize int) *pageCache {
	c := &pageCache{seed: maphash.MakeSeed()}
	for i := range c.shards {
		c.shards[i].pages = map[entry]*cachedPage{}
		c.shards[i].max = int(max(4, bytes/int64(unitSize)/cacheShards))
	}
	return c
}

func (c *pageCache) shard(e entry) *cacheShard {
	return &c.shards[maphash.Comparable(c.seed, e.addr)%cacheShards]
}

func (c *pageCache) get(e entry) []byte {
	s := c.shard(e)
	s.mu.RLock()
	p := s.pages[e]
	s.mu.RUnlock()
	if p == nil {
		return nil
	}
	if !p.used.Load() {
		p.used.Store(true)
	}
	return p.data
}

func (c *pageCache) put(e entry, data []byte) {
	s := c.shard(e)
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.pages[e] != nil {
		return
	}
	p := &cachedPage{key: e, data: data}
	s.pages[e] = p
	if len(s.ring) < s.max {
		s.ring = append(s.ring, p)
		return
	}
	for s.ring[s.hand].used.Swap(false) {
		s.hand = (s.hand + 1) % len(s.ring)
	}
	delete(s.pages, s.ring[s.hand].key)
	s.ring[s.hand] = p
	s.hand = (s.hand + 1) % len(s.ring)
}
