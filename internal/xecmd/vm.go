package xecmd

import (
	"context"
	"fmt"
	"slices"
	"strings"

	"coppice/internal/xapi"
)

func vmCommands() []command {
	vms := selection{noun: "vm"}
	withTemplates := selection{noun: "vm", templates: true}
	return []command{
		{
			name: "vm-create", required: []string{"name-label"}, optional: []string{"name-description"}, hidden: true,
			help: "Create a new VM with default parameters.", run: vmCreate,
		},
		{name: "vm-destroy", required: []string{"uuid"}, help: "Destroy a VM. Leaves associated storage intact.", run: send("VM", "VM.destroy")},
		{
			name: "vm-clone", required: []string{"new-name-label"}, optional: []string{"new-name-description"}, selects: withTemplates,
			help: "Clone an existing VM, using storage-level fast disk clone operation where available.", run: vmClone,
		},
		{
			name: "vm-copy", required: []string{"new-name-label"}, optional: []string{"new-name-description", "sr-uuid", "progress"},
			selects: selection{noun: "vm", templates: true, single: true},
			help:    "Copy an existing VM, but without using storage-level fast disk clone operation.", run: vmCopy,
		},
		{
			name: "vm-snapshot", required: []string{"new-name-label"}, optional: []string{"new-name-description", "ignore-vdi-uuids"}, selects: vms,
			help: "Snapshot an existing VM, using storage-level fast disk snapshot operation where available.", run: vmSnapshot,
		},
		{
			name: "vm-snapshot-with-quiesce", required: []string{"new-name-label"}, optional: []string{"new-name-description"}, selects: vms,
			help: "Not available: quiesced snapshots are no longer supported.", run: vmCopyWith("VM.snapshot_with_quiesce"),
		},
		{
			name: "vm-checkpoint", required: []string{"new-name-label"}, optional: []string{"new-name-description"}, selects: vms,
			help: "Checkpoint an existing VM, using storage-level fast disk snapshot operation where available.", run: vmCopyWith("VM.checkpoint"),
		},
		{
			name: "vm-start", optional: []string{"force", "on", "paused", "progress"}, selects: selection{noun: "vm", dom0: true},
			help: "Start the selected VM(s).", run: vmStart,
		},
		{name: "vm-shutdown", optional: []string{"force", "progress"}, selects: vms, help: "Shutdown the selected VM(s).", run: forced("VM.clean_shutdown", "VM.hard_shutdown")},
		{name: "vm-reboot", optional: []string{"force"}, selects: vms, help: "Reboot the selected VM(s).", run: forced("VM.clean_reboot", "VM.hard_reboot")},
		{name: "vm-suspend", optional: []string{"progress"}, selects: vms, help: "Suspend the selected VM(s).", run: on("VM.suspend")},
		{name: "vm-resume", optional: []string{"on", "force", "progress"}, selects: vms, help: "Resume the selected VM(s).", run: on("VM.resume", false, false)},
		{name: "vm-pause", selects: vms, help: "Pause a running VM.", run: on("VM.pause")},
		{name: "vm-unpause", selects: vms, help: "Unpause a paused VM.", run: on("VM.unpause")},
		{name: "vm-reset-powerstate", optional: []string{"force"}, selects: vms, help: "Force the VM power state to halted in the management toolstack database only.", run: vmResetPowerState},
		{
			name: "vm-disk-list", optional: []string{"vbd-params", "vdi-params"}, selects: vms,
			help: "List disks on the selected VM(s).", run: diskList("Disk"),
		},
		{
			name: "vm-cd-list", optional: []string{"vbd-params", "vdi-params"}, selects: vms,
			help: "List CDs currently attached to the VM(s).", run: diskList("CD"),
		},
		{
			name: "vm-uninstall", optional: []string{"force"}, selects: vms,
			help: "Uninstall a VM. This operation will destroy those VDIs that are marked RW and connected to this VM only. To simply destroy the VM record, use vm-destroy.",
			run:  vmUninstall,
		},
		{
			name: "template-uninstall", required: []string{"template-uuid"}, optional: []string{"force"},
			help: "Uninstall a custom template. This operation will destroy those VDIs that are marked as 'owned' by this template.",
			run: func(ctx context.Context, r *run) error {
				vm, err := r.ref(ctx, "VM", "template-uuid")
				if err != nil {
					return err
				}
				return uninstall(ctx, r, []string{vm})
			},
		},
	}
}

func vmCreate(ctx context.Context, r *run) error {
	const mib = int64(1) << 20
	none := map[string]any{}
	vm, err := r.callText(ctx, "VM.create", map[string]any{
		"name_label": r.args.str("name-label"), "name_description": r.args.str("name-description"),
		"user_version": int64(0), "is_a_template": false, "affinity": xapi.NullRef,
		"memory_static_min": 128 * mib, "memory_dynamic_min": 128 * mib, "memory_dynamic_max": 256 * mib, "memory_static_max": 256 * mib,
		"VCPUs_params": none, "VCPUs_max": int64(1), "VCPUs_at_startup": int64(1),
		"actions_after_shutdown": "destroy", "actions_after_reboot": "restart", "actions_after_crash": "restart",
		"PV_bootloader": "", "PV_kernel": "", "PV_ramdisk": "", "PV_args": "", "PV_bootloader_args": "", "PV_legacy_args": "",
		"HVM_boot_policy": "BIOS order", "HVM_boot_params": map[string]any{"order": "dc"},
		"platform": none, "PCI_bus": "", "other_config": none, "recommendations": "", "xenstore_data": none,
	})
	if err != nil {
		return err
	}
	return r.printUUID(ctx, "VM", vm)
}

// vmCopyWith makes a command that makes a new VM of each selected one.
func vmCopyWith(method string, params ...any) func(ctx context.Context, r *run) error {
	return func(ctx context.Context, r *run) error {
		return r.each(ctx, func(row row) error {
			return r.newVM(ctx, method, append([]any{row.ref, r.args.str("new-name-label")}, params...)...)
		})
	}
}

// newVM sends a message that makes a VM, describes the VM and prints its uuid.
func (r *run) newVM(ctx context.Context, method string, params ...any) error {
	vm, err := r.made(ctx, method, params...)
	if err != nil {
		return err
	}
	if d, ok := r.args.lookup("new-name-description"); ok {
		if err := r.do(ctx, "VM.set_name_description", vm, d); err != nil {
			return err
		}
	}
	return r.printUUID(ctx, "VM", vm)
}

func vmClone(ctx context.Context, r *run) error { return vmCopyWith("VM.clone")(ctx, r) }

func vmCopy(ctx context.Context, r *run) error {
	sr, err := r.optionalRef(ctx, "SR", "sr-uuid")
	if err != nil {
		return err
	}
	return vmCopyWith("VM.copy", sr)(ctx, r)
}

func vmSnapshot(ctx context.Context, r *run) error {
	ignored := []any{}
	if list := r.args.str("ignore-vdi-uuids"); list != "" {
		for uuid := range strings.SplitSeq(list, ",") {
			vdi, err := r.byUUID(ctx, "VDI", uuid)
			if err != nil {
				return err
			}
			ignored = append(ignored, vdi)
		}
	}
	return vmCopyWith("VM.snapshot", ignored)(ctx, r)
}

func vmStart(ctx context.Context, r *run) error {
	force, paused := r.args.flag("force"), r.args.flag("paused")
	name, there := r.args.lookup("on")
	if !there {
		return on("VM.start", paused, force)(ctx, r)
	}
	host, err := r.hostNamed(name)
	if err != nil {
		return err
	}
	return on("VM.start_on", host, paused, force)(ctx, r)
}

func (r *run) hostNamed(name string) (host string, err error) {
	return host, r.read(func(v view) error {
		for ref, rec := range v.Each(xapi.ClassOf[xapi.Host]()) {
			if h := rec.(*xapi.Host); h.UUID == name || h.NameLabel == name {
				host = ref
				return nil
			}
		}
		return failf("No matching hosts found")
	})
}

// forced makes a command with a gentle message and one for --force.
func forced(gently, hard string) func(ctx context.Context, r *run) error {
	return func(ctx context.Context, r *run) error {
		if r.args.flag("force") {
			return on(hard)(ctx, r)
		}
		return on(gently)(ctx, r)
	}
}

func vmResetPowerState(ctx context.Context, r *run) error {
	if !r.args.flag("force") {
		return errForce
	}
	return on("VM.power_state_reset")(ctx, r)
}

// diskList makes the command that lists the VBDs of a type with their VDIs.
func diskList(kind string) func(ctx context.Context, r *run) error {
	return func(ctx context.Context, r *run) error {
		return r.each(ctx, func(row row) error { return r.listDisks(row.ref, kind) })
	}
}

// listDisks lists the VBDs of one type of a VM, by device, with their VDIs.
func (r *run) listDisks(vm, kind string) error {
	params := func(name string, otherwise ...string) []string {
		switch p, ok := r.args.lookup(name); {
		case !ok:
			return otherwise
		case p == "all":
			return nil
		default:
			return strings.Split(p, ",")
		}
	}
	vbdNoun, vdiNoun := r.table.nouns["vbd"], r.table.nouns["vdi"]
	vbdFields := vbdNoun.pick(params("vbd-params", "uuid", "vm-name-label", "userdevice"))
	if kind == "CD" {
		vbdFields = vbdNoun.pick(params("vbd-params", "uuid", "vm-name-label", "userdevice", "empty"))
	}
	vdiFields := vdiNoun.pick(params("vdi-params", "uuid", "name-label", "sr-name-label", "virtual-size"))
	type part struct {
		title string
		rec   []cell
	}
	var parts []part
	err := r.read(func(v view) error {
		rec, ok := v.Lookup(xapi.ClassOf[xapi.VM](), vm)
		if !ok {
			return xapi.NewError(xapi.ErrHandleInvalid, "VM", vm)
		}
		var vbds []*xapi.VBD
		for _, ref := range rec.(*xapi.VM).VBDs {
			if vbd, ok := v.Lookup(vbdNoun.class, string(ref)); ok && string(vbd.(*xapi.VBD).Type) == kind {
				vbds = append(vbds, vbd.(*xapi.VBD))
			}
		}
		slices.SortFunc(vbds, func(a, b *xapi.VBD) int { return strings.Compare(a.Userdevice, b.Userdevice) })
		for i, vbd := range vbds {
			parts = append(parts, part{fmt.Sprintf("%s %d VBD:", kind, i), cells(v, vbd, vbdFields)})
			if vdi, ok := v.Lookup(vdiNoun.class, string(vbd.VDI)); ok && !vbd.Empty {
				parts = append(parts, part{fmt.Sprintf("%s %d VDI:", kind, i), cells(v, vdi, vdiFields)})
			}
		}
		return nil
	})
	if err != nil {
		return err
	}
	for _, p := range parts {
		r.out.message(p.title)
		r.out.records(p.rec)
	}
	return nil
}

func vmUninstall(ctx context.Context, r *run) error {
	rows, err := r.selected(ctx)
	if err != nil {
		return err
	}
	vms := make([]string, len(rows))
	for i, row := range rows {
		vms[i] = row.ref
	}
	return uninstall(ctx, r, vms)
}

// doomed is what an uninstall destroys.
type doomed struct {
	vms, vdis []string
	lines     []string // for people
}

// collect adds a VM, its snapshots, and the disks that they own.
func (d *doomed) collect(v view, vm string) {
	rec, ok := v.Lookup(xapi.ClassOf[xapi.VM](), vm)
	if !ok || slices.Contains(d.vms, vm) {
		return
	}
	m := rec.(*xapi.VM)
	d.vms = append(d.vms, vm)
	d.lines = append(d.lines, fmt.Sprintf("VM : %s (%s)", m.UUID, m.NameLabel))
	disk := func(ref string) {
		rec, ok := v.Lookup(xapi.ClassOf[xapi.VDI](), ref)
		if !ok || slices.Contains(d.vdis, ref) {
			return
		}
		vdi := rec.(*xapi.VDI)
		line := fmt.Sprintf("VDI: %s (%s) ", vdi.UUID, vdi.NameLabel)
		if len(vdi.VBDs) > 1 {
			line += " ** WARNING: disk is shared by other VMs"
		}
		d.vdis, d.lines = append(d.vdis, ref), append(d.lines, line)
	}
	for _, ref := range m.VBDs {
		if rec, ok := v.Lookup(xapi.ClassOf[xapi.VBD](), string(ref)); ok {
			vbd := rec.(*xapi.VBD)
			if _, owner := vbd.OtherConfig["owner"]; owner {
				disk(string(vbd.VDI))
			}
		}
	}
	disk(string(m.SuspendVDI))
	for _, ref := range m.Snapshots {
		d.collect(v, string(ref))
	}
}

// uninstall destroys VMs with everything that is theirs, after asking.
func uninstall(ctx context.Context, r *run, vms []string) error {
	var d doomed
	err := r.read(func(v view) error {
		for _, vm := range vms {
			d.collect(v, vm)
		}
		return nil
	})
	if err != nil {
		return err
	}
	r.out.direct("The following items are about to be destroyed")
	for _, line := range d.lines {
		r.out.direct(line)
	}
	if !r.args.flag("force") {
		r.out.direct("Type 'yes' to continue")
		answer, err := r.conn.Prompt(ctx)
		if err != nil {
			return err
		}
		if !strings.EqualFold(strings.TrimSpace(answer), "yes") {
			r.out.direct(fmt.Sprintf("Aborted (you typed: '%s')", answer))
			return nil
		}
	}
	if err := d.destroy(ctx, r); err != nil {
		return err
	}
	r.out.direct("All objects destroyed")
	return nil
}

// destroy destroys what was collected.
func (d *doomed) destroy(ctx context.Context, r *run) error {
	for _, vm := range d.vms {
		if err := r.halt(ctx, vm); err != nil {
			return err
		}
		if err := r.do(ctx, "VM.destroy", vm); err != nil {
			return err
		}
	}
	for _, vdi := range d.vdis {
		if err := r.do(ctx, "VDI.destroy", vdi); err != nil {
			return err
		}
	}
	return nil
}

// halt shuts a VM down the hard way unless it is halted.
func (r *run) halt(ctx context.Context, vm string) error {
	state, err := r.callText(ctx, "VM.get_power_state", vm)
	if err != nil || state == string(xapi.VMPowerStateHalted) {
		return err
	}
	return r.do(ctx, "VM.hard_shutdown", vm)
}
