package remote

import (
	"errors"
	"net"
	"net/http"
	"net/netip"
	"os"
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

func TestParseURL(t *testing.T) {
	tests := []struct {
		text     string
		insecure bool
		want     string // "" for a refusal
	}{
		{"https://host", false, "https://host:443/"},
		{"https://host/", false, "https://host:443/"},
		{"https://192.0.2.1:8443", false, "https://192.0.2.1:8443/"},
		{"https://[2001:db8::1]", false, "https://[2001:db8::1]:443/"},
		{"http://host", true, "http://host:80/"},
		{"http://host", false, ""},
		{"ftp://host", true, ""},
		{"file:///etc/passwd", true, ""},
		{"host", true, ""},
		{"https:host", true, ""},
		{"https://", true, ""},
		{"https://:443", true, ""},
		{"https://host:port", true, ""},
		{"https://root:hidden@host", true, ""},
		{"https://host/path", true, ""},
		{"https://host?query", true, ""},
		{"https://host/?", true, ""},
		{"https://host/#fragment", true, ""},
		{"https://ho\nst", true, ""},
	}
	for _, tt := range tests {
		u, err := parseURL(tt.text, tt.insecure)
		if tt.want != "" {
			if err != nil || u.String() != tt.want {
				t.Errorf("%q: %v, %v; want %s", tt.text, u, err, tt.want)
			}
			continue
		}
		if _, ok := errors.AsType[*URLError](err); !ok {
			t.Errorf("%q: %v, %v; want a URLError", tt.text, u, err)
		} else if strings.Contains(err.Error(), "hidden") {
			t.Errorf("%q: the error tells the password: %v", tt.text, err)
		}
	}
}

func TestNetworks(t *testing.T) {
	some, err := ParseNetworks("10.0.0.0/8, 127.0.0.1,2001:db8::/32")
	if err != nil {
		t.Fatal(err)
	}
	none, err := ParseNetworks("off")
	if err != nil {
		t.Fatal(err)
	}
	tests := []struct {
		addr                  string
		byDefault, some, none bool
	}{
		{"192.0.2.1", true, false, false},
		{"10.1.2.3", true, true, false},
		{"::ffff:10.1.2.3", true, true, false},
		{"2001:db8::1", true, true, false},
		{"127.0.0.1", false, true, false},
		{"127.0.0.2", false, false, false},
		{"::1", false, false, false},
		{"::ffff:127.0.0.2", false, false, false},
		{"169.254.169.254", false, false, false},
		{"fe80::1%lo", false, false, false},
		{"fd00:ec2::254", false, false, false},
		{"fd00:ec2::253", true, false, false},
		{"fd20:ce::254", false, false, false},
		{"100.100.100.200", false, false, false},
		{"::ffff:100.100.100.200", false, false, false},
		{"168.63.129.16", false, false, false},
		{"192.0.0.192", false, false, false},
		{"0.0.0.0", false, false, false},
		{"::", false, false, false},
		{"224.0.0.1", false, false, false},
		{"ff02::1", false, false, false},
	}
	for _, tt := range tests {
		a := netip.MustParseAddr(tt.addr)
		if got := Networks(nil).Allow(a); got != tt.byDefault {
			t.Errorf("%s by default: %v", a, got)
		}
		if got := some.Allow(a); got != tt.some {
			t.Errorf("%s in %v: %v", a, some, got)
		}
		if none.Allow(a) != tt.none {
			t.Errorf("%s where nothing is allowed", a)
		}
	}
	for _, bad := range []string{"", "10.0.0.0/33", "host", "10.0.0.1,"} {
		if n, err := ParseNetworks(bad); err == nil {
			t.Errorf("ParseNetworks(%q) = %v", bad, n)
		}
	}
}

func TestFingerprint(t *testing.T) {
	plain := strings.Repeat("0f", 32)
	f, err := ParseFingerprint(plain)
	if err != nil {
		t.Fatal(err)
	}
	if again, err := ParseFingerprint(f.String()); err != nil || again != f {
		t.Errorf("%v: %v, %v", f, again, err)
	}
	for _, bad := range []string{"", plain[2:], plain + "00", "x" + plain[1:]} {
		if _, err := ParseFingerprint(bad); err == nil {
			t.Errorf("%q is no fingerprint", bad)
		}
	}
}

// The time that a server may be silent for begins with the request, not when
// somebody began to wait for what it might say.
func TestIdleConn(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		here, there := net.Pipe()
		defer there.Close()
		c := &idleConn{here, time.Minute}
		defer c.Close()
		type reply struct {
			n   int
			err error
		}
		read := make(chan reply)
		go func() {
			for range 2 {
				n, err := c.Read(make([]byte, 8))
				read <- reply{n, err}
			}
		}()
		time.Sleep(59 * time.Second)
		go func() {
			_, _ = there.Read(make([]byte, 8))
			time.Sleep(59 * time.Second)
			_, _ = there.Write([]byte("answer"))
		}()
		if _, err := c.Write([]byte("request")); err != nil {
			t.Fatal(err)
		}
		if r := <-read; r.n != 6 || r.err != nil {
			t.Errorf("read %d bytes, %v", r.n, r.err)
		}
		if r := <-read; !errors.Is(r.err, os.ErrDeadlineExceeded) {
			t.Errorf("a server that is silent: %d bytes, %v", r.n, r.err)
		}
	})
}

// Only the host of a redirection is followed, and only to where the same may be
// asked for.
func TestElsewhere(t *testing.T) {
	tests := []struct {
		named, location string
		want            string // "" when it is not followed
	}{
		{"https://a", "https://b/export_raw_vdi?session_id=x&vdi=y", "https://b:443/"},
		{"https://a", "https://b/export_raw_vdi/", "https://b:443/"},
		{"https://a", "https://[2001:db8::1]/export_raw_vdi", "https://[2001:db8::1]:443/"},
		{"https://a:8443", "https://b:8443/export_raw_vdi", "https://b:8443/"},
		{"https://a:8443", "https://b/export_raw_vdi", "https://b:443/"},
		{"https://a:8443", "//b/export_raw_vdi", "https://b:443/"},
		{"http://a:8080", "https://b/export_raw_vdi", "https://b:443/"},
		{"http://a:8080", "http://b:8080/export_raw_vdi", "http://b:8080/"},
		{"https://a", "http://b/export_raw_vdi", ""},
		{"https://a", "https://b:22/export_raw_vdi", ""},
		{"https://a:8443", "https://b:9443/export_raw_vdi", ""},
		{"https://a", "https://b/latest/meta-data", ""},
		{"https://a", "https://user:hidden@b/export_raw_vdi", ""},
		{"https://a", "gopher://b/export_raw_vdi", ""},
		{"https://a", "https:///export_raw_vdi", ""},
		{"https://a", "", ""},
	}
	for _, tt := range tests {
		u, err := parseURL(tt.named, true)
		if err != nil {
			t.Fatal(err)
		}
		asked := *u
		asked.Path = exportPath
		c := &Client{data: *u}
		resp := &http.Response{StatusCode: http.StatusFound, Header: http.Header{"Location": {tt.location}}, Request: &http.Request{URL: &asked}}
		got := ""
		if to, ok := c.elsewhere(resp); ok {
			got = to.String()
		}
		if got != tt.want {
			t.Errorf("%s leads to %s: %q, want %q", tt.named, tt.location, got, tt.want)
		}
	}
}
