package server

import (
	"context"
	"encoding/binary"
	"io"
)

// readChunked writes a body in the framed form of raw, which carries only
// parts of a disk: a u64 with the offset, a u32 with the length, both
// little-endian, and so many bytes of data, again and again. An offset and a
// length of 0 are its end. Parts may overlap and come in any order.
func readChunked(ctx context.Context, body io.Reader, _ int64, u *upload) error {
	if err := u.whole(); err != nil {
		return err
	}
	return u.receive(ctx, func(_ context.Context, next func() (*piece, error), send func(*piece)) error {
		for {
			var head [12]byte
			if _, err := io.ReadFull(body, head[:]); err != nil {
				return badBody("header of a chunk: %w", cutShort(err))
			}
			start := binary.LittleEndian.Uint64(head[:])
			left := int64(binary.LittleEndian.Uint32(head[8:]))
			if start == 0 && left == 0 {
				return nil
			}
			if start > uint64(u.size) || left > u.size-int64(start) {
				return badBody("a chunk of %d bytes at byte %d does not fit a disk of %d bytes", left, start, u.size)
			}
			for off := int64(start); left > 0; {
				p, err := next()
				if err != nil {
					return err
				}
				p.off, p.data = off, p.data[:min(uploadChunk, left)]
				if _, err := io.ReadFull(body, p.data); err != nil {
					return badBody("chunk at byte %d: %w", start, cutShort(err))
				}
				off += int64(len(p.data))
				left -= int64(len(p.data))
				p.done, p.total = off, u.size
				send(p)
			}
		}
	})
}

// cutShort is the error of a body that ends where it must not.
func cutShort(err error) error {
	if err == io.EOF {
		return io.ErrUnexpectedEOF
	}
	return err
}
