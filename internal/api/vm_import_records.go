package api

import (
	"maps"
	"net"
	"slices"
	"strconv"
	"time"

	"github.com/google/uuid"

	"coppice/internal/db"
	"coppice/internal/ova"
	"coppice/internal/xapi"
)

// insert adds the VMs of the manifest with all that belongs to them but their
// disks, which are in the transaction already, and removes what they replace.
func (x *VMImport) insert(tx *db.Tx) error {
	schedules, err := x.replace(tx)
	if err != nil {
		return err
	}
	for _, id := range x.manifest.VMs {
		if err := x.insertVM(tx, id, schedules); err != nil {
			return err
		}
	}
	networks := map[xapi.Ref[xapi.Network]]xapi.Ref[xapi.Network]{}
	for _, id := range x.manifest.VMs {
		for _, vbd := range x.manifest.VBDs(id) {
			if err := x.insertVBD(tx, id, vbd); err != nil {
				return err
			}
		}
		for _, vif := range x.manifest.VIFs(id) {
			if err := x.insertVIF(tx, id, vif, networks); err != nil {
				return err
			}
		}
	}
	for _, d := range x.disks {
		of, ok := x.vdis[ova.Get(x.manifest, d.id).SnapshotOf]
		if !d.rec.IsASnapshot || !ok {
			continue
		}
		if err := db.Modify(tx, d.ref, func(v *xapi.VDI) { v.SnapshotOf = of }); err != nil {
			return err
		}
	}
	if err := x.adopt(tx); err != nil {
		return err
	}
	for _, ref := range x.vms {
		if err := x.call.api.refreshVM(tx, ref); err != nil {
			return err
		}
	}
	return nil
}

// insertVM adds a VM without devices; schedules are those of replaced VMs.
func (x *VMImport) insertVM(tx *db.Tx, id xapi.Ref[xapi.VM], schedules map[string]xapi.Ref[xapi.VMSS]) error {
	src := ova.Get(x.manifest, id)
	vm := derivedVM(src, src.NameLabel)
	if err := forgetRefs(vm); err != nil {
		return err
	}
	delete(vm.OtherConfig, undoKey)
	if host := ova.Get(x.manifest, src.Affinity); host != nil {
		if ref, _, err := db.ByUUID[xapi.Host](tx, host.UUID); err == nil {
			vm.Affinity = ref
		}
	}
	if vm.OtherConfig == nil {
		vm.OtherConfig = map[string]string{}
	}
	if name := x.identity(src); name != "" {
		if ref, _, err := db.ByUUID[xapi.VM](tx, name); err == nil {
			return xapi.NewError(xapi.ErrDuplicateVM, string(ref)) // twice in the archive
		}
		vm.UUID, vm.SnapshotSchedule = name, schedules[name]
	} else {
		vm.OtherConfig[macSeedKey] = uuid.NewString()
	}
	if x.req.Restore {
		vm.Version = restoredVersion(src.Version)
	}
	vm.MemoryOverhead = memoryOverhead(vm)
	if src.IsASnapshot {
		vm.SnapshotOf = x.vms[src.SnapshotOf]
		// A network card of a snapshot has the address that its VM has.
		if seed, ok := x.seed(tx, src.SnapshotOf); ok {
			vm.OtherConfig[macSeedKey] = seed
		}
	} else {
		vm.SnapshotTime = time.Unix(0, 0).UTC()
		vm.SnapshotInfo, vm.SnapshotMetadata = map[string]string{}, ""
	}
	if parent, ok := x.vms[src.Parent]; ok {
		vm.Parent = parent
	}
	if memory, ok := x.vdis[src.SuspendVDI]; ok && src.PowerState == xapi.VMPowerStateSuspended {
		vm.PowerState, vm.SuspendVDI = xapi.VMPowerStateSuspended, memory
	}
	if err := x.insertMetrics(tx, vm, src); err != nil {
		return err
	}
	return db.InsertAs(tx, x.vms[id], vm)
}

// forgetRefs makes the references of a VM null, which are names of a manifest.
func forgetRefs(vm *xapi.VM) error {
	for _, f := range xapi.ClassOf[xapi.VM]().Fields {
		var none any
		switch t := f.Type; {
		case f.Computed:
			continue
		case t.Kind == xapi.KindRef:
			none = xapi.NullRef
		case t.Kind == xapi.KindSet && t.Elem.Kind == xapi.KindRef:
			none = []any{}
		case t.Kind == xapi.KindMap && (t.Key.Kind == xapi.KindRef || t.Elem.Kind == xapi.KindRef):
			none = map[string]any{}
		default:
			continue
		}
		v, err := f.Type.Parse(none)
		if err != nil {
			return err
		}
		f.Set(vm, v)
	}
	return nil
}

// seed is the mac_seed of an imported VM, if that has been added.
func (x *VMImport) seed(tx *db.Tx, id xapi.Ref[xapi.VM]) (string, bool) {
	vm, err := db.Get(tx, x.vms[id])
	if err != nil {
		return "", false
	}
	return vm.OtherConfig[macSeedKey], true
}

// insertMetrics gives vm the metrics of the manifest.
func (x *VMImport) insertMetrics(tx *db.Tx, vm, src *xapi.VM) (err error) {
	metrics := xapi.New[xapi.VMMetrics]()
	if m := ova.Get(x.manifest, src.Metrics); m != nil {
		metrics = xapi.ClassOf[xapi.VMMetrics]().Clone(m).(*xapi.VMMetrics)
	}
	metrics.UUID = uuid.NewString()
	if vm.Metrics, err = db.Insert(tx, metrics); err != nil {
		return err
	}
	g := ova.Get(x.manifest, src.GuestMetrics)
	if g == nil {
		return nil
	}
	guest := xapi.ClassOf[xapi.VMGuestMetrics]().Clone(g).(*xapi.VMGuestMetrics)
	guest.UUID = uuid.NewString()
	vm.GuestMetrics, err = db.Insert(tx, guest)
	return err
}

// insertVBD adds a VBD. A CD that is not here leaves its drive empty; so does
// a missing disk of an import that was forced, and a disk has no drive.
func (x *VMImport) insertVBD(tx *db.Tx, id xapi.Ref[xapi.VM], src *xapi.VBD) error {
	ref := x.vms[id]
	vm, err := db.Get(tx, ref)
	if err != nil {
		return err
	}
	vbd := copyOfVBD(src, ref, nil)
	if x.req.Metadata {
		vbd.OtherConfig = maps.Clone(src.OtherConfig) // nothing makes its disk the VM's own
	}
	if vbd.Userdevice, err = pickDisk(tx, vm, src.Userdevice); err != nil {
		return err
	}
	if vm.PowerState == xapi.VMPowerStateSuspended {
		vbd.CurrentlyAttached, vbd.Device = src.CurrentlyAttached, src.Device
	}
	if vdi, ok := x.vdis[src.VDI]; ok && !src.Empty {
		vbd.VDI = vdi
	} else if vbd.VDI = x.medium(tx, src); vbd.VDI.IsNull() {
		if src.Type == xapi.VBDTypeDisk {
			if x.req.Force {
				return nil
			}
			return xapi.NewError(xapi.ErrImportErrorAttachedDisksNotFound)
		}
		vbd.Empty = true
	}
	if err := vbdMayBe(tx, vbd); err != nil {
		return err
	}
	b, err := db.Insert(tx, vbd)
	if err != nil {
		return err
	}
	return x.call.api.refreshAllowed(tx, "VBD", string(b))
}

// medium finds the image of a CD: the same, or one of the same name in an SR
// of such images.
func (x *VMImport) medium(tx *db.Tx, src *xapi.VBD) xapi.Ref[xapi.VDI] {
	image := ova.Get(x.manifest, src.VDI)
	if src.Empty || image == nil || src.Type == xapi.VBDTypeDisk && x.manifest.Filled(image) {
		return xapi.NullRef
	}
	if ref, _, err := db.ByUUID[xapi.VDI](tx, image.UUID); err == nil {
		return ref
	}
	for _, ref := range db.ByName[xapi.VDI](tx, image.NameLabel) {
		vdi, err := db.Get(tx, ref)
		if err != nil {
			continue
		}
		if sr, err := db.Get(tx, vdi.SR); err == nil && sr.ContentType == isoContent {
			return ref
		}
	}
	return xapi.NullRef
}

// insertVIF adds a VIF on the network of the same UUID or, for want of it,
// name. One that is not here is made, with nothing connected to it.
func (x *VMImport) insertVIF(tx *db.Tx, id xapi.Ref[xapi.VM], src *xapi.VIF, networks map[xapi.Ref[xapi.Network]]xapi.Ref[xapi.Network]) error {
	ref := x.vms[id]
	vm, err := db.Get(tx, ref)
	if err != nil {
		return err
	}
	n, err := strconv.Atoi(src.Device)
	if err != nil || n < 0 || n >= maxVIFs {
		return xapi.NewError(xapi.ErrInvalidDevice, src.Device)
	}
	for _, v := range vm.VIFs {
		if other, err := db.Get(tx, v); err == nil && other.Device == src.Device {
			return xapi.NewError(xapi.ErrDeviceAlreadyExists, src.Device)
		}
	}
	network, ok := networks[src.Network]
	if !ok {
		if network, err = x.network(tx, ova.Get(x.manifest, src.Network)); err != nil {
			return err
		}
		networks[src.Network] = network
	}
	vif := copyOfVIF(src, ref)
	vif.Network = network
	if x.req.Restore {
		if mac, err := net.ParseMAC(vif.MAC); err != nil || len(mac) != 6 {
			return xapi.NewError(xapi.ErrMACInvalid, vif.MAC)
		}
	} else {
		vif.MAC, vif.MACAutogenerated = seededMAC(vm.OtherConfig[macSeedKey], vif.Device), true
	}
	_, err = db.Insert(tx, vif)
	return err
}

// network finds or makes the network that a record of the manifest means.
func (x *VMImport) network(tx *db.Tx, src *xapi.Network) (xapi.Ref[xapi.Network], error) {
	if ref, _, err := db.ByUUID[xapi.Network](tx, src.UUID); err == nil {
		return ref, nil
	}
	if refs := db.ByName[xapi.Network](tx, src.NameLabel); len(refs) > 0 {
		return slices.Min(refs), nil
	}
	n := xapi.New[xapi.Network]()
	n.NameLabel, n.NameDescription, n.OtherConfig, n.MTU = src.NameLabel, src.NameDescription, maps.Clone(src.OtherConfig), src.MTU
	n.Bridge = freeBridge(tx)
	return db.Insert(tx, n)
}
