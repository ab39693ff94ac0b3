package api

import (
	"context"
	"errors"
	"math"
	"slices"
	"strconv"

	"github.com/google/uuid"

	"coppice/internal/claim"
	"coppice/internal/db"
	"coppice/internal/ova"
	"coppice/internal/sexpr"
	"coppice/internal/xapi"
)

// An import with restore gives VMs the UUIDs that they had. One that is here
// under such a UUID is replaced, if it is older: it goes in the commit that
// adds the new one, so that at any time there is one of the two. Its disks
// stay, as they do when a VM is destroyed.

// identity is the UUID that a VM of the manifest gets, "" for a new one.
func (x *VMImport) identity(vm *xapi.VM) string {
	if !x.req.Restore || !canonicalUUID(vm.UUID) {
		return ""
	}
	return vm.UUID
}

// replaced lists the VMs that make room for those of the manifest, in its
// order. The error says why one must not.
func (x *VMImport) replaced(tx *db.Tx) (refs []xapi.Ref[xapi.VM], err error) {
	if err := x.checkSeeds(tx); err != nil {
		return nil, err
	}
	for _, id := range x.manifest.VMs {
		src := ova.Get(x.manifest, id)
		name := x.identity(src)
		if name == "" {
			continue
		}
		ref, old, err := db.ByUUID[xapi.VM](tx, name)
		switch {
		case err != nil:
			continue // nobody has it
		case slices.Contains(refs, ref):
			return nil, xapi.NewError(xapi.ErrDuplicateVM, string(ref))
		case old.PowerState != xapi.VMPowerStateHalted && !old.IsASnapshot:
			return nil, badPowerState(ref, old, xapi.VMPowerStateHalted)
		case old.Version >= src.Version && !x.req.Force:
			return nil, xapi.NewError(xapi.ErrVMToImportIsNotNewerVersion, string(ref),
				strconv.FormatInt(old.Version, 10), strconv.FormatInt(src.Version, 10))
		}
		refs = append(refs, ref)
	}
	return refs, nil
}

// removable says whether VMs can be destroyed now.
func (x *VMImport) removable(tx *db.Tx, refs []xapi.Ref[xapi.VM]) error {
	for _, ref := range refs {
		if err := x.call.api.vmAllows(tx, ref, xapi.VMOperationsDestroy); err != nil {
			return err
		}
	}
	return nil
}

// claimReplaced claims the VMs that are replaced, when everything else is
// done: until then they can be used. An operation on one of them is waited for.
func (x *VMImport) claimReplaced(ctx context.Context) (refs []xapi.Ref[xapi.VM], release func(), err error) {
	err = x.call.api.db.View(func(tx *db.Tx) error {
		refs, err = x.replaced(tx)
		return err
	})
	if err != nil || len(refs) == 0 {
		return nil, func() {}, err
	}
	var claims []claim.Claim
	for _, ref := range refs {
		claims = append(claims, claim.On(ref, xapi.VMOperationsDestroy))
	}
	release, err = x.call.ClaimWithin(ctx, transferPatience, func(tx *db.Tx) error {
		return x.removable(tx, refs)
	}, claims...)
	if e, ok := errors.AsType[*xapi.Error](err); ok && e.Code == xapi.ErrHandleInvalid && slices.Contains(refs, xapi.Ref[xapi.VM](e.Params[len(e.Params)-1])) {
		err = errPartsChanged // another import has replaced it
	}
	return refs, release, err
}

// commit adds everything and removes what it replaces. Only the wait for
// others that use a VM to be replaced can be cancelled.
func (x *VMImport) commit(ctx context.Context) error {
	for {
		claimed, release, err := x.claimReplaced(ctx)
		if errors.Is(err, errPartsChanged) {
			continue
		}
		if err != nil {
			return err
		}
		err = x.batch.commit(context.WithoutCancel(ctx), func(tx *db.Tx) error {
			now, err := x.replaced(tx)
			switch {
			case err != nil:
				return err
			case !slices.Equal(now, claimed):
				return errPartsChanged
			}
			return x.insert(tx)
		})
		release()
		if !errors.Is(err, errPartsChanged) {
			return err
		}
	}
}

// replace removes the VMs that make room. What was said about the VM of this
// UUID and not by its archive is kept: its schedule, which is in schedules by
// UUID, and its snapshots, see adopt.
func (x *VMImport) replace(tx *db.Tx) (schedules map[string]xapi.Ref[xapi.VMSS], err error) {
	refs, err := x.replaced(tx)
	if err != nil {
		return nil, err
	}
	schedules = map[string]xapi.Ref[xapi.VMSS]{}
	for _, ref := range refs {
		old, err := db.Get(tx, ref)
		if err != nil {
			return nil, err
		}
		schedules[old.UUID] = old.SnapshotSchedule
		if err := x.call.api.removeVM(tx, ref); err != nil {
			return nil, err
		}
	}
	return schedules, nil
}

// adopt makes snapshots that are here those of the VMs that come with the UUID
// of what they were taken of. Without it a revert to one of them would bring
// that VM back a second time.
func (x *VMImport) adopt(tx *db.Tx) error {
	restored := map[string]xapi.Ref[xapi.VM]{}
	for _, id := range x.manifest.VMs {
		src := ova.Get(x.manifest, id)
		if name := x.identity(src); name != "" && !src.IsASnapshot {
			restored[name] = x.vms[id]
		}
	}
	if len(restored) == 0 {
		return nil
	}
	orphans := map[xapi.Ref[xapi.VM]]xapi.Ref[xapi.VM]{}
	for ref, s := range db.All[xapi.VM](tx) {
		if !s.IsASnapshot {
			continue
		}
		if _, err := db.Get(tx, s.SnapshotOf); err == nil {
			continue
		}
		if of, ok := restored[originalUUID(s)]; ok {
			orphans[ref] = of
		}
	}
	for ref, of := range orphans {
		if err := db.Modify(tx, ref, func(s *xapi.VM) { s.SnapshotOf = of }); err != nil {
			return err
		}
	}
	return nil
}

// originalUUID is the UUID of the VM that a snapshot was taken of, according
// to the snapshot itself; "" when it does not say.
func originalUUID(snapshot *xapi.VM) string {
	id, _ := sexpr.Fields[xapi.VM](snapshot.SnapshotMetadata)["uuid"].(string)
	return id
}

// checkSeeds refuses VMs that would share their addresses with a VM that they
// do not replace and that is not of the same snapshots: DUPLICATE_MAC_SEED.
func (x *VMImport) checkSeeds(tx *db.Tx) error {
	family := map[string]string{} // by seed: the UUID of the VM that has it, or had it
	for _, id := range x.manifest.VMs {
		src := ova.Get(x.manifest, id)
		of := src
		if src.IsASnapshot {
			of = ova.Get(x.manifest, src.SnapshotOf)
		}
		if seed := src.OtherConfig[macSeedKey]; seed != "" && x.identity(src) != "" {
			family[seed] = of.UUID
		}
	}
	if len(family) == 0 {
		return nil
	}
	for _, vm := range db.All[xapi.VM](tx) {
		seed := vm.OtherConfig[macSeedKey]
		mine, ok := family[seed]
		if !ok {
			continue
		}
		of := vm.UUID
		if vm.IsASnapshot {
			if source, err := db.Get(tx, vm.SnapshotOf); err == nil {
				of = source.UUID
			} else {
				of = originalUUID(vm)
			}
		}
		if of != mine {
			return xapi.NewError(xapi.ErrDuplicateMACSeed, seed)
		}
	}
	return nil
}

// restoredVersion counts the restore of a VM.
func restoredVersion(version int64) int64 {
	if version == math.MaxInt64 {
		return version
	}
	return version + 1
}

// canonicalUUID says whether text is a UUID in the form in which this server
// writes them.
func canonicalUUID(text string) bool {
	u, err := uuid.Parse(text)
	return err == nil && u.String() == text
}
