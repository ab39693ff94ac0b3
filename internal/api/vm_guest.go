package api

import (
	"context"
	"math"

	"coppice/internal/db"
	"coppice/internal/xapi"
)

// vmGuestMethods are about VMs that run, or could run, somewhere. Here none
// does: what is asked of a running one says so, and what only computes does
// that.
func vmGuestMethods() map[string]any {
	return map[string]any{
		"VM.set_VCPUs_number_live": func(a *API, _ context.Context, _ *Call, ref xapi.Ref[xapi.VM], n int64) error {
			return a.powerOp(ref, xapi.VMOperationsChangingVCPUsLive)
		},
		"VM.add_to_VCPUs_params_live": func(a *API, _ context.Context, _ *Call, ref xapi.Ref[xapi.VM], key, value string) error {
			return a.powerOp(ref, xapi.VMOperationsChangingVCPUsLive)
		},
		"VM.set_shadow_multiplier_live": func(a *API, _ context.Context, _ *Call, ref xapi.Ref[xapi.VM], m float64) error {
			return a.powerOp(ref, xapi.VMOperationsChangingShadowMemoryLive)
		},
		"VM.send_sysrq": func(a *API, _ context.Context, _ *Call, ref xapi.Ref[xapi.VM], key string) error {
			return a.powerOp(ref, xapi.VMOperationsSendSysrq)
		},
		"VM.send_trigger": func(a *API, _ context.Context, _ *Call, ref xapi.Ref[xapi.VM], trigger string) error {
			return a.powerOp(ref, xapi.VMOperationsSendTrigger)
		},
		"VM.sysprep": func(a *API, _ context.Context, _ *Call, ref xapi.Ref[xapi.VM], unattend string, timeout float64) error {
			return a.powerOp(ref, xapi.VMOperationsSysprep)
		},
		"VM.call_plugin": func(a *API, _ context.Context, _ *Call, ref xapi.Ref[xapi.VM], plugin, fn string, args map[string]string) (string, error) {
			return "", a.powerOp(ref, xapi.VMOperationsCallPlugin)
		},
		"VM.query_services": func(a *API, _ context.Context, _ *Call, ref xapi.Ref[xapi.VM]) (map[string]string, error) {
			return nil, a.powerOp(ref, xapi.VMOperationsQueryServices)
		},
		"VM.get_data_sources": func(a *API, _ context.Context, _ *Call, ref xapi.Ref[xapi.VM]) ([]*xapi.DataSource, error) {
			return nil, a.powerOp(ref, xapi.VMOperationsDataSourceOp)
		},
		"VM.query_data_source": func(a *API, _ context.Context, _ *Call, ref xapi.Ref[xapi.VM], name string) (float64, error) {
			return 0, a.powerOp(ref, xapi.VMOperationsDataSourceOp)
		},
		"VM.record_data_source":           vmDataSource,
		"VM.forget_data_source_archives":  vmDataSource,
		"VM.restart_device_models":        (*API).vmRestartDeviceModels,
		"VM.call_host_plugin":             (*API).vmCallHostPlugin,
		"VM.retrieve_wlb_recommendations": (*API).vmRetrieveWLBRecommendations,
		"VM.assert_can_boot_here":         (*API).vmAssertCanBootHere,
		"VM.assert_agile":                 (*API).vmAssertAgile,
		"VM.compute_memory_overhead":      (*API).vmComputeMemoryOverhead,
		"VM.maximise_memory":              (*API).vmMaximiseMemory,
		"VM.copy_bios_strings":            (*API).vmCopyBIOSStrings,
		"VM.set_groups":                   (*API).vmSetGroups,
	}
}

func vmDataSource(a *API, _ context.Context, _ *Call, ref xapi.Ref[xapi.VM], name string) error {
	return a.powerOp(ref, xapi.VMOperationsDataSourceOp)
}

// vmRestartDeviceModels has no operation of its own in the datamodel.
func (a *API) vmRestartDeviceModels(ctx context.Context, c *Call, ref xapi.Ref[xapi.VM]) error {
	return a.db.View(func(tx *db.Tx) error {
		vm, err := db.Get(tx, ref)
		switch {
		case err != nil:
			return err
		case vm.PowerState != xapi.VMPowerStateRunning:
			return badPowerState(ref, vm, xapi.VMPowerStateRunning)
		}
		return errNoHypervisor
	})
}

// vmCallHostPlugin would run a program beside a VM, of which there are none.
func (a *API) vmCallHostPlugin(ctx context.Context, c *Call, ref xapi.Ref[xapi.VM], plugin, fn string, args map[string]string) (string, error) {
	return "", a.db.View(func(tx *db.Tx) error {
		if _, err := db.Get(tx, ref); err != nil {
			return err
		}
		return xapi.NewError(xapi.ErrXenAPIMissingPlugin, plugin)
	})
}

// vmRetrieveWLBRecommendations: nobody balances workloads here.
func (a *API) vmRetrieveWLBRecommendations(ctx context.Context, c *Call, ref xapi.Ref[xapi.VM]) (map[xapi.Ref[xapi.Host]][]string, error) {
	return nil, a.db.View(func(tx *db.Tx) error {
		if _, err := db.Get(tx, ref); err != nil {
			return err
		}
		return xapi.NewError(xapi.ErrWLBNotInitialized)
	})
}

// vmAssertCanBootHere says the first thing that keeps a VM from starting.
func (a *API) vmAssertCanBootHere(ctx context.Context, c *Call, ref xapi.Ref[xapi.VM], host xapi.Ref[xapi.Host]) error {
	return a.db.View(func(tx *db.Tx) error {
		vm, err := db.Get(tx, ref)
		if err != nil {
			return err
		}
		switch h, err := db.Get(tx, host); {
		case err != nil:
			return err
		case !h.Enabled:
			return xapi.NewError(xapi.ErrHostDisabled, string(host))
		}
		err = eachDisk(tx, vm, func(sr xapi.Ref[xapi.SR], _ *xapi.SR) error {
			if !srAttached(tx, sr) {
				return xapi.NewError(xapi.ErrVMRequiresSR, string(ref), string(sr))
			}
			return nil
		})
		if err != nil {
			return err
		}
		return errNoHypervisor
	})
}

// vmAssertAgile says what ties a VM to one host: an SR that is not shared, or
// a network that not every host has a device for.
func (a *API) vmAssertAgile(ctx context.Context, c *Call, ref xapi.Ref[xapi.VM]) error {
	return a.db.View(func(tx *db.Tx) error {
		vm, err := db.Get(tx, ref)
		if err != nil {
			return err
		}
		err = eachDisk(tx, vm, func(sr xapi.Ref[xapi.SR], rec *xapi.SR) error {
			if !rec.Shared || !srAttached(tx, sr) {
				return xapi.NewError(xapi.ErrHAConstraintViolationSRNotShared, string(sr))
			}
			return nil
		})
		if err != nil {
			return err
		}
		for _, v := range vm.VIFs {
			vif, err := db.Get(tx, v)
			if err != nil {
				continue
			}
			if n, err := db.Get(tx, vif.Network); err == nil && len(n.PIFs) == 0 {
				return xapi.NewError(xapi.ErrHAConstraintViolationNetworkNotShared, string(vif.Network))
			}
		}
		return nil
	})
}

// eachDisk calls fn with the SR of each disk that is on a VBD of a VM.
func eachDisk(tx *db.Tx, vm *xapi.VM, fn func(xapi.Ref[xapi.SR], *xapi.SR) error) error {
	for _, b := range vm.VBDs {
		vbd, err := db.Get(tx, b)
		if err != nil || vbd.VDI.IsNull() {
			continue
		}
		vdi, err := db.Get(tx, vbd.VDI)
		if err != nil {
			continue
		}
		if sr, err := db.Get(tx, vdi.SR); err == nil {
			if err := fn(vdi.SR, sr); err != nil {
				return err
			}
		}
	}
	return nil
}

// mebibyte is the unit in which memory is given to VMs, in bytes.
const mebibyte = 1 << 20

// memoryOverhead is what a VM costs under Xen beside its own memory, in bytes.
// Shadow page tables take a page per MiB of its memory, another for the map of
// its pages and 256 for each processor, times the multiplier, and at least
// 1 MiB. Xen itself takes 1 MiB, 2 for one that is fully virtualised, and the
// shim of a PV guest in a PVH one a part of the memory. This is the model by
// which xapi computes the field memory_overhead.
func memoryOverhead(vm *xapi.VM) int64 {
	static := math.Ceil(float64(vm.MemoryStaticMax) / mebibyte)
	multiplier, own := vm.HVMShadowMultiplier, 2.0
	switch domain := vm.DomainType; {
	case domain == xapi.DomainTypePVInPVH:
		own += 20 + math.Floor(static/110)
	case domain == xapi.DomainTypePV, domain == xapi.DomainTypeUnspecified && vm.HVMBootPolicy == "":
		multiplier, own = 1, 1
	}
	const page = 4096
	shadow := math.Trunc(math.Ceil((256*float64(vm.VCPUsMax)+2*static)*page/mebibyte) * multiplier)
	return int64(min((own+max(1, shadow))*mebibyte, 1<<62))
}

func (a *API) vmComputeMemoryOverhead(ctx context.Context, c *Call, ref xapi.Ref[xapi.VM]) (n int64, err error) {
	err = a.db.View(func(tx *db.Tx) error {
		vm, err := db.Get(tx, ref)
		if err == nil {
			n = memoryOverhead(vm)
		}
		return err
	})
	return n, err
}

// approximateVCPUs is for how many processors an approximate answer of
// maximise_memory leaves room.
const approximateVCPUs = 64

// vmMaximiseMemory returns the most memory, in whole MiB as bytes, that a VM
// can have of total together with its overhead; 0 when not even that fits.
func (a *API) vmMaximiseMemory(ctx context.Context, c *Call, ref xapi.Ref[xapi.VM], total int64, approximate bool) (int64, error) {
	var vm *xapi.VM
	err := a.db.View(func(tx *db.Tx) error {
		rec, err := db.Get(tx, ref)
		if err == nil {
			vm = xapi.ClassOf[xapi.VM]().Clone(rec).(*xapi.VM)
		}
		return err
	})
	if err != nil {
		return 0, err
	}
	if approximate {
		vm.VCPUsMax = max(vm.VCPUsMax, approximateVCPUs)
	}
	low, high := int64(0), max(total, 0)/mebibyte+1 // in MiB; low fits, high does not
	for high-low > 1 {
		middle := low + (high-low)/2
		vm.MemoryStaticMax = middle * mebibyte
		if memoryOverhead(vm) <= total-vm.MemoryStaticMax {
			low = middle
		} else {
			high = middle
		}
	}
	return low * mebibyte, nil
}

// vmCopyBIOSStrings gives a VM without BIOS strings those of a host.
func (a *API) vmCopyBIOSStrings(ctx context.Context, c *Call, ref xapi.Ref[xapi.VM], host xapi.Ref[xapi.Host]) error {
	var strings map[string]string
	if err := a.onHost(host, func(_ *db.Tx, h *xapi.Host) error { strings = h.BIOSStrings; return nil }); err != nil {
		return err
	}
	return a.vmSetBIOSStrings(ctx, c, ref, strings)
}

// vmSetGroups puts a VM into a group of placement, or into none.
func (a *API) vmSetGroups(ctx context.Context, c *Call, ref xapi.Ref[xapi.VM], groups []xapi.Ref[xapi.VMGroup]) error {
	return a.db.Update(ctx, func(tx *db.Tx) error {
		vm, err := db.Get(tx, ref)
		switch {
		case err != nil:
			return err
		case vm.IsControlDomain || vm.IsASnapshot || vm.IsATemplate:
			return xapi.NewError(xapi.ErrOperationNotAllowed, "Only VMs that can run belong to groups: "+string(ref))
		case len(groups) > 1:
			return xapi.NewError(xapi.ErrTooManyGroups)
		}
		for _, g := range groups {
			if _, err := db.Get(tx, g); err != nil {
				return err
			}
		}
		return db.Modify(tx, ref, func(vm *xapi.VM) { vm.Groups = groups })
	})
}
