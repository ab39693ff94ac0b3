package server

import (
	"bytes"
	"embed"
	"html/template"
	"net"
	"net/http"
	"strconv"
	"strings"
)

//go:embed web
var web embed.FS

// welcomePage is the page of GET /.
var welcomePage = template.Must(template.ParseFS(web, "web/welcome.html"))

// welcome answers GET / with a page that says what this is and how to talk to
// it. Below / there is nothing yet.
func (s *Server) welcome(w http.ResponseWriter, r *request) {
	if r.URL.Path != "/" {
		s.fail(w, r, &statusError{Status: http.StatusNotFound})
		return
	}
	host, port, err := net.SplitHostPort(r.Host)
	if err != nil {
		host, port = r.Host, map[bool]string{true: "443", false: "80"}[r.TLS != nil]
	}
	if host == "" { // HTTP/1.0
		host = "localhost"
	}
	scheme := "http"
	if r.TLS != nil {
		scheme = "https"
		if host == "127.0.0.1" {
			host = "localhost" // xe uses no TLS for 127.0.0.1
		}
	}
	var page bytes.Buffer
	err = welcomePage.Execute(&page, struct {
		Version, Scheme, Host, Port, Formats string
		Secure                               bool
	}{s.version, scheme, host, port, strings.Join(formatNames(), ", "), r.TLS != nil})
	if err != nil {
		s.fail(w, r, err)
		return
	}
	h := w.Header()
	h.Set("Content-Type", "text/html; charset=utf-8")
	h.Set("Content-Security-Policy", "default-src 'none'; style-src 'unsafe-inline'")
	h.Set("Content-Length", strconv.Itoa(page.Len()))
	_, _ = page.WriteTo(w)
}
