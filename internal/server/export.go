package server

import (
	"context"
	"fmt"
	"io"
	"iter"
	"net/http"
	"strconv"

	"coppice/internal/api"
	"coppice/internal/storage"
	"coppice/internal/xapi"
)

// exportRawVDI sends the contents of a VDI as they are at one instant, in the
// format asked for; with a base only what differs from that. Everything that
// can be wrong is found before the first byte, and the length is exact.
func (s *Server) exportRawVDI(w http.ResponseWriter, r *request) {
	session, release, err := s.session(r)
	if err != nil {
		s.fail(w, r, err)
		return
	}
	defer release()
	req := transferRequest(r, "get_export_raw_vdi", session)
	req.Base, _ = r.param("base")
	// Not the request's context: a client may close its sending side and wait.
	ctx := s.cutting
	x, err := s.api.Export(ctx, r.origin, req)
	if err != nil {
		s.fail(w, r, err)
		return
	}
	ctx, done := either(x.Context(), ctx)
	defer done()
	f, img, err := planExport(ctx, req.Format, x)
	if err != nil {
		s.refuse(w, r, x, err)
		return
	}
	s.run(ctx, w, r, x, func(ctx context.Context, conn *stream) error {
		total := img.length()
		err := begin(w, conn, head(string(x.Task), f.contentType,
			fmt.Sprintf(`content-disposition: attachment; filename="%s.%s"`, x.VDI.UUID, f.name),
			"Content-Length: "+strconv.FormatInt(total, 10)))
		if err != nil {
			return &clientError{err}
		}
		m := meter{report: x.Progress}
		return img.send(ctx, toClient{conn}, func(done int64) { m.set(done, total) })
	})
}

// planExport finds the format and plans the image of an opened VDI.
func planExport(ctx context.Context, name string, x *api.Export) (format, image, error) {
	f, err := findFormat(name)
	if err != nil {
		return format{}, nil, err
	}
	if f.encode == nil {
		return format{}, nil, notBuilt("export", f)
	}
	d := &download{ref: string(x.Ref), vdi: x.VDI, volume: x.Volume, baseVDI: x.BaseVDI, base: x.Base}
	d.extents = func(ctx context.Context) iter.Seq2[storage.Extent, error] {
		return x.Volume.Extents(ctx, 0, x.Volume.Size())
	}
	if d.base != nil {
		differ, ok := x.Repo.(storage.Differ)
		if !ok {
			return format{}, nil, xapi.NewError(xapi.ErrSROperationNotSupported, string(x.VDI.SR))
		}
		d.extents = func(ctx context.Context) iter.Seq2[storage.Extent, error] {
			return differ.Diff(ctx, x.Base, x.Volume, 0)
		}
	}
	img, err := f.encode(ctx, d)
	return f, img, err
}

// clientError is the failure of a connection while something is sent.
type clientError struct{ err error }

func (e *clientError) Error() string { return "sending to the client: " + e.err.Error() }
func (e *clientError) Unwrap() error { return e.err }

// toClient marks its errors as those of the client's connection.
type toClient struct{ w io.Writer }

func (t toClient) Write(p []byte) (int, error) {
	n, err := t.w.Write(p)
	if err != nil {
		err = &clientError{err}
	}
	return n, err
}
