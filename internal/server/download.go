package server

import (
	"cmp"
	"context"
	"io"
	"iter"
	"strconv"
	"time"

	"coppice/internal/storage"
	"coppice/internal/vhd"
	"coppice/internal/xapi"

	"github.com/google/uuid"
)

// readAhead is how many buffers of a download are filled before they are sent.
const readAhead = 4

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

// read fills p from the volume at off; behind its end is nothing but zero.
func (d *download) read(p []byte, off int64) error {
	n := max(0, min(int64(len(p)), d.volume.Size()-off))
	clear(p[n:])
	return readFull(d.volume, p[:n], off)
}

// readFull fills p from off, which lies within the volume.
func readFull(v storage.Volume, p []byte, off int64) error {
	if n, err := v.ReadAt(p, off); n < len(p) {
		return cmp.Or(err, io.ErrUnexpectedEOF)
	}
	return nil
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

// rawImage is the plain contents of a disk. What does not have to be sent
// reads as zero, and is sent without touching the volume.
type rawImage struct{ d *download }

func planRaw(_ context.Context, d *download) (image, error) { return rawImage{d}, nil }

func (r rawImage) length() int64 { return r.d.volume.Size() }

// rawChunk is how much of a raw image is read, and sent, at a time.
const rawChunk = 1 << 20

func (r rawImage) send(ctx context.Context, w io.Writer, done func(int64)) error {
	type chunk struct {
		off  int64
		data []byte // what is sent: part of buf, or zeroes
		buf  []byte
	}
	buffers := make([]*chunk, readAhead)
	for i := range buffers {
		buffers[i] = new(chunk)
	}
	size := r.length()
	zeroes := make([]byte, min(rawChunk, size))
	produce := func(ctx context.Context, next func() (*chunk, error), send func(*chunk)) error {
		extents := startWalk(r.d.data(ctx))
		defer extents.stop()
		for off := int64(0); off < size; off += rawChunk {
			c, err := next()
			if err != nil {
				return err
			}
			n := min(rawChunk, size-off)
			c.off, c.data = off, zeroes[:n]
			filled := off // up to where buf is valid
			for e, err := range extents.within(off, off+n) {
				if err != nil {
					return err
				}
				if e.Hole {
					continue
				}
				if filled == off {
					if c.buf == nil {
						c.buf = make([]byte, len(zeroes))
					}
					c.data = c.buf[:n]
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
	}
	return relay(ctx, buffers, produce, func(c *chunk) error {
		if _, err := w.Write(c.data); err != nil {
			return err
		}
		done(c.off + int64(len(c.data)))
		return nil
	})
}

// vhdImage is a dynamic image, or with a base a differencing one.
type vhdImage struct {
	d *download
	l *vhd.Layout
}

func planVHD(ctx context.Context, d *download) (image, error) {
	size := d.volume.Size()
	if size > vhd.MaxSize {
		return nil, xapi.NewError(xapi.ErrVDITooLarge, d.ref, strconv.FormatInt(vhd.MaxSize, 10))
	}
	self, err := identify(ctx, d.vdi, d.volume)
	if err != nil {
		return nil, err
	}
	o := vhd.Options{Size: size, UUID: self.uuid, Timestamp: self.modified, Blocks: vhd.NewBlockSet(size)}
	if d.base != nil {
		parent, err := identify(ctx, d.baseVDI, d.base)
		if err != nil {
			return nil, err
		}
		o.Parent = &vhd.Parent{UUID: parent.uuid, Name: parent.name + ".vhd", Timestamp: parent.modified}
	}
	for e, err := range d.data(ctx) {
		if err != nil {
			return nil, err
		}
		o.Blocks.Add(e.Off, e.Len)
	}
	l, err := vhd.NewLayout(o)
	if err != nil {
		return nil, err
	}
	return vhdImage{d, l}, nil
}

func (v vhdImage) length() int64 { return v.l.Length() }

func (v vhdImage) send(ctx context.Context, w io.Writer, done func(int64)) error {
	type indexed struct {
		index int64
		vhd.Block
	}
	buffers := make([]*indexed, min(readAhead, v.l.NumBlocks()))
	for i := range buffers {
		buffers[i] = new(indexed)
	}
	enc, err := vhd.NewWriter(w, v.l)
	if err != nil {
		return err
	}
	sent := v.length() - v.l.NumBlocks()*int64(len(vhd.Block{}))
	done(sent)
	produce := func(ctx context.Context, next func() (*indexed, error), send func(*indexed)) error {
		var changes *walk
		if v.d.base != nil {
			changes = startWalk(v.d.data(ctx))
			defer changes.stop()
		}
		for index := range v.l.Blocks() {
			b, err := next()
			if err != nil {
				return err
			}
			b.index = index
			if err := v.fill(&b.Block, index*vhd.BlockSize, changes); err != nil {
				return err
			}
			send(b)
		}
		return nil
	}
	err = relay(ctx, buffers, produce, func(b *indexed) error {
		if err := enc.WriteBlock(b.index, &b.Block); err != nil {
			return err
		}
		sent += int64(len(b.Block))
		done(sent)
		return nil
	})
	if err != nil {
		return err
	}
	return enc.Close()
}

// fill makes the block that lies at off on the disk: its complete contents,
// and in a delta the marks of what has changed. Sectors behind the end of the
// base are marked too, because not every reader reads behind that end.
func (v vhdImage) fill(b *vhd.Block, off int64, changes *walk) error {
	if changes == nil {
		b.MarkAll()
	} else {
		b.Clear()
		for e, err := range changes.within(off, off+vhd.BlockSize) {
			if err != nil {
				return err
			}
			b.Mark(e.Off-off, e.Len)
		}
		if behind := max(v.d.base.Size()-off, 0); behind < vhd.BlockSize {
			b.Mark(behind, vhd.BlockSize-behind)
		}
	}
	return v.d.read(b.Data(), off)
}
