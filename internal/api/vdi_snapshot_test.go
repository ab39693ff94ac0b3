package api

import (
	"bytes"
	"slices"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"coppice/internal/xapi"
)

// derivedFields are the fields that a snapshot or clone shares with its
// source.
var derivedFields = cmpopts.IgnoreFields(xapi.VDI{}, "UUID", "Location", "IsASnapshot", "SnapshotOf", "SnapshotTime",
	"Snapshots", "VBDs", "AllowedOperations", "PhysicalUtilisation", "SMConfig", "ReadOnly")

func richDisk(r *rig) vdiRef {
	args := diskArgs(r.sr, 4<<20)
	args["name_label"], args["name_description"], args["type"] = "rich", "of fields", "system"
	args["other_config"] = map[string]any{"content_id": "1", "k": "v"}
	args["xenstore_data"] = map[string]any{"x": "y"}
	args["sm_config"] = map[string]any{"key": "value"}
	args["tags"] = []any{"b", "a"}
	ref := r.call("VDI.create", args).(vdiRef)
	r.call("VDI.set_allow_caching", ref, true)
	r.write(ref, []byte("first"), 1000)
	return ref
}

func TestVDISnapshot(t *testing.T) {
	r := newRig(t)
	src := richDisk(r)
	before := record(r.core, src)
	start := r.now().Truncate(time.Second)
	snap := r.call("VDI.snapshot", src, map[string]any{"type": "internal", "unknown": "key"}).(vdiRef)
	end := r.now()

	got := record(r.core, snap)
	if diff := cmp.Diff(before, got, derivedFields); diff != "" {
		t.Errorf("copied fields (-source +snapshot):\n%s", diff)
	}
	if !got.IsASnapshot || got.SnapshotOf != src || got.SnapshotTime.Before(start) || got.SnapshotTime.After(end) ||
		got.ReadOnly || got.UUID == before.UUID || got.Location != got.UUID || len(got.SMConfig) != 0 {
		t.Errorf("snapshot %+v", got)
	}
	after := record(r.core, src)
	if after.UUID != before.UUID || !slices.Equal(after.Snapshots, []vdiRef{snap}) {
		t.Errorf("source after: uuid %s, snapshots %q", after.UUID, after.Snapshots)
	}
	r.write(src, []byte("later"), 1000)
	if got := r.contents(snap)[1000:1005]; string(got) != "first" {
		t.Errorf("the snapshot sees %q", got)
	}
	if got := r.contents(src)[1000:1005]; string(got) != "later" {
		t.Errorf("the source has %q", got)
	}

	second := r.call("VDI.snapshot", snap).(vdiRef)
	if got := record(r.core, second); got.SnapshotOf != snap {
		t.Errorf("snapshot of a snapshot: snapshot_of %s, want the snapshot %s", got.SnapshotOf, snap)
	}
	r.wantConsistent()
}

func TestVDIClone(t *testing.T) {
	r := newRig(t)
	src := richDisk(r)
	snap := r.call("VDI.snapshot", src).(vdiRef)
	for _, from := range []vdiRef{src, snap} {
		clone := r.call("VDI.clone", from, map[string]any{}).(vdiRef)
		got := record(r.core, clone)
		if diff := cmp.Diff(record(r.core, from), got, derivedFields); diff != "" {
			t.Errorf("copied fields (-source +clone):\n%s", diff)
		}
		if got.IsASnapshot || !got.SnapshotOf.IsNull() || !got.SnapshotTime.Equal(time.Unix(0, 0)) {
			t.Errorf("clone: is_a_snapshot %v, snapshot_of %s, snapshot_time %v", got.IsASnapshot, got.SnapshotOf, got.SnapshotTime)
		}
		r.write(clone, []byte("mine"), 1000)
		if got := r.contents(from)[1000:1005]; string(got) != "first" {
			t.Errorf("writing to a clone changed its source to %q", got)
		}
	}
	r.wantConsistent()
}

func TestVDIRevert(t *testing.T) {
	r := newRig(t)
	disk := richDisk(r)
	uuid := record(r.core, disk).UUID
	old := r.call("VDI.snapshot", disk).(vdiRef)
	r.write(disk, []byte("newer"), 1000)
	newer := r.call("VDI.snapshot", disk).(vdiRef)
	r.call("VDI.resize", disk, 8<<20)

	r.call("VDI.revert", old)
	if got := r.contents(disk)[1000:1005]; string(got) != "first" {
		t.Errorf("after the revert: %q", got)
	}
	got := record(r.core, disk)
	if got.UUID != uuid || got.VirtualSize != 4<<20 || len(got.Snapshots) != 2 {
		t.Errorf("disk after the revert: %+v", got)
	}
	r.call("VDI.revert", newer)
	if got := r.contents(disk)[1000:1005]; string(got) != "newer" {
		t.Errorf("after going forward again: %q", got)
	}
	r.wantConsistent()

	r.fails("REVERT_ONLY_ALLOWED_ON_SNAPSHOT", "VDI.revert", disk)
	ofSnap := r.call("VDI.snapshot", old).(vdiRef)
	r.fails("VDI_READONLY|"+string(old), "VDI.revert", ofSnap)
	drop := r.repos.uses.add(disk, writing)
	r.fails("VDI_IN_USE|"+string(disk)+"|revert_from", "VDI.revert", old)
	drop()
	r.call("VDI.destroy", disk)
	r.fails("HANDLE_INVALID|VDI|"+string(disk), "VDI.revert", old)
}

// A revert that is to be undoable takes a snapshot first. The newest one of a
// disk is kept, also when it is reverted to; one that is on hold, or has been
// taken into use, stays.
func TestVDIRevertUndo(t *testing.T) {
	onWire(t, func(t *testing.T, w *wire) {
		disk := w.vdi("VDI.create", diskArgs(w.sr, 4<<20))
		w.write(disk, []byte("old"), 0)
		snap := w.vdi("VDI.snapshot", disk)
		w.call("VDI.set_name_label", snap, "snap")
		want := func(contents string, snapshots int) (undo vdiRef) {
			t.Helper()
			if got := w.contents(disk); !bytes.HasPrefix(got, []byte(contents)) {
				t.Errorf("contents %q, want %q", got[:8], contents)
			}
			if got := record(w.core, disk).Snapshots; len(got) != snapshots {
				t.Errorf("snapshots %q, want %d", got, snapshots)
			}
			w.wantConsistent()
			if snapshots > 1 {
				undo = w.undoOfDisk(disk)
			}
			return undo
		}
		w.call("VDI.revert", snap)
		want("old", 1)
		w.write(disk, []byte("new"), 0)
		w.call("VDI.resize", disk, 8<<20)
		w.call("session.add_to_other_config", string(w.root), undoKey, "true")

		w.call("VDI.revert", snap)
		first := want("old", 2)
		if got := record(w.core, first); got.NameLabel != "Before reverting to snap" || !got.IsASnapshot || got.VirtualSize != 8<<20 {
			t.Errorf("undo snapshot %+v", got)
		}
		w.call("VDI.revert", first) // undone
		second := want("new", 2)
		w.refuses("HANDLE_INVALID|VDI|"+string(first), "VDI.get_uuid", first)
		w.call("VDI.revert", second) // and redone
		third := want("old", 2)

		clone := w.vdi("VDI.clone", third)
		if _, ok := record(w.core, clone).OtherConfig[undoKey]; ok {
			t.Error("a clone of an undo snapshot is marked as one")
		}
		w.call("VDI.add_to_other_config", third, holdKey, "precious")
		w.call("VDI.revert", third)
		if got := record(w.core, disk).Snapshots; len(got) != 3 {
			t.Errorf("with one on hold: snapshots %q", got)
		}
		w.call("VDI.remove_from_other_config", third, holdKey)
		vbd := w.vbd(w.dom0, third, "autodetect", "RO")
		w.call("VDI.revert", snap)
		if got := record(w.core, disk).Snapshots; len(got) != 3 || !slices.Contains(got, third) {
			t.Errorf("with one in use: snapshots %q", got)
		}
		w.call("VBD.destroy", string(vbd))
		w.call("VDI.revert", snap)
		fourth := want("old", 2)

		w.call("session.remove_from_other_config", string(w.root), undoKey)
		w.call("session.add_to_other_config", string(w.root), undoKey, "false")
		w.choose(undoKey, "true")
		w.call("VDI.revert", fourth)
		if got := want("old", 2); got != fourth {
			t.Errorf("undo snapshot %s, though none was wanted", got)
		}
		w.call("session.remove_from_other_config", string(w.root), undoKey)
		w.call("VDI.revert", snap)
		fifth := want("old", 2)
		if fifth == fourth {
			t.Error("no new undo snapshot, though the pool wants one")
		}
		w.restart()
		want("old", 2)
		w.destroy(disk, snap, fifth, clone)
	})
}
