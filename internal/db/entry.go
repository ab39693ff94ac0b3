package db

import (
	"encoding/binary"
	"errors"
	"iter"
	"strings"

	"github.com/google/uuid"
)

// entry is one step of the history.
type entry struct {
	revision uint64 // of the state after it
	prev     uint64 // of the state before it
	basis    uint64 // what the store had as revision before
	ceiling  uint64 // what it has from then on
	first    bool   // of a run of the program: prev is the state that was loaded
	reset    bool   // what was before cannot be told from it
	changes  []change
}

// change is what an entry says of an object.
type change struct {
	class, ref string
	created    uint64 // 0: before the entry
	born       uint64 // with created: see object; 0: the reference is new
	modified   uint64 // 0: before the entry, only told is news
	deleted    bool
	told       uint32 // digest of what does not survive a restart, see digest
}

// Flags of a change on disk.
const (
	changeDeleted = 1 << iota
	changeCreated
	changeModified
	changeBorn
)

// Flags of an entry on disk.
const (
	entryFirst = 1 << iota
	entryReset
)

const refPrefix = "OpaqueRef:"

// encode writes the entry: unsigned varints but where a width is given.
//
//	format, revision, prev, basis, ceiling, flags (1 byte)
//	for each class: length of its name, the name, number of changes, for each:
//	    16, the 16 bytes of a uuid       reference "OpaqueRef:<uuid>", or
//	    17 + length, that many bytes     any other reference
//	    flags (1 byte)
//	    revision - modified              with changeModified
//	    revision - created               with changeCreated
//	    revision - born                  with changeBorn
//	    told (4 bytes, little-endian)    without changeDeleted
func (e *entry) encode() []byte {
	b := binary.AppendUvarint(nil, historyFormat)
	for _, n := range []uint64{e.revision, e.prev, e.basis, e.ceiling} {
		b = binary.AppendUvarint(b, n)
	}
	b = append(b, flags(e.first, entryFirst)|flags(e.reset, entryReset))
	for class := range chunks(e.changes) {
		b = binary.AppendUvarint(b, uint64(len(class[0].class)))
		b = append(b, class[0].class...)
		b = binary.AppendUvarint(b, uint64(len(class)))
		for _, c := range class {
			b = appendRef(b, c.ref)
			b = append(b, flags(c.deleted, changeDeleted)|flags(c.created > 0, changeCreated)|flags(c.modified > 0, changeModified)|
				flags(c.born > 0, changeBorn))
			if c.modified > 0 {
				b = binary.AppendUvarint(b, e.revision-c.modified)
			}
			if c.created > 0 {
				b = binary.AppendUvarint(b, e.revision-c.created)
			}
			if c.born > 0 {
				b = binary.AppendUvarint(b, e.revision-c.born)
			}
			if !c.deleted {
				b = binary.LittleEndian.AppendUint32(b, c.told)
			}
		}
	}
	return b
}

func flags(set bool, bit byte) byte {
	if set {
		return bit
	}
	return 0
}

// chunks yields the runs of changes of one class.
func chunks(all []change) iter.Seq[[]change] {
	return func(yield func([]change) bool) {
		for len(all) > 0 {
			n := 1
			for n < len(all) && all[n].class == all[0].class {
				n++
			}
			if !yield(all[:n]) {
				return
			}
			all = all[n:]
		}
	}
}

func appendRef(b []byte, ref string) []byte {
	if id, ok := strings.CutPrefix(ref, refPrefix); ok && len(id) == 36 {
		if u, err := uuid.Parse(id); err == nil && u.String() == id {
			return append(append(b, byte(len(u))), u[:]...)
		}
	}
	b = binary.AppendUvarint(b, uint64(len(uuid.UUID{})+1+len(ref)))
	return append(b, ref...)
}

var errHistory = errors.New("db: an entry of the history cannot be read")

// decodeEntry reads what encode wrote. An error says that it did not.
func decodeEntry(b []byte) (e entry, err error) {
	p := entryReader{rest: b}
	if format := p.number(); format == 0 || format > historyFormat {
		return e, errHistory
	}
	e.revision, e.prev, e.basis, e.ceiling = p.number(), p.number(), p.number(), p.number()
	bits := p.byte()
	e.first, e.reset = bits&entryFirst != 0, bits&entryReset != 0
	for len(p.rest) > 0 && !p.bad {
		class := string(p.bytes(p.number()))
		for n := p.number(); n > 0 && !p.bad; n-- {
			c := change{class: class, ref: p.ref()}
			bits := p.byte()
			c.deleted = bits&changeDeleted != 0
			if bits&changeModified != 0 {
				c.modified = e.revision - p.number()
			}
			if bits&changeCreated != 0 {
				c.created = e.revision - p.number()
			}
			if bits&changeBorn != 0 {
				c.born = e.revision - p.number()
			}
			if told := p.bytes(uint64(4 * flags(!c.deleted, 1))); len(told) == 4 {
				c.told = binary.LittleEndian.Uint32(told)
			}
			if max(c.modified, c.created, c.born) > e.revision {
				p.bad = true
			}
			e.changes = append(e.changes, c)
		}
	}
	if p.bad || e.prev > e.revision {
		return e, errHistory
	}
	return e, nil
}

// entryReader is what is left of an entry. Once it is bad it yields zeros.
type entryReader struct {
	rest []byte
	bad  bool
}

func (p *entryReader) number() uint64 {
	n, size := binary.Uvarint(p.rest)
	if size <= 0 {
		p.bad, p.rest = true, nil
		return 0
	}
	p.rest = p.rest[size:]
	return n
}

func (p *entryReader) bytes(n uint64) []byte {
	if n > uint64(len(p.rest)) {
		p.bad, p.rest = true, nil
		return nil
	}
	b := p.rest[:n]
	p.rest = p.rest[n:]
	return b
}

func (p *entryReader) byte() byte {
	if b := p.bytes(1); len(b) == 1 {
		return b[0]
	}
	return 0
}

func (p *entryReader) ref() string {
	n, size := p.number(), uint64(len(uuid.UUID{}))
	switch {
	case n == size:
		if b := p.bytes(size); len(b) > 0 {
			return refPrefix + uuid.UUID(b).String()
		}
	case n > size:
		return string(p.bytes(n - size - 1))
	}
	p.bad = true
	return ""
}
