package api

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"

	"coppice/internal/db"
	"coppice/internal/schedule"
	"coppice/internal/xapi"
)

// schedulePoll is how often the scheduler looks at the clock. Timers do not notice that a clock was set.
const schedulePoll = 20 * time.Second

// schedulerUser is whose tasks the scheduled snapshots are.
const schedulerUser = "__dom0__vmss"

// scheduler takes the snapshots of schedules (class VMSS) when they are due.
//
// The only state that lasts is last_run_time. A schedule is due when its last slot is younger; last_run_time moves
// before the first snapshot is taken, so that no slot comes twice, whatever happens. Therefore:
//
//   - Slots that pass while the server is down are made up for by one run, for the newest of them, and reported.
//   - A run that a crash cut off is completed at the next start: the VMs that have no scheduled snapshot since the
//     slot get theirs.
//   - A clock that is set back by less than the schedule's period makes it wait until the clock is where it was. One
//     that is set back by more had been wrong, and so is last_run_time, which becomes the present.
type scheduler struct {
	api     *API
	session *session
	wake    chan struct{} // has an element when a schedule may have changed

	mu struct {
		sync.Mutex                                   // may be taken within a transaction, and none begins under it
		since      map[xapi.Ref[xapi.VMSS]]time.Time // slots up to then are not due
		resumed    map[xapi.Ref[xapi.VMSS]]bool      // has been looked at since the start
		snapping   map[xapi.Ref[xapi.VM]]bool        // a scheduled snapshot is being taken
		pruning    map[xapi.Ref[xapi.VM]]bool
	}
}

func newScheduler(a *API) *scheduler {
	s := &scheduler{api: a, wake: make(chan struct{}, 1)}
	s.session = &session{ref: xapi.NullRef, user: schedulerUser, role: a.model.Roles[0], superuser: true, local: true, ctx: a.ctx}
	s.mu.since = map[xapi.Ref[xapi.VMSS]]time.Time{}
	s.mu.resumed = map[xapi.Ref[xapi.VMSS]]bool{}
	s.mu.snapping = map[xapi.Ref[xapi.VM]]bool{}
	s.mu.pruning = map[xapi.Ref[xapi.VM]]bool{}
	return s
}

// look makes the scheduler look at its schedules again.
func (s *scheduler) look() {
	select {
	case s.wake <- struct{}{}:
	default:
	}
}

// since says that a schedule has no slots to make up for from before t.
func (s *scheduler) since(ref xapi.Ref[xapi.VMSS], t time.Time) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.mu.since[ref], s.mu.resumed[ref] = t, true
}

// forget drops what is known of a schedule that is gone.
func (s *scheduler) forget(ref xapi.Ref[xapi.VMSS]) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.mu.since, ref)
	delete(s.mu.resumed, ref)
}

// loop runs until the API closes.
func (s *scheduler) loop() {
	a := s.api
	for {
		now := a.now()
		next := s.pass(now)
		timer := time.NewTimer(min(max(next.Sub(now), time.Second), schedulePoll))
		select {
		case <-a.ctx.Done():
			timer.Stop()
			return
		case <-timer.C:
		case <-s.wake:
			timer.Stop()
		}
	}
}

// pass starts what is due now and returns when the next slot is.
func (s *scheduler) pass(now time.Time) (next time.Time) {
	a := s.api
	next = now.Add(schedulePoll)
	enabled := map[xapi.Ref[xapi.VMSS]]*xapi.VMSS{}
	_ = a.db.View(func(tx *db.Tx) error {
		for ref, v := range db.All[xapi.VMSS](tx) {
			if v.Enabled {
				enabled[ref] = v
			}
		}
		return nil
	})
	for ref, v := range enabled {
		plan, err := planOf(v)
		if err != nil { // a zone that this host no longer knows
			a.log.Error("a schedule cannot be followed", "vmss", v.UUID, "err", err)
			continue
		}
		if slot := plan.Next(now); slot.Before(next) {
			next = slot
		}
		if s.setBack(ref, v, plan, now) {
			continue
		}
		if d, ok := s.due(ref, v, plan, now); ok {
			a.background.Go(func() { s.follow(ref, plan, d) })
		}
	}
	return next
}

// dueSlot is a slot whose time has come.
type dueSlot struct {
	slot, now time.Time
	missed    int  // slots before it that nobody was there for
	resumed   bool // an earlier process has begun it
}

// due says whether a schedule has something to do.
func (s *scheduler) due(ref xapi.Ref[xapi.VMSS], v *xapi.VMSS, plan schedule.Schedule, now time.Time) (dueSlot, bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if _, seen := s.mu.since[ref]; !seen {
		since := time.Time{}
		if v.LastRunTime.Unix() <= 0 { // never before
			since, s.mu.resumed[ref] = now, true
		}
		s.mu.since[ref] = since
	}
	done := v.LastRunTime
	if since := s.mu.since[ref]; since.After(done) {
		done = since
	}
	d := dueSlot{slot: plan.Last(now), now: now}
	first := !s.mu.resumed[ref]
	s.mu.resumed[ref] = true
	if !d.slot.After(done) {
		d.resumed = true
		return d, first && !done.After(now)
	}
	for slot := plan.Last(d.slot.Add(-1)); slot.After(done) && d.missed < 1000; slot = plan.Last(slot.Add(-1)) {
		d.missed++
	}
	return d, true
}

// setBack reports whether the clock has been set back by more than the period of a schedule, which then begins anew.
func (s *scheduler) setBack(ref xapi.Ref[xapi.VMSS], v *xapi.VMSS, plan schedule.Schedule, now time.Time) bool {
	if v.LastRunTime.Sub(now) <= plan.Frequency.Period() {
		return false
	}
	s.api.log.Warn("the clock has been set back, a schedule begins anew", "vmss", v.UUID, "last_run_time", v.LastRunTime)
	s.since(ref, now)
	if err := s.setLastRun(ref, now); err != nil {
		s.api.log.Error("a schedule could not be set back", "vmss", ref, "err", err)
	}
	return true
}

func (s *scheduler) setLastRun(ref xapi.Ref[xapi.VMSS], now time.Time) error {
	return s.api.db.Update(s.api.ctx, func(tx *db.Tx) error {
		return db.Modify(tx, ref, func(v *xapi.VMSS) { v.LastRunTime = now.Truncate(time.Second) })
	})
}

// follow does what is due.
func (s *scheduler) follow(ref xapi.Ref[xapi.VMSS], plan schedule.Schedule, d dueSlot) {
	a := s.api
	var v *xapi.VMSS
	err := a.db.Update(a.ctx, func(tx *db.Tx) (err error) {
		if v, err = db.Get(tx, ref); err != nil {
			return errNothing // destroyed meanwhile
		}
		if d.resumed {
			return nil
		}
		if !v.LastRunTime.Before(d.slot) {
			return errNothing // another pass was here first
		}
		if d.missed > 0 {
			body := fmt.Sprintf("Nobody was there for %d slots. The one of %s is late and taken now.", d.missed, d.slot.In(plan.Zone).Format(slotLayout))
			if err := a.alert(tx, "VMSS_SNAPSHOT_MISSED_EVENT", xapi.ClsVMSS, v.UUID, body); err != nil {
				return err
			}
		}
		return db.Modify(tx, ref, func(v *xapi.VMSS) { v.LastRunTime = d.now.Truncate(time.Second) })
	})
	switch {
	case errors.Is(err, errNothing):
	case err != nil && a.ctx.Err() == nil:
		a.log.Error("a slot cannot begin and is tried again", "vmss", ref, "err", err)
	case err == nil:
		s.run(a.ctx, ref, v, plan, d.slot, withoutSnapshot)
	}
}

// slotLayout is how names and alerts spell a slot.
const slotLayout = "2006-01-02 15:04"

// runReport is what became of a run.
type runReport struct {
	taken  []string // uuids
	failed []vmFailure
}

type vmFailure struct {
	name, uuid string
	err        error
	locked     bool // the one before is still being taken
}

// selection says which VMs of a schedule a run is for.
type selection int

const (
	everyVM         selection = iota
	withoutSnapshot           // those that have no scheduled snapshot since the slot
)

// run takes a snapshot of each VM, side by side, because any may have to wait for its turn, and prunes those for
// which it could. It ends with the last of them and tells the outcome by an alert.
func (s *scheduler) run(ctx context.Context, ref xapi.Ref[xapi.VMSS], v *xapi.VMSS, plan schedule.Schedule, slot time.Time, which selection) runReport {
	a := s.api
	var vms []xapi.Ref[xapi.VM]
	_ = a.db.View(func(tx *db.Tx) error {
		for _, vm := range v.VMs {
			if which == everyVM || !hasScheduledSince(tx, vm, slot, a.now()) {
				vms = append(vms, vm)
			}
		}
		return nil
	})
	var mu sync.Mutex
	var r runReport
	var all sync.WaitGroup
	for _, vm := range vms {
		all.Go(func() {
			uuid, failed := s.snapshot(ctx, v, plan, slot, vm)
			mu.Lock()
			if failed != nil {
				r.failed = append(r.failed, *failed)
			} else if uuid != "" {
				r.taken = append(r.taken, uuid)
			}
			mu.Unlock()
			if failed == nil {
				s.prune(ctx, ref, vm)
			}
		})
	}
	all.Wait()
	slices.Sort(r.taken)
	slices.SortFunc(r.failed, func(x, y vmFailure) int { return cmp.Or(cmp.Compare(x.name, y.name), cmp.Compare(x.uuid, y.uuid)) })
	if a.ctx.Err() == nil { // else the next start completes it
		s.tell(v, plan, slot, r)
	}
	return r
}

// hasScheduledSince reports whether a VM has a scheduled snapshot from between two times.
func hasScheduledSince(tx *db.Tx, ref xapi.Ref[xapi.VM], slot, now time.Time) bool {
	vm, err := db.Get(tx, ref)
	if err != nil {
		return false
	}
	return slices.ContainsFunc(vm.Snapshots, func(r xapi.Ref[xapi.VM]) bool {
		snap, err := db.Get(tx, r)
		return err == nil && snap.IsVMSSSnapshot && !snap.SnapshotTime.Before(slot) && !snap.SnapshotTime.After(now)
	})
}

// snapshot takes the snapshot of one VM, as a task of its own, and returns its uuid. A VM that is gone, or follows
// another schedule by now, has neither snapshot nor failure.
func (s *scheduler) snapshot(ctx context.Context, v *xapi.VMSS, plan schedule.Schedule, slot time.Time, ref xapi.Ref[xapi.VM]) (uuid string, failed *vmFailure) {
	a := s.api
	var vm *xapi.VM
	_ = a.db.View(func(tx *db.Tx) (err error) {
		vm, err = db.Get(tx, ref)
		return err
	})
	if vm == nil {
		return "", nil
	}
	failure := func(err error) *vmFailure { return &vmFailure{name: vm.NameLabel, uuid: vm.UUID, err: err} }
	if !s.enter(s.mu.snapping, ref) {
		f := failure(xapi.NewError(xapi.ErrOperationNotAllowed, "The scheduled snapshot before this one is still being taken"))
		f.locked = true
		return "", f
	}
	defer s.leave(s.mu.snapping, ref)
	var snapshot xapi.Ref[xapi.VM]
	err := s.do(ctx, "Scheduled snapshot of "+vm.NameLabel, func(ctx context.Context, c *Call) (err error) {
		snapshot, err = a.snapshotVM(ctx, c, ref, snapshotOptions{
			name:       v.NameLabel + " " + slot.In(plan.Zone).Format(slotLayout),
			checkpoint: v.Type == xapi.VMSSTypeCheckpoint, scheduled: true,
		})
		return err
	})
	if err != nil {
		return "", failure(err)
	}
	_ = a.db.View(func(tx *db.Tx) error {
		if rec, err := db.Get(tx, snapshot); err == nil {
			uuid = rec.UUID
		}
		return nil
	})
	return uuid, nil
}

// do runs fn as a call with a task that everybody sees and may cancel. It also ends with ctx.
func (s *scheduler) do(ctx context.Context, label string, fn func(context.Context, *Call) error) error {
	a := s.api
	c, err := a.begin(a.ctx, Origin{Peer: "scheduler"}, s.session, "VMSS.snapshot_now")
	if err != nil {
		return err
	}
	unlink := context.AfterFunc(ctx, func() { c.cancel(context.Cause(ctx)) })
	defer unlink()
	if err = a.recordTask(c, label, "", xapi.NullRef); err == nil {
		err = fn(c.ctx, c)
	}
	return c.finish(Result{}, err)
}

// enter puts a VM into a set; false when it is there.
func (s *scheduler) enter(set map[xapi.Ref[xapi.VM]]bool, ref xapi.Ref[xapi.VM]) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if set[ref] {
		return false
	}
	set[ref] = true
	return true
}

func (s *scheduler) leave(set map[xapi.Ref[xapi.VM]]bool, ref xapi.Ref[xapi.VM]) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(set, ref)
}

// toldFailures is how many VMs an alert names.
const toldFailures = 20

// tell raises the alert about a run.
func (s *scheduler) tell(v *xapi.VMSS, plan schedule.Schedule, slot time.Time, r runReport) {
	a := s.api
	head := fmt.Sprintf("Schedule %q, slot %s: %d snapshots taken, %d failed.", v.NameLabel, slot.In(plan.Zone).Format(slotLayout), len(r.taken), len(r.failed))
	name := "VMSS_SNAPSHOT_SUCCEEDED"
	var body strings.Builder
	body.WriteString(head)
	if len(r.failed) > 0 {
		name = "VMSS_SNAPSHOT_FAILED"
		if !slices.ContainsFunc(r.failed, func(f vmFailure) bool { return !f.locked }) {
			name = "VMSS_SNAPSHOT_LOCK_FAILED"
		}
		for _, f := range r.failed[:min(len(r.failed), toldFailures)] {
			fmt.Fprintf(&body, "\n%s (%s): %s", f.name, f.uuid, strings.Join(a.apiError(f.err).Description(), " "))
		}
		if n := len(r.failed) - toldFailures; n > 0 {
			fmt.Fprintf(&body, "\nand %d more", n)
		}
	} else if len(r.taken) == 0 {
		return
	}
	err := a.db.Update(a.ctx, func(tx *db.Tx) error { return a.alert(tx, name, xapi.ClsVMSS, v.UUID, body.String()) })
	if err != nil && a.ctx.Err() == nil {
		a.log.Error("an alert could not be raised", "alert", name, "vmss", v.UUID, "body", body.String(), "err", err)
	}
}
