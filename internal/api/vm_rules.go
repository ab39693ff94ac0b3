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
	states     []xapi.VMPowerState // empty: any
	template   bool                // also on templates
	snapshot   bool                // also on snapshots
	hypervisor bool                // nobody here can do it
}

// States by what they are called together.
var (
	halted         = []xapi.VMPowerState{xapi.VMPowerStateHalted}
	running        = []xapi.VMPowerState{xapi.VMPowerStateRunning}
	suspended      = []xapi.VMPowerState{xapi.VMPowerStateSuspended}
	paused         = []xapi.VMPowerState{xapi.VMPowerStatePaused}
	haltedOrAsleep = []xapi.VMPowerState{xapi.VMPowerStateHalted, xapi.VMPowerStateSuspended}
	alive          = []xapi.VMPowerState{xapi.VMPowerStatePaused, xapi.VMPowerStateSuspended, xapi.VMPowerStateRunning}
)

// vmRules are the operations that this server knows on VMs. Those that it
// cannot perform never appear in allowed_operations, but answer first for what
// is wrong with the VM and only then that there is no hypervisor.
var vmRules = map[xapi.VMOperations]vmRule{
	xapi.VMOperationsSnapshot:                {},
	xapi.VMOperationsCheckpoint:              {states: alive},
	xapi.VMOperationsClone:                   {states: halted, template: true, snapshot: true}, // more in vmStates
	xapi.VMOperationsCopy:                    {states: halted, template: true, snapshot: true},
	xapi.VMOperationsExport:                  {states: haltedOrAsleep, template: true, snapshot: true},
	xapi.VMOperationsRevert:                  {template: true, snapshot: true},
	xapi.VMOperationsReverting:               {},
	xapi.VMOperationsProvision:               {states: halted, template: true},
	xapi.VMOperationsDestroy:                 {states: haltedOrAsleep, template: true, snapshot: true},
	xapi.VMOperationsMakeIntoTemplate:        {states: halted},
	xapi.VMOperationsChangingMemoryLimits:    {states: halted, template: true},
	xapi.VMOperationsChangingStaticRange:     {states: halted, template: true},
	xapi.VMOperationsChangingDynamicRange:    {states: halted, template: true},
	xapi.VMOperationsChangingShadowMemory:    {states: halted, template: true},
	xapi.VMOperationsChangingVCPUs:           {states: halted, template: true},
	xapi.VMOperationsChangingNVRAM:           {states: halted, template: true},
	xapi.VMOperationsUpdateAllowedOperations: {template: true, snapshot: true},
	xapi.VMOperationsHardShutdown:            {states: alive, snapshot: true},
	xapi.VMOperationsPowerStateReset:         {snapshot: true},
	xapi.VMOperationsMetadataExport:          {template: true, snapshot: true},

	xapi.VMOperationsStart:         {states: halted, hypervisor: true},
	xapi.VMOperationsStartOn:       {states: halted, hypervisor: true},
	xapi.VMOperationsResume:        {states: suspended, hypervisor: true},
	xapi.VMOperationsResumeOn:      {states: suspended, hypervisor: true},
	xapi.VMOperationsSuspend:       {states: running, hypervisor: true},
	xapi.VMOperationsPause:         {states: running, hypervisor: true},
	xapi.VMOperationsUnpause:       {states: paused, hypervisor: true},
	xapi.VMOperationsCleanShutdown: {states: running, hypervisor: true},
	xapi.VMOperationsCleanReboot:   {states: running, hypervisor: true},
	xapi.VMOperationsHardReboot:    {states: []xapi.VMPowerState{xapi.VMPowerStatePaused, xapi.VMPowerStateRunning}, hypervisor: true},
	xapi.VMOperationsPoolMigrate:   {states: running, hypervisor: true},

	xapi.VMOperationsChangingMemoryLive:       {states: running, hypervisor: true},
	xapi.VMOperationsAwaitingMemoryLive:       {states: running, hypervisor: true},
	xapi.VMOperationsChangingShadowMemoryLive: {states: running, hypervisor: true},
	xapi.VMOperationsChangingVCPUsLive:        {states: running, hypervisor: true},
	xapi.VMOperationsDataSourceOp:             {states: running, hypervisor: true},
	xapi.VMOperationsSendSysrq:                {states: running, hypervisor: true},
	xapi.VMOperationsSendTrigger:              {states: running, hypervisor: true},
	xapi.VMOperationsCallPlugin:               {states: running, hypervisor: true},
	xapi.VMOperationsSysprep:                  {states: running, hypervisor: true},
	xapi.VMOperationsQueryServices:            {hypervisor: true},
}

// publishedVMOps are the operations that allowed_operations may list, in order.
var publishedVMOps = slices.DeleteFunc(slices.Sorted(maps.Keys(vmRules)), func(op xapi.VMOperations) bool {
	return vmRules[op].hypervisor
})

// cloneSuspendedKey in the pool's other_config lets suspended VMs be cloned.
const cloneSuspendedKey = "allow_clone_suspended_vm"

// vmStates lists the states in which op may begin on a VM; empty is any.
func (a *API) vmStates(tx *db.Tx, vm *xapi.VM, op xapi.VMOperations) []xapi.VMPowerState {
	if op == xapi.VMOperationsClone || op == xapi.VMOperationsCopy {
		_, pool, err := a.pool(tx)
		if vm.IsASnapshot || err == nil && pool.OtherConfig[cloneSuspendedKey] == "true" {
			return haltedOrAsleep
		}
	}
	return vmRules[op].states
}

// vmOpsBeside says whether two operations on one VM can run at the same time.
func vmOpsBeside(op, cur xapi.VMOperations) bool {
	for _, together := range [][]xapi.VMOperations{
		{xapi.VMOperationsClone, xapi.VMOperationsCopy, xapi.VMOperationsExport},
		{xapi.VMOperationsSnapshot, xapi.VMOperationsCheckpoint},
	} {
		if slices.Contains(together, op) && slices.Contains(together, cur) {
			return true
		}
	}
	return false
}

// vmAllows says whether an operation may begin on a VM now: nil, or the error
// of the first rule that forbids it. Only OTHER_OPERATION_IN_PROGRESS is worth
// waiting for.
func (a *API) vmAllows(tx *db.Tx, ref xapi.Ref[xapi.VM], op xapi.VMOperations) error {
	vm, err := db.Get(tx, ref)
	if err != nil {
		return err
	}
	return a.vmAllowsNow(tx, ref, vm, op)
}

// vmAllowsNow is vmAllows for a VM whose record is known.
func (a *API) vmAllowsNow(tx *db.Tx, ref xapi.Ref[xapi.VM], vm *xapi.VM, op xapi.VMOperations) error {
	rule, ok := vmRules[op]
	if !ok {
		return xapi.NewError(xapi.ErrNotImplemented, "VM."+string(op))
	}
	if reason, blocked := vm.BlockedOperations[op]; blocked {
		return xapi.NewError(xapi.ErrOperationBlocked, string(ref), reason)
	}
	if op == xapi.VMOperationsDestroy {
		if err := held(string(ref), vm.OtherConfig); err != nil {
			return err
		}
	}
	if states := a.vmStates(tx, vm, op); len(states) > 0 && !slices.Contains(states, vm.PowerState) {
		return badPowerState(ref, vm, states...)
	}
	for _, task := range slices.Sorted(maps.Keys(vm.CurrentOperations)) {
		if cur := vm.CurrentOperations[task]; !vmOpsBeside(op, cur) {
			return otherOperation("VM", string(ref), string(cur), task)
		}
	}
	switch {
	case op == xapi.VMOperationsProvision && (!vm.IsATemplate || vm.IsASnapshot):
		return xapi.NewError(xapi.ErrProvisionOnlyAllowedOnTemplate)
	case op == xapi.VMOperationsRevert && !vm.IsASnapshot:
		return xapi.NewError(xapi.ErrRevertOnlyAllowedOnSnapshot)
	case vm.IsASnapshot && !rule.snapshot:
		return xapi.NewError(xapi.ErrVMIsSnapshot, string(ref), string(op))
	case vm.IsATemplate && !vm.IsASnapshot && !rule.template:
		return xapi.NewError(xapi.ErrVMIsTemplate, string(ref), string(op))
	case vm.IsDefaultTemplate && op == xapi.VMOperationsDestroy:
		return xapi.NewError(xapi.ErrVMCannotDeleteDefaultTemplate)
	case vm.IsControlDomain && op != xapi.VMOperationsUpdateAllowedOperations:
		return xapi.NewError(xapi.ErrOperationNotAllowed, "The control domain cannot do "+string(op))
	}
	if op == xapi.VMOperationsSnapshot || op == xapi.VMOperationsCheckpoint {
		if err := vmSnapshotable(tx, ref, vm); err != nil {
			return err
		}
	}
	if rule.hypervisor {
		return errNoHypervisor
	}
	return nil
}

// vmSnapshotable refuses snapshots of VMs with parts that have no snapshot.
func vmSnapshotable(tx *db.Tx, ref xapi.Ref[xapi.VM], vm *xapi.VM) error {
	for _, b := range vm.VBDs {
		vbd, err := db.Get(tx, b)
		if err != nil || vbd.Type == xapi.VBDTypeCD {
			continue
		}
		if vdi, err := db.Get(tx, vbd.VDI); err == nil && vdi.OnBoot == xapi.OnBootReset {
			return xapi.NewError(xapi.ErrVDIOnBootModeIncompatibleWithOperation)
		}
	}
	if len(vm.VUSBs) > 0 {
		return xapi.NewError(xapi.ErrVMHasVUSBs, string(ref))
	}
	return nil
}

// allowedVMOps lists the operations that may begin on a VM now.
func (a *API) allowedVMOps(tx *db.Tx, ref xapi.Ref[xapi.VM]) []xapi.VMOperations {
	allowed := []xapi.VMOperations{}
	vm, err := db.Get(tx, ref)
	if err != nil {
		return allowed
	}
	for _, op := range publishedVMOps {
		if a.vmAllowsNow(tx, ref, vm, op) == nil {
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
