package api

import (
	"context"
	"errors"
	"fmt"
	"iter"
	"slices"
	"sync"
	"time"

	"github.com/google/uuid"

	"coppice/internal/db"
	"coppice/internal/storage"
	"coppice/internal/xapi"
)

// NBDEndpoints says where the server listens for NBD. What is "" is not there.
type NBDEndpoints struct {
	Socket string // path of the Unix socket

	Address     string // of the host, for TLS and Plain
	TLS, Plain  int64  // ports, 0 for none
	Certificate string // PEM of the certificate of the TLS listener
	Subject     string // a name in it
}

// NBDClient is the client of one connection.
type NBDClient struct {
	Origin
	// Process tells local clients from each other: those that give the same
	// one share what they attach.
	Process string
}

// NBDExport is what a client may know of an export before it is attached.
type NBDExport struct {
	VDI      *xapi.VDI
	ReadOnly bool
}

// NBDAttachment is a disk that a connection has attached. While it is open its
// SR cannot be detached, and one for writing counts as attached read-write in
// the rules of all operations: an import or a revert gets VDI_IN_USE, a
// snapshot, a clone or an export is not hindered.
type NBDAttachment struct {
	Volume   storage.Volume
	ReadOnly bool
	Repo     storage.Repo
	Context  context.Context // ends when the client has to go: logout, unplug, stop

	release func()
}

// Close detaches. It is called once.
func (x *NBDAttachment) Close() { x.release() }

// nbdKey names what connections share: several connections of one client to one
// disk are one attachment, so that they see the same contents and are not in
// each other's way. Clones that become different disks, or none, are different
// attachments.
type nbdKey struct {
	client string
	vdi    xapi.Ref[xapi.VDI]
	mode   nbdMode
	keep   string
}

// nbdTable holds what is attached by NBD.
type nbdTable struct {
	mu       sync.Mutex
	attached map[nbdKey]*nbdDisk
	tokens   map[string]nbdToken
	left     chan struct{} // closed, and made anew, when a use of a disk ends; nil when nobody waits
}

// nbdPatience is how long is waited for clients that may be about to go: what
// they do last is to disconnect, without an answer, and whoever is next may
// come before the server has taken note.
const nbdPatience = 500 * time.Millisecond

// nbdSettle waits until busy, which is called with the table locked, denies,
// for as long as clients that have disconnected may still count.
func (a *API) nbdSettle(ctx context.Context, busy func(*nbdTable) bool) {
	t := &a.nbd
	var timeout <-chan time.Time
	for {
		t.mu.Lock()
		if !busy(t) {
			t.mu.Unlock()
			return
		}
		if t.left == nil {
			t.left = make(chan struct{})
		}
		left := t.left
		t.mu.Unlock()
		if timeout == nil {
			timer := time.NewTimer(nbdPatience)
			defer timer.Stop()
			timeout = timer.C
		}
		select {
		case <-left:
		case <-timeout:
			return
		case <-ctx.Done():
			return
		}
	}
}

// nbdWritten says that a client other than the named one writes a disk by
// NBD.
func nbdWritten(vdi xapi.Ref[xapi.VDI], client string) func(*nbdTable) bool {
	return func(t *nbdTable) bool {
		for key, d := range t.attached {
			if key.vdi == vdi && key.mode == nbdReadWrite && key.client != client && d.vbd == "" {
				return true
			}
		}
		return false
	}
}

// nbdDisk is an attached disk, for one client or more of its connections.
type nbdDisk struct {
	key   nbdKey
	ready chan struct{} // closed when disk and err are set
	gone  chan struct{} // closed when the disk is not attached any more
	err   error
	disk  *openDisk
	clone *nbdClone          // of a copy-on-write attachment
	vbd   xapi.Ref[xapi.VBD] // whose plug is one of the users, "" for none

	users int                // guarded by the table's mu: connections, and the plug of a VBD
	cut   context.CancelFunc // ends ctx
	ctx   context.Context    // of all connections
}

// nbdClone is the temporary clone behind a copy-on-write attachment.
type nbdClone struct {
	id   storage.ID
	keep string    // label of the disk that it becomes, "" for none
	rec  *xapi.VDI // of that disk
	done func()    // ends the reservation of id
}

// nbdAccess is who asks for what, after sessions and roles were checked.
type nbdAccess struct {
	name    nbdName
	session *session // nil for a trusted client without one
	vdi     xapi.Ref[xapi.VDI]
	rec     *xapi.VDI
	vbd     xapi.Ref[xapi.VBD] // of a VBD's export
	mode    nbdMode
	client  string
}

// nbdAccess resolves an export name for a client and checks that it may use
// it, as an export or import by HTTP would.
func (a *API) nbdAccess(o NBDClient, s string) (x nbdAccess, err error) {
	if x.name, err = parseNBDName(s); err != nil {
		return x, err
	}
	x.mode = x.name.mode
	switch {
	case x.name.kind == nbdOfToken:
		t, err := a.nbdToken(x.name.id)
		if err != nil {
			return x, err
		}
		x.client, x.name, x.mode = x.name.id, t.name, t.name.mode
	case x.name.session != "":
		if x.session, err = a.session(x.name.session); err != nil {
			return x, err
		}
		x.client = string(x.session.ref)
	case !o.Trusted:
		return x, errSessionInvalid(xapi.NullRef)
	default:
		x.client = o.Process
	}
	err = a.db.View(func(tx *db.Tx) (err error) {
		if x.name.kind == nbdOfVBD {
			var vbd *xapi.VBD
			if x.vbd, vbd, err = db.ByUUID[xapi.VBD](tx, x.name.id); err != nil {
				return err
			}
			if !vbd.CurrentlyAttached || vbd.RuntimeProperties[nbdURIKey] == "" {
				return xapi.NewError(xapi.ErrDeviceAlreadyDetached, string(x.vbd))
			}
			x.vdi, x.mode, x.client = vbd.VDI, vbdNBDMode(vbd), string(x.vbd)
			x.rec, err = db.Get(tx, x.vdi)
			return err
		}
		x.vdi, x.rec, err = db.ByUUID[xapi.VDI](tx, x.name.id)
		return err
	})
	if err != nil || x.session == nil {
		return x, err
	}
	return x, a.authorizeHTTP(x.session, nbdName{mode: x.mode, keep: x.name.keep}.action())
}

// NBDNames yields the export names of all disks, for a trusted client.
func (a *API) NBDNames(o NBDClient) iter.Seq2[string, error] {
	return func(yield func(string, error) bool) {
		if !o.Trusted {
			yield("", errSessionInvalid(xapi.NullRef))
			return
		}
		var names []string
		_ = a.db.View(func(tx *db.Tx) error {
			for ref, v := range db.All[xapi.VDI](tx) {
				if a.vdiReadable(tx, ref) == nil {
					names = append(names, v.UUID)
				}
			}
			return nil
		})
		slices.Sort(names)
		for _, n := range names {
			if !yield(n, nil) {
				return
			}
		}
	}
}

// NBDDescribe tells about an export that the client may use, and attaches
// nothing.
func (a *API) NBDDescribe(o NBDClient, name string) (NBDExport, error) {
	x, err := a.nbdAccess(o, name)
	if err != nil {
		return NBDExport{}, a.apiError(err)
	}
	err = a.db.View(func(tx *db.Tx) error { return a.vdiReadable(tx, x.vdi) })
	if err != nil {
		return NBDExport{}, a.apiError(err)
	}
	return NBDExport{VDI: x.rec, ReadOnly: x.mode == nbdReadOnly}, nil
}

// NBDAttach attaches a disk for one connection.
func (a *API) NBDAttach(ctx context.Context, o NBDClient, name string) (*NBDAttachment, error) {
	x, err := a.nbdAccess(o, name)
	if err != nil {
		return nil, a.apiError(err)
	}
	if s := x.session; s != nil {
		s.running.Add(1) // an attached disk is a use of the session
	}
	d, err := a.nbdShare(ctx, o.Origin, x)
	if err != nil {
		if s := x.session; s != nil {
			s.running.Add(-1)
		}
		return nil, a.apiError(err)
	}
	at := &NBDAttachment{Volume: d.disk.Volume, ReadOnly: x.mode == nbdReadOnly, Repo: d.disk.repo.Repo}
	cctx, cancel := context.WithCancel(d.ctx)
	at.Context = cctx
	unhook := func() bool { return true }
	if x.session != nil {
		unhook = context.AfterFunc(x.session.ctx, cancel)
	}
	at.release = func() {
		unhook()
		cancel()
		a.nbdLeave(d)
		if s := x.session; s != nil {
			s.active.Store(a.now().UnixNano())
			s.running.Add(-1)
		}
	}
	return at, nil
}

// nbdShare returns the attachment that x asks for, a new one or one that
// another connection of the same client has. nbdLeave gives it back.
func (a *API) nbdShare(ctx context.Context, o Origin, x nbdAccess) (*nbdDisk, error) {
	key := nbdKey{x.client, x.vdi, x.mode, x.name.keep}
	t := &a.nbd
	if x.mode == nbdReadWrite && !x.rec.Sharable {
		a.nbdSettle(ctx, nbdWritten(x.vdi, x.client))
	}
	d, err := t.lockFor(ctx, key)
	if err != nil {
		return nil, err
	}
	if d == nil && x.name.kind == nbdOfVBD { // unplugged meanwhile
		t.mu.Unlock()
		return nil, xapi.NewError(xapi.ErrDeviceAlreadyDetached, string(x.vbd))
	}
	first := d == nil
	if first {
		d = &nbdDisk{key: key, vbd: x.vbd, ready: make(chan struct{}), gone: make(chan struct{})}
		d.ctx, d.cut = context.WithCancel(a.ctx)
		if t.attached == nil {
			t.attached = map[nbdKey]*nbdDisk{}
		}
		t.attached[key] = d
	}
	d.users++
	t.mu.Unlock()
	if first {
		d.err = a.nbdOpen(ctx, o, d, x)
		close(d.ready)
	}
	<-d.ready
	if d.err != nil {
		a.nbdLeave(d)
		return nil, d.err
	}
	return d, nil
}

// lockFor locks the table and returns the attachment of a key, nil for none.
// One that is ending is waited for.
func (t *nbdTable) lockFor(ctx context.Context, key nbdKey) (*nbdDisk, error) {
	for {
		t.mu.Lock()
		d := t.attached[key]
		if d == nil || d.users > 0 {
			return d, nil
		}
		t.mu.Unlock()
		select {
		case <-d.gone:
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		}
	}
}

// nbdOpen opens the disk behind a new attachment.
func (a *API) nbdOpen(ctx context.Context, o Origin, d *nbdDisk, x nbdAccess) error {
	c, err := a.begin(ctx, o, x.session, "nbd")
	if err != nil {
		return err
	}
	switch x.mode {
	case nbdReadOnly:
		d.disk, err = a.openReader(ctx, c, x.vdi, nil)
	case nbdReadWrite:
		d.disk, err = a.open(ctx, c, x.vdi, lending, func(tx *db.Tx) error {
			if err := a.nbdWritable(tx, x.vdi); err != nil {
				return err
			}
			return forgetReceived(tx, x.vdi)
		})
	case nbdCopyOnWrite:
		err = a.nbdOpenClone(ctx, c, d, x)
	}
	return c.finish(Result{}, err)
}

// nbdWritable is vdiWritable for NBD: a sharable disk may have several clients
// that write, but none while the server itself writes to it.
func (a *API) nbdWritable(tx *db.Tx, ref xapi.Ref[xapi.VDI]) error {
	err := a.vdiWritable(tx, ref, "nbd")
	if e, ok := errors.AsType[*xapi.Error](err); ok && e.Code == xapi.ErrVDIInUse {
		if v, gone := db.Get(tx, ref); gone == nil && v.Sharable && a.repos.uses.count(ref, writing) == 0 {
			return nil
		}
	}
	return err
}

// nbdOpenClone makes the temporary clone. It has no record, so that a crash
// leaves garbage that start-up reclaims.
func (a *API) nbdOpenClone(ctx context.Context, c *Call, d *nbdDisk, x nbdAccess) (err error) {
	src, err := a.openReader(ctx, c, x.vdi, func(tx *db.Tx) error {
		return a.vdiAllows(tx, x.vdi, xapi.VDIOperationsClone)
	})
	if err != nil {
		return err
	}
	src.Volume.Close() // only its hold on the SR is wanted
	rec := derivedDisk(src.rec)
	rec.UUID = uuid.NewString()
	rec.Location, rec.Managed = rec.UUID, true
	rec.NameLabel = x.name.keep
	k := &nbdClone{id: storage.ID(rec.UUID), keep: x.name.keep, rec: rec}
	k.done = src.repo.reserve(k.id)
	defer func() {
		if err != nil {
			a.discard(context.WithoutCancel(ctx), src.repo, k.id)
			k.done()
			src.drop()
		}
	}()
	var attrs []byte
	if err := a.db.View(func(tx *db.Tx) error { attrs = attrsOf(tx, rec).encode(); return nil }); err != nil {
		return err
	}
	if _, err := src.repo.Clone(ctx, storage.Derived{Source: storage.ID(src.rec.UUID), ID: k.id, Attrs: attrs}); err != nil {
		return fmt.Errorf("clone VDI %s: %w", src.rec.UUID, err)
	}
	v, err := src.repo.Open(ctx, k.id, storage.Live)
	if err != nil {
		return fmt.Errorf("open the clone of VDI %s: %w", src.rec.UUID, err)
	}
	src.Volume = v
	d.disk, d.clone = src, k
	return nil
}

// nbdLeave ends one use of an attachment, and with the last one the
// attachment.
func (a *API) nbdLeave(d *nbdDisk) {
	t := &a.nbd
	t.mu.Lock()
	d.users--
	last := d.users == 0
	t.mu.Unlock()
	defer func() {
		t.mu.Lock()
		defer t.mu.Unlock()
		if last {
			close(d.gone)
			if t.attached[d.key] == d {
				delete(t.attached, d.key)
			}
		}
		if t.left != nil {
			close(t.left)
			t.left = nil
		}
	}()
	if !last {
		return
	}
	d.cut()
	if d.disk == nil {
		return
	}
	ctx := context.WithoutCancel(a.ctx)
	switch {
	case d.clone != nil:
		a.nbdEndClone(ctx, d)
	case d.key.mode == nbdReadWrite:
		if err := d.disk.Flush(ctx); err != nil {
			a.log.Error("nbd: what a client wrote last may not be durable", "vdi", d.disk.rec.UUID, "err", err)
		}
		a.noteWritten(ctx, d.disk)
	}
	d.disk.close()
	if d.clone != nil {
		d.clone.done()
	}
}

// nbdEndClone makes a disk of a temporary clone, or deletes it.
func (a *API) nbdEndClone(ctx context.Context, d *nbdDisk) {
	k, repo := d.clone, d.disk.repo
	if k.keep != "" {
		err := d.disk.Flush(ctx)
		var info storage.Info
		if err == nil {
			info, err = repo.Stat(ctx, k.id)
		}
		if err == nil {
			k.rec.VirtualSize, k.rec.PhysicalUtilisation = info.Size, info.Used
			_, err = a.recordDisk(ctx, k.rec)
			if err == nil || unsettled(err) {
				return
			}
		}
		a.log.Error("nbd: a clone could not be kept", "of", d.disk.rec.UUID, "err", err)
	}
	a.discard(ctx, repo, k.id)
}

// closeNBD detaches the VBDs that are plugged when the server stops; the next
// start puts their records right. Connections detach what they have
// themselves.
func (a *API) closeNBD() {
	t := &a.nbd
	t.mu.Lock()
	var plugged []*nbdDisk
	for _, d := range t.attached {
		if d.vbd != "" {
			plugged = append(plugged, d)
		}
	}
	clear(t.attached)
	t.mu.Unlock()
	for _, d := range plugged {
		<-d.ready
		a.nbdLeave(d)
	}
}

// NBDChanged returns what in a disk that a connection has attached differs
// from the disk base, from byte off on. UUID_INVALID when there is no such
// base, SR_OPERATION_NOT_SUPPORTED when it cannot be compared.
func (a *API) NBDChanged(x *NBDAttachment, base string) (func(ctx context.Context, off, n int64) iter.Seq2[storage.Extent, error], error) {
	tracker, ok := x.Repo.(storage.ChangeTracker)
	if !ok {
		return nil, xapi.NewError(xapi.ErrSROperationNotSupported, xapi.NullRef)
	}
	if err := a.nbdBase(x.Repo, base); err != nil {
		return nil, a.apiError(err)
	}
	return func(ctx context.Context, off, n int64) iter.Seq2[storage.Extent, error] {
		return func(yield func(storage.Extent, error) bool) {
			for e, err := range tracker.ChangedSince(ctx, storage.ID(base), x.Volume, off) {
				if err == nil && e.Off >= off+n {
					return
				}
				if !yield(e, err) || err != nil {
					return
				}
			}
		}
	}, nil
}

// nbdBase checks that a disk can be the base of changes in a repository.
func (a *API) nbdBase(repo storage.Repo, base string) error {
	return a.db.View(func(tx *db.Tx) error {
		_, v, err := db.ByUUID[xapi.VDI](tx, base)
		if err != nil {
			return err
		}
		r, err := a.repos.get(v.SR)
		if err != nil {
			return err
		}
		if r.Repo != repo {
			return xapi.NewError(xapi.ErrSROperationNotSupported, string(v.SR))
		}
		return nil
	})
}

// NBDComparable tells whether a disk can be asked for what changed in it since
// base, before it is attached.
func (a *API) NBDComparable(o NBDClient, name, base string) error {
	x, err := a.nbdAccess(o, name)
	if err != nil {
		return a.apiError(err)
	}
	repo, err := a.repos.get(x.rec.SR)
	if err != nil {
		return err
	}
	if _, ok := repo.Repo.(storage.ChangeTracker); !ok {
		return xapi.NewError(xapi.ErrSROperationNotSupported, string(x.rec.SR))
	}
	if err := a.nbdBase(repo.Repo, base); err != nil {
		return a.apiError(err)
	}
	return nil
}
