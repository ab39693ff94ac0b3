package vhd

import (
	"bufio"
	"fmt"
	"io"
)

// FixedReader reads the contents of the disk of a fixed image, which is raw
// data and then a footer. Whether it is one shows only at its end: what was
// read must not count before Read returned io.EOF.
type FixedReader struct {
	src    *bufio.Reader
	pos    int64 // bytes of the disk
	length int64 // of the image, -1 when not known
	err    error
}

// IsFixed tells whether a stream may be a fixed image, by its first bytes, of
// which it wants 8: all other images begin with the copy of a footer.
func IsFixed(start []byte) bool {
	return string(start) != cookieFooter && string(start) != cookiePoison
}

// HasFooter tells whether data begins with the copy of a footer, as all images
// do but fixed ones, by its first 512 bytes.
func HasFooter(start []byte) bool {
	return len(start) >= footerSize && checkFooter((*Footer)(start), 0, "footer") == nil
}

// NewFixedReader refuses a length that no fixed image has.
func NewFixedReader(src io.Reader, o ReaderOptions) (*FixedReader, error) {
	if o.Length >= 0 {
		if o.Length < footerSize+SectorSize || o.Length%SectorSize != 0 {
			return nil, field(0, "length of a fixed image", o.Length, "sectors, and a footer of 512 bytes")
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
	return r.length - footerSize
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
	r.err = r.finish(b, err)
	return 0, r.err
}

// finish checks the footer, which is all that is left.
func (r *FixedReader) finish(b []byte, err error) error {
	if err != nil && err != io.EOF {
		return err
	}
	if len(b) < footerSize || r.length >= 0 && r.pos+footerSize < r.length {
		return fmt.Errorf("vhd: stream ends at byte %d, in a fixed image: %w", r.pos+int64(len(b)), io.ErrUnexpectedEOF)
	}
	f := Footer(b)
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
