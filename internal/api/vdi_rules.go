package api

import (
	"maps"
	"slices"

	"coppice/internal/db"
	"coppice/internal/xapi"
)

// vdiOpFeature names the SM feature without which an operation is refused.
// Operations that are not listed need none.
var vdiOpFeature = map[xapi.VDIOperations]string{
	xapi.VDIOperationsSnapshot:          "VDI_SNAPSHOT",
	xapi.VDIOperationsDestroy:           "VDI_DELETE",
	xapi.VDIOperationsResize:            "VDI_RESIZE",
	xapi.VDIOperationsResizeOnline:      "VDI_RESIZE_ONLINE",
	xapi.VDIOperationsUpdate:            "VDI_UPDATE",
	xapi.VDIOperationsGenerateConfig:    "VDI_GENERATE_CONFIG",
	xapi.VDIOperationsClone:             "VDI_CLONE",
	xapi.VDIOperationsRevertTo:          "VDI_REVERT",
	xapi.VDIOperationsRevertFrom:        "VDI_REVERT",
	xapi.VDIOperationsMirror:            "VDI_MIRROR",
	xapi.VDIOperationsEnableCBT:         "VDI_CONFIG_CBT",
	xapi.VDIOperationsDisableCBT:        "VDI_CONFIG_CBT",
	xapi.VDIOperationsDataDestroy:       "VDI_CONFIG_CBT",
	xapi.VDIOperationsListChangedBlocks: "VDI_CONFIG_CBT",
	xapi.VDIOperationsSetOnBoot:         "VDI_RESET_ON_BOOT",
}

// publishedVDIOps are the operations that allowed_operations may list; the
// others are valid or not without being advertised.
var publishedVDIOps = []xapi.VDIOperations{
	xapi.VDIOperationsClone, xapi.VDIOperationsCopy, xapi.VDIOperationsResize,
	xapi.VDIOperationsResizeOnline, xapi.VDIOperationsSnapshot, xapi.VDIOperationsDestroy,
	xapi.VDIOperationsForget, xapi.VDIOperationsUpdate, xapi.VDIOperationsGenerateConfig,
}

// Operations by what an attachment of the disk means to them.
var (
	vdiOpsWhileAttached = []xapi.VDIOperations{ // never hindered
		xapi.VDIOperationsSnapshot, xapi.VDIOperationsClone, xapi.VDIOperationsResizeOnline,
		xapi.VDIOperationsRevertTo, xapi.VDIOperationsMirror, xapi.VDIOperationsEnableCBT,
		xapi.VDIOperationsDisableCBT, xapi.VDIOperationsDataDestroy, xapi.VDIOperationsBlocked,
	}
	vdiOpsOnCBTMetadata = []xapi.VDIOperations{ // possible without data
		xapi.VDIOperationsDataDestroy, xapi.VDIOperationsDestroy, xapi.VDIOperationsListChangedBlocks,
		xapi.VDIOperationsForget, xapi.VDIOperationsGenerateConfig, xapi.VDIOperationsUpdate,
		xapi.VDIOperationsForceUnlock, xapi.VDIOperationsBlocked,
	}
	vdiOpsWhileMissing = []xapi.VDIOperations{ // possible without a volume
		xapi.VDIOperationsDestroy, xapi.VDIOperationsForget, xapi.VDIOperationsUpdate,
	}
	vdiOpsOnRecord = []xapi.VDIOperations{ // never reach the storage
		xapi.VDIOperationsForget, xapi.VDIOperationsBlocked, xapi.VDIOperationsForceUnlock,
	}
)

// vdiAllows says whether an operation may begin on a disk now: nil, or the
// error of the first rule that forbids it. It is both what operations check
// before they start and what allowed_operations is computed from. Only
// OTHER_OPERATION_IN_PROGRESS is worth waiting for.
func (a *API) vdiAllows(tx *db.Tx, ref xapi.Ref[xapi.VDI], op xapi.VDIOperations) error {
	return a.vdiAllowsBeside(tx, ref, op, xapi.NullRef)
}

// vdiAllowsBeside is vdiAllows for an operation that takes the disk away from
// the VM beside, so that its VBDs there do not count.
func (a *API) vdiAllowsBeside(tx *db.Tx, ref xapi.Ref[xapi.VDI], op xapi.VDIOperations, beside xapi.Ref[xapi.VM]) error {
	f, err := a.diskFacts(tx, ref, beside)
	if err != nil {
		return err
	}
	return f.allow(tx, op)
}

// diskFacts is a disk with its surroundings, as far as the rules of its
// operations look at them.
type diskFacts struct {
	ref     xapi.Ref[xapi.VDI]
	v       *xapi.VDI
	sr      srFacts
	busy    error // the operation that others wait for; nil for none
	vbdBusy error // likewise, on one of its VBDs

	// How the disk is attached. A disk that the server itself writes counts
	// as attached read-write.
	inUse, inUseRW, onlySnapshots bool
}

// diskFacts reads what there is to know about a disk. VBDs of the VM beside
// do not count as attached.
func (a *API) diskFacts(tx *db.Tx, ref xapi.Ref[xapi.VDI], beside xapi.Ref[xapi.VM]) (*diskFacts, error) {
	v, err := db.Get(tx, ref)
	if err != nil {
		return nil, err
	}
	return a.diskFactsOn(tx, factsOfSR(tx, v.SR), ref, v, beside), nil
}

// diskFactsOn is diskFacts for a disk whose record and SR are known.
func (a *API) diskFactsOn(tx *db.Tx, sr srFacts, ref xapi.Ref[xapi.VDI], v *xapi.VDI, beside xapi.Ref[xapi.VM]) *diskFacts {
	f := &diskFacts{ref: ref, v: v, sr: sr}
	for _, task := range slices.Sorted(maps.Keys(v.CurrentOperations)) {
		if cur := v.CurrentOperations[task]; cur != xapi.VDIOperationsCopy {
			f.busy = otherOperation("VDI", string(ref), string(cur), task)
			break
		}
	}
	f.inUse = a.repos.uses.written(ref)
	f.inUseRW, f.onlySnapshots = f.inUse, !f.inUse
	for _, b := range v.VBDs {
		vbd, err := db.Get(tx, b)
		if err != nil {
			continue
		}
		for _, task := range slices.Sorted(maps.Keys(vbd.CurrentOperations)) {
			if f.vbdBusy == nil {
				f.vbdBusy = otherOperation("VDI", string(ref), string(vbd.CurrentOperations[task]), task)
			}
		}
		if !vbd.CurrentlyAttached && !vbd.Reserved || vbd.VM == beside {
			continue
		}
		f.inUse = true
		f.inUseRW = f.inUseRW || vbd.Mode == xapi.VBDModeRW
		vm, err := db.Get(tx, vbd.VM)
		f.onlySnapshots = f.onlySnapshots && err == nil && vm.IsASnapshot
	}
	return f
}

// allow applies the rules of an operation, in their order.
func (f *diskFacts) allow(tx *db.Tx, op xapi.VDIOperations) error {
	v := f.v
	if !v.Managed {
		return xapi.NewError(xapi.ErrVDINotManaged, string(f.ref))
	}
	if f.busy != nil {
		return f.busy
	}
	if !f.sr.attached && !slices.Contains(vdiOpsOnRecord, op) {
		return xapi.NewError(xapi.ErrSRHasNoPBDs, string(v.SR))
	}
	switch {
	case slices.Contains(vdiOpsWhileAttached, op):
	case op == xapi.VDIOperationsCopy && !f.inUseRW:
	case op == xapi.VDIOperationsListChangedBlocks && f.onlySnapshots:
	case f.inUse:
		return xapi.NewError(xapi.ErrVDIInUse, string(f.ref), string(op))
	}
	if f.vbdBusy != nil && op != xapi.VDIOperationsDataDestroy {
		return f.vbdBusy
	}
	if need := vdiOpFeature[op]; need != "" {
		if _, ok := f.sr.features[need]; !ok {
			return xapi.NewError(xapi.ErrSROperationNotSupported, string(v.SR))
		}
	}
	if v.Type == xapi.VDITypeCBTMetadata && !slices.Contains(vdiOpsOnCBTMetadata, op) {
		return xapi.NewError(xapi.ErrVDIIncompatibleType, string(f.ref), string(v.Type))
	}
	if v.CBTEnabled && (op == xapi.VDIOperationsMirror || op == xapi.VDIOperationsSetOnBoot) {
		return xapi.NewError(xapi.ErrVDICBTEnabled, string(f.ref))
	}
	if v.Missing && !slices.Contains(vdiOpsWhileMissing, op) {
		return xapi.NewError(xapi.ErrVDIMissing, string(v.SR), string(f.ref))
	}
	if f.sr.rec == nil {
		return xapi.NewError(xapi.ErrHandleInvalid, "SR", string(v.SR))
	}
	return vdiOpSpecific(tx, f.ref, v, f.sr.rec, op)
}

// vdiOpSpecific applies the rules that concern one operation only.
func vdiOpSpecific(tx *db.Tx, ref xapi.Ref[xapi.VDI], v *xapi.VDI, sr *xapi.SR, op xapi.VDIOperations) error {
	switch op {
	case xapi.VDIOperationsDestroy, xapi.VDIOperationsDataDestroy:
		if err := held(string(ref), v.OtherConfig); err != nil {
			return err
		}
	}
	switch op {
	case xapi.VDIOperationsDestroy, xapi.VDIOperationsDataDestroy, xapi.VDIOperationsRevertFrom:
		switch {
		case sr.IsToolsSR:
			return xapi.NewError(xapi.ErrSROperationNotSupported, string(v.SR))
		case v.Type == xapi.VDITypeRRD:
			return xapi.NewError(xapi.ErrVDIHasRRDs, string(ref))
		}
	}
	switch op {
	case xapi.VDIOperationsEnableCBT, xapi.VDIOperationsDisableCBT:
		switch {
		case v.IsASnapshot:
			return xapi.NewError(xapi.ErrOperationNotAllowed, "VDI is a snapshot: "+string(ref))
		case v.Type != xapi.VDITypeUser && v.Type != xapi.VDITypeSystem:
			return xapi.NewError(xapi.ErrVDIIncompatibleType, string(ref), string(v.Type))
		case v.OnBoot == xapi.OnBootReset:
			return xapi.NewError(xapi.ErrVDIOnBootModeIncompatibleWithOperation)
		}
	case xapi.VDIOperationsDataDestroy:
		switch {
		case !v.IsASnapshot:
			return xapi.NewError(xapi.ErrOperationNotAllowed, "VDI is not a snapshot: "+string(ref))
		case !v.CBTEnabled:
			return xapi.NewError(xapi.ErrVDINoCBTMetadata, string(ref))
		}
	case xapi.VDIOperationsDestroy:
		if v.Type == xapi.VDITypeHAStatefile || v.Type == xapi.VDITypeRedoLog {
			for _, p := range db.All[xapi.Pool](tx) {
				if p.HAEnabled {
					return xapi.NewError(xapi.ErrHAIsEnabled)
				}
			}
		}
	case xapi.VDIOperationsSnapshot:
		switch {
		case v.Sharable:
			return xapi.NewError(xapi.ErrVDIIsSharable, string(ref))
		case v.OnBoot == xapi.OnBootReset:
			return xapi.NewError(xapi.ErrVDIOnBootModeIncompatibleWithOperation)
		case len(v.CurrentOperations) > 0: // only copies get this far
			return xapi.NewError(xapi.ErrOperationNotAllowed, "Snapshot operation not allowed during copy.")
		}
	case xapi.VDIOperationsCopy:
		switch {
		case v.OnBoot == xapi.OnBootReset:
			return xapi.NewError(xapi.ErrVDIOnBootModeIncompatibleWithOperation)
		case v.Type == xapi.VDITypeHAStatefile, v.Type == xapi.VDITypeRedoLog:
			return xapi.NewError(xapi.ErrOperationNotAllowed, "VDIs of type "+string(v.Type)+" cannot be copied.")
		}
	case xapi.VDIOperationsResize, xapi.VDIOperationsResizeOnline:
		if v.IsASnapshot {
			return xapi.NewError(xapi.ErrVDIReadonly, string(ref))
		}
	case xapi.VDIOperationsRevertTo:
		if !v.IsASnapshot {
			return xapi.NewError(xapi.ErrRevertOnlyAllowedOnSnapshot)
		}
	case xapi.VDIOperationsRevertFrom:
		if v.IsASnapshot || v.ReadOnly {
			return xapi.NewError(xapi.ErrVDIReadonly, string(ref))
		}
	}
	return nil
}

// vdiWritable says whether the server may write into a disk for an import or
// a copy, which it does like a VM that has the disk attached read-write.
func (a *API) vdiWritable(tx *db.Tx, ref xapi.Ref[xapi.VDI], what string) error {
	v, err := db.Get(tx, ref)
	if err != nil {
		return err
	}
	if !v.Managed {
		return xapi.NewError(xapi.ErrVDINotManaged, string(ref))
	}
	if v.ReadOnly || v.IsASnapshot {
		return xapi.NewError(xapi.ErrVDIReadonly, string(ref))
	}
	if v.Type == xapi.VDITypeCBTMetadata {
		return xapi.NewError(xapi.ErrVDIIncompatibleType, string(ref), string(v.Type))
	}
	for _, task := range slices.Sorted(maps.Keys(v.CurrentOperations)) {
		switch cur := v.CurrentOperations[task]; cur {
		case xapi.VDIOperationsSnapshot, xapi.VDIOperationsClone, xapi.VDIOperationsCopy:
			// All of them read one instant; a writer does not disturb them.
		default:
			return otherOperation("VDI", string(ref), string(cur), task)
		}
	}
	if !srAttached(tx, v.SR) {
		return xapi.NewError(xapi.ErrSRHasNoPBDs, string(v.SR))
	}
	if a.repos.uses.written(ref) {
		return xapi.NewError(xapi.ErrVDIInUse, string(ref), what)
	}
	for _, b := range v.VBDs {
		if vbd, err := db.Get(tx, b); err == nil && (vbd.CurrentlyAttached || vbd.Reserved) {
			return xapi.NewError(xapi.ErrVDIInUse, string(ref), what)
		}
	}
	if v.Missing {
		return xapi.NewError(xapi.ErrVDIMissing, string(v.SR), string(ref))
	}
	return nil
}

// vdiReadable says whether the server may read a disk for an export or a
// copy's base: always while it has contents and its SR is attached, because a
// reader gets the version of one instant.
func (a *API) vdiReadable(tx *db.Tx, ref xapi.Ref[xapi.VDI]) error {
	v, err := db.Get(tx, ref)
	switch {
	case err != nil:
		return err
	case !v.Managed:
		return xapi.NewError(xapi.ErrVDINotManaged, string(ref))
	case v.Type == xapi.VDITypeCBTMetadata:
		return xapi.NewError(xapi.ErrVDIIncompatibleType, string(ref), string(v.Type))
	case !srAttached(tx, v.SR):
		return xapi.NewError(xapi.ErrSRHasNoPBDs, string(v.SR))
	case v.Missing:
		return xapi.NewError(xapi.ErrVDIMissing, string(v.SR), string(ref))
	}
	return nil
}

// allowedVDIOps lists the published operations that may begin on a disk now.
func (a *API) allowedVDIOps(tx *db.Tx, ref xapi.Ref[xapi.VDI]) []xapi.VDIOperations {
	f, err := a.diskFacts(tx, ref, xapi.NullRef)
	if err != nil {
		return []xapi.VDIOperations{}
	}
	return f.allowed(tx)
}

// allowed lists the published operations that may begin on the disk now.
func (f *diskFacts) allowed(tx *db.Tx) []xapi.VDIOperations {
	allowed := make([]xapi.VDIOperations, 0, len(publishedVDIOps))
	for _, op := range publishedVDIOps {
		if f.allow(tx, op) == nil {
			allowed = append(allowed, op)
		}
	}
	return allowed
}
