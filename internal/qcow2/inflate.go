package qcow2

import (
	"bytes"
	"fmt"
	"io"

	"github.com/klauspost/compress/flate"
	"github.com/klauspost/compress/zstd"
)

// maxWindow is the largest window that a zstd frame may ask for, in bytes.
const maxWindow = 8 << 20

// inflater decompresses single clusters. Its output is a cluster, whatever the
// input says.
type inflater struct {
	zstd bool
	out  []byte
	in   []byte
	size int64

	deflate io.ReadCloser
	decoder *zstd.Decoder
}

func (f *inflater) init(h *header) { f.zstd, f.size = h.zstd, h.clusterSize() }

// input returns a buffer of n bytes.
func (f *inflater) input(n int64) []byte {
	if int64(cap(f.in)) < n {
		f.in = make([]byte, n)
	}
	return f.in[:n]
}

// cluster decompresses the cluster that b begins with. What it returns is
// valid until the next call.
func (f *inflater) cluster(b []byte) ([]byte, error) {
	if f.out == nil {
		f.out = make([]byte, f.size)
	}
	src, err := f.reader(bytes.NewReader(b))
	if err != nil {
		return nil, err
	}
	if n, err := io.ReadFull(src, f.out); err != nil {
		return nil, fmt.Errorf("%d bytes, then %w", n, err)
	}
	return f.out, nil
}

func (f *inflater) reader(src io.Reader) (io.Reader, error) {
	if f.zstd {
		if f.decoder == nil {
			d, err := zstd.NewReader(nil, zstd.WithDecoderConcurrency(1), zstd.WithDecoderMaxWindow(maxWindow), zstd.WithDecoderLowmem(true))
			if err != nil {
				return nil, err
			}
			f.decoder = d
		}
		return f.decoder, f.decoder.Reset(src)
	}
	if f.deflate == nil {
		f.deflate = flate.NewReader(src)
		return f.deflate, nil
	}
	return f.deflate, f.deflate.(flate.Resetter).Reset(src, nil)
}
