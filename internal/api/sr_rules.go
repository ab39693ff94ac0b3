package api

import (
	"maps"
	"slices"
	"strings"

	"coppice/internal/db"
	"coppice/internal/xapi"
)

// srOpFeature names the SM feature without which an operation of an SR is
// refused. Operations that are not listed need none.
var srOpFeature = map[xapi.StorageOperations]string{
	xapi.StorageOperationsScan:                 "SR_SCAN",
	xapi.StorageOperationsUpdate:               "SR_UPDATE",
	xapi.StorageOperationsVDICreate:            "VDI_CREATE",
	xapi.StorageOperationsVDIDestroy:           "VDI_DELETE",
	xapi.StorageOperationsVDIResize:            "VDI_RESIZE",
	xapi.StorageOperationsVDISnapshot:          "VDI_SNAPSHOT",
	xapi.StorageOperationsVDIMirror:            "VDI_MIRROR",
	xapi.StorageOperationsVDIEnableCBT:         "VDI_CONFIG_CBT",
	xapi.StorageOperationsVDIDisableCBT:        "VDI_CONFIG_CBT",
	xapi.StorageOperationsVDIDataDestroy:       "VDI_CONFIG_CBT",
	xapi.StorageOperationsVDIListChangedBlocks: "VDI_CONFIG_CBT",
	xapi.StorageOperationsVDISetOnBoot:         "VDI_RESET_ON_BOOT",
	xapi.StorageOperationsVDIIntroduce:         "VDI_INTRODUCE",
	xapi.StorageOperationsVDIRevert:            "VDI_REVERT",
}

// publishedSROps are the operations that allowed_operations may list.
var publishedSROps = []xapi.StorageOperations{
	xapi.StorageOperationsScan, xapi.StorageOperationsDestroy, xapi.StorageOperationsForget,
	xapi.StorageOperationsPlug, xapi.StorageOperationsUnplug, xapi.StorageOperationsUpdate,
	xapi.StorageOperationsVDICreate, xapi.StorageOperationsVDIIntroduce,
	xapi.StorageOperationsVDIDestroy, xapi.StorageOperationsVDIResize,
	xapi.StorageOperationsVDIClone, xapi.StorageOperationsVDISnapshot,
	xapi.StorageOperationsVDIMirror, xapi.StorageOperationsVDIEnableCBT,
	xapi.StorageOperationsVDIDisableCBT, xapi.StorageOperationsVDIDataDestroy,
	xapi.StorageOperationsVDIListChangedBlocks, xapi.StorageOperationsVDISetOnBoot,
	xapi.StorageOperationsVDIRevert, xapi.StorageOperationsPBDCreate, xapi.StorageOperationsPBDDestroy,
}

// isDiskOp tells the operations that concern one disk of an SR. Any number of
// them run at a time, unlike in xapi, which lets an SR do one thing at a time.
func isDiskOp(op xapi.StorageOperations) bool { return strings.HasPrefix(string(op), "vdi_") }

// srOpsBeside says whether two operations of one SR can run at the same time.
func srOpsBeside(op, cur xapi.StorageOperations) bool {
	reads := func(o xapi.StorageOperations) bool {
		return o == xapi.StorageOperationsScan || o == xapi.StorageOperationsUpdate
	}
	switch {
	case op == xapi.StorageOperationsPlug:
		return true
	case isDiskOp(op):
		return isDiskOp(cur) || reads(cur)
	case reads(op):
		return isDiskOp(cur)
	}
	return false
}

// srAllows says whether an operation may begin on an SR now: nil, or the
// error of the first rule that forbids it. Only OTHER_OPERATION_IN_PROGRESS
// is worth waiting for.
func (a *API) srAllows(tx *db.Tx, ref xapi.Ref[xapi.SR], op xapi.StorageOperations) error {
	sr, err := db.Get(tx, ref)
	if err != nil {
		return err
	}
	for _, task := range slices.Sorted(maps.Keys(sr.CurrentOperations)) {
		if cur := sr.CurrentOperations[task]; !srOpsBeside(op, cur) {
			return otherOperation("SR", string(ref), string(cur), task)
		}
	}
	if f := srOpFeature[op]; f != "" && !srHasFeature(tx, ref, f) {
		return xapi.NewError(xapi.ErrSROperationNotSupported, string(ref))
	}
	attached := srAttached(tx, ref)
	switch op {
	case xapi.StorageOperationsPlug, xapi.StorageOperationsPBDCreate:
		return nil
	case xapi.StorageOperationsDestroy, xapi.StorageOperationsForget, xapi.StorageOperationsPBDDestroy:
		if attached {
			return xapi.NewError(xapi.ErrSRHasPBD, string(ref))
		}
	default:
		if !attached {
			return xapi.NewError(xapi.ErrSRHasNoPBDs, string(ref))
		}
	}
	if op != xapi.StorageOperationsDestroy {
		return nil
	}
	if sr.OtherConfig["indestructible"] == "true" {
		return xapi.NewError(xapi.ErrSRIndestructible, string(ref))
	}
	if len(sr.PBDs) == 0 {
		return xapi.NewError(xapi.ErrSRHasNoPBDs, string(ref))
	}
	for _, v := range sr.VDIs {
		if vdi, err := db.Get(tx, v); err == nil && vdi.Managed {
			return xapi.NewError(xapi.ErrSRNotEmpty)
		}
	}
	return nil
}

// srUnused says whether nothing keeps an SR from being detached: VDI_IN_USE
// names the first disk that is attached to a VM, under an operation or open in
// a transfer; disks that are only being made have no name yet. It looks at
// every disk, so it is asked only by PBD.unplug and not for
// allowed_operations, which are recomputed all the time.
func (a *API) srUnused(tx *db.Tx, ref xapi.Ref[xapi.SR]) error {
	sr, err := db.Get(tx, ref)
	if err != nil {
		return err
	}
	if repo, err := a.repos.get(ref); err == nil && repo.isHeld() {
		return backendFailure(16, "The SR is in use [opterr=a disk is being filled, or the SR is looked through]")
	}
	for _, v := range sr.VDIs {
		vdi, err := db.Get(tx, v)
		if err != nil {
			continue
		}
		busy := len(vdi.CurrentOperations) > 0 ||
			a.repos.uses.count(v, reading) > 0 || a.repos.uses.written(v)
		for _, b := range vdi.VBDs {
			vbd, err := db.Get(tx, b)
			busy = busy || err == nil && (vbd.CurrentlyAttached || vbd.Reserved)
		}
		if busy {
			return xapi.NewError(xapi.ErrVDIInUse, string(v), string(xapi.StorageOperationsUnplug))
		}
	}
	return nil
}

// allowedSROps lists the published operations that may begin on an SR now.
func (a *API) allowedSROps(tx *db.Tx, ref xapi.Ref[xapi.SR]) []xapi.StorageOperations {
	allowed := []xapi.StorageOperations{}
	for _, op := range publishedSROps {
		if a.srAllows(tx, ref, op) == nil {
			allowed = append(allowed, op)
		}
	}
	return allowed
}

// srFacts are what the rules of an SR's disks look at of the SR. One look serves
// all its disks, as long as nothing changes.
type srFacts struct {
	rec      *xapi.SR // nil when it is gone
	attached bool
	features map[string]int64 // of the driver
}

func factsOfSR(tx *db.Tx, ref xapi.Ref[xapi.SR]) srFacts {
	sr, err := db.Get(tx, ref)
	if err != nil {
		return srFacts{}
	}
	return srFacts{rec: sr, attached: srAttached(tx, ref), features: srFeatures(tx, ref)}
}

// srAttached says whether an SR has an attached PBD.
func srAttached(tx *db.Tx, ref xapi.Ref[xapi.SR]) bool {
	sr, err := db.Get(tx, ref)
	if err != nil {
		return false
	}
	for _, p := range sr.PBDs {
		if pbd, err := db.Get(tx, p); err == nil && pbd.CurrentlyAttached {
			return true
		}
	}
	return false
}

// srHasFeature says whether the driver of an SR has a feature.
func srHasFeature(tx *db.Tx, ref xapi.Ref[xapi.SR], feature string) bool {
	_, ok := srFeatures(tx, ref)[feature]
	return ok
}

// srFeatures are the features of the driver of an SR.
func srFeatures(tx *db.Tx, ref xapi.Ref[xapi.SR]) map[string]int64 {
	sr, err := db.Get(tx, ref)
	if err != nil {
		return nil
	}
	for _, sm := range db.All[xapi.SM](tx) {
		if sm.Type == sr.Type {
			return sm.Features
		}
	}
	return nil
}
