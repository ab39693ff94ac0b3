package server

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"log/slog"
	"maps"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"coppice/internal/api"
	"coppice/internal/db"
	"coppice/internal/storage"
	"coppice/internal/storage/mem"
	"coppice/internal/users"
	"coppice/internal/xapi"
)

// operated is a server that counts and audits, without listeners.
type operated struct {
	*Server
	api     *api.API
	objects *db.DB
	users   *users.File
	audit   *Audit
	path    string        // of the audit log
	tasks   chan struct{} // gets an element for each task that has been written
}

func newOperated(t *testing.T) *operated {
	t.Helper()
	objects, err := db.Open(t.Context(), xapi.Datamodel(), db.NewMemStore())
	if err != nil {
		t.Fatal(err)
	}
	o := &operated{objects: objects, path: filepath.Join(t.TempDir(), "audit.log"), tasks: make(chan struct{}, 1)}
	if o.audit, err = OpenAudit(o.path, slog.New(slog.DiscardHandler)); err != nil {
		t.Fatal(err)
	}
	o.users = users.At(filepath.Join(t.TempDir(), "users.json"))
	metrics := NewMetrics("1.2.3")
	driver := mem.Driver()
	o.api, err = api.New(t.Context(), api.Config{
		DB: objects, Storage: storage.Registry{driver.Type: driver}, RootPassword: rootVerifier(), DataDir: t.TempDir(),
		Users: o.users,
		OnCall: func(r api.CallReport) {
			metrics.Observe(r)
			o.audit.Record(r)
			if r.Async {
				o.tasks <- struct{}{}
			}
		},
	})
	if err != nil {
		t.Fatal(err)
	}
	o.Server = New(Config{API: o.api, Version: "1.2.3", Metrics: metrics, Audit: o.audit})
	t.Cleanup(func() {
		if err := errors.Join(o.api.Close(), objects.Close(), o.audit.Close()); err != nil {
			t.Error(err)
		}
	})
	return o
}

// get answers a request from an address.
func (o *operated) get(path, from string, set ...func(*http.Request)) *httptest.ResponseRecorder {
	r := httptest.NewRequest(http.MethodGet, path, nil)
	r.RemoteAddr = from
	for _, f := range set {
		f(r)
	}
	w := httptest.NewRecorder()
	o.ServeHTTP(w, r)
	return w
}

func (o *operated) call(t *testing.T, method string, params ...any) any {
	t.Helper()
	res, err := o.api.Invoke(t.Context(), api.Origin{Peer: "10.0.0.1:5", UserAgent: "test"}, method, params)
	if err != nil {
		t.Fatalf("%s: %v", method, err)
	}
	return res.Value
}

const (
	here  = "127.0.0.1:1234"
	there = "192.0.2.7:1234"
)

func TestMetrics(t *testing.T) {
	o := newOperated(t)
	session := string(o.call(t, "session.login_with_password", "root", "secret").(xapi.Ref[xapi.Session]))
	o.call(t, "pool.get_all", session)
	if _, err := o.api.Invoke(t.Context(), api.Origin{}, "VDI.get_record", []any{session, "OpaqueRef:x"}); err == nil {
		t.Error("there is a VDI")
	}
	for _, from := range []string{here, "[::1]:9", "@"} {
		if w := o.get("/metrics", from); w.Code != http.StatusOK {
			t.Errorf("from %s: status %d", from, w.Code)
		}
	}
	for name, set := range map[string]func(*http.Request){
		"nobody":   func(*http.Request) {},
		"a stray":  func(r *http.Request) { r.Header.Set("Cookie", "session_id=OpaqueRef:x") },
		"mistaken": func(r *http.Request) { r.SetBasicAuth("root", "wrong") },
	} {
		if w := o.get("/metrics", there, set); w.Code != http.StatusUnauthorized {
			t.Errorf("%s from elsewhere: status %d", name, w.Code)
		}
	}
	if w := o.get("/metrics", there, func(r *http.Request) { r.SetBasicAuth("root", "secret") }); w.Code != http.StatusOK {
		t.Errorf("root from elsewhere: status %d", w.Code)
	}
	w := o.get("/metrics", there, func(r *http.Request) { r.Header.Set("Cookie", "session_id="+session) })
	text := w.Body.String()
	for _, want := range []string{
		`coppice_build_info{version="1.2.3"} 1`,
		`coppice_calls_total{class="pool",outcome="ok"} 1`,
		`coppice_calls_total{class="VDI",outcome="HANDLE_INVALID"} 1`,
		`coppice_calls_total{class="session",outcome="SESSION_AUTHENTICATION_FAILED"} 1`,
		`coppice_call_seconds_count{class="pool"} 1`,
		`coppice_http_requests_total{method="GET",status="401"} 3`,
		`coppice_sr_attached{name="Local storage",type="mem",uuid="`,
		`coppice_objects{class="pool"} 1`,
		"coppice_sessions 1", "coppice_calls_running 0", "coppice_calls_waiting 0", "go_goroutines ", "process_open_fds ",
	} {
		if !strings.Contains(text, want) {
			t.Errorf("%s is missing", want)
		}
	}
	if strings.Contains(text, session) {
		t.Error("a session is in the metrics")
	}
	// A client cannot make figures up.
	for _, method := range []string{"FLY", "SWIM"} {
		o.ServeHTTP(httptest.NewRecorder(), httptest.NewRequest(method, "/", nil))
	}
	if text := o.get("/metrics", here).Body.String(); strings.Contains(text, "FLY") || !strings.Contains(text, `method="other",status="501"} 2`) {
		t.Error("a method that does not exist has a figure of its own")
	}
}

func TestHealth(t *testing.T) {
	o := newOperated(t)
	for path, want := range map[string]string{"/healthz": "ok\n", "/readyz": "ready\n"} {
		if w := o.get(path, there); w.Code != http.StatusOK || w.Body.String() != want {
			t.Errorf("%s: %d %q", path, w.Code, w.Body)
		}
	}
	ref := ""
	if err := o.objects.Update(t.Context(), func(tx *db.Tx) error {
		for r := range db.All[xapi.PBD](tx) {
			ref = string(r)
		}
		return db.Modify(tx, xapi.Ref[xapi.PBD](ref), func(p *xapi.PBD) { p.OtherConfig["coppice:unavailable"] = "/secret/path is gone" })
	}); err != nil {
		t.Fatal(err)
	}
	if w := o.get("/readyz", there); w.Code != http.StatusServiceUnavailable || w.Body.String() != "not ready\n" {
		t.Errorf("without an SR, from elsewhere: %d %q", w.Code, w.Body)
	}
	if w := o.get("/readyz", here); !strings.Contains(w.Body.String(), "/secret/path is gone") {
		t.Errorf("without an SR, from here: %q", w.Body)
	}
	if w := o.get("/healthz", there); w.Code != http.StatusOK {
		t.Errorf("/healthz without an SR: %d", w.Code)
	}
	o.drain(ErrStopping)
	if w := o.get("/readyz", here); w.Code != http.StatusServiceUnavailable {
		t.Errorf("while stopping: %d", w.Code)
	}
}

// entries reads the audit log.
func entries(t *testing.T, path string) (list []map[string]any) {
	t.Helper()
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	lines := bufio.NewScanner(bytes.NewReader(data))
	lines.Buffer(nil, 1<<20)
	for lines.Scan() {
		e := map[string]any{}
		if err := json.Unmarshal(lines.Bytes(), &e); err != nil {
			t.Fatalf("%s: %v", lines.Text(), err)
		}
		list = append(list, e)
	}
	return list
}

func TestAudit(t *testing.T) {
	o := newOperated(t)
	if _, err := o.api.Invoke(t.Context(), api.Origin{Peer: "10.0.0.1:5"}, "session.login_with_password", []any{"root", "hunter2"}); err == nil {
		t.Fatal("a wrong password is good")
	}
	session := string(o.call(t, "session.login_with_password", "root", "secret").(xapi.Ref[xapi.Session]))
	o.call(t, "pool.get_all_records", session)
	pool := string(o.call(t, "pool.get_all", session).([]string)[0])
	o.call(t, "event.from", session, []any{}, "", 0.0)
	o.call(t, "pool.add_to_other_config", session, pool, "colour", "red")
	o.call(t, "pool.set_other_config", session, pool, map[string]any{"my_password": "hunter2", "colour": strings.Repeat("x", 1000)})
	o.call(t, "secret.create", session, map[string]any{"value": "hunter2", "other_config": map[string]any{}})
	o.call(t, "session.add_to_other_config", session, session, "k", "v")
	if _, err := o.api.Invoke(t.Context(), api.Origin{}, "VDI.destroy", []any{session, "OpaqueRef:x"}); err == nil {
		t.Error("there is a VDI")
	}
	task := string(o.call(t, "Async.pool.sync_database", session).(xapi.Ref[xapi.Task]))
	<-o.tasks
	o.call(t, "session.logout", session)

	data, err := os.ReadFile(o.path)
	if err != nil {
		t.Fatal(err)
	}
	for _, secret := range []string{"hunter2", session, `"secret"`} {
		if bytes.Contains(data, []byte(secret)) {
			t.Errorf("%s is in the audit log:\n%s", secret, data)
		}
	}
	list := entries(t, o.path)
	var got []string
	for _, e := range list {
		got = append(got, e["msg"].(string)+" "+e["outcome"].(string))
		if _, ok := e["level"]; ok || e["time"] == nil {
			t.Errorf("entry %v", e)
		}
	}
	want := []string{
		"session.login_with_password SESSION_AUTHENTICATION_FAILED", "session.login_with_password ok",
		"pool.add_to_other_config ok", "pool.set_other_config ok", "secret.create ok", "session.add_to_other_config ok",
		"VDI.destroy HANDLE_INVALID", "pool.sync_database ok", "session.logout ok",
	}
	if !slices.Equal(got, want) {
		t.Fatalf("entries\n got %q\nwant %q", got, want)
	}
	e := list[2]
	params := e["params"].(map[string]any)
	if e["user"] != "root" || e["role"] != "root" || e["peer"] != "10.0.0.1:5" || e["session"] != api.SessionName(session) ||
		params["key"] != "colour" || params["value"] != "red" || params["self"] != pool {
		t.Errorf("entry %v", e)
	}
	if got := list[0]["params"].(map[string]any); got["uname"] != "root" || got["pwd"] != hidden {
		t.Errorf("a login: %v", got)
	}
	if v := list[3]["params"].(map[string]any)["value"].(map[string]any); v["my_password"] != hidden || len(v["colour"].(string)) > maxAuditText+3 {
		t.Errorf("a map: %v", slices.Collect(maps.Keys(v)))
	}
	if e := list[7]; e["async"] != true || e["task"] != task {
		t.Errorf("a task: %v", e)
	}
	info, err := os.Stat(o.path)
	if err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("mode %v, %v", info.Mode(), err)
	}
}

// What logrotate does: rename the file, then tell.
func TestAuditReopen(t *testing.T) {
	o := newOperated(t)
	session := string(o.call(t, "session.login_with_password", "root", "secret").(xapi.Ref[xapi.Session]))
	if err := os.Rename(o.path, o.path+".1"); err != nil {
		t.Fatal(err)
	}
	if err := o.audit.Reopen(); err != nil {
		t.Fatal(err)
	}
	o.call(t, "session.logout", session)
	if a, b := entries(t, o.path+".1"), entries(t, o.path); len(a) != 1 || len(b) != 1 {
		t.Errorf("%d entries before, %d after", len(a), len(b))
	}
	if _, err := OpenAudit(filepath.Join(o.path, "x"), nil); err == nil {
		t.Error("a file below a file is opened")
	}
}

func TestCertificateReload(t *testing.T) {
	dir := t.TempDir()
	certPath, keyPath := filepath.Join(dir, "c.pem"), filepath.Join(dir, "k.pem")
	write := func(host string, at time.Time) {
		t.Helper()
		cert, key, err := selfSigned([]string{host}, time.Now())
		if err != nil {
			t.Fatal(err)
		}
		for path, data := range map[string][]byte{certPath: cert, keyPath: key} {
			if err := errors.Join(os.WriteFile(path, data, 0o600), os.Chtimes(path, at, at)); err != nil {
				t.Fatal(err)
			}
		}
	}
	now := time.Now()
	write("one.example", now.Add(-time.Hour))
	c, err := LoadCertificate(certPath, keyPath)
	if err != nil {
		t.Fatal(err)
	}
	var failures []error
	c.OnReloadError(func(err error) { failures = append(failures, err) })
	host := func(at time.Time) string {
		t.Helper()
		c.follow(at)
		return c.Leaf().DNSNames[0]
	}
	write("two.example", now.Add(-time.Minute))
	if got := host(now); got != "two.example" {
		t.Errorf("after a change: %s", got)
	}
	write("three.example", now)
	if got := host(now.Add(certLook / 2)); got != "two.example" {
		t.Errorf("too soon: %s", got)
	}
	if err := c.Reload(); err != nil || c.Leaf().DNSNames[0] != "three.example" {
		t.Errorf("reloaded: %s, %v", c.Leaf().DNSNames[0], err)
	}
	// One of two files is new: the old certificate goes on, until both are.
	cert, key, err := selfSigned([]string{"four.example"}, time.Now())
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(certPath, cert, 0o600); err != nil {
		t.Fatal(err)
	}
	if got := host(now.Add(2 * certLook)); got != "three.example" || len(failures) != 1 {
		t.Errorf("with half of a certificate: %s, failures %v", got, failures)
	}
	if err := c.Reload(); err == nil {
		t.Error("half a certificate is loaded")
	}
	if err := os.WriteFile(keyPath, key, 0o600); err != nil {
		t.Fatal(err)
	}
	if got := host(now.Add(4 * certLook)); got != "four.example" {
		t.Errorf("with both: %s", got)
	}
}

// Each handler with each role. A new one must say here for whom it is.
func TestEveryHandlerWithEveryRole(t *testing.T) {
	o := newOperated(t)
	forAll := []string{ // their calls have roles, or there is nothing to protect
		"POST /", "POST /RPC2", "POST /xmlrpc", "POST /jsonrpc", "POST /json", "POST /cli", "OPTIONS /", "GET /", "GET /healthz", "GET /readyz",
	}
	actions := map[string]string{
		"GET /export_raw_vdi": "get_export_raw_vdi", "HEAD /export_raw_vdi": "get_export_raw_vdi",
		"PUT /import_raw_vdi": "put_import_raw_vdi", "HEAD /import_raw_vdi": "put_import_raw_vdi", "GET /metrics": metricsAction, "GET /audit_log": "get_audit_log",
		"GET /export": "get_export", "HEAD /export": "get_export",
		"GET /export_metadata": "get_export_metadata", "HEAD /export_metadata": "get_export_metadata", "PUT /import": "put_import", "PUT /import_metadata": "put_import_metadata",
	}
	model := xapi.Datamodel()
	for _, role := range model.Roles {
		if err := o.users.Add(users.User{Name: role, Roles: []string{role}, Verifier: rootVerifier()}); err != nil {
			t.Fatal(err)
		}
	}
	for _, r := range routes() {
		name := r.method + " " + r.path
		if slices.Contains(forAll, name) {
			continue
		}
		action := model.HTTP[actions[name]]
		if action == nil {
			t.Errorf("nobody says for whom %s is", name)
			continue
		}
		for _, role := range model.Roles {
			req := httptest.NewRequest(r.method, r.path+"?vdi=OpaqueRef:x", nil)
			req.RemoteAddr = there
			req.SetBasicAuth(role, "secret")
			w := httptest.NewRecorder()
			o.ServeHTTP(w, req)
			refused := w.Code == http.StatusForbidden
			if want := !model.Allows(role, action.Role) && !slices.Contains(action.ExtraRoles, role); refused != want {
				t.Errorf("%s as %s: status %d, want refused: %v", name, role, w.Code, want)
			}
		}
	}
}
