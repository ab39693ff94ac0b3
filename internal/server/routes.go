package server

import (
	"cmp"
	"net/http"
	"slices"
	"strings"
)

// handler answers one request.
type handler func(s *Server, w http.ResponseWriter, r *request)

// route binds a method and a path to a handler. A path stands for itself and
// for everything below it; the longest one that fits wins.
type route struct {
	method string
	path   string
	handle handler
}

// routes is everything this server answers. POST / catches any other POST,
// because some clients send XML-RPC to paths of their own.
func routes() []route {
	exportVDI := checked((*Server).exportRawVDI, []string{"vdi", "format", "base"})
	importVDI := checked((*Server).importRawVDI, []string{"vdi", "sr_id", "sr_uuid", "format", "chunked", atomicParam, baseParam, offsetParam})
	exportOf := []string{"uuid", "ref", "use_compression", "excluded_device_types"}
	exportXVA := checked(exportVM(false), exportOf, "export_snapshots", "preserve_power_state")
	exportRecords := checked(exportVM(true), exportOf, "export_snapshots", "preserve_power_state", "all", "include_dom0")
	importTo := []string{"sr_id", "sr_uuid"}
	return []route{
		{http.MethodPost, "/", (*Server).xmlRPC},
		{http.MethodPost, "/RPC2", (*Server).xmlRPC},
		{http.MethodPost, "/xmlrpc", (*Server).xmlRPC},
		{http.MethodPost, "/jsonrpc", (*Server).jsonRPC},
		{http.MethodPost, "/json", (*Server).jsonRPC},
		{http.MethodPost, "/cli", (*Server).cli},
		{http.MethodGet, "/export_raw_vdi", exportVDI},
		{http.MethodHead, "/export_raw_vdi", exportVDI},
		{http.MethodPut, "/import_raw_vdi", importVDI},
		{http.MethodHead, "/import_raw_vdi", (*Server).importState},
		{http.MethodGet, "/export", exportXVA},
		{http.MethodHead, "/export", exportXVA},
		{http.MethodGet, "/export_metadata", exportRecords},
		{http.MethodHead, "/export_metadata", exportRecords},
		{http.MethodPut, "/import", checked(importVM(false), importTo, "restore", "force")},
		{http.MethodPut, "/import_metadata", checked(importVM(true), importTo, "restore", "force", "dry_run")},
		{http.MethodGet, "/audit_log", checked((*Server).auditLog, []string{"since"})},
		{http.MethodGet, "/metrics", (*Server).serveMetrics},
		{http.MethodGet, "/healthz", (*Server).healthz},
		{http.MethodGet, "/readyz", (*Server).readyz},
		{http.MethodOptions, "/", (*Server).preflight},
		{http.MethodGet, "/", (*Server).welcome},
	}
}

// methods are the methods that exist everywhere. HEAD does where it has a route.
var methods = []string{
	http.MethodGet, http.MethodPut, http.MethodPost, http.MethodConnect, http.MethodOptions,
}

// router finds handlers. It holds the routes of each method, longest path
// first.
type router map[string][]route

func newRouter(rs []route) router {
	byMethod := make(router)
	for _, r := range rs {
		byMethod[r.method] = append(byMethod[r.method], r)
	}
	for _, rs := range byMethod {
		slices.SortFunc(rs, func(a, b route) int { return cmp.Compare(len(b.path), len(a.path)) })
	}
	return byMethod
}

// find returns the handler for a request, or the error it is answered with:
// 501 for a method that does not exist, 403 for one that has nothing there.
func (rt router) find(method, path string) (handler, error) {
	for _, r := range rt[method] {
		if under(path, r.path) {
			return r.handle, nil
		}
	}
	if slices.Contains(methods, method) {
		return nil, &statusError{Status: http.StatusForbidden}
	}
	return nil, &statusError{Status: http.StatusNotImplemented}
}

// under reports whether path is root or lies below it.
func under(path, root string) bool {
	rest, ok := strings.CutPrefix(path, root)
	return ok && (rest == "" || rest[0] == '/' || strings.HasSuffix(root, "/"))
}

// preflight answers a browser that asks whether a page from elsewhere may
// talk to this server. It may: what protects the server is the login.
func (s *Server) preflight(w http.ResponseWriter, r *request) {
	allow := "X-Requested-With"
	if asked := r.Header.Get("Access-Control-Request-Headers"); asked != "" {
		allow = asked + ", " + allow
	}
	h := w.Header()
	h.Set("Access-Control-Allow-Origin", "*")
	h.Set("Access-Control-Allow-Headers", allow)
	h.Set("Access-Control-Allow-Methods", "PUT")
	h.Set("Content-Length", "0")
	w.WriteHeader(http.StatusOK)
}
