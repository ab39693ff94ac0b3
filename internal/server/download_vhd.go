package server

import (
	"context"

	"coppice/internal/vhd"
)

// vhdImage is a dynamic image, or with a base a differencing one.
type vhdImage struct {
	d   *download
	l   *vhd.Layout
	tag string
}

func planVHD(ctx context.Context, d *download) (image, error) {
	size := d.volume.Size()
	if size > vhd.MaxSize {
		return nil, d.tooLarge(vhd.MaxSize)
	}
	self, base, err := d.origin(ctx)
	if err != nil {
		return nil, err
	}
	o := vhd.Options{Size: size, UUID: self.uuid, Timestamp: self.modified, Blocks: vhd.NewBlockSet(size)}
	if d.base != nil {
		o.Parent = &vhd.Parent{UUID: base.uuid, Name: base.name + ".vhd", Timestamp: base.modified}
	}
	if err := d.scan(ctx, o.Blocks.Add); err != nil {
		return nil, err
	}
	if d.base != nil {
		addGrown(o.Blocks, d.base.Size(), size)
	}
	l, err := vhd.NewLayout(o)
	if err != nil {
		return nil, err
	}
	return vhdImage{d, l, d.tag("vhd 2", self, base)}, nil
}

// maxBlank is how much of a disk is sent, in bytes, only because its base ends
// before it.
const maxBlank = 4 << 30

// addGrown puts the blocks from the end of a base to that of its larger delta
// into the set: what neither of the two holds reads as zero, but libvhdi, which
// knows no such thing behind the end of the parent, fails there. When a disk has
// grown by more than maxBlank bytes without data, its delta goes on costing what
// has changed: others read it as it is.
func addGrown(set *vhd.BlockSet, base, size int64) {
	blank := int64(0)
	for i := base / vhd.BlockSize; i*vhd.BlockSize < size; i++ {
		if !set.Has(i) {
			blank++
		}
	}
	if blank*vhd.BlockSize <= maxBlank {
		set.Add(base, size-base)
	}
}

func (v vhdImage) length() int64 { return v.l.Length() }
func (v vhdImage) etag() string  { return v.tag }

func (v vhdImage) send(ctx context.Context, w *window, done func(int64)) error {
	type indexed struct {
		index int64
		vhd.Block
	}
	buffers := make([]*indexed, min(readAhead/vhd.BlockSize, v.l.NumBlocks()))
	for i := range buffers {
		buffers[i] = new(indexed)
	}
	enc, err := vhd.NewWriter(w, v.l)
	if err != nil {
		return err
	}
	done(w.pos)
	at := w.pos
	produce := func(ctx context.Context, next func() (*indexed, error), send func(*indexed)) error {
		var changes *walk
		if v.d.base != nil {
			changes = startWalk(v.d.data(ctx))
			defer changes.stop()
		}
		pos := at
		for index := range v.l.Blocks() {
			if pos >= w.to {
				return nil
			}
			b, err := next()
			if err != nil {
				return err
			}
			b.index = index
			if w.needs(pos, int64(len(b.Block))) {
				if err := v.fill(&b.Block, index*vhd.BlockSize, changes); err != nil {
					return err
				}
			}
			pos += int64(len(b.Block))
			send(b)
		}
		return nil
	}
	err = relayLent(ctx, buffers, produce, func(b *indexed, release func()) error {
		if err := w.lend(func() error { return enc.WriteBlock(b.index, &b.Block) }, release); err != nil {
			return err
		}
		done(w.pos)
		return nil
	})
	if err != nil || w.pos >= w.to {
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
