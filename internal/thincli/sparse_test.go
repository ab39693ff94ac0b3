package thincli

import (
	"bytes"
	"math/rand/v2"
	"os"
	"path/filepath"
	"syscall"
	"testing"
)

// TestWriteSparse stores random mixtures of zero and other pieces, in calls of
// odd lengths, and holds the file against what was given.
func TestWriteSparse(t *testing.T) {
	rng := rand.New(rand.NewPCG(1, 2))
	for range 50 {
		want := make([]byte, rng.IntN(2<<20))
		for at := 0; at < len(want); at += sparsePiece {
			if rng.IntN(2) == 0 {
				// One byte somewhere makes a piece worth storing.
				want[at+rng.IntN(min(sparsePiece, len(want)-at))] = 1
			}
		}
		f, err := os.Create(filepath.Join(t.TempDir(), "f"))
		if err != nil {
			t.Fatal(err)
		}
		for off := 0; off < len(want); {
			n := min(copyBuffer, len(want)-off)
			if err := writeSparse(f, want[off:off+n], int64(off)); err != nil {
				t.Fatal(err)
			}
			off += n
		}
		if err := f.Truncate(int64(len(want))); err != nil {
			t.Fatal(err)
		}
		got, err := os.ReadFile(f.Name())
		if err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(got, want) {
			t.Fatalf("%d bytes come back different", len(want))
		}
		f.Close()
	}
}

func TestWriteSparseLeavesHoles(t *testing.T) {
	f, err := os.Create(filepath.Join(t.TempDir(), "f"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	p := make([]byte, copyBuffer)
	p[0], p[len(p)-1] = 1, 1
	for i := range int64(8) {
		if err := writeSparse(f, p, i*copyBuffer); err != nil {
			t.Fatal(err)
		}
	}
	info, err := f.Stat()
	if err != nil {
		t.Fatal(err)
	}
	if got := info.Sys().(*syscall.Stat_t).Blocks * 512; info.Size() != 8*copyBuffer || got > 4<<20 {
		t.Errorf("%d bytes take %d on disk", info.Size(), got)
	}
}
