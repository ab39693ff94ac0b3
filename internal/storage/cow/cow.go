// Package cow is the storage driver for stores of the copy-on-write engine,
// package coppice/internal/cow: one directory of the host is one repository.
// It has every power of the contract. All it does itself is to find the
// directory, to translate names and errors, to say how much the host has left,
// and to keep the attributes of the repository as a whole in a file beside those
// of the engine; what the operations promise, and what they cost, is the
// engine's.
package cow

import (
	"context"
	"errors"
	"fmt"
	"io"
	"iter"
	"path/filepath"
	"slices"
	"sync"
	"sync/atomic"

	engine "coppice/internal/cow"
	"coppice/internal/storage"
	"coppice/internal/vfs"
)

// Driver returns the driver. Its one configuration key is location, the path
// of the directory; Open and Destroy want an absolute one.
func Driver() storage.Driver {
	d := DriverIn(hostDir, engine.Options{})
	destroy := d.Destroy
	d.Destroy = func(ctx context.Context, config map[string]string) error {
		if err := destroy(ctx, config); err != nil {
			return err
		}
		return vfs.RemoveDir(config["location"])
	}
	return d
}

// Dir is a directory with a store, or for one. Closing it ends what it takes
// to have it open.
type Dir interface {
	vfs.FS
	io.Closer
}

// DriverIn is Driver with options other than those of ordinary use and with
// directories that find opens, or, with create, makes if need be: in memory, or
// with faults.
func DriverIn(find func(path string, create bool) (Dir, error), o engine.Options) storage.Driver {
	return storage.Driver{
		Type:        "cow",
		Description: "Copy-on-write store in a directory of the host",
		Config:      map[string]string{"location": "directory that holds the store; a relative path starts at the data directory"},
		Open: func(ctx context.Context, config map[string]string, create bool) (storage.Repo, error) {
			return openDir(ctx, config, create, find, o)
		},
		Destroy: func(ctx context.Context, config map[string]string) error {
			return destroyDir(ctx, config, find)
		},
		Features: storage.Features(&repo{}),
	}
}

// hostDir finds directories of the host.
func hostDir(path string, create bool) (Dir, error) {
	if create {
		return vfs.CreateDir(path)
	}
	return vfs.OpenDir(path)
}

// location returns the directory that a configuration names.
func location(config map[string]string) (string, error) {
	path := config["location"]
	if !filepath.IsAbs(path) {
		return "", fmt.Errorf("%w: location %q is not an absolute path", storage.ErrInvalid, path)
	}
	return path, nil
}

func openDir(ctx context.Context, config map[string]string, create bool, find func(string, bool) (Dir, error), o engine.Options) (storage.Repo, error) {
	path, err := location(config)
	if err != nil {
		return nil, err
	}
	dir, err := find(path, create)
	if err != nil {
		return nil, translate("open store in "+path, "", err)
	}
	r, err := openStore(ctx, dir, o, create)
	if err != nil {
		return nil, errors.Join(translate("open store in "+path, "", err), dir.Close())
	}
	r.release = dir.Close
	return r, nil
}

// openStore opens the store in a directory, or makes it. A directory where it does
// neither stays as it is.
func openStore(ctx context.Context, dir vfs.FS, o engine.Options, create bool) (*repo, error) {
	if ctx.Err() != nil {
		return nil, context.Cause(ctx)
	}
	present, err := engine.Present(dir)
	if err != nil {
		return nil, err
	}
	open := engine.Open
	if !present {
		if !create {
			return nil, engine.ErrNoStore
		}
		if err := vacant(dir); err != nil {
			return nil, err
		}
		if err := removeLabel(dir); err != nil { // of a store that was destroyed in part
			return nil, err
		}
		open = engine.Create
	}
	s, err := open(ctx, dir, o)
	if err != nil {
		return nil, err
	}
	return &repo{s: s, dir: dir}, nil
}

// vacant refuses to make a store among files that are not of one, some of which
// could have the names of its own. The directory for what a file system has
// lost is no obstacle: a file system of its own is a good place for a store.
func vacant(dir vfs.FS) error {
	foreign, err := engine.Foreign(dir)
	if err != nil {
		return err
	}
	foreign = slices.DeleteFunc(foreign, func(n string) bool {
		return n == labelName || n == labelTemp || n == "lost+found"
	})
	if len(foreign) == 0 {
		return nil
	}
	return fmt.Errorf("%w: %q is in the directory; name a new or an empty one", storage.ErrOccupied, foreign[0])
}

// destroyDir removes a store, and nothing else of its directory. The superblock
// goes first: what is left after a crash is no store.
func destroyDir(ctx context.Context, config map[string]string, find func(string, bool) (Dir, error)) error {
	path, err := location(config)
	if err != nil {
		return err
	}
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	dir, err := find(path, false)
	if err == nil {
		if err = engine.Destroy(dir); err == nil {
			err = removeLabel(dir)
		}
		err = errors.Join(err, dir.Close())
	}
	return translate("destroy store in "+path, "", err)
}

// repo is an open store.
type repo struct {
	s       *engine.Store
	dir     vfs.FS
	release func() error // what Close calls at the end; may be nil
	closed  atomic.Bool
	label   sync.Mutex // guards the file of the repo's own attributes
}

var (
	_ storage.Repo             = (*repo)(nil)
	_ storage.BareLister       = (*repo)(nil)
	_ storage.Resizer          = (*repo)(nil)
	_ storage.Reverter         = (*repo)(nil)
	_ storage.GroupSnapshotter = (*repo)(nil)
	_ storage.Differ           = (*repo)(nil)
	_ storage.RangeCloner      = (*repo)(nil)
	_ storage.Attributer       = (*repo)(nil)
	_ storage.DataDestroyer    = (*repo)(nil)
	_ storage.ChangeTracker    = (*repo)(nil)
	_ storage.SpaceEstimator   = (*repo)(nil)
	_ storage.WriteCounter     = (*repo)(nil)
	_ storage.Checker          = (*repo)(nil)
	_ storage.Scrubber         = (*repo)(nil)
	_ storage.DamageLister     = (*repo)(nil)
	_ storage.Labeled          = (*repo)(nil)
)

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

// info adds the attributes to what the engine says of a volume.
func (r *repo) info(i engine.Info, attrs []byte) storage.Info {
	info := storage.Info{ID: volumeID(i.ID), Size: i.Size, ReadOnly: i.ReadOnly, NoData: i.NoData, Used: i.Used, Attrs: attrs}
	if i.Parent != (engine.ID{}) {
		info.Parent = volumeID(i.Parent)
	}
	return info
}

// inform is info with the attributes that the store has.
func (r *repo) inform(ctx context.Context, i engine.Info) (storage.Info, error) {
	var attrs []byte
	if i.AttrsLen > 0 {
		var err error
		if attrs, err = r.s.Attrs(ctx, i.ID); err != nil {
			return storage.Info{}, err
		}
	}
	return r.info(i, attrs), nil
}

func (r *repo) Create(ctx context.Context, spec storage.Spec) (storage.Info, error) {
	const doing = "create"
	if err := r.usable(ctx); err != nil {
		return storage.Info{}, translate(doing, spec.ID, err)
	}
	if err := spec.Validate(); err != nil {
		return storage.Info{}, translate(doing, spec.ID, err)
	}
	i, err := r.s.Create(ctx, engineID(spec.ID), spec.Size, spec.Attrs)
	if err != nil {
		return storage.Info{}, translate(doing, spec.ID, err)
	}
	return r.info(i, spec.Attrs), nil
}

func (r *repo) Stat(ctx context.Context, id storage.ID) (storage.Info, error) {
	err := r.usable(ctx)
	if err == nil {
		var i engine.Info
		if i, err = r.s.Stat(ctx, engineID(id)); err == nil {
			var info storage.Info
			if info, err = r.inform(ctx, i); err == nil {
				return info, nil
			}
		}
	}
	return storage.Info{}, translate("stat", id, err)
}

func (r *repo) List(ctx context.Context) iter.Seq2[storage.Info, error] {
	return r.list(ctx, r.inform)
}

func (r *repo) ListBare(ctx context.Context) iter.Seq2[storage.Info, error] {
	return r.list(ctx, func(_ context.Context, i engine.Info) (storage.Info, error) { return r.info(i, nil), nil })
}

// list yields what inform makes of each volume.
func (r *repo) list(ctx context.Context, inform func(context.Context, engine.Info) (storage.Info, error)) iter.Seq2[storage.Info, error] {
	return func(yield func(storage.Info, error) bool) {
		if err := r.usable(ctx); err != nil {
			yield(storage.Info{}, translate("list", "", err))
			return
		}
		for i := range r.s.List() {
			err := r.usable(ctx)
			var info storage.Info
			if err == nil {
				info, err = inform(ctx, i)
			}
			if errors.Is(err, engine.ErrNotFound) {
				continue // deleted meanwhile
			}
			if err != nil {
				yield(storage.Info{}, translate("list", volumeID(i.ID), err))
				return
			}
			if !yield(info, nil) {
				return
			}
		}
	}
}

func (r *repo) Open(ctx context.Context, id storage.ID, m storage.Mode) (storage.Volume, error) {
	err := r.usable(ctx)
	if err == nil {
		mode := engine.Live
		if m == storage.Pinned {
			mode = engine.Pinned
		}
		var d *engine.Disk
		if d, err = r.s.OpenDisk(ctx, engineID(id), mode); err == nil {
			return &volume{d: d, r: r, id: id}, nil
		}
	}
	return nil, translate("open", id, err)
}

func (r *repo) Snapshot(ctx context.Context, d storage.Derived) (storage.Info, error) {
	infos, err := r.SnapshotGroup(ctx, []storage.Derived{d})
	if err != nil {
		return storage.Info{}, err
	}
	return infos[0], nil
}

func (r *repo) SnapshotGroup(ctx context.Context, ds []storage.Derived) ([]storage.Info, error) {
	if len(ds) == 0 {
		return nil, r.usable(ctx)
	}
	const doing = "snapshot"
	pairs := make([]engine.Pair, len(ds))
	seen := map[storage.ID]bool{}
	for i, d := range ds {
		err := r.usable(ctx)
		if err == nil {
			err = d.Validate()
		}
		if err == nil && (seen[d.Source] || seen[d.ID]) {
			err = fmt.Errorf("%w: a volume occurs twice in the group", storage.ErrInvalid)
		}
		if err != nil {
			return nil, translate(doing, d.Source, err)
		}
		seen[d.Source], seen[d.ID] = true, true
		pairs[i] = pair(d)
	}
	made, err := r.s.Snapshot(ctx, pairs)
	if err != nil {
		return nil, translate(doing, ds[0].Source, err)
	}
	infos := make([]storage.Info, len(ds))
	for i, d := range ds {
		infos[i] = r.info(made[i], d.Attrs)
	}
	return infos, nil
}

func (r *repo) Clone(ctx context.Context, d storage.Derived) (storage.Info, error) {
	const doing = "clone"
	err := r.usable(ctx)
	if err == nil {
		err = d.Validate()
	}
	if err != nil {
		return storage.Info{}, translate(doing, d.Source, err)
	}
	i, err := r.s.Clone(ctx, pair(d))
	if err != nil {
		return storage.Info{}, translate(doing, d.Source, err)
	}
	return r.info(i, d.Attrs), nil
}

// pair is d for the engine, to which no attributes means those of the source.
func pair(d storage.Derived) engine.Pair {
	attrs := d.Attrs
	if attrs == nil {
		attrs = []byte{}
	}
	return engine.Pair{Src: engineID(d.Source), New: engineID(d.ID), Attrs: attrs}
}

func (r *repo) Revert(ctx context.Context, id, to storage.ID) error {
	err := r.usable(ctx)
	if err == nil {
		err = r.s.Revert(ctx, engineID(id), engineID(to))
	}
	return translate("revert", id, err)
}

func (r *repo) Resize(ctx context.Context, id storage.ID, size int64) (storage.Info, error) {
	err := r.usable(ctx)
	if err == nil {
		err = storage.ValidateSize(size)
	}
	if err == nil {
		var i engine.Info
		if i, err = r.s.Resize(ctx, engineID(id), size); err == nil {
			var info storage.Info
			if info, err = r.inform(ctx, i); err == nil {
				return info, nil
			}
		}
	}
	return storage.Info{}, translate("resize", id, err)
}

func (r *repo) SetAttrs(ctx context.Context, id storage.ID, attrs []byte) error {
	err := r.usable(ctx)
	if err == nil {
		err = storage.ValidateAttrs(attrs)
	}
	if err == nil {
		err = r.s.SetAttrs(ctx, engineID(id), attrs)
	}
	return translate("set attributes of", id, err)
}

func (r *repo) Delete(ctx context.Context, id storage.ID) error {
	err := r.usable(ctx)
	if err == nil {
		err = r.s.Delete(ctx, engineID(id))
	}
	return translate("delete", id, err)
}

// freer is a directory that knows what the host has left.
type freer interface{ Free() (int64, error) }

// Usage counts what the host has left as free, as far as the store may grow.
// What the store keeps back so that deletes always work is neither used nor
// free.
func (r *repo) Usage(ctx context.Context) (storage.Usage, error) {
	if err := r.usable(ctx); err != nil {
		return storage.Usage{}, translate("usage", "", err)
	}
	var growth int64
	if f, ok := r.dir.(freer); ok {
		var err error
		if growth, err = f.Free(); err != nil {
			return storage.Usage{}, translate("usage", "", err)
		}
	}
	u := r.s.Usage()
	if u.Max > 0 {
		growth = min(growth, u.Max-u.Allocated)
	}
	growth = max(0, growth)
	return storage.Usage{Total: u.Allocated + growth, Used: u.Used, Free: u.Free + growth}, nil
}

func (r *repo) Close() error {
	if r.closed.Swap(true) {
		return nil
	}
	err := r.s.Close()
	if r.release != nil {
		err = errors.Join(err, r.release())
	}
	return translate("close repository", "", err)
}
