package api

import (
	"context"
	"maps"
	"strconv"

	"coppice/internal/db"
	"coppice/internal/xapi"
)

// vmFieldMethods are the setters of VM that the datamodel leaves to code:
// they have a rule, or are ordinary fields that it makes read-only.
func vmFieldMethods() map[string]any {
	return map[string]any{
		"VM.set_memory_limits":              (*API).vmSetMemoryLimits,
		"VM.set_memory":                     (*API).vmSetMemory,
		"VM.set_memory_static_range":        (*API).vmSetMemoryStaticRange,
		"VM.set_memory_static_min":          (*API).vmSetMemoryStaticMin,
		"VM.set_memory_static_max":          (*API).vmSetMemoryStaticMax,
		"VM.set_memory_dynamic_range":       (*API).vmSetMemoryDynamicRange,
		"VM.set_memory_dynamic_min":         (*API).vmSetMemoryDynamicMin,
		"VM.set_memory_dynamic_max":         (*API).vmSetMemoryDynamicMax,
		"VM.set_VCPUs_max":                  (*API).vmSetVCPUsMax,
		"VM.set_VCPUs_at_startup":           (*API).vmSetVCPUsAtStartup,
		"VM.set_HVM_shadow_multiplier":      (*API).vmSetHVMShadowMultiplier,
		"VM.set_HVM_boot_policy":            (*API).vmSetHVMBootPolicy,
		"VM.set_NVRAM":                      (*API).vmSetNVRAM,
		"VM.add_to_NVRAM":                   (*API).vmAddToNVRAM,
		"VM.remove_from_NVRAM":              (*API).vmRemoveFromNVRAM,
		"VM.set_actions_after_crash":        (*API).vmSetActionsAfterCrash,
		"VM.set_bios_strings":               (*API).vmSetBIOSStrings,
		"VM.set_domain_type":                (*API).vmSetDomainType,
		"VM.set_has_vendor_device":          (*API).vmSetHasVendorDevice,
		"VM.set_ha_restart_priority":        (*API).vmSetHARestartPriority,
		"VM.set_is_default_template":        (*API).vmSetIsDefaultTemplate,
		"VM.set_order":                      (*API).vmSetOrder,
		"VM.set_start_delay":                (*API).vmSetStartDelay,
		"VM.set_shutdown_delay":             (*API).vmSetShutdownDelay,
		"VM.set_suspend_VDI":                (*API).vmSetSuspendVDI,
		"VM.set_appliance":                  (*API).vmSetAppliance,
		"VM.set_snapshot_schedule":          (*API).vmSetSnapshotSchedule,
		"VM.set_other_config":               (*API).vmSetOtherConfig,
		"VM.add_to_other_config":            (*API).vmAddToOtherConfig,
		"VM.remove_from_other_config":       (*API).vmRemoveFromOtherConfig,
		"VM.set_platform":                   (*API).vmSetPlatform,
		"VM.add_to_platform":                (*API).vmAddToPlatform,
		"VM.remove_from_platform":           (*API).vmRemoveFromPlatform,
		"VM.set_blocked_operations":         (*API).vmSetBlockedOperations,
		"VM.add_to_blocked_operations":      (*API).vmAddToBlockedOperations,
		"VM.remove_from_blocked_operations": (*API).vmRemoveFromBlockedOperations,
	}
}

// changeVM changes the record of a VM under the rule of an operation, or
// under none when op is empty, and recomputes what it may do.
func (a *API) changeVM(ctx context.Context, ref xapi.Ref[xapi.VM], op xapi.VMOperations, change func(*xapi.VM) error) error {
	return a.db.Update(ctx, func(tx *db.Tx) error {
		if op != "" {
			if err := a.vmAllows(tx, ref, op); err != nil {
				return err
			}
		}
		var refused error
		err := db.Modify(tx, ref, func(vm *xapi.VM) {
			refused = change(vm)
			vm.MemoryOverhead = memoryOverhead(vm)
		})
		if err != nil {
			return err
		}
		if refused != nil {
			return refused
		}
		return a.refreshVM(tx, ref)
	})
}

// setVM is changeVM for a plain assignment without a rule.
func (a *API) setVM(ctx context.Context, ref xapi.Ref[xapi.VM], set func(*xapi.VM)) error {
	return a.changeVM(ctx, ref, "", func(vm *xapi.VM) error {
		set(vm)
		return nil
	})
}

// validMemory is MEMORY_CONSTRAINT_VIOLATION_ORDER unless
// 0 ≤ static_min ≤ dynamic_min ≤ dynamic_max ≤ static_max.
func validMemory(vm *xapi.VM) error {
	if vm.MemoryStaticMin < 0 || vm.MemoryStaticMin > vm.MemoryDynamicMin ||
		vm.MemoryDynamicMin > vm.MemoryDynamicMax || vm.MemoryDynamicMax > vm.MemoryStaticMax {
		return xapi.NewError(xapi.ErrMemoryConstraintViolationOrder)
	}
	return nil
}

func validVCPUs(maximum, atStartup int64) error {
	switch {
	case maximum < 1:
		return invalidValue("VCPUs_max", strconv.FormatInt(maximum, 10))
	case atStartup < 1 || atStartup > maximum:
		return invalidValue("VCPUs_at_startup", strconv.FormatInt(atStartup, 10))
	}
	return nil
}

func validShadowMultiplier(m float64) error {
	if m < 1 {
		return invalidValue("HVM_shadow_multiplier", strconv.FormatFloat(m, 'g', -1, 64))
	}
	return nil
}

// changeMemory changes memory limits and checks the result.
func (a *API) changeMemory(ctx context.Context, ref xapi.Ref[xapi.VM], op xapi.VMOperations, change func(*xapi.VM)) error {
	return a.changeVM(ctx, ref, op, func(vm *xapi.VM) error {
		change(vm)
		return validMemory(vm)
	})
}

func (a *API) vmSetMemoryLimits(ctx context.Context, c *Call, ref xapi.Ref[xapi.VM], staticMin, staticMax, dynamicMin, dynamicMax int64) error {
	return a.changeMemory(ctx, ref, xapi.VMOperationsChangingMemoryLimits, func(vm *xapi.VM) {
		vm.MemoryStaticMin, vm.MemoryStaticMax = staticMin, staticMax
		vm.MemoryDynamicMin, vm.MemoryDynamicMax = dynamicMin, dynamicMax
	})
}

// vmSetMemory gives a VM a fixed amount of memory.
func (a *API) vmSetMemory(ctx context.Context, c *Call, ref xapi.Ref[xapi.VM], value int64) error {
	return a.changeMemory(ctx, ref, xapi.VMOperationsChangingMemoryLimits, func(vm *xapi.VM) {
		vm.MemoryStaticMax, vm.MemoryDynamicMin, vm.MemoryDynamicMax = value, value, value
	})
}

func (a *API) vmSetMemoryStaticRange(ctx context.Context, c *Call, ref xapi.Ref[xapi.VM], low, high int64) error {
	return a.changeMemory(ctx, ref, xapi.VMOperationsChangingStaticRange, func(vm *xapi.VM) {
		vm.MemoryStaticMin, vm.MemoryStaticMax = low, high
	})
}

func (a *API) vmSetMemoryStaticMin(ctx context.Context, c *Call, ref xapi.Ref[xapi.VM], value int64) error {
	return a.changeMemory(ctx, ref, xapi.VMOperationsChangingStaticRange, func(vm *xapi.VM) { vm.MemoryStaticMin = value })
}

func (a *API) vmSetMemoryStaticMax(ctx context.Context, c *Call, ref xapi.Ref[xapi.VM], value int64) error {
	return a.changeMemory(ctx, ref, xapi.VMOperationsChangingStaticRange, func(vm *xapi.VM) { vm.MemoryStaticMax = value })
}

func (a *API) vmSetMemoryDynamicRange(ctx context.Context, c *Call, ref xapi.Ref[xapi.VM], low, high int64) error {
	return a.changeMemory(ctx, ref, xapi.VMOperationsChangingDynamicRange, func(vm *xapi.VM) {
		vm.MemoryDynamicMin, vm.MemoryDynamicMax = low, high
	})
}

func (a *API) vmSetMemoryDynamicMin(ctx context.Context, c *Call, ref xapi.Ref[xapi.VM], value int64) error {
	return a.changeMemory(ctx, ref, xapi.VMOperationsChangingDynamicRange, func(vm *xapi.VM) { vm.MemoryDynamicMin = value })
}

func (a *API) vmSetMemoryDynamicMax(ctx context.Context, c *Call, ref xapi.Ref[xapi.VM], value int64) error {
	return a.changeMemory(ctx, ref, xapi.VMOperationsChangingDynamicRange, func(vm *xapi.VM) { vm.MemoryDynamicMax = value })
}

func (a *API) vmSetVCPUsMax(ctx context.Context, c *Call, ref xapi.Ref[xapi.VM], value int64) error {
	return a.changeVM(ctx, ref, xapi.VMOperationsChangingVCPUs, func(vm *xapi.VM) error {
		vm.VCPUsMax = value
		return validVCPUs(vm.VCPUsMax, vm.VCPUsAtStartup)
	})
}

func (a *API) vmSetVCPUsAtStartup(ctx context.Context, c *Call, ref xapi.Ref[xapi.VM], value int64) error {
	return a.changeVM(ctx, ref, xapi.VMOperationsChangingVCPUs, func(vm *xapi.VM) error {
		vm.VCPUsAtStartup = value
		return validVCPUs(vm.VCPUsMax, vm.VCPUsAtStartup)
	})
}

func (a *API) vmSetHVMShadowMultiplier(ctx context.Context, c *Call, ref xapi.Ref[xapi.VM], value float64) error {
	return a.changeVM(ctx, ref, xapi.VMOperationsChangingShadowMemory, func(vm *xapi.VM) error {
		vm.HVMShadowMultiplier = value
		return validShadowMultiplier(value)
	})
}

// vmSetHVMBootPolicy is the old way to set the domain type, and does.
func (a *API) vmSetHVMBootPolicy(ctx context.Context, c *Call, ref xapi.Ref[xapi.VM], value string) error {
	return a.setVM(ctx, ref, func(vm *xapi.VM) {
		vm.HVMBootPolicy = value
		vm.DomainType = xapi.DomainTypeHVM
		if value == "" {
			vm.DomainType = xapi.DomainTypePV
		}
	})
}

func (a *API) vmSetNVRAM(ctx context.Context, c *Call, ref xapi.Ref[xapi.VM], value map[string]string) error {
	return a.changeVM(ctx, ref, xapi.VMOperationsChangingNVRAM, func(vm *xapi.VM) error {
		vm.NVRAM = maps.Clone(value)
		return nil
	})
}

func (a *API) vmAddToNVRAM(ctx context.Context, c *Call, ref xapi.Ref[xapi.VM], key, value string) error {
	return a.changeVM(ctx, ref, xapi.VMOperationsChangingNVRAM, func(vm *xapi.VM) error {
		return addKey(vm.NVRAM, "NVRAM", ref, key, value)
	})
}

func (a *API) vmRemoveFromNVRAM(ctx context.Context, c *Call, ref xapi.Ref[xapi.VM], key string) error {
	return a.changeVM(ctx, ref, xapi.VMOperationsChangingNVRAM, func(vm *xapi.VM) error {
		delete(vm.NVRAM, key)
		return nil
	})
}

func (a *API) vmSetActionsAfterCrash(ctx context.Context, c *Call, ref xapi.Ref[xapi.VM], value xapi.OnCrashBehaviour) error {
	return a.setVM(ctx, ref, func(vm *xapi.VM) { vm.ActionsAfterCrash = value })
}

// vmSetBIOSStrings can be done once; they are what a guest's licence looks at.
func (a *API) vmSetBIOSStrings(ctx context.Context, c *Call, ref xapi.Ref[xapi.VM], value map[string]string) error {
	return a.changeVM(ctx, ref, "", func(vm *xapi.VM) error {
		if len(vm.BIOSStrings) > 0 {
			return xapi.NewError(xapi.ErrVMBIOSStringsAlreadySet)
		}
		vm.BIOSStrings = maps.Clone(value)
		return nil
	})
}

// vmSetDomainType keeps the old field that says the same in step.
func (a *API) vmSetDomainType(ctx context.Context, c *Call, ref xapi.Ref[xapi.VM], value xapi.DomainType) error {
	return a.setVM(ctx, ref, func(vm *xapi.VM) {
		vm.DomainType = value
		vm.HVMBootPolicy = ""
		if value == xapi.DomainTypeHVM {
			vm.HVMBootPolicy = "BIOS order"
		}
	})
}

func (a *API) vmSetHasVendorDevice(ctx context.Context, c *Call, ref xapi.Ref[xapi.VM], value bool) error {
	return a.changeVM(ctx, ref, "", func(vm *xapi.VM) error {
		if vm.PowerState != xapi.VMPowerStateHalted {
			return badPowerState(ref, vm, xapi.VMPowerStateHalted)
		}
		vm.HasVendorDevice = value
		return nil
	})
}

// vmSetHARestartPriority accepts the priorities there are: restart, best-effort
// and none.
func (a *API) vmSetHARestartPriority(ctx context.Context, c *Call, ref xapi.Ref[xapi.VM], value string) error {
	switch value {
	case "", "restart", "best-effort":
	default:
		return invalidValue("ha_restart_priority", value)
	}
	return a.setVM(ctx, ref, func(vm *xapi.VM) { vm.HARestartPriority = value })
}

func (a *API) vmSetIsDefaultTemplate(ctx context.Context, c *Call, ref xapi.Ref[xapi.VM], value bool) error {
	return a.setVM(ctx, ref, func(vm *xapi.VM) { vm.IsDefaultTemplate = value })
}

// setNonNegative sets a field that cannot be negative.
func (a *API) setNonNegative(ctx context.Context, ref xapi.Ref[xapi.VM], field string, value int64, set func(*xapi.VM)) error {
	if value < 0 {
		return invalidValue(field, strconv.FormatInt(value, 10))
	}
	return a.setVM(ctx, ref, set)
}

func (a *API) vmSetOrder(ctx context.Context, c *Call, ref xapi.Ref[xapi.VM], value int64) error {
	return a.setNonNegative(ctx, ref, "order", value, func(vm *xapi.VM) { vm.Order = value })
}

func (a *API) vmSetStartDelay(ctx context.Context, c *Call, ref xapi.Ref[xapi.VM], value int64) error {
	return a.setNonNegative(ctx, ref, "start_delay", value, func(vm *xapi.VM) { vm.StartDelay = value })
}

func (a *API) vmSetShutdownDelay(ctx context.Context, c *Call, ref xapi.Ref[xapi.VM], value int64) error {
	return a.setNonNegative(ctx, ref, "shutdown_delay", value, func(vm *xapi.VM) { vm.ShutdownDelay = value })
}

// setRef makes a VM refer to an object that must exist, or to nothing.
func setRef[T any](ctx context.Context, a *API, ref xapi.Ref[xapi.VM], to xapi.Ref[T], check func(*xapi.VM) error, set func(*xapi.VM)) error {
	return a.db.Update(ctx, func(tx *db.Tx) error {
		vm, err := db.Get(tx, ref)
		if err != nil {
			return err
		}
		if err := check(vm); err != nil {
			return err
		}
		if !to.IsNull() {
			if _, err := db.Get(tx, to); err != nil {
				return err
			}
		}
		return db.Modify(tx, ref, set)
	})
}

// vmSetSuspendVDI points a suspended VM at another copy of its memory.
func (a *API) vmSetSuspendVDI(ctx context.Context, c *Call, ref xapi.Ref[xapi.VM], value xapi.Ref[xapi.VDI]) error {
	return setRef(ctx, a, ref, value, func(vm *xapi.VM) error {
		if vm.PowerState != xapi.VMPowerStateSuspended {
			return badPowerState(ref, vm, xapi.VMPowerStateSuspended)
		}
		return nil
	}, func(vm *xapi.VM) { vm.SuspendVDI = value })
}

func (a *API) vmSetAppliance(ctx context.Context, c *Call, ref xapi.Ref[xapi.VM], value xapi.Ref[xapi.VMAppliance]) error {
	return setRef(ctx, a, ref, value, refuseControlDomain, func(vm *xapi.VM) { vm.Appliance = value })
}

func (a *API) vmSetSnapshotSchedule(ctx context.Context, c *Call, ref xapi.Ref[xapi.VM], value xapi.Ref[xapi.VMSS]) error {
	return setRef(ctx, a, ref, value, refuseControlDomain, func(vm *xapi.VM) { vm.SnapshotSchedule = value })
}

func refuseControlDomain(vm *xapi.VM) error {
	if vm.IsControlDomain {
		return xapi.NewError(xapi.ErrOperationNotAllowed, "The control domain cannot be scheduled")
	}
	return nil
}

// addKey adds to a map of a VM's record.
func addKey[K ~string](m map[K]string, field string, ref xapi.Ref[xapi.VM], key K, value string) error {
	if _, ok := m[key]; ok {
		return xapi.NewError(xapi.ErrMapDuplicateKey, "VM", field, string(ref), string(key))
	}
	m[key] = value
	return nil
}

func (a *API) vmSetOtherConfig(ctx context.Context, c *Call, ref xapi.Ref[xapi.VM], value map[string]string) error {
	return a.setVM(ctx, ref, func(vm *xapi.VM) { vm.OtherConfig = maps.Clone(value) })
}

func (a *API) vmAddToOtherConfig(ctx context.Context, c *Call, ref xapi.Ref[xapi.VM], key, value string) error {
	return a.changeVM(ctx, ref, "", func(vm *xapi.VM) error {
		return addKey(vm.OtherConfig, "other_config", ref, key, value)
	})
}

func (a *API) vmRemoveFromOtherConfig(ctx context.Context, c *Call, ref xapi.Ref[xapi.VM], key string) error {
	return a.setVM(ctx, ref, func(vm *xapi.VM) { delete(vm.OtherConfig, key) })
}

func (a *API) vmSetPlatform(ctx context.Context, c *Call, ref xapi.Ref[xapi.VM], value map[string]string) error {
	return a.setVM(ctx, ref, func(vm *xapi.VM) { vm.Platform = maps.Clone(value) })
}

func (a *API) vmAddToPlatform(ctx context.Context, c *Call, ref xapi.Ref[xapi.VM], key, value string) error {
	return a.changeVM(ctx, ref, "", func(vm *xapi.VM) error {
		return addKey(vm.Platform, "platform", ref, key, value)
	})
}

func (a *API) vmRemoveFromPlatform(ctx context.Context, c *Call, ref xapi.Ref[xapi.VM], key string) error {
	return a.setVM(ctx, ref, func(vm *xapi.VM) { delete(vm.Platform, key) })
}

func (a *API) vmSetBlockedOperations(ctx context.Context, c *Call, ref xapi.Ref[xapi.VM], value map[xapi.VMOperations]string) error {
	return a.setVM(ctx, ref, func(vm *xapi.VM) { vm.BlockedOperations = maps.Clone(value) })
}

func (a *API) vmAddToBlockedOperations(ctx context.Context, c *Call, ref xapi.Ref[xapi.VM], key xapi.VMOperations, value string) error {
	return a.changeVM(ctx, ref, "", func(vm *xapi.VM) error {
		return addKey(vm.BlockedOperations, "blocked_operations", ref, key, value)
	})
}

func (a *API) vmRemoveFromBlockedOperations(ctx context.Context, c *Call, ref xapi.Ref[xapi.VM], key xapi.VMOperations) error {
	return a.setVM(ctx, ref, func(vm *xapi.VM) { delete(vm.BlockedOperations, key) })
}
