package server

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"io"
	"slices"
	"testing"
	"time"

	"coppice/internal/qcow2"
	"coppice/internal/storage"
	"coppice/internal/vhd"
	"coppice/internal/xapi"

	"github.com/google/uuid"
)

const mib = 1 << 20

// encode plans and sends an image and checks that it has the length announced.
func encode(t *testing.T, plan func(context.Context, *download) (image, error), d *download) []byte {
	t.Helper()
	img, err := plan(t.Context(), d)
	if err != nil {
		t.Fatal(err)
	}
	var out bytes.Buffer
	var last int64
	err = img.send(t.Context(), whole(&out), func(done int64) {
		if done < last || done > img.length() {
			t.Errorf("progress went from %d to %d of %d", last, done, img.length())
		}
		last = done
	})
	if err != nil {
		t.Fatal(err)
	}
	if int64(out.Len()) != img.length() {
		t.Fatalf("%d bytes sent, length is %d", out.Len(), img.length())
	}
	return out.Bytes()
}

func TestRawImage(t *testing.T) {
	for name, tt := range map[string]struct {
		size   int64
		ranges [][2]int64
		reads  int64 // most bytes that may be read
	}{
		"empty":              {size: 5 * mib},
		"one unit":           {size: 4096, ranges: [][2]int64{{0, 4096}}, reads: 4096},
		"full":               {size: 3 * mib, ranges: [][2]int64{{0, 3 * mib}}, reads: 3 * mib},
		"odd size":           {size: 3*mib + 4096, ranges: [][2]int64{{3 * mib, 4096}}, reads: 4096},
		"scattered":          {size: 4 * mib, ranges: [][2]int64{{4096, 8192}, {1*mib - 4096, 8192}, {3 * mib, 4096}}, reads: 20480},
		"data, hole, data":   {size: 2 * mib, ranges: [][2]int64{{0, 4096}, {8192, 4096}, {2*mib - 4096, 4096}}, reads: 12288},
		"across many chunks": {size: 10 * mib, ranges: [][2]int64{{mib / 2, 8 * mib}}, reads: 8 * mib},
		"buffers are reused": {size: 20 * mib, ranges: [][2]int64{{0, 8 * mib}, {9 * mib, 4096}, {15 * mib, 4096}}, reads: 8*mib + 8192},
	} {
		t.Run(name, func(t *testing.T) {
			want := random(tt.size, 1, tt.ranges...)
			v := &watched{Volume: testDisk(t, testRepo(t), 1, want)}
			if got := encode(t, planRaw, downloadOf(nil, v, nil)); !bytes.Equal(got, want) {
				t.Error("the image is not the contents")
			}
			var read int64
			for _, e := range v.reads {
				read += e.Len
			}
			if read > tt.reads {
				t.Errorf("%d bytes read, at most %d needed", read, tt.reads)
			}
		})
	}
}

// A raw image of a terabyte of holes touches nothing.
func TestRawImageOfHoles(t *testing.T) {
	repo := testRepo(t)
	if _, err := repo.Create(t.Context(), storage.Spec{ID: testID(1), Size: 1 << 40}); err != nil {
		t.Fatal(err)
	}
	v := &watched{Volume: testOpen(t, repo, 1, storage.Live)}
	img, err := planRaw(t.Context(), downloadOf(nil, v, nil))
	if err != nil {
		t.Fatal(err)
	}
	var n int64
	err = img.send(t.Context(), whole(writerFunc(func(p []byte) (int, error) {
		if n += int64(len(p)); n > 1<<30 {
			return 0, errTest
		}
		return len(p), nil
	})), func(int64) {})
	if !errors.Is(err, errTest) || len(v.reads) != 0 {
		t.Errorf("error %v, %d reads; want %v and none", err, len(v.reads), errTest)
	}
}

type writerFunc func(p []byte) (int, error)

func (f writerFunc) Write(p []byte) (int, error) { return f(p) }

func TestVHDImage(t *testing.T) {
	for name, tt := range map[string]struct {
		size   int64
		ranges [][2]int64
		blocks []int64
	}{
		"empty":         {size: 6 * mib},
		"one unit":      {size: 4096, ranges: [][2]int64{{0, 4096}}, blocks: []int64{0}},
		"full":          {size: 6 * mib, ranges: [][2]int64{{0, 6 * mib}}, blocks: []int64{0, 1, 2}},
		"cut last":      {size: 5 * mib, ranges: [][2]int64{{5*mib - 4096, 4096}}, blocks: []int64{2}},
		"across blocks": {size: 20 * mib, ranges: [][2]int64{{2*mib - 4096, 8192}, {10 * mib, 4096}}, blocks: []int64{0, 1, 5}},
		"many blocks":   {size: 40 * mib, ranges: [][2]int64{{0, 40 * mib}}, blocks: []int64{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19}},
	} {
		t.Run(name, func(t *testing.T) {
			want := random(tt.size, 1, tt.ranges...)
			d := downloadOf(nil, testDisk(t, testRepo(t), 1, want), nil)
			b := encode(t, planVHD, d)
			r, got, blocks := readBlocks(t, b, tt.size)
			if !slices.Equal(blocks, tt.blocks) {
				t.Errorf("blocks %v, want %v", blocks, tt.blocks)
			}
			if !bytes.Equal(got, want) {
				t.Error("the image does not hold the contents")
			}
			f := r.Footer()
			if r.Size() != tt.size || f.Type() != vhd.TypeDynamic || uuid.UUID(f.UUID()).String() != vdiTest.UUID || !f.Timestamp().Equal(vdiTest.SnapshotTime) {
				t.Errorf("footer says size %d, type %d, uuid %x, time %v", r.Size(), f.Type(), f.UUID(), f.Timestamp())
			}
		})
	}
}

// readBlocks applies a VHD to a zero disk of size bytes, without regard to its
// bitmaps, as several readers do, and lists its blocks.
func readBlocks(t *testing.T, b []byte, size int64) (*vhd.Reader, []byte, []int64) {
	t.Helper()
	r, err := vhd.NewReader(bytes.NewReader(b), vhd.ReaderOptions{Length: int64(len(b))})
	if err != nil {
		t.Fatal(err)
	}
	disk := make([]byte, size)
	var blocks []int64
	for i := range (size + vhd.BlockSize - 1) / vhd.BlockSize {
		entry := binary.BigEndian.Uint32(b[int64(r.Header().TableOffset())+4*i:])
		if entry == 0xFFFFFFFF {
			continue
		}
		blocks = append(blocks, i)
		copy(disk[i*vhd.BlockSize:], b[int64(entry)*512+512:][:vhd.BlockSize])
	}
	for err == nil {
		_, err = r.Next()
	}
	if err != io.EOF {
		t.Fatal(err)
	}
	return r, disk, blocks
}

// applied is a disk after a VHD was laid over it, as an import does.
func applied(t *testing.T, b, disk []byte) []byte {
	t.Helper()
	disk = bytes.Clone(disk)
	r, err := vhd.NewReader(bytes.NewReader(b), vhd.ReaderOptions{Length: -1})
	for err == nil {
		var run vhd.Run
		if run, err = r.Next(); err == nil {
			_, err = io.ReadFull(r, disk[run.Off:][:run.Len])
		}
	}
	if err != io.EOF {
		t.Fatal(err)
	}
	return disk
}

func TestDelta(t *testing.T) {
	const size = 12 * mib
	base := random(size, 1, [2]int64{0, 3 * mib}, [2]int64{8 * mib, 4096})
	edit := func(changes func([]byte)) []byte {
		b := bytes.Clone(base)
		changes(b)
		return b
	}
	for name, tt := range map[string]struct {
		to     []byte
		blocks []int64
	}{
		"nothing":           {to: base},
		"one sector":        {to: edit(func(b []byte) { b[5000]++ }), blocks: []int64{0}},
		"changed to zero":   {to: edit(func(b []byte) { clear(b[8*mib:][:4096]) }), blocks: []int64{4}},
		"zero and new data": {to: edit(func(b []byte) { clear(b[:2*mib]); copy(b[10*mib:], "new") }), blocks: []int64{0, 5}},
		"across blocks":     {to: edit(func(b []byte) { copy(b[4*mib-2:], "abcd") }), blocks: []int64{1, 2}},
		"all of it":         {to: random(size, 9, [2]int64{4 * mib, mib}), blocks: []int64{0, 1, 2, 4}},
		"larger":            {to: append(edit(func(b []byte) { b[0]++ }), random(4*mib, 3, [2]int64{mib, 4096})...), blocks: []int64{0, 6, 7}},
		"larger by holes":   {to: append(bytes.Clone(base), make([]byte, 5*mib)...), blocks: []int64{6, 7, 8}},
		"smaller":           {to: edit(func(b []byte) { b[0]++ })[:3*mib], blocks: []int64{0}},
	} {
		t.Run(name, func(t *testing.T) {
			repo := testRepo(t)
			from := testDisk(t, repo, 1, base)
			d := downloadOf(repo, testEdit(t, repo, 1, 2, tt.to), from)
			size := int64(len(tt.to))
			b := encode(t, planVHD, d)
			r, complete, blocks := readBlocks(t, b, size)
			if !slices.Equal(blocks, tt.blocks) {
				t.Errorf("blocks %v, want %v", blocks, tt.blocks)
			}
			for _, i := range blocks {
				off, end := i*vhd.BlockSize, min((i+1)*vhd.BlockSize, size)
				if !bytes.Equal(complete[off:end], tt.to[off:end]) {
					t.Errorf("block %d does not hold the complete contents", i)
				}
			}
			under := make([]byte, size)
			copy(under, base)
			if got := applied(t, b, under); !bytes.Equal(got, tt.to) {
				t.Error("base and delta do not give the contents")
			}
			h := r.Header()
			if r.Footer().Type() != vhd.TypeDifferencing || uuid.UUID(h.ParentUUID()).String() != baseTest.UUID ||
				h.ParentName() != baseTest.UUID+".vhd" || !h.ParentTimestamp().Equal(baseTest.SnapshotTime) {
				t.Errorf("type %d, parent %x %q of %v", r.Footer().Type(), h.ParentUUID(), h.ParentName(), h.ParentTimestamp())
			}

			raw := encode(t, planRaw, d)
			want := make([]byte, size)
			for e, err := range d.data(t.Context()) {
				if err != nil {
					t.Fatal(err)
				}
				copy(want[e.Off:e.End()], tt.to[e.Off:])
			}
			if !bytes.Equal(raw, want) {
				t.Error("the raw delta is not the changed ranges")
			}
		})
	}
}

// Volumes that have nothing to do with each other make a delta too.
func TestDeltaUnrelated(t *testing.T) {
	from, to := random(8*mib, 1, [2]int64{0, 3 * mib}), random(8*mib, 2, [2]int64{7 * mib, mib})
	if got := applied(t, imageOf(t, to, from), from); !bytes.Equal(got, to) {
		t.Error("base and delta do not give the contents")
	}
}

// A delta marks what changed, not the blocks it sends for it.
func TestDeltaMarks(t *testing.T) {
	base := random(4*mib, 1, [2]int64{0, 4 * mib})
	to := bytes.Clone(base)
	to[100*4096]++
	to[300*4096]++
	repo := testRepo(t)
	from := testDisk(t, repo, 1, base)
	d := downloadOf(repo, testEdit(t, repo, 1, 2, to), from)
	r, err := vhd.NewReader(bytes.NewReader(encode(t, planVHD, d)), vhd.ReaderOptions{Length: -1})
	var got []vhd.Run
	for err == nil {
		var run vhd.Run
		if run, err = r.Next(); err == nil {
			got = append(got, run)
		}
	}
	want := []vhd.Run{{Off: 100 * 4096, Len: 4096}, {Off: 300 * 4096, Len: 4096}}
	if err != io.EOF || !slices.Equal(got, want) {
		t.Errorf("marked runs %v, error %v; want %v", got, err, want)
	}
}

func TestVHDTooLarge(t *testing.T) {
	repo := testRepo(t)
	for _, tt := range []struct {
		size int64
		ok   bool
	}{{vhd.MaxSize, true}, {vhd.MaxSize + 2*mib, false}} {
		id := int(tt.size >> 20)
		if _, err := repo.Create(t.Context(), storage.Spec{ID: testID(id), Size: tt.size}); err != nil {
			t.Fatal(err)
		}
		_, err := planVHD(t.Context(), downloadOf(nil, testOpen(t, repo, id, storage.Pinned), nil))
		if e, ok := errors.AsType[*xapi.Error](err); tt.ok != (err == nil) ||
			!tt.ok && (!ok || !slices.Equal(e.Description(), []string{"VDI_TOO_LARGE", "OpaqueRef:x", "2190433320960"})) {
			t.Errorf("size %d: error is %v", tt.size, err)
		}
	}
}

// Storage that fails ends a download with its error, wherever it fails.
func TestDownloadStorageFails(t *testing.T) {
	v := &watched{Volume: testDisk(t, testRepo(t), 1, random(8*mib, 1, [2]int64{0, 8 * mib}))}
	v.fail = func(off int64) error {
		if off >= 6*mib {
			return errTest
		}
		return nil
	}
	for name, plan := range map[string]func(context.Context, *download) (image, error){"raw": planRaw, "vhd": planVHD} {
		img, err := plan(t.Context(), downloadOf(nil, v, nil))
		if err != nil {
			t.Fatal(err)
		}
		var out bytes.Buffer
		if err := img.send(t.Context(), whole(&out), func(int64) {}); !errors.Is(err, errTest) {
			t.Errorf("%s: error is %v, want %v", name, err, errTest)
		}
		if out.Len() < 6*mib || int64(out.Len()) >= img.length() {
			t.Errorf("%s: %d bytes sent", name, out.Len())
		}
	}
}

// Scattered data is read side by side, and stands in the image as it does when
// only a part of that is sent.
func TestScatteredQcow2(t *testing.T) {
	const size = 24 * mib
	var ranges [][2]int64
	for off := int64(0); off < 19*mib; off += 3 * qcow2.ClusterSize {
		ranges = append(ranges, [2]int64{off, 4096 + off%qcow2.ClusterSize})
	}
	ranges = append(ranges, [2]int64{20 * mib, 3*mib - 4096})
	v := &watched{Volume: testDisk(t, testRepo(t), 1, random(size, 1, ranges...))}
	d := downloadOf(nil, v, nil)
	image := encode(t, planQcow2, d)
	r, err := qcow2.NewReader(bytes.NewReader(image), qcow2.ReaderOptions{Length: int64(len(image))})
	if err != nil {
		t.Fatal(err)
	}
	got, want := make([]byte, size), make([]byte, size)
	for run, err := r.Next(); err != io.EOF; run, err = r.Next() {
		if err != nil {
			t.Fatal(err)
		}
		if _, err := io.ReadFull(r, got[run.Off:run.End()]); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := v.Volume.ReadAt(want, 0); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got, want) {
		t.Error("not the contents")
	}
	img, err := planQcow2(t.Context(), d)
	if err != nil {
		t.Fatal(err)
	}
	n := int64(len(image))
	for _, part := range [][2]int64{{0, 10}, {n / 2, n/2 + 3*mib}, {5*mib + 1, 5*mib + 2}, {n - 70000, n}, {3 * mib, n - mib}} {
		var out bytes.Buffer
		w := &window{w: &out, from: part[0], to: part[1]}
		if err := img.send(t.Context(), w, func(int64) {}); err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(out.Bytes(), image[part[0]:part[1]]) {
			t.Errorf("bytes %d to %d: %d that are others", part[0], part[1], out.Len())
		}
	}
	for i := 0; i < len(ranges)-1; i += 11 {
		bad := ranges[i]
		v.fail = func(off int64) error {
			if off == bad[0]/qcow2.ClusterSize*qcow2.ClusterSize {
				return errTest
			}
			return nil
		}
		if err := img.send(t.Context(), whole(io.Discard), func(int64) {}); !errors.Is(err, errTest) {
			t.Fatalf("byte %d cannot be read: %v", bad[0], err)
		}
	}
}

func TestIdentify(t *testing.T) {
	const id = "3f1e6c5a-9b0d-7e8f-e102-5c772190de01" // not of RFC 4122
	when := time.Date(2026, 11, 25, 1, 2, 3, 0, time.UTC)
	repo := testRepo(t)
	live := testDisk(t, repo, 1, make([]byte, mib))
	of := func(vdi *xapi.VDI) identity {
		t.Helper()
		got, err := identify(t.Context(), vdi, testOpen(t, repo, 1, storage.Pinned))
		if err != nil {
			t.Fatal(err)
		}
		return got
	}
	want := identity{
		uuid:     [16]byte{0x3f, 0x1e, 0x6c, 0x5a, 0x9b, 0x0d, 0x4e, 0x8f, 0xa1, 0x02, 0x5c, 0x77, 0x21, 0x90, 0xde, 0x01},
		modified: when,
		name:     id,
	}
	if got := of(&xapi.VDI{UUID: id, IsASnapshot: true, SnapshotTime: when}); got != want {
		t.Errorf("snapshot: %v, want %v", got, want)
	}
	disk := &xapi.VDI{UUID: id, SnapshotTime: when}
	one, again := of(disk), of(disk)
	if _, err := live.WriteAt([]byte("changed"), 0); err != nil {
		t.Fatal(err)
	}
	two := of(disk)
	if one != again || one.uuid == two.uuid || one.uuid == want.uuid || !one.modified.IsZero() || one.uuid != vhd.WellFormed(one.uuid) {
		t.Errorf("live disk: %x, %x unchanged, %x changed, at %v", one.uuid, again.uuid, two.uuid, one.modified)
	}
	if _, err := identify(t.Context(), &xapi.VDI{UUID: "no"}, live); err == nil {
		t.Error("a malformed uuid was accepted")
	}
}

// The two looks at a disk see it as one does.
func TestAllExtents(t *testing.T) {
	repo := testRepo(t)
	if _, err := repo.Create(t.Context(), storage.Spec{ID: testID(1), Size: firstLook + 8*mib}); err != nil {
		t.Fatal(err)
	}
	v := testOpen(t, repo, 1, storage.Live)
	for off, n := range map[int64]int{mib: mib, firstLook - 2*mib: 4 * mib} {
		if _, err := v.WriteAt(bytes.Repeat([]byte{1}, n), off); err != nil {
			t.Fatal(err)
		}
	}
	var joined []storage.Extent
	end := int64(0)
	for e, err := range allExtents(t.Context(), v) {
		if err != nil {
			t.Fatal(err)
		}
		if e.Off != end || e.Len <= 0 {
			t.Errorf("extent %+v behind byte %d", e, end)
		}
		end = e.End()
		if last := len(joined) - 1; last >= 0 && joined[last].Hole == e.Hole {
			joined[last].Len += e.Len
		} else {
			joined = append(joined, e)
		}
	}
	want := []storage.Extent{
		{Off: 0, Len: mib, Hole: true},
		{Off: mib, Len: mib},
		{Off: 2 * mib, Len: firstLook - 4*mib, Hole: true},
		{Off: firstLook - 2*mib, Len: 4 * mib},
		{Off: firstLook + 2*mib, Len: 6 * mib, Hole: true},
	}
	if !slices.Equal(joined, want) {
		t.Errorf("extents %+v, want %+v", joined, want)
	}
	for range allExtents(t.Context(), v) {
		break // an iterator that goes on panics
	}
	ctx, cancel := context.WithCancelCause(t.Context())
	cancel(errTest)
	errs := 0
	for _, err := range allExtents(ctx, v) {
		if errs++; !errors.Is(err, errTest) {
			t.Errorf("error %v, want %v", err, errTest)
		}
	}
	if errs != 1 {
		t.Errorf("%d errors, want 1", errs)
	}
}
