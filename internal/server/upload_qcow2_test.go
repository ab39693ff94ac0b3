package server

import (
	"bytes"
	"fmt"
	"os/exec"
	"path/filepath"
	"strconv"
	"testing"

	"coppice/internal/peertest"
)

// resized is a qcow2 image that has been made larger, with its first table
// behind all of its data.
func resized(t *testing.T, contents []byte, size string) []byte {
	t.Helper()
	qemu := peertest.Tool(t, "qemu-img", "qemu-utils")
	raw, image := filepath.Join(t.TempDir(), "raw"), filepath.Join(t.TempDir(), "qcow2")
	putFile(t, raw, contents)
	for _, args := range [][]string{{"convert", "-f", "raw", "-O", "qcow2", raw, image}, {"resize", image, size}} {
		if out, err := exec.Command(qemu, args...).CombinedOutput(); err != nil {
			t.Fatalf("%v\n%s", err, out)
		}
	}
	return getFile(t, image)
}

// An image whose tables come after its data takes the room of its data once,
// and what it took comes back when it is cut.
func TestImportQcow2TablesLast(t *testing.T) {
	const size = 24 * mib
	contents := random(size, 1, [2]int64{0, 9 * mib}, [2]int64{11*mib + 4096, 12 * mib})
	image := resized(t, contents, "60G")
	r := newFaultRig(t, &faultHost{capacity: 38 << 20, options: smallRegions()})
	d := &depot{fixture: r.fixture, t: t, session: r.session, sr: r.defaultSR()}
	for _, atomic := range []string{"0", "1"} {
		ref, _ := d.disk(60 << 30)
		if o := d.cutShortAt(ref, image, len(image)-2000, "format", "qcow2", atomicParam, atomic); o[0] != "failure" || o[1] != "VDI_IO_ERROR" {
			t.Fatalf("cut short: %q", o)
		}
		if o := d.offer(ref, image, nil, "format", "qcow2", atomicParam, atomic); !succeeded(o) {
			t.Fatalf("whole: %q", o)
		}
		resp := d.fetch("GET", d.url("/export_raw_vdi", "vdi", ref), "Range", "bytes=0-25165823")
		if got := readBody(t, resp); !bytes.Equal(got, contents) {
			t.Error("not the contents")
		}
		d.do("VDI.destroy", d.session, ref)
	}
	full, _ := d.disk(60 << 30)
	more, _ := d.disk(60 << 30)
	d.upload(full, "qcow2", image)
	if o := d.offer(more, image, nil, "format", "qcow2"); o[0] != "failure" || o[1] != "SR_BACKEND_FAILURE_44" {
		t.Errorf("with no room: %q", o)
	}
	if got := len(d.do("VDI.get_all", d.session).([]any)); got != 2 {
		t.Errorf("%d disks, want 2", got)
	}
	r.close()
	r.host.check(t)
}

// Over a disk that has contents, only what differs changes.
func TestImportQcow2TablesLastOver(t *testing.T) {
	const size = 24 * mib
	contents := random(size, 1, [2]int64{0, 9 * mib}, [2]int64{11*mib + 4096, 12 * mib})
	d := newDepot(t)
	ref, _ := d.disk(1 << 30)
	d.upload(ref, "qcow2", resized(t, contents, "1G"))
	base := d.do("VDI.snapshot", d.session, ref).(string)
	copy(contents[2*mib:], random(mib, 7, [2]int64{0, mib}))
	d.upload(ref, "qcow2", resized(t, contents, "1G"))
	resp := d.fetch("GET", d.url("/export_raw_vdi", "vdi", ref), "Range", fmt.Sprintf("bytes=0-%d", size-1))
	if got := readBody(t, resp); !bytes.Equal(got, contents) {
		t.Error("not the contents")
	}
	resp = d.fetch("HEAD", d.url("/export_raw_vdi", "vdi", ref, "format", "qcow2", "base", base))
	_ = resp.Body.Close()
	if n := resp.Header.Get("Coppice-Changed-Bytes"); n != strconv.Itoa(mib) {
		t.Errorf("%s bytes have changed, want %d", n, mib)
	}
}
