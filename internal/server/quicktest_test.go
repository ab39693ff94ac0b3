package server

import (
	"fmt"
	"strings"
	"testing"

	"coppice/internal/api"
	"coppice/internal/xapi"
)

// The behaviours of the HTTP layer that the test suite of XenAPI servers
// asserts, by their ids.

// loggedIn returns a session and a disk that it can read.
func loggedIn(t *testing.T, f *fixture) (session, disk string) {
	t.Helper()
	ref, err := f.api.Login(t.Context(), api.Origin{}, "root", "secret")
	if err != nil {
		t.Fatal(err)
	}
	call := func(name string, params ...any) any {
		t.Helper()
		res, err := f.api.Invoke(t.Context(), api.Origin{}, name, append([]any{string(ref)}, params...))
		if err != nil {
			t.Fatal(err)
		}
		return res.Value
	}
	sr := call("SR.get_by_name_label", "Local storage").([]string)[0]
	vdi := call("VDI.create", map[string]any{
		"SR": sr, "virtual_size": int64(2 << 20), "type": "user", "sharable": false, "read_only": false, "other_config": map[string]any{},
	})
	return string(ref), string(vdi.(xapi.Ref[xapi.VDI]))
}

// Cookies are separated by ; or by &.
func TestQT_HTTP_1(t *testing.T) {
	f := start(t, 0)
	session, disk := loggedIn(t, f)
	for _, cookie := range []string{
		"k1=v1;session_id=%s;k3=v3", "k1=v1&session_id=%s&k3=v3", "k1=v1; session_id=%s", "session_id=%s",
	} {
		cookie = fmt.Sprintf(cookie, session)
		answer := f.send(t, "tcp", "GET /export_raw_vdi?vdi="+disk+" HTTP/1.0\r\nCookie: "+cookie+"\r\n\r\n")
		if !strings.HasPrefix(answer, "HTTP/1.") || !strings.Contains(strings.SplitN(answer, "\r\n", 2)[0], " 200 ") {
			t.Errorf("cookie %q: %.100q", cookie, answer)
		}
	}
}

// A wrong pool secret is 401, and so are wrong credentials.
func TestQT_HTTP_2(t *testing.T) {
	f := start(t, 0)
	_, disk := loggedIn(t, f)
	for _, header := range []string{
		"Cookie: pool_secret=wrong", "Cookie: k1=v1;pool_secret=wrong;k3=v3", "Cookie: session_id=OpaqueRef:wrong",
		"Authorization: Basic cm9vdDp3cm9uZw==", "X-Nothing: at all",
	} {
		answer := f.send(t, "tcp", "GET /export_raw_vdi?vdi="+disk+" HTTP/1.0\r\n"+header+"\r\n\r\n")
		if status := strings.SplitN(answer, "\r\n", 2)[0]; !strings.Contains(status, " 401 ") {
			t.Errorf("%s: %s", header, status)
		}
	}
}

// The path of a request is escaped in the body of an error.
func TestQT_HTTP_3(t *testing.T) {
	f := start(t, 0)
	answer := f.send(t, "tcp", "GET /%3C%3E%27%22%26 HTTP/1.0\r\n\r\n")
	_, body, _ := strings.Cut(answer, "\r\n\r\n")
	if !strings.Contains(body, "/&lt;&gt;&apos;&quot;&amp;") || strings.Contains(body, "<>") {
		t.Errorf("body %q", body)
	}
}
