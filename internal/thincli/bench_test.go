package thincli

import (
	"context"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// benchmarkTransfer measures the client end of one transfer of 256 MiB over
// loopback; data, which moves it on the server's side, does no work beside.
func benchmarkTransfer(b *testing.B, m Message, data func(conn net.Conn, buf []byte) error) {
	const size = 256 << 20
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		b.Fatal(err)
	}
	defer ln.Close()
	go func() {
		buf := make([]byte, 1<<20)
		for {
			conn, err := ln.Accept()
			if err != nil {
				return
			}
			if err := data(conn, buf); err != nil {
				b.Error(err)
			}
			conn.Close()
		}
	}()
	dir := b.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "in"), make([]byte, size), 0o600); err != nil {
		b.Fatal(err)
	}
	env := &Env{
		Dir: dir, Stderr: io.Discard,
		Dial: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, "tcp", ln.Addr().String())
		},
	}
	c := &client{options: &options{server: "127.0.0.1"}, env: env, permitted: permitted(env, []string{"in=in", "out=out"})}
	b.SetBytes(size)
	for b.Loop() {
		var r Response
		switch m := m.(type) {
		case HTTPGet:
			r, err = c.get(b.Context(), m)
			if err := os.Remove(filepath.Join(dir, "out")); err != nil {
				b.Fatal(err)
			}
		case HTTPPut:
			r, err = c.put(b.Context(), m)
		}
		if r != OK || err != nil {
			b.Fatal(r, err)
		}
	}
}

func skipHead(conn net.Conn) error {
	var head strings.Builder
	one := make([]byte, 1)
	for !strings.HasSuffix(head.String(), "\r\n\r\n") {
		if _, err := conn.Read(one); err != nil {
			return err
		}
		head.Write(one)
	}
	_, err := io.WriteString(conn, "HTTP/1.1 200 OK\r\n\r\n")
	return err
}

func BenchmarkDownload(b *testing.B) {
	benchmarkTransfer(b, HTTPGet{"out", "/x"}, func(conn net.Conn, buf []byte) error {
		if err := skipHead(conn); err != nil {
			return err
		}
		for range 256 {
			if _, err := conn.Write(buf); err != nil {
				return err
			}
		}
		return nil
	})
}

func BenchmarkUpload(b *testing.B) {
	benchmarkTransfer(b, HTTPPut{"in", "/x"}, func(conn net.Conn, buf []byte) error {
		if err := skipHead(conn); err != nil {
			return err
		}
		for {
			if _, err := conn.Read(buf); err != nil {
				return nil // the end
			}
		}
	})
}
