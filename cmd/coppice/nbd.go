package main

import (
	"context"
	"encoding/pem"
	"errors"
	"fmt"
	"net"
	"strconv"
	"sync"
	"syscall"

	"coppice/internal/api"
	"coppice/internal/server"
)

// defaultNBD is where NBD listens unless a flag says otherwise. When another
// server has the port already, this one does without: there is the Unix
// socket, too.
const defaultNBD = "127.0.0.1:10809"

// nbdAddresses are the places to listen at for NBD, as the command line gives
// them.
type nbdAddresses struct {
	tls   string // "" for the default, or off
	plain string // loopback only; "" or off for none
}

// nbdEndpoints are the open listeners for NBD.
type nbdEndpoints struct {
	socket     net.Listener
	tls, plain net.Listener // nil for none
}

// close closes those that a server has not closed already.
func (eps *nbdEndpoints) close() error {
	var errs []error
	for _, l := range []net.Listener{eps.socket, eps.tls, eps.plain} {
		if l == nil {
			continue
		}
		if err := l.Close(); !errors.Is(err, net.ErrClosed) {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}

// validate finds what cannot be listened at, whatever else happens on this machine.
func (a nbdAddresses) validate() error {
	if a.tls != "" {
		if err := validAddress("--nbd", a.tls); err != nil {
			return err
		}
	}
	if a.plain == "" || a.plain == off {
		return nil
	}
	if err := validAddress("--nbd-plain", a.plain); err != nil {
		return err
	}
	if !isLoopback(a.plain) {
		return &hinted{
			fmt.Errorf("--nbd-plain %s: NBD without TLS is for loopback addresses only, it shows disks and sessions to the network", a.plain),
			"Use --nbd " + a.plain + ".",
		}
	}
	return nil
}

// listen opens all of them, or none.
func (a nbdAddresses) listen(ctx context.Context, socket string) (eps nbdEndpoints, err error) {
	defer func() {
		if err != nil {
			err = errors.Join(err, eps.close())
		}
	}()
	if eps.socket, err = listenUnix(socket); err != nil {
		return eps, err
	}
	switch a.tls {
	case off:
	case "":
		eps.tls, err = new(net.ListenConfig).Listen(ctx, "tcp", defaultNBD)
		if errors.Is(err, syscall.EADDRINUSE) {
			eps.tls, err = nil, nil
		}
	default:
		eps.tls, err = listenTCP(ctx, "--nbd", a.tls)
	}
	if err != nil || a.plain == "" || a.plain == off {
		return eps, err
	}
	eps.plain, err = listenTCP(ctx, "--nbd-plain", a.plain)
	return eps, err
}

// urls are how clients on this machine name the endpoints.
func (eps *nbdEndpoints) urls() []string {
	urls := []string{"nbd+unix:///?socket=" + eps.socket.Addr().String()}
	if eps.tls != nil {
		urls = append(urls, "nbds://"+eps.tls.Addr().String())
	}
	if eps.plain != nil {
		urls = append(urls, "nbd://"+eps.plain.Addr().String())
	}
	return urls
}

// describe returns what the API tells clients of them. The certificate is
// looked at when it is asked for first: it may still be in the making.
func (eps *nbdEndpoints) describe(address string, cert *server.Certificate) func() api.NBDEndpoints {
	ep := api.NBDEndpoints{Address: address, Socket: eps.socket.Addr().String(), TLS: port(eps.tls), Plain: port(eps.plain)}
	return sync.OnceValue(func() api.NBDEndpoints {
		if ep.TLS != 0 && cert.Wait(context.Background()) == nil {
			leaf := cert.Leaf()
			ep.Certificate = string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: leaf.Raw}))
			ep.Subject = leaf.Subject.CommonName
			if len(leaf.DNSNames) > 0 {
				ep.Subject = leaf.DNSNames[0]
			}
		}
		return ep
	})
}

// port returns the TCP port of a listener, 0 for none.
func port(l net.Listener) int64 {
	if l == nil {
		return 0
	}
	_, p, err := net.SplitHostPort(l.Addr().String())
	if err != nil {
		return 0
	}
	n, _ := strconv.ParseInt(p, 10, 64)
	return n
}

// serve makes the server answer at all of them.
func (eps *nbdEndpoints) serve(n *server.NBD, cert *server.Certificate) {
	n.Serve(eps.socket, nil)
	if eps.tls != nil {
		n.Serve(eps.tls, cert.TLS())
	}
	if eps.plain != nil {
		n.Serve(eps.plain, nil)
	}
}
