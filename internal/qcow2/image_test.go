package qcow2

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"testing"
)

// disk returns size bytes of which only the given ranges are not zero.
func disk(size int64, seed byte, ranges ...[2]int64) []byte {
	b := make([]byte, size)
	rng := rand.NewChaCha8([32]byte{seed})
	for _, r := range ranges {
		off, end := min(r[0], size), min(r[0]+r[1], size)
		_, _ = rng.Read(b[off:end])
	}
	return b
}

// clustersOf is the set of clusters of a disk that differ from another one.
func clustersOf(contents, base []byte) *ClusterSet {
	s := NewClusterSet(int64(len(contents)))
	for off := 0; off < len(contents); off += SectorSize {
		var before []byte
		if off < len(base) {
			before = base[off : off+SectorSize]
		} else {
			before = zeros[:SectorSize]
		}
		if !bytes.Equal(contents[off:off+SectorSize], before) {
			s.Add(int64(off), 1)
		}
	}
	return s
}

// write makes an image of the clusters of a disk that are in a set.
func write(t testing.TB, contents []byte, set *ClusterSet, backing *Backing) []byte {
	t.Helper()
	l, err := NewLayout(Options{Size: int64(len(contents)), Clusters: set, Backing: backing})
	if err != nil {
		t.Fatal(err)
	}
	var out bytes.Buffer
	if err := l.WriteHead(&out); err != nil {
		t.Fatal(err)
	}
	if int64(out.Len()) != l.HeadLength() {
		t.Fatalf("head of %d bytes, HeadLength is %d", out.Len(), l.HeadLength())
	}
	for run := range set.Runs() {
		n := min(run.Len, int64(len(contents))-run.Off)
		out.Write(contents[run.Off:][:n])
		out.Write(make([]byte, run.Len-n))
	}
	if int64(out.Len()) != l.Length() {
		t.Fatalf("image of %d bytes, Length is %d", out.Len(), l.Length())
	}
	return out.Bytes()
}

// scratch is a spool in memory that notes whether it was asked for.
type scratch struct {
	b      []byte
	opened bool
}

func (s *scratch) open() (Spool, error) {
	if s.opened {
		return nil, errors.New("opened twice")
	}
	s.opened = true
	return s, nil
}

func (s *scratch) WriteAt(p []byte, off int64) (int, error) {
	if need := off + int64(len(p)); need > int64(len(s.b)) {
		s.b = append(s.b, make([]byte, need-int64(len(s.b)))...)
	}
	return copy(s.b[off:], p), nil
}

func (s *scratch) ReadAt(p []byte, off int64) (int, error) {
	if off >= int64(len(s.b)) {
		return 0, io.EOF
	}
	n := copy(p, s.b[off:])
	if n < len(p) {
		return n, io.EOF
	}
	return n, nil
}

// apply reads an image over a disk, whose size must be that of the image.
func apply(src io.Reader, length int64, over []byte, s *scratch) error {
	r, err := NewReader(src, ReaderOptions{Length: length, Spool: s.open})
	if err != nil {
		return err
	}
	if r.Size() != int64(len(over)) {
		return fmt.Errorf("size is %d, want %d", r.Size(), len(over))
	}
	written := make(map[int64]int64)
	for {
		run, err := r.Next()
		if err == io.EOF {
			return nil
		}
		if err != nil {
			return err
		}
		if run.Len <= 0 || run.Off < 0 || run.End() > r.Size() {
			return fmt.Errorf("run %+v of a disk of %d", run, r.Size())
		}
		if _, twice := written[run.Off]; twice {
			return fmt.Errorf("byte %d is written twice", run.Off)
		}
		written[run.Off] = run.Len
		if run.Zero {
			clear(over[run.Off:run.End()])
			continue
		}
		if _, err := io.ReadFull(r, over[run.Off:run.End()]); err != nil {
			return err
		}
		if n, err := r.Read(make([]byte, 1)); n != 0 || err != io.EOF {
			return fmt.Errorf("behind a run: %d bytes, %v", n, err)
		}
	}
}

// applied is the disk that an image makes of one full of a pattern.
func applied(t testing.TB, image []byte, size int64, s *scratch) []byte {
	t.Helper()
	got := make([]byte, size)
	if err := apply(bytes.NewReader(image), int64(len(image)), got, s); err != nil {
		t.Fatal(err)
	}
	unknown := make([]byte, size)
	if err := apply(bytes.NewReader(image), -1, unknown, new(scratch)); err != nil {
		t.Fatalf("length unknown: %v", err)
	}
	if !bytes.Equal(got, unknown) {
		t.Fatal("without a length the contents differ")
	}
	return got
}

func difference(a, b []byte) string {
	if len(a) != len(b) {
		return fmt.Sprintf("%d and %d bytes", len(a), len(b))
	}
	for i := range a {
		if a[i] != b[i] {
			return fmt.Sprintf("first difference at byte %d", i)
		}
	}
	return "no difference"
}
