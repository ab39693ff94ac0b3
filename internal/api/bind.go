package api

import (
	"context"
	"errors"
	"fmt"
	"reflect"
	"slices"

	"coppice/internal/xapi"
)

// A method table maps message names ("VDI.snapshot") to functions of the form
//
//	func(a *API, ctx context.Context, c *Call, params…) (result, error)
//	func(a *API, ctx context.Context, c *Call, params…) error // void
//
// usually method expressions. The parameters after the session are the Go
// types of the datamodel ([xapi.Type.GoType]); a constructor takes the record
// (*xapi.VDI) with defaults filled in and mandatory members present. bind
// compares each with the datamodel. A mechanical message may be bound too and
// is then not interpreted.

// methodTables lists the tables of the package: the ones of dispatch itself,
// and those of the classes.
func methodTables() []map[string]any {
	return []map[string]any{sessionMethods(), taskMethods(), eventMethods(), classMethods()}
}

// fieldHook runs after a mechanical setter, adder or remover has changed a
// field of an object. Its error becomes the message's; the change stays.
type fieldHook func(a *API, ctx context.Context, c *Call, ref, field string) error

// method is one message, ready to be called.
type method struct {
	name     string // "VDI.snapshot"
	class    *xapi.Class
	msg      *xapi.Method
	required int // parameters without the session
	how      Implementation
	run      handler // nil when NOT_IMPLEMENTED
}

// handler executes a message. args has one entry per parameter of the
// message, optional ones filled in.
type handler func(a *API, ctx context.Context, c *Call, args []any) (any, error)

// Implementation says what becomes of a message.
type Implementation int

// The kinds of implementation.
const (
	NotImplemented Implementation = iota // answers NOT_IMPLEMENTED
	Mechanical                           // interpreted from the datamodel
	Written                              // a function of this package
	Reserved                             // refused: PERMISSION_DENIED, for the storage layer only
	Withdrawn                            // refused: MESSAGE_REMOVED or MESSAGE_DEPRECATED
)

// reserved are the messages with which a storage back end reports to the
// server. There is no such back end outside the process, so they are refused.
var reserved = []string{
	"SR.set_physical_size", "SR.set_physical_utilisation", "SR.set_virtual_allocation",
	"VDI.db_forget", "VDI.db_introduce", "VDI.set_cbt_enabled", "VDI.set_is_a_snapshot", "VDI.set_managed",
	"VDI.set_metadata_of_pool", "VDI.set_missing", "VDI.set_physical_utilisation", "VDI.set_read_only",
	"VDI.set_sharable", "VDI.set_snapshot_of", "VDI.set_snapshot_time", "VDI.set_virtual_size",
}

// bind makes the dispatch table of the whole model, under both spellings of
// each name, from the method tables. It returns every mismatch.
func bind(model *xapi.Model, tables ...map[string]any) (map[string]*method, error) {
	written := map[string]any{}
	var errs []error
	for _, t := range tables {
		for name, fn := range t {
			if _, dup := written[name]; dup {
				errs = append(errs, fmt.Errorf("api: %s is bound twice", name))
			}
			written[name] = fn
		}
	}
	methods := map[string]*method{}
	for _, class := range model.Classes {
		for _, msg := range class.Methods {
			m := &method{name: class.Name + "." + msg.Name, class: class, msg: msg, required: msg.Required()}
			fn, bound := written[m.name]
			delete(written, m.name)
			switch {
			case msg.State == "removed":
				m.how, m.run = Withdrawn, refuse(xapi.NewError(xapi.ErrMessageRemoved))
			case slices.Contains(reserved, m.name):
				m.how, m.run = Reserved, refuse(permissionDenied(""))
			case bound:
				run, err := adapt(msg, fn)
				if err != nil {
					errs = append(errs, fmt.Errorf("api: %s: %w", m.name, err))
				}
				m.how, m.run = Written, run
			case msg.Kind != xapi.Custom:
				if m.run = mechanical(class, msg); m.run != nil {
					m.how = Mechanical
				}
			case msg.State == "deprecated":
				m.how, m.run = Withdrawn, refuse(xapi.NewError(xapi.ErrMessageDeprecated))
			}
			if bound && m.how != Written {
				errs = append(errs, fmt.Errorf("api: %s is bound but the datamodel says %s", m.name, msg.State))
			}
			methods[m.name] = m
			methods[class.Name+"_"+msg.Name] = m
		}
	}
	for name := range written {
		errs = append(errs, fmt.Errorf("api: %s is bound but not in the datamodel", name))
	}
	return methods, errors.Join(errs...)
}

// refuse is the handler that always fails with err.
func refuse(err *xapi.Error) handler {
	return func(*API, context.Context, *Call, []any) (any, error) { return nil, err }
}

var (
	apiType     = reflect.TypeFor[*API]()
	contextType = reflect.TypeFor[context.Context]()
	callType    = reflect.TypeFor[*Call]()
	errorType   = reflect.TypeFor[error]()
)

// adapt checks fn against the datamodel and makes a handler of it.
func adapt(msg *xapi.Method, fn any) (handler, error) {
	v := reflect.ValueOf(fn)
	if v.Kind() != reflect.Func {
		return nil, fmt.Errorf("bound to %T, not to a function", fn)
	}
	in := []reflect.Type{apiType, contextType, callType}
	for _, p := range msg.Params {
		in = append(in, p.Type.GoType())
	}
	out := []reflect.Type{errorType}
	if msg.Result.Kind != xapi.KindVoid {
		out = []reflect.Type{msg.Result.GoType(), errorType}
	}
	if want := reflect.FuncOf(in, out, false); v.Type() != want {
		return nil, fmt.Errorf("function is %v, the datamodel wants %v", v.Type(), want)
	}
	return func(a *API, ctx context.Context, c *Call, args []any) (any, error) {
		in := make([]reflect.Value, 3, 3+len(args))
		in[0], in[1], in[2] = reflect.ValueOf(a), reflect.ValueOf(ctx), reflect.ValueOf(c)
		for _, arg := range args {
			in = append(in, reflect.ValueOf(arg))
		}
		out := v.Call(in)
		err, _ := out[len(out)-1].Interface().(error)
		if len(out) == 1 || err != nil {
			return nil, err
		}
		return out[0].Interface(), nil
	}, nil
}

// listMethods returns the names of what can be called, sorted: clients find
// out from it which classes to watch and which features to offer.
func listMethods(methods map[string]*method) []string {
	names := []string{"system.isAlive", "system.listMethods"}
	for key, m := range methods {
		if key != m.name || m.how != Mechanical && m.how != Written {
			continue
		}
		names = append(names, m.name)
		if m.msg.Async {
			names = append(names, "Async."+m.name)
		}
	}
	slices.Sort(names)
	return names
}

// parse makes the values of a message's parameters, optional ones included,
// out of what came over the wire without the session.
func (m *method) parse(wire []any) ([]any, error) {
	n := len(m.msg.Params)
	if len(wire) < m.required || len(wire) > n && m.required == n {
		return nil, xapi.NewError(xapi.ErrMessageParameterCountMismatch,
			m.name, fmt.Sprint(m.required), fmt.Sprint(len(wire)))
	}
	args := make([]any, n)
	for i, p := range m.msg.Params {
		if i >= len(wire) {
			args[i] = p.Default
			continue
		}
		name := p.Name
		if m.msg.Kind == xapi.FieldSetter && i > 0 {
			name = m.msg.Field.Name
		}
		var err error
		if args[i], err = p.Type.ParseAs(name, wire[i]); err != nil {
			return nil, err
		}
	}
	return args, nil
}
