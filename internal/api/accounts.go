package api

import (
	"context"
	"errors"
	"maps"
	"slices"
	"sync"

	"github.com/google/uuid"

	"coppice/internal/db"
	"coppice/internal/rbac"
	"coppice/internal/users"
	"coppice/internal/xapi"
)

func subjectMethods() map[string]any {
	return map[string]any{
		"subject.create":                     (*API).subjectCreate,
		"subject.destroy":                    (*API).subjectDestroy,
		"subject.add_to_roles":               (*API).subjectAddToRoles,
		"subject.remove_from_roles":          (*API).subjectRemoveFromRoles,
		"subject.get_permissions_name_label": (*API).subjectGetPermissionsNameLabel,

		"auth.get_subject_identifier":                  (*API).authGetSubjectIdentifier,
		"auth.get_subject_information_from_identifier": (*API).authGetSubjectInformation,
		"auth.get_group_membership":                    (*API).authGetGroupMembership,
	}
}

// account is a user of the server beside root. XenAPI shows it as a subject, whose identifier is the user's name. It
// is immutable.
type account struct {
	users.User
	ref  xapi.Ref[xapi.Subject]
	role string // the strongest of its roles, "" for none
}

// accountTable mirrors the file of the users: the file is the truth, the subjects of the database and this table
// follow it.
type accountTable struct {
	reload sync.Mutex // held while following the file; guards stamp and loaded
	stamp  users.Stamp
	loaded bool

	mu     sync.RWMutex
	byName map[string]*account
}

func (t *accountTable) get(name string) *account {
	t.mu.RLock()
	defer t.mu.RUnlock()
	return t.byName[name]
}

// ReloadUsers follows the file of the users, if it has changed. Sessions of users that are gone, or have other roles
// or another password, end.
func (a *API) ReloadUsers(ctx context.Context) error {
	if a.cfg.Users == nil {
		return nil
	}
	t := &a.accounts
	t.reload.Lock()
	defer t.reload.Unlock()
	if stamp, err := a.cfg.Users.Stamp(); err != nil || t.loaded && stamp == t.stamp {
		return err
	}
	list, stamp, err := a.cfg.Users.Load()
	if err != nil {
		return err
	}
	now := map[string]*account{}
	for _, u := range list {
		now[u.Name] = &account{User: u, role: a.roles.Strongest(u.Roles)}
	}
	if err := a.mirrorSubjects(ctx, now); err != nil {
		return err
	}
	t.mu.Lock()
	t.byName = now
	t.mu.Unlock()
	reset := a.password.Follow(a.log, list)
	t.stamp, t.loaded = stamp, true
	a.endSessions(func(s *session) bool {
		return s.account != nil && (!s.account.same(now[s.user]) || slices.Contains(reset, s.user))
	})
	return nil
}

// same reports whether other, which may be nil, is the same user with the same roles.
func (acc *account) same(other *account) bool {
	return other != nil && acc.ref == other.ref && slices.Equal(acc.Roles, other.Roles)
}

// followUsers is ReloadUsers for those who have something better to do than to fail.
func (a *API) followUsers(ctx context.Context) {
	if err := a.ReloadUsers(ctx); err != nil && a.ctx.Err() == nil && ctx.Err() == nil {
		a.log.Error("the users are those of before, their file cannot be followed", "err", err)
	}
}

// mirrorSubjects makes the subjects of the database those of list, and sets their references there.
func (a *API) mirrorSubjects(ctx context.Context, list map[string]*account) error {
	return a.db.Update(ctx, func(tx *db.Tx) error {
		rows := map[string]xapi.Ref[xapi.Subject]{} // by identifier
		for ref, s := range db.All[xapi.Subject](tx) {
			if acc := list[s.SubjectIdentifier]; acc == nil || acc.UUID != "" && acc.UUID != s.UUID {
				if err := db.Delete(tx, ref); err != nil {
					return err
				}
				continue
			}
			rows[s.SubjectIdentifier] = ref
		}
		for _, name := range slices.Sorted(maps.Keys(list)) {
			acc := list[name]
			fill := func(s *xapi.Subject) {
				s.SubjectIdentifier, s.OtherConfig = acc.Name, maps.Clone(acc.OtherConfig)
				s.Roles = []xapi.Ref[xapi.Role]{}
				for _, r := range acc.Roles {
					s.Roles = append(s.Roles, rbac.Ref(r))
				}
			}
			ref, ok := rows[name]
			if ok {
				if err := db.Modify(tx, ref, fill); err != nil {
					return err
				}
			} else {
				s := xapi.New[xapi.Subject]()
				s.UUID = acc.UUID
				fill(s)
				var err error
				if ref, err = db.Insert(tx, s); err != nil {
					return err
				}
			}
			acc.ref = ref
		}
		return nil
	})
}

// endSessions ends the sessions that which holds for.
func (a *API) endSessions(which func(*session) bool) {
	var refs []xapi.Ref[xapi.Session]
	a.sessions.mu.RLock()
	for ref, s := range a.sessions.byRef {
		if which(s) {
			refs = append(refs, ref)
		}
	}
	a.sessions.mu.RUnlock()
	for _, ref := range refs {
		if err := a.logout(ref); err != nil && !errors.Is(err, xapi.NewError(xapi.ErrSessionInvalid)) {
			a.log.Error("session: not removed", "err", err)
		}
	}
}

// usersError is what a client is told of an error of the users' file.
func usersError(err error, name string) error {
	switch {
	case errors.Is(err, users.ErrExists):
		return xapi.NewError(xapi.ErrSubjectAlreadyExists)
	case errors.Is(err, users.ErrName):
		return invalidValue("subject_identifier", name)
	}
	return err
}

// usersFile is the file of the users; AUTH_IS_DISABLED when there is none.
func (a *API) usersFile() (*users.File, error) {
	if a.cfg.Users == nil {
		return nil, xapi.NewError(xapi.ErrAuthIsDisabled)
	}
	return a.cfg.Users, nil
}

// subjectCreate makes a user whose name is the identifier. Like every new subject it has the role pool-admin; it
// can log in when "coppice user passwd" has given it a password.
func (a *API) subjectCreate(ctx context.Context, c *Call, args *xapi.Subject) (ref xapi.Ref[xapi.Subject], err error) {
	file, err := a.usersFile()
	if err != nil {
		return "", err
	}
	u := users.User{Name: args.SubjectIdentifier, UUID: uuid.NewString(), Roles: []string{a.model.Roles[0]}, OtherConfig: args.OtherConfig}
	if err := file.Add(u); err != nil {
		return "", usersError(err, u.Name)
	}
	if err := a.ReloadUsers(ctx); err != nil {
		return "", err
	}
	if acc := a.accounts.get(u.Name); acc != nil {
		ref = acc.ref
	}
	return ref, nil
}

// subjectAccount returns the user that a subject stands for.
func (a *API) subjectAccount(ref xapi.Ref[xapi.Subject]) (name string, err error) {
	err = a.db.View(func(tx *db.Tx) error {
		s, err := db.Get(tx, ref)
		if err == nil {
			name = s.SubjectIdentifier
		}
		return err
	})
	return name, err
}

// changeSubject changes the user that a subject stands for.
func (a *API) changeSubject(ctx context.Context, ref xapi.Ref[xapi.Subject], change func(file *users.File, name string) error) error {
	name, err := a.subjectAccount(ref)
	if err != nil {
		return err
	}
	file, err := a.usersFile()
	if err != nil {
		return err
	}
	switch err := change(file, name); {
	case errors.Is(err, users.ErrNotFound): // the command line was first
		return cmpErr(a.ReloadUsers(ctx), xapi.NewError(xapi.ErrHandleInvalid, "subject", string(ref)))
	case err != nil:
		return err
	}
	return a.ReloadUsers(ctx)
}

// subjectDestroy removes a user and ends the sessions of it.
func (a *API) subjectDestroy(ctx context.Context, c *Call, ref xapi.Ref[xapi.Subject]) error {
	return a.changeSubject(ctx, ref, func(file *users.File, name string) error { return file.Remove(name) })
}

func (a *API) subjectAddToRoles(ctx context.Context, c *Call, ref xapi.Ref[xapi.Subject], role xapi.Ref[xapi.Role]) error {
	return a.changeSubject(ctx, ref, func(file *users.File, name string) error {
		r := a.roles.Named(role)
		if r == "" {
			return xapi.NewError(xapi.ErrRoleNotFound)
		}
		return file.Change(name, func(u *users.User) error {
			if slices.Contains(u.Roles, r) {
				return xapi.NewError(xapi.ErrRoleAlreadyExists)
			}
			u.Roles = append(u.Roles, r)
			return nil
		})
	})
}

func (a *API) subjectRemoveFromRoles(ctx context.Context, c *Call, ref xapi.Ref[xapi.Subject], role xapi.Ref[xapi.Role]) error {
	return a.changeSubject(ctx, ref, func(file *users.File, name string) error {
		r := a.roles.Named(role)
		return file.Change(name, func(u *users.User) error {
			i := slices.Index(u.Roles, r)
			if i < 0 {
				return xapi.NewError(xapi.ErrRoleNotFound)
			}
			u.Roles = slices.Delete(slices.Clone(u.Roles), i, i+1)
			return nil
		})
	})
}

func (a *API) subjectGetPermissionsNameLabel(ctx context.Context, c *Call, ref xapi.Ref[xapi.Subject]) ([]string, error) {
	name, err := a.subjectAccount(ref)
	if err != nil {
		return nil, err
	}
	if acc := a.accounts.get(name); acc != nil && acc.role != "" {
		return a.roles.Permissions(acc.role), nil
	}
	return []string{}, nil
}

// authGetSubjectIdentifier and its kin ask the directory of users, which is the server's own.
func (a *API) authGetSubjectIdentifier(ctx context.Context, c *Call, name string) (string, error) {
	acc, err := a.resolve(ctx, name)
	if err != nil {
		return "", err
	}
	return acc.Name, nil
}

func (a *API) authGetSubjectInformation(ctx context.Context, c *Call, identifier string) (map[string]string, error) {
	acc, err := a.resolve(ctx, identifier)
	if err != nil {
		return nil, err
	}
	info := map[string]string{
		"subject-name": acc.Name, "subject-displayname": acc.Name, "subject-sid": acc.Name, "subject-is-group": "false",
		"subject-account-disabled": "false",
	}
	if acc.Verifier == "" {
		info["subject-account-disabled"] = "true"
	}
	maps.Copy(info, acc.OtherConfig)
	return info, nil
}

// authGetGroupMembership answers that nobody is in a group: there are none.
func (a *API) authGetGroupMembership(ctx context.Context, c *Call, identifier string) ([]string, error) {
	_, err := a.resolve(ctx, identifier)
	return []string{}, err
}

func (a *API) resolve(ctx context.Context, name string) (*account, error) {
	a.followUsers(ctx)
	if acc := a.accounts.get(name); acc != nil {
		return acc, nil
	}
	return nil, xapi.NewError(xapi.ErrSubjectCannotBeResolved)
}
