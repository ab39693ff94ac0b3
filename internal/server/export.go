package server

import (
	"context"
	"errors"
	"fmt"
	"io"
	"iter"
	"net/http"
	"strconv"
	"strings"

	"coppice/internal/api"
	"coppice/internal/storage"
	"coppice/internal/xapi"
)

// exportRawVDI sends the contents of a VDI as they are at one instant, in the
// format asked for; with a base only what differs from that. Everything that
// can be wrong is found before the first byte. Uncompressed images have an
// exact length, and any part of them can be had: the same bytes every time, as
// their entity tag says. A HEAD asks for the head alone.
func (s *Server) exportRawVDI(w http.ResponseWriter, r *request) {
	session, release, err := s.session(r)
	if err != nil {
		s.fail(w, r, err)
		return
	}
	defer release()
	req := transferRequest(r, "get_export_raw_vdi", session)
	req.Base, _ = r.param("base")
	if r.Method == http.MethodHead {
		req.Task = "" // which waits for the transfer itself
	}
	// Not the request's context: a client may close its sending side and wait.
	ctx := s.cutting
	x, err := s.api.Export(ctx, r.origin, req)
	if err != nil {
		s.fail(w, r, err)
		return
	}
	ctx, done := either(x.Context(), ctx)
	defer done()
	out, err := planExport(ctx, r, req.Format, x)
	if err != nil {
		s.refuseExport(w, r, x, err)
		return
	}
	out.recall(&s.digests)
	s.deliver(ctx, w, r, x, out, out.head(string(x.Task), x.VDI.UUID))
}

// refuseExport refuses an export that cannot be planned.
func (s *Server) refuseExport(w http.ResponseWriter, r *request, x transfer, err error) {
	if e, ok := errors.AsType[*rangeError](err); ok {
		w.Header().Set("Content-Range", fmt.Sprintf("bytes */%d", e.length))
		err = &statusError{http.StatusRequestedRangeNotSatisfiable, xapi.NewError(xapi.ErrInvalidValue, "Range", e.spec)}
	}
	s.refuse(w, r, x, err)
}

// deliver sends what has been planned, unless only the head is wanted.
func (s *Server) deliver(ctx context.Context, w http.ResponseWriter, r *request, x described, out *outgoing, head []byte) {
	s.run(ctx, w, r, x, func(ctx context.Context, conn *stream) error {
		if err := begin(w, conn, out.status, head); err != nil {
			return &clientError{err}
		}
		if r.Method == http.MethodHead || out.status == http.StatusNotModified {
			return nil
		}
		return out.send(ctx, conn, x)
	})
}

// outgoing is a planned reply to an export.
type outgoing struct {
	format
	image
	*download
	part
	encoding string // of the body: "", zstd or gzip
	tag      string
	chunked  bool
	digest   bool     // of the body is wanted
	digests  *digests // of what has been sent before
	known    []byte   // that of the representation, nil when it is not known
}

// recall looks up whether the representation has been sent before.
func (o *outgoing) recall(d *digests) { o.digests, o.known = d, d.get(o.tag) }

// whole tells whether the body is all of the representation.
func (o *outgoing) whole() bool { return o.from == 0 && (o.to < 0 || o.to == o.length()) }

// planExport finds the format, plans the image of an opened VDI and decides
// what is sent of it.
func planExport(ctx context.Context, r *request, name string, x *api.Export) (*outgoing, error) {
	f, err := findFormat(name)
	if err != nil {
		return nil, err
	}
	d := newDownload(x.Ref, x.VDI, x.Volume)
	if x.Base != nil {
		if f.fullOnly {
			return nil, wholeOnly(f)
		}
		differ, ok := x.Repo.(storage.Differ)
		if !ok {
			return nil, xapi.NewError(xapi.ErrSROperationNotSupported, string(x.VDI.SR))
		}
		d.baseVDI, d.base = x.BaseVDI, x.Base
		d.extents = func(ctx context.Context) iter.Seq2[storage.Extent, error] {
			return differ.Diff(ctx, x.Base, x.Volume, 0)
		}
	}
	img, err := f.encode(ctx, d)
	if err != nil {
		return nil, err
	}
	out := &outgoing{format: f, image: img, download: d, tag: img.etag(), digest: wantsDigest(r.Header, r.auth("task_id") != "")}
	length := img.length()
	if f.name == "raw" {
		if out.encoding = acceptedEncoding(r.Request); out.encoding != "" {
			length = -1
			out.tag = encodedTag(out.tag, out.encoding)
		}
	}
	if out.chunked = length < 0 && r.ProtoAtLeast(1, 1); out.chunked {
		out.digest = wantsDigest(r.Header, true)
	}
	out.part, err = choosePart(r.Request, out.tag, length)
	return out, err
}

// encodedTag is the tag of what the coding makes of an image with that tag.
func encodedTag(tag, coding string) string {
	return strings.TrimSuffix(tag, `"`) + "-" + coding + `"`
}

// head is the head of the reply.
func (o *outgoing) head(task, uuid string) []byte {
	more := []string{
		fmt.Sprintf(`content-disposition: attachment; filename="%s.%s"`, uuid, o.format.name),
		"ETag: " + o.tag,
		"Coppice-Basis: exact",
		"Coppice-Virtual-Size: " + strconv.FormatInt(o.volume.Size(), 10),
	}
	if o.base != nil {
		more = append(more, "Coppice-Changed-Bytes: "+strconv.FormatInt(o.bytes, 10))
	}
	more = append(more, o.reprDigest()...)
	switch {
	case o.status == http.StatusNotModified:
	case o.to < 0:
		more = append(more, "Accept-Ranges: none")
		if o.encoding != "" {
			more = append(more, "Content-Encoding: "+o.encoding, "Vary: Accept-Encoding")
		}
		if o.chunked {
			more = append(more, "Transfer-Encoding: chunked")
			if o.digest {
				more = append(more, "Trailer: Content-Digest")
			}
		}
	default:
		more = append(more, o.place()...)
	}
	return head(o.status, task, o.contentType, more...)
}

// reprDigest is the line of the head with the digest of the representation, of
// which a part may be sent, if it is known.
func (o *outgoing) reprDigest() []string {
	if o.known == nil || o.status == http.StatusNotModified {
		return nil
	}
	return []string{digestField("Repr-Digest", o.known)}
}

// place are the lines of the head that say which bytes are sent, of a reply
// with a length.
func (o *outgoing) place() []string {
	lines := []string{"Accept-Ranges: bytes", "Content-Length: " + strconv.FormatInt(o.to-o.from, 10)}
	if o.status == http.StatusPartialContent {
		lines = append(lines, fmt.Sprintf("Content-Range: bytes %d-%d/%d", o.from, o.to-1, o.length()))
	}
	return lines
}

// described is a transfer whose task takes notes.
type described interface {
	transfer
	Describe(key, value string)
}

// send sends the body, and notes its SHA-256 in the task if that is wanted.
func (o *outgoing) send(ctx context.Context, conn *stream, x described) error {
	body, finish, err := o.body(toClient{conn})
	if err != nil {
		return err
	}
	w := whole(body)
	total := o.length()
	if o.to >= 0 {
		w.from, w.to = o.from, o.to
		total = o.to
	} else if total < 0 {
		total = o.volume.Size()
	}
	m := meter{report: x.Progress}
	err = o.image.send(ctx, w, func(done int64) { m.set(done-w.from, total-w.from) })
	sum, end := finish(err == nil)
	if err == nil {
		err = end
	}
	if err == nil && o.digest {
		x.Describe(sha256Key, sumText(sum))
		if o.whole() && o.known == nil {
			o.digests.put(o.tag, sum)
		}
	}
	return err
}

// body puts what a body needs between the image and the client: from the
// inside its encoding, the hash and the framing. finish ends them, in order if
// all of the image was written, and returns the hash of the encoded body, nil
// when no digest is wanted. One that is known is not computed again.
func (o *outgoing) body(conn io.Writer) (body io.Writer, finish func(complete bool) ([]byte, error), err error) {
	body = conn
	var frames *chunkedBody
	if o.chunked {
		frames = newChunkedBody(conn)
		body = frames
	}
	sum := func() []byte { return nil }
	switch {
	case o.digest && o.whole() && o.known != nil:
		sum = func() []byte { return o.known }
	case o.digest:
		hash := newHashed(body)
		body, sum = hash, hash.sum
	}
	end := func() error { return nil }
	if o.encoding != "" {
		enc, err := encoder(o.encoding, body)
		if err != nil {
			sum()
			return nil, nil, err
		}
		body, end = enc, enc.Close
	}
	return body, func(complete bool) ([]byte, error) {
		err := end() // of an encoder that failed it only ends its goroutines
		sum := sum()
		if err == nil && complete && frames != nil {
			trailer := ""
			if sum != nil {
				trailer = digestField("Content-Digest", sum) + "\r\n"
			}
			err = frames.end(trailer)
		}
		return sum, err
	}, nil
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
