package server

import (
	"errors"
	"net/http"

	"coppice/internal/api"
	"coppice/internal/xapi"
)

// vmTransfer answers the transfer of a whole VM, which is not built, as
// everything that is not: session and role are checked, and the client's task
// fails with NOT_IMPLEMENTED.
func vmTransfer(action, what string) handler {
	return func(s *Server, w http.ResponseWriter, r *request) {
		session, release, err := s.session(r)
		if err != nil {
			s.fail(w, r, err)
			return
		}
		defer release()
		req := api.TransferRequest{Session: session, Task: r.auth("task_id"), SubtaskOf: r.auth("subtask_of"), Action: action}
		err = s.api.RefuseTransfer(s.cutting, r.origin, req, what)
		if e, ok := errors.AsType[*xapi.Error](err); ok && e.Code == xapi.ErrNotImplemented {
			err = &statusError{http.StatusNotImplemented, err}
		}
		s.fail(w, r, err)
	}
}
