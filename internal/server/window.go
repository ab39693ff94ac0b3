package server

import (
	"errors"
	"fmt"
	"io"
	"math"
	"net/http"
	"net/textproto"
	"strconv"
	"strings"

	"coppice/internal/xapi"
)

// window passes the part of a stream on that somebody wants, the bytes from
// from to to, and drops the rest.
type window struct {
	w        io.Writer
	pos      int64 // of the next byte written
	from, to int64
}

// whole passes everything on.
func whole(w io.Writer) *window { return &window{w: w, to: math.MaxInt64} }

func (w *window) Write(p []byte) (int, error) {
	start := w.pos
	w.pos += int64(len(p))
	lo, hi := max(w.from, start), min(w.to, w.pos)
	if lo < hi {
		if n, err := w.w.Write(p[lo-start : hi-start]); err != nil {
			return int(lo-start) + n, err
		}
	}
	return len(p), nil
}

// lender is a writer that may look at what it was given when its Write has
// returned, if it knows that it may.
type lender interface {
	io.Writer
	// lend calls write, which writes to the lender bytes that stay as they are until
	// release has been called. That happens once, also on a failure, maybe later and
	// in another goroutine.
	lend(write func() error, release func()) error
}

// lend calls write, which writes to w bytes that stay as they are until release
// has been called, see [lender].
func (w *window) lend(write func() error, release func()) error {
	if l, ok := w.w.(lender); ok {
		return l.lend(write, release)
	}
	defer release()
	return write()
}

// sendLent lends p to w, and tells done how far that is.
func (w *window) sendLent(p []byte, release func(), done func(int64)) error {
	err := w.lend(func() error {
		_, err := w.Write(p)
		return err
	}, release)
	if err == nil {
		done(w.pos)
	}
	return err
}

// skip stands for n bytes written that are not needed.
func (w *window) skip(n int64) { w.pos += n }

// needs tells whether any of n bytes at pos are to be passed on.
func (w *window) needs(pos, n int64) bool { return pos < w.to && pos+n > w.from }

// part is what of a representation is sent, and under which status.
type part struct {
	status   int
	from, to int64 // bytes
}

// choosePart applies the conditions and the range of a request to a
// representation with an entity tag and a length in bytes, as RFC 9110 says. A
// length below zero is not known: then the whole is sent. Several ranges are
// answered with the whole, which a server may do.
func choosePart(r *http.Request, tag string, length int64) (part, error) {
	h := r.Header
	all := part{http.StatusOK, 0, length}
	if m := listOf(h, "If-Match"); m != "" && !tagMatches(m, tag, false) {
		return part{}, &statusError{http.StatusPreconditionFailed, xapi.NewError(xapi.ErrInvalidValue, "If-Match", m)}
	}
	if m := listOf(h, "If-None-Match"); m != "" && tagMatches(m, tag, true) {
		return part{http.StatusNotModified, 0, 0}, nil
	}
	spec := rangeOf(r)
	if spec == "" || length < 0 {
		return all, nil
	}
	if only := textproto.TrimString(h.Get("If-Range")); only != "" && only != tag {
		return all, nil
	}
	from, to, ok := parseRange(spec, length)
	switch {
	case !ok:
		return all, nil
	case from >= length || from >= to:
		return part{}, &rangeError{spec, length}
	}
	return part{http.StatusPartialContent, from, to}, nil
}

// listOf is the value of a field that is a list and may stand on several lines.
func listOf(h http.Header, name string) string { return strings.Join(h.Values(name), ",") }

// rangeOf is the range that a request asks for, "" for everything. Only for a
// GET has it a meaning (RFC 9110, 14.2): the head of a HEAD is that of the whole.
func rangeOf(r *http.Request) string {
	if r.Method == http.MethodHead {
		return ""
	}
	return r.Header.Get("Range")
}

// parseRange returns the only range of a Range header as [from, to); from is
// length when there is nothing of it. ok is false for anything else than one
// range in bytes.
func parseRange(spec string, length int64) (from, to int64, ok bool) {
	unit, spec, ok := strings.Cut(spec, "=")
	first, last, dash := strings.Cut(textproto.TrimString(spec), "-")
	if !ok || !dash || !strings.EqualFold(unit, "bytes") {
		return 0, 0, false
	}
	if first == "" { // the last n bytes
		n, ok := parsePlace(last)
		return max(0, length-n), length, ok
	}
	begin, ok := parsePlace(first)
	if last == "" || !ok {
		return begin, length, ok
	}
	end, ok := parsePlace(last)
	return begin, min(end, length-1) + 1, ok && end >= begin
}

// parsePlace reads a number of bytes, of which more than there can be are as
// many as there can be.
func parsePlace(s string) (int64, bool) {
	n, err := strconv.ParseUint(s, 10, 63)
	return int64(n), err == nil || errors.Is(err, strconv.ErrRange)
}

// tagMatches tells whether a list of entity tags names tag. A weak comparison
// ignores that a tag in the list is weak.
func tagMatches(list, tag string, weak bool) bool {
	for item := range strings.SplitSeq(list, ",") {
		item = textproto.TrimString(item)
		if weak {
			item = strings.TrimPrefix(item, "W/")
		}
		if item == "*" || item == tag {
			return true
		}
	}
	return false
}

// rangeError is a range that does not begin within what there is.
type rangeError struct {
	spec   string
	length int64
}

func (e *rangeError) Error() string {
	return fmt.Sprintf("range %q is not within %d bytes", e.spec, e.length)
}
