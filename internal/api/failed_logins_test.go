package api

import (
	"encoding/xml"
	"fmt"
	"runtime"
	"strings"
	"testing"
	"testing/synctest"
	"time"
	"unsafe"
	"weak"

	"github.com/google/go-cmp/cmp"

	"coppice/internal/xapi"
)

// loginReport is the body of the alert as clients read it.
type loginReport struct {
	Total   int          `xml:"total"`
	Known   []knownLogin `xml:"known"`
	Unknown int          `xml:"unknown"`
}

type knownLogin struct {
	Username   string `xml:"username"`
	Originator string `xml:"originator"`
	Useragent  string `xml:"useragent"`
	IP         string `xml:"ip"`
	Number     int    `xml:"number"`
	Date       string `xml:"date"`
}

// Refused logins of an hour make one alert, an hour without makes none.
func TestFailedLoginAlert(t *testing.T) {
	verifier := HashPassword("right")
	synctest.Test(t, func(t *testing.T) {
		c := newCore(t, func(cfg *Config) { cfg.RootPassword = verifier })
		done := make(chan struct{})
		go func() { defer close(done); c.tellFailedLogins() }()
		from := Origin{Peer: "192.0.2.7:4711", UserAgent: `<"&>`, Originator: "test"}
		for range 2 {
			if _, err := c.Login(t.Context(), from, "root", "wrong"); code(err) != xapi.ErrSessionAuthenticationFailed {
				t.Errorf("a wrong password: %v", err)
			}
		}
		last := time.Now()
		if _, err := c.Login(t.Context(), from, "root", "right"); err != nil {
			t.Error(err)
		}
		for range 3 {
			time.Sleep(failedLoginInterval)
		}
		synctest.Wait()
		all := c.call("message.get_all_records").(messages)
		if len(all) != 1 {
			t.Errorf("%d messages, want 1", len(all))
		}
		for _, m := range all {
			if m.Name != "FAILED_LOGIN_ATTEMPTS" || m.Cls != xapi.ClsPool || m.ObjUUID != record(c, c.pool).UUID || m.Priority != 3 {
				t.Errorf("message %+v", m)
			}
			var got, want loginReport
			if err := xml.Unmarshal([]byte(m.Body), &got); err != nil {
				t.Fatalf("%v in %s", err, m.Body)
			}
			want.Total = 2
			want.Known = append(want.Known, knownLogin{"root", "test", `<"&>`, "192.0.2.7", 2, last.UTC().Format("20060102T15:04:05Z")})
			if diff := cmp.Diff(want, got); diff != "" {
				t.Errorf("body (-want +got):\n%s", diff)
			}
		}
		c.stop(errStopping)
		<-done
	})
}

// The names of refused logins do not keep the requests in memory that they came
// with.
func TestFailedLoginsKeepNoRequests(t *testing.T) {
	var f failedLogins
	refused := func() weak.Pointer[byte] {
		body := make([]byte, 1<<20)
		text := unsafe.String(&body[0], len(body))
		f.add(Origin{Peer: "192.0.2.7:1", UserAgent: text[:10], Originator: text[:maxLoginText]}, text, time.Unix(1_000_000_000, 0))
		return weak.Make(&body[0])
	}
	gone := refused()
	for range 10 { // the collector is free to find it late
		if runtime.GC(); gone.Value() == nil {
			break
		}
	}
	if gone.Value() != nil {
		t.Error("a request is kept in memory")
	}
	if f.take() == "" {
		t.Error("nothing was counted")
	}
}

// What clients say of themselves is bounded, and so is how many are told apart.
func TestFailedLoginBounds(t *testing.T) {
	var f failedLogins
	now := time.Unix(1_000_000_000, 0)
	for i := range maxLoginClients + 10 {
		f.add(Origin{Peer: fmt.Sprintf("192.0.2.%d:1", i%256), UserAgent: strings.Repeat("ü", 1000)}, fmt.Sprint(i), now)
	}
	f.add(Origin{Peer: "unix"}, "7", now) // beyond the bound
	f.add(Origin{Peer: "192.0.2.7:9", UserAgent: strings.Repeat("ü", 1000)}, "7", now)
	var got loginReport
	if err := xml.Unmarshal([]byte(f.take()), &got); err != nil {
		t.Fatal(err)
	}
	if got.Total != maxLoginClients+12 || got.Unknown != 11 || len(got.Known) != toldLoginClients {
		t.Fatalf("report %+v", got)
	}
	if worst := got.Known[0]; worst.Username != "7" || worst.Number != 2 || worst.IP != "192.0.2.7" || len(worst.Useragent) > maxLoginText {
		t.Errorf("worst client %+v", worst)
	}
	if again := f.take(); again != "" {
		t.Errorf("counted twice: %s", again)
	}
}
