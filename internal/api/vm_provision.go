package api

import (
	"context"
	"encoding/xml"
	"strconv"
	"strings"
	"time"

	"coppice/internal/claim"
	"coppice/internal/db"
	"coppice/internal/xapi"
)

// disksKey in the other_config of a template describes the disks that
// VM.provision makes, as XML.
const disksKey = "disks"

// provisionDisks is what that XML says:
//
//	<provision><disk device="0" size="8589934592" sr="" bootable="true" type="system"/></provision>
type provisionDisks struct {
	Disks []provisionDisk `xml:"disk"`
}

type provisionDisk struct {
	Device   string `xml:"device,attr"`
	Size     string `xml:"size,attr"` // bytes
	SR       string `xml:"sr,attr"`   // uuid or reference; "" is the pool's default
	Bootable string `xml:"bootable,attr"`
	Type     string `xml:"type,attr"`
}

// vmProvision makes a template an ordinary VM. Disks that the template only
// describes are made for it; a failure or crash leaves the template as it was.
func (a *API) vmProvision(ctx context.Context, c *Call, ref xapi.Ref[xapi.VM]) error {
	var text string
	release, err := c.Claim(ctx, func(tx *db.Tx) error {
		if err := a.vmAllows(tx, ref, xapi.VMOperationsProvision); err != nil {
			return err
		}
		vm, err := db.Get(tx, ref)
		if err == nil {
			text = vm.OtherConfig[disksKey]
		}
		return err
	}, claim.On(ref, xapi.VMOperationsProvision))
	if err != nil {
		return err
	}
	defer release()
	var wanted provisionDisks
	if text != "" {
		if err := xml.Unmarshal([]byte(text), &wanted); err != nil {
			return invalidValue("other_config:"+disksKey, text)
		}
	}
	b := a.newBatch()
	defer b.end(ctx)
	for _, d := range wanted.Disks {
		drop, err := a.planProvision(ctx, c, b, d)
		if err != nil {
			return err
		}
		defer drop()
	}
	if err := b.make(ctx); err != nil {
		return err
	}
	return b.commit(ctx, func(tx *db.Tx) error {
		err := db.Modify(tx, ref, func(vm *xapi.VM) {
			vm.IsATemplate = false
			delete(vm.OtherConfig, disksKey)
		})
		if err != nil {
			return err
		}
		for i, d := range wanted.Disks {
			vm, err := db.Get(tx, ref)
			if err != nil {
				return err
			}
			vbd := xapi.New[xapi.VBD]()
			vbd.VM, vbd.VDI, vbd.Type, vbd.Mode = ref, b.disks[i].ref, xapi.VBDTypeDisk, xapi.VBDModeRW
			vbd.Bootable, vbd.Unpluggable = d.Bootable == "true", true
			vbd.OtherConfig = map[string]string{ownerKey: ""}
			if vbd.Userdevice, err = pickDisk(tx, vm, d.Device); err != nil {
				return err
			}
			if _, err := db.Insert(tx, vbd); err != nil {
				return err
			}
		}
		return a.refreshVM(tx, ref)
	})
}

// planProvision adds one described disk to b, and keeps its SR attached until
// drop is called.
func (a *API) planProvision(ctx context.Context, c *Call, b *diskBatch, d provisionDisk) (drop func(), err error) {
	size, err := strconv.ParseInt(d.Size, 10, 64)
	if err != nil {
		return nil, invalidValue("size", d.Size)
	}
	if size, err = diskSize(size); err != nil {
		return nil, err
	}
	typ := xapi.VDITypeUser
	if d.Type == string(xapi.VDITypeSystem) {
		typ = xapi.VDITypeSystem
	}
	var sr xapi.Ref[xapi.SR]
	err = a.db.View(func(tx *db.Tx) error {
		switch {
		case d.SR == "":
			_, pool, err := a.pool(tx)
			if err == nil {
				sr = pool.DefaultSR
			}
			return err
		case strings.HasPrefix(d.SR, "OpaqueRef:"):
			sr = xapi.Ref[xapi.SR](d.SR)
			return nil
		}
		sr, _, err = db.ByUUID[xapi.SR](tx, d.SR)
		return err
	})
	if err != nil {
		return nil, err
	}
	repo, drop, err := a.holdSR(ctx, c, sr, xapi.StorageOperationsVDICreate)
	if err != nil {
		return nil, err
	}
	rec := xapi.New[xapi.VDI]()
	rec.SR, rec.Type, rec.VirtualSize = sr, typ, size
	rec.NameLabel, rec.NameDescription = d.Device, "Created by template provisioner"
	b.create(repo, rec)
	return drop, nil
}

// vmUpdateSnapshotMetadata makes an existing VM a snapshot of another, as tools
// do that carry snapshots from one server to another.
func (a *API) vmUpdateSnapshotMetadata(ctx context.Context, c *Call, ref, of xapi.Ref[xapi.VM], at time.Time, id string) error {
	return a.changeVM(ctx, ref, "", func(vm *xapi.VM) error {
		if vm.IsControlDomain {
			return xapi.NewError(xapi.ErrOperationNotAllowed, "The control domain cannot be a snapshot")
		}
		vm.IsASnapshot, vm.SnapshotOf, vm.SnapshotTime, vm.TransportableSnapshotID = true, of, at, id
		return nil
	})
}

// vmGetBootRecord returns the record that a VM runs with: without a
// hypervisor, the one that it would be started with.
func (a *API) vmGetBootRecord(ctx context.Context, c *Call, ref xapi.Ref[xapi.VM]) (vm *xapi.VM, err error) {
	err = a.db.View(func(tx *db.Tx) error {
		vm, err = db.Get(tx, ref)
		return err
	})
	return vm, err
}
