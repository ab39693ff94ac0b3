package api

import (
	"context"
	"crypto/sha1"
	"crypto/sha256"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"strings"
	"time"

	"coppice/internal/db"
	"coppice/internal/xapi"
)

// certificatePoll is how often class Certificate is compared with the
// certificate that the server shows: its files may be replaced at any time.
const certificatePoll = 10 * time.Second

// followCertificate keeps class Certificate up to date until the API closes.
func (a *API) followCertificate() {
	for pause := time.Duration(0); ; pause = certificatePoll {
		timer := time.NewTimer(pause)
		select {
		case <-a.ctx.Done():
			timer.Stop()
			return
		case <-timer.C:
		}
		if err := a.noteCertificate(a.ctx); err != nil && a.ctx.Err() == nil {
			a.log.Warn("the record of the certificate is out of date", "err", err)
		}
	}
}

// noteCertificate makes the only record of class Certificate that of the
// certificate which the server shows now. It stays as it is while there is
// none.
func (a *API) noteCertificate(ctx context.Context) error {
	cert := a.cfg.Certificate()
	if cert == nil {
		return nil
	}
	rec := certificateRecord(cert)
	outdated := func(tx *db.Tx) (stale []xapi.Ref[xapi.Certificate], known bool) {
		for ref, c := range db.All[xapi.Certificate](tx) {
			if c.FingerprintSha256 == rec.FingerprintSha256 && !known {
				known = true
			} else {
				stale = append(stale, ref)
			}
		}
		return stale, known
	}
	current := false
	err := a.db.View(func(tx *db.Tx) error {
		stale, known := outdated(tx)
		current = known && len(stale) == 0
		return nil
	})
	if err != nil || current {
		return err
	}
	return a.db.Update(ctx, func(tx *db.Tx) (err error) {
		stale, known := outdated(tx)
		if err := deleteEach(tx, stale); err != nil || known {
			return err
		}
		if rec.Host, _, err = a.host(tx); err != nil {
			return err
		}
		_, err = db.Insert(tx, rec)
		return err
	})
}

// certificateRecord describes a server's certificate.
func certificateRecord(cert *x509.Certificate) *xapi.Certificate {
	rec := xapi.New[xapi.Certificate]()
	rec.Type = xapi.CertificateTypeHost
	rec.NotBefore, rec.NotAfter = cert.NotBefore.UTC(), cert.NotAfter.UTC()
	one, two := sha1.Sum(cert.Raw), sha256.Sum256(cert.Raw)
	rec.FingerprintSha1, rec.FingerprintSha256 = colons(one[:]), colons(two[:])
	rec.Fingerprint = rec.FingerprintSha256
	return rec
}

// colons writes bytes as certificates' fingerprints are written: 0A:1B:….
func colons(b []byte) string {
	return strings.ReplaceAll(fmt.Sprintf("% X", b), " ", ":")
}

// hostGetServerCertificate returns the certificate of the host as PEM.
func (a *API) hostGetServerCertificate(ctx context.Context, c *Call, ref xapi.Ref[xapi.Host]) (string, error) {
	if err := a.onHost(ref, func(*db.Tx, *xapi.Host) error { return nil }); err != nil {
		return "", err
	}
	var cert *x509.Certificate
	if a.cfg.Certificate != nil {
		cert = a.cfg.Certificate()
	}
	if cert == nil {
		return "", xapi.InternalError(errors.New("the server has no certificate (yet)"))
	}
	return string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: cert.Raw})), nil
}
