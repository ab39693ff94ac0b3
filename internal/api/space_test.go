package api

import (
	"strconv"
	"strings"
	"testing"
	"time"

	"coppice/internal/storage"
)

// What a disk has of its own is told on request and stays in its record.
func TestExclusiveBytes(t *testing.T) {
	onDrivers(t, func(t *testing.T, r *rig) {
		disk, data := r.noisyDisk()
		snap := r.call("VDI.snapshot", disk).(vdiRef)
		clone := r.call("VDI.clone", snap).(vdiRef)
		half := len(data) / 2
		r.write(disk, data[half:], 0) // half of it is the disk's own, half of the snapshot shared with the clone
		r.restart()                   // a store tells what is in its trees
		disks := map[string]int64{"disk": int64(half), "snap": 0, "clone": 0}
		refs := map[string]vdiRef{"disk": disk, "snap": snap, "clone": clone}
		// Map pages and attributes come on top.
		near := func(got, want int64) bool { return got >= want && got <= want+128<<10 }
		exclusive := func(name string) int64 {
			v := record(r.core, refs[name])
			at, err := time.Parse(time.RFC3339, v.SMConfig[exclusiveAtKey])
			if err != nil || at.After(r.now()) || r.now().Sub(at) > time.Hour {
				t.Errorf("%s: as of %q", name, v.SMConfig[exclusiveAtKey])
			}
			n, err := strconv.ParseInt(v.SMConfig[exclusiveKey], 10, 64)
			if err != nil {
				t.Fatalf("%s: sm_config %v", name, v.SMConfig)
			}
			return n
		}
		sr := record(r.core, r.sr).UUID
		if got := plugin[spaceReport](r, "sr-space", map[string]string{"sr": sr}); got.Disks != 3 || !near(got.Bytes, int64(half)) {
			t.Errorf("the disks of the SR have %+v", got)
		}
		for name, want := range disks {
			if got := exclusive(name); !near(got, want) {
				t.Errorf("%s has %d bytes of its own, want %d", name, got, want)
			}
		}
		if got := record(r.core, disk).SMConfig[writtenKey]; r.driver.Type == "cow" && got != strconv.Itoa(half) {
			t.Errorf("%s bytes were written since the snapshot, want %d", got, half)
		}
		r.call("VDI.update", disk)
		if got := exclusive("disk"); !near(got, int64(half)) {
			t.Errorf("after VDI.update %d bytes", got)
		}
		free := func(refs ...vdiRef) freedReport {
			uuids := make([]string, len(refs))
			for i, ref := range refs {
				uuids[i] = record(r.core, ref).UUID
			}
			return plugin[freedReport](r, "vdi-would-free", map[string]string{"vdis": strings.Join(uuids, ",")})
		}
		for _, c := range []struct {
			refs []vdiRef
			want int
		}{
			{[]vdiRef{snap}, 0},
			{[]vdiRef{snap, clone}, half}, // the other half is shared with the disk
			{[]vdiRef{snap, clone, disk}, len(data) + half},
		} {
			if got := free(c.refs...); !near(got.Bytes, int64(c.want)) || !got.Exact || got.At.IsZero() {
				t.Errorf("%d disks would free %+v, want %d", len(c.refs), got, c.want)
			}
		}
		r.destroy(clone, snap, disk)
		if got := record(r.core, r.sr); got.VirtualAllocation != 0 {
			t.Errorf("virtual_allocation %d", got.VirtualAllocation)
		}
	})
}

// Clients cannot bring such keys along.
func TestTransientKeys(t *testing.T) {
	r := newRig(t)
	args := diskArgs(r.sr, storage.Unit)
	args["sm_config"] = map[string]any{exclusiveKey: "1", damagedKey: "0+1", "theirs": "kept"}
	ref := r.call("VDI.create", args).(vdiRef)
	if got := record(r.core, ref).SMConfig; len(got) != 1 || got["theirs"] != "kept" {
		t.Errorf("sm_config %v", got)
	}
}
