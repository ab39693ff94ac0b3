package cow

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
)

// errRetry says that the volume has changed under a writer in a way that it
// has to look at again.
var errRetry = errors.New("volume changed meanwhile")

const (
	// writeWindow is how much of one WriteAt is worked on at a time.
	writeWindow = 4 << 20
	// compareMin is the length of a WriteAt from which units that would not
	// change are found and left alone.
	compareMin = 64 << 10
)

// WriteAt stores p at off. The bytes are visible to reads on return and
// durable after the next Flush. Units that become zero turn into holes, and
// in a call of 64 KiB or more those whose bytes would not change are left
// alone, so that copying an image over its former version changes, for
// [Store.Diff] as well, no more than what differs.
//
// Errors: [ErrInvalid] past the end, and nothing is written; a *SpaceError;
// a *CorruptError where old contents are needed and damaged; [ErrReadOnly],
// [ErrFailed]. After an error n bytes are written and any part of the rest
// may be.
func (d *Disk) WriteAt(p []byte, off int64) (n int, err error) { return d.write(p, off, false) }

func (d *Disk) write(p []byte, off int64, bulk bool) (n int, err error) {
	if err := d.begin(true); err != nil {
		return 0, err
	}
	defer d.s.end()
	if err := d.checkRange(off, int64(len(p))); err != nil {
		return 0, err
	}
	w := writer{
		disk:    d,
		direct:  int64(len(p)) >= d.s.limits.DirectMin,
		compare: len(p) >= compareMin,
		bulk:    bulk,
	}
	u := int64(d.s.geo.UnitSize)
	for n < len(p) {
		at := off + int64(n)
		k := min(int64(len(p)-n), writeWindow-writeWindow%u-at%u)
		switch {
		case at%u != 0 || k < u:
			k = min(k, u-at%u)
			err = w.patch(uint64(at/u), int(at%u), p[n:n+int(k)])
		default:
			k -= k % u
			err = w.units(uint64(at/u), p[n:n+int(k)])
		}
		if err != nil {
			return n, err
		}
		n += int(k)
	}
	return n, nil
}

func (d *Disk) checkRange(off, n int64) error {
	if size := d.Size(); off < 0 || n < 0 || off > size || n > size-off {
		return fmt.Errorf("%w: %d bytes at %d in a volume of %d", ErrInvalid, n, off, size)
	}
	return nil
}

// Zero makes n bytes from off read as zero and gives their space back. It
// costs the same for any length.
func (d *Disk) Zero(ctx context.Context, off, n int64) error {
	if err := d.begin(true); err != nil {
		return err
	}
	defer d.s.end()
	if err := d.checkRange(off, n); err != nil {
		return err
	}
	u := int64(d.s.geo.UnitSize)
	w := writer{disk: d}
	zeros := make([]byte, min(u, n))
	if head := off % u; head != 0 && n > 0 {
		k := min(n, u-head)
		if err := w.patch(uint64(off/u), int(head), zeros[:k]); err != nil {
			return err
		}
		off, n = off+k, n-k
	}
	if whole := n / u; whole > 0 {
		if err := w.zero(ctx, uint64(off/u), uint64(off/u+whole)); err != nil {
			return err
		}
		off, n = off+whole*u, n-whole*u
	}
	if n > 0 {
		return w.patch(uint64(off/u), 0, zeros[:n])
	}
	return nil
}

// writer is one call that changes a disk.
type writer struct {
	disk    *Disk
	direct  bool    // write to the space files at once
	compare bool    // leave equal units alone
	bulk    bool    // let the host forget what is written to the files
	pieces  []piece // scratch of leaveEqual
}

// units writes whole units from first on.
func (w *writer) units(first uint64, p []byte) error {
	s := w.disk.s
	if err := s.throttle(context.Background()); err != nil {
		return err
	}
	slots, err := w.plan(first, p)
	if err != nil {
		return err
	}
	data, chunks := 0, 0
	last := ^uint64(0)
	for i, sl := range slots {
		if sl.state == slotNone {
			continue
		}
		if sl.state != slotZero {
			data++
		}
		if c := (first + uint64(i)) / uint64(s.geo.Fanout); c != last {
			chunks, last = chunks+1, c
		}
	}
	if chunks == 0 {
		return nil
	}
	f := floorWrite
	if data == 0 {
		f = floorDiscard
	}
	height := w.disk.v.view.Load().height
	promised := int64(data) + int64(2*chunks*height) + s.tableCost()
	if err := s.promise(context.Background(), promised, f); err != nil {
		return err
	}
	if w.direct {
		err = w.store(slots, p, &promised)
	} else {
		for i := range slots {
			if slots[i].state == slotBuf {
				slots[i].buf = bytes.Clone(slots[i].buf)
			}
		}
	}
	if err == nil {
		err = w.publish(height, promised, first+uint64(len(slots)), func(top *layer) (load, []uint64, error) {
			d, dropped := w.put(top, first, slots)
			return d, dropped, nil
		})
	} else {
		s.space.unpromise(promised)
	}
	if err != nil {
		var lost []uint64
		for _, sl := range slots {
			if sl.state == slotAddr {
				lost = append(lost, sl.addr)
			}
		}
		s.dropUnits(lost)
	}
	if err == errRetry { // the volume has grown, or got ranges of another one
		return w.units(first, p)
	}
	return err
}

func (w *writer) damaged(err error, unit uint64) error {
	return w.disk.damaged(err, int64(unit)*int64(w.disk.s.geo.UnitSize))
}

// store writes the slotBuf units to the space files, in runs as long as p and
// the free space have them, and makes them slotAddr.
func (w *writer) store(slots []slot, p []byte, promised *int64) error {
	s := w.disk.s
	u := s.geo.UnitSize
	for i := 0; i < len(slots); {
		if slots[i].state != slotBuf {
			i++
			continue
		}
		n := 1
		for i+n < len(slots) && slots[i+n].state == slotBuf {
			n++
		}
		addr, got, err := s.space.alloc(classDirect, n, n)
		if err != nil {
			return err
		}
		*promised -= int64(got)
		for j := range got {
			slots[i+j].state, slots[i+j].addr, slots[i+j].buf = slotAddr, addr+uint64(j), nil
		}
		if err := s.files.write(p[i*u:(i+got)*u], addr); err != nil {
			return err
		}
		s.files.writeBehind(addr, got)
		if w.bulk {
			s.bulk.add(addr, got)
		}
		i += got
	}
	return nil
}

// errGrafted says that the volume is about to get ranges of another one.
var errGrafted = errors.New("volume gets ranges of another one")

// publish changes the top layer of the volume by f, under the shared gate,
// and settles the promise made for it. height is what the promise assumed;
// end is the first unit behind the change. A volume that is getting ranges of
// another one changes when it has them, and the writer looks at it again then:
// a change is before all of them or after.
func (w *writer) publish(height int, promised int64, end uint64, f func(*layer) (load, []uint64, error)) error {
	err := w.tryPublish(height, promised, end, f)
	if err == errGrafted {
		err = cmp.Or(w.disk.s.sync(context.Background()), errRetry)
	}
	return err
}

func (w *writer) tryPublish(height int, promised int64, end uint64, f func(*layer) (load, []uint64, error)) error {
	s, v := w.disk.s, w.disk.v
	v.gate.RLock()
	defer v.gate.RUnlock()
	view := v.view.Load()
	err := w.disk.alive()
	switch {
	case err != nil:
	case end > s.geo.units(view.size):
		err = fmt.Errorf("%w: the volume has shrunk", ErrInvalid)
	case view.grafted():
		err = errGrafted
	case view.height > height:
		err = errRetry
	}
	if err != nil {
		s.space.unpromise(promised)
		return err
	}
	view.top.mu.Lock()
	d, dropped, err := f(view.top)
	view.top.mu.Unlock()
	if err == nil {
		s.markChanged(v)
	}
	s.entries.Add(d.entries)
	s.buffers.Add(d.buffers)
	s.space.unpromise(promised - d.promised)
	s.dropUnits(dropped)
	return err
}

// put stores slots, those of slotNone left out, as units from first on.
func (w *writer) put(top *layer, first uint64, slots []slot) (d load, dropped []uint64) {
	fan := uint64(w.disk.s.geo.Fanout)
	for i := 0; i < len(slots); {
		at := first + uint64(i)
		n := min(len(slots)-i, int(fan-at%fan))
		run := slots[i : i+n]
		i += n
		live, zero := 0, 0
		for _, sl := range run {
			if sl.state != slotNone {
				run[live] = sl
				live++
			}
			if sl.state == slotZero {
				zero++
			}
		}
		var g load
		var gone []uint64
		switch {
		case live == 0:
			continue
		case zero == int(fan):
			g, gone = top.zeroChunks(at/fan, at/fan+1)
		default:
			g, gone = top.putRun(at/fan, run[:live])
		}
		d.add(g)
		dropped = append(dropped, gone...)
	}
	return d, dropped
}

// zero makes whole units [lo, hi) zero.
func (w *writer) zero(ctx context.Context, lo, hi uint64) error {
	s := w.disk.s
	if err := s.throttle(ctx); err != nil {
		return err
	}
	for {
		height := w.disk.v.view.Load().height
		promised := int64(4*height) + s.tableCost()
		if err := s.promise(ctx, promised, floorDiscard); err != nil {
			return err
		}
		err := w.publish(height, promised, hi, func(top *layer) (load, []uint64, error) {
			d, dropped := top.zeroUnits(lo, hi, uint64(s.geo.Fanout))
			return d, dropped, nil
		})
		if err != errRetry {
			return err
		}
	}
}

// zeroUnits makes units [lo, hi) zero. l.mu is held.
func (l *layer) zeroUnits(lo, hi, fan uint64) (d load, dropped []uint64) {
	do := func(g load, gone []uint64) {
		d.add(g)
		dropped = append(dropped, gone...)
	}
	for lo < hi {
		if lo%fan == 0 && hi-lo >= fan {
			do(l.zeroChunks(lo/fan, hi/fan))
			lo = hi / fan * fan
			continue
		}
		end := min(hi, (lo/fan+1)*fan)
		var run []slot
		for u := lo; u < end; u++ {
			run = append(run, slot{idx: uint16(u % fan), state: slotZero})
		}
		do(l.putRun(lo/fan, run))
		lo = end
	}
	return d, dropped
}

// patch overwrites b within one unit, from byte at of it on. Two patches of
// one unit never lose each other's bytes: the new version is published only
// when the version it was made from is still the current one.
func (w *writer) patch(unit uint64, at int, b []byte) error {
	s := w.disk.s
	fan := uint64(s.geo.Fanout)
	if err := s.throttle(context.Background()); err != nil {
		return err
	}
	chunk, idx := unit/fan, int(unit%fan)
	for {
		old, buf, err := w.current(unit)
		if err != nil {
			return err
		}
		if bytes.Equal(buf[at:at+len(b)], b) {
			return nil
		}
		copy(buf[at:], b)
		sl := slot{idx: uint16(idx), state: slotBuf, buf: buf, crc: checksum(buf)}
		if isZero(buf) {
			sl = slot{idx: uint16(idx), state: slotZero}
		}
		height := w.disk.v.view.Load().height
		promised := 1 + int64(height) + s.tableCost()
		if err := s.promise(context.Background(), promised, floorWrite); err != nil {
			return err
		}
		err = w.publish(height, promised, unit+1, func(top *layer) (load, []uint64, error) {
			if !w.disk.v.view.Load().version(chunk, idx, top.getLocked(chunk, idx)).same(old) {
				return load{}, nil, errRetry
			}
			d, dropped := top.putRun(chunk, []slot{sl})
			return d, dropped, nil
		})
		if err != errRetry {
			return err
		}
	}
}

// current reads a unit and tells which version it is. The bytes are the
// caller's.
func (w *writer) current(unit uint64) (version, []byte, error) {
	s := w.disk.s
	u, fan := s.geo.UnitSize, uint64(s.geo.Fanout)
	e := s.eras.enter()
	defer e.leave()
	if err := w.disk.alive(); err != nil {
		return version{}, nil, err
	}
	v := w.disk.v.view.Load()
	if unit >= s.geo.units(v.size) {
		return version{}, nil, fmt.Errorf("%w: the volume has shrunk", ErrInvalid)
	}
	ver := v.version(unit/fan, int(unit%fan), v.top.get(unit/fan, int(unit%fan)))
	buf := make([]byte, u)
	one := []slot{ver.s}
	if ver.s.state == slotNone {
		if err := s.pageReader.fill(ver.root, unit/fan, int(unit%fan), one); err != nil {
			return ver, nil, w.damaged(err, unit)
		}
	}
	switch one[0].state {
	case slotLost:
		return ver, nil, w.damaged(errLost(), unit)
	case slotBuf:
		copy(buf, one[0].buf)
	case slotAddr:
		if err := s.verified(buf, one[0].entry()); err != nil {
			return ver, nil, w.damaged(err, unit)
		}
	}
	return ver, buf, nil
}
