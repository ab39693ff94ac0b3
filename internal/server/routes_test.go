package server

import (
	"net/http"
	"testing"
)

func TestRouterFind(t *testing.T) {
	named := func(name string) handler {
		return func(_ *Server, w http.ResponseWriter, _ *request) { w.Header().Set("Name", name) }
	}
	rt := newRouter([]route{
		{http.MethodGet, "/", named("page")},
		{http.MethodGet, "/export", named("export")},
		{http.MethodGet, "/export_raw_vdi", named("raw")},
		{http.MethodPut, "/import", named("import")},
	})
	tests := []struct {
		method, path string
		want         string // handler, or ""
		status       int
	}{
		{"GET", "/", "page", 0},
		{"GET", "", "", 403},
		{"GET", "/elsewhere", "page", 0},
		{"GET", "/export", "export", 0},
		{"GET", "/export/", "export", 0},
		{"GET", "/export/x/y", "export", 0},
		{"GET", "/exporter", "page", 0},
		{"GET", "/export_raw_vdi", "raw", 0},
		{"GET", "/export_raw_vdi/", "raw", 0},
		{"PUT", "/import", "import", 0},
		{"PUT", "/elsewhere", "", 403},
		{"PUT", "/", "", 403},
		{"CONNECT", "/console", "", 403},
		{"HEAD", "/", "", 501},
		{"DELETE", "/export", "", 501},
		{"get", "/", "", 501},
	}
	for _, tt := range tests {
		h, err := rt.find(tt.method, tt.path)
		if tt.want == "" {
			if err == nil || statusOf(err) != tt.status {
				t.Errorf("%s %q: error %v, want status %d", tt.method, tt.path, err, tt.status)
			}
			continue
		}
		if err != nil {
			t.Errorf("%s %q: %v", tt.method, tt.path, err)
			continue
		}
		hdr := header{}
		h(nil, hdr, nil)
		if got := http.Header(hdr).Get("Name"); got != tt.want {
			t.Errorf("%s %q goes to %q, want %q", tt.method, tt.path, got, tt.want)
		}
	}
}

// header is a ResponseWriter that has nothing but a header.
type header http.Header

func (h header) Header() http.Header       { return http.Header(h) }
func (header) Write(p []byte) (int, error) { return len(p), nil }
func (header) WriteHeader(int)             {}

func TestRoutesAreUnique(t *testing.T) {
	seen := make(map[string]bool)
	for _, r := range routes() {
		key := r.method + " " + r.path
		if seen[key] {
			t.Errorf("%s is there twice", key)
		}
		seen[key] = true
	}
}
