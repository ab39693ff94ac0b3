package server

import (
	"context"

	"coppice/internal/xva"
)

// tarPrefix is how the names of the chunks of a single disk begin.
const tarPrefix = "vdi/"

// tarImage is a disk in numbered chunks with checksums, in a tar archive.
type tarImage struct {
	d   *download
	l   *xva.Layout
	tag string
}

func planTar(ctx context.Context, d *download) (image, error) {
	l, tag, err := layTar(ctx, d, tarPrefix, "tar 1")
	if err != nil {
		return nil, err
	}
	return tarImage{d, l, tag}, nil
}

// layTar decides where the chunks of a disk stand in an archive; codec is what
// their tag begins with.
func layTar(ctx context.Context, d *download, prefix, codec string) (l *xva.Layout, tag string, err error) {
	if d.volume.Size() > xva.MaxSize {
		return nil, "", d.tooLarge(xva.MaxSize)
	}
	self, base, err := d.origin(ctx)
	if err != nil {
		return nil, "", err
	}
	if l, err = xva.NewLayout(prefix, d.volume.Size()); err != nil {
		return nil, "", err
	}
	if err := d.scan(ctx, l.Add); err != nil {
		return nil, "", err
	}
	return l, d.tag(codec, self, base), nil
}

func (a tarImage) length() int64 { return a.l.Length() + int64(len(xva.Trailer())) }
func (a tarImage) etag() string  { return a.tag }

func (a tarImage) send(ctx context.Context, w *window, done func(int64)) error {
	if err := sendTar(ctx, w, done, a.d, a.l); err != nil {
		return err
	}
	if _, err := w.Write(xva.Trailer()); err != nil {
		return err
	}
	done(w.pos)
	return nil
}

// sendTar sends the chunks of a disk.
func sendTar(ctx context.Context, w *window, done func(int64), d *download, l *xva.Layout) error {
	type entry struct {
		xva.Entry
		data []byte // nil when it is not needed
		n    int64
	}
	buffers := make([]*entry, readAhead/xva.ChunkSize)
	for i := range buffers {
		buffers[i] = new(entry)
	}
	pos := w.pos
	produce := func(ctx context.Context, next func() (*entry, error), send func(*entry)) error {
		for chunk := range l.Chunks() {
			if pos >= w.to {
				return nil
			}
			e, err := next()
			if err != nil {
				return err
			}
			e.data, e.n = nil, l.EntryLen(chunk)
			if w.needs(pos, e.n) {
				if err := d.read(e.Data(l.ChunkLen(chunk)), chunk*xva.ChunkSize); err != nil {
					return err
				}
				if e.data, err = l.Seal(&e.Entry, chunk); err != nil {
					return err
				}
			}
			pos += e.n
			send(e)
		}
		return nil
	}
	return relayLent(ctx, buffers, produce, func(e *entry, release func()) error {
		if e.data == nil {
			w.skip(e.n)
			release()
			return nil
		}
		return w.sendLent(e.data, release, done)
	})
}
