package server

import (
	"maps"
	"net/http"
	"net/http/httptest"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestPairs(t *testing.T) {
	tests := []struct {
		in, seps string
		want     map[string]string
	}{
		{"", "&", map[string]string{}},
		{"a=1&b=2", "&", map[string]string{"a": "1", "b": "2"}},
		{"a=1&a=2", "&", map[string]string{"a": "1"}},
		{"a=x,y&b", "&", map[string]string{"a": "x,y", "b": ""}},
		{"vdi=OpaqueRef%3A1%2b2", "&", map[string]string{"vdi": "OpaqueRef:1+2"}},
		{"vdi=a+b", "&", map[string]string{"vdi": "a+b"}},
		{"a=100%&b=%zz", "&", map[string]string{"a": "100%", "b": "%zz"}},
		{"a=1=2&=3&&", "&", map[string]string{"a": "1=2"}},
		{"a=1;b=2", "&", map[string]string{"a": "1;b=2"}},
		// Both separators are in use, by different generations of clients.
		{"k1=v1;pool_secret=s;k3=v3", ";&", map[string]string{"k1": "v1", "pool_secret": "s", "k3": "v3"}},
		{"a=1; b=2&c=3", ";&", map[string]string{"a": "1", "b": "2", "c": "3"}},
	}
	for _, tt := range tests {
		if diff := cmp.Diff(tt.want, pairs(tt.in, tt.seps)); diff != "" {
			t.Errorf("pairs(%q, %q) (-want +got):\n%s", tt.in, tt.seps, diff)
		}
	}
}

func FuzzPairs(f *testing.F) {
	f.Add("session_id=OpaqueRef%3Ax&vdi=y&chunked")
	f.Add("a=1; b=2&a=3;;=%")
	f.Fuzz(func(t *testing.T, s string) {
		m := pairs(s, ";&")
		if _, ok := m[""]; ok {
			t.Errorf("a parameter without a name in %q", s)
		}
	})
}

// TestParamPrecedence: who asks is told by the cookie first, what is asked
// by the query first.
func TestParamPrecedence(t *testing.T) {
	r := httptest.NewRequest(http.MethodGet, "/x?session_id=q&vdi=q&only_query=q", nil)
	r.Header.Set("Cookie", "session_id=c; vdi=c&only_cookie=c")
	r.Header.Set("task-id", "h")
	r.Header.Set("Subtask-of", "h")
	p := newRequest(r).params

	got := make(map[string]string)
	for _, k := range []string{"session_id", "only_query", "only_cookie", "task_id", "subtask_of", "absent"} {
		got["auth "+k] = p.auth(k)
	}
	for _, k := range []string{"vdi", "only_query", "only_cookie", "absent"} {
		if v, ok := p.param(k); ok {
			got["param "+k] = v
		}
	}
	want := map[string]string{
		"auth session_id": "c", "auth only_query": "q", "auth only_cookie": "c",
		"auth task_id": "h", "auth subtask_of": "h", "auth absent": "",
		"param vdi": "q", "param only_query": "q", "param only_cookie": "c",
	}
	if !maps.Equal(got, want) {
		t.Errorf("(-want +got):\n%s", cmp.Diff(want, got))
	}
}
