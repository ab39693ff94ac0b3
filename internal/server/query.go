package server

import (
	"cmp"
	"fmt"
	"maps"
	"net/http"
	"slices"
	"strconv"
	"strings"

	"coppice/internal/typo"
	"coppice/internal/xapi"
)

// authParams are the parameters that every handler with a session takes.
var authParams = []string{"session_id", "task_id", "subtask_of"}

// checked is a handler that takes the given parameters, and switches, which are
// true or false. A request is refused that has another one in its query that is
// nearly one of these, or a switch that is neither: ignored, as parameters are
// that nobody knows, bas= would make a whole export of a difference. So are an empty
// base=, which would do the same, and a body that is a part of something, which would
// be taken for the whole.
func checked(h handler, names []string, switches ...string) handler {
	known := slices.Concat(authParams, names, switches)
	return func(s *Server, w http.ResponseWriter, r *request) {
		err := cmp.Or(misspelt(r.params, known), emptyBase(r.params), partial(r.Header))
		for _, name := range switches {
			if v, ok := r.param(name); ok && err == nil {
				if _, parse := parseSwitch(v); parse != nil {
					err = badParam(name, v)
				}
			}
		}
		if err != nil {
			s.fail(w, r, s.refuseQuery(r, &statusError{http.StatusBadRequest, err}))
			return
		}
		h(s, w, r)
	}
}

// refuseQuery fails the task of a request that is refused for what it asks for, and
// returns what to tell the client.
func (s *Server) refuseQuery(r *request, why *statusError) error {
	session, release, err := s.session(r)
	if err != nil {
		return err
	}
	defer release()
	task := r.auth("task_id")
	if r.Method == http.MethodHead {
		task = "" // which waits for the transfer itself
	}
	action := strings.ToLower(r.Method) + strings.ReplaceAll(r.URL.Path, "/", "_")
	if err := s.api.RefuseTransfer(r.Context(), r.origin, session, task, action, why.Err); err != nil {
		return err
	}
	return why
}

// emptyBase refuses to take no name, often that of a variable that has not been set,
// for the name of no base.
func emptyBase(p params) error {
	if base, ok := p.param("base"); ok && base == "" {
		return xapi.NewError(xapi.ErrInvalidValue, "base", "it is empty: name a VDI, or leave base= out to get all of the disk")
	}
	return nil
}

// partial refuses a body that is a part of something, as its Content-Range says:
// RFC 9110 (14.5) asks that of those who do not put it together.
func partial(h http.Header) error {
	place := h.Get("Content-Range")
	var last, total int64
	if n, err := fmt.Sscanf(place, "bytes 0-%d/%d", &last, &total); place == "" || err == nil && n == 2 && last+1 == total {
		return nil
	}
	return xapi.NewError(xapi.ErrInvalidValue, "Content-Range", place+": an import takes all of an image. "+offsetParam+"= says where raw data that was cut goes on")
}

// misspelt returns the error for the first parameter of a query, in the order
// of their names, that is nearly a known one.
func misspelt(p params, known []string) error {
	for _, key := range slices.Sorted(maps.Keys(p.query)) {
		if slices.Contains(known, key) {
			continue
		}
		for _, name := range known {
			if typo.Nearly(key, name) {
				return xapi.NewError(xapi.ErrInvalidValue, key, "no parameter has this name; did you mean "+name+"?")
			}
		}
	}
	return nil
}

// parseSwitch parses true or false in the ways that clients write them.
func parseSwitch(v string) (bool, error) { return strconv.ParseBool(strings.ToLower(v)) }
