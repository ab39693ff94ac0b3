package storage

import (
	"bytes"
	"cmp"
	"context"
	"fmt"
	"io"
)

const (
	// Bytes looked up in the map of a volume and read of its contents at a
	// time: at first, and at most when access goes on to be sequential.
	overlayMapMin, overlayMapMax   = 4 << 20, 1 << 30
	overlayReadMin, overlayReadMax = 32 << 10, 1 << 20
)

var zeroUnit [Unit]byte

// Overlay writes over a volume that may have contents already, and leaves
// every [Unit] that would not change untouched: shared with its relatives and
// absent from a later diff. Zeros are never stored: holes stay holes, and
// units of data that become all zero become holes.
//
// Writes may have any alignment and come in any order; ascending ones are
// fastest: zeros into holes then cost a look at the bytes, data into holes a
// write, and data that is there already a read.
//
// Nobody else may write to the volume meanwhile. An Overlay is not safe for
// concurrent use. It does not flush. After an error, what was passed to the
// failed call may be stored in part.
type Overlay struct {
	v       Volume
	changed int64

	// What is known of the volume from next on, as long as calls ascend.
	next    int64
	extents []Extent // adjoining
	old     []byte   // contents at oldOff
	oldOff  int64
	mapLen  int64 // bytes to look up the next time
	readLen int64 // bytes to read the next time
	buf     []byte
}

// NewOverlay returns an Overlay of v, which stays the caller's to close.
func NewOverlay(v Volume) *Overlay { return &Overlay{v: v} }

// Changed returns how many bytes have been stored or turned into holes.
func (o *Overlay) Changed() int64 { return o.changed }

// WriteAt makes [off, off+len(p)) of the volume equal to p.
func (o *Overlay) WriteAt(ctx context.Context, p []byte, off int64) error {
	if err := o.seek(off, int64(len(p))); err != nil {
		return err
	}
	for len(p) > 0 {
		e, err := o.extent(ctx, off)
		if err != nil {
			return err
		}
		n := int(min(int64(len(p)), e.End()-off))
		if e.Hole {
			err = o.fill(p[:n], off)
		} else {
			n, err = o.merge(ctx, p[:n], off)
		}
		if err != nil {
			o.extents, o.old = nil, nil // no longer what the volume has
			return err
		}
		p, off = p[n:], off+int64(n)
		o.next = off
	}
	return nil
}

// Zero makes [off, off+n) of the volume read as zero.
func (o *Overlay) Zero(ctx context.Context, off, n int64) error {
	if err := o.seek(off, n); err != nil {
		return err
	}
	if head := min(n, -off&(Unit-1)); head > 0 {
		if err := o.WriteAt(ctx, zeroUnit[:head], off); err != nil {
			return err
		}
		off, n = off+head, n-head
	}
	tail := n % Unit
	if err := o.clean(ctx, off, n-tail); err != nil {
		return err
	}
	return o.WriteAt(ctx, zeroUnit[:tail], off+n-tail)
}

// clean turns the data in a range of whole units into holes.
func (o *Overlay) clean(ctx context.Context, off, n int64) error {
	if n == 0 {
		return nil
	}
	o.next, o.extents, o.old = off+n, nil, nil
	var data Extent // neighbours joined
	for e, err := range o.v.Extents(ctx, off, n) {
		switch {
		case err != nil:
			return err
		case e.Hole:
			err = o.drop(ctx, data)
			data = Extent{}
		case data.Len > 0:
			data.Len += e.Len
		default:
			data = e
		}
		if err != nil {
			return err
		}
	}
	return o.drop(ctx, data)
}

// drop turns an extent into a hole.
func (o *Overlay) drop(ctx context.Context, e Extent) error {
	if e.Len == 0 {
		return nil
	}
	err := o.v.Zero(ctx, e.Off, e.Len)
	if err == nil {
		o.changed += e.Len
	}
	return err
}

// seek checks a range, forgets what is known when it lies further back, and
// becomes cautious about what is wanted next when it does not adjoin.
func (o *Overlay) seek(off, n int64) error {
	if size := o.v.Size(); off < 0 || n < 0 || off > size-n {
		return fmt.Errorf("%w: [%d, +%d) is not within a volume of %d bytes", ErrInvalid, off, n, size)
	}
	if off < o.next {
		o.extents, o.old = nil, nil
	}
	if off != o.next || o.mapLen == 0 {
		o.mapLen, o.readLen = overlayMapMin, overlayReadMin
	}
	return nil
}

// extent returns the extent that off is in.
func (o *Overlay) extent(ctx context.Context, off int64) (Extent, error) {
	for len(o.extents) > 0 && o.extents[0].End() <= off {
		o.extents = o.extents[1:]
	}
	if len(o.extents) > 0 && o.extents[0].Off <= off {
		return o.extents[0], nil
	}
	o.extents = o.extents[:0]
	n := min(o.mapLen, o.v.Size()-off)
	o.mapLen = min(2*o.mapLen, overlayMapMax)
	for e, err := range o.v.Extents(ctx, off, n) {
		if err != nil {
			return Extent{}, err
		}
		if last := len(o.extents) - 1; last >= 0 && o.extents[last].Hole == e.Hole {
			o.extents[last].Len += e.Len
			continue
		}
		o.extents = append(o.extents, e)
	}
	if len(o.extents) == 0 || o.extents[0].Off > off || o.extents[0].End() <= off {
		return Extent{}, fmt.Errorf("volume has no extent at byte %d", off)
	}
	return o.extents[0], nil
}

// split returns the length of the first run of p whose units all answer like
// the first, and the answer. Units are those of the volume, so the first and
// last may be parts.
func split[T comparable](p []byte, off int64, kind func(part []byte, at int) T) (int, T) {
	n := 0
	var first T
	for n < len(p) {
		k := min(len(p)-n, int(Unit-(off+int64(n))%Unit))
		answer := kind(p[n:n+k], n)
		if n == 0 {
			first = answer
		} else if answer != first {
			break
		}
		n += k
	}
	return n, first
}

// fill stores p, all of which goes into a hole.
func (o *Overlay) fill(p []byte, off int64) error {
	for len(p) > 0 {
		n, zero := split(p, off, func(part []byte, _ int) bool { return isZero(part) })
		if !zero {
			if err := o.store(p[:n], off); err != nil {
				return err
			}
		}
		p, off = p[n:], off+int64(n)
	}
	return nil
}

// What is to be done with a unit that holds data.
const (
	keep = iota
	put
	wipe
	unread // the old contents at hand end before it
)

// merge makes the volume equal to the first n bytes of p, all of which goes
// where there may be data.
func (o *Overlay) merge(ctx context.Context, p []byte, off int64) (int, error) {
	done := 0
	for done < len(p) {
		at := off + int64(done)
		n, do := split(p[done:], at, func(part []byte, i int) int {
			if len(part) == Unit && isZero(part) {
				return wipe
			}
			old := o.oldAt(at+int64(i), len(part))
			switch {
			case old == nil:
				return unread
			case bytes.Equal(old, part):
				return keep
			}
			return put
		})
		part := p[done : done+n]
		var err error
		switch do {
		case put:
			err = o.store(part, at)
		case wipe:
			err = o.drop(ctx, Extent{Off: at, Len: int64(n)})
		case unread:
			err = o.load(at, int64(len(p)-done))
			n = 0
		}
		if err != nil {
			return done, err
		}
		done += n
	}
	return done, nil
}

func (o *Overlay) store(p []byte, off int64) error {
	n, err := WriteBulk(o.v, p, off)
	o.changed += int64(n)
	return err
}

// oldAt returns the n bytes that the volume has at off, or nil when they have
// not been read.
func (o *Overlay) oldAt(off int64, n int) []byte {
	i := off - o.oldOff
	if i < 0 || i+int64(n) > int64(len(o.old)) {
		return nil
	}
	return o.old[i:][:n]
}

// load reads what the volume has from off on: the want bytes at least, whole
// units, and not beyond the extent.
func (o *Overlay) load(off, want int64) error {
	n := min(max(want+Unit-1, o.readLen), overlayReadMax)
	n = min(n-(off+n)%Unit, o.extents[0].End()-off)
	o.readLen = min(2*o.readLen, overlayReadMax)
	if int64(cap(o.buf)) < n {
		o.buf = make([]byte, n)
	}
	buf := o.buf[:n]
	if k, err := o.v.ReadAt(buf, off); int64(k) < n {
		return fmt.Errorf("read %d bytes at %d: got %d: %w", n, off, k, cmp.Or(err, io.ErrUnexpectedEOF))
	}
	o.old, o.oldOff = buf, off
	return nil
}

func isZero(p []byte) bool { return bytes.Equal(p, zeroUnit[:len(p)]) }
