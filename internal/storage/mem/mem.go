// Package mem is a storage driver that keeps volumes in the memory of the
// process. It has every power of the contract but that of telling damage, so
// it serves as the model that other drivers are compared with, and for scratch
// repositories that may vanish with the server.
//
// The contents of a volume are an ordered map from unit number to an immutable
// page. Snapshots, clones, pinned volumes and iterations take a copy of the
// map that shares its nodes, which costs the same whatever the size; a page
// that two maps share is recognised by its address. A unit of zeros is not in
// the map.
//
// The lock order is: repository, then volumes in the order of their IDs.
package mem

import (
	"cmp"
	"context"
	"fmt"
	"iter"
	"slices"
	"sync"
	"sync/atomic"

	"coppice/internal/storage"

	"github.com/tidwall/btree"
	"golang.org/x/sys/unix"
)

// Driver returns the driver. Repositories live in the value that is returned,
// by location, so one that is closed is found again, with its contents, until
// the process ends.
func Driver() storage.Driver {
	h := &host{stores: map[string]*store{}}
	return storage.Driver{
		Type:        "mem",
		Description: "Volumes in the memory of the server, lost when it stops",
		Config: map[string]string{
			"location": "name of the repository within the server",
		},
		Open:     h.open,
		Destroy:  h.destroy,
		Features: storage.Features(&repo{}),
	}
}

// host is where repositories live while they are closed.
type host struct {
	mu     sync.Mutex
	stores map[string]*store // guarded by mu
}

func (h *host) open(ctx context.Context, config map[string]string, create bool) (storage.Repo, error) {
	if ctx.Err() != nil {
		return nil, context.Cause(ctx)
	}
	name := config["location"]
	h.mu.Lock()
	defer h.mu.Unlock()
	s := h.stores[name]
	switch {
	case s == nil && !create:
		return nil, fmt.Errorf("open repository %q: %w", name, storage.ErrNoRepo)
	case s == nil:
		s = &store{pins: map[*pinned]struct{}{}}
		h.stores[name] = s
	case s.open:
		return nil, fmt.Errorf("open repository %q: %w", name, storage.ErrLocked)
	}
	s.open = true
	return &repo{host: h, store: s}, nil
}

func (h *host) destroy(ctx context.Context, config map[string]string) error {
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	name := config["location"]
	h.mu.Lock()
	defer h.mu.Unlock()
	s := h.stores[name]
	switch {
	case s == nil:
		return fmt.Errorf("destroy repository %q: %w", name, storage.ErrNoRepo)
	case s.open:
		return fmt.Errorf("destroy repository %q: %w", name, storage.ErrLocked)
	}
	delete(h.stores, name)
	return nil
}

// store is what outlives a repo that is closed.
type store struct {
	open bool // guarded by host.mu

	mu      sync.RWMutex
	volumes btree.Map[storage.ID, *volume] // guarded by mu, as is all below
	pins    map[*pinned]struct{}           // that are open
	attrs   []byte                         // of the repository; never changed in place

	changes atomic.Uint64 // of any volume
}

// stamp marks a change of c.
func (s *store) stamp(c *contents) { c.version = s.changes.Add(1) }

// repo is an open store.
type repo struct {
	host   *host
	store  *store
	closed atomic.Bool
}

var (
	_ storage.Repo             = (*repo)(nil)
	_ storage.Resizer          = (*repo)(nil)
	_ storage.Reverter         = (*repo)(nil)
	_ storage.GroupSnapshotter = (*repo)(nil)
	_ storage.Differ           = (*repo)(nil)
	_ storage.RangeCloner      = (*repo)(nil)
	_ storage.Attributer       = (*repo)(nil)
	_ storage.DataDestroyer    = (*repo)(nil)
	_ storage.ChangeTracker    = (*repo)(nil)
	_ storage.SpaceEstimator   = (*repo)(nil)
	_ storage.Checker          = (*repo)(nil)
	_ storage.Scrubber         = (*repo)(nil)
	_ storage.Labeled          = (*repo)(nil)
)

// volume is a volume with a name.
type volume struct {
	id       storage.ID
	readOnly bool

	mu     sync.RWMutex
	data   contents   // guarded by mu, as is all below
	parent storage.ID // also guarded by store.mu: written under both
	attrs  []byte     // never changed in place
	gone   bool
	ghost  *ghost // what is left of data that has been destroyed; nil while there is data
}

// info describes v, which the caller has locked.
func (v *volume) info() storage.Info {
	return storage.Info{
		ID: v.id, Size: v.data.size, ReadOnly: v.readOnly, NoData: v.ghost != nil, Parent: v.parent,
		Used: int64(v.data.pages.Len()) * storage.Unit, Attrs: slices.Clone(v.attrs),
	}
}

// heir is the parent of what takes over the contents of v.
func (v *volume) heir() storage.ID {
	if v.readOnly {
		return v.id
	}
	return v.parent
}

// usable refuses work on a closed repo or with a cancelled context.
func (r *repo) usable(ctx context.Context) error {
	switch {
	case r.closed.Load():
		return storage.ErrClosed
	case ctx.Err() != nil:
		return context.Cause(ctx)
	}
	return nil
}

// find returns the volume of an ID. The caller holds the store's lock.
func (r *repo) find(id storage.ID) (*volume, error) {
	v, ok := r.store.volumes.Get(id)
	if !ok {
		return nil, storage.ErrNotFound
	}
	return v, nil
}

// source is find for a volume whose contents are wanted.
func (r *repo) source(id storage.ID) (*volume, error) {
	v, err := r.find(id)
	if err == nil && v.ghost != nil {
		return nil, storage.ErrNoData
	}
	return v, err
}

// update runs fn with the store locked, unless the repo is not usable, and
// says what was being done in its error.
func (r *repo) update(ctx context.Context, doing string, id storage.ID, fn func() error) error {
	r.store.mu.Lock()
	defer r.store.mu.Unlock()
	err := r.usable(ctx)
	if err == nil {
		err = fn()
	}
	if err != nil {
		return fmt.Errorf("%s volume %s: %w", doing, id, err)
	}
	return nil
}

func (r *repo) Create(ctx context.Context, spec storage.Spec) (info storage.Info, err error) {
	err = r.update(ctx, "create", spec.ID, func() error {
		if err := spec.Validate(); err != nil {
			return err
		}
		if _, ok := r.store.volumes.Get(spec.ID); ok {
			return storage.ErrExists
		}
		v := &volume{id: spec.ID, data: newContents(spec.Size), attrs: slices.Clone(spec.Attrs)}
		r.store.stamp(&v.data)
		r.store.volumes.Set(v.id, v)
		info = v.info()
		return nil
	})
	return info, err
}

func (r *repo) Stat(ctx context.Context, id storage.ID) (storage.Info, error) {
	r.store.mu.RLock()
	defer r.store.mu.RUnlock()
	err := r.usable(ctx)
	if err == nil {
		var v *volume
		if v, err = r.find(id); err == nil {
			v.mu.RLock()
			defer v.mu.RUnlock()
			return v.info(), nil
		}
	}
	return storage.Info{}, fmt.Errorf("stat volume %s: %w", id, err)
}

func (r *repo) List(ctx context.Context) iter.Seq2[storage.Info, error] {
	return func(yield func(storage.Info, error) bool) {
		var after storage.ID
		for {
			info, ok, err := r.nextVolume(ctx, after)
			if err != nil {
				yield(storage.Info{}, fmt.Errorf("list volumes: %w", err))
				return
			}
			if !ok || !yield(info, nil) {
				return
			}
			after = info.ID
		}
	}
}

// nextVolume describes the first volume with a larger ID.
func (r *repo) nextVolume(ctx context.Context, after storage.ID) (info storage.Info, ok bool, err error) {
	r.store.mu.RLock()
	defer r.store.mu.RUnlock()
	if err := r.usable(ctx); err != nil {
		return storage.Info{}, false, err
	}
	r.store.volumes.Ascend(after, func(id storage.ID, v *volume) bool {
		if id == after {
			return true
		}
		v.mu.RLock()
		defer v.mu.RUnlock()
		info, ok = v.info(), true
		return false
	})
	return info, ok, nil
}

func (r *repo) Open(ctx context.Context, id storage.ID, m storage.Mode) (storage.Volume, error) {
	r.store.mu.Lock()
	defer r.store.mu.Unlock()
	err := r.usable(ctx)
	if err == nil {
		var v *volume
		if v, err = r.source(id); err == nil {
			if m == storage.Live {
				return &live{handle: handle{repo: r}, v: v}, nil
			}
			v.mu.Lock()
			defer v.mu.Unlock()
			p := &pinned{handle: handle{repo: r}, data: v.data.copy(), parent: v.heir()}
			r.store.pins[p] = struct{}{}
			return p, nil
		}
	}
	return nil, fmt.Errorf("open volume %s: %w", id, err)
}

func (r *repo) Snapshot(ctx context.Context, d storage.Derived) (storage.Info, error) {
	infos, err := r.derive(ctx, "snapshot", true, d)
	if err != nil {
		return storage.Info{}, err
	}
	return infos[0], nil
}

func (r *repo) Clone(ctx context.Context, d storage.Derived) (storage.Info, error) {
	infos, err := r.derive(ctx, "clone", false, d)
	if err != nil {
		return storage.Info{}, err
	}
	return infos[0], nil
}

func (r *repo) SnapshotGroup(ctx context.Context, ds []storage.Derived) ([]storage.Info, error) {
	return r.derive(ctx, "snapshot", true, ds...)
}

// derive makes volumes with the contents that their sources have at one
// instant.
func (r *repo) derive(ctx context.Context, doing string, readOnly bool, ds ...storage.Derived) ([]storage.Info, error) {
	if len(ds) == 0 {
		return nil, r.usable(ctx)
	}
	infos := make([]storage.Info, len(ds))
	err := r.update(ctx, doing, ds[0].Source, func() error {
		sources := make([]*volume, len(ds))
		seen := map[storage.ID]bool{}
		for i, d := range ds {
			if err := d.Validate(); err != nil {
				return err
			}
			v, err := r.source(d.Source)
			if err != nil {
				return err
			}
			if _, ok := r.store.volumes.Get(d.ID); ok {
				return storage.ErrExists
			}
			if seen[d.Source] || seen[d.ID] {
				return fmt.Errorf("%w: a volume occurs twice in the group", storage.ErrInvalid)
			}
			seen[d.Source], seen[d.ID] = true, true
			sources[i] = v
		}
		byID := slices.SortedFunc(slices.Values(sources), func(a, b *volume) int { return cmp.Compare(a.id, b.id) })
		for _, v := range byID {
			v.mu.Lock()
			defer v.mu.Unlock()
		}
		for i, d := range ds {
			src := sources[i]
			v := &volume{
				id: d.ID, readOnly: readOnly, data: src.data.copy(),
				parent: src.heir(), attrs: slices.Clone(d.Attrs),
			}
			if readOnly && !src.readOnly {
				src.parent = v.id
			}
			r.store.volumes.Set(v.id, v)
			infos[i] = v.info()
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	return infos, nil
}

func (r *repo) Revert(ctx context.Context, id, to storage.ID) error {
	return r.update(ctx, "revert", id, func() error {
		v, err := r.find(id)
		if err != nil {
			return err
		}
		src, err := r.source(to)
		switch {
		case err != nil:
			return err
		case v.readOnly:
			return storage.ErrReadOnly
		case v == src:
			return nil
		}
		src.mu.Lock()
		data, parent := src.data.copy(), src.heir()
		src.mu.Unlock()
		v.mu.Lock()
		defer v.mu.Unlock()
		v.data, v.parent = data, parent
		return nil
	})
}

func (r *repo) Resize(ctx context.Context, id storage.ID, size int64) (info storage.Info, err error) {
	err = r.update(ctx, "resize", id, func() error {
		if err := storage.ValidateSize(size); err != nil {
			return err
		}
		v, err := r.find(id)
		if err != nil {
			return err
		}
		if v.readOnly {
			return storage.ErrReadOnly
		}
		v.mu.Lock()
		defer v.mu.Unlock()
		v.data.resize(size)
		r.store.stamp(&v.data)
		info = v.info()
		return nil
	})
	return info, err
}

func (r *repo) SetAttrs(ctx context.Context, id storage.ID, attrs []byte) error {
	return r.update(ctx, "set attributes of", id, func() error {
		if err := storage.ValidateAttrs(attrs); err != nil {
			return err
		}
		v, err := r.find(id)
		if err != nil {
			return err
		}
		v.mu.Lock()
		defer v.mu.Unlock()
		v.attrs = slices.Clone(attrs)
		return nil
	})
}

func (r *repo) Delete(ctx context.Context, id storage.ID) error {
	return r.update(ctx, "delete", id, func() error {
		v, err := r.find(id)
		if err != nil {
			return err
		}
		r.store.volumes.Delete(id)
		r.store.volumes.Scan(func(_ storage.ID, child *volume) bool {
			if child.parent == id {
				child.mu.Lock()
				child.parent = v.parent
				child.mu.Unlock()
			}
			return true
		})
		for p := range r.store.pins {
			if p.parent == id {
				p.parent = v.parent
			}
		}
		v.mu.Lock()
		defer v.mu.Unlock()
		v.gone, v.data = true, newContents(v.data.size)
		return nil
	})
}

// Usage counts pages that volumes share once. What is free is the free memory
// of the host.
func (r *repo) Usage(ctx context.Context) (storage.Usage, error) {
	var host unix.Sysinfo_t
	if err := unix.Sysinfo(&host); err != nil {
		return storage.Usage{}, fmt.Errorf("usage of memory: %w", err)
	}
	seen := map[*page]struct{}{}
	err := r.everyVolume(ctx, func(_ storage.ID, data contents) bool {
		data.pages.Scan(func(_ int64, p *page) bool {
			seen[p] = struct{}{}
			return true
		})
		return true
	})
	if err != nil {
		return storage.Usage{}, fmt.Errorf("usage: %w", err)
	}
	u := storage.Usage{Used: int64(len(seen)) * storage.Unit, Free: int64(host.Freeram) * int64(host.Unit)}
	u.Total = u.Used + u.Free
	return u, nil
}

// everyVolume calls fn with the present contents of each volume, until it
// returns false. No lock is held meanwhile.
func (r *repo) everyVolume(ctx context.Context, fn func(storage.ID, contents) bool) error {
	for info, err := range r.List(ctx) {
		if err != nil {
			return err
		}
		r.store.mu.RLock()
		v, err := r.find(info.ID)
		r.store.mu.RUnlock()
		if err != nil {
			continue // deleted meanwhile
		}
		v.mu.Lock()
		data := v.data.copy()
		v.mu.Unlock()
		if !fn(v.id, data) {
			return nil
		}
	}
	return nil
}

func (r *repo) Close() error {
	r.store.mu.Lock()
	defer r.store.mu.Unlock()
	if r.closed.Swap(true) {
		return nil
	}
	clear(r.store.pins)
	r.host.mu.Lock()
	defer r.host.mu.Unlock()
	r.store.open = false
	return nil
}
