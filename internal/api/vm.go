package api

import (
	"context"
	"slices"
	"strconv"

	"github.com/google/uuid"

	"coppice/internal/claim"
	"coppice/internal/db"
	"coppice/internal/xapi"
)

func vmMethods() map[string]any {
	return map[string]any{
		"VM.create":                    (*API).vmCreate,
		"VM.snapshot":                  (*API).vmSnapshot,
		"VM.checkpoint":                (*API).vmCheckpoint,
		"VM.clone":                     (*API).vmClone,
		"VM.copy":                      (*API).vmCopy,
		"VM.provision":                 (*API).vmProvision,
		"VM.revert":                    (*API).vmRevert,
		"VM.update_snapshot_metadata":  (*API).vmUpdateSnapshotMetadata,
		"VM.get_boot_record":           (*API).vmGetBootRecord,
		"VM.destroy":                   (*API).vmDestroy,
		"VM.get_allowed_VBD_devices":   (*API).vmGetAllowedVBDDevices,
		"VM.get_allowed_VIF_devices":   (*API).vmGetAllowedVIFDevices,
		"VM.update_allowed_operations": (*API).vmUpdateAllowedOperations,
		"VM.assert_operation_valid":    (*API).vmAssertOperationValid,
		"VM.get_possible_hosts":        (*API).vmGetPossibleHosts,
	}
}

// vmCreate makes a VM that is halted, or suspended when everything is there
// that resuming it would need.
func (a *API) vmCreate(ctx context.Context, c *Call, args *xapi.VM) (ref xapi.Ref[xapi.VM], err error) {
	ref = xapi.NewRef[xapi.VM]()
	vm := args
	switch {
	case vm.PowerState == xapi.VMPowerStateHalted:
	case vm.PowerState == xapi.VMPowerStateSuspended &&
		!vm.SuspendVDI.IsNull() && vm.LastBootedRecord != "" && len(vm.LastBootCPUFlags) > 0:
	default:
		return "", badPowerState(ref, vm, xapi.VMPowerStateHalted, xapi.VMPowerStateSuspended)
	}
	if err := validMemory(vm); err != nil {
		return "", err
	}
	if err := validVCPUs(vm.VCPUsMax, vm.VCPUsAtStartup); err != nil {
		return "", err
	}
	if err := validShadowMultiplier(vm.HVMShadowMultiplier); err != nil {
		return "", err
	}
	vm.UUID, vm.Domid = uuid.NewString(), -1
	vm.MemoryTarget, vm.MemoryOverhead = 0, memoryOverhead(vm)
	if vm.OtherConfig == nil {
		vm.OtherConfig = map[string]string{}
	}
	if vm.OtherConfig[macSeedKey] == "" {
		vm.OtherConfig[macSeedKey] = uuid.NewString()
	}
	err = a.db.Update(ctx, func(tx *db.Tx) error {
		if !vm.SuspendVDI.IsNull() {
			if _, err := db.Get(tx, vm.SuspendVDI); err != nil {
				return err
			}
		}
		metrics := xapi.New[xapi.VMMetrics]()
		metrics.LastUpdated = a.now()
		m, err := db.Insert(tx, metrics)
		if err != nil {
			return err
		}
		vm.Metrics = m
		if err := db.InsertAs(tx, ref, vm); err != nil {
			return err
		}
		return a.refreshVM(tx, ref)
	})
	if err != nil {
		return "", err
	}
	return ref, nil
}

// vmDestroy removes a VM with its VBDs, VIFs and what else cannot be without
// it. Its disks and its snapshots stay.
func (a *API) vmDestroy(ctx context.Context, c *Call, ref xapi.Ref[xapi.VM]) error {
	release, err := c.Claim(ctx, func(tx *db.Tx) error {
		return a.vmAllows(tx, ref, xapi.VMOperationsDestroy)
	}, claim.On(ref, xapi.VMOperationsDestroy))
	if err != nil {
		return err
	}
	defer release()
	return a.db.Update(ctx, func(tx *db.Tx) error { return a.removeVM(tx, ref) })
}

// removeVM removes the record of a VM and what hangs on it. Its children in
// the tree of snapshots become those of its parent.
func (a *API) removeVM(tx *db.Tx, ref xapi.Ref[xapi.VM]) error {
	vm, err := db.Get(tx, ref)
	if err != nil {
		return err
	}
	for _, child := range slices.Clone(vm.Children) {
		if err := db.Modify(tx, child, func(c *xapi.VM) { c.Parent = vm.Parent }); err != nil {
			return err
		}
	}
	if err := a.removeDevices(tx, vm); err != nil {
		return err
	}
	return db.Delete(tx, ref)
}

// removeDevices deletes the objects that belong to one VM only.
func (a *API) removeDevices(tx *db.Tx, vm *xapi.VM) error {
	for _, b := range slices.Clone(vm.VBDs) {
		vbd, err := db.Get(tx, b)
		if err != nil {
			continue
		}
		if err := db.Delete(tx, b); err != nil {
			return err
		}
		if err := a.refreshVDI(tx, vbd.VDI); err != nil {
			return err
		}
	}
	return cmpErr(
		deleteEach(tx, vm.VIFs),
		deleteEach(tx, vm.VTPMs),
		deleteEach(tx, vm.VGPUs),
		deleteEach(tx, vm.VUSBs),
		deleteEach(tx, vm.Consoles),
		deleteEach(tx, []xapi.Ref[xapi.VMMetrics]{vm.Metrics}),
		deleteEach(tx, []xapi.Ref[xapi.VMGuestMetrics]{vm.GuestMetrics}),
	)
}

// deleteEach deletes the objects of refs that exist.
func deleteEach[T any](tx *db.Tx, refs []xapi.Ref[T]) error {
	for _, ref := range slices.Clone(refs) {
		if _, err := db.Get(tx, ref); err != nil {
			continue
		}
		if err := db.Delete(tx, ref); err != nil {
			return err
		}
	}
	return nil
}

// How many block devices a VM can have.
const (
	guestDisks = 16
	dom0Disks  = 255
)

// maxVIFs is how many network interfaces a VM can have.
const maxVIFs = 7

// vmGetAllowedVBDDevices lists the device numbers that are free.
func (a *API) vmGetAllowedVBDDevices(ctx context.Context, c *Call, ref xapi.Ref[xapi.VM]) (free []string, err error) {
	err = a.db.View(func(tx *db.Tx) error {
		vm, err := db.Get(tx, ref)
		if err == nil {
			free = freeDisks(tx, vm)
		}
		return err
	})
	return free, err
}

// freeDisks lists the device numbers of a VM that no VBD has, in order.
func freeDisks(tx *db.Tx, vm *xapi.VM) []string {
	taken := map[int]bool{}
	for _, b := range vm.VBDs {
		if vbd, err := db.Get(tx, b); err == nil {
			if n, ok := diskNumber(vbd.Userdevice); ok {
				taken[n] = true
			}
		}
	}
	limit := guestDisks
	if vm.IsControlDomain {
		limit = dom0Disks
	}
	free := []string{}
	for n := range limit {
		if !taken[n] {
			free = append(free, strconv.Itoa(n))
		}
	}
	return free
}

// vmGetAllowedVIFDevices lists the interface numbers that are free.
func (a *API) vmGetAllowedVIFDevices(ctx context.Context, c *Call, ref xapi.Ref[xapi.VM]) (free []string, err error) {
	free = []string{}
	err = a.db.View(func(tx *db.Tx) error {
		vm, err := db.Get(tx, ref)
		if err != nil {
			return err
		}
		taken := map[string]bool{}
		for _, v := range vm.VIFs {
			if vif, err := db.Get(tx, v); err == nil {
				taken[vif.Device] = true
			}
		}
		for n := range maxVIFs {
			if d := strconv.Itoa(n); !taken[d] {
				free = append(free, d)
			}
		}
		return nil
	})
	return free, err
}

// vmUpdateAllowedOperations recomputes what is computed after every change
// anyway.
func (a *API) vmUpdateAllowedOperations(ctx context.Context, c *Call, ref xapi.Ref[xapi.VM]) error {
	return a.db.Update(ctx, func(tx *db.Tx) error {
		if _, err := db.Get(tx, ref); err != nil {
			return err
		}
		return a.refreshVM(tx, ref)
	})
}

func (a *API) vmAssertOperationValid(ctx context.Context, c *Call, ref xapi.Ref[xapi.VM], op xapi.VMOperations) error {
	return a.db.View(func(tx *db.Tx) error { return a.vmAllows(tx, ref, op) })
}

// vmGetPossibleHosts lists the hosts that reach all disks of a VM.
func (a *API) vmGetPossibleHosts(ctx context.Context, c *Call, ref xapi.Ref[xapi.VM]) (hosts []xapi.Ref[xapi.Host], err error) {
	hosts = []xapi.Ref[xapi.Host]{}
	err = a.db.View(func(tx *db.Tx) error {
		vm, err := db.Get(tx, ref)
		if err != nil {
			return err
		}
		for _, b := range vm.VBDs {
			vbd, err := db.Get(tx, b)
			if err != nil || vbd.VDI.IsNull() {
				continue
			}
			vdi, err := db.Get(tx, vbd.VDI)
			if err != nil || !srAttached(tx, vdi.SR) {
				return nil
			}
		}
		host, h, err := a.host(tx)
		if err == nil && h.Enabled {
			hosts = append(hosts, host)
		}
		return err
	})
	return hosts, err
}
