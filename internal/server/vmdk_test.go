package server

import (
	"bytes"
	"context"
	"errors"
	"iter"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"testing"

	"coppice/internal/peertest"
	"coppice/internal/storage"
	"coppice/internal/vmdk"
	"coppice/internal/xapi"
)

// Both directions of VMDK, against the wide-spread tool.
func TestVMDK(t *testing.T) {
	qemu := peertest.Tool(t, "qemu-img", "qemu-utils")
	d := newDepot(t)
	contents := random(72*mib, 1, [2]int64{0, 3 * mib}, [2]int64{5*mib + 4096, 4096}, [2]int64{40 * mib, 70 << 10}, [2]int64{71 * mib, mib})
	ref, _ := d.filled(contents)
	task := d.task()
	resp := d.fetch("GET", d.url("/export_raw_vdi", "vdi", ref, "format", "vmdk", "task_id", task))
	image := readBody(t, resp)
	if resp.ContentLength >= 0 || resp.Header.Get("Accept-Ranges") != "none" || resp.Trailer.Get("Content-Digest") == "" {
		t.Errorf("length %d, header %v, trailer %v", resp.ContentLength, resp.Header, resp.Trailer)
	}
	if o := d.settled(task); !succeeded(o) {
		t.Errorf("task says %q", o)
	}
	dir := t.TempDir()
	raw, ours, theirs := filepath.Join(dir, "raw"), filepath.Join(dir, "ours"), filepath.Join(dir, "theirs")
	putFile(t, raw, contents)
	putFile(t, ours, image)
	for _, args := range [][]string{
		{"check", "-f", "vmdk", ours},
		{"compare", "-f", "raw", "-F", "vmdk", raw, ours},
		{"convert", "-f", "raw", "-O", "vmdk", "-o", "subformat=streamOptimized", raw, theirs},
	} {
		if out, err := exec.Command(qemu, args...).CombinedOutput(); err != nil {
			t.Fatalf("qemu-img %q: %v\n%s", args, err, out)
		}
	}
	for _, b := range [][]byte{image, getFile(t, theirs)} {
		other, _ := d.disk(72 * mib)
		if o := d.offer(other, b, nil, "format", "vmdk"); !succeeded(o) {
			t.Errorf("import: %q", o)
		}
		if !bytes.Equal(d.download(other, "raw", ""), contents) {
			t.Error("import: not the contents")
		}
		if o := d.cutShortAt(other, b, len(b)-700, "format", "vmdk"); o[0] != "failure" {
			t.Errorf("import, cut: %q", o)
		}
	}
	small, _ := d.disk(2 * mib)
	if o := d.offer(small, image, nil, "format", "vmdk"); o[0] != "failure" || o[1] != "VDI_IO_ERROR" {
		t.Errorf("onto a small disk: %q", o)
	}
}

// A disk may be larger than the room of an image, as long as its data is not;
// a grain counts once, however often it is touched.
func TestVMDKTooLarge(t *testing.T) {
	const size = vmdk.MaxData + 2*vmdk.GrainSize
	repo := testRepo(t)
	for i, disk := range []int64{size / storage.Unit * storage.Unit, vmdk.MaxSize + storage.Unit} {
		if _, err := repo.Create(t.Context(), storage.Spec{ID: testID(i), Size: disk}); err != nil {
			t.Fatal(err)
		}
	}
	for name, tt := range map[string]struct {
		disk  int
		data  []storage.Extent
		limit string // "" when it fits
	}{
		"empty": {},
		"as much data as fits, in pieces": {data: []storage.Extent{
			{Off: 4096, Len: 4096}, {Off: 16384, Len: 4096}, {Off: vmdk.GrainSize, Len: vmdk.MaxData - vmdk.GrainSize},
		}},
		"one grain more":      {data: []storage.Extent{{Len: vmdk.MaxData - 4096}, {Off: vmdk.MaxData, Len: 4096}}, limit: strconv.Itoa(vmdk.MaxData)},
		"too large and empty": {disk: 1, limit: strconv.Itoa(vmdk.MaxSize)},
	} {
		d := downloadOf(nil, testOpen(t, repo, tt.disk, storage.Pinned), nil)
		d.extents = func(context.Context) iter.Seq2[storage.Extent, error] {
			return func(yield func(storage.Extent, error) bool) {
				for _, e := range tt.data {
					if !yield(e, nil) {
						return
					}
				}
			}
		}
		_, err := planVMDK(t.Context(), d)
		if e, ok := errors.AsType[*xapi.Error](err); (tt.limit == "") != (err == nil) ||
			err != nil && (!ok || !slices.Equal(e.Description(), []string{"VDI_TOO_LARGE", "OpaqueRef:x", tt.limit})) {
			t.Errorf("%s: error is %v, want one that says %q", name, err, tt.limit)
		}
	}
}
