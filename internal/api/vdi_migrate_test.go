package api

import (
	"bytes"
	"maps"
	"slices"
	"testing"

	"coppice/internal/db"
	"coppice/internal/xapi"
)

// srNamed is the SR of a name.
func (r *rig) srNamed(name string) (sr xapi.Ref[xapi.SR]) {
	r.t.Helper()
	r.view(func(tx *db.Tx) {
		if refs := db.ByName[xapi.SR](tx, name); len(refs) == 1 {
			sr = refs[0]
		}
	})
	return sr
}

// A disk moves with everything that its VM and its snapshots know of it.
func TestVDIPoolMigrate(t *testing.T) {
	onDrivers(t, func(t *testing.T, r *rig) {
		second := xapi.Ref[xapi.SR](r.secondSR())
		vm, disk := r.vm("guest"), r.disk(4<<20)
		r.call("VDI.set_name_label", disk, "disk")
		r.call("VDI.set_name_description", disk, "moves")
		r.call("VDI.add_to_other_config", disk, "k", "v")
		r.call("VDI.add_tags", disk, "tag")
		r.write(disk, bytes.Repeat([]byte("a"), 1<<20), 1<<20)
		r.vbd(vm, disk, "0", "RW")
		vbd := record(r.core, vm).VBDs[0]
		snap := r.call("VDI.snapshot", disk).(vdiRef)
		r.write(disk, []byte("changed"), 1<<20)
		was, want := record(r.core, disk), r.contents(disk)

		if got := r.call("VDI.pool_migrate", disk, string(r.sr), map[string]string{}); got != disk {
			t.Errorf("to where it is: %v", got)
		}
		moved := r.call("VDI.pool_migrate", disk, string(second), map[string]string{}).(vdiRef)
		is := record(r.core, moved)
		if is.SR != second || is.UUID == was.UUID || is.NameLabel != was.NameLabel || is.NameDescription != was.NameDescription ||
			!maps.Equal(is.OtherConfig, was.OtherConfig) || !slices.Equal(is.Tags, was.Tags) || is.VirtualSize != was.VirtualSize {
			t.Errorf("was %+v, is %+v", was, is)
		}
		if !bytes.Equal(r.contents(moved), want) {
			t.Error("other contents")
		}
		if b := record(r.core, vbd); b.VDI != moved || !slices.Equal(is.VBDs, []xapi.Ref[xapi.VBD]{vbd}) {
			t.Errorf("VBD %+v", b)
		}
		if s := record(r.core, snap); s.SnapshotOf != moved || s.SR != r.sr {
			t.Errorf("snapshot %+v", s)
		}
		r.fails("HANDLE_INVALID|VDI|"+string(disk), "VDI.get_uuid", disk)
		r.call("SR.scan", string(r.sr))
		r.call("SR.scan", string(second))
		if got := r.disks(r.sr); !slices.Equal(got, []string{record(r.core, snap).UUID}) {
			t.Errorf("left behind: %q", got)
		}
		r.restart()
		back := r.call("VDI.pool_migrate", r.ref(is.UUID), string(r.sr), map[string]string{}).(vdiRef)
		if !bytes.Equal(r.contents(back), want) {
			t.Error("other contents on the way back")
		}
		r.wantConsistent()
		r.call("VM.destroy", vm)
		r.destroy(back, snap)
	})
}

func TestVDIPoolMigrateErrors(t *testing.T) {
	r := newRig(t)
	second := r.secondSR()
	disk, none := r.disk(2<<20), map[string]string{}
	move := func(want string, vdi any, sr any, options map[string]string) {
		t.Helper()
		r.fails(want, "VDI.pool_migrate", vdi, sr, options)
	}
	move("VDI_NEEDS_VM_FOR_MIGRATE|"+string(disk), disk, second, none)
	vm := r.vm("guest")
	r.vbd(vm, disk, "0", "RW")
	move("HANDLE_INVALID|SR|OpaqueRef:x", disk, "OpaqueRef:x", none)
	move("VALUE_NOT_SUPPORTED|dest_img_format|vhd|The SRs of this server have one format each", disk, second, map[string]string{"dest_img_format": "vhd"})
	snap := r.call("VM.snapshot", vm, "snap").(vmRef)
	ofSnap := record(r.core, record(r.core, snap).VBDs[0]).VDI
	move("VM_IS_SNAPSHOT|"+string(snap)+"|migrate_send", ofSnap, second, none)
	r.call("VM.add_to_blocked_operations", vm, "migrate_send", "backup")
	move("OPERATION_BLOCKED|"+string(vm)+"|backup", disk, second, none)
	r.call("VM.remove_from_blocked_operations", vm, "migrate_send")
	r.call("VDI.enable_cbt", disk)
	move("VDI_CBT_ENABLED|"+string(disk), disk, second, none)
	r.call("VDI.disable_cbt", disk)
	attach := func(on bool) {
		set(r, record(r.core, vm).VBDs[0], func(b *xapi.VBD) { b.CurrentlyAttached = on })
	}
	attach(true)
	move("VDI_IN_USE|"+string(disk)+"|copy", disk, second, none)
	attach(false)
	r.call("PBD.unplug", r.pbd(xapi.Ref[xapi.SR](second)))
	move("SR_HAS_NO_PBDS|"+second, disk, second, none)
	if got := record(r.core, disk); len(got.CurrentOperations) > 0 {
		t.Errorf("left: %v", got.CurrentOperations)
	}
}
