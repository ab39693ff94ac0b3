package api

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"iter"
	"log/slog"
	"maps"
	"slices"
	"sync"
	"testing"

	"coppice/internal/db"
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
	r.core = &core{API: a, t: t, records: &log.Buffer}
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
	if err := readOrZero(v, p, 0); err != nil {
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

// errInjected is what faults return.
var errInjected = errors.New("injected fault")

// faultKind says how a chosen call fails.
type faultKind int

const (
	failBefore faultKind = iota // it does nothing
	failAfter                   // it does its work and says that it did not
	failAlways                  // it and everything after it does nothing, as if the machine stopped
)

func (k faultKind) String() string { return [...]string{"before", "after", "always"}[k] }

// faults makes the n-th call to the storage fail. The zero value never does.
type faults struct {
	mu    sync.Mutex
	n     int // calls until it happens; 0 is never
	kind  faultKind
	down  bool
	fired bool
	store bool   // the calls counted are the commits of the database
	write func() // called by every write to a volume

	noLabels bool // attributes of repos cannot be changed
}

// onWrite has fn called by every write to a volume, nil ends that.
func (f *faults) onWrite(fn func()) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.write = fn
}

// arm makes the n-th call from now fail, counting commits or storage calls.
func (f *faults) arm(n int, kind faultKind, commits bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.n, f.kind, f.down, f.fired, f.store = n, kind, false, false, commits
}

func (f *faults) disarm() {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.n, f.down = 0, false
}

func (f *faults) hasFired() bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.fired
}

// refuseLabels makes every change of a repo's own attributes fail.
func (f *faults) refuseLabels(on bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.noLabels = on
}

func (f *faults) refusesLabels() bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.noLabels || f.down
}

// next says whether the call that is about to be made fails, and how.
func (f *faults) next(commit bool) (fail bool, kind faultKind) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.down {
		return true, failAlways
	}
	if f.n == 0 || f.store != commit {
		return false, 0
	}
	if f.n--; f.n > 0 {
		return false, 0
	}
	f.fired, f.down = true, f.kind == failAlways
	return true, f.kind
}

// do makes a call that may fail.
func (f *faults) do(commit bool, call func() error) error {
	fail, kind := f.next(commit)
	if fail && kind != failAfter {
		return errInjected
	}
	if err := call(); err != nil {
		return err
	}
	if fail {
		return errInjected
	}
	return nil
}

// faultStore is a store of the database that can fail.
type faultStore struct {
	db.Store
	faults *faults
}

func (s *faultStore) Commit(ctx context.Context, b db.Batch) error {
	return s.faults.do(true, func() error { return s.Store.Commit(ctx, b) })
}

// driver makes the repos and volumes of a driver fail.
func (f *faults) driver(d storage.Driver) storage.Driver {
	open := d.Open
	d.Open = func(ctx context.Context, config map[string]string, create bool) (storage.Repo, error) {
		r, err := open(ctx, config, create)
		if err != nil {
			return nil, err
		}
		return &faultRepo{Repo: r, faults: f}, nil
	}
	return d
}

// faultRepo is a repo with all powers that can fail.
type faultRepo struct {
	storage.Repo
	faults *faults
}

func (r *faultRepo) Create(ctx context.Context, s storage.Spec) (info storage.Info, err error) {
	err = r.faults.do(false, func() (err error) { info, err = r.Repo.Create(ctx, s); return err })
	return info, err
}

func (r *faultRepo) Stat(ctx context.Context, id storage.ID) (info storage.Info, err error) {
	err = r.faults.do(false, func() (err error) { info, err = r.Repo.Stat(ctx, id); return err })
	return info, err
}

func (r *faultRepo) Open(ctx context.Context, id storage.ID, m storage.Mode) (v storage.Volume, err error) {
	err = r.faults.do(false, func() (err error) { v, err = r.Repo.Open(ctx, id, m); return err })
	if err != nil {
		if v != nil {
			v.Close()
		}
		return nil, err
	}
	return &faultVolume{Volume: v, faults: r.faults}, nil
}

func (r *faultRepo) Snapshot(ctx context.Context, d storage.Derived) (info storage.Info, err error) {
	err = r.faults.do(false, func() (err error) { info, err = r.Repo.Snapshot(ctx, d); return err })
	return info, err
}

func (r *faultRepo) SnapshotGroup(ctx context.Context, ds []storage.Derived) (infos []storage.Info, err error) {
	err = r.faults.do(false, func() (err error) {
		infos, err = r.Repo.(storage.GroupSnapshotter).SnapshotGroup(ctx, ds)
		return err
	})
	return infos, err
}

func (r *faultRepo) Clone(ctx context.Context, d storage.Derived) (info storage.Info, err error) {
	err = r.faults.do(false, func() (err error) { info, err = r.Repo.Clone(ctx, d); return err })
	return info, err
}

func (r *faultRepo) Delete(ctx context.Context, id storage.ID) error {
	return r.faults.do(false, func() error { return r.Repo.Delete(ctx, id) })
}

func (r *faultRepo) Usage(ctx context.Context) (u storage.Usage, err error) {
	err = r.faults.do(false, func() (err error) { u, err = r.Repo.Usage(ctx); return err })
	return u, err
}

func (r *faultRepo) Resize(ctx context.Context, id storage.ID, size int64) (info storage.Info, err error) {
	err = r.faults.do(false, func() (err error) { info, err = r.Repo.(storage.Resizer).Resize(ctx, id, size); return err })
	return info, err
}

func (r *faultRepo) Revert(ctx context.Context, id, to storage.ID) error {
	return r.faults.do(false, func() error { return r.Repo.(storage.Reverter).Revert(ctx, id, to) })
}

func (r *faultRepo) SetAttrs(ctx context.Context, id storage.ID, attrs []byte) error {
	return r.faults.do(false, func() error { return r.Repo.(storage.Attributer).SetAttrs(ctx, id, attrs) })
}

func (r *faultRepo) Diff(ctx context.Context, from, to storage.Volume, off int64) iter.Seq2[storage.Extent, error] {
	return func(yield func(storage.Extent, error) bool) {
		if fail, _ := r.faults.next(false); fail {
			yield(storage.Extent{}, errInjected)
			return
		}
		r.Repo.(storage.Differ).Diff(ctx, from.(*faultVolume).Volume, to.(*faultVolume).Volume, off)(yield)
	}
}

func (r *faultRepo) DestroyData(ctx context.Context, id storage.ID) error {
	return r.faults.do(false, func() error { return r.Repo.(storage.DataDestroyer).DestroyData(ctx, id) })
}

func (r *faultRepo) ChangedSince(ctx context.Context, from storage.ID, to storage.Volume, off int64) iter.Seq2[storage.Extent, error] {
	return func(yield func(storage.Extent, error) bool) {
		if fail, _ := r.faults.next(false); fail {
			yield(storage.Extent{}, errInjected)
			return
		}
		r.Repo.(storage.ChangeTracker).ChangedSince(ctx, from, to.(*faultVolume).Volume, off)(yield)
	}
}

// What only looks does not count.
func (r *faultRepo) WouldFree(ctx context.Context, ids ...storage.ID) (storage.Freed, error) {
	return r.Repo.(storage.SpaceEstimator).WouldFree(ctx, ids...)
}

func (r *faultRepo) WrittenSinceParent(ctx context.Context, id storage.ID) (int64, error) {
	if w, ok := r.Repo.(storage.WriteCounter); ok {
		return w.WrittenSinceParent(ctx, id)
	}
	return -1, nil
}

func (r *faultRepo) Scrub(ctx context.Context, o storage.ScrubOptions) iter.Seq2[storage.Problem, error] {
	return r.Repo.(storage.Scrubber).Scrub(ctx, o)
}

func (r *faultRepo) Damage(ctx context.Context) ([]storage.Problem, error) {
	if l, ok := r.Repo.(storage.DamageLister); ok {
		return l.Damage(ctx)
	}
	return nil, nil
}

// The attributes of the repo are set at any time, so they do not count, but
// do fail when everything does.
func (r *faultRepo) RepoAttrs(ctx context.Context) ([]byte, error) {
	return r.Repo.(storage.Labeled).RepoAttrs(ctx)
}

func (r *faultRepo) SetRepoAttrs(ctx context.Context, attrs []byte) error {
	if r.faults.refusesLabels() {
		return errInjected
	}
	return r.Repo.(storage.Labeled).SetRepoAttrs(ctx, attrs)
}

// faultVolume is a volume that can fail.
type faultVolume struct {
	storage.Volume
	faults *faults
}

func (v *faultVolume) ReadAt(p []byte, off int64) (n int, err error) {
	err = v.faults.do(false, func() (err error) { n, err = v.Volume.ReadAt(p, off); return err })
	if errors.Is(err, errInjected) {
		n = 0
	}
	return n, err
}

func (v *faultVolume) WriteAt(p []byte, off int64) (n int, err error) {
	v.faults.mu.Lock()
	hook := v.faults.write
	v.faults.mu.Unlock()
	if hook != nil {
		hook()
	}
	err = v.faults.do(false, func() (err error) { n, err = v.Volume.WriteAt(p, off); return err })
	return n, err
}

func (v *faultVolume) Zero(ctx context.Context, off, n int64) error {
	return v.faults.do(false, func() error { return v.Volume.Zero(ctx, off, n) })
}

func (v *faultVolume) Flush(ctx context.Context) error {
	return v.faults.do(false, func() error { return v.Volume.Flush(ctx) })
}

func (v *faultVolume) Extents(ctx context.Context, off, n int64) iter.Seq2[storage.Extent, error] {
	return func(yield func(storage.Extent, error) bool) {
		if fail, _ := v.faults.next(false); fail {
			yield(storage.Extent{}, errInjected)
			return
		}
		v.Volume.Extents(ctx, off, n)(yield)
	}
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
