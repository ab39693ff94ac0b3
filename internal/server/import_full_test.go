package server

import (
	"bytes"
	"testing"
)

// An import for which the SR has no room ends with that, in every format, and
// leaves a store that is sound and a disk that can be read and filled again.
func TestImportFull(t *testing.T) {
	const size = 12 * mib
	contents := random(size, 1, [2]int64{0, size})
	from := newDepot(t)
	source, _ := from.filled(contents)
	images := map[string][]byte{}
	for _, format := range []string{"raw", "vhd", "qcow2", "tar"} {
		images[format] = from.download(source, format, "")
	}
	images["vmdk"] = readBody(t, from.fetch("GET", from.url("/export_raw_vdi", "vdi", source, "format", "vmdk")))

	r := newFaultRig(t, &faultHost{capacity: 14 << 20, options: smallRegions()})
	d := &depot{fixture: r.fixture, t: t, session: r.session, sr: r.defaultSR()}
	before := contents[:2*mib]
	for format, image := range images {
		modes := []string{"0"}
		if format == "raw" {
			modes = append(modes, "1")
		}
		for _, atomic := range modes {
			ref, _ := d.disk(size)
			d.upload(ref, "raw", before)
			if o := d.offer(ref, image, nil, "format", format, atomicParam, atomic); o[0] != "failure" || o[1] != "SR_BACKEND_FAILURE_44" {
				t.Errorf("%s, atomic %s: %q", format, atomic, o)
			}
			task := d.task()
			resp := d.fetch("GET", d.url("/export_raw_vdi", "vdi", ref, "task_id", task), "Range", "bytes=0-2097151")
			if got := readBody(t, resp); !bytes.Equal(got, before) {
				t.Errorf("%s, atomic %s: the disk does not begin as it did", format, atomic)
			}
			if o := d.settled(task); o[0] != "success" { // until then it keeps what it reads
				t.Errorf("%s, atomic %s: export: %q", format, atomic, o)
			}
			d.do("VDI.destroy", d.session, ref)
		}
	}
	ref, _ := d.disk(size)
	d.upload(ref, "raw", contents[:5*mib])
	if got := len(d.do("VDI.get_all", d.session).([]any)); got != 1 {
		t.Errorf("%d disks, want 1", got)
	}
	r.close()
	r.host.check(t)
}
