// Package ova describes VMs for archives: which objects of the database belong to a VM, and how they are written down
// for another server. It knows nothing of archives themselves, of the contents of disks, or of what an import makes of
// a description.
//
// An archive of VMs is described by a manifest, the file ova.xml of an XVA: an
// XML-RPC value with the version of the server that wrote it and the records
// of all objects that belong to the VMs. References between them are names
// that mean something only there, "Ref:0", "Ref:1" …; all others are null.
// [Collect] makes one of VMs of the database, [Parse] reads one from anywhere.
package ova

import (
	"fmt"
	"slices"
	"strings"
	"time"

	"coppice/internal/db"
	"coppice/internal/rpc"
	"coppice/internal/xapi"
)

// exportVersion is the version of the manifest that is written, and the
// newest that is read.
const exportVersion = 2

// isoContent is the content_type of SRs that hold images of CDs, whose
// contents no archive has.
const isoContent = "iso"

// Options say what goes into a manifest.
type Options struct {
	Snapshots bool     // the VM's snapshots too, and everything that makes records snapshots
	State     bool     // suspended VMs stay suspended
	Exclude   []string // types of devices that are left out: vbd, vif
}

// Collection is the objects that belong to some VMs, in the order of their
// manifest.
type Collection struct {
	Disks []Disk // in the order in which their contents follow the manifest

	options Options
	ids     map[string]string // by reference
	objects []object
	filled  map[xapi.Ref[xapi.VDI]]bool // those in Disks
	date    time.Time
}

type object struct {
	class *xapi.Class
	id    string
	rec   any
}

// Disk is a disk whose contents belong to an archive.
type Disk struct {
	ID  string // its name in the manifest
	Ref xapi.Ref[xapi.VDI]
}

// put adds an object, unless it is there already.
func put[T any](c *Collection, ref xapi.Ref[T], rec *T) (added bool) {
	if c.ids[string(ref)] != "" {
		return false
	}
	id := fmt.Sprintf("Ref:%d", len(c.objects))
	c.ids[string(ref)] = id
	c.objects = append(c.objects, object{xapi.ClassOf[T](), id, rec})
	return true
}

// putIf adds the object of a reference, if there is one.
func putIf[T any](tx *db.Tx, c *Collection, ref xapi.Ref[T]) *T {
	rec, err := db.Get(tx, ref)
	if err != nil {
		return nil
	}
	put(c, ref, rec)
	return rec
}

// Collect finds the objects of VMs; HANDLE_INVALID when one of those is none.
// The records of others than snapshots are those of plain VMs, which is also
// what a snapshot becomes that is exported for itself.
func Collect(tx *db.Tx, vms []xapi.Ref[xapi.VM], o Options) (*Collection, error) {
	c := &Collection{options: o, ids: map[string]string{}, filled: map[xapi.Ref[xapi.VDI]]bool{}}
	for _, ref := range vms {
		vm, err := db.Get(tx, ref)
		if err != nil {
			return nil, err
		}
		c.vm(tx, ref, vm)
		if !o.Snapshots {
			continue
		}
		for _, s := range vm.Snapshots {
			if snapshot, err := db.Get(tx, s); err == nil {
				c.vm(tx, s, snapshot)
			}
		}
	}
	// The disks follow in this order.
	slices.SortFunc(c.Disks, func(a, b Disk) int { return strings.Compare(a.ID, b.ID) })
	return c, nil
}

// vm adds a VM and what belongs to it.
func (c *Collection) vm(tx *db.Tx, ref xapi.Ref[xapi.VM], src *xapi.VM) {
	vm := xapi.ClassOf[xapi.VM]().Clone(src).(*xapi.VM)
	if !c.options.Snapshots {
		vm.IsASnapshot, vm.SnapshotOf, vm.SnapshotTime = false, xapi.NullRef, time.Unix(0, 0).UTC()
		vm.SnapshotInfo, vm.SnapshotMetadata, vm.Parent = map[string]string{}, "", xapi.NullRef
	}
	if !c.options.State && !vm.IsASnapshot {
		vm.PowerState, vm.SuspendVDI, vm.SuspendSR = xapi.VMPowerStateHalted, xapi.NullRef, xapi.NullRef
	}
	if !put(c, ref, vm) {
		return
	}
	// The date is that of the VM: equal VMs give equal bytes.
	if src.SnapshotTime.After(c.date) {
		c.date = src.SnapshotTime
	}
	if m := putIf(tx, c, vm.Metrics); m != nil && m.InstallTime.After(c.date) {
		c.date = m.InstallTime
	}
	putIf(tx, c, vm.GuestMetrics)
	putIf(tx, c, vm.Affinity)
	if !slices.Contains(c.options.Exclude, "vbd") {
		for _, b := range vm.VBDs {
			c.vbd(tx, b, vm.PowerState)
		}
	}
	if !slices.Contains(c.options.Exclude, "vif") {
		for _, v := range vm.VIFs {
			c.vif(tx, v, vm.PowerState)
		}
	}
	if vm.PowerState == xapi.VMPowerStateSuspended {
		c.disk(tx, vm.SuspendVDI, true)
	}
}

func (c *Collection) vbd(tx *db.Tx, ref xapi.Ref[xapi.VBD], state xapi.VMPowerState) {
	src, err := db.Get(tx, ref)
	if err != nil {
		return
	}
	vbd := xapi.ClassOf[xapi.VBD]().Clone(src).(*xapi.VBD)
	vbd.CurrentlyAttached = vbd.CurrentlyAttached && state != xapi.VMPowerStateHalted
	put(c, ref, vbd)
	if !vbd.Empty {
		c.disk(tx, vbd.VDI, vbd.Type == xapi.VBDTypeDisk)
	}
}

func (c *Collection) vif(tx *db.Tx, ref xapi.Ref[xapi.VIF], state xapi.VMPowerState) {
	src, err := db.Get(tx, ref)
	if err != nil {
		return
	}
	vif := xapi.ClassOf[xapi.VIF]().Clone(src).(*xapi.VIF)
	vif.CurrentlyAttached = vif.CurrentlyAttached && state != xapi.VMPowerStateHalted
	put(c, ref, vif)
	putIf(tx, c, vif.Network)
}

// disk adds a VDI with its SR; its contents are part of the archive unless it
// is a CD.
func (c *Collection) disk(tx *db.Tx, ref xapi.Ref[xapi.VDI], contents bool) {
	src, err := db.Get(tx, ref)
	if err != nil {
		return
	}
	vdi := xapi.ClassOf[xapi.VDI]().Clone(src).(*xapi.VDI)
	if !c.options.Snapshots {
		vdi.IsASnapshot, vdi.SnapshotOf, vdi.SnapshotTime = false, xapi.NullRef, time.Unix(0, 0).UTC()
	}
	put(c, ref, vdi)
	sr := putIf(tx, c, vdi.SR)
	if contents && !c.filled[ref] && (sr == nil || sr.ContentType != isoContent) {
		c.filled[ref] = true
		c.Disks = append(c.Disks, Disk{c.ids[string(ref)], ref})
	}
}

// Manifest writes the manifest as one of a host.
func (c *Collection) Manifest(host *xapi.Host) ([]byte, error) {
	text, err := rpc.XMLValue(func(e rpc.Encoder) error {
		e.BeginStruct()
		e.Key("version")
		e.BeginStruct()
		for _, v := range [][2]string{
			{"hostname", host.Hostname},
			{"date", xapi.FormatTime(c.date)},
			{"product_version", host.SoftwareVersion["product_version"]},
			{"product_brand", host.SoftwareVersion["product_brand"]},
			{"build_number", host.SoftwareVersion["build_number"]},
		} {
			e.Key(v[0])
			e.String(v[1])
		}
		e.Key("xapi_major")
		e.Int(host.APIVersionMajor)
		e.Key("xapi_minor")
		e.Int(host.APIVersionMinor)
		e.Key("export_vsn")
		e.Int(exportVersion)
		e.EndStruct()
		e.Key("objects")
		e.BeginArray()
		for _, o := range c.objects {
			e.BeginStruct()
			e.Key("class")
			e.String(o.class.Name)
			e.Key("id")
			e.String(o.id)
			e.Key("snapshot")
			if err := c.record(e, o); err != nil {
				return err
			}
			e.EndStruct()
		}
		e.EndArray()
		e.EndStruct()
		return nil
	})
	return []byte(text), err
}

// fillOfSR are the fields of an SR that change with what others do on it. They
// say nothing about a VM, and would give each of its archives another tag.
var fillOfSR = []string{"physical_size", "physical_utilisation", "virtual_allocation"}

// record writes a record with the references that mean something in the
// archive, and without what goes on at the moment.
func (c *Collection) record(e rpc.Encoder, o object) error {
	e.BeginStruct()
	for _, f := range o.class.Fields {
		if f.Internal || f.Type.Kind == xapi.KindOption {
			continue
		}
		e.Key(f.Name)
		switch {
		case f.Name == "allowed_operations":
			e.BeginArray()
			e.EndArray()
		case f.Name == "current_operations", f.Type.Kind == xapi.KindMap && (f.Type.Key.Kind == xapi.KindRef || f.Type.Elem.Kind == xapi.KindRef):
			e.BeginStruct()
			e.EndStruct()
		case o.class.Name == "SR" && slices.Contains(fillOfSR, f.Name):
			e.Int(0)
		case f.Type.Kind == xapi.KindRef:
			id := xapi.NullRef
			for _, ref := range f.AppendRefs(nil, o.rec) {
				if known := c.ids[ref]; known != "" {
					id = known
				}
			}
			e.String(id)
		case f.Type.Kind == xapi.KindSet && f.Type.Elem.Kind == xapi.KindRef:
			e.BeginArray()
			for _, ref := range f.AppendRefs(nil, o.rec) {
				if id := c.ids[ref]; id != "" {
					e.String(id)
				}
			}
			e.EndArray()
		default:
			if err := f.Type.Encode(e, f.Get(o.rec)); err != nil {
				return fmt.Errorf("%s: %w", f, err)
			}
		}
	}
	e.EndStruct()
	return nil
}
