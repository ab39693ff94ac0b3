package qcow2

import (
	"bytes"
	"encoding/binary"
	"errors"
	"io"
	"testing"
)

// limited is a spool that takes no more than an input can justify.
type limited struct{ scratch }

func (l *limited) WriteAt(p []byte, off int64) (int, error) {
	if off+int64(len(p)) > 64*mib {
		return 0, errors.New("spooled more than there was")
	}
	return l.scratch.WriteAt(p, off)
}

// FuzzReader feeds anything to a Reader: it ends with io.EOF or a typed error,
// and its runs lie on the disk.
func FuzzReader(f *testing.F) {
	f.Add(tiny(2, flagCompressed|2<<(62-1)|5*512), uint8(0))
	f.Add(tiny(3, flagZero), uint8(2))
	f.Add(tiny(3, 4*512), uint8(0))
	f.Add(tiny(2, 1*512), uint8(0))
	f.Add(append(tiny(3, 5*512), tiny(3, 6*512)...), uint8(1))
	f.Fuzz(func(t *testing.T, b []byte, cut uint8) {
		for _, length := range []int64{-1, int64(len(b)), int64(len(b)) + int64(cut)} {
			s := new(limited)
			r, err := NewReader(bytes.NewReader(b), ReaderOptions{Length: length, Spool: func() (Spool, error) { return s, nil }})
			var total int64
			for err == nil {
				var run Run
				if run, err = r.Next(); err != nil {
					break
				}
				if run.Off < 0 || run.Len <= 0 || run.End() > r.Size() {
					t.Fatalf("run %+v of a disk of %d", run, r.Size())
				}
				if run.Zero {
					continue
				}
				var n int64
				n, err = io.Copy(io.Discard, onlyReader{r})
				if err == nil && n != run.Len {
					t.Fatalf("run of %d bytes has %d", run.Len, n)
				}
				if total += n; total > 256*mib { // tables in the spool may repeat their data
					return
				}
			}
			if err != io.EOF && !errors.Is(err, ErrFormat) && !errors.Is(err, io.ErrUnexpectedEOF) {
				t.Fatalf("error is %v", err)
			}
		}
	})
}

// tiny is an image with clusters of 512 bytes: header, refcount table, L1
// table, L2 table with one entry, data.
func tiny(version uint32, entry uint64) []byte {
	b := make([]byte, 7*512)
	be := binary.BigEndian
	be.PutUint32(b, magic)
	be.PutUint32(b[4:], version)
	be.PutUint32(b[20:], 9)
	be.PutUint64(b[24:], 1024)
	be.PutUint32(b[36:], 1)
	be.PutUint64(b[40:], 2*512)
	be.PutUint64(b[48:], 512)
	be.PutUint32(b[56:], 1)
	be.PutUint32(b[96:], 4)
	be.PutUint32(b[100:], headSizeV3)
	be.PutUint64(b[2*512:], 3*512|flagCopied)
	be.PutUint64(b[3*512:], entry)
	return b
}

// FuzzRoundTrip makes an image of the input; what is written is what is read.
func FuzzRoundTrip(f *testing.F) {
	f.Add(uint16(0), []byte{}, false)
	f.Add(uint16(900), []byte("some contents"), true)
	f.Fuzz(func(t *testing.T, sectors uint16, data []byte, delta bool) {
		size := (int64(sectors%4096) + 1) * SectorSize
		contents := make([]byte, size)
		for off := int64(0); len(data) > 0 && off < size; off += int64(len(data)) * 101 {
			copy(contents[off:], data)
		}
		var backing *Backing
		if delta {
			backing = &Backing{Name: "base.qcow2", Format: "qcow2"}
		}
		image := write(t, contents, clustersOf(contents, nil), backing)
		if got := applied(t, image, size, &scratch{opened: true}); !bytes.Equal(got, contents) {
			t.Error(difference(got, contents))
		}
	})
}
