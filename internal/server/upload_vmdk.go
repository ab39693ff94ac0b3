package server

import (
	"cmp"
	"context"
	"io"

	"coppice/internal/vmdk"
)

// readVMDK writes the grains that a streamOptimized VMDK holds and leaves all
// others as they are.
func readVMDK(ctx context.Context, body io.Reader, length int64, u *upload) error {
	r, err := vmdk.NewReader(body, vmdk.ReaderOptions{Length: length})
	if err != nil {
		return &bodyError{err}
	}
	if err := cmp.Or(u.holds(r.Size()), u.whole()); err != nil {
		return err
	}
	total := length
	if length < 0 {
		total = r.Size()
	}
	return u.receive(ctx, func(_ context.Context, next func() (*piece, error), send func(*piece)) error {
		p, err := next()
		if err != nil {
			return err
		}
		p.off, p.data = 0, p.data[:0]
		for {
			run, err := r.Next()
			full := err == nil && (int64(len(p.data))+run.Len > uploadChunk || run.Off != p.off+int64(len(p.data)))
			if len(p.data) > 0 && (err == io.EOF || full) {
				p.done, p.total = min(r.Consumed(), total), total
				send(p)
				var free error
				if p, free = next(); free != nil {
					return free
				}
				p.data = p.data[:0]
			}
			if err == io.EOF {
				return nil
			}
			if err != nil {
				return &bodyError{err}
			}
			if len(p.data) == 0 {
				p.off = run.Off
			}
			n := len(p.data)
			p.data = p.data[:n+int(run.Len)]
			if _, err := io.ReadFull(r, p.data[n:]); err != nil {
				return &bodyError{err}
			}
		}
	})
}
