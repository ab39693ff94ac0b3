package server

import (
	"bytes"
	"errors"
	"testing"

	"coppice/internal/storage"
)

// FuzzUpload gives anything to the decoders: each ends in order or with a
// fault of the body, and nothing lies outside of the disk.
func FuzzUpload(f *testing.F) {
	f.Add([]byte("some contents"), int64(13))
	f.Add(frames(piece{off: 5, data: []byte("abc")}, piece{}), int64(-1))
	f.Add(frames(piece{off: 1 << 40, data: []byte("abc")}), int64(-1))
	f.Add([]byte("\r\nconectix"), int64(10))
	f.Add([]byte("conectix"), int64(1<<40))
	repo := testRepo(f)
	const size = 64 << 10
	v := testDisk(f, repo, 1, make([]byte, size))
	f.Fuzz(func(t *testing.T, b []byte, length int64) {
		for name, dec := range map[string]decoder{"raw": readRaw, "chunked": readChunked, "vhd": readVHD} {
			u := &upload{size: size, overlay: storage.NewOverlay(v), done: func(int64, int64) {}, interrupt: func() {}, atomic: func() error { return nil }}
			err := dec(t.Context(), bytes.NewReader(b), max(length, -1), u)
			if _, ok := errors.AsType[*bodyError](err); err != nil && !ok {
				t.Errorf("%s: error is %v", name, err)
			}
			if name == "raw" && err == nil {
				if got := contentsOf(t, v); !bytes.Equal(got[:len(b)], b) {
					t.Error("raw: wrong contents")
				}
			}
		}
	})
}
