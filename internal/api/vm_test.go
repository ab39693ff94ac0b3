package api

import (
	"maps"
	"net"
	"slices"
	"testing"
	"time"

	"coppice/internal/xapi"
)

type vmRef = xapi.Ref[xapi.VM]

func TestVMCreate(t *testing.T) {
	r := newRig(t)
	args := vmArgs("guest")
	args["name_description"], args["other_config"] = "d", map[string]any{"k": "v"}
	args["is_a_template"], args["tags"] = true, []any{"t"}
	args["is_a_snapshot"], args["snapshot_of"] = true, "OpaqueRef:x" // not for clients to say
	vm := r.call("VM.create", args).(vmRef)
	got := record(r.core, vm)
	if got.NameLabel != "guest" || got.NameDescription != "d" || got.OtherConfig["k"] != "v" || got.OtherConfig["mac_seed"] == "" ||
		!got.IsATemplate || got.IsASnapshot || !got.SnapshotOf.IsNull() || got.Domid != -1 || got.PowerState != xapi.VMPowerStateHalted ||
		got.IsControlDomain || !got.ResidentOn.IsNull() {
		t.Errorf("VM %+v", got)
	}
	record(r.core, got.Metrics) // exists
	if !slices.Contains(got.AllowedOperations, xapi.VMOperationsDestroy) {
		t.Errorf("allowed %q", got.AllowedOperations)
	}
}

func TestVMCreateErrors(t *testing.T) {
	r := newRig(t)
	with := func(key string, value any) map[string]any {
		args := vmArgs("x")
		args[key] = value
		return args
	}
	for _, c := range []struct {
		want string
		args map[string]any
	}{
		{"VM_BAD_POWER_STATE", with("power_state", "Running")},
		{"VM_BAD_POWER_STATE", with("power_state", "Suspended")},
		{"MEMORY_CONSTRAINT_VIOLATION_ORDER", with("memory_static_min", int64(2<<30))},
		{"INVALID_VALUE", with("VCPUs_max", int64(0))},
		{"INVALID_VALUE", with("VCPUs_at_startup", int64(2))},
		{"INVALID_VALUE", with("HVM_shadow_multiplier", 0.5)},
		{"HANDLE_INVALID", with("suspend_VDI", "OpaqueRef:none")},
	} {
		if _, err := r.try(r.root, "VM.create", c.args); code(err) != c.want {
			t.Errorf("got %v, want %s", err, c.want)
		}
	}
	disk := r.disk(1 << 20)
	args := with("power_state", "Suspended")
	args["suspend_VDI"], args["last_booted_record"] = string(disk), "record"
	args["last_boot_CPU_flags"] = map[string]any{"vendor": "x"}
	if got := record(r.core, r.call("VM.create", args).(vmRef)); got.PowerState != xapi.VMPowerStateSuspended {
		t.Errorf("power_state %s", got.PowerState)
	}
}

func TestVMDestroy(t *testing.T) {
	r := newRig(t)
	vm := r.vm("vm")
	disk := r.disk(1 << 20)
	vbd := r.vbd(vm, disk, "0", "RW")
	vif := r.vif(vm, "0")
	grandparent, child := r.vm("parent"), r.vm("child")
	set(r, vm, func(v *xapi.VM) { v.Parent = grandparent })
	set(r, child, func(v *xapi.VM) { v.Parent = vm })
	metrics := record(r.core, vm).Metrics

	r.call("VM.destroy", vm)
	r.fails("HANDLE_INVALID|VM|"+string(vm), "VM.get_record", vm)
	r.fails("HANDLE_INVALID|VBD|"+string(vbd), "VBD.get_record", string(vbd))
	r.fails("HANDLE_INVALID|VIF|"+string(vif), "VIF.get_record", string(vif))
	r.fails("HANDLE_INVALID|VM_metrics|"+string(metrics), "VM_metrics.get_record", string(metrics))
	if got := record(r.core, disk).VBDs; len(got) != 0 {
		t.Errorf("VBDs of the disk: %q", got)
	}
	if got := record(r.core, child).Parent; got != grandparent {
		t.Errorf("the child's parent is %s, want %s", got, grandparent)
	}
	r.wantConsistent()
}

func TestVMRules(t *testing.T) {
	r := newRig(t)
	vm := r.vm("vm")
	ref := string(vm)
	r.call("VM.add_to_blocked_operations", vm, "destroy", "because")
	if slices.Contains(record(r.core, vm).AllowedOperations, xapi.VMOperationsDestroy) {
		t.Error("a blocked operation is advertised")
	}
	r.fails("OPERATION_BLOCKED|"+ref+"|because", "VM.destroy", vm)
	r.fails("MAP_DUPLICATE_KEY|VM|blocked_operations|"+ref+"|destroy", "VM.add_to_blocked_operations", vm, "destroy", "x")
	r.call("VM.remove_from_blocked_operations", vm, "destroy")
	set(r, vm, func(v *xapi.VM) { v.PowerState = xapi.VMPowerStateRunning })
	r.fails("VM_BAD_POWER_STATE|"+ref+"|halted, suspended|running", "VM.destroy", vm)
	r.fails("VM_BAD_POWER_STATE|"+ref+"|halted|running", "VM.set_VCPUs_max", vm, 2)
	set(r, vm, func(v *xapi.VM) { v.PowerState = xapi.VMPowerStateHalted })
	r.call("VM.set_is_a_template", vm, true)
	if slices.Contains(record(r.core, vm).AllowedOperations, xapi.VMOperationsMakeIntoTemplate) {
		t.Error("a template can be made into a template")
	}
	r.fails("VM_IS_TEMPLATE|"+ref+"|make_into_template", "VM.assert_operation_valid", vm, "make_into_template")
	r.call("VM.set_is_default_template", vm, true)
	r.fails("VM_CANNOT_DELETE_DEFAULT_TEMPLATE", "VM.destroy", vm)
	r.call("VM.set_is_default_template", vm, false)
	set(r, vm, func(v *xapi.VM) { v.IsASnapshot = true })
	r.fails("VM_IS_SNAPSHOT|"+ref+"|changing_VCPUs", "VM.set_VCPUs_max", vm, 2)
	r.call("VM.assert_operation_valid", vm, "destroy")
	r.fails("VM_BAD_POWER_STATE|"+string(r.dom0)+"|halted, suspended|running", "VM.destroy", r.dom0)
	set(r, r.dom0, func(v *xapi.VM) { v.PowerState = xapi.VMPowerStateHalted })
	r.fails("OPERATION_NOT_ALLOWED|The control domain cannot do destroy", "VM.destroy", r.dom0)
	r.call("VM.update_allowed_operations", vm)
	r.call("VM.destroy", vm)
	r.fails("HANDLE_INVALID|VM|"+ref, "VM.update_allowed_operations", vm)
}

func TestVMSetters(t *testing.T) {
	r := newRig(t)
	vm := r.vm("vm")
	r.call("VM.set_memory_limits", vm, 1<<20, 8<<20, 2<<20, 4<<20)
	r.call("VM.set_memory_static_range", vm, 1<<19, 9<<20)
	r.call("VM.set_memory_dynamic_range", vm, 3<<20, 5<<20)
	r.call("VM.set_memory_static_min", vm, 1<<18)
	r.call("VM.set_memory_static_max", vm, 10<<20)
	r.call("VM.set_memory_dynamic_min", vm, 1<<20)
	r.call("VM.set_memory_dynamic_max", vm, 6<<20)
	r.call("VM.set_VCPUs_max", vm, 4)
	r.call("VM.set_VCPUs_at_startup", vm, 2)
	r.call("VM.set_HVM_shadow_multiplier", vm, 2.5)
	r.call("VM.set_HVM_boot_policy", vm, "BIOS order")
	r.call("VM.set_NVRAM", vm, map[string]string{"a": "1"})
	r.call("VM.add_to_NVRAM", vm, "b", "2")
	r.call("VM.remove_from_NVRAM", vm, "a")
	r.call("VM.set_actions_after_crash", vm, "destroy")
	r.call("VM.set_bios_strings", vm, map[string]string{"vendor": "x"})
	r.call("VM.set_has_vendor_device", vm, false)
	r.call("VM.set_ha_restart_priority", vm, "restart")
	r.call("VM.set_order", vm, 3)
	r.call("VM.set_start_delay", vm, 4)
	r.call("VM.set_shutdown_delay", vm, 5)
	r.call("VM.set_other_config", vm, map[string]string{"o": "1"})
	r.call("VM.add_to_other_config", vm, "p", "2")
	r.call("VM.remove_from_other_config", vm, "o")
	r.call("VM.set_platform", vm, map[string]string{"q": "1"})
	r.call("VM.add_to_platform", vm, "s", "2")
	r.call("VM.remove_from_platform", vm, "q")
	r.call("VM.set_blocked_operations", vm, map[string]string{"start": "no"})
	got := record(r.core, vm)
	switch {
	case got.MemoryStaticMin != 1<<18, got.MemoryStaticMax != 10<<20, got.MemoryDynamicMin != 1<<20, got.MemoryDynamicMax != 6<<20,
		got.VCPUsMax != 4, got.VCPUsAtStartup != 2, got.HVMShadowMultiplier != 2.5, got.HVMBootPolicy != "BIOS order",
		got.DomainType != xapi.DomainTypeHVM, len(got.NVRAM) != 1, got.NVRAM["b"] != "2",
		got.ActionsAfterCrash != xapi.OnCrashBehaviourDestroy, got.BIOSStrings["vendor"] != "x", got.HasVendorDevice,
		got.HARestartPriority != "restart", got.Order != 3, got.StartDelay != 4, got.ShutdownDelay != 5,
		len(got.OtherConfig) != 1, got.OtherConfig["p"] != "2", len(got.Platform) != 1, got.Platform["s"] != "2",
		got.BlockedOperations[xapi.VMOperationsStart] != "no":
		t.Errorf("VM %+v", got)
	}
	r.call("VM.set_memory", vm, 7<<20)
	r.call("VM.set_domain_type", vm, "pv")
	if got := record(r.core, vm); got.MemoryStaticMax != 7<<20 || got.MemoryDynamicMin != 7<<20 || got.HVMBootPolicy != "" {
		t.Errorf("VM %+v", got)
	}
	r.fails("MEMORY_CONSTRAINT_VIOLATION_ORDER", "VM.set_memory_dynamic_max", vm, 8<<20)
	r.fails("INVALID_VALUE|VCPUs_at_startup|2", "VM.set_VCPUs_max", vm, 1)
	r.fails("INVALID_VALUE|VCPUs_at_startup|5", "VM.set_VCPUs_at_startup", vm, 5)
	r.fails("INVALID_VALUE|HVM_shadow_multiplier|0.5", "VM.set_HVM_shadow_multiplier", vm, 0.5)
	r.fails("VM_BIOS_STRINGS_ALREADY_SET", "VM.set_bios_strings", vm, map[string]string{})
	r.fails("INVALID_VALUE|ha_restart_priority|x", "VM.set_ha_restart_priority", vm, "x")
	r.fails("INVALID_VALUE|order|-1", "VM.set_order", vm, -1)
	r.fails("VM_BAD_POWER_STATE|"+string(vm)+"|suspended|halted", "VM.set_suspend_VDI", vm, "OpaqueRef:NULL")
	r.fails("HANDLE_INVALID|VMSS|OpaqueRef:no", "VM.set_snapshot_schedule", vm, "OpaqueRef:no")
	r.fails("OPERATION_NOT_ALLOWED|The control domain cannot be scheduled", "VM.set_appliance", r.dom0, "OpaqueRef:NULL")
	r.fails("MAP_DUPLICATE_KEY|VM|other_config|"+string(vm)+"|p", "VM.add_to_other_config", vm, "p", "x")
}

func TestVBDCreate(t *testing.T) {
	r := newRig(t)
	vm := r.vm("vm")
	disk := r.disk(1 << 20)
	with := func(change map[string]any) map[string]any {
		args := vbdArgs(vm, disk, "0", "RW")
		maps.Copy(args, change)
		return args
	}
	r.call("VDI.enable_cbt", disk)
	typed := r.call("VDI.snapshot", disk).(vdiRef)
	r.call("VDI.data_destroy", typed)
	ro := r.disk(1 << 20)
	set(r, ro, func(v *xapi.VDI) { v.ReadOnly = true })
	for _, c := range []struct {
		want   string
		change map[string]any
	}{
		{"VBD_CDS_MUST_BE_READONLY", map[string]any{"type": "CD"}},
		{"VBD_NOT_REMOVABLE_MEDIA|in constructor", map[string]any{"empty": true}},
		{"VDI_INCOMPATIBLE_TYPE|" + string(typed) + "|cbt_metadata", map[string]any{"VDI": string(typed)}},
		{"VDI_READONLY|" + string(ro), map[string]any{"VDI": string(ro)}},
		{"HANDLE_INVALID|VDI|OpaqueRef:NULL", map[string]any{"VDI": "OpaqueRef:NULL"}},
		{"HANDLE_INVALID|VM|OpaqueRef:no", map[string]any{"VM": "OpaqueRef:no"}},
		{"INVALID_DEVICE|x", map[string]any{"userdevice": "x"}},
		{"INVALID_DEVICE|16", map[string]any{"userdevice": "16"}},
		{"INVALID_DEVICE|-1", map[string]any{"userdevice": "-1"}},
		{"INVALID_DEVICE|01", map[string]any{"userdevice": "01"}},
	} {
		r.fails(c.want, "VBD.create", with(c.change))
	}
	vbd := r.call("VBD.create", with(map[string]any{"currently_attached": true, "device": "xvda"})).(xapi.Ref[xapi.VBD])
	if got := record(r.core, vbd); got.CurrentlyAttached || got.Device != "" || !got.Unpluggable {
		t.Errorf("VBD %+v", got)
	}
	r.fails("DEVICE_ALREADY_EXISTS|xvda", "VBD.create", with(map[string]any{"userdevice": "xvda"}))
	auto := r.call("VBD.create", with(map[string]any{"userdevice": "autodetect"})).(xapi.Ref[xapi.VBD])
	if got := record(r.core, auto).Userdevice; got != "1" {
		t.Errorf("autodetect chose %q, want 1", got)
	}
	cd := r.call("VBD.create", with(map[string]any{"userdevice": "3", "type": "CD", "mode": "RO", "empty": true})).(xapi.Ref[xapi.VBD])
	if got := record(r.core, cd); !got.Empty || !got.VDI.IsNull() {
		t.Errorf("empty drive %+v", got)
	}
	free := r.call("VM.get_allowed_VBD_devices", vm).([]string)
	if len(free) != 13 || free[0] != "2" || free[1] != "4" {
		t.Errorf("free devices %q", free)
	}

	r.call("VBD.set_mode", string(vbd), "RO")
	r.fails("VBD_CDS_MUST_BE_READONLY", "VBD.set_mode", string(cd), "RW")
	set(r, vbd, func(b *xapi.VBD) { b.CurrentlyAttached = true })
	r.fails("DEVICE_ALREADY_ATTACHED|"+string(vbd), "VBD.set_mode", string(vbd), "RW")
	r.fails("OPERATION_NOT_ALLOWED|VBD '"+record(r.core, vbd).UUID+"' still attached to '"+record(r.core, vm).UUID+"'",
		"VBD.destroy", string(vbd))
	set(r, vbd, func(b *xapi.VBD) { b.CurrentlyAttached = false })
	r.call("VBD.destroy", string(vbd))
	record(r.core, disk) // stays
}

func TestDiskNumber(t *testing.T) {
	for device, want := range map[string]int{
		"0": 0, "15": 15, "xvda": 0, "xvdp": 15, "hdd": 3, "sdb": 1, "xvdaa": 26, "xvdiu": 254,
		"": -1, "xvd": -1, "xvd1": -1, "xvdA": -1, "nbd0": -1, "1x": -1, "-2": -1, "xvdaaa": -1, "007": -1,
	} {
		n, ok := diskNumber(device)
		if ok != (want >= 0) || ok && n != want {
			t.Errorf("%q: %d %v, want %d", device, n, ok, want)
		}
	}
}

// vif makes a network interface.
func (r *rig) vif(vm vmRef, device string) xapi.Ref[xapi.VIF] {
	r.t.Helper()
	return r.call("VIF.create", r.vifArgs(vm, device)).(xapi.Ref[xapi.VIF])
}

func (r *rig) vifArgs(vm vmRef, device string) map[string]any {
	r.t.Helper()
	network := r.call("network.create", map[string]any{"name_label": "n", "other_config": map[string]any{}}).(xapi.Ref[xapi.Network])
	return map[string]any{
		"VM": string(vm), "network": string(network), "device": device, "MAC": "", "MTU": int64(1500),
		"other_config": map[string]any{}, "qos_algorithm_type": "", "qos_algorithm_params": map[string]any{},
	}
}

func TestVIF(t *testing.T) {
	r := newRig(t)
	vm := r.vm("vm")
	vif := r.vif(vm, "0")
	got := record(r.core, vif)
	if mac, err := net.ParseMAC(got.MAC); err != nil || mac[0]&3 != 2 || !got.MACAutogenerated {
		t.Errorf("MAC %q: %v", got.MAC, err)
	}
	r.fails("DEVICE_ALREADY_EXISTS|0", "VIF.create", r.vifArgs(vm, "0"))
	r.fails("INVALID_DEVICE|7", "VIF.create", r.vifArgs(vm, "7"))
	args := r.vifArgs(vm, "1")
	args["MAC"] = "zz"
	r.fails("MAC_INVALID|zz", "VIF.create", args)
	args["network"] = "OpaqueRef:no"
	r.fails("HANDLE_INVALID|network|OpaqueRef:no", "VIF.create", args)
	if free := r.call("VM.get_allowed_VIF_devices", vm).([]string); len(free) != 6 || free[0] != "1" {
		t.Errorf("free %q", free)
	}
	r.fails("NETWORK_CONTAINS_VIF|"+string(vif), "network.destroy", string(got.Network))
	r.call("VIF.destroy", string(vif))
	r.call("network.destroy", string(got.Network))
}

func TestVIFConfiguration(t *testing.T) {
	r := newRig(t)
	vm := r.vm("vm")
	vif := r.vif(vm, "0")
	ref := string(vif)
	r.call("VIF.set_locking_mode", ref, "locked")
	r.call("VIF.set_ipv4_allowed", ref, []string{"10.0.0.1"})
	r.call("VIF.add_ipv4_allowed", ref, "10.0.0.2")
	r.call("VIF.add_ipv4_allowed", ref, "10.0.0.2")
	r.call("VIF.remove_ipv4_allowed", ref, "10.0.0.1")
	r.call("VIF.set_ipv6_allowed", ref, []string{"::1"})
	r.call("VIF.add_ipv6_allowed", ref, "fe80::1")
	r.call("VIF.remove_ipv6_allowed", ref, "::1")
	r.call("VIF.configure_ipv4", ref, "Static", "10.0.0.2/8", "10.0.0.254")
	r.call("VIF.configure_ipv6", ref, "Autoconf", "ignored", "ignored")
	r.call("VIF.set_trunks", ref, []any{int64(1), int64(2)})
	r.call("VIF.add_trunks", ref, 3)
	r.call("VIF.add_trunks", ref, 3)
	r.call("VIF.remove_trunks", ref, 1)
	got := record(r.core, vif)
	switch {
	case got.LockingMode != xapi.VIFLockingModeLocked, !slices.Equal(got.IPv4Allowed, []string{"10.0.0.2"}),
		!slices.Equal(got.IPv6Allowed, []string{"fe80::1"}), !slices.Equal(got.Trunks, []int64{2, 3}):
		t.Errorf("VIF %+v", got)
	case !slices.Equal(got.IPv4Addresses, []string{"10.0.0.2/8"}) || got.IPv4Gateway != "10.0.0.254" || len(got.IPv6Addresses) != 0 ||
		got.IPv6ConfigurationMode != xapi.VIFIPv6ConfigurationModeAutoconf || got.IPv6Gateway != "":
		t.Errorf("VIF %+v", got)
	}
	r.fails("INVALID_IP_ADDRESS_SPECIFIED|::1", "VIF.set_ipv4_allowed", ref, []string{"::1"})
	r.fails("INVALID_IP_ADDRESS_SPECIFIED|10.0.0.1", "VIF.add_ipv6_allowed", ref, "10.0.0.1")
	r.fails("INVALID_IP_ADDRESS_SPECIFIED|fe80::1%eth0", "VIF.add_ipv6_allowed", ref, "fe80::1%eth0")
	r.fails("INVALID_CIDR_ADDRESS_SPECIFIED|10.0.0.1", "VIF.configure_ipv4", ref, "Static", "10.0.0.1")
	r.fails("INVALID_IP_ADDRESS_SPECIFIED|nowhere", "VIF.configure_ipv6", ref, "Static", "::1/64", "nowhere")
	r.fails("INVALID_VALUE|trunks|4095", "VIF.add_trunks", ref, 4095)
	r.fails("INVALID_VALUE|trunks|-1", "VIF.set_trunks", ref, []any{int64(-1)})
	r.fails("VM_BAD_POWER_STATE|"+string(vm)+"|running|halted", "VIF.plug", ref)
	r.fails("VM_BAD_POWER_STATE|"+string(vm)+"|running|halted", "VIF.unplug", ref)
	set(r, vm, func(v *xapi.VM) { v.PowerState = xapi.VMPowerStateRunning })
	r.fails("DEVICE_ALREADY_DETACHED|"+ref, "VIF.unplug_force", ref)
	if _, err := r.try(r.root, "VIF.plug", ref); err == nil || code(err) != "OPERATION_NOT_ALLOWED" {
		t.Errorf("plug: %v", err)
	}
	other := r.call("network.create", map[string]any{"name_label": "other", "other_config": map[string]any{}}).(xapi.Ref[xapi.Network])
	r.call("VIF.move", ref, string(other))
	if got := record(r.core, other).VIFs; !slices.Equal(got, []xapi.Ref[xapi.VIF]{vif}) {
		t.Errorf("VIFs of the network: %q", got)
	}
	if got := record(r.core, got.Network).VIFs; len(got) != 0 {
		t.Errorf("VIFs of the old network: %q", got)
	}
	r.fails("HANDLE_INVALID|network|"+dangling, "VIF.move", ref, dangling)
}

func TestVBDMedia(t *testing.T) {
	r := newRig(t)
	vm, disc := r.vm("vm"), r.disk(2<<20)
	args := vbdArgs(vm, xapi.NullRef, "0", "RO")
	args["type"], args["empty"] = "CD", true
	drive := r.call("VBD.create", args).(xapi.Ref[xapi.VBD])
	ref := string(drive)
	ops := func() []xapi.VBDOperations { return record(r.core, drive).AllowedOperations }
	if got := ops(); !slices.Equal(got, []xapi.VBDOperations{"insert"}) {
		t.Errorf("allowed on an empty drive: %q", got)
	}
	r.fails("VBD_IS_EMPTY|"+ref, "VBD.eject", ref)
	r.fails("HANDLE_INVALID|VDI|"+dangling, "VBD.insert", ref, dangling)
	r.call("VBD.insert", ref, disc)
	if got := record(r.core, drive); got.Empty || got.VDI != disc || !slices.Equal(record(r.core, disc).VBDs, []xapi.Ref[xapi.VBD]{drive}) {
		t.Errorf("VBD %+v", got)
	}
	if got := ops(); !slices.Equal(got, []xapi.VBDOperations{"eject"}) {
		t.Errorf("allowed on a full drive: %q", got)
	}
	r.fails("VBD_NOT_EMPTY|"+ref, "VBD.insert", ref, disc)
	set(r, vm, func(v *xapi.VM) { v.PowerState = xapi.VMPowerStateSuspended })
	r.fails("VM_BAD_POWER_STATE|"+string(vm)+"|halted, running|suspended", "VBD.eject", ref)
	if got := ops(); len(got) != 0 {
		t.Errorf("allowed while suspended: %q", got)
	}
	set(r, vm, func(v *xapi.VM) { v.PowerState = xapi.VMPowerStateHalted })
	r.call("VBD.eject", ref)
	if got := record(r.core, drive); !got.Empty || !got.VDI.IsNull() || len(record(r.core, disc).VBDs) != 0 {
		t.Errorf("VBD %+v", got)
	}
	hard := r.vbd(vm, disc, "1", "RW")
	r.fails("VBD_NOT_REMOVABLE_MEDIA|"+string(hard), "VBD.eject", string(hard))
}

func TestPoolAndHost(t *testing.T) {
	r := newRig(t)
	r.call("pool.sync_database")
	if got := r.call("pool.is_slave", r.host); got != false {
		t.Errorf("is_slave %v", got)
	}
	r.call("pool.add_to_guest_agent_config", r.pool, "k", "v")
	r.fails("MAP_DUPLICATE_KEY|pool|guest_agent_config|"+string(r.pool)+"|k", "pool.add_to_guest_agent_config", r.pool, "k", "w")
	r.call("pool.remove_from_guest_agent_config", r.pool, "k")
	if got := record(r.core, r.pool).GuestAgentConfig; len(got) != 0 {
		t.Errorf("guest_agent_config %v", got)
	}
	r.call("pool.set_default_SR", r.pool, "OpaqueRef:NULL")
	if got := record(r.core, r.pool).DefaultSR; !got.IsNull() {
		t.Errorf("default_SR %s", got)
	}

	before := time.Now().Add(-time.Second)
	if got := r.call("host.get_servertime", r.host).(time.Time); got.Before(before) || got.After(time.Now()) {
		t.Errorf("servertime %v", got)
	}
	wall := r.call("host.get_server_localtime", r.host).(time.Time)
	if local := time.Now(); wall.Hour() != local.Hour() && wall.Hour() != local.Add(-time.Minute).Hour() {
		t.Errorf("localtime %v, the clock shows %v", wall, local)
	}
	r.fails("XENAPI_MISSING_PLUGIN|updater.py", "host.call_plugin", r.host, "updater.py", "fn", map[string]string{})
	if got := r.call("host.list_methods").([]string); !slices.Contains(got, "VDI.snapshot") {
		t.Errorf("%d methods, none of them VDI.snapshot", len(got))
	}
	r.call("host.disable", r.host)
	if record(r.core, r.host).Enabled {
		t.Error("the host is still enabled")
	}
	if got := r.call("VM.get_possible_hosts", r.dom0).([]xapi.Ref[xapi.Host]); len(got) != 0 {
		t.Errorf("possible hosts %q", got)
	}
	r.call("host.enable", r.host)
	if got := r.call("host.compute_free_memory", r.host).(int64); got <= 0 {
		t.Errorf("free memory %d", got)
	}
	r.fails("HANDLE_INVALID|host|OpaqueRef:no", "host.get_servertime", "OpaqueRef:no")
}
