package api

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"slices"
	"sync"
	"testing"

	"coppice/internal/db"
	"coppice/internal/rpc"
	"coppice/internal/storage"
	"coppice/internal/storage/mem"
	"coppice/internal/xapi"
)

// rig is a whole API over the memory driver, whose storage and database can
// be made to fail, and which can be stopped and started again.
type rig struct {
	*core
	faults *faults
	store  *faultStore
	driver storage.Driver
	dir    string            // the data directory
	sr     xapi.Ref[xapi.SR] // the default one
	dom0   xapi.Ref[xapi.VM]
	adjust func(*Config) // of the next start, nil for none
	tongue *rpc.Dialect  // of all starts; see core
}

func newRig(t *testing.T) *rig {
	t.Helper()
	return newRigOn(t, mem.Driver())
}

// newRigOn makes a rig whose SRs are of the driver.
func newRigOn(t *testing.T, d storage.Driver) *rig {
	t.Helper()
	f := &faults{}
	r := &rig{faults: f, store: &faultStore{Store: db.NewMemStore(), faults: f}, driver: d, dir: t.TempDir()}
	r.start(t)
	t.Cleanup(func() { r.stop(t) })
	return r
}

// start opens the database and makes the API.
func (r *rig) start(t *testing.T) {
	t.Helper()
	if err := r.tryStart(t); err != nil {
		t.Fatal(err)
	}
}

// tryStart is start that may fail, and leaves nothing open then.
func (r *rig) tryStart(t *testing.T) error {
	t.Helper()
	d, err := db.Open(t.Context(), xapi.Datamodel(), r.store)
	if err != nil {
		t.Fatal(err)
	}
	log := new(lockedBuffer)
	cfg := Config{
		DB:      d,
		Storage: storage.Registry{r.driver.Type: r.faults.driver(r.driver)},
		Log:     slog.New(slog.NewTextHandler(log, nil)),
		Version: "1.2.3", DataDir: r.dir,
	}
	if r.adjust != nil {
		r.adjust(&cfg)
	}
	a, err := New(context.Background(), cfg)
	if err != nil {
		return errors.Join(fmt.Errorf("start: %w\n%s", err, log.String()), d.Close())
	}
	r.core = &core{API: a, t: t, records: &log.Buffer, spoken: r.tongue}
	if r.root, err = a.Login(t.Context(), trusted, "root", "any"); err != nil {
		t.Fatal(err)
	}
	r.view(func(tx *db.Tx) {
		for ref, p := range db.All[xapi.Pool](tx) {
			r.pool, r.host, r.sr = ref, p.Master, p.DefaultSR
		}
		if h, err := db.Get(tx, r.host); err == nil {
			r.dom0 = h.ControlDomain
		}
	})
	return nil
}

func (r *rig) stop(t *testing.T) {
	t.Helper()
	if err := r.API.Close(); err != nil {
		t.Errorf("close the API: %v", err)
	}
	if err := r.API.db.Close(); err != nil {
		t.Errorf("close the database: %v", err)
	}
}

// restart stops the API and starts it again on what it left behind, without
// faults.
func (r *rig) restart() {
	r.t.Helper()
	t := r.t
	r.stop(t)
	r.faults.disarm()
	r.start(t)
}

func (r *rig) view(fn func(*db.Tx)) {
	r.t.Helper()
	_ = r.API.db.View(func(tx *db.Tx) error { fn(tx); return nil })
}

// disk makes a disk of size bytes.
func (r *rig) disk(size int64) xapi.Ref[xapi.VDI] {
	r.t.Helper()
	return r.call("VDI.create", diskArgs(r.sr, size)).(xapi.Ref[xapi.VDI])
}

// diskArgs are the arguments of VDI.create.
func diskArgs(sr xapi.Ref[xapi.SR], size int64) map[string]any {
	return map[string]any{
		"SR": string(sr), "virtual_size": size, "type": "user", "sharable": false, "read_only": false,
		"other_config": map[string]any{}, "name_label": "disk",
	}
}

// volume opens the volume of a disk.
func (r *rig) volume(ref xapi.Ref[xapi.VDI]) storage.Volume {
	r.t.Helper()
	v := record(r.core, ref)
	repo, err := r.repos.get(v.SR)
	if err != nil {
		r.t.Fatal(err)
	}
	vol, err := repo.Open(r.t.Context(), storage.ID(v.UUID), storage.Live)
	if err != nil {
		r.t.Fatal(err)
	}
	return vol
}

// write puts bytes into a disk.
func (r *rig) write(ref xapi.Ref[xapi.VDI], p []byte, off int64) {
	r.t.Helper()
	v := r.volume(ref)
	defer v.Close()
	if _, err := v.WriteAt(p, off); err != nil {
		r.t.Fatal(err)
	}
}

// contents reads a whole disk.
func (r *rig) contents(ref xapi.Ref[xapi.VDI]) []byte {
	r.t.Helper()
	v := r.volume(ref)
	defer v.Close()
	p := make([]byte, v.Size())
	if err := storage.ReadFull(v, p, 0); err != nil {
		r.t.Fatal(err)
	}
	return p
}

// disks returns the UUIDs of the disks of an SR, sorted.
func (r *rig) disks(sr xapi.Ref[xapi.SR]) []string {
	ids := []string{}
	r.view(func(tx *db.Tx) {
		for _, v := range db.All[xapi.VDI](tx) {
			if v.SR == sr {
				ids = append(ids, v.UUID)
			}
		}
	})
	slices.Sort(ids)
	return ids
}

// volumes returns the IDs of the volumes of an SR, sorted.
func (r *rig) volumes(sr xapi.Ref[xapi.SR]) []string {
	r.t.Helper()
	repo, err := r.repos.get(sr)
	if err != nil {
		r.t.Fatal(err)
	}
	ids := []string{}
	for info, err := range repo.List(r.t.Context()) {
		if err != nil {
			r.t.Fatal(err)
		}
		ids = append(ids, string(info.ID))
	}
	return ids
}

// wantConsistent checks that each disk of the default SR has its volume and
// each volume its disk, and that records and volumes say the same.
func (r *rig) wantConsistent() {
	r.t.Helper()
	if disks, volumes := r.disks(r.sr), r.volumes(r.sr); !slices.Equal(disks, volumes) {
		r.t.Errorf("disks %q and volumes %q are not the same", disks, volumes)
	}
	repo, err := r.repos.get(r.sr)
	if err != nil {
		r.t.Fatal(err)
	}
	repo.attrs.Lock()
	stale := repo.attrsStale
	repo.attrs.Unlock()
	r.view(func(tx *db.Tx) {
		var allocated int64
		for ref, v := range db.All[xapi.VDI](tx) {
			if v.SR != r.sr {
				continue
			}
			allocated += v.VirtualSize
			info, err := repo.Stat(r.t.Context(), storage.ID(v.UUID))
			switch {
			case err != nil:
				r.t.Errorf("VDI %s: %v", v.UUID, err)
			case info.Size != v.VirtualSize:
				r.t.Errorf("VDI %s: size %d, its volume has %d", v.UUID, v.VirtualSize, info.Size)
			case v.Missing:
				r.t.Errorf("VDI %s is missing", v.UUID)
			case info.NoData != (v.Type == xapi.VDITypeCBTMetadata):
				r.t.Errorf("VDI %s: type %s, its volume is without data: %v", v.UUID, v.Type, info.NoData)
			case !stale && !bytes.Equal(info.Attrs, attrsOf(tx, v).inherit(info.Attrs).encode()):
				r.t.Errorf("VDI %s: the volume says %s, the record %s", v.UUID, info.Attrs, attrsOf(tx, v).inherit(info.Attrs).encode())
			case len(v.CurrentOperations) > 0:
				r.t.Errorf("VDI %s has current_operations %v", v.UUID, v.CurrentOperations)
			}
			if want := r.allowedVDIOps(tx, ref); !slices.Equal(v.AllowedOperations, want) {
				r.t.Errorf("VDI %s: allowed_operations %q, the rules say %q", v.UUID, v.AllowedOperations, want)
			}
		}
		sr, err := db.Get(tx, r.sr)
		if err != nil {
			r.t.Error(err)
			return
		}
		if sr.VirtualAllocation != allocated {
			r.t.Errorf("virtual_allocation %d, the disks have %d", sr.VirtualAllocation, allocated)
		}
		if want := r.allowedSROps(tx, r.sr); !slices.Equal(sr.AllowedOperations, want) {
			r.t.Errorf("SR: allowed_operations %q, the rules say %q", sr.AllowedOperations, want)
		}
		if len(sr.CurrentOperations) > 0 {
			r.t.Errorf("SR has current_operations %v", sr.CurrentOperations)
		}
	})
	repo.mu.Lock()
	if repo.mu.held > 0 || repo.mu.scans > 0 || len(repo.mu.reserved) > 0 || len(repo.mu.touched) > 0 {
		r.t.Errorf("the repository is still held (%d), scanned (%d) or reserved %v", repo.mu.held, repo.mu.scans, repo.mu.reserved)
	}
	repo.mu.Unlock()
	if len(r.repos.uses.n) > 0 {
		r.t.Errorf("disks still counted as open: %v", slices.Collect(maps.Keys(r.repos.uses.n)))
	}
}

type lockedBuffer struct {
	mu sync.Mutex
	bytes.Buffer
}

func (b *lockedBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.Buffer.Write(p)
}

func volumeID(v *xapi.VDI) storage.ID { return storage.ID(v.UUID) }

func orphanSpec(id string) storage.Spec { return storage.Spec{ID: storage.ID(id), Size: 2 << 20} }

// ref returns the reference of a disk by its UUID.
func (r *rig) ref(uuid string) (ref xapi.Ref[xapi.VDI]) {
	r.t.Helper()
	r.view(func(tx *db.Tx) {
		var err error
		if ref, _, err = db.ByUUID[xapi.VDI](tx, uuid); err != nil {
			r.t.Fatal(err)
		}
	})
	return ref
}

// secondSR makes another SR.
func (r *rig) secondSR() string {
	r.t.Helper()
	return string(r.call("SR.create", r.host, map[string]string{}, 0, "second", "", r.driver.Type, "user", false).(xapi.Ref[xapi.SR]))
}

// vm makes a halted VM.
func (r *rig) vm(name string) xapi.Ref[xapi.VM] {
	r.t.Helper()
	return r.call("VM.create", vmArgs(name)).(xapi.Ref[xapi.VM])
}

// vmArgs are the mandatory arguments of VM.create.
func vmArgs(name string) map[string]any {
	args := map[string]any{"name_label": name, "memory_static_max": 1 << 30, "memory_static_min": 1 << 29}
	args["memory_dynamic_max"], args["memory_dynamic_min"] = 1<<30, 1<<29
	for _, f := range xapi.ClassOf[xapi.VM]().Fields {
		if _, given := args[f.Name]; given || f.HasDefault || f.Qualifier == xapi.DynamicRO {
			continue
		}
		switch f.Type.Kind {
		case xapi.KindInt:
			args[f.Name] = 1
		case xapi.KindBool:
			args[f.Name] = false
		case xapi.KindMap:
			args[f.Name] = map[string]any{}
		case xapi.KindEnum:
			args[f.Name] = f.Type.Values()[0]
		case xapi.KindRef:
			args[f.Name] = xapi.NullRef
		default:
			args[f.Name] = ""
		}
	}
	for k, v := range args {
		if n, ok := v.(int); ok {
			args[k] = int64(n)
		}
	}
	return args
}

// vbdArgs are the arguments of VBD.create.
func vbdArgs(vm xapi.Ref[xapi.VM], vdi xapi.Ref[xapi.VDI], device, mode string) map[string]any {
	return map[string]any{
		"VM": string(vm), "VDI": string(vdi), "userdevice": device, "bootable": false, "mode": mode, "type": "Disk",
		"unpluggable": true, "empty": false, "other_config": map[string]any{}, "qos_algorithm_type": "",
		"qos_algorithm_params": map[string]any{},
	}
}

func (r *rig) vbd(vm xapi.Ref[xapi.VM], vdi xapi.Ref[xapi.VDI], device, mode string) xapi.Ref[xapi.VBD] {
	r.t.Helper()
	return r.call("VBD.create", vbdArgs(vm, vdi, device, mode)).(xapi.Ref[xapi.VBD])
}

// wait waits until a task has ended.
func (r *rig) wait(task xapi.Ref[xapi.Task]) {
	r.t.Helper()
	for {
		var rev uint64
		var status xapi.TaskStatusType
		r.view(func(tx *db.Tx) {
			rev = tx.Revision()
			got, err := db.Get(tx, task)
			if err != nil {
				r.t.Fatal(err)
			}
			status = got.Status
		})
		if status != xapi.TaskStatusTypePending {
			return
		}
		if err := r.API.db.Wait(r.t.Context(), rev); err != nil {
			r.t.Fatal(err)
		}
	}
}
