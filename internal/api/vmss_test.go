package api

import (
	"encoding/json"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"coppice/internal/claim"
	"coppice/internal/db"
	"coppice/internal/xapi"
)

// vmssArgs are the arguments of VMSS.create.
func vmssArgs(frequency string, schedule map[string]string) map[string]any {
	return map[string]any{
		"name_label": "nightly", "type": "snapshot", "frequency": frequency, "schedule": wireOf(schedule), "retained_snapshots": int64(2),
	}
}

// vmss makes a schedule that some VMs follow.
func (r *rig) vmss(args map[string]any, vms ...xapi.Ref[xapi.VM]) string {
	r.t.Helper()
	ref := string(r.call("VMSS.create", args).(xapi.Ref[xapi.VMSS]))
	for _, vm := range vms {
		r.call("VM.set_snapshot_schedule", vm, ref)
	}
	return ref
}

// scheduled returns the scheduled snapshots of a VM, by when they were taken.
func (r *rig) scheduled(vm xapi.Ref[xapi.VM]) map[string]xapi.Ref[xapi.VM] {
	r.t.Helper()
	found := map[string]xapi.Ref[xapi.VM]{}
	for _, ref := range record(r.core, vm).Snapshots {
		if s := record(r.core, ref); s.IsVMSSSnapshot {
			found[s.SnapshotTime.Format("02 15:04")] = ref
		}
	}
	return found
}

func (r *rig) wantScheduled(vm xapi.Ref[xapi.VM], want ...string) {
	r.t.Helper()
	synctest.Wait()
	if got := slices.Sorted(maps.Keys(r.scheduled(vm))); !slices.Equal(got, want) {
		r.t.Errorf("scheduled snapshots of %q, want %q", got, want)
	}
}

// alerts returns the names of the alerts about an object, sorted.
func (r *rig) alerts(class, uuid string) []string {
	r.t.Helper()
	names := []string{}
	for _, m := range r.call("message.get", class, uuid, "19700101T00:00:00Z").(messages) {
		names = append(names, m.Name)
	}
	slices.Sort(names)
	return names
}

func (r *rig) vmssRecord(ref string) *xapi.VMSS {
	r.t.Helper()
	return record(r.core, xapi.Ref[xapi.VMSS](ref))
}

// vmWithDisk makes a VM with a disk.
func (r *rig) vmWithDisk(name string) xapi.Ref[xapi.VM] {
	r.t.Helper()
	vm := r.vm(name)
	r.vbd(vm, r.disk(4<<20), "0", "RW")
	return vm
}

func TestVMSSMessages(t *testing.T) {
	r := newRig(t)
	for want, change := range map[string]map[string]any{
		"INVALID_VALUE|frequency|yearly":                        {"frequency": "yearly"},
		"INVALID_VALUE|retained_snapshots|0":                    {"retained_snapshots": int64(0)},
		"INVALID_VALUE|retained_snapshots|11":                   {"retained_snapshots": int64(11)},
		"INVALID_VALUE|schedule:min|20":                         {"schedule": wireOf(map[string]string{"min": "20"})},
		"INVALID_VALUE|schedule:hour|24":                        {"schedule": wireOf(map[string]string{"hour": "24"})},
		"INVALID_VALUE|schedule:days|Someday":                   {"schedule": wireOf(map[string]string{"days": "Someday"})},
		"INVALID_VALUE|schedule:days|":                          {"frequency": "weekly"},
		"INVALID_VALUE|schedule:why|not":                        {"schedule": wireOf(map[string]string{"why": "not"})},
		"INVALID_VALUE|schedule:coppice:timezone|Mars/Olympus":  {"schedule": wireOf(map[string]string{"coppice:timezone": "Mars/Olympus"})},
		"VALUE_NOT_SUPPORTED|type|snapshot_with_quiesce":        {"type": "snapshot_with_quiesce"},
		"INVALID_VALUE|schedule:coppice:keep-daily|many":        {"schedule": wireOf(map[string]string{"coppice:keep-daily": "many"})},
		"INVALID_VALUE|schedule:coppice:keep-centuries|1000000": {"schedule": wireOf(map[string]string{"coppice:keep-centuries": "1000000"})},
	} {
		args := vmssArgs("daily", nil)
		maps.Copy(args, change)
		r.wantFailure(want, r.root, "VMSS.create", args)
	}
	if n := len(r.call("VMSS.get_all").([]string)); n != 0 {
		t.Errorf("%d schedules after refused ones", n)
	}

	vm := r.vm("vm")
	ref := r.vmss(vmssArgs("daily", map[string]string{"hour": "3", "min": "30"}), vm)
	got := r.vmssRecord(ref)
	if !got.Enabled || got.RetainedSnapshots != 2 || got.LastRunTime.Unix() != 0 || !slices.Equal(got.VMs, []xapi.Ref[xapi.VM]{vm}) {
		t.Errorf("new schedule: %+v", got)
	}
	r.wantFailure("INVALID_VALUE|schedule:days|", r.root, "VMSS.set_frequency", ref, "weekly")
	r.wantFailure("MAP_DUPLICATE_KEY|VMSS|schedule|"+ref+"|hour", r.root, "VMSS.add_to_schedule", ref, "hour", "4")
	r.call("VMSS.remove_from_schedule", ref, "hour")
	r.call("VMSS.add_to_schedule", ref, "hour", "4")
	r.call("VMSS.add_to_schedule", ref, "days", "Monday,Friday")
	r.wantFailure("INVALID_VALUE|schedule:min|5", r.root, "VMSS.set_schedule", ref, map[string]string{"min": "5"})
	r.call("VMSS.set_frequency", ref, "weekly")
	r.wantFailure("INVALID_VALUE|schedule:days|", r.root, "VMSS.remove_from_schedule", ref, "days")
	r.wantFailure("INVALID_VALUE|retained_snapshots|99", r.root, "VMSS.set_retained_snapshots", ref, 99)
	r.call("VMSS.set_retained_snapshots", ref, 10)
	r.wantFailure("VALUE_NOT_SUPPORTED|type", r.root, "VMSS.set_type", ref, "snapshot_with_quiesce")
	r.call("VMSS.set_type", ref, "checkpoint")
	r.wantFailure("RBAC_PERMISSION_DENIED", r.as("pool-admin"), "VMSS.set_last_run_time", ref, "20260101T00:00:00Z")
	want := &xapi.VMSS{Frequency: "weekly", RetainedSnapshots: 10, Type: "checkpoint"}
	got = r.vmssRecord(ref)
	if got.Frequency != want.Frequency || got.RetainedSnapshots != want.RetainedSnapshots || got.Type != want.Type ||
		!maps.Equal(got.Schedule, map[string]string{"hour": "4", "min": "30", "days": "Monday,Friday"}) {
		t.Errorf("changed schedule: %+v", got)
	}
	r.wantFailure("VMSS_HAS_VM", r.root, "VMSS.destroy", ref)
	r.call("VM.set_snapshot_schedule", vm, xapi.NullRef)
	r.call("VMSS.destroy", ref)
	r.wantFailure("HANDLE_INVALID|VMSS|"+ref, r.root, "VMSS.destroy", ref)
	r.wantFailure("HANDLE_INVALID|VMSS|"+ref, r.root, "VMSS.snapshot_now", ref)
	r.wantFailure("HANDLE_INVALID|VMSS|"+ref, r.root, "VMSS.set_schedule", ref, map[string]string{})
}

// The clock of these tests begins at midnight of a Saturday, UTC.
func TestScheduledSnapshots(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t)
		one, two := r.vmWithDisk("one"), r.vmWithDisk("two")
		other := r.vmWithDisk("other")
		ref := r.vmss(vmssArgs("hourly", map[string]string{"min": "15", "coppice:timezone": "UTC"}), one, two)
		byHand := r.call("VM.snapshot", one, "by hand").(xapi.Ref[xapi.VM])
		time.Sleep(20 * time.Minute)
		r.wantScheduled(one, "01 00:15")
		snap := record(r.core, r.scheduled(one)["01 00:15"])
		if snap.NameLabel != "nightly 2000-01-01 00:15" || !snap.IsASnapshot {
			t.Errorf("snapshot: %+v", snap)
		}
		time.Sleep(4 * time.Hour)
		for _, vm := range []xapi.Ref[xapi.VM]{one, two} {
			r.wantScheduled(vm, "01 03:15", "01 04:15")
		}
		r.wantScheduled(other)
		if record(r.core, byHand).NameLabel != "by hand" {
			t.Error("a snapshot that was taken by hand is gone")
		}
		// 3 disks, one snapshot by hand, two scheduled of each of two VMs.
		if n := len(r.disks(r.sr)); n != 3+1+4 {
			t.Errorf("%d disks, want 8: pruned snapshots leave theirs", n)
		}
		uuid := r.vmssRecord(ref).UUID
		if got := r.alerts("VMSS", uuid); !slices.Equal(got, slices.Repeat([]string{"VMSS_SNAPSHOT_SUCCEEDED"}, 5)) {
			t.Errorf("alerts %q", got)
		}
		if got := r.vmssRecord(ref).LastRunTime.Format("15:04"); got != "04:15" {
			t.Errorf("last_run_time %s", got)
		}

		// Disabled, it does nothing, and nothing is made up for later.
		r.call("VMSS.set_enabled", ref, false)
		time.Sleep(3 * time.Hour)
		r.call("VMSS.set_enabled", ref, true)
		r.wantScheduled(one, "01 03:15", "01 04:15")
		time.Sleep(time.Hour)
		r.wantScheduled(one, "01 04:15", "01 08:15")

		// A new time of day that is over for today begins tomorrow.
		r.call("VMSS.set_schedule", ref, map[string]string{"hour": "1"})
		r.call("VMSS.set_frequency", ref, "daily")
		time.Sleep(12 * time.Hour)
		r.wantScheduled(one, "01 04:15", "01 08:15")
		time.Sleep(6 * time.Hour)
		r.wantScheduled(one, "01 08:15", "02 01:00")
		r.wantConsistent()
	})
}

func TestScheduleSurvivesRestart(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t)
		vm := r.vmWithDisk("vm")
		ref := r.vmss(vmssArgs("hourly", nil), vm)
		uuid := r.vmssRecord(ref).UUID
		r.call("VMSS.set_retained_snapshots", ref, 10)
		time.Sleep(90 * time.Minute)
		r.wantScheduled(vm, "01 01:00")

		r.restart() // in the middle of an hour: nothing is due
		time.Sleep(time.Minute)
		r.wantScheduled(vm, "01 01:00")

		r.stop(t)
		time.Sleep(3 * time.Hour)
		r.start(t) // at 04:31, and 02:00, 03:00, 04:00 were missed
		time.Sleep(time.Minute)
		r.wantScheduled(vm, "01 01:00", "01 04:31")
		want := []string{"VMSS_SNAPSHOT_MISSED_EVENT", "VMSS_SNAPSHOT_SUCCEEDED", "VMSS_SNAPSHOT_SUCCEEDED"}
		if got := r.alerts("VMSS", uuid); !slices.Equal(got, want) {
			t.Errorf("alerts %q, want %q", got, want)
		}
		time.Sleep(30 * time.Minute)
		r.wantScheduled(vm, "01 01:00", "01 04:31", "01 05:00")

		// A run that was cut off: its slot has begun, the second VM has nothing.
		late := r.vmWithDisk("late")
		r.call("VM.set_snapshot_schedule", late, ref)
		r.restart()
		time.Sleep(time.Minute)
		r.wantScheduled(vm, "01 01:00", "01 04:31", "01 05:00")
		r.wantScheduled(late, "01 05:02")
	})
}

// The clock of the host is set.
func TestScheduleAndClockChanges(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t)
		var shift atomic.Int64 // of the clock, nanoseconds
		r.stop(t)
		r.adjust = func(c *Config) { c.Now = func() time.Time { return time.Now().Add(time.Duration(shift.Load())) } }
		r.start(t)
		vm := r.vmWithDisk("vm")
		ref := r.vmss(vmssArgs("hourly", nil), vm)
		r.call("VMSS.set_retained_snapshots", ref, 10)
		time.Sleep(61 * time.Minute)
		r.wantScheduled(vm, "01 01:00")
		synctest.Wait()
		shift.Store(int64(-10 * time.Minute)) // it is 00:51 again
		time.Sleep(30 * time.Minute)
		r.wantScheduled(vm, "01 01:00")
		time.Sleep(60 * time.Minute) // 02:21
		r.wantScheduled(vm, "01 01:00", "01 02:00")
		synctest.Wait()
		shift.Store(int64(3*time.Hour - 10*time.Minute)) // 05:21
		time.Sleep(time.Minute)
		r.wantScheduled(vm, "01 01:00", "01 02:00", "01 05:21")
		synctest.Wait()
		shift.Store(int64(-10 * time.Minute)) // 02:22, more than an hour back: it had been wrong
		time.Sleep(40 * time.Minute)
		r.wantScheduled(vm, "01 01:00", "01 02:00", "01 03:00", "01 05:21")
	})
}

// Over the changes to summer time and back, in a zone that is not the host's:
// each slot once.
func TestScheduleDaylightSaving(t *testing.T) {
	for _, tt := range []struct {
		begin time.Time
		want  []string
	}{
		{time.Date(2000, 3, 24, 0, 0, 0, 0, time.UTC), []string{"24 01:30", "25 01:30", "26 01:00", "27 00:30"}},   // 26 March has no 02:30
		{time.Date(2000, 10, 27, 12, 0, 0, 0, time.UTC), []string{"28 00:30", "29 00:30", "30 01:30", "31 01:30"}}, // 29 October has two
	} {
		synctest.Test(t, func(t *testing.T) {
			r := newRig(t)
			shift := time.Until(tt.begin)
			r.stop(t)
			r.adjust = func(c *Config) { c.Now = func() time.Time { return time.Now().Add(shift) } }
			r.start(t)
			vm := r.vmWithDisk("vm")
			ref := r.vmss(vmssArgs("daily", map[string]string{"hour": "2", "min": "30", "coppice:timezone": "Europe/Berlin"}), vm)
			r.call("VMSS.set_retained_snapshots", ref, 4)
			time.Sleep(4 * 24 * time.Hour)
			if r.root, _ = r.Login(t.Context(), trusted, "root", "any"); r.root == "" {
				t.Fatal("no session")
			}
			r.wantScheduled(vm, tt.want...)
		})
	}
}

func TestScheduleFailures(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t)
		good, bad, busy := r.vmWithDisk("good"), r.vm("bad"), r.vmWithDisk("busy")
		args := diskArgs(r.sr, 4<<20)
		args["sharable"] = true
		shared := r.call("VDI.create", args).(xapi.Ref[xapi.VDI])
		r.vbd(bad, shared, "0", "RW")
		ref := r.vmss(vmssArgs("hourly", nil), good, bad, busy)
		uuid := r.vmssRecord(ref).UUID
		release := r.occupy(busy)
		time.Sleep(61 * time.Minute)
		r.wantScheduled(good, "01 01:00")
		if got := r.alerts("VMSS", uuid); len(got) != 0 {
			t.Errorf("alerts while the run goes on: %q", got)
		}
		time.Sleep(time.Hour) // the next slot comes while busy still waits
		r.wantScheduled(good, "01 01:00", "01 02:00")
		r.wantScheduled(bad)
		release()
		synctest.Wait()
		if got := slices.Sorted(maps.Keys(r.scheduled(busy))); len(got) != 1 {
			t.Errorf("busy has %q", got)
		}
		got := map[string]string{}
		for _, m := range r.call("message.get", "VMSS", uuid, "19700101T00:00:00Z").(messages) {
			if m.Name != "VMSS_SNAPSHOT_FAILED" {
				t.Errorf("alert %s", m.Name)
			}
			got[strings.Split(m.Body, "\n")[0]] = m.Body
		}
		first, second := got[`Schedule "nightly", slot 2000-01-01 01:00: 2 snapshots taken, 1 failed.`], got[`Schedule "nightly", slot 2000-01-01 02:00: 1 snapshots taken, 2 failed.`]
		if !strings.Contains(first, "VDI_IS_SHARABLE") || !strings.Contains(second, "still being taken") {
			t.Errorf("alerts %q", got)
		}
		r.wantFailure("VDI_IS_SHARABLE|"+string(shared), r.root, "VMSS.snapshot_now", ref)
	})
}

// occupy claims a VM so that nothing else may happen to it until release.
func (r *rig) occupy(vm xapi.Ref[xapi.VM]) (release func()) {
	r.t.Helper()
	c, err := r.begin(r.t.Context(), trusted, nil, "test")
	if err != nil {
		r.t.Fatal(err)
	}
	if _, err := c.Claim(c.ctx, nil, claim.On(vm, xapi.VMOperationsDestroy)); err != nil {
		r.t.Fatal(err)
	}
	return func() { c.end(Result{}, nil) }
}

func TestHoldAndPreview(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t)
		vm := r.vmWithDisk("vm")
		args := vmssArgs("hourly", map[string]string{"coppice:keep-daily": "2"})
		args["retained_snapshots"] = int64(1)
		ref := r.vmss(args, vm)
		time.Sleep(61 * time.Minute)
		first := r.scheduled(vm)["01 01:00"]
		r.call("VM.add_to_other_config", first, holdKey, "court case")
		r.wantFailure("OPERATION_BLOCKED|"+string(first)+"|coppice:hold: court case", r.root, "VM.destroy", first)
		if slices.Contains(record(r.core, first).AllowedOperations, xapi.VMOperationsDestroy) {
			t.Error("destroy is allowed for a VM on hold")
		}
		time.Sleep(time.Hour)
		disk := r.disksOfVM(r.scheduled(vm)["01 02:00"])[0]
		r.call("VDI.add_to_other_config", disk, holdKey, "audit")
		r.wantFailure("OPERATION_BLOCKED|"+string(disk)+"|coppice:hold: audit", r.root, "VDI.destroy", disk)
		time.Sleep(2 * time.Hour)
		r.wantScheduled(vm, "01 01:00", "01 02:00", "01 04:00")

		// A VM on hold keeps them all.
		r.call("VM.add_to_other_config", vm, holdKey, "")
		time.Sleep(time.Hour)
		r.wantScheduled(vm, "01 01:00", "01 02:00", "01 04:00", "01 05:00")
		if _, copied := record(r.core, r.scheduled(vm)["01 05:00"]).OtherConfig[holdKey]; copied {
			t.Error("a hold is copied to a snapshot")
		}
		r.call("VM.remove_from_other_config", vm, holdKey)

		text := r.call("host.call_plugin", r.host, "coppice", "vmss-preview", map[string]string{"vmss": r.vmssRecord(ref).UUID}).(string)
		var lines []struct {
			Snapshots []struct {
				Name string   `json:"name_label"`
				Goes bool     `json:"goes"`
				Keep []string `json:"kept_by"`
				Hold string   `json:"hold"`
			} `json:"snapshots"`
		}
		if err := json.Unmarshal([]byte(text), &lines); err != nil || len(lines) != 1 {
			t.Fatalf("preview %s: %v", text, err)
		}
		want := `[{nightly 2000-01-01 05:00 false [last 1 daily 2000-01-01] } {nightly 2000-01-01 04:00 true [] } ` +
			`{nightly 2000-01-01 02:00 false [] audit} {nightly 2000-01-01 01:00 false [] court case}]`
		if got := fmt.Sprint(lines[0].Snapshots); got != want {
			t.Errorf("preview\n got %s\nwant %s", got, want)
		}
		r.wantScheduled(vm, "01 01:00", "01 02:00", "01 04:00", "01 05:00")
		r.wantFailure("UUID_INVALID|VMSS|", r.root, "host.call_plugin", r.host, "coppice", "vmss-preview", map[string]string{})
		r.wantFailure("XENAPI_PLUGIN_FAILURE", r.root, "host.call_plugin", r.host, "coppice", "dance", map[string]string{})
		r.wantFailure("XENAPI_MISSING_PLUGIN|other", r.root, "host.call_plugin", r.host, "other", "x", map[string]string{})

		// The last snapshot of yesterday stays by its tier.
		for range 2 {
			time.Sleep(12 * time.Hour)
			r.call("pool.get_all") // or the session ends
		}
		r.wantScheduled(vm, "01 01:00", "01 02:00", "01 23:00", "02 05:00")

		// By hand, beside the slots, and pruned like them.
		time.Sleep(10 * time.Minute)
		got := r.call("VMSS.snapshot_now", ref).(string)
		r.wantScheduled(vm, "01 01:00", "01 02:00", "01 23:00", "02 05:11")
		if want := record(r.core, r.scheduled(vm)["02 05:11"]).UUID; got != want {
			t.Errorf("snapshot_now returned %q, want %q", got, want)
		}
		r.call("VM.remove_from_other_config", first, holdKey)
		r.call("VM.destroy", first)
		r.wantConsistent()
	})
}

// A snapshot goes with its disks or stays with them.
func TestPruneIsWhole(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t)
		vm := r.vmWithDisk("vm")
		args := vmssArgs("hourly", nil)
		args["retained_snapshots"] = int64(1)
		ref := r.vmss(args, vm)
		time.Sleep(61 * time.Minute)
		disk := r.disksOfVM(r.scheduled(vm)["01 01:00"])[0]

		// Somebody reads the disk: the snapshot has to wait for the next slot.
		reader := r.vbd(r.dom0, disk, "autodetect", "RO")
		set(r, reader, func(b *xapi.VBD) { b.CurrentlyAttached = true })
		time.Sleep(time.Hour)
		r.wantScheduled(vm, "01 01:00", "01 02:00")
		if got := r.disksOfVM(r.scheduled(vm)["01 01:00"]); !slices.Equal(got, []xapi.Ref[xapi.VDI]{disk}) {
			t.Errorf("the snapshot has the disks %q", got)
		}
		if got := r.alerts("VMSS", r.vmssRecord(ref).UUID); !slices.Contains(got, "VMSS_SNAPSHOT_FAILED") {
			t.Errorf("alerts %q", got)
		}
		set(r, reader, func(b *xapi.VBD) { b.CurrentlyAttached = false })
		time.Sleep(time.Hour)
		r.wantScheduled(vm, "01 03:00")
		if _, err := r.try(r.root, "VDI.get_uuid", disk); code(err) != "HANDLE_INVALID" {
			t.Errorf("the disk of a pruned snapshot: %v", err)
		}

		// What a checkpoint says of its own devices is not in the way.
		r.call("VMSS.set_type", ref, "checkpoint")
		r.suspend(vm)
		for _, b := range record(r.core, vm).VBDs {
			set(r, b, func(b *xapi.VBD) { b.CurrentlyAttached = true })
		}
		time.Sleep(2 * time.Hour)
		r.wantScheduled(vm, "01 05:00")
		r.wantConsistent()
	})
}

// disksOfVM returns the disks of a VM.
func (r *rig) disksOfVM(vm xapi.Ref[xapi.VM]) (disks []xapi.Ref[xapi.VDI]) {
	r.t.Helper()
	r.view(func(tx *db.Tx) {
		v, err := db.Get(tx, vm)
		if err != nil {
			r.t.Fatal(err)
		}
		for _, b := range v.VBDs {
			if vbd, err := db.Get(tx, b); err == nil {
				disks = append(disks, vbd.VDI)
			}
		}
	})
	return disks
}
