package api

import (
	"encoding/xml"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"coppice/internal/db"
	"coppice/internal/storage"
	"coppice/internal/storage/cow"
	"coppice/internal/storage/mem"
	"coppice/internal/xapi"
)

type srRef = xapi.Ref[xapi.SR]

// pbd returns the PBD of an SR.
func (r *rig) pbd(sr srRef) string { return string(record(r.core, sr).PBDs[0]) }

// A first start makes what clients cannot do without; a second one keeps it.
func TestBootstrap(t *testing.T) {
	r := newRig(t)
	check := func() {
		t.Helper()
		r.view(func(tx *db.Tx) {
			for class, n := range map[string]int{"pool": 1, "host": 1, "host_metrics": 1, "VM": 2, "VM_metrics": 2, "network": 1, "SR": 1, "PBD": 1, "SM": 1, "VDI": 0} {
				if got := tx.Count(r.model.Classes[class]); got != n {
					t.Errorf("%d objects of class %s, want %d", got, class, n)
				}
			}
		})
		pool, host, dom0 := record(r.core, r.pool), record(r.core, r.host), record(r.core, r.dom0)
		sr := record(r.core, r.sr)
		pbd := record(r.core, xapi.Ref[xapi.PBD](r.pbd(r.sr)))
		switch {
		case pool.Master != r.host || pool.DefaultSR != r.sr || pool.Restrictions["restrict_snapshots"] != "false":
			t.Errorf("pool %+v", pool)
		case !host.Enabled || host.Address != "127.0.0.1" || host.APIVersionMajor != 2 || host.APIVersionMinor != 23 ||
			host.SoftwareVersion["xapi"] == "" || host.SoftwareVersion["coppice"] != "1.2.3" || host.ControlDomain != r.dom0:
			t.Errorf("host %+v", host)
		case !record(r.core, host.Metrics).Live:
			t.Error("the host is not live")
		case !dom0.IsControlDomain || dom0.ResidentOn != r.host || dom0.Domid != 0 || dom0.PowerState != xapi.VMPowerStateRunning:
			t.Errorf("dom0 %+v", dom0)
		case sr.NameLabel != "Local storage" || sr.Type != "mem" || sr.ContentType != "user" || sr.PhysicalSize == 0:
			t.Errorf("SR %+v", sr)
		case !pbd.CurrentlyAttached || pbd.Host != r.host || pbd.DeviceConfig["location"] != "store":
			t.Errorf("PBD %+v", pbd)
		}
		r.view(func(tx *db.Tx) {
			for _, sm := range db.All[xapi.SM](tx) {
				if sm.Type != "mem" || !slices.Equal(sm.Capabilities, r.driver.Features) || sm.Features["VDI_REVERT"] != 1 {
					t.Errorf("SM %+v", sm)
				}
			}
		})
		r.wantConsistent()
	}
	check()
	ids := []string{record(r.core, r.pool).UUID, record(r.core, r.host).UUID, record(r.core, r.dom0).UUID, record(r.core, r.sr).UUID}
	r.restart()
	check()
	if again := []string{record(r.core, r.pool).UUID, record(r.core, r.host).UUID, record(r.core, r.dom0).UUID, record(r.core, r.sr).UUID}; !slices.Equal(ids, again) {
		t.Errorf("other objects after a restart: %q, %q", ids, again)
	}
}

// A first start that finds a store takes its disks: the database can be lost.
func TestBootstrapOnExistingStore(t *testing.T) {
	r := newRig(t)
	disk := richDisk(r)
	snap := r.call("VDI.snapshot", disk).(vdiRef)
	uuid, snapUUID := record(r.core, disk).UUID, record(r.core, snap).UUID
	r.stop(t)
	r.store.Store = db.NewMemStore()
	r.start(t)
	back, snapBack := r.ref(uuid), r.ref(snapUUID)
	if got := record(r.core, back); got.NameLabel != "rich" || got.OtherConfig["k"] != "v" || got.Type != xapi.VDITypeSystem {
		t.Errorf("disk %+v", got)
	}
	if got := record(r.core, snapBack); !got.IsASnapshot || got.SnapshotOf != back || got.SnapshotTime.Unix() == 0 {
		t.Errorf("snapshot %+v", got)
	}
	r.wantConsistent()
}

// Whatever fails during a start, the next one works.
func TestBootstrapFaults(t *testing.T) {
	for _, commits := range []bool{false, true} {
		for n := 1; ; n++ {
			f := &faults{}
			store := &faultStore{Store: db.NewMemStore(), faults: f}
			r := &rig{faults: f, store: store, driver: mem.Driver()}
			f.arm(n, failAlways, commits)
			d, err := db.Open(t.Context(), xapi.Datamodel(), store)
			if err != nil {
				t.Fatal(err)
			}
			a, err := New(t.Context(), Config{DB: d, Storage: storage.Registry{"mem": f.driver(r.driver)}})
			if err == nil {
				if err := a.Close(); err != nil {
					t.Error(err)
				}
			}
			_ = d.Close()
			if !f.hasFired() {
				if n == 1 {
					t.Error("nothing could fail")
				}
				break
			}
			f.disarm()
			r.start(t)
			r.wantConsistent()
			r.disk(1 << 20)
			r.stop(t)
		}
	}
}

func TestSRCreateDestroy(t *testing.T) {
	r := newRig(t)
	sr := srRef(r.secondSR())
	got := record(r.core, sr)
	pbd := record(r.core, xapi.Ref[xapi.PBD](r.pbd(sr)))
	if got.NameLabel != "second" || got.Type != "mem" || !pbd.CurrentlyAttached || !strings.HasSuffix(pbd.DeviceConfig["location"], got.UUID) {
		t.Errorf("SR %+v, PBD %+v", got, pbd)
	}
	if !slices.Contains(got.AllowedOperations, xapi.StorageOperationsVDICreate) || slices.Contains(got.AllowedOperations, xapi.StorageOperationsDestroy) {
		t.Errorf("allowed %q", got.AllowedOperations)
	}
	disk := r.call("VDI.create", diskArgs(sr, 1<<20)).(vdiRef)
	r.fails("SR_HAS_PBD|"+string(sr), "SR.destroy", string(sr))
	r.fails("SR_HAS_PBD|"+string(sr), "SR.forget", string(sr))
	r.call("PBD.unplug", r.pbd(sr))
	r.fails("SR_NOT_EMPTY", "SR.destroy", string(sr))
	r.call("PBD.plug", r.pbd(sr))
	r.call("VDI.forget", disk)
	r.call("PBD.unplug", r.pbd(sr))
	r.fails("SR_NOT_EMPTY", "SR.destroy", string(sr)) // the volume is still there
	r.call("PBD.plug", r.pbd(sr))
	for _, v := range record(r.core, sr).VDIs {
		r.call("VDI.destroy", v)
	}
	r.call("PBD.unplug", r.pbd(sr))
	r.call("SR.add_to_other_config", string(sr), "indestructible", "true")
	r.fails("SR_INDESTRUCTIBLE|"+string(sr), "SR.destroy", string(sr))
	r.call("SR.remove_from_other_config", string(sr), "indestructible")
	config := map[string]string{"location": filepath.Join(r.dir, record(r.core, xapi.Ref[xapi.PBD](r.pbd(sr))).DeviceConfig["location"])}
	r.call("SR.destroy", string(sr))
	r.fails("HANDLE_INVALID|SR|"+string(sr), "SR.get_record", string(sr))
	if _, err := r.driver.Open(t.Context(), config, false); !errors.Is(err, storage.ErrNoRepo) {
		t.Errorf("the storage of a destroyed SR: %v", err)
	}
}

func TestSRCreateErrors(t *testing.T) {
	r := newRig(t)
	location := record(r.core, xapi.Ref[xapi.PBD](r.pbd(r.sr))).DeviceConfig
	r.fails("SR_UNKNOWN_DRIVER|nfs", "SR.create", r.host, map[string]string{}, 0, "n", "", "nfs", "user", true)
	r.fails("HANDLE_INVALID|host|OpaqueRef:no", "SR.create", "OpaqueRef:no", map[string]string{}, 0, "n", "", "mem", "user", true)
	r.fails("SR_DEVICE_IN_USE", "SR.create", r.host, location, 0, "n", "", "mem", "user", false)
	absolute := map[string]string{"location": filepath.Join(r.dir, location["location"])}
	r.fails("SR_DEVICE_IN_USE", "SR.create", r.host, absolute, 0, "n", "", "mem", "user", false)
	r.fails("SR_UNKNOWN_DRIVER|nfs", "SR.introduce", "u", "n", "", "nfs", "user", true)
	r.fails("SR_UUID_EXISTS|"+record(r.core, r.sr).UUID, "SR.introduce", record(r.core, r.sr).UUID, "n", "", "mem", "user", false)
}

// An SR that is forgotten and introduced again has its disks back, with all
// that is known about them.
func TestSRForgetIntroduce(t *testing.T) {
	r := newRig(t)
	disk := richDisk(r)
	snap := r.call("VDI.snapshot", disk).(vdiRef)
	uuid, snapUUID := record(r.core, disk).UUID, record(r.core, snap).UUID
	config := record(r.core, xapi.Ref[xapi.PBD](r.pbd(r.sr))).DeviceConfig
	srUUID := record(r.core, r.sr).UUID

	r.call("PBD.unplug", r.pbd(r.sr))
	r.call("SR.forget", string(r.sr))
	if got := r.disks(r.sr); len(got) != 0 {
		t.Errorf("disks of a forgotten SR: %q", got)
	}
	var probed srList
	if err := xml.Unmarshal([]byte(r.call("SR.probe", r.host, config, "mem", map[string]string{}).(string)), &probed); err != nil {
		t.Fatal(err)
	}
	if len(probed.SRs) != 1 || probed.SRs[0].UUID != srUUID {
		t.Errorf("probe found %+v, want %s", probed.SRs, srUUID)
	}
	r.sr = r.call("SR.introduce", srUUID, "again", "", "mem", "user", false).(srRef)
	r.fails("SR_HAS_NO_PBDS|"+string(r.sr), "SR.scan", string(r.sr))
	pbdArgs := map[string]any{"SR": string(r.sr), "host": string(r.host), "device_config": wireOf(config)}
	pbd := string(r.call("PBD.create", pbdArgs).(xapi.Ref[xapi.PBD]))
	r.fails("PBD_EXISTS|"+string(r.sr)+"|"+string(r.host)+"|"+pbd, "PBD.create", pbdArgs)
	r.call("PBD.plug", pbd)
	r.call("PBD.plug", pbd) // no-op
	if got := record(r.core, r.ref(snapUUID)); got.NameLabel != "rich" || got.SnapshotOf != r.ref(uuid) {
		t.Errorf("snapshot %+v", got)
	}
	r.wantConsistent()
}

func TestPBDUnplug(t *testing.T) {
	r := newRig(t)
	disk := richDisk(r)
	pbd := r.pbd(r.sr)
	for _, how := range []diskUse{reading, writing} {
		drop := r.repos.uses.add(disk, how)
		r.fails("VDI_IN_USE|"+string(disk)+"|unplug", "PBD.unplug", pbd)
		drop()
	}
	vm := r.vm("vm")
	vbd := r.vbd(vm, disk, "0", "RW")
	set(r, vbd, func(b *xapi.VBD) { b.CurrentlyAttached = true })
	r.fails("VDI_IN_USE|"+string(disk)+"|unplug", "PBD.unplug", pbd)
	set(r, vbd, func(b *xapi.VBD) { b.CurrentlyAttached = false })

	r.fails("OPERATION_NOT_ALLOWED|PBD is currently attached", "PBD.destroy", pbd)
	r.fails("OPERATION_NOT_ALLOWED|PBD is currently attached", "PBD.set_device_config", pbd, map[string]string{})
	r.call("PBD.unplug", pbd)
	r.call("PBD.unplug", pbd) // no-op
	if got := record(r.core, disk).AllowedOperations; !slices.Equal(got, []xapi.VDIOperations{xapi.VDIOperationsForget}) {
		t.Errorf("a disk of a detached SR allows %q", got)
	}
	for _, m := range []string{"VDI.snapshot", "VDI.clone", "VDI.destroy", "VDI.update", "VDI.checksum"} {
		r.fails("SR_HAS_NO_PBDS|"+string(r.sr), m, disk)
	}
	r.fails("SR_HAS_NO_PBDS|"+string(r.sr), "VDI.resize", disk, 1<<30)
	r.restart() // stays detached
	r.call("PBD.plug", r.pbd(r.sr))
	if len(r.disks(r.sr)) != 1 {
		t.Errorf("disks %q", r.disks(r.sr))
	}
	r.wantConsistent()
	if got := r.call("SR.get_live_hosts", string(r.sr)).([]xapi.Ref[xapi.Host]); !slices.Equal(got, []xapi.Ref[xapi.Host]{r.host}) {
		t.Errorf("live hosts %q", got)
	}

	other := srRef(r.secondSR())
	r.call("PBD.unplug", r.pbd(other))
	r.fails("SR_DEVICE_IN_USE", "PBD.set_device_config", r.pbd(other), record(r.core, xapi.Ref[xapi.PBD](r.pbd(r.sr))).DeviceConfig)
	r.call("PBD.set_device_config", r.pbd(other), map[string]string{"location": "elsewhere"})
	if _, err := r.try(r.root, "PBD.plug", r.pbd(other)); err == nil {
		t.Error("plugged a store that does not exist")
	}
	r.call("PBD.destroy", r.pbd(other))
	r.fails("SR_HAS_NO_PBDS|"+string(other), "SR.destroy", string(other))
	r.call("SR.forget", string(other))
}

// A scan refreshes what has changed in the storage.
func TestSRScan(t *testing.T) {
	r := newRig(t)
	disk := richDisk(r)
	gone := r.disk(2 << 20)
	repo, err := r.repos.get(r.sr)
	if err != nil {
		t.Fatal(err)
	}
	if err := repo.Delete(t.Context(), volumeID(record(r.core, gone))); err != nil {
		t.Fatal(err)
	}
	stranger := "11111111-2222-4333-8444-555555555555"
	if _, err := repo.Create(t.Context(), orphanSpec(stranger)); err != nil {
		t.Fatal(err)
	}
	set(r, disk, func(v *xapi.VDI) { v.VirtualSize, v.Missing = 1, true })
	r.call("SR.scan", string(r.sr))
	r.fails("HANDLE_INVALID|VDI|"+string(gone), "VDI.get_record", gone)
	if got := record(r.core, r.ref(stranger)); !got.Managed || got.VirtualSize != 2<<20 || got.Type != xapi.VDITypeUser {
		t.Errorf("the stranger: %+v", got)
	}
	if got := record(r.core, disk); got.VirtualSize != 4<<20 || got.Missing {
		t.Errorf("the disk: %+v", got)
	}
	r.wantConsistent()
}

// A volume whose deletion failed is not given a record by a scan: the scan
// deletes it.
func TestSRScanFinishesDeletion(t *testing.T) {
	r := newRig(t)
	disk := r.disk(2 << 20)
	r.faults.arm(1, failBefore, false)
	if _, err := r.try(r.root, "VDI.destroy", disk); err == nil {
		t.Fatal("the deletion did not fail")
	}
	r.fails("HANDLE_INVALID|VDI|"+string(disk), "VDI.destroy", disk)
	if len(r.volumes(r.sr)) != 1 {
		t.Fatal("the volume is gone already")
	}
	r.call("SR.scan", string(r.sr))
	r.wantConsistent()
	if got := r.volumes(r.sr); len(got) != 0 {
		t.Errorf("volumes %q", got)
	}
}

func TestSRSmallMessages(t *testing.T) {
	r := newRig(t)
	r.call("SR.set_name_label", string(r.sr), "label")
	r.call("SR.set_name_description", string(r.sr), "description")
	r.call("SR.set_shared", string(r.sr), true)
	set(r, r.sr, func(sr *xapi.SR) { sr.PhysicalSize = 1 })
	r.call("SR.update", string(r.sr))
	if got := record(r.core, r.sr); got.NameLabel != "label" || got.NameDescription != "description" || !got.Shared || got.PhysicalSize == 1 {
		t.Errorf("SR %+v", got)
	}
	if got := r.call("SR.get_supported_types").([]string); !slices.Equal(got, []string{"mem"}) {
		t.Errorf("types %q", got)
	}
	r.fails("SR_UNKNOWN_DRIVER|x", "SR.probe", r.host, map[string]string{}, "x", map[string]string{})
}

// The sizes of an SR follow its storage without being asked to.
func TestRefreshUsage(t *testing.T) {
	r := newRig(t)
	disk := r.disk(4 << 20)
	r.write(disk, slices.Repeat([]byte{1}, 1<<20), 0)
	before := r.API.db.Revision()
	if err := r.refreshUsage(t.Context()); err != nil {
		t.Fatal(err)
	}
	if got := record(r.core, r.sr).PhysicalUtilisation; got < 1<<20 {
		t.Errorf("physical_utilisation %d", got)
	}
	after := r.API.db.Revision()
	if err := r.refreshUsage(t.Context()); err != nil {
		t.Fatal(err)
	}
	if r.API.db.Revision() != after || after == before {
		t.Errorf("revisions %d, %d, %d: want one change", before, after, r.API.db.Revision())
	}
}

// After an operation the SR's sizes are right within the pause, and after
// changes that the API did not see within the interval.
func TestWatchUsage(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t)
		disk := r.disk(8 << 20)
		time.Sleep(2 * usagePause)
		r.write(disk, slices.Repeat([]byte{1}, 1<<20), 0)
		before := record(r.core, r.sr).PhysicalUtilisation
		time.Sleep(usageInterval + usagePause)
		synctest.Wait()
		if got := record(r.core, r.sr).PhysicalUtilisation; got < before+1<<20 {
			t.Errorf("after the interval: %d, was %d", got, before)
		}
		if got := record(r.core, disk).PhysicalUtilisation; got != 1<<20 {
			t.Errorf("after the interval the disk maps %d bytes, want %d", got, 1<<20)
		}
		r.write(disk, slices.Repeat([]byte{1}, 1<<20), 2<<20)
		before = record(r.core, r.sr).PhysicalUtilisation
		r.call("VDI.snapshot", disk)
		time.Sleep(usagePause)
		synctest.Wait()
		if got := record(r.core, r.sr).PhysicalUtilisation; got < before+1<<20 {
			t.Errorf("after the pause: %d, was %d", got, before)
		}
	})
}

// What a disk maps is told some time after it was written, though nobody scans
// the SR; and nothing changes when nothing has.
func TestRefreshDisks(t *testing.T) {
	r := newRig(t)
	disk, other := r.disk(8<<20), r.disk(8<<20)
	repo, err := r.API.repos.get(r.sr)
	if err != nil {
		t.Fatal(err)
	}
	refresh := func() {
		t.Helper()
		if err := r.refreshDisks(t.Context(), repo); err != nil {
			t.Fatal(err)
		}
	}
	r.write(disk, slices.Repeat([]byte{1}, 1<<20), 0)
	before := record(r.core, other)
	refresh()
	if got := record(r.core, disk).PhysicalUtilisation; got != 1<<20 {
		t.Errorf("the disk maps %d bytes, want %d", got, 1<<20)
	}
	if got := record(r.core, other); got != before {
		t.Errorf("the other disk has changed: %+v", got)
	}
	revision := r.API.db.Revision()
	refresh()
	if got := r.API.db.Revision(); got != revision {
		t.Errorf("revision %d, want %d as before", got, revision)
	}
	// A disk whose record an operation is about to change is left to it.
	r.write(disk, slices.Repeat([]byte{1}, 1<<20), 4<<20)
	reserved := repo.reserve(storage.ID(record(r.core, disk).UUID))
	refresh()
	reserved()
	if got := record(r.core, disk).PhysicalUtilisation; got != 1<<20 {
		t.Errorf("the disk maps %d bytes, want %d as before", got, 1<<20)
	}
}

// A data directory takes its stores along wherever it goes, and a copy of it
// has nothing to do with the stores of the original.
func TestMovedDataDirectory(t *testing.T) {
	r := newRigOn(t, cow.Driver())
	kept := r.disk(1 << 20)
	second := r.call("SR.create", r.host, map[string]string{}, 0, "second", "", "cow", "user", false).(srRef)
	other := r.call("VDI.create", diskArgs(second, 1<<20)).(xapi.Ref[xapi.VDI])

	r.stop(t)
	original, moved := r.dir, filepath.Join(t.TempDir(), "moved")
	if err := os.CopyFS(moved, os.DirFS(original)); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(original, original+".away"); err != nil {
		t.Fatal(err)
	}
	r.dir = moved
	r.start(t)
	for _, ref := range []xapi.Ref[xapi.VDI]{kept, other} {
		if record(r.core, ref).Missing {
			t.Errorf("disk %s was left behind", ref)
		}
	}
	r.disk(1 << 20)
	r.wantConsistent()
}

// A store without a disk in it still knows which SR it is.
func TestSRProbeEmpty(t *testing.T) {
	onDrivers(t, func(t *testing.T, r *rig) {
		config := record(r.core, xapi.Ref[xapi.PBD](r.pbd(r.sr))).DeviceConfig
		uuid := record(r.core, r.sr).UUID
		r.call("PBD.unplug", r.pbd(r.sr))
		r.call("SR.forget", string(r.sr))
		var probed srList
		answer := r.call("SR.probe", r.host, config, r.driver.Type, map[string]string{}).(string)
		if err := xml.Unmarshal([]byte(answer), &probed); err != nil {
			t.Fatal(err)
		}
		if len(probed.SRs) != 1 || probed.SRs[0].UUID != uuid {
			t.Errorf("probe found %+v, want %s", probed.SRs, uuid)
		}
		r.sr = r.call("SR.introduce", uuid, "again", "", r.driver.Type, "user", false).(srRef)
		pbd := r.call("PBD.create", map[string]any{"SR": string(r.sr), "host": string(r.host), "device_config": wireOf(config)})
		r.call("PBD.plug", string(pbd.(xapi.Ref[xapi.PBD])))
		r.destroy(r.disk(2 << 20))
	})
}
