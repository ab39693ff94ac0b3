package server

import (
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"iter"
	"strconv"
	"sync"
	"time"

	"coppice/internal/storage"
	"coppice/internal/vhd"
	"coppice/internal/xapi"

	"github.com/google/uuid"
)

// readAhead is how many bytes of a download are in buffers: read and not sent
// yet, or sent and not hashed yet.
const readAhead = 8 << 20

// download is a disk to be sent: what is sent of it is decided by data, how it
// looks by a format.
type download struct {
	ref    string // of the VDI, for errors
	vdi    *xapi.VDI
	volume storage.Volume

	baseVDI *xapi.VDI
	base    storage.Volume // nil when everything is to be sent

	// extents yields, ascending, the extents of the volume; with a base only
	// what differs from that. It may be called again.
	extents func(ctx context.Context) iter.Seq2[storage.Extent, error]

	// Filled in by scan:
	bytes  int64    // of data
	layout [32]byte // a hash of where it is
}

// newDownload is everything of a disk.
func newDownload(ref xapi.Ref[xapi.VDI], vdi *xapi.VDI, v storage.Volume) *download {
	return &download{ref: string(ref), vdi: vdi, volume: v, extents: func(ctx context.Context) iter.Seq2[storage.Extent, error] {
		return allExtents(ctx, v)
	}}
}

// firstLook is how much of a disk is looked at for its first extent, in bytes.
const firstLook = 64 << 20

// allExtents are the extents of a volume. Its start is asked for on its own: a
// driver may look at much before it yields anything, and what is sent without a
// plan can begin meanwhile.
func allExtents(ctx context.Context, v storage.Volume) iter.Seq2[storage.Extent, error] {
	return func(yield func(storage.Extent, error) bool) {
		size := v.Size()
		first := min(firstLook, size)
		for _, part := range [][2]int64{{0, first}, {first, size - first}} {
			for e, err := range v.Extents(ctx, part[0], part[1]) {
				if !yield(e, err) || err != nil {
					return
				}
			}
		}
	}
}

// tooLarge says that a format holds at most limit bytes.
func (d *download) tooLarge(limit int64) error {
	return xapi.NewError(xapi.ErrVDITooLarge, d.ref, strconv.FormatInt(limit, 10))
}

// identity is what an image says about where it comes from.
type identity struct {
	uuid     [16]byte
	modified time.Time // zero when it is not known
	name     string    // the uuid of the VDI
}

// identify returns the identity of images of a VDI whose contents are those of
// v. That of a snapshot never changes; that of a disk that may be written is
// the same as long as its contents are, if the driver can tell.
func identify(ctx context.Context, vdi *xapi.VDI, v storage.Volume) (identity, error) {
	id, err := uuid.Parse(vdi.UUID)
	if err != nil {
		return identity{}, err
	}
	if vdi.IsASnapshot {
		return identity{uuid: vhd.WellFormed(id), modified: vdi.SnapshotTime, name: vdi.UUID}, nil
	}
	version := uuid.NewString()
	if v, ok := v.(storage.Versioned); ok {
		if version, err = v.Version(ctx); err != nil {
			return identity{}, err
		}
	}
	return identity{uuid: uuid.NewSHA1(id, []byte(version)), name: vdi.UUID}, nil
}

// origin identifies the disk and, if there is one, its base.
func (d *download) origin(ctx context.Context) (self, base identity, err error) {
	if self, err = identify(ctx, d.vdi, d.volume); err == nil && d.base != nil {
		base, err = identify(ctx, d.baseVDI, d.base)
	}
	return self, base, err
}

// tag is the entity tag of an image: it follows from the codec, which has a
// version of its own, from whose contents the image has, and from where its
// data is.
func (d *download) tag(codec string, self, base identity) string {
	h := sha256.New()
	for _, part := range [][]byte{[]byte(codec), self.uuid[:], base.uuid[:], d.layout[:]} {
		h.Write(part)
	}
	return `"` + hex.EncodeToString(h.Sum(nil)[:16]) + `"`
}

// data yields, ascending, what has to be sent: what differs from the base,
// new holes included; without a base everything that is no hole.
func (d *download) data(ctx context.Context) iter.Seq2[storage.Extent, error] {
	return func(yield func(storage.Extent, error) bool) {
		for e, err := range d.extents(ctx) {
			if err == nil && e.Hole && d.base == nil {
				continue
			}
			if !yield(e, err) {
				return
			}
		}
	}
}

// scan passes what has to be sent to add, neighbours of a kind joined, and
// notes how much it is and where.
func (d *download) scan(ctx context.Context, add func(off, n int64)) error {
	h := sha256.New()
	d.bytes = 0
	var last storage.Extent
	var buf []byte
	flush := func() {
		if last.Len == 0 {
			return
		}
		add(last.Off, last.Len)
		d.bytes += last.Len
		hole := uint64(0)
		if last.Hole {
			hole = 1
		}
		buf = binary.BigEndian.AppendUint64(buf[:0], uint64(last.Off))
		buf = binary.BigEndian.AppendUint64(buf, uint64(last.Len)<<1|hole)
		h.Write(buf)
	}
	for e, err := range d.data(ctx) {
		if err != nil {
			return err
		}
		if last.Len > 0 && last.End() == e.Off && last.Hole == e.Hole {
			last.Len += e.Len
			continue
		}
		flush()
		last = e
	}
	flush()
	h.Sum(d.layout[:0])
	return nil
}

// read fills p from the volume at off; behind its end is nothing but zero.
func (d *download) read(p []byte, off int64) error {
	n := max(0, min(int64(len(p)), d.volume.Size()-off))
	clear(p[n:])
	return storage.ReadFull(d.volume, p[:n], off)
}

// walk follows ascending extents in step with ascending ranges.
type walk struct {
	pull func() (storage.Extent, error, bool)
	stop func()
	e    storage.Extent // the current one; empty when the next must be pulled
	end  bool
}

// startWalk begins to follow a sequence. The stop of the walk must be called.
func startWalk(seq iter.Seq2[storage.Extent, error]) *walk {
	w := new(walk)
	w.pull, w.stop = iter.Pull2(seq)
	return w
}

// within yields the parts of extents that lie in [off, end). The ranges of
// successive calls must ascend.
func (w *walk) within(off, end int64) iter.Seq2[storage.Extent, error] {
	return func(yield func(storage.Extent, error) bool) {
		for !w.end {
			if w.e.End() <= off {
				e, err, ok := w.pull()
				if err != nil {
					yield(storage.Extent{}, err)
					return
				}
				w.e, w.end = e, !ok
				continue
			}
			if w.e.Off >= end {
				return
			}
			part := storage.Extent{Off: max(off, w.e.Off), Hole: w.e.Hole}
			part.Len = min(end, w.e.End()) - part.Off
			if !yield(part, nil) || w.e.End() >= end {
				return
			}
			off = w.e.End()
		}
	}
}

// chunk is a piece of an image on its way to the client.
type chunk struct {
	skip int64  // bytes that stand for it when it is not needed
	data []byte // what is sent: part of buf, or zeroes
	buf  []byte
}

// chunkSize is how much of a raw image, or of the data of others, is read and
// sent at a time.
const chunkSize = 1 << 20

func newChunks() []*chunk {
	buffers := make([]*chunk, readAhead/chunkSize)
	for i := range buffers {
		buffers[i] = new(chunk)
	}
	return buffers
}

// room returns n bytes of the chunk's own.
func (c *chunk) room(n int64) []byte {
	if int64(cap(c.buf)) < n {
		c.buf = make([]byte, max(n, chunkSize))
	}
	return c.buf[:n]
}

// gather makes chunks of ranges of a disk that stand one behind the other in an
// image. Those of one chunk are read side by side, because each may have to wait
// for the device.
type gather struct {
	d      *download
	next   func() (*chunk, error)
	send   func(*chunk)
	ranges []gathered // of the chunk that is being gathered
	n      int64      // its bytes, less than chunkSize
}

// gathered is n bytes of a disk at off, which stand in a chunk at at.
type gathered struct{ at, off, n int64 }

// add puts n bytes of the disk at off into the image; no more than chunkSize fit
// a chunk.
func (g *gather) add(off, n int64) error {
	g.ranges = append(g.ranges, gathered{g.n, off, n})
	if g.n += n; g.n < chunkSize {
		return nil
	}
	return g.flush()
}

// skip stands for n bytes of the image that are not needed.
func (g *gather) skip(n int64) error {
	if err := g.flush(); err != nil {
		return err
	}
	c, err := g.next()
	if err != nil {
		return err
	}
	c.skip = n
	g.send(c)
	return nil
}

// readers is how many ranges of a chunk are read side by side.
const readers = 4

// flush sends what has been gathered.
func (g *gather) flush() error {
	if g.n == 0 {
		return nil
	}
	c, err := g.next()
	if err != nil {
		return err
	}
	c.skip, c.data = 0, c.room(g.n)
	errs := make([]error, min(readers, len(g.ranges)))
	read := func(reader int) {
		for i := reader; i < len(g.ranges) && errs[reader] == nil; i += len(errs) {
			r := g.ranges[i]
			errs[reader] = g.d.read(c.data[r.at:r.at+r.n], r.off)
		}
	}
	var others sync.WaitGroup
	for i := range errs[1:] {
		others.Go(func() { read(1 + i) })
	}
	read(0)
	others.Wait()
	if err := cmp.Or(errs...); err != nil {
		return err
	}
	g.ranges, g.n = g.ranges[:0], 0
	g.send(c)
	return nil
}

// sendChunks sends what produce makes to w.
func sendChunks(ctx context.Context, w *window, done func(int64), produce func(ctx context.Context, next func() (*chunk, error), send func(*chunk)) error) error {
	return relayLent(ctx, newChunks(), produce, func(c *chunk, release func()) error {
		if c.skip > 0 {
			w.skip(c.skip)
			release()
			return nil
		}
		return w.sendLent(c.data, release, done)
	})
}

// rawImage is the plain contents of a disk. What does not have to be sent
// reads as zero, and is sent without touching the volume.
type rawImage struct {
	d   *download
	tag string
}

func planRaw(ctx context.Context, d *download) (image, error) {
	self, base, err := d.origin(ctx)
	if err == nil && d.base != nil {
		err = d.scan(ctx, func(int64, int64) {})
	}
	if err != nil {
		return nil, err
	}
	return rawImage{d, d.tag("raw 1", self, base)}, nil
}

func (r rawImage) length() int64 { return r.d.volume.Size() }
func (r rawImage) etag() string  { return r.tag }

func (r rawImage) send(ctx context.Context, w *window, done func(int64)) error {
	size := r.length()
	zeroes := make([]byte, min(chunkSize, size))
	return sendChunks(ctx, w, done, func(ctx context.Context, next func() (*chunk, error), send func(*chunk)) error {
		extents := startWalk(r.d.data(ctx))
		defer extents.stop()
		for off := int64(0); off < size && off < w.to; off += chunkSize {
			n := min(chunkSize, size-off)
			if off == 0 && w.from >= chunkSize { // everything before the part, at once
				n = min(w.from, size) / chunkSize * chunkSize
				c, err := next()
				if err != nil {
					return err
				}
				c.skip = n
				send(c)
				off = n - chunkSize
				continue
			}
			c, err := next()
			if err != nil {
				return err
			}
			c.skip, c.data = 0, zeroes[:n]
			filled := off // up to where buf is valid
			for e, err := range extents.within(off, off+n) {
				if err != nil {
					return err
				}
				if e.Hole {
					continue
				}
				if filled == off {
					c.data = c.room(n)
				}
				clear(c.data[filled-off : e.Off-off])
				filled = e.End()
				if err := r.d.read(c.data[e.Off-off:filled-off], e.Off); err != nil {
					return err
				}
			}
			if filled > off {
				clear(c.data[filled-off:])
			}
			send(c)
		}
		return nil
	})
}
