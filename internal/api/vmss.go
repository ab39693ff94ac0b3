package api

import (
	"context"
	"errors"
	"maps"
	"strconv"
	"strings"
	"time"

	"coppice/internal/db"
	"coppice/internal/schedule"
	"coppice/internal/xapi"
)

func vmssMethods() map[string]any {
	return map[string]any{
		"VMSS.create":                 (*API).vmssCreate,
		"VMSS.destroy":                (*API).vmssDestroy,
		"VMSS.snapshot_now":           (*API).vmssSnapshotNow,
		"VMSS.set_enabled":            (*API).vmssSetEnabled,
		"VMSS.set_type":               (*API).vmssSetType,
		"VMSS.set_frequency":          (*API).vmssSetFrequency,
		"VMSS.set_schedule":           (*API).vmssSetSchedule,
		"VMSS.add_to_schedule":        (*API).vmssAddToSchedule,
		"VMSS.remove_from_schedule":   (*API).vmssRemoveFromSchedule,
		"VMSS.set_retained_snapshots": (*API).vmssSetRetainedSnapshots,
		"VMSS.set_last_run_time":      (*API).vmssSetLastRunTime,
	}
}

// retainedMost is the most snapshots of a VM that retained_snapshots keeps. Tiers may keep more.
const retainedMost = 10

// planOf reads when a VMSS takes its snapshots and what it keeps of them. What is wrong with its fields is
// INVALID_VALUE or VALUE_NOT_SUPPORTED.
func planOf(v *xapi.VMSS) (schedule.Schedule, error) {
	if v.Type == xapi.VMSSTypeSnapshotWithQuiesce {
		return schedule.Schedule{}, xapi.NewError(xapi.ErrValueNotSupported, "type", string(v.Type), "Quiesced snapshots no longer exist")
	}
	if v.RetainedSnapshots < 1 || v.RetainedSnapshots > retainedMost {
		return schedule.Schedule{}, invalidValue("retained_snapshots", strconv.FormatInt(v.RetainedSnapshots, 10))
	}
	plan, err := schedule.Parse(schedule.Frequency(v.Frequency), v.Schedule, time.Local)
	if bad, ok := errors.AsType[*schedule.ValueError](err); ok {
		return plan, invalidValue("schedule:"+bad.Key, bad.Value)
	}
	plan.Keep.Last = int(v.RetainedSnapshots)
	return plan, err
}

func (a *API) vmssCreate(ctx context.Context, c *Call, args *xapi.VMSS) (ref xapi.Ref[xapi.VMSS], err error) {
	args.UUID, args.LastRunTime = "", time.Unix(0, 0).UTC()
	if _, err := planOf(args); err != nil {
		return "", err
	}
	ref = xapi.NewRef[xapi.VMSS]()
	a.scheduler.since(ref, a.now())
	err = a.db.Update(ctx, func(tx *db.Tx) error { return db.InsertAs(tx, ref, args) })
	if err != nil {
		a.scheduler.forget(ref)
		return "", err
	}
	a.scheduler.look()
	return ref, nil
}

// vmssDestroy removes a schedule that no VM follows. The snapshots it took stay.
func (a *API) vmssDestroy(ctx context.Context, c *Call, ref xapi.Ref[xapi.VMSS]) error {
	err := a.db.Update(ctx, func(tx *db.Tx) error {
		v, err := db.Get(tx, ref)
		if err != nil {
			return err
		}
		if len(v.VMs) > 0 {
			return xapi.NewError(xapi.ErrVMSSHasVM)
		}
		return db.Delete(tx, ref)
	})
	if err == nil {
		a.scheduler.forget(ref)
	}
	return err
}

// changeVMSS changes a schedule if it is a valid one afterwards.
func (a *API) changeVMSS(ctx context.Context, ref xapi.Ref[xapi.VMSS], change func(*xapi.VMSS) error) error {
	return a.restartVMSS(ctx, ref, func(v *xapi.VMSS) error {
		if err := change(v); err != nil {
			return err
		}
		_, err := planOf(v)
		return err
	})
}

// restartVMSS changes a schedule. Slots that it would have had before now are not made up for: the scheduler knows
// that before it can see the change.
func (a *API) restartVMSS(ctx context.Context, ref xapi.Ref[xapi.VMSS], change func(*xapi.VMSS) error) error {
	err := a.db.Update(ctx, func(tx *db.Tx) error {
		var failed error
		err := db.Modify(tx, ref, func(v *xapi.VMSS) { failed = change(v) })
		if err := cmpErr(failed, err); err != nil {
			return err
		}
		a.scheduler.since(ref, a.now())
		return nil
	})
	if err == nil {
		a.scheduler.look()
	}
	return err
}

// vmssSetEnabled switches a schedule on or off, also one that cannot be followed.
func (a *API) vmssSetEnabled(ctx context.Context, c *Call, ref xapi.Ref[xapi.VMSS], value bool) error {
	return a.restartVMSS(ctx, ref, func(v *xapi.VMSS) error {
		v.Enabled = value
		return nil
	})
}

func (a *API) vmssSetType(ctx context.Context, c *Call, ref xapi.Ref[xapi.VMSS], value xapi.VMSSType) error {
	return a.changeVMSS(ctx, ref, func(v *xapi.VMSS) error {
		v.Type = value
		return nil
	})
}

func (a *API) vmssSetFrequency(ctx context.Context, c *Call, ref xapi.Ref[xapi.VMSS], value xapi.VMSSFrequency) error {
	return a.changeVMSS(ctx, ref, func(v *xapi.VMSS) error {
		v.Frequency = value
		return nil
	})
}

func (a *API) vmssSetSchedule(ctx context.Context, c *Call, ref xapi.Ref[xapi.VMSS], value map[string]string) error {
	return a.changeVMSS(ctx, ref, func(v *xapi.VMSS) error {
		v.Schedule = maps.Clone(value)
		return nil
	})
}

func (a *API) vmssAddToSchedule(ctx context.Context, c *Call, ref xapi.Ref[xapi.VMSS], key, value string) error {
	return a.changeVMSS(ctx, ref, func(v *xapi.VMSS) error {
		if _, ok := v.Schedule[key]; ok {
			return duplicateKey("VMSS", "schedule", string(ref), key)
		}
		v.Schedule[key] = value
		return nil
	})
}

func (a *API) vmssRemoveFromSchedule(ctx context.Context, c *Call, ref xapi.Ref[xapi.VMSS], key string) error {
	return a.changeVMSS(ctx, ref, func(v *xapi.VMSS) error {
		delete(v.Schedule, key)
		return nil
	})
}

func (a *API) vmssSetRetainedSnapshots(ctx context.Context, c *Call, ref xapi.Ref[xapi.VMSS], value int64) error {
	return a.changeVMSS(ctx, ref, func(v *xapi.VMSS) error {
		v.RetainedSnapshots = value
		return nil
	})
}

// vmssSetLastRunTime says that slots up to a time are done.
func (a *API) vmssSetLastRunTime(ctx context.Context, c *Call, ref xapi.Ref[xapi.VMSS], value time.Time) error {
	return a.db.Update(ctx, func(tx *db.Tx) error {
		return db.Modify(tx, ref, func(v *xapi.VMSS) { v.LastRunTime = value })
	})
}

// vmssSnapshotNow takes a snapshot of every VM of a schedule beside its slots, also when it is disabled, and prunes
// as after a slot. It returns the uuids of the snapshots, with commas between them. When some VMs fail the others
// are done all the same, and the error is that of the first.
func (a *API) vmssSnapshotNow(ctx context.Context, c *Call, ref xapi.Ref[xapi.VMSS]) (string, error) {
	var v *xapi.VMSS
	err := a.db.View(func(tx *db.Tx) (err error) {
		v, err = db.Get(tx, ref)
		return err
	})
	if err != nil {
		return "", err
	}
	plan, err := planOf(v)
	if err != nil {
		return "", err
	}
	r := a.scheduler.run(ctx, ref, v, plan, a.now(), everyVM)
	if len(r.failed) > 0 {
		return "", r.failed[0].err
	}
	return strings.Join(r.taken, ","), nil
}
