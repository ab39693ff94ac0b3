package server

import (
	"context"

	"coppice/internal/qcow2"
)

// qcow2Image is a qcow2 image, with a base one that names it as its backing
// file.
type qcow2Image struct {
	d   *download
	l   *qcow2.Layout
	set *qcow2.ClusterSet
	tag string
}

func planQcow2(ctx context.Context, d *download) (image, error) {
	size := d.volume.Size()
	if size > qcow2.MaxSize {
		return nil, d.tooLarge(qcow2.MaxSize)
	}
	self, base, err := d.origin(ctx)
	if err != nil {
		return nil, err
	}
	o := qcow2.Options{Size: size, Clusters: qcow2.NewClusterSet(size)}
	if d.base != nil {
		o.Backing = &qcow2.Backing{Name: base.name + ".qcow2", Format: "qcow2"}
	}
	if err := d.scan(ctx, o.Clusters.Add); err != nil {
		return nil, err
	}
	l, err := qcow2.NewLayout(o)
	if err != nil {
		return nil, err
	}
	return qcow2Image{d, l, o.Clusters, d.tag("qcow2 1", self, base)}, nil
}

func (q qcow2Image) length() int64 { return q.l.Length() }
func (q qcow2Image) etag() string  { return q.tag }

func (q qcow2Image) send(ctx context.Context, w *window, done func(int64)) error {
	if w.needs(0, q.l.HeadLength()) {
		if err := q.l.WriteHead(w); err != nil {
			return err
		}
		done(w.pos)
	} else {
		w.skip(q.l.HeadLength())
	}
	pos := w.pos
	return sendChunks(ctx, w, done, func(ctx context.Context, next func() (*chunk, error), send func(*chunk)) error {
		g := gather{d: q.d, next: next, send: send}
		for run := range q.set.Runs() {
			for run.Len > 0 {
				if pos >= w.to {
					return g.flush()
				}
				n := min(chunkSize-g.n, run.Len)
				if pos < w.from { // whole chunks before the part, at once
					n = max(n, min(w.from-pos, run.Len)/chunkSize*chunkSize)
				}
				var err error
				if w.needs(pos, n) {
					err = g.add(run.Off, n)
				} else {
					err = g.skip(n)
				}
				if err != nil {
					return err
				}
				pos += n
				run.Off, run.Len = run.Off+n, run.Len-n
			}
		}
		return g.flush()
	})
}
