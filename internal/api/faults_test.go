package api

import (
	"context"
	"errors"
	"iter"
	"sync"

	"coppice/internal/db"
	"coppice/internal/storage"
)

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

// hostRoom is what the host has left for a repository, in bytes: the real figure
// changes with whatever else it does.
const hostRoom = 1 << 40

func (r *faultRepo) Usage(ctx context.Context) (u storage.Usage, err error) {
	err = r.faults.do(false, func() (err error) { u, err = r.Repo.Usage(ctx); return err })
	u.Free, u.Total = hostRoom, u.Used+hostRoom
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
func (r *faultRepo) ListBare(ctx context.Context) iter.Seq2[storage.Info, error] {
	if b, ok := r.Repo.(storage.BareLister); ok {
		return b.ListBare(ctx)
	}
	return r.Repo.List(ctx)
}

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

func (v *faultVolume) Version(ctx context.Context) (version string, err error) {
	named, ok := v.Volume.(storage.Versioned)
	if !ok {
		return "", storage.ErrInvalid
	}
	err = v.faults.do(false, func() (err error) { version, err = named.Version(ctx); return err })
	return version, err
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
