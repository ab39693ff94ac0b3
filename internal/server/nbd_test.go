package server

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"log/slog"
	"net"
	"path/filepath"
	"slices"
	"sync"
	"testing"

	"coppice/internal/api"
	"coppice/internal/nbd"
	"coppice/internal/xapi"
)

// nbdFixture is a server that also listens for NBD: over TLS, and on a Unix
// socket.
type nbdFixture struct {
	*fixture
	server *NBD
	tcp    string
	socket string
	cert   *Certificate
}

func startNBD(t *testing.T) *nbdFixture {
	t.Helper()
	return serveNBD(t, start(t, 0))
}

// serveNBD has a server listen for NBD.
func serveNBD(t *testing.T, on *fixture) *nbdFixture {
	t.Helper()
	f := &nbdFixture{fixture: on, socket: filepath.Join(t.TempDir(), "nbd.sock")}
	var err error
	if f.cert, err = OpenCertificate(filepath.Join(t.TempDir(), "tls"), []string{"localhost"}); err != nil {
		t.Fatal(err)
	}
	if err := f.cert.Wait(t.Context()); err != nil {
		t.Fatal(err)
	}
	f.server = NewNBD(f.fixture.Server.api, slog.New(slog.NewTextHandler(f.log, nil)), 0)
	tcp, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	f.tcp = tcp.Addr().String()
	local, err := net.Listen("unix", f.socket)
	if err != nil {
		t.Fatal(err)
	}
	f.nbd.Store(&api.NBDEndpoints{Socket: f.socket})
	f.server.Serve(tcp, f.cert.TLS())
	f.server.Serve(local, nil)
	rest := f.close
	f.close = sync.OnceFunc(func() {
		if err := f.server.Close(); err != nil {
			t.Errorf("closing the NBD server: %v", err)
		}
		rest()
	})
	t.Cleanup(f.close)
	return f
}

// overTLS begins a negotiation over TLS.
func (f *nbdFixture) overTLS(t *testing.T) *nbd.Dialogue {
	t.Helper()
	nc, err := net.Dial("tcp", f.tcp)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { nc.Close() })
	d, err := nbd.Begin(nc)
	if err != nil {
		t.Fatal(err)
	}
	roots := x509.NewCertPool()
	roots.AddCert(f.cert.Leaf())
	if err := d.StartTLS(t.Context(), &tls.Config{RootCAs: roots, ServerName: "localhost"}); err != nil {
		t.Fatal(err)
	}
	return d
}

func (f *nbdFixture) onSocket(t *testing.T) *nbd.Dialogue {
	t.Helper()
	nc, err := net.Dial("unix", f.socket)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { nc.Close() })
	d, err := nbd.Begin(nc)
	if err != nil {
		t.Fatal(err)
	}
	return d
}

// disk makes a disk and returns its uuid.
func (f *nbdFixture) disk(t *testing.T, session string) (ref, uuid string) {
	t.Helper()
	pools, err := f.call("pool.get_all_records", session)
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range pools.(map[string]any) {
		vdi, err := f.call("VDI.create", session, map[string]any{
			"SR": p.(map[string]any)["default_SR"], "virtual_size": int64(8 << 20), "type": "user",
			"sharable": false, "read_only": false, "other_config": map[string]any{}, "name_label": "a disk",
		})
		if err != nil {
			t.Fatal(err)
		}
		id, err := f.call("VDI.get_uuid", session, vdi)
		if err != nil {
			t.Fatal(err)
		}
		return vdi.(string), id.(string)
	}
	t.Fatal("no pool")
	return "", ""
}

func wantRefusal(t *testing.T, what string, err error, want *nbd.Refusal) {
	t.Helper()
	if !errors.Is(err, want) {
		t.Errorf("%s: %v, want a refusal like %q", what, err, want)
	}
}

// TestNBDSession has a client of the network come with a session, as Xen
// Orchestra does, and lose its disk with it.
func TestNBDSession(t *testing.T) {
	f := startNBD(t)
	session := f.login(t)
	_, uuid := f.disk(t, session)
	d := f.overTLS(t)
	_, err := d.List()
	wantRefusal(t, "list", err, nbd.ErrPolicy)
	_, err = d.Info(uuid)
	wantRefusal(t, "without a session", err, nbd.ErrPolicy)
	_, err = d.Go("/" + uuid + "?session_id=OpaqueRef:nobody")
	wantRefusal(t, "with a session that is none", err, nbd.ErrPolicy)
	_, err = d.Go("/11111111-2222-4333-8444-555555555555?session_id=" + session)
	wantRefusal(t, "of a disk that is none", err, nbd.ErrUnknown)
	i, err := d.Info("/rw/" + uuid + "?session_id=" + session)
	if err != nil || i.Size != 8<<20 || i.Description != "a disk" || i.Flags&nbd.FlagReadOnly != 0 {
		t.Errorf("info %+v, %v", i, err)
	}
	c, err := d.Go("/rw/" + uuid + "?session_id=" + session)
	if err != nil {
		t.Fatal(err)
	}
	data := bytes.Repeat([]byte("coppice."), 100_000)
	if _, err := c.WriteAt(data, 12345); err != nil {
		t.Fatal(err)
	}
	// The plain way in, as @vates/nbd-client goes.
	reader, err := f.overTLS(t).ExportName("/" + uuid + "?session_id=" + session)
	if err != nil {
		t.Fatal(err)
	}
	if reader.Flags()&nbd.FlagReadOnly == 0 {
		t.Error("a disk named the way of the original is writable")
	}
	got := make([]byte, len(data))
	if _, err := reader.ReadAt(got, 12345); err != nil || !bytes.Equal(got, data) {
		t.Errorf("read: %v", err)
	}
	if _, err := f.call("session.logout", session); err != nil {
		t.Fatal(err)
	}
	for _, c := range []*nbd.Client{c, reader} {
		for err == nil {
			_, err = c.ReadAt(got[:1], 0)
		}
		if !errors.Is(err, nbd.ErrDisconnected) {
			t.Errorf("after the logout: %v", err)
		}
		err = nil
	}
}

func TestNBDSocket(t *testing.T) {
	f := startNBD(t)
	session := f.login(t)
	ref, uuid := f.disk(t, session)
	d := f.onSocket(t)
	names, err := d.List()
	if err != nil || len(names) != 1 || names[0] != uuid {
		t.Errorf("exports %q, %v", names, err)
	}
	if err := d.Structured(); err != nil {
		t.Fatal(err)
	}
	snap, err := f.call("VDI.snapshot", session, ref)
	if err != nil {
		t.Fatal(err)
	}
	base, err := f.call("VDI.get_uuid", session, snap)
	if err != nil {
		t.Fatal(err)
	}
	for query, want := range map[string][]string{
		"":                   {nbd.ContextAllocation, "coppice:changed:", "qemu:dirty-bitmap:"},
		"qemu:":              {"qemu:dirty-bitmap:"},
		"qemu:dirty-bitmap:": {"qemu:dirty-bitmap:"},
		"qemu":               nil,
		"other:":             nil,
	} {
		queries := []string{query}
		if query == "" {
			queries = nil
		}
		if got, err := d.ListContexts("rw/"+uuid, queries...); err != nil || !slices.Equal(got, want) {
			t.Errorf("contexts listed by %q: %q, %v, want %q", query, got, err, want)
		}
	}
	want := []string{nbd.ContextAllocation, "coppice:changed:" + base.(string), "qemu:dirty-bitmap:" + base.(string)}
	got, err := d.SetContexts("rw/"+uuid, append(want, "coppice:changed:none", "qemu:other", "qemu:", "coppice:changed:")...)
	if err != nil || len(got) != len(want) {
		t.Fatalf("contexts %q, %v, want %q", got, err, want)
	}
	c, err := d.Go("rw/" + uuid)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := c.WriteAt(make([]byte, 4096), 0); err != nil { // zeros: no change
		t.Fatal(err)
	}
	if _, err := c.WriteAt([]byte{1}, 1<<20); err != nil {
		t.Fatal(err)
	}
	st, err := c.BlockStatus(0, 8<<20, 0)
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range want[1:] {
		if s := st[name]; len(s) != 3 || s[1] != (nbd.Status{Len: 4096, Flags: nbd.StateDirty}) {
			t.Errorf("%s: %v, want one changed unit", name, s)
		}
	}
	if err := c.Flush(context.Background()); err != nil {
		t.Fatal(err)
	}
	if err := c.Close(); err != nil {
		t.Fatal(err)
	}
	// Whoever comes next need not wait for the server to take note.
	if _, err := f.call("VDI.destroy", session, ref); err != nil {
		t.Errorf("destroy after the client has gone: %v", err)
	}
	_, err = f.onSocket(t).Go(uuid)
	wantRefusal(t, "a disk that is gone", err, nbd.ErrUnknown)
	if err := nbdRefusal(xapi.NewError(xapi.ErrVDIInUse, "x")); !errors.Is(err, nbd.ErrPolicy) {
		t.Errorf("VDI_IN_USE becomes %v", err)
	}
}
