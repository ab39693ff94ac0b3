// Package remote is a client of other servers that speak XenAPI, for what they
// export: it logs in, looks disks up and reads their images, and says of each
// whether it was complete. It hides HTTP and TLS, how the other side is
// recognised, which addresses may be connected to, and which host of a pool
// answers what.
//
// What it sends is XML-RPC and a plain GET, which every XenAPI server
// understands. It goes to the named host and to those of its pool that this one
// names, under the same rules for address and certificate: a member names the
// coordinator (HOST_IS_SLAVE), which then gets the messages, and any host names
// the one that has a disk, by a redirection. Of that only the host is followed:
// what is asked there is the same. Proxies are not used.
//
// A session that ends while the client is open is replaced by another one if it
// was the client's own.
//
// Nothing here is kept longer than a [Client] is open, and no error has
// credentials in it.
package remote

import (
	"bytes"
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"strings"
	"time"

	"coppice/internal/rpc"
)

// Config names a server and says how far it is trusted.
type Config struct {
	// URL is https://host or https://host:port; http:// only with Insecure.
	URL string

	// The server is logged in to as User, unless there is a Session, which is
	// used and left open.
	User, Password string
	Session        string

	// The server's certificate must have one of the Fingerprints; without any
	// it must be valid for the host and come from Roots, by default those of
	// the system. Insecure takes any. Without TLS there must be neither.
	Fingerprints []Fingerprint
	Roots        *x509.CertPool
	Insecure     bool

	// Networks are the addresses that may be connected to.
	Networks Networks

	// Idle is how long the server may neither send nor take a byte; 0 for ever.
	Idle time.Duration
}

// Limits of what a server can make the client do.
const (
	maxAnswer      = 4 << 20          // bytes of the answer to a message
	maxHead        = 64 << 10         // bytes of the head of a reply
	callTimeout    = time.Minute      // for a message and its answer
	connectTimeout = 15 * time.Second // for a connection, and again for its TLS
	maxHops        = 3                // hosts of a pool that a request is passed on to
)

// originator is what the client calls itself in its sessions and requests.
const originator = "coppice"

// Client is a session with a server, used by one goroutine at a time. Close
// ends it.
type Client struct {
	http    http.Client
	data    url.URL // of the host that was named
	api     url.URL // of the host that messages go to
	session string
	own     bool // the session is ours to end
	login   credentials
}

type credentials struct{ user, password string }

// Open connects to a server and logs in. Errors are a [*URLError], one of
// those that [Client.Call] has, or what the server says of the credentials.
func Open(ctx context.Context, cfg Config) (*Client, error) {
	u, err := parseURL(cfg.URL, cfg.Insecure)
	if err != nil {
		return nil, err
	}
	if u.Scheme == "http" && (len(cfg.Fingerprints) > 0 || cfg.Roots != nil) {
		return nil, &URLError{"the URL must begin with https:// where a certificate is to be checked"}
	}
	c := &Client{data: *u, api: *u, session: cfg.Session, login: credentials{cfg.User, cfg.Password}}
	c.http.Transport = transport(cfg)
	c.http.CheckRedirect = func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }
	if c.session == "" {
		err = c.logIn(ctx)
	} else if err = c.checkSession(); err == nil {
		// Which host has the session, and whether it is valid, is found out at once.
		_, err = c.Call(ctx, "session.get_this_host", c.session)
	}
	if err != nil {
		c.http.CloseIdleConnections()
		return nil, err
	}
	return c, nil
}

func (c *Client) logIn(ctx context.Context) error {
	v, err := c.send(ctx, "session.login_with_password", c.login.user, c.login.password, "1.0", originator)
	if err != nil {
		return err
	}
	c.session, _ = v.(string)
	c.own = true
	return c.checkSession()
}

// checkSession refuses what cannot stand in the head of a request.
func (c *Client) checkSession() error {
	odd := func(r rune) bool {
		return !strings.ContainsRune("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789:-_", r)
	}
	if c.session == "" || len(c.session) > 256 || strings.ContainsFunc(c.session, odd) {
		return &ProtocolError{errors.New("this is no reference of a session")}
	}
	return nil
}

// Close logs out, if the session is the client's own, and closes all
// connections. What has been opened must have been closed. When ctx ends the
// session is left to end by itself.
func (c *Client) Close(ctx context.Context) error {
	defer c.http.CloseIdleConnections()
	if !c.own {
		return nil
	}
	_, err := c.send(ctx, "session.logout", c.session)
	return err
}

// Call sends a message, with the session before the other parameters, and
// returns its result as package rpc decodes it. What the server refuses is a
// [*rpc.Fault]. Otherwise the error matches an [*AddressError], a
// [*CertificateError] or a [*ConnectError], or it is a [*ProtocolError] when
// what answers is no such server.
func (c *Client) Call(ctx context.Context, method string, params ...any) (any, error) {
	with := func() []any { return append([]any{c.session}, params...) }
	v, err := c.send(ctx, method, with()...)
	if f, ok := errors.AsType[*rpc.Fault](err); !ok || f.Code != "SESSION_INVALID" || !c.own {
		return v, err
	}
	if err := c.logIn(ctx); err != nil {
		return nil, err
	}
	return c.send(ctx, method, with()...)
}

// send sends a message to where messages go, which another host of the pool may
// say.
func (c *Client) send(ctx context.Context, method string, params ...any) (any, error) {
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	for hop := 0; ; hop++ {
		v, err := c.post(ctx, method, params)
		f, ok := errors.AsType[*rpc.Fault](err)
		if !ok || f.Code != "HOST_IS_SLAVE" || len(f.Params) == 0 || hop == maxHops {
			return v, err
		}
		if c.api.Host, err = sameService(c.data, f.Params[0]); err != nil {
			return nil, err
		}
	}
}

func (c *Client) post(ctx context.Context, method string, params []any) (any, error) {
	var call bytes.Buffer
	if err := rpc.WriteCall(&call, rpc.XMLRPC, 1, method, params...); err != nil {
		return nil, err
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, c.api.String(), &call)
	if err != nil {
		return nil, &ProtocolError{errors.New("no URL can be made of the host")}
	}
	req.Header.Set("Content-Type", rpc.XML.ContentType())
	if strings.Contains(method, ".get_") {
		// For net/http: may be sent again when a server has just closed the connection.
		req.Header["Idempotency-Key"] = nil
	}
	resp, err := c.do(req)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return nil, &ProtocolError{fmt.Errorf("a message is answered with status %d%s", resp.StatusCode, leadsTo(resp))}
	}
	v, err := rpc.ReadResponse(rpc.XMLRPC, resp.Body, maxAnswer)
	if _, refused := errors.AsType[*rpc.Fault](err); err != nil && !refused {
		if ctx.Err() != nil {
			return nil, context.Cause(ctx)
		}
		return nil, &ProtocolError{err}
	}
	return v, err
}

// leadsTo says where an answer redirects to, "" for nowhere.
func leadsTo(resp *http.Response) string {
	to, err := resp.Location()
	if err != nil {
		return ""
	}
	return ", which leads to " + to.Scheme + "://" + to.Host
}

// do sends a request and names what can go wrong with it.
func (c *Client) do(req *http.Request) (*http.Response, error) {
	req.Header.Set("User-Agent", originator)
	resp, err := c.http.Do(req)
	if err == nil {
		return resp, nil
	}
	if ctx := req.Context(); errors.Is(ctx.Err(), context.Canceled) {
		return nil, context.Cause(ctx)
	}
	return nil, connectError(req.URL.Host, err)
}
