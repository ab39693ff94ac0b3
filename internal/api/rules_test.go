package api

import (
	"context"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"testing"

	"coppice/internal/db"
	"coppice/internal/storage/cow"
	"coppice/internal/xapi"
)

// allVDIOps are the operations there are on disks.
func allVDIOps() []xapi.VDIOperations {
	var ops []xapi.VDIOperations
	for _, name := range xapi.Datamodel().Enums["vdi_operations"] {
		ops = append(ops, xapi.VDIOperations(name))
	}
	return ops
}

// TestVDIRules brings a disk into each state that a rule speaks of and
// compares what each operation is told. Operations that a case does not name
// are refused with its default; "" allows.
func TestVDIRules(t *testing.T) {
	type outcome = map[string]string // operations, separated by spaces → error
	const (
		needSM    = "mirror resize_online set_on_boot"
		unnamed   = "the rest"
		fromOther = "SR_OPERATION_NOT_SUPPORTED|$sr"
		notSnap   = "OPERATION_NOT_ALLOWED|VDI is not a snapshot: $vdi"
		noCBT     = "VDI_INCOMPATIBLE_TYPE|$vdi|"
	)
	for _, c := range []struct {
		name  string
		state func(r *rig, ref vdiRef)
		want  outcome
	}{
		{"plain", func(r *rig, ref vdiRef) {}, outcome{
			needSM: fromOther, "data_destroy": notSnap, "revert_to": "REVERT_ONLY_ALLOWED_ON_SNAPSHOT", unnamed: "",
		}},
		{"busy", func(r *rig, ref vdiRef) {
			set(r, ref, func(v *xapi.VDI) {
				v.CurrentOperations = map[string]xapi.VDIOperations{"OpaqueRef:t": xapi.VDIOperationsResize}
			})
		}, outcome{unnamed: "OTHER_OPERATION_IN_PROGRESS|VDI|$vdi|resize|OpaqueRef:t"}},
		{"copied", func(r *rig, ref vdiRef) {
			set(r, ref, func(v *xapi.VDI) {
				v.CurrentOperations = map[string]xapi.VDIOperations{"OpaqueRef:t": xapi.VDIOperationsCopy}
			})
		}, outcome{
			"snapshot": "OPERATION_NOT_ALLOWED|Snapshot operation not allowed during copy.",
			needSM:     fromOther, "data_destroy": notSnap, "revert_to": "REVERT_ONLY_ALLOWED_ON_SNAPSHOT", unnamed: "",
		}},
		{"detached SR", func(r *rig, ref vdiRef) { r.call("PBD.unplug", r.pbd(r.sr)) }, outcome{
			"forget blocked force_unlock": "", unnamed: "SR_HAS_NO_PBDS|$sr",
		}},
		{"unmanaged", func(r *rig, ref vdiRef) { set(r, ref, func(v *xapi.VDI) { v.Managed = false }) }, outcome{
			unnamed: "VDI_NOT_MANAGED|$vdi",
		}},
		{"attached RW", attach(xapi.VBDModeRW, false), outcome{
			"snapshot clone blocked enable_cbt disable_cbt": "", "resize_online mirror": fromOther, "data_destroy": notSnap,
			"revert_to": "REVERT_ONLY_ALLOWED_ON_SNAPSHOT", unnamed: "VDI_IN_USE|$vdi|$op",
		}},
		{"attached RO", attach(xapi.VBDModeRO, false), outcome{
			"snapshot clone blocked copy enable_cbt disable_cbt": "", "resize_online mirror": fromOther, "data_destroy": notSnap,
			"revert_to": "REVERT_ONLY_ALLOWED_ON_SNAPSHOT", unnamed: "VDI_IN_USE|$vdi|$op",
		}},
		{"attached to a snapshot VM", attach(xapi.VBDModeRO, true), outcome{
			"snapshot clone blocked copy enable_cbt disable_cbt list_changed_blocks": "", "resize_online mirror": fromOther, "data_destroy": notSnap,
			"revert_to": "REVERT_ONLY_ALLOWED_ON_SNAPSHOT", unnamed: "VDI_IN_USE|$vdi|$op",
		}},
		{"written by the server", func(r *rig, ref vdiRef) { r.t.Cleanup(r.repos.uses.add(ref, writing)) }, outcome{
			"snapshot clone blocked enable_cbt disable_cbt": "", "resize_online mirror": fromOther, "data_destroy": notSnap,
			"revert_to": "REVERT_ONLY_ALLOWED_ON_SNAPSHOT", unnamed: "VDI_IN_USE|$vdi|$op",
		}},
		{"VBD busy", func(r *rig, ref vdiRef) {
			vbd := r.vbd(r.vm("vm"), ref, "0", "RW")
			set(r, vbd, func(b *xapi.VBD) {
				b.CurrentOperations = map[string]xapi.VBDOperations{"OpaqueRef:t": xapi.VBDOperationsPlug}
			})
		}, outcome{"data_destroy": notSnap, unnamed: "OTHER_OPERATION_IN_PROGRESS|VDI|$vdi|plug|OpaqueRef:t"}},
		{"without features", func(r *rig, ref vdiRef) {
			r.update(func(tx *db.Tx) error {
				for sm := range db.All[xapi.SM](tx) {
					if err := db.Modify(tx, sm, func(sm *xapi.SM) { sm.Features = map[string]int64{} }); err != nil {
						return err
					}
				}
				return nil
			})
		}, outcome{"forget copy force_unlock blocked": "", unnamed: fromOther}},
		{"cbt_metadata", func(r *rig, ref vdiRef) {
			set(r, ref, func(v *xapi.VDI) { v.Type = xapi.VDITypeCBTMetadata })
		}, outcome{
			needSM: fromOther, "destroy forget generate_config update force_unlock blocked list_changed_blocks": "", "data_destroy": notSnap,
			unnamed: "VDI_INCOMPATIBLE_TYPE|$vdi|cbt_metadata",
		}},
		{"missing", func(r *rig, ref vdiRef) { set(r, ref, func(v *xapi.VDI) { v.Missing = true }) }, outcome{
			needSM: fromOther, "destroy forget update": "", unnamed: "VDI_MISSING|$sr|$vdi",
		}},
		{"tools SR", func(r *rig, ref vdiRef) { set(r, r.sr, func(s *xapi.SR) { s.IsToolsSR = true }) }, outcome{
			needSM: fromOther, "destroy revert_from data_destroy": fromOther, "revert_to": "REVERT_ONLY_ALLOWED_ON_SNAPSHOT", unnamed: "",
		}},
		{"rrd", func(r *rig, ref vdiRef) { set(r, ref, func(v *xapi.VDI) { v.Type = xapi.VDITypeRRD }) }, outcome{
			needSM: fromOther, "destroy revert_from data_destroy": "VDI_HAS_RRDS|$vdi", "enable_cbt disable_cbt": noCBT + "rrd",
			"revert_to": "REVERT_ONLY_ALLOWED_ON_SNAPSHOT", unnamed: "",
		}},
		{"redo log with HA", func(r *rig, ref vdiRef) {
			set(r, ref, func(v *xapi.VDI) { v.Type = xapi.VDITypeRedoLog })
			set(r, r.pool, func(p *xapi.Pool) { p.HAEnabled = true })
		}, outcome{
			needSM: fromOther, "destroy": "HA_IS_ENABLED", "copy": "OPERATION_NOT_ALLOWED|VDIs of type redo_log cannot be copied.",
			"enable_cbt disable_cbt": noCBT + "redo_log", "data_destroy": notSnap,
			"revert_to": "REVERT_ONLY_ALLOWED_ON_SNAPSHOT", unnamed: "",
		}},
		{"sharable", func(r *rig, ref vdiRef) { set(r, ref, func(v *xapi.VDI) { v.Sharable = true }) }, outcome{
			needSM: fromOther, "snapshot": "VDI_IS_SHARABLE|$vdi", "data_destroy": notSnap, "revert_to": "REVERT_ONLY_ALLOWED_ON_SNAPSHOT", unnamed: "",
		}},
		{"on_boot reset", func(r *rig, ref vdiRef) { set(r, ref, func(v *xapi.VDI) { v.OnBoot = xapi.OnBootReset }) }, outcome{
			needSM: fromOther, "snapshot copy enable_cbt disable_cbt": "VDI_ON_BOOT_MODE_INCOMPATIBLE_WITH_OPERATION", "data_destroy": notSnap,
			"revert_to": "REVERT_ONLY_ALLOWED_ON_SNAPSHOT", unnamed: "",
		}},
		{"snapshot", func(r *rig, ref vdiRef) { set(r, ref, func(v *xapi.VDI) { v.IsASnapshot = true }) }, outcome{
			needSM: fromOther, "resize revert_from": "VDI_READONLY|$vdi", "data_destroy": "VDI_NO_CBT_METADATA|$vdi",
			"enable_cbt disable_cbt": "OPERATION_NOT_ALLOWED|VDI is a snapshot: $vdi", unnamed: "",
		}},
		{"tracked snapshot", func(r *rig, ref vdiRef) {
			set(r, ref, func(v *xapi.VDI) { v.IsASnapshot, v.CBTEnabled = true, true })
		}, outcome{
			needSM: fromOther, "resize revert_from": "VDI_READONLY|$vdi",
			"enable_cbt disable_cbt": "OPERATION_NOT_ALLOWED|VDI is a snapshot: $vdi", unnamed: "",
		}},
		{"on hold", func(r *rig, ref vdiRef) {
			set(r, ref, func(v *xapi.VDI) {
				v.IsASnapshot, v.CBTEnabled, v.OtherConfig = true, true, map[string]string{holdKey: "why"}
			})
		}, outcome{
			needSM: fromOther, "resize revert_from": "VDI_READONLY|$vdi", "destroy data_destroy": "OPERATION_BLOCKED|$vdi|coppice:hold: why",
			"enable_cbt disable_cbt": "OPERATION_NOT_ALLOWED|VDI is a snapshot: $vdi", unnamed: "",
		}},
	} {
		t.Run(c.name, func(t *testing.T) {
			r := newRig(t)
			ref := r.disk(1 << 20)
			c.state(r, ref)
			r.update(func(tx *db.Tx) error {
				for _, op := range allVDIOps() {
					want := c.want[unnamed]
					for ops, w := range c.want {
						if slices.Contains(strings.Fields(ops), string(op)) {
							want = w
						}
					}
					want = strings.NewReplacer("$vdi", string(ref), "$sr", string(r.sr), "$op", string(op)).Replace(want)
					if got := description(r.vdiAllows(tx, ref, op)); got != want {
						t.Errorf("%s: got %q, want %q", op, got, want)
					}
				}
				if err := r.refreshVDI(tx, ref); err != nil {
					return err
				}
				v, err := db.Get(tx, ref)
				if err != nil {
					return err
				}
				for _, op := range v.AllowedOperations {
					if err := r.vdiAllows(tx, ref, op); err != nil || !slices.Contains(publishedVDIOps, op) {
						t.Errorf("%s is advertised: %v", op, err)
					}
				}
				return nil
			})
		})
	}
}

// attach puts a disk on a VM, attached.
func attach(mode xapi.VBDMode, toSnapshot bool) func(r *rig, ref vdiRef) {
	return func(r *rig, ref vdiRef) {
		vm := r.vm("vm")
		vbd := r.vbd(vm, ref, "0", string(mode))
		set(r, vbd, func(b *xapi.VBD) { b.CurrentlyAttached = true })
		set(r, vm, func(v *xapi.VM) { v.IsASnapshot = toSnapshot })
	}
}

// Which operations of an SR run beside each other.
func TestSRRules(t *testing.T) {
	for _, c := range []struct {
		op, cur string
		beside  bool
	}{
		{"vdi_create", "vdi_snapshot", true},
		{"vdi_create", "scan", true},
		{"scan", "vdi_destroy", true},
		{"scan", "scan", false},
		{"update", "scan", false},
		{"vdi_create", "unplug", false},
		{"vdi_create", "destroy", false},
		{"unplug", "vdi_create", false},
		{"destroy", "scan", false},
		{"plug", "destroy", true},
		{"pbd_create", "plug", false},
	} {
		r := newRig(t)
		set(r, r.sr, func(sr *xapi.SR) {
			sr.CurrentOperations = map[string]xapi.StorageOperations{"OpaqueRef:t": xapi.StorageOperations(c.cur)}
		})
		r.view(func(tx *db.Tx) {
			err := r.srAllows(tx, r.sr, xapi.StorageOperations(c.op))
			want := "OTHER_OPERATION_IN_PROGRESS|SR|" + string(r.sr) + "|" + c.cur + "|OpaqueRef:t"
			if got := description(err); (got == want) == c.beside {
				t.Errorf("%s beside %s: %q", c.op, c.cur, got)
			}
		})
	}
}

// TestRaces runs pairs of operations on one disk at the same time, many times,
// on every driver. Each may succeed or fail as declared; afterwards nothing is
// left over: as many volumes as disks, nothing claimed, nothing open.
func TestRaces(t *testing.T) {
	t.Run("mem", func(t *testing.T) { races(t, newRig(t), 4) })
	t.Run("cow", func(t *testing.T) { races(t, newRigOn(t, cow.Driver()), 1) }) // each round syncs to the disk
}

func races(t *testing.T, r *rig, rounds int) {
	type racer struct {
		name string
		run  func(disk, snap vdiRef) error
	}
	message := func(name string, args ...any) racer {
		return racer{name, func(disk, snap vdiRef) error {
			params := []any{disk}
			if name == "VDI.revert" {
				params = []any{snap}
			}
			_, err := r.try(r.root, name, append(params, args...)...)
			return err
		}}
	}
	racers := []racer{
		message("VDI.snapshot"),
		message("VDI.clone"),
		message("VDI.destroy"),
		message("VDI.resize", 8<<20),
		message("VDI.revert"),
		message("VDI.copy", string(r.sr)),
		message("VDI.update"),
		message("VDI.forget"),
		message("VDI.checksum"),
		message("VDI.set_name_label", "other"),
		message("VDI.add_tags", "tag"),
		{"SR.scan", func(vdiRef, vdiRef) error {
			_, err := r.try(r.root, "SR.scan", string(r.sr))
			return err
		}},
		{"import", func(disk, _ vdiRef) error {
			x, err := r.Import(context.Background(), trusted, TransferRequest{
				Session: string(r.root), Action: "put_import_raw_vdi", VDI: string(disk), Length: -1,
			})
			if err != nil {
				return err
			}
			_, err = x.Volume.WriteAt([]byte("imported"), 0)
			return x.Finish(err)
		}},
		{"export", func(disk, _ vdiRef) error {
			x, err := r.Export(context.Background(), trusted, TransferRequest{
				Session: string(r.root), Action: "get_export_raw_vdi", VDI: string(disk),
			})
			if err != nil {
				return err
			}
			_, err = x.Volume.ReadAt(make([]byte, 4096), 0)
			return x.Finish(err)
		}},
		{"unplug and plug", func(vdiRef, vdiRef) error {
			_, err := r.try(r.root, "PBD.unplug", r.pbd(r.sr))
			if _, plug := r.try(r.root, "PBD.plug", r.pbd(r.sr)); plug != nil {
				return plug
			}
			return err
		}},
	}
	allowed := []string{
		"", "HANDLE_INVALID", "VDI_IN_USE", "OPERATION_NOT_ALLOWED", "OTHER_OPERATION_IN_PROGRESS", "SR_HAS_NO_PBDS",
		// A disk that a scan brings back is another object; its old volume may be gone under an open transfer.
		"SR_BACKEND_FAILURE_46", "SR_BACKEND_FAILURE_79",
		"SR_BACKEND_FAILURE_16", // detaching while a copy fills a disk
	}
	rng := rand.New(rand.NewPCG(uint64(t.Name()[0]), 7))
	for i, first := range racers {
		for _, second := range racers[i:] {
			for range rounds {
				disk := r.disk(4 << 20)
				r.write(disk, []byte("data"), 0)
				snap := r.call("VDI.snapshot", disk).(vdiRef)
				var wg sync.WaitGroup
				errs := make([]error, 2)
				both := []racer{first, second}
				if rng.IntN(2) == 0 {
					slices.Reverse(both)
				}
				for k, x := range both {
					wg.Go(func() { errs[k] = x.run(disk, snap) })
				}
				wg.Wait()
				for k, err := range errs {
					if !slices.Contains(allowed, code(err)) {
						t.Errorf("%s beside %s: %v", both[k].name, both[1-k].name, err)
					}
				}
				r.call("SR.scan", string(r.sr)) // finds what was forgotten
				r.wantConsistent()
				if t.Failed() {
					t.Fatalf("after %s beside %s\n%s", first.name, second.name, r.records)
				}
				r.sweep()
			}
		}
	}
}

// sweep destroys every disk of the default SR.
func (r *rig) sweep() {
	r.t.Helper()
	for _, v := range record(r.core, r.sr).VDIs {
		r.call("VDI.destroy", v)
	}
	if left := r.volumes(r.sr); len(left) > 0 {
		r.t.Fatalf("volumes left: %q", left)
	}
}
