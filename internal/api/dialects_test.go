package api

import (
	"errors"
	"strings"
	"testing"

	"coppice/internal/rpc"
	"coppice/internal/storage"
	"coppice/internal/storage/cow"
	"coppice/internal/storage/mem"
)

// wire is a rig that is spoken to in one dialect: calls and answers are text,
// and call returns what the text says.
type wire struct {
	*rig
	dialect rpc.Dialect
}

var dialects = map[string]rpc.Dialect{"XML-RPC": rpc.XMLRPC, "JSON-RPC": rpc.JSONRPC2}

// onWire runs a test on an SR of each type in each syntax, and checks that it
// leaves no disk behind.
func onWire(t *testing.T, test func(t *testing.T, w *wire)) {
	for _, d := range []storage.Driver{mem.Driver(), cow.Driver()} {
		for name, dialect := range dialects {
			t.Run(d.Type+"/"+name, func(t *testing.T) {
				w := &wire{newRigOn(t, d), dialect}
				test(t, w)
				if left := w.disks(w.sr); len(left) > 0 && !t.Failed() {
					t.Errorf("disks left: %q", left)
				}
				w.wantConsistent()
			})
		}
	}
}

// send makes a call and returns the value that its answer holds.
func (w *wire) send(name string, params ...any) (any, error) {
	w.t.Helper()
	return w.sendIn(string(w.root), name, params...)
}

// sendIn is send in a session other than root's. It may be called from any
// goroutine.
func (w *wire) sendIn(session, name string, params ...any) (any, error) {
	all := []any{session}
	for _, p := range params {
		all = append(all, wireOf(p))
	}
	_, value, err := w.speak(w.dialect, name, all)
	return value, err
}

// call makes a call that succeeds.
func (w *wire) call(name string, params ...any) any {
	w.t.Helper()
	v, err := w.send(name, params...)
	if err != nil {
		w.t.Fatalf("%s%q: %v", name, params, err)
	}
	return v
}

// vdi makes a call that returns a disk.
func (w *wire) vdi(name string, params ...any) vdiRef {
	w.t.Helper()
	return vdiRef(w.call(name, params...).(string))
}

// refuses checks that a call fails with an error; its parameters may be left
// out from the end.
func (w *wire) refuses(want, name string, params ...any) {
	w.t.Helper()
	v, err := w.send(name, params...)
	got := "success: " + asText(v)
	if f, ok := errors.AsType[*rpc.Fault](err); ok {
		got = strings.Join(append([]string{f.Code}, f.Params...), "|")
	}
	if got != want && !strings.HasPrefix(got, want+"|") {
		w.t.Errorf("%s%q: got %q, want %q", name, params, got, want)
	}
}

func asText(v any) string {
	s, _ := v.(string)
	return s
}

// destroy destroys disks twice: the second time must be HANDLE_INVALID.
func (w *wire) destroy(refs ...vdiRef) {
	w.t.Helper()
	for _, ref := range refs {
		w.call("VDI.destroy", ref)
		w.refuses("HANDLE_INVALID|VDI|"+string(ref), "VDI.destroy", ref)
	}
}
