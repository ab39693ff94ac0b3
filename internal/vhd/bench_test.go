package vhd

import (
	"bytes"
	"io"
	"testing"
)

func BenchmarkWriter(b *testing.B) {
	s := source{data: make([]byte, 64<<20), o: Options{UUID: idBase}}
	for i := range int64(32) {
		s.blocks = append(s.blocks, i)
	}
	b.SetBytes(int64(len(s.data)))
	for b.Loop() {
		s.write(b, io.Discard)
	}
}

func BenchmarkReader(b *testing.B) {
	s := source{data: make([]byte, 64<<20), o: Options{UUID: idBase}}
	for i := range int64(32) {
		s.blocks = append(s.blocks, i)
	}
	var out bytes.Buffer
	s.write(b, &out)
	buf := make([]byte, BlockSize)
	b.SetBytes(int64(len(s.data)))
	for b.Loop() {
		r, err := NewReader(bytes.NewReader(out.Bytes()), ReaderOptions{Length: int64(out.Len())})
		for err == nil {
			var run Run
			if run, err = r.Next(); err == nil {
				_, err = io.ReadFull(r, buf[:run.Len])
			}
		}
		if err != io.EOF {
			b.Fatal(err)
		}
	}
}

// The table of the largest disk, which is read and sorted before any block.
func BenchmarkReaderTable(b *testing.B) {
	o := Options{Size: MaxSize, UUID: idBase, Blocks: NewBlockSet(MaxSize)}
	o.Blocks.Add(0, MaxSize)
	l, err := NewLayout(o)
	if err != nil {
		b.Fatal(err)
	}
	var head bytes.Buffer
	if _, err := NewWriter(&head, l); err != nil {
		b.Fatal(err)
	}
	b.ReportAllocs()
	for b.Loop() {
		if _, err := NewReader(bytes.NewReader(head.Bytes()), ReaderOptions{Length: l.Length()}); err != nil {
			b.Fatal(err)
		}
	}
}
