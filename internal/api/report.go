package api

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"strings"
	"time"

	"coppice/internal/db"
	"coppice/internal/xapi"
)

// CallReport says what became of one call: who sent what, and the outcome.
// Config.OnCall gets one for each message, login and transfer that has ended,
// also for those that were refused.
type CallReport struct {
	Name    string       // "VDI.snapshot", or the HTTP action of a transfer
	Message *xapi.Method // nil for a transfer
	Args    []any        // typed, of Message, without the session; nil when they were never understood
	Detail  string       // what a transfer is about
	Async   bool

	Origin  Origin
	User    string // "" when nobody is logged in
	Role    string
	Session string // names the session without being it
	Task    string // reference of the task, when it has a record

	Told  *xapi.Error // nil for success
	Begun time.Time
	Took  time.Duration
}

// report tells Config.OnCall about a call that has ended.
func (a *API) report(r CallReport, s *session, told error) {
	if a.cfg.OnCall == nil {
		return
	}
	r.Took = time.Since(r.Begun)
	if s != nil {
		r.User, r.Role, r.Session = s.user, s.role, SessionName(string(s.ref))
		if s.superuser {
			r.Role = "root"
		}
	}
	if told != nil {
		r.Told, _ = errors.AsType[*xapi.Error](told)
	}
	a.cfg.OnCall(r)
}

// about names the objects of a transfer.
func (r TransferRequest) about() string {
	var parts []string
	for _, p := range [][2]string{{"vdi", r.VDI}, {"base", r.Base}, {"sr", r.SR}, {"format", r.Format}} {
		if p[1] != "" {
			parts = append(parts, p[0]+"="+p[1])
		}
	}
	return strings.Join(parts, " ")
}

// SessionName is what logs call a session, whose reference is a secret.
func SessionName(ref string) string {
	sum := sha256.Sum256([]byte(ref))
	return hex.EncodeToString(sum[:6])
}

// SRFigures are the sizes of one SR, in bytes.
type SRFigures struct {
	UUID, Name, Type          string
	Attached                  bool
	Total, Used, VirtualAlloc int64
	Disks                     int
}

// Figures are what the server counts of itself.
type Figures struct {
	SRs      []SRFigures
	Objects  map[string]int // by class, those that have any
	Sessions int
	Running  int // calls and transfers in progress
	Tasks    map[xapi.TaskStatusType]int
	Waiting  int // calls that wait for a claim
	Revision uint64
}

// Figures counts.
func (a *API) Figures() Figures {
	f := Figures{Objects: map[string]int{}, Tasks: map[xapi.TaskStatusType]int{}}
	_ = a.db.View(func(tx *db.Tx) error {
		f.Revision = tx.Revision()
		for _, class := range a.model.Ordered {
			if n := tx.Count(class); n > 0 {
				f.Objects[class.Name] = n
			}
		}
		for _, t := range db.All[xapi.Task](tx) {
			f.Tasks[t.Status]++
		}
		for ref, sr := range db.All[xapi.SR](tx) {
			f.SRs = append(f.SRs, SRFigures{
				UUID: sr.UUID, Name: sr.NameLabel, Type: sr.Type, Attached: srAttached(tx, ref),
				Total: sr.PhysicalSize, Used: sr.PhysicalUtilisation, VirtualAlloc: sr.VirtualAllocation, Disks: len(sr.VDIs),
			})
		}
		return nil
	})
	a.sessions.mu.RLock()
	f.Sessions = len(a.sessions.byRef)
	a.sessions.mu.RUnlock()
	a.running.mu.Lock()
	f.Running = a.running.active
	a.running.mu.Unlock()
	f.Waiting = a.claims.Waiting()
	return f
}

// Ready says why the server cannot do its work, or nil: it is stopping, its
// database takes no changes, or an SR that should be attached is not.
func (a *API) Ready(ctx context.Context) error {
	if a.ctx.Err() != nil {
		return errStopping
	}
	var failed error
	err := a.db.Update(ctx, func(tx *db.Tx) error {
		for _, pbd := range db.All[xapi.PBD](tx) {
			if why := pbd.OtherConfig[unavailableKey]; why != "" {
				failed = fmt.Errorf("an SR is not available: %s", why)
			}
		}
		return errNothing // nothing to commit, but a database that cannot says so
	})
	if errors.Is(err, errNothing) {
		return failed
	}
	return err
}

// Authorized says whether a session may use an HTTP action of the datamodel;
// an *xapi.Error when not. It counts as a use of the session.
func (a *API) Authorized(ref xapi.Ref[xapi.Session], action string) error {
	s, err := a.session(ref)
	if err == nil {
		err = a.authorizeHTTP(s, action)
	}
	if err != nil {
		return a.apiError(err)
	}
	return nil
}
