package server

import (
	"bytes"
	"context"
	"encoding/binary"

	"coppice/internal/vmdk"
)

// vmdkImage is a streamOptimized VMDK. It is compressed, so that its length
// shows only in the end.
type vmdkImage struct {
	d   *download
	cid uint32
	tag string
}

func planVMDK(ctx context.Context, d *download) (image, error) {
	size := d.volume.Size()
	if size > vmdk.MaxSize {
		return nil, d.tooLarge(vmdk.MaxSize)
	}
	self, base, err := d.origin(ctx)
	if err != nil {
		return nil, err
	}
	if size > vmdk.MaxData { // which is about the room of the data, not the size of the disk
		n, err := grains(ctx, d)
		if err != nil {
			return nil, err
		}
		if n > vmdk.MaxData/vmdk.GrainSize {
			return nil, d.tooLarge(vmdk.MaxData)
		}
	}
	// The two highest values mean something else.
	cid := binary.BigEndian.Uint32(self.uuid[:]) &^ (1 << 31)
	return vmdkImage{d, cid, d.tag("vmdk 2", self, base)}, nil
}

// grains is how many grains of a disk have data.
func grains(ctx context.Context, d *download) (n int64, err error) {
	var next int64
	err = d.scan(ctx, func(off, length int64) {
		first, end := max(next, off/vmdk.GrainSize), (off+length+vmdk.GrainSize-1)/vmdk.GrainSize
		n += max(0, end-first)
		next = max(next, end)
	})
	return n, err
}

func (v vmdkImage) length() int64 { return -1 }
func (v vmdkImage) etag() string  { return v.tag }

// pressedAhead is how many grains are compressed and not sent yet, or sent and
// not hashed yet.
const pressedAhead = 16

func (v vmdkImage) send(ctx context.Context, w *window, done func(int64)) error {
	type pressed struct {
		vmdk.Grain
		raw [vmdk.GrainSize]byte
		end int64 // on the disk
	}
	buffers := make([]*pressed, pressedAhead)
	for i := range buffers {
		buffers[i] = new(pressed)
	}
	enc, err := vmdk.NewWriter(w, vmdk.Options{Size: v.d.volume.Size(), CID: v.cid})
	if err != nil {
		return err
	}
	zero := make([]byte, vmdk.GrainSize)
	produce := func(ctx context.Context, next func() (*pressed, error), send func(*pressed)) error {
		b, err := next()
		if err != nil {
			return err
		}
		var grain int64
		for e, err := range v.d.data(ctx) {
			if err != nil {
				return err
			}
			for grain = max(grain, e.Off/vmdk.GrainSize); grain*vmdk.GrainSize < e.End(); grain++ {
				if err := v.d.read(b.raw[:], grain*vmdk.GrainSize); err != nil {
					return err
				}
				if bytes.Equal(b.raw[:], zero) {
					continue
				}
				if err := b.Compress(grain, b.raw[:]); err != nil {
					return err
				}
				b.end = (grain + 1) * vmdk.GrainSize
				send(b)
				if b, err = next(); err != nil {
					return err
				}
			}
		}
		return nil
	}
	err = relayLent(ctx, buffers, produce, func(b *pressed, release func()) error {
		end := b.end // which is the next grain's once b has been given back
		if err := w.lend(func() error { return enc.Write(&b.Grain) }, release); err != nil {
			return err
		}
		done(end)
		return nil
	})
	if err != nil {
		return err
	}
	return enc.Close()
}
