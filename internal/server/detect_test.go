package server

import (
	"bytes"
	"fmt"
	"slices"
	"strings"
	"testing"

	"coppice/internal/xva"
)

// Images that come without a format are refused before a byte of them is
// written; said to be raw they are stored, as is what only resembles one.
func TestUndeclaredFormat(t *testing.T) {
	d := newDepot(t)
	source, _ := d.filled(random(2*mib, 1, [2]int64{0, 64 << 10}))
	before := random(4*mib, 2, [2]int64{0, 4 * mib})
	refused := func(format string) []string {
		return []string{"failure", "VALUE_NOT_SUPPORTED", "format", "raw", "The data is an image of the format " + format +
			", and no format was given. Give format=" + format + ", or format=raw to store the bytes of the image as they are"}
	}
	for _, format := range []string{"vhd", "qcow2", "vmdk", "tar"} {
		t.Run(format, func(t *testing.T) {
			image := readBody(t, d.fetch("GET", d.url("/export_raw_vdi", "vdi", source, "format", format)))
			vdi, _ := d.filled(before)
			for name, o := range map[string][]string{
				"plain":     d.offer(vdi, image, nil),
				"atomic":    d.offer(vdi, image, nil, "coppice-atomic", "1"),
				"resumable": d.offer(vdi, image, nil, "coppice-offset", "0"),
				"zstd":      d.offer(vdi, squeezed(t, image), []string{"Content-Encoding: zstd"}),
			} {
				if !slices.Equal(o, refused(format)) {
					t.Errorf("%s: %q", name, o)
				}
			}
			// Without a task only the connection says that it failed.
			for _, length := range []string{"1125899906842624", fmt.Sprint(len(image))} {
				reply := d.put(d.url("/import_raw_vdi", "vdi", vdi)+" HTTP/1.1", []string{"Host: h", "Content-Length: " + length}, string(image), false)
				if !strings.HasPrefix(reply, "HTTP/1.1 200 ") {
					t.Errorf("a length of %s: %q", length, reply)
				}
			}
			disks := len(d.do("VDI.get_all", d.session).([]any))
			task := d.task()
			d.put(d.url("/import_raw_vdi", "task_id", task, "sr_id", d.sr)+" HTTP/1.1", []string{"Host: h", fmt.Sprintf("Content-Length: %d", len(image))}, string(image), true)
			if o := d.settled(task); !slices.Equal(o, refused(format)) {
				t.Errorf("a new disk: %q", o)
			}
			if n := len(d.do("VDI.get_all", d.session).([]any)); n != disks {
				t.Errorf("%d disks, there were %d", n, disks)
			}
			if got := d.download(vdi, "raw", ""); !bytes.Equal(got, before) {
				t.Error("the disk was written")
			}

			d.upload(vdi, "raw", image)
			if got := d.download(vdi, "raw", ""); !bytes.Equal(got[:len(image)], image) {
				t.Error("with format=raw the image is not stored as it is")
			}
			for _, at := range []int{0, 4, len(image) - 1} {
				other := bytes.Clone(image)
				other[at] ^= 0x80
				data := other[:512]
				if at == len(image)-1 {
					data = image[:71] // less than any header
				}
				if o := d.offer(vdi, data, nil); !succeeded(o) {
					t.Errorf("data that is no image: %q", o)
				} else if got := d.download(vdi, "raw", ""); !bytes.Equal(got[:len(data)], data) {
					t.Error("data that is no image is not stored")
				}
			}
			if o := d.offer(vdi, image, nil, "format", format); !succeeded(o) {
				t.Errorf("with its format: %q", o)
			}
		})
	}
}

// What is no image is told apart as well, where nothing else begins like that.
func TestUndeclaredPacking(t *testing.T) {
	d := newDepot(t)
	before := random(4*mib, 2, [2]int64{0, 4 * mib})
	vdi, _ := d.filled(before)
	contents := random(mib, 3, [2]int64{0, 4096})
	archive := func(name string) []byte {
		b, err := xva.File(name, contents)
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	for name, tt := range map[string]struct {
		body []byte
		want string // the start of the reason; "" for none
	}{
		"gzip":           {zipped(t, string(contents)), "The data is compressed with gzip, and neither that nor a format was given. Send the header Content-Encoding: gzip, "},
		"zstd":           {squeezed(t, contents), "The data is compressed with zstd, and neither that nor a format was given. Send the header Content-Encoding: zstd, "},
		"VM":             {archive("ova.xml"), "The data is the export of a VM, and no format was given. Send it to /import, "},
		"another disk":   {archive("Ref:7/00000000"), "The data is an image of the format tar, and no format was given. Give format=tar, "},
		"another tar":    {archive("etc/passwd"), ""},
		"almost gzip":    {[]byte("\x1f\x8b\x08\x80 and more"), ""},
		"almost zstd":    {[]byte("\x28\xb5\x2f\xfd\x08 and more"), ""},
		"only the magic": {[]byte("\x1f\x8b\x08"), ""},
	} {
		o := d.offer(vdi, tt.body, nil)
		if tt.want == "" {
			if !succeeded(o) || !bytes.Equal(d.download(vdi, "raw", "")[:len(tt.body)], tt.body) {
				t.Errorf("%s: %q, or not stored", name, o)
			}
			d.upload(vdi, "raw", before)
			continue
		}
		if len(o) != 5 || !slices.Equal(o[:4], []string{"failure", "VALUE_NOT_SUPPORTED", "format", "raw"}) || !strings.HasPrefix(o[4], tt.want) {
			t.Errorf("%s: %q", name, o)
		}
		if !bytes.Equal(d.download(vdi, "raw", ""), before) {
			t.Errorf("%s: the disk was written", name)
		}
		d.upload(vdi, "raw", tt.body)
		if !bytes.Equal(d.download(vdi, "raw", "")[:len(tt.body)], tt.body) {
			t.Errorf("%s: not stored with format=raw", name)
		}
		d.upload(vdi, "raw", before)
	}
}
