package api

import (
	"context"
	"fmt"
	"slices"
	"strconv"
	"strings"

	"coppice/internal/db"
	"coppice/internal/xapi"
)

func vbdMethods() map[string]any {
	return map[string]any{
		"VBD.create":            (*API).vbdCreate,
		"VBD.destroy":           (*API).vbdDestroy,
		"VBD.set_mode":          (*API).vbdSetMode,
		"VBD.insert":            (*API).vbdInsert,
		"VBD.eject":             (*API).vbdEject,
		"VBD.assert_attachable": (*API).vbdAssertAttachable,
		"VBD.pause":             (*API).vbdPause,
		"VBD.unpause":           (*API).vbdUnpause,
	}
}

// vbdDiskTypes are the types of disks that a VM can have.
var vbdDiskTypes = []xapi.VDIType{
	xapi.VDITypeSystem, xapi.VDITypeUser, xapi.VDITypeEphemeral, xapi.VDITypeSuspend,
	xapi.VDITypeCrashdump, xapi.VDITypeMetadata, xapi.VDITypeRRD, xapi.VDITypePVSCache,
}

// vbdCreate gives a disk to a VM. It is not attached by that.
func (a *API) vbdCreate(ctx context.Context, c *Call, args *xapi.VBD) (ref xapi.Ref[xapi.VBD], err error) {
	vbd := args
	err = a.db.Update(ctx, func(tx *db.Tx) error {
		vm, err := db.Get(tx, vbd.VM)
		if err != nil {
			return err
		}
		if err := vbdMayBe(tx, vbd); err != nil {
			return err
		}
		if vbd.Userdevice, err = pickDisk(tx, vm, vbd.Userdevice); err != nil {
			return err
		}
		if vm.PowerState != xapi.VMPowerStateSuspended {
			vbd.CurrentlyAttached, vbd.Device = false, ""
		}
		if vbd.Empty {
			vbd.VDI = xapi.NullRef
		}
		if ref, err = db.Insert(tx, vbd); err != nil {
			return err
		}
		return a.refreshAllowed(tx, "VBD", string(ref))
	})
	if err != nil {
		return "", err
	}
	return ref, nil
}

// vbdMayBe checks what a new VBD says.
func vbdMayBe(tx *db.Tx, vbd *xapi.VBD) error {
	if vbd.Type == xapi.VBDTypeCD && vbd.Mode != xapi.VBDModeRO {
		return xapi.NewError(xapi.ErrVBDCDsMustBeReadonly)
	}
	if vbd.Empty {
		if vbd.Type != xapi.VBDTypeCD {
			return xapi.NewError(xapi.ErrVBDNotRemovableMedia, "in constructor")
		}
		return nil
	}
	vdi, err := db.Get(tx, vbd.VDI)
	if err != nil {
		return err
	}
	if !slices.Contains(vbdDiskTypes, vdi.Type) {
		return xapi.NewError(xapi.ErrVDIIncompatibleType, string(vbd.VDI), string(vdi.Type))
	}
	if vbd.Mode == xapi.VBDModeRW && vdi.ReadOnly {
		return xapi.NewError(xapi.ErrVDIReadonly, string(vbd.VDI))
	}
	return nil
}

// pickDisk checks that a device is free on a VM, and chooses the lowest free
// one for "autodetect".
func pickDisk(tx *db.Tx, vm *xapi.VM, device string) (string, error) {
	free := freeDisks(tx, vm)
	if device == "autodetect" {
		if len(free) == 0 {
			return "", xapi.NewError(xapi.ErrInvalidDevice, device)
		}
		return free[0], nil
	}
	n, ok := diskNumber(device)
	if !ok {
		return "", xapi.NewError(xapi.ErrInvalidDevice, device)
	}
	if !slices.Contains(free, strconv.Itoa(n)) {
		if n >= dom0Disks || !vm.IsControlDomain && n >= guestDisks {
			return "", xapi.NewError(xapi.ErrInvalidDevice, device)
		}
		return "", xapi.NewError(xapi.ErrDeviceAlreadyExists, device)
	}
	return device, nil
}

// diskNumber reads the ways to name a block device: "3", "xvdd", "hdd",
// "sdd" are one and the same.
func diskNumber(device string) (int, bool) {
	if n, err := strconv.Atoi(device); err == nil {
		return n, n >= 0 && device == strconv.Itoa(n)
	}
	for _, prefix := range []string{"xvd", "hd", "sd"} {
		letters, ok := strings.CutPrefix(device, prefix)
		if !ok || letters == "" || len(letters) > 2 {
			continue
		}
		n := 0
		for _, l := range letters {
			if l < 'a' || l > 'z' {
				return 0, false
			}
			n = n*26 + int(l-'a') + 1
		}
		return n - 1, true
	}
	return 0, false
}

// vbdDestroy takes a disk from a VM; the disk stays.
func (a *API) vbdDestroy(ctx context.Context, c *Call, ref xapi.Ref[xapi.VBD]) error {
	return a.db.Update(ctx, func(tx *db.Tx) error {
		vbd, err := db.Get(tx, ref)
		if err != nil {
			return err
		}
		if vbd.CurrentlyAttached {
			owner := ""
			if vm, err := db.Get(tx, vbd.VM); err == nil {
				owner = vm.UUID
			}
			return xapi.NewError(xapi.ErrOperationNotAllowed,
				fmt.Sprintf("VBD '%s' still attached to '%s'", vbd.UUID, owner))
		}
		if err := db.Delete(tx, ref); err != nil {
			return err
		}
		if err := a.refreshVDI(tx, vbd.VDI); err != nil {
			return err
		}
		return a.refreshVM(tx, vbd.VM)
	})
}

// vbdSetMode changes whether a VM may write to a disk that it has not
// attached.
func (a *API) vbdSetMode(ctx context.Context, c *Call, ref xapi.Ref[xapi.VBD], value xapi.VBDMode) error {
	return a.db.Update(ctx, func(tx *db.Tx) error {
		vbd, err := db.Get(tx, ref)
		if err != nil {
			return err
		}
		if vbd.CurrentlyAttached {
			return xapi.NewError(xapi.ErrDeviceAlreadyAttached, string(ref))
		}
		next := *vbd
		next.Mode = value
		if err := vbdMayBe(tx, &next); err != nil {
			return err
		}
		if err := db.Modify(tx, ref, func(b *xapi.VBD) { b.Mode = value }); err != nil {
			return err
		}
		return a.refreshAllowed(tx, "VBD", string(ref))
	})
}

// vbdInsert puts a disc into an empty drive.
func (a *API) vbdInsert(ctx context.Context, c *Call, ref xapi.Ref[xapi.VBD], vdi xapi.Ref[xapi.VDI]) error {
	return a.changeMedium(ctx, ref, func(tx *db.Tx, vbd *xapi.VBD) (xapi.Ref[xapi.VDI], error) {
		if !vbd.Empty {
			return "", xapi.NewError(xapi.ErrVBDNotEmpty, string(ref))
		}
		next := *vbd
		next.VDI, next.Empty = vdi, false
		return vdi, vbdMayBe(tx, &next)
	})
}

// vbdEject takes the disc out of a drive.
func (a *API) vbdEject(ctx context.Context, c *Call, ref xapi.Ref[xapi.VBD]) error {
	return a.changeMedium(ctx, ref, func(tx *db.Tx, vbd *xapi.VBD) (xapi.Ref[xapi.VDI], error) {
		if vbd.Empty {
			return "", xapi.NewError(xapi.ErrVBDIsEmpty, string(ref))
		}
		return xapi.NullRef, nil
	})
}

// changeMedium changes what is in a drive whose VM is not suspended to what
// medium returns.
func (a *API) changeMedium(ctx context.Context, ref xapi.Ref[xapi.VBD], medium func(*db.Tx, *xapi.VBD) (xapi.Ref[xapi.VDI], error)) error {
	return a.db.Update(ctx, func(tx *db.Tx) error {
		vbd, err := db.Get(tx, ref)
		if err != nil {
			return err
		}
		if vbd.Type != xapi.VBDTypeCD {
			return xapi.NewError(xapi.ErrVBDNotRemovableMedia, string(ref))
		}
		vm, err := db.Get(tx, vbd.VM)
		if err != nil {
			return err
		}
		if vm.PowerState == xapi.VMPowerStateSuspended {
			return badPowerState(vbd.VM, vm, xapi.VMPowerStateHalted, xapi.VMPowerStateRunning)
		}
		vdi, err := medium(tx, vbd)
		if err != nil {
			return err
		}
		err = db.Modify(tx, ref, func(b *xapi.VBD) { b.VDI, b.Empty = vdi, vdi.IsNull() })
		if err != nil {
			return err
		}
		if err := a.refreshVDI(tx, vbd.VDI); err != nil { // the one that was in it
			return err
		}
		return a.refreshAllowed(tx, "VBD", string(ref))
	})
}

// refreshVBD recomputes the allowed_operations of a VBD.
func (a *API) refreshVBD(tx *db.Tx, ref xapi.Ref[xapi.VBD]) error {
	vbd, err := db.Get(tx, ref)
	if err != nil {
		return nil
	}
	allowed := allowedVBDOps(tx, vbd)
	if slices.Equal(allowed, vbd.AllowedOperations) {
		return nil
	}
	return db.Modify(tx, ref, func(b *xapi.VBD) { b.AllowedOperations = allowed })
}

// allowedVBDOps lists what may be done to a VBD now: nothing while something
// is being done.
func allowedVBDOps(tx *db.Tx, vbd *xapi.VBD) []xapi.VBDOperations {
	allowed := []xapi.VBDOperations{}
	vm, err := db.Get(tx, vbd.VM)
	if err != nil || len(vbd.CurrentOperations) > 0 {
		return allowed
	}
	if vbd.Type == xapi.VBDTypeCD && vm.PowerState != xapi.VMPowerStateSuspended {
		if vbd.Empty {
			allowed = append(allowed, xapi.VBDOperationsInsert)
		} else {
			allowed = append(allowed, xapi.VBDOperationsEject)
		}
	}
	switch {
	case vm.PowerState != xapi.VMPowerStateRunning:
	case !vbd.CurrentlyAttached:
		allowed = append(allowed, xapi.VBDOperationsPlug)
	case vbd.Unpluggable:
		allowed = append(allowed, xapi.VBDOperationsUnplug, xapi.VBDOperationsUnplugForce)
	}
	return allowed
}
