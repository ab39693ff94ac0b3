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
// that nobody knows, bas= would make a whole export of a difference. So is a body
// that is a part of something, which would be taken for the whole.
func checked(h handler, names []string, switches ...string) handler {
	known := slices.Concat(authParams, names, switches)
	return func(s *Server, w http.ResponseWriter, r *request) {
		err := cmp.Or(misspelt(r.params, known), partial(r.Header))
		for _, name := range switches {
			if v, ok := r.param(name); ok && err == nil {
				if _, parse := parseSwitch(v); parse != nil {
					err = badParam(name, v)
				}
			}
		}
		if err != nil {
			s.fail(w, r, &statusError{http.StatusBadRequest, err})
			return
		}
		h(s, w, r)
	}
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
