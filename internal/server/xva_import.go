package server

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"io"
	"net/http"
	"strings"

	"coppice/internal/api"
	"coppice/internal/storage"
	"coppice/internal/xapi"
	"coppice/internal/xva"
)

// importVM takes an XVA, compressed or not, and makes its VMs: all of them or
// nothing. The 200 goes out before the body is read; what becomes of the
// import is said by its task, and by the connection, which is reset when it
// failed. A request with an empty body and without a task is a probe.
func importVM(metadata bool) handler {
	return func(s *Server, w http.ResponseWriter, r *request) {
		session, release, err := s.session(r)
		if err != nil {
			s.fail(w, r, err)
			return
		}
		defer release()
		req := importVMRequest(r, session, metadata)
		if bodyLength(r) == 0 && req.Task == "" {
			if err := s.api.CheckVMImport(r.origin, req); err != nil {
				s.fail(w, r, err)
				return
			}
			answerProbe(w)
			return
		}
		// Not the request's context: a client may close its sending side and wait.
		ctx := s.cutting
		x, err := s.api.ImportVM(ctx, r.origin, req)
		if err != nil {
			s.fail(w, r, err)
			return
		}
		encoding := r.Header.Get("Content-Encoding")
		if !knownEncoding(encoding) {
			s.refuse(w, r, x, unknownEncoding(encoding))
			return
		}
		ctx, done := either(x.Context(), ctx)
		defer done()
		s.run(ctx, w, r, x, func(ctx context.Context, conn *stream) error {
			if err := accept(w, r, conn, string(x.Task)); err != nil {
				return &clientError{err}
			}
			return archiveError(takeXVA(ctx, r, conn, x, req.Force), metadata)
		})
	}
}

// importVMRequest collects the parameters of an import.
func importVMRequest(r *request, session string, metadata bool) api.VMImportRequest {
	req := api.VMImportRequest{
		Session: session, Task: r.auth("task_id"), SubtaskOf: r.auth("subtask_of"), Action: "put_import", Metadata: metadata,
		Restore: r.flag("restore", false), Force: r.flag("force", false), VDIs: map[string]string{},
	}
	req.SR = r.namedSR()
	if metadata {
		req.Action, req.DryRun = "put_import_metadata", r.flag("dry_run", false)
		for key, other := range r.query {
			if old, ok := strings.CutPrefix(key, "vdi:"); ok {
				req.VDIs[old] = other
			}
		}
	}
	return req
}

// archiveError names what is wrong with an archive, or with how it came, as
// clients know it; metadata is set where an archive has nothing but a manifest.
// Every other error stays what it is.
func archiveError(err error, metadata bool) error {
	e, ok := errors.AsType[*bodyError](err)
	if !ok {
		return err
	}
	err = e.err
	if e, ok := errors.AsType[*xva.UnexpectedFileError](err); ok {
		want := e.Want
		if metadata && want != xva.Manifest {
			want = "the end of an archive of metadata alone; /import takes disks as well"
		}
		return xapi.NewError(xapi.ErrImportErrorUnexpectedFile, want, e.Found).WithCause(err)
	}
	switch {
	case errors.Is(err, xva.ErrChecksum):
		return xapi.NewError(xapi.ErrImportErrorSomeChecksumsFailed).WithCause(err)
	case errors.Is(err, io.ErrUnexpectedEOF):
		return xapi.NewError(xapi.ErrImportErrorPrematureEOF).WithCause(err)
	}
	return xapi.NewError(xapi.ErrImportError, err.Error()).WithCause(err)
}

// counter counts what is read.
type counter struct {
	io.Reader
	n int64
}

func (c *counter) Read(p []byte) (int, error) {
	n, err := c.Reader.Read(p)
	c.n += int64(n)
	return n, err
}

// compression tells by its first bytes how a file is compressed.
func compression(r *bufio.Reader) string {
	start, _ := r.Peek(4) // what is wrong with a shorter one shows later
	switch {
	case bytes.HasPrefix(start, []byte{0x1f, 0x8b}):
		return "gzip"
	case bytes.Equal(start, []byte{0x28, 0xb5, 0x2f, 0xfd}):
		return "zstd"
	}
	return ""
}

// fromBody marks what is wrong with reading as a fault of the body.
type fromBody struct{ io.Reader }

func (b fromBody) Read(p []byte) (int, error) {
	n, err := b.Reader.Read(p)
	if err != nil && err != io.EOF {
		err = &bodyError{err}
	}
	return n, err
}

// takeXVA reads an archive from the body of r and fills the disks of an
// import.
func takeXVA(ctx context.Context, r *request, conn *stream, x *api.VMImport, trust bool) error {
	b := newBody(r, conn)
	raw := &counter{Reader: b}
	plain, release, err := decoded(r.Header.Get("Content-Encoding"), raw)
	if err != nil {
		return err
	}
	defer release()
	start := bufio.NewReaderSize(plain, 64<<10)
	unpacked, end, err := decoded(compression(start), start)
	if err != nil {
		return err
	}
	defer end()
	archive, manifest, err := xva.NewArchive(unpacked)
	if err != nil {
		return &bodyError{err}
	}
	disks, err := x.Begin(fromBody{manifest})
	if err != nil {
		return err
	}
	total := b.length
	sizes, arriving := map[string]int64{}, map[string]*filling{}
	for _, d := range disks {
		sizes[d.Name+"/"], arriving[d.Name+"/"] = d.VDI.VirtualSize, &filling{ArchiveDisk: d, x: x}
		if b.length < 0 {
			total += d.VDI.VirtualSize
		}
	}
	archive.Expect(sizes, trust)
	progress := meter{report: x.Progress}
	return fill(ctx, conn, archive, arriving, func() { progress.set(min(raw.n, total), total) })
}

// filling is a disk of an archive on its way to its volume.
type filling struct {
	api.ArchiveDisk
	x       *api.VMImport
	overlay *storage.Overlay // nil until something has come
	based   bool             // begins as a relative, so that what is not in the archive becomes zero
	next    int64            // end of what has come
}

// write stores a chunk; those of a disk ascend, from its start to its end.
func (f *filling) write(ctx context.Context, data []byte, off int64) (err error) {
	if f.overlay == nil {
		if f.based, err = f.x.Base(ctx, f.Name); err != nil {
			return err
		}
		f.overlay = storage.NewOverlay(f.Volume)
	}
	if err := f.clear(ctx, off); err != nil {
		return err
	}
	if err := f.overlay.WriteAt(ctx, data, off); err != nil {
		return err
	}
	if f.next = off + int64(len(data)); f.next < f.VDI.VirtualSize {
		return nil
	}
	if err := f.clear(ctx, f.Volume.Size()); err != nil {
		return err
	}
	f.x.Arrived(f.Name)
	return nil
}

// clear makes zero what lies between what has come and a chunk at off.
func (f *filling) clear(ctx context.Context, off int64) error {
	if !f.based || off <= f.next {
		return nil
	}
	return f.overlay.Zero(ctx, f.next, off-f.next)
}

// fill writes the chunks of an archive to its disks, each one while the next
// is being received.
func fill(ctx context.Context, conn *stream, archive *xva.Reader, disks map[string]*filling, received func()) error {
	type chunk struct {
		disk *filling
		off  int64
		data []byte
	}
	buffers := make([]*chunk, writeBehind)
	for i := range buffers {
		buffers[i] = &chunk{data: make([]byte, xva.ChunkSize)}
	}
	produce := func(ctx context.Context, next func() (*chunk, error), send func(*chunk)) error {
		// When a write fails, the client may be sending nothing for long.
		defer context.AfterFunc(ctx, conn.interrupt)()
		for {
			off, data, err := archive.Next()
			if err == io.EOF {
				return nil
			}
			if err != nil {
				return &bodyError{err}
			}
			c, err := next()
			if err != nil {
				return err
			}
			c.disk, c.off = disks[archive.Disk()], off
			c.data = c.data[:copy(c.data[:xva.ChunkSize], data)]
			received()
			send(c)
		}
	}
	return relay(ctx, buffers, produce, func(c *chunk) error {
		return c.disk.write(ctx, c.data, c.off)
	})
}
