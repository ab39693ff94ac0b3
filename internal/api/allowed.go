package api

import (
	"slices"
	"sync"

	"coppice/internal/db"
	"coppice/internal/xapi"
)

// refreshAllowed recomputes the allowed_operations of an object, and those of
// the objects they depend on it, from the same rules that operations check
// when they begin. It writes only what changed, so that nobody is woken for
// nothing. An object that is gone, or whose class has no rules, is left alone.
func (a *API) refreshAllowed(tx *db.Tx, class, ref string) error {
	switch class {
	case "VDI":
		return a.refreshVDI(tx, xapi.Ref[xapi.VDI](ref))
	case "SR":
		return a.refreshSR(tx, xapi.Ref[xapi.SR](ref))
	case "VBD":
		r := xapi.Ref[xapi.VBD](ref)
		vbd, err := db.Get(tx, r)
		if err != nil {
			return nil
		}
		if err := a.refreshVBD(tx, r); err != nil {
			return err
		}
		if err := a.refreshVDI(tx, vbd.VDI); err != nil {
			return err
		}
		return a.refreshVM(tx, vbd.VM)
	case "VM":
		return a.refreshVM(tx, xapi.Ref[xapi.VM](ref))
	}
	return nil
}

func (a *API) refreshVDI(tx *db.Tx, ref xapi.Ref[xapi.VDI]) error {
	v, err := db.Get(tx, ref)
	if err != nil {
		return nil
	}
	allowed := a.lists.vdi.shared(a.allowedVDIOps(tx, ref))
	if slices.Equal(allowed, v.AllowedOperations) {
		return nil
	}
	return db.Modify(tx, ref, func(v *xapi.VDI) { v.AllowedOperations = allowed })
}

func (a *API) refreshSR(tx *db.Tx, ref xapi.Ref[xapi.SR]) error {
	sr, err := db.Get(tx, ref)
	if err != nil {
		return nil
	}
	allowed := a.allowedSROps(tx, ref)
	if slices.Equal(allowed, sr.AllowedOperations) {
		return nil
	}
	return db.Modify(tx, ref, func(sr *xapi.SR) { sr.AllowedOperations = allowed })
}

// refreshDisksOf recomputes an SR and all its disks, for changes that concern
// each of them, as attaching the SR does.
func (a *API) refreshDisksOf(tx *db.Tx, ref xapi.Ref[xapi.SR]) error {
	sr, err := db.Get(tx, ref)
	if err != nil {
		return nil
	}
	for _, v := range sr.VDIs {
		if err := a.refreshVDI(tx, v); err != nil {
			return err
		}
	}
	return a.refreshSR(tx, ref)
}

func (a *API) refreshVM(tx *db.Tx, ref xapi.Ref[xapi.VM]) error {
	vm, err := db.Get(tx, ref)
	if err != nil {
		return nil
	}
	allowed := a.lists.vm.shared(a.allowedVMOps(tx, ref))
	if slices.Equal(allowed, vm.AllowedOperations) {
		return nil
	}
	return db.Modify(tx, ref, func(vm *xapi.VM) { vm.AllowedOperations = allowed })
}

// restoreAllowed computes the allowed_operations of every object at start-up:
// they do not survive a restart.
func (a *API) restoreAllowed(tx *db.Tx) error {
	facts := map[xapi.Ref[xapi.SR]]srFacts{}
	for ref := range db.All[xapi.SR](tx) {
		facts[ref] = factsOfSR(tx, ref)
	}
	return cmpErr(
		db.RestoreEach(tx, func(tx *db.Tx, ref xapi.Ref[xapi.VDI], v *xapi.VDI) []xapi.VDIOperations {
			return a.lists.vdi.shared(a.diskFactsOn(tx, facts[v.SR], ref, v, xapi.NullRef).allowed(tx))
		}, func(v *xapi.VDI, allowed []xapi.VDIOperations) { v.AllowedOperations = allowed }),
		db.RestoreEach(tx, func(tx *db.Tx, ref xapi.Ref[xapi.VM], _ *xapi.VM) []xapi.VMOperations {
			return a.lists.vm.shared(a.allowedVMOps(tx, ref))
		}, func(vm *xapi.VM, allowed []xapi.VMOperations) { vm.AllowedOperations = allowed }),
		db.RestoreEach(tx, func(tx *db.Tx, _ xapi.Ref[xapi.VBD], b *xapi.VBD) []xapi.VBDOperations {
			return a.lists.vbd.shared(allowedVBDOps(tx, b))
		}, func(b *xapi.VBD, allowed []xapi.VBDOperations) { b.AllowedOperations = allowed }),
		db.RestoreEach(tx, func(tx *db.Tx, ref xapi.Ref[xapi.SR], _ *xapi.SR) []xapi.StorageOperations {
			return a.allowedSROps(tx, ref)
		}, func(sr *xapi.SR, allowed []xapi.StorageOperations) { sr.AllowedOperations = allowed }),
	)
}

// operationLists are the lists that allowed_operations have had. Thousands of
// objects share one, and records do not change.
type operationLists struct {
	vdi operationList[xapi.VDIOperations]
	vm  operationList[xapi.VMOperations]
	vbd operationList[xapi.VBDOperations]
}

// operationList holds different lists; there are few, because they follow from
// a handful of rules.
type operationList[O ~string] struct {
	mu  sync.Mutex
	all [][]O
}

// shared returns the list that says the same as l.
func (s *operationList[O]) shared(l []O) []O {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, known := range s.all {
		if slices.Equal(known, l) {
			return known
		}
	}
	l = slices.Clone(l) // as small as can be
	s.all = append(s.all, l)
	return l
}

// refreshChoices recomputes what depends on choices in the pool's
// other_config.
func (a *API) refreshChoices(tx *db.Tx) error {
	if err := a.refreshSMs(tx); err != nil {
		return err
	}
	var srs []xapi.Ref[xapi.SR]
	for ref := range db.All[xapi.SR](tx) {
		srs = append(srs, ref)
	}
	for _, ref := range srs {
		if err := a.refreshSR(tx, ref); err != nil {
			return err
		}
	}
	var asleep []xapi.Ref[xapi.VM]
	for ref, vm := range db.All[xapi.VM](tx) {
		if vm.PowerState == xapi.VMPowerStateSuspended {
			asleep = append(asleep, ref)
		}
	}
	for _, ref := range asleep {
		if err := a.refreshVM(tx, ref); err != nil {
			return err
		}
	}
	return nil
}

// otherOperation is the error of an object that is busy with something
// incompatible; Claim waits for the object it names.
func otherOperation(class, ref, op, task string) error {
	return xapi.NewError(xapi.ErrOtherOperationInProgress, class, ref, op, task)
}
