package cow

import (
	"bytes"
	"sync"
)

// plan decides what becomes of each unit of p: slotZero, slotBuf with the
// bytes in p, or slotNone when it stays as it is.
func (w *writer) plan(first uint64, p []byte) ([]slot, error) {
	s := w.disk.s
	u, fan := s.geo.UnitSize, uint64(s.geo.Fanout)
	slots := make([]slot, len(p)/u)
	zeros := false
	for i := range slots {
		b := p[i*u : (i+1)*u : (i+1)*u]
		slots[i] = slot{idx: uint16((first + uint64(i)) % fan), state: slotBuf, buf: b}
		if isZero(b) {
			slots[i].state, slots[i].buf = slotZero, nil
			zeros = true
		} else {
			slots[i].crc = checksum(b)
		}
	}
	e := s.eras.enter()
	defer e.leave()
	if err := w.disk.alive(); err != nil {
		return nil, err
	}
	v := w.disk.v.view.Load()
	old := make([]slot, min(len(slots), int(fan)))
	for i := 0; i < len(slots); {
		at := first + uint64(i)
		n := min(len(slots)-i, int(fan-at%fan))
		if !w.compare && !zeros {
			// A damaged map must fail the write, not the checkpoint.
			if _, err := s.leafPage(v.base.root, at/fan); err != nil {
				return nil, w.damaged(err, at)
			}
			i += n
			continue
		}
		if err := s.resolve(v, at/fan, int(at%fan), old[:n]); err != nil {
			return nil, w.damaged(err, at)
		}
		w.leaveEqual(slots[i:i+n], old[:n])
		i += n
	}
	return slots, nil
}

// leaveEqual turns those of now whose bytes are those of old, the versions
// that the volume has of the same units, into slotNone. The checksum is only
// the first sieve: where it is the same, the old bytes are read, adjoining
// units at a time. Units that cannot be read count as different. The caller
// is in an era.
func (w *writer) leaveEqual(now, old []slot) {
	s := w.disk.s
	u := int64(s.geo.UnitSize)
	w.pieces = w.pieces[:0]
	for i := range now {
		switch {
		case now[i].state == slotZero:
			if old[i].state == slotZero {
				now[i].state = slotNone
			}
		case old[i].state == slotZero || old[i].state == slotLost || now[i].crc != old[i].crc:
		case old[i].state == slotBuf:
			if bytes.Equal(now[i].buf, old[i].buf) {
				now[i].state = slotNone
			}
		default:
			w.pieces = joined(w.pieces, int64(i)*u, old, i, s.files)
		}
	}
	concurrently(w.pieces, compareWorkers, func(pc piece) { s.compare(pc, now[pc.off/u:]) })
}

// joined adds slot i of slots, whose first byte is off, to the last of pieces
// if it continues that, in the volume and in the space files, and to a new one
// otherwise.
func joined(pieces []piece, off int64, slots []slot, i int, files *spaceFiles) []piece {
	if k := len(pieces) - 1; k >= 0 {
		p := &pieces[k]
		n := len(p.units)
		if p.off+int64(n)*int64(files.geo.UnitSize) == off && slots[i].addr == p.units[0].addr+uint64(n) && files.contiguous(p.units[0].addr, n+1) {
			p.units = p.units[:n+1]
			return pieces
		}
	}
	return append(pieces, piece{off, slots[i : i+1]})
}

// pieceBuffers are buffers of readPiece bytes.
var pieceBuffers = sync.Pool{New: func() any { return new([readPiece]byte) }}

// compare reads the units of a piece and turns those of now that are equal
// into slotNone.
func (s *Store) compare(pc piece, now []slot) {
	u := s.geo.UnitSize
	buf := pieceBuffers.Get().(*[readPiece]byte)
	defer pieceBuffers.Put(buf)
	for len(pc.units) > 0 {
		n := min(len(pc.units), readPiece/u)
		err := s.files.read(buf[:n*u], pc.units[0].addr)
		for i := range n {
			b := buf[i*u : (i+1)*u]
			if err != nil && s.verified(b, pc.units[i].entry()) != nil {
				continue
			}
			if bytes.Equal(now[i].buf, b) { // so the checksum fits as well
				now[i].state = slotNone
			}
		}
		pc.units, now = pc.units[n:], now[n:]
	}
}

var zeroPage [4096]byte

// isZero tells at the speed of memory; the length of b is a power of two.
func isZero(b []byte) bool {
	for n := min(len(b), len(zeroPage)); len(b) > 0; b = b[n:] {
		if !bytes.Equal(b[:n], zeroPage[:n]) {
			return false
		}
	}
	return true
}
