package server

import (
	"context"
	"io"
	"net/http"
	"strings"

	"coppice/internal/api"
	"coppice/internal/storage"
)

// importRawVDI writes the body onto a VDI. The 200 goes out before the body is
// read, because clients wait for it; what becomes of the transfer is said by
// its task, and by the connection, which is reset when it failed. What was
// written before a failure stays, and the import may simply be repeated.
//
// A request with an empty body and without a task is a probe: it is answered
// as the transfer would be, and touches nothing.
func (s *Server) importRawVDI(w http.ResponseWriter, r *request) {
	session, release, err := s.session(r)
	if err != nil {
		s.fail(w, r, err)
		return
	}
	defer release()
	req := transferRequest(r, "put_import_raw_vdi", session)
	req.Length = bodyLength(r)
	for _, key := range []string{"sr_id", "sr_uuid"} {
		if sr, ok := r.param(key); ok && req.SR == "" {
			req.SR = sr
		}
	}
	if req.Length == 0 && req.Task == "" {
		if err := s.api.CheckImport(r.Context(), r.origin, req); err != nil {
			s.fail(w, r, err)
			return
		}
		w.Header().Set("Connection", "close")
		w.WriteHeader(http.StatusOK)
		return
	}
	// Not the request's context: a client may close its sending side and wait.
	ctx := s.cutting
	if r.ContentLength == unknownLength && req.Task == "" {
		s.importFromFirstByte(ctx, w, r, req)
		return
	}
	m, decode, err := s.openImport(ctx, r, req)
	if err != nil {
		s.fail(w, r, err)
		return
	}
	ctx, done := either(m.Context(), ctx)
	defer done()
	s.run(ctx, w, r, m, func(ctx context.Context, conn *stream) error {
		if err := accept(w, r, conn, string(m.Task)); err != nil {
			return &clientError{err}
		}
		return takeIn(ctx, r, conn, m, decode, req.Length)
	})
}

// importFromFirstByte carries out an import that may be a probe without being
// an empty one: a client that does not know the length of its data announces
// the same 1 PiB when it only asks, and cuts the connection when it is
// answered. The request that follows at once must find the disk free, so this
// one takes the disk only when there is a body. What it fails with then shows
// in the connection alone.
func (s *Server) importFromFirstByte(ctx context.Context, w http.ResponseWriter, r *request, req api.TransferRequest) {
	if err := s.api.CheckImport(ctx, r.origin, req); err != nil {
		s.fail(w, r, err)
		return
	}
	conn, err := s.hijack(w, 0)
	if err != nil {
		s.fail(w, r, err)
		return
	}
	defer context.AfterFunc(ctx, conn.interrupt)()
	err = accept(w, r, conn, "")
	if err == nil {
		_, err = conn.r.Peek(1)
	}
	if err != nil {
		if err := conn.Close(); err != nil {
			s.log.Debug("closing the connection of a probe", "error", err)
		}
		return
	}
	m, decode, err := s.openImport(ctx, r, req)
	if err != nil {
		s.log.Info("transfer failed", "path", r.URL.Path, "peer", r.origin.Peer, "error", err)
		if err := conn.Abort(); err != nil {
			s.log.Debug("closing the connection of a transfer", "error", err)
		}
		return
	}
	ctx, done := either(m.Context(), ctx)
	defer done()
	s.carry(ctx, conn, r, m, func(ctx context.Context, conn *stream) error {
		return takeIn(ctx, r, conn, m, decode, req.Length)
	})
}

// openImport opens the disk of an import and finds the decoder for its body.
// When that fails the client's task, if any, has been failed.
func (s *Server) openImport(ctx context.Context, r *request, req api.TransferRequest) (*api.Import, decoder, error) {
	m, err := s.api.Import(ctx, r.origin, req)
	if err != nil {
		return nil, nil, err
	}
	decode, err := planImport(r, req.Format, req.Length, m.Volume.Size())
	if err != nil {
		return nil, nil, finish(m, err)
	}
	return m, decode, nil
}

// accept answers an import that has not sent its body.
func accept(w http.ResponseWriter, r *request, conn *stream, task string) error {
	if r.ProtoAtLeast(1, 1) && r.Header.Get("Expect") != "" {
		if _, err := conn.Write([]byte("HTTP/1.1 100 Continue\r\n\r\n")); err != nil {
			return err
		}
	}
	return begin(w, conn, http.StatusOK, head(http.StatusOK, task, "application/octet-stream"))
}

// takeIn writes the body of r to the disk of an import.
func takeIn(ctx context.Context, r *request, conn *stream, m *api.Import, decode decoder, length int64) error {
	progress := meter{report: m.Progress}
	u := &upload{
		size:      m.Volume.Size(),
		overlay:   storage.NewOverlay(m.Volume),
		done:      progress.set,
		interrupt: conn.interrupt,
		scratch:   m.Scratch,
	}
	return decode(ctx, newBody(r, conn), length, u)
}

// decoder reads an image from body and writes what it holds to a disk. length
// is that of the body in bytes, -1 when it is not known.
type decoder func(ctx context.Context, body io.Reader, length int64, u *upload) error

// planImport finds the decoder for a request and refuses what can be seen not
// to work.
func planImport(r *request, name string, length, size int64) (decoder, error) {
	f, err := findFormat(name)
	if err != nil {
		return nil, err
	}
	if f.decode == nil {
		return nil, notBuilt("import", f)
	}
	_, chunked := r.param("chunked")
	switch {
	case chunked && f.name == "raw":
		return readChunked, nil
	case chunked:
		return nil, unknownFormat("Cannot handle chunked " + strings.ToUpper(f.name))
	case f.name == "raw" && length > size:
		return nil, badBody("%d bytes do not fit a disk of %d bytes", length, size)
	}
	return f.decode, nil
}
