package api

import (
	"context"
	"fmt"

	"coppice/internal/db"
	"coppice/internal/storage"
	"coppice/internal/xapi"
)

// snapshotOptions say how a snapshot of a VM is taken.
type snapshotOptions struct {
	name       string
	ignore     []xapi.Ref[xapi.VDI] // disks that are left out
	checkpoint bool                 // with the memory of a suspended VM
	scheduled  bool                 // taken by a schedule, which may prune it
}

func (a *API) vmSnapshot(ctx context.Context, c *Call, ref xapi.Ref[xapi.VM], name string, ignore []xapi.Ref[xapi.VDI]) (xapi.Ref[xapi.VM], error) {
	return a.snapshotVM(ctx, c, ref, snapshotOptions{name: name, ignore: ignore})
}

func (a *API) vmCheckpoint(ctx context.Context, c *Call, ref xapi.Ref[xapi.VM], name string) (xapi.Ref[xapi.VM], error) {
	return a.snapshotVM(ctx, c, ref, snapshotOptions{name: name, checkpoint: true})
}

// snapshotVM takes a snapshot of a VM: its record, and all its disks, those on
// one SR at one instant. CDs are shared, not copied. It takes one commit in
// each SR and one in the database, whatever the sizes; before the latter
// nothing is visible, and a failure or crash leaves nothing.
func (a *API) snapshotVM(ctx context.Context, c *Call, ref xapi.Ref[xapi.VM], o snapshotOptions) (xapi.Ref[xapi.VM], error) {
	op, alert := xapi.VMOperationsSnapshot, "VM_SNAPSHOTTED"
	if o.checkpoint {
		op, alert = xapi.VMOperationsCheckpoint, "VM_CHECKPOINTED"
	}
	p, release, err := a.claimVM(ctx, c, op, diskOps{vdi: xapi.VDIOperationsSnapshot, sr: xapi.StorageOperationsVDISnapshot},
		func(tx *db.Tx) (vmParts, error) { return partsOf(tx, ref, o.ignore, o.checkpoint) })
	if err != nil {
		return "", err
	}
	defer release()
	b := a.newBatch()
	defer b.end(ctx)
	disks, err := a.planSnapshot(b, p)
	if err != nil {
		return "", err
	}
	if err := b.make(ctx); err != nil {
		return "", err
	}
	vm, err := a.snapshotOfVM(p, o.name)
	if err != nil {
		return "", err
	}
	vm.IsVMSSSnapshot = o.scheduled
	if memory, ok := disks[p.vm.SuspendVDI]; ok && o.checkpoint {
		vm.PowerState, vm.SuspendVDI = p.vm.PowerState, memory
	}
	snapshot := xapi.NewRef[xapi.VM]()
	err = b.commit(ctx, func(tx *db.Tx) error {
		now, err := db.Get(tx, ref)
		if err != nil {
			return err
		}
		vm.Parent = now.Parent // a snapshot beside this one may have come first
		if err := a.insertVM(tx, snapshot, vm, p, disks); err != nil {
			return err
		}
		if err := db.Modify(tx, ref, func(vm *xapi.VM) { vm.Parent = snapshot }); err != nil {
			return err
		}
		return a.alert(tx, alert, xapi.ClsVM, p.vm.UUID, fmt.Sprintf("Snapshot '%s' (uuid: %s) of VM '%s' (uuid: %s)",
			vm.NameLabel, vm.UUID, p.vm.NameLabel, p.vm.UUID))
	})
	if err != nil {
		return "", err
	}
	return snapshot, nil
}

// planSnapshot adds a snapshot of each disk of p to b and returns which stands
// for which.
func (a *API) planSnapshot(b *diskBatch, p vmParts) (map[xapi.Ref[xapi.VDI]]xapi.Ref[xapi.VDI], error) {
	disks := map[xapi.Ref[xapi.VDI]]xapi.Ref[xapi.VDI]{}
	for _, vdi := range p.disks {
		src := p.recs[vdi]
		repo, err := a.repos.get(src.SR)
		if err != nil {
			return nil, err
		}
		disks[vdi] = b.snapshot(repo, a.snapshotRecord(vdi, src), storage.ID(src.UUID)).ref
	}
	return disks, nil
}
