// Package api is what XenAPI methods do. [API.Invoke] takes a method name and
// wire parameters from any transport and answers with a typed result or a
// [*xapi.Error]; everything between the two happens here, in one order:
//
//	name → parameter count → parameter types → session → role → handler
//
// The names, signatures, roles and defaults all come from the datamodel
// ([xapi.Datamodel]). Messages fall into three groups:
//
//   - mechanical ones (get and set a field, get_record, get_all_records_where,
//     …) are interpreted once for every class, in verbs.go;
//   - exceptions are ordinary functions, one file per class, bound by name in
//     the table at the top of the file. New compares every signature with the
//     datamodel and refuses to start on a mismatch;
//   - the rest answers NOT_IMPLEMENTED. [Coverage] lists which is which.
//
// What needs nothing of the rest is in packages of its own: what roles allow
// (rbac), how calls take turns (claim), events (event), expressions about
// objects (where), passwords (login), how VMs are written down (ova, sexpr) and
// copying contents (diskcopy).
//
// # Calls, tasks and claims
//
// Every invocation is a [Call], and every Call is a task with a reference that
// task.cancel accepts. Async calls and HTTP transfers also have a task record;
// those of synchronous calls stay out of the database. A handler runs
// detached from the connection of its client: a client that goes away does
// not abort what it started, task.cancel and the server's stop do, by ending
// the handler's context with TASK_CANCELLED as its cause.
//
// A handler that is about to do something lasting to an object takes a
// claim on it ([Call.Claim]). The claim appears in the object's current_operations, and
// whoever is not compatible with it waits for its turn.
//
// # Users and schedules
//
// Who may log in, and with which roles, is what the file of the users says
// (accounts.go); class subject mirrors it. The scheduler (vmss_run.go) takes
// the snapshots of class VMSS through the same code as VM.snapshot, as calls
// of its own.
//
// # State
//
// Objects live in [db.DB]. Sessions and tasks are rows there too, memory-only
// ones, so that getters and events work on them; what dispatch needs on every
// call is kept beside them in plain Go structs. Nothing of a session, task or
// claim survives a restart.
package api

import (
	"cmp"
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"time"

	"coppice/internal/claim"
	"coppice/internal/db"
	"coppice/internal/event"
	"coppice/internal/login"
	"coppice/internal/rbac"
	"coppice/internal/storage"
	"coppice/internal/users"
	"coppice/internal/xapi"
)

// Config is what an API is made of. DB and Storage are required.
type Config struct {
	DB      *db.DB
	Storage storage.Registry

	// RootPassword is the verifier of root's password, made by [login.Hash].
	// Empty means that nobody can log in with a password.
	RootPassword string
	// SavePassword stores a new verifier for user; session.change_password
	// succeeds only after it returned nil. Nil refuses changes.
	SavePassword func(user, verifier string) error
	// Users is the file of the users beside root; nil when there can be none.
	Users *users.File

	// OnCall is told what became of each call, right after it and by the
	// goroutine that it ran in. Nil: nobody is.
	OnCall func(CallReport)

	Log         *slog.Logger     // nil discards
	Version     string           // product version, for host.software_version
	DataDir     string           // default SRs live under it
	HostAddress func() string    // address clients reach the server at; nil means 127.0.0.1
	Now         func() time.Time // nil means time.Now

	// Certificate returns what TLS listeners show now, nil while it is in the
	// making; nil means that there are none.
	Certificate func() *x509.Certificate

	// NBD tells where the server listens for NBD; nil means nowhere.
	NBD func() NBDEndpoints

	// Sources reaches the servers that disks can be pulled from; nil when none
	// can.
	Sources Sources

	// RevertByClone makes VM.revert replace disks by clones, whatever the
	// pool's other_config says.
	RevertByClone bool
}

// API executes XenAPI messages. It is safe for concurrent use.
type API struct {
	cfg   Config
	db    *db.DB
	log   *slog.Logger
	model *xapi.Model

	methods  map[string]*method // by every spelling, without Async.
	listed   []string           // system.listMethods
	hooks    map[string]fieldHook
	password *login.Passwords
	types    struct{ text, stringSet, taskRef *xapi.Type }

	roles    *rbac.Table
	accounts accountTable
	sessions sessionTable
	running  taskTable
	claims   *claim.Queue
	events   *event.Feed
	repos    repoTable
	nbd      nbdTable
	lists    operationLists

	refused login.Refusals // since the last alert about them

	scheduler *scheduler

	ctx        context.Context // ends when Close is called
	stop       context.CancelCauseFunc
	shut       func() error // what Close does, once
	background sync.WaitGroup
}

// New binds every method, creates the objects that must exist (pool, host,
// control domain, SMs, the default SR) where they are missing, opens the
// storage repositories and starts the collectors of old sessions and tasks.
// The caller closes the API before the DB it passed in.
func New(ctx context.Context, cfg Config) (*API, error) {
	if cfg.Storage == nil {
		return nil, errors.New("api: Config.Storage is required")
	}
	a, err := prepare(ctx, cfg)
	if err != nil {
		return nil, err
	}
	if err := a.recognize(ctx); err != nil {
		a.stop(err)
		return nil, errors.Join(fmt.Errorf("api: looking at the storage: %w", err), a.closeStorage())
	}
	if err := a.bootstrap(ctx); err != nil {
		a.stop(err)
		return nil, errors.Join(fmt.Errorf("api: creating the first objects: %w", err), a.closeStorage())
	}
	if err := a.ReloadUsers(ctx); err != nil {
		a.stop(err)
		return nil, fmt.Errorf("api: reading the users: %w", err)
	}
	if err := a.detachAll(ctx); err != nil {
		a.stop(err)
		return nil, fmt.Errorf("api: detaching disks: %w", err)
	}
	if err := a.openStorage(ctx); err != nil {
		a.stop(err)
		return nil, errors.Join(fmt.Errorf("api: opening storage: %w", err), a.closeStorage())
	}
	a.background.Go(a.collect)
	a.background.Go(a.scheduler.loop)
	a.background.Go(a.tellFailedLogins)
	if cfg.Certificate != nil {
		a.background.Go(a.followCertificate)
	}
	return a, nil
}

// prepare makes an API that can dispatch but has no objects yet.
func prepare(ctx context.Context, cfg Config) (*API, error) {
	if cfg.DB == nil {
		return nil, errors.New("api: Config.DB is required")
	}
	cfg.Log = cmp.Or(cfg.Log, slog.New(slog.DiscardHandler))
	if cfg.HostAddress == nil {
		cfg.HostAddress = func() string { return "127.0.0.1" }
	}
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	a := &API{cfg: cfg, db: cfg.DB, log: cfg.Log, model: xapi.Datamodel()}
	a.types.taskRef = a.model.Classes["task"].RefType()
	var err error
	if a.types.text, err = a.model.Type("string"); err != nil {
		return nil, err
	}
	if a.types.stringSet, err = a.model.Type("string set"); err != nil {
		return nil, err
	}
	if a.methods, err = bind(a.model, methodTables()...); err != nil {
		return nil, err
	}
	a.listed = listMethods(a.methods)
	a.hooks = fieldHooks()
	if a.password, err = login.NewPasswords(rootUser, cfg.RootPassword); err != nil {
		return nil, err
	}
	a.roles = rbac.New(a.model)
	a.sessions.init()
	a.events = event.New(a.db, a.model, a.now)
	a.running.init()
	a.claims = claim.New(a.db, a.model, a.log, claim.Rules{
		Runs:    func(task xapi.Ref[xapi.Task]) bool { return a.running.call(task) != nil },
		Refresh: a.refreshAllowed,
	})
	a.ctx, a.stop = context.WithCancelCause(context.WithoutCancel(ctx))
	a.shut = sync.OnceValue(a.shutdown)
	a.scheduler = newScheduler(a)
	return a, nil
}

// errStopping is the cause with which the contexts of running calls end when
// the API closes.
var errStopping = xapi.NewError(xapi.ErrInternalError, "The server is stopping")

// Close cancels the running calls, waits for them to end and closes the
// storage repositories. Calls that arrive later fail. It may be called again,
// and from several goroutines: all get the one result.
func (a *API) Close() error { return a.shut() }

func (a *API) shutdown() error {
	a.stop(errStopping)
	a.running.close()
	a.background.Wait()
	a.closeNBD()
	return a.closeStorage()
}

// now is the server's clock, in UTC.
func (a *API) now() time.Time { return a.cfg.Now().UTC() }
