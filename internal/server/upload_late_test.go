package server

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
	"sync"
	"testing"

	"coppice/internal/storage"
)

// lateImage is a qcow2 image with its tables behind its data, of a disk of size
// bytes with one table. The clusters of the disk are those of the data that are
// named, 0 for none, and of the data, cluster n is full of the letter n.
func lateImage(bits, size int, named ...byte) []byte {
	cluster := 1 << bits
	last := 0
	for _, n := range named {
		last = max(last, int(n))
	}
	l2 := (1 + last) * cluster
	b := make([]byte, l2+2*cluster)
	be := binary.BigEndian
	be.PutUint32(b, 0x514649FB)
	be.PutUint32(b[4:], 2)
	be.PutUint32(b[20:], uint32(bits))
	be.PutUint64(b[24:], uint64(size))
	be.PutUint32(b[36:], 1)
	be.PutUint64(b[40:], uint64(l2+cluster)) // L1 table, the last thing of all
	be.PutUint64(b[l2+cluster:], uint64(l2))
	for i, n := range named {
		if n > 0 {
			be.PutUint64(b[l2+8*i:], uint64(int(n)*cluster))
			copy(b[int(n)*cluster:], bytes.Repeat([]byte{n}, cluster))
		}
	}
	return b
}

// lateUpload takes an image onto a disk whose repository clones what has to
// wait, or copies it.
func lateUpload(t testing.TB, image []byte, length int64, old []byte, clones bool) ([]byte, error) {
	v, u := lateDisk(t, old, clones)
	err := readQcow2(context.Background(), bytes.NewReader(image), length, u)
	return contentsOf(t, v), err
}

// lateDisk is a disk of such a repository, and an upload to it.
func lateDisk(t testing.TB, old []byte, clones bool) (storage.Volume, *upload) {
	repo := testRepo(t)
	v := testDisk(t, repo, 1, old)
	spools := 1
	return v, &upload{
		size: v.Size(), overlay: storage.NewOverlay(v), done: func(int64, int64) {}, interrupt: func() {},
		scratch: func(size int64) (storage.Volume, *storage.CloneBatch, error) {
			spools++
			size = (size + storage.Unit - 1) / storage.Unit * storage.Unit
			if _, err := repo.Create(t.Context(), storage.Spec{ID: testID(spools), Size: max(size, storage.Unit)}); err != nil {
				return nil, nil, err
			}
			space := testOpen(t, repo, spools, storage.Live)
			if !clones {
				return space, nil, nil
			}
			return space, storage.NewCloneBatch(repo, v, space), nil
		},
	}
}

// The progress of an image whose data has to wait does not fall, and leaves
// what moving takes.
func TestUploadLateProgress(t *testing.T) {
	const clusters, bits = 64, 16
	named := make([]byte, clusters)
	for i := range named {
		named[i] = byte(clusters - i)
	}
	image := lateImage(bits, clusters<<bits, named...)
	for _, clones := range []bool{true, false} {
		_, u := lateDisk(t, make([]byte, clusters<<bits), clones)
		var mu sync.Mutex
		var shown []float64
		u.done = func(done, total int64) {
			mu.Lock()
			defer mu.Unlock()
			shown = append(shown, float64(done)/float64(total))
		}
		if err := readQcow2(t.Context(), bytes.NewReader(image), int64(len(image)), u); err != nil {
			t.Fatal(err)
		}
		come := 0.51 // of what is shown in the end
		if clones {
			come = 0.81
		}
		coming, _ := slices.BinarySearch(shown, come)
		if !slices.IsSorted(shown) || coming < 4 || len(shown)-coming < clusters/2 || shown[len(shown)-1] < 0.95 {
			t.Errorf("cloned %v: progress is %v", clones, shown)
		}
	}
}

// Data before its tables reaches the disk whether it is cloned or, as clusters
// that are smaller than a unit are, copied. Clusters may be shared.
func TestUploadLateClusters(t *testing.T) {
	for _, bits := range []int{9, 11, 12, 14, 16} {
		t.Run(fmt.Sprintf("%d bytes", 1<<bits), func(t *testing.T) {
			cluster := 1 << bits
			named := []byte{0, 3, 1, 0, 1, 2, 9}
			size := len(named) * cluster
			image := lateImage(bits, size-512, named...) // the last cluster ends early
			old := random(int64((size+storage.Unit-1)/storage.Unit*storage.Unit), 1, [2]int64{0, int64(size) * 2 / 3})
			want := bytes.Clone(old)
			for i, n := range named {
				if n > 0 {
					copy(want[i*cluster:min((i+1)*cluster, size-512)], bytes.Repeat([]byte{n}, cluster))
				}
			}
			for _, clones := range []bool{true, false} {
				for _, length := range []int64{int64(len(image)), -1} {
					got, err := lateUpload(t, image, length, old, clones)
					if err != nil || !bytes.Equal(got, want) {
						t.Errorf("cloned %v, length %d: not the contents, %v", clones, length, err)
					}
				}
			}
		})
	}
}

// FuzzUploadLate gives anything to the decoder of qcow2, whose data may have to
// wait: what is cloned then comes out as what is copied, and so do faults.
func FuzzUploadLate(f *testing.F) {
	f.Add(lateImage(12, 64<<10, 0, 3, 1, 0, 1, 2, 9), int64(-1))
	f.Add(lateImage(9, 4<<10, 1, 2, 3, 4, 1, 1), int64(9<<9))
	f.Add(lateImage(13, 60<<10, 4, 3, 2, 1, 1, 1, 1, 2), int64(-1))
	old := random(64<<10, 2, [2]int64{5 << 10, 20 << 10}, [2]int64{40 << 10, 8 << 10})
	f.Fuzz(func(t *testing.T, image []byte, length int64) {
		if len(image) > 1<<20 {
			return
		}
		length = min(max(length, -1), 1<<20)
		cloned, err := lateUpload(t, image, length, old, true)
		copied, err2 := lateUpload(t, image, length, old, false)
		if _, ok := errors.AsType[*bodyError](err); err != nil && !ok {
			t.Errorf("error is %v", err)
		}
		if fmt.Sprint(err) != fmt.Sprint(err2) {
			t.Errorf("cloned: %v; copied: %v", err, err2)
		}
		if err == nil && !bytes.Equal(cloned, copied) {
			t.Error("what was cloned is not what was copied")
		}
	})
}
