package api

import (
	"context"

	"coppice/internal/db"
	"coppice/internal/storage"
	"coppice/internal/xapi"
)

// vmPowerMethods change what a VM does. There is no hypervisor, so a VM that
// does not run cannot be made to; what can be done is to throw the memory of a
// suspended one away.
func vmPowerMethods() map[string]any {
	return map[string]any{
		"VM.start": func(a *API, ctx context.Context, c *Call, ref xapi.Ref[xapi.VM], paused, force bool) error {
			return a.powerOp(ref, xapi.VMOperationsStart)
		},
		"VM.start_on": func(a *API, ctx context.Context, c *Call, ref xapi.Ref[xapi.VM], host xapi.Ref[xapi.Host], paused, force bool) error {
			return a.powerOpOn(ref, host, xapi.VMOperationsStartOn)
		},
		"VM.resume": func(a *API, ctx context.Context, c *Call, ref xapi.Ref[xapi.VM], paused, force bool) error {
			return a.powerOp(ref, xapi.VMOperationsResume)
		},
		"VM.resume_on": func(a *API, ctx context.Context, c *Call, ref xapi.Ref[xapi.VM], host xapi.Ref[xapi.Host], paused, force bool) error {
			return a.powerOpOn(ref, host, xapi.VMOperationsResumeOn)
		},
		"VM.pool_migrate": func(a *API, ctx context.Context, c *Call, ref xapi.Ref[xapi.VM], host xapi.Ref[xapi.Host], options map[string]string) error {
			return a.powerOpOn(ref, host, xapi.VMOperationsPoolMigrate)
		},
		"VM.pause":             powerMessage(xapi.VMOperationsPause),
		"VM.unpause":           powerMessage(xapi.VMOperationsUnpause),
		"VM.suspend":           powerMessage(xapi.VMOperationsSuspend),
		"VM.clean_shutdown":    powerMessage(xapi.VMOperationsCleanShutdown),
		"VM.clean_reboot":      powerMessage(xapi.VMOperationsCleanReboot),
		"VM.hard_reboot":       powerMessage(xapi.VMOperationsHardReboot),
		"VM.hard_shutdown":     (*API).vmHardShutdown,
		"VM.shutdown":          (*API).vmHardShutdown, // there is nobody to ask for a clean one
		"VM.power_state_reset": (*API).vmPowerStateReset,
	}
}

// powerMessage is a message that takes the VM alone and needs a hypervisor.
func powerMessage(op xapi.VMOperations) func(*API, context.Context, *Call, xapi.Ref[xapi.VM]) error {
	return func(a *API, _ context.Context, _ *Call, ref xapi.Ref[xapi.VM]) error { return a.powerOp(ref, op) }
}

// errNoHypervisor is the answer to everything that would need one.
var errNoHypervisor = xapi.NewError(xapi.ErrOperationNotAllowed,
	"This server has no hypervisor: it keeps disks and VM records but does not run VMs")

// powerOp answers with the first rule that forbids op, of which the last is
// that there is no hypervisor.
func (a *API) powerOp(ref xapi.Ref[xapi.VM], op xapi.VMOperations) error {
	return a.db.View(func(tx *db.Tx) error { return a.vmAllows(tx, ref, op) })
}

// powerOpOn is powerOp on a host, which must exist.
func (a *API) powerOpOn(ref xapi.Ref[xapi.VM], host xapi.Ref[xapi.Host], op xapi.VMOperations) error {
	return a.db.View(func(tx *db.Tx) error {
		if _, err := db.Get(tx, ref); err != nil {
			return err
		}
		if _, err := db.Get(tx, host); err != nil {
			return err
		}
		return a.vmAllows(tx, ref, op)
	})
}

// vmHardShutdown halts a suspended VM: its memory is destroyed. The commit
// that makes it halted takes the record of the memory away; a crash after that
// leaves a volume that start-up reclaims.
func (a *API) vmHardShutdown(ctx context.Context, c *Call, ref xapi.Ref[xapi.VM]) error {
	p, release, err := a.claimVM(ctx, c, xapi.VMOperationsHardShutdown,
		diskOps{vdi: xapi.VDIOperationsDestroy, sr: xapi.StorageOperationsVDIDestroy},
		func(tx *db.Tx) (p vmParts, err error) {
			p = vmParts{ref: ref, recs: map[xapi.Ref[xapi.VDI]]*xapi.VDI{}}
			if p.vm, err = db.Get(tx, ref); err != nil {
				return p, err
			}
			if rec, err := db.Get(tx, p.vm.SuspendVDI); err == nil {
				p.disks, p.recs[p.vm.SuspendVDI] = append(p.disks, p.vm.SuspendVDI), rec
			}
			return p, nil
		})
	if err != nil {
		return err
	}
	defer release()
	var repos []*repository
	for _, memory := range p.disks {
		repo, err := a.repos.get(p.recs[memory].SR)
		if err != nil {
			return err
		}
		repos = append(repos, repo)
		defer repo.reserve(storage.ID(p.recs[memory].UUID))()
	}
	err = a.db.Update(ctx, func(tx *db.Tx) error {
		if err := a.haltRecord(tx, ref); err != nil {
			return err
		}
		for _, memory := range p.disks {
			if err := a.removeDiskRecord(tx, memory); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		return err
	}
	for i, memory := range p.disks {
		a.discard(context.WithoutCancel(ctx), repos[i], storage.ID(p.recs[memory].UUID))
	}
	return nil
}

// vmPowerStateReset makes the record say that a VM is halted and does nothing
// else.
func (a *API) vmPowerStateReset(ctx context.Context, c *Call, ref xapi.Ref[xapi.VM]) error {
	return a.db.Update(ctx, func(tx *db.Tx) error {
		if err := a.vmAllows(tx, ref, xapi.VMOperationsPowerStateReset); err != nil {
			return err
		}
		return a.haltRecord(tx, ref)
	})
}

// haltRecord makes a VM halted and detaches its devices.
func (a *API) haltRecord(tx *db.Tx, ref xapi.Ref[xapi.VM]) error {
	vm, err := db.Get(tx, ref)
	if err != nil {
		return err
	}
	for _, b := range vm.VBDs {
		if _, err := db.Get(tx, b); err != nil {
			continue
		}
		err := db.Modify(tx, b, func(b *xapi.VBD) { b.CurrentlyAttached, b.Reserved, b.Device = false, false, "" })
		if err != nil {
			return err
		}
		if err := a.refreshAllowed(tx, "VBD", string(b)); err != nil {
			return err
		}
	}
	for _, v := range vm.VIFs {
		if _, err := db.Get(tx, v); err != nil {
			continue
		}
		if err := db.Modify(tx, v, func(v *xapi.VIF) { v.CurrentlyAttached, v.Reserved = false, false }); err != nil {
			return err
		}
	}
	err = db.Modify(tx, ref, func(vm *xapi.VM) {
		vm.PowerState, vm.SuspendVDI = xapi.VMPowerStateHalted, xapi.NullRef
		vm.Domid, vm.ResidentOn = -1, xapi.NullRef
	})
	if err != nil {
		return err
	}
	return a.refreshVM(tx, ref)
}
