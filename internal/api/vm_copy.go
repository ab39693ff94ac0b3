package api

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"strings"
	"time"

	"github.com/google/uuid"

	"coppice/internal/claim"
	"coppice/internal/db"
	"coppice/internal/sexpr"
	"coppice/internal/storage"
	"coppice/internal/xapi"
)

// vmParts is what belongs to a VM, as one transaction saw it. The records are
// shared and only read.
type vmParts struct {
	ref  xapi.Ref[xapi.VM]
	vm   *xapi.VM
	vbds []*xapi.VBD // by device
	vifs []*xapi.VIF // by device
	// disks are the VDIs of the VBDs of type Disk, each once, in the order of
	// the VBDs, without those to be ignored; then the suspend image, if it is
	// wanted.
	disks []xapi.Ref[xapi.VDI]
	recs  map[xapi.Ref[xapi.VDI]]*xapi.VDI
}

// partsOf reads a VM with its VBDs and VIFs. VBDs of disks in ignore are left
// out; withMemory adds the suspend image to the disks.
func partsOf(tx *db.Tx, ref xapi.Ref[xapi.VM], ignore []xapi.Ref[xapi.VDI], withMemory bool) (p vmParts, err error) {
	p = vmParts{ref: ref, recs: map[xapi.Ref[xapi.VDI]]*xapi.VDI{}}
	if p.vm, err = db.Get(tx, ref); err != nil {
		return p, err
	}
	add := func(r xapi.Ref[xapi.VDI]) error {
		if p.recs[r] != nil {
			return nil
		}
		rec, err := db.Get(tx, r)
		if err != nil {
			return err
		}
		p.disks, p.recs[r] = append(p.disks, r), rec
		return nil
	}
	for _, b := range p.vm.VBDs {
		if vbd, err := db.Get(tx, b); err == nil && (vbd.VDI.IsNull() || !slices.Contains(ignore, vbd.VDI)) {
			p.vbds = append(p.vbds, vbd)
		}
	}
	slices.SortFunc(p.vbds, func(a, b *xapi.VBD) int {
		x, _ := diskNumber(a.Userdevice)
		y, _ := diskNumber(b.Userdevice)
		return x - y
	})
	for _, vbd := range p.vbds {
		if vbd.Type != xapi.VBDTypeDisk || vbd.Empty {
			continue
		}
		if err := add(vbd.VDI); err != nil {
			return p, err
		}
	}
	if withMemory && !p.vm.SuspendVDI.IsNull() {
		if err := add(p.vm.SuspendVDI); err != nil {
			return p, err
		}
	}
	for _, v := range p.vm.VIFs {
		if vif, err := db.Get(tx, v); err == nil {
			p.vifs = append(p.vifs, vif)
		}
	}
	slices.SortFunc(p.vifs, func(a, b *xapi.VIF) int { return strings.Compare(a.Device, b.Device) })
	return p, nil
}

// errPartsChanged makes a claim start over: what it was to claim is not what
// is there now.
var errPartsChanged = errors.New("the VM has changed")

// diskOps are the operations that making a VM of another one performs on each
// disk and on its SR.
type diskOps struct {
	vdi    xapi.VDIOperations
	sr     xapi.StorageOperations // "" for none
	beside xapi.Ref[xapi.VM]      // whose VBDs do not count as attached, "" for none
}

// claimVM claims op on a VM and the operations ops on its disks and their SRs,
// all in one step, and returns the parts that it saw then.
func (a *API) claimVM(ctx context.Context, c *Call, op xapi.VMOperations, ops diskOps, parts func(*db.Tx) (vmParts, error)) (p vmParts, release func(), err error) {
	for {
		err := a.db.View(func(tx *db.Tx) (err error) {
			p, err = parts(tx)
			return err
		})
		if err != nil {
			return p, nil, err
		}
		claims := []claim.Claim{claim.On(p.ref, op)}
		srs := map[xapi.Ref[xapi.SR]]bool{}
		for _, ref := range p.disks {
			claims = append(claims, claim.On(ref, ops.vdi))
			if sr := p.recs[ref].SR; ops.sr != "" && !srs[sr] {
				srs[sr] = true
				claims = append(claims, claim.On(sr, ops.sr))
			}
		}
		release, err := c.Claim(ctx, func(tx *db.Tx) error {
			if err := a.vmAllows(tx, p.ref, op); err != nil {
				return err
			}
			now, err := parts(tx)
			if err != nil {
				return err
			}
			if !slices.Equal(now.disks, p.disks) {
				return errPartsChanged
			}
			p = now
			for _, ref := range p.disks {
				if err := a.vdiAllowsBeside(tx, ref, ops.vdi, ops.beside); err != nil {
					return err
				}
			}
			for sr := range srs {
				if err := a.srAllows(tx, sr, ops.sr); err != nil {
					return err
				}
			}
			return nil
		}, claims...)
		if !errors.Is(err, errPartsChanged) {
			return p, release, err
		}
	}
}

// newGenerationID is what a guest recognises by that it runs from a copy.
func newGenerationID() string { return fmt.Sprintf("%d:%d", rand.Int64(), rand.Int64()) }

// derivedVM is the record of a VM made from src: what its user configured is
// the same, its identity, its history and its place in the pool are its own.
func derivedVM(src *xapi.VM, name string) *xapi.VM {
	vm := xapi.ClassOf[xapi.VM]().Clone(src).(*xapi.VM)
	vm.UUID, vm.NameLabel = uuid.NewString(), name
	vm.PowerState, vm.SuspendVDI, vm.SuspendSR = xapi.VMPowerStateHalted, xapi.NullRef, xapi.NullRef
	vm.Domid, vm.ResidentOn, vm.ScheduledToBeResidentOn = -1, xapi.NullRef, xapi.NullRef
	vm.AllowedOperations, vm.CurrentOperations = nil, map[string]xapi.VMOperations{}
	vm.BlockedOperations, vm.Blobs = map[xapi.VMOperations]string{}, map[string]xapi.Ref[xapi.Blob]{}
	vm.HAAlwaysRun, vm.RequiresReboot = false, false
	vm.ProtectionPolicy, vm.SnapshotSchedule, vm.Appliance = xapi.NullRef, xapi.NullRef, xapi.NullRef
	vm.StartDelay, vm.ShutdownDelay, vm.Order, vm.Version = 0, 0, 0, 0
	vm.IsDefaultTemplate, vm.IsVMSSSnapshot, vm.IsSnapshotFromVMPP = false, false, false
	vm.PendingGuidances, vm.PendingGuidancesFull, vm.PendingGuidancesRecommended = nil, nil, nil
	vm.GenerationID = newGenerationID()
	vm.TransportableSnapshotID = ""
	delete(vm.OtherConfig, "default_template")
	delete(vm.OtherConfig, "xensource_internal")
	delete(vm.OtherConfig, holdKey) // it was meant for src
	return vm
}

// snapshotOfVM makes derivedVM's result a snapshot.
func (a *API) snapshotOfVM(p vmParts, name string) (*xapi.VM, error) {
	metadata, err := sexpr.Record(p.vm)
	if err != nil {
		return nil, err
	}
	vm := derivedVM(p.vm, name)
	vm.IsASnapshot, vm.IsATemplate = true, true
	vm.SnapshotOf, vm.SnapshotTime = p.ref, a.now().Truncate(time.Second)
	vm.SnapshotMetadata = metadata
	vm.SnapshotInfo = map[string]string{
		"disk-snapshot-type":      "crash_consistent",
		"power-state-at-snapshot": string(p.vm.PowerState),
	}
	return vm, nil // parent is the source's: the older snapshot
}

// cloneOfVM makes derivedVM's result a VM of its own, outside of the tree of
// snapshots and with other addresses.
func cloneOfVM(src *xapi.VM, name string) *xapi.VM {
	vm := derivedVM(src, name)
	vm.IsASnapshot, vm.SnapshotOf, vm.SnapshotTime = false, xapi.NullRef, time.Unix(0, 0).UTC()
	vm.SnapshotInfo, vm.SnapshotMetadata, vm.Parent = map[string]string{}, "", xapi.NullRef
	vm.OtherConfig[macSeedKey] = uuid.NewString()
	delete(vm.OtherConfig, undoKey)
	if src.IsATemplate {
		vm.OtherConfig["base_template_name"] = src.NameLabel
	}
	return vm
}

// insertVM adds a VM with copies of the metrics, VBDs and VIFs of the one it
// was made from. disks says which new disk stands for which old one; what is
// not in it is shared, as CDs are.
func (a *API) insertVM(tx *db.Tx, ref xapi.Ref[xapi.VM], vm *xapi.VM, p vmParts, disks map[xapi.Ref[xapi.VDI]]xapi.Ref[xapi.VDI]) error {
	if err := a.copyMetrics(tx, vm, p.vm); err != nil {
		return err
	}
	if err := db.InsertAs(tx, ref, vm); err != nil {
		return err
	}
	for _, src := range p.vbds {
		vbd := copyOfVBD(src, ref, disks)
		if vm.PowerState == xapi.VMPowerStateSuspended {
			vbd.CurrentlyAttached, vbd.Device = src.CurrentlyAttached, src.Device
		}
		b, err := db.Insert(tx, vbd)
		if err != nil {
			return err
		}
		if err := a.refreshAllowed(tx, "VBD", string(b)); err != nil {
			return err
		}
	}
	for _, src := range p.vifs {
		vif := copyOfVIF(src, ref)
		if !vm.IsASnapshot {
			vif.MAC, vif.MACAutogenerated = seededMAC(vm.OtherConfig[macSeedKey], vif.Device), true
		}
		if _, err := db.Insert(tx, vif); err != nil {
			return err
		}
	}
	return a.refreshVM(tx, ref)
}

// copyMetrics gives vm copies of the metrics of src.
func (a *API) copyMetrics(tx *db.Tx, vm, src *xapi.VM) error {
	metrics := xapi.New[xapi.VMMetrics]()
	if m, err := db.Get(tx, src.Metrics); err == nil {
		metrics = xapi.ClassOf[xapi.VMMetrics]().Clone(m).(*xapi.VMMetrics)
		metrics.UUID = uuid.NewString()
	}
	var err error
	if vm.Metrics, err = db.Insert(tx, metrics); err != nil {
		return err
	}
	vm.GuestMetrics = xapi.NullRef
	g, err := db.Get(tx, src.GuestMetrics)
	if err != nil {
		return nil
	}
	guest := xapi.ClassOf[xapi.VMGuestMetrics]().Clone(g).(*xapi.VMGuestMetrics)
	guest.UUID = uuid.NewString()
	vm.GuestMetrics, err = db.Insert(tx, guest)
	return err
}

// isoContent is the content_type of SRs that hold images of CDs.
const isoContent = "iso"

// ownerKey in the other_config of a VBD says that its disk belongs to the VM
// and goes with it.
const ownerKey = "owner"

// copyOfVBD is a detached VBD like src, of another VM, with the disk that
// stands for src's.
func copyOfVBD(src *xapi.VBD, vm xapi.Ref[xapi.VM], disks map[xapi.Ref[xapi.VDI]]xapi.Ref[xapi.VDI]) *xapi.VBD {
	vbd := xapi.ClassOf[xapi.VBD]().Clone(src).(*xapi.VBD)
	vbd.UUID, vbd.VM = uuid.NewString(), vm
	vbd.CurrentlyAttached, vbd.Reserved, vbd.Device = false, false, ""
	vbd.CurrentOperations, vbd.AllowedOperations = map[string]xapi.VBDOperations{}, nil
	vbd.StatusCode, vbd.StatusDetail, vbd.RuntimeProperties = 0, "", map[string]string{}
	vbd.Metrics = xapi.NullRef
	if vbd.Type == xapi.VBDTypeDisk {
		if d, ok := disks[src.VDI]; ok {
			vbd.VDI = d
		}
		if _, owned := vbd.OtherConfig[ownerKey]; !owned {
			vbd.OtherConfig = maps.Clone(vbd.OtherConfig)
			vbd.OtherConfig[ownerKey] = ""
		}
	}
	return vbd
}

// copyOfVIF is an unplugged VIF like src, of another VM, with the same MAC.
func copyOfVIF(src *xapi.VIF, vm xapi.Ref[xapi.VM]) *xapi.VIF {
	vif := xapi.ClassOf[xapi.VIF]().Clone(src).(*xapi.VIF)
	vif.UUID, vif.VM = uuid.NewString(), vm
	vif.CurrentlyAttached, vif.Reserved, vif.ReservedPCI = false, false, xapi.NullRef
	vif.CurrentOperations, vif.AllowedOperations = map[string]xapi.VIFOperations{}, nil
	vif.StatusCode, vif.StatusDetail, vif.RuntimeProperties = 0, "", map[string]string{}
	vif.Metrics = xapi.NullRef
	return vif
}

// partsToCopy are the parts of a VM that its clones and copies get: those of a
// checkpoint are halted and have no memory.
func partsToCopy(ref xapi.Ref[xapi.VM]) func(*db.Tx) (vmParts, error) {
	return func(tx *db.Tx) (vmParts, error) {
		vm, err := db.Get(tx, ref)
		if err != nil {
			return vmParts{}, err
		}
		return partsOf(tx, ref, nil, !vm.IsASnapshot)
	}
}

// vmClone makes a VM, or of a template a template, with clones of the disks.
// It takes the same time whatever their size. Both the VM and its disks appear
// in one commit, or nothing does.
func (a *API) vmClone(ctx context.Context, c *Call, ref xapi.Ref[xapi.VM], name string) (xapi.Ref[xapi.VM], error) {
	p, release, err := a.claimVM(ctx, c, xapi.VMOperationsClone,
		diskOps{vdi: xapi.VDIOperationsClone, sr: xapi.StorageOperationsVDIClone},
		partsToCopy(ref))
	if err != nil {
		return "", err
	}
	defer release()
	b := a.newBatch()
	defer b.end(ctx)
	for _, vdi := range p.disks {
		repo, err := a.repos.get(p.recs[vdi].SR)
		if err != nil {
			return "", err
		}
		b.clone(repo, derivedDisk(p.recs[vdi]), storage.ID(p.recs[vdi].UUID))
	}
	return a.finishCopy(ctx, b, p, name, "VM_CLONED")
}

// finishCopy makes the disks of a clone or copy and records them with its VM.
// The disks of b stand for those of p in their order.
func (a *API) finishCopy(ctx context.Context, b *diskBatch, p vmParts, name, alert string) (xapi.Ref[xapi.VM], error) {
	if err := b.make(ctx); err != nil {
		return "", err
	}
	vm, ref := cloneOfVM(p.vm, name), xapi.NewRef[xapi.VM]()
	disks := map[xapi.Ref[xapi.VDI]]xapi.Ref[xapi.VDI]{}
	for i, vdi := range p.disks {
		disks[vdi] = b.disks[i].ref
	}
	if memory, ok := disks[p.vm.SuspendVDI]; ok {
		vm.PowerState, vm.SuspendVDI, vm.SuspendSR = p.vm.PowerState, memory, p.vm.SuspendSR
	}
	err := b.commit(ctx, func(tx *db.Tx) error {
		if err := a.insertVM(tx, ref, vm, p, disks); err != nil {
			return err
		}
		return a.alert(tx, alert, xapi.ClsVM, vm.UUID, fmt.Sprintf("VM '%s' (uuid: %s) was made of '%s' (uuid: %s)",
			vm.NameLabel, vm.UUID, p.vm.NameLabel, p.vm.UUID))
	})
	if err != nil {
		return "", err
	}
	return ref, nil
}

// vmCopy is vmClone with full copies of the disks, in sr or, where that is
// null or leads nowhere, each in the SR of its original. It takes as long as
// the disks have data and can be cancelled, which leaves nothing.
func (a *API) vmCopy(ctx context.Context, c *Call, ref xapi.Ref[xapi.VM], name string, sr xapi.Ref[xapi.SR]) (xapi.Ref[xapi.VM], error) {
	err := a.db.View(func(tx *db.Tx) error {
		rec, err := db.Get(tx, sr)
		switch {
		case err != nil:
			sr = xapi.NullRef
		case rec.ContentType == isoContent:
			return xapi.NewError(xapi.ErrOperationNotAllowed, "Disks cannot be copied to an SR of ISO images.")
		}
		return nil
	})
	if err != nil {
		return "", err
	}
	p, release, err := a.claimVM(ctx, c, xapi.VMOperationsCopy, diskOps{vdi: xapi.VDIOperationsCopy},
		partsToCopy(ref))
	if err != nil {
		return "", err
	}
	defer release()
	b := a.newBatch()
	defer b.end(ctx)
	for _, vdi := range p.disks {
		src, err := a.openReader(ctx, c, vdi, nil)
		if err != nil {
			return "", err
		}
		defer src.close()
		to := sr
		if to.IsNull() {
			to = src.rec.SR
		}
		repo, drop, err := a.holdSR(ctx, c, to, xapi.StorageOperationsVDICopy)
		if err != nil {
			return "", err
		}
		defer drop()
		rec := derivedDisk(src.rec)
		rec.SR, rec.OnBoot = to, xapi.OnBootPersist
		b.add(repo, rec, func(ctx context.Context, id storage.ID, attrs []byte) (storage.Info, error) {
			return copyOf(c, src).Create(ctx, repo, storage.Spec{ID: id, Attrs: attrs}, nil)
		})
	}
	return a.finishCopy(ctx, b, p, name, "VM_CLONED")
}
