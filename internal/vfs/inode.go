package vfs

import (
	"bytes"
	"maps"
	"math"
	"slices"
)

const (
	pageSize   = 4096 // bytes that the cache keeps and the space is counted in
	sectorSize = 512  // bytes that a power cut keeps or loses as one
	allSectors = 1<<(pageSize/sectorSize) - 1

	maxOffset = math.MaxInt64 &^ (pageSize - 1)
)

func pageEnd(off int64) int64 { return (off + pageSize - 1) &^ (pageSize - 1) }

// inode is the contents of a file. Its Mem's lock guards it.
type inode struct {
	id     int64 // in the order of creation
	linked bool  // has a name
	opens  int   // open files

	sizes []int64 // bytes: as last synced, then every change since
	pages map[int64]*page
	dirty map[int64]struct{} // pages that have pending versions
	stale map[int64]struct{} // pages whose cache differs from the device
	space spans              // bytes that take host space, in whole pages
}

// block is the contents of a page. It never changes once it is in a page, so
// versions and clones share it.
type block [pageSize]byte

// page is one cached page. A nil block reads as zero.
type page struct {
	device  *block    // what a sync has put there
	cache   *block    // what readers see
	pending []version // written since the last sync, oldest first
}

// version is the page after one write, and which sectors the write touched.
type version struct {
	data    *block
	sectors uint8
}

func newInode(id int64) *inode {
	return &inode{
		id: id, linked: true, sizes: []int64{0},
		pages: map[int64]*page{}, dirty: map[int64]struct{}{}, stale: map[int64]struct{}{},
	}
}

func (n *inode) size() int64 { return n.sizes[len(n.sizes)-1] }

func (n *inode) resize(size int64) {
	if size != n.size() {
		n.sizes = append(n.sizes, size)
	}
}

// read fills p, which lies within the file.
func (n *inode) read(p []byte, off int64) {
	for len(p) > 0 {
		at := int(off % pageSize)
		k := min(len(p), pageSize-at)
		if pg := n.pages[off/pageSize]; pg != nil && pg.cache != nil {
			copy(p[:k], pg.cache[at:])
		} else {
			clear(p[:k])
		}
		p, off = p[k:], off+int64(k)
	}
}

// write stores p, which lies within one page.
func (n *inode) write(p []byte, off int64) {
	at := int(off % pageSize)
	pg := n.pages[off/pageSize]
	if pg == nil {
		pg = &page{}
		n.pages[off/pageSize] = pg
	}
	b := new(block)
	if pg.cache != nil && len(p) < pageSize {
		*b = *pg.cache
	}
	copy(b[at:], p)
	n.push(off/pageSize, pg, b, at, at+len(p))
	n.resize(max(n.size(), off+int64(len(p))))
}

// zero makes [off, end) read as zero.
func (n *inode) zero(off, end int64) {
	first, last := off/pageSize, (end+pageSize-1)/pageSize
	one := func(i int64) {
		pg := n.pages[i]
		from, to := int(max(0, off-i*pageSize)), int(min(pageSize, end-i*pageSize))
		var b *block
		if to-from < pageSize && pg.cache != nil {
			b = new(block)
			*b = *pg.cache
			clear(b[from:to])
		}
		n.push(i, pg, b, from, to)
	}
	if last-first <= int64(len(n.pages)) {
		for i := first; i < last; i++ {
			if n.pages[i] != nil {
				one(i)
			}
		}
		return
	}
	for i := range n.pages {
		if first <= i && i < last {
			one(i)
		}
	}
}

// push makes b the newest version of a page, of which [from, to) is new.
func (n *inode) push(i int64, pg *page, b *block, from, to int) {
	sectors := uint8(0)
	for s := from / sectorSize; s*sectorSize < to; s++ {
		sectors |= 1 << s
	}
	if _, ok := n.stale[i]; ok {
		sectors = allSectors // the whole page goes to the device again
		delete(n.stale, i)
	}
	pg.cache = b
	pg.pending = append(pg.pending, version{b, sectors})
	n.dirty[i] = struct{}{}
}

// sync makes everything durable.
func (n *inode) sync() {
	n.sizes = append(n.sizes[:0], n.size())
	for i := range n.dirty {
		pg := n.pages[i]
		pg.device, pg.pending = pg.cache, nil
		if pg.device == nil {
			delete(n.pages, i)
		}
	}
	clear(n.dirty)
}

// syncRange makes [off, end) durable, and the size if it was not there before.
func (n *inode) syncRange(off, end int64) {
	if slices.Min(n.sizes) < end {
		n.sizes = append(n.sizes[:0], n.size())
	}
	n.settleRange(off, end, func(pg *page, s int) []byte { return pg.cache.sector(s) })
}

// failRange is a sync of [off, end) that failed; see failDatasync.
func (n *inode) failRange(off, end int64, choose Choose) {
	n.settleRange(off, end, func(pg *page, s int) []byte {
		options := pg.options(s, nil)
		if len(options) == 1 {
			return options[0]
		}
		return options[choose(len(options))]
	})
}

// settleRange puts what pick says of each sector of [off, end) that has been
// written onto the device, and forgets what it might have been otherwise.
func (n *inode) settleRange(off, end int64, pick func(pg *page, sector int) []byte) {
	for i := off / pageSize; i*pageSize < end; i++ {
		if _, ok := n.dirty[i]; !ok {
			continue
		}
		pg := n.pages[i]
		device := new(block)
		if pg.device != nil {
			*device = *pg.device
		}
		done := uint8(0)
		for s := range pageSize / sectorSize {
			if at := i*pageSize + int64(s)*sectorSize; at < end && at+sectorSize > off {
				copy(device[s*sectorSize:], pick(pg, s))
				done |= 1 << s
			}
		}
		pg.device = device
		pg.forget(done)
		if len(pg.pending) > 0 {
			continue
		}
		delete(n.dirty, i)
		switch {
		case !pg.cache.equal(device):
			n.stale[i] = struct{}{}
		case pg.cache == nil:
			delete(n.pages, i)
		default:
			pg.device = pg.cache
		}
	}
}

// forget takes sectors out of the pending versions of a page.
func (pg *page) forget(sectors uint8) {
	var left []version
	for _, v := range pg.pending {
		if v.sectors &^= sectors; v.sectors != 0 {
			left = append(left, v)
		}
	}
	pg.pending = left
}

func (n *inode) failSync(choose Choose) {
	for _, i := range slices.Sorted(maps.Keys(n.dirty)) {
		pg := n.pages[i]
		pg.device, pg.pending = pg.settle(i*pageSize, maxOffset, choose), nil
		if pg.device != pg.cache {
			n.stale[i] = struct{}{}
		}
	}
	clear(n.dirty)
}

// evict lets the clean pages that are wholly in [off, end) show what the device
// has.
func (n *inode) evict(off, end int64) {
	for i := range n.stale {
		if i*pageSize >= off && (i+1)*pageSize <= end {
			n.pages[i].cache = n.pages[i].device
			delete(n.stale, i)
		}
	}
}

var zeroSector [sectorSize]byte

// sector returns sector s of a block.
func (b *block) sector(s int) []byte {
	if b == nil {
		return zeroSector[:]
	}
	return b[s*sectorSize:][:sectorSize]
}

// equal tells whether two pages read the same.
func (b *block) equal(c *block) bool {
	for s := range pageSize / sectorSize {
		if !bytes.Equal(b.sector(s), c.sector(s)) {
			return false
		}
	}
	return true
}

// options appends what sector s of the page may be on the device, oldest first.
func (pg *page) options(s int, to [][]byte) [][]byte {
	to = append(to, pg.device.sector(s))
	for _, v := range pg.pending {
		if v.sectors&(1<<s) != 0 && !bytes.Equal(v.data.sector(s), to[len(to)-1]) {
			to = append(to, v.data.sector(s))
		}
	}
	return to
}

// settle picks what of the page at byte off reaches the device, sector by
// sector, in a file that ends at size.
func (pg *page) settle(off, size int64, choose Choose) *block {
	out := pg.device
	fresh := false
	var options [][]byte
	for s := range pageSize / sectorSize {
		if off+int64(s)*sectorSize >= size {
			break
		}
		if options = pg.options(s, options[:0]); len(options) == 1 {
			continue
		}
		k := choose(len(options))
		if k == 0 {
			continue
		}
		if !fresh {
			b := new(block)
			if out != nil {
				*b = *out
			}
			out, fresh = b, true
		}
		copy(out[s*sectorSize:], options[k])
	}
	return out
}

// crash returns the file as a power cut leaves it.
func (n *inode) crash(id int64, choose Choose) *inode {
	c := newInode(id)
	size := n.sizes[0]
	if len(n.sizes) > 1 {
		size = n.sizes[choose(len(n.sizes))]
	}
	c.sizes[0] = size
	for _, i := range slices.Sorted(maps.Keys(n.pages)) {
		if i*pageSize >= size {
			break
		}
		b := n.pages[i].settle(i*pageSize, size, choose)
		if tail := size - i*pageSize; b != nil && tail < pageSize {
			cut := new(block)
			copy(cut[:tail], b[:])
			b = cut
		}
		if b != nil {
			c.pages[i] = &page{device: b, cache: b}
			c.space.add(i*pageSize, (i+1)*pageSize)
		}
	}
	for _, sp := range n.space {
		c.space.add(sp.off, min(sp.end, pageEnd(size)))
	}
	return c
}

// kill returns the file as the end of the process leaves it.
func (n *inode) kill() *inode {
	c := &inode{
		id: n.id, linked: true, sizes: slices.Clone(n.sizes),
		pages: make(map[int64]*page, len(n.pages)),
		dirty: maps.Clone(n.dirty), stale: maps.Clone(n.stale), space: slices.Clone(n.space),
	}
	for i, pg := range n.pages {
		c.pages[i] = &page{device: pg.device, cache: pg.cache, pending: slices.Clone(pg.pending)}
	}
	return c
}
