package login

import (
	"encoding/xml"
	"fmt"
	"runtime"
	"strings"
	"testing"
	"time"
	"unsafe"
	"weak"

	"github.com/google/go-cmp/cmp"
)

// report is the body of the alert as clients read it.
type report struct {
	Total   int     `xml:"total"`
	Known   []known `xml:"known"`
	Unknown int     `xml:"unknown"`
}

type known struct {
	Username   string `xml:"username"`
	Originator string `xml:"originator"`
	Useragent  string `xml:"useragent"`
	IP         string `xml:"ip"`
	Number     int    `xml:"number"`
	Date       string `xml:"date"`
}

// The body says who was refused how often, the worst first, whatever they call themselves.
func TestRefusalsBody(t *testing.T) {
	var r Refusals
	if body := r.Take(); body != "" {
		t.Errorf("of nothing: %s", body)
	}
	at := time.Date(2026, 1, 2, 3, 4, 5, 0, time.FixedZone("", 3600))
	r.Add(Attempt{User: "bob", Peer: "@"}, at)
	for range 2 {
		r.Add(Attempt{User: "root", Originator: "test", UserAgent: `<"&>`, Peer: "192.0.2.7:4711"}, at)
	}
	text := r.Take()
	var got report
	if err := xml.Unmarshal([]byte(text), &got); err != nil {
		t.Fatalf("%v in %s", err, text)
	}
	want := report{Total: 3, Known: []known{
		{"root", "test", `<"&>`, "192.0.2.7", 2, "20260102T02:04:05Z"}, {"bob", "", "", "", 1, "20260102T02:04:05Z"},
	}}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("body (-want +got):\n%s", diff)
	}
}

// The names of refused logins do not keep the requests in memory that they came
// with.
func TestRefusalsKeepNoRequests(t *testing.T) {
	var r Refusals
	refused := func() weak.Pointer[byte] {
		body := make([]byte, 1<<20)
		text := unsafe.String(&body[0], len(body))
		r.Add(Attempt{User: text, Peer: "192.0.2.7:1", UserAgent: text[:10], Originator: text[:maxText]}, time.Unix(1_000_000_000, 0))
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
	if r.Take() == "" {
		t.Error("nothing was counted")
	}
}

// What clients say of themselves is bounded, and so is how many are told apart.
func TestRefusalsAreBounded(t *testing.T) {
	var r Refusals
	now := time.Unix(1_000_000_000, 0)
	for i := range maxClients + 10 {
		r.Add(Attempt{User: fmt.Sprint(i), Peer: fmt.Sprintf("192.0.2.%d:1", i%256), UserAgent: strings.Repeat("ü", 1000)}, now)
	}
	r.Add(Attempt{User: "7", Peer: "unix"}, now) // beyond the bound
	r.Add(Attempt{User: "7", Peer: "192.0.2.7:9", UserAgent: strings.Repeat("ü", 1000)}, now)
	var got report
	if err := xml.Unmarshal([]byte(r.Take()), &got); err != nil {
		t.Fatal(err)
	}
	if got.Total != maxClients+12 || got.Unknown != 11 || len(got.Known) != toldClients {
		t.Fatalf("report %+v", got)
	}
	if worst := got.Known[0]; worst.Username != "7" || worst.Number != 2 || worst.IP != "192.0.2.7" || len(worst.Useragent) > maxText {
		t.Errorf("worst client %+v", worst)
	}
	if again := r.Take(); again != "" {
		t.Errorf("counted twice: %s", again)
	}
}
