package api

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/google/uuid"

	"coppice/internal/claim"
	"coppice/internal/db"
	"coppice/internal/storage"
	"coppice/internal/xapi"
)

func vdiMethods() map[string]any {
	return map[string]any{
		"VDI.create":               (*API).vdiCreate,
		"VDI.destroy":              (*API).vdiDestroy,
		"VDI.snapshot":             (*API).vdiSnapshot,
		"VDI.clone":                (*API).vdiClone,
		"VDI.revert":               (*API).vdiRevert,
		"VDI.copy":                 (*API).vdiCopy,
		"VDI.pool_migrate":         (*API).vdiPoolMigrate,
		"VDI.checksum":             (*API).vdiChecksum,
		"VDI.resize":               (*API).vdiResize,
		"VDI.resize_online":        (*API).vdiResizeOnline,
		"VDI.update":               (*API).vdiUpdate,
		"VDI.forget":               (*API).vdiForget,
		"VDI.introduce":            (*API).vdiIntroduce,
		"VDI.generate_config":      (*API).vdiGenerateConfig,
		"VDI.enable_cbt":           (*API).vdiEnableCBT,
		"VDI.disable_cbt":          (*API).vdiDisableCBT,
		"VDI.data_destroy":         (*API).vdiDataDestroy,
		"VDI.list_changed_blocks":  (*API).vdiListChangedBlocks,
		"VDI.set_name_label":       (*API).vdiSetNameLabel,
		"VDI.set_name_description": (*API).vdiSetNameDescription,
		"VDI.set_on_boot":          (*API).vdiSetOnBoot,
		"VDI.set_allow_caching":    (*API).vdiSetAllowCaching,
	}
}

const (
	// diskGrain is what sizes of disks are rounded up to, so that a size read
	// from a VHD, whose geometry rounds down, makes a disk it fits into.
	diskGrain = 2 << 20
	// maxDiskSize is the largest disk, in bytes.
	maxDiskSize = 2 << 50
)

// diskSize rounds a requested size up to what a disk can have.
func diskSize(n int64) (int64, error) {
	if n < 0 || n > maxDiskSize {
		return 0, backendFailure(79, fmt.Sprintf(
			"VDI Invalid size [opterr=%d bytes asked, 0 to %d possible]", n, int64(maxDiskSize)))
	}
	return max((n+diskGrain-1)/diskGrain*diskGrain, diskGrain), nil
}

// diskWork is an operation on one disk in progress.
type diskWork struct {
	ref     xapi.Ref[xapi.VDI]
	rec     *xapi.VDI // as it was when the claim was taken
	repo    *repository
	release func()
}

func (w *diskWork) id() storage.ID { return storage.ID(w.rec.UUID) }

// beginDisk claims an operation on a disk, waiting for its turn, and the
// operation srOp on its SR unless that is empty. The caller releases it.
func (a *API) beginDisk(ctx context.Context, c *Call, ref xapi.Ref[xapi.VDI], op xapi.VDIOperations, srOp xapi.StorageOperations) (*diskWork, error) {
	w := &diskWork{ref: ref}
	err := a.db.View(func(tx *db.Tx) (err error) {
		w.rec, err = db.Get(tx, ref)
		return err
	})
	if err != nil {
		return nil, err
	}
	if !slices.Contains(vdiOpsWhileAttached, op) {
		a.awaitWriters(ctx, ref)
	}
	claims := []claim.Claim{claim.On(ref, op)}
	if srOp != "" {
		claims = append(claims, claim.On(w.rec.SR, srOp))
	}
	w.release, err = c.Claim(ctx, func(tx *db.Tx) (err error) {
		if err := a.vdiAllows(tx, ref, op); err != nil {
			return err
		}
		if srOp != "" {
			if err := a.srAllows(tx, w.rec.SR, srOp); err != nil {
				return err
			}
		}
		w.rec, err = db.Get(tx, ref)
		return err
	}, claims...)
	if err != nil {
		return nil, err
	}
	if w.repo, err = a.repos.get(w.rec.SR); err != nil {
		w.release()
		return nil, err
	}
	return w, nil
}

// vdiCreate makes an empty disk. A crash or cancel leaves nothing, or a
// volume without a record, which start-up reclaims.
func (a *API) vdiCreate(ctx context.Context, c *Call, args *xapi.VDI) (xapi.Ref[xapi.VDI], error) {
	if args.Type == xapi.VDITypeCBTMetadata {
		return "", xapi.NewError(xapi.ErrVDIIncompatibleType, "", string(args.Type))
	}
	size, err := diskSize(args.VirtualSize)
	if err != nil {
		return "", err
	}
	rec := xapi.New[xapi.VDI]()
	rec.SR, rec.Type, rec.VirtualSize = args.SR, args.Type, size
	rec.NameLabel, rec.NameDescription = args.NameLabel, args.NameDescription
	rec.Sharable, rec.ReadOnly = args.Sharable, args.ReadOnly
	rec.OtherConfig, rec.XenstoreData = args.OtherConfig, args.XenstoreData
	rec.SMConfig, rec.Tags = ownSMConfig(args.SMConfig), args.Tags

	var sr *xapi.SR
	release, err := c.Claim(ctx, func(tx *db.Tx) (err error) {
		if err := a.srAllows(tx, args.SR, xapi.StorageOperationsVDICreate); err != nil {
			return err
		}
		sr, err = db.Get(tx, args.SR)
		return err
	}, claim.On(args.SR, xapi.StorageOperationsVDICreate))
	if err != nil {
		return "", err
	}
	defer release()
	repo, err := a.repos.get(args.SR)
	if err != nil {
		return "", err
	}
	rec.UUID = newDiskUUID(sr, rec)
	return a.addDisk(ctx, repo, rec, func(id storage.ID, attrs []byte) (storage.Info, error) {
		info, err := repo.Create(ctx, storage.Spec{ID: id, Size: size, Attrs: attrs})
		if err != nil {
			return info, fmt.Errorf("create VDI %s: %w", id, err)
		}
		return info, nil
	})
}

// poolBackupLabel is the name of the disk that pool metadata backups go to. A
// user disk of that name has an identity that follows from its SR, so that it
// is found again without a database.
const poolBackupLabel = "Pool Metadata Backup"

// newDiskUUID chooses the UUID of a new disk, which is also the name of its
// volume.
func newDiskUUID(sr *xapi.SR, rec *xapi.VDI) string {
	if rec.Type == xapi.VDITypeUser && rec.NameLabel == poolBackupLabel {
		if ns, err := uuid.Parse(sr.UUID); err == nil {
			return uuid.NewSHA1(ns, []byte(poolBackupLabel)).String()
		}
	}
	return uuid.NewString()
}

// ownSMConfig returns sm_config without what describes somebody else's
// storage: our volumes have no chain of parents.
func ownSMConfig(m map[string]string) map[string]string {
	own := map[string]string{}
	for k, v := range m {
		if k != "vhd-parent" && !strings.HasPrefix(k, "coppice:") {
			own[k] = v
		}
	}
	return own
}

// addDisk makes a volume with make and then its record rec, which has all of
// what the caller knows. Either both exist afterwards or neither.
func (a *API) addDisk(ctx context.Context, repo *repository, rec *xapi.VDI, make func(id storage.ID, attrs []byte) (storage.Info, error)) (xapi.Ref[xapi.VDI], error) {
	if rec.UUID == "" {
		rec.UUID = uuid.NewString()
	}
	id := storage.ID(rec.UUID)
	rec.Location, rec.Managed = rec.UUID, true
	var attrs []byte
	err := a.db.View(func(tx *db.Tx) error {
		attrs = attrsOf(tx, rec).encode()
		return nil
	})
	if err != nil {
		return "", err
	}
	done := repo.reserve(id)
	defer done()
	var undo undoStack
	defer func() { undo.run(ctx) }()

	info, err := make(id, attrs)
	if err == nil || !errors.Is(err, storage.ErrExists) { // an existing volume is not ours to delete
		undo.push(func(ctx context.Context) { a.discard(ctx, repo, id) })
	}
	if err != nil {
		return "", err
	}
	rec.VirtualSize, rec.PhysicalUtilisation = info.Size, info.Used
	ref, err := a.recordDisk(ctx, rec)
	if err == nil || unsettled(err) {
		undo.disarm()
	}
	return ref, err
}

// unsettled says that a commit failed in a way that leaves open whether it
// happened. Only the next start knows, and puts right whatever it finds, so
// nothing may be undone now.
func unsettled(err error) bool {
	_, yes := errors.AsType[*db.StoreError](err)
	return yes
}

// recordDisk adds the record of a disk whose volume exists.
func (a *API) recordDisk(ctx context.Context, rec *xapi.VDI) (ref xapi.Ref[xapi.VDI], err error) {
	err = a.db.Update(ctx, func(tx *db.Tx) error {
		if ref, err = db.Insert(tx, rec); err != nil {
			return err
		}
		if err := a.refreshVDI(tx, ref); err != nil {
			return err
		}
		return db.Modify(tx, rec.SR, func(sr *xapi.SR) { sr.VirtualAllocation += rec.VirtualSize })
	})
	a.repos.used()
	return ref, err
}

// discard deletes a volume that never got a record.
func (a *API) discard(ctx context.Context, repo *repository, id storage.ID) {
	if err := repo.remove(ctx, id); err != nil {
		a.log.Error("a volume of a failed operation is left until the next scan", "sr", repo.sr, "volume", id, "err", err)
	}
}

// vdiDestroy deletes a disk, whatever was derived from it. The record goes
// first: a crash in between leaves a volume that start-up reclaims.
func (a *API) vdiDestroy(ctx context.Context, c *Call, ref xapi.Ref[xapi.VDI]) error {
	w, err := a.beginDisk(ctx, c, ref, xapi.VDIOperationsDestroy, xapi.StorageOperationsVDIDestroy)
	if err != nil {
		return err
	}
	defer w.release()
	done := w.repo.reserve(w.id())
	defer done()
	if err := a.db.Update(ctx, func(tx *db.Tx) error { return a.removeDiskRecord(tx, ref) }); err != nil {
		return err
	}
	a.repos.used()
	if err := w.repo.remove(context.WithoutCancel(ctx), w.id()); err != nil {
		return fmt.Errorf("delete VDI %s: %w", w.id(), err)
	}
	return nil
}

// removeDiskRecord removes the record of a disk and what hangs on it: its
// VBDs, and the claim of suspended VMs to it. Snapshots of it stay, with a
// snapshot_of that leads nowhere.
func (a *API) removeDiskRecord(tx *db.Tx, ref xapi.Ref[xapi.VDI]) error {
	v, err := db.Get(tx, ref)
	if err != nil {
		return err
	}
	if err := a.removeVBDs(tx, v); err != nil {
		return err
	}
	var suspended []xapi.Ref[xapi.VM]
	for r, vm := range db.All[xapi.VM](tx) {
		if vm.SuspendVDI == ref {
			suspended = append(suspended, r)
		}
	}
	for _, r := range suspended {
		if err := db.Modify(tx, r, func(vm *xapi.VM) { vm.SuspendVDI = xapi.NullRef }); err != nil {
			return err
		}
	}
	if err := db.Delete(tx, ref); err != nil {
		return err
	}
	if _, err := db.Get(tx, v.SR); err != nil {
		return nil
	}
	if err := db.Modify(tx, v.SR, func(sr *xapi.SR) { sr.VirtualAllocation -= v.VirtualSize }); err != nil {
		return err
	}
	return a.refreshSR(tx, v.SR)
}

// removeVBDs removes the VBDs of a disk.
func (a *API) removeVBDs(tx *db.Tx, v *xapi.VDI) error {
	for _, b := range v.VBDs {
		vbd, err := db.Get(tx, b)
		if err != nil {
			continue
		}
		if err := db.Delete(tx, b); err != nil {
			return err
		}
		if err := a.refreshVM(tx, vbd.VM); err != nil {
			return err
		}
	}
	return nil
}

// vdiResize makes a disk larger; what is added reads as zero. The size it has
// already is no error, a smaller one is.
func (a *API) vdiResize(ctx context.Context, c *Call, ref xapi.Ref[xapi.VDI], size int64) error {
	return a.resizeDisk(ctx, c, ref, size, xapi.VDIOperationsResize, xapi.StorageOperationsVDIResize)
}

// vdiResizeOnline is vdiResize of a disk that may be attached, where the
// driver can do that.
func (a *API) vdiResizeOnline(ctx context.Context, c *Call, ref xapi.Ref[xapi.VDI], size int64) error {
	return a.resizeDisk(ctx, c, ref, size, xapi.VDIOperationsResizeOnline, xapi.StorageOperationsVDIResize)
}

func (a *API) resizeDisk(ctx context.Context, c *Call, ref xapi.Ref[xapi.VDI], size int64, op xapi.VDIOperations, srOp xapi.StorageOperations) error {
	w, err := a.beginDisk(ctx, c, ref, op, srOp)
	if err != nil {
		return err
	}
	defer w.release()
	size, err = diskSize(size)
	if err != nil {
		return err
	}
	old := w.rec.VirtualSize
	switch {
	case size == old:
		return nil
	case size < old:
		return backendFailure(79, fmt.Sprintf("VDI Invalid size [opterr=disks do not shrink: %d bytes now, %d asked]", old, size))
	}
	r, ok := w.repo.Repo.(storage.Resizer)
	if !ok {
		return xapi.NewError(xapi.ErrSROperationNotSupported, string(w.rec.SR))
	}
	defer w.repo.reserve(w.id())() // a scan beside this does not know the size
	var undo undoStack
	defer func() { undo.run(ctx) }()
	undo.push(func(ctx context.Context) { // only zeros are cut off again
		if _, err := r.Resize(ctx, w.id(), old); err != nil {
			a.log.Error("a failed resize could not be taken back", "vdi", ref, "err", err)
		}
	})
	info, err := r.Resize(ctx, w.id(), size)
	if err != nil {
		return fmt.Errorf("resize VDI %s: %w", w.id(), err)
	}
	if err := a.noteInfo(ctx, w, info); err != nil {
		return err
	}
	undo.disarm()
	return nil
}

// noteInfo brings the sizes in the record of a disk up to date.
func (a *API) noteInfo(ctx context.Context, w *diskWork, info storage.Info) error {
	defer a.repos.used()
	return a.db.Update(ctx, func(tx *db.Tx) error { return noteDiskInfo(tx, w.ref, info) })
}

// vdiUpdate reads the sizes of a disk from its storage again.
func (a *API) vdiUpdate(ctx context.Context, c *Call, ref xapi.Ref[xapi.VDI]) error {
	w, err := a.beginDisk(ctx, c, ref, xapi.VDIOperationsUpdate, "")
	if err != nil {
		return err
	}
	defer w.release()
	info, err := w.repo.Stat(ctx, w.id())
	if errors.Is(err, storage.ErrNotFound) {
		err := a.db.Update(ctx, func(tx *db.Tx) error {
			return db.Modify(tx, ref, func(v *xapi.VDI) { v.Missing = true })
		})
		if err != nil {
			return err
		}
		return xapi.NewError(xapi.ErrVDIMissing, string(w.rec.SR), string(ref))
	}
	if err != nil {
		return fmt.Errorf("look at VDI %s: %w", w.id(), err)
	}
	a.syncAttrs(ctx, ref)
	if err := a.noteInfo(ctx, w, info); err != nil {
		return err
	}
	a.noteSpace(ctx, w)
	return nil
}

// vdiForget removes the record of a disk and leaves its volume, to which the
// next SR.scan gives a record again.
func (a *API) vdiForget(ctx context.Context, c *Call, ref xapi.Ref[xapi.VDI]) error {
	var rec *xapi.VDI
	var at diskAttrs
	release, err := c.Claim(ctx, func(tx *db.Tx) (err error) {
		if err := a.vdiAllows(tx, ref, xapi.VDIOperationsForget); err != nil {
			return err
		}
		if rec, err = db.Get(tx, ref); err == nil {
			at = attrsOf(tx, rec)
		}
		return err
	}, claim.On(ref, xapi.VDIOperationsForget))
	if err != nil {
		return err
	}
	defer release()
	repo, err := a.repos.get(rec.SR)
	if err != nil { // attaching the SR will find the volume
		return a.db.Update(ctx, func(tx *db.Tx) error { return a.removeDiskRecord(tx, ref) })
	}
	repo.attrs.Lock()
	defer repo.attrs.Unlock()
	if w, ok := repo.Repo.(storage.Attributer); ok {
		at.Forgotten = true
		err := w.SetAttrs(ctx, storage.ID(rec.UUID), at.encode())
		if err != nil && !errors.Is(err, storage.ErrNotFound) {
			return fmt.Errorf("forget VDI %s: %w", rec.UUID, err)
		}
	}
	return a.db.Update(ctx, func(tx *db.Tx) error { return a.removeDiskRecord(tx, ref) })
}

// vdiIntroduce is what a driver with the feature VDI_INTRODUCE would offer;
// none of ours takes volumes that it did not make itself.
func (a *API) vdiIntroduce(ctx context.Context, c *Call, _, _, _ string, sr xapi.Ref[xapi.SR], _ xapi.VDIType, _, _ bool, _ map[string]string, _ string, _, _ map[string]string, _ bool, _, _ int64, _ xapi.Ref[xapi.Pool], _ bool, _ time.Time, _ xapi.Ref[xapi.VDI]) (xapi.Ref[xapi.VDI], error) {
	err := a.db.View(func(tx *db.Tx) error { return a.srAllows(tx, sr, xapi.StorageOperationsVDIIntroduce) })
	if err == nil {
		err = xapi.NewError(xapi.ErrSROperationNotSupported, string(sr))
	}
	return "", err
}

// vdiGenerateConfig describes how a disk is reached: our drivers need no more
// than its SR and its location there.
func (a *API) vdiGenerateConfig(ctx context.Context, c *Call, host xapi.Ref[xapi.Host], ref xapi.Ref[xapi.VDI]) (string, error) {
	var config string
	err := a.db.View(func(tx *db.Tx) error {
		if _, err := db.Get(tx, host); err != nil {
			return err
		}
		if err := a.vdiAllows(tx, ref, xapi.VDIOperationsGenerateConfig); err != nil {
			return err
		}
		v, err := db.Get(tx, ref)
		if err != nil {
			return err
		}
		sr, err := db.Get(tx, v.SR)
		if err != nil {
			return err
		}
		config = fmt.Sprintf("sr_uuid=%s type=%s location=%s", sr.UUID, sr.Type, v.Location)
		return nil
	})
	return config, err
}

func (a *API) vdiSetNameLabel(ctx context.Context, c *Call, ref xapi.Ref[xapi.VDI], value string) error {
	return a.setStoredField(ctx, ref, func(v *xapi.VDI) { v.NameLabel = value })
}

func (a *API) vdiSetNameDescription(ctx context.Context, c *Call, ref xapi.Ref[xapi.VDI], value string) error {
	return a.setStoredField(ctx, ref, func(v *xapi.VDI) { v.NameDescription = value })
}

// setStoredField changes a field that the volume knows too, which takes an
// attached SR.
func (a *API) setStoredField(ctx context.Context, ref xapi.Ref[xapi.VDI], set func(*xapi.VDI)) error {
	err := a.db.Update(ctx, func(tx *db.Tx) error {
		v, err := db.Get(tx, ref)
		if err != nil {
			return err
		}
		if !v.Managed {
			return xapi.NewError(xapi.ErrVDINotManaged, string(ref))
		}
		if !srAttached(tx, v.SR) {
			return xapi.NewError(xapi.ErrSRHasNoPBDs, string(v.SR))
		}
		return db.Modify(tx, ref, set)
	})
	if err == nil {
		a.syncAttrs(ctx, ref)
	}
	return err
}

// vdiSetOnBoot says whether writes survive a reboot of the VM; only drivers
// that can throw them away allow any change.
func (a *API) vdiSetOnBoot(ctx context.Context, c *Call, ref xapi.Ref[xapi.VDI], value xapi.OnBoot) error {
	err := a.db.Update(ctx, func(tx *db.Tx) error {
		if err := attachedVMsHalted(tx, ref); err != nil {
			return err
		}
		if err := a.vdiAllows(tx, ref, xapi.VDIOperationsSetOnBoot); err != nil {
			return err
		}
		return db.Modify(tx, ref, func(v *xapi.VDI) { v.OnBoot = value })
	})
	if err == nil {
		a.syncAttrs(ctx, ref)
	}
	return err
}

func (a *API) vdiSetAllowCaching(ctx context.Context, c *Call, ref xapi.Ref[xapi.VDI], value bool) error {
	err := a.db.Update(ctx, func(tx *db.Tx) error {
		if err := attachedVMsHalted(tx, ref); err != nil {
			return err
		}
		return db.Modify(tx, ref, func(v *xapi.VDI) { v.AllowCaching = value })
	})
	if err == nil {
		a.syncAttrs(ctx, ref)
	}
	return err
}

// attachedVMsHalted is VM_BAD_POWER_STATE for a VM that has the disk and is
// not halted.
func attachedVMsHalted(tx *db.Tx, ref xapi.Ref[xapi.VDI]) error {
	v, err := db.Get(tx, ref)
	if err != nil {
		return err
	}
	for _, b := range v.VBDs {
		vbd, err := db.Get(tx, b)
		if err != nil {
			continue
		}
		if vm, err := db.Get(tx, vbd.VM); err == nil && vm.PowerState != xapi.VMPowerStateHalted {
			return badPowerState(vbd.VM, vm, xapi.VMPowerStateHalted)
		}
	}
	return nil
}
