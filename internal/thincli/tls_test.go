package thincli

import (
	"bytes"
	"crypto/rand"
	"crypto/rsa"
	"crypto/tls"
	"crypto/x509"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"testing"
)

// Both connections use TLS to a server that certifies itself and offers no
// more than the stock client understands.
func TestTLS(t *testing.T) {
	key, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(1)}
	cert, err := x509.CreateCertificate(rand.Reader, template, template, &key.PublicKey, key)
	if err != nil {
		t.Fatal(err)
	}
	config := &tls.Config{
		Certificates:     []tls.Certificate{{Certificate: [][]byte{cert}, PrivateKey: key}},
		MinVersion:       tls.VersionTLS12,
		MaxVersion:       tls.VersionTLS12,
		CurvePreferences: []tls.CurveID{tls.CurveP384},
		CipherSuites:     []uint16{tls.TLS_ECDHE_RSA_WITH_AES_256_GCM_SHA384},
	}
	secure := func(fn func(*wire)) func(*wire) {
		return func(w *wire) {
			var conn net.Conn = tls.Server(w.Conn, config)
			defer conn.Close()
			fn(newWire(t, conn))
		}
	}
	image := bytes.Repeat([]byte("0123456789"), 500<<10)
	p := newPeer(
		t,
		secure(func(w *wire) {
			w.hello()
			w.send(HTTPGet{"f", "/x"})
			w.expectMessage(OK)
			w.send(HTTPPut{"sent", "/y"})
			w.expectMessage(OK)
			w.send(Exit{0})
		}),
		secure(func(w *wire) {
			w.head()
			w.send("HTTP/1.1 200 OK\r\n\r\n", image)
		}),
		secure(func(w *wire) {
			w.head()
			w.send("HTTP/1.1 200 OK\r\n\r\n")
			w.expect(image)
			w.expectEnd()
		}),
	)
	if err := os.WriteFile(filepath.Join(p.dir, "sent"), image, 0o600); err != nil {
		t.Fatal(err)
	}
	p.check(p.run("-s", "host", "x", "f=f", "g=sent"), 0, "", "")
	if got, err := os.ReadFile(filepath.Join(p.dir, "f")); err != nil || !bytes.Equal(got, image) {
		t.Errorf("file of %d bytes, %v, want %d", len(got), err, len(image))
	}
	for _, address := range p.dialed {
		if address != "host:443" {
			t.Errorf("connected to %s", address)
		}
	}
}
