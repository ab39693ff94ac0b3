package main

import (
	"net"
	"path/filepath"
	"strings"
	"testing"
)

func TestNBDListeners(t *testing.T) {
	dir := t.TempDir()
	// Somebody has the default port: this test, or whoever was first.
	if l, err := net.Listen("tcp", defaultNBD); err == nil {
		defer l.Close()
	}
	eps, err := nbdAddresses{plain: "localhost:0"}.listen(t.Context(), filepath.Join(dir, "a"))
	if err != nil {
		t.Fatalf("with the default port in use: %v", err)
	}
	defer eps.close()
	if eps.tls != nil {
		t.Errorf("listens at %v, which is in use", eps.tls.Addr())
	}
	urls := strings.Join(eps.urls(), " ")
	if !strings.Contains(urls, "nbd+unix:///?socket="+dir+"/a") || !strings.Contains(urls, " nbd://127.0.0.1:") {
		t.Errorf("URLs %s", urls)
	}
	if got := port(eps.plain); got == 0 || port(nil) != 0 {
		t.Errorf("port %d", got)
	}
	for want, a := range map[string]nbdAddresses{
		"is for loopback":               {tls: off, plain: "192.0.2.1:1"},
		"--nbd nowhere: not an address": {tls: "nowhere"},
		"--nbd-plain nowhere":           {plain: "nowhere"},
	} {
		if err := a.validate(); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%+v: %v, want %q", a, err, want)
		}
	}
	const want = "the port is in use"
	taken := nbdAddresses{tls: eps.plain.Addr().String()}
	if _, err := taken.listen(t.Context(), filepath.Join(dir, "b")); taken.validate() != nil || err == nil || !strings.Contains(err.Error(), want) {
		t.Errorf("%+v: %v, want %q", taken, err, want)
	}
	if eps, err = (nbdAddresses{tls: off}).listen(t.Context(), filepath.Join(dir, "c")); err != nil || eps.tls != nil || eps.plain != nil {
		t.Errorf("off: %v", err)
	}
	eps.close()
}
