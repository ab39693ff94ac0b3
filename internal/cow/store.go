package cow

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"sync"
	"sync/atomic"
	"time"

	"coppice/internal/vfs"
)

// Store is an open store. It is safe for concurrent use.
//
// Locks, in the order in which they are taken: life, the commit role, that of a
// volume for writing out, trees, mu, the gate of a volume (several in the order
// of their numbers), the mutex of a layer, then any of changedMu, waitMu, dropMu,
// relMu and space.mu, which are leaves. None but the first three is held across
// a sync; life (shared) is held for the length of a call.
type Store struct {
	geo    Geometry
	opts   Options
	limits Limits
	dir    vfs.FS
	lock   io.Closer
	superF vfs.File

	*pageReader
	space *space
	bulk  bulkCache
	eras  eras

	life   sync.RWMutex // shared by calls, exclusive to Close
	closed bool         // guarded by life

	failed atomic.Pointer[failure]

	mu         sync.Mutex // guards what follows and the volumes
	byID       map[ID]*volume
	byNum      map[uint64]*volume
	children   map[uint64]map[*volume]struct{} // by the number of the parent
	nextNum    uint64
	epoch      uint64
	opPromised int64 // units promised to volume operations since the last cut

	changedMu sync.Mutex // guards what follows and layer.marked
	changed   map[*volume]struct{}

	dropMu  sync.Mutex
	dropped []uint64 // units that layers referred to; released by the next checkpoint

	entries atomic.Int64 // of all layers; see Limits
	buffers atomic.Int64

	// trees is held by the tree writer while it changes trees and counters, and
	// by others, for short, to look at those of one generation. It guards
	// durable, and super for others than the tree writer.
	trees   chan struct{}
	durable map[uint64]*record // the volume table as last written

	// The tree writer's, touched by its goroutine only.
	super super
	force bool // the next checkpoint is made even if nothing has changed
	queue *reapQueue
	stuck bool // the reaper met damage and waits for the next checkpoint

	writing    atomic.Bool // a checkpoint is being made
	reaping    atomic.Bool
	durableGen atomic.Uint64 // of the superblock
	freeable   freeCache
	damage     damageTable

	commits committer
	log     redoLog // for the holder of the commit role

	wake    chan struct{} // somebody wants a checkpoint
	armed   chan struct{} // the first change since the last cut
	freeing chan struct{} // space has been given up
	stop    chan struct{}
	wg      sync.WaitGroup
	waitMu  sync.Mutex
	waiters []chan error // answered by the next checkpoint; guarded by waitMu
	atCut   []*request   // operations too large for a frame; guarded by waitMu

	relMu      sync.Mutex
	releases   []release // not begun; guarded by relMu
	relPending int       // not ended; guarded by relMu
	relWake    chan struct{}
}

// failure is why a store has stopped writing.
type failure struct{ err error }

// Create makes a store in an empty directory and opens it. It fails with
// [ErrStoreExists] when there is one, with [vfs.ErrLocked] when somebody has
// the directory, and with a *SpaceError when the host has no room for the
// reserve. After an error the directory is empty again, unless the host failed
// so late that there is a store; a crash leaves nothing that a second Create minds.
func Create(ctx context.Context, dir vfs.FS, o Options) (*Store, error) {
	if err := o.validate(); err != nil {
		return nil, err
	}
	if o.Geometry == (Geometry{}) {
		o.Geometry = DefaultGeometry()
	}
	if o.LogBytes == 0 {
		o.LogBytes = max(minLogBytes(o.Geometry), o.Geometry.regionBytes())
	}
	if err := o.Geometry.validate(); err != nil {
		return nil, err
	}
	if err := checkLogSize(o.LogBytes, o.Geometry); err != nil {
		return nil, err
	}
	return withLock(dir, func(lock io.Closer) (*Store, error) {
		present, err := Present(dir)
		if err != nil {
			return nil, err
		}
		if present {
			return nil, ErrStoreExists
		}
		if err := removeFiles(dir); err != nil {
			return nil, err
		}
		if err := createFiles(dir, o); err != nil {
			return nil, errors.Join(fmt.Errorf("creating store: %w", err), undoCreate(dir))
		}
		return open(ctx, dir, o, lock)
	})
}

// undoCreate removes what a creation that failed has made of a store.
func undoCreate(dir vfs.FS) error {
	if present, err := Present(dir); present || err != nil {
		return err
	}
	return removeFiles(dir)
}

// createFiles writes an empty store, the superblock last.
func createFiles(dir vfs.FS, o Options) (err error) {
	files, err := openSpace(dir, o.Geometry, 0)
	if err != nil {
		return err
	}
	sp := newSpace(files, o)
	defer func() { err = errors.Join(err, sp.table.close(), files.close()) }()
	for i := range sp.table.file {
		if sp.table.file[i], err = dir.Create(regionsName(uint64(i))); err != nil {
			return err
		}
		if err = sp.table.file[i].Datasync(); err != nil {
			return err
		}
	}
	if err = sp.promise(1, floorWrite); err != nil { // grows to the reserve
		return err
	}
	if err = createLog(dir, o.LogBytes); err != nil {
		return err
	}
	s := super{geo: o.Geometry, gen: 1, epoch: 1, nextID: 1, regions: uint64(len(sp.regions)), logSize: uint64(o.LogBytes)}
	s.log.seq = 1
	rand.Read(s.uuid[:])
	rand.Read(s.logKey[:])
	pages, sum := sp.table.encode(s.gen, len(sp.regions), func(i int) regionRecord { return sp.regions[i].rec })
	s.tableCRC = sum
	if err = sp.table.write(s.gen, pages); err != nil {
		return err
	}
	if err = files.sync(); err != nil {
		return err
	}
	if err = dir.SyncDir(); err != nil {
		return err
	}
	f, err := createSuper(dir, &s)
	if err != nil {
		return err
	}
	return f.Close()
}

// withLock runs f under the lock of the directory, which f takes over when it
// succeeds.
func withLock(dir vfs.FS, f func(io.Closer) (*Store, error)) (*Store, error) {
	lock, err := dir.Lock()
	if err != nil {
		return nil, err
	}
	s, err := f(lock)
	if err != nil {
		return nil, errors.Join(err, lock.Close())
	}
	return s, nil
}

// Open opens the store in a directory and recovers it. It fails with
// [ErrInvalid], [ErrNoStore], [vfs.ErrLocked], an *[UnsupportedError] or a *CorruptError. A
// store that this version can read but must not write is open read-only, and
// [Store.Failed] says so.
func Open(ctx context.Context, dir vfs.FS, o Options) (*Store, error) {
	if err := o.validate(); err != nil {
		return nil, err
	}
	return withLock(dir, func(lock io.Closer) (*Store, error) {
		s, err := open(ctx, dir, o, lock)
		if err != nil {
			return nil, fmt.Errorf("opening store: %w", err)
		}
		return s, nil
	})
}

func open(ctx context.Context, dir vfs.FS, o Options, lock io.Closer) (_ *Store, err error) {
	im, err := readImage(dir, o)
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, im.close())
		}
	}()
	im.pageReader = im.newReader(o.Limits.withDefaults().PageCache)
	s := &Store{
		geo: im.super.geo, opts: o, limits: o.Limits.withDefaults(), dir: dir, lock: lock, superF: im.superF,
		pageReader: im.pageReader, space: im.space,
		bulk: bulkCache{files: im.pageReader.files, most: int(o.Limits.withDefaults().BulkCache) / im.super.geo.UnitSize},
		byID: map[ID]*volume{}, byNum: map[uint64]*volume{}, children: map[uint64]map[*volume]struct{}{},
		nextNum: im.super.nextID, epoch: im.super.epoch,
		changed: map[*volume]struct{}{},
		super:   *im.super, durable: map[uint64]*record{},
		trees: make(chan struct{}, 1), wake: make(chan struct{}, 1), armed: make(chan struct{}, 1), freeing: make(chan struct{}, 1), stop: make(chan struct{}), relWake: make(chan struct{}, 1),
	}
	s.fellBack = s.damage.add
	s.eras.init()
	s.durableGen.Store(s.super.gen)
	s.freeable.begin(s.super.gen)
	s.commits.role = make(chan struct{}, 1)
	s.log = im.newLog()
	s.limits.Entries = min(s.limits.Entries, int64(s.log.size/160))
	if s.queue, err = loadQueue(s.pageReader, im.super.queue, im.super.queueLen); err != nil {
		return nil, err
	}
	for r, err := range im.records() {
		if err != nil {
			return nil, err
		}
		if err := ctx.Err(); err != nil {
			return nil, context.Cause(ctx)
		}
		if err := s.addRecord(r); err != nil {
			return nil, err
		}
	}
	if err := im.super.writable(); err != nil {
		s.fail(err)
	}
	if s.force, err = s.replay(); err != nil {
		return nil, err
	}
	s.reaping.Store(len(s.queue.ents) > 0)
	replayed, work := s.force, len(s.changed) > 0 || len(s.queue.ents) > 0
	s.wg.Go(s.writeTrees)
	s.wg.Go(s.releaseUnits)
	if replayed && s.failure() == nil { // nothing may be written to the log before
		if err := s.sync(ctx); err != nil {
			close(s.stop)
			s.wg.Wait()
			return nil, err
		}
	}
	if work {
		s.kick()
	}
	return s, nil
}

// addRecord takes over one volume of an existing store. What an open volume
// had pinned is given up.
func (s *Store) addRecord(r record) error {
	if r.num >= s.nextNum || s.byNum[r.num] != nil || s.durable[r.num] != nil || s.byID[r.id] != nil && r.flags&flagPin == 0 {
		return &CorruptError{Detail: fmt.Sprintf("volume table: volume %d is listed twice or out of range", r.num)}
	}
	s.durable[r.num] = &r
	v := &volume{num: r.num, id: r.id, flags: r.flags, parent: r.parent, sealedAt: r.sealed}
	if r.attrLen > 0 {
		v.attrs = &blob{n: int(r.attrLen), root: r.attrs}
	}
	if r.flags&flagPin != 0 {
		v.removed = true
		s.markChanged(v)
		return nil
	}
	nv := &view{size: r.size, bare: r.flags&flagNoData != 0, base: tree{root: r.root, mapped: r.mapped, inexact: r.flags&flagInexact != 0}}
	nv.height = max(s.geo.height(s.geo.units(r.size)), int(r.root.level))
	if r.flags&flagReadOnly == 0 {
		nv.top, nv.logged = newLayer(nv.height), newLayer(nv.height)
	}
	s.setView(v, nv)
	s.register(v)
	return nil
}

// Close writes what is not durable yet and releases the store. Calls that are
// running end first; later ones fail with [ErrClosed]. It returns the error
// for which the store had failed, if it had.
func (s *Store) Close() error {
	s.life.Lock()
	if s.closed {
		s.life.Unlock()
		return ErrClosed
	}
	s.closed = true
	s.life.Unlock()
	err := s.sync(context.Background())
	close(s.stop)
	s.wg.Wait()
	return errors.Join(err, s.space.table.close(), s.files.close(), s.log.file.Close(), s.superF.Close(), s.lock.Close())
}

// begin starts a call; end must be called when it ends.
func (s *Store) begin() error {
	s.life.RLock()
	if s.closed {
		s.life.RUnlock()
		return ErrClosed
	}
	return nil
}

func (s *Store) end() { s.life.RUnlock() }

// beginWrite starts a call that changes something.
func (s *Store) beginWrite() error {
	if err := s.begin(); err != nil {
		return err
	}
	if err := s.failure(); err != nil {
		s.end()
		return err
	}
	return nil
}

// fail stops all writing until the store is opened again.
func (s *Store) fail(err error) {
	s.failed.CompareAndSwap(nil, &failure{err: fmt.Errorf("%w: %w", ErrFailed, err)})
}

// failure returns the error that [Store.fail] recorded.
func (s *Store) failure() error {
	if f := s.failed.Load(); f != nil {
		return f.err
	}
	return nil
}

// Failed returns why the store has become read-only, nil while it has not.
func (s *Store) Failed() error { return s.failure() }

// UnitSize is the grain of mapping and sharing in bytes; sizes of volumes are
// multiples of it.
func (s *Store) UnitSize() int { return s.geo.UnitSize }

// Usage tells the space of the store.
func (s *Store) Usage() Usage {
	allocated, free, reserve := s.space.usage()
	u := int64(s.geo.UnitSize)
	return Usage{
		Allocated: allocated * u, Used: (allocated - free - reserve) * u, Free: free * u, Reserve: reserve * u,
		Max: s.opts.MaxBytes, Reaping: s.reaping.Load(),
	}
}

// promise sets units aside for a caller. A short store makes checkpoints as
// long as they may give space back before it says so.
func (s *Store) promise(ctx context.Context, n int64, f floor) error {
	for try := 0; ; try++ {
		more := s.reclaimable() // asked first: what comes free after the answer is found below
		err := s.space.promise(n, f)
		if err == nil || !more || try > 2 && !s.reaping.Load() {
			return err
		}
		if err := s.sync(ctx); err != nil {
			return err
		}
		if err := s.awaitReleases(ctx); err != nil {
			return err
		}
	}
}

// reclaimable reports whether a checkpoint, the one that is being made or one
// to come, may free something. What it looks at is in the order in which space
// comes back: what is not seen in one place any more is in the next, or free.
func (s *Store) reclaimable() bool {
	s.changedMu.Lock()
	n := len(s.changed)
	s.changedMu.Unlock()
	s.dropMu.Lock()
	n += len(s.dropped)
	s.dropMu.Unlock()
	if n > 0 || s.writing.Load() || s.reaping.Load() {
		return true
	}
	s.relMu.Lock()
	defer s.relMu.Unlock()
	return s.relPending > 0
}

// throttle starts a checkpoint when the memory for changes is half full, and
// waits for it when there is none left.
func (s *Store) throttle(ctx context.Context) error {
	n, b := s.entries.Load(), s.buffers.Load()
	if n < s.limits.Entries/2 && b < s.limits.Buffers/2 {
		return nil
	}
	if n < s.limits.Entries && b < s.limits.Buffers {
		s.kick()
		return nil
	}
	return s.sync(ctx)
}

func (s *Store) checkpointAfter() time.Duration {
	if s.opts.CheckpointAfter > 0 {
		return s.opts.CheckpointAfter
	}
	return 30 * time.Second
}
