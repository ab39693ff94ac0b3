package api

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"math/big"
	"strings"
	"testing"
	"time"

	"coppice/internal/xapi"
)

// testCertificate makes a certificate.
func testCertificate(t *testing.T, serial int64) *x509.Certificate {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(serial), Subject: pkix.Name{CommonName: "test"},
		NotBefore: time.Unix(1_700_000_000, 0), NotAfter: time.Unix(1_900_000_000, 0),
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, &key.PublicKey, key)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return cert
}

// Class Certificate has what TLS listeners show, and follows it.
func TestCertificateRecord(t *testing.T) {
	var shown *x509.Certificate
	c := newCore(t, func(cfg *Config) { cfg.Certificate = func() *x509.Certificate { return shown } })
	want := func(n int) {
		t.Helper()
		if err := c.noteCertificate(t.Context()); err != nil {
			t.Fatal(err)
		}
		recs := c.call("host.get_certificates", c.host).([]xapi.Ref[xapi.Certificate])
		if len(recs) != n {
			t.Fatalf("%d certificates, want %d", len(recs), n)
		}
		for _, ref := range recs {
			rec := record(c, ref)
			sum := sha256.Sum256(shown.Raw)
			if rec.FingerprintSha256 != colons(sum[:]) || rec.Type != xapi.CertificateTypeHost || rec.Host != c.host || !rec.NotAfter.Equal(shown.NotAfter) {
				t.Errorf("record %+v", rec)
			}
			if len(rec.FingerprintSha256) != 95 || strings.ToUpper(rec.FingerprintSha1) != rec.FingerprintSha1 || len(rec.FingerprintSha1) != 59 {
				t.Errorf("fingerprints %s, %s", rec.FingerprintSha1, rec.FingerprintSha256)
			}
		}
	}
	want(0)
	c.wantFailure("INTERNAL_ERROR", c.root, "host.get_server_certificate", c.host)
	shown = testCertificate(t, 1)
	want(1)
	before := c.db.Revision()
	want(1)
	if after := c.db.Revision(); after != before {
		t.Error("nothing has changed, but there was a commit")
	}
	shown = testCertificate(t, 2)
	want(1)
	block, rest := pem.Decode([]byte(c.call("host.get_server_certificate", c.host).(string)))
	if block == nil || len(rest) > 0 || block.Type != "CERTIFICATE" || string(block.Bytes) != string(shown.Raw) {
		t.Errorf("certificate %+v, %q", block, rest)
	}
	c.wantFailure("HANDLE_INVALID|host|OpaqueRef:x", c.root, "host.get_server_certificate", "OpaqueRef:x")
}
