package api

import (
	"fmt"
	"slices"
	"strings"
	"time"

	"coppice/internal/db"
	"coppice/internal/rpc"
	"coppice/internal/xapi"
)

// An archive of VMs is described by a manifest, the file ova.xml of an XVA: an
// XML-RPC value with the version of the server that wrote it and the records
// of all objects that belong to the VMs. References between them are names
// that mean something only there, "Ref:0", "Ref:1" …; all others are null.

// exportVersion is the version of the manifest that is written, and the
// newest that is read.
const exportVersion = 2

// archiveOptions say what goes into a manifest.
type archiveOptions struct {
	snapshots bool     // the VM's snapshots too, and everything that makes records snapshots
	state     bool     // suspended VMs stay suspended
	exclude   []string // types of devices that are left out: vbd, vif
}

// archive collects the objects of a manifest in their order.
type archive struct {
	archiveOptions
	ids     map[string]string // by reference
	objects []archivedObject
	disks   []archivedDisk
	filled  map[xapi.Ref[xapi.VDI]]bool // those in disks
	date    time.Time
}

type archivedObject struct {
	class *xapi.Class
	id    string
	rec   any
}

// archivedDisk is a disk whose contents belong to an archive.
type archivedDisk struct {
	id  string
	ref xapi.Ref[xapi.VDI]
}

// put adds an object, unless it is there already.
func put[T any](ar *archive, ref xapi.Ref[T], rec *T) (added bool) {
	if ar.ids[string(ref)] != "" {
		return false
	}
	id := fmt.Sprintf("Ref:%d", len(ar.objects))
	ar.ids[string(ref)] = id
	ar.objects = append(ar.objects, archivedObject{xapi.ClassOf[T](), id, rec})
	return true
}

// putIf adds the object of a reference, if there is one.
func putIf[T any](tx *db.Tx, ar *archive, ref xapi.Ref[T]) *T {
	rec, err := db.Get(tx, ref)
	if err != nil {
		return nil
	}
	put(ar, ref, rec)
	return rec
}

// collect makes an archive of VMs. The records of others than snapshots are
// those of plain VMs, which is also what a snapshot becomes that is exported
// for itself.
func collect(tx *db.Tx, refs []xapi.Ref[xapi.VM], o archiveOptions) (*archive, error) {
	ar := &archive{archiveOptions: o, ids: map[string]string{}, filled: map[xapi.Ref[xapi.VDI]]bool{}}
	for _, ref := range refs {
		vm, err := db.Get(tx, ref)
		if err != nil {
			return nil, err
		}
		ar.vm(tx, ref, vm)
		if !o.snapshots {
			continue
		}
		for _, s := range vm.Snapshots {
			if snapshot, err := db.Get(tx, s); err == nil {
				ar.vm(tx, s, snapshot)
			}
		}
	}
	// The disks follow in this order.
	slices.SortFunc(ar.disks, func(a, b archivedDisk) int { return strings.Compare(a.id, b.id) })
	return ar, nil
}

// vm adds a VM and what belongs to it.
func (ar *archive) vm(tx *db.Tx, ref xapi.Ref[xapi.VM], src *xapi.VM) {
	vm := xapi.ClassOf[xapi.VM]().Clone(src).(*xapi.VM)
	if !ar.snapshots {
		vm.IsASnapshot, vm.SnapshotOf, vm.SnapshotTime = false, xapi.NullRef, time.Unix(0, 0).UTC()
		vm.SnapshotInfo, vm.SnapshotMetadata, vm.Parent = map[string]string{}, "", xapi.NullRef
	}
	if !ar.state && !vm.IsASnapshot {
		vm.PowerState, vm.SuspendVDI, vm.SuspendSR = xapi.VMPowerStateHalted, xapi.NullRef, xapi.NullRef
	}
	if !put(ar, ref, vm) {
		return
	}
	// The date is that of the VM: equal VMs give equal bytes.
	if src.SnapshotTime.After(ar.date) {
		ar.date = src.SnapshotTime
	}
	if m := putIf(tx, ar, vm.Metrics); m != nil && m.InstallTime.After(ar.date) {
		ar.date = m.InstallTime
	}
	putIf(tx, ar, vm.GuestMetrics)
	putIf(tx, ar, vm.Affinity)
	if !slices.Contains(ar.exclude, "vbd") {
		for _, b := range vm.VBDs {
			ar.vbd(tx, b, vm.PowerState)
		}
	}
	if !slices.Contains(ar.exclude, "vif") {
		for _, v := range vm.VIFs {
			ar.vif(tx, v, vm.PowerState)
		}
	}
	if vm.PowerState == xapi.VMPowerStateSuspended {
		ar.disk(tx, vm.SuspendVDI, true)
	}
}

func (ar *archive) vbd(tx *db.Tx, ref xapi.Ref[xapi.VBD], state xapi.VMPowerState) {
	src, err := db.Get(tx, ref)
	if err != nil {
		return
	}
	vbd := xapi.ClassOf[xapi.VBD]().Clone(src).(*xapi.VBD)
	vbd.CurrentlyAttached = vbd.CurrentlyAttached && state != xapi.VMPowerStateHalted
	put(ar, ref, vbd)
	if !vbd.Empty {
		ar.disk(tx, vbd.VDI, vbd.Type == xapi.VBDTypeDisk)
	}
}

func (ar *archive) vif(tx *db.Tx, ref xapi.Ref[xapi.VIF], state xapi.VMPowerState) {
	src, err := db.Get(tx, ref)
	if err != nil {
		return
	}
	vif := xapi.ClassOf[xapi.VIF]().Clone(src).(*xapi.VIF)
	vif.CurrentlyAttached = vif.CurrentlyAttached && state != xapi.VMPowerStateHalted
	put(ar, ref, vif)
	putIf(tx, ar, vif.Network)
}

// disk adds a VDI with its SR; its contents are part of the archive unless it
// is a CD.
func (ar *archive) disk(tx *db.Tx, ref xapi.Ref[xapi.VDI], contents bool) {
	src, err := db.Get(tx, ref)
	if err != nil {
		return
	}
	vdi := xapi.ClassOf[xapi.VDI]().Clone(src).(*xapi.VDI)
	if !ar.snapshots {
		vdi.IsASnapshot, vdi.SnapshotOf, vdi.SnapshotTime = false, xapi.NullRef, time.Unix(0, 0).UTC()
	}
	put(ar, ref, vdi)
	sr := putIf(tx, ar, vdi.SR)
	if contents && !ar.filled[ref] && (sr == nil || sr.ContentType != isoContent) {
		ar.filled[ref] = true
		ar.disks = append(ar.disks, archivedDisk{ar.ids[string(ref)], ref})
	}
}

// manifest writes the archive as its host wrote it.
func (ar *archive) manifest(host *xapi.Host) ([]byte, error) {
	text, err := rpc.XMLValue(func(e rpc.Encoder) error {
		e.BeginStruct()
		e.Key("version")
		e.BeginStruct()
		for _, v := range [][2]string{
			{"hostname", host.Hostname},
			{"date", xapi.FormatTime(ar.date)},
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
		for _, o := range ar.objects {
			e.BeginStruct()
			e.Key("class")
			e.String(o.class.Name)
			e.Key("id")
			e.String(o.id)
			e.Key("snapshot")
			if err := ar.record(e, o); err != nil {
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
func (ar *archive) record(e rpc.Encoder, o archivedObject) error {
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
				if known := ar.ids[ref]; known != "" {
					id = known
				}
			}
			e.String(id)
		case f.Type.Kind == xapi.KindSet && f.Type.Elem.Kind == xapi.KindRef:
			e.BeginArray()
			for _, ref := range f.AppendRefs(nil, o.rec) {
				if id := ar.ids[ref]; id != "" {
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
