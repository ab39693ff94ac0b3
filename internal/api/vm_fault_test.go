package api

import (
	"bytes"
	"context"
	"fmt"
	"hash/crc32"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"

	"coppice/internal/db"
	"coppice/internal/storage"
	"coppice/internal/xapi"
)

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// world describes every VM and every disk by what users see of them, without
// references and uuids, so that two servers can be compared: a VM with its
// place in the tree of snapshots, the disks on its devices, and its addresses;
// a disk with its size, its contents and what it is a snapshot of.
func (r *rig) world() string {
	r.t.Helper()
	disks := map[vdiRef]string{}
	var all []vdiRef
	r.view(func(tx *db.Tx) {
		for ref := range db.All[xapi.VDI](tx) {
			all = append(all, ref)
		}
	})
	for _, ref := range all {
		v := record(r.core, ref)
		sum := crc32.Checksum(r.contents(ref), castagnoli)
		disks[ref] = fmt.Sprintf("%s of %d bytes %x in %s", v.NameLabel, v.VirtualSize, sum, record(r.core, v.SR).NameLabel)
	}
	var lines []string
	r.view(func(tx *db.Tx) {
		name := func(ref vmRef) string {
			if vm, err := db.Get(tx, ref); err == nil {
				return vm.NameLabel
			}
			return "-"
		}
		for _, vm := range db.All[xapi.VM](tx) {
			if vm.IsControlDomain || vm.IsDefaultTemplate {
				continue
			}
			line := fmt.Sprintf("VM %s: %s of %s after %s, template %v, %s, memory %s", vm.NameLabel, vm.PowerState,
				name(vm.SnapshotOf), name(vm.Parent), vm.IsATemplate, vm.NameDescription, disks[vm.SuspendVDI])
			var parts []string
			for _, b := range vm.VBDs {
				vbd, err := db.Get(tx, b)
				if err != nil {
					r.t.Errorf("a VBD of %s: %v", vm.NameLabel, err)
					continue
				}
				parts = append(parts, fmt.Sprintf("%s %s %s [%s]", vbd.Type, vbd.Userdevice, vbd.Mode, disks[vbd.VDI]))
			}
			for _, v := range vm.VIFs {
				if vif, err := db.Get(tx, v); err == nil {
					parts = append(parts, "VIF "+vif.Device)
				}
			}
			if _, err := db.Get(tx, vm.Metrics); err != nil {
				r.t.Errorf("metrics of %s: %v", vm.NameLabel, err)
			}
			if len(vm.CurrentOperations) > 0 {
				r.t.Errorf("VM %s has current_operations %v", vm.NameLabel, vm.CurrentOperations)
			}
			slices.Sort(parts)
			lines = append(lines, line+"\n  "+strings.Join(parts, "\n  "))
		}
		for ref, v := range db.All[xapi.VDI](tx) {
			lines = append(lines, fmt.Sprintf("VDI %s, snapshot of [%s], %d VBDs, %d snapshots",
				disks[ref], disks[v.SnapshotOf], len(v.VBDs), len(v.Snapshots)))
		}
		metrics := tx.Count(xapi.ClassOf[xapi.VMMetrics]())
		if vms := tx.Count(xapi.ClassOf[xapi.VM]()); metrics != vms {
			r.t.Errorf("%d VMs and %d VM_metrics", vms, metrics)
		}
		lines = append(lines, fmt.Sprintf("%d messages", tx.Count(xapi.ClassOf[xapi.Message]())))
	})
	slices.Sort(lines)
	return strings.Join(lines, "\n")
}

// guest makes a VM with two disks that have contents, a CD and a VIF.
func (r *rig) guest(name string) (vm vmRef, disks []vdiRef) {
	r.t.Helper()
	vm = r.vm(name)
	for i := range 2 {
		disk := r.disk(2 << 20)
		r.call("VDI.set_name_label", disk, fmt.Sprintf("disk %d", i))
		r.write(disk, bytes.Repeat([]byte{byte('a' + i)}, 5000), int64(i)*100_000)
		r.vbd(vm, disk, fmt.Sprint(i), "RW")
		disks = append(disks, disk)
	}
	cd := r.disk(2 << 20)
	r.call("VDI.set_name_label", cd, "CD")
	args := vbdArgs(vm, cd, "3", "RO")
	args["type"] = "CD"
	r.call("VBD.create", args)
	r.vif(vm, "0")
	return vm, disks
}

// suspend makes a VM look as if it had been suspended.
func (r *rig) suspend(vm vmRef) {
	r.t.Helper()
	memory := r.disk(2 << 20)
	r.call("VDI.set_name_label", memory, "memory")
	r.write(memory, []byte("what it thought"), 0)
	set(r, vm, func(v *xapi.VM) { v.PowerState, v.SuspendVDI = xapi.VMPowerStateSuspended, memory })
}

// changed makes a VM, takes a snapshot, and changes everything afterwards.
func (r *rig) changed() (vm, snap vmRef) {
	r.t.Helper()
	vm, disks := r.guest("guest")
	snap = r.call("VM.snapshot", vm, "snap").(vmRef)
	r.call("VM.set_name_description", vm, "changed")
	for _, d := range disks {
		r.write(d, []byte("changed"), 50_000)
	}
	r.call("VDI.resize", disks[0], 4<<20)
	extra := r.disk(2 << 20)
	r.call("VDI.set_name_label", extra, "extra")
	r.vbd(vm, extra, "5", "RW")
	r.vif(vm, "1")
	return vm, snap
}

// changedDisk makes a disk, takes a snapshot, changes the disk, and wants
// reverts to be undoable.
func (r *rig) changedDisk() (disk, snap vdiRef) {
	r.t.Helper()
	disk = filledDisk(r)
	snap = r.call("VDI.snapshot", disk).(vdiRef)
	r.call("VDI.set_name_label", snap, "snap")
	r.write(disk, []byte("changed"), 50_000)
	r.call("VDI.resize", disk, 8<<20)
	r.choose(undoKey, "true")
	return disk, snap
}

// vmFaultCase is an operation on a VM, or a disk, that must be all or nothing.
type vmFaultCase struct {
	setup func(r *rig) vmRef // what run is to work on
	run   func(r *rig, on vmRef) error
}

func invoke(message string, params ...any) func(*rig, vmRef) error {
	return func(r *rig, on vmRef) error {
		_, err := r.try(r.root, message, append([]any{on}, params...)...)
		return err
	}
}

var vmFaultCases = map[string]vmFaultCase{
	"snapshot": {
		func(r *rig) vmRef { vm, _ := r.guest("guest"); return vm },
		invoke("VM.snapshot", "made"),
	},
	"checkpoint": {
		func(r *rig) vmRef { vm, _ := r.guest("guest"); r.suspend(vm); return vm },
		invoke("VM.checkpoint", "made"),
	},
	"clone": {
		func(r *rig) vmRef { vm, _ := r.guest("guest"); return vm },
		invoke("VM.clone", "made"),
	},
	"copy": {
		func(r *rig) vmRef { vm, _ := r.guest("guest"); return vm },
		invoke("VM.copy", "made", xapi.NullRef),
	},
	"provision": {
		func(r *rig) vmRef {
			vm := r.vm("guest")
			r.call("VM.set_is_a_template", vm, true)
			r.call("VM.add_to_other_config", vm, "disks",
				`<provision><disk device="0" size="4194304" sr="" bootable="true" type="system"/><disk device="1" size="1" sr=""/></provision>`)
			return vm
		},
		invoke("VM.provision"),
	},
	"prune": {
		func(r *rig) vmRef { _, snap := r.changed(); return snap },
		func(r *rig, on vmRef) error {
			return r.scheduler.do(r.ctx, "prune", func(ctx context.Context, c *Call) error { return r.destroySnapshot(ctx, c, on) })
		},
	},
	"revert":       {func(r *rig) vmRef { _, snap := r.changed(); return snap }, invoke("VM.revert")},
	"revert clone": {func(r *rig) vmRef { _, snap := r.changed(); r.choose("coppice:revert", "clone"); return snap }, invoke("VM.revert")},
	"revert undo":  {func(r *rig) vmRef { _, snap := r.changed(); r.choose("coppice:undo", "true"); return snap }, invoke("VM.revert")},
	"revert again": {
		func(r *rig) vmRef {
			vm, snap := r.changed()
			r.choose("coppice:undo", "true")
			r.call("VM.revert", snap)
			r.call("VM.set_name_description", vm, "changed again")
			return snap
		},
		invoke("VM.revert"),
	},
	"undo": {
		func(r *rig) vmRef {
			vm, snap := r.changed()
			r.choose("coppice:undo", "true")
			r.call("VM.revert", snap)
			return r.undoOf(vm)
		},
		invoke("VM.revert"),
	},
	"undo clone": {
		func(r *rig) vmRef {
			vm, snap := r.changed()
			r.choose("coppice:undo", "true")
			r.choose("coppice:revert", "clone")
			r.call("VM.revert", snap)
			return r.undoOf(vm)
		},
		invoke("VM.revert"),
	},
	"disk revert undo": {func(r *rig) vmRef { _, snap := r.changedDisk(); return vmRef(snap) }, invoke("VDI.revert")},
	"disk undo": {
		func(r *rig) vmRef {
			disk, snap := r.changedDisk()
			r.call("VDI.revert", snap)
			return vmRef(r.undoOfDisk(disk))
		},
		invoke("VDI.revert"),
	},
	"revert gone": {
		func(r *rig) vmRef { vm, snap := r.changed(); r.call("VM.destroy", vm); return snap },
		invoke("VM.revert"),
	},
	"revert suspended": {
		func(r *rig) vmRef { vm, snap := r.changed(); r.suspend(vm); return snap },
		invoke("VM.revert"),
	},
	"revert to checkpoint": {
		func(r *rig) vmRef {
			vm, _ := r.changed()
			r.suspend(vm)
			snap := r.call("VM.checkpoint", vm, "checkpoint").(vmRef)
			r.call("VM.hard_shutdown", vm)
			return snap
		},
		invoke("VM.revert"),
	},
	"move a disk": {
		func(r *rig) vmRef {
			r.secondSR()
			vm, disk := r.vm("guest"), r.disk(2<<20)
			r.vbd(vm, disk, "0", "RW")
			r.call("VM.snapshot", vm, "snap")
			r.write(disk, []byte("changed"), 50_000)
			return vmRef(disk)
		},
		func(r *rig, disk vmRef) error {
			_, err := r.try(r.root, "VDI.pool_migrate", disk, string(r.srNamed("second")), map[string]string{})
			return err
		},
	},
	"destroy":       {func(r *rig) vmRef { _, snap := r.changed(); return snap }, invoke("VM.destroy")},
	"hard_shutdown": {func(r *rig) vmRef { vm, _ := r.guest("guest"); r.suspend(vm); return vm }, invoke("VM.hard_shutdown")},
}

// choose sets a key in the pool's other_config.
func (r *rig) choose(key, value string) {
	r.t.Helper()
	r.call("pool.remove_from_other_config", r.pool, key)
	r.call("pool.add_to_other_config", r.pool, key, value)
}

// undoOf returns the undo snapshot of a VM.
func (r *rig) undoOf(vm vmRef) vmRef {
	r.t.Helper()
	return onlyUndo(r, record(r.core, vm).Snapshots, func(s vmRef) map[string]string { return record(r.core, s).OtherConfig })
}

// undoOfDisk returns the undo snapshot of a disk.
func (r *rig) undoOfDisk(disk vdiRef) vdiRef {
	r.t.Helper()
	return onlyUndo(r, record(r.core, disk).Snapshots, func(s vdiRef) map[string]string { return record(r.core, s).OtherConfig })
}

// onlyUndo returns the one of some snapshots that is an undo snapshot.
func onlyUndo[R ~string](r *rig, snapshots []R, otherConfig func(R) map[string]string) (undo R) {
	r.t.Helper()
	for _, s := range snapshots {
		if otherConfig(s)[undoKey] == "true" {
			if undo != "" {
				r.t.Errorf("two undo snapshots, %s and %s", undo, s)
			}
			undo = s
		}
	}
	if undo == "" {
		r.t.Fatalf("no undo snapshot in %q", snapshots)
	}
	return undo
}

// TestVMFaultAtEveryCall makes the n-th call to the storage, or the n-th commit
// of the database, fail in every way, for every n (see [faultStep]), during each operation on a
// VM. At once, where the server still works, and after a restart, the world is
// as before or as after, acknowledged operations are done, and every volume
// belongs to a disk.
func TestVMFaultAtEveryCall(t *testing.T) {
	for name, c := range vmFaultCases {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			sweepFaults(t, c, func(*rig) {})
		})
	}
}

// sweepFaults does for one operation what TestVMFaultAtEveryCall says. then
// looks at each server after its restart.
func sweepFaults(t *testing.T, c vmFaultCase, then func(*rig)) {
	r := newRig(t)
	on := c.setup(r)
	before := r.world()
	if err := c.run(r, on); err != nil {
		t.Fatalf("without a fault: %v", err)
	}
	after := r.world()
	if before == after {
		t.Fatalf("nothing happened:\n%s", before)
	}
	r.wantConsistent()
	r.restart()
	if again := r.world(); again != after {
		t.Fatalf("a restart changes\n%s\nto\n%s", after, again)
	}
	for _, commits := range []bool{false, true} {
		for _, kind := range []faultKind{failBefore, failAfter, failAlways} {
			for n := 1 + rand.IntN(faultStep); vmFaultOnce(t, c, n, kind, commits, before, after, then); n += faultStep {
				if t.Failed() {
					t.Fatalf("commits %v, %v, call %d", commits, kind, n)
				}
			}
		}
	}
}

// vmFaultOnce runs an operation with one fault and reports whether it came to
// that.
func vmFaultOnce(t *testing.T, c vmFaultCase, n int, kind faultKind, commits bool, before, after string, then func(*rig)) bool {
	r := newRig(t)
	on := c.setup(r)
	r.faults.arm(n, kind, commits)
	err := c.run(r, on)
	fired := r.faults.hasFired()
	if kind != failAlways {
		r.faults.disarm() // what follows only looks
	}
	if !fired && err != nil {
		t.Fatalf("without a fault: %v", err)
	}
	check := func(when string) {
		t.Helper()
		got := r.world()
		switch {
		case got == after || got == before && err != nil:
		case got == before:
			t.Errorf("%s: acknowledged, but undone", when)
		default:
			t.Errorf("%s: neither before nor after (%v):\n%s\nbefore:\n%s\nafter:\n%s", when, err, got, before, after)
		}
	}
	if !commits && kind != failAlways {
		check("at once")
	}
	r.restart()
	check("after a restart")
	r.wantConsistent()
	then(r)
	return fired
}

// What another server's revert has left in a store is not judged here: the disk
// keeps its contents, and the volume with those of before becomes a disk.
func TestSettleForeignRevert(t *testing.T) {
	for _, gone := range []bool{false, true} {
		r := newRig(t)
		second := xapi.Ref[xapi.SR](r.secondSR())
		repo, err := r.repos.get(second)
		if err != nil {
			t.Fatal(err)
		}
		const disk, before = "11111111-2222-4333-8444-555555555555", "11111111-2222-4333-8444-666666666666"
		mark := diskAttrs{UUID: before, Type: xapi.VDITypeUser, Snapshot: true, SnapshotOf: disk, Revert: &revertMark{
			VM: "11111111-2222-4333-8444-777777777777", Generation: "0:0", Gone: gone, Disk: disk,
		}}
		for id, attrs := range map[string]diskAttrs{disk: {UUID: disk, Type: xapi.VDITypeUser}, before: mark} {
			spec := orphanSpec(id)
			spec.Attrs = attrs.encode()
			if _, err := repo.Create(t.Context(), spec); err != nil {
				t.Fatal(err)
			}
		}
		vol, err := repo.Open(t.Context(), disk, storage.Live)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := vol.WriteAt([]byte("reverted"), 0); err != nil {
			t.Fatal(err)
		}
		vol.Close()
		r.call("PBD.unplug", r.pbd(second))
		r.call("PBD.plug", r.pbd(second))
		if got := r.disks(second); !slices.Equal(got, []string{disk, before}) {
			t.Errorf("gone=%v: disks %q", gone, got)
		}
		if got := r.contents(r.ref(disk)); !bytes.HasPrefix(got, []byte("reverted")) {
			t.Errorf("gone=%v: contents %q", gone, got[:8])
		}
	}
}
