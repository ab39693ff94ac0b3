package mem

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"iter"

	"coppice/internal/storage"

	"github.com/tidwall/btree"
)

// page is the contents of one unit. It never changes.
type page [storage.Unit]byte

var zeroPage page

// contents is what a volume holds. A copy shares everything until one of the
// two is written.
type contents struct {
	size    int64  // bytes
	version uint64 // changes with every change, and is never used again
	pages   *btree.Map[int64, *page]
}

func newContents(size int64) contents {
	return contents{size: size, pages: new(btree.Map[int64, *page])}
}

// copy returns an independent copy. It counts as a change of c.
func (c contents) copy() contents { return contents{c.size, c.version, c.pages.Copy()} }

// within returns an error that matches ErrInvalid for a range that is not in
// the volume.
func (c contents) within(off, n int64) error {
	if off < 0 || n < 0 || off > c.size-n {
		return fmt.Errorf("%w: [%d, +%d) is not within a volume of %d bytes", storage.ErrInvalid, off, n, c.size)
	}
	return nil
}

func (c contents) read(p []byte, off int64) (int, error) {
	if off < 0 {
		return 0, fmt.Errorf("%w: offset %d", storage.ErrInvalid, off)
	}
	n := int(min(int64(len(p)), max(0, c.size-off)))
	for done := 0; done < n; {
		at := off + int64(done)
		k := min(n-done, int(storage.Unit-at%storage.Unit))
		if pg, ok := c.pages.Get(at / storage.Unit); ok {
			copy(p[done:done+k], pg[at%storage.Unit:])
		} else {
			clear(p[done : done+k])
		}
		done += k
	}
	if n < len(p) {
		return n, io.EOF
	}
	return n, nil
}

// write stores p, which is within the volume.
func (c contents) write(p []byte, off int64) {
	for len(p) > 0 {
		unit, at := off/storage.Unit, int(off%storage.Unit)
		k := min(len(p), storage.Unit-at)
		c.put(unit, at, p[:k])
		p, off = p[k:], off+int64(k)
	}
}

// put stores p, which is within one unit, at a byte of it.
func (c contents) put(unit int64, at int, p []byte) {
	old, ok := c.pages.Get(unit)
	if bytes.Equal(p, zeroPage[:len(p)]) && (!ok || len(p) == storage.Unit) {
		c.pages.Delete(unit)
		return
	}
	pg := new(page)
	if ok {
		*pg = *old
	}
	copy(pg[at:], p)
	if *pg == zeroPage {
		c.pages.Delete(unit)
	} else {
		c.pages.Set(unit, pg)
	}
}

// zero makes [off, off+n), which is within the volume, read as zero.
func (c contents) zero(off, n int64) {
	if head := min(n, -off&(storage.Unit-1)); head > 0 {
		c.write(zeroPage[:head], off)
		off, n = off+head, n-head
	}
	tail := n % storage.Unit
	c.drop(off/storage.Unit, (off+n)/storage.Unit)
	c.write(zeroPage[:tail], off+n-tail)
}

// drop removes the pages of units [first, last).
func (c contents) drop(first, last int64) {
	for {
		unit := last
		c.pages.Ascend(first, func(u int64, _ *page) bool { unit = u; return false })
		if unit >= last {
			return
		}
		c.pages.Delete(unit)
		first = unit + 1
	}
}

func (c *contents) resize(size int64) {
	c.drop(size/storage.Unit, c.size/storage.Unit)
	c.size = size
}

// extents describes [off, off+n). Nobody else uses c.
func (c contents) extents(ctx context.Context, off, n int64) iter.Seq2[storage.Extent, error] {
	return func(yield func(storage.Extent, error) bool) {
		if n == 0 {
			return
		}
		end := off + n
		j := joiner{next: off, end: end, gaps: true}
		for it, ok := c.seek(off / storage.Unit); ok && it.Key()*storage.Unit < end; ok = it.Next() {
			if ctx.Err() != nil {
				yield(storage.Extent{}, context.Cause(ctx))
				return
			}
			if !j.add(it.Key(), false, yield) {
				return
			}
		}
		j.finish(yield)
	}
}

// diff yields where c differs from from. Nobody else uses the two.
func (c contents) diff(ctx context.Context, from contents, off int64) iter.Seq2[storage.Extent, error] {
	return func(yield func(storage.Extent, error) bool) {
		a, ok := from.seek(off / storage.Unit)
		differ(ctx, c, off, &a, ok, func(was, is *page) bool { return was == is }, yield)
	}
}

// differ yields where c, from off on, differs from what was there, given by an
// iterator at the first page from off on, if there is one. same says whether a
// page is as it was.
func differ[P any](ctx context.Context, c contents, off int64, was *btree.MapIter[int64, P], ok bool,
	same func(was P, is *page) bool, yield func(storage.Extent, error) bool,
) {
	j := joiner{next: off, end: c.size}
	is, isOK := c.seek(off / storage.Unit)
	for {
		if ctx.Err() != nil {
			yield(storage.Extent{}, context.Cause(ctx))
			return
		}
		ok = ok && was.Key()*storage.Unit < c.size
		goOn := true
		switch {
		case !ok && !isOK:
			j.finish(yield)
			return
		case !isOK || ok && was.Key() < is.Key():
			goOn = j.add(was.Key(), true, yield)
			ok = was.Next()
		case !ok || is.Key() < was.Key():
			goOn = j.add(is.Key(), false, yield)
			isOK = is.Next()
		default:
			if !same(was.Value(), is.Value()) {
				goOn = j.add(is.Key(), false, yield)
			}
			ok, isOK = was.Next(), is.Next()
		}
		if !goOn {
			return
		}
	}
}

// seek returns an iterator at the first page from unit on, if there is one.
func (c contents) seek(unit int64) (btree.MapIter[int64, *page], bool) {
	it := c.pages.Iter()
	return it, it.Seek(unit)
}

// joiner turns ascending units into extents: neighbours of a kind are joined,
// ends are cut off at the range asked for, and with gaps, what lies between
// the units is a hole.
type joiner struct {
	next, end int64 // bytes of the range that are yet to be described
	gaps      bool
	cur       storage.Extent // not yielded yet; Len 0 when there is none
}

type yieldFunc = func(storage.Extent, error) bool

func (j *joiner) add(unit int64, hole bool, yield yieldFunc) bool {
	off := max(unit*storage.Unit, j.next)
	return j.gap(off, yield) && j.put(min((unit+1)*storage.Unit, j.end), hole, yield)
}

// gap goes on at off.
func (j *joiner) gap(off int64, yield yieldFunc) bool {
	if off > j.next && j.gaps {
		return j.put(off, true, yield)
	}
	j.next = off
	return true
}

// put describes everything up to end.
func (j *joiner) put(end int64, hole bool, yield yieldFunc) bool {
	if j.cur.Len > 0 && j.cur.Hole == hole && j.cur.End() == j.next {
		j.cur.Len = end - j.cur.Off
		j.next = end
		return true
	}
	last := j.cur
	j.cur = storage.Extent{Off: j.next, Len: end - j.next, Hole: hole}
	j.next = end
	return last.Len == 0 || yield(last, nil)
}

func (j *joiner) finish(yield yieldFunc) {
	if j.gap(j.end, yield) && j.cur.Len > 0 {
		yield(j.cur, nil)
	}
}
