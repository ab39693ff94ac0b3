package remote

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"hash"
	"html"
	"io"
	"net/http"
	"net/url"
	"regexp"
	"strconv"
	"strings"
	"time"

	"coppice/internal/rpc"
)

// Disk is a VDI of a server.
type Disk struct {
	UUID        string
	Label       string
	Description string
	Size        int64 // bytes
	Snapshot    bool  // so its contents stay what they are
}

// Disk looks a VDI up by its uuid or reference.
func (c *Client) Disk(ctx context.Context, vdi string) (d Disk, err error) {
	var ref any = vdi
	if !strings.HasPrefix(vdi, "OpaqueRef:") {
		if ref, err = c.Call(ctx, "VDI.get_by_uuid", vdi); err != nil {
			return d, err
		}
	}
	v, err := c.Call(ctx, "VDI.get_record", ref)
	if err != nil {
		return d, err
	}
	rec, _ := v.(map[string]any)
	d.UUID, _ = rec["uuid"].(string)
	d.Label, _ = rec["name_label"].(string)
	d.Description, _ = rec["name_description"].(string)
	d.Snapshot, _ = rec["is_a_snapshot"].(bool)
	switch n := rec["virtual_size"].(type) {
	case int64:
		d.Size = n
	case string:
		d.Size, err = strconv.ParseInt(n, 10, 64)
	}
	if err != nil || d.Size <= 0 || d.UUID == "" {
		return d, &ProtocolError{errors.New("the record of the VDI has no uuid or no size")}
	}
	return d, nil
}

// StatusError is the answer to a request for an image that is no image.
type StatusError struct {
	Status int
	Host   string // that a redirection leads to which is not followed, "" when it is none
}

func (e *StatusError) Error() string {
	if e.Host != "" {
		return "the disk is to be had from the host " + e.Host
	}
	return fmt.Sprintf("status %d %s", e.Status, http.StatusText(e.Status))
}

// Export is the image of a disk that a server sends. It is read once, by one
// goroutine, and must be ended with Finish or Close.
type Export struct {
	Length int64 // bytes, -1 when it is not known
	Exact  bool  // the server is one of ours: a delta is the difference, and names its parent

	c        *Client
	task     string // at the server
	body     io.ReadCloser
	hash     hash.Hash
	received int64
	open     bool // the body ends with the connection
}

// Export asks for the image of a disk, given by uuid, in a format; with a base
// only for what differs from that. The request and the reading end with ctx.
// The error is one that Call has, or a [*StatusError]; where the server says
// more, that.
func (c *Client) Export(ctx context.Context, vdi, base, format string) (*Export, error) {
	creating, created := lingering(ctx)
	v, err := c.Call(creating, "task.create", "Pull of VDI "+vdi, "")
	created()
	if err != nil {
		return nil, err
	}
	x := &Export{c: c, hash: sha256.New()}
	x.task, _ = v.(string)
	query := url.Values{"vdi": {vdi}, "format": {format}, "task_id": {x.task}}
	if base != "" {
		query.Set("base", base)
	}
	resp, err := c.fetch(ctx, query)
	if err != nil {
		return nil, x.Finish(ctx, err)
	}
	x.body, x.Length = resp.Body, resp.ContentLength
	x.open = resp.ContentLength < 0 && len(resp.TransferEncoding) == 0
	x.Exact = resp.Header.Get("Coppice-Basis") == "exact"
	if resp.StatusCode != http.StatusOK {
		return nil, x.refused(ctx, resp)
	}
	if coding := resp.Header.Get("Content-Encoding"); coding != "" && coding != "identity" {
		return nil, x.Finish(ctx, &ProtocolError{fmt.Errorf("the image comes with the content coding %q, which nobody asked for", coding)})
	}
	return x, nil
}

// exportPath is where images are asked for.
const exportPath = "/export_raw_vdi"

// fetch asks for an image, of the host that was named or those that it leads
// to.
func (c *Client) fetch(ctx context.Context, query url.Values) (*http.Response, error) {
	at := c.data
	at.Path, at.RawQuery = exportPath, query.Encode()
	for hop := 0; ; hop++ {
		req, err := http.NewRequestWithContext(ctx, http.MethodGet, at.String(), nil)
		if err != nil {
			return nil, &ProtocolError{errors.New("no URL can be made of the host")}
		}
		req.Header.Set("Cookie", "session_id="+c.session)
		resp, err := c.do(req)
		if err != nil {
			return nil, err
		}
		next, ok := c.elsewhere(resp)
		if !ok || hop == maxHops {
			return resp, nil
		}
		resp.Body.Close()
		at.Scheme, at.Host = next.Scheme, next.Host
	}
}

// elsewhere returns the other host that an answer to a request for an image
// leads to: for the same, not in the clear if that was not so before, and at the
// port that was named or that of the scheme.
func (c *Client) elsewhere(resp *http.Response) (*url.URL, bool) {
	to, err := resp.Location()
	if err != nil || resp.StatusCode/100 != 3 || strings.TrimSuffix(to.Path, "/") != exportPath {
		return nil, false
	}
	at, err := parseURL((&url.URL{Scheme: to.Scheme, User: to.User, Host: to.Host}).String(), c.data.Scheme == "http")
	if err != nil || at.Port() != c.data.Port() && at.Port() != usualPort(at.Scheme) {
		return nil, false
	}
	return at, true
}

// maxPage is how much of an answer that is no image is read for what it says.
const maxPage = 16 << 10

// pageReason finds in a page of xapi which error it is about: a code and its
// parameters, CODE: [ p1; p2 ].
var pageReason = regexp.MustCompile(`\b([A-Z][A-Z0-9_]{3,}): \[ ?(.*?) ?\]`)

// refused ends an export that is answered with something else than an image: a
// redirection that is not followed, or an error, of which the page may say more
// than the task, which some servers then leave alone.
func (x *Export) refused(ctx context.Context, resp *http.Response) error {
	refused := &StatusError{Status: resp.StatusCode}
	if to, err := resp.Location(); err == nil {
		refused.Host = to.Host
		x.Close(ctx) // nobody works on it
		return refused
	}
	late := time.AfterFunc(reasonTime, func() { resp.Body.Close() })
	page, _ := io.ReadAll(io.LimitReader(resp.Body, maxPage)) // what has come is looked at
	late.Stop()
	says := pageReason.FindStringSubmatch(html.UnescapeString(string(page)))
	if says == nil {
		return x.Finish(ctx, refused)
	}
	f := &rpc.Fault{Code: says[1]}
	if says[2] != "" {
		f.Params = strings.Split(says[2], "; ")
	}
	x.Close(ctx)
	return f
}

// lingering returns a context that ends partingTime after ctx does, for what
// has to be known in order to be taken back. The function must be called.
func lingering(ctx context.Context) (context.Context, func()) {
	late, cancel := context.WithCancelCause(context.WithoutCancel(ctx))
	stop := context.AfterFunc(ctx, func() {
		time.AfterFunc(partingTime, func() { cancel(context.Cause(ctx)) })
	})
	return late, func() {
		stop()
		cancel(nil)
	}
}

// Close ends the export without asking how it went, also when ctx has ended.
func (x *Export) Close(ctx context.Context) {
	if x.body != nil {
		x.body.Close() // which cuts what has not come to its end
	}
	x.leave(ctx)
}

// leave has the server end the task, for which no request may have reached it,
// and remove it.
func (x *Export) leave(ctx context.Context) { x.part(ctx, "task.cancel", "task.destroy") }

// part sends last messages about the task, also when ctx has ended.
func (x *Export) part(ctx context.Context, methods ...string) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), partingTime)
	defer cancel()
	for _, method := range methods {
		_, _ = x.c.Call(ctx, method, x.task) // nothing follows from it
	}
}

// Received returns how many bytes of the image have been read.
func (x *Export) Received() int64 { return x.received }

func (x *Export) Read(p []byte) (int, error) {
	n, err := x.body.Read(p)
	x.received += int64(n)
	x.hash.Write(p[:n])
	if x.open && errors.Is(err, io.ErrUnexpectedEOF) {
		// TLS that was not ended in order. Whether all has come is said by the
		// image, and by the task.
		err = io.EOF
	}
	return n, err
}

// How long a server gets to say how an export went, or to hear that nobody
// wants to know, and how often it is asked.
const (
	settleTime            = time.Minute
	partingTime           = time.Second
	reasonTime            = 3 * time.Second
	settleMin, settlePoll = 2 * time.Millisecond, time.Second
)

// Finish ends the export. With err nil the image has been read to its end as
// its format has it, and Finish finds out whether the server agrees that it was
// all, and whether it has sent what has come. Else it returns err, or in its
// place what the server says about it.
func (x *Export) Finish(ctx context.Context, err error) error {
	if err == nil {
		err = x.ended()
	}
	if x.body != nil {
		x.body.Close() // which cuts what has not come to its end
	}
	if ctx.Err() != nil {
		x.leave(ctx)
		return context.Cause(ctx)
	}
	limit := settleTime
	if err != nil {
		limit = reasonTime
	}
	asking, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	told := x.settle(asking)
	f, says := errors.AsType[*rpc.Fault](told)
	switch {
	case err == nil:
		return told
	case says && f.Code != "CLIENT_ERROR": // which is that we hung up
		return f
	}
	return err
}

// ended checks that nothing comes after the image.
func (x *Export) ended() error {
	switch n, err := io.ReadFull(x, make([]byte, 1)); {
	case n > 0:
		return errors.New("more bytes than the image has")
	case err != io.EOF:
		return err
	}
	return nil
}

// settle waits until the task of the export has ended, removes it, and returns
// what it failed with.
func (x *Export) settle(ctx context.Context) error {
	for pause := settleMin; ; pause = min(2*pause, settlePoll) {
		v, err := x.c.Call(ctx, "task.get_record", x.task)
		if err != nil {
			x.leave(ctx)
			return &ProtocolError{fmt.Errorf("the server does not say how the export went: %w", err)}
		}
		task, _ := v.(map[string]any)
		status, _ := task["status"].(string)
		if status == "pending" || status == "cancelling" {
			t := time.NewTimer(pause)
			select {
			case <-t.C:
				continue
			case <-ctx.Done():
				t.Stop()
				x.leave(ctx)
				return &ProtocolError{errors.New("the server does not say how the export went")}
			}
		}
		x.part(ctx, "task.destroy")
		if status == "success" {
			return x.verify(task)
		}
		return faultOf(status, task)
	}
}

// faultOf is what a task failed with.
func faultOf(status string, task map[string]any) error {
	info, _ := task["error_info"].([]any)
	if len(info) == 0 {
		return &ProtocolError{fmt.Errorf("the export is %q", status)}
	}
	f := &rpc.Fault{Code: fmt.Sprint(info[0])}
	for _, p := range info[1:] {
		f.Params = append(f.Params, fmt.Sprint(p))
	}
	return f
}

// verify compares what has come with what the server says that it sent, if it
// does.
func (x *Export) verify(task map[string]any) error {
	notes, _ := task["other_config"].(map[string]any)
	if sent, ok := notes["coppice:sha256"].(string); ok && sent != hex.EncodeToString(x.hash.Sum(nil)) {
		return errors.New("the image is not the one that was sent: its SHA-256 is another")
	}
	return nil
}
