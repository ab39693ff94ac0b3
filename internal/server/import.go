package server

import (
	"context"
	"errors"
	"io"
	"net/http"
	"strconv"
	"strings"

	"coppice/internal/api"
	"coppice/internal/storage"
	"coppice/internal/xapi"
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
	req.SR = r.namedSR()
	if req.Length == 0 && req.Task == "" {
		if err := s.api.CheckImport(r.Context(), r.origin, req); err != nil {
			s.fail(w, r, err)
			return
		}
		answerProbe(w)
		return
	}
	// Not the request's context: a client may close its sending side and wait.
	ctx := s.cutting
	if r.ContentLength == unknownLength && req.Task == "" {
		s.importFromFirstByte(ctx, w, r, req)
		return
	}
	in, err := s.openImport(ctx, r, req)
	if err != nil {
		s.fail(w, r, err)
		return
	}
	ctx, done := either(in.Context(), ctx)
	defer done()
	s.run(ctx, w, r, in, func(ctx context.Context, conn *stream) error {
		if err := accept(w, r, conn, string(in.Task)); err != nil {
			return &clientError{err}
		}
		return in.take(ctx, r, conn)
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
	conn, err := s.hijack(w, s.idle)
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
	in, err := s.openImport(ctx, r, req)
	if err != nil {
		s.log.Info("transfer failed", "path", r.URL.Path, "peer", r.origin.Peer, "error", err)
		if err := conn.Abort(); err != nil {
			s.log.Debug("closing the connection of a transfer", "error", err)
		}
		return
	}
	ctx, done := either(in.Context(), ctx)
	defer done()
	s.carry(ctx, conn, r, in, func(ctx context.Context, conn *stream) error {
		return in.take(ctx, r, conn)
	})
}

// incoming is an import that can begin.
type incoming struct {
	*api.Import
	decode    decoder
	length    int64  // of the body in bytes, -1 when it is not known
	encoding  string // of the body
	parent    string // what the image must be a delta to, the UUID of a VDI; "" for anything
	resumable bool
	offset    int64 // on the disk, of the start of the body
}

// Parameters of an import that go beyond XenAPI.
const (
	atomicParam = "coppice-atomic" // 1: all of it or nothing
	baseParam   = "coppice-base"   // a VDI whose contents the disk must have
	offsetParam = "coppice-offset" // where on the disk the body begins; resumable
)

// openImport opens the disk of an import and finds the decoder for its body.
// When that fails the client's task, if any, has been failed.
func (s *Server) openImport(ctx context.Context, r *request, req api.TransferRequest) (*incoming, error) {
	m, err := s.api.Import(ctx, r.origin, req)
	if err != nil {
		return nil, err
	}
	in, err := planImport(r, req, m)
	if err != nil {
		return nil, finish(m, err)
	}
	return in, nil
}

// planImport finds the decoder for a request and refuses what can be seen not
// to work.
func planImport(r *request, req api.TransferRequest, m *api.Import) (*incoming, error) {
	in := &incoming{Import: m, length: req.Length, encoding: r.Header.Get("Content-Encoding")}
	if !knownEncoding(in.encoding) {
		return nil, unknownEncoding(in.encoding)
	}
	encoded := in.encoding != "" && !strings.EqualFold(in.encoding, "identity")
	if encoded {
		in.length = -1
	}
	f, err := findFormat(req.Format)
	if err != nil {
		return nil, err
	}
	in.decode = f.decode
	_, chunked := r.param("chunked")
	if req.Format == "" {
		in.decode = readUndeclared
	}
	atomic, _ := r.param(atomicParam)
	offset, resumable := r.param(offsetParam)
	switch {
	case chunked && f.name == "raw":
		in.decode = readChunked
	case chunked:
		return nil, unknownFormat("Cannot handle chunked " + strings.ToUpper(f.name))
	case atomic != "" && atomic != "0" && atomic != "1":
		return nil, badParam(atomicParam, atomic)
	}
	if resumable {
		in.resumable = true
		in.offset, err = strconv.ParseInt(offset, 10, 64)
		if err != nil || in.offset < 0 || in.offset > max(m.Received(), 0) {
			return nil, &statusError{http.StatusConflict, badParam(offsetParam, offset)}
		}
		if f.name != "raw" || chunked || encoded || atomic == "1" || in.length < 0 {
			return nil, badParam(offsetParam, offset)
		}
	}
	if f.name == "raw" && in.length > m.Volume.Size()-in.offset {
		return nil, tooLong(req.Format, in.length, m.Volume.Size()-in.offset)
	}
	if base, ok := r.param(baseParam); ok {
		rec, err := m.Holds(baseParam, base)
		if err != nil {
			return nil, err
		}
		if rec.IsASnapshot {
			in.parent = rec.UUID
		}
	}
	if atomic == "1" {
		if err := m.Shadow(); err != nil {
			return nil, err
		}
	}
	// What an earlier upload left counts up to where this one begins.
	return in, m.Keep(min(in.offset, m.Received()))
}

// badParam refuses the value of a parameter.
func badParam(name, value string) error {
	return xapi.NewError(xapi.ErrInvalidValue, name, value)
}

// importState tells a client where it can go on with an interrupted upload of
// raw data.
func (s *Server) importState(w http.ResponseWriter, r *request) {
	session, release, err := s.session(r)
	if err != nil {
		s.fail(w, r, err)
		return
	}
	defer release()
	n, err := s.api.Received(r.Context(), r.origin, transferRequest(r, "put_import_raw_vdi", session))
	if err != nil {
		s.fail(w, r, err)
		return
	}
	w.Header().Set("Cache-Control", "no-store")
	w.Header().Set("Upload-Offset", strconv.FormatInt(n, 10))
	w.WriteHeader(http.StatusOK)
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

// answerProbe answers a request that asks only whether there could be one.
func answerProbe(w http.ResponseWriter) {
	w.Header().Set("Connection", "close")
	w.WriteHeader(http.StatusOK)
}

// keepEvery is how much of a resumable upload may have to be sent again after
// a crash of the server, in bytes. Each time costs a flush of the disk.
const keepEvery = 256 << 20

// take writes the body of r to the disk of an import.
func (in *incoming) take(ctx context.Context, r *request, conn *stream) error {
	body, release, err := decoded(in.encoding, newBody(r, conn))
	if err != nil {
		return err
	}
	defer release()
	progress := meter{report: in.Progress}
	u := &upload{
		size:      in.Volume.Size(),
		offset:    in.offset,
		overlay:   storage.NewOverlay(in.Volume),
		parent:    in.parent,
		done:      progress.set,
		interrupt: conn.interrupt,
		scratch:   in.Scratch,
	}
	u.atomic = func() error {
		if err := in.Shadow(); err != nil {
			return err
		}
		u.overlay = storage.NewOverlay(in.Volume)
		return nil
	}
	if !in.resumable {
		return in.decode(ctx, body, in.length, u)
	}
	kept := in.offset
	u.done = func(done, total int64) {
		progress.set(done, total)
		if u.stored-kept >= keepEvery && in.Keep(u.stored) == nil {
			kept = u.stored
		}
	}
	u.stored = in.offset
	if err := in.decode(ctx, body, in.length, u); err != nil {
		return errors.Join(err, in.Keep(u.stored))
	}
	return in.Keep(0)
}

// decoder reads an image from body and writes what it holds to a disk. length
// is that of the body in bytes, -1 when it is not known.
type decoder func(ctx context.Context, body io.Reader, length int64, u *upload) error
