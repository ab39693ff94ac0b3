package server

import (
	"errors"
	"net/http"

	"coppice/internal/thincli"
	"coppice/internal/xecmd"
)

// cli answers the xe client: the body of the request is its command line, and
// from then on the connection speaks the thin CLI protocol instead of HTTP.
func (s *Server) cli(w http.ResponseWriter, r *request) {
	if r.ContentLength <= 0 {
		s.fail(w, r, &statusError{http.StatusBadRequest, errors.New("a command line with its Content-Length is needed")})
		return
	}
	unlimit := s.limitBody(w, bodyTimeout)
	args, err := thincli.ReadArgs(r.Body, r.ContentLength)
	unlimit()
	if err != nil {
		s.fail(w, r, &statusError{http.StatusBadRequest, err})
		return
	}
	if l, ok := w.(*reply); ok && len(args) > 0 {
		l.call = args[0]
	}
	conn, err := s.hijack(w, 0)
	if err != nil {
		s.fail(w, r, err)
		return
	}
	defer conn.done() // package thincli closes it, in its own way
	client, err := thincli.Accept(conn.Conn, conn.r)
	if err != nil {
		s.log.Debug("xe client", "peer", r.origin.Peer, "error", err)
		return
	}
	defer client.Close()
	xecmd.Serve(s.cutting, s.api, formatNames(), r.origin, client, args)
}
