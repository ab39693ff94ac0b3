package server

import (
	"context"
	"crypto/rand"
	"crypto/rsa"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"time"
)

// Names of the two files of a certificate inside its directory.
const (
	certFile = "cert.pem"
	keyFile  = "key.pem"
)

// certLife is how long a generated certificate is valid. Clients of a
// self-signed certificate pin or ignore it, so an early end helps nobody.
const certLife = 10 * 365 * 24 * time.Hour

// certLook is how often a handshake looks whether the files of a certificate
// have changed.
const certLook = 5 * time.Second

// Certificate is the TLS certificate of the server. It may still be in the
// making while listeners are open already: a handshake waits for it. One that
// comes from files is loaded again when they change, so that whoever renews it
// need not tell; connections that are open keep the old one.
type Certificate struct {
	ready chan struct{} // closed when loaded is set, or err
	err   error

	loaded atomic.Pointer[tls.Certificate]
	files  certFiles
	log    func(err error) // hears of files that cannot be loaded again
}

// certFiles are the files that a certificate comes from, and when they were
// what they are.
type certFiles struct {
	cert, key string // paths; "" for a certificate that is in the making

	mu     sync.Mutex
	looked time.Time
	stamps [2]time.Time // of the files as they were last looked at
}

// LoadCertificate reads a certificate chain and its key from two PEM files.
func LoadCertificate(certPath, keyPath string) (*Certificate, error) {
	c := &Certificate{ready: make(chan struct{}), files: certFiles{cert: certPath, key: keyPath}}
	if err := c.Reload(); err != nil {
		return nil, err
	}
	close(c.ready)
	return c, nil
}

// Reload loads the files again. On an error the certificate stays what it is.
func (c *Certificate) Reload() error {
	c.files.mu.Lock()
	defer c.files.mu.Unlock()
	return c.load()
}

// load does what Reload says; files.mu is held.
func (c *Certificate) load() error {
	f := &c.files
	if f.cert == "" {
		return nil
	}
	f.stamps = [2]time.Time{modified(f.cert), modified(f.key)} // first: a change after this is seen next time
	cert, err := tls.LoadX509KeyPair(f.cert, f.key)
	if err != nil {
		return fmt.Errorf("certificate %s with key %s: %w", f.cert, f.key, err)
	}
	c.loaded.Store(&cert)
	return nil
}

// modified returns when a file was last changed, the zero time when there is
// none.
func modified(path string) time.Time {
	info, err := os.Stat(path)
	if err != nil {
		return time.Time{}
	}
	return info.ModTime()
}

// follow loads the files again if they have changed, and looks for that now
// and then. Files that cannot be loaded, because only one of them is new yet,
// are looked at again.
func (c *Certificate) follow(now time.Time) {
	f := &c.files
	if f.cert == "" || !f.mu.TryLock() {
		return
	}
	defer f.mu.Unlock()
	if now.Sub(f.looked) < certLook {
		return
	}
	f.looked = now
	if f.stamps == [2]time.Time{modified(f.cert), modified(f.key)} {
		return
	}
	if err := c.load(); err != nil {
		f.stamps = [2]time.Time{}
		if c.log != nil {
			c.log(err)
		}
	}
}

// OnReloadError has fn called when changed files cannot be loaded. It is
// called before the certificate is used.
func (c *Certificate) OnReloadError(fn func(error)) { c.log = fn }

// OpenCertificate returns the certificate kept in dir. When there is none it
// makes a self-signed one for hosts (names or addresses), which goes on in
// the background, and keeps it there, the key readable by its owner only.
// Making one never replaces files that are there; a crash leaves at worst a
// temporary file.
//
// The key is RSA because the stock xe client accepts nothing else.
func OpenCertificate(dir string, hosts []string) (*Certificate, error) {
	certPath, keyPath := filepath.Join(dir, certFile), filepath.Join(dir, keyFile)
	c, err := LoadCertificate(certPath, keyPath)
	if err == nil || !errors.Is(err, fs.ErrNotExist) {
		return c, err
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, err
	}
	c = &Certificate{ready: make(chan struct{})}
	go func() {
		defer close(c.ready)
		certPEM, keyPEM, err := selfSigned(hosts, time.Now())
		if err == nil {
			err = errors.Join(writeFile(keyPath, keyPEM, 0o600), writeFile(certPath, certPEM, 0o644))
		}
		var cert tls.Certificate
		if err == nil {
			cert, err = tls.X509KeyPair(certPEM, keyPEM)
		}
		c.loaded.Store(&cert)
		c.err = err
	}()
	return c, nil
}

// Wait returns when the certificate is there, or why it could not be made.
func (c *Certificate) Wait(ctx context.Context) error {
	select {
	case <-c.ready:
		return c.err
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// Leaf returns the parsed certificate, after Wait.
func (c *Certificate) Leaf() *x509.Certificate { return c.loaded.Load().Leaf }

// Current returns the parsed certificate, nil while it is in the making.
func (c *Certificate) Current() *x509.Certificate {
	select {
	case <-c.ready:
	default:
		return nil
	}
	c.follow(time.Now())
	return c.loaded.Load().Leaf
}

// TLS returns the configuration of a TLS listener that uses c. TLS 1.2 with
// an ECDHE-RSA suite on P-384 is what the stock xe client offers, and nothing
// but HTTP/1 can be taken over by a handler.
func (c *Certificate) TLS() *tls.Config {
	return &tls.Config{
		MinVersion: tls.VersionTLS12,
		NextProtos: []string{"http/1.1"},
		GetCertificate: func(hello *tls.ClientHelloInfo) (*tls.Certificate, error) {
			if err := c.Wait(hello.Context()); err != nil {
				return nil, err
			}
			c.follow(time.Now())
			return c.loaded.Load(), nil
		},
	}
}

// selfSigned makes an RSA-2048 key and a certificate for hosts, both as PEM.
func selfSigned(hosts []string, now time.Time) (certPEM, keyPEM []byte, err error) {
	key, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		return nil, nil, err
	}
	serial, err := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 127))
	if err != nil {
		return nil, nil, err
	}
	template := &x509.Certificate{
		SerialNumber:          serial,
		Subject:               pkix.Name{CommonName: "Coppice"},
		NotBefore:             now.Add(-time.Hour), // clocks differ
		NotAfter:              now.Add(certLife),
		KeyUsage:              x509.KeyUsageDigitalSignature | x509.KeyUsageKeyEncipherment | x509.KeyUsageCertSign,
		ExtKeyUsage:           []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
		BasicConstraintsValid: true,
		IsCA:                  true, // so that it can be its own trust anchor
	}
	for _, h := range hosts {
		if ip := net.ParseIP(h); ip != nil {
			template.IPAddresses = append(template.IPAddresses, ip)
		} else {
			template.DNSNames = append(template.DNSNames, h)
		}
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, &key.PublicKey, key)
	if err != nil {
		return nil, nil, err
	}
	keyDER, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return nil, nil, err
	}
	certPEM = pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})
	keyPEM = pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: keyDER})
	return certPEM, keyPEM, nil
}

// writeFile replaces a file by data, durably: after a crash there is either
// the old file or the new one.
func writeFile(path string, data []byte, mode fs.FileMode) (err error) {
	dir := filepath.Dir(path)
	tmp, err := os.CreateTemp(dir, filepath.Base(path)+".*") // 0600
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, os.Remove(tmp.Name()))
		}
	}()
	_, err = tmp.Write(data)
	if err = errors.Join(err, tmp.Chmod(mode), tmp.Sync(), tmp.Close()); err != nil {
		return err
	}
	if err := os.Rename(tmp.Name(), path); err != nil {
		return err
	}
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}
