package server

import (
	"bytes"
	"cmp"
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"fmt"
	"io"
	"math"
	"net/http"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"

	"coppice/internal/peertest"
)

// fetch sends a request for an export with headers.
func (d *depot) fetch(method, target string, headers ...string) *http.Response {
	d.t.Helper()
	req, err := http.NewRequestWithContext(d.t.Context(), method, "http://"+d.tcp+target, nil)
	if err != nil {
		d.t.Fatal(err)
	}
	for i := 0; i < len(headers); i += 2 {
		req.Header.Set(headers[i], headers[i+1])
	}
	transport := &http.Transport{DisableCompression: true}
	d.t.Cleanup(transport.CloseIdleConnections)
	resp, err := transport.RoundTrip(req)
	if err != nil {
		d.t.Fatal(err)
	}
	d.t.Cleanup(func() { resp.Body.Close() })
	return resp
}

func readBody(t *testing.T, r *http.Response) []byte {
	t.Helper()
	b, err := io.ReadAll(r.Body)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// Any part of an image is the same bytes as in the whole, wherever it begins
// and ends, and only what it needs is read.
func TestRanges(t *testing.T) {
	d := newDepot(t)
	ref, _ := d.filled(random(12*mib, 1, [2]int64{0, 3 * mib}, [2]int64{5*mib + 4096, 70 << 10}, [2]int64{11 * mib, mib}))
	base := d.do("VDI.snapshot", d.session, ref).(string)
	d.upload(ref, "raw", random(12*mib, 1, [2]int64{0, mib}, [2]int64{6 * mib, 4096}))
	snap := d.do("VDI.snapshot", d.session, ref).(string)
	for _, format := range []string{"raw", "vhd", "qcow2", "tar"} {
		for _, against := range []string{"", base} {
			if format == "tar" && against != "" {
				continue
			}
			t.Run(format+against, func(t *testing.T) {
				target := d.url("/export_raw_vdi", "vdi", snap, "format", format)
				if against != "" {
					target += "&base=" + against
				}
				full := d.fetch("GET", target)
				want := readBody(t, full)
				tag := full.Header.Get("ETag")
				head := d.fetch("HEAD", target)
				if n := int64(len(want)); head.ContentLength != n || full.ContentLength != n || head.Header.Get("ETag") != tag || len(readBody(t, head)) != 0 {
					t.Errorf("HEAD says %d bytes and %s, GET has %d and %s", head.ContentLength, head.Header.Get("ETag"), n, tag)
				}
				size := len(want)
				for _, r := range [][2]int{
					{0, size},
					{0, 1},
					{1, 2},
					{size - 1, size},
					{size / 2, size},
					{511, 513},
					{1536, 4096},
					{mib - 1, mib + 1},
					{min(2*mib+1000, size-1), min(4*mib, size)},
					{size - 512, size},
					{size - 513, size - 511},
					{4 << 16, 4<<16 + 5},
				} {
					resp := d.fetch("GET", target, "Range", fmt.Sprintf("bytes=%d-%d", r[0], r[1]-1), "If-Range", tag)
					got := readBody(t, resp)
					if resp.StatusCode != 206 || !bytes.Equal(got, want[r[0]:r[1]]) {
						t.Errorf("bytes %d to %d: status %d, %d bytes, wrong", r[0], r[1], resp.StatusCode, len(got))
					}
					if cr := resp.Header.Get("Content-Range"); cr != fmt.Sprintf("bytes %d-%d/%d", r[0], r[1]-1, size) {
						t.Errorf("Content-Range %s", cr)
					}
				}
			})
		}
	}
}

func TestConditions(t *testing.T) {
	d := newDepot(t)
	contents := random(2*mib, 1, [2]int64{0, 2 * mib})
	ref, _ := d.filled(contents)
	target := d.url("/export_raw_vdi", "vdi", ref)
	tag := d.fetch("HEAD", target).Header.Get("ETag")
	for name, tt := range map[string]struct {
		headers []string
		status  int
		want    []byte
	}{
		"suffix":               {[]string{"Range", "bytes=-10"}, 206, contents[2*mib-10:]},
		"suffix, too long":     {[]string{"Range", "bytes=-99999999"}, 206, contents},
		"open":                 {[]string{"Range", "bytes=2097000-"}, 206, contents[2097000:]},
		"end behind the end":   {[]string{"Range", "bytes=2097000-99999999"}, 206, contents[2097000:]},
		"two ranges":           {[]string{"Range", "bytes=0-1,4-5"}, 200, contents},
		"other unit":           {[]string{"Range", "lines=1-2"}, 200, contents},
		"backwards":            {[]string{"Range", "bytes=5-4"}, 200, contents},
		"not a number":         {[]string{"Range", "bytes=x-"}, 200, contents},
		"behind the end":       {[]string{"Range", "bytes=2097152-"}, 416, nil},
		"nothing":              {[]string{"Range", "bytes=-0"}, 416, nil},
		"changed since":        {[]string{"Range", "bytes=0-9", "If-Range", `"other"`}, 200, contents},
		"not changed since":    {[]string{"Range", "bytes=0-9", "If-Range", tag}, 206, contents[:10]},
		"must match":           {[]string{"If-Match", `"other"`}, 412, nil},
		"matches":              {[]string{"If-Match", `"other", ` + tag}, 200, contents},
		"have it already":      {[]string{"If-None-Match", tag}, 304, []byte{}},
		"have it, weakly":      {[]string{"If-None-Match", "W/" + tag}, 304, []byte{}},
		"have another version": {[]string{"If-None-Match", `"other"`}, 200, contents},
	} {
		t.Run(name, func(t *testing.T) {
			task := d.task()
			resp := d.fetch("GET", target+"&task_id="+task, tt.headers...)
			got := readBody(t, resp)
			if resp.StatusCode != tt.status || tt.want != nil && !bytes.Equal(got, tt.want) {
				t.Errorf("status %d, %d bytes; want %d, %d", resp.StatusCode, len(got), tt.status, len(tt.want))
			}
			o := d.settled(task)
			if failed := o[0] == "failure"; failed != (tt.status > 400) {
				t.Errorf("task says %q", o)
			}
			if failed := len(o) > 1 && o[0] == "failure"; failed && o[1] != "INVALID_VALUE" {
				t.Errorf("the task failed with %q, which is not the client's fault", o)
			}
			want := map[int]int{206: 200, 416: 200}[tt.status]
			if head := d.fetch("HEAD", target, tt.headers...); head.StatusCode != cmp.Or(want, tt.status) ||
				want != 0 && (head.ContentLength != int64(len(contents)) || head.Header.Get("Content-Range") != "") {
				t.Errorf("HEAD: status %d, %d bytes, Content-Range %q", head.StatusCode, head.ContentLength, head.Header.Get("Content-Range"))
			}
			if tt.status == 416 && resp.Header.Get("Content-Range") != "bytes */2097152" {
				t.Errorf("Content-Range %q", resp.Header.Get("Content-Range"))
			}
			if tt.status == 200 || tt.status == 206 {
				config := d.do("task.get_other_config", d.session, task).(map[string]any)
				if sum := sha256.Sum256(got); config[sha256Key] != hex.EncodeToString(sum[:]) {
					t.Errorf("task says that the SHA-256 is %v", config[sha256Key])
				}
			}
		})
	}
	before := tag
	d.upload(ref, "raw", []byte("changed"))
	if after := d.fetch("HEAD", target).Header.Get("ETag"); after == before {
		t.Error("a disk that was written keeps its entity tag")
	}
}

// What curl makes of an interrupted download.
func TestCurlResumes(t *testing.T) {
	curl := peertest.Tool(t, "curl", "curl")
	d := newDepot(t)
	ref, _ := d.filled(random(9*mib, 1, [2]int64{0, 5 * mib}))
	for _, format := range []string{"raw", "vhd", "qcow2", "tar"} {
		want := d.download(ref, format, "")
		file := filepath.Join(t.TempDir(), "disk")
		for _, have := range []int{1, 700, 3*mib + 5, len(want) - 1} {
			putFile(t, file, want[:have])
			target := "http://" + d.tcp + d.url("/export_raw_vdi", "vdi", ref, "format", format)
			if out, err := exec.Command(curl, "-sSf", "-C", "-", "-o", file, target).CombinedOutput(); err != nil {
				t.Fatalf("%v\n%s", err, out)
			}
			if !bytes.Equal(getFile(t, file), want) {
				t.Errorf("%s, resumed at %d: another file", format, have)
			}
		}
	}
}

func TestContentEncoding(t *testing.T) {
	d := newDepot(t)
	contents := random(8*mib, 1, [2]int64{0, 2 * mib}, [2]int64{5 * mib, 1000})
	ref, _ := d.filled(contents)
	for _, tt := range []struct{ accept, agent, want string }{
		{"zstd", "", "zstd"},
		{"gzip", "", "gzip"},
		{"gzip, deflate, br, zstd", "", ""},
		{"gzip, deflate", "python-requests/2.32", ""},
		{"zstd;q=0.5, identity;q=0.1, gzip;q=0", "", "zstd"},
		{"zstd;q=0", "", ""},
		{"br", "", ""},
		{"gzip", "Go-http-client/1.1", ""},
	} {
		t.Run(tt.accept+tt.agent, func(t *testing.T) {
			task := d.task()
			resp := d.fetch("GET", d.url("/export_raw_vdi", "vdi", ref, "task_id", task), "Accept-Encoding", tt.accept, "User-Agent", tt.agent)
			sent := readBody(t, resp)
			if got := resp.Header.Get("Content-Encoding"); got != tt.want {
				t.Fatalf("Content-Encoding %q, want %q", got, tt.want)
			}
			sum := sha256.Sum256(sent)
			if tt.want != "" {
				if resp.Header.Get("Accept-Ranges") != "none" || resp.ContentLength >= 0 {
					t.Errorf("Accept-Ranges %q, length %d", resp.Header.Get("Accept-Ranges"), resp.ContentLength)
				}
				if got, want := resp.Trailer.Get("Content-Digest"), "sha-256=:"+base64.StdEncoding.EncodeToString(sum[:])+":"; got != want {
					t.Errorf("trailer says %q, want %q", got, want)
				}
			}
			if o := d.settled(task); o[0] != "success" {
				t.Errorf("task says %q", o)
			}
			config := d.do("task.get_other_config", d.session, task).(map[string]any)
			if config[sha256Key] != hex.EncodeToString(sum[:]) {
				t.Errorf("task says that the SHA-256 is %v", config[sha256Key])
			}
			var plain []byte
			var err error
			switch tt.want {
			case "zstd":
				var z *zstd.Decoder
				if z, err = zstd.NewReader(nil); err == nil {
					plain, err = z.DecodeAll(sent, nil)
					z.Close()
				}
			case "gzip":
				var z *gzip.Reader
				if z, err = gzip.NewReader(bytes.NewReader(sent)); err == nil {
					plain, err = io.ReadAll(z)
				}
			default:
				plain = sent
			}
			if err != nil || !bytes.Equal(plain, contents) {
				t.Errorf("%d bytes, %v: not the disk", len(plain), err)
			}
		})
	}
	old := d.send(t, "tcp", "GET "+d.url("/export_raw_vdi", "vdi", ref)+" HTTP/1.0\r\nAccept-Encoding: gzip\r\n\r\n")
	_, sent, _ := strings.Cut(old, "\r\n\r\n")
	z, err := gzip.NewReader(strings.NewReader(sent))
	if err != nil {
		t.Fatal(err)
	}
	if plain, err := io.ReadAll(z); err != nil || !bytes.Equal(plain, contents) || strings.Contains(old, "chunked") {
		t.Errorf("HTTP/1.0: %d bytes, %v", len(plain), err)
	}
}

// The head of a delta says what it is, before anything of it is read.
func TestDeltaHeaders(t *testing.T) {
	d := newDepot(t)
	contents := random(8*mib, 1, [2]int64{0, 8 * mib})
	ref, uuid := d.filled(contents)
	base := d.do("VDI.snapshot", d.session, ref).(string)
	copy(contents[3*mib:], "changed")
	clear(contents[5*mib : 5*mib+8192])
	d.upload(ref, "raw", contents)
	for _, format := range []string{"raw", "vhd", "qcow2"} {
		h := d.fetch("HEAD", d.url("/export_raw_vdi", "vdi", ref, "format", format, "base", base)).Header
		for name, want := range map[string]string{
			"Coppice-Basis": "exact", "Coppice-Changed-Bytes": strconv.Itoa(3 * 4096), "Coppice-Virtual-Size": strconv.Itoa(8 * mib),
			"Content-Disposition": `attachment; filename="` + uuid + "." + format + `"`, "Accept-Ranges": "bytes",
		} {
			if h.Get(name) != want {
				t.Errorf("%s: %s is %q, want %q", format, name, h.Get(name), want)
			}
		}
	}
}

func TestParseRange(t *testing.T) {
	for spec, want := range map[string][2]int64{
		"bytes=0-0": {0, 1}, "bytes=5-": {5, 100}, "bytes=-5": {95, 100}, "bytes=99-200": {99, 100}, "bytes= 1-2": {1, 3},
		"Bytes=0-0": {0, 1}, "bytes=-0": {100, 100}, "bytes=-200": {0, 100}, "bytes=7-99999999999999999999": {7, 100}, "bytes=-99999999999999999999": {0, 100},
		"bytes=99999999999999999999-": {math.MaxInt64, 100},
	} {
		if from, to, ok := parseRange(spec, 100); !ok || from != want[0] || to != want[1] {
			t.Errorf("%q: %d, %d, %v", spec, from, to, ok)
		}
	}
	for _, spec := range []string{"", "bytes", "bytes=", "bytes=-", "bytes=--1", "bytes=1-0", "bytes=1,2", "bytes=1-2-3", "bytes=+1-2", "items=1-2"} {
		if _, _, ok := parseRange(spec, 100); ok {
			t.Errorf("%q is a range", spec)
		}
	}
}

// Lists of tags may stand on several lines.
func TestConditionLines(t *testing.T) {
	for _, name := range []string{"If-Match", "If-None-Match"} {
		r, err := http.NewRequestWithContext(t.Context(), http.MethodGet, "/", nil)
		if err != nil {
			t.Fatal(err)
		}
		r.Header[name] = []string{`"a", "b"`, `"c"`}
		p, err := choosePart(r, `"c"`, 100)
		if want := map[string]int{"If-Match": http.StatusOK, "If-None-Match": http.StatusNotModified}[name]; err != nil || p.status != want {
			t.Errorf("%s: status %d, %v; want %d", name, p.status, err, want)
		}
	}
}
