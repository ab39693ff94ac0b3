package api

import (
	"bytes"
	"crypto/md5"
	"math/rand/v2"
	"regexp"
	"slices"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"github.com/google/uuid"

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

// inDialects is onDrivers in each dialect.
func inDialects(t *testing.T, test func(t *testing.T, r *rig)) {
	for name, d := range dialects {
		t.Run(name, func(t *testing.T) {
			onDrivers(t, func(t *testing.T, r *rig) {
				r.tongue, r.spoken = &d, &d
				test(t, r)
			})
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
	inDialects(t, func(t *testing.T, r *rig) {
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
	inDialects(t, func(t *testing.T, r *rig) {
		ref := r.disk(4 << 20)
		r.call("VDI.generate_config", r.host, ref)
		r.destroy(ref)
	})
}

func TestQT_VDI_3(t *testing.T) {
	inDialects(t, func(t *testing.T, r *rig) {
		ref := r.disk(4 << 20)
		r.updateCheck(ref)
		r.destroy(ref)
	})
}

func TestQT_VDI_4(t *testing.T) {
	inDialects(t, func(t *testing.T, r *rig) {
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
	inDialects(t, func(t *testing.T, r *rig) {
		ref := r.disk(4 << 20)
		r.fails("PERMISSION_DENIED|", "VDI.db_forget", ref)
		r.destroy(ref)
	})
}

// introduce makes the parameters of VDI.introduce.
func (r *rig) introduce(uuid, location string) []any {
	none := map[string]string{}
	return []any{uuid, "introduced", "", string(r.sr), "user", false, false, none, location, none, none, true}
}

func TestQT_VDI_6(t *testing.T) {
	inDialects(t, func(t *testing.T, r *rig) {
		ref := r.disk(4 << 20)
		r.fails("SR_OPERATION_NOT_SUPPORTED|"+string(r.sr), "VDI.introduce", r.introduce(record(r.core, ref).UUID, uuid.NewString())...)
		r.destroy(ref)
	})
}

func TestQT_VDI_7(t *testing.T) {
	inDialects(t, func(t *testing.T, r *rig) {
		ref := r.disk(4 << 20)
		r.fails("SR_OPERATION_NOT_SUPPORTED|"+string(r.sr), "VDI.introduce", r.introduce(uuid.NewString(), record(r.core, ref).Location)...)
		r.destroy(ref)
	})
}

func TestQT_VDI_8(t *testing.T) {
	inDialects(t, func(t *testing.T, r *rig) {
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
	inDialects(t, func(t *testing.T, r *rig) {
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
	inDialects(t, func(t *testing.T, r *rig) {
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
	inDialects(t, func(t *testing.T, r *rig) { r.call("SR.scan", string(r.sr)) })
}

func TestQT_SR_2(t *testing.T) {
	inDialects(t, func(t *testing.T, r *rig) { r.call("SR.update", string(r.sr)) })
}

func TestQT_SR_3(t *testing.T) {
	inDialects(t, func(t *testing.T, r *rig) {
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
	inDialects(t, func(t *testing.T, r *rig) {
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
	inDialects(t, func(t *testing.T, r *rig) {
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

// differences are the bytes by which two disks differ, where either has any.
func (r *rig) differences(a, b vdiRef) (n int64) {
	r.t.Helper()
	left, right := r.volume(a), r.volume(b)
	defer left.Close()
	defer right.Close()
	if left.Size() != right.Size() {
		r.t.Fatalf("%d and %d bytes", left.Size(), right.Size())
	}
	for _, v := range []storage.Volume{left, right} {
		for e, err := range v.Extents(r.t.Context(), 0, v.Size()) {
			if err != nil {
				r.t.Fatal(err)
			}
			if e.Hole {
				continue
			}
			p, q := make([]byte, e.Len), make([]byte, e.Len)
			if err := cmpErr(storage.ReadFull(left, p, e.Off), storage.ReadFull(right, q, e.Off)); err != nil {
				r.t.Fatal(err)
			}
			for i := range p {
				if p[i] != q[i] {
					n++
				}
			}
		}
	}
	return n
}

func TestQT_INT_1(t *testing.T) {
	inDialects(t, func(t *testing.T, r *rig) {
		rng := rand.New(rand.NewPCG(1, 2))
		noise := func(n int) []byte {
			p := make([]byte, n)
			for i := range p {
				p[i] = byte(rng.Uint32())
			}
			return p
		}
		zero := func(vdiRef, int64) {}
		extents := func(ref vdiRef, size int64) {
			for range rng.IntN(100) + 1 {
				p := noise(rng.IntN(2<<10-1) + 1)
				r.write(ref, p, rng.Int64N(size-int64(len(p))))
			}
		}
		full := func(ref vdiRef, size int64) { r.write(ref, noise(int(size)), 0) }
		for _, c := range []struct {
			contents string
			size     int64
			fill     func(vdiRef, int64)
		}{
			{"zero", 4 << 20, zero},
			{"extents", 4 << 20, extents},
			{"full", 4 << 20, full},
			{"zero", 2 << 30, zero},
			{"extents", 2 << 30, extents},
			{"zero", 2<<30 + 1, zero},
			{"extents", 2<<30 + 7, extents},
			{"extents", 2<<30 + 15, extents},
		} {
			ref := r.disk(c.size)
			c.fill(ref, record(r.core, ref).VirtualSize)
			dup := r.call("VDI.copy", ref, string(r.sr), "OpaqueRef:NULL", "OpaqueRef:NULL").(vdiRef)
			if n := r.differences(ref, dup); n > 0 {
				t.Errorf("%s of %d bytes: %d differ", c.contents, c.size, n)
			}
			if c.size == 4<<20 {
				if got, want := md5.Sum(r.contents(dup)), md5.Sum(r.contents(ref)); got != want {
					t.Errorf("%s: MD5 %x, want %x", c.contents, got, want)
				}
			}
			r.destroy(ref, dup)
		}
	})
}
