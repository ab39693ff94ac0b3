package api

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"coppice/internal/db"
	"coppice/internal/schedule"
	"coppice/internal/storage"
	"coppice/internal/xapi"
)

// retained is a scheduled snapshot of a VM, and what its schedule makes of it.
type retained struct {
	ref  xapi.Ref[xapi.VM]
	uuid string
	name string
	at   time.Time
	age  int      // how many snapshots it descends from: that of two from the same second is newer which has more
	why  []string // the rules that keep it
	hold string   // why it is on hold, "" when it is not
}

func (r *retained) goes() bool { return len(r.why) == 0 && r.hold == "" }

// retention says which scheduled snapshots of a VM go, the newest snapshot first. A snapshot on hold stays and does
// not count; when the VM itself is on hold all stay.
func retention(tx *db.Tx, vm *xapi.VM, plan schedule.Schedule) []retained {
	var all, counted []retained
	for _, ref := range vm.Snapshots {
		snap, err := db.Get(tx, ref)
		if err != nil || !snap.IsVMSSSnapshot {
			continue
		}
		r := retained{ref: ref, uuid: snap.UUID, name: snap.NameLabel, at: snap.SnapshotTime, hold: holdOf(tx, snap)}
		r.age = ancestors(tx, snap, len(vm.Snapshots))
		if why, ok := vm.OtherConfig[holdKey]; ok {
			r.hold = cmp.Or(r.hold, "the VM: "+why)
		}
		if r.hold != "" {
			all = append(all, r)
		} else {
			counted = append(counted, r)
		}
	}
	newestFirst := func(x, y retained) int {
		return cmp.Or(y.at.Compare(x.at), cmp.Compare(y.age, x.age), cmp.Compare(x.ref, y.ref))
	}
	slices.SortFunc(counted, newestFirst)
	times := make([]time.Time, len(counted))
	for i, r := range counted {
		times[i] = r.at
	}
	for i, why := range plan.Keep.Why(times, plan.Zone) {
		counted[i].why = why
	}
	all = append(all, counted...)
	slices.SortFunc(all, newestFirst)
	return all
}

// ancestors counts the snapshots that one descends from, up to most.
func ancestors(tx *db.Tx, snap *xapi.VM, most int) (n int) {
	for ; n < most; n++ {
		parent, err := db.Get(tx, snap.Parent)
		if err != nil {
			break
		}
		snap = parent
	}
	return n
}

// holdOf returns why a snapshot, or one of its disks, is on hold; "" when none is.
func holdOf(tx *db.Tx, snap *xapi.VM) string {
	if why, ok := snap.OtherConfig[holdKey]; ok {
		return cmp.Or(why, "no reason given")
	}
	for _, ref := range disksOf(tx, snap) {
		if vdi, err := db.Get(tx, ref); err == nil {
			if why, ok := vdi.OtherConfig[holdKey]; ok {
				return cmp.Or(why, "no reason given")
			}
		}
	}
	return ""
}

// disksOf returns the disks that exist for a snapshot alone: those of its disk VBDs that are snapshots themselves and
// that no other VM has, and its memory. A control domain has disks only for a time, so that does not count.
func disksOf(tx *db.Tx, snap *xapi.VM) []xapi.Ref[xapi.VDI] {
	var disks []xapi.Ref[xapi.VDI]
	for _, b := range snap.VBDs {
		vbd, err := db.Get(tx, b)
		if err != nil || vbd.Type != xapi.VBDTypeDisk {
			continue
		}
		vdi, err := db.Get(tx, vbd.VDI)
		if err == nil && vdi.IsASnapshot && !slices.ContainsFunc(vdi.VBDs, func(b xapi.Ref[xapi.VBD]) bool { return othersVBD(tx, b, snap) }) {
			disks = append(disks, vbd.VDI)
		}
	}
	if !snap.SuspendVDI.IsNull() {
		if _, err := db.Get(tx, snap.SuspendVDI); err == nil {
			disks = append(disks, snap.SuspendVDI)
		}
	}
	return disks
}

// othersVBD reports whether a VBD is that of a VM other than vm and the control domains.
func othersVBD(tx *db.Tx, ref xapi.Ref[xapi.VBD], vm *xapi.VM) bool {
	vbd, err := db.Get(tx, ref)
	if err != nil {
		return false
	}
	owner, err := db.Get(tx, vbd.VM)
	return err == nil && owner.UUID != vm.UUID && !owner.IsControlDomain
}

// prune destroys the scheduled snapshots of a VM that its schedule does not keep. A snapshot that cannot go is
// reported and found again by the next run.
func (s *scheduler) prune(ctx context.Context, ref xapi.Ref[xapi.VMSS], vm xapi.Ref[xapi.VM]) {
	if !s.enter(s.mu.pruning, vm) {
		return // the run that is at it sees the newest snapshot too, or the next one does
	}
	defer s.leave(s.mu.pruning, vm)
	a := s.api
	var going []retained
	var v *xapi.VMSS
	err := a.db.View(func(tx *db.Tx) (err error) {
		if v, err = db.Get(tx, ref); err != nil {
			return err
		}
		rec, err := db.Get(tx, vm)
		if err != nil {
			return err
		}
		plan, err := planOf(v)
		if err != nil {
			return err
		}
		going = slices.DeleteFunc(retention(tx, rec, plan), func(r retained) bool { return !r.goes() })
		return nil
	})
	if err != nil {
		return // the schedule or the VM is gone
	}
	for _, r := range slices.Backward(going) {
		err := s.do(ctx, "Pruning of "+r.name, func(ctx context.Context, c *Call) error { return a.destroySnapshot(ctx, c, r.ref) })
		if err == nil || gone(err) || a.ctx.Err() != nil {
			continue
		}
		body := fmt.Sprintf("The snapshot %s (%s) is due to go, but: %s", r.name, r.uuid, strings.Join(a.apiError(err).Description(), " "))
		err = a.db.Update(a.ctx, func(tx *db.Tx) error { return a.alert(tx, "VMSS_SNAPSHOT_FAILED", xapi.ClsVMSS, v.UUID, body) })
		if err != nil {
			a.log.Error("an alert could not be raised", "vmss", v.UUID, "body", body, "err", err)
		}
	}
}

// destroySnapshot destroys a snapshot of a VM with its disks: all of its records in one commit, then the volumes. It
// is found whole or not at all, so that nobody reverts a VM to what is left of it; the volumes that a crash leaves
// are reclaimed by the next start.
func (a *API) destroySnapshot(ctx context.Context, c *Call, ref xapi.Ref[xapi.VM]) error {
	ops := diskOps{vdi: xapi.VDIOperationsDestroy, sr: xapi.StorageOperationsVDIDestroy, beside: ref}
	p, release, err := a.claimVM(ctx, c, xapi.VMOperationsDestroy, ops, func(tx *db.Tx) (vmParts, error) {
		snap, err := db.Get(tx, ref)
		if err != nil {
			return vmParts{}, err
		}
		p := vmParts{ref: ref, vm: snap, disks: disksOf(tx, snap), recs: map[xapi.Ref[xapi.VDI]]*xapi.VDI{}}
		for _, disk := range p.disks {
			if p.recs[disk], err = db.Get(tx, disk); err != nil {
				return vmParts{}, err
			}
		}
		return p, nil
	})
	if err != nil {
		return err
	}
	defer release()
	for _, rec := range p.recs {
		repo, err := a.repos.get(rec.SR)
		if err != nil {
			return err
		}
		defer repo.reserve(storage.ID(rec.UUID))() // until its volume is gone, too
	}
	err = a.db.Update(ctx, func(tx *db.Tx) error {
		if err := a.removeVM(tx, ref); err != nil {
			return err
		}
		for _, disk := range p.disks {
			if err := a.removeDiskRecord(tx, disk); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		return err
	}
	a.repos.used()
	for _, disk := range p.disks {
		if repo, err := a.repos.get(p.recs[disk].SR); err == nil {
			a.discard(context.WithoutCancel(ctx), repo, storage.ID(p.recs[disk].UUID))
		}
	}
	return nil
}

// gone reports whether an error says that there is no such object.
func gone(err error) bool {
	e, ok := errors.AsType[*xapi.Error](err)
	return ok && e.Code == xapi.ErrHandleInvalid
}

// pruningPreview says what a schedule would prune now, as JSON; nothing happens.
func (a *API) pruningPreview(ref xapi.Ref[xapi.VMSS]) (string, error) {
	type snapshotLine struct {
		UUID  string    `json:"uuid"`
		Name  string    `json:"name_label"`
		Taken time.Time `json:"taken"`
		Goes  bool      `json:"goes"`
		Keep  []string  `json:"kept_by,omitempty"`
		Hold  string    `json:"hold,omitempty"`
	}
	type vmLine struct {
		UUID      string         `json:"uuid"`
		Name      string         `json:"name_label"`
		Snapshots []snapshotLine `json:"snapshots"`
	}
	lines := []vmLine{}
	err := a.db.View(func(tx *db.Tx) error {
		v, err := db.Get(tx, ref)
		if err != nil {
			return err
		}
		plan, err := planOf(v)
		if err != nil {
			return err
		}
		for _, r := range v.VMs {
			vm, err := db.Get(tx, r)
			if err != nil {
				continue
			}
			line := vmLine{UUID: vm.UUID, Name: vm.NameLabel, Snapshots: []snapshotLine{}}
			for _, r := range retention(tx, vm, plan) {
				line.Snapshots = append(line.Snapshots, snapshotLine{r.uuid, r.name, r.at.UTC(), r.goes(), r.why, r.hold})
			}
			lines = append(lines, line)
		}
		return nil
	})
	if err != nil {
		return "", err
	}
	text, err := json.MarshalIndent(lines, "", "  ")
	return string(text), err
}
