package server

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strconv"
	"time"

	"coppice/internal/api"
	"coppice/internal/xapi"
)

// auditLog sends the audit log as it is now, with the parameter since from its
// first entry that is not older, with what a rotation has renamed away.
func (s *Server) auditLog(w http.ResponseWriter, r *request) {
	session, release, err := s.session(r)
	if err != nil {
		s.fail(w, r, err)
		return
	}
	defer release()
	x, err := s.api.ExportLog(s.cutting, r.origin, api.LogRequest{
		Session: session, Task: r.auth("task_id"), SubtaskOf: r.auth("subtask_of"), Action: "get_audit_log", Label: "Audit log",
	})
	if err != nil {
		s.fail(w, r, err)
		return
	}
	// Not the request's context: a client may close its sending side and wait.
	ctx, done := either(x.Context(), s.cutting)
	defer done()
	log, length, err := s.openAuditLog(ctx, r)
	if err != nil {
		s.refuse(w, r, x, err)
		return
	}
	defer func() { _ = log.Close() }() // only read from
	s.run(ctx, w, r, x, func(ctx context.Context, conn *stream) error {
		lines := []string{"Content-Length: " + strconv.FormatInt(length, 10)}
		if err := begin(w, conn, http.StatusOK, head(http.StatusOK, string(x.Task), "text/plain; charset=utf-8", lines...)); err != nil {
			return &clientError{err}
		}
		return log.send(ctx, toClient{conn})
	})
}

// openAuditLog opens the log where a request wants it to begin, and says how
// many bytes there are from there.
func (s *Server) openAuditLog(ctx context.Context, r *request) (_ auditLogs, length int64, err error) {
	if s.audit == nil {
		return nil, 0, &statusError{http.StatusNotFound, xapi.NewError(xapi.ErrOperationNotAllowed,
			"This server keeps no audit log; it does with serve --audit-log")}
	}
	var since time.Time
	if text, ok := r.param("since"); ok && text != "" {
		if since, err = xapi.ParseTime(text); err != nil {
			return nil, 0, &statusError{http.StatusBadRequest, xapi.NewError(xapi.ErrInvalidValue, "since", text)}
		}
	}
	logs, err := openAuditLogs(s.audit.file.path)
	if err != nil {
		return nil, 0, fmt.Errorf("audit log: %w", err)
	}
	if length, err = logs.since(ctx, since); err != nil {
		return nil, 0, errors.Join(err, logs.Close())
	}
	return logs, length, nil
}

// entriesSince returns where the first entry begins that is not older than a
// time, the end for none. Entries are in the order of their times.
func entriesSince(ctx context.Context, log io.Reader, since time.Time) (at int64, err error) {
	lines := bufio.NewReaderSize(log, 64<<10)
	whole := true // the piece begins a line
	for {
		piece, err := lines.ReadSlice('\n')
		if whole && entryTime(piece).Compare(since) >= 0 {
			return at, nil
		}
		at += int64(len(piece))
		whole = err == nil
		switch {
		case errors.Is(err, io.EOF):
			return at, nil
		case err != nil && !errors.Is(err, bufio.ErrBufferFull):
			return 0, err
		case ctx.Err() != nil:
			return 0, context.Cause(ctx)
		}
	}
}

// entryTime returns when an entry was written, the zero time for what is none.
func entryTime(line []byte) time.Time {
	rest, ok := bytes.CutPrefix(line, []byte(`{"time":"`))
	if !ok {
		return time.Time{}
	}
	text, _, _ := bytes.Cut(rest, []byte(`"`))
	t, err := time.Parse(time.RFC3339Nano, string(text))
	if err != nil {
		return time.Time{}
	}
	return t
}
