package server

import (
	"errors"
	"fmt"
	"net/http"
	"strings"
	"time"

	"coppice/internal/xapi"
)

// statusError is an error with the HTTP status it is answered with.
type statusError struct {
	Status int
	Err    error // shown to the client; nil when the status says it all
}

func (e *statusError) Error() string {
	if e.Err == nil {
		return http.StatusText(e.Status)
	}
	return e.Err.Error()
}

func (e *statusError) Unwrap() error { return e.Err }

// statusOf maps an error of a handler to an HTTP status.
func statusOf(err error) int {
	if e, ok := errors.AsType[*statusError](err); ok {
		return e.Status
	}
	if e, ok := errors.AsType[*http.MaxBytesError](err); ok && e != nil {
		return http.StatusRequestEntityTooLarge
	}
	if e, ok := errors.AsType[*xapi.Error](err); ok {
		switch e.Code {
		case xapi.ErrSessionInvalid, xapi.ErrSessionAuthenticationFailed:
			return http.StatusUnauthorized
		case xapi.ErrRBACPermissionDenied:
			return http.StatusForbidden
		}
	}
	return http.StatusInternalServerError
}

// headlines are the first line of an error page and the sentence below it.
var headlines = map[int][2]string{
	http.StatusBadRequest:            {"bad request", "The server does not understand this request."},
	http.StatusUnauthorized:          {"unauthorised", "Valid credentials or a valid session are needed."},
	http.StatusForbidden:             {"forbidden", "Access to this is not allowed."},
	http.StatusNotFound:              {"not found", "There is nothing here."},
	http.StatusRequestEntityTooLarge: {"request too large", "The body of this request is larger than the server accepts."},
	http.StatusInternalServerError:   {"internal server error", "The request could not be carried out."},
	http.StatusNotImplemented:        {"method not implemented", "The server does not implement this method."},
}

// fail answers r with a small HTML page that names err. The connection ends
// soon after it: part of the request may still be unread, and the client may
// be waiting for this answer before it sends the rest.
func (s *Server) fail(w http.ResponseWriter, r *request, err error) {
	status := statusOf(err)
	h := w.Header()
	h.Set("Content-Type", "text/html; charset=utf-8")
	h.Set("Content-Security-Policy", "default-src 'none'")
	h.Set("Connection", "close")
	if status == http.StatusUnauthorized {
		h.Set("WWW-Authenticate", `Basic realm="Coppice"`)
	}
	page := errorPage(status, r.Method, r.URL.Path, err)
	h.Set("Content-Length", fmt.Sprint(len(page)))
	w.WriteHeader(status)
	fmt.Fprint(w, page)
	_ = http.NewResponseController(w).SetReadDeadline(time.Now().Add(lingerLimit))
}

// errorPage is the body of an error reply.
func errorPage(status int, method, path string, err error) string {
	head, ok := headlines[status]
	if !ok {
		head = [2]string{strings.ToLower(http.StatusText(status)), ""}
	}
	var b strings.Builder
	fmt.Fprintf(&b, "<html><body><h1>HTTP %d %s</h1>%s<p>%s %s</p>",
		status, head[0], head[1], escapeHTML(method), escapeHTML(path))
	if detail := errorDetail(err); detail != "" {
		fmt.Fprintf(&b, "<h1>Additional information</h1>%s", escapeHTML(detail))
	}
	b.WriteString("</body></html>\n")
	return b.String()
}

// errorDetail spells an API error as "CODE: [ p1; p2 ]" and any other by its
// text.
func errorDetail(err error) string {
	if e, ok := errors.AsType[*xapi.Error](err); ok {
		return fmt.Sprintf("%s: [ %s ]", e.Code, strings.Join(e.Params, "; "))
	}
	if e, ok := errors.AsType[*statusError](err); ok && e.Err == nil {
		return ""
	}
	return err.Error()
}

// htmlEscaper uses the named entities that clients of the original see.
var htmlEscaper = strings.NewReplacer(
	"&", "&amp;", "<", "&lt;", ">", "&gt;", "'", "&apos;", `"`, "&quot;")

func escapeHTML(s string) string { return htmlEscaper.Replace(s) }
