package api

import (
	"bytes"
	"context"
	"fmt"
	"slices"
	"strings"
	"testing"

	"coppice/internal/db"
	"coppice/internal/storage"
	"coppice/internal/xapi"
)

// faultCase is an operation that must be all or nothing.
type faultCase struct {
	name  string
	setup func(r *rig) []xapi.Ref[xapi.VDI]
	run   func(r *rig, on []xapi.Ref[xapi.VDI]) error
	disks int  // how many disks there are more afterwards, when it is done
	scan  bool // what it leaves is put right by a scan, not at start-up
}

// filledDisk is a disk with something in it.
func filledDisk(r *rig) xapi.Ref[xapi.VDI] {
	ref := r.disk(4 << 20)
	r.write(ref, bytes.Repeat([]byte("contents "), 1000), 12345)
	return ref
}

var faultCases = []faultCase{
	{
		name:  "create",
		setup: func(r *rig) []xapi.Ref[xapi.VDI] { return nil },
		run: func(r *rig, _ []xapi.Ref[xapi.VDI]) error {
			_, err := r.try(r.root, "VDI.create", diskArgs(r.sr, 3<<20))
			return err
		},
		disks: 1,
	},
	{
		name:  "snapshot",
		setup: func(r *rig) []xapi.Ref[xapi.VDI] { return []xapi.Ref[xapi.VDI]{filledDisk(r)} },
		run: func(r *rig, on []xapi.Ref[xapi.VDI]) error {
			_, err := r.try(r.root, "VDI.snapshot", on[0])
			return err
		},
		disks: 1,
	},
	{
		name:  "clone",
		setup: func(r *rig) []xapi.Ref[xapi.VDI] { return []xapi.Ref[xapi.VDI]{filledDisk(r)} },
		run: func(r *rig, on []xapi.Ref[xapi.VDI]) error {
			_, err := r.try(r.root, "VDI.clone", on[0])
			return err
		},
		disks: 1,
	},
	{
		name: "destroy",
		setup: func(r *rig) []xapi.Ref[xapi.VDI] {
			kept := filledDisk(r)
			return []xapi.Ref[xapi.VDI]{kept, r.call("VDI.clone", kept).(xapi.Ref[xapi.VDI])}
		},
		run: func(r *rig, on []xapi.Ref[xapi.VDI]) error {
			_, err := r.try(r.root, "VDI.destroy", on[1])
			return err
		},
		disks: -1,
	},
	{
		name: "revert",
		setup: func(r *rig) []xapi.Ref[xapi.VDI] {
			kept := filledDisk(r)
			disk := r.call("VDI.clone", kept).(xapi.Ref[xapi.VDI])
			snap := r.call("VDI.snapshot", disk).(xapi.Ref[xapi.VDI])
			r.call("VDI.resize", disk, 8<<20)
			r.write(disk, []byte("newer"), 6<<20)
			return []xapi.Ref[xapi.VDI]{kept, snap}
		},
		run: func(r *rig, on []xapi.Ref[xapi.VDI]) error {
			_, err := r.try(r.root, "VDI.revert", on[1])
			return err
		},
	},
	{
		name: "resize",
		setup: func(r *rig) []xapi.Ref[xapi.VDI] {
			kept := filledDisk(r)
			return []xapi.Ref[xapi.VDI]{kept, r.call("VDI.clone", kept).(xapi.Ref[xapi.VDI])}
		},
		run: func(r *rig, on []xapi.Ref[xapi.VDI]) error {
			_, err := r.try(r.root, "VDI.resize", on[1], 6<<20)
			return err
		},
	},
	{
		name:  "copy",
		setup: func(r *rig) []xapi.Ref[xapi.VDI] { return []xapi.Ref[xapi.VDI]{filledDisk(r)} },
		run: func(r *rig, on []xapi.Ref[xapi.VDI]) error {
			_, err := r.try(r.root, "VDI.copy", on[0], string(r.sr))
			return err
		},
		disks: 1,
	},
	{
		name:  "import",
		setup: func(r *rig) []xapi.Ref[xapi.VDI] { return []xapi.Ref[xapi.VDI]{filledDisk(r)} },
		run: func(r *rig, _ []xapi.Ref[xapi.VDI]) error {
			x, err := r.Import(r.t.Context(), trusted, TransferRequest{
				Session: string(r.root), Action: "put_import_raw_vdi", SR: string(r.sr), Length: 2 << 20,
			})
			if err != nil {
				return err
			}
			_, err = x.Volume.WriteAt([]byte("imported"), 0)
			return x.Finish(err)
		},
		disks: 1,
	},
	{
		name: "data_destroy",
		setup: func(r *rig) []xapi.Ref[xapi.VDI] {
			kept := filledDisk(r)
			r.call("VDI.enable_cbt", kept)
			return []xapi.Ref[xapi.VDI]{kept, r.call("VDI.snapshot", kept).(xapi.Ref[xapi.VDI])}
		},
		run: func(r *rig, on []xapi.Ref[xapi.VDI]) error {
			_, err := r.try(r.root, "VDI.data_destroy", on[1])
			return err
		},
	},
	{
		name: "forget",
		setup: func(r *rig) []xapi.Ref[xapi.VDI] {
			kept := filledDisk(r)
			return []xapi.Ref[xapi.VDI]{kept, r.call("VDI.clone", kept).(xapi.Ref[xapi.VDI])}
		},
		run: func(r *rig, on []xapi.Ref[xapi.VDI]) error {
			_, err := r.try(r.root, "VDI.forget", on[1])
			return err
		},
		scan: true,
	},
	{
		name: "scan",
		setup: func(r *rig) []xapi.Ref[xapi.VDI] {
			kept := filledDisk(r)
			r.call("VDI.forget", r.call("VDI.clone", kept))
			return []xapi.Ref[xapi.VDI]{kept}
		},
		run: func(r *rig, on []xapi.Ref[xapi.VDI]) error {
			_, err := r.try(r.root, "SR.scan", string(r.sr))
			return err
		},
		disks: 1,
		scan:  true,
	},
}

// TestFaultAtEveryCall makes the n-th call to the storage, or the n-th commit
// of the database, fail in every way, for every n, during each operation. At
// once, and after a restart, every disk has a volume and every volume a disk,
// the operation is done or undone, and what it did not concern is unharmed.
func TestFaultAtEveryCall(t *testing.T) {
	for _, c := range faultCases {
		for _, commits := range []bool{false, true} {
			for _, kind := range []faultKind{failBefore, failAfter, failAlways} {
				where := "storage"
				if commits {
					where = "commit"
				}
				t.Run(fmt.Sprintf("%s/%s-%v", c.name, where, kind), func(t *testing.T) {
					for n := 1; ; n++ {
						if !faultOnce(t, c, n, kind, commits) {
							if n == 1 {
								t.Fatal("the operation never got to a call that could fail")
							}
							return
						}
						if t.Failed() {
							t.Fatalf("at call %d", n)
						}
					}
				})
			}
		}
	}
}

// faultOnce runs an operation with one fault and reports whether it came to
// that.
func faultOnce(t *testing.T, c faultCase, n int, kind faultKind, commits bool) bool {
	r := newRig(t)
	on := c.setup(r)
	var before []byte
	if len(on) > 0 {
		before = r.contents(on[0])
	}
	start := len(r.disks(r.sr))

	r.faults.arm(n, kind, commits)
	err := c.run(r, on)
	fired := r.faults.hasFired()
	if !fired && err != nil {
		t.Fatalf("without a fault: %v", err)
	}
	r.restart()

	if c.scan {
		r.call("SR.scan", string(r.sr))
	}
	r.wantConsistent()
	end := len(r.disks(r.sr))
	if end != start && end != start+c.disks {
		t.Errorf("%d disks before, %d after", start, end)
	}
	if err == nil && end != start+c.disks {
		t.Errorf("acknowledged, but %d disks before and %d after", start, end)
	}
	if len(on) > 0 && !bytes.Equal(before, r.contents(on[0])) {
		t.Error("a disk that was only read has changed")
	}
	settled := r.disks(r.sr)
	r.restart()
	if again := r.disks(r.sr); !slices.Equal(settled, again) {
		t.Errorf("another restart changes the disks: %q, then %q", settled, again)
	}
	r.wantConsistent()
	return fired
}

// A volume that nobody owns is reclaimed at start-up; one that VDI.forget left
// is not, and comes back with a scan.
func TestReconcile(t *testing.T) {
	r := newRig(t)
	disk := r.disk(2 << 20)
	forgotten := record(r.core, r.disk(2<<20))
	lost := record(r.core, r.disk(2<<20))
	r.call("VDI.forget", r.ref(forgotten.UUID))
	repo, err := r.repos.get(r.sr)
	if err != nil {
		t.Fatal(err)
	}
	orphan := "11111111-2222-4333-8444-555555555555"
	if _, err := repo.Create(t.Context(), orphanSpec(orphan)); err != nil {
		t.Fatal(err)
	}
	if err := repo.Delete(t.Context(), volumeID(lost)); err != nil {
		t.Fatal(err)
	}
	r.restart()

	want := []string{record(r.core, disk).UUID, forgotten.UUID}
	slices.Sort(want)
	if got := r.volumes(r.sr); !slices.Equal(got, want) {
		t.Errorf("volumes after start-up: got %q, want %q", got, want)
	}
	r.view(func(tx *db.Tx) {
		_, v, err := db.ByUUID[xapi.VDI](tx, lost.UUID)
		if err != nil || !v.Missing {
			t.Errorf("the record of the lost volume: %v, missing %v", err, v != nil && v.Missing)
		}
	})
	for _, text := range []string{"reclaimed", orphan, "missing", lost.UUID} {
		if !bytes.Contains(r.records.Bytes(), []byte(text)) {
			t.Errorf("the log does not speak of %q:\n%s", text, r.records)
		}
	}

	r.call("SR.scan", string(r.sr))
	if got := r.disks(r.sr); !slices.Equal(got, want) {
		t.Errorf("disks after a scan: got %q, want %q", got, want)
	}
	r.wantConsistent()
}

// An SR that cannot be opened at start-up does not keep the server from
// starting, says why in its PBD, and is attached when it can be again.
func TestUnavailableSR(t *testing.T) {
	r := newRig(t)
	disk := r.disk(2 << 20)
	uuid := record(r.core, disk).UUID
	good := r.driver
	for _, plug := range []bool{false, true} {
		r.stop(t)
		r.driver.Open = func(context.Context, map[string]string, bool) (storage.Repo, error) {
			return nil, storage.ErrCorrupt
		}
		r.start(t)
		pbd := xapi.Ref[xapi.PBD](r.pbd(r.sr))
		if got := record(r.core, pbd); got.CurrentlyAttached || got.OtherConfig[unavailableKey] == "" {
			t.Errorf("PBD %+v", got)
		}
		r.fails("SR_HAS_NO_PBDS|"+string(r.sr), "VDI.snapshot", r.ref(uuid))
		if plug {
			if _, err := r.try(r.root, "PBD.plug", string(pbd)); code(err) != "VDI_IO_ERROR" {
				t.Errorf("plug: %v", err)
			}
		}
		r.stop(t)
		r.driver = good
		r.start(t)
		if got := record(r.core, pbd); !got.CurrentlyAttached || len(got.OtherConfig) != 0 {
			t.Errorf("PBD %+v", got)
		}
		r.wantConsistent()
	}
}

// A snapshot whose disk is gone still knows, in the storage, which disk that
// was.
func TestAttrsRememberOrigin(t *testing.T) {
	r := newRig(t)
	disk := r.disk(2 << 20)
	uuid := record(r.core, disk).UUID
	snap := r.call("VDI.snapshot", disk).(vdiRef)
	r.call("VDI.destroy", disk)
	r.call("VDI.set_name_label", snap, "renamed")
	r.call("SR.scan", string(r.sr))
	repo, err := r.repos.get(r.sr)
	if err != nil {
		t.Fatal(err)
	}
	info, err := repo.Stat(t.Context(), volumeID(record(r.core, snap)))
	if err != nil {
		t.Fatal(err)
	}
	if at, _ := decodeAttrs(info.Attrs); at.SnapshotOf != uuid || at.Label != "renamed" {
		t.Errorf("attributes %s", info.Attrs)
	}
}

// TestSRFaultAtEveryCall is TestFaultAtEveryCall for what is done to SRs. Of
// each there is afterwards all or nothing: a record, an attached PBD and an
// open repository, or none of them.
func TestSRFaultAtEveryCall(t *testing.T) {
	for name, c := range map[string]struct {
		setup func(r *rig) string
		run   string // on the SR, or on its PBD
	}{
		"create":  {func(r *rig) string { return "" }, "SR.create"},
		"plug":    {func(r *rig) string { return r.detachedSR() }, "PBD.plug"},
		"unplug":  {func(r *rig) string { return r.secondSR() }, "PBD.unplug"},
		"forget":  {func(r *rig) string { return r.detachedSR() }, "SR.forget"},
		"destroy": {func(r *rig) string { return r.detachedSR() }, "SR.destroy"},
	} {
		for _, commits := range []bool{false, true} {
			for _, kind := range []faultKind{failBefore, failAfter, failAlways} {
				t.Run(fmt.Sprintf("%s/commits=%v-%v", name, commits, kind), func(t *testing.T) {
					for n := 1; ; n++ {
						r := newRig(t)
						sr := c.setup(r)
						r.faults.arm(n, kind, commits)
						switch {
						case sr == "":
							_, _ = r.try(r.root, c.run, r.host, map[string]string{}, 0, "second", "", "mem", "user", false)
						case strings.HasPrefix(c.run, "PBD."):
							_, _ = r.try(r.root, c.run, r.pbd(xapi.Ref[xapi.SR](sr)))
						default:
							_, _ = r.try(r.root, c.run, sr)
						}
						fired := r.faults.hasFired()
						r.restart()
						r.view(func(tx *db.Tx) {
							for ref, sr := range db.All[xapi.SR](tx) {
								if len(sr.PBDs) != 1 {
									t.Errorf("call %d: SR %s has PBDs %q", n, sr.NameLabel, sr.PBDs)
								}
								if _, err := r.repos.get(ref); srAttached(tx, ref) != (err == nil) {
									t.Errorf("call %d: SR %s attached %v, its repository: %v", n, sr.NameLabel, srAttached(tx, ref), err)
								}
							}
							for _, pbd := range db.All[xapi.PBD](tx) {
								if _, err := db.Get(tx, pbd.SR); err != nil {
									t.Errorf("call %d: PBD without SR: %v", n, err)
								}
							}
						})
						r.wantConsistent()
						if !fired || t.Failed() {
							return
						}
					}
				})
			}
		}
	}
}

// detachedSR makes an SR whose PBD is unplugged.
func (r *rig) detachedSR() string {
	r.t.Helper()
	sr := r.secondSR()
	r.call("PBD.unplug", r.pbd(xapi.Ref[xapi.SR](sr)))
	return sr
}

// A store that is a copy of another one keeps its volumes: they get no records
// beside those of the original, and are not taken for garbage either.
func TestCopiedStore(t *testing.T) {
	r := newRig(t)
	disk := record(r.core, r.disk(2<<20))
	second := xapi.Ref[xapi.SR](r.secondSR())
	repo, err := r.repos.get(second)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := repo.Create(t.Context(), orphanSpec(disk.UUID)); err != nil {
		t.Fatal(err)
	}
	r.call("SR.scan", string(second))
	r.restart()
	if got := r.volumes(second); !slices.Equal(got, []string{disk.UUID}) {
		t.Errorf("volumes of the copy: %q", got)
	}
	if got := r.disks(second); len(got) != 0 {
		t.Errorf("disks of the copy: %q", got)
	}
	r.wantConsistent()
}
