package main

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/url"
	"os"
	"strings"
	"syscall"
)

// off is the flag value that leaves a listener out.
const off = "off"

// maxSocketPath is the longest path of a Unix socket on Linux, in bytes.
const maxSocketPath = 107

// endpoint is one address the server answers at.
type endpoint struct {
	net.Listener
	scheme string // "http", "https" or "unix"
}

// url is how a client on this machine names the endpoint.
func (ep endpoint) url() string { return ep.scheme + "://" + ep.Addr().String() }

// hostPort returns the address as a client on this machine uses it: an
// address that stands for all addresses becomes the loopback one.
func (ep endpoint) hostPort() (host, port string) {
	host, port, _ = net.SplitHostPort(ep.Addr().String())
	if ip := net.ParseIP(host); ip != nil && ip.IsUnspecified() {
		host = "127.0.0.1"
	}
	return host, port
}

// endpoints is the set of open listeners.
type endpoints []endpoint

// close closes those that a server has not closed already.
func (eps endpoints) close() error {
	var errs []error
	for _, ep := range eps {
		if err := ep.Close(); !errors.Is(err, net.ErrClosed) {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}

func (eps endpoints) listeners() []net.Listener {
	var ls []net.Listener
	for _, ep := range eps {
		ls = append(ls, ep.Listener)
	}
	return ls
}

// first returns the first endpoint of a scheme.
func (eps endpoints) first(scheme string) (endpoint, bool) {
	for _, ep := range eps {
		if ep.scheme == scheme {
			return ep, true
		}
	}
	return endpoint{}, false
}

// addresses are the places to listen at, as the command line gives them; see validate.
type addresses struct {
	http  string   // loopback only, or off
	https string   // or off
	more  []string // http://ADDRESS or https://ADDRESS
}

// further is an address of --listen.
type further struct{ scheme, address string }

// further returns what --listen names.
func (a addresses) further() (list []further, err error) {
	for _, spec := range a.more {
		u, err := url.Parse(spec)
		if err != nil || (u.Scheme != "http" && u.Scheme != "https") || u.Host == "" || strings.Trim(u.Path, "/") != "" {
			return nil, notAnAddress("--listen", spec, "http://ADDRESS:PORT or https://ADDRESS:PORT")
		}
		address := u.Host
		if u.Port() == "" {
			address = net.JoinHostPort(u.Hostname(), map[string]string{"http": "80", "https": "443"}[u.Scheme])
		}
		if _, err := splitAddress(address); err != nil {
			return nil, notAnAddress("--listen", spec, "http://ADDRESS:PORT or https://ADDRESS:PORT")
		}
		list = append(list, further{u.Scheme, address})
	}
	return list, nil
}

// validate finds what cannot be listened at, whatever else happens on this machine.
func (a addresses) validate() error {
	if err := validAddress("--http", a.http); err != nil {
		return err
	}
	if a.http != off && !isLoopback(a.http) { // passwords in the clear over a network by accident
		return &hinted{
			fmt.Errorf("--http %s: plain HTTP is for loopback addresses only, it shows passwords to the network", a.http),
			"Use --https " + a.http + ", or --listen http://" + a.http + " if the network may see them.",
		}
	}
	if err := validAddress("--https", a.https); err != nil {
		return err
	}
	_, err := a.further()
	return err
}

// validAddress refuses what is neither off nor a host and a port.
func validAddress(flagName, address string) error {
	if address == off {
		return nil
	}
	if _, err := splitAddress(address); err != nil {
		return notAnAddress(flagName, address, "ADDRESS:PORT, such as 127.0.0.1:8080, or off")
	}
	return nil
}

// splitAddress returns the host of an address, which must have a port, too.
func splitAddress(address string) (host string, err error) {
	host, port, err := net.SplitHostPort(address)
	if err == nil {
		_, err = net.LookupPort("tcp", port)
	}
	return host, err
}

func notAnAddress(flagName, value, want string) error {
	return &hinted{fmt.Errorf("%s %s: not an address with a port", flagName, value), "Write " + want + "."}
}

// listen opens all of them and the Unix socket, or none.
func (a addresses) listen(ctx context.Context, config *tls.Config, socket string) (_ endpoints, err error) {
	var eps endpoints
	defer func() {
		if err != nil {
			err = errors.Join(err, eps.close())
		}
	}()
	add := func(flagName, scheme, address string) error {
		l, err := listenTCP(ctx, flagName, address)
		if err != nil {
			return err
		}
		if scheme == "https" {
			l = tls.NewListener(l, config)
		}
		eps = append(eps, endpoint{l, scheme})
		return nil
	}
	if a.http != off {
		if err := add("--http", "http", a.http); err != nil {
			return eps, err
		}
	}
	if a.https != off {
		if err := add("--https", "https", a.https); err != nil {
			return eps, err
		}
	}
	more, err := a.further()
	if err != nil {
		return eps, err
	}
	for _, f := range more {
		if err := add("--listen", f.scheme, f.address); err != nil {
			return eps, err
		}
	}
	l, err := listenUnix(socket)
	if err != nil {
		return eps, err
	}
	return append(eps, endpoint{l, "unix"}), nil
}

// isLoopback reports whether only this machine can reach an address.
func isLoopback(address string) bool {
	host, err := splitAddress(address)
	ip := net.ParseIP(host)
	return err == nil && (host == "localhost" || ip != nil && ip.IsLoopback())
}

func listenTCP(ctx context.Context, flagName, address string) (net.Listener, error) {
	l, err := new(net.ListenConfig).Listen(ctx, "tcp", address)
	switch {
	case errors.Is(err, syscall.EADDRINUSE):
		return nil, &hinted{
			fmt.Errorf("%s %s: the port is in use", flagName, address),
			"Another server has it, perhaps another coppice. Stop that one or choose another port; port 0 takes any free one.",
		}
	case errors.Is(err, syscall.EACCES):
		return nil, &hinted{
			fmt.Errorf("%s %s: not permitted", flagName, address),
			"Ports below 1024 need the capability CAP_NET_BIND_SERVICE: setcap cap_net_bind_service+ep, or AmbientCapabilities= in a systemd unit.",
		}
	case err != nil:
		return nil, fmt.Errorf("%s %s: %w", flagName, address, err)
	}
	return l, nil
}

// listenUnix makes the Unix socket. Whatever bears its name is left over from
// a server that was killed: the lock of the directory is ours.
func listenUnix(path string) (net.Listener, error) {
	if len(path) > maxSocketPath {
		return nil, &hinted{
			fmt.Errorf("the path of the Unix socket, %s, is longer than %d bytes", path, maxSocketPath),
			"Use a data directory with a shorter path.",
		}
	}
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	l, err := net.Listen("unix", path)
	if err != nil {
		return nil, err
	}
	return l, os.Chmod(path, 0o600)
}
