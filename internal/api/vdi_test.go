package api

import (
	"bytes"
	"crypto/md5"
	"encoding/hex"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"coppice/internal/db"
	"coppice/internal/xapi"
)

type vdiRef = xapi.Ref[xapi.VDI]

// set changes the record of an object behind the API's back, to bring it into
// a state that messages cannot.
func set[T any](r *rig, ref xapi.Ref[T], change func(*T)) {
	r.t.Helper()
	r.update(func(tx *db.Tx) error { return cmpErr(db.Modify(tx, ref, change), r.refreshAll(tx)) })
	for _, repo := range r.repos.all() { // the volumes are not told
		repo.attrs.Lock()
		repo.attrsStale = true
		repo.attrs.Unlock()
	}
}

// refreshAll recomputes the allowed_operations of every object.
func (r *rig) refreshAll(tx *db.Tx) (err error) {
	for ref := range db.All[xapi.SR](tx) {
		err = cmpErr(err, r.refreshDisksOf(tx, ref))
	}
	for ref := range db.All[xapi.VM](tx) {
		err = cmpErr(err, r.refreshVM(tx, ref))
	}
	for ref := range db.All[xapi.VBD](tx) {
		err = cmpErr(err, r.refreshVBD(tx, ref))
	}
	return err
}

// fails checks that a message fails with exactly this code and parameters.
func (r *rig) fails(want, name string, params ...any) {
	r.t.Helper()
	_, err := r.try(r.root, name, params...)
	if got := description(err); got != want {
		r.t.Errorf("%s%q: got %q, want %q", name, params, got, want)
	}
}

func TestVDICreate(t *testing.T) {
	r := newRig(t)
	args := diskArgs(r.sr, 3<<20+1)
	args["name_label"], args["name_description"] = "data", "what I need"
	args["type"], args["sharable"], args["read_only"] = "system", true, true
	args["other_config"] = map[string]any{"a": "b"}
	args["xenstore_data"] = map[string]any{"c": "d"}
	args["sm_config"] = map[string]any{"image-format": "vhd", "vhd-parent": "someone"}
	args["tags"] = []any{"x", "y"}
	args["snapshot_of"], args["is_a_snapshot"], args["managed"] = "OpaqueRef:x", true, false // not for clients to say
	ref := r.call("VDI.create", args).(vdiRef)
	got := record(r.core, ref)
	want := &xapi.VDI{
		SR: r.sr, NameLabel: "data", NameDescription: "what I need", Type: xapi.VDITypeSystem, Sharable: true,
		ReadOnly: true, OtherConfig: map[string]string{"a": "b"}, XenstoreData: map[string]string{"c": "d"},
		SMConfig: map[string]string{"image-format": "vhd"}, Tags: []string{"x", "y"},
		VirtualSize: 4 << 20, Managed: true, Location: got.UUID, UUID: got.UUID, OnBoot: xapi.OnBootPersist,
		SnapshotOf: xapi.NullRef, SnapshotTime: time.Unix(0, 0).UTC(), Parent: xapi.NullRef, MetadataOfPool: xapi.NullRef,
		AllowedOperations: []xapi.VDIOperations{
			xapi.VDIOperationsClone, xapi.VDIOperationsCopy, xapi.VDIOperationsResize, xapi.VDIOperationsDestroy,
			xapi.VDIOperationsForget, xapi.VDIOperationsUpdate, xapi.VDIOperationsGenerateConfig,
		},
	}
	if diff := cmp.Diff(want, got, cmpopts.EquateEmpty()); diff != "" {
		t.Errorf("record (-want +got):\n%s", diff)
	}
	sr := record(r.core, r.sr)
	if sr.VirtualAllocation != 4<<20 || sr.PhysicalSize == 0 {
		t.Errorf("SR: virtual_allocation %d, physical_size %d", sr.VirtualAllocation, sr.PhysicalSize)
	}
	if !bytes.Equal(r.contents(ref), make([]byte, 4<<20)) {
		t.Error("a new disk is not zero")
	}
	r.wantConsistent()
}

func TestVDICreateSizes(t *testing.T) {
	r := newRig(t)
	for _, c := range []struct{ ask, get int64 }{
		{0, 2 << 20},
		{1, 2 << 20},
		{2 << 20, 2 << 20},
		{2<<20 + 1, 4 << 20},
		{25769705472, 24 << 30}, // what qemu-img says of a VHD of 24 GiB
		{2 << 50, 2 << 50},
	} {
		if got := record(r.core, r.disk(c.ask)).VirtualSize; got != c.get {
			t.Errorf("asked for %d: got %d, want %d", c.ask, got, c.get)
		}
	}
	for _, size := range []int64{-1, 2<<50 + 1} {
		_, err := r.try(r.root, "VDI.create", diskArgs(r.sr, size))
		if code(err) != "SR_BACKEND_FAILURE_79" {
			t.Errorf("asked for %d: got %v", size, err)
		}
	}
}

func TestVDICreateErrors(t *testing.T) {
	r := newRig(t)
	args := diskArgs(r.sr, 1<<20)
	args["type"] = "cbt_metadata"
	r.fails("VDI_INCOMPATIBLE_TYPE||cbt_metadata", "VDI.create", args)
	r.fails("HANDLE_INVALID|SR|OpaqueRef:none", "VDI.create", diskArgs("OpaqueRef:none", 1<<20))
	r.call("PBD.unplug", string(record(r.core, r.sr).PBDs[0]))
	r.fails("SR_HAS_NO_PBDS|"+string(r.sr), "VDI.create", diskArgs(r.sr, 1<<20))
}

// The disk for metadata backups has the same UUID wherever it is made again
// in one SR.
func TestVDICreatePoolMetadataBackup(t *testing.T) {
	r := newRig(t)
	args := diskArgs(r.sr, 1<<20)
	args["name_label"] = poolBackupLabel
	first := r.call("VDI.create", args).(vdiRef)
	id := record(r.core, first).UUID
	_, err := r.try(r.root, "VDI.create", args)
	if code(err) != "SR_BACKEND_FAILURE_43" {
		t.Errorf("a second one: %v", err)
	}
	if got := r.volumes(r.sr); !slices.Equal(got, []string{id}) {
		t.Errorf("volumes %q: the failed creation took the first one's", got)
	}
	r.call("VDI.destroy", first)
	if again := record(r.core, r.call("VDI.create", args).(vdiRef)).UUID; again != id {
		t.Errorf("UUID %s, then %s", id, again)
	}
}

func TestVDIDestroy(t *testing.T) {
	r := newRig(t)
	disk := r.disk(2 << 20)
	snap := r.call("VDI.snapshot", disk).(vdiRef)
	vm := r.vm("owner")
	vbd := r.vbd(vm, disk, "0", "RW")
	set(r, vm, func(v *xapi.VM) { v.SuspendVDI = disk })

	r.call("VDI.destroy", disk)
	r.fails("HANDLE_INVALID|VDI|"+string(disk), "VDI.get_record", disk)
	r.fails("HANDLE_INVALID|VDI|"+string(disk), "VDI.destroy", disk)
	r.fails("HANDLE_INVALID|VBD|"+string(vbd), "VBD.get_record", string(vbd))
	if got := record(r.core, vm); len(got.VBDs) != 0 || !got.SuspendVDI.IsNull() {
		t.Errorf("VM: VBDs %q, suspend_VDI %s", got.VBDs, got.SuspendVDI)
	}
	if got := record(r.core, snap).SnapshotOf; got != disk {
		t.Errorf("snapshot_of became %s, want it to dangle at %s", got, disk)
	}
	if got := record(r.core, r.sr).VirtualAllocation; got != 2<<20 {
		t.Errorf("virtual_allocation %d", got)
	}
	r.call("VDI.destroy", snap)
	r.wantConsistent()
}

func TestVDIResize(t *testing.T) {
	r := newRig(t)
	disk := r.disk(4 << 20)
	r.write(disk, []byte("x"), 4<<20-1)
	r.call("VDI.resize", disk, 4<<20) // no-op
	r.call("VDI.resize", disk, 4<<20+1)
	if got := record(r.core, disk).VirtualSize; got != 6<<20 {
		t.Errorf("size %d, want 6 MiB", got)
	}
	if p := r.contents(disk); p[4<<20-1] != 'x' || bytes.ContainsFunc(p[4<<20:], func(b rune) bool { return b != 0 }) {
		t.Error("contents after growing")
	}
	for _, size := range []int64{4 << 20, 2<<50 + 1, -1} {
		if _, err := r.try(r.root, "VDI.resize", disk, size); code(err) != "SR_BACKEND_FAILURE_79" {
			t.Errorf("resize to %d: %v", size, err)
		}
	}
	r.fails("SR_OPERATION_NOT_SUPPORTED|"+string(r.sr), "VDI.resize_online", disk, 8<<20)
	snap := r.call("VDI.snapshot", disk).(vdiRef)
	r.fails("VDI_READONLY|"+string(snap), "VDI.resize", snap, 8<<20)
	if slices.Contains(record(r.core, snap).AllowedOperations, xapi.VDIOperationsResize) {
		t.Error("resize is advertised for a snapshot")
	}
	r.wantConsistent()
}

func TestVDIUpdate(t *testing.T) {
	r := newRig(t)
	disk := r.disk(4 << 20)
	r.write(disk, bytes.Repeat([]byte{1}, 1<<20), 0)
	set(r, disk, func(v *xapi.VDI) { v.PhysicalUtilisation = 0 })
	r.call("VDI.update", disk)
	if got := record(r.core, disk).PhysicalUtilisation; got != 1<<20 {
		t.Errorf("physical_utilisation %d, want 1 MiB", got)
	}
	repo, err := r.repos.get(r.sr)
	if err != nil {
		t.Fatal(err)
	}
	if err := repo.Delete(t.Context(), volumeID(record(r.core, disk))); err != nil {
		t.Fatal(err)
	}
	r.fails("VDI_MISSING|"+string(r.sr)+"|"+string(disk), "VDI.update", disk)
	if got := record(r.core, disk); !got.Missing || slices.Contains(got.AllowedOperations, xapi.VDIOperationsSnapshot) {
		t.Errorf("missing %v, allowed %q", got.Missing, got.AllowedOperations)
	}
	r.fails("VDI_MISSING|"+string(r.sr)+"|"+string(disk), "VDI.snapshot", disk)
	r.call("VDI.destroy", disk)
	r.wantConsistent()
}

func TestVDIForget(t *testing.T) {
	r := newRig(t)
	disk := richDisk(r)
	snap := r.call("VDI.snapshot", disk).(vdiRef)
	r.call("VDI.update", disk) // for physical_utilisation
	before, snapBefore := record(r.core, disk), record(r.core, snap)
	r.call("VDI.forget", snap)
	r.call("VDI.forget", disk)
	if got := r.disks(r.sr); len(got) != 0 {
		t.Fatalf("disks %q", got)
	}
	r.call("SR.scan", string(r.sr))

	ignore := cmp.Options{
		cmpopts.IgnoreFields(xapi.VDI{}, "SnapshotOf", "Snapshots", "AllowedOperations"),
		cmpopts.IgnoreMapEntries(func(k, _ string) bool { return transient(k) }),
	}
	back := r.ref(before.UUID)
	if diff := cmp.Diff(before, record(r.core, back), ignore); diff != "" {
		t.Errorf("the disk came back (-was +is):\n%s", diff)
	}
	snapBack := record(r.core, r.ref(snapBefore.UUID))
	if diff := cmp.Diff(snapBefore, snapBack, ignore); diff != "" {
		t.Errorf("the snapshot came back (-was +is):\n%s", diff)
	}
	r.wantConsistent()
	// Known again, it survives a start like every other.
	r.restart()
	if len(r.disks(r.sr)) != 2 {
		t.Errorf("disks after a restart: %q", r.disks(r.sr))
	}
}

func TestVDICopy(t *testing.T) {
	r := newRig(t)
	src := richDisk(r)
	r.write(src, bytes.Repeat([]byte("0123456789"), 300_000), 500_001)
	to := r.secondSR()
	ref := r.call("VDI.copy", src, to, "OpaqueRef:NULL", "OpaqueRef:NULL").(vdiRef)
	got := record(r.core, ref)
	if diff := cmp.Diff(record(r.core, src), got, derivedFields, cmpopts.IgnoreFields(xapi.VDI{}, "SR")); diff != "" {
		t.Errorf("copied fields (-source +copy):\n%s", diff)
	}
	if got.SR != xapi.Ref[xapi.SR](to) || got.IsASnapshot || got.OnBoot != xapi.OnBootPersist || len(got.SMConfig) != 0 {
		t.Errorf("copy %+v", got)
	}
	if !bytes.Equal(r.contents(src), r.contents(ref)) {
		t.Error("the copy is not equal")
	}

	snap := r.call("VDI.snapshot", src).(vdiRef)
	ro := r.call("VDI.create", func() map[string]any { a := diskArgs(r.sr, 4<<20); a["read_only"] = true; return a }()).(vdiRef)
	small := r.disk(2 << 20)
	r.fails("VDI_READONLY|"+string(snap), "VDI.copy", src, "", "", snap)
	r.fails("VDI_READONLY|"+string(ro), "VDI.copy", src, "", "", ro)
	r.fails(fmt.Sprintf("VDI_TOO_SMALL|%s|%d", small, 4<<20), "VDI.copy", src, "", "", small)
	r.fails("VDI_IN_USE|"+string(src)+"|copy", "VDI.copy", src, "", "", src)
	r.fails("HANDLE_INVALID|SR|OpaqueRef:NULL", "VDI.copy", src)
	r.fails("HANDLE_INVALID|VDI|OpaqueRef:no", "VDI.copy", src, string(r.sr), "OpaqueRef:no")
	drop := r.repos.uses.add(src, writing)
	r.fails("VDI_IN_USE|"+string(src)+"|copy", "VDI.copy", src, string(r.sr))
	drop()
	r.wantConsistent()
}

// Against a base, only what differs travels, zeros included, whether base and
// disk are relatives in one SR or strangers in two.
func TestVDICopyWithBase(t *testing.T) {
	r := newRig(t)
	other := r.secondSR()
	base := r.disk(6 << 20)
	r.write(base, bytes.Repeat([]byte("a"), 5<<20), 0)
	disk := r.call("VDI.clone", base).(vdiRef)
	r.write(disk, bytes.Repeat([]byte("b"), 512), 4096)
	r.write(disk, make([]byte, 100_000), 1<<20)
	r.write(disk, []byte("end"), 6<<20-3)

	foreign := r.call("VDI.copy", base, other).(vdiRef)
	for name, b := range map[string]vdiRef{"relative": base, "stranger": foreign} {
		into := r.call("VDI.copy", base, string(r.sr)).(vdiRef)
		if got := r.call("VDI.copy", disk, "OpaqueRef:NULL", b, into).(vdiRef); got != into {
			t.Errorf("%s: the result is %s, want the disk copied into", name, got)
		}
		if !bytes.Equal(r.contents(into), r.contents(disk)) {
			t.Errorf("%s: base + difference is not the disk", name)
		}
	}
	delta := r.call("VDI.copy", disk, string(r.sr), base).(vdiRef)
	p := r.contents(delta)
	if p[4096] != 'b' || p[2<<20] != 0 || string(p[6<<20-3:]) != "end" {
		t.Error("the delta is not what changed")
	}
	r.wantConsistent()
}

func TestVDICopyCancelled(t *testing.T) {
	r := newRig(t)
	src := filledDisk(r)
	// The task is cancelled by the storage, in the middle of the copy.
	var task xapi.Ref[xapi.Task]
	ready := make(chan struct{})
	r.faults.onWrite(func() {
		<-ready
		r.call("task.cancel", task)
	})
	task = r.call("Async.VDI.copy", src, string(r.sr)).(xapi.Ref[xapi.Task])
	close(ready)
	r.wait(task)
	r.faults.onWrite(nil)
	got := record(r.core, task)
	if got.Status != xapi.TaskStatusTypeCancelled || !slices.Equal(got.ErrorInfo, []string{"TASK_CANCELLED", string(task)}) {
		t.Errorf("task: %s %q", got.Status, got.ErrorInfo)
	}
	if n := len(r.disks(r.sr)); n != 1 {
		t.Errorf("%d disks, want the source alone", n)
	}
	r.wantConsistent()
}

func TestVDIChecksum(t *testing.T) {
	r := newRig(t)
	disk := filledDisk(r)
	sum := md5.Sum(r.contents(disk))
	if got := r.call("VDI.checksum", disk); got != hex.EncodeToString(sum[:]) {
		t.Errorf("got %v, want %x", got, sum)
	}
}

// Messages that the storage layer has to itself are refused, whoever asks.
func TestVDIReserved(t *testing.T) {
	r := newRig(t)
	disk := r.disk(2 << 20)
	for name, value := range map[string]any{
		"sharable": true, "read_only": true, "managed": false, "missing": true, "is_a_snapshot": true, "virtual_size": 1,
		"physical_utilisation": 1, "snapshot_of": disk, "snapshot_time": "20260101T00:00:00Z", "metadata_of_pool": r.pool,
	} {
		r.fails("PERMISSION_DENIED|", "VDI.set_"+name, disk, value)
	}
	r.fails("PERMISSION_DENIED|", "VDI.db_forget", disk)
}

func TestVDISetters(t *testing.T) {
	r := newRig(t)
	disk := r.disk(2 << 20)
	r.call("VDI.set_name_label", disk, "new name")
	r.call("VDI.set_name_description", disk, "new description")
	r.call("VDI.add_to_other_config", disk, "key", "value")
	r.call("VDI.add_tags", disk, "tag")
	r.fails("SR_OPERATION_NOT_SUPPORTED|"+string(r.sr), "VDI.set_on_boot", disk, "reset")
	vm := r.vm("vm")
	r.vbd(vm, disk, "0", "RW")
	set(r, vm, func(v *xapi.VM) { v.PowerState = xapi.VMPowerStateRunning })
	r.fails("VM_BAD_POWER_STATE|"+string(vm)+"|halted|running", "VDI.set_on_boot", disk, "reset")
	r.fails("VM_BAD_POWER_STATE|"+string(vm)+"|halted|running", "VDI.set_allow_caching", disk, true)

	// The volume can tell all of it again.
	repo, err := r.repos.get(r.sr)
	if err != nil {
		t.Fatal(err)
	}
	info, err := repo.Stat(t.Context(), volumeID(record(r.core, disk)))
	if err != nil {
		t.Fatal(err)
	}
	at, ok := decodeAttrs(info.Attrs)
	if !ok || at.Label != "new name" || at.Description != "new description" || at.OtherConfig["key"] != "value" ||
		!slices.Equal(at.Tags, []string{"tag"}) || at.SR != record(r.core, r.sr).UUID {
		t.Errorf("attributes %s", info.Attrs)
	}

	r.call("PBD.unplug", string(record(r.core, r.sr).PBDs[0]))
	r.fails("SR_HAS_NO_PBDS|"+string(r.sr), "VDI.set_name_label", disk, "x")
	if got := r.call("VDI.get_name_label", disk); got != "new name" {
		t.Errorf("name_label %v", got)
	}
}

func TestVDISmallMessages(t *testing.T) {
	r := newRig(t)
	disk := r.disk(2 << 20)
	if got := r.call("VDI.get_nbd_info", disk).([]*xapi.VDINBDServerInfo); len(got) != 0 {
		t.Errorf("get_nbd_info: %v", got)
	}
	config := r.call("VDI.generate_config", r.host, disk).(string)
	if v := record(r.core, disk); !strings.Contains(config, v.Location) {
		t.Errorf("generate_config: %q", config)
	}
	r.fails("SR_OPERATION_NOT_SUPPORTED|"+string(r.sr), "VDI.introduce", "u", "n", "d", string(r.sr), "user", false,
		false, map[string]any{}, "loc")
	set(r, disk, func(v *xapi.VDI) { v.Type = xapi.VDITypeCBTMetadata })
	r.fails("VDI_INCOMPATIBLE_TYPE|"+string(disk)+"|cbt_metadata", "VDI.get_nbd_info", disk)
}

// An attribute blob always fits, and always identifies the disk.
func TestAttrsFit(t *testing.T) {
	big := map[string]string{}
	for i := range 1000 {
		big[fmt.Sprint(i)] = strings.Repeat("v", 100)
	}
	at := diskAttrs{
		UUID: "u", Label: strings.Repeat("l", 100_000), Description: strings.Repeat("d", 100_000), SnapshotOf: "s",
		OtherConfig: big, SMConfig: big, Xenstore: big, Tags: slices.Repeat([]string{"tag"}, 100_000),
	}
	b := at.encode()
	got, ok := decodeAttrs(b)
	if len(b) > 64<<10 || !ok || got.UUID != "u" || got.SnapshotOf != "s" || got.Label == "" {
		t.Errorf("%d bytes, decoded %v: %.100s", len(b), ok, b)
	}
	if _, ok := decodeAttrs([]byte("something else")); ok {
		t.Error("foreign attributes were taken for ours")
	}
}
