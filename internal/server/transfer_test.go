package server

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"coppice/internal/vhd"
	"coppice/internal/xapi"
)

// depot is a server with a session, for tests of transfers.
type depot struct {
	*fixture
	t       *testing.T
	session string
	sr      string
}

func newDepot(t *testing.T, more ...route) *depot {
	t.Helper()
	d := &depot{fixture: start(t, 0, more...), t: t}
	d.session = d.login(t)
	d.sr = d.do("SR.get_all", d.session).([]any)[0].(string)
	return d
}

// do calls a method that succeeds. The session is a parameter like others.
func (d *depot) do(method string, params ...any) any {
	d.t.Helper()
	v, err := d.call(method, params...)
	if err != nil {
		d.t.Fatalf("%s: %v", method, err)
	}
	return v
}

// disk makes a VDI and returns its reference and uuid.
func (d *depot) disk(size int64) (ref, uuid string) {
	d.t.Helper()
	ref = d.do("VDI.create", d.session, map[string]any{
		"name_label": "disk", "SR": d.sr, "virtual_size": size, "type": "user", "sharable": false, "read_only": false, "other_config": map[string]any{},
	}).(string)
	return ref, d.do("VDI.get_uuid", d.session, ref).(string)
}

// filled makes a VDI with contents.
func (d *depot) filled(contents []byte) (ref, uuid string) {
	d.t.Helper()
	ref, uuid = d.disk(int64(len(contents)))
	d.upload(ref, "raw", contents)
	return ref, uuid
}

func (d *depot) task() string {
	d.t.Helper()
	return d.do("task.create", d.session, "transfer", "").(string)
}

// outcome is the status of a task and what explains it.
func (d *depot) outcome(task string) []string {
	d.t.Helper()
	r := d.do("task.get_record", d.session, task).(map[string]any)
	all := []string{r["status"].(string)}
	for _, s := range r["error_info"].([]any) {
		all = append(all, s.(string))
	}
	if s := r["result"].(string); s != "" {
		all = append(all, s)
	}
	return all
}

// settled waits until a task is not pending any more and returns its outcome.
func (d *depot) settled(task string) []string {
	d.t.Helper()
	token := ""
	for {
		if o := d.outcome(task); o[0] != "pending" {
			return o
		}
		batch := d.do("event.from", d.session, []string{"task/" + task}, token, 30.0).(map[string]any)
		token = batch["token"].(string)
	}
}

// url is the path of a transfer. args alternate keys and values.
func (d *depot) url(path string, args ...string) string {
	var q strings.Builder
	q.WriteString(path + "?session_id=" + d.session)
	for i := 0; i < len(args); i += 2 {
		q.WriteString("&" + args[i] + "=" + args[i+1])
	}
	return q.String()
}

// download is the body of an export that succeeds.
func (d *depot) download(vdi, format, base string) []byte {
	d.t.Helper()
	args := []string{"vdi", vdi, "format", format, "task_id", d.task()}
	if base != "" {
		args = append(args, "base", base)
	}
	reply := d.send(d.t, "tcp", "GET "+d.url("/export_raw_vdi", args...)+" HTTP/1.0\r\n\r\n")
	head, body, _ := strings.Cut(reply, "\r\n\r\n")
	if !strings.HasPrefix(head, "HTTP/1.1 200 OK\r\n") {
		d.t.Fatalf("export: %s", reply)
	}
	if want := "Content-Length: " + strconv.Itoa(len(body)); !strings.Contains(head+"\r\n", want+"\r\n") {
		d.t.Fatalf("export of %d bytes says:\n%s", len(body), head)
	}
	if o := d.settled(args[5]); !slices.Equal(o, []string{"success"}) {
		d.t.Fatalf("export: task says %q", o)
	}
	return []byte(body)
}

// upload carries out an import as xe does, which succeeds.
func (d *depot) upload(vdi, format string, body []byte) {
	d.t.Helper()
	task := d.task()
	reply := d.put(d.url("/import_raw_vdi", "task_id", task, "vdi", vdi, "format", format)+" HTTP/1.0",
		[]string{fmt.Sprintf("Content-length: %d", len(body))}, string(body), true)
	if o, want := d.settled(task), []string{"success", "<value>" + vdi + "</value>"}; !slices.Equal(o, want) {
		d.t.Fatalf("import: task says %q, reply %q", o, reply)
	}
}

// put sends the head of a PUT, waits for the head of the reply, sends the body
// and, when asked for, closes its side. It returns the reply.
func (d *depot) put(target string, headers []string, body string, end bool) string {
	d.t.Helper()
	conn := d.dial(d.t, "tcp")
	head := "PUT " + target + "\r\n" + strings.Join(append(headers, ""), "\r\n") + "\r\n"
	if _, err := io.WriteString(conn, head); err != nil {
		d.t.Fatal(err)
	}
	reply := d.untilBlank(conn)
	if !strings.HasPrefix(reply, "HTTP/1.1 200 OK\r\n") && !strings.HasPrefix(reply, "HTTP/1.1 100 ") {
		rest, _ := io.ReadAll(conn)
		return reply + string(rest)
	}
	_, err := io.WriteString(conn, body)
	if err == nil && end {
		err = conn.(*net.TCPConn).CloseWrite()
	}
	rest, _ := io.ReadAll(conn)
	if err != nil {
		return reply + string(rest) + err.Error()
	}
	return reply + string(rest)
}

// untilBlank reads the head of a reply.
func (d *depot) untilBlank(conn net.Conn) string {
	d.t.Helper()
	var head []byte
	for b := make([]byte, 1); !bytes.HasSuffix(head, []byte("\r\n\r\n")); head = append(head, b...) {
		if _, err := io.ReadFull(conn, b); err != nil {
			d.t.Fatalf("%v after %q", err, head)
		}
	}
	return string(head)
}

// Everything that is wrong with a request is answered by its status, the code
// on the page, and the task.
func TestTransferRefusals(t *testing.T) {
	d := newDepot(t)
	contents := random(2*mib, 1, [2]int64{0, 2 * mib})
	ref, uuid := d.filled(contents)
	huge, _ := d.disk(vhd.MaxSize + 2*mib)
	snapshot := d.do("VDI.snapshot", d.session, ref).(string)
	const export, imp = "GET /export_raw_vdi", "PUT /import_raw_vdi"
	const noDeltas = "An image of this format cannot say what it is the difference to. Those that base= can be used with are: raw, vhd, qcow2"
	for name, tt := range map[string]struct {
		request string // without session and task
		status  string
		outcome []string // of the task
	}{
		"export, unknown format":    {export + "?vdi=" + ref + "&format=<x>", "404 Not Found", []string{"failure", "INTERNAL_ERROR", "Unknown format <x> (there are raw, vhd, tar, qcow2, vmdk)"}},
		"import, unknown format":    {imp + "?vdi=" + ref + "&format=vdi", "404 Not Found", []string{"failure", "INTERNAL_ERROR", "Unknown format vdi (there are raw, vhd, tar, qcow2, vmdk)"}},
		"export, bas=":              {export + "?vdi=" + ref + "&format=vhd&bas=" + snapshot, "400 Bad Request", []string{"failure", "INVALID_VALUE", "bas", "no parameter has this name; did you mean base?"}},
		"import, formatt=":          {imp + "?vdi=" + ref + "&formatt=vhd", "400 Bad Request", []string{"failure", "INVALID_VALUE", "formatt", "no parameter has this name; did you mean format?"}},
		"VM export, a switch":       {"GET /export?uuid=x&export_snapshots=ture", "400 Bad Request", []string{"failure", "INVALID_VALUE", "export_snapshots", "ture"}},
		"VM import, sr_uid=":        {"PUT /import?sr_uid=x", "400 Bad Request", []string{"failure", "INVALID_VALUE", "sr_uid", "no parameter has this name; did you mean sr_id?"}},
		"export, delta as tar":      {export + "?vdi=" + ref + "&format=tar&base=" + snapshot, "400 Bad Request", append([]string{"failure", "VALUE_NOT_SUPPORTED", "format", "tar"}, noDeltas)},
		"export, delta as vmdk":     {export + "?vdi=" + ref + "&format=vmdk&base=" + snapshot, "400 Bad Request", append([]string{"failure", "VALUE_NOT_SUPPORTED", "format", "vmdk"}, noDeltas)},
		"VM export, wrong uuid":     {"GET /export?uuid=x", "500 Internal Server Error", []string{"failure", "UUID_INVALID", "VM", "x"}},
		"VM import, no such SR":     {"PUT /import?sr_uuid=x", "500 Internal Server Error", []string{"failure", "UUID_INVALID", "SR", "x"}},
		"VM export, no session":     {"GET /export?session_id=OpaqueRef:s&uuid=x", "401 Unauthorized", []string{"pending"}},
		"import, chunked vhd":       {imp + "?vdi=" + ref + "&format=vhd&chunked", "404 Not Found", []string{"failure", "INTERNAL_ERROR", "Cannot handle chunked VHD"}},
		"export, dangling ref":      {export + "?vdi=OpaqueRef:x", "500 Internal Server Error", []string{"failure", "HANDLE_INVALID", "VDI", "OpaqueRef:x"}},
		"export, wrong uuid":        {export + "?vdi=" + uuid[1:], "500 Internal Server Error", []string{"failure", "UUID_INVALID", "VDI", uuid[1:]}},
		"export, no vdi":            {export + "?format=raw", "500 Internal Server Error", []string{"failure", "VDI_MISSING"}},
		"export, empty base":        {export + "?format=vhd&vdi=" + ref + "&base=", "400 Bad Request", []string{"failure", "INVALID_VALUE", "base", "it is empty: name a VDI, or leave base= out to get all of the disk"}},
		"export, dangling base":     {export + "?format=vhd&vdi=" + ref + "&base=OpaqueRef:b", "500 Internal Server Error", []string{"failure", "HANDLE_INVALID", "VDI", "OpaqueRef:b"}},
		"export, too large":         {export + "?format=vhd&vdi=" + huge, "500 Internal Server Error", []string{"failure", "VDI_TOO_LARGE", huge, "2190433320960"}},
		"import, no vdi and no SR":  {imp + "?format=raw", "500 Internal Server Error", []string{"failure", "VDI_MISSING"}},
		"import, longer than disk":  {imp + "?vdi=" + ref + "\x00x\r\nContent-Length: 2097153", "500 Internal Server Error", []string{"failure", "VDI_IO_ERROR", "2097153 bytes do not fit a disk of 2097152 bytes, and without format= data is taken as raw"}},
		"import, onto a snapshot":   {imp + "?vdi=" + snapshot, "500 Internal Server Error", []string{"failure", "VDI_READONLY", snapshot}},
		"import, wrong uuid of SR":  {imp + "?sr_uuid=x", "500 Internal Server Error", []string{"failure", "UUID_INVALID", "SR", "x"}},
		"export, invalid session":   {export + "?session_id=OpaqueRef:s&vdi=" + ref, "401 Unauthorized", []string{"pending"}},
		"import, invalid session":   {imp + "?session_id=OpaqueRef:s&vdi=" + ref, "401 Unauthorized", []string{"pending"}},
		"export, nobody logged in":  {export + "?session_id=&vdi=" + ref, "401 Unauthorized", []string{"pending"}},
		"export, a password, wrong": {export + "?session_id=&vdi=" + ref + "\x00x\r\nAuthorization: Basic eDp5", "401 Unauthorized", []string{"pending"}},
	} {
		t.Run(name, func(t *testing.T) {
			task := d.task()
			target, header, _ := strings.Cut(tt.request, "\x00")
			target += "&task_id=" + task
			if !strings.Contains(target, "session_id") {
				target += "&session_id=" + d.session
			}
			got := d.send(t, "tcp", target+" HTTP/1.1\r\nHost: h\r\nX: "+header+"\r\n\r\n")
			if !strings.HasPrefix(got, "HTTP/1.1 "+tt.status+"\r\n") {
				t.Errorf("want %s, got:\n%s", tt.status, got)
			}
			if o := d.outcome(task); !slices.Equal(o, tt.outcome) {
				t.Errorf("task says %q, want %q", o, tt.outcome)
			}
			if len(tt.outcome) > 1 {
				if want := escapeHTML(tt.outcome[1] + ": [ " + strings.Join(tt.outcome[2:], "; ") + " ]"); !strings.Contains(got, want) {
					t.Errorf("the page does not say %q:\n%s", want, got)
				}
			}
		})
	}
	if !bytes.Equal(d.download(ref, "raw", ""), contents) {
		t.Error("the disk has changed")
	}
}

// stall begins a transfer whose client then does nothing: it neither sends a
// body nor takes one.
func (d *depot) stall(request, task string) *net.TCPConn {
	d.t.Helper()
	conn := d.dial(d.t, "tcp").(*net.TCPConn)
	if _, err := io.WriteString(conn, request+"&task_id="+task+" HTTP/1.0\r\n\r\n"); err != nil {
		d.t.Fatal(err)
	}
	d.untilBlank(conn)
	return conn
}

// A cancelled task ends a transfer whose client is silent, and frees the disk.
func TestCancelStalled(t *testing.T) {
	d := newDepot(t)
	contents := random(64*mib, 1, [2]int64{0, 64 * mib})
	ref, _ := d.filled(contents)
	for name, request := range map[string]string{
		"export, raw": "GET " + d.url("/export_raw_vdi", "vdi", ref),
		"export, vhd": "GET " + d.url("/export_raw_vdi", "vdi", ref, "format", "vhd"),
		"import, raw": "PUT " + d.url("/import_raw_vdi", "vdi", ref),
		"import, vhd": "PUT " + d.url("/import_raw_vdi", "vdi", ref, "format", "vhd"),
	} {
		t.Run(name, func(t *testing.T) {
			task := d.task()
			conn := d.stall(request, task)
			d.do("task.cancel", d.session, task)
			if o := d.settled(task); !slices.Equal(o, []string{"cancelled", "TASK_CANCELLED", task}) {
				t.Errorf("task says %q", o)
			}
			if _, err := io.Copy(io.Discard, conn); !errors.Is(err, syscall.ECONNRESET) {
				t.Errorf("the connection ends with %v, want a reset", err)
			}
			d.upload(ref, "raw", contents[:mib])
		})
	}
}

// A client that goes away ends its transfer, and frees the disk.
func TestClientGoesAway(t *testing.T) {
	d := newDepot(t)
	contents := random(64*mib, 1, [2]int64{0, 64 * mib})
	ref, _ := d.filled(contents)
	for name, tt := range map[string]struct{ request, code string }{
		"export, raw": {"GET " + d.url("/export_raw_vdi", "vdi", ref), "CLIENT_ERROR"},
		"export, vhd": {"GET " + d.url("/export_raw_vdi", "vdi", ref, "format", "vhd"), "CLIENT_ERROR"},
		"import, vhd": {"PUT " + d.url("/import_raw_vdi", "vdi", ref, "format", "vhd"), "VDI_IO_ERROR"},
	} {
		t.Run(name, func(t *testing.T) {
			task := d.task()
			conn := d.stall(tt.request, task)
			if err := conn.SetLinger(0); err != nil {
				t.Fatal(err)
			}
			if err := conn.Close(); err != nil {
				t.Fatal(err)
			}
			if o := d.settled(task); o[0] != "failure" || o[1] != tt.code {
				t.Errorf("task says %q, want %s", o, tt.code)
			}
			d.upload(ref, "raw", contents[:mib])
		})
	}
}

// ended is a transfer without an API behind it.
type ended struct {
	ctx context.Context
	err error
}

func (e *ended) Context() context.Context { return e.ctx }
func (e *ended) Progress(int64, int64)    {}
func (e *ended) Finish(err error) error   { e.err = err; return err }

// A transfer that fails after its 200 resets the connection, so that nobody
// takes what has arrived for the whole.
func TestFailureResets(t *testing.T) {
	for name, work := range map[string]func(*stream) error{
		"at once":      func(*stream) error { return errTest },
		"in the midst": func(c *stream) error { _, err := c.Write([]byte("half")); return cmpOr(err, errTest) },
		"succeeding":   func(c *stream) error { _, err := c.Write([]byte("all")); return err },
	} {
		t.Run(name, func(t *testing.T) {
			e := &ended{ctx: t.Context()}
			d := newDepot(t, route{http.MethodGet, "/test", func(s *Server, w http.ResponseWriter, r *request) {
				s.run(e.ctx, w, r, e, func(_ context.Context, c *stream) error { return work(c) })
			}})
			conn := d.dial(t, "tcp")
			if _, err := io.WriteString(conn, "GET /test HTTP/1.0\r\n\r\n"); err != nil {
				t.Fatal(err)
			}
			_, err := io.ReadAll(conn)
			if reset := errors.Is(err, syscall.ECONNRESET); reset != (name != "succeeding") {
				t.Errorf("the connection ends with %v", err)
			}
		})
	}
}

func cmpOr(a, b error) error {
	if a != nil {
		return a
	}
	return b
}

// A stop cuts transfers that do not end within the grace period.
func TestStopCutsTransfers(t *testing.T) {
	d := &depot{fixture: start(t, time.Millisecond), t: t}
	d.session = d.login(t)
	d.sr = d.do("SR.get_all", d.session).([]any)[0].(string)
	ref, _ := d.filled(random(64*mib, 1, [2]int64{0, 64 * mib}))
	out := d.stall("GET "+d.url("/export_raw_vdi", "vdi", ref), d.task())
	in := d.stall("PUT "+d.url("/import_raw_vdi", "vdi", ref, "format", "vhd"), d.task())
	d.stop()
	if err := d.stopped(); err != nil {
		t.Error(err)
	}
	for name, conn := range map[string]net.Conn{"export": out, "import": in} {
		if _, err := io.Copy(io.Discard, conn); err == nil {
			t.Errorf("%s: the connection ends in order", name)
		}
	}
	for _, want := range []string{"path=/export_raw_vdi", "path=/import_raw_vdi"} {
		if !strings.Contains(d.log.String(), want) {
			t.Errorf("the log does not say %q", want)
		}
	}
}

// Over TLS transfers are the same, and the end of a body may lack the notice
// that TLS wants: several clients just close.
func TestTransfersOverTLS(t *testing.T) {
	d := newDepot(t)
	front := httptest.NewTLSServer(d.Server)
	defer front.Close()
	dial := func() (*tls.Conn, *net.TCPConn) {
		raw, err := net.Dial("tcp", front.Listener.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		conn := tls.Client(raw, &tls.Config{InsecureSkipVerify: true})
		t.Cleanup(func() { raw.Close() })
		if err := conn.SetDeadline(time.Now().Add(patience)); err != nil {
			t.Fatal(err)
		}
		return conn, raw.(*net.TCPConn)
	}
	contents := random(32*mib, 1, [2]int64{0, 32 * mib})
	ref, _ := d.disk(32 * mib)

	task := d.task()
	conn, raw := dial()
	if _, err := io.WriteString(conn, "PUT "+d.url("/import_raw_vdi", "vdi", ref, "task_id", task)+" HTTP/1.0\r\n\r\n"); err != nil {
		t.Fatal(err)
	}
	d.untilBlank(conn)
	if _, err := conn.Write(contents); err != nil {
		t.Fatal(err)
	}
	if err := raw.CloseWrite(); err != nil {
		t.Fatal(err)
	}
	if o := d.settled(task); o[0] != "success" {
		t.Fatalf("import: task says %q", o)
	}

	export := "GET " + d.url("/export_raw_vdi", "vdi", ref)
	conn, _ = dial()
	if _, err := io.WriteString(conn, export+" HTTP/1.0\r\n\r\n"); err != nil {
		t.Fatal(err)
	}
	d.untilBlank(conn)
	if got, err := io.ReadAll(conn); err != nil || !bytes.Equal(got, contents) {
		t.Errorf("export: %d bytes, error %v", len(got), err)
	}

	// One that fails is no complete body for TLS either.
	task = d.task()
	conn, _ = dial()
	if _, err := io.WriteString(conn, export+"&task_id="+task+" HTTP/1.0\r\n\r\n"); err != nil {
		t.Fatal(err)
	}
	d.untilBlank(conn)
	d.do("task.cancel", d.session, task)
	if o := d.settled(task); o[0] != "cancelled" {
		t.Errorf("export: task says %q", o)
	}
	if n, err := io.Copy(io.Discard, conn); err == nil {
		t.Errorf("a cancelled export ends in order after %d bytes", n)
	}
}

func TestMeter(t *testing.T) {
	n, last := 0, int64(-1)
	m := meter{report: func(done, total int64) {
		n++
		last = done
		if total != 1000 {
			t.Errorf("total is %d", total)
		}
	}}
	for i := int64(1); i <= 1000; i++ {
		m.set(i, 1000)
	}
	if n > 201 || n < 190 || last < 990 {
		t.Errorf("%d reports, the last of %d", n, last)
	}
}

func TestAPIError(t *testing.T) {
	for _, tt := range []struct {
		err  error
		code string
	}{
		{badBody("x"), xapi.ErrVDIIOError},
		{fmt.Errorf("y: %w", &bodyError{io.ErrUnexpectedEOF}), xapi.ErrVDIIOError},
		{&clientError{syscall.EPIPE}, xapi.ErrClientError},
	} {
		if got, ok := errors.AsType[*xapi.Error](apiError(tt.err)); !ok || got.Code != tt.code || !errors.Is(got, tt.err) {
			t.Errorf("apiError(%v) = %v", tt.err, got)
		}
	}
	if got := apiError(errTest); got != errTest {
		t.Errorf("apiError(%v) = %v", errTest, got)
	}
}
