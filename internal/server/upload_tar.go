package server

import (
	"context"
	"io"

	"coppice/internal/xva"
)

// readTar writes the chunks of a disk that a tar archive holds, each when its
// checksum has been verified, and leaves all else as it is.
func readTar(ctx context.Context, body io.Reader, length int64, u *upload) error {
	if err := u.whole(); err != nil {
		return err
	}
	if length >= 0 {
		body = io.LimitReader(body, length)
	}
	r := xva.NewReader(body, tarPrefix, u.size)
	total := length
	if length < 0 {
		total = u.size
	}
	return u.receive(ctx, func(_ context.Context, next func() (*piece, error), send func(*piece)) error {
		for {
			off, data, err := r.Next()
			if err == io.EOF {
				return nil
			}
			if err != nil {
				return &bodyError{err}
			}
			p, err := next()
			if err != nil {
				return err
			}
			p.off, p.data = off, p.data[:copy(p.data, data)]
			p.done, p.total = min(r.Consumed(), total), total
			send(p)
		}
	})
}
