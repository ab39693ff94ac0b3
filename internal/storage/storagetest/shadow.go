package storagetest

import (
	"bytes"
	"fmt"
	"slices"
)

// shadow is what a volume must hold, as a plain slice, with what a power cut
// may bring back of it.
type shadow struct {
	data []byte
	// older holds, for every unit that changed since the volume was last
	// durable, what it was after each change but the newest, and before the
	// first.
	older map[int][][]byte
}

func newShadow(size int) *shadow {
	return &shadow{data: make([]byte, size), older: map[int][][]byte{}}
}

// clone returns a durable copy.
func (m *shadow) clone() *shadow {
	return &shadow{data: slices.Clone(m.data), older: map[int][][]byte{}}
}

func (m *shadow) unit(u int) []byte { return m.data[u*unit:][:unit] }

// touch remembers the units of [off, off+n), which are about to change.
func (m *shadow) touch(off, n int) {
	for u := off / unit; n > 0 && u*unit < off+n; u++ {
		m.older[u] = append(m.older[u], slices.Clone(m.unit(u)))
	}
}

func (m *shadow) write(p []byte, off int) {
	m.touch(off, len(p))
	copy(m.data[off:], p)
}

func (m *shadow) zero(off, n int) {
	m.touch(off, n)
	clear(m.data[off : off+n])
}

// flush makes the present contents durable.
func (m *shadow) flush() { clear(m.older) }

// become takes over the contents of another volume, durably.
func (m *shadow) become(other *shadow) {
	m.data = slices.Clone(other.data)
	m.flush()
}

// resize changes the size durably; the contents of what remains are not.
func (m *shadow) resize(size int) {
	old := len(m.data)
	m.data = append(m.data, make([]byte, max(0, size-old))...)[:size:size]
	for u := range m.older {
		if u*unit >= size {
			delete(m.older, u)
		}
	}
}

// settle takes what a volume holds after a power cut, or says what cannot be.
func (m *shadow) settle(got []byte) error {
	if len(got) != len(m.data) {
		return fmt.Errorf("%d bytes, want %d", len(got), len(m.data))
	}
	for u := range len(got) / unit {
		part := got[u*unit:][:unit]
		if bytes.Equal(part, m.unit(u)) {
			continue
		}
		if !slices.ContainsFunc(m.older[u], func(b []byte) bool { return bytes.Equal(b, part) }) {
			i := firstDifference(part, m.unit(u))
			return fmt.Errorf("unit %d is none of the %d it may be: byte %d is %#x, last written %#x",
				u, 1+len(m.older[u]), u*unit+i, part[i], m.unit(u)[i])
		}
	}
	m.data = slices.Clone(got)
	m.flush()
	return nil
}
