package login

import (
	"cmp"
	"encoding/xml"
	"fmt"
	"maps"
	"net"
	"slices"
	"strings"
	"sync"
	"time"
)

const (
	// maxClients is how many clients are told apart in that time; the
	// attempts of more are counted together.
	maxClients = 1000
	// toldClients is how many clients the alert names, the worst first.
	toldClients = 3
	// maxText is how much of what a client says of itself is kept, in bytes.
	maxText = 256
)

// Refusals counts refused logins until the next alert, FAILED_LOGIN_ATTEMPTS,
// within bounded memory. The zero value has none. It is safe for concurrent
// use.
type Refusals struct {
	mu      sync.Mutex
	clients map[client]*attempts
	others  int // by clients beyond maxClients
}

// Attempt is a login that was refused, and what its client says of itself.
type Attempt struct {
	User, Originator, UserAgent string
	Peer                        string // address and port; anything else is the Unix socket
}

// client is where a login comes from. The names of its fields are those
// of the alert.
type client struct{ username, originator, useragent, ip string }

type attempts struct {
	number int
	last   time.Time
}

// Add counts a login that was refused.
func (r *Refusals) Add(a Attempt, now time.Time) {
	ip, _, err := net.SplitHostPort(a.Peer)
	if err != nil {
		ip = "" // the Unix socket
	}
	c := client{short(a.User), short(a.Originator), short(a.UserAgent), strings.Clone(ip)}
	r.mu.Lock()
	defer r.mu.Unlock()
	known := r.clients[c]
	if known == nil {
		if len(r.clients) >= maxClients {
			r.others++
			return
		}
		if r.clients == nil {
			r.clients = map[client]*attempts{}
		}
		known = &attempts{}
		r.clients[c] = known
	}
	known.number, known.last = known.number+1, now
}

// short copies the beginning of a text that a client made up, up to a rune, so
// that the rest of the request is not kept with it.
func short(s string) string {
	if len(s) > maxText {
		s = strings.ToValidUTF8(s[:maxText], "")
	}
	return strings.Clone(s)
}

// Take returns the body of the alert about what was counted, "" for nothing,
// and begins to count anew.
func (r *Refusals) Take() string {
	r.mu.Lock()
	clients, others := r.clients, r.others
	r.clients, r.others = nil, 0
	r.mu.Unlock()
	if len(clients) == 0 {
		return ""
	}
	total := others
	for _, a := range clients {
		total += a.number
	}
	worst := slices.SortedFunc(maps.Keys(clients), func(x, y client) int {
		a, b := clients[x], clients[y]
		return cmp.Or(cmp.Compare(b.number, a.number), b.last.Compare(a.last), cmp.Compare(x.username, y.username), cmp.Compare(x.ip, y.ip))
	})
	var b strings.Builder
	element := func(name, value string) {
		if value != "" {
			fmt.Fprintf(&b, "<%s>", name)
			_ = xml.EscapeText(&b, []byte(value)) // a strings.Builder takes everything
			fmt.Fprintf(&b, "</%s>\n", name)
		}
	}
	fmt.Fprintf(&b, "<body>\n<total>%d</total>\n", total)
	for _, c := range worst[:min(len(worst), toldClients)] {
		b.WriteString("<known>\n")
		element("username", c.username)
		element("originator", c.originator)
		element("useragent", c.useragent)
		element("ip", c.ip)
		fmt.Fprintf(&b, "<number>%d</number>\n<date>%s</date>\n</known>\n", clients[c].number, clients[c].last.UTC().Format("20060102T15:04:05Z"))
	}
	if others > 0 {
		fmt.Fprintf(&b, "<unknown>%d</unknown>\n", others)
	}
	b.WriteString("</body>")
	return b.String()
}
