package api

import (
	"bytes"
	"crypto/md5"
	"fmt"
	"math/rand/v2"
	"regexp"
	"slices"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"coppice/internal/db"
	"coppice/internal/storage"
	"coppice/internal/storage/cow"
	"coppice/internal/storage/mem"
	"coppice/internal/xapi"
)

// The behaviours that the test suite of XenAPI servers asserts, by their ids,
// on every driver.

// onDrivers runs a test on an SR of each type, and checks that it leaves no
// disk behind.
func onDrivers(t *testing.T, test func(t *testing.T, r *rig)) {
	for _, d := range []storage.Driver{mem.Driver(), cow.Driver()} {
		t.Run(d.Type, func(t *testing.T) {
			r := newRigOn(t, d)
			test(t, r)
			if left := r.disks(r.sr); len(left) > 0 && !t.Failed() {
				t.Errorf("disks left: %q", left)
			}
			r.wantConsistent()
		})
	}
}

// destroy destroys a disk twice: the second time must be HANDLE_INVALID.
func (r *rig) destroy(refs ...vdiRef) {
	r.t.Helper()
	for _, ref := range refs {
		r.call("VDI.destroy", ref)
		r.fails("HANDLE_INVALID|VDI|"+string(ref), "VDI.destroy", ref)
	}
}

// updateCheck checks that VDI.update leaves alone what it must.
func (r *rig) updateCheck(ref vdiRef) {
	r.t.Helper()
	before := record(r.core, ref)
	r.call("VDI.update", ref)
	after := record(r.core, ref)
	type fixed struct {
		CBT, Snapshot, Managed       bool
		Location, Description, Label string
		Of                           vdiRef
		Time                         time.Time
		Size                         int64
	}
	pick := func(v *xapi.VDI) fixed {
		return fixed{v.CBTEnabled, v.IsASnapshot, v.Managed, v.Location, v.NameDescription, v.NameLabel, v.SnapshotOf, v.SnapshotTime, v.VirtualSize}
	}
	if diff := cmp.Diff(pick(before), pick(after)); diff != "" {
		r.t.Errorf("VDI.update changed (-before +after):\n%s", diff)
	}
}

func TestQT_VDI_1(t *testing.T) {
	onDrivers(t, func(t *testing.T, r *rig) {
		for mib := int64(4); mib <= 8; mib++ {
			ask := mib<<20 + 1
			ref := r.disk(ask)
			v := record(r.core, ref)
			if v.VirtualSize < ask {
				t.Errorf("asked for %d, got %d", ask, v.VirtualSize)
			}
			r.destroy(ref)
			r.fails("UUID_INVALID|VDI|"+v.UUID, "VDI.get_by_uuid", v.UUID)
		}
	})
}

func TestQT_VDI_2(t *testing.T) {
	onDrivers(t, func(t *testing.T, r *rig) {
		ref := r.disk(4 << 20)
		r.call("VDI.generate_config", r.host, ref)
		r.destroy(ref)
	})
}

func TestQT_VDI_3(t *testing.T) {
	onDrivers(t, func(t *testing.T, r *rig) {
		ref := r.disk(4 << 20)
		r.updateCheck(ref)
		r.destroy(ref)
	})
}

func TestQT_VDI_4(t *testing.T) {
	onDrivers(t, func(t *testing.T, r *rig) {
		ref := r.disk(4 << 20)
		want := r.call("VDI.get_virtual_size", ref).(int64) + 1<<20
		r.call("VDI.resize", ref, want)
		if got := r.call("VDI.get_virtual_size", ref).(int64); got < want {
			t.Errorf("size %d, want at least %d", got, want)
		}
		r.updateCheck(ref)
		r.destroy(ref)
	})
}

func TestQT_VDI_5(t *testing.T) {
	onDrivers(t, func(t *testing.T, r *rig) {
		ref := r.disk(4 << 20)
		r.fails("PERMISSION_DENIED|", "VDI.db_forget", ref)
		r.destroy(ref)
	})
}

func TestQT_VDI_8(t *testing.T) {
	onDrivers(t, func(t *testing.T, r *rig) {
		ref := r.disk(4 << 20)
		r.call("VDI.set_tags", ref, []string{"quick", "test"})
		start := time.Now().Add(-time.Second)
		snap := r.call("VDI.snapshot", ref).(vdiRef)
		end := time.Now().Add(time.Second)
		got, src := record(r.core, snap), record(r.core, ref)
		switch {
		case got.SnapshotTime.Before(start) || got.SnapshotTime.After(end):
			t.Errorf("snapshot_time %v is not between %v and %v", got.SnapshotTime, start, end)
		case !got.IsASnapshot, got.SnapshotOf.IsNull(), got.VirtualSize != src.VirtualSize, got.Location == src.Location, !slices.Equal(got.Tags, src.Tags):
			t.Errorf("snapshot %+v of %+v", got, src)
		}
		r.updateCheck(snap)
		r.destroy(snap, ref)
	})
}

func TestQT_VDI_9(t *testing.T) {
	onDrivers(t, func(t *testing.T, r *rig) {
		ref := r.disk(4 << 20)
		r.call("VDI.set_tags", ref, []string{"quick", "test"})
		clone := r.call("VDI.clone", ref).(vdiRef)
		got, src := record(r.core, clone), record(r.core, ref)
		if got.VirtualSize != src.VirtualSize || got.Location == src.Location || !slices.Equal(got.Tags, src.Tags) {
			t.Errorf("clone %+v of %+v", got, src)
		}
		r.destroy(clone, ref)
	})
}

func TestQT_VDI_12(t *testing.T) {
	onDrivers(t, func(t *testing.T, r *rig) {
		ref := r.disk(4 << 20)
		free := r.call("VM.get_allowed_VBD_devices", r.dom0).([]string)
		if len(free) == 0 {
			t.Fatal("no device is free on dom0")
		}
		r.vbd(r.dom0, ref, free[0], "RW")
		r.destroy(r.call("VDI.copy", ref, string(r.sr), "OpaqueRef:NULL", "OpaqueRef:NULL").(vdiRef))
		r.destroy(ref)
	})
}

func TestQT_SR_1(t *testing.T) {
	onDrivers(t, func(t *testing.T, r *rig) { r.call("SR.scan", string(r.sr)) })
}

func TestQT_SR_2(t *testing.T) {
	onDrivers(t, func(t *testing.T, r *rig) { r.call("SR.update", string(r.sr)) })
}

func TestQT_SR_3(t *testing.T) {
	onDrivers(t, func(t *testing.T, r *rig) {
		pbd := r.pbd(r.sr)
		sr := record(r.core, r.sr)
		r.call("PBD.unplug", pbd)
		list := r.call("SR.probe", r.host, record(r.core, xapi.Ref[xapi.PBD](pbd)).DeviceConfig, sr.Type, sr.SMConfig).(string)
		if !regexp.MustCompile(`^<SRlist>(<SR><UUID>[^<]*</UUID></SR>)*</SRlist>$`).MatchString(list) || !bytes.Contains([]byte(list), []byte(sr.UUID)) {
			t.Errorf("probe: %s", list)
		}
		r.call("PBD.plug", pbd)
	})
}

func TestQT_SR_4(t *testing.T) {
	onDrivers(t, func(t *testing.T, r *rig) {
		r.call("SR.set_name_label", string(r.sr), "label")
		r.call("SR.set_name_description", string(r.sr), "description")
		before := record(r.core, r.sr)
		if before.NameLabel != "label" || before.NameDescription != "description" {
			t.Errorf("SR %+v", before)
		}
		r.call("SR.update", string(r.sr))
		if diff := cmp.Diff(before, record(r.core, r.sr), cmpopts.IgnoreFields(xapi.SR{}, "PhysicalUtilisation", "PhysicalSize")); diff != "" {
			t.Errorf("SR.update changed (-before +after):\n%s", diff)
		}
	})
}

func TestQT_COPY_1(t *testing.T) {
	onDrivers(t, func(t *testing.T, r *rig) {
		original := r.disk(4 << 20)
		r.write(original, bytes.Repeat([]byte("a"), 1<<20), 0)
		snapshot := r.call("VDI.snapshot", original).(vdiRef)
		r.write(original, bytes.Repeat([]byte("b"), 512), 0)
		backup := r.call("VDI.copy", snapshot, string(r.sr), "OpaqueRef:NULL", "OpaqueRef:NULL").(vdiRef)
		delta := r.call("VDI.copy", original, string(r.sr), snapshot, "OpaqueRef:NULL").(vdiRef)
		r.call("VDI.copy", delta, "OpaqueRef:NULL", "OpaqueRef:NULL", backup)
		p := r.contents(backup)
		want := append(bytes.Repeat([]byte("b"), 512), bytes.Repeat([]byte("a"), 1<<20-512)...)
		if !bytes.Equal(p[:1<<20], want) {
			t.Error("the backup is not the original")
		}
		r.destroy(original, snapshot, backup, delta)
	})
}

func TestQT_INT_1(t *testing.T) {
	onDrivers(t, func(t *testing.T, r *rig) {
		rng := rand.New(rand.NewPCG(1, 2))
		noise := func(n int) []byte {
			p := make([]byte, n)
			for i := range p {
				p[i] = byte(rng.Uint32())
			}
			return p
		}
		for name, fill := range map[string]func(vdiRef){
			"zero": func(vdiRef) {},
			"extents": func(ref vdiRef) {
				for range rng.IntN(100) + 1 {
					p := noise(rng.IntN(2<<10-1) + 1)
					r.write(ref, p, rng.Int64N(4<<20-int64(len(p))))
				}
			},
			"full": func(ref vdiRef) { r.write(ref, noise(4<<20), 0) },
		} {
			ref := r.disk(4 << 20)
			fill(ref)
			dup := r.call("VDI.copy", ref, string(r.sr), "OpaqueRef:NULL", "OpaqueRef:NULL").(vdiRef)
			if got, want := md5.Sum(r.contents(dup)), md5.Sum(r.contents(ref)); got != want {
				t.Errorf("%s: MD5 %x, want %x", name, got, want)
			}
			r.destroy(ref, dup)
		}
	})
}

func TestQT_ASYNC_1(t *testing.T) {
	onDrivers(t, func(t *testing.T, r *rig) {
		ref := r.disk(4 << 20)
		task := r.call("Async.VDI.copy", ref, string(r.sr), "OpaqueRef:NULL", "OpaqueRef:NULL").(xapi.Ref[xapi.Task])
		r.wait(task)
		got := record(r.core, task)
		m := regexp.MustCompile(`^<value>(OpaqueRef:[-0-9a-f]+)</value>$`).FindStringSubmatch(got.Result)
		if got.Status != xapi.TaskStatusTypeSuccess || got.Progress != 1 || m == nil {
			t.Fatalf("task %s, progress %v, result %q", got.Status, got.Progress, got.Result)
		}
		r.destroy(vdiRef(m[1]), ref)
	})
}

func TestQT_MSG_1(t *testing.T) {
	r := newRig(t)
	vm := record(r.core, r.dom0).UUID
	ref := r.call("message.create", "X", 100, "VM", vm, "body").(xapi.Ref[xapi.Message])
	for expr, want := range map[string]int{
		`field "name" = "X"`: 1, `field "priority" = "100"`: 1, `field "cls" = "VM"`: 1,
		`field "name" = "X" and field "priority" = "100"`: 1, `field "name" = "Y" or field "cls" = "VM"`: 1,
		`field "name" = "Y"`: 0, `field "class" = "VM"`: 0,
	} {
		got := r.call("message.get_all_records_where", expr).(messages)
		if len(got) != want {
			t.Errorf("%s: %d messages, want %d", expr, len(got), want)
		}
	}
	r.call("message.destroy", string(ref))
	r.fails("HANDLE_INVALID|message|"+string(ref), "message.destroy", string(ref))
	r.fails("UUID_INVALID|VM|nobody", "message.create", "X", 1, "VM", "nobody", "")
	r.fails("UUID_INVALID|VM|nobody", "message.get", "VM", "nobody", "19700101T00:00:00Z")
}

func TestQT_DATE(t *testing.T) {
	r := newRig(t)
	r.call("host.get_server_localtime", r.host)
	for _, since := range []string{
		"2026-01-01T00:00:00Z", "2026-01-01T00:00:00", "20260101T00:00:00Z", "20260101T00:00:00", "20260101T00:00:00-12:00",
	} {
		r.call("message.get_since", since)
	}
}

// The part of QT-EV-6 that the messages themselves answer for.
func TestQT_EV_6(t *testing.T) {
	r := newRig(t)
	vm := record(r.core, r.dom0).UUID
	var refs []xapi.Ref[xapi.Message]
	for i := range 3 {
		refs = append(refs, r.call("message.create", fmt.Sprint("m", i), 1, "VM", vm, "").(xapi.Ref[xapi.Message]))
	}
	got := r.call("message.get", "VM", vm, "19700101T00:00:00Z").(messages)
	if len(got) != 3 {
		t.Errorf("%d messages, want 3", len(got))
	}
	one := r.call("message.get_record", string(refs[1])).(*xapi.Message)
	if one.Name != "m1" || one.ObjUUID != vm || r.call("message.get_by_uuid", one.UUID) != refs[1] {
		t.Errorf("message %+v", one)
	}
	r.fails("HANDLE_INVALID|message|OpaqueRef:no", "message.destroy_many", []string{string(refs[0]), "OpaqueRef:no"})
	r.call("message.destroy_many", []string{string(refs[0]), string(refs[1])})
	if got := r.call("message.get_all").([]xapi.Ref[xapi.Message]); !slices.Equal(got, refs[2:]) {
		t.Errorf("left: %q", got)
	}
	if got := r.call("message.get_all_records").(messages); len(got) != 1 {
		t.Errorf("left: %d", len(got))
	}
}

func TestQT_OBJ_1(t *testing.T) {
	r := newRig(t)
	pbd := r.pbd(r.sr)
	if got := r.call("PBD.get_by_uuid", r.call("PBD.get_uuid", pbd)); fmt.Sprint(got) != pbd {
		t.Errorf("got %v, want %s", got, pbd)
	}
}

// Messages are bounded; the oldest make room.
func TestMessagesBounded(t *testing.T) {
	r := newRig(t)
	vm := record(r.core, r.dom0).UUID
	r.update(func(tx *db.Tx) error {
		for i := range maxMessages {
			m := xapi.New[xapi.Message]()
			m.Name, m.Timestamp = "old", time.Unix(int64(1000+i), 0)
			if _, err := db.Insert(tx, m); err != nil {
				return err
			}
		}
		return nil
	})
	r.call("message.create", "new", 1, "VM", vm, "")
	var oldest time.Time
	n := 0
	r.view(func(tx *db.Tx) {
		for _, m := range db.All[xapi.Message](tx) {
			if n++; oldest.IsZero() || m.Timestamp.Before(oldest) {
				oldest = m.Timestamp
			}
		}
	})
	if n != maxMessages || oldest.Unix() != 1001 {
		t.Errorf("%d messages, the oldest of %d", n, oldest.Unix())
	}
}
