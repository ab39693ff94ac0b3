package server

import (
	"bytes"
	"crypto/tls"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"
	"time"

	"coppice/internal/rpc"
	"coppice/internal/vhd"
	"coppice/internal/xapi"

	"github.com/google/uuid"
)

// xapiPool is a pool as xapi has it, with one snapshot. Its hosts are addresses
// of the loopback network: coordinatorHost answers messages, holderHost exports, and any
// other sends one to the two.
type xapiPool struct {
	contents []byte
	front    *httptest.Server

	// How an image is sent; an error is the end of the task.
	export func(w http.ResponseWriter, r *http.Request, image []byte) []string

	mu       sync.Mutex
	sessions map[string]bool
	tasks    map[string][]string // error_info; nil for a pending one
	made     int                 // sessions and tasks
	asked    map[string]int      // how often each method was called
	left     chan struct{}       // gets one for each logout
}

const (
	coordinatorHost = "127.0.0.1"
	memberHost      = "127.0.0.2"
	holderHost      = "127.0.0.4"

	snapshotUUID = "5a7c1a2e-0000-4000-8000-000000000001"
)

func newXapiPool(t *testing.T, contents []byte) *xapiPool {
	t.Helper()
	p := &xapiPool{contents: contents, sessions: map[string]bool{}, tasks: map[string][]string{}, asked: map[string]int{}, left: make(chan struct{}, 1)}
	l, err := net.Listen("tcp4", "0.0.0.0:0")
	if err != nil {
		t.Fatal(err)
	}
	p.front = httptest.NewUnstartedServer(p)
	p.front.Listener.Close()
	p.front.Listener = l
	p.front.StartTLS()
	t.Cleanup(p.front.Close)
	return p
}

func (p *xapiPool) url(host string) string {
	return fmt.Sprintf("https://%s:%d", host, p.front.Listener.Addr().(*net.TCPAddr).Port)
}

func (p *xapiPool) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	host := r.Context().Value(http.LocalAddrContextKey).(*net.TCPAddr).IP.String()
	if r.Method == http.MethodPost {
		p.message(w, r, host)
		return
	}
	if host != holderHost {
		w.Header().Set("Location", p.url(holderHost)+r.URL.Path+"?"+r.URL.RawQuery)
		w.WriteHeader(http.StatusFound)
		return
	}
	session, err := r.Cookie("session_id")
	q := r.URL.Query()
	p.mu.Lock()
	known := err == nil && p.sessions[session.Value]
	p.mu.Unlock()
	if !known || q.Get("vdi") != snapshotUUID {
		w.WriteHeader(http.StatusUnauthorized)
		return
	}
	info := p.export(w, r, p.image())
	p.mu.Lock()
	defer p.mu.Unlock()
	p.tasks[q.Get("task_id")] = info
}

// message answers one; xapi has no faults of HTTP for what it refuses.
func (p *xapiPool) message(w http.ResponseWriter, r *http.Request, host string) {
	call, err := rpc.ReadCall(rpc.XML, r.Body, 1<<20)
	if err != nil {
		w.WriteHeader(http.StatusInternalServerError)
		return
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.asked[call.Method]++; call.Method == "task.get_record" && p.asked[call.Method] == 1 {
		panic(http.ErrAbortHandler) // a connection that was kept for long enough
	}
	param := func(i int) string { s, _ := call.Params[min(i, len(call.Params)-1)].(string); return s }
	login := call.Method == "session.login_with_password"
	var v any = ""
	switch {
	case host != coordinatorHost:
		_ = call.WriteFailure(w, xapi.ErrHostIsSlave, coordinatorHost)
		return
	case !login && !p.sessions[param(0)]:
		_ = call.WriteFailure(w, xapi.ErrSessionInvalid, param(0))
		return
	}
	switch call.Method {
	case "session.login_with_password":
		p.made++
		v = fmt.Sprintf("OpaqueRef:session-%d", p.made)
		p.sessions[v.(string)] = true
	case "session.logout":
		delete(p.sessions, param(0))
		p.left <- struct{}{}
	case "VDI.get_by_uuid":
		v = "OpaqueRef:vdi"
	case "VDI.get_record":
		v = map[string]any{"uuid": snapshotUUID, "virtual_size": fmt.Sprint(len(p.contents)), "is_a_snapshot": true}
	case "task.create":
		p.made++
		v = fmt.Sprintf("OpaqueRef:task-%d", p.made)
		p.tasks[v.(string)] = nil
	case "task.destroy":
		delete(p.tasks, param(1))
	case "task.get_record":
		rec := map[string]any{"status": "pending", "error_info": []any{}}
		if info := p.tasks[param(1)]; info != nil {
			if rec["status"] = "success"; len(info) > 0 {
				rec["status"] = "failure"
			}
			for _, s := range info {
				rec["error_info"] = append(rec["error_info"].([]any), s)
			}
		}
		v = rec
	}
	_ = call.WriteSuccess(w, func(e rpc.Encoder) error { return rpc.Encode(e, v) })
}

// image is the disk as xapi exports it: with whole blocks, also the last one.
func (p *xapiPool) image() []byte {
	size := int64(len(p.contents))
	o := vhd.Options{Size: size, UUID: vhd.WellFormed(uuid.New()), Blocks: vhd.NewBlockSet(size)}
	o.Blocks.Add(0, size)
	l, err := vhd.NewLayout(o)
	if err != nil {
		panic(err)
	}
	var b bytes.Buffer
	w, err := vhd.NewWriter(&b, l)
	if err != nil {
		panic(err)
	}
	for i := range l.Blocks() {
		var block vhd.Block
		block.MarkAll()
		copy(block.Data(), p.contents[i*vhd.BlockSize:])
		if err := w.WriteBlock(i, &block); err != nil {
			panic(err)
		}
	}
	if err := w.Close(); err != nil {
		panic(err)
	}
	return b.Bytes()
}

// untilClose is a reply as stunnel passes it on: with no length, and no end of
// TLS either.
func untilClose(w http.ResponseWriter, body []byte) {
	conn, _, err := http.NewResponseController(w).Hijack()
	if err != nil {
		panic(err)
	}
	fmt.Fprint(conn, "HTTP/1.1 200 OK\r\nconnection: close\r\ncache-control: no-cache, no-store\r\n"+
		"task-id: OpaqueRef:x\r\ncontent-type: application/vhd\r\n\r\n")
	_, _ = conn.Write(body)
	conn.(*tls.Conn).NetConn().Close()
}

// What xapi does with requests for images, and what its pools and its sessions
// do, is coped with or told.
func TestPullXapi(t *testing.T) {
	errorPage := func(text string) string {
		return "<html><body><h1>HTTP 500 internal server error</h1>An unexpected error occurred; please wait a while and try again.<h1>Additional information</h1>" +
			text + "</body></html>"
	}
	contents := random(5*mib+512, 1, [2]int64{0, 5*mib + 512})
	var p *xapiPool
	tests := []struct {
		name       string
		export     func(w http.ResponseWriter, r *http.Request, image []byte) []string
		code, text string // of the refusal, "" for none
	}{
		{"until close", func(w http.ResponseWriter, _ *http.Request, image []byte) []string {
			untilClose(w, image)
			return []string{}
		}, "", ""},
		{"chunked", func(w http.ResponseWriter, _ *http.Request, image []byte) []string {
			_, _ = io.Copy(w, bytes.NewReader(image))
			return []string{}
		}, "", ""},
		{"session ends", func(w http.ResponseWriter, _ *http.Request, image []byte) []string {
			p.mu.Lock()
			clear(p.sessions)
			p.mu.Unlock()
			untilClose(w, image)
			return []string{}
		}, "", ""},
		{"page", func(w http.ResponseWriter, _ *http.Request, _ []byte) []string {
			w.WriteHeader(http.StatusInternalServerError)
			_, _ = io.WriteString(w, errorPage("VDI_IN_USE: [ OpaqueRef:vdi; it&apos;s attached ]"))
			return nil // as it does with what it cannot open
		}, xapi.ErrVDIInUse, "OpaqueRef:vdi it's attached"},
		{"page for a terminal", func(w http.ResponseWriter, _ *http.Request, _ []byte) []string {
			w.WriteHeader(http.StatusInternalServerError)
			_, _ = io.WriteString(w, errorPage("VDI_IN_USE: [ \x1b[31mr\u00f6d\x00\xff ]"))
			return nil
		}, xapi.ErrVDIInUse, "?[31mröd??"},
		{"page in the image", func(w http.ResponseWriter, _ *http.Request, image []byte) []string {
			untilClose(w, append(image[:3*mib:3*mib], "HTTP/1.1 500 Internal Error\r\n\r\n"+errorPage("")...))
			return []string{"VDI_IO_ERROR", "Device I/O errors"}
		}, xapi.ErrVDIIOError, "Device I/O errors"},
		{"cut", func(w http.ResponseWriter, _ *http.Request, image []byte) []string {
			untilClose(w, image[:3*mib])
			return []string{} // which is wrong
		}, xapi.ErrVDIIOError, ""},
		{"compressed", func(w http.ResponseWriter, _ *http.Request, image []byte) []string {
			w.Header().Set("Content-Encoding", "gzip")
			_, _ = w.Write(image)
			return []string{}
		}, xapi.ErrVDIIOError, "gzip"},
		{"round and round", func(w http.ResponseWriter, r *http.Request, _ []byte) []string {
			w.Header().Set("Location", p.url(memberHost)+r.URL.String())
			w.WriteHeader(http.StatusFound)
			return nil
		}, xapi.ErrOperationNotAllowed, memberHost},
		{"another port", func(w http.ResponseWriter, r *http.Request, _ []byte) []string {
			w.Header().Set("Location", "https://"+holderHost+":22"+r.URL.String())
			w.WriteHeader(http.StatusMovedPermanently)
			return nil
		}, xapi.ErrOperationNotAllowed, holderHost + ":22"},
		{"in the clear", func(w http.ResponseWriter, r *http.Request, _ []byte) []string {
			w.Header().Set("Location", strings.Replace(p.url(holderHost), "https", "http", 1)+r.URL.String())
			w.WriteHeader(http.StatusFound)
			return nil
		}, xapi.ErrOperationNotAllowed, holderHost},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			p = newXapiPool(t, contents)
			p.export = tt.export
			here := &pair{to: newDepot(t), front: p.front}
			here.host = here.to.do("host.get_all", here.to.session).([]any)[0]
			before := here.volumes()
			got, err := here.pull(here.args(snapshotUUID, "remote-url", p.url(memberHost)))
			if tt.code != "" {
				wantFault(t, tt.name, err, tt.code, tt.text)
				if after := here.volumes(); after != before {
					t.Errorf("%d disks, before there were %d", after, before)
				}
			} else if err != nil {
				t.Fatal(err)
			} else {
				here.wantContents(got.VDI, append(contents[:len(contents):len(contents)], make([]byte, 6*mib-len(contents))...))
			}
			select {
			case <-p.left:
			case <-time.After(time.Minute):
				t.Fatal("no logout")
			}
			p.mu.Lock()
			defer p.mu.Unlock()
			if len(p.sessions) > 0 || len(p.tasks) > 0 {
				t.Errorf("left at the source: sessions %v, tasks %v", p.sessions, p.tasks)
			}
		})
	}
}
