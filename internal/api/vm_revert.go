package api

import (
	"context"
	"errors"
	"maps"
	"slices"

	"coppice/internal/claim"
	"coppice/internal/db"
	"coppice/internal/sexpr"
	"coppice/internal/storage"
	"coppice/internal/xapi"
)

// Keys in other_config of the pool that choose how VMs are reverted.
const (
	// revertKey with the value "clone" has VM.revert replace disks by clones
	// of the snapshot's, as the document of snapshots describes it, instead of
	// putting their contents back; VDI.revert is then not supported.
	revertKey   = "coppice:revert"
	revertClone = "clone"
	// undoKey with the value "true" has VM.revert and VDI.revert take a
	// snapshot first. In other_config of a session it overrides the pool's. In
	// other_config of a snapshot it marks the one that was taken for this.
	undoKey = "coppice:undo"
)

// revertsByClone tells which of the two ways to revert is chosen.
func (a *API) revertsByClone(tx *db.Tx) bool {
	_, pool, err := a.pool(tx)
	return a.cfg.RevertByClone || err == nil && pool.OtherConfig[revertKey] == revertClone
}

// wantsUndo tells whether a call that reverts a VM or a disk is to take a
// snapshot first.
func (a *API) wantsUndo(tx *db.Tx, c *Call) bool {
	want := c.Origin.Undo
	if c.Session != nil && want == "" {
		if s, err := db.Get(tx, c.Session.ref); err == nil {
			want = s.OtherConfig[undoKey]
		}
	}
	if _, pool, err := a.pool(tx); err == nil && want == "" {
		want = pool.OtherConfig[undoKey]
	}
	return want == "true"
}

// undoLabel is the name of a snapshot that is taken before a revert to one with
// a name and other_config.
func undoLabel(name string, otherConfig map[string]string) string {
	if otherConfig[undoKey] == "true" {
		return "Before undoing a revert"
	}
	return "Before reverting to " + name
}

// vmRevert makes a VM what it was at the time of a snapshot: its fields, its
// disks and its network interfaces. The snapshot and all others stay.
//
// In place, which is the default, disks keep their identity and their VBDs;
// where a driver cannot do that, or the disk is gone or has another user by
// now, and for all of them under coppice:revert=clone, the disk is replaced by
// a clone of the snapshot's and destroyed. Disks that the snapshot does not
// have are detached and kept. A VM that was destroyed comes back with its uuid.
//
// Everything in the database changes in one commit, and that commit decides:
// what a crash or failure before it has left in the storage is put back, at
// once or when the SR is opened again (see settleReverts), so the VM is found
// as before or as after. A cancel is heeded until disks go back.
func (a *API) vmRevert(ctx context.Context, c *Call, snapshot xapi.Ref[xapi.VM]) error {
	r, release, err := a.claimRevert(ctx, c, snapshot)
	if err != nil {
		return err
	}
	defer release()
	if err := r.run(ctx); err != nil {
		return r.failure(err)
	}
	return nil
}

// vmRevertWork is a revert of a VM. It is planned in one transaction, which
// only reads; maps are from disks of the snapshot.
type vmRevertWork struct {
	api   *API
	call  *Call
	snap  vmParts
	vm    vmParts // as it is now; no record when it is gone
	clone bool    // disks are replaced, not put back
	undo  bool

	inPlace map[xapi.Ref[xapi.VDI]]xapi.Ref[xapi.VDI] // disks that get their contents back
	cloned  []xapi.Ref[xapi.VDI]                      // disks of the snapshot of which clones are made
	doomed  map[xapi.Ref[xapi.VDI]]*xapi.VDI          // disks that are destroyed
	saved   []xapi.Ref[xapi.VDI]                      // disks of the VM of which the present contents are kept
	dropped []xapi.Ref[xapi.VM]                       // older undo snapshots, destroyed with their disks
	claims  []claim.Claim

	sizes  map[xapi.Ref[xapi.VDI]]storage.Info       // of disks put back
	clones map[xapi.Ref[xapi.VDI]]xapi.Ref[xapi.VDI] // disk of the snapshot → clone
	saves  map[xapi.Ref[xapi.VDI]]xapi.Ref[xapi.VDI] // disk of the VM → snapshot of before
}

func (r *vmRevertWork) gone() bool { return r.vm.vm == nil }

// claimRevert plans a revert and claims all that it is going to touch.
func (a *API) claimRevert(ctx context.Context, c *Call, snapshot xapi.Ref[xapi.VM]) (r *vmRevertWork, release func(), err error) {
	for {
		err := a.db.View(func(tx *db.Tx) (err error) {
			r, err = a.planRevert(tx, c, snapshot)
			return err
		})
		if err != nil {
			return nil, nil, err
		}
		a.awaitWriters(ctx, r.written()...)
		claims := r.claims
		release, err := c.Claim(ctx, func(tx *db.Tx) error {
			now, err := a.planRevert(tx, c, snapshot)
			if err != nil {
				return err
			}
			if !slices.Equal(now.claims, claims) {
				return errPartsChanged
			}
			r = now
			return r.allowed(tx)
		}, claims...)
		if !errors.Is(err, errPartsChanged) {
			return r, release, err
		}
	}
}

// written lists the disks whose contents are replaced.
func (r *vmRevertWork) written() []xapi.Ref[xapi.VDI] {
	return slices.AppendSeq(slices.Collect(maps.Values(r.inPlace)), maps.Keys(r.doomed))
}

// planRevert decides what becomes of every disk.
func (a *API) planRevert(tx *db.Tx, c *Call, snapshot xapi.Ref[xapi.VM]) (*vmRevertWork, error) {
	r := &vmRevertWork{
		api: a, call: c, clone: a.revertsByClone(tx), undo: a.wantsUndo(tx, c),
		inPlace: map[xapi.Ref[xapi.VDI]]xapi.Ref[xapi.VDI]{},
		doomed:  map[xapi.Ref[xapi.VDI]]*xapi.VDI{},
	}
	var err error
	if r.snap, err = partsOf(tx, snapshot, nil, true); err != nil {
		return nil, err
	}
	if !r.snap.vm.IsASnapshot {
		return nil, xapi.NewError(xapi.ErrRevertOnlyAllowedOnSnapshot)
	}
	r.claim(claim.On(snapshot, xapi.VMOperationsRevert))
	if _, err := db.Get(tx, r.snap.vm.SnapshotOf); err == nil {
		if r.vm, err = partsOf(tx, r.snap.vm.SnapshotOf, nil, true); err != nil {
			return nil, err
		}
		r.claim(claim.On(r.vm.ref, xapi.VMOperationsReverting))
	} else {
		r.vm.ref, r.undo = xapi.NewRef[xapi.VM](), false
	}
	for _, s := range r.snap.disks {
		r.planDisk(tx, s)
	}
	if !r.gone() {
		r.planRest(tx)
	}
	return r, nil
}

// claim adds a claim, of which an SR needs only one.
func (r *vmRevertWork) claim(cl claim.Claim) {
	if !slices.ContainsFunc(r.claims, func(have claim.Claim) bool { return have.Ref == cl.Ref }) {
		r.claims = append(r.claims, cl)
	}
}

// planDisk decides about a disk of the snapshot.
func (r *vmRevertWork) planDisk(tx *db.Tx, s xapi.Ref[xapi.VDI]) {
	rec := r.snap.recs[s]
	t := rec.SnapshotOf
	target, err := db.Get(tx, t)
	exists := err == nil && s != r.snap.vm.SuspendVDI
	mine := exists && !r.shared(tx, target)
	taken := slices.Contains(slices.Collect(maps.Values(r.inPlace)), t)
	if mine && !r.clone && !taken && !target.IsASnapshot && target.SR == rec.SR && srHasFeature(tx, rec.SR, "VDI_REVERT") {
		r.inPlace[s] = t
		r.saved = append(r.saved, t)
		r.claim(claim.On(s, xapi.VDIOperationsRevertTo))
		r.claim(claim.On(t, xapi.VDIOperationsRevertFrom))
		r.claim(claim.On(rec.SR, xapi.StorageOperationsVDIRevert))
		return
	}
	r.cloned = append(r.cloned, s)
	r.claim(claim.On(s, xapi.VDIOperationsClone))
	r.claim(claim.On(rec.SR, xapi.StorageOperationsVDIClone))
	if mine && !taken && !target.IsASnapshot && slices.Contains(r.vm.disks, t) {
		r.doom(t, target)
	}
}

// doom has a disk destroyed.
func (r *vmRevertWork) doom(ref xapi.Ref[xapi.VDI], rec *xapi.VDI) {
	if r.doomed[ref] == nil {
		r.doomed[ref] = rec
		r.claim(claim.On(ref, xapi.VDIOperationsDestroy))
		r.claim(claim.On(rec.SR, xapi.StorageOperationsVDIDestroy))
	}
}

// shared tells whether a disk belongs to another VM, too, which is no
// snapshot.
func (r *vmRevertWork) shared(tx *db.Tx, v *xapi.VDI) bool {
	for _, b := range v.VBDs {
		vbd, err := db.Get(tx, b)
		if err != nil || vbd.VM == r.vm.ref {
			continue
		}
		if vm, err := db.Get(tx, vbd.VM); err == nil && !vm.IsASnapshot {
			return true
		}
	}
	return false
}

// planRest decides about the VM's memory, about what is kept for undo, and
// about the undo snapshots that this one replaces.
func (r *vmRevertWork) planRest(tx *db.Tx) {
	a := r.api
	if rec := r.vm.recs[r.vm.vm.SuspendVDI]; rec != nil {
		r.doom(r.vm.vm.SuspendVDI, rec)
	}
	if !r.undo {
		return
	}
	for _, v := range r.vm.disks {
		if slices.Contains(r.saved, v) {
			continue
		}
		if r.doomed[v] == nil {
			// It is only detached. If no snapshot of it can be taken, it is
			// left out rather than in the way.
			if err := a.vdiAllows(tx, v, xapi.VDIOperationsSnapshot); err != nil && !busy(err) {
				continue
			}
			r.claim(claim.On(v, xapi.VDIOperationsSnapshot))
			r.claim(claim.On(r.vm.recs[v].SR, xapi.StorageOperationsVDISnapshot))
		}
		r.saved = append(r.saved, v)
	}
	for _, u := range r.vm.vm.Snapshots {
		if disks, ok := a.droppableUndo(tx, u, r.snap.ref); ok {
			r.dropped = append(r.dropped, u)
			r.claim(claim.On(u, xapi.VMOperationsDestroy))
			for _, v := range slices.Sorted(maps.Keys(disks)) {
				r.doom(v, disks[v])
			}
		}
	}
}

// busy tells an error that passes with the operation that it names.
func busy(err error) bool {
	e, ok := errors.AsType[*xapi.Error](err)
	return ok && e.Code == xapi.ErrOtherOperationInProgress
}

// droppableUndo tells whether a VM is an undo snapshot that may be destroyed,
// and which disks go with it. One that somebody protects, or uses a disk of,
// stays. The one that is reverted to is busy with just that.
func (a *API) droppableUndo(tx *db.Tx, ref, reverted xapi.Ref[xapi.VM]) (disks map[xapi.Ref[xapi.VDI]]*xapi.VDI, ok bool) {
	p, err := partsOf(tx, ref, nil, true)
	if err != nil || !p.vm.IsASnapshot || p.vm.OtherConfig[undoKey] != "true" {
		return nil, false
	}
	if err := a.vmAllows(tx, ref, xapi.VMOperationsDestroy); err != nil && !busy(err) {
		return nil, false
	}
	disks = map[xapi.Ref[xapi.VDI]]*xapi.VDI{}
	for _, v := range p.disks {
		rec := p.recs[v]
		if !rec.IsASnapshot || slices.ContainsFunc(rec.VBDs, func(b xapi.Ref[xapi.VBD]) bool {
			vbd, err := db.Get(tx, b)
			return err == nil && vbd.VM != ref
		}) {
			continue
		}
		if err := a.vdiAllowsBeside(tx, v, xapi.VDIOperationsDestroy, ref); err != nil && !busy(err) {
			return nil, false
		}
		disks[v] = rec
	}
	return disks, true
}

// allowed checks every claim against the rules.
func (r *vmRevertWork) allowed(tx *db.Tx) error {
	for _, cl := range r.claims {
		var err error
		switch cl.Class {
		case "VM":
			err = r.api.vmAllows(tx, xapi.Ref[xapi.VM](cl.Ref), xapi.VMOperations(cl.Op))
		case "VDI":
			err = r.api.vdiAllowsBeside(tx, xapi.Ref[xapi.VDI](cl.Ref), xapi.VDIOperations(cl.Op), r.vm.ref)
		case "SR":
			err = r.api.srAllows(tx, xapi.Ref[xapi.SR](cl.Ref), xapi.StorageOperations(cl.Op))
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// failure is what a client is told of an error after the plan was made.
func (r *vmRevertWork) failure(err error) error {
	switch told := r.api.apiError(err); told.Code {
	case "SR_BACKEND_FAILURE_44", "SR_BACKEND_FAILURE_109", xapi.ErrVDIIncompatibleType, xapi.ErrTaskCancelled:
		return err
	default:
		return xapi.NewError(xapi.ErrVMRevertFailed, string(r.snap.ref), string(r.snap.vm.SnapshotOf)).WithCause(err)
	}
}

// run makes volumes, puts disks back, commits, and deletes what is left over.
func (r *vmRevertWork) run(ctx context.Context) error {
	a := r.api
	b := a.newBatch()
	defer b.end(ctx)
	if err := r.plan(b); err != nil {
		return err
	}
	for _, rec := range r.doomed {
		repo, err := a.repos.get(rec.SR)
		if err != nil {
			return err
		}
		defer repo.reserve(storage.ID(rec.UUID))() // until its volume is gone, too
	}
	if err := b.make(ctx); err != nil {
		return err
	}
	if err := context.Cause(ctx); err != nil {
		return err
	}
	ctx = context.WithoutCancel(ctx)
	r.call.Progress(2, 10)
	if err := r.putBack(ctx, b); err != nil {
		return err
	}
	r.call.Progress(6, 10)
	if err := b.commit(ctx, r.apply); err != nil {
		return err
	}
	r.cleanUp(ctx)
	return nil
}

// plan adds the disks to be made to b: snapshots of how the disks are now,
// and clones of the snapshot's.
func (r *vmRevertWork) plan(b *diskBatch) error {
	a := r.api
	r.clones, r.saves = map[xapi.Ref[xapi.VDI]]xapi.Ref[xapi.VDI]{}, map[xapi.Ref[xapi.VDI]]xapi.Ref[xapi.VDI]{}
	mark := revertMark{VM: r.uuid(), Gone: r.gone()}
	if !r.gone() {
		mark.Generation = r.vm.vm.GenerationID
	}
	back := slices.Collect(maps.Values(r.inPlace))
	for _, v := range r.saved {
		rec, err := r.record(v)
		if err != nil {
			return err
		}
		repo, err := a.repos.get(rec.SR)
		if err != nil {
			return err
		}
		d := b.snapshot(repo, a.snapshotRecord(v, rec), storage.ID(rec.UUID))
		d.passing = !r.undo
		r.saves[v] = d.ref
		if slices.Contains(back, v) {
			m := mark
			m.Disk = rec.UUID
			d.mark = &m
		}
	}
	for _, s := range r.cloned {
		rec := r.snap.recs[s]
		repo, err := a.repos.get(rec.SR)
		if err != nil {
			return err
		}
		r.clones[s] = b.clone(repo, derivedDisk(rec), storage.ID(rec.UUID)).ref
	}
	return nil
}

// uuid is the VM's, also if it is gone.
func (r *vmRevertWork) uuid() string {
	if !r.gone() {
		return r.vm.vm.UUID
	}
	id, _ := sexpr.Fields[xapi.VM](r.snap.vm.SnapshotMetadata)["uuid"].(string)
	return id
}

// record returns the record of a disk that is put back or saved.
func (r *vmRevertWork) record(v xapi.Ref[xapi.VDI]) (rec *xapi.VDI, err error) {
	err = r.api.db.View(func(tx *db.Tx) error {
		rec, err = db.Get(tx, v)
		return err
	})
	return rec, err
}

// putBack gives disks the contents of the snapshot. Each step is undone by b
// from the volumes that were made before.
func (r *vmRevertWork) putBack(ctx context.Context, b *diskBatch) error {
	r.sizes = map[xapi.Ref[xapi.VDI]]storage.Info{}
	for _, d := range b.disks {
		if d.mark == nil {
			continue
		}
		target := d.rec.SnapshotOf
		for s, t := range r.inPlace {
			if t != target {
				continue
			}
			info, err := b.putBack(ctx, d, storage.ID(r.snap.recs[s].UUID))
			if err != nil {
				return err
			}
			r.sizes[target] = info
		}
	}
	return nil
}

// cleanUp deletes the volumes of disks whose records are gone, and brings the
// volumes' copies of records up to date. What fails here, start-up or a scan
// does.
func (r *vmRevertWork) cleanUp(ctx context.Context) {
	a := r.api
	for _, rec := range r.doomed {
		if repo, err := a.repos.get(rec.SR); err == nil {
			a.discard(ctx, repo, storage.ID(rec.UUID))
		}
	}
	if r.undo {
		for _, ref := range r.saves {
			a.syncAttrs(ctx, ref)
		}
	}
	for _, clone := range r.clones {
		var older []xapi.Ref[xapi.VDI]
		_ = a.db.View(func(tx *db.Tx) error {
			v, err := db.Get(tx, clone)
			if err == nil {
				older = v.Snapshots
			}
			return err
		})
		for _, v := range older {
			a.syncAttrs(ctx, v)
		}
	}
}
