package api

import (
	"cmp"
	"context"
	"errors"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"coppice/internal/db"
	"coppice/internal/event"
	"coppice/internal/login"
	"coppice/internal/users"
	"coppice/internal/xapi"
)

// sessionMethods binds the custom messages of class session.
func sessionMethods() map[string]any {
	return map[string]any{
		"session.login_with_password":             (*API).sessionLoginWithPassword,
		"session.logout":                          (*API).sessionLogout,
		"session.slave_local_login_with_password": (*API).sessionSlaveLocalLogin,
		"session.local_logout":                    (*API).sessionLocalLogout,
		"session.change_password":                 (*API).sessionChangePassword,
		"session.slave_login":                     (*API).sessionSlaveLogin,
		"session.slave_local_login":               (*API).sessionSlaveLocalLoginSecret,
		"session.get_all_subject_identifiers":     (*API).sessionGetAllSubjectIdentifiers,
		"session.logout_subject_identifier":       (*API).sessionLogoutSubjectIdentifier,
	}
}

// rootUser is the local superuser.
const rootUser = "root"

// Limits of the session table. The oldest sessions beyond a limit end.
const (
	sessionLife          = 24 * time.Hour // since the last use
	sessionsPerUser      = 500
	sessionsPerOrigin    = 500
	sessionTouch         = 10 * time.Minute // how fine last_active of the record is
	collectorPause       = 30 * time.Second
	sessionTrimThreshold = min(sessionsPerUser, sessionsPerOrigin)
)

// session is what dispatch needs to know of a session on every call; the
// record in db is for those who read fields.
type session struct {
	ref        xapi.Ref[xapi.Session]
	user       string
	role       string   // the user's role
	superuser  bool     // local root: passes every role check
	account    *account // of a user beside root, nil for root
	pool       bool     // of another member of the pool
	local      bool     // an emergency session, which has no record
	originator string
	created    time.Time

	ctx context.Context // ends with SESSION_INVALID at logout or expiry
	end context.CancelCauseFunc

	running   atomic.Int32 // calls and transfers in progress
	active    atomic.Int64 // last use, Unix nanoseconds
	published atomic.Int64 // last_active of the record, Unix nanoseconds

	registered event.Registration // of event.register
}

// sessionTable holds the live sessions.
type sessionTable struct {
	mu    sync.RWMutex
	byRef map[xapi.Ref[xapi.Session]]*session
}

func (t *sessionTable) init() { t.byRef = map[xapi.Ref[xapi.Session]]*session{} }

func (t *sessionTable) get(ref xapi.Ref[xapi.Session]) *session {
	t.mu.RLock()
	defer t.mu.RUnlock()
	return t.byRef[ref]
}

func errSessionInvalid(ref xapi.Ref[xapi.Session]) *xapi.Error {
	return xapi.NewError(xapi.ErrSessionInvalid, string(ref))
}

// session returns the live session that ref names and counts that as a use;
// SESSION_INVALID otherwise.
func (a *API) session(ref xapi.Ref[xapi.Session]) (*session, error) {
	s := a.sessions.get(ref)
	if s == nil {
		return nil, errSessionInvalid(ref)
	}
	now := a.now()
	s.active.Store(now.UnixNano())
	if shown := s.published.Load(); !s.local && now.UnixNano()-shown >= int64(sessionTouch) &&
		s.published.CompareAndSwap(shown, now.UnixNano()) {
		a.touchSession(s, now)
	}
	return s, nil
}

// LoggedIn tells whether a session is live, and does not count as a use of it.
func (a *API) LoggedIn(session string) bool {
	return a.sessions.get(xapi.Ref[xapi.Session](session)) != nil
}

// touchSession brings last_active of the session's record up to date.
func (a *API) touchSession(s *session, now time.Time) {
	err := a.db.Update(a.ctx, func(tx *db.Tx) error {
		return db.Modify(tx, s.ref, func(r *xapi.Session) { r.LastActive = now })
	})
	if err != nil && !errors.Is(err, context.Canceled) {
		a.log.Warn("session: last_active not updated", "err", err)
	}
}

// Login authenticates a user of the server and opens a session. A refusal is
// SESSION_AUTHENTICATION_FAILED [user, message] and comes after a pause that
// grows with repeated failures. Any password is right for a trusted origin.
func (a *API) Login(ctx context.Context, o Origin, user, password string) (ref xapi.Ref[xapi.Session], err error) {
	m := a.methods["session.login_with_password"]
	r := CallReport{Name: m.name, Message: m.msg, Args: []any{user}, Origin: o, Begun: time.Now()}
	s, err := a.login(ctx, o, user, password)
	if err != nil {
		told := a.apiError(err)
		a.report(r, nil, told)
		return xapi.NullRef, told
	}
	a.report(r, s, nil)
	return s.ref, nil
}

func (a *API) login(ctx context.Context, o Origin, user, password string) (*session, error) {
	s, err := a.authenticate(ctx, o, user, password)
	if err != nil {
		return nil, err
	}
	return s, a.openSession(s)
}

// authenticate checks the credentials and makes the session that they give
// right to. It is not open yet.
func (a *API) authenticate(ctx context.Context, o Origin, user, password string) (*session, error) {
	a.followUsers(ctx)
	acc := a.accounts.get(user) // before the password is checked: openSession sees what changes later
	if !o.Trusted {
		ok, err := a.password.Verify(ctx, user, password)
		if err != nil {
			return nil, err
		}
		if !ok {
			a.log.Warn("login refused", "user", user, "peer", o.Peer, "agent", o.UserAgent)
			a.refused.Add(login.Attempt{User: user, Originator: o.Originator, UserAgent: o.UserAgent, Peer: o.Peer}, a.now())
			return nil, errAuthentication(user)
		}
	}
	s := &session{
		ref: xapi.NewRef[xapi.Session](), user: user, role: a.model.Roles[0], superuser: true,
		originator: o.Originator, created: a.now(),
	}
	if acc != nil {
		if acc.role == "" {
			return nil, xapi.NewError(xapi.ErrSessionAuthorizationFailed, user, "The user has no role")
		}
		s.account, s.role, s.superuser = acc, acc.role, false
	} else if !o.Trusted && user != rootUser {
		return nil, errAuthentication(user) // added while the password was checked
	}
	s.ctx, s.end = context.WithCancelCause(a.ctx)
	s.active.Store(s.created.UnixNano())
	s.published.Store(s.created.UnixNano())
	return s, nil
}

func errAuthentication(user string) *xapi.Error {
	return xapi.NewError(xapi.ErrSessionAuthenticationFailed, user, "Authentication failure")
}

// openSession makes the session valid, gives it a record unless it is an emergency
// session, and ends the oldest ones beyond the limits.
func (a *API) openSession(s *session) error {
	if !s.local {
		err := a.db.Update(a.ctx, func(tx *db.Tx) error {
			r := xapi.New[xapi.Session]()
			r.AuthUserName = s.user
			r.IsLocalSuperuser = s.superuser
			r.LastActive, r.ValidationTime = s.created, s.created
			r.Originator = s.originator
			r.Pool = s.pool
			r.ThisHost = thisHost(tx)
			if acc := s.account; acc != nil {
				r.Subject, r.AuthUserSID = acc.ref, acc.Name
				r.RBACPermissions = a.roles.Permissions(s.role)
			}
			return db.InsertAs(tx, s.ref, r)
		})
		if err != nil {
			return err
		}
	}
	a.sessions.mu.Lock()
	a.sessions.byRef[s.ref] = s
	crowded := len(a.sessions.byRef) > sessionTrimThreshold
	a.sessions.mu.Unlock()
	if now := a.accounts.get(s.user); s.account != nil && (!s.account.same(now) || s.account.Verifier != now.Verifier) {
		// Changed since it was checked; whoever ended the sessions did not see this one.
		return cmpErr(a.logout(s.ref), errAuthentication(s.user))
	}
	if crowded {
		a.trimSessions(a.now())
	}
	return nil
}

// Logout ends a session: its blocked event calls return SESSION_INVALID, its
// other calls and its transfers go on. Ending a session that is not there is
// SESSION_INVALID.
func (a *API) Logout(ref xapi.Ref[xapi.Session]) error {
	m := a.methods["session.logout"]
	r := CallReport{Name: m.name, Message: m.msg, Begun: time.Now()}
	s := a.sessions.get(ref)
	err := a.logout(ref)
	a.report(r, s, err)
	return err
}

// logout is Logout for those whose call is reported already, and for the
// server itself.
func (a *API) logout(ref xapi.Ref[xapi.Session]) error {
	a.sessions.mu.Lock()
	s := a.sessions.byRef[ref]
	delete(a.sessions.byRef, ref)
	a.sessions.mu.Unlock()
	if s == nil {
		return errSessionInvalid(ref)
	}
	s.end(errSessionInvalid(ref))
	if s.local {
		return nil
	}
	return a.db.Update(context.WithoutCancel(a.ctx), func(tx *db.Tx) error {
		return db.Delete(tx, ref)
	})
}

// trimSessions ends the sessions that have not been used for sessionLife and
// the oldest ones of a user or an originator that has too many. One that has
// a call in progress is spared.
func (a *API) trimSessions(now time.Time) {
	a.sessions.mu.RLock()
	all := make([]*session, 0, len(a.sessions.byRef))
	for _, s := range a.sessions.byRef {
		all = append(all, s)
	}
	a.sessions.mu.RUnlock()
	slices.SortFunc(all, func(x, y *session) int { return cmp.Compare(y.active.Load(), x.active.Load()) })
	users, origins := map[string]int{}, map[string]int{}
	for _, s := range all {
		users[s.user]++
		if s.originator != "" {
			origins[s.originator]++
		}
		old := now.Sub(time.Unix(0, s.active.Load())) > sessionLife
		if (old || users[s.user] > sessionsPerUser || origins[s.originator] > sessionsPerOrigin) && s.running.Load() == 0 {
			if err := a.logout(s.ref); err != nil && !errors.Is(err, xapi.NewError(xapi.ErrSessionInvalid)) {
				a.log.Error("session: not removed", "err", err)
			}
		}
	}
}

// collect ends old sessions and removes old tasks, until the API closes.
func (a *API) collect() {
	tick := time.NewTicker(collectorPause)
	defer tick.Stop()
	for {
		select {
		case <-a.ctx.Done():
			return
		case <-tick.C:
			now := a.now()
			a.followUsers(a.ctx)
			a.trimSessions(now)
			a.collectTasks(now)
		}
	}
}

func (a *API) sessionLoginWithPassword(ctx context.Context, c *Call, user, password, _ /* version */, originator string) (xapi.Ref[xapi.Session], error) {
	o := c.Origin
	o.Originator = cmp.Or(originator, o.Originator)
	ctx, done := c.attended(ctx)
	defer done()
	s, err := a.login(ctx, o, user, password)
	if err != nil {
		return xapi.NullRef, err
	}
	c.opened = s
	return s.ref, nil
}

// sessionSlaveLocalLogin opens an emergency session: it is valid for every
// call, but has no record.
func (a *API) sessionSlaveLocalLogin(ctx context.Context, c *Call, user, password string) (xapi.Ref[xapi.Session], error) {
	ctx, done := c.attended(ctx)
	defer done()
	s, err := a.authenticate(ctx, c.Origin, user, password)
	if err != nil {
		return xapi.NullRef, err
	}
	s.local = true
	return s.ref, a.openSession(s)
}

func (a *API) sessionLogout(ctx context.Context, c *Call) error {
	return a.logout(c.Session.ref)
}

// sessionLocalLogout ends an emergency session, and no other.
func (a *API) sessionLocalLogout(ctx context.Context, c *Call) error {
	if !c.Session.local {
		return errSessionInvalid(c.Session.ref)
	}
	return a.logout(c.Session.ref)
}

// sessionSlaveLogin is how another member of the pool would log in, with a
// secret that only members have. The pool has one member and no secret.
func (a *API) sessionSlaveLogin(ctx context.Context, c *Call, host xapi.Ref[xapi.Host], secret string) (xapi.Ref[xapi.Session], error) {
	return xapi.NullRef, a.refuseMember(ctx, c, secret)
}

func (a *API) sessionSlaveLocalLoginSecret(ctx context.Context, c *Call, secret string) (xapi.Ref[xapi.Session], error) {
	return xapi.NullRef, a.refuseMember(ctx, c, secret)
}

// refuseMember refuses a pool secret, as late as a wrong password.
func (a *API) refuseMember(ctx context.Context, c *Call, secret string) error {
	ctx, done := c.attended(ctx)
	defer done()
	if _, err := a.password.Verify(ctx, "", secret); err != nil {
		return err
	}
	a.log.Warn("login of a pool member refused", "peer", c.Origin.Peer)
	return errAuthentication("")
}

// sessionChangePassword changes the password of the session's own user, which
// is root unless it is one of the users beside. Other sessions of the user
// stay.
func (a *API) sessionChangePassword(ctx context.Context, c *Call, old, password string) error {
	name, save := rootUser, a.cfg.SavePassword
	if c.Session.account != nil {
		name = c.Session.user
		save = func(name, verifier string) error {
			return a.cfg.Users.Change(name, func(u *users.User) error {
				u.Verifier = verifier
				return nil
			})
		}
	}
	if save == nil {
		return xapi.NewError(xapi.ErrChangePasswordRejected, "Passwords of this server are set when it starts")
	}
	if !c.Origin.Trusted {
		ok, err := a.password.Verify(ctx, name, old)
		if err != nil {
			return err
		}
		if !ok {
			return errAuthentication(name)
		}
	}
	if password == "" { // would let everybody in, and a start takes none either
		return xapi.NewError(xapi.ErrChangePasswordRejected, "The new password is empty")
	}
	return a.password.Set(name, password, save)
}

// sessionGetAllSubjectIdentifiers names the users beside root that are logged
// in.
func (a *API) sessionGetAllSubjectIdentifiers(ctx context.Context, c *Call) ([]string, error) {
	names := []string{}
	a.sessions.mu.RLock()
	for _, s := range a.sessions.byRef {
		if s.account != nil {
			names = append(names, s.account.Name)
		}
	}
	a.sessions.mu.RUnlock()
	slices.Sort(names)
	return slices.Compact(names), nil
}

// sessionLogoutSubjectIdentifier ends the sessions of a user, except the one
// that asks for it.
func (a *API) sessionLogoutSubjectIdentifier(ctx context.Context, c *Call, identifier string) error {
	a.endSessions(func(s *session) bool {
		return s.account != nil && s.account.Name == identifier && s.ref != c.Session.ref
	})
	return nil
}

// thisHost returns the one host.
func thisHost(tx *db.Tx) xapi.Ref[xapi.Host] {
	for ref := range db.All[xapi.Host](tx) {
		return ref
	}
	return xapi.NullRef
}
