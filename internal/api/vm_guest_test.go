package api

import (
	"math"
	"testing"

	"coppice/internal/xapi"
)

// What only a running VM can do is refused for what is wrong with the VM, and
// for want of a hypervisor only when nothing is.
func TestVMGuestMessages(t *testing.T) {
	r := newRig(t)
	vm := r.vm("guest")
	for message, args := range map[string][]any{
		"VM.set_VCPUs_number_live":       {2},
		"VM.add_to_VCPUs_params_live":    {"weight", "1"},
		"VM.set_shadow_multiplier_live":  {2.0},
		"VM.send_sysrq":                  {"h"},
		"VM.send_trigger":                {"nmi"},
		"VM.sysprep":                     {"<xml/>", 1.0},
		"VM.call_plugin":                 {"guest-agent-operation", "request-snapshot", map[string]string{}},
		"VM.get_data_sources":            {},
		"VM.query_data_source":           {"cpu0"},
		"VM.record_data_source":          {"cpu0"},
		"VM.forget_data_source_archives": {"cpu0"},
		"VM.restart_device_models":       {},
	} {
		set(r, vm, func(v *xapi.VM) { v.PowerState = xapi.VMPowerStateHalted })
		r.fails("VM_BAD_POWER_STATE|"+string(vm)+"|running|halted", message, append([]any{vm}, args...)...)
		set(r, vm, func(v *xapi.VM) { v.PowerState = xapi.VMPowerStateRunning })
		if _, err := r.try(r.root, message, append([]any{vm}, args...)...); code(err) != "OPERATION_NOT_ALLOWED" {
			t.Errorf("%s of a running VM: %v", message, err)
		}
		r.fails("HANDLE_INVALID|VM|OpaqueRef:none", message, append([]any{"OpaqueRef:none"}, args...)...)
	}
	set(r, vm, func(v *xapi.VM) { v.PowerState = xapi.VMPowerStateHalted })
	r.fails("XENAPI_MISSING_PLUGIN|p", "VM.call_host_plugin", vm, "p", "f", map[string]string{})
	r.fails("WLB_NOT_INITIALIZED", "VM.retrieve_wlb_recommendations", vm)
	if _, err := r.try(r.root, "VM.assert_can_boot_here", vm, r.host); code(err) != "OPERATION_NOT_ALLOWED" {
		t.Errorf("can boot here: %v", err)
	}
	r.call("VM.assert_agile", vm)
	disk := r.disk(2 << 20)
	r.vbd(vm, disk, "0", "RW")
	r.fails("HA_CONSTRAINT_VIOLATION_SR_NOT_SHARED|"+string(r.sr), "VM.assert_agile", vm)
	r.call("PBD.unplug", r.pbd(r.sr))
	r.fails("VM_REQUIRES_SR|"+string(vm)+"|"+string(r.sr), "VM.assert_can_boot_here", vm, r.host)
	r.call("host.disable", r.host)
	r.fails("HOST_DISABLED|"+string(r.host), "VM.assert_can_boot_here", vm, r.host)
}

// Expected figures are of the memory model of Xen as xapi documents it: a page
// of 4 KiB for each of 256 per VCPU, a page table and a map entry per MiB.
func TestMemoryOverhead(t *testing.T) {
	for _, c := range []struct {
		domain     xapi.DomainType
		static     int64
		vcpus      int64
		multiplier float64
		want       int64 // MiB
	}{
		{xapi.DomainTypeHVM, 1 << 30, 1, 1, 2 + 1 + 8},
		{xapi.DomainTypeHVM, 4 << 30, 4, 1, 2 + 4 + 32},
		{xapi.DomainTypeHVM, 4 << 30, 4, 1.5, 2 + 54},
		{xapi.DomainTypeHVM, 1<<30 + 1, 1, 1, 2 + 10},
		{xapi.DomainTypePV, 1 << 30, 1, 4, 1 + 9},
		{xapi.DomainTypePVInPVH, 1100 << 20, 1, 1, 2 + 30 + 10},
		{xapi.DomainTypeHVM, 0, 0, 1, 2 + 1},
		{xapi.DomainTypeHVM, math.MaxInt64, math.MaxInt64, math.MaxFloat64, 1 << 42},
	} {
		vm := xapi.New[xapi.VM]()
		vm.DomainType, vm.MemoryStaticMax, vm.VCPUsMax, vm.HVMShadowMultiplier = c.domain, c.static, c.vcpus, c.multiplier
		if got := memoryOverhead(vm); got != c.want<<20 {
			t.Errorf("%+v: %d MiB and %d bytes", c, got>>20, got&(1<<20-1))
		}
	}
	r := newRig(t)
	vm := r.vm("guest")
	r.call("VM.set_VCPUs_max", vm, 8)
	computed := r.call("VM.compute_memory_overhead", vm).(int64)
	if field := record(r.core, vm).MemoryOverhead; computed != field || computed == 0 {
		t.Errorf("computed %d, the field says %d", computed, field)
	}
	for _, total := range []int64{-1, 0, 1 << 20, 100 << 20, 1<<30 + 5, 1 << 45} {
		for _, approximate := range []bool{false, true} {
			most := r.call("VM.maximise_memory", vm, total, approximate).(int64)
			needs := func(memory int64) int64 {
				v := *record(r.core, vm)
				v.MemoryStaticMax = memory
				if approximate {
					v.VCPUsMax = 64
				}
				return memory + memoryOverhead(&v)
			}
			if most > 0 && needs(most) > total || most == 0 && needs(1<<20) <= total || most > 0 && needs(most+1<<20) <= total {
				t.Errorf("of %d, approximate %v: %d", total, approximate, most)
			}
		}
	}
}

func TestVMSetGroups(t *testing.T) {
	r := newRig(t)
	vm := r.vm("guest")
	group := func() xapi.Ref[xapi.VMGroup] {
		return xapi.Ref[xapi.VMGroup](r.call("VM_group.create", map[string]any{"name_label": "g", "name_description": "", "placement": "normal"}).(string))
	}
	one, two := group(), group()
	r.call("VM.set_groups", vm, []any{string(one)})
	if got := record(r.core, one).VMs; len(got) != 1 || got[0] != vm {
		t.Errorf("VMs of the group: %v", got)
	}
	r.fails("TOO_MANY_GROUPS", "VM.set_groups", vm, []any{string(one), string(two)})
	r.fails("HANDLE_INVALID|VM_group|OpaqueRef:x", "VM.set_groups", vm, []any{"OpaqueRef:x"})
	r.call("VM.set_groups", vm, []any{})
	if got := record(r.core, one).VMs; len(got) != 0 {
		t.Errorf("VMs of a group that has none: %v", got)
	}
}

// What VIFs of a network may send does not change under those that are attached.
func TestNetworkSetDefaultLockingMode(t *testing.T) {
	r := newRig(t)
	vif := r.vif(r.vm("guest"), "0")
	network := record(r.core, vif).Network
	r.call("network.set_default_locking_mode", string(network), "disabled")
	if got := record(r.core, network).DefaultLockingMode; got != xapi.NetworkDefaultLockingModeDisabled {
		t.Errorf("mode %q", got)
	}
	set(r, vif, func(v *xapi.VIF) { v.CurrentlyAttached = true })
	r.fails("VIF_IN_USE|"+string(network)+"|"+string(vif), "network.set_default_locking_mode", string(network), "unlocked")
}
