package vhd

import (
	"bufio"
	"bytes"
	"fmt"
	"io"
)

// FixedReader reads the contents of the disk of a fixed image, which is raw
// data and then a footer, of 511 bytes in images of old tools. Whether it is one
// shows only at its end: what was read must not count before Read returned
// io.EOF.
type FixedReader struct {
	src    *bufio.Reader
	pos    int64 // bytes of the disk
	length int64 // of the image, -1 when not known
	err    error
}

// HasFooter tells whether data begins with the copy of a footer, as all images
// do but fixed ones, by its first 512 bytes.
func HasFooter(start []byte) bool {
	return len(start) >= footerSize && checkFooter((*Footer)(start), 0, "footer") == nil
}

// FixedPeek is how much of a stream IsFixed looks at, in bytes.
const FixedPeek = footerSize + len(cookieHeader)

// IsFixed tells whether a stream is a fixed image, if it is an image at all, by
// its first FixedPeek bytes. All others begin with the copy of a footer, and where
// that is damaged with a header behind it; the disk of a fixed image may begin
// with the cookie of a footer as with anything else.
func IsFixed(start []byte) bool {
	if HasFooter(start) {
		return (*Footer)(start).Type() == TypeFixed
	}
	switch header := start[min(footerSize, len(start)):]; {
	case bytes.HasPrefix(start, []byte(cookiePoison)):
		return false
	case bytes.HasPrefix(start, []byte(cookieFooter)):
		return len(header) >= len(cookieHeader) && !bytes.HasPrefix(header, []byte(cookieHeader))
	}
	return true
}

// NewFixedReader refuses a length that no fixed image has.
func NewFixedReader(src io.Reader, o ReaderOptions) (*FixedReader, error) {
	if o.Length >= 0 {
		if rest := o.Length % SectorSize; o.Length < footerSize-1+SectorSize || rest != 0 && rest != footerSize-1 {
			return nil, field(0, "length of a fixed image", o.Length, "sectors, and a footer of 512 or 511 bytes")
		}
		src = io.LimitReader(src, o.Length)
	}
	return &FixedReader{src: bufio.NewReaderSize(src, 64<<10), length: o.Length}, nil
}

// Size is the size of the disk in bytes, -1 when it is not known yet.
func (r *FixedReader) Size() int64 {
	if r.length < 0 {
		return -1
	}
	return (r.length - (footerSize - 1)) / SectorSize * SectorSize
}

// Read reads the contents of the disk. The error is io.EOF when the image is
// complete and its footer has been verified.
func (r *FixedReader) Read(p []byte) (int, error) {
	if r.err != nil || len(p) == 0 {
		return 0, r.err
	}
	// What is in the buffer beyond the size of a footer is no footer.
	b, err := r.src.Peek(min(footerSize+len(p), r.src.Size()))
	if n := len(b) - footerSize; n > 0 {
		copy(p, b[:n])
		r.pos += int64(n)
		_, err = r.src.Discard(n)
		if err != nil {
			r.err = err
		}
		return n, r.err
	}
	if len(b) == footerSize && (r.pos+footerSize)%SectorSize == footerSize-1 && !HasFooter(b) {
		p[0] = b[0] // the footer is a byte shorter
		r.pos++
		_, r.err = r.src.Discard(1)
		return 1, r.err
	}
	r.err = r.finish(b, err)
	return 0, r.err
}

// finish checks the footer, which is all that is left.
func (r *FixedReader) finish(b []byte, err error) error {
	if err != nil && err != io.EOF {
		return err
	}
	short := len(b) == footerSize-1 && r.pos > 0 && r.pos%SectorSize == 0
	if len(b) < footerSize && !short || r.length >= 0 && r.pos+int64(len(b)) < r.length {
		return fmt.Errorf("vhd: stream ends at byte %d, in a fixed image: %w", r.pos+int64(len(b)), io.ErrUnexpectedEOF)
	}
	var f Footer // the last byte of a short one counts as zero
	copy(f[:], b)
	if err := checkFooter(&f, r.pos, "footer"); err != nil {
		return err
	}
	switch {
	case f.Type() != TypeFixed:
		return field(r.pos+60, "footer disk type", f.Type(), "2 (fixed), behind raw data")
	case f.CurrentSize() != uint64(r.pos):
		return field(r.pos+48, "footer current size", f.CurrentSize(), r.pos)
	}
	return io.EOF
}
