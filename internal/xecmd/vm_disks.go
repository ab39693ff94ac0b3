package xecmd

import (
	"context"
	"slices"
	"strings"

	"coppice/internal/xapi"
)

// vmDiskCommands are those about the disks, discs and interfaces of VMs.
func vmDiskCommands() []command {
	vms := selection{noun: "vm"}
	return []command{
		{
			name: "vm-disk-add", required: []string{"disk-size", "device"}, optional: []string{"sr-uuid"}, selects: vms,
			help: "Add a new disk to the selected VM(s).", run: vmDiskAdd,
		},
		{
			name: "vm-disk-remove", required: []string{"device"}, selects: vms,
			help: "Remove a disk from the selected VM and destroy it.", run: vmDiskRemove,
		},
		{
			name: "vm-cd-add", required: []string{"cd-name", "device"}, selects: vms,
			help: "Add a CD to the VM(s). The device field should be selected from the parameter 'allowed-VBD-devices' of the VM.", run: vmCDAdd,
		},
		{
			name: "vm-cd-insert", required: []string{"cd-name"}, selects: vms,
			help: "Insert a CD into the VM(s). This command works only when there is exactly one empty CD device.", run: vmCDInsert,
		},
		{name: "vm-cd-eject", selects: vms, help: "Eject a CD from the virtual CD drive. This command works only if there is exactly one CD attached to the VM.", run: vmCDEject},
		{
			name: "vm-cd-remove", required: []string{"cd-name"}, selects: vms,
			help: "Remove the selected CDs from the VM(s).", run: vmCDRemove,
		},
		{name: "vm-vif-list", selects: vms, help: "List the VIFs present on selected VM.", run: vmVIFList},
		{name: "cd-list", optional: []string{"params"}, help: "List the CDs available to be attached to VMs.", run: cdList},
	}
}

// newVBD makes a VBD.
func (r *run) newVBD(ctx context.Context, vm, vdi, device, kind, mode string, owned bool) (string, error) {
	config := map[string]any{}
	if owned {
		config["owner"] = ""
	}
	return r.callText(ctx, "VBD.create", map[string]any{
		"VM": vm, "VDI": vdi, "device": "", "userdevice": device, "bootable": false, "mode": mode, "type": kind,
		"unpluggable": true, "empty": false, "other_config": config,
		"qos_algorithm_type": "", "qos_algorithm_params": map[string]any{},
	})
}

// vmDiskAdd makes a disk and gives it to a VM; without the VBD there is no
// disk either.
func vmDiskAdd(ctx context.Context, r *run) error {
	size, err := r.args.size("disk-size")
	if err != nil {
		return err
	}
	sr, err := r.optionalRef(ctx, "SR", "sr-uuid")
	if err != nil {
		return err
	}
	if sr == xapi.NullRef {
		if sr, err = r.defaultSR(); err != nil {
			return err
		}
	}
	return r.each(ctx, func(row row) error {
		vdi, err := r.callText(ctx, "VDI.create", map[string]any{
			"SR": sr, "virtual_size": size, "type": "user", "sharable": false, "read_only": false,
			"name_label": "Created by xe", "name_description": "", "other_config": map[string]any{},
		})
		if err != nil {
			return err
		}
		vbd, err := r.newVBD(ctx, row.ref, vdi, r.args.str("device"), "Disk", "RW", true)
		if err != nil {
			_ = r.do(context.WithoutCancel(ctx), "VDI.destroy", vdi) // err says why
			return err
		}
		if row.rec.(*xapi.VM).PowerState != xapi.VMPowerStateRunning {
			return nil
		}
		return r.do(ctx, "VBD.plug", vbd)
	})
}

// defaultSR is the pool's.
func (r *run) defaultSR() (sr string, err error) {
	err = r.read(func(v view) error {
		for _, rec := range v.Each(xapi.ClassOf[xapi.Pool]()) {
			sr = string(rec.(*xapi.Pool).DefaultSR)
		}
		if _, ok := v.Lookup(xapi.ClassOf[xapi.SR](), sr); !ok {
			return failf("No SR specified and Pool default SR is null")
		}
		return nil
	})
	return sr, err
}

// device is a VBD with its reference.
type device struct {
	ref string
	rec *xapi.VBD
}

// devices returns the VBDs of a VM that pass.
func (r *run) devices(vm string, pass func(v view, vbd *xapi.VBD) bool) (found []device, err error) {
	err = r.read(func(v view) error {
		rec, ok := v.Lookup(xapi.ClassOf[xapi.VM](), vm)
		if !ok {
			return xapi.NewError(xapi.ErrHandleInvalid, "VM", vm)
		}
		for _, ref := range rec.(*xapi.VM).VBDs {
			if vbd, ok := v.Lookup(xapi.ClassOf[xapi.VBD](), string(ref)); ok && pass(v, vbd.(*xapi.VBD)) {
				found = append(found, device{string(ref), vbd.(*xapi.VBD)})
			}
		}
		return nil
	})
	return found, err
}

func vmDiskRemove(ctx context.Context, r *run) error {
	return r.each(ctx, func(row row) error {
		found, err := r.devices(row.ref, func(_ view, vbd *xapi.VBD) bool {
			return vbd.Type == xapi.VBDTypeDisk && vbd.Userdevice == r.args.str("device")
		})
		if err != nil {
			return err
		}
		if len(found) == 0 {
			return failf("Disk not found")
		}
		if err := r.do(ctx, "VBD.destroy", found[0].ref); err != nil {
			return err
		}
		return r.do(ctx, "VDI.destroy", string(found[0].rec.VDI))
	})
}

// isCD tells whether a VDI is an image of a CD: what SRs of content type iso
// hold.
func isCD(v view, vdi *xapi.VDI) bool {
	sr, ok := v.Lookup(xapi.ClassOf[xapi.SR](), string(vdi.SR))
	return ok && sr.(*xapi.SR).ContentType == "iso"
}

// cdNamed returns the image with the name that cd-name gives.
func (r *run) cdNamed() (vdi string, err error) {
	name := r.args.str("cd-name")
	err = r.read(func(v view) error {
		for ref, rec := range v.Each(xapi.ClassOf[xapi.VDI]()) {
			if d := rec.(*xapi.VDI); d.NameLabel == name && isCD(v, d) {
				vdi = ref
				return nil
			}
		}
		return failf("CD %s not found!", name)
	})
	return vdi, err
}

func vmCDAdd(ctx context.Context, r *run) error {
	vdi, err := r.cdNamed()
	if err != nil {
		return err
	}
	return r.each(ctx, func(row row) error {
		_, err := r.newVBD(ctx, row.ref, vdi, r.args.str("device"), "CD", "RO", false)
		return err
	})
}

// drives returns the CD drives of a VM that are empty, or those that are not.
func (r *run) drives(vm string, empty bool) ([]device, error) {
	return r.devices(vm, func(_ view, vbd *xapi.VBD) bool { return vbd.Type == xapi.VBDTypeCD && vbd.Empty == empty })
}

func vmCDInsert(ctx context.Context, r *run) error {
	vdi, err := r.cdNamed()
	if err != nil {
		return err
	}
	return r.each(ctx, func(row row) error {
		found, err := r.drives(row.ref, true)
		switch {
		case err != nil:
			return err
		case len(found) == 0:
			return failf("No empty CD devices found")
		case len(found) > 1:
			return failf("Two or more empty CD devices found. Please specify the CD device to use with vbd-insert")
		}
		return r.do(ctx, "VBD.insert", found[0].ref, vdi)
	})
}

func vmCDEject(ctx context.Context, r *run) error {
	return r.each(ctx, func(row row) error {
		found, err := r.drives(row.ref, false)
		switch {
		case err != nil:
			return err
		case len(found) == 0:
			return failf("No CDs found")
		case len(found) > 1:
			return failf("Two or more CDs found. Please use vbd-eject")
		}
		return r.do(ctx, "VBD.eject", found[0].ref)
	})
}

func vmCDRemove(ctx context.Context, r *run) error {
	name := r.args.str("cd-name")
	return r.each(ctx, func(row row) error {
		found, err := r.devices(row.ref, func(v view, vbd *xapi.VBD) bool {
			vdi, ok := v.Lookup(xapi.ClassOf[xapi.VDI](), string(vbd.VDI))
			return vbd.Type == xapi.VBDTypeCD && ok && vdi.(*xapi.VDI).NameLabel == name
		})
		if err != nil {
			return err
		}
		if len(found) == 0 {
			return failf("CD %s not found!", name)
		}
		for _, d := range found {
			if err := r.do(ctx, "VBD.destroy", d.ref); err != nil {
				return err
			}
		}
		return nil
	})
}

func vmVIFList(ctx context.Context, r *run) error {
	n := r.table.nouns["vif"]
	return r.each(ctx, func(row row) error {
		var list [][]cell
		err := r.read(func(v view) error {
			for _, ref := range row.rec.(*xapi.VM).VIFs {
				if vif, ok := v.Lookup(n.class, string(ref)); ok {
					list = append(list, cells(v, vif, n.pick(n.defaults)))
				}
			}
			return nil
		})
		if err != nil {
			return err
		}
		r.out.records(list...)
		return nil
	})
}

func cdList(ctx context.Context, r *run) error {
	n := r.table.nouns["vdi"]
	names := []string{"name-label", "uuid"}
	if p, ok := r.args.lookup("params"); ok {
		if names = strings.Split(p, ","); p == "all" {
			names = nil
		}
	}
	var list [][]cell
	err := r.read(func(v view) error {
		var found []row
		for ref, rec := range v.Each(n.class) {
			if isCD(v, rec.(*xapi.VDI)) {
				found = append(found, row{ref: ref, rec: rec})
			}
		}
		slices.SortFunc(found, func(a, b row) int {
			return strings.Compare(a.rec.(*xapi.VDI).NameLabel, b.rec.(*xapi.VDI).NameLabel)
		})
		for _, f := range found {
			list = append(list, cells(v, f.rec, n.pick(names)))
		}
		return nil
	})
	if err != nil {
		return err
	}
	r.out.records(list...)
	return nil
}
