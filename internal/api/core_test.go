package api

import (
	"bytes"
	"context"
	"errors"
	"log/slog"
	"slices"
	"strings"
	"testing"

	"coppice/internal/db"
	"coppice/internal/rpc"
	"coppice/internal/xapi"
)

// core is an API with a database of its own, a pool and a host, and nothing
// else: no storage, no collectors.
type core struct {
	*API
	t       *testing.T
	root    xapi.Ref[xapi.Session]
	pool    xapi.Ref[xapi.Pool]
	host    xapi.Ref[xapi.Host]
	records *bytes.Buffer // the log
	spoken  *rpc.Dialect  // what calls and answers are written in; nil for neither
}

var trusted = Origin{Peer: "test", Trusted: true}

// newCore makes one; change may adjust the configuration.
func newCore(t *testing.T, change ...func(*Config)) *core {
	t.Helper()
	d, err := db.Open(t.Context(), xapi.Datamodel(), db.NewMemStore())
	if err != nil {
		t.Fatal(err)
	}
	log := new(bytes.Buffer)
	cfg := Config{DB: d, Log: slog.New(slog.NewTextHandler(log, nil))}
	for _, f := range change {
		f(&cfg)
	}
	a, err := prepare(t.Context(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	c := &core{API: a, t: t, records: log}
	t.Cleanup(func() {
		a.stop(errStopping)
		a.running.close()
		if err := d.Close(); err != nil {
			t.Error(err)
		}
	})
	c.update(func(tx *db.Tx) error {
		var err error
		if c.host, err = db.Insert(tx, xapi.New[xapi.Host]()); err != nil {
			return err
		}
		p := xapi.New[xapi.Pool]()
		p.Master = c.host
		p.OtherConfig = map[string]string{"a": "1"}
		c.pool, err = db.Insert(tx, p)
		return err
	})
	if c.root, err = a.Login(t.Context(), trusted, "root", "any"); err != nil {
		t.Fatal(err)
	}
	return c
}

func (c *core) update(fn func(*db.Tx) error) {
	c.t.Helper()
	if err := c.db.Update(context.Background(), fn); err != nil {
		c.t.Fatal(err)
	}
}

// insert adds an object.
func insert[T any](c *core, rec *T) xapi.Ref[T] {
	c.t.Helper()
	var ref xapi.Ref[T]
	c.update(func(tx *db.Tx) (err error) {
		ref, err = db.Insert(tx, rec)
		return err
	})
	return ref
}

// record reads an object.
func record[T any](c *core, ref xapi.Ref[T]) *T {
	c.t.Helper()
	var rec *T
	if err := c.db.View(func(tx *db.Tx) (err error) {
		rec, err = db.Get(tx, ref)
		return err
	}); err != nil {
		c.t.Fatal(err)
	}
	return rec
}

// as opens a session with a role.
func (c *core) as(role string) xapi.Ref[xapi.Session] {
	c.t.Helper()
	s, err := c.authenticate(c.t.Context(), trusted, "user with "+role, "")
	if err != nil {
		c.t.Fatal(err)
	}
	if role != localRoot {
		s.role, s.superuser = role, false
	}
	if err := c.openSession(s); err != nil {
		c.t.Fatal(err)
	}
	return s.ref
}

// call sends a message as root and returns its value.
func (c *core) call(name string, params ...any) any {
	c.t.Helper()
	res, err := c.try(c.root, name, params...)
	if err != nil {
		c.t.Fatalf("%s%q: %v", name, params, err)
	}
	return res.Value
}

// try sends a message in a session.
func (c *core) try(session xapi.Ref[xapi.Session], name string, params ...any) (Result, error) {
	wire := make([]any, 0, len(params)+1)
	wire = append(wire, string(session))
	for _, p := range params {
		wire = append(wire, wireOf(p))
	}
	if c.spoken == nil {
		return c.Invoke(context.Background(), Origin{Peer: "test"}, name, wire)
	}
	res, answer, err := c.speak(*c.spoken, name, wire)
	if f, ok := errors.AsType[*rpc.Fault](err); ok {
		return res, xapi.NewError(f.Code, f.Params...)
	}
	if err == nil && res.Type != nil {
		res.Value, err = res.Type.Parse(answer)
	}
	return res, err
}

// speak sends a message as text and returns its result, and what the text of
// the answer says. It may be called from any goroutine.
func (c *core) speak(d rpc.Dialect, name string, params []any) (res Result, value any, err error) {
	var call, answer bytes.Buffer
	if err := rpc.WriteCall(&call, d, 1, name, params...); err != nil {
		return res, nil, err
	}
	req, err := rpc.ParseCall(d.Syntax(), call.Bytes())
	if err != nil {
		return res, nil, err
	}
	res, err = c.Invoke(context.Background(), Origin{Peer: "test"}, req.Method, req.Params)
	if e, ok := errors.AsType[*xapi.Error](err); ok {
		err = req.WriteFailure(&answer, e.Code, e.Params...)
	} else if err == nil {
		err = req.WriteSuccess(&answer, func(e rpc.Encoder) error { return res.Encode(e) })
	}
	if err != nil {
		return res, nil, err
	}
	value, err = rpc.ReadResponse(d, &answer, 1<<30)
	return res, value, err
}

// wireOf makes a wire value of what tests like to write.
func wireOf(v any) any {
	switch v := v.(type) {
	case xapi.Ref[xapi.Pool]:
		return string(v)
	case xapi.Ref[xapi.Host]:
		return string(v)
	case xapi.Ref[xapi.VM]:
		return string(v)
	case xapi.Ref[xapi.VDI]:
		return string(v)
	case xapi.Ref[xapi.Task]:
		return string(v)
	case xapi.Ref[xapi.Session]:
		return string(v)
	case int:
		return int64(v)
	case []string:
		out := make([]any, len(v))
		for i := range v {
			out[i] = v[i]
		}
		return out
	case map[string]string:
		out := map[string]any{}
		for k := range v {
			out[k] = v[k]
		}
		return out
	}
	return v
}

// description is the code and the parameters of an API error, joined; "" for
// none.
func description(err error) string {
	if err == nil {
		return ""
	}
	e, ok := errors.AsType[*xapi.Error](err)
	if !ok {
		return "not an API error: " + err.Error()
	}
	return strings.Join(e.Description(), "|")
}

func code(err error) string {
	c, _, _ := strings.Cut(description(err), "|")
	return c
}

// wantFailure checks that a message in a session fails with an error; params
// of the error may be left out from the end.
func (c *core) wantFailure(want string, session xapi.Ref[xapi.Session], name string, params ...any) {
	c.t.Helper()
	_, err := c.try(session, name, params...)
	got := description(err)
	if got != want && !strings.HasPrefix(got, want+"|") {
		c.t.Errorf("%s%q: got %q, want %q", name, params, got, want)
	}
}

// asXML encodes a result the way XML-RPC does.
func asXML(t *testing.T, r Result) string {
	t.Helper()
	s, err := rpc.XMLValue(func(e rpc.Encoder) error { return r.Encode(e) })
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// asJSON encodes a result the way JSON-RPC does.
func asJSON(t *testing.T, r Result) string {
	t.Helper()
	var b bytes.Buffer
	w := rpc.NewJSON(&b)
	if err := r.Encode(w); err != nil {
		t.Fatal(err)
	}
	if err := w.Flush(); err != nil {
		t.Fatal(err)
	}
	return b.String()
}

// sortedStrings returns the refs in a result, sorted.
func sortedStrings(v any) []string {
	s := slices.Clone(v.([]string))
	slices.Sort(s)
	return s
}
