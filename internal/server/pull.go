package server

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"

	"coppice/internal/api"
	"coppice/internal/remote"
	"coppice/internal/rpc"
	"coppice/internal/storage"
	"coppice/internal/xapi"
)

// Sources reaches the servers that disks are pulled from. It is an
// [api.Sources].
type Sources struct {
	networks remote.Networks
	idle     time.Duration
}

// NewSources returns Sources in the networks, which may neither send nor take
// a byte for idle; 0 for ever.
func NewSources(networks remote.Networks, idle time.Duration) *Sources {
	return &Sources{networks, idle}
}

// Connect implements [api.Sources].
func (s *Sources) Connect(ctx context.Context, from api.Source) (api.SourceSession, error) {
	cfg := remote.Config{
		URL: from.URL, User: from.User, Password: from.Password, Session: from.Session, Insecure: from.Insecure,
		Networks: s.networks, Idle: s.idle,
	}
	if from.Fingerprints != "" {
		for text := range strings.SplitSeq(from.Fingerprints, ",") {
			f, err := remote.ParseFingerprint(text)
			if err != nil {
				return nil, badParam("remote-fingerprint", text)
			}
			cfg.Fingerprints = append(cfg.Fingerprints, f)
		}
	}
	if from.CA != "" {
		cfg.Roots = x509.NewCertPool()
		if !cfg.Roots.AppendCertsFromPEM([]byte(from.CA)) {
			return nil, badParam("remote-ca", "no certificate in PEM form")
		}
	}
	c, err := remote.Open(ctx, cfg)
	if err != nil {
		return nil, sourceError(err)
	}
	return &sourceSession{c}, nil
}

// sourceSession is an [api.SourceSession].
type sourceSession struct{ client *remote.Client }

func (s *sourceSession) Disk(ctx context.Context, vdi string) (api.SourceDisk, error) {
	d, err := s.client.Disk(ctx, vdi)
	if err != nil {
		return api.SourceDisk{}, sourceError(err)
	}
	return api.SourceDisk(d), nil
}

func (s *sourceSession) Fetch(ctx context.Context, f api.Fetch) (int64, error) {
	format, err := findFormat(f.Format)
	if err != nil {
		return 0, err
	}
	reading, interrupt := context.WithCancel(ctx)
	defer interrupt()
	image, err := s.client.Export(reading, f.VDI, f.Base, f.Format)
	if err != nil {
		return 0, sourceError(err)
	}
	u := &upload{
		size: f.Volume.Size(), overlay: storage.NewOverlay(f.Volume), wants: wholeImage, scratch: f.Scratch, interrupt: interrupt,
		atomic: func() error { return nil }, // the volume is nobody's yet
	}
	progress := meter{report: f.Progress}
	u.done = progress.set
	if f.Base != "" {
		u.wants = deltaImage
		if image.Exact {
			u.parent = f.Base
		}
	}
	err = format.decode(ctx, image, image.Length, u)
	if _, ok := errors.AsType[*bodyError](err); err != nil && !ok {
		image.Close(ctx) // the reason is known
		return image.Received(), err
	}
	if err == nil && format.name == "raw" && image.Received() != f.Size {
		err = badBody("%d bytes of %d", image.Received(), f.Size)
	}
	if err = image.Finish(ctx, err); err != nil {
		err = sourceError(err)
	}
	return image.Received(), err
}

// sourceClosing is how long a server gets to take note of a logout.
const sourceClosing = 5 * time.Second

func (s *sourceSession) Close(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, sourceClosing)
	defer cancel()
	_ = s.client.Close(ctx) // else the session ends by itself
}

// sourceError makes of what went wrong with a source what a client is told. A
// code of the source is passed on, but for those that are about its sessions,
// tasks and hosts, which a client would take for ours.
func sourceError(err error) error {
	if e, ok := errors.AsType[*rpc.Fault](err); ok {
		switch e.Code {
		case xapi.ErrSessionInvalid, xapi.ErrSessionAuthenticationFailed:
			return xapi.NewError(xapi.ErrSessionAuthenticationFailed, "remote-username", "The source does not accept the credentials").WithCause(err)
		case xapi.ErrTaskCancelled, xapi.ErrHostIsSlave:
			return xapi.NewError(xapi.ErrVDIIOError, "The source says "+e.Code).WithCause(err)
		}
		params := slices.Clone(e.Params)
		for i, p := range params {
			params[i] = printable(p)
		}
		return xapi.NewError(printable(e.Code), params...).WithCause(err)
	}
	if e, ok := errors.AsType[*remote.URLError](err); ok {
		return badParam("remote-url", e.Reason)
	}
	if e, ok := errors.AsType[*remote.AddressError](err); ok {
		return xapi.NewError(xapi.ErrOperationNotAllowed, "Disks are not pulled from "+e.Addr.String()+"; --pull-from says from where").WithCause(err)
	}
	if e, ok := errors.AsType[*remote.CertificateError](err); ok {
		return xapi.NewError(xapi.ErrSSLVerifyError, e.Error()).WithCause(err)
	}
	if e, ok := errors.AsType[*remote.StatusError](err); ok && e.Host != "" {
		return xapi.NewError(xapi.ErrOperationNotAllowed, fmt.Sprintf("The source does not have the disk: name %s in remote-url", e.Host)).WithCause(err)
	}
	if e, ok := errors.AsType[*remote.ConnectError](err); ok {
		return xapi.NewError(xapi.ErrCannotContactHost, e.Address, e.Err.Error()).WithCause(err)
	}
	if _, ok := errors.AsType[*xapi.Error](err); ok || errors.Is(err, context.Canceled) {
		return err
	}
	return xapi.NewError(xapi.ErrVDIIOError, printable("The source: "+err.Error())).WithCause(err)
}

// printable is a text of another server as it can go to a terminal: what is not
// printed is a question mark.
func printable(s string) string {
	return strings.Map(func(r rune) rune {
		if r != utf8.RuneError && unicode.IsPrint(r) {
			return r
		}
		return '?'
	}, s)
}
