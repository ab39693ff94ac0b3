// Package xecmd is what the commands of xe do. They run inside the server:
// the client sends its arguments as text and prints what it is told (package
// thincli), so a command here is the command for every xe there is.
//
// # A run
//
// [Serve] takes a connection through one fixed sequence: parse the arguments;
// answer help without credentials; report an unknown command or a missing
// parameter, still without credentials; log in; run the command; log out;
// make the client exit with 0 or, after any error, with 1.
//
// # Commands
//
// Most commands are not written anywhere: C-list and C-param-{list,get,set,
// add,remove,clear} exist for each class of the datamodel. What they show is
// a list of fields per class (fields.go), in the order of layouts.go for the
// classes that scripts know well and in the order of the datamodel for the
// others. The remaining commands are entries of one table, spread over the
// files that hold their functions: commandTable in table.go lists them.
//
// Beside the stock server's there are commands of our own, whose help calls
// them extensions, and lists are sorted by name.
//
// Commands act only through messages of the API, as their user; lists read
// objects directly, from one consistent state.
package xecmd

import (
	"context"
	"errors"
	"iter"
	"sync"

	"coppice/internal/api"
	"coppice/internal/thincli"
	"coppice/internal/xapi"
)

// API is what commands need of the server. *api.API provides it.
type API interface {
	Invoke(ctx context.Context, o api.Origin, method string, params []any) (api.Result, error)
	Login(ctx context.Context, o api.Origin, user, password string) (xapi.Ref[xapi.Session], error)
	Logout(session xapi.Ref[xapi.Session]) error
	Read(session xapi.Ref[xapi.Session], fn func(api.View) error) error
}

// view is one consistent state of all objects.
type view interface {
	Lookup(class *xapi.Class, ref string) (rec any, ok bool)
	Each(class *xapi.Class) iter.Seq2[string, any]
	UUID(class *xapi.Class, uuid string) (ref string, ok bool)
	ClassOf(ref string) (*xapi.Class, bool)
}

// run is one command being run.
type run struct {
	api     API
	formats []string // of images, that the server moves disks as
	origin  api.Origin
	conn    *thincli.Server
	session xapi.Ref[xapi.Session]
	opened  bool // session is ours to end
	args    *arguments
	out     *printer
	table   *table
	cmd     *command
}

// Serve runs the command in args for the client on conn and sends the exit
// code that it returns. It does not close conn. The command ends early when
// ctx does or when the client hangs up; what an API message has begun then
// goes on or is cancelled as that message sees fit. formats are the names of
// the image formats that the server's transfers know.
func Serve(ctx context.Context, a API, formats []string, o api.Origin, conn *thincli.Server, args []string) (exit int) {
	ctx, cancel := context.WithCancelCause(ctx)
	var wg sync.WaitGroup
	defer wg.Wait()
	defer cancel(nil)
	wg.Go(func() {
		select {
		case <-conn.Done():
			cancel(thincli.ErrGone)
		case <-ctx.Done():
		}
	})
	o.Originator = "cli"
	r := &run{api: a, formats: formats, origin: o, conn: conn, table: commands()}
	if err := r.serve(ctx, args); err != nil {
		r.report(err) // before logging out: it looks references up
		exit = 1
	}
	if r.opened {
		_ = a.Logout(r.session) // it may have expired
	}
	// A client that is gone is not told anything, and needs not be.
	_ = conn.Exit(exit)
	return exit
}

func (r *run) serve(ctx context.Context, args []string) error {
	a, err := parseArgs(args)
	if err != nil {
		return err
	}
	r.args = a
	r.out = &printer{conn: r.conn, minimal: a.flag("minimal")}
	if a.command == "help" {
		if err := r.help(); err != nil {
			return err
		}
		return r.out.flush()
	}
	cmd := r.table.byName[a.command]
	if cmd == nil {
		return r.table.unknown(a.command)
	}
	r.cmd = cmd
	if err := cmd.misspelt(a); err != nil {
		return err
	}
	for _, p := range cmd.required {
		if !a.has(p) {
			return missing(p)
		}
	}
	if a.session != "" {
		r.session = xapi.Ref[xapi.Session](a.session)
	} else {
		if err := r.login(ctx); err != nil {
			return err
		}
	}
	if err := cmd.run(ctx, r); err != nil {
		if cause := context.Cause(ctx); cause != nil && errors.Is(err, ctx.Err()) {
			return cause
		}
		return err
	}
	return r.out.flush()
}

func (r *run) login(ctx context.Context) error {
	user, password := r.args.str("username"), r.args.str("password")
	if user == "" && !r.origin.Trusted {
		return &usageError{text: "Username/password must be specified", hint: "See -u, -pw and -pwf, or put username= and password= into ~/.xe."}
	}
	session, err := r.api.Login(ctx, r.origin, user, password)
	if e, ok := errors.AsType[*xapi.Error](err); ok && e.Code == xapi.ErrSessionAuthenticationFailed {
		return &usageError{text: "Authentication failed", hint: "The user name or the password is wrong: see -u, -pw and -pwf, and ~/.xe."}
	}
	if err != nil {
		return err
	}
	r.session, r.opened = session, true
	return nil
}

// call sends a message, with the session as its first parameter.
func (r *run) call(ctx context.Context, method string, params ...any) (api.Result, error) {
	return r.api.Invoke(ctx, r.origin, method, append([]any{string(r.session)}, params...))
}

// callText is call for messages whose result is a scalar: its text.
func (r *run) callText(ctx context.Context, method string, params ...any) (string, error) {
	res, err := r.call(ctx, method, params...)
	if err != nil {
		return "", err
	}
	return res.Type.Text(res.Value), nil
}

// do is call for messages whose result does not matter.
func (r *run) do(ctx context.Context, method string, params ...any) error {
	_, err := r.call(ctx, method, params...)
	return err
}

// read runs fn on one state of all objects and returns its error as it is.
func (r *run) read(fn func(v view) error) error {
	var own error
	err := r.api.Read(r.session, func(v api.View) error {
		own = fn(v)
		return nil
	})
	if err != nil {
		return err
	}
	return own
}

// byUUID returns the reference of the object of a class with a uuid.
func (r *run) byUUID(ctx context.Context, class, uuid string) (string, error) {
	return r.callText(ctx, class+".get_by_uuid", uuid)
}

// ref returns the reference of the object whose uuid is the value of a parameter.
func (r *run) ref(ctx context.Context, class, param string) (string, error) {
	return r.byUUID(ctx, class, r.args.str(param))
}

// optionalRef is ref for a parameter that may be missing or empty, which is the null reference.
func (r *run) optionalRef(ctx context.Context, class, param string) (string, error) {
	if r.args.str(param) == "" {
		return xapi.NullRef, nil
	}
	return r.ref(ctx, class, param)
}

// printUUID prints the uuid of a new object.
func (r *run) printUUID(ctx context.Context, class, ref string) error {
	uuid, err := r.callText(ctx, class+".get_uuid", ref)
	if err != nil {
		return err
	}
	r.out.list(uuid)
	return nil
}
