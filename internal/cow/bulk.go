package cow

import "sync"

// WriteBulk is [Disk.WriteAt] for much that nobody reads soon, such as an image
// that is taken in. Left in the host's cache it would push out what is read often,
// and take memory that the host has to provide first. So only the newest of what has been
// written to the store in this way stays there, see [Limits], and a call may wait for
// the device to have what is older.
func (d *Disk) WriteBulk(p []byte, off int64) (n int, err error) { return d.write(p, off, true) }

// bulkCache is what has been written to the space files in bulk and may be in the
// host's cache. Some of it may have been given up since, or be something
// else by now: then that is forgotten, which harms nobody.
type bulkCache struct {
	files *spaceFiles
	most  int // units

	mu    sync.Mutex
	runs  []unitRun // oldest first; guarded by mu
	units int       // of runs; guarded by mu
}

// unitRun is adjoining units of one space file.
type unitRun struct {
	addr uint64
	n    int
}

// add takes note of n units that have been written, and has the host forget the
// oldest ones.
func (c *bulkCache) add(addr uint64, n int) {
	c.mu.Lock()
	c.runs = append(c.runs, unitRun{addr, n})
	c.units += n
	old := 0
	for ; c.units > c.most; old++ {
		c.units -= c.runs[old].n
	}
	forget := c.runs[:old:old]
	c.runs = c.runs[old:]
	c.mu.Unlock()
	for _, r := range forget {
		c.files.evict(r.addr, r.n)
	}
}
