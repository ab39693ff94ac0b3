package api

import (
	"fmt"
	"maps"
	"slices"
	"time"

	"github.com/google/uuid"

	"coppice/internal/db"
	"coppice/internal/sexpr"
	"coppice/internal/xapi"
)

// apply makes all changes of a revert to the database.
func (r *vmRevertWork) apply(tx *db.Tx) error {
	a := r.api
	if r.undo {
		if err := r.insertUndo(tx); err != nil {
			return err
		}
	}
	if err := r.applyFields(tx); err != nil {
		return err
	}
	if err := r.applyDisks(tx); err != nil {
		return err
	}
	if err := r.applyVBDs(tx); err != nil {
		return err
	}
	if err := r.applyVIFs(tx); err != nil {
		return err
	}
	for _, u := range r.dropped {
		if err := a.removeVM(tx, u); err != nil {
			return err
		}
	}
	for _, v := range slices.Sorted(maps.Keys(r.doomed)) {
		if err := a.removeDiskRecord(tx, v); err != nil {
			return err
		}
	}
	vm, err := db.Get(tx, r.vm.ref)
	if err != nil {
		return err
	}
	if err := a.refreshVM(tx, r.vm.ref); err != nil {
		return err
	}
	return a.alert(tx, "VM_SNAPSHOT_REVERTED", xapi.ClsVM, vm.UUID, fmt.Sprintf(
		"VM '%s' (uuid: %s) was reverted to snapshot '%s' (uuid: %s)", vm.NameLabel, vm.UUID, r.snap.vm.NameLabel, r.snap.vm.UUID))
}

// insertUndo records how the VM was before.
func (r *vmRevertWork) insertUndo(tx *db.Tx) error {
	undo, err := r.api.snapshotOfVM(r.vm, undoLabel(r.snap.vm.NameLabel, r.snap.vm.OtherConfig))
	if err != nil {
		return err
	}
	undo.OtherConfig[undoKey] = "true"
	if memory, ok := r.saves[r.vm.vm.SuspendVDI]; ok {
		undo.PowerState, undo.SuspendVDI = r.vm.vm.PowerState, memory
	}
	p := r.vm
	p.vbds = slices.DeleteFunc(slices.Clone(p.vbds), func(b *xapi.VBD) bool {
		return b.Type == xapi.VBDTypeDisk && !b.Empty && r.saves[b.VDI] == ""
	})
	return r.api.insertVM(tx, xapi.NewRef[xapi.VM](), undo, p, r.saves)
}

// notReverted are the fields of a VM that VM.revert leaves as they are: its
// identity, its place in the pool and in the tree of snapshots, what the server
// computes, and what its user keeps over snapshots.
var notReverted = []string{
	"uuid", "suspend_VDI", "power_state", "parent", "children", "allowed_operations", "current_operations",
	"metrics", "guest_metrics", "resident_on", "domid", "protection_policy", "snapshot_schedule",
	"scheduled_to_be_resident_on", "snapshots", "tags", "affinity", "groups", "consoles", "VBDs", "VIFs", "VGPUs",
	"VUSBs", "VTPMs", "attached_PCIs", "crash_dumps", "ha_always_run", "generation_id",
	"is_a_snapshot", "snapshot_of", "snapshot_time", "snapshot_info", "snapshot_metadata",
	"transportable_snapshot_id", "is_control_domain", "is_vmss_snapshot", "is_snapshot_from_vmpp",
}

// fields are the values that the VM's fields get.
func (r *vmRevertWork) fields() map[string]any {
	fields := sexpr.Fields[xapi.VM](r.snap.vm.SnapshotMetadata)
	if len(fields) == 0 { // somebody else's snapshot: its own fields are what is known
		fields = map[string]any{}
		for _, f := range xapi.ClassOf[xapi.VM]().Fields {
			if f.Name != "is_a_template" && f.Name != "name_label" {
				fields[f.Name] = f.Get(r.snap.vm)
			}
		}
	}
	for _, name := range notReverted {
		delete(fields, name)
	}
	return fields
}

// applyFields changes the record of the VM, or makes it again.
func (r *vmRevertWork) applyFields(tx *db.Tx) error {
	a := r.api
	class := xapi.ClassOf[xapi.VM]()
	fields := r.fields()
	parent := r.snap.ref
	if slices.Contains(r.dropped, r.snap.ref) {
		parent = r.snap.vm.Parent
	}
	var metrics xapi.VM
	if err := a.copyMetrics(tx, &metrics, r.snap.vm); err != nil {
		return err
	}
	set := func(vm *xapi.VM) {
		why, held := vm.OtherConfig[holdKey]
		for name, v := range fields {
			class.Field(name).Set(vm, v)
		}
		if vm.OtherConfig = maps.Clone(vm.OtherConfig); vm.OtherConfig == nil {
			vm.OtherConfig = map[string]string{}
		}
		delete(vm.OtherConfig, holdKey) // a hold is what it is now, not what it was then
		if held {
			vm.OtherConfig[holdKey] = why
		}
		vm.HAAlwaysRun, vm.GenerationID, vm.Parent = false, newGenerationID(), parent
		vm.PowerState, vm.SuspendVDI = r.snap.vm.PowerState, xapi.NullRef
		if memory, ok := r.clones[r.snap.vm.SuspendVDI]; ok {
			vm.SuspendVDI = memory
		}
		vm.Metrics, vm.GuestMetrics = metrics.Metrics, metrics.GuestMetrics
	}
	if !r.gone() {
		if err := deleteEach(tx, []xapi.Ref[xapi.VMMetrics]{r.vm.vm.Metrics}); err != nil {
			return err
		}
		if err := deleteEach(tx, []xapi.Ref[xapi.VMGuestMetrics]{r.vm.vm.GuestMetrics}); err != nil {
			return err
		}
		return db.Modify(tx, r.vm.ref, set)
	}
	vm := derivedVM(r.snap.vm, r.snap.vm.NameLabel)
	vm.IsASnapshot, vm.IsATemplate, vm.SnapshotOf = false, false, xapi.NullRef
	vm.SnapshotTime, vm.SnapshotInfo, vm.SnapshotMetadata = time.Unix(0, 0).UTC(), map[string]string{}, ""
	delete(vm.OtherConfig, undoKey)
	set(vm)
	vm.UUID = r.uuid()
	if _, taken, err := db.ByUUID[xapi.VM](tx, vm.UUID); vm.UUID == "" || err == nil && taken != nil {
		vm.UUID = uuid.NewString()
	}
	if err := db.InsertAs(tx, r.vm.ref, vm); err != nil {
		return err
	}
	var orphans []xapi.Ref[xapi.VM]
	for ref, other := range db.All[xapi.VM](tx) {
		if other.SnapshotOf == r.snap.vm.SnapshotOf {
			orphans = append(orphans, ref)
		}
	}
	for _, ref := range orphans {
		if err := db.Modify(tx, ref, func(vm *xapi.VM) { vm.SnapshotOf = r.vm.ref }); err != nil {
			return err
		}
	}
	return nil
}

// applyDisks notes the sizes of disks that were put back, and makes clones the
// disks that the snapshots of their predecessors are snapshots of.
func (r *vmRevertWork) applyDisks(tx *db.Tx) error {
	for _, ref := range slices.Sorted(maps.Keys(r.sizes)) {
		if err := noteDiskInfo(tx, ref, r.sizes[ref]); err != nil {
			return err
		}
	}
	for _, s := range slices.Sorted(maps.Keys(r.clones)) {
		old := r.snap.recs[s].SnapshotOf
		if s == r.snap.vm.SuspendVDI || old.IsNull() {
			continue
		}
		var history []xapi.Ref[xapi.VDI]
		if v, err := db.Get(tx, old); err == nil {
			history = slices.Clone(v.Snapshots)
		} else {
			for ref, v := range db.All[xapi.VDI](tx) {
				if v.SnapshotOf == old {
					history = append(history, ref)
				}
			}
		}
		for _, ref := range history {
			if err := db.Modify(tx, ref, func(v *xapi.VDI) { v.SnapshotOf = r.clones[s] }); err != nil {
				return err
			}
		}
	}
	return nil
}

// disk returns what stands for a disk of the snapshot: the disk put back, the
// clone, or for media the disk itself.
func (r *vmRevertWork) disk(s xapi.Ref[xapi.VDI]) xapi.Ref[xapi.VDI] {
	if t, ok := r.inPlace[s]; ok {
		return t
	}
	if c, ok := r.clones[s]; ok {
		return c
	}
	return s
}

// applyVBDs gives the VM the VBDs of the snapshot. Those of disks that were put
// back, and unless everything is cloned the CD drives, are the VM's own with
// the properties of the snapshot's.
func (r *vmRevertWork) applyVBDs(tx *db.Tx) error {
	a := r.api
	own := func(src *xapi.VBD) func(xapi.Ref[xapi.VBD]) bool {
		return func(ref xapi.Ref[xapi.VBD]) bool {
			b, err := db.Get(tx, ref)
			if err != nil || b.Type != src.Type {
				return false
			}
			if t, ok := r.inPlace[src.VDI]; ok {
				return b.VDI == t
			}
			return src.Type != xapi.VBDTypeDisk && !r.clone && b.Userdevice == src.Userdevice
		}
	}
	var mine []xapi.Ref[xapi.VBD]
	if !r.gone() {
		mine = slices.Clone(r.vm.vm.VBDs)
		if now, err := db.Get(tx, r.vm.ref); err == nil {
			mine = slices.Clone(now.VBDs)
		}
	}
	kept := map[*xapi.VBD]xapi.Ref[xapi.VBD]{}
	for _, src := range r.snap.vbds {
		if i := slices.IndexFunc(mine, own(src)); i >= 0 {
			kept[src] = mine[i]
			mine = slices.Delete(mine, i, i+1)
		}
	}
	for _, ref := range mine {
		vbd, err := db.Get(tx, ref)
		if err != nil {
			continue
		}
		if err := db.Delete(tx, ref); err != nil {
			return err
		}
		if err := a.refreshVDI(tx, vbd.VDI); err != nil {
			return err
		}
	}
	for _, src := range r.snap.vbds {
		vbd := copyOfVBD(src, r.vm.ref, nil)
		vbd.VDI = r.disk(src.VDI)
		if r.snap.vm.PowerState == xapi.VMPowerStateSuspended {
			vbd.CurrentlyAttached, vbd.Device = src.CurrentlyAttached, src.Device
		}
		ref, ok := kept[src]
		var err error
		if ok {
			err = db.Modify(tx, ref, func(b *xapi.VBD) {
				b.VDI, b.Empty, b.Mode, b.Bootable, b.Unpluggable = vbd.VDI, vbd.Empty, vbd.Mode, vbd.Bootable, vbd.Unpluggable
				b.Userdevice, b.Device, b.CurrentlyAttached = vbd.Userdevice, vbd.Device, vbd.CurrentlyAttached
				b.QoSAlgorithmType, b.QoSAlgorithmParams = vbd.QoSAlgorithmType, vbd.QoSAlgorithmParams
			})
		} else {
			ref, err = db.Insert(tx, vbd)
		}
		if err != nil {
			return err
		}
		if err := a.refreshAllowed(tx, "VBD", string(ref)); err != nil {
			return err
		}
	}
	return nil
}

// applyVIFs gives the VM the VIFs of the snapshot, with the same addresses.
// Unless everything is cloned, one with the same device keeps its identity.
func (r *vmRevertWork) applyVIFs(tx *db.Tx) error {
	mine := map[string]xapi.Ref[xapi.VIF]{}
	if now, err := db.Get(tx, r.vm.ref); err == nil {
		for _, ref := range now.VIFs {
			if vif, err := db.Get(tx, ref); err == nil {
				mine[vif.Device] = ref
			}
		}
	}
	for _, src := range r.snap.vifs {
		vif := copyOfVIF(src, r.vm.ref)
		if ref, ok := mine[src.Device]; ok && !r.clone {
			delete(mine, src.Device)
			err := db.Modify(tx, ref, func(v *xapi.VIF) {
				id := v.UUID
				*v = *vif
				v.UUID = id
			})
			if err != nil {
				return err
			}
			continue
		}
		if ref, ok := mine[src.Device]; ok {
			delete(mine, src.Device)
			if err := db.Delete(tx, ref); err != nil {
				return err
			}
		}
		if _, err := db.Insert(tx, vif); err != nil {
			return err
		}
	}
	return deleteEach(tx, slices.Sorted(maps.Values(mine)))
}
