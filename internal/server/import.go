package server

import (
	"context"
	"io"
	"net/http"
	"strings"

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
	m, err := s.api.Import(ctx, r.origin, req)
	if err != nil {
		s.fail(w, r, err)
		return
	}
	size := m.Volume.Size()
	decode, err := planImport(r, req.Format, req.Length, size)
	if err != nil {
		s.refuse(w, r, m, err)
		return
	}
	ctx, done := either(m.Context(), ctx)
	defer done()
	s.run(ctx, w, r, m, func(ctx context.Context, conn *stream) error {
		if r.ProtoAtLeast(1, 1) && r.Header.Get("Expect") != "" {
			if _, err := conn.Write([]byte("HTTP/1.1 100 Continue\r\n\r\n")); err != nil {
				return &clientError{err}
			}
		}
		if err := begin(w, conn, head(string(m.Task), "application/octet-stream")); err != nil {
			return &clientError{err}
		}
		progress := meter{report: m.Progress}
		u := &upload{
			size:      size,
			overlay:   storage.NewOverlay(m.Volume),
			done:      progress.set,
			interrupt: conn.interrupt,
		}
		return decode(ctx, newBody(r, conn), req.Length, u)
	})
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
