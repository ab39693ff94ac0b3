package server

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"net/http"
	"strings"

	"coppice/internal/api"
	"coppice/internal/xva"
)

// exportVM sends whole VMs as an XVA. Everything that can be wrong is found
// before the first byte. What is not compressed has an exact length, and any
// part of it can be had. A HEAD asks for the head alone.
func exportVM(metadata bool) handler {
	return func(s *Server, w http.ResponseWriter, r *request) {
		session, release, err := s.session(r)
		if err != nil {
			s.fail(w, r, err)
			return
		}
		defer release()
		req := exportVMRequest(r, session, metadata)
		if r.Method == http.MethodHead {
			req.Task = "" // which waits for the transfer itself
		}
		// Not the request's context: a client may close its sending side and wait.
		ctx := s.cutting
		x, err := s.api.ExportVM(ctx, r.origin, req)
		if err != nil {
			s.fail(w, r, err)
			return
		}
		ctx, done := either(x.Context(), ctx)
		defer done()
		out, err := planXVA(ctx, r, x)
		if err != nil {
			s.refuseExport(w, r, x, err)
			return
		}
		out.recall(&s.digests)
		s.deliver(ctx, w, r, x, out, out.xvaHead(string(x.Task)))
	}
}

// exportVMRequest collects the parameters of an export.
func exportVMRequest(r *request, session string, metadata bool) api.VMExportRequest {
	req := api.VMExportRequest{
		Session: session, Task: r.auth("task_id"), SubtaskOf: r.auth("subtask_of"), Action: "get_export", Metadata: metadata,
		Snapshots: r.flag("export_snapshots", metadata),
		State:     r.flag("preserve_power_state", false),
	}
	req.VM, _ = r.param("uuid")
	if ref, ok := r.param("ref"); ok {
		req.VM = ref
	}
	if metadata {
		req.Action = "get_export_metadata"
		req.All, req.Dom0 = r.flag("all", false), r.flag("include_dom0", false)
	}
	types, _ := r.param("excluded_device_types")
	req.Exclude = strings.Split(strings.ToLower(types), ",")
	return req
}

// flag returns a parameter that is true or false; see checked.
func (p params) flag(key string, otherwise bool) bool {
	v, ok := p.param(key)
	if !ok {
		return otherwise
	}
	on, err := parseSwitch(v)
	return err == nil && on
}

// xvaEncoding is the compression that a request asks for.
func xvaEncoding(r *request) (string, error) {
	switch v, _ := r.param("use_compression"); strings.ToLower(v) {
	case "", "false", "none":
		return "", nil
	case "true", "gzip":
		return "gzip", nil
	case "zstd":
		return "zstd", nil
	default:
		return "", badParam("use_compression", v)
	}
}

// xvaImage is an XVA whose place of every byte is decided.
type xvaImage struct {
	manifest []byte // as it stands in the archive
	disks    []xvaDisk
	tag      string
}

type xvaDisk struct {
	*download
	layout *xva.Layout
}

// planXVA plans the archive of an export and decides what is sent of it.
func planXVA(ctx context.Context, r *request, x *api.VMExport) (*outgoing, error) {
	encoding, err := xvaEncoding(r)
	if err != nil {
		return nil, err
	}
	img := &xvaImage{}
	if img.manifest, err = xva.File(xva.Manifest, x.Manifest); err != nil {
		return nil, err
	}
	hash := sha256.New()
	hash.Write(img.manifest)
	for _, disk := range x.Disks {
		d := newDownload(disk.Ref, disk.VDI, disk.Volume)
		layout, tag, err := layTar(ctx, d, disk.Name+"/", "xva 1")
		if err != nil {
			return nil, err
		}
		hash.Write([]byte(tag))
		img.disks = append(img.disks, xvaDisk{d, layout})
	}
	img.tag = `"` + hex.EncodeToString(hash.Sum(nil)[:16]) + `"`
	out := &outgoing{image: img, encoding: encoding, tag: img.tag, digest: wantsDigest(r.Header, r.auth("task_id") != "")}
	out.contentType = "application/octet-stream"
	length := img.length()
	if encoding != "" {
		length = -1
		out.tag = encodedTag(out.tag, encoding)
	}
	out.part, err = choosePart(r.Request, out.tag, length)
	return out, err
}

// xvaHead is the head of the reply. A compressed archive is a file of its own
// and no content coding; it ends where the connection does.
func (o *outgoing) xvaHead(task string) []byte {
	more := []string{`content-disposition: attachment; filename="export.xva"`, "ETag: " + o.tag}
	more = append(more, o.reprDigest()...)
	switch {
	case o.status == http.StatusNotModified:
	case o.to < 0:
		more = append(more, "Accept-Ranges: none")
	default:
		more = append(more, o.place()...)
	}
	return head(o.status, task, o.contentType, more...)
}

func (a *xvaImage) length() int64 {
	n := int64(len(a.manifest) + len(xva.Trailer()))
	for _, d := range a.disks {
		n += d.layout.Length()
	}
	return n
}

func (a *xvaImage) etag() string { return a.tag }

func (a *xvaImage) send(ctx context.Context, w *window, done func(int64)) error {
	if _, err := w.Write(a.manifest); err != nil {
		return err
	}
	done(w.pos)
	for _, d := range a.disks {
		switch n := d.layout.Length(); {
		case w.pos >= w.to:
			return nil
		case !w.needs(w.pos, n):
			w.skip(n)
		default:
			if err := sendTar(ctx, w, done, d.download, d.layout); err != nil {
				return err
			}
		}
	}
	if _, err := w.Write(xva.Trailer()); err != nil {
		return err
	}
	done(w.pos)
	return nil
}
