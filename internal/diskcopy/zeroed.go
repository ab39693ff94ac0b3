package diskcopy

import (
	"strconv"
	"strings"

	"coppice/internal/storage"
	"coppice/internal/xapi"
)

// longestZeroed is how much text about zeroed ranges there may be, in bytes.
const longestZeroed = 32 << 10

// Zeroed collects the ranges of a new volume that are zero and were not in the
// base of the copy that made it. Storage gives zeros no space, so such a range
// looks like one that is the same in both: a copy of that delta into a copy of
// the base has to know which are which to make the original again. The zero
// value has none. Where the volume has data by then, the data counts.
type Zeroed struct {
	text strings.Builder
	end  int64 // of the last range, in units
	off  int64 // of the range that may still grow; n units of it
	n    int64
}

// add notes that a range, in bytes, has become zero; ranges come in ascending
// order. OPERATION_NOT_ALLOWED when there are too many. A nil z forgets them.
func (z *Zeroed) add(off, n int64) error {
	if z == nil {
		return nil
	}
	first, last := off/storage.Unit, (off+n+storage.Unit-1)/storage.Unit
	if z.n > 0 && first <= z.off+z.n {
		z.n = max(z.n, last-z.off)
		return nil
	}
	z.flush()
	z.off, z.n = first, last-first
	if z.text.Len() > longestZeroed {
		return xapi.NewError(xapi.ErrOperationNotAllowed,
			"Too many ranges have become zero since the base VDI for a delta of its own; copy into a VDI instead.")
	}
	return nil
}

func (z *Zeroed) flush() {
	if z.n == 0 {
		return
	}
	if z.text.Len() > 0 {
		z.text.WriteByte(',')
	}
	z.text.WriteString(strconv.FormatInt(z.off-z.end, 10) + "+" + strconv.FormatInt(z.n, 10))
	z.end, z.n = z.off+z.n, 0
}

// String writes ascending ranges, "gap+length" parted by commas, in units of 4
// KiB; a gap is from the end of the range before. It is what a Job takes.
func (z *Zeroed) String() string {
	z.flush()
	return z.text.String()
}

// parseZeroed reads what Zeroed wrote, of a disk of some size in bytes. It
// stops at what it did not write.
func parseZeroed(s string, size int64) (ranges []storage.Extent) {
	end := int64(0)
	for f := range strings.SplitSeq(s, ",") {
		gap, n, ok := strings.Cut(f, "+")
		g, err := strconv.ParseInt(gap, 10, 64)
		if !ok || err != nil || g < 0 || g >= storage.MaxSize/storage.Unit {
			break
		}
		l, err := strconv.ParseInt(n, 10, 64)
		if err != nil || l <= 0 || l > storage.MaxSize/storage.Unit {
			break
		}
		off := (end + g) * storage.Unit
		if off >= size {
			break
		}
		ranges = append(ranges, storage.Extent{Off: off, Len: min(l*storage.Unit, size-off), Hole: true})
		end += g + l
	}
	return ranges
}
