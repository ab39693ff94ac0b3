package api

import (
	"context"

	"coppice/internal/claim"
	"coppice/internal/db"
	"coppice/internal/ova"
	"coppice/internal/storage"
	"coppice/internal/xapi"
)

// VMExportRequest is what an HTTP handler knows about an export of VMs.
type VMExportRequest struct {
	Session   string
	Task      string // the client's task, which the transfer completes; "" makes one
	SubtaskOf string
	Action    string // name of the HTTP action in the datamodel, whose role is checked

	VM        string // reference or UUID
	All       bool   // all VMs that are no snapshots, instead; metadata only
	Dom0      bool   // with All: control domains too
	Metadata  bool   // the manifest alone, of VMs as they are
	Snapshots bool   // with their snapshots
	State     bool   // suspended VMs with their memory
	Exclude   []string
}

// VMExport is an archive of VMs that is being sent to a client. Its disks are
// those of the moment at which the export began.
type VMExport struct {
	Task     xapi.Ref[xapi.Task]
	Manifest []byte
	Disks    []ArchiveDisk // in the order in which they are sent

	call  *Call
	open  []*openDisk
	notes [][2]string
}

// ArchiveDisk is a disk of an archive.
type ArchiveDisk struct {
	Name   string // of its directory
	Ref    xapi.Ref[xapi.VDI]
	VDI    *xapi.VDI
	Volume storage.Volume
}

// ExportVM begins an export of VMs. A VM whose disks go with it is halted or
// suspended and stays so until the export ends; snapshots can always be
// exported. When it fails after the session was found valid, the client's task
// has been failed with the error. The caller calls Finish exactly once.
func (a *API) ExportVM(ctx context.Context, o Origin, r VMExportRequest) (*VMExport, error) {
	c, err := a.beginTransfer(ctx, o, transferStart{
		Session: r.Session, Task: r.Task, SubtaskOf: r.SubtaskOf, Action: r.Action, Label: "Export of VM", About: r.VM,
	})
	if err != nil {
		return nil, err
	}
	x := &VMExport{Task: c.Task(), call: c}
	if err := a.openVMExport(x, r); err != nil {
		return nil, x.Finish(err)
	}
	return x, nil
}

func (a *API) openVMExport(x *VMExport, r VMExportRequest) error {
	c, ctx := x.call, x.call.Context()
	var refs []xapi.Ref[xapi.VM]
	err := a.db.View(func(tx *db.Tx) error {
		if !r.All {
			ref, err := find[xapi.VM](tx, r.VM)
			refs = append(refs, ref)
			return err
		}
		for ref, vm := range db.All[xapi.VM](tx) {
			if !vm.IsASnapshot && !vm.IsDefaultTemplate && (r.Dom0 || !vm.IsControlDomain) {
				refs = append(refs, ref)
			}
		}
		return nil
	})
	if err != nil {
		return err
	}
	if !r.Metadata {
		// Given back when the call ends.
		_, err := c.Claim(ctx, func(tx *db.Tx) error {
			return a.vmAllows(tx, refs[0], xapi.VMOperationsExport)
		}, claim.On(refs[0], xapi.VMOperationsExport))
		if err != nil {
			return err
		}
	}
	var vms *ova.Collection
	err = a.db.View(func(tx *db.Tx) (err error) {
		if vms, err = ova.Collect(tx, refs, ova.Options{Snapshots: r.Snapshots, State: r.State || r.Metadata, Exclude: r.Exclude}); err != nil {
			return err
		}
		_, host, err := a.host(tx)
		if err != nil {
			return err
		}
		x.Manifest, err = vms.Manifest(host)
		return err
	})
	if err != nil || r.Metadata {
		return err
	}
	for _, disk := range vms.Disks {
		d, err := a.openReader(ctx, c, disk.Ref, nil)
		if err != nil {
			return err
		}
		x.open = append(x.open, d)
		if err := d.verifyKnown(ctx); err != nil {
			return err
		}
		x.Disks = append(x.Disks, ArchiveDisk{disk.ID, disk.Ref, d.rec, d.Volume})
	}
	return nil
}

// Context is like Export.Context.
func (x *VMExport) Context() context.Context { return x.call.Context() }

// Progress is like Export.Progress.
func (x *VMExport) Progress(done, total int64) { x.call.Progress(done, total) }

// Describe is like Import.Describe.
func (x *VMExport) Describe(key, value string) { x.notes = append(x.notes, [2]string{key, value}) }

// Finish is like Export.Finish.
func (x *VMExport) Finish(err error) error {
	for _, d := range x.open {
		d.close()
	}
	x.call.api.describe(x.Task, x.notes)
	return x.call.finish(Result{}, err)
}
