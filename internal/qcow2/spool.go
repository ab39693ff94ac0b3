package qcow2

import (
	"errors"
	"fmt"
	"io"
	"slices"
)

// maxHeld is how many separate ranges a spool can have: an image whose tables
// interleave with data more often than that is refused.
const maxHeld = 1 << 18

// spoolRun is how much of the spool is a run at most, in bytes.
const spoolRun = 4 << 20

// spool keeps parts of the stream that may turn out to be needed.
type spool struct {
	open func() (Spool, error)
	s    Spool
	held []held // ascending

	unused int64              // bytes held that have not been taken; fewer when some were taken twice
	tables map[int64]struct{} // places of the L2 tables that have been taken
}

// held is a range [from, to) of the image.
type held struct{ from, to int64 }

// put stores the next part of the stream.
func (s *spool) put(p []byte, off int64) error {
	last := len(s.held) - 1
	switch {
	case last >= 0 && s.held[last].to == off:
		s.held[last].to = off + int64(len(p))
	case last+1 == maxHeld:
		return field(off, "order of tables and data", "too scattered", fmt.Sprintf("at most %d gaps before the last table", maxHeld))
	default:
		s.held = append(s.held, held{off, off + int64(len(p))})
	}
	s.unused += int64(len(p))
	if s.allZero(p) {
		return nil
	}
	if s.s == nil {
		if s.open == nil {
			return field(off, "order of tables and data", "data before its table", "tables before data, because there is no room to put it")
		}
		var err error
		if s.s, err = s.open(); err != nil {
			return fmt.Errorf("scratch space: %w", err)
		}
	}
	if _, err := s.s.WriteAt(p, off); err != nil {
		return fmt.Errorf("scratch space: %w", err)
	}
	return nil
}

func (s *spool) allZero(p []byte) bool {
	for len(p) > 0 {
		n := min(len(p), len(zeros))
		if string(p[:n]) != string(zeros[:n]) {
			return false
		}
		p = p[n:]
	}
	return true
}

// has fails when part of a range was not kept: it was something else already,
// or never came.
func (s *spool) has(off, n int64, what string) error {
	i, found := slices.BinarySearchFunc(s.held, off, func(h held, off int64) int {
		switch {
		case h.to <= off:
			return -1
		case h.from > off:
			return 1
		}
		return 0
	})
	if !found || s.held[i].to < off+n {
		return usedAlready(off, what)
	}
	return nil
}

func usedAlready(off int64, what string) error {
	return field(off, what, "a place that is used already, or behind the end", "one of its own")
}

// take is has for a range that is to be used, which means once. It does not know
// what has been taken, only how much: a few bytes may be taken twice as long as
// others are not wanted at all, but never more than the image has.
func (s *spool) take(off, n int64, what string) error {
	if err := s.has(off, n, what); err != nil {
		return err
	}
	if s.unused -= n; s.unused < 0 {
		return usedAlready(off, what)
	}
	return nil
}

// takeTable is take for an L2 table of n bytes, whose entries are far more work
// than its bytes: none is taken twice. It costs 10 to 20 bytes for each of the
// tables, of which there are up to maxL1Bytes/8.
func (s *spool) takeTable(off, n int64) error {
	if _, twice := s.tables[off]; twice {
		return usedAlready(off, claimL2.String())
	}
	if s.tables == nil {
		s.tables = make(map[int64]struct{})
	}
	s.tables[off] = struct{}{}
	return s.take(off, n, claimL2.String())
}

// readFull fills p from a range that the spool has.
func (s *spool) readFull(p []byte, off int64) error {
	clear(p)
	if s.s == nil { // all of it is zero
		return nil
	}
	if n, err := s.s.ReadAt(p, off); n < len(p) && !errors.Is(err, io.EOF) {
		return fmt.Errorf("scratch space: %w", err)
	}
	return nil
}

// section reads a range that the spool has.
type section struct {
	s        *spool
	off, end int64
}

func (s *section) Read(p []byte) (int, error) {
	p = p[:min(int64(len(p)), s.end-s.off)]
	if len(p) == 0 {
		return 0, io.EOF
	}
	if err := s.s.readFull(p, s.off); err != nil {
		return 0, err
	}
	s.off += int64(len(p))
	return len(p), nil
}
