package server

import (
	"bytes"
	"crypto/sha256"
	"encoding/base64"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"coppice/internal/peertest"
)

func TestExportForms(t *testing.T) {
	d := newDepot(t)
	contents := random(6*mib, 1, [2]int64{mib, 3 * mib})
	ref, uuid := d.filled(contents)
	basic := "Authorization: Basic " + base64.StdEncoding.EncodeToString([]byte("root:secret")) + "\r\n"
	for name, request := range map[string]string{
		"the document":     "GET " + d.url("/export_raw_vdi", "task_id", "%s", "vdi", ref, "format", "raw") + " HTTP/1.0\r\nConnection: close\r\n\r\n\r\n",
		"xe":               "GET " + d.url("/export_raw_vdi", "task_id", "%s", "vdi", ref) + " HTTP/1.0\r\n\r\n",
		"trailing slash":   "GET " + d.url("/export_raw_vdi/", "format", "raw", "vdi", ref, "task_id", "%s") + " HTTP/1.1\r\nHost: h\r\nConnection: keep-alive\r\n\r\n",
		"uuid, upper case": "GET " + d.url("/export_raw_vdi", "task_id", "%s", "vdi", uuid, "format", "RAW") + " HTTP/1.1\r\nHost: h\r\n\r\n",
		"percent-encoded":  "GET " + d.url("/export_raw_vdi", "task_id", "%s", "vdi", strings.ReplaceAll(ref, ":", "%%3A")) + " HTTP/1.1\r\nHost: h\r\n\r\n",
		"cookie":           "GET /export_raw_vdi?vdi=" + uuid + " HTTP/1.1\r\nHost: h\r\nCookie: session_id=" + d.session + "; task_id=%s\r\n\r\n",
		"task in a header": "GET " + d.url("/export_raw_vdi", "vdi", uuid) + " HTTP/1.1\r\nHost: h\r\ntask-id: %s\r\n\r\n",
		"basic":            "GET /export_raw_vdi?vdi=" + uuid + "&task_id=%s HTTP/1.1\r\nHost: h\r\n" + basic + "\r\n",
	} {
		t.Run(name, func(t *testing.T) {
			task := d.task()
			got := d.send(t, "tcp", fmt.Sprintf(request, task))
			got, tag := cutHeader(got, "ETag")
			if len(tag) != 34 {
				t.Errorf("entity tag %s", tag)
			}
			if strings.Contains(got, "Repr-Digest: ") { // one of the others was first
				got, _ = cutHeader(got, "Repr-Digest")
			}
			want := "HTTP/1.1 200 OK\r\nConnection: close\r\nCache-Control: no-cache, no-store\r\ntask-id: " + task +
				"\r\ncontent-type: application/octet-stream\r\ncontent-disposition: attachment; filename=\"" + uuid + ".raw\"" +
				"\r\nCoppice-Basis: exact\r\nCoppice-Virtual-Size: 6291456\r\nAccept-Ranges: bytes\r\nContent-Length: 6291456\r\n\r\n"
			head, body, _ := strings.Cut(got, "\r\n\r\n")
			if head+"\r\n\r\n" != want {
				t.Fatalf("got:\n%s\nwant:\n%s", head, want)
			}
			if body != string(contents) {
				t.Error("wrong contents")
			}
			if o := d.settled(task); !slices.Equal(o, []string{"success"}) {
				t.Errorf("task says %q", o)
			}
		})
	}
	t.Run("sending side closed", func(t *testing.T) {
		conn := d.dial(t, "tcp").(*net.TCPConn)
		if _, err := io.WriteString(conn, "GET "+d.url("/export_raw_vdi", "vdi", ref)+" HTTP/1.0\r\n\r\n"); err != nil {
			t.Fatal(err)
		}
		if err := conn.CloseWrite(); err != nil {
			t.Fatal(err)
		}
		if got, err := io.ReadAll(conn); err != nil || !bytes.HasSuffix(got, contents) {
			t.Errorf("%d bytes, error %v", len(got), err)
		}
	})
	t.Run("without a task", func(t *testing.T) {
		got := d.send(t, "tcp", "GET "+d.url("/export_raw_vdi", "vdi", ref)+" HTTP/1.0\r\n\r\n")
		_, rest, _ := strings.Cut(got, "task-id: ")
		task, _, _ := strings.Cut(rest, "\r\n")
		if o := d.settled(task); !strings.HasSuffix(got, string(contents)) || !slices.Equal(o, []string{"success"}) {
			t.Errorf("task %s says %q", task, o)
		}
	})
}

// cutHeader takes the line of a header out of a reply.
func cutHeader(reply, name string) (rest, value string) {
	before, after, _ := strings.Cut(reply, "\r\n"+name+": ")
	value, after, _ = strings.Cut(after, "\r\n")
	return before + "\r\n" + after, value
}

// The walk-through of the document: full, delta, restore of both.
func TestIncrementalBackup(t *testing.T) {
	d := newDepot(t)
	const size = 24 << 30
	disk, _ := d.disk(size)
	one := random(40*mib, 1, [2]int64{0, 9 * mib}, [2]int64{20 * mib, 12 * mib})
	d.upload(disk, "raw", one)
	full := d.do("VDI.snapshot", d.session, disk).(string)
	fullImage := d.download(full, "vhd", "")

	two := bytes.Clone(one)
	copy(two[5*mib:], "changed")
	clear(two[30*mib:][:mib])
	d.upload(disk, "raw", two) // only what differs is written
	delta := d.do("VDI.snapshot", d.session, disk).(string)
	deltaImage := d.download(delta, "vhd", d.do("VDI.get_uuid", d.session, full).(string))

	if got, want := blocksOf(t, fullImage), []int64{0, 1, 2, 3, 4, 10, 11, 12, 13, 14, 15}; !slices.Equal(got, want) {
		t.Errorf("full has blocks %v, want %v", got, want)
	}
	if got, want := blocksOf(t, deltaImage), []int64{2, 15}; !slices.Equal(got, want) {
		t.Errorf("delta has blocks %v, want %v", got, want)
	}
	if same := d.download(full, "vhd", ""); !bytes.Equal(same, fullImage) {
		t.Error("a second export of the same snapshot gives other bytes")
	}
	if none := d.download(delta, "vhd", delta); len(blocksOf(t, none)) != 0 {
		t.Error("a delta against itself has blocks")
	}
	if live := d.download(disk, "vhd", delta); len(blocksOf(t, live)) != 0 {
		t.Error("a delta of the disk against its newest snapshot has blocks")
	}
	if one, two := d.download(disk, "vhd", ""), d.download(disk, "vhd", ""); !bytes.Equal(one, two) {
		t.Error("a second export of a disk that nobody wrote gives other bytes")
	}
	if back := d.download(full, "vhd", delta); !slices.Equal(blocksOf(t, back), []int64{2, 15}) {
		t.Error("a delta backwards has other blocks")
	}

	restored, _ := d.disk(size)
	d.upload(restored, "vhd", fullImage)
	if d.digest(restored, int64(len(one))) != sha256.Sum256(one) {
		t.Error("the restored full differs")
	}
	d.upload(restored, "vhd", deltaImage)
	if d.digest(restored, int64(len(two))) != sha256.Sum256(two) {
		t.Error("the restored delta differs")
	}
	if used, ok := d.do("VDI.get_physical_utilisation", d.session, restored).(int64); !ok || used > 64*mib {
		t.Errorf("the restored disk takes %d bytes, it is not sparse", used)
	}
}

func blocksOf(t *testing.T, b []byte) []int64 {
	t.Helper()
	_, _, blocks := readBlocks(t, b, 40*mib)
	return blocks
}

// digest is the SHA-256 of the first n bytes of a VDI.
func (d *depot) digest(vdi string, n int64) [32]byte {
	d.t.Helper()
	conn := d.dial(d.t, "tcp")
	if _, err := io.WriteString(conn, "GET "+d.url("/export_raw_vdi", "vdi", vdi)+" HTTP/1.0\r\n\r\n"); err != nil {
		d.t.Fatal(err)
	}
	d.untilBlank(conn)
	b := make([]byte, n)
	if _, err := io.ReadFull(conn, b); err != nil {
		d.t.Fatal(err)
	}
	return sha256.Sum256(b)
}

// A live disk is exported as of one instant, whatever happens to it meanwhile.
func TestExportIsOneInstant(t *testing.T) {
	d := newDepot(t)
	contents := random(64*mib, 1, [2]int64{0, 64 * mib})
	ref, _ := d.filled(contents)
	conn := d.stall("GET "+d.url("/export_raw_vdi", "vdi", ref), d.task())
	d.upload(ref, "raw", random(64*mib, 2, [2]int64{0, 64 * mib}))
	d.do("VDI.destroy", d.session, ref)
	got, err := io.ReadAll(conn)
	if err != nil || !bytes.Equal(got, contents) {
		t.Errorf("%d bytes, error %v: not the contents when the export began", len(got), err)
	}
}

// What the wide-spread tool makes of our images.
func TestQemuReadsExports(t *testing.T) {
	qemu := peertest.Tool(t, "qemu-img", "qemu-utils")
	d := newDepot(t)
	contents := random(9*mib, 1, [2]int64{0, 3 * mib}, [2]int64{8 * mib, mib})
	ref, _ := d.filled(contents)
	dir := t.TempDir()
	raw, image, clusters := filepath.Join(dir, "disk.raw"), filepath.Join(dir, "disk.vhd"), filepath.Join(dir, "disk.qcow2")
	for file, format := range map[string]string{raw: "raw", image: "vhd", clusters: "qcow2"} {
		if err := os.WriteFile(file, d.download(ref, format, ""), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if out, err := exec.Command(qemu, "compare", "-f", "raw", "-F", "vpc", raw, image).CombinedOutput(); err != nil {
		t.Errorf("%v\n%s", err, out)
	}
	if out, err := exec.Command(qemu, "compare", "-f", "raw", "-F", "qcow2", raw, clusters).CombinedOutput(); err != nil {
		t.Errorf("%v\n%s", err, out)
	}
	if out, err := exec.Command(qemu, "check", "-f", "qcow2", clusters).CombinedOutput(); err != nil {
		t.Errorf("%v\n%s", err, out)
	}
	again := filepath.Join(dir, "again.vhd")
	if out, err := exec.Command(qemu, "convert", "-f", "raw", "-O", "vpc", "-o", "force_size=on", raw, again).CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	b, err := os.ReadFile(again)
	if err != nil {
		t.Fatal(err)
	}
	other, _ := d.disk(10 * mib)
	d.upload(other, "vhd", b)
	if !bytes.Equal(d.download(other, "raw", ""), d.download(ref, "raw", "")) {
		t.Error("an image of qemu-img gives other contents")
	}
}
