package nbd

import (
	"context"
	"encoding/binary"
	"iter"
	"slices"

	"coppice/internal/storage"
)

// descriptors bound what one context's answer to BLOCK_STATUS costs: a client
// asks again from where the answer ends.
const (
	maxDescriptors = 2048
	maxVisited     = 1 << 16 // extents looked at
)

// descriptor is a run of bytes of one status.
type descriptor struct {
	length uint64
	status uint32
}

// blockStatus answers BLOCK_STATUS with a chunk for each context that was
// chosen, or, of those, that the payload p names.
func (w *worker) blockStatus(r *request, p []byte) {
	c := w.c
	off, n := r.off, r.length
	ids := make([]uint32, len(c.meta.names))
	for i := range ids {
		ids[i] = uint32(i + 1)
	}
	if r.flags&cmdPayloadLen != 0 {
		n = binary.BigEndian.Uint64(p)
		ids = ids[:0]
		for p = p[8:]; len(p) > 0; p = p[4:] {
			id := binary.BigEndian.Uint32(p)
			if id == 0 || uint64(id) > uint64(len(c.meta.names)) || slices.Contains(ids, id) {
				w.answer(r, EINVAL)
				return
			}
			ids = append(ids, id)
		}
		if n == 0 || !c.within(off, n) {
			w.answer(r, EINVAL)
			return
		}
	}
	start := len(w.out)
	for i, id := range ids {
		ds, err := c.status(c.meta.names[id-1], int64(off), int64(n), r.flags&CmdReqOne != 0)
		if err != nil {
			w.out = w.out[:start]
			w.answer(r, err)
			return
		}
		flags := uint16(0)
		if i == len(ids)-1 {
			flags = chunkDone
		}
		w.out = c.appendStatus(w.out, r, flags, id, ds)
	}
}

// appendStatus encodes the answer of one context.
func (c *conn) appendStatus(b []byte, r *request, flags uint16, id uint32, ds []descriptor) []byte {
	be := binary.BigEndian
	if c.wire == wireExtended {
		b = c.wire.appendChunk(b, r, flags, chunkBlockStatusExt, 8+16*len(ds))
		b = be.AppendUint32(b, id)
		b = be.AppendUint32(b, uint32(len(ds)))
		for _, d := range ds {
			b = be.AppendUint64(b, d.length)
			b = be.AppendUint64(b, uint64(d.status))
		}
		return b
	}
	b = c.wire.appendChunk(b, r, flags, chunkBlockStatus, 4+8*len(ds))
	b = be.AppendUint32(b, id)
	for _, d := range ds {
		b = be.AppendUint32(b, uint32(d.length))
		b = be.AppendUint32(b, d.status)
	}
	return b
}

// status describes [off, off+n), or a front part of it, in one context.
func (c *conn) status(name string, off, n int64, one bool) ([]descriptor, error) {
	var runs iter.Seq2[storage.Extent, error]
	if name == ContextAllocation {
		runs = c.export.Extents(c.ctx, off, n)
	} else {
		runs = spread(c.ctx, c.export.Changed[name], off, n)
	}
	limit := maxDescriptors
	if one {
		limit = 1
	}
	var ds []descriptor
	visited := 0
	for e, err := range runs {
		if err != nil {
			return nil, err
		}
		s := uint32(0)
		switch {
		case name == ContextAllocation && e.Hole:
			s = StateHole | StateZero
		case name != ContextAllocation && !e.Hole:
			s = StateDirty
		}
		if k := len(ds); k > 0 && ds[k-1].status == s {
			ds[k-1].length += uint64(e.Len)
		} else if k == limit {
			break
		} else {
			ds = append(ds, descriptor{uint64(e.Len), s})
		}
		if visited++; visited == maxVisited {
			break
		}
	}
	if len(ds) == 0 {
		return nil, EIO // a device that describes nothing of a range it has
	}
	return ds, nil
}

// spread makes of the changed extents of a range extents that cover it, in
// which a hole is what has not changed.
func spread(ctx context.Context, changed func(context.Context, int64, int64) iter.Seq2[storage.Extent, error], off, n int64) iter.Seq2[storage.Extent, error] {
	return func(yield func(storage.Extent, error) bool) {
		at, end := off, off+n
		for e, err := range changed(ctx, off, n) {
			if err != nil {
				yield(storage.Extent{}, err)
				return
			}
			lo, hi := max(e.Off, at), min(e.End(), end)
			if lo >= hi {
				continue
			}
			if lo > at && !yield(storage.Extent{Off: at, Len: lo - at, Hole: true}, nil) {
				return
			}
			if !yield(storage.Extent{Off: lo, Len: hi - lo}, nil) {
				return
			}
			at = hi
		}
		if at < end {
			yield(storage.Extent{Off: at, Len: end - at, Hole: true}, nil)
		}
	}
}
