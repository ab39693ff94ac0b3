package server

import (
	"net"
	"net/http"
	"net/http/httptest"
	"regexp"
	"strings"
	"testing"
)

// What the page tells people to do is so: the flags of xe go with how they got there, all formats are named, and every
// link leads somewhere.
func TestWelcome(t *testing.T) {
	s := New(Config{Version: "1.2.3"})
	get := func(url string) *httptest.ResponseRecorder {
		w := httptest.NewRecorder()
		s.ServeHTTP(w, httptest.NewRequest(http.MethodGet, url, nil))
		return w
	}
	link := regexp.MustCompile(`href="([^"]*)"`)
	for url, want := range map[string]string{
		"http://127.0.0.1:8080/":  "XE_EXTRA_ARGS=server=127.0.0.1,port=8080,nossl=true,",
		"https://127.0.0.1:8443/": "XE_EXTRA_ARGS=server=localhost,port=8443,username=",
		"https://disks.example/":  "curl -k -u root -o disk.vhd 'https://disks.example:443/export_raw_vdi?",
	} {
		page := get(url)
		body := page.Body.String()
		if page.Code != http.StatusOK || !strings.Contains(body, want) {
			t.Errorf("%s: status %d, want %q in:\n%s", url, page.Code, want, body)
		}
		for _, f := range formats() {
			if !strings.Contains(body, f.name) {
				t.Errorf("%s: no word of %s", url, f.name)
			}
		}
		links := link.FindAllStringSubmatch(body, -1)
		if len(links) == 0 {
			t.Errorf("%s: no links", url)
		}
		for _, l := range links {
			if handle, err := s.router.find(http.MethodGet, l[1]); err != nil || handle == nil || l[1] == "/" {
				t.Errorf("%s links to %s, which there is not", url, l[1])
			}
		}
	}
	if w := get("http://127.0.0.1:8080/nothing"); w.Code != http.StatusNotFound {
		t.Errorf("/nothing: status %d", w.Code)
	}
}

func TestWelcomePage(t *testing.T) {
	f := start(t, 0)
	got := f.send(t, "tcp", "GET / HTTP/1.0\r\nHost: "+f.tcp+"\r\n\r\n")
	_, port, _ := net.SplitHostPort(f.tcp)
	for _, want := range []string{"version 1.2.3", "server=127.0.0.1,port=" + port + ",", "nossl=true", "http://" + f.tcp + "/jsonrpc"} {
		if !strings.Contains(got, want) {
			t.Errorf("no %q in:\n%s", want, got)
		}
	}
}
