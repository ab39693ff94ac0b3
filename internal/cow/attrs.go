package cow

import (
	"bytes"
	"context"
	"fmt"
)

// blob is the attribute blob of one or more volumes. Guarded by Store.mu.
type blob struct {
	n    int    // bytes
	data []byte // until a checkpoint has written it
	root entry  // afterwards
}

// newBlob returns the blob with a copy of attrs.
func newBlob(attrs []byte) *blob {
	if len(attrs) == 0 {
		return nil
	}
	return &blob{n: len(attrs), data: bytes.Clone(attrs)}
}

// SetAttrs replaces the attribute blob of a volume, read-only ones included.
func (s *Store) SetAttrs(ctx context.Context, id ID, attrs []byte) error {
	if err := s.beginWrite(); err != nil {
		return err
	}
	defer s.end()
	if err := s.checkNew(id, attrs); err != nil {
		return err
	}
	return s.operate(ctx, s.opCost(attrs), nil, func() (*logRecord, error) {
		v, err := s.lookup(id)
		if err != nil {
			return nil, err
		}
		return &logRecord{kind: recAttrs, num: v.num, attrs: attrs}, nil
	})
}

// Attrs returns the attribute blob of a volume.
func (s *Store) Attrs(ctx context.Context, id ID) ([]byte, error) {
	if err := s.begin(); err != nil {
		return nil, err
	}
	defer s.end()
	e := s.eras.enter()
	defer e.leave()
	s.mu.Lock()
	v, err := s.lookup(id)
	if err != nil || v.attrs == nil {
		s.mu.Unlock()
		return nil, err
	}
	b := *v.attrs
	s.mu.Unlock()
	if b.data != nil {
		return bytes.Clone(b.data), nil
	}
	return s.readBlob(b.root, b.n)
}

// readBlob reads n bytes below root.
func (r *pageReader) readBlob(root entry, n int) ([]byte, error) {
	u := r.geo.UnitSize
	out := make([]byte, (n+u-1)/u*u)
	for i := 0; i*u < n; i++ {
		e := root
		if root.kind == kindPage {
			var err error
			if e, err = r.child(root, i); err != nil {
				return nil, fmt.Errorf("attributes: %w", err)
			}
		}
		if e.kind != kindData {
			return nil, errShape(root, "attributes: unit %d is missing", i)
		}
		if err := r.verified(out[i*u:(i+1)*u], e); err != nil {
			return nil, fmt.Errorf("attributes: %w", err)
		}
	}
	return out[:n], nil
}
