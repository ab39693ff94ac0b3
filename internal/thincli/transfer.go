package thincli

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/textproto"
	"net/url"
	"os"
	"strconv"
	"strings"
	"syscall"
)

const (
	maxRedirects = 20
	maxHead      = 64 << 10 // of a reply, in bytes

	copyBuffer = 1 << 20 // bytes
)

// errRefused is a reply that is neither success nor a redirect, or no reply at all.
var errRefused = errors.New("thincli: request refused")

// exchange is a side-channel connection whose reply head has been read.
type exchange struct {
	net.Conn
	r      *bufio.Reader // the body
	length int64         // of the body in bytes, as the head says; -1 when it does not
}

// errCutShort is a body that is not as long as its head says. The server may
// not know: what it sent last was on its way when the connection ended.
var errCutShort = errors.New("thincli: the connection ended within the body")

// whole is errCutShort when n bytes are not the body.
func (x *exchange) whole(n int64) error {
	if x.length >= 0 && n != x.length {
		return fmt.Errorf("%w: %d of %d bytes", errCutShort, n, x.length)
	}
	return nil
}

// httpRequest sends a request line and its headers to where the URL leads and
// reads the reply's head, through redirects.
func (c *client) httpRequest(ctx context.Context, method, target, headers string) (*exchange, error) {
	host := c.server
	for range maxRedirects {
		var path string
		host, path = resolve(host, target)
		x, location, err := c.exchangeWith(ctx, host, method+" "+path+" HTTP/1.0\r\n"+headers+"\r\n")
		if err != nil {
			c.debugf("%s %s: %v", method, path, err)
			return nil, err
		}
		if location == "" {
			return x, nil
		}
		target = location
	}
	return nil, fmt.Errorf("%w: too many redirects", errRefused)
}

// resolve splits a target into host and request target. Only https URLs
// name a host, and only they are decoded; a port in them does not count.
func resolve(host, target string) (string, string) {
	rest, ok := strings.CutPrefix(target, "https://")
	if !ok {
		return host, target
	}
	authority, path, _ := strings.Cut(rest, "/")
	path = "/" + path
	if decoded, err := url.PathUnescape(path); err == nil {
		path = decoded
	}
	if strings.HasPrefix(authority, "[") {
		authority, _, _ = strings.Cut(authority, "]")
		return authority + "]", path
	}
	authority, _, _ = strings.Cut(authority, ":")
	return authority, path
}

func (c *client) exchangeWith(ctx context.Context, host, request string) (x *exchange, location string, err error) {
	conn, err := c.dial(ctx, host)
	if err != nil {
		return nil, "", err
	}
	stop := context.AfterFunc(ctx, func() { conn.Close() })
	x = &exchange{Conn: &boundConn{conn, stop}}
	defer func() {
		if err != nil || location != "" {
			x.Close()
			x = nil
		}
	}()
	if _, err := io.WriteString(conn, request); err != nil {
		return x, "", err
	}
	head := &io.LimitedReader{R: conn, N: maxHead}
	x.r = bufio.NewReader(head)
	status, location, length, err := readHead(x.r)
	x.length = length
	head.N = 1<<63 - 1
	switch {
	case err != nil:
		return x, "", err
	case status == 302 && location != "":
		return x, location, nil
	case status != 200:
		return x, "", fmt.Errorf("%w: status %d", errRefused, status)
	}
	return x, "", nil
}

// boundConn is a connection that the end of a context closes.
type boundConn struct {
	net.Conn
	stop func() bool
}

func (b *boundConn) Close() error {
	b.stop()
	return b.Conn.Close()
}

func readHead(r *bufio.Reader) (status int, location string, length int64, err error) {
	t := textproto.NewReader(r)
	line, err := t.ReadLine()
	if err != nil {
		return 0, "", -1, err
	}
	words := strings.Fields(line)
	if len(words) < 2 || !strings.HasPrefix(words[0], "HTTP/") {
		return 0, "", -1, fmt.Errorf("%w: %q", errRefused, line)
	}
	if status, err = strconv.Atoi(words[1]); err != nil {
		return 0, "", -1, fmt.Errorf("%w: %q", errRefused, line)
	}
	length = -1
	for {
		line, err := t.ReadLine()
		if err != nil {
			return 0, "", -1, err
		}
		if line == "" {
			return status, location, length, nil
		}
		k, v, _ := strings.Cut(line, ":")
		switch v = strings.TrimSpace(v); {
		case strings.EqualFold(k, "location"):
			location = v
		case strings.EqualFold(k, "content-length"):
			if length, err = strconv.ParseInt(v, 10, 64); err != nil || length < 0 {
				return 0, "", -1, fmt.Errorf("%w: %q", errRefused, line)
			}
		}
	}
}

// get fetches a URL into a new file, or to standard output. It answers the
// server with its Response; an error besides ends the run.
func (c *client) get(ctx context.Context, m HTTPGet) (Response, error) {
	x, err := c.httpRequest(ctx, "GET", m.URL, "")
	if err != nil {
		return Failed, nil
	}
	defer x.Close()
	if m.File == "" {
		// Not spliced: into a pipe whose reader is slow that would not wait but try again
		// and again.
		n, err := io.CopyBuffer(struct{ io.Writer }{c.env.Stdout}, struct{ io.Reader }{x.body()}, make([]byte, copyBuffer))
		if err == nil {
			err = x.whole(n)
		}
		if err := unread(err); err != nil {
			return Failed, err
		}
		return c.copied(err)
	}
	if err := c.mayTouch(m.File); err != nil {
		return 0, err
	}
	f, err := c.received.create(m.File)
	if err != nil {
		return Failed, operationFailed(fmt.Sprintf("Sys_error(%q)", m.File+": "+reason(err)))
	}
	if err = receive(f, x); err == nil {
		err = f.Sync() // the server, too, is told of success only when power cuts do not matter any more
	}
	if err != nil {
		c.received.broken = true
	}
	return c.copied(err)
}

// copied answers for a finished copy. Trouble with a file is the user's to
// know; a broken connection is the server's to explain.
func (c *client) copied(err error) (Response, error) {
	if err == nil {
		return OK, nil
	}
	c.debugf("copying: %v", err)
	// os.File wraps what goes wrong at the connection it copies from, too.
	network := errors.Is(err, syscall.ECONNRESET) || errors.Is(err, syscall.EPIPE) || errors.Is(err, syscall.ETIMEDOUT)
	if e, ok := errors.AsType[*fs.PathError](err); ok && !network {
		return Failed, operationFailed(fmt.Sprintf("Sys_error(%q)", e.Path+": "+reason(e)))
	}
	return Failed, nil
}

// body returns what is left to read. Where the buffer holds nothing of it any
// more this is the bare connection.
func (x *exchange) body() io.Reader {
	var conn io.Reader = x.Conn
	if b, ok := conn.(*boundConn); ok {
		conn = b.Conn
	}
	if n := x.r.Buffered(); n > 0 {
		return io.MultiReader(io.LimitReader(x.r, int64(n)), conn)
	}
	return conn
}

// sparsePiece is the alignment and length of what receive leaves as a hole.
const sparsePiece = 64 << 10

// receive copies the body into the new file f. Pieces that are all zero become
// holes, so the raw image of a sparse disk is a sparse file. It reads and
// writes: splicing from a connection into a file moves single pages, and took
// three times as long.
func receive(f *os.File, x *exchange) error {
	src := x.body()
	buf := make([]byte, copyBuffer)
	for off := int64(0); ; {
		n, err := io.ReadFull(src, buf)
		if err := writeSparse(f, buf[:n], off); err != nil {
			return err
		}
		off += int64(n)
		if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
			if err := f.Truncate(off); err != nil {
				return err
			}
			return x.whole(off)
		}
		if err != nil {
			return err
		}
	}
}

// zeroPiece is what becomes a hole.
var zeroPiece [sparsePiece]byte

// writeSparse stores p at off, all but its zero pieces.
func writeSparse(f io.WriterAt, p []byte, off int64) error {
	start := 0 // of the data that is not stored yet
	for at := 0; at < len(p); at += sparsePiece {
		end := min(at+sparsePiece, len(p))
		if !bytes.Equal(p[at:end], zeroPiece[:end-at]) {
			continue
		}
		if at > start {
			if _, err := f.WriteAt(p[start:at], off+int64(start)); err != nil {
				return err
			}
		}
		start = end
	}
	if start == len(p) {
		return nil
	}
	_, err := f.WriteAt(p[start:], off+int64(start))
	return err
}

// put sends a file to a URL. The reply comes before the body: only after a
// 200 does the file go out, and there is no second reply.
func (c *client) put(ctx context.Context, m HTTPPut) (Response, error) {
	if err := c.mayTouch(m.File); err != nil {
		return 0, err
	}
	f, err := os.Open(c.env.path(m.File))
	if errors.Is(err, fs.ErrNotExist) {
		return Failed, operationFailed(fmt.Sprintf("file '%s' does not exist", m.File))
	}
	if err != nil {
		return Failed, operationFailed(fmt.Sprintf("Sys_error(%q)", m.File+": "+reason(err)))
	}
	defer f.Close()
	defer context.AfterFunc(ctx, func() { f.Close() })()
	info, err := f.Stat()
	if err != nil {
		return Failed, operationFailed(fmt.Sprintf("Sys_error(%q)", m.File+": "+reason(err)))
	}
	headers := ""
	var src io.Reader = f
	if info.Mode().IsRegular() {
		headers = "Content-length: " + strconv.FormatInt(info.Size(), 10) + "\r\n"
		src = io.LimitReader(f, info.Size())
	}
	x, err := c.httpRequest(ctx, "PUT", m.URL, headers)
	if err != nil {
		return Failed, nil
	}
	err = transmit(x, src)
	if e := x.Close(); err == nil {
		err = e
	}
	return c.copied(err)
}

// transmit is the opposite of receive.
func transmit(x *exchange, src io.Reader) error {
	conn := x.Conn.(*boundConn).Conn
	if w, ok := conn.(io.ReaderFrom); ok {
		_, err := w.ReadFrom(src)
		return err
	}
	_, err := io.CopyBuffer(struct{ io.Writer }{conn}, struct{ io.Reader }{src}, make([]byte, copyBuffer))
	return err
}

func operationFailed(what string) error {
	return failf("Operation failed. Error: %s\n", what)
}

// reason returns the innermost error's text, with a capital as the C library has it.
func reason(err error) string {
	for {
		inner := errors.Unwrap(err)
		if inner == nil {
			break
		}
		err = inner
	}
	text := err.Error()
	if text == "" {
		return text
	}
	return strings.ToUpper(text[:1]) + text[1:]
}
