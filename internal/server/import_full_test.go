package server

import (
	"bytes"
	"errors"
	"testing"

	"coppice/internal/rpc"
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

// A disk that moves to an SR without room for it stays where and what it is, and
// nothing of it is left there.
func TestMigrateFull(t *testing.T) {
	const size = 12 * mib
	contents := random(size, 1, [2]int64{0, size})
	r := newFaultRig(t, &faultHost{capacity: 24 << 20, options: smallRegions()})
	d := &depot{fixture: r.fixture, t: t, session: r.session, sr: r.defaultSR()}
	ref, _ := d.disk(size)
	d.upload(ref, "raw", contents)
	none := map[string]any{}
	r.must("VBD.create", map[string]any{
		"VM": r.must("VM.clone", r.must("VM.get_by_name_label", "Other install media").([]any)[0], "guest"), "VDI": ref, "userdevice": "0",
		"bootable": false, "mode": "RW", "type": "Disk", "unpluggable": true, "empty": false, "other_config": none,
		"qos_algorithm_type": "", "qos_algorithm_params": none,
	})
	host := d.do("host.get_all", d.session).([]any)[0]
	second := d.do("SR.create", d.session, host, none, 0, "second", "", "cow", "user", false, none).(string)
	there := &depot{fixture: r.fixture, t: t, session: r.session, sr: second}
	other, _ := there.disk(size)
	there.upload(other, "raw", contents[:10*mib])

	for range 2 {
		_, err := d.call("VDI.pool_migrate", d.session, ref, second, none)
		if f, ok := errors.AsType[*rpc.Fault](err); !ok || f.Code != "SR_BACKEND_FAILURE_44" {
			t.Fatalf("to a full SR: %v", err)
		}
	}
	if got := d.do("VDI.get_SR", d.session, ref); got != d.sr {
		t.Errorf("the disk is in SR %v", got)
	}
	if got := d.download(ref, "raw", ""); !bytes.Equal(got, contents) {
		t.Error("the disk has other contents")
	}
	if got := d.do("SR.get_VDIs", d.session, second).([]any); len(got) != 1 || got[0] != other {
		t.Errorf("the full SR has the disks %v", got)
	}
	there.upload(other, "raw", contents) // its room has come back
	d.do("VDI.destroy", d.session, other)
	if _, err := d.call("VDI.pool_migrate", d.session, ref, second, none); err != nil {
		t.Errorf("with room: %v", err)
	}
	r.close()
	r.host.check(t)
}
