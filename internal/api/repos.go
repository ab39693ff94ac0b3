package api

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"sync"

	"coppice/internal/storage"
	"coppice/internal/xapi"
)

// repository is the open storage of one attached SR. It embeds the driver's
// Repo and keeps what the API layer needs to know about volumes whose record
// and storage are momentarily out of step.
//
// Creating a disk puts the volume into storage before its record into the
// database, deleting takes the record away first. In between, SR.scan would
// take the volume for one that nobody knows. [repository.reserve] marks the
// volume until both agree.
type repository struct {
	storage.Repo
	sr xapi.Ref[xapi.SR]

	attrs      sync.Mutex // held while an attribute blob is made and written
	marked     storeMark  // what the store says of the database; guarded by attrs
	attrsStale bool       // some attribute blob could not be written; guarded by attrs
	attrsKnown bool       // when it was opened, all attribute blobs said what the records say

	mu struct { // guards everything in it
		sync.Mutex
		held     int                            // long works that need the repo open
		reserved map[storage.ID]int             // number of operations in flight
		scans    int                            // scans running now
		touched  map[storage.ID]struct{}        // reserved at some time during a scan
		doomed   map[storage.ID]struct{}        // record is gone, deletion failed: retried by scan
		only     map[string]xapi.Ref[xapi.Task] // what runs once at a time, and its task
	}
}

func newRepository(sr xapi.Ref[xapi.SR], r storage.Repo) *repository {
	rp := &repository{Repo: r, sr: sr}
	rp.mu.reserved = map[storage.ID]int{}
	rp.mu.touched = map[storage.ID]struct{}{}
	rp.mu.doomed = map[storage.ID]struct{}{}
	rp.mu.only = map[string]xapi.Ref[xapi.Task]{}
	return rp
}

// hold keeps the repository from being detached until drop is called. It is
// for work that takes as long as a disk is large, of which current_operations
// says nothing: whoever wants to detach the SR is told at once.
func (r *repository) hold() (drop func()) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.mu.held++
	return sync.OnceFunc(func() {
		r.mu.Lock()
		defer r.mu.Unlock()
		r.mu.held--
	})
}

// isHeld tells whether such work goes on.
func (r *repository) isHeld() bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.mu.held > 0
}

// alone lets one work of a name run at a time, until done is called. While
// another does, other is its task and there is nothing to be done.
func (r *repository) alone(name string, task xapi.Ref[xapi.Task]) (done func(), other xapi.Ref[xapi.Task]) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if other, ok := r.mu.only[name]; ok {
		return nil, other
	}
	r.mu.only[name] = task
	return sync.OnceFunc(func() {
		r.mu.Lock()
		defer r.mu.Unlock()
		delete(r.mu.only, name)
	}), ""
}

// reserve keeps scans away from a volume until done is called.
func (r *repository) reserve(id storage.ID) (done func()) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.mu.reserved[id]++
	if r.mu.scans > 0 {
		r.mu.touched[id] = struct{}{}
	}
	return sync.OnceFunc(func() {
		r.mu.Lock()
		defer r.mu.Unlock()
		if r.mu.reserved[id]--; r.mu.reserved[id] == 0 {
			delete(r.mu.reserved, id)
		}
	})
}

// beginScan opens a window in which reserved volumes are remembered, so that
// a list of volumes read in the window can be told from operations that ran
// beside it. settled reports whether no operation touched the volume since.
func (r *repository) beginScan() (settled func(storage.ID) bool, end func()) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.mu.scans++
	for id := range r.mu.reserved {
		r.mu.touched[id] = struct{}{}
	}
	settled = func(id storage.ID) bool {
		r.mu.Lock()
		defer r.mu.Unlock()
		_, busy := r.mu.touched[id]
		return !busy
	}
	return settled, sync.OnceFunc(func() {
		r.mu.Lock()
		defer r.mu.Unlock()
		if r.mu.scans--; r.mu.scans == 0 {
			clear(r.mu.touched)
		}
	})
}

// remove deletes a volume whose record is gone. When that fails the volume is
// remembered, so that a scan tries again instead of giving it a record.
func (r *repository) remove(ctx context.Context, id storage.ID) error {
	err := r.Delete(ctx, id)
	if errors.Is(err, storage.ErrNotFound) {
		err = nil
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if err != nil {
		r.mu.doomed[id] = struct{}{}
	} else {
		delete(r.mu.doomed, id)
	}
	return err
}

// isDoomed tells whether the volume should have been deleted already.
func (r *repository) isDoomed(id storage.ID) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	_, yes := r.mu.doomed[id]
	return yes
}

// repoTable holds the repositories of attached SRs, and which disks the
// server itself has open. The zero value is empty.
type repoTable struct {
	mu   sync.RWMutex // guards open and kept
	open map[xapi.Ref[xapi.SR]]*repository
	kept map[xapi.Ref[xapi.SR]]*repository // opened by recognize, for openStorage
	uses diskUses
	wake chan struct{} // has room for one; a send makes watchUsage look
}

// used tells that the space a repository uses may have changed.
func (t *repoTable) used() {
	select {
	case t.wake <- struct{}{}:
	default: // it is going to look anyway, or does not run yet
	}
}

// get returns the repository of an SR; SR_HAS_NO_PBDS when it is not attached.
func (t *repoTable) get(sr xapi.Ref[xapi.SR]) (*repository, error) {
	t.mu.RLock()
	defer t.mu.RUnlock()
	if r := t.open[sr]; r != nil {
		return r, nil
	}
	return nil, xapi.NewError(xapi.ErrSRHasNoPBDs, string(sr))
}

func (t *repoTable) put(r *repository) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.open == nil {
		t.open = map[xapi.Ref[xapi.SR]]*repository{}
	}
	t.open[r.sr] = r
}

// early keeps a repository that is not reconciled yet.
func (t *repoTable) early(r *repository) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.kept == nil {
		t.kept = map[xapi.Ref[xapi.SR]]*repository{}
	}
	t.kept[r.sr] = r
}

// takeEarly returns what early has kept, nil when there is none.
func (t *repoTable) takeEarly(sr xapi.Ref[xapi.SR]) *repository {
	t.mu.Lock()
	defer t.mu.Unlock()
	r := t.kept[sr]
	delete(t.kept, sr)
	return r
}

// take removes the repository of an SR from the table and returns it, nil
// when there is none.
func (t *repoTable) take(sr xapi.Ref[xapi.SR]) *repository {
	t.mu.Lock()
	defer t.mu.Unlock()
	r := t.open[sr]
	delete(t.open, sr)
	return r
}

// all returns the open repositories.
func (t *repoTable) all() []*repository {
	t.mu.RLock()
	defer t.mu.RUnlock()
	return slices.Collect(maps.Values(t.open))
}

// closeAll closes every repository.
func (t *repoTable) closeAll() error {
	t.mu.Lock()
	open, kept := t.open, t.kept
	t.open, t.kept = nil, nil
	t.mu.Unlock()
	var errs []error
	for _, table := range []map[xapi.Ref[xapi.SR]]*repository{open, kept} {
		for sr, r := range table {
			if err := r.Close(); err != nil {
				errs = append(errs, fmt.Errorf("close the storage of SR %s: %w", sr, err))
			}
		}
	}
	return errors.Join(errs...)
}
