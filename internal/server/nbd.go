package server

import (
	"context"
	"crypto/tls"
	"errors"
	"iter"
	"log/slog"
	"net"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"coppice/internal/api"
	"coppice/internal/nbd"
	"coppice/internal/storage"
	"coppice/internal/xapi"
)

// NBD serves disks by the NBD protocol. What the names of exports mean, and
// who may have what, is api's; see doc/extensions.md.
type NBD struct {
	api    *api.API
	log    *slog.Logger
	grace  time.Duration
	server *nbd.Server

	serving sync.WaitGroup
}

// NewNBD returns a server that listens to nothing yet. The zero grace means
// DefaultGrace.
func NewNBD(a *api.API, log *slog.Logger, grace time.Duration) *NBD {
	n := &NBD{api: a, log: log, grace: grace}
	if n.grace == 0 {
		n.grace = DefaultGrace
	}
	n.server = nbd.NewServer(nbd.Options{Backend: n.backend, Log: log})
	return n
}

// Serve serves a listener in the background until Close. With a TLS
// configuration clients must use TLS.
func (n *NBD) Serve(l net.Listener, config *tls.Config) {
	if config != nil {
		config = config.Clone()
		config.NextProtos = nil // those of HTTP
	}
	n.serving.Go(func() {
		if err := n.server.Serve(l, config); !errors.Is(err, nbd.ErrServerClosed) {
			n.log.Error("nbd: a listener has failed", "address", l.Addr(), "err", err)
		}
	})
}

// Close stops: requests that are being worked on end, or are cut off after
// the grace period. It returns when every disk is detached.
func (n *NBD) Close() error {
	ctx, cancel := context.WithTimeout(context.Background(), n.grace)
	defer cancel()
	err := n.server.Shutdown(ctx)
	n.serving.Wait()
	if errors.Is(err, context.DeadlineExceeded) {
		n.log.Warn("nbd: requests were cut off that did not end within the grace period", "grace", n.grace)
		return nil
	}
	return err
}

// backend gives a connection its exports.
func (n *NBD) backend(c net.Conn) nbd.Backend {
	client := api.NBDClient{Origin: api.Origin{Peer: c.RemoteAddr().String(), UserAgent: "nbd"}}
	if ownPeer(c) {
		client.Trusted = true
		client.Process = "process " + strconv.Itoa(peerProcess(c))
	}
	return &nbdBackend{api: n.api, client: client}
}

// peerProcess returns the process at the other end of a Unix socket, 0 when
// that cannot be known.
func peerProcess(c net.Conn) int {
	uc, ok := c.(*net.UnixConn)
	if !ok {
		return 0
	}
	raw, err := uc.SyscallConn()
	if err != nil {
		return 0
	}
	pid := 0
	err = raw.Control(func(fd uintptr) {
		if cred, err := unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED); err == nil {
			pid = int(cred.Pid)
		}
	})
	if err != nil {
		return 0
	}
	return pid
}

// nbdBackend is the exports of one connection.
type nbdBackend struct {
	api    *api.API
	client api.NBDClient
}

func (b *nbdBackend) List(context.Context) iter.Seq2[string, error] {
	return func(yield func(string, error) bool) {
		for name, err := range b.api.NBDNames(b.client) {
			if !yield(name, nbdRefusal(err)) {
				return
			}
		}
	}
}

func (b *nbdBackend) Describe(_ context.Context, name string) (nbd.Description, error) {
	e, err := b.api.NBDDescribe(b.client, name)
	if err != nil {
		return nbd.Description{}, nbdRefusal(err)
	}
	return nbd.Description{Size: e.VDI.VirtualSize, ReadOnly: e.ReadOnly, Text: e.VDI.NameLabel}, nil
}

// The namespaces of contexts that tell what differs from another disk, whose
// uuid follows. The second is what QEMU asks for.
var changedNamespaces = []string{"coppice:changed:", "qemu:dirty-bitmap:"}

// changedSince returns the disk that a context compares with.
func changedSince(name string) (base string, ok bool) {
	for _, ns := range changedNamespaces {
		if base, ok := strings.CutPrefix(name, ns); ok {
			return base, storage.ID(base).Valid()
		}
	}
	return "", false
}

func (b *nbdBackend) Contexts(_ context.Context, name, query string) ([]string, error) {
	base, ok := changedSince(query)
	if !ok { // any disk can be a base: there are only namespaces to list
		return slices.DeleteFunc(slices.Clone(changedNamespaces), func(ns string) bool {
			return !strings.HasPrefix(ns, query) || query != "" && !strings.HasSuffix(query, ":")
		}), nil
	}
	if b.api.NBDComparable(b.client, name, base) != nil {
		return nil, nil
	}
	return []string{query}, nil
}

func (b *nbdBackend) Open(ctx context.Context, name string, contexts []string) (*nbd.Export, error) {
	at, err := b.api.NBDAttach(ctx, b.client, name)
	if err != nil {
		return nil, nbdRefusal(err)
	}
	e := &nbd.Export{
		Device: at.Volume, ReadOnly: at.ReadOnly, Context: at.Context, Close: at.Close,
		Changed: map[string]func(context.Context, int64, int64) iter.Seq2[storage.Extent, error]{},
	}
	for _, c := range contexts {
		base, _ := changedSince(c)
		if e.Changed[c], err = b.api.NBDChanged(at, base); err != nil {
			at.Close()
			return nil, nbdRefusal(err)
		}
	}
	return e, nil
}

// nbdRefusal is what an NBD client is told of an error of the API.
func nbdRefusal(err error) error {
	e, ok := errors.AsType[*xapi.Error](err)
	if !ok {
		return err
	}
	switch e.Code {
	case xapi.ErrVDIMissing, xapi.ErrUUIDInvalid, xapi.ErrHandleInvalid, xapi.ErrDeviceAlreadyDetached:
		return nbd.ErrUnknown.Because(e.Code)
	}
	return nbd.ErrPolicy.Because(e.Code)
}
