package server

import (
	"bufio"
	"bytes"
	"context"
	"encoding/binary"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"coppice/internal/api"
	"coppice/internal/db"
	"coppice/internal/login"
	"coppice/internal/remote"
	"coppice/internal/rpc"
	"coppice/internal/storage"
	"coppice/internal/storage/mem"
	"coppice/internal/xapi"
)

// patience bounds reads from a server; no test that passes comes near it.
const patience = 60 * time.Second

// fixture is a server that answers on TCP and on a Unix socket.
type fixture struct {
	*Server
	tcp, unix string
	log       *logBuffer
	stop      func() // starts a stop
	stopped   func() error
	close     func() // stops it and closes what is below it; so does the end of the test
	broken    bool   // the storage has failed: closing may say so
	nbd       atomic.Pointer[api.NBDEndpoints]
}

// logBuffer collects the log of a server.
type logBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer // guarded by mu
}

func (l *logBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *logBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

var rootVerifier = sync.OnceValue(func() string { return login.Hash("secret") })

// start runs a server with further routes until the test ends.
func start(t *testing.T, grace time.Duration, more ...route) *fixture {
	t.Helper()
	return startOn(t, mem.Driver(), db.NewMemStore(), grace, more...)
}

// startOn is start with SRs of a driver and on a database that may have been
// in use before.
func startOn(t *testing.T, driver storage.Driver, records db.Store, grace time.Duration, more ...route) *fixture {
	t.Helper()
	objects, err := db.Open(t.Context(), xapi.Datamodel(), records)
	if err != nil {
		t.Fatal(err)
	}
	f := &fixture{log: new(logBuffer)}
	f.nbd.Store(&api.NBDEndpoints{})
	a, err := api.New(t.Context(), api.Config{
		NBD: func() api.NBDEndpoints { return *f.nbd.Load() },
		DB:  objects, Storage: storage.Registry{driver.Type: driver}, RootPassword: rootVerifier(), DataDir: t.TempDir(),
		Sources: NewSources(remote.Networks{netip.MustParsePrefix("127.0.0.1/32"), netip.MustParsePrefix("127.0.0.2/32"), netip.MustParsePrefix("127.0.0.4/32")}, 0),
	})
	if err != nil {
		t.Fatal(err)
	}
	f.Server = New(Config{
		API: a, Version: "1.2.3", Grace: grace,
		Log: slog.New(slog.NewTextHandler(f.log, &slog.HandlerOptions{Level: slog.LevelDebug})),
	})
	f.router = newRouter(append(routes(), more...))
	tcp, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	f.tcp = tcp.Addr().String()
	f.unix = filepath.Join(t.TempDir(), "sock")
	local, err := net.Listen("unix", f.unix)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	f.stop = cancel
	served := make(chan error, 1)
	go func() { served <- f.Serve(ctx, tcp, local) }()
	f.stopped = sync.OnceValue(func() error { return <-served })
	f.close = sync.OnceFunc(func() {
		cancel()
		if err := f.stopped(); err != nil {
			t.Errorf("Serve: %v", err)
		}
		if err := a.Close(); err != nil && !f.broken {
			t.Errorf("closing the API: %v", err)
		}
		if err := objects.Close(); err != nil {
			t.Errorf("closing the database: %v", err)
		}
	})
	t.Cleanup(f.close)
	return f
}

// dial connects to the server.
func (f *fixture) dial(t *testing.T, network string) net.Conn {
	t.Helper()
	conn, err := net.Dial(network, map[string]string{"tcp": f.tcp, "unix": f.unix}[network])
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	if err := conn.SetDeadline(time.Now().Add(patience)); err != nil {
		t.Fatal(err)
	}
	return conn
}

// send writes the pieces, each as a packet of its own, and returns everything
// that comes back.
func (f *fixture) send(t *testing.T, network string, pieces ...string) string {
	t.Helper()
	conn := f.dial(t, network)
	for _, p := range pieces {
		if _, err := io.WriteString(conn, p); err != nil {
			t.Fatal(err)
		}
	}
	b, err := io.ReadAll(conn)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

// post is an HTTP/1.0 request with a body.
func post(path, body string) string {
	return fmt.Sprintf("POST %s HTTP/1.0\r\nContent-Length: %d\r\n\r\n%s", path, len(body), body)
}

// call invokes a method with JSON-RPC.
func (f *fixture) call(method string, params ...any) (any, error) {
	var body bytes.Buffer
	if err := rpc.WriteCall(&body, rpc.JSONRPC2, 1, method, params...); err != nil {
		return nil, err
	}
	resp, err := http.Post("http://"+f.tcp+"/jsonrpc", "application/json", &body)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	return rpc.ReadResponse(rpc.JSONRPC2, resp.Body, 16<<20)
}

func (f *fixture) login(t *testing.T) string {
	t.Helper()
	session, err := f.call("session.login_with_password", "root", "secret")
	if err != nil {
		t.Fatal(err)
	}
	return session.(string)
}

// dateless takes the Date line out of a reply.
func dateless(reply string) string {
	head, body, _ := strings.Cut(reply, "\r\n\r\n")
	var kept []string
	for line := range strings.SplitSeq(head, "\r\n") {
		if !strings.HasPrefix(line, "Date: ") {
			kept = append(kept, line)
		}
	}
	return strings.Join(kept, "\r\n") + "\r\n\r\n" + body
}

const isAliveJSON = `{"jsonrpc":"2.0","method":"system.isAlive:x","params":["hello"],"id":7}`

// TestReplies pins whole replies: clients compare some of these bytes.
func TestReplies(t *testing.T) {
	f := start(t, 0)
	tests := []struct {
		name, request, want string
	}{
		{
			"JSON-RPC", post("/jsonrpc", isAliveJSON),
			"HTTP/1.0 200 OK\r\n" +
				"Access-Control-Allow-Headers: X-Requested-With\r\n" +
				"Access-Control-Allow-Origin: *\r\n" +
				"Cache-Control: no-cache, no-store\r\n" +
				"Content-Length: 41\r\n" +
				"Content-Type: application/json\r\n\r\n" +
				`{"jsonrpc":"2.0","result":"hello","id":7}`,
		},
		{
			"XML-RPC", post("/RPC2", "<methodCall><methodName>system.isAlive:x</methodName><params><param><value>hello</value></param></params></methodCall>"),
			"HTTP/1.0 200 OK\r\n" +
				"Access-Control-Allow-Headers: X-Requested-With\r\n" +
				"Access-Control-Allow-Origin: *\r\n" +
				"Cache-Control: no-cache, no-store\r\n" +
				"Content-Length: 231\r\n" +
				"Content-Type: text/xml\r\n\r\n" +
				"<?xml version=\"1.0\"?><methodResponse><params><param><value><struct><member><name>Status</name><value>Success</value></member>" +
				"<member><name>Value</name><value>hello</value></member></struct></value></param></params></methodResponse>",
		},
		{
			"preflight", "OPTIONS /jsonrpc HTTP/1.0\r\naccess-control-request-headers: X-Thing\r\n\r\n",
			"HTTP/1.0 200 OK\r\n" +
				"Access-Control-Allow-Headers: X-Thing, X-Requested-With\r\n" +
				"Access-Control-Allow-Methods: PUT\r\n" +
				"Access-Control-Allow-Origin: *\r\n" +
				"Cache-Control: no-cache, no-store\r\n" +
				"Content-Length: 0\r\n\r\n",
		},
		{
			"no such page", "GET /<nothing> HTTP/1.0\r\n\r\n",
			"HTTP/1.0 404 Not Found\r\n" +
				"Cache-Control: no-cache, no-store\r\n" +
				"Connection: close\r\n" +
				"Content-Length: 103\r\n" +
				"Content-Security-Policy: default-src 'none'\r\n" +
				"Content-Type: text/html; charset=utf-8\r\n\r\n" +
				"<html><body><h1>HTTP 404 not found</h1>There is nothing here.<p>GET /&lt;nothing&gt;</p></body></html>\n",
		},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			if got := dateless(f.send(t, "tcp", tt.request)); got != tt.want {
				t.Errorf("got:\n%s\nwant:\n%s", got, tt.want)
			}
		})
	}
}

// TestRequestForms: the ways in which clients are known to send a request.
func TestRequestForms(t *testing.T) {
	f := start(t, 0)
	const hello = `"result":"hello"`
	body := isAliveJSON
	tests := []struct {
		name   string
		pieces []string
		want   string
	}{
		{"lines in packets of their own", []string{"POST /jsonrpc HTTP/1.0\r\n", fmt.Sprintf("Content-Length: %d\r\n", len(body)), "\r\n", body[:10], body[10:]}, hello},
		{"a stray CRLF after a GET", []string{"GET / HTTP/1.0\r\nConnection: close\r\n\r\n\r\n"}, "Coppice"},
		{"HTTP/1.1 with close", []string{fmt.Sprintf("POST /jsonrpc HTTP/1.1\r\nHost: x\r\nConnection: Close\r\nContent-Length: %d\r\n\r\n%s", len(body), body)}, "HTTP/1.1 200 OK"},
		{"HTTP/1.1 chunked", []string{fmt.Sprintf("POST /jsonrpc HTTP/1.1\r\nHost: x\r\nConnection: close\r\nTransfer-Encoding: chunked\r\n\r\n%x\r\n%s\r\n0\r\n\r\n", len(body), body)}, hello},
		{"absolute URL", []string{fmt.Sprintf("POST http://x/jsonrpc HTTP/1.0\r\nContent-Length: %d\r\n\r\n%s", len(body), body)}, hello},
		{"legacy path", []string{post("/json", body)}, hello},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			if got := f.send(t, "tcp", tt.pieces...); !strings.Contains(got, tt.want) {
				t.Errorf("no %q in:\n%s", tt.want, got)
			}
		})
	}
}

func TestKeepAlive(t *testing.T) {
	f := start(t, 0)
	conn := f.dial(t, "tcp")
	r := bufio.NewReader(conn)
	for n := range 3 {
		fmt.Fprintf(conn, "POST /jsonrpc HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%s", len(isAliveJSON), isAliveJSON)
		resp, err := http.ReadResponse(r, nil)
		if err != nil {
			t.Fatalf("reply %d: %v", n, err)
		}
		if _, err := io.Copy(io.Discard, resp.Body); err != nil {
			t.Fatal(err)
		}
		if resp.Close {
			t.Fatal("the connection was closed")
		}
	}
}

// TestRefusals: what is no call gets an error page with a status, in time,
// whatever its size.
func TestRefusals(t *testing.T) {
	f := start(t, 0, route{http.MethodGet, "/needs-session", needsSession})
	deep := strings.Repeat("[", 100_000)
	tests := []struct {
		name, request string
		status        string
		want          string
	}{
		{"malformed XML", post("/RPC2", "<methodCall"), "500", "Additional information"},
		{"malformed JSON", post("/jsonrpc", `{"method":`), "500", "Additional information"},
		{"no body", post("/jsonrpc", ""), "500", "Additional information"},
		{"JSON without id", post("/jsonrpc", `{"method":"pool.get_all","params":[]}`), "500", "Additional information"},
		{"deep JSON", post("/jsonrpc", `{"method":"x","id":1,"params":[`+deep), "500", "Additional information"},
		{"deep XML", post("/RPC2", "<methodCall><methodName>x</methodName><params><param>"+strings.Repeat("<value><array><data>", 10_000)), "500", "Additional information"},
		{"announced giant", "POST /RPC2 HTTP/1.0\r\nContent-Length: 99999999999\r\n\r\nx", "413", "16777216 bytes"},
		{"header too long", "GET / HTTP/1.0\r\nX: " + strings.Repeat("x", 100<<10) + "\r\n\r\n", "431", ""},
		{"strange scheme", "GET /needs-session HTTP/1.0\r\nAuthorization: Bearer x\r\n\r\n", "500", "only Basic"},
		{"no credentials", "GET /needs-session HTTP/1.0\r\n\r\n", "401", `Basic realm="Coppice"`},
		{"wrong credentials", "GET /needs-session HTTP/1.0\r\nAuthorization: Basic cm9vdDp4\r\n\r\n", "401", "SESSION_AUTHENTICATION_FAILED: [ root; "},
		{"PUT nowhere", "PUT /x HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\n\r\n", "403", "PUT /x"},
		{"HEAD", "HEAD / HTTP/1.0\r\n\r\n", "501", ""},
		{"OPTIONS *", "OPTIONS * HTTP/1.0\r\n\r\n", "403", ""},
		{"xe without a command line", "POST /cli HTTP/1.0\r\n\r\n", "400", "Content-Length"},
		{"xe with a giant command line", "POST /cli HTTP/1.0\r\nContent-Length: 204801\r\n\r\n", "400", "204801 bytes"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			got := f.send(t, "tcp", tt.request)
			status := strings.Fields(got + " - -")[1]
			if status != tt.status || !strings.Contains(got, tt.want) {
				t.Errorf("status %s, want %s; want %q in:\n%s", status, tt.status, tt.want, got)
			}
		})
	}
}

// TestGiantBody: a body that does not say how long it is is cut at the limit.
func TestGiantBody(t *testing.T) {
	f := start(t, 0)
	resp, err := http.Post("http://"+f.tcp+"/jsonrpc", "application/json", io.LimitReader(zeros{}, maxRPC+1))
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusRequestEntityTooLarge {
		t.Errorf("status %s", resp.Status)
	}
}

type zeros struct{}

func (zeros) Read(p []byte) (int, error) {
	clear(p)
	return len(p), nil
}

// needsSession answers with whether the session it was called with is valid.
func needsSession(s *Server, w http.ResponseWriter, r *request) {
	session, release, err := s.session(r)
	if err != nil {
		s.fail(w, r, err)
		return
	}
	defer release()
	if _, err := s.api.Invoke(r.Context(), r.origin, "pool.get_all", []any{session}); err != nil {
		s.fail(w, r, err)
		return
	}
	fmt.Fprint(w, "known: ", session)
}

// TestSessionOfARequest: by parameter, by cookie, or made from credentials
// for as long as the request lasts.
func TestSessionOfARequest(t *testing.T) {
	f := start(t, 0, route{http.MethodGet, "/who", needsSession})
	session := f.login(t)
	for _, request := range []string{
		"GET /who?session_id=" + session + " HTTP/1.0\r\n\r\n",
		"GET /who?session_id=nonsense HTTP/1.0\r\nCookie: session_id=" + session + "\r\n\r\n",
	} {
		if got := f.send(t, "tcp", request); !strings.HasSuffix(got, "known: "+session) {
			t.Errorf("%s%s", request, got)
		}
	}
	_, made, ok := strings.Cut(f.send(t, "tcp", "GET /who HTTP/1.0\r\nAuthorization: Basic cm9vdDpzZWNyZXQ=\r\n\r\n"), "known: ")
	if !ok {
		t.Fatal("Basic credentials were refused")
	}
	if _, err := f.call("pool.get_all", made); err == nil {
		t.Error("the session of the Basic credentials is still there")
	}
	if got := f.send(t, "tcp", "GET /who?session_id="+made+" HTTP/1.0\r\n\r\n"); !strings.HasPrefix(got, "HTTP/1.0 401 ") {
		t.Errorf("a dead session:\n%s", got)
	}
	if strings.Contains(f.log.String(), session) {
		t.Error("a session reference is in the log")
	}
}

// TestUnixSocketIsTrusted: any password will do there, and only there.
func TestUnixSocketIsTrusted(t *testing.T) {
	f := start(t, 0)
	login := post("/jsonrpc", `{"jsonrpc":"2.0","method":"session.login_with_password","params":["root","whatever"],"id":1}`)
	if got := f.send(t, "unix", login); !strings.Contains(got, `"result":"OpaqueRef:`) {
		t.Errorf("through the Unix socket:\n%s", got)
	}
	if got := f.send(t, "tcp", login); !strings.Contains(got, "SESSION_AUTHENTICATION_FAILED") {
		t.Errorf("over TCP:\n%s", got)
	}
}

// TestBadUTF8: a string that is not text is an ordinary failure, HTTP 200.
func TestBadUTF8(t *testing.T) {
	f := start(t, 0)
	got := f.send(t, "tcp", post("/RPC2", "<methodCall><methodName>session.logout</methodName><params><param><value>\xff</value></param></params></methodCall>"))
	if !strings.HasPrefix(got, "HTTP/1.0 200 OK") || !strings.Contains(got, "<value>INVALID_VALUE</value><value>Invalid UTF-8 string in parameter</value>") {
		t.Errorf("got:\n%s", got)
	}
}

// TestListMethods: the one answer without a Status around it.
func TestListMethods(t *testing.T) {
	f := start(t, 0)
	got := f.send(t, "tcp", post("/", "<methodCall><methodName>system.listMethods</methodName><params/></methodCall>"))
	if strings.Contains(got, "Status") || !strings.Contains(got, "<value><array><data><value>") || !strings.Contains(got, "VDI.snapshot<") {
		t.Errorf("got %.300s", got)
	}
}

// TestLargeAnswerIsStreamed: it has no length, so it was not collected first.
func TestLargeAnswerIsStreamed(t *testing.T) {
	f := start(t, 0)
	session := f.login(t)
	for range 200 {
		if _, err := f.call("network.create", session, map[string]any{"name_label": strings.Repeat("n", 500), "name_description": "", "MTU": 1500, "other_config": map[string]any{}}); err != nil {
			t.Fatal(err)
		}
	}
	var body bytes.Buffer
	if err := rpc.WriteCall(&body, rpc.JSONRPC2, 1, "network.get_all_records", session); err != nil {
		t.Fatal(err)
	}
	resp, err := http.Post("http://"+f.tcp+"/jsonrpc", "application/json", &body)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	v, err := rpc.ReadResponse(rpc.JSONRPC2, resp.Body, 16<<20)
	if err != nil {
		t.Fatal(err)
	}
	if n := len(v.(map[string]any)); n < 200 || resp.ContentLength != -1 {
		t.Errorf("%d records with Content-Length %d", n, resp.ContentLength)
	}
}

// TestPanic: a handler that panics costs its own request, no other.
func TestPanic(t *testing.T) {
	f := start(t, 0,
		route{http.MethodGet, "/before", func(*Server, http.ResponseWriter, *request) { panic("early") }},
		route{http.MethodGet, "/after", func(_ *Server, w http.ResponseWriter, _ *request) {
			w.Header().Set("Content-Length", "100")
			fmt.Fprint(w, "some")
			_ = http.NewResponseController(w).Flush()
			panic("late")
		}})
	if got := f.send(t, "tcp", "GET /before HTTP/1.0\r\n\r\n"); !strings.HasPrefix(got, "HTTP/1.0 500 ") || strings.Contains(got, "early") {
		t.Errorf("got:\n%s", got)
	}
	resp, err := http.Get("http://" + f.tcp + "/after")
	if err == nil {
		_, err = io.ReadAll(resp.Body)
		resp.Body.Close()
	}
	if err == nil {
		t.Error("half an answer passed for a whole one")
	}
	if log := f.log.String(); strings.Count(log, "panic in a handler") != 2 || !strings.Contains(log, "early") {
		t.Errorf("log:\n%s", log)
	}
	if got := f.send(t, "tcp", post("/jsonrpc", isAliveJSON)); !strings.Contains(got, "hello") {
		t.Errorf("the server is not well after it:\n%s", got)
	}
}

// banner is what both ends of the thin CLI protocol say first.
var banner = append([]byte("XenSource thin CLI protocol"), 0, 0, 0, 0, 2, 0, 0, 0)

// TestCLI speaks to /cli as xe does: there is no HTTP reply, only frames.
func TestCLI(t *testing.T) {
	f := start(t, 0)
	conn := f.dial(t, "tcp")
	args := "nosuch\nusername=root\npassword=x"
	fmt.Fprintf(conn, "POST /cli HTTP/1.0\r\nUser-agent: xe-cli/Unix/0.2\r\noriginator: cli\r\ncontent-length: %d\r\n\r\n%s", len(args), args)
	got := make([]byte, len(banner))
	if _, err := io.ReadFull(conn, got); err != nil || !bytes.Equal(got, banner) {
		t.Fatalf("got %q, %v; want the banner", got, err)
	}
	if _, err := conn.Write(banner); err != nil {
		t.Fatal(err)
	}
	var text strings.Builder
	for {
		var n uint32
		if err := binary.Read(conn, binary.LittleEndian, &n); err != nil {
			t.Fatal(err)
		}
		frame := make([]byte, n)
		if _, err := io.ReadFull(conn, frame); err != nil {
			t.Fatal(err)
		}
		if tag := binary.LittleEndian.Uint32(frame[4:]); tag == 4 { // Exit
			if code := binary.LittleEndian.Uint32(frame[8:]); code != 1 {
				t.Errorf("exit code %d", code)
			}
			break
		}
		text.Write(frame[12:])
	}
	if !strings.Contains(text.String(), "Unknown command: nosuch") {
		t.Errorf("got %q", text.String())
	}
}
