package api

import (
	"maps"
	"slices"
	"strings"

	"coppice/internal/db"
	"coppice/internal/xapi"
)

// vmRule says when an operation of a VM may begin.
type vmRule struct {
	states   []xapi.VMPowerState // empty: any
	template bool                // also on templates
	snapshot bool                // also on snapshots
}

// vmRules are the operations that this server performs on VMs. Others do not
// appear in allowed_operations.
var vmRules = map[xapi.VMOperations]vmRule{
	xapi.VMOperationsDestroy: {
		states:   []xapi.VMPowerState{xapi.VMPowerStateHalted, xapi.VMPowerStateSuspended},
		template: true, snapshot: true,
	},
	xapi.VMOperationsMakeIntoTemplate:        {states: halted},
	xapi.VMOperationsChangingMemoryLimits:    {states: halted, template: true},
	xapi.VMOperationsChangingStaticRange:     {states: halted, template: true},
	xapi.VMOperationsChangingDynamicRange:    {states: halted, template: true},
	xapi.VMOperationsChangingShadowMemory:    {states: halted, template: true},
	xapi.VMOperationsChangingVCPUs:           {states: halted, template: true},
	xapi.VMOperationsChangingNVRAM:           {states: halted, template: true},
	xapi.VMOperationsUpdateAllowedOperations: {template: true, snapshot: true},
}

var halted = []xapi.VMPowerState{xapi.VMPowerStateHalted}

// vmAllows says whether an operation may begin on a VM now: nil, or the error
// of the first rule that forbids it.
func (a *API) vmAllows(tx *db.Tx, ref xapi.Ref[xapi.VM], op xapi.VMOperations) error {
	vm, err := db.Get(tx, ref)
	if err != nil {
		return err
	}
	rule, ok := vmRules[op]
	if !ok {
		return xapi.NewError(xapi.ErrNotImplemented, "VM."+string(op))
	}
	if reason, blocked := vm.BlockedOperations[op]; blocked {
		return xapi.NewError(xapi.ErrOperationBlocked, string(ref), reason)
	}
	if len(rule.states) > 0 && !slices.Contains(rule.states, vm.PowerState) {
		return badPowerState(ref, vm, rule.states...)
	}
	for _, task := range slices.Sorted(maps.Keys(vm.CurrentOperations)) {
		return otherOperation("VM", string(ref), string(vm.CurrentOperations[task]), task)
	}
	switch {
	case vm.IsASnapshot && !rule.snapshot:
		return xapi.NewError(xapi.ErrVMIsSnapshot, string(ref), string(op))
	case vm.IsATemplate && !vm.IsASnapshot && !rule.template:
		return xapi.NewError(xapi.ErrVMIsTemplate, string(ref), string(op))
	case vm.IsDefaultTemplate && op == xapi.VMOperationsDestroy:
		return xapi.NewError(xapi.ErrVMCannotDeleteDefaultTemplate)
	case vm.IsControlDomain && op != xapi.VMOperationsUpdateAllowedOperations:
		return xapi.NewError(xapi.ErrOperationNotAllowed, "The control domain cannot do "+string(op))
	}
	return nil
}

// allowedVMOps lists the operations that may begin on a VM now.
func (a *API) allowedVMOps(tx *db.Tx, ref xapi.Ref[xapi.VM]) []xapi.VMOperations {
	allowed := []xapi.VMOperations{}
	for _, op := range slices.Sorted(maps.Keys(vmRules)) {
		if a.vmAllows(tx, ref, op) == nil {
			allowed = append(allowed, op)
		}
	}
	return allowed
}

// badPowerState is the error of a VM that is in none of the wanted states.
func badPowerState(ref xapi.Ref[xapi.VM], vm *xapi.VM, want ...xapi.VMPowerState) error {
	names := make([]string, len(want))
	for i, s := range want {
		names[i] = strings.ToLower(string(s))
	}
	return xapi.NewError(xapi.ErrVMBadPowerState, string(ref), strings.Join(names, ", "), strings.ToLower(string(vm.PowerState)))
}
