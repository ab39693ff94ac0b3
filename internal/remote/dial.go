package remote

import (
	"cmp"
	"context"
	"crypto/sha256"
	"crypto/tls"
	"encoding/hex"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"slices"
	"strings"
	"syscall"
	"time"
)

// URLError says what is wrong with a Config.URL, which it does not repeat: it
// may have a password in it.
type URLError struct{ Reason string }

func (e *URLError) Error() string { return e.Reason }

// AddressError is the refusal to connect to an address.
type AddressError struct{ Addr netip.Addr }

func (e *AddressError) Error() string {
	return "the address " + e.Addr.String() + " may not be connected to"
}

// CertificateError says why a server is not trusted.
type CertificateError struct{ Err error }

func (e *CertificateError) Error() string { return e.Err.Error() }
func (e *CertificateError) Unwrap() error { return e.Err }

// ConnectError is the failure of a connection, or of making one.
type ConnectError struct {
	Address string // host:port
	Err     error
}

func (e *ConnectError) Error() string { return "connection to " + e.Address + ": " + e.Err.Error() }
func (e *ConnectError) Unwrap() error { return e.Err }

// ProtocolError is an answer that no XenAPI server gives.
type ProtocolError struct{ Err error }

func (e *ProtocolError) Error() string { return e.Err.Error() }
func (e *ProtocolError) Unwrap() error { return e.Err }

// connectError names the failure of a request to a host.
func connectError(host string, err error) error {
	if e, ok := errors.AsType[*AddressError](err); ok {
		return e
	}
	if e, ok := errors.AsType[*CertificateError](err); ok {
		return &CertificateError{fmt.Errorf("%s: %w", host, e.Err)}
	}
	if e, ok := errors.AsType[*tls.CertificateVerificationError](err); ok {
		return &CertificateError{fmt.Errorf("%s: %w", host, e.Err)}
	}
	if e, ok := errors.AsType[*url.Error](err); ok {
		err = e.Err // without the URL
	}
	return &ConnectError{host, err}
}

// parseURL returns the root of a server's URL, with its port.
func parseURL(text string, insecure bool) (*url.URL, error) {
	u, err := url.Parse(text)
	switch {
	case err != nil:
		return nil, &URLError{"this is no URL"}
	case u.Scheme != "https" && u.Scheme != "http":
		return nil, &URLError{"the URL must begin with https://"}
	case u.Scheme == "http" && !insecure:
		return nil, &URLError{"http:// has no certificate to recognise the server by; it goes only with remote-insecure=true"}
	case u.User != nil:
		return nil, &URLError{"the URL must not have a user or a password in it"}
	case u.Hostname() == "" || u.Opaque != "":
		return nil, &URLError{"the URL has no host"}
	case strings.Trim(u.Path, "/") != "" || u.RawQuery != "" || u.ForceQuery || u.Fragment != "":
		return nil, &URLError{"the URL must end after the host"}
	}
	return &url.URL{Scheme: u.Scheme, Host: net.JoinHostPort(u.Hostname(), cmp.Or(u.Port(), usualPort(u.Scheme))), Path: "/"}, nil
}

// usualPort is the port of a scheme.
func usualPort(scheme string) string {
	if scheme == "http" {
		return "80"
	}
	return "443"
}

// sameService returns where host has the service that is at u here.
func sameService(u url.URL, host string) (string, error) {
	at, err := parseURL(u.Scheme+"://"+net.JoinHostPort(strings.Trim(host, "[]"), u.Port()), true)
	if err != nil {
		return "", &ProtocolError{errors.New("the coordinator of the pool has no address")}
	}
	return at.Host, nil
}

// Fingerprint is the SHA-256 of a certificate.
type Fingerprint [sha256.Size]byte

// ParseFingerprint reads a fingerprint in hexadecimal, with colons or without.
func ParseFingerprint(s string) (f Fingerprint, err error) {
	b, err := hex.DecodeString(strings.ReplaceAll(strings.TrimSpace(s), ":", ""))
	if err != nil || len(b) != len(f) {
		return f, fmt.Errorf("%q is no SHA-256 in hexadecimal", s)
	}
	return Fingerprint(b), nil
}

func (f Fingerprint) String() string {
	return strings.ReplaceAll(fmt.Sprintf("% X", f[:]), " ", ":")
}

// Networks are addresses that may be connected to. Nil stands for all but
// those of this machine and its links: loopback, link-local, multicast and
// unspecified ones, and the others at which clouds give machines credentials.
type Networks []netip.Prefix

// cloudMetadata are the addresses of metadata services that are not
// link-local, as their clouds document them.
func cloudMetadata() []netip.Addr {
	return []netip.Addr{
		netip.MustParseAddr("fd00:ec2::254"),   // AWS, over IPv6
		netip.MustParseAddr("fd20:ce::254"),    // Google Cloud, over IPv6
		netip.MustParseAddr("100.100.100.200"), // Alibaba Cloud
		netip.MustParseAddr("168.63.129.16"),   // Azure, the agents' host
		netip.MustParseAddr("192.0.0.192"),     // Oracle Cloud Classic
	}
}

// ParseNetworks reads addresses and networks such as 10.0.0.0/8, with commas
// between them. "off" are none.
func ParseNetworks(s string) (Networks, error) {
	n := Networks{}
	if s == "off" {
		return n, nil
	}
	for part := range strings.SplitSeq(s, ",") {
		part = strings.TrimSpace(part)
		if a, err := netip.ParseAddr(part); err == nil {
			n = append(n, netip.PrefixFrom(a, a.BitLen()))
			continue
		}
		p, err := netip.ParsePrefix(part)
		if err != nil {
			return nil, fmt.Errorf("%q is neither an address nor a network", part)
		}
		n = append(n, p)
	}
	return n, nil
}

// Allow tells whether an address may be connected to.
func (n Networks) Allow(a netip.Addr) bool {
	a = a.Unmap().WithZone("")
	if n == nil {
		return a.IsValid() && !a.IsLoopback() && !a.IsLinkLocalUnicast() && !a.IsMulticast() && !a.IsUnspecified() &&
			!slices.Contains(cloudMetadata(), a)
	}
	return slices.ContainsFunc(n, func(p netip.Prefix) bool { return p.Contains(a) })
}

// transport makes the connections of a client.
func transport(cfg Config) *http.Transport {
	dialer := net.Dialer{
		Timeout: connectTimeout,
		// The address is looked at when it is connected to: what a name stands
		// for may have changed since.
		ControlContext: func(_ context.Context, _, address string, _ syscall.RawConn) error {
			at, err := netip.ParseAddrPort(address)
			if err == nil && !cfg.Networks.Allow(at.Addr()) {
				err = &AddressError{at.Addr()}
			}
			return err
		},
	}
	return &http.Transport{
		DialContext: func(ctx context.Context, network, address string) (net.Conn, error) {
			conn, err := dialer.DialContext(ctx, network, address)
			if err != nil {
				return nil, err
			}
			return &idleConn{conn, cfg.Idle}, nil
		},
		TLSClientConfig:        cfg.tls(),
		TLSHandshakeTimeout:    connectTimeout,
		MaxResponseHeaderBytes: maxHead,
		DisableCompression:     true, // what comes is what is meant
		IdleConnTimeout:        callTimeout,
	}
}

func (cfg Config) tls() *tls.Config {
	t := &tls.Config{MinVersion: tls.VersionTLS12, RootCAs: cfg.Roots}
	if len(cfg.Fingerprints) == 0 {
		t.InsecureSkipVerify = cfg.Insecure
		return t
	}
	t.InsecureSkipVerify = true // who it is says the fingerprint
	t.VerifyConnection = func(s tls.ConnectionState) error {
		got := Fingerprint(sha256.Sum256(s.PeerCertificates[0].Raw))
		if !slices.Contains(cfg.Fingerprints, got) {
			return &CertificateError{fmt.Errorf("the certificate has the SHA-256 %v, which is not the one that was given", got)}
		}
		return nil
	}
	return t
}

// idleConn fails when the other side is silent for too long.
type idleConn struct {
	net.Conn
	idle time.Duration // 0 for ever
}

func (c *idleConn) Read(p []byte) (int, error) {
	if c.idle > 0 {
		if err := c.SetReadDeadline(time.Now().Add(c.idle)); err != nil {
			return 0, err
		}
	}
	return c.Conn.Read(p)
}

// Write gives a Read that waits the time from now on, too: before there is a
// request nobody is silent.
func (c *idleConn) Write(p []byte) (int, error) {
	if c.idle > 0 {
		if err := c.SetDeadline(time.Now().Add(c.idle)); err != nil {
			return 0, err
		}
	}
	return c.Conn.Write(p)
}
