package api

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

	"coppice/internal/db"
	"coppice/internal/xapi"
)

const (
	// failedLoginInterval is how often the alert FAILED_LOGIN_ATTEMPTS tells of
	// refused logins, when there are any. It is xapi's.
	failedLoginInterval = time.Hour
	// maxLoginClients is how many clients are told apart in that time; the
	// attempts of more are counted together.
	maxLoginClients = 1000
	// toldLoginClients is how many clients the alert names, the worst first.
	toldLoginClients = 3
	// maxLoginText is how much of what a client says of itself is kept, in bytes.
	maxLoginText = 256
)

// failedLogins counts refused logins until the next alert.
type failedLogins struct {
	mu      sync.Mutex
	clients map[loginClient]*loginAttempts
	others  int // by clients beyond maxLoginClients
}

// loginClient is where a login comes from. The names of its fields are those
// of the alert.
type loginClient struct{ username, originator, useragent, ip string }

type loginAttempts struct {
	number int
	last   time.Time
}

// add counts a login that was refused.
func (f *failedLogins) add(o Origin, user string, now time.Time) {
	ip, _, err := net.SplitHostPort(o.Peer)
	if err != nil {
		ip = "" // the Unix socket
	}
	c := loginClient{short(user), short(o.Originator), short(o.UserAgent), strings.Clone(ip)}
	f.mu.Lock()
	defer f.mu.Unlock()
	known := f.clients[c]
	if known == nil {
		if len(f.clients) >= maxLoginClients {
			f.others++
			return
		}
		if f.clients == nil {
			f.clients = map[loginClient]*loginAttempts{}
		}
		known = &loginAttempts{}
		f.clients[c] = known
	}
	known.number, known.last = known.number+1, now
}

// short copies the beginning of a text that a client made up, up to a rune, so
// that the rest of the request is not kept with it.
func short(s string) string {
	if len(s) > maxLoginText {
		s = strings.ToValidUTF8(s[:maxLoginText], "")
	}
	return strings.Clone(s)
}

// take returns the body of the alert about what was counted, "" for nothing,
// and begins to count anew.
func (f *failedLogins) take() string {
	f.mu.Lock()
	clients, others := f.clients, f.others
	f.clients, f.others = nil, 0
	f.mu.Unlock()
	if len(clients) == 0 {
		return ""
	}
	total := others
	for _, a := range clients {
		total += a.number
	}
	worst := slices.SortedFunc(maps.Keys(clients), func(x, y loginClient) int {
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
	for _, c := range worst[:min(len(worst), toldLoginClients)] {
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

// tellFailedLogins raises the alert about refused logins until the API closes.
// What has been counted by then is in the log.
func (a *API) tellFailedLogins() {
	for {
		timer := time.NewTimer(failedLoginInterval)
		select {
		case <-a.ctx.Done():
			timer.Stop()
			return
		case <-timer.C:
		}
		body := a.failedLogins.take()
		if body == "" {
			continue
		}
		err := a.db.Update(a.ctx, func(tx *db.Tx) error {
			_, pool, err := a.pool(tx)
			if err != nil {
				return err
			}
			return a.alert(tx, "FAILED_LOGIN_ATTEMPTS", xapi.ClsPool, pool.UUID, body)
		})
		if err != nil && a.ctx.Err() == nil {
			a.log.Error("an alert could not be raised", "alert", "FAILED_LOGIN_ATTEMPTS", "body", body, "err", err)
		}
	}
}
