package api

import (
	"bytes"
	"fmt"
	"maps"
	"slices"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"coppice/internal/db"
	"coppice/internal/sexpr"
	"coppice/internal/xapi"
)

// vbdsOf returns the VBDs of a VM by device.
func (r *rig) vbdsOf(vm vmRef) map[string]*xapi.VBD {
	r.t.Helper()
	got := map[string]*xapi.VBD{}
	for _, b := range record(r.core, vm).VBDs {
		vbd := record(r.core, b)
		got[vbd.Userdevice] = vbd
	}
	return got
}

// vifsOf returns the MACs of a VM's VIFs by device.
func (r *rig) vifsOf(vm vmRef) map[string]string {
	r.t.Helper()
	got := map[string]string{}
	for _, v := range record(r.core, vm).VIFs {
		vif := record(r.core, v)
		got[vif.Device] = vif.MAC
	}
	return got
}

// What a snapshot takes over from its VM, and what it does not.
func TestVMSnapshotRecord(t *testing.T) {
	r := newRig(t)
	vm, disks := r.guest("guest")
	r.call("VM.add_to_other_config", vm, "k", "v")
	r.call("VM.add_to_other_config", vm, "default_template", "true")
	r.call("VM.add_to_other_config", vm, "xensource_internal", "1")
	r.call("VM.set_tags", vm, []string{"t"})
	r.call("VM.add_to_blocked_operations", vm, "destroy", "because")
	r.call("VM.set_order", vm, 3)
	r.call("VM.set_start_delay", vm, 4)
	r.call("VM.set_name_description", vm, "serves pages")
	begun := time.Now().Add(-time.Second)
	snap := r.call("VM.snapshot", vm, "snap", []string{}).(vmRef)
	src, got := record(r.core, vm), record(r.core, snap)
	switch {
	case !got.IsASnapshot || !got.IsATemplate || got.SnapshotOf != vm || got.PowerState != xapi.VMPowerStateHalted:
		t.Errorf("snapshot %+v", got)
	case got.SnapshotTime.Before(begun) || got.SnapshotTime.After(time.Now().Add(time.Second)):
		t.Errorf("snapshot_time %v", got.SnapshotTime)
	case got.NameLabel != "snap" || got.NameDescription != "serves pages" || !slices.Equal(got.Tags, src.Tags) || got.VCPUsMax != src.VCPUsMax:
		t.Errorf("snapshot %+v", got)
	case got.OtherConfig["k"] != "v" || got.OtherConfig["mac_seed"] != src.OtherConfig["mac_seed"] ||
		got.OtherConfig["default_template"] != "" || got.OtherConfig["xensource_internal"] != "":
		t.Errorf("other_config %q", got.OtherConfig)
	case len(got.BlockedOperations) > 0 || got.Order != 0 || got.StartDelay != 0 || got.Domid != -1 || got.GenerationID == src.GenerationID:
		t.Errorf("snapshot %+v", got)
	case got.Metrics == src.Metrics || got.UUID == src.UUID || got.TransportableSnapshotID != "":
		t.Errorf("snapshot %+v", got)
	}
	want := map[string]string{"disk-snapshot-type": "crash_consistent", "power-state-at-snapshot": "Halted"}
	if diff := cmp.Diff(want, got.SnapshotInfo); diff != "" {
		t.Errorf("snapshot_info: %s", diff)
	}
	if saved := sexpr.Fields[xapi.VM](got.SnapshotMetadata); saved["uuid"] != src.UUID || saved["name_label"] != "guest" || saved["order"] != int64(3) {
		t.Errorf("snapshot_metadata %s", got.SnapshotMetadata)
	}
	vbds, own := r.vbdsOf(snap), r.vbdsOf(vm)
	for i, d := range disks {
		vbd, src := vbds[fmt.Sprint(i)], own[fmt.Sprint(i)]
		if _, owned := vbd.OtherConfig["owner"]; !owned || vbd.Mode != src.Mode || vbd.UUID == src.UUID || vbd.CurrentlyAttached {
			t.Errorf("VBD %+v", vbd)
		}
		if v := record(r.core, vbd.VDI); v.SnapshotOf != d || !v.IsASnapshot {
			t.Errorf("VDI %+v", v)
		}
	}
	if vbds["3"].VDI != own["3"].VDI || len(vbds) != 3 {
		t.Errorf("the CD is not shared: %+v", vbds)
	}
	if diff := cmp.Diff(r.vifsOf(vm), r.vifsOf(snap)); diff != "" {
		t.Errorf("VIFs: %s", diff)
	}
	ops := []xapi.VMOperations{"clone", "copy", "destroy", "export", "metadata_export", "power_state_reset", "revert", "update_allowed_operations"}
	if diff := cmp.Diff(ops, got.AllowedOperations); diff != "" {
		t.Errorf("allowed_operations of a snapshot: %s", diff)
	}
	if !slices.Contains(record(r.core, vm).AllowedOperations, xapi.VMOperationsSnapshot) {
		t.Errorf("allowed_operations of the VM: %q", record(r.core, vm).AllowedOperations)
	}
	if names := r.messageNames(src.UUID); !slices.Equal(names, []string{"VM_SNAPSHOTTED"}) {
		t.Errorf("messages %q", names)
	}
	r.wantConsistent()
}

// messageNames lists the names of the messages about an object, oldest first.
func (r *rig) messageNames(uuid string) []string {
	var found []*xapi.Message
	r.view(func(tx *db.Tx) {
		for _, m := range db.All[xapi.Message](tx) {
			if m.ObjUUID == uuid {
				found = append(found, m)
			}
		}
	})
	slices.SortFunc(found, func(a, b *xapi.Message) int { return a.Timestamp.Compare(b.Timestamp) })
	names := []string{}
	for _, m := range found {
		names = append(names, m.Name)
	}
	return names
}

// The parents of snapshots form a chain, which a revert branches and a destroy
// closes.
func TestVMSnapshotTree(t *testing.T) {
	r := newRig(t)
	vm, _ := r.guest("guest")
	parent := func(v vmRef) vmRef { return record(r.core, v).Parent }
	a := r.call("VM.snapshot", vm, "a").(vmRef)
	b := r.call("VM.snapshot", vm, "b").(vmRef)
	if parent(vm) != b || parent(b) != a || !parent(a).IsNull() {
		t.Errorf("parents %s, %s, %s", parent(vm), parent(b), parent(a))
	}
	r.call("VM.revert", a)
	c := r.call("VM.snapshot", vm, "c").(vmRef)
	if parent(vm) != c || parent(c) != a || parent(b) != a {
		t.Errorf("parents %s, %s, %s", parent(vm), parent(c), parent(b))
	}
	children := slices.Sorted(slices.Values(record(r.core, a).Children))
	if want := slices.Sorted(slices.Values([]vmRef{b, c})); !slices.Equal(children, want) {
		t.Errorf("children %q, want %q", children, want)
	}
	if got := record(r.core, vm).Snapshots; len(got) != 3 {
		t.Errorf("snapshots %q", got)
	}
	r.call("VM.destroy", a)
	if !parent(b).IsNull() || !parent(c).IsNull() {
		t.Errorf("parents %s, %s", parent(b), parent(c))
	}
	r.call("VM.destroy", c)
	if !parent(vm).IsNull() {
		t.Errorf("parent %s", parent(vm))
	}
}

func TestVMSnapshotErrors(t *testing.T) {
	r := newRig(t)
	vm, disks := r.guest("guest")
	ref := string(vm)
	snap := string(r.call("VM.snapshot", vm, "snap").(vmRef))
	before := r.world()
	r.fails("VM_IS_SNAPSHOT|"+snap+"|snapshot", "VM.snapshot", snap, "x")
	r.fails("REVERT_ONLY_ALLOWED_ON_SNAPSHOT", "VM.revert", vm)
	r.fails("VM_BAD_POWER_STATE|"+ref+"|paused, suspended, running|halted", "VM.checkpoint", vm, "x")
	r.fails("MESSAGE_REMOVED", "VM.snapshot_with_quiesce", vm, "x")
	r.fails("PROVISION_ONLY_ALLOWED_ON_TEMPLATE", "VM.provision", vm)
	r.fails("PROVISION_ONLY_ALLOWED_ON_TEMPLATE", "VM.provision", snap)
	r.fails("VM_BAD_POWER_STATE|"+string(r.dom0)+"|halted|running", "VM.clone", r.dom0, "x")
	r.fails("OPERATION_NOT_ALLOWED|The control domain cannot do snapshot", "VM.snapshot", r.dom0, "x")
	r.call("VM.set_is_a_template", vm, true)
	r.fails("VM_IS_TEMPLATE|"+ref+"|snapshot", "VM.snapshot", vm, "x")
	r.fails("VM_IS_TEMPLATE|"+ref+"|reverting", "VM.revert", snap)
	r.call("VM.set_is_a_template", vm, false)
	r.call("VM.add_to_blocked_operations", vm, "snapshot", "because")
	r.fails("OPERATION_BLOCKED|"+ref+"|because", "VM.snapshot", vm, "x")
	r.call("VM.remove_from_blocked_operations", vm, "snapshot")
	set(r, disks[1], func(v *xapi.VDI) { v.Sharable = true })
	r.fails("VDI_IS_SHARABLE|"+string(disks[1]), "VM.snapshot", vm, "x")
	set(r, disks[1], func(v *xapi.VDI) { v.Sharable, v.OnBoot = false, xapi.OnBootReset })
	r.fails("VDI_ON_BOOT_MODE_INCOMPATIBLE_WITH_OPERATION", "VM.snapshot", vm, "x")
	set(r, disks[1], func(v *xapi.VDI) { v.OnBoot = xapi.OnBootPersist })
	r.call("PBD.unplug", r.pbd(r.sr))
	r.fails("SR_HAS_NO_PBDS|"+string(r.sr), "VM.snapshot", vm, "x")
	r.call("PBD.plug", r.pbd(r.sr))
	if after := r.world(); after != before {
		t.Errorf("errors have changed the world: %s", cmp.Diff(before, after))
	}
	r.wantConsistent()
}

// A VM that was suspended: a snapshot of it is halted, a checkpoint has the
// memory, and what is made of that is halted again.
func TestVMCheckpoint(t *testing.T) {
	r := newRig(t)
	vm, _ := r.guest("guest")
	r.suspend(vm)
	memory := record(r.core, vm).SuspendVDI
	plain := record(r.core, r.call("VM.snapshot", vm, "plain").(vmRef))
	if plain.PowerState != xapi.VMPowerStateHalted || !plain.SuspendVDI.IsNull() || plain.SnapshotInfo["power-state-at-snapshot"] != "Suspended" {
		t.Errorf("snapshot %+v", plain)
	}
	ref := r.call("VM.checkpoint", vm, "checkpoint").(vmRef)
	got := record(r.core, ref)
	if got.PowerState != xapi.VMPowerStateSuspended || record(r.core, got.SuspendVDI).SnapshotOf != memory {
		t.Errorf("checkpoint %+v", got)
	}
	if record(r.core, vm).SuspendVDI != memory || record(r.core, vm).PowerState != xapi.VMPowerStateSuspended {
		t.Errorf("the VM is %+v", record(r.core, vm))
	}
	r.fails("VM_BAD_POWER_STATE|"+string(vm)+"|halted|suspended", "VM.clone", vm, "x")
	clone := record(r.core, r.call("VM.clone", ref, "clone").(vmRef))
	if clone.PowerState != xapi.VMPowerStateHalted || !clone.SuspendVDI.IsNull() || !clone.IsATemplate {
		t.Errorf("clone of a checkpoint %+v", clone)
	}
	r.choose("allow_clone_suspended_vm", "true")
	asleep := record(r.core, r.call("VM.clone", vm, "asleep").(vmRef))
	if asleep.PowerState != xapi.VMPowerStateSuspended || asleep.SuspendVDI == memory || asleep.SuspendVDI.IsNull() {
		t.Errorf("clone of a suspended VM %+v", asleep)
	}

	r.call("VM.hard_shutdown", vm)
	if got := record(r.core, vm); got.PowerState != xapi.VMPowerStateHalted || !got.SuspendVDI.IsNull() {
		t.Errorf("after a hard shutdown: %+v", got)
	}
	r.fails("HANDLE_INVALID|VDI|"+string(memory), "VDI.get_record", memory)
	r.fails("VM_BAD_POWER_STATE|"+string(vm)+"|paused, suspended, running|halted", "VM.hard_shutdown", vm)
	r.call("VM.revert", ref)
	if got := record(r.core, vm); got.PowerState != xapi.VMPowerStateSuspended || got.SuspendVDI.IsNull() || record(r.core, got.SuspendVDI).IsASnapshot {
		t.Errorf("back at the checkpoint: %+v", got)
	}
	r.call("VM.power_state_reset", vm)
	if got := record(r.core, vm); got.PowerState != xapi.VMPowerStateHalted {
		t.Errorf("power state %s", got.PowerState)
	}
	r.wantConsistent()
}

// A clone is a VM of its own: outside of the tree, with other addresses, and
// of a template a template.
func TestVMClone(t *testing.T) {
	for _, copy := range []bool{false, true} {
		t.Run(fmt.Sprintf("copy=%v", copy), func(t *testing.T) {
			r := newRig(t)
			vm, disks := r.guest("golden")
			snap := r.call("VM.snapshot", vm, "snap").(vmRef)
			clone := func(of vmRef) vmRef {
				if copy {
					return r.call("VM.copy", of, "clone", dangling).(vmRef)
				}
				return r.call("VM.clone", of, "clone").(vmRef)
			}
			ref := clone(vm)
			src, got := record(r.core, vm), record(r.core, ref)
			switch {
			case got.IsASnapshot || got.IsATemplate || !got.SnapshotOf.IsNull() || !got.Parent.IsNull() || got.SnapshotTime.Unix() != 0:
				t.Errorf("clone %+v", got)
			case len(got.SnapshotInfo) > 0 || got.SnapshotMetadata != "" || got.OtherConfig["mac_seed"] == src.OtherConfig["mac_seed"]:
				t.Errorf("clone %+v", got)
			case got.OtherConfig["base_template_name"] != "" || got.UUID == src.UUID || got.NameLabel != "clone":
				t.Errorf("clone %+v", got)
			}
			if mac := r.vifsOf(ref)["0"]; mac == "" || mac == r.vifsOf(vm)["0"] {
				t.Errorf("MAC %q", mac)
			}
			vbds := r.vbdsOf(ref)
			for i, d := range disks {
				v := record(r.core, vbds[fmt.Sprint(i)].VDI)
				if v.IsASnapshot || !v.SnapshotOf.IsNull() || vbds[fmt.Sprint(i)].VDI == d {
					t.Errorf("VDI %+v", v)
				}
				if !bytes.Equal(r.contents(vbds[fmt.Sprint(i)].VDI), r.contents(d)) {
					t.Error("contents differ")
				}
			}
			if vbds["3"].VDI != r.vbdsOf(vm)["3"].VDI {
				t.Error("the CD is not shared")
			}
			of := record(r.core, clone(snap))
			if of.IsASnapshot || !of.IsATemplate || of.OtherConfig["base_template_name"] != "snap" {
				t.Errorf("clone of a snapshot %+v", of)
			}
			// The golden image goes, its clones stay.
			r.call("VM.destroy", vm)
			for _, d := range disks {
				r.call("VDI.destroy", d)
			}
			if got := r.contents(vbds["0"].VDI); !bytes.HasPrefix(got, []byte("aaaa")) {
				t.Error("the clone has lost its contents with its origin")
			}
			r.wantConsistent()
		})
	}
}

func TestVMCopyElsewhere(t *testing.T) {
	r := newRig(t)
	second := xapi.Ref[xapi.SR](r.secondSR())
	vm, disks := r.guest("guest")
	ref := r.call("VM.copy", vm, "copy", string(second)).(vmRef)
	vbds := r.vbdsOf(ref)
	for i, d := range disks {
		if v := record(r.core, vbds[fmt.Sprint(i)].VDI); v.SR != second || !bytes.Equal(r.contents(d), r.contents(vbds[fmt.Sprint(i)].VDI)) {
			t.Errorf("VDI %+v", v)
		}
	}
	set(r, second, func(sr *xapi.SR) { sr.ContentType = "iso" })
	r.fails("OPERATION_NOT_ALLOWED|Disks cannot be copied to an SR of ISO images.", "VM.copy", vm, "x", string(second))
	r.wantConsistent()
}

func TestVMProvision(t *testing.T) {
	r := newRig(t)
	template := func(disks string) vmRef {
		vm := r.vm("template")
		r.call("VM.set_is_a_template", vm, true)
		r.call("VM.add_to_other_config", vm, "disks", disks)
		return vm
	}
	sr := record(r.core, r.sr).UUID
	vm := template(`<provision><disk device="0" size="5000000" sr="" bootable="true" type="system"/>` +
		`<disk device="1" size="4194304" sr="` + sr + `"/></provision>`)
	r.call("VM.provision", vm)
	got, vbds := record(r.core, vm), r.vbdsOf(vm)
	if got.IsATemplate || got.OtherConfig["disks"] != "" || len(vbds) != 2 {
		t.Errorf("VM %+v", got)
	}
	if v := record(r.core, vbds["0"].VDI); v.VirtualSize != 6<<20 || v.Type != xapi.VDITypeSystem || !vbds["0"].Bootable || vbds["1"].Bootable {
		t.Errorf("VDI %+v, VBD %+v", v, vbds["0"])
	}
	for text, want := range map[string]string{
		`<provision`: "INVALID_VALUE",
		`<provision><disk device="0" size="many"/></provision>`:                                            "INVALID_VALUE",
		`<provision><disk device="0" size="-1"/></provision>`:                                              "SR_BACKEND_FAILURE_79",
		`<provision><disk device="0" size="1"/><disk device="0" size="1"/></provision>`:                    "DEVICE_ALREADY_EXISTS",
		`<provision><disk device="0" size="1" sr="00000000-dead-dead-dead-000000000000"/></provision>`:     "UUID_INVALID",
		`<provision><disk device="0" size="1" sr="` + dangling + `"/></provision>`:                         "HANDLE_INVALID",
		`<provision><disk device="0" size="1"/><disk device="x" size="1" bootable="perhaps"/></provision>`: "INVALID_DEVICE",
	} {
		vm, before := template(text), len(r.disks(r.sr))
		if _, err := r.try(r.root, "VM.provision", vm); code(err) != want {
			t.Errorf("%s: %v, want %s", text, err, want)
		}
		if !record(r.core, vm).IsATemplate || len(r.disks(r.sr)) != before {
			t.Errorf("%s: something was done", text)
		}
	}
	r.wantConsistent()
}

// A revert brings fields back, but not what the user keeps over snapshots, and
// devices to what they were.
func TestVMRevert(t *testing.T) {
	for _, clone := range []bool{false, true} {
		t.Run(fmt.Sprintf("clone=%v", clone), func(t *testing.T) {
			r := newRig(t)
			if clone {
				r.choose("coppice:revert", "clone")
			}
			vm, disks := r.guest("guest")
			r.call("VM.set_tags", vm, []string{"old"})
			r.call("VM.add_to_other_config", vm, "k", "old")
			then, macs := r.contents(disks[0]), r.vifsOf(vm)
			older := r.call("VDI.snapshot", disks[0]).(vdiRef)
			snap := r.call("VM.snapshot", vm, "snap").(vmRef)
			was := record(r.core, vm)

			r.call("VM.set_name_label", vm, "new name")
			r.call("VM.set_tags", vm, []string{"new"})
			r.call("VM.set_other_config", vm, map[string]string{"k": "new", holdKey: "mine"})
			r.call("VM.set_VCPUs_max", vm, 8)
			r.write(disks[0], []byte("new"), 0)
			r.call("VDI.resize", disks[0], 8<<20)
			extra := r.disk(2 << 20)
			r.vbd(vm, extra, "7", "RW")
			r.call("VIF.destroy", string(record(r.core, vm).VIFs[0]))
			r.vif(vm, "2")
			newer := r.call("VDI.snapshot", disks[0]).(vdiRef)

			r.call("VM.revert", snap)
			got, vbds := record(r.core, vm), r.vbdsOf(vm)
			switch {
			case got.UUID != was.UUID || got.NameLabel != "guest" || got.VCPUsMax != was.VCPUsMax || got.OtherConfig["k"] != "old":
				t.Errorf("VM %+v", got)
			case !slices.Equal(got.Tags, []string{"new"}) || got.OtherConfig[holdKey] != "mine":
				t.Errorf("tags %q, other_config %q", got.Tags, got.OtherConfig)
			case got.IsASnapshot || got.IsATemplate || got.Parent != snap || !got.SnapshotOf.IsNull() || got.GenerationID == was.GenerationID:
				t.Errorf("VM %+v", got)
			case len(vbds) != 3 || vbds["7"] != nil:
				t.Errorf("VBDs %v", slices.Sorted(maps.Keys(vbds)))
			}
			if diff := cmp.Diff(macs, r.vifsOf(vm)); diff != "" {
				t.Errorf("VIFs: %s", diff)
			}
			if v := record(r.core, extra); len(v.VBDs) != 0 {
				t.Errorf("the extra disk %+v", v)
			}
			now := vbds["0"].VDI
			if (now == disks[0]) == clone {
				t.Errorf("disk %s, before %s", now, disks[0])
			}
			if !bytes.Equal(r.contents(now), then) || record(r.core, now).VirtualSize != int64(len(then)) {
				t.Error("contents are not those of the snapshot")
			}
			// The whole history belongs to the disk of now.
			history := record(r.core, now).Snapshots
			for _, s := range []vdiRef{older, newer, r.vbdsOf(snap)["0"].VDI} {
				if record(r.core, s).SnapshotOf != now || !slices.Contains(history, s) {
					t.Errorf("snapshot %+v is not one of %s", record(r.core, s), now)
				}
			}
			if got := r.messageNames(was.UUID); !slices.Contains(got, "VM_SNAPSHOT_REVERTED") {
				t.Errorf("messages %q", got)
			}
			r.wantConsistent()
			r.restart()
			r.wantConsistent()
		})
	}
}

// A disk that has got another user since is neither overwritten nor destroyed.
func TestVMRevertShared(t *testing.T) {
	for _, clone := range []bool{false, true} {
		r := newRig(t)
		if clone {
			r.choose("coppice:revert", "clone")
		}
		vm, disks := r.guest("guest")
		snap := r.call("VM.snapshot", vm, "snap").(vmRef)
		r.write(disks[0], []byte("another's"), 0)
		r.vbd(r.vm("other"), disks[0], "0", "RW")
		r.call("VM.revert", snap)
		if now := r.vbdsOf(vm)["0"].VDI; now == disks[0] || !bytes.HasPrefix(r.contents(now), []byte("aaaa")) {
			t.Errorf("clone=%v: the VM has %s", clone, now)
		}
		if !bytes.HasPrefix(r.contents(disks[0]), []byte("another's")) {
			t.Errorf("clone=%v: the other VM's disk was overwritten", clone)
		}
		r.wantConsistent()
	}
}

// Undo snapshots: the newest one of a VM is kept, also when it is reverted to,
// and one on hold stays.
func TestVMRevertUndo(t *testing.T) {
	r := newRig(t)
	vm, disks := r.guest("guest")
	snap := r.call("VM.snapshot", vm, "snap").(vmRef)
	r.write(disks[0], []byte("one"), 0)
	r.call("session.add_to_other_config", string(r.root), undoKey, "true")
	r.call("VM.revert", snap)
	first := r.undoOf(vm)
	if got := record(r.core, first); got.SnapshotOf != vm || !got.IsASnapshot || record(r.core, vm).Parent != snap {
		t.Errorf("undo snapshot %+v", got)
	}
	r.call("VM.revert", first)
	if got := r.contents(disks[0]); !bytes.HasPrefix(got, []byte("one")) {
		t.Errorf("undone: %q", got[:10])
	}
	second := r.undoOf(vm)
	r.fails("HANDLE_INVALID|VM|"+string(first), "VM.get_record", first)
	r.call("VM.revert", second)
	if got := r.contents(disks[0]); !bytes.HasPrefix(got, []byte("aaaa")) {
		t.Errorf("redone: %q", got[:10])
	}
	third := r.undoOf(vm)
	r.call("VM.add_to_other_config", third, holdKey, "precious")
	r.call("VM.revert", snap)
	if got := len(record(r.core, vm).Snapshots); got != 3 { // snap, third, and a new one
		t.Errorf("%d snapshots", got)
	}
	r.fails("OPERATION_BLOCKED|"+string(third)+"|"+holdKey+": precious", "VM.destroy", third)
	r.call("session.remove_from_other_config", string(r.root), undoKey)
	r.call("session.add_to_other_config", string(r.root), undoKey, "false")
	r.choose(undoKey, "true")
	before := len(r.disks(r.sr))
	r.call("VM.revert", snap)
	if after := len(r.disks(r.sr)); after != before {
		t.Errorf("%d disks, then %d", before, after)
	}
	r.wantConsistent()
}

// A VM that was destroyed comes back with its uuid, its disks and its history.
func TestVMRevertGone(t *testing.T) {
	r := newRig(t)
	vm, disks := r.guest("guest")
	uuid := record(r.core, vm).UUID
	first := r.call("VM.snapshot", vm, "first").(vmRef)
	second := r.call("VM.snapshot", vm, "second").(vmRef)
	r.write(disks[0], []byte("later"), 0)
	r.call("VM.destroy", vm)
	r.call("VDI.destroy", disks[1])
	r.call("VM.revert", first)
	var back vmRef
	r.view(func(tx *db.Tx) {
		var err error
		if back, _, err = db.ByUUID[xapi.VM](tx, uuid); err != nil {
			t.Fatal(err)
		}
	})
	vbds := r.vbdsOf(back)
	if vbds["0"].VDI != disks[0] || !bytes.HasPrefix(r.contents(disks[0]), []byte("aaaa")) {
		t.Errorf("disk 0 is %s, was %s", vbds["0"].VDI, disks[0])
	}
	if got := r.contents(vbds["1"].VDI); got[100_000] != 'b' {
		t.Error("disk 1 has not come back")
	}
	for _, s := range []vmRef{first, second} {
		if got := record(r.core, s).SnapshotOf; got != back {
			t.Errorf("snapshot_of %s, want %s", got, back)
		}
	}
	r.call("VM.revert", second) // and it can be reverted like any other
	r.wantConsistent()
}

// A hold is as it is now, whatever the snapshot says of it.
func TestRevertKeepsHolds(t *testing.T) {
	r := newRig(t)
	vm, _ := r.guest("guest")
	free := r.call("VM.snapshot", vm, "free").(vmRef)
	r.call("VM.add_to_other_config", vm, holdKey, "audit")
	held := r.call("VM.snapshot", vm, "held").(vmRef)
	r.call("VM.revert", free)
	if why := record(r.core, vm).OtherConfig[holdKey]; why != "audit" {
		t.Errorf("a revert has changed the hold to %q", why)
	}
	r.call("VM.remove_from_other_config", vm, holdKey)
	r.call("VM.revert", held)
	if why, ok := record(r.core, vm).OtherConfig[holdKey]; ok {
		t.Errorf("a revert has brought back the hold %q", why)
	}
	r.call("VM.destroy", vm)
	r.call("VM.revert", held)
	if why, ok := record(r.core, record(r.core, held).SnapshotOf).OtherConfig[holdKey]; ok {
		t.Errorf("a VM came back with the hold %q", why)
	}
}
