package vfs

import (
	"cmp"
	"slices"
)

// span is the byte range [off, end).
type span struct{ off, end int64 }

// spans is a set of bytes as sorted, disjoint, non-adjoining ranges.
type spans []span

// find returns the index of the first span that ends at or behind off.
func (s spans) find(off int64) int {
	i, _ := slices.BinarySearchFunc(s, off, func(sp span, off int64) int { return cmp.Compare(sp.end, off) })
	return i
}

// add puts [off, end) into the set and returns how many bytes are new.
func (s *spans) add(off, end int64) int64 {
	if off >= end {
		return 0
	}
	i := s.find(off)
	if i < len(*s) && (*s)[i].off <= off && end <= (*s)[i].end {
		return 0
	}
	merged, fresh, j := span{off, end}, end-off, i
	for ; j < len(*s) && (*s)[j].off <= end; j++ {
		sp := (*s)[j]
		fresh -= max(0, min(sp.end, end)-max(sp.off, off))
		merged = span{min(merged.off, sp.off), max(merged.end, sp.end)}
	}
	*s = slices.Replace(*s, i, j, merged)
	return fresh
}

// missing returns how many bytes of [off, end) are not in the set.
func (s spans) missing(off, end int64) int64 {
	n := end - off
	for i := s.find(off); i < len(s) && s[i].off < end; i++ {
		n -= max(0, min(s[i].end, end)-max(s[i].off, off))
	}
	return n
}

// remove takes [off, end) out of the set and returns how many bytes were in it.
func (s *spans) remove(off, end int64) int64 {
	if off >= end {
		return 0
	}
	var keep []span
	var gone int64
	i := s.find(off)
	j := i
	for ; j < len(*s) && (*s)[j].off < end; j++ {
		sp := (*s)[j]
		gone += max(0, min(sp.end, end)-max(sp.off, off))
		if sp.off < off {
			keep = append(keep, span{sp.off, min(sp.end, off)})
		}
		if sp.end > end {
			keep = append(keep, span{max(sp.off, end), sp.end})
		}
	}
	*s = slices.Replace(*s, i, j, keep...)
	return gone
}

// total returns the number of bytes in the set.
func (s spans) total() int64 {
	var n int64
	for _, sp := range s {
		n += sp.end - sp.off
	}
	return n
}
