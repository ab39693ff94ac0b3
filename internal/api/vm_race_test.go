package api

import (
	"fmt"
	"maps"
	"slices"
	"sync"
	"testing"

	"coppice/internal/db"
	"coppice/internal/xapi"
)

// Events come for both sides of each relation that a snapshot, a revert and a
// destroy change.
func TestVMSnapshotEvents(t *testing.T) {
	r := newRig(t)
	vm, disks := r.guest("guest")
	token := r.from("", 0, "*").Token
	seen := func() map[string]string {
		batch := r.from(token, 1, "VM", "VDI", "VBD", "VIF", "SR", "VM_metrics", "message")
		token = batch.Token
		got := map[string]string{}
		for _, e := range batch.Events {
			got[e.Ref] = string(e.Operation)
		}
		return got
	}
	expect := func(got map[string]string, what, op string, refs ...string) {
		t.Helper()
		for _, ref := range refs {
			if got[ref] != op {
				t.Errorf("%s %s: %q, want %q", what, ref, got[ref], op)
			}
		}
	}
	snap := r.call("VM.snapshot", vm, "snap").(vmRef)
	got := seen()
	made := record(r.core, snap)
	expect(got, "the VM and the SR", "mod", string(vm), string(r.sr))
	expect(got, "the disks", "mod", string(disks[0]), string(disks[1]))
	expect(got, "the CD", "mod", string(r.vbdsOf(vm)["3"].VDI))
	expect(got, "the snapshot", "add", string(snap), string(made.Metrics))
	for _, b := range made.VBDs {
		expect(got, "a VBD", "add", string(b))
		if vbd := record(r.core, b); vbd.Type == xapi.VBDTypeDisk {
			expect(got, "a disk", "add", string(vbd.VDI))
		}
	}
	expect(got, "a VIF", "add", string(made.VIFs[0]))

	r.call("VM.revert", snap)
	got = seen()
	expect(got, "after the revert", "mod", string(vm), string(snap))

	r.call("VM.destroy", snap)
	got = seen()
	expect(got, "destroyed", "del", string(snap), string(made.VBDs[0]), string(made.VIFs[0]), string(made.Metrics))
	expect(got, "beside it", "mod", string(vm), string(r.vbdsOf(vm)["3"].VDI))
}

// Two callers on one VM: one of the allowed outcomes for each, no deadlock,
// nothing left over.
func TestVMRaces(t *testing.T) {
	messages := map[string]func(vm, snap vmRef) []any{
		"VM.snapshot":  func(vm, snap vmRef) []any { return []any{vm, "raced"} },
		"VM.clone":     func(vm, snap vmRef) []any { return []any{vm, "raced"} },
		"VM.copy":      func(vm, snap vmRef) []any { return []any{vm, "raced", xapi.NullRef} },
		"VM.revert":    func(vm, snap vmRef) []any { return []any{snap} },
		"VM.destroy":   func(vm, snap vmRef) []any { return []any{vm} },
		"VDI.destroy":  func(vm, snap vmRef) []any { return []any{"disk"} },
		"VDI.snapshot": func(vm, snap vmRef) []any { return []any{"disk"} },
	}
	// What may become of a message that another one got ahead of.
	allowed := []string{"", "HANDLE_INVALID", "VM_REVERT_FAILED", "OTHER_OPERATION_IN_PROGRESS", "VDI_IN_USE", "OPERATION_NOT_ALLOWED"}
	names := slices.Sorted(maps.Keys(messages))
	for _, undo := range []string{"false", "true"} {
		for i, one := range names {
			for _, two := range names[i:] {
				t.Run(fmt.Sprintf("%s and %s, undo %s", one, two, undo), func(t *testing.T) {
					r := newRig(t)
					r.choose(undoKey, undo)
					vm, disks := r.guest("guest")
					snap := r.call("VM.snapshot", vm, "snap").(vmRef)
					var all sync.WaitGroup
					for _, name := range []string{one, two, one, two} {
						all.Go(func() {
							params := messages[name](vm, snap)
							if params[0] == "disk" {
								params[0] = disks[0]
							}
							if _, err := r.try(r.root, name, params...); !slices.Contains(allowed, code(err)) {
								t.Errorf("%s: %v", name, err)
							}
						})
					}
					all.Wait()
					r.view(func(tx *db.Tx) {
						for ref, vm := range db.All[xapi.VM](tx) {
							if len(vm.CurrentOperations) > 0 {
								t.Errorf("VM %s has current_operations %v", ref, vm.CurrentOperations)
							}
							if want := r.allowedVMOps(tx, ref); !slices.Equal(vm.AllowedOperations, want) {
								t.Errorf("VM %s: allowed_operations %q, the rules say %q", ref, vm.AllowedOperations, want)
							}
							for _, b := range vm.VBDs {
								if vbd, err := db.Get(tx, b); err != nil {
									t.Errorf("VBD of %s: %v", vm.NameLabel, err)
								} else if _, err := db.Get(tx, vbd.VDI); !vbd.Empty && err != nil {
									t.Errorf("VDI of %s: %v", vm.NameLabel, err)
								}
							}
						}
					})
					r.wantConsistent()
				})
			}
		}
	}
}

// The choice how to revert shows at once in what SRs and drivers say of
// themselves, and goes away with the key; the server's own flag holds anyway.
func TestRevertChoice(t *testing.T) {
	r := newRig(t)
	features := func() (sm, sr bool) {
		r.view(func(tx *db.Tx) {
			for _, rec := range db.All[xapi.SM](tx) {
				_, sm = rec.Features["VDI_REVERT"]
				sm = sm && slices.Contains(rec.Capabilities, "VDI_REVERT")
			}
		})
		return sm, slices.Contains(record(r.core, r.sr).AllowedOperations, xapi.StorageOperationsVDIRevert)
	}
	expect := func(what string, want bool) {
		t.Helper()
		if sm, sr := features(); sm != want || sr != want {
			t.Errorf("%s: SM %v, SR %v, want %v", what, sm, sr, want)
		}
	}
	expect("at first", true)
	r.choose(revertKey, revertClone)
	expect("by clone", false)
	r.restart()
	expect("after a restart", false)
	r.call("pool.remove_from_other_config", r.pool, revertKey)
	expect("in place again", true)
	r.adjust = func(c *Config) { c.RevertByClone = true }
	r.restart()
	expect("by the flag", false)
	r.choose(revertKey, "whatever")
	expect("by the flag, whatever the key says", false)
	r.wantConsistent()
}

// A VM that is declared a snapshot, as tools do that bring snapshots from
// elsewhere, counts as one and can be reverted to.
func TestVMUpdateSnapshotMetadata(t *testing.T) {
	r := newRig(t)
	vm, disks := r.guest("guest")
	other := r.call("VM.clone", vm, "brought").(vmRef)
	r.call("VM.update_snapshot_metadata", other, vm, "20260101T00:00:00Z", "id")
	got := record(r.core, other)
	if !got.IsASnapshot || got.SnapshotOf != vm || got.SnapshotTime.Year() != 2026 || got.TransportableSnapshotID != "id" {
		t.Errorf("VM %+v", got)
	}
	if snaps := record(r.core, vm).Snapshots; !slices.Equal(snaps, []vmRef{other}) {
		t.Errorf("snapshots %q", snaps)
	}
	if _, err := r.try(r.root, "VM.update_snapshot_metadata", r.dom0, vm, "20260101T00:00:00Z", ""); code(err) != "OPERATION_NOT_ALLOWED" {
		t.Errorf("dom0: %v", err)
	}
	r.call("VM.set_name_label", vm, "own name")
	r.call("VM.revert", other)
	back := record(r.core, vm)
	if back.NameLabel != "own name" || back.IsASnapshot || back.IsATemplate || back.Parent != other {
		t.Errorf("VM %+v", back)
	}
	if now := r.vbdsOf(vm)["0"].VDI; now == disks[0] || now == r.vbdsOf(other)["0"].VDI {
		t.Errorf("disk %s, of the snapshot %s", now, r.vbdsOf(other)["0"].VDI)
	}
	if boot := r.call("VM.get_boot_record", vm).(*xapi.VM); boot.UUID != back.UUID {
		t.Errorf("boot record %+v", boot)
	}
	r.wantConsistent()
}
