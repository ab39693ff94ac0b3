package cow

import (
	"encoding/binary"
	"fmt"
	"hash/crc32"
)

const (
	frameMagic  = "COWFRAME"
	frameHeader = 64
)

// frameInfo is the header of a frame: a batch of records that is durable as a
// whole or not at all.
type frameInfo struct {
	gen  uint64 // of the durable superblock when it was written
	seq  uint64 // one more than the frame's before, never used again
	prev uint32 // payload checksum of the frame before
	n    uint32 // bytes of payload
	crc  uint32 // of the payload
}

// frameCodec seals frames with the log key, which nobody who writes to a
// volume knows: no data in a frame can pass for a frame.
type frameCodec struct {
	uuid [16]byte
	seed uint32 // checksum of the log key
}

func newFrameCodec(s *super) frameCodec {
	return frameCodec{uuid: s.uuid, seed: checksum(s.logKey[:])}
}

func (c frameCodec) sum(b []byte) uint32 { return crc32.Update(c.seed, castagnoli, b) }

// put encodes the header into b.
func (c frameCodec) put(b []byte, f frameInfo) {
	le := binary.LittleEndian
	clear(b[:frameHeader])
	copy(b, frameMagic)
	copy(b[8:], c.uuid[:])
	le.PutUint64(b[24:], f.gen)
	le.PutUint64(b[32:], f.seq)
	le.PutUint32(b[40:], f.prev)
	le.PutUint32(b[44:], f.n)
	le.PutUint32(b[48:], f.crc)
	le.PutUint32(b[60:], c.sum(b[:60]))
}

// get decodes a header; ok is false when b is none of this store.
func (c frameCodec) get(b []byte) (f frameInfo, ok bool) {
	le := binary.LittleEndian
	if len(b) < frameHeader || string(b[:8]) != frameMagic || [16]byte(b[8:24]) != c.uuid || le.Uint32(b[60:]) != c.sum(b[:60]) {
		return f, false
	}
	return frameInfo{
		gen: le.Uint64(b[24:]), seq: le.Uint64(b[32:]), prev: le.Uint32(b[40:]),
		n: le.Uint32(b[44:]), crc: le.Uint32(b[48:]),
	}, true
}

// recordKind is the first byte of a log record.
type recordKind uint8

const (
	recWrite  recordKind = 'W' // units with their contents
	recMap    recordKind = 'M' // units that lie in the space files
	recZero   recordKind = 'Z' // units that became zero
	recCreate recordKind = 'C'
	recDerive recordKind = 'S' // snapshots or clones, of one instant
	recRevert recordKind = 'R'
	recResize recordKind = 'L'
	recDelete recordKind = 'D'
	recAttrs  recordKind = 'A'
	recEmpty  recordKind = 'X' // the contents of a snapshot are given up
)

// logRecord is one record of the log in memory. Which fields count depends on
// the kind.
type logRecord struct {
	kind  recordKind
	num   uint64    // volume
	first uint64    // recWrite, recMap, recZero: unit
	count uint64    // and how many
	addr  uint64    // recMap: unit of the space files
	crcs  []uint32  // recMap: of each unit
	data  []byte    // recWrite: contents, of a record that was read
	bufs  [][]byte  // recWrite: contents, unit by unit, of a record to be written
	id    ID        // recCreate
	size  int64     // recCreate, recResize: bytes
	to    uint64    // recRevert: volume
	epoch uint64    // at which the operation seals layers
	attrs []byte    // recCreate, recAttrs
	flags uint32    // recDerive: of the new volumes
	pairs []logPair // recDerive
}

// logPair is one volume that a recDerive makes.
type logPair struct {
	src, num uint64
	id       ID
	own      bool // attrs, rather than the source's
	attrs    []byte
}

// append encodes r behind b.
func (r *logRecord) append(b []byte) []byte {
	le := binary.LittleEndian
	blob := func(p []byte) {
		b = le.AppendUint32(b, uint32(len(p)))
		b = append(b, p...)
	}
	b = append(b, byte(r.kind))
	b = le.AppendUint64(b, r.num)
	switch r.kind {
	case recWrite, recZero, recMap:
		b = le.AppendUint64(b, r.first)
		b = le.AppendUint64(b, r.count)
		b = append(b, r.data...)
		for _, p := range r.bufs {
			b = append(b, p...)
		}
		if r.kind == recMap {
			b = le.AppendUint64(b, r.addr)
			for _, c := range r.crcs {
				b = le.AppendUint32(b, c)
			}
		}
	case recCreate:
		b = append(b, r.id[:]...)
		b = le.AppendUint64(b, uint64(r.size))
		blob(r.attrs)
	case recDerive:
		b = le.AppendUint64(b, r.epoch)
		b = le.AppendUint32(b, r.flags)
		b = le.AppendUint32(b, uint32(len(r.pairs)))
		for _, p := range r.pairs {
			b = le.AppendUint64(b, p.src)
			b = le.AppendUint64(b, p.num)
			b = append(b, p.id[:]...)
			own := byte(0)
			if p.own {
				own = 1
			}
			b = append(b, own)
			blob(p.attrs)
		}
	case recRevert:
		b = le.AppendUint64(b, r.epoch)
		b = le.AppendUint64(b, r.to)
	case recResize:
		b = le.AppendUint64(b, r.epoch)
		b = le.AppendUint64(b, uint64(r.size))
	case recAttrs:
		blob(r.attrs)
	}
	return b
}

// recordReader takes values off the front of a payload; after a short read
// all others fail as well.
type recordReader struct {
	b   []byte
	bad bool
}

func (d *recordReader) take(n uint64) []byte {
	if d.bad || n > uint64(len(d.b)) {
		d.bad = true
		return nil
	}
	p := d.b[:n]
	d.b = d.b[n:]
	return p
}

func (d *recordReader) u8() (v uint8) {
	if p := d.take(1); p != nil {
		v = p[0]
	}
	return v
}

func (d *recordReader) u32() (v uint32) {
	if p := d.take(4); p != nil {
		v = binary.LittleEndian.Uint32(p)
	}
	return v
}

func (d *recordReader) u64() (v uint64) {
	if p := d.take(8); p != nil {
		v = binary.LittleEndian.Uint64(p)
	}
	return v
}

func (d *recordReader) id() (id ID) {
	copy(id[:], d.take(16))
	return id
}

func (d *recordReader) blob() []byte { return d.take(uint64(d.u32())) }

// decodeRecords decodes the payload of a frame. The records refer to it.
func decodeRecords(b []byte, g Geometry) ([]logRecord, error) {
	var out []logRecord
	d := &recordReader{b: b}
	for len(d.b) > 0 {
		r := logRecord{kind: recordKind(d.u8()), num: d.u64()}
		switch r.kind {
		case recWrite, recZero, recMap:
			r.first, r.count = d.u64(), d.u64()
			end := uint64(MaxSize / int64(g.UnitSize))
			if r.count == 0 || r.first >= end || r.count > end-r.first {
				d.bad = true
				break
			}
			switch r.kind {
			case recWrite:
				r.data = d.take(r.count * uint64(g.UnitSize))
			case recMap:
				r.addr = d.u64()
				if p := d.take(4 * r.count); p != nil {
					for i := range r.count {
						r.crcs = append(r.crcs, binary.LittleEndian.Uint32(p[4*i:]))
					}
				}
			}
		case recCreate:
			r.id, r.size, r.attrs = d.id(), int64(d.u64()), d.blob()
		case recDerive:
			r.epoch, r.flags = d.u64(), d.u32()
			for n := d.u32(); n > 0 && !d.bad; n-- {
				r.pairs = append(r.pairs, logPair{src: d.u64(), num: d.u64(), id: d.id(), own: d.u8() != 0, attrs: d.blob()})
			}
		case recRevert:
			r.epoch, r.to = d.u64(), d.u64()
		case recResize:
			r.epoch, r.size = d.u64(), int64(d.u64())
		case recAttrs:
			r.attrs = d.blob()
		case recDelete, recEmpty:
		default:
			return nil, fmt.Errorf("unknown record %q", r.kind)
		}
		if d.bad {
			return nil, fmt.Errorf("bad record %q", r.kind)
		}
		out = append(out, r)
	}
	return out, nil
}
