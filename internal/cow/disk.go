package cow

import (
	"context"
	"errors"
	"fmt"
	"io"
	"sync"
	"sync/atomic"
)

// Disk is an open volume. It is safe for concurrent use; offsets and lengths
// are bytes and need no alignment.
type Disk struct {
	s      *Store
	v      *volume // of a pinned disk, the pin
	id     ID      // as opened
	pinned bool
	closed atomic.Bool
}

// OpenDisk opens a volume any number of times. See [Mode].
func (s *Store) OpenDisk(ctx context.Context, id ID, m Mode) (*Disk, error) {
	if m == Live {
		if err := s.begin(); err != nil {
			return nil, err
		}
		defer s.end()
		s.mu.Lock()
		defer s.mu.Unlock()
		v, err := s.source(id)
		if err != nil {
			return nil, err
		}
		return &Disk{s: s, v: v, id: id}, nil
	}
	if err := s.begin(); err != nil {
		return nil, err
	}
	defer s.end()
	s.mu.Lock()
	v, err := s.source(id)
	s.mu.Unlock()
	if err != nil {
		return nil, err
	}
	for len(v.view.Load().sealed) >= s.limits.Chain && s.failure() == nil {
		if err := s.sync(ctx); err != nil {
			return nil, err
		}
	}
	d := &Disk{s: s, id: id, pinned: true}
	pin := func(b *batch) error {
		s.beforeSeal(v)
		s.mu.Lock()
		defer s.mu.Unlock()
		v, err := s.source(id)
		if err != nil {
			return err
		}
		v.gate.Lock()
		defer v.gate.Unlock()
		if err := b.admit(s.openCost(v, true)); err != nil {
			return err
		}
		d.v = s.derive(b, v, s.nextNum, id, flagReadOnly|flagPin, nil)
		s.epoch++
		return nil
	}
	if s.failure() != nil { // nothing is logged any more, but all can be read
		return d, pin(&batch{})
	}
	flush := func() error { return s.flushVolume(ctx, v) }
	if err := s.commit(ctx, flush, pin); err != nil {
		return nil, err
	}
	return d, nil
}

// ID is the name under which the disk was opened.
func (d *Disk) ID() ID { return d.id }

// Size returns the size in bytes, at this moment for a Live disk.
func (d *Disk) Size() int64 { return d.v.view.Load().size }

// Version names the contents of a pinned disk: equal versions of one volume
// stand for equal bytes, across restarts, too. Contents that have not been
// written yet are made durable first.
func (d *Disk) Version(ctx context.Context) (string, error) {
	if !d.pinned {
		return "", fmt.Errorf("%w: version of a live disk", ErrInvalid)
	}
	if err := d.begin(false); err != nil {
		return "", err
	}
	defer d.s.end()
	if len(d.v.view.Load().sealed) > 0 {
		if err := d.s.sync(ctx); err != nil {
			return "", err
		}
	}
	w := d.v.view.Load()
	r := w.base.root
	return fmt.Sprintf("%x-%x-%x-%08x", w.size, r.birth, r.addr, r.crc), nil
}

// Close releases the disk; it does not flush.
func (d *Disk) Close() error {
	if d.closed.Swap(true) {
		return ErrClosed
	}
	if !d.pinned {
		return nil
	}
	s := d.s
	if err := s.begin(); err != nil {
		return nil // the store has been closed; the next open removes the pin
	}
	defer s.end()
	s.mu.Lock()
	defer s.mu.Unlock()
	d.v.gate.Lock()
	defer d.v.gate.Unlock()
	d.v.gone.Store(true)
	s.unregister(d.v)
	s.hurry()
	return nil
}

// begin starts a call on the disk; s.end ends it.
func (d *Disk) begin(write bool) error {
	if d.closed.Load() {
		return ErrClosed
	}
	if write {
		if err := d.s.beginWrite(); err != nil {
			return err
		}
		if d.v.readOnly() {
			d.s.end()
			return fmt.Errorf("%w: %v", ErrReadOnly, d.id)
		}
	} else if err := d.s.begin(); err != nil {
		return err
	}
	if err := d.alive(); err != nil {
		d.s.end()
		return err
	}
	return nil
}

// alive fails when the volume has been deleted. A read asks inside its era.
func (d *Disk) alive() error {
	if !d.v.gone.Load() {
		return nil
	}
	if d.pinned {
		return ErrClosed
	}
	return fmt.Errorf("%w: %v", ErrNotFound, d.id)
}

func (d *Disk) noData() error { return fmt.Errorf("%w: %v", ErrNoData, d.id) }

// Flush makes every write to the volume that returned before it durable.
// After an error nothing is known about them, and the store has failed unless
// the error is the context's.
func (d *Disk) Flush(ctx context.Context) error {
	if err := d.begin(false); err != nil {
		return err
	}
	defer d.s.end()
	return d.s.flushVolume(ctx, d.v)
}

const (
	// readWindow is how much of one ReadAt is looked up and read at a time.
	readWindow = 4 << 20
	// readPiece is how much is read from a file and verified at a time: much
	// for the device's sake, and so little that the bytes are still in the
	// processor's cache when they are verified.
	readPiece = 512 << 10
)

// ReadAt fills p from off as [io.ReaderAt] says. Every byte has been verified
// against its checksum; a unit that fails it twice is a *CorruptError. The
// bytes of one call may come from different moments when others write.
func (d *Disk) ReadAt(p []byte, off int64) (int, error) {
	if err := d.begin(false); err != nil {
		return 0, err
	}
	defer d.s.end()
	if off < 0 {
		return 0, fmt.Errorf("%w: negative offset", ErrInvalid)
	}
	done := 0
	for done < len(p) {
		n := min(len(p)-done, readWindow)
		k, err := d.readWindow(p[done:done+n], off+int64(done))
		done += k
		if err != nil {
			return done, err
		}
	}
	return done, nil
}

func (d *Disk) readWindow(p []byte, off int64) (int, error) {
	e := d.s.eras.enter()
	defer e.leave()
	if err := d.alive(); err != nil {
		return 0, err
	}
	w := d.v.view.Load()
	if w.bare {
		return 0, d.noData()
	}
	if off >= w.size {
		return 0, io.EOF
	}
	var end error
	if n := w.size - off; n < int64(len(p)) {
		p, end = p[:n], io.EOF
	}
	if err := d.s.readView(w, p, off); err != nil {
		if ce, ok := errors.AsType[*CorruptError](err); ok {
			return int(max(0, ce.Off-off)), d.damaged(ce, ce.Off)
		}
		return 0, err
	}
	return len(p), end
}

// piece is adjoining units of the space files that go to adjoining bytes.
type piece struct {
	off   int64 // byte in the volume
	units []slot
}

// scratch is the memory of one read.
type scratch struct {
	slots  []slot
	pieces []piece
}

var scratches = sync.Pool{New: func() any { return new(scratch) }}

// readView fills p from off of a view. The range is within its size, and the
// caller in an era. Errors of damage carry the offset, not the volume.
func (r *pageReader) readView(w *view, p []byte, off int64) error {
	u := int64(r.geo.UnitSize)
	first, last := uint64(off/u), uint64((off+int64(len(p))-1)/u)
	if first == last {
		return r.readUnit(w, first, p, off)
	}
	sc := scratches.Get().(*scratch)
	defer func() {
		clear(sc.slots)
		clear(sc.pieces)
		scratches.Put(sc)
	}()
	n := int(last - first + 1)
	if cap(sc.slots) < n {
		sc.slots = make([]slot, n)
	}
	slots := sc.slots[:n]
	sc.slots = slots
	fan := uint64(r.geo.Fanout)
	var bad error // of the first unit that cannot be found; those before it are read
	for at := first; at <= last; {
		end := min(last+1, (at/fan+1)*fan)
		if err := r.resolve(w, at/fan, int(at%fan), slots[at-first:end-first]); err != nil {
			n, bad = int(at-first), damagedAt(err, max(off, int64(at)*u))
			break
		}
		at = end
	}
	pieces := sc.pieces[:0]
	for i := 0; i < n; {
		at := int64(first+uint64(i)) * u
		switch s := slots[i]; s.state {
		case slotAddr:
			j := i + 1
			for j < n && slots[j].state == slotAddr && slots[j].addr == s.addr+uint64(j-i) && r.files.contiguous(s.addr, j-i+1) {
				j++
			}
			pieces = append(pieces, piece{at, slots[i:j]})
			i = j
			continue
		case slotLost:
			n, bad = i, damagedAt(errLost(), max(off, at))
			continue
		case slotBuf:
			copy(p[max(0, at-off):], s.buf[max(0, off-at):])
		default:
			clear(p[max(0, at-off):min(int64(len(p)), at+u-off)])
		}
		i++
	}
	sc.pieces = pieces
	if err := r.readPieces(pieces, p, off); err != nil {
		return err
	}
	return bad
}

// readUnit is readView within one unit.
func (r *pageReader) readUnit(w *view, unit uint64, p []byte, off int64) error {
	fan := uint64(r.geo.Fanout)
	s, err := r.lookup(w, unit/fan, int(unit%fan))
	if err != nil {
		return damagedAt(err, off)
	}
	at := int(off % int64(r.geo.UnitSize))
	switch {
	case s.state == slotBuf:
		copy(p, s.buf[at:])
	case s.state == slotLost:
		return damagedAt(errLost(), off)
	case s.state != slotAddr:
		clear(p)
	case len(p) == r.geo.UnitSize:
		if err := r.verified(p, s.entry()); err != nil {
			clear(p)
			return damagedAt(err, off)
		}
	default:
		b := pieceBuffers.Get().(*[readPiece]byte)
		defer pieceBuffers.Put(b)
		if err := r.verified(b[:r.geo.UnitSize], s.entry()); err != nil {
			return damagedAt(err, off)
		}
		copy(p, b[at:])
	}
	return nil
}

// readPiece reads and verifies one piece. Whole units go straight to p; p may
// begin and end within a unit.
func (r *pageReader) readPiece(pc piece, p []byte, off int64) error {
	u := int64(r.geo.UnitSize)
	for len(pc.units) > 0 {
		from := pc.off - off
		if from < 0 || from+u > int64(len(p)) { // cut by an end of p
			b := make([]byte, u)
			if err := r.verified(b, pc.units[0].entry()); err != nil {
				return damagedAt(err, max(off, pc.off))
			}
			copy(p[max(0, from):], b[max(0, -from):])
			pc = piece{pc.off + u, pc.units[1:]}
			continue
		}
		n := min(int64(len(pc.units)), (int64(len(p))-from)/u, max(1, readPiece/u))
		dst := p[from : from+n*u]
		err := r.files.read(dst, pc.units[0].addr)
		for i := range n {
			b := dst[i*u : (i+1)*u]
			if err == nil && checksum(b) == pc.units[i].crc {
				continue
			}
			if err := r.verified(b, pc.units[i].entry()); err != nil {
				clear(dst[i*u:])
				return damagedAt(err, pc.off+i*u)
			}
		}
		pc = piece{pc.off + n*u, pc.units[n:]}
	}
	return nil
}

// entry is the slot as a reference to data.
func (s slot) entry() entry { return entry{addr: s.addr, crc: s.crc, kind: kindData} }

// damagedAt adds the byte of the volume to a corruption error.
func damagedAt(err error, off int64) error {
	if ce, ok := errors.AsType[*CorruptError](err); ok {
		c := *ce
		c.Off = off
		return &c
	}
	return err
}

// damaged is damagedAt for the volume of the disk, whose damage is noted.
func (d *Disk) damaged(err error, off int64) error {
	err = damagedAt(err, off)
	if ce, ok := err.(*CorruptError); ok {
		ce.Volume = d.id
		d.s.damage.add(ce)
	}
	return err
}
