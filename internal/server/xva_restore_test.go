package server

import (
	"bytes"
	"slices"
	"sync"
	"testing"

	"github.com/google/go-cmp/cmp"

	"coppice/internal/xapi"
)

// withUUID are the VMs that have a UUID.
func (y *yard) withUUID(uuid string) (vms []string) {
	y.t.Helper()
	for ref, rec := range y.do("VM.get_all_records", y.session).(map[string]any) {
		if rec.(map[string]any)["uuid"] == uuid {
			vms = append(vms, ref)
		}
	}
	return vms
}

// attached are the disks of a VM by device.
func (y *yard) attached(vm string) map[string]any {
	y.t.Helper()
	out := map[string]any{}
	for _, b := range y.record("VM", vm)["VBDs"].([]any) {
		vbd := y.record("VBD", b.(string))
		out[vbd["userdevice"].(string)] = vbd["VDI"]
	}
	return out
}

// refused sees that an import fails with an error and changes nothing.
func (y *yard) refused(path string, body []byte, want []string, args ...string) {
	y.t.Helper()
	before := y.population()
	if o := y.bring(path, body, args...); !slices.Equal(o, append([]string{"failure"}, want...)) {
		y.t.Errorf("%s %q: the task says %q, want %q", path, args, o, want)
	}
	if diff := cmp.Diff(before, y.population()); diff != "" {
		y.t.Errorf("%s %q changed %s", path, args, diff)
	}
}

// A VM that has been restored elsewhere, and so is newer, takes the place of the
// one that it was: it has its UUID, its addresses, its snapshots and its
// schedule, and the disks of before are kept.
func TestXVARestoreReplaces(t *testing.T) {
	y, there := newYard(t), newYard(t)
	uuid := y.record("VM", y.vm)["uuid"].(string)
	old, disks, want := y.archive("/export", "ref", y.vm), y.attached(y.vm), y.shape(y.vm)
	y.refused("/import", old, []string{"VM_TO_IMPORT_IS_NOT_NEWER_VERSION", y.vm, "0", "0"}, "restore", "true")

	moved := there.brought("/import", old, "restore", "true", "sr_id", there.sr)[0]
	if v := there.record("VM", moved)["version"]; v != int64(1) {
		t.Errorf("restored for the first time: version %v", v)
	}
	newer := there.archive("/export", "ref", moved)

	schedule := y.do("VMSS.create", y.session, map[string]any{
		"name_label": "s", "type": "snapshot", "frequency": "daily", "schedule": map[string]any{"hour": "1", "min": "0"},
	}).(string)
	y.do("VM.set_snapshot_schedule", y.session, y.vm, schedule)
	y.do("VM.set_name_label", y.session, y.vm, "changed since")
	y.do("VM.add_to_blocked_operations", y.session, y.vm, "destroy", "by hand")
	y.refused("/import", newer, []string{"OPERATION_BLOCKED", y.vm, "by hand"}, "restore", "true")
	y.do("VM.remove_from_blocked_operations", y.session, y.vm, "destroy")

	vms := y.brought("/import", newer, "restore", "true", "sr_id", y.sr)
	if have := y.withUUID(uuid); len(vms) != 1 || !slices.Equal(have, vms) || vms[0] == y.vm {
		t.Fatalf("the import made %q, with the UUID there are %q", vms, have)
	}
	rec := y.record("VM", vms[0])
	vif := y.record("VIF", rec["VIFs"].([]any)[0].(string))
	if rec["version"] != int64(2) || vif["MAC"] != "02:00:00:00:00:09" || rec["snapshot_schedule"] != schedule {
		t.Errorf("version %v, MAC %v, schedule %v", rec["version"], vif["MAC"], rec["snapshot_schedule"])
	}
	if diff := cmp.Diff(want, y.shape(vms[0])); diff != "" {
		t.Errorf("(-exported +restored) %s", diff)
	}
	for device, vdi := range disks {
		if ref := vdi.(string); ref != xapi.NullRef && len(y.record("VDI", ref)["VBDs"].([]any)) != 0 {
			t.Errorf("disk %s of before has VBDs %v", device, y.record("VDI", ref)["VBDs"])
		}
	}
	if diff := cmp.Diff([]any{y.snapshot}, rec["snapshots"]); diff != "" {
		t.Errorf("snapshots %s", diff)
	}
	y.refused("/import", newer, []string{"VM_TO_IMPORT_IS_NOT_NEWER_VERSION", vms[0], "2", "1"}, "restore", "true")

	before := y.download(y.vdi(y.snapshot, "1"), "raw", "")
	y.do("VM.revert", y.session, y.snapshot)
	if got := y.vdi(vms[0], "1"); got != disks["1"] || !bytes.Equal(y.download(got, "raw", ""), before) {
		t.Error("a revert to a snapshot of before does not bring its disks back")
	}
	if again := y.brought("/import", old, "restore", "true", "force", "true"); !slices.Equal(y.withUUID(uuid), again) {
		t.Errorf("by force: %q, the UUID have %q", again, y.withUUID(uuid))
	}
}

// Records alone replace a VM, too, with its snapshots, and take over its disks.
func TestXVARestoreMetadata(t *testing.T) {
	y := newYard(t)
	uuid, disks := y.record("VM", y.vm)["uuid"].(string), y.attached(y.vm)
	snapshotUUID, snapshotDisks := y.record("VM", y.snapshot)["uuid"].(string), y.attached(y.snapshot)
	body := y.archive("/export_metadata", "ref", y.vm)
	y.do("VM.set_name_description", y.session, y.vm, "changed since")
	y.refused("/import_metadata", body, []string{"VM_TO_IMPORT_IS_NOT_NEWER_VERSION", y.vm, "0", "0"}, "restore", "true")
	before := y.population()
	if vms := y.brought("/import_metadata", body, "restore", "true", "force", "true", "dry_run", "true"); len(vms) != 0 {
		t.Errorf("a dry run made %q", vms)
	}
	if diff := cmp.Diff(before, y.population()); diff != "" {
		t.Errorf("a dry run changed %s", diff)
	}
	vms := y.brought("/import_metadata", body, "restore", "true", "force", "true")
	if have := y.withUUID(uuid); len(vms) != 1 || !slices.Equal(have, vms) {
		t.Fatalf("the import made %q, with the UUID there are %q", vms, have)
	}
	rec := y.record("VM", vms[0])
	if rec["name_description"] != "serves <pages> & more" {
		t.Errorf("description %v", rec["name_description"])
	}
	if diff := cmp.Diff(disks, y.attached(vms[0])); diff != "" {
		t.Errorf("disks (-before +after): %s", diff)
	}
	snapshots := y.withUUID(snapshotUUID)
	if diff := cmp.Diff([]any{snapshots[0]}, rec["snapshots"]); diff != "" || len(snapshots) != 1 {
		t.Errorf("snapshots %q: %s", snapshots, diff)
	}
	if diff := cmp.Diff(snapshotDisks, y.attached(snapshots[0])); diff != "" {
		t.Errorf("disks of the snapshot (-before +after): %s", diff)
	}
}

// Two VMs cannot have the same addresses, whatever their UUIDs.
func TestXVARestoreSeed(t *testing.T) {
	y := newYard(t)
	rec := y.record("VM", y.vm)
	seed, uuid := rec["other_config"].(map[string]any)["mac_seed"].(string), rec["uuid"].(string)
	alone := y.archive("/export", "ref", y.snapshot) // with the seed of its VM, but as a VM
	y.refused("/import", alone, []string{"DUPLICATE_MAC_SEED", seed}, "restore", "true")
	whole := bytes.ReplaceAll(y.archive("/export_metadata", "ref", y.vm), []byte(uuid), []byte("11111111-2222-4333-8444-555555555555"))
	y.refused("/import_metadata", whole, []string{"DUPLICATE_MAC_SEED", seed}, "restore", "true", "force", "true")
}

// Restores of one VM at the same time come after one another: each replaces
// what the one before has made, and one VM is left.
func TestXVARestoreAtOnce(t *testing.T) {
	y := newYard(t)
	uuid := y.record("VM", y.vm)["uuid"].(string)
	archive := y.archive("/export", "ref", y.vm)
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() {
			if o := y.bring("/import", archive, "restore", "true", "force", "true"); o[0] != "success" {
				t.Errorf("one of several: %q", o)
			}
		})
	}
	wg.Wait()
	if vms := y.withUUID(uuid); len(vms) != 1 {
		t.Errorf("%d VMs are left", len(vms))
	}
}
