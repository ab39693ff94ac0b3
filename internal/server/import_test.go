package server

import (
	"bytes"
	"fmt"
	"io"
	"net"
	"net/http"
	"slices"
	"strings"
	"testing"
)

func TestImportForms(t *testing.T) {
	d := newDepot(t)
	contents := random(4*mib, 1, [2]int64{0, 3 * mib})
	image := string(imageOf(t, contents, nil))
	raw := string(contents)
	chunks := func(s string) string {
		return fmt.Sprintf("%x\r\n%s\r\n%x;x=y\r\n%s\r\n0\r\n\r\n", 100, s[:100], len(s)-100, s[100:])
	}
	length := func(n int) string { return fmt.Sprintf("Content-Length: %d", n) }
	const unknown = "Content-Length: 1125899906842624"
	type form struct {
		version, format string
		headers         []string
		body            string
		end             bool // the client closes when everything is sent
	}
	for name, tt := range map[string]form{
		"the document, vhd":         {"HTTP/1.0", "vhd", []string{"Connection: close"}, "\r\n" + image, true},
		"the document, raw":         {"HTTP/1.0", "raw", []string{"Connection: close"}, raw, true},
		"xe, file":                  {"HTTP/1.0", "vhd", []string{length(len(image))}, image, false},
		"xe, file, closes":          {"HTTP/1.0", "vhd", []string{length(len(image))}, image, true},
		"xe, pipe":                  {"HTTP/1.0", "vhd", nil, image, true},
		"xe, raw file":              {"HTTP/1.0", "raw", []string{length(len(raw))}, raw, false},
		"HTTP/1.1, length":          {"HTTP/1.1", "vhd", []string{"Host: h", length(len(image))}, image, false},
		"HTTP/1.1, no length":       {"HTTP/1.1", "raw", []string{"Host: h"}, raw, true},
		"HTTP/1.1, chunked":         {"HTTP/1.1", "vhd", []string{"Host: h", "Transfer-Encoding: chunked"}, chunks(image), false},
		"HTTP/1.1, chunked raw":     {"HTTP/1.1", "raw", []string{"Host: h", "Transfer-Encoding: chunked"}, chunks(raw), false},
		"unknown length, vhd":       {"HTTP/1.1", "vhd", []string{"Host: h", unknown}, image, true},
		"unknown length, raw":       {"HTTP/1.1", "raw", []string{"Host: h", unknown}, raw, true},
		"expects to be continued":   {"HTTP/1.1", "vhd", []string{"Host: h", "Expect: 100-continue", length(len(image))}, image, false},
		"length with a CRLF in it":  {"HTTP/1.0", "VHD", []string{length(len(image) + 2)}, "\r\n" + image, false},
		"private chunks":            {"HTTP/1.0", "raw&chunked", nil, string(frames(piece{data: contents[:mib]}, piece{off: mib, data: contents[mib : 3*mib]}, piece{})), false},
		"private chunks, in chunks": {"HTTP/1.1", "raw&chunked=1", []string{"Host: h", "Transfer-Encoding: chunked"}, chunks(string(frames(piece{data: contents[:3*mib]}, piece{}))), false},
	} {
		t.Run(name, func(t *testing.T) {
			ref, uuid := d.disk(4 * mib)
			task := d.task()
			reply := d.put(d.url("/import_raw_vdi", "task_id", task, "vdi", uuid, "format", tt.format)+" "+tt.version, tt.headers, tt.body, tt.end)
			want := "HTTP/1.1 200 OK\r\nConnection: close\r\nCache-Control: no-cache, no-store\r\ntask-id: " + task +
				"\r\ncontent-type: application/octet-stream\r\n\r\n"
			if slices.Contains(tt.headers, "Expect: 100-continue") {
				want = "HTTP/1.1 100 Continue\r\n\r\n" + want
			}
			if reply != want {
				t.Errorf("got:\n%s\nwant:\n%s", reply, want)
			}
			if o := d.settled(task); !slices.Equal(o, []string{"success", "<value>" + ref + "</value>"}) {
				t.Fatalf("task says %q", o)
			}
			if !bytes.Equal(d.download(ref, "raw", ""), contents) {
				t.Error("wrong contents")
			}
		})
	}
}

// A request that comes in pieces, and whose body follows at once.
func TestImportWithoutWaiting(t *testing.T) {
	d := newDepot(t)
	contents := random(4*mib, 1, [2]int64{0, 4 * mib})
	ref, _ := d.disk(4 * mib)
	task := d.task()
	conn := d.dial(t, "tcp")
	for _, s := range []string{"PUT " + d.url("/import_raw_vdi/", "vdi", ref, "task_id", task) + " HTTP/1.0\r\n", "Connection: close\r\n", "\r\n" + string(contents[:100]), string(contents[100:])} {
		if _, err := io.WriteString(conn, s); err != nil {
			t.Fatal(err)
		}
	}
	if err := conn.(*net.TCPConn).CloseWrite(); err != nil {
		t.Fatal(err)
	}
	if _, err := io.ReadAll(conn); err != nil {
		t.Error(err)
	}
	if o := d.settled(task); o[0] != "success" || !bytes.Equal(d.download(ref, "raw", ""), contents) {
		t.Errorf("task says %q", o)
	}
}

// A probe is answered like an import and touches nothing, not even the task
// of the import that follows at once.
func TestImportProbe(t *testing.T) {
	d := newDepot(t)
	contents := random(2*mib, 1, [2]int64{0, 2 * mib})
	ref, _ := d.filled(contents)
	for _, format := range []string{"vhd", "raw"} {
		probe := "PUT " + d.url("/import_raw_vdi/", "format", format, "vdi", ref) + " HTTP/1.1\r\nHost: h\r\nContent-Length: 0\r\n\r\n"
		if got := d.send(t, "tcp", probe); !strings.HasPrefix(got, "HTTP/1.1 200 OK\r\n") {
			t.Errorf("%s: %s", format, got)
		}
		if !bytes.Equal(d.download(ref, "raw", ""), contents) {
			t.Errorf("%s: the disk has changed", format)
		}
	}
	d.upload(ref, "vhd", imageOf(t, contents, nil))
	bad := "PUT " + d.url("/import_raw_vdi/", "vdi", "OpaqueRef:none") + " HTTP/1.1\r\nHost: h\r\nContent-Length: 0\r\n\r\n"
	if got := d.send(t, "tcp", bad); !strings.HasPrefix(got, "HTTP/1.1 500 ") || !strings.Contains(got, "HANDLE_INVALID: [ VDI; OpaqueRef:none ]") {
		t.Errorf("probe of nothing: %s", got)
	}
}

// A client that does not know the length of its data announces 1 PiB already
// when it asks. That does not take the disk, and its body is taken all the same.
func TestImportProbeOfUnknownLength(t *testing.T) {
	d := newDepot(t)
	contents := random(2*mib, 1, [2]int64{0, 2 * mib})
	ref, _ := d.disk(2 * mib)
	ask := "PUT " + d.url("/import_raw_vdi/", "format", "raw", "vdi", ref) + " HTTP/1.1\r\nHost: h\r\nContent-Length: 1125899906842624\r\n\r\n"
	probe := d.dial(t, "tcp")
	if _, err := io.WriteString(probe, ask); err != nil {
		t.Fatal(err)
	}
	if got := d.untilBlank(probe); !strings.HasPrefix(got, "HTTP/1.1 200 OK\r\n") || strings.Contains(got, "task-id") {
		t.Errorf("probe: %s", got)
	}
	d.upload(ref, "raw", contents) // while the probe is still there
	if _, err := io.WriteString(probe, "more"); err != nil {
		t.Fatal(err)
	}
	if err := probe.(*net.TCPConn).CloseWrite(); err != nil {
		t.Fatal(err)
	}
	if _, err := io.ReadAll(probe); err != nil {
		t.Error(err)
	}
	if got := d.download(ref, "raw", ""); !bytes.Equal(got, append([]byte("more"), contents[4:]...)) {
		t.Error("wrong contents")
	}
	bad := "PUT " + d.url("/import_raw_vdi/", "vdi", "OpaqueRef:none") + " HTTP/1.1\r\nHost: h\r\nContent-Length: 1125899906842624\r\n\r\n"
	if got := d.send(t, "tcp", bad); !strings.HasPrefix(got, "HTTP/1.1 500 ") || !strings.Contains(got, "HANDLE_INVALID: [ VDI; OpaqueRef:none ]") {
		t.Errorf("probe of nothing: %s", got)
	}
}

func TestImportMakesDisk(t *testing.T) {
	d := newDepot(t)
	contents := random(3*mib, 1, [2]int64{0, 3 * mib})
	task := d.task()
	d.put(d.url("/import_raw_vdi", "task_id", task, "sr_id", d.sr)+" HTTP/1.0", []string{fmt.Sprintf("Content-Length: %d", len(contents))}, string(contents), false)
	o := d.settled(task)
	if len(o) != 2 || o[0] != "success" {
		t.Fatalf("task says %q", o)
	}
	ref := strings.TrimSuffix(strings.TrimPrefix(o[1], "<value>"), "</value>")
	got := d.do("VDI.get_record", d.session, ref).(map[string]any)
	if got["name_label"] != "Imported VDI" || got["type"] != "user" || fmt.Sprint(got["virtual_size"]) != "4194304" {
		t.Errorf("record is %v", got)
	}
	if !bytes.Equal(d.download(ref, "raw", ""), append(contents, make([]byte, mib)...)) {
		t.Error("wrong contents")
	}
}

// Bodies that are not what they should be fail the task and cut the
// connection. Where nothing of the body could be used the disk is unchanged.
func TestImportBadBodies(t *testing.T) {
	d := newDepot(t)
	old := random(4*mib, 1, [2]int64{0, 4 * mib})
	good := imageOf(t, random(4*mib, 2, [2]int64{0, 4 * mib}), nil)
	flipped := bytes.Clone(good)
	flipped[12] ^= 1
	for name, tt := range map[string]struct {
		format    string
		headers   []string
		body      []byte
		reason    string
		unchanged bool
	}{
		"raw as vhd":             {"vhd", nil, old, "footer cookie", true},
		"flipped bit":            {"vhd", nil, flipped, "footer checksum", true},
		"disk too small":         {"vhd", nil, imageOf(t, random(8*mib, 1, [2]int64{7 * mib, 4096}), nil), "the disk ends at 4194304", true},
		"cut vhd":                {"vhd", nil, good[:3*mib], "unexpected EOF", false},
		"cut vhd, known length":  {"vhd", []string{fmt.Sprintf("Content-Length: %d", len(good))}, good[:3*mib], "unexpected EOF", false},
		"cut raw, in chunks":     {"raw", []string{"Host: h", "Transfer-Encoding: chunked"}, []byte("100000\r\n" + string(old[:mib/2])), "body ends before its last chunk", false},
		"no last chunk":          {"raw", []string{"Host: h", "Transfer-Encoding: chunked"}, []byte("5\r\n12345\r\n"), "body ends before its last chunk", false},
		"cut raw, known length":  {"raw", []string{"Content-Length: 4194304"}, good[:mib], "body ends after 1048576 of 4194304 bytes", false},
		"raw too long":           {"raw", nil, append(bytes.Clone(old), 1), "more bytes than the disk has", true},
		"empty vhd":              {"vhd", []string{"Content-Length: 0"}, nil, "stream ends at byte 0", true},
		"chunk behind the disk":  {"raw&chunked", nil, frames(piece{off: 4 * mib, data: old[:1]}), "does not fit a disk of 4194304", true},
		"chunks without the end": {"raw&chunked", nil, frames(piece{data: old[:7]}), "unexpected EOF", true},
	} {
		t.Run(name, func(t *testing.T) {
			ref, _ := d.filled(old)
			task := d.task()
			version := " HTTP/1.0"
			if slices.Contains(tt.headers, "Host: h") {
				version = " HTTP/1.1"
			}
			d.put(d.url("/import_raw_vdi", "task_id", task, "vdi", ref, "format", tt.format)+version, tt.headers, string(tt.body), true)
			if o := d.settled(task); len(o) != 3 || o[0] != "failure" || o[1] != "VDI_IO_ERROR" || !strings.Contains(o[2], tt.reason) {
				t.Errorf("task says %q, want a VDI_IO_ERROR with %q", o, tt.reason)
			}
			if tt.unchanged && !bytes.Equal(d.download(ref, "raw", ""), old) {
				t.Error("the disk has changed")
			}
			d.upload(ref, "raw", old) // nothing is left behind: it may simply be repeated
		})
	}
}

// A part of an image, as curl -C sends the rest of a file, is not taken for the
// whole.
func TestImportPart(t *testing.T) {
	d := newDepot(t)
	contents := random(2*mib, 1, [2]int64{0, 2 * mib})
	ref, _ := d.filled(contents)
	put := func(place string) int {
		req, err := http.NewRequestWithContext(t.Context(), http.MethodPut, "http://"+d.tcp+d.url("/import_raw_vdi", "vdi", ref), strings.NewReader("new contents"))
		if err != nil {
			t.Fatal(err)
		}
		req.Header.Set("Content-Range", place)
		resp, err := http.DefaultTransport.RoundTrip(req)
		if err != nil {
			t.Fatal(err)
		}
		_ = resp.Body.Close()
		return resp.StatusCode
	}
	for _, place := range []string{"bytes 1000-1011/1012", "bytes 0-11/24", "bytes 0-11/*", "bytes */12", "nonsense"} {
		if got := put(place); got != http.StatusBadRequest {
			t.Errorf("%s: status %d", place, got)
		}
	}
	if !bytes.Equal(d.download(ref, "raw", ""), contents) {
		t.Error("the disk has changed")
	}
	if got := put("bytes 0-11/12"); got != http.StatusOK {
		t.Errorf("all of it: status %d", got)
	}
}
