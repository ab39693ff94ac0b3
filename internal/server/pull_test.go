package server

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"

	"coppice/internal/rpc"
	"coppice/internal/vhd"
	"coppice/internal/xapi"
)

// pair is two servers, one of which pulls disks from the other.
type pair struct {
	from, to *depot
	front    *httptest.Server // of from, with TLS
	host     any              // of to
}

// newPair starts two servers. What the source says goes through front.
func newPair(t *testing.T, front func(from *depot) http.Handler) *pair {
	t.Helper()
	p := &pair{from: newDepot(t), to: newDepot(t)}
	p.front = httptest.NewTLSServer(front(p.from))
	t.Cleanup(p.front.Close)
	p.host = p.to.do("host.get_all", p.to.session).([]any)[0]
	return p
}

func straight(from *depot) http.Handler { return from.Server }

func fingerprintOf(s *httptest.Server) string {
	sum := sha256.Sum256(s.Certificate().Raw)
	return hex.EncodeToString(sum[:])
}

// args are the arguments that pull a disk, with changes: a key and its value,
// which is left out when it is "".
func (p *pair) args(vdi string, change ...string) map[string]any {
	args := map[string]any{
		"remote-url": p.front.URL, "remote-username": "root", "remote-password": "secret",
		"remote-fingerprint": fingerprintOf(p.front), "remote-vdi": vdi,
	}
	for i := 0; i < len(change); i += 2 {
		args[change[i]] = change[i+1]
		if change[i+1] == "" {
			delete(args, change[i])
		}
	}
	return args
}

// pulled is what a pull answers.
type pulled struct {
	VDI, Source, Base string
	Bytes             int64
	Snapshot          bool
}

// pull pulls a disk and says what came of it.
func (p *pair) pull(args map[string]any) (got pulled, err error) {
	v, err := p.to.call("host.call_plugin", p.to.session, p.host, "coppice", "vdi-pull", args)
	if err != nil {
		return got, err
	}
	return got, json.Unmarshal([]byte(v.(string)), &got)
}

func (p *pair) pulls(args map[string]any) pulled {
	p.to.t.Helper()
	got, err := p.pull(args)
	if err != nil {
		p.to.t.Fatalf("pull: %v", err)
	}
	return got
}

// wantContents compares a disk of the server that pulls.
func (p *pair) wantContents(uuid string, want []byte) {
	p.to.t.Helper()
	if got := p.to.download(uuid, "raw", ""); !bytes.Equal(got, want) {
		p.to.t.Errorf("VDI %s has %d bytes that are not the %d of the source", uuid, len(got), len(want))
	}
}

// volumes is how many disks the server that pulls has.
func (p *pair) volumes() int {
	p.to.t.Helper()
	p.to.do("SR.scan", p.to.session, p.to.sr) // would find volumes that are nobody's
	return len(p.to.do("VDI.get_all", p.to.session).([]any))
}

// snapshot takes a snapshot of a disk of the source.
func (p *pair) snapshot(ref string) (snap, uuid string) {
	p.from.t.Helper()
	snap = p.from.do("VDI.snapshot", p.from.session, ref).(string)
	return snap, p.from.do("VDI.get_uuid", p.from.session, snap).(string)
}

// A disk comes whole and then by what has changed, as long as it is what has
// been pulled before.
func TestPull(t *testing.T) {
	for _, format := range []string{"vhd", "qcow2"} {
		t.Run(format, func(t *testing.T) {
			p := newPair(t, straight)
			contents := random(8*mib, 1, [2]int64{0, 3 * mib}, [2]int64{5 * mib, 4096})
			disk, _ := p.from.filled(contents)
			p.from.do("VDI.set_name_label", p.from.session, disk, "data <of> guest")
			_, first := p.snapshot(disk)

			full := p.pulls(p.args(first, "format", format))
			want := pulled{VDI: full.VDI, Source: first, Bytes: full.Bytes, Snapshot: true}
			if full != want || full.Bytes < 3*mib || full.Bytes > 7*mib {
				t.Errorf("pull: %+v", full)
			}
			p.wantContents(full.VDI, contents)
			ref := p.to.do("VDI.get_by_uuid", p.to.session, full.VDI).(string)
			if got := p.to.do("VDI.get_name_label", p.to.session, ref); got != "data <of> guest" {
				t.Errorf("name %q", got)
			}

			// What has changed, and a new size.
			p.from.do("VDI.resize", p.from.session, disk, int64(10*mib))
			contents = append(contents, make([]byte, 2*mib)...)
			copy(contents[2*mib+5:], "changed")
			copy(contents[9*mib:], "behind the old end")
			clear(contents[mib : 2*mib])
			p.from.upload(disk, "raw", contents)
			_, second := p.snapshot(disk)
			delta := p.pulls(p.args(second, "format", format, "vdi", full.VDI))
			if delta.Base != first || delta.VDI != full.VDI || delta.Bytes > 7*mib {
				t.Errorf("delta: %+v", delta)
			}
			p.wantContents(full.VDI, contents)
			if got := p.to.do("VDI.get_virtual_size", p.to.session, ref); got != int64(10*mib) {
				t.Errorf("size %v", got)
			}

			// The same again, and little.
			if again := p.pulls(p.args(second, "format", format, "vdi", ref)); again.Base != second || again.Bytes != 0 {
				t.Errorf("the same again: %+v", again)
			}
			copy(contents[4*mib:], "a little")
			p.from.upload(disk, "raw", contents)
			snap, third := p.snapshot(disk)
			if little := p.pulls(p.args(snap, "format", format, "vdi", full.VDI)); little.Base != second || little.Bytes > 3*mib {
				t.Errorf("a little: %+v", little)
			}
			p.wantContents(full.VDI, contents)

			// Changed here: refused, and put right.
			local := bytes.Clone(contents)
			copy(local, "changed here")
			p.to.upload(ref, "raw", local)
			_, err := p.pull(p.args(third, "format", format, "vdi", full.VDI))
			wantFault(t, "changed here", err, xapi.ErrOperationNotAllowed, "has been changed since")
			p.wantContents(full.VDI, local)
			replaced := p.pulls(p.args(third, "format", format, "vdi", full.VDI, "full", "true"))
			if replaced.Base != "" || replaced.VDI != full.VDI {
				t.Errorf("full: %+v", replaced)
			}
			p.wantContents(full.VDI, contents)
			if again := p.pulls(p.args(third, "vdi", full.VDI)); again.Base != third {
				t.Errorf("after a full one: %+v", again)
			}

			// A disk that may change is nothing to be a delta to.
			live := p.pulls(p.args(disk, "vdi", full.VDI))
			if live.Base != third || live.Snapshot {
				t.Errorf("of a disk that is no snapshot: %+v", live)
			}
			_, err = p.pull(p.args(third, "vdi", full.VDI))
			wantFault(t, "after a live one", err, xapi.ErrOperationNotAllowed, "not what was pulled")
			if sessions := p.from.do("task.get_all", p.from.session).([]any); len(sessions) > 0 {
				for _, task := range sessions {
					if label := p.from.do("task.get_name_label", p.from.session, task); strings.HasPrefix(label.(string), "Pull of") {
						t.Errorf("the source is left with the task %v", label)
					}
				}
			}
		})
	}
}

// A copy of a disk that was pulled is one that was not, and what the disk was
// reverted to counts.
func TestPullBaseStaysWithDisk(t *testing.T) {
	p := newPair(t, straight)
	contents := random(4*mib, 1, [2]int64{0, mib})
	disk, _ := p.from.filled(contents)
	_, first := p.snapshot(disk)
	got := p.pulls(p.args(first))
	ref := p.to.do("VDI.get_by_uuid", p.to.session, got.VDI).(string)
	clone := p.to.do("VDI.clone", p.to.session, ref).(string)
	_, err := p.pull(p.args(first, "vdi", clone))
	wantFault(t, "a clone", err, xapi.ErrOperationNotAllowed, "not what was pulled")

	snap := p.to.do("VDI.snapshot", p.to.session, ref).(string)
	p.to.upload(ref, "raw", random(4*mib, 2, [2]int64{0, mib}))
	p.to.do("VDI.revert", p.to.session, snap)
	copy(contents, "changed")
	p.from.upload(disk, "raw", contents)
	_, second := p.snapshot(disk)
	if delta := p.pulls(p.args(second, "vdi", ref)); delta.Base != first {
		t.Errorf("after a revert: %+v", delta)
	}
	p.wantContents(got.VDI, contents)
}

// wantFault checks the code of a failure and something of its text.
func wantFault(t *testing.T, what string, err error, code, text string) {
	t.Helper()
	f, ok := errors.AsType[*rpc.Fault](err)
	if !ok || f.Code != code || !strings.Contains(strings.Join(f.Params, " "), text) {
		t.Errorf("%s: %v; want %s with %q", what, err, code, text)
	}
	if err != nil && strings.Contains(err.Error(), "hush") {
		t.Errorf("%s: the error has a password in it: %v", what, err)
	}
}

// What cannot be is refused with a code that says why, and leaves nothing,
// neither here nor of the password.
func TestPullRefused(t *testing.T) {
	p := newPair(t, straight)
	contents := random(2*mib, 1, [2]int64{0, mib})
	disk, _ := p.from.filled(contents)
	snap, first := p.snapshot(disk)
	_, mine := p.to.filled(contents)
	got := p.pulls(p.args(first))
	p.from.do("VDI.destroy", p.from.session, snap)
	_, second := p.snapshot(disk)
	other := httptest.NewTLSServer(p.from.Server)
	t.Cleanup(other.Close)
	before := p.volumes()
	none := "deadbeef-0000-4000-8000-000000000000"
	tests := []struct {
		name       string
		vdi        string
		change     []string
		code, text string
	}{
		{"password", second, []string{"remote-password", "hush"}, xapi.ErrSessionAuthenticationFailed, ""},
		{"user", second, []string{"remote-username", "nobody", "remote-password", "hush"}, xapi.ErrSessionAuthenticationFailed, ""},
		{"session", second, []string{"remote-session", "OpaqueRef:hush"}, xapi.ErrSessionAuthenticationFailed, ""},
		{"session that is none", second, []string{"remote-session", "hush\r\nCookie: x"}, xapi.ErrVDIIOError, "no reference of a session"},
		{"certificate", second, []string{"remote-fingerprint", strings.Repeat("00", 32)}, xapi.ErrSSLVerifyError, "SHA-256"},
		{"certificate of nobody", second, []string{"remote-fingerprint", ""}, xapi.ErrSSLVerifyError, "unknown authority"},
		{"fingerprint", second, []string{"remote-fingerprint", "00"}, xapi.ErrInvalidValue, "remote-fingerprint"},
		{"CA", second, []string{"remote-ca", "hush"}, xapi.ErrInvalidValue, "remote-ca"},
		{"plain", second, []string{"remote-url", "http://" + p.from.tcp}, xapi.ErrInvalidValue, "insecure"},
		{"plain and recognised", second, []string{"remote-url", "http://" + p.from.tcp, "remote-insecure", "true"}, xapi.ErrInvalidValue, "certificate"},
		{"password in URL", second, []string{"remote-url", strings.Replace(p.front.URL, "://", "://root:hush@", 1)}, xapi.ErrInvalidValue, "remote-url"},
		{"path in URL", second, []string{"remote-url", p.front.URL + "/latest/meta-data"}, xapi.ErrInvalidValue, "remote-url"},
		{"address", second, []string{"remote-url", "https://127.0.0.3"}, xapi.ErrOperationNotAllowed, "127.0.0.3"},
		{"nobody there", second, []string{"remote-url", "https://127.0.0.2:1"}, xapi.ErrCannotContactHost, "127.0.0.2:1"},
		{"no such VDI", none, nil, xapi.ErrUUIDInvalid, none},
		{"no such reference", "OpaqueRef:none", nil, xapi.ErrHandleInvalid, "OpaqueRef:none"},
		{"no VDI", "", nil, xapi.ErrInvalidValue, "remote-vdi"},
		{"base gone", second, []string{"vdi", got.VDI}, xapi.ErrUUIDInvalid, first},
		{"never pulled", second, []string{"vdi", mine}, xapi.ErrOperationNotAllowed, "not what was pulled"},
		{"delta in raw", second, []string{"vdi", got.VDI, "format", "raw"}, xapi.ErrInvalidValue, "raw"},
		{"format", second, []string{"format", "vmdk"}, xapi.ErrInvalidValue, "vmdk"},
		{"no such SR", second, []string{"sr", none}, xapi.ErrUUIDInvalid, none},
		{"no such disk here", second, []string{"vdi", none}, xapi.ErrUUIDInvalid, none},
		{"disk and SR", second, []string{"vdi", got.VDI, "sr", p.to.sr}, xapi.ErrInvalidValue, "sr"},
		{"full without disk", second, []string{"full", "true"}, xapi.ErrInvalidValue, "full"},
		{"flag", second, []string{"remote-insecure", "maybe"}, xapi.ErrInvalidValue, "remote-insecure"},
		{"unknown argument", second, []string{"remote_password", "hush"}, xapi.ErrInvalidValue, "remote_password"},
	}
	for _, tt := range tests {
		_, err := p.pull(p.args(tt.vdi, tt.change...))
		wantFault(t, tt.name, err, tt.code, tt.text)
	}
	if after := p.volumes(); after != before {
		t.Errorf("%d disks, before there were %d", after, before)
	}
	p.wantContents(got.VDI, contents)
	if log := p.to.log.String() + p.from.log.String(); strings.Contains(log, "hush") || strings.Contains(log, "password=secret") {
		t.Errorf("the log has a password in it:\n%s", log)
	}

	// Who is not mistaken.
	session := p.from.login(t)
	p.pulls(p.args(second, "remote-username", "", "remote-password", "", "remote-session", session))
	p.from.do("session.logout", session) // was left open
	p.pulls(p.args(second, "remote-url", "http://"+p.from.tcp, "remote-fingerprint", "", "remote-insecure", "true", "format", "raw"))
	p.pulls(p.args(second, "remote-fingerprint", strings.Repeat("00", 32)+", "+fingerprintOf(p.front)))
}

// throttle passes connections on to a server, cut or held up after so many
// bytes of an answer.
type throttle struct {
	net.Listener
	mu    sync.Mutex
	left  int64
	cut   bool
	full  chan struct{} // closed when nothing more is passed on
	over  <-chan struct{}
	conns []net.Conn
}

func newThrottle(t *testing.T, to string, bytes int64, cut bool) *throttle {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	p := &throttle{Listener: l, left: bytes, cut: cut, full: make(chan struct{}), over: t.Context().Done()}
	var wg sync.WaitGroup
	t.Cleanup(func() {
		l.Close()
		p.hangUp()
		wg.Wait()
	})
	wg.Go(func() {
		for {
			in, err := l.Accept()
			if err != nil {
				return
			}
			out, err := net.Dial("tcp", to)
			if err != nil {
				in.Close()
				return
			}
			p.mu.Lock()
			p.conns = append(p.conns, in, out)
			p.mu.Unlock()
			wg.Go(func() { _, _ = io.Copy(out, in); out.Close() })
			wg.Go(func() { _, _ = io.Copy(p.limited(in), out); in.Close() })
		}
	})
	return p
}

// hangUp cuts everything, and nobody gets through any more.
func (p *throttle) hangUp() {
	p.Close()
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, c := range p.conns {
		c.Close()
	}
}

type limitedConn struct {
	net.Conn
	p *throttle
}

func (p *throttle) limited(c net.Conn) io.Writer { return limitedConn{c, p} }

func (c limitedConn) Write(b []byte) (int, error) {
	c.p.mu.Lock()
	before := c.p.left
	c.p.left -= int64(len(b))
	c.p.mu.Unlock()
	if before > int64(len(b)) {
		return c.Conn.Write(b)
	}
	if before > 0 {
		close(c.p.full)
	}
	if c.p.cut {
		c.p.hangUp()
	} else {
		<-c.p.over
	}
	return 0, net.ErrClosed
}

// A source that dies in the middle leaves nothing, and the disk what it was.
func TestPullCut(t *testing.T) {
	p := newPair(t, straight)
	contents := random(8*mib, 1, [2]int64{0, 8 * mib})
	disk, _ := p.from.filled(contents)
	_, first := p.snapshot(disk)
	old := p.pulls(p.args(first))
	changed := random(8*mib, 2, [2]int64{0, 8 * mib})
	p.from.upload(disk, "raw", changed)
	_, second := p.snapshot(disk)
	before := p.volumes()
	for _, change := range [][]string{nil, {"vdi", old.VDI}, {"vdi", old.VDI, "full", "true"}, {"format", "raw"}} {
		proxy := newThrottle(t, p.front.Listener.Addr().String(), 4*mib, true)
		args := p.args(second, append(change, "remote-url", "https://"+proxy.Addr().String())...)
		task := p.to.do("Async.host.call_plugin", p.to.session, p.host, "coppice", "vdi-pull", args).(string)
		if o := p.to.settled(task); o[0] != "failure" || o[1] != xapi.ErrVDIIOError {
			t.Errorf("%q: task says %q", change, o)
		}
	}
	if after := p.volumes(); after != before {
		t.Errorf("%d disks, before there were %d", after, before)
	}
	p.wantContents(old.VDI, contents)
	if delta := p.pulls(p.args(second, "vdi", old.VDI)); delta.Base != first {
		t.Errorf("afterwards: %+v", delta)
	}
	p.wantContents(old.VDI, changed)
}

// foreign makes of a server one that has nothing of what ours have beyond
// XenAPI: a reply to an export ends with its connection, says nothing of
// digests, and its deltas have a parent of their own naming.
func foreign(from *depot) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path != "/export_raw_vdi" {
			from.Server.ServeHTTP(w, r)
			return
		}
		in, err := http.NewRequestWithContext(r.Context(), r.Method, "http://"+from.tcp+r.URL.String(), nil)
		if err != nil {
			panic(err)
		}
		in.Header = r.Header.Clone()
		in.Header.Set("Accept-Encoding", "identity")
		resp, err := http.DefaultTransport.RoundTrip(in)
		if err != nil {
			panic(http.ErrAbortHandler)
		}
		defer resp.Body.Close()
		image, err := io.ReadAll(resp.Body)
		if err != nil {
			panic(http.ErrAbortHandler)
		}
		task := r.URL.Query().Get("task_id")
		for r.Context().Err() == nil && from.do("task.get_status", from.session, task) == "pending" { // the digest comes last
			runtime.Gosched()
		}
		from.do("task.remove_from_other_config", from.session, task, sha256Key)
		conn, _, err := http.NewResponseController(w).Hijack()
		if err != nil {
			panic(err)
		}
		fmt.Fprintf(conn, "HTTP/1.1 %s\r\nConnection: close\r\ncontent-type: application/vhd\r\n\r\n", resp.Status)
		_, _ = conn.Write(image)
		conn.Close()
	})
}

// pool makes of a server the coordinator of a pool with a member, which is
// reached at another address.
func pool(s http.Handler, coordinator, member string) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		at := r.Context().Value(http.LocalAddrContextKey).(*net.TCPAddr)
		if r.Method != http.MethodPost || at.IP.String() != member {
			s.ServeHTTP(w, r)
			return
		}
		call, err := rpc.ReadCall(rpc.XML, r.Body, 1<<20)
		if err != nil {
			w.WriteHeader(http.StatusInternalServerError)
			return
		}
		_ = call.WriteFailure(w, xapi.ErrHostIsSlave, coordinator)
	})
}

// A server that knows XenAPI and nothing of ours is a source, too, and so is a
// member of its pool.
func TestPullForeign(t *testing.T) {
	p := newPair(t, foreign)
	l, err := net.Listen("tcp4", "0.0.0.0:0")
	if err != nil {
		t.Fatal(err)
	}
	both := httptest.NewUnstartedServer(pool(p.front.Config.Handler, "127.0.0.1", "127.0.0.2"))
	both.Listener.Close()
	both.Listener = l
	both.StartTLS()
	t.Cleanup(both.Close)
	atMember := fmt.Sprintf("https://127.0.0.2:%d", l.Addr().(*net.TCPAddr).Port)

	contents := random(8*mib, 1, [2]int64{mib, 2 * mib})
	disk, _ := p.from.filled(contents)
	_, first := p.snapshot(disk)
	full := p.pulls(p.args(first, "remote-url", atMember))
	p.wantContents(full.VDI, contents)
	copy(contents[5*mib:], "changed")
	p.from.upload(disk, "raw", contents)
	_, second := p.snapshot(disk)
	if delta := p.pulls(p.args(second, "vdi", full.VDI)); delta.Base != first || delta.Bytes > 3*mib {
		t.Errorf("delta: %+v", delta)
	}
	p.wantContents(full.VDI, contents)
	raw := p.pulls(p.args(second, "format", "raw"))
	p.wantContents(raw.VDI, contents)
}

// A source whose answers are wrong is not believed.
func TestPullDistrust(t *testing.T) {
	whole := func(d *depot, r *http.Request) []byte { // whatever was asked for
		return d.download(r.URL.Query().Get("vdi"), "vhd", "")
	}
	tests := []struct {
		name       string
		answer     func(d *depot, w http.ResponseWriter, r *http.Request)
		code, text string
	}{
		{"elsewhere", func(_ *depot, w http.ResponseWriter, r *http.Request) {
			http.Redirect(w, r, "https://192.0.2.7/export_raw_vdi?session_id=hush", http.StatusFound)
		}, xapi.ErrOperationNotAllowed, "192.0.2.7"},
		{"silently whole", func(d *depot, w http.ResponseWriter, r *http.Request) { _, _ = w.Write(whole(d, r)) }, xapi.ErrVDIIOError, "no delta"},
		{"short", func(d *depot, w http.ResponseWriter, r *http.Request) {
			image := whole(d, r)
			_, _ = w.Write(image[:len(image)-vhd.SectorSize])
		}, xapi.ErrVDIIOError, ""},
		{"error page", func(_ *depot, w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusInternalServerError) }, xapi.ErrVDIIOError, "500"},
		{"garbage", func(_ *depot, w http.ResponseWriter, _ *http.Request) { fmt.Fprint(w, "HTTP/1.1 500 hush") }, xapi.ErrVDIIOError, ""},
	}
	var answer func(*depot, http.ResponseWriter, *http.Request) // nil for the right one
	p := newPair(t, func(from *depot) http.Handler {
		return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			if answer == nil || r.URL.Path != "/export_raw_vdi" {
				from.Server.ServeHTTP(w, r)
				return
			}
			answer(from, w, r)
			from.do("task.set_status", from.session, r.URL.Query().Get("task_id"), "success")
		})
	})
	contents := random(4*mib, 1, [2]int64{0, mib})
	disk, _ := p.from.filled(contents)
	_, first := p.snapshot(disk)
	old := p.pulls(p.args(first))
	_, second := p.snapshot(disk)
	for _, tt := range tests {
		answer = tt.answer
		_, err := p.pull(p.args(second, "vdi", old.VDI))
		wantFault(t, tt.name, err, tt.code, tt.text)
		p.wantContents(old.VDI, contents)
	}
}

func TestRedactPullArgs(t *testing.T) {
	for _, key := range []string{"remote-password", "remote-session"} {
		if !secretKey.MatchString(key) {
			t.Errorf("the value of %s is shown", key)
		}
	}
	if slices.ContainsFunc([]string{"remote-url", "remote-vdi", "sessions"}, secretKey.MatchString) {
		t.Error("what is no secret is hidden")
	}
}
