package server

import (
	"crypto/rsa"
	"crypto/tls"
	"crypto/x509"
	"io"
	"net"
	"os"
	"path/filepath"
	"testing"
	"time"
)

// openCertificate makes a certificate in a new directory.
func openCertificate(t *testing.T) (*Certificate, string) {
	t.Helper()
	dir := filepath.Join(t.TempDir(), "tls")
	c, err := OpenCertificate(dir, []string{"localhost", "127.0.0.1", "host.example"})
	if err != nil {
		t.Fatal(err)
	}
	if err := c.Wait(t.Context()); err != nil {
		t.Fatal(err)
	}
	return c, dir
}

func TestCertificateIsKept(t *testing.T) {
	c, dir := openCertificate(t)
	for name, want := range map[string]os.FileMode{keyFile: 0o600, certFile: 0o644} {
		info, err := os.Stat(filepath.Join(dir, name))
		if err != nil {
			t.Fatal(err)
		}
		if got := info.Mode().Perm(); got != want {
			t.Errorf("%s has mode %o, want %o", name, got, want)
		}
	}
	if names, _ := os.ReadDir(dir); len(names) != 2 {
		t.Errorf("left behind: %v", names)
	}
	again, err := OpenCertificate(dir, nil)
	if err != nil {
		t.Fatal(err)
	}
	if !again.Leaf().Equal(c.Leaf()) {
		t.Error("a second start has another certificate")
	}
	key, ok := c.Leaf().PublicKey.(*rsa.PublicKey)
	if !ok || key.N.BitLen() != 2048 {
		t.Errorf("key is %T, want RSA-2048", c.Leaf().PublicKey)
	}
	for _, host := range []string{"localhost", "127.0.0.1", "host.example"} {
		if err := c.Leaf().VerifyHostname(host); err != nil {
			t.Error(err)
		}
	}
}

func TestCertificateDamaged(t *testing.T) {
	_, dir := openCertificate(t)
	if err := os.WriteFile(filepath.Join(dir, certFile), []byte("junk"), 0o644); err != nil {
		t.Fatal(err)
	}
	if _, err := OpenCertificate(dir, nil); err == nil {
		t.Error("a damaged certificate was accepted or replaced")
	}
}

// TestHandshake does the handshake of the stock xe client, which offers two
// suites and one curve and nothing else, and those of others.
func TestHandshake(t *testing.T) {
	c, _ := openCertificate(t)
	l, err := tls.Listen("tcp", "127.0.0.1:0", c.TLS())
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	go func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				defer func() { _ = conn.Close() }()
				_, _ = io.Copy(conn, conn)
			}()
		}
	}()
	roots := x509.NewCertPool()
	roots.AddCert(c.Leaf())
	xe := func(suite uint16) *tls.Config {
		return &tls.Config{
			MinVersion: tls.VersionTLS12, MaxVersion: tls.VersionTLS12, InsecureSkipVerify: true,
			CipherSuites: []uint16{suite}, CurvePreferences: []tls.CurveID{tls.CurveP384},
		}
	}
	tests := []struct {
		name   string
		client *tls.Config
		ok     bool
	}{
		{"xe AES256", xe(tls.TLS_ECDHE_RSA_WITH_AES_256_GCM_SHA384), true},
		{"xe AES128", xe(tls.TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256), true},
		{"TLS 1.3 verified against the certificate itself", &tls.Config{RootCAs: roots, ServerName: "localhost", MinVersion: tls.VersionTLS13}, true},
		{"HTTP/2 offered", &tls.Config{InsecureSkipVerify: true, NextProtos: []string{"h2", "http/1.1"}}, true},
		{"TLS 1.1", &tls.Config{InsecureSkipVerify: true, MinVersion: tls.VersionTLS10, MaxVersion: tls.VersionTLS11}, false},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			conn, err := tls.DialWithDialer(&net.Dialer{Timeout: 30 * time.Second}, "tcp", l.Addr().String(), tt.client)
			if (err == nil) != tt.ok {
				t.Fatalf("handshake: %v, want success %v", err, tt.ok)
			}
			if err != nil {
				return
			}
			defer func() { _ = conn.Close() }()
			if p := conn.ConnectionState().NegotiatedProtocol; p == "h2" {
				t.Error("negotiated HTTP/2, whose connections cannot be taken over")
			}
		})
	}
}

// TestCertificateInTheMaking: a handshake that comes too early waits.
func TestCertificateInTheMaking(t *testing.T) {
	made, _ := openCertificate(t)
	c := &Certificate{ready: make(chan struct{})}
	client, srv := net.Pipe()
	defer client.Close()
	server := tls.Server(srv, c.TLS())
	shaken := make(chan error, 1)
	go func() { shaken <- server.HandshakeContext(t.Context()) }()
	go func() {
		c.loaded.Store(made.loaded.Load())
		close(c.ready)
	}()
	if err := tls.Client(client, &tls.Config{InsecureSkipVerify: true}).HandshakeContext(t.Context()); err != nil {
		t.Error(err)
	}
	go func() { _, _ = io.Copy(io.Discard, client) }()
	if err := <-shaken; err != nil {
		t.Error(err)
	}
}
