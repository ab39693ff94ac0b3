package api

import (
	"context"
	"errors"
	"fmt"
	"io"

	"coppice/internal/db"
	"coppice/internal/ova"
	"coppice/internal/storage"
	"coppice/internal/xapi"
)

// VMImportRequest is what an HTTP handler knows about an import of VMs.
type VMImportRequest struct {
	Session   string
	Task      string // the client's task, which the transfer completes; "" makes one
	SubtaskOf string
	Action    string // name of the HTTP action in the datamodel, whose role is checked

	SR       string            // reference or UUID: where disks go; "" for the pool's default
	Restore  bool              // VMs keep their UUIDs and MACs, disks their SRs; older VMs are replaced
	Force    bool              // in spite of checksums, of disks that are missing, or of a VM that is no older
	Metadata bool              // disks are already here
	DryRun   bool              // metadata: see whether it would work
	VDIs     map[string]string // metadata: UUIDs of the disks that stand for others
}

// VMImport is an archive of VMs that is being received. VMs and disks appear
// in one commit when everything is there; a failure, or a crash, leaves
// nothing of them.
type VMImport struct {
	Task xapi.Ref[xapi.Task]

	call     *Call
	req      VMImportRequest
	manifest *ova.Manifest // nil until Begin
	batch    *diskBatch
	disks    []*arrivingDisk
	vdis     map[xapi.Ref[xapi.VDI]]xapi.Ref[xapi.VDI] // by name in the manifest
	vms      map[xapi.Ref[xapi.VM]]xapi.Ref[xapi.VM]   // by name in the manifest
	held     map[xapi.Ref[xapi.SR]]heldSR
}

// heldSR is an SR that disks go to.
type heldSR struct {
	repo *repository
	drop func()
}

// arrivingDisk is a disk that is being filled.
type arrivingDisk struct {
	*batchDisk
	id      xapi.Ref[xapi.VDI] // in the manifest
	volume  storage.Volume     // nil until it is open
	arrived bool               // has all of its contents
}

// maxArrivingDisks is how many disks an archive can have: each is open during
// the import.
const maxArrivingDisks = 1024

// ImportVM begins an import of VMs. When it fails after the session was found
// valid, the client's task has been failed with the error. The caller passes
// the manifest to Begin, fills the disks that it returns and calls Finish
// exactly once.
func (a *API) ImportVM(ctx context.Context, o Origin, r VMImportRequest) (*VMImport, error) {
	c, err := a.beginTransfer(ctx, o, transferStart{
		Session: r.Session, Task: r.Task, SubtaskOf: r.SubtaskOf, Action: r.Action, Label: "Import of VM",
	})
	if err != nil {
		return nil, err
	}
	x := &VMImport{
		Task: c.Task(), call: c, req: r,
		vdis: map[xapi.Ref[xapi.VDI]]xapi.Ref[xapi.VDI]{}, vms: map[xapi.Ref[xapi.VM]]xapi.Ref[xapi.VM]{},
		held: map[xapi.Ref[xapi.SR]]heldSR{},
	}
	if _, err := a.targetSR(r); err != nil {
		return nil, c.finish(Result{}, err)
	}
	return x, nil
}

// CheckVMImport is CheckImport for archives.
func (a *API) CheckVMImport(o Origin, r VMImportRequest) error {
	s, err := a.session(xapi.Ref[xapi.Session](r.Session))
	if err == nil {
		err = a.authorizeHTTP(s, r.Action)
	}
	if err == nil {
		_, err = a.targetSR(r)
	}
	if err != nil {
		return a.apiError(err)
	}
	return nil
}

// targetSR is where disks go that have no other place.
func (a *API) targetSR(r VMImportRequest) (sr xapi.Ref[xapi.SR], err error) {
	if r.Metadata {
		return xapi.NullRef, nil
	}
	err = a.db.View(func(tx *db.Tx) error {
		if r.SR == "" {
			_, pool, err := a.pool(tx)
			if err != nil {
				return err
			}
			if _, err := db.Get(tx, pool.DefaultSR); err != nil {
				return xapi.NewError(xapi.ErrDefaultSRNotFound, string(pool.DefaultSR))
			}
			sr = pool.DefaultSR
			return nil
		}
		if sr, err = find[xapi.SR](tx, r.SR); err != nil {
			return err
		}
		rec, err := db.Get(tx, sr)
		if err == nil && rec.ContentType == isoContent {
			err = xapi.NewError(xapi.ErrOperationNotAllowed, "Disks cannot be imported into an SR of ISO images.")
		}
		return err
	})
	return sr, err
}

// Begin reads the manifest, checks everything that can be checked without the
// disks, and makes their volumes. It returns the disks that the archive must
// have, each with a volume to write to. An error of the manifest's reader comes
// back as it is.
func (x *VMImport) Begin(manifest io.Reader) ([]ArchiveDisk, error) {
	a, ctx := x.call.api, x.call.Context()
	m, err := ova.Parse(manifest)
	if err != nil {
		return nil, err
	}
	if err := checkManifest(m); err != nil {
		return nil, err
	}
	x.batch = a.newBatch()
	x.manifest = m
	for _, id := range m.VMs {
		x.vms[id] = xapi.NewRef[xapi.VM]()
	}
	if x.req.Metadata {
		return nil, x.match()
	}
	for _, id := range m.Disks() {
		if err := x.plan(ctx, id); err != nil {
			return nil, err
		}
	}
	if len(x.disks) > maxArrivingDisks {
		return nil, importError("%d disks, %d are possible", len(x.disks), maxArrivingDisks)
	}
	// What would fail in the end fails now, before the disks have come.
	if err := x.rehearse(ctx); err != nil {
		return nil, err
	}
	if err := x.batch.make(ctx); err != nil {
		return nil, err
	}
	var out []ArchiveDisk
	for _, d := range x.disks {
		if d.volume, err = d.repo.Open(ctx, d.batchDisk.id(), storage.Live); err != nil {
			return nil, fmt.Errorf("open VDI %s: %w", d.rec.UUID, err)
		}
		out = append(out, ArchiveDisk{Name: string(d.id), Ref: d.ref, VDI: ova.Get(m, d.id), Volume: d.volume})
	}
	return out, nil
}

// importError is IMPORT_ERROR with a text.
func importError(format string, args ...any) error {
	return xapi.NewError(xapi.ErrImportError, fmt.Sprintf(format, args...))
}

// checkManifest refuses manifests that cannot be imported anywhere.
func checkManifest(m *ova.Manifest) error {
	if len(m.VMs) == 0 {
		return importError("there is no VM in it")
	}
	for _, id := range m.VMs {
		vm := ova.Get(m, id)
		if err := cmpErr(validMemory(vm), validVCPUs(vm.VCPUsMax, vm.VCPUsAtStartup), validShadowMultiplier(vm.HVMShadowMultiplier)); err != nil {
			return err
		}
		if vm.IsASnapshot && ova.Get(m, vm.SnapshotOf) == nil {
			return xapi.NewError(xapi.ErrImportErrorFailedToFindObject, string(vm.SnapshotOf))
		}
		for _, vbd := range m.VBDs(id) {
			if vbd.Type == xapi.VBDTypeDisk && ova.Get(m, vbd.VDI) == nil {
				return xapi.NewError(xapi.ErrImportErrorFailedToFindObject, string(vbd.VDI))
			}
		}
		for _, vif := range m.VIFs(id) {
			if ova.Get(m, vif.Network) == nil {
				return xapi.NewError(xapi.ErrImportErrorFailedToFindObject, string(vif.Network))
			}
		}
	}
	return nil
}

// plan plans the disk of a record of the manifest.
func (x *VMImport) plan(ctx context.Context, id xapi.Ref[xapi.VDI]) error {
	src := ova.Get(x.manifest, id)
	rec := derivedDisk(src)
	size, err := diskSize(src.VirtualSize)
	if err != nil || src.VirtualSize == 0 {
		return importError("the disk %s has %d bytes, 1 to %d are possible", id, src.VirtualSize, int64(maxDiskSize))
	}
	rec.VirtualSize, rec.OnBoot = size, xapi.OnBootPersist
	delete(rec.OtherConfig, receivedKey)
	delete(rec.SMConfig, zeroedKey)
	rec.IsASnapshot, rec.SnapshotTime = src.IsASnapshot, src.SnapshotTime
	if rec.SR, err = x.place(src); err != nil {
		return err
	}
	sr, ok := x.held[rec.SR]
	if !ok {
		if sr.repo, sr.drop, err = x.call.api.holdSR(ctx, x.call, rec.SR, xapi.StorageOperationsVDICreate); err != nil {
			return err
		}
		x.held[rec.SR] = sr
	}
	d := &arrivingDisk{batchDisk: x.batch.create(sr.repo, rec), id: id}
	x.disks = append(x.disks, d)
	x.vdis[id] = d.ref
	return nil
}

// place chooses the SR of a disk.
func (x *VMImport) place(src *xapi.VDI) (sr xapi.Ref[xapi.SR], err error) {
	if old := ova.Get(x.manifest, src.SR); x.req.Restore && x.req.SR == "" && old != nil {
		err := x.call.api.db.View(func(tx *db.Tx) (err error) {
			sr, _, err = db.ByUUID[xapi.SR](tx, old.UUID)
			return err
		})
		if err == nil {
			return sr, nil
		}
	}
	return x.call.api.targetSR(x.req)
}

// match finds the disks that an import of records alone refers to.
func (x *VMImport) match() error {
	return x.call.api.db.View(func(tx *db.Tx) error {
		for _, id := range x.manifest.Disks() {
			name := ova.Get(x.manifest, id).UUID
			if other, ok := x.req.VDIs[name]; ok {
				ref, err := find[xapi.VDI](tx, other)
				if err != nil {
					return err
				}
				x.vdis[id] = ref
				continue
			}
			ref, _, err := db.ByUUID[xapi.VDI](tx, name)
			switch {
			case err == nil:
				x.vdis[id] = ref
			case !x.req.Force:
				return xapi.NewError(xapi.ErrImportErrorAttachedDisksNotFound)
			}
		}
		return nil
	})
}

// errRehearsed ends a rehearsal that went well.
var errRehearsed = errors.New("rehearsed")

// rehearse sees whether the records can be added, and adds none.
func (x *VMImport) rehearse(ctx context.Context) error {
	err := x.call.api.db.Update(ctx, func(tx *db.Tx) error {
		for _, d := range x.disks {
			if err := db.InsertAs(tx, d.ref, xapi.ClassOf[xapi.VDI]().Clone(d.rec).(*xapi.VDI)); err != nil {
				return err
			}
		}
		refs, err := x.replaced(tx)
		if err != nil {
			return err
		}
		if err := x.removable(tx, refs); err != nil && !busy(err) {
			return err
		}
		if err := x.insert(tx); err != nil {
			return err
		}
		return errRehearsed
	})
	if errors.Is(err, errRehearsed) {
		return nil
	}
	return err
}

// Context is like Import.Context.
func (x *VMImport) Context() context.Context { return x.call.Context() }

// Progress is like Import.Progress.
func (x *VMImport) Progress(done, total int64) { x.call.Progress(done, total) }

// Finish makes the disks durable and adds their records and those of the VMs
// when err is nil; else it takes back what there is. The task ends with the
// references of the VMs that are no snapshots. Finish returns what the task
// ended with: nil for success, else an *xapi.Error.
func (x *VMImport) Finish(err error) error {
	a, ctx := x.call.api, context.WithoutCancel(x.call.Context())
	for _, d := range x.disks {
		if d.volume == nil {
			continue
		}
		err = cmpErr(err, x.settle(ctx, d, err == nil))
	}
	refs := []xapi.Ref[xapi.VM]{}
	if err == nil {
		refs, err = x.record(ctx)
	}
	if x.batch != nil {
		x.batch.end(ctx)
	}
	for _, sr := range x.held {
		sr.drop()
	}
	if err != nil {
		return x.call.finish(Result{}, err)
	}
	for _, d := range x.disks {
		if d.rec.IsASnapshot {
			a.syncAttrs(ctx, d.ref) // of what is known only now
		}
	}
	set, err := xapi.Datamodel().Type("VM ref set")
	return x.call.finish(Result{Type: set, Value: refs}, err)
}

// settle closes a disk, and completes it when it is to be kept.
func (x *VMImport) settle(ctx context.Context, d *arrivingDisk, keep bool) (err error) {
	if keep {
		err = d.volume.Flush(ctx)
	}
	if closed := d.volume.Close(); closed != nil {
		x.call.api.log.Warn("closing a disk failed", "vdi", d.rec.UUID, "err", closed)
	}
	if !keep || err != nil {
		return err
	}
	info, err := d.repo.Stat(ctx, d.batchDisk.id())
	if err != nil {
		return fmt.Errorf("stat VDI %s: %w", d.rec.UUID, err)
	}
	d.made(info)
	return nil
}

// record adds everything, and returns the VMs that are no snapshots.
func (x *VMImport) record(ctx context.Context) ([]xapi.Ref[xapi.VM], error) {
	refs := []xapi.Ref[xapi.VM]{}
	if x.manifest == nil {
		return refs, importError("no manifest has been read")
	}
	if x.req.DryRun {
		return refs, x.rehearse(ctx)
	}
	if err := x.commit(x.call.Context()); err != nil {
		return nil, err
	}
	for _, id := range x.manifest.VMs {
		if !ova.Get(x.manifest, id).IsASnapshot {
			refs = append(refs, x.vms[id])
		}
	}
	return refs, nil
}
