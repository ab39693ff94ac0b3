package server

import (
	"bytes"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"

	"coppice/internal/xapi"
)

func TestStatusOf(t *testing.T) {
	tests := []struct {
		err  error
		want int
	}{
		{errors.New("x"), 500},
		{xapi.NewError(xapi.ErrSessionInvalid, "r"), 401},
		{xapi.NewError(xapi.ErrSessionAuthenticationFailed), 401},
		{xapi.NewError(xapi.ErrRBACPermissionDenied, "p", "m"), 403},
		{xapi.NewError(xapi.ErrHandleInvalid, "VDI", "r"), 500},
		{&statusError{Status: 404}, 404},
		{fmt.Errorf("wrapped: %w", &statusError{404, errors.New("y")}), 404},
		{&statusError{404, xapi.NewError(xapi.ErrSessionInvalid, "r")}, 404},
		{&http.MaxBytesError{Limit: 1}, 413},
	}
	for _, tt := range tests {
		if got := statusOf(tt.err); got != tt.want {
			t.Errorf("statusOf(%v) = %d, want %d", tt.err, got, tt.want)
		}
	}
}

func TestErrorPageEscapes(t *testing.T) {
	page := errorPage(500, "GET", `/<a href='x' b="y">&`, xapi.NewError("SOME_CODE", "<p1>", `"p2'`))
	for _, want := range []string{
		"/&lt;a href=&apos;x&apos; b=&quot;y&quot;&gt;&amp;",
		"Additional information",
		"SOME_CODE: [ &lt;p1&gt;; &quot;p2&apos; ]",
	} {
		if !strings.Contains(page, want) {
			t.Errorf("page lacks %q:\n%s", want, page)
		}
	}
}

func TestFailAsksForCredentials(t *testing.T) {
	w := httptest.NewRecorder()
	s := New(Config{})
	s.fail(w, newRequest(httptest.NewRequest("GET", "/x", nil)), xapi.NewError(xapi.ErrSessionInvalid, "r"))
	if w.Code != 401 || w.Header().Get("WWW-Authenticate") != `Basic realm="Coppice"` || w.Header().Get("Connection") != "close" {
		t.Errorf("got %d with %v", w.Code, w.Header())
	}
}

func TestRedact(t *testing.T) {
	tests := []struct{ in, want string }{
		{"/x?session_id=OpaqueRef:1&vdi=2", "/x?session_id=…&vdi=2"},
		{"/x?vdi=2&SESSION_ID=OpaqueRef%3A1", "/x?vdi=2&SESSION_ID=…"},
		{"a=1; pool_secret=s; b=2", "a=1; pool_secret=…; b=2"},
		{"username=root password=p", "username=root password=…"},
		{"Authorization: abc", "Authorization: …"},
		{"vdi=2", "vdi=2"},
		{"https://root:a:b/c@d@host:443", "https://root:…@host:443"},
		{"https://:p@[::1]/ a@b", "https://:…@[::1]/ a@b"},
		{"https://root@host:443 and https://host:443/x", "https://root@host:443 and https://host:443/x"},
	}
	for _, tt := range tests {
		if got := Redact(tt.in); got != tt.want {
			t.Errorf("Redact(%q) = %q, want %q", tt.in, got, tt.want)
		}
	}
}

func TestRedactAttr(t *testing.T) {
	var out bytes.Buffer
	log := slog.New(slog.NewTextHandler(&out, &slog.HandlerOptions{ReplaceAttr: RedactAttr}))
	log.Info("password=hunter2", "password", "hunter2", "error", errors.New("bad session_id=hunter2"), "session", "hunter2", "n", 1)
	if strings.Contains(out.String(), "hunter2") || !strings.Contains(out.String(), "n=1") {
		t.Errorf("logged: %s", out.String())
	}
}
