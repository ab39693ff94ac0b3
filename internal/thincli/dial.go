package thincli

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"strconv"
	"strings"
	"syscall"
)

// DialFunc opens a connection, like net.Dialer's DialContext.
type DialFunc func(ctx context.Context, network, address string) (net.Conn, error)

// localSocket is where a real host's own xe reaches its server.
const localSocket = "/var/lib/xcp/xapi"

const (
	portPlain = 80
	portTLS   = 443
)

// dialServer connects to the server for the CLI itself. The address 127.0.0.1
// means, to begin with, the Unix socket of a local host.
func (c *client) dialServer(ctx context.Context) (net.Conn, error) {
	if c.server == "127.0.0.1" {
		if conn, err := c.dialer()(ctx, "unix", localSocket); err == nil {
			return conn, nil
		}
	}
	return c.dial(ctx, c.server)
}

func (c *client) dialer() DialFunc {
	if c.env.Dial != nil {
		return c.env.Dial
	}
	return new(net.Dialer).DialContext
}

// dial connects to a host with the port and the transport that the options
// ask for. A host that is an absolute path is a Unix socket.
func (c *client) dial(ctx context.Context, host string) (net.Conn, error) {
	if strings.HasPrefix(host, "/") {
		return c.dialer()(ctx, "unix", host)
	}
	plain := c.noTLS || host == "127.0.0.1"
	port := c.port
	switch {
	case port != 0:
	case plain:
		port = portPlain
	default:
		port = portTLS
	}
	name := strings.TrimSuffix(strings.TrimPrefix(host, "["), "]")
	address := net.JoinHostPort(name, strconv.Itoa(port))
	c.debugf("connecting to %s, TLS %t", address, !plain)
	conn, err := c.dialer()(ctx, "tcp", address)
	if err != nil {
		return nil, &dialError{err, name, port}
	}
	if plain {
		return conn, nil
	}
	// The protocol has no notion of whom to trust: hosts certify themselves.
	t := tls.Client(conn, &tls.Config{ServerName: name, InsecureSkipVerify: true, MinVersion: tls.VersionTLS12})
	if err := t.HandshakeContext(ctx); err != nil {
		conn.Close()
		return nil, fmt.Errorf("TLS: %w", err)
	}
	return t, nil
}

// dialError remembers the host and the port that the options came to.
type dialError struct {
	error
	host string
	port int
}

func (e *dialError) Unwrap() error { return e.error }

// dialFailure words the failure to connect as the stock client does, and adds
// where nobody was found.
func dialFailure(err error) error {
	where := ""
	d, ok := errors.AsType[*dialError](err)
	if ok {
		where = fmt.Sprintf("That was %s, port %d. Is the server running there? -s and -p say where it is.\n", d.host, d.port)
	}
	if e, known := errors.AsType[*net.DNSError](err); known && ok {
		return failf("No addrinfo found for host: %s, port: %dHost '%s' not found.\n", e.Name, d.port, e.Name)
	}
	if e, ok := errors.AsType[syscall.Errno](err); ok {
		text := e.Error()
		return failf("Error: %s (calling connect )\n%s", strings.ToUpper(text[:1])+text[1:], where)
	}
	return failf("Unable to contact server. Please check server and port settings.\n")
}
