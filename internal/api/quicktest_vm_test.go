package api

import (
	"fmt"
	"slices"
	"strings"
	"testing"
)

// text and list are call for messages that return a string or a set of them.
func (w *wire) text(name string, params ...any) string {
	w.t.Helper()
	return w.call(name, params...).(string)
}

func (w *wire) list(name string, params ...any) []string {
	w.t.Helper()
	out := []string{}
	for _, v := range w.call(name, params...).([]any) {
		out = append(out, v.(string))
	}
	return out
}

// onBothReverts is onWire with both ways to revert, checking that no VM is left
// behind, either.
func onBothReverts(t *testing.T, test func(t *testing.T, w *wire)) {
	for _, clone := range []bool{false, true} {
		t.Run(fmt.Sprintf("clone=%v", clone), func(t *testing.T) {
			onWire(t, func(t *testing.T, w *wire) {
				if clone {
					w.call("pool.add_to_other_config", w.pool, "coppice:revert", "clone")
				}
				before := len(w.list("VM.get_all"))
				test(t, w)
				if after := len(w.list("VM.get_all")); after != before && !t.Failed() {
					t.Errorf("%d VMs before, %d after", before, after)
				}
			})
		})
	}
}

// revertsInPlace tells what the SR says of itself, as the suite's filters read it.
func (w *wire) revertsInPlace() bool {
	w.t.Helper()
	ops := w.list("SR.get_allowed_operations", string(w.sr))
	if !slices.Contains(ops, "vdi_create") || !slices.Contains(ops, "vdi_clone") {
		w.t.Fatalf("SR.allowed_operations %q", ops)
	}
	return slices.Contains(ops, "vdi_revert")
}

// installed makes a VM from the default template with two disks of 4 MiB, on
// devices 0 and 1.
func (w *wire) installed(typ string) (vm string, vdis [2]string) {
	w.t.Helper()
	var template string
	for ref, rec := range w.call("VM.get_all_records").(map[string]any) {
		if r := rec.(map[string]any); r["is_a_template"] == true && strings.HasPrefix(r["name_label"].(string), "Other install media") {
			template = ref
		}
	}
	if template == "" {
		w.t.Fatal("no template Other install media")
	}
	vm = w.text("VM.clone", template, "quicktest")
	w.call("VM.provision", vm)
	for i := range vdis {
		vdis[i] = w.text("VDI.create", diskArgs(w.sr, 4<<20))
		mode := "RW"
		if typ == "CD" {
			mode = "RO"
		}
		args := vbdArgs(vmRef(vm), vdiRef(vdis[i]), fmt.Sprint(i), mode)
		args["type"], args["currently_attached"] = typ, true
		vbd := w.text("VBD.create", args)
		if w.call("VBD.get_currently_attached", vbd) != false {
			w.t.Error("a VBD of a halted VM is attached")
		}
	}
	return vm, vdis
}

// attached returns the VDIs of a VM by device.
func (w *wire) attached(vm string) map[string]string {
	w.t.Helper()
	got := map[string]string{}
	for _, vbd := range w.list("VM.get_VBDs", vm) {
		got[w.text("VBD.get_userdevice", vbd)] = w.text("VBD.get_VDI", vbd)
	}
	return got
}

// uninstall destroys VMs with their snapshots and all disks that belong to
// them, and the disks extra.
func (w *wire) uninstall(vm string, extra ...string) {
	w.t.Helper()
	vms := append(w.list("VM.get_snapshots", vm), vm)
	doomed := slices.Clone(extra)
	for _, v := range vms {
		for _, vdi := range w.attached(v) {
			if !slices.Contains(doomed, vdi) {
				doomed = append(doomed, vdi)
			}
		}
	}
	for _, v := range vms {
		w.call("VM.destroy", v)
		w.refuses("HANDLE_INVALID", "VM.destroy", v)
	}
	for _, vdi := range doomed {
		w.call("VDI.destroy", vdi)
	}
}

func TestQT_SNAP_1(t *testing.T) {
	onBothReverts(t, func(t *testing.T, w *wire) {
		vm, vdis := w.installed("Disk")
		snap := w.text("VM.snapshot", vm, "snap", []string{})
		if got := w.text("VM.get_snapshot_of", snap); got != vm {
			t.Errorf("snapshot_of %s, want %s", got, vm)
		}
		got := w.attached(snap)
		if len(got) != 2 {
			t.Errorf("VBDs %q", got)
		}
		for i, vdi := range vdis {
			if of := w.text("VDI.get_snapshot_of", got[fmt.Sprint(i)]); of != vdi {
				t.Errorf("device %d is a snapshot of %s, want %s", i, of, vdi)
			}
		}
		w.uninstall(vm)
	})
}

func TestQT_SNAP_2(t *testing.T) {
	onBothReverts(t, func(t *testing.T, w *wire) {
		vm, vdis := w.installed("Disk")
		snap := w.text("VM.snapshot", vm, "snap", []string{vdis[1]})
		got := w.attached(snap)
		if len(got) != 1 || w.text("VDI.get_snapshot_of", got["0"]) != vdis[0] {
			t.Errorf("VBDs %q", got)
		}
		w.uninstall(vm)
	})
}

func TestQT_REV_1(t *testing.T) {
	onBothReverts(t, func(t *testing.T, w *wire) {
		vm, vdis := w.installed("Disk")
		snap := w.text("VM.snapshot", vm, "snap", []string{vdis[1]})
		w.call("VM.revert", snap)
		if got := w.attached(vm); len(got) != 1 {
			t.Errorf("VBDs %q", got)
		}
		w.text("VDI.get_uuid", vdis[1]) // it survives
		w.uninstall(vm, vdis[1])
	})
}

func TestQT_REV_2(t *testing.T) {
	onBothReverts(t, func(t *testing.T, w *wire) {
		vm, vdis := w.installed("Disk")
		snap := w.text("VM.snapshot", vm, "snap")
		if !w.revertsInPlace() {
			w.call("VM.revert", snap)
			if got := w.attached(vm); len(got) != 2 || got["0"] == vdis[0] {
				t.Errorf("VBDs %q, before %q", got, vdis)
			}
			w.refuses("HANDLE_INVALID", "VDI.get_record", vdis[0])
			w.refuses("SR_OPERATION_NOT_SUPPORTED", "VDI.revert", w.attached(snap)["0"])
		}
		w.uninstall(vm)
	})
}

func TestQT_REV_3(t *testing.T) {
	onBothReverts(t, func(t *testing.T, w *wire) {
		vm, vdis := w.installed("Disk")
		snap := w.text("VM.snapshot", vm, "snap")
		if w.revertsInPlace() {
			vbds := w.list("VM.get_VBDs", vm)
			w.call("VM.revert", snap)
			if got := w.attached(vm); len(got) != 2 || got["0"] != vdis[0] || got["1"] != vdis[1] {
				t.Errorf("VBDs %q, before %q", got, vdis)
			}
			if got := w.list("VM.get_VBDs", vm); !slices.Equal(slices.Sorted(slices.Values(got)), slices.Sorted(slices.Values(vbds))) {
				t.Errorf("VBDs %q, before %q", got, vbds)
			}
		}
		w.uninstall(vm)
	})
}

func TestQT_REV_4(t *testing.T) {
	onBothReverts(t, func(t *testing.T, w *wire) {
		vm, vdis := w.installed("CD")
		snap := w.text("VM.snapshot", vm, "snap", []string{})
		if got := w.attached(snap); len(got) != 2 || got["0"] != vdis[0] || got["1"] != vdis[1] {
			t.Errorf("VBDs of the snapshot %q, of the VM %q", got, vdis)
		}
		w.call("VM.revert", snap)
		if got := w.attached(vm); len(got) != 2 || got["0"] != vdis[0] || got["1"] != vdis[1] {
			t.Errorf("VBDs %q, before %q", got, vdis)
		}
		w.uninstall(vm)
	})
}

// QT-LIFE: what needs a hypervisor is refused by its name, and what is wrong
// with the VM is said first.
func TestQT_LIFE(t *testing.T) {
	onBothReverts(t, func(t *testing.T, w *wire) {
		vm, vdis := w.installed("Disk")
		w.refuses("OPERATION_NOT_ALLOWED", "VM.start", vm, false, false)
		w.refuses("OPERATION_NOT_ALLOWED", "VM.start_on", vm, string(w.host), false, false)
		for _, name := range []string{"clean_shutdown", "clean_reboot", "hard_shutdown", "hard_reboot", "pause", "unpause", "suspend", "shutdown"} {
			w.refuses("VM_BAD_POWER_STATE", "VM."+name, vm)
		}
		w.refuses("VM_BAD_POWER_STATE", "VM.resume", vm, false, false)
		snap := w.text("VM.snapshot", vm, "snap")
		w.refuses("VM_IS_SNAPSHOT", "VM.start", snap, false, false)
		w.call("VM.set_is_a_template", vm, true)
		w.refuses("VM_IS_TEMPLATE", "VM.start", vm, false, false)
		if domid := fmt.Sprint(w.call("VM.get_domid", vm)); domid != "-1" {
			t.Errorf("domid %s", domid)
		}
		w.uninstall(vm, vdis[:]...)
	})
}
