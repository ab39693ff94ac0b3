package main

import (
	"context"
	"hash/crc32"
	"io"
	"net"
	"net/http"
	"os"
	"strconv"
	"sync/atomic"

	"golang.org/x/sys/unix"
)

// limit is the do-nothing HTTP server: GET sends the file named by the path,
// PUT writes the body to it and syncs it, and both take the CRC32C of each
// 4 KiB on the way.
type limit struct {
	base string
	srv  *http.Server
	sum  atomic.Uint32 // keeps the checksums from being optimised away
}

func startLimit() (*limit, error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	lim := &limit{base: "http://" + l.Addr().String()}
	lim.srv = &http.Server{Handler: lim}
	go func() { _ = lim.srv.Serve(l) }() // it ends by Close
	return lim, nil
}

func (l *limit) Close() error { return l.srv.Close() }

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

func (l *limit) check(p []byte) {
	sum := uint32(0)
	for len(p) > 0 {
		n := min(len(p), 4096)
		sum ^= crc32.Checksum(p[:n], castagnoli)
		p = p[n:]
	}
	l.sum.Add(sum)
}

func (l *limit) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	var err error
	switch r.Method {
	case http.MethodGet:
		err = l.get(w, r.URL.Path)
	case http.MethodPut:
		err = l.put(r.Body, r.URL.Path)
	}
	if err != nil {
		http.Error(w, err.Error(), http.StatusInternalServerError)
	}
}

func (l *limit) get(w http.ResponseWriter, path string) error {
	f, size, err := openSized(path)
	if err != nil {
		return err
	}
	defer f.Close()
	w.Header().Set("Content-Length", strconv.FormatInt(size, 10))
	return l.pump(w, f)
}

func (l *limit) put(body io.Reader, path string) error {
	f, err := os.Create(path)
	if err != nil {
		return err
	}
	defer f.Close()
	if err := l.pump(f, body); err != nil {
		return err
	}
	return unix.Fdatasync(int(f.Fd()))
}

// fetch has the file at path come over HTTP, and puts it into another one as a PUT
// does.
func (l *limit) fetch(ctx context.Context, client *server, path, out string) error {
	body, _, err := client.open(ctx, l.base+path, nil)
	if err != nil {
		return err
	}
	defer body.Close()
	return l.put(body, out)
}

// read does what a GET does, for nobody.
func (l *limit) read(path string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	return l.pump(io.Discard, f)
}

func (l *limit) pump(w io.Writer, r io.Reader) error {
	buf := make([]byte, 1<<20)
	for {
		n, err := io.ReadFull(r, buf)
		l.check(buf[:n])
		if n > 0 {
			if _, err := w.Write(buf[:n]); err != nil {
				return err
			}
		}
		if err == io.EOF || err == io.ErrUnexpectedEOF {
			return nil
		}
		if err != nil {
			return err
		}
	}
}
