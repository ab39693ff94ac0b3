package api

import (
	"context"
	"fmt"
	"strings"

	"github.com/google/uuid"

	"coppice/internal/db"
	"coppice/internal/storage"
	"coppice/internal/xapi"
)

// TransferRequest is what an HTTP handler knows about a disk transfer. VDI,
// Base and SR are references or UUIDs, as the client sent them.
type TransferRequest struct {
	Session   string
	Task      string // the client's task, which the transfer completes; "" makes one
	SubtaskOf string // parent of the task that is made
	Action    string // name of the HTTP action in the datamodel, whose role is checked
	VDI       string
	Base      string // export: send only what differs from it
	SR        string // import: where to make a disk when VDI is ""
	Format    string
	Length    int64 // import: bytes that will come, -1 when unknown
}

// Export is a disk that is being sent to a client: the versions of the disk
// and of its base of the instant at which the export began. Nothing that
// happens to them later, not even deletion, disturbs it.
type Export struct {
	Task    xapi.Ref[xapi.Task]
	Ref     xapi.Ref[xapi.VDI]
	VDI     *xapi.VDI
	Volume  storage.Volume
	Repo    storage.Repo
	BaseRef xapi.Ref[xapi.VDI] // null without base
	BaseVDI *xapi.VDI          // nil without base
	Base    storage.Volume     // nil without base; of the same Repo

	call      *Call
	src, base *openDisk
	notes     [][2]string // for the task
}

// Export begins an export. When it fails after the session was found valid,
// the client's task has been failed with the error. The caller calls Finish
// exactly once.
func (a *API) Export(ctx context.Context, o Origin, r TransferRequest) (*Export, error) {
	c, err := a.beginTransfer(ctx, o, transferStart{
		Session: r.Session, Task: r.Task, SubtaskOf: r.SubtaskOf, Action: r.Action, Label: "Export raw VDI", About: r.about(),
	})
	if err != nil {
		return nil, err
	}
	x, err := a.openExport(c, r)
	if err != nil {
		return nil, c.finish(Result{}, err)
	}
	return x, nil
}

func (a *API) openExport(c *Call, r TransferRequest) (*Export, error) {
	x := &Export{Task: c.Task(), BaseRef: xapi.NullRef, call: c}
	ref, err := a.findDisk(r.VDI)
	if err != nil {
		return nil, err
	}
	base := xapi.Ref[xapi.VDI](xapi.NullRef)
	if r.Base != "" {
		if base, err = a.findDisk(r.Base); err != nil {
			return nil, err
		}
	}
	if x.src, err = a.openReader(c.Context(), c, ref, nil); err != nil {
		return nil, err
	}
	x.Ref, x.VDI, x.Volume, x.Repo = ref, x.src.rec, x.src.Volume, x.src.repo.Repo
	if base.IsNull() {
		if err := x.src.verifyKnown(c.Context()); err != nil {
			x.src.close()
			return nil, err
		}
		return x, nil
	}
	if x.base, err = a.openReader(c.Context(), c, base, nil); err != nil {
		x.src.close()
		return nil, err
	}
	if x.base.repo != x.src.repo { // the difference is one of maps, which share nothing here
		x.base.close()
		x.src.close()
		return nil, xapi.NewError(xapi.ErrSROperationNotSupported, string(x.base.repo.sr))
	}
	x.BaseRef, x.BaseVDI, x.Base = base, x.base.rec, x.base.Volume
	return x, nil
}

// Context ends when the task is cancelled, with TASK_CANCELLED as its cause,
// or when the server stops.
func (x *Export) Context() context.Context { return x.call.Context() }

// Progress tells watchers of the task how far the export is. It may be called
// for every chunk.
func (x *Export) Progress(done, total int64) { x.call.Progress(done, total) }

// Finish releases the disks and completes the task: with success when err is
// nil, and no result. It returns what the task ended with: nil for success,
// else an *xapi.Error.
func (x *Export) Finish(err error) error {
	x.src.close()
	if x.base != nil {
		x.base.close()
	}
	x.call.api.describe(x.Task, x.notes)
	return x.call.finish(Result{}, err)
}

// Import is a disk that is being filled by a client. A disk made for the
// import gets its record when it is complete; until then nobody sees it.
type Import struct {
	Task   xapi.Ref[xapi.Task]
	Ref    xapi.Ref[xapi.VDI] // null while the disk has no record
	VDI    *xapi.VDI
	Volume storage.Volume // Live; written by the caller
	Repo   storage.Repo

	call    *Call
	dst     *openDisk
	shadow  *hidden                         // what is written to, nil when that is the disk itself
	scratch []*hidden                       // to be dropped at the end
	notes   [][2]string                     // for the task
	sealed  func(ctx context.Context) error // called when everything is durable and nothing shows yet; nil for nothing

	// Of a new disk:
	record func(ctx context.Context) (xapi.Ref[xapi.VDI], error) // makes its record
	undo   undoStack                                             // deletes its volume
	free   func()                                                // lets SR and volume go
}

// importOp is what VDI_IN_USE calls an import that found the disk in use.
const importOp = "import"

// importedLabel is the name of a disk that an import makes.
const importedLabel = "Imported VDI"

// Import begins an import into a disk, or into a new one in r.SR, which only
// raw data of known length can be. When it fails after the session was found
// valid, the client's task has been failed with the error. The caller writes
// to Volume and calls Finish exactly once. While it runs, the disk counts as
// attached read-write.
func (a *API) Import(ctx context.Context, o Origin, r TransferRequest) (*Import, error) {
	c, err := a.beginTransfer(ctx, o, transferStart{
		Session: r.Session, Task: r.Task, SubtaskOf: r.SubtaskOf, Action: r.Action, Label: "Import raw VDI", About: r.about(),
	})
	if err != nil {
		return nil, err
	}
	x, err := a.openImport(c, r)
	if err != nil {
		return nil, c.finish(Result{}, err)
	}
	return x, nil
}

// CheckImport answers a client that only asks whether it came to the right
// server, by an import without a body and without a task. It looks whether
// session, role and target are valid, and touches nothing.
func (a *API) CheckImport(ctx context.Context, o Origin, r TransferRequest) error {
	err := func() error {
		s, err := a.session(xapi.Ref[xapi.Session](r.Session))
		if err != nil {
			return err
		}
		if err := a.authorizeHTTP(s, r.Action); err != nil {
			return err
		}
		if r.VDI != "" {
			_, err = a.findDisk(r.VDI)
		} else {
			_, err = a.findSR(r.SR)
		}
		return err
	}()
	if err != nil {
		return a.apiError(err)
	}
	return nil
}

func (a *API) openImport(c *Call, r TransferRequest) (*Import, error) {
	x := &Import{Task: c.Task(), Ref: xapi.NullRef, call: c}
	if r.VDI == "" {
		return x, a.openNewDisk(x, r)
	}
	ref, err := a.findDisk(r.VDI)
	if err != nil {
		return nil, err
	}
	if x.dst, err = a.openWriter(c.Context(), c, ref, importOp); err != nil {
		return nil, err
	}
	x.Ref, x.VDI, x.Volume, x.Repo = ref, x.dst.rec, x.dst.Volume, x.dst.repo.Repo
	return x, nil
}

// openNewDisk makes the disk that an import fills.
func (a *API) openNewDisk(x *Import, r TransferRequest) error {
	sr, err := a.findSR(r.SR)
	if err != nil {
		return err
	}
	if r.Format != "" && !strings.EqualFold(r.Format, "raw") || r.Length < 0 {
		return xapi.NewError(xapi.ErrInternalError, "Only raw data of known length can be imported without a VDI")
	}
	rec := xapi.New[xapi.VDI]()
	rec.SR, rec.Type, rec.NameLabel = sr, xapi.VDITypeUser, importedLabel
	if rec.VirtualSize, err = diskSize(r.Length); err != nil {
		return err
	}
	return a.openNew(x, rec)
}

// openNew makes the volume of a disk that gets the record rec when the import
// has succeeded.
func (a *API) openNew(x *Import, rec *xapi.VDI) (err error) {
	c, ctx := x.call, x.call.Context()
	repo, drop, err := a.holdSR(ctx, c, rec.SR, xapi.StorageOperationsVDICreate)
	if err != nil {
		return err
	}
	rec.UUID = uuid.NewString()
	rec.Location, rec.Managed = rec.UUID, true
	id := storage.ID(rec.UUID)
	done := repo.reserve(id)
	x.free = func() { done(); drop() }
	defer func() {
		if err != nil {
			x.undo.run(ctx)
			x.free()
		}
	}()
	var attrs []byte
	if err := a.db.View(func(tx *db.Tx) error { attrs = attrsOf(tx, rec).encode(); return nil }); err != nil {
		return err
	}
	x.undo.push(func(ctx context.Context) { a.discard(ctx, repo, id) })
	if _, err := repo.Create(ctx, storage.Spec{ID: id, Size: rec.VirtualSize, Attrs: attrs}); err != nil {
		return fmt.Errorf("create VDI %s: %w", id, err)
	}
	v, err := repo.Open(ctx, id, storage.Live)
	if err != nil {
		return fmt.Errorf("open VDI %s: %w", id, err)
	}
	x.VDI, x.Volume, x.Repo = rec, v, repo.Repo
	x.dst = &openDisk{Volume: v, rec: rec, repo: repo, drop: func() {}, log: a.log}
	x.record = func(ctx context.Context) (xapi.Ref[xapi.VDI], error) {
		info, err := repo.Stat(ctx, id)
		if err != nil {
			return "", err
		}
		rec.VirtualSize, rec.PhysicalUtilisation = info.Size, info.Used
		ref, err := a.recordDisk(ctx, rec)
		if err == nil || unsettled(err) {
			x.undo.disarm()
		}
		return ref, err
	}
	return nil
}

// Context is like Export.Context.
func (x *Import) Context() context.Context { return x.call.Context() }

// Progress is like Export.Progress.
func (x *Import) Progress(done, total int64) { x.call.Progress(done, total) }

// Finish releases the disk and completes the task: when err is nil, after what
// was written has been made durable, with the reference of the disk as its
// result. After an error an existing disk keeps what was written, which a crash
// may undo, unless that went to a shadow; a new one is deleted. It returns what the task ended with: nil for success, else an *xapi.Error.
func (x *Import) Finish(err error) error {
	ref, err := x.end(err)
	x.call.api.describe(x.Task, x.notes)
	if err != nil {
		return x.call.finish(Result{}, err)
	}
	return x.call.finish(Result{Type: xapi.ClassOf[xapi.VDI]().RefType(), Value: ref}, nil)
}

// end is all of Finish but the end of the task.
func (x *Import) end(err error) (xapi.Ref[xapi.VDI], error) {
	a, ctx := x.call.api, context.WithoutCancel(x.call.Context())
	if err == nil {
		if err = x.Volume.Flush(ctx); err != nil {
			err = fmt.Errorf("flush VDI %s: %w", x.VDI.UUID, err)
		}
	}
	if err == nil && x.sealed != nil {
		err = x.sealed(ctx)
	}
	if err == nil {
		err = x.publish(ctx)
	}
	ref := x.Ref
	if x.record == nil {
		a.noteWritten(ctx, x.dst)
	}
	if x.shadow != nil {
		a.reveal(ctx, x.shadow)
	}
	for _, h := range x.scratch {
		a.reveal(ctx, h)
	}
	x.dst.close()
	if x.record != nil {
		if err == nil {
			ref, err = x.record(ctx)
		}
		x.undo.run(ctx)
		x.free()
	}
	return ref, err
}

// findDisk returns the disk with a reference or UUID.
func (a *API) findDisk(s string) (ref xapi.Ref[xapi.VDI], err error) {
	if s == "" {
		return "", xapi.NewError(xapi.ErrVDIMissing)
	}
	err = a.db.View(func(tx *db.Tx) (err error) {
		ref, err = find[xapi.VDI](tx, s)
		return err
	})
	return ref, err
}

// findSR returns the SR with a reference or UUID.
func (a *API) findSR(s string) (ref xapi.Ref[xapi.SR], err error) {
	if s == "" {
		return "", xapi.NewError(xapi.ErrVDIMissing) // neither a VDI nor an SR to make one in
	}
	err = a.db.View(func(tx *db.Tx) (err error) {
		ref, err = find[xapi.SR](tx, s)
		return err
	})
	return ref, err
}

// find returns the object of a class with a reference or UUID.
func find[T any](tx *db.Tx, s string) (xapi.Ref[T], error) {
	if strings.HasPrefix(s, "OpaqueRef:") {
		_, err := db.Get(tx, xapi.Ref[T](s))
		return xapi.Ref[T](s), err
	}
	ref, _, err := db.ByUUID[T](tx, s)
	return ref, err
}
