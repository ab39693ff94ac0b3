package server

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"

	"coppice/internal/peertest"
	"coppice/internal/qcow2"
	"coppice/internal/storage"

	"github.com/klauspost/compress/zstd"
)

// offer carries out an import with further parameters and headers and returns
// what its task says.
func (d *depot) offer(vdi string, body []byte, headers []string, args ...string) []string {
	d.t.Helper()
	task := d.task()
	args = append([]string{"task_id", task, "vdi", vdi}, args...)
	headers = append([]string{"Host: h", fmt.Sprintf("Content-Length: %d", len(body))}, headers...)
	d.put(d.url("/import_raw_vdi", args...)+" HTTP/1.1", headers, string(body), true)
	return d.settled(task)
}

func succeeded(outcome []string) bool { return outcome[0] == "success" }

// cutShortAt begins an upload of which only a part is sent.
func (d *depot) cutShortAt(vdi string, body []byte, n int, args ...string) []string {
	d.t.Helper()
	task := d.task()
	args = append([]string{"task_id", task, "vdi", vdi}, args...)
	conn := d.dial(d.t, "tcp").(*net.TCPConn)
	_, err := fmt.Fprintf(conn, "PUT %s HTTP/1.1\r\nHost: h\r\nContent-Length: %d\r\n\r\n", d.url("/import_raw_vdi", args...), len(body))
	if err != nil {
		d.t.Fatal(err)
	}
	d.untilBlank(conn)
	if _, err := conn.Write(body[:n]); err != nil {
		d.t.Fatal(err)
	}
	if err := conn.CloseWrite(); err != nil {
		d.t.Fatal(err)
	}
	_, _ = io.Copy(io.Discard, conn)
	return d.settled(task)
}

// emptyTables is a qcow2 image of a disk of 32 MiB whose 1024 tables of the
// second level are empty and come before that of the first.
func emptyTables() []byte {
	be := binary.BigEndian
	const l1 = 512 + 1024*512
	b := make([]byte, l1, l1+1024*8)
	copy(b, "QFI\xfb")
	for at, v := range map[int]uint32{4: 3, 20: 9, 28: 32 << 20, 36: 1024, 44: l1, 96: 4, 100: 104} {
		be.PutUint32(b[at:], v)
	}
	for i := range uint64(1024) {
		b = be.AppendUint64(b, 512+512*i)
	}
	return b
}

// A small image may have tables to look through for long, and no data.
func TestReadQcow2Ends(t *testing.T) {
	v := testDisk(t, testRepo(t), 1, make([]byte, 32*mib))
	if n, err := decode(t, readQcow2, emptyTables(), -1, v); n != 0 || err != nil {
		t.Fatalf("%d bytes changed, error %v", n, err)
	}
	ctx, cancel := context.WithCancelCause(t.Context())
	cancel(errTest)
	u := &upload{size: v.Size(), overlay: storage.NewOverlay(v), done: func(int64, int64) {}, interrupt: func() {}}
	if err := readQcow2(ctx, bytes.NewReader(emptyTables()), -1, u); !errors.Is(err, errTest) {
		t.Errorf("error is %v, want that of the context", err)
	}
}

// An atomic import appears as a whole or not at all, and leaves nothing.
func TestAtomicImport(t *testing.T) {
	d := newDepot(t)
	before, after := random(4*mib, 1, [2]int64{0, 4 * mib}), random(4*mib, 2, [2]int64{0, 4 * mib})
	ref, uuid := d.filled(before)
	other, _ := d.filled(after)
	for format, image := range map[string][]byte{
		"raw": after, "vhd": d.download(other, "vhd", ""), "qcow2": d.download(other, "qcow2", ""), "tar": d.download(other, "tar", ""),
	} {
		for _, n := range []int{0, 1000, len(image) / 2, len(image) - 1} {
			if o := d.cutShortAt(ref, image, n, "format", format, "coppice-atomic", "1"); o[0] != "failure" {
				t.Errorf("%s cut at %d: %q", format, n, o)
			}
			if !bytes.Equal(d.download(ref, "raw", ""), before) {
				t.Fatalf("%s cut at %d: the disk has changed", format, n)
			}
		}
		if o := d.offer(ref, image, nil, "format", format, "coppice-atomic", "1"); !slices.Equal(o, []string{"success", "<value>" + ref + "</value>"}) {
			t.Errorf("%s: %q", format, o)
		}
		if !bytes.Equal(d.download(ref, "raw", ""), after) {
			t.Errorf("%s: the disk is not what was sent", format)
		}
		d.upload(ref, "raw", before)
	}
	if got := d.do("VDI.get_uuid", d.session, ref); got != uuid {
		t.Errorf("the disk is %v now", got)
	}
	d.do("SR.scan", d.session, d.sr)
	if got := len(d.do("VDI.get_all", d.session).([]any)); got != 2 {
		t.Errorf("%d disks, want 2", got)
	}
	if o := d.offer(ref, after, nil, "coppice-atomic", "yes"); !slices.Equal(o, []string{"failure", "INVALID_VALUE", "coppice-atomic", "yes"}) {
		t.Errorf("a wrong value: %q", o)
	}
}

// A delta goes only onto what it was made against.
func TestImportOntoBase(t *testing.T) {
	d := newDepot(t)
	one := random(6*mib, 1, [2]int64{0, 6 * mib})
	two := bytes.Clone(one)
	copy(two[3*mib:], "changed")
	disk, _ := d.filled(one)
	base := d.do("VDI.snapshot", d.session, disk).(string)
	baseID := d.do("VDI.get_uuid", d.session, base).(string)
	d.upload(disk, "raw", two)
	later := d.do("VDI.snapshot", d.session, disk).(string)
	full := d.download(later, "vhd", "")
	for _, format := range []string{"vhd", "qcow2"} {
		delta := d.download(later, format, base)
		copied, _ := d.filled(one) // equal, and shares nothing
		clone := d.do("VDI.clone", d.session, base).(string)
		for _, target := range []string{copied, clone} {
			if o := d.offer(target, full, nil, "format", "vhd", "coppice-base", base); o[0] != "failure" {
				t.Errorf("a full image is taken for a delta: %q", o)
			}
			if o := d.offer(target, delta, nil, "format", format, "coppice-base", baseID); !succeeded(o) {
				t.Errorf("%s: %q", format, o)
			}
			if !bytes.Equal(d.download(target, "raw", ""), two) {
				t.Errorf("%s: the target is not what the delta makes", format)
			}
			want := []string{"failure", "INVALID_VALUE", "coppice-base", base}
			if o := d.offer(target, delta, nil, "format", format, "coppice-base", base); !slices.Equal(o, want) {
				t.Errorf("%s, once more: %q, want %q", format, o, want)
			}
		}
	}
	for _, body := range []struct {
		data  []byte
		query []string
	}{
		{one, []string{"format", "raw"}},
		{one, nil},
		{frames(piece{off: 5, data: []byte("new")}, piece{}), []string{"format", "raw", "chunked", "true"}},
	} {
		target, _ := d.filled(one)
		if o := d.offer(target, body.data, nil, append(body.query, "coppice-base", base)...); o[0] != "failure" || o[1] != "VDI_IO_ERROR" {
			t.Errorf("raw data, %q, is taken for a delta: %q", body.query, o)
		}
		if !bytes.Equal(d.download(target, "raw", ""), one) {
			t.Errorf("raw data, %q: the disk has changed", body.query)
		}
		live, _ := d.filled(one)
		if o := d.offer(target, body.data, nil, append(body.query, "coppice-base", live)...); !succeeded(o) {
			t.Errorf("raw data, %q, onto what a disk holds that is no snapshot: %q", body.query, o)
		}
	}
	delta := d.download(later, "vhd", base)
	twin := d.do("VDI.snapshot", d.session, base).(string) // the same contents, another identity
	clone := d.do("VDI.clone", d.session, base).(string)
	if o := d.offer(clone, delta, nil, "format", "vhd", "coppice-base", twin); o[0] != "failure" || o[1] != "VDI_IO_ERROR" {
		t.Errorf("a delta to another snapshot: %q", o)
	}
	small, _ := d.filled(one[:2*mib])
	if o := d.offer(small, delta, nil, "format", "vhd", "coppice-base", base); o[0] != "failure" || o[1] != "INVALID_VALUE" {
		t.Errorf("onto a disk of another size: %q", o)
	}
}

func TestImportFixedVHD(t *testing.T) {
	qemu := peertest.Tool(t, "qemu-img", "qemu-utils")
	d := newDepot(t)
	contents := random(4*mib, 1, [2]int64{0, 3 * mib})
	dir := t.TempDir()
	raw, image := filepath.Join(dir, "raw"), filepath.Join(dir, "vhd")
	putFile(t, raw, contents)
	if out, err := exec.Command(qemu, "convert", "-f", "raw", "-O", "vpc", "-o", "subformat=fixed,force_size=on", raw, image).CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	b := getFile(t, image)
	before := random(4*mib, 9, [2]int64{0, 4 * mib})
	ref, _ := d.filled(before)
	wrong := bytes.Clone(b)
	wrong[len(wrong)-1] = 1
	for name, body := range map[string][]byte{"raw data": before, "wrong footer": wrong, "cut": b[:len(b)-512]} {
		if o := d.offer(ref, body, nil, "format", "vhd"); o[0] != "failure" || o[1] != "VDI_IO_ERROR" {
			t.Errorf("%s: %q", name, o)
		}
		if !bytes.Equal(d.download(ref, "raw", ""), before) {
			t.Errorf("%s: the disk has changed", name)
		}
	}
	if o := d.offer(ref, b, nil, "format", "vhd"); !succeeded(o) {
		t.Errorf("%q", o)
	}
	if !bytes.Equal(d.download(ref, "raw", ""), contents) {
		t.Error("not the contents")
	}
	small, _ := d.disk(2 * mib)
	if o := d.offer(small, b, nil, "format", "vhd"); o[0] != "failure" {
		t.Errorf("onto a small disk: %q", o)
	}
	// A footer without its last byte, which is 0, behind a disk that begins like one.
	copy(contents, "conectix")
	odd := append(bytes.Clone(contents), b[len(contents):len(b)-1]...)
	if o := d.offer(ref, odd, nil, "format", "vhd"); !succeeded(o) {
		t.Errorf("a footer of 511 bytes: %q", o)
	}
	if !bytes.Equal(d.download(ref, "raw", ""), contents) {
		t.Error("a footer of 511 bytes: not the contents")
	}
}

func TestImportQcow2(t *testing.T) {
	qemu := peertest.Tool(t, "qemu-img", "qemu-utils")
	d := newDepot(t)
	contents := random(10*mib, 1, [2]int64{0, 3 * mib}, [2]int64{7 * mib, 3 * mib})
	dir := t.TempDir()
	raw := filepath.Join(dir, "raw")
	putFile(t, raw, contents)
	for i, options := range [][]string{
		{"-o", "compat=0.10"},
		{"-c", "-o", "compression_type=zstd"},
		{"-c"},
		{"-o", "preallocation=full"}, // data before its tables
		{"-o", "extended_l2=on"},
	} {
		image := filepath.Join(dir, strconv.Itoa(i))
		args := append(append([]string{"convert", "-f", "raw", "-O", "qcow2"}, options...), raw, image)
		if out, err := exec.Command(qemu, args...).CombinedOutput(); err != nil {
			t.Fatalf("%v\n%s", err, out)
		}
		ref, _ := d.disk(10 * mib)
		d.upload(ref, "qcow2", getFile(t, image))
		if !bytes.Equal(d.download(ref, "raw", ""), contents) {
			t.Errorf("%q: not the contents", options)
		}
	}
	// A delta over a disk, with a cluster that became zero.
	disk, _ := d.filled(contents)
	base := d.do("VDI.snapshot", d.session, disk).(string)
	changed := bytes.Clone(contents)
	clear(changed[mib : 2*mib])
	copy(changed[5*mib:], "new")
	d.upload(disk, "raw", changed)
	delta := d.download(disk, "qcow2", base)
	if r, err := qcow2.NewReader(bytes.NewReader(delta), qcow2.ReaderOptions{Length: -1}); err != nil || !r.Delta() || len(delta) > 3*mib {
		t.Errorf("a delta of %d bytes: %v", len(delta), err)
	}
	clone := d.do("VDI.clone", d.session, base).(string)
	d.upload(clone, "qcow2", delta)
	if !bytes.Equal(d.download(clone, "raw", ""), changed) {
		t.Error("delta: not the contents")
	}
	small, _ := d.disk(2 * mib)
	if o := d.offer(small, delta, nil, "format", "qcow2"); o[0] != "failure" || o[1] != "VDI_IO_ERROR" {
		t.Errorf("onto a small disk: %q", o)
	}
	if got := len(d.do("VDI.get_all", d.session).([]any)); got != 9 {
		t.Errorf("%d disks, want 9: scratch volumes show", got)
	}
}

func TestTar(t *testing.T) {
	d := newDepot(t)
	contents := random(10*mib, 1, [2]int64{2 * mib, mib + 5000}, [2]int64{8 * mib, 4096})
	ref, _ := d.filled(contents)
	archive := d.download(ref, "tar", "")
	dir := t.TempDir()
	file := filepath.Join(dir, "disk.tar")
	putFile(t, file, archive)
	list, err := exec.Command("tar", "-tf", file).CombinedOutput()
	if err != nil {
		t.Fatalf("%v\n%s", err, list)
	}
	var want strings.Builder
	for _, chunk := range []int{0, 2, 3, 8, 9} {
		fmt.Fprintf(&want, "vdi/%08d\nvdi/%08[1]d.xxhash\n", chunk)
	}
	if string(list) != want.String() {
		t.Errorf("tar lists\n%swant\n%s", list, want.String())
	}
	other, _ := d.disk(10 * mib)
	d.upload(other, "tar", archive)
	if !bytes.Equal(d.download(other, "raw", ""), contents) {
		t.Error("not the contents")
	}
	archive[1000]++
	if o := d.offer(other, archive, nil, "format", "tar"); o[0] != "failure" || o[1] != "VDI_IO_ERROR" {
		t.Errorf("a flipped bit: %q", o)
	}
}

// squeezed is what zstd makes of bytes.
func squeezed(t *testing.T, p []byte, options ...zstd.EOption) []byte {
	t.Helper()
	z, err := zstd.NewWriter(nil, options...)
	if err != nil {
		t.Fatal(err)
	}
	return z.EncodeAll(p, nil)
}

func TestImportContentEncoding(t *testing.T) {
	d := newDepot(t)
	contents := random(4*mib, 1, [2]int64{mib, mib})
	bomb := squeezed(t, make([]byte, 64*mib))
	for coding, body := range map[string][]byte{"gzip": zipped(t, string(contents)), "zstd": squeezed(t, contents), "identity": contents} {
		ref, _ := d.disk(4 * mib)
		if o := d.offer(ref, body, []string{"Content-Encoding: " + coding}); !succeeded(o) {
			t.Errorf("%s: %q", coding, o)
		}
		if !bytes.Equal(d.download(ref, "raw", ""), contents) {
			t.Errorf("%s: not the contents", coding)
		}
		if coding == "identity" {
			continue
		}
		for name, bad := range map[string][]byte{"cut": body[:len(body)/2], "garbage": contents[mib : mib+5000], "empty": {}} {
			if o := d.offer(ref, bad, []string{"Content-Encoding: " + coding}); o[0] != "failure" && name != "empty" {
				t.Errorf("%s, %s: %q", coding, name, o)
			}
		}
	}
	ref, _ := d.disk(4 * mib)
	if o := d.offer(ref, bomb, []string{"Content-Encoding: zstd"}); o[0] != "failure" {
		t.Errorf("a body of 64 MiB onto a disk of 4: %q", o)
	}
	wide := func(options ...zstd.EOption) []byte {
		return squeezed(t, make([]byte, maxDecoderWindow+mib), options...)
	}
	large, _ := d.disk(maxDecoderWindow + 2*mib)
	if o := d.offer(large, wide(zstd.WithWindowSize(maxDecoderWindow), zstd.WithSingleSegment(false)), []string{"Content-Encoding: zstd"}); !succeeded(o) {
		t.Errorf("the largest window: %q", o)
	}
	for name, body := range map[string][]byte{
		"a larger window":     wide(zstd.WithWindowSize(2 * maxDecoderWindow)),
		"all of it in memory": wide(zstd.WithSingleSegment(true)),
	} {
		if o := d.offer(large, body, []string{"Content-Encoding: zstd"}); o[0] != "failure" || !strings.Contains(strings.Join(o, " "), "limit of 32 MiB: compress it with zstd -19 or less and without --long") {
			t.Errorf("%s: %q", name, o)
		}
	}
	if o := d.offer(ref, contents, []string{"Content-Encoding: br"}); !slices.Equal(o, []string{"failure", "INTERNAL_ERROR", "Cannot handle content encoding: br"}) {
		t.Errorf("br: %q", o)
	}
}

// An upload that is cut goes on where the server has it.
func TestResumableUpload(t *testing.T) {
	d := newDepot(t)
	contents := random(8*mib, 1, [2]int64{0, 8 * mib})
	ref, _ := d.disk(8 * mib)
	offset := func() int {
		t.Helper()
		resp := d.fetch("HEAD", d.url("/import_raw_vdi", "vdi", ref))
		n, err := strconv.Atoi(resp.Header.Get("Upload-Offset"))
		if err != nil || resp.StatusCode != 200 {
			t.Fatalf("status %d, offset %q", resp.StatusCode, resp.Header.Get("Upload-Offset"))
		}
		return n
	}
	if n := offset(); n != 0 {
		t.Errorf("an empty disk has %d bytes of an upload", n)
	}
	for _, n := range []int{mib + 5, 1, 3 * mib} {
		at := offset()
		if o := d.cutShortAt(ref, contents[at:], n, "coppice-offset", strconv.Itoa(at)); o[0] != "failure" {
			t.Errorf("cut: %q", o)
		}
		if got := offset(); got != at+n {
			t.Errorf("%d bytes from %d on: the server has %d", n, at, got)
		}
	}
	at := offset()
	for name, tt := range map[string]struct{ args []string }{
		"a gap":         {[]string{"coppice-offset", strconv.Itoa(at + 1)}},
		"negative":      {[]string{"coppice-offset", "-1"}},
		"no number":     {[]string{"coppice-offset", "x"}},
		"another form":  {[]string{"coppice-offset", strconv.Itoa(at), "format", "vhd"}},
		"an atomic one": {[]string{"coppice-offset", strconv.Itoa(at), "coppice-atomic", "1"}},
	} {
		if o := d.offer(ref, contents[at:], nil, tt.args...); o[0] != "failure" || o[1] != "INVALID_VALUE" {
			t.Errorf("%s: %q", name, o)
		}
	}
	if o := d.offer(ref, contents[at:], nil, "coppice-offset", strconv.Itoa(at)); !succeeded(o) {
		t.Errorf("the rest: %q", o)
	}
	if !bytes.Equal(d.download(ref, "raw", ""), contents) {
		t.Error("not the contents")
	}
	if n := offset(); n != 0 {
		t.Errorf("a complete upload has %d bytes left", n)
	}
	if o := d.cutShortAt(ref, contents, mib, "coppice-offset", "0"); o[0] != "failure" || offset() != mib {
		t.Errorf("%q, then %d bytes", o, offset())
	}
	d.upload(ref, "raw", contents[:4096])
	if n := offset(); n != 0 {
		t.Errorf("after an import of another kind there are %d bytes", n)
	}
	if resp := d.fetch("HEAD", d.url("/import_raw_vdi", "vdi", "none")); resp.StatusCode != 500 {
		t.Errorf("of no disk: status %d", resp.StatusCode)
	}
	if resp := d.fetch("HEAD", "/import_raw_vdi?vdi="+ref); resp.StatusCode != 401 || !strings.Contains(resp.Header.Get("WWW-Authenticate"), "Basic") {
		t.Errorf("of a stranger: status %d", resp.StatusCode)
	}
}
