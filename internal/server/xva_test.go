package server

import (
	"bytes"
	"fmt"
	"io"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"coppice/internal/rpc"
	"coppice/internal/xapi"
)

// yard is a server with a VM: an empty CD drive as 0, two disks as 1 and 2, a
// network card and, of an earlier state, a snapshot.
type yard struct {
	*depot
	vm, snapshot string
	network      string
	disks        []string
	contents     [][]byte // of the disks
}

func newYard(t *testing.T) *yard {
	t.Helper()
	y := &yard{depot: newDepot(t)}
	y.contents = [][]byte{
		random(3*mib+4096, 1, [2]int64{mib, mib + 1000}),
		random(2*mib, 2, [2]int64{0, 2 * mib}),
	}
	none := map[string]any{}
	args := map[string]any{"name_label": "guest"}
	for _, f := range xapi.ClassOf[xapi.VM]().Fields {
		if _, given := args[f.Name]; given || f.HasDefault || f.Qualifier == xapi.DynamicRO {
			continue
		}
		args[f.Name] = map[xapi.Kind]any{
			xapi.KindInt: int64(1), xapi.KindBool: false, xapi.KindMap: none, xapi.KindRef: xapi.NullRef, xapi.KindString: "",
		}[f.Type.Kind]
		if f.Type.Kind == xapi.KindEnum {
			args[f.Name] = f.Type.Values()[0]
		}
	}
	y.vm = y.do("VM.create", y.session, args).(string)
	y.do("VM.set_name_description", y.session, y.vm, "serves <pages> & more")
	y.do("VM.set_tags", y.session, y.vm, []string{"one", "two"})
	y.do("VM.add_to_other_config", y.session, y.vm, "remark", "OpaqueRef:none")
	y.do("VM.set_platform", y.session, y.vm, map[string]any{"nx": "true"})
	vbd := map[string]any{
		"VM": y.vm, "VDI": xapi.NullRef, "userdevice": "0", "bootable": false, "mode": "RO", "type": "CD", "unpluggable": true, "empty": true,
		"other_config": none, "qos_algorithm_type": "", "qos_algorithm_params": none,
	}
	y.do("VBD.create", y.session, vbd)
	for i, c := range y.contents {
		ref, _ := y.filled(c)
		y.do("VDI.set_name_label", y.session, ref, fmt.Sprintf("disk %d", i))
		y.do("VDI.add_to_other_config", y.session, ref, "n", fmt.Sprint(i))
		y.disks = append(y.disks, ref)
		vbd["VDI"], vbd["userdevice"], vbd["mode"], vbd["type"], vbd["empty"] = ref, fmt.Sprint(i+1), "RW", "Disk", false
		vbd["other_config"] = map[string]any{"owner": ""}
		y.do("VBD.create", y.session, vbd)
	}
	y.network = y.do("network.create", y.session, map[string]any{"name_label": "net", "other_config": none}).(string)
	y.do("VIF.create", y.session, map[string]any{
		"VM": y.vm, "network": y.network, "device": "0", "MAC": "02:00:00:00:00:09", "MTU": int64(1500), "other_config": none,
		"qos_algorithm_type": "", "qos_algorithm_params": none,
	})
	y.snapshot = y.do("VM.snapshot", y.session, y.vm, "before", []string{}).(string)
	y.contents[0] = bytes.Clone(y.contents[0])
	copy(y.contents[0][2*mib:], "written after the snapshot")
	y.upload(y.disks[0], "raw", y.contents[0])
	return y
}

// archive is the body of an export that succeeds.
func (y *yard) archive(path string, args ...string) []byte {
	y.t.Helper()
	task := y.task()
	resp := y.fetch(http.MethodGet, y.url(path, append([]string{"task_id", task}, args...)...))
	body := readBody(y.t, resp)
	if resp.StatusCode != http.StatusOK || resp.ContentLength >= 0 && resp.ContentLength != int64(len(body)) {
		y.t.Fatalf("export: %s, %d bytes: %.500s", resp.Status, len(body), body)
	}
	if o := y.settled(task); o[0] != "success" {
		y.t.Fatalf("export: task says %q", o)
	}
	return body
}

// bring sends an archive and returns what the task says.
func (y *yard) bring(path string, body []byte, args ...string) []string {
	y.t.Helper()
	task := y.task()
	y.put(y.url(path, append([]string{"task_id", task}, args...)...)+" HTTP/1.1",
		[]string{"Host: h", fmt.Sprintf("Content-Length: %d", len(body))}, string(body), true)
	return y.settled(task)
}

// brought is bring for what succeeds: the VMs.
func (y *yard) brought(path string, body []byte, args ...string) (vms []string) {
	y.t.Helper()
	o := y.bring(path, body, args...)
	if len(o) != 2 || o[0] != "success" {
		y.t.Fatalf("import: task says %q", o)
	}
	x := rpc.NewXMLReader(strings.NewReader(o[1]), rpc.MaxValues)
	for range x.Elements() {
		vms = append(vms, x.Value().(string))
	}
	if err := x.End(); err != nil {
		y.t.Fatal(err)
	}
	return vms
}

func (y *yard) record(class, ref string) map[string]any {
	y.t.Helper()
	return y.do(class+".get_record", y.session, ref).(map[string]any)
}

// fields is what must be equal of two objects.
func fields(rec map[string]any, names ...string) map[string]any {
	out := map[string]any{}
	for _, n := range names {
		out[n] = rec[n]
	}
	return out
}

// shape describes a VM with what hangs on it, but for identities.
func (y *yard) shape(vm string) map[string]any {
	y.t.Helper()
	rec := y.record("VM", vm)
	delete(rec["other_config"].(map[string]any), "mac_seed")
	out := fields(rec, "name_label", "name_description", "tags", "platform", "other_config", "is_a_template", "is_a_snapshot",
		"power_state", "memory_static_max", "VCPUs_max", "HVM_boot_params", "actions_after_crash")
	for _, b := range rec["VBDs"].([]any) {
		vbd := y.record("VBD", b.(string))
		part := fields(vbd, "type", "mode", "empty", "bootable", "unpluggable", "other_config")
		if vdi := vbd["VDI"].(string); vdi != xapi.NullRef {
			part["VDI"] = fields(y.record("VDI", vdi), "name_label", "virtual_size", "type", "other_config", "is_a_snapshot", "sharable")
			part["contents"] = string(y.download(vdi, "raw", ""))
		}
		out["VBD "+vbd["userdevice"].(string)] = part
	}
	for _, v := range rec["VIFs"].([]any) {
		vif := y.record("VIF", v.(string))
		out["VIF "+vif["device"].(string)] = fields(vif, "network", "MTU", "locking_mode")
	}
	return out
}

// population is everything that an import could leave behind. A scan finds
// volumes without records.
func (y *yard) population() map[string][]any {
	y.t.Helper()
	y.do("SR.scan", y.session, y.sr)
	out := map[string][]any{}
	for _, class := range []string{"VM", "VBD", "VIF", "VDI", "network", "VM_metrics"} {
		all := y.do(class+".get_all", y.session).([]any)
		slices.SortFunc(all, func(a, b any) int { return strings.Compare(a.(string), b.(string)) })
		out[class] = all
	}
	return out
}

func TestXVARoundTrip(t *testing.T) {
	y := newYard(t)
	want := y.shape(y.vm)
	uuid := y.record("VM", y.vm)["uuid"].(string)
	for _, compression := range []string{"false", "true", "gzip", "zstd"} {
		body := y.archive("/export", "uuid", uuid, "use_compression", compression)
		start := map[string]string{"false": "ova.xml", "true": "\x1f\x8b", "gzip": "\x1f\x8b", "zstd": "\x28\xb5\x2f\xfd"}[compression]
		if !strings.HasPrefix(string(body), start) {
			t.Fatalf("%s: begins with %q", compression, body[:8])
		}
		vms := y.brought("/import/", body, "sr_id", y.sr)
		if len(vms) != 1 || vms[0] == y.vm {
			t.Fatalf("%s: VMs %q", compression, vms)
		}
		if diff := cmp.Diff(want, y.shape(vms[0])); diff != "" {
			t.Errorf("%s: the VM differs (-exported +imported):\n%s", compression, diff)
		}
		rec := y.record("VM", vms[0])
		if rec["uuid"] == uuid || len(rec["snapshots"].([]any)) != 0 {
			t.Errorf("%s: uuid %v, snapshots %v", compression, rec["uuid"], rec["snapshots"])
		}
		vif := y.record("VIF", rec["VIFs"].([]any)[0].(string))
		if vif["MAC"] == "02:00:00:00:00:09" {
			t.Errorf("%s: the MAC is that of the original", compression)
		}
	}
	if again := y.archive("/export", "ref", y.vm); !bytes.Equal(again, y.archive("/export", "ref", y.vm)) {
		t.Error("two exports of the same VM have other bytes")
	}
}

// With its snapshots a VM comes back with its snapshots.
func TestXVAWithSnapshots(t *testing.T) {
	y := newYard(t)
	want, old := y.shape(y.vm), y.shape(y.snapshot)
	was := y.record("VM", y.snapshot)
	body := y.archive("/export", "ref", y.vm, "export_snapshots", "true")
	vms := y.brought("/import", body)
	if len(vms) != 1 {
		t.Fatalf("VMs %q", vms)
	}
	rec := y.record("VM", vms[0])
	snapshots := rec["snapshots"].([]any)
	if len(snapshots) != 1 || rec["parent"] != snapshots[0] {
		t.Fatalf("snapshots %v, parent %v", snapshots, rec["parent"])
	}
	if diff := cmp.Diff(want, y.shape(vms[0])); diff != "" {
		t.Errorf("VM (-exported +imported):\n%s", diff)
	}
	snapshot := snapshots[0].(string)
	if diff := cmp.Diff(old, y.shape(snapshot)); diff != "" {
		t.Errorf("snapshot (-exported +imported):\n%s", diff)
	}
	is := y.record("VM", snapshot)
	if diff := cmp.Diff(fields(was, "snapshot_time", "snapshot_info", "snapshot_metadata"), fields(is, "snapshot_time", "snapshot_info", "snapshot_metadata")); diff != "" {
		t.Errorf("snapshot (-exported +imported):\n%s", diff)
	}
	y.do("VM.revert", y.session, snapshot)
	if !bytes.Equal(y.download(y.vdi(vms[0], "1"), "raw", ""), y.download(y.vdi(y.snapshot, "1"), "raw", "")) {
		t.Error("a revert to the imported snapshot brings something else back")
	}
}

// vdi is the disk of a VM on a device.
func (y *yard) vdi(vm, device string) string {
	y.t.Helper()
	for _, b := range y.record("VM", vm)["VBDs"].([]any) {
		if vbd := y.record("VBD", b.(string)); vbd["userdevice"] == device {
			return vbd["VDI"].(string)
		}
	}
	y.t.Fatalf("no disk %s of VM %s", device, vm)
	return ""
}

// unshared is how much of a disk it does not share with a base.
func (y *yard) unshared(vdi, base string) int64 {
	y.t.Helper()
	head := y.fetch(http.MethodHead, y.url("/export_raw_vdi", "vdi", vdi, "base", base, "format", "raw"))
	n, err := strconv.ParseInt(head.Header.Get("Coppice-Changed-Bytes"), 10, 64)
	if err != nil {
		y.t.Fatal(err)
	}
	return n
}

// Disks and their snapshots that come in one archive share what they have in
// common, as the exported ones do, also where one of them is longer, or zero
// where the other has data.
func TestXVAShares(t *testing.T) {
	y := newYard(t)
	// A second snapshot, in the middle of two states; the archive leaves chunks
	// of zeros out.
	y.do("VDI.resize", y.session, y.disks[1], int64(6*mib))
	middle := make([]byte, 6*mib)
	copy(middle[mib:], y.contents[1][mib:])
	copy(middle[5*mib:], "behind the old end")
	y.upload(y.disks[1], "raw", middle)
	y.do("VM.snapshot", y.session, y.vm, "middle", []string{})
	last := bytes.Clone(middle)
	clear(last[5*mib:])
	copy(last[4*mib:], "another")
	y.upload(y.disks[1], "raw", last)

	imported := y.brought("/import", y.archive("/export", "ref", y.vm, "export_snapshots", "true"))[0]
	named := func(vm string) map[string]string {
		all := map[string]string{"": vm}
		for _, s := range y.record("VM", vm)["snapshots"].([]any) {
			all[y.record("VM", s.(string))["name_label"].(string)] = s.(string)
		}
		return all
	}
	from, to := named(y.vm), named(imported)
	for _, device := range []string{"1", "2"} {
		for name, vm := range from {
			if !bytes.Equal(y.download(y.vdi(vm, device), "raw", ""), y.download(y.vdi(to[name], device), "raw", "")) {
				t.Errorf("disk %s of %q is not what it was", device, name)
			}
			for base, other := range from {
				// Snapshots of one second are as near as each other: then what is
				// alike in two may have come to each for itself.
				most := y.unshared(y.vdi(vm, device), y.vdi(other, device)) + 64<<10
				if got := y.unshared(y.vdi(to[name], device), y.vdi(to[base], device)); got > most {
					t.Errorf("disk %s of %q shares all but %d bytes with that of %q, of the exported ones all but %d", device, name, got, base, most)
				}
			}
		}
	}
}

// A snapshot that is exported for itself comes back as a template; with
// restore a VM that is gone comes back as itself.
func TestXVARestore(t *testing.T) {
	y := newYard(t)
	vms := y.brought("/import", y.archive("/export", "ref", y.snapshot))
	if rec := y.record("VM", vms[0]); rec["is_a_snapshot"] != false || rec["is_a_template"] != true || rec["snapshot_of"] != xapi.NullRef {
		t.Errorf("of a snapshot: %v", rec)
	}
	uuid, body := y.record("VM", y.vm)["uuid"], y.archive("/export", "ref", y.vm)
	y.do("VM.destroy", y.session, y.vm)
	rec := y.record("VM", y.brought("/import", body, "restore", "true")[0])
	vif := y.record("VIF", rec["VIFs"].([]any)[0].(string))
	if rec["uuid"] != uuid || vif["MAC"] != "02:00:00:00:00:09" {
		t.Errorf("uuid %v, MAC %v", rec["uuid"], vif["MAC"])
	}
}

// Any part of an archive can be had, under its entity tag.
func TestXVARange(t *testing.T) {
	y := newYard(t)
	whole := y.archive("/export", "ref", y.vm)
	resp := y.fetch(http.MethodGet, y.url("/export", "ref", y.vm))
	tag := resp.Header.Get("ETag")
	readBody(t, resp)
	for _, from := range []int{0, 511, 512, len(whole) / 2, len(whole) - 1024, len(whole) - 1} {
		to := min(len(whole), from+mib+7)
		resp := y.fetch(http.MethodGet, y.url("/export", "ref", y.vm), "Range", fmt.Sprintf("bytes=%d-%d", from, to-1), "If-Range", tag)
		if got := readBody(t, resp); resp.StatusCode != http.StatusPartialContent || !bytes.Equal(got, whole[from:to]) {
			t.Errorf("from %d: %s, %d bytes", from, resp.Status, len(got))
		}
	}
	resp = y.fetch(http.MethodGet, y.url("/export", "ref", y.vm), "Range", "bytes="+strconv.Itoa(len(whole))+"-")
	if resp.StatusCode != http.StatusRequestedRangeNotSatisfiable {
		t.Errorf("behind the end: %s", resp.Status)
	}
	resp = y.fetch(http.MethodGet, y.url("/export", "ref", y.vm), "If-None-Match", tag)
	if resp.StatusCode != http.StatusNotModified {
		t.Errorf("unchanged: %s", resp.Status)
	}
}

// A HEAD has the head of a GET, no body, and leaves the client's task alone.
func TestXVAHead(t *testing.T) {
	y := newYard(t)
	for _, c := range []struct {
		path, query string
		length      bool
	}{{"/export", "", true}, {"/export_metadata", "", true}, {"/export", "zstd", false}} {
		args := []string{"ref", y.vm}
		if c.query != "" {
			args = append(args, "use_compression", c.query)
		}
		task := y.task()
		head := y.fetch(http.MethodHead, y.url(c.path, append(args, "task_id", task)...))
		body := readBody(t, head)
		if o := y.outcome(task); o[0] != "pending" {
			t.Errorf("%s: the task says %q", c.path, o)
		}
		full := y.fetch(http.MethodGet, y.url(c.path, args...))
		want := readBody(t, full)
		if head.StatusCode != http.StatusOK || len(body) > 0 || c.length && head.ContentLength != int64(len(want)) {
			t.Errorf("%s %s: %s, %d bytes of body, length %d, want %d", c.path, c.query, head.Status, len(body), head.ContentLength, len(want))
		}
		for _, h := range []string{"ETag", "Accept-Ranges", "Content-Length", "Content-Disposition"} {
			if head.Header.Get(h) != full.Header.Get(h) {
				t.Errorf("%s %s: %s is %q of HEAD, %q of GET", c.path, c.query, h, head.Header.Get(h), full.Header.Get(h))
			}
		}
	}
	if resp := y.fetch(http.MethodHead, y.url("/export", "uuid", "none")); resp.StatusCode != http.StatusInternalServerError {
		t.Errorf("no such VM: %s", resp.Status)
	}
}

// A cancelled import leaves nothing; a probe does nothing.
func TestXVACancelAndProbe(t *testing.T) {
	y := newYard(t)
	whole := y.archive("/export", "ref", y.vm)
	before := y.population()
	task := y.task()
	conn := y.dial(t, "tcp")
	fmt.Fprintf(conn, "PUT %s HTTP/1.1\r\nHost: h\r\nContent-Length: %d\r\n\r\n", y.url("/import", "task_id", task), len(whole))
	y.untilBlank(conn)
	if _, err := conn.Write(whole[:len(whole)/2]); err != nil {
		t.Fatal(err)
	}
	y.do("task.cancel", y.session, task)
	if o := y.settled(task); o[0] != "cancelled" {
		t.Errorf("cancelled: %q", o)
	}
	_, _ = io.Copy(io.Discard, conn)
	reply := y.send(t, "tcp", "PUT "+y.url("/import/", "sr_id", y.sr)+" HTTP/1.1\r\nHost: h\r\nContent-Length: 0\r\n\r\n")
	if !strings.HasPrefix(reply, "HTTP/1.1 200 OK\r\n") {
		t.Errorf("probe: %s", reply)
	}
	if diff := cmp.Diff(before, y.population()); diff != "" {
		t.Errorf("left behind: %s", diff)
	}
	running := y.fetch(http.MethodGet, y.url("/export", "ref", "OpaqueRef:x", "task_id", y.task()))
	if running.StatusCode != http.StatusInternalServerError {
		t.Errorf("no such VM: %s", running.Status)
	}
}

// Records travel alone, too: the disks are those that are here.
func TestXVAMetadata(t *testing.T) {
	y := newYard(t)
	uuid := y.record("VM", y.vm)["uuid"].(string)
	body := y.archive("/export_metadata", "uuid", uuid)
	if all := unpack(t, body); len(all) != 1 || all[0].Name != "ova.xml" || !bytes.Contains(all[0].data, []byte("before")) {
		t.Fatalf("%d files", len(all))
	}
	if all := unpack(t, y.archive("/export_metadata", "all", "true", "excluded_device_types", "vif,vbd")); bytes.Contains(all[0].data, []byte("<value>VBD</value>")) {
		t.Error("VBDs in spite of excluded_device_types")
	}
	before := y.population()
	if vms := y.brought("/import_metadata", body, "dry_run", "true"); len(vms) != 0 {
		t.Errorf("dry run: %q", vms)
	}
	if diff := cmp.Diff(before, y.population()); diff != "" {
		t.Errorf("left behind: %s", diff)
	}
	if o := y.bring("/import_metadata", body, "dry_run", "true", "restore", "true"); len(o) < 2 || o[1] != "VM_TO_IMPORT_IS_NOT_NEWER_VERSION" {
		t.Errorf("dry run of what cannot be: %q", o)
	}
	whole := y.archive("/export", "ref", y.vm)
	want := []string{"failure", "IMPORT_ERROR_UNEXPECTED_FILE", "the end of an archive of metadata alone; /import takes disks as well", unpack(t, whole)[1].Name}
	if o := y.bring("/import_metadata", whole); !slices.Equal(o, want) {
		t.Errorf("with disks: %q, want %q", o, want)
	}
	got := y.record("VM", y.brought("/import_metadata", body)[0])
	if len(got["snapshots"].([]any)) != 1 {
		t.Errorf("snapshots %v", got["snapshots"])
	}
	vdis := func(rec map[string]any) map[string]any {
		out := map[string]any{}
		for _, b := range rec["VBDs"].([]any) {
			vbd := y.record("VBD", b.(string))
			out[vbd["userdevice"].(string)] = vbd["VDI"]
		}
		return out
	}
	if diff := cmp.Diff(vdis(y.record("VM", y.vm)), vdis(got)); diff != "" {
		t.Errorf("disks (-exported +imported): %s", diff)
	}
	// A disk that is gone, and one that stands for it.
	other, otherUUID := y.disk(mib)
	_, goneUUID := y.disks[1], y.record("VDI", y.disks[1])["uuid"].(string)
	body = bytes.ReplaceAll(body, []byte(goneUUID), []byte("00000000-0000-0000-0000-00000000dead"))
	if o := y.bring("/import_metadata", body); len(o) < 2 || o[1] != "IMPORT_ERROR_ATTACHED_DISKS_NOT_FOUND" {
		t.Errorf("a disk is gone: %q", o)
	}
	if n := len(y.record("VM", y.brought("/import_metadata", body, "force", "true")[0])["VBDs"].([]any)); n != 2 {
		t.Errorf("forced: %d VBDs", n)
	}
	got = y.record("VM", y.brought("/import_metadata", body, "vdi:00000000-0000-0000-0000-00000000dead", otherUUID)[0])
	if vdis(got)["2"] != other {
		t.Errorf("with a disk in its place: %v", vdis(got))
	}
}

// An import that finds no room fails with the code of that and gives back what
// it took, at once and after a power cut.
func TestXVAFull(t *testing.T) {
	y := newYard(t)
	const size = 24 * mib
	y.do("VDI.resize", y.session, y.disks[1], int64(size))
	y.upload(y.disks[1], "raw", random(size, 3, [2]int64{0, size}))
	body := y.archive("/export", "ref", y.vm)

	r := newFaultRig(t, &faultHost{capacity: 20 << 20, options: smallRegions()})
	at := &yard{depot: &depot{fixture: r.fixture, t: t, session: r.session}}
	o := at.bring("/import", body)
	if len(o) < 2 || o[0] != "failure" || o[1] != "SR_BACKEND_FAILURE_44" {
		t.Errorf("task says %q", o)
	}
	nothing := func(when string) {
		t.Helper()
		r.must("SR.scan", r.defaultSR())
		if disks := r.must("VDI.get_all").([]any); len(disks) > 0 {
			t.Errorf("%s: disks %v", when, disks)
		}
	}
	nothing("at once")
	r.close()
	r.host.cutPower()
	r.start()
	nothing("after a power cut")
	r.close()
	r.host.check(t)
}
