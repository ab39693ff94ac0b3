package qcow2

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"io"
)

// subclusters is how many parts a cluster has with extended entries.
const subclusters = 32

// tableIter goes through the entries of one L2 table.
type tableIter struct {
	buf   []byte
	ref   tableRef
	next  int64 // entry
	parts extendedEntry
	on    bool
}

// extendedEntry is an extended entry with the parts of its cluster that are
// still to be looked at.
type extendedEntry struct {
	host, guest   int64
	stored, zero  uint32 // a bit per part
	part, entryAt int64
	on            bool
}

func (t *tableIter) buffer(h *header) []byte {
	if t.buf == nil {
		t.buf = make([]byte, h.clusterSize())
	}
	return t.buf
}

func (t *tableIter) begin(ref tableRef) { t.ref, t.next, t.on = ref, 0, true }

// fromTable goes on with the current table: it notes what lies ahead, and
// returns the next run that can be had now; an empty one at the end of the
// table.
func (r *Reader) fromTable() (Run, error) {
	t := &r.table
	for t.on {
		if t.parts.on {
			if run, err := r.fromParts(); err != nil || run.Len > 0 {
				return run, err
			}
			continue
		}
		guest := (t.ref.index*r.h.perTable() + t.next) << r.h.clusterBits
		if t.next == r.h.perTable() || guest >= r.h.size {
			t.on = false
			break
		}
		run, err := r.fromEntry(guest)
		if err != nil || run.Len > 0 {
			return run, err
		}
	}
	return Run{}, nil
}

// entry returns the entry i of the current table.
func (r *Reader) entry(i int64) uint64 {
	return binary.BigEndian.Uint64(r.table.buf[i*r.h.entrySize():])
}

// fromEntry looks at the next entry, which describes the disk from guest on,
// and at those after it that go on alike.
func (r *Reader) fromEntry(guest int64) (Run, error) {
	t := &r.table
	e, at := r.entry(t.next), t.ref.off+t.next*r.h.entrySize()
	if e&flagCompressed != 0 {
		t.next++
		return r.compressed(e, at, guest)
	}
	host := int64(e & maskOffset)
	if host%r.h.clusterSize() != 0 {
		return Run{}, field(at, "L2 entry", fmt.Sprintf("%#x", e), fmt.Sprintf("a multiple of %d", r.h.clusterSize()))
	}
	if r.h.extended {
		bitmap := binary.BigEndian.Uint64(t.buf[t.next*16+8:])
		t.parts = extendedEntry{host: host, guest: guest, stored: uint32(bitmap), zero: uint32(bitmap >> 32), entryAt: at, on: true}
		t.next++
		return Run{}, nil
	}
	if e&flagZero != 0 && r.h.version == 2 {
		return Run{}, field(at, "L2 entry", fmt.Sprintf("%#x", e), "one without the zero bit, in version 2")
	}
	kind := kindOf(e)
	n := int64(1)
	for kind != entryNone && t.next+n < r.h.perTable() {
		more := r.entry(t.next + n)
		if kindOf(more) != kind || kind == entryData && more != e+uint64(n)<<r.h.clusterBits {
			break
		}
		n++
	}
	if kind == entryData && host < r.pos {
		n = min(n, spoolRun>>r.h.clusterBits)
	}
	t.next += n
	length := min(n<<r.h.clusterBits, r.h.size-guest)
	switch kind {
	case entryZero:
		return Run{Off: guest, Len: length, Zero: true}, nil
	case entryData:
		return r.stored(at, host, guest, length)
	}
	return Run{}, nil
}

// Kinds of entries that are not compressed.
const (
	entryNone = iota
	entryZero
	entryData
	entryOther // compressed
)

func kindOf(e uint64) int {
	switch {
	case e&flagCompressed != 0:
		return entryOther
	case e&flagZero != 0:
		return entryZero
	case e&maskOffset != 0:
		return entryData
	}
	return entryNone
}

// fromParts goes on with an extended entry.
func (r *Reader) fromParts() (Run, error) {
	p := &r.table.parts
	if both := p.stored & p.zero; both != 0 {
		return Run{}, field(p.entryAt+8, "L2 bitmap", fmt.Sprintf("%#x", both), "no part that is both stored and zero")
	}
	if p.stored != 0 && p.host == 0 {
		return Run{}, field(p.entryAt, "L2 entry", 0, "an offset for the parts that are stored")
	}
	size := r.h.clusterSize() / subclusters
	for p.part < subclusters {
		from := p.part
		kind := p.kind(from)
		for p.part++; p.part < subclusters && p.kind(p.part) == kind; p.part++ {
		}
		off := p.guest + from*size
		n := min((p.part-from)*size, r.h.size-off)
		if kind == entryNone || n <= 0 {
			continue
		}
		if kind == entryZero {
			return Run{Off: off, Len: n, Zero: true}, nil
		}
		return r.stored(p.entryAt, p.host+from*size, off, n)
	}
	p.on = false
	return Run{}, nil
}

func (p *extendedEntry) kind(part int64) int {
	switch bit := uint32(1) << part; {
	case p.stored&bit != 0:
		return entryData
	case p.zero&bit != 0:
		return entryZero
	}
	return entryNone
}

// stored deals with n bytes of the disk at guest that lie at host in the
// image: those ahead are noted, those behind are a run of the spool.
func (r *Reader) stored(at, host, guest, n int64) (Run, error) {
	if err := r.inside(at, "L2 entry", host, n); err != nil {
		return Run{}, err
	}
	if host >= r.pos {
		r.ahead.add(claim{off: host, at: guest, n: n, kind: claimData})
		return Run{}, nil
	}
	if err := r.spool.take(host, n, claimData.String()); err != nil {
		return Run{}, err
	}
	if r.spool.s == nil {
		return Run{Off: guest, Len: n, Zero: true}, nil
	}
	r.from = &section{s: &r.spool, off: host, end: host + n}
	return Run{Off: guest, Len: n, Spooled: true, From: host}, nil
}

// compressed deals with the entry of a compressed cluster: the low bits are
// the offset of its data, which need not be aligned, the bits above them the
// number of sectors that it reaches into behind the first.
func (r *Reader) compressed(e uint64, at, guest int64) (Run, error) {
	shift := 62 - (r.h.clusterBits - 8)
	host := int64(e & (1<<shift - 1))
	sectors := int64(e&(flagCompressed-1)) >> shift
	n := (sectors+1)*SectorSize - host%SectorSize
	if host > maxFile {
		return Run{}, field(at, "L2 entry", fmt.Sprintf("%#x", e), "an offset within the image")
	}
	if err := r.inside(at, "L2 entry", host, 1); err != nil {
		return Run{}, err
	}
	c := claim{off: host, at: guest, n: n, kind: claimCompressed}
	if host >= r.pos {
		r.ahead.add(c)
		return Run{}, nil
	}
	// The last sectors may not have been written, or be ahead.
	have := n
	for have > 0 && r.spool.has(host, have, claimCompressed.String()) != nil {
		have = max(0, roundUp(host+have, SectorSize)-SectorSize-host)
	}
	if have == 0 {
		return Run{}, r.spool.has(host, 1, claimCompressed.String())
	}
	b := r.inflate.input(have)
	if err := r.spool.readFull(b, host); err != nil {
		return Run{}, err
	}
	return r.inflated(c, b)
}

// decompress reads a compressed cluster that the stream has come to. It leaves
// its bytes in the stream: the next one may begin in its last sector.
func (r *Reader) decompress(c claim) (Run, error) {
	b, err := r.src.Peek(int(min(c.n, int64(r.src.Size()))))
	if err != nil && err != io.EOF {
		return Run{}, err
	}
	return r.inflated(c, b)
}

func (r *Reader) inflated(c claim, b []byte) (Run, error) {
	out, err := r.inflate.cluster(b)
	if err != nil {
		if int64(len(b)) < c.n {
			return Run{}, cut(c.off+int64(len(b)), c.kind.String())
		}
		return Run{}, field(c.off, c.kind.String(), err, fmt.Sprintf("%d bytes of data", r.h.clusterSize()))
	}
	n := min(int64(len(out)), r.h.size-c.at)
	r.from = bytes.NewReader(out[:n])
	return Run{Off: c.at, Len: n}, nil
}
