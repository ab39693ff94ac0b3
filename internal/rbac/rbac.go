// Package rbac says what roles allow: which messages and HTTP actions, and what class role tells of that. It hides the
// rules of the datamodel and that permissions are made from them. It knows nothing of users and sessions.
package rbac

import (
	"crypto/md5"
	"fmt"
	"slices"
	"strings"

	"github.com/google/uuid"

	"coppice/internal/xapi"
)

// All is in the place of a role for whom no check is made: local root, and the
// members of the pool.
const All = "local-root"

// Table is what the datamodel says of roles. A role is one of the six that users have, or a permission: the right to
// send one message or to use one HTTP action. Permissions can be looked at, but lists and events show the six only,
// because nothing about the some thousand others ever changes. It is safe for concurrent use.
type Table struct {
	model       *xapi.Model
	byRef       map[xapi.Ref[xapi.Role]]*xapi.Role // roles and permissions
	permissions map[string][]string                // names by the name of the role, sorted
	holders     map[string][]xapi.Ref[xapi.Role]   // the roles that have a permission, strongest first
}

// Ref is the reference of a role or permission. The datamodel refers to roles by it.
func Ref(name string) xapi.Ref[xapi.Role] {
	return xapi.Ref[xapi.Role]("OpaqueRef:" + nameUUID(name))
}

// nameUUID is the uuid that follows from a name, as those of the static roles do.
func nameUUID(name string) string {
	sum := md5.Sum([]byte(name))
	return uuid.UUID(sum).String()
}

// New makes the table of a datamodel.
func New(m *xapi.Model) *Table {
	t := &Table{
		model:       m,
		byRef:       map[xapi.Ref[xapi.Role]]*xapi.Role{},
		permissions: map[string][]string{},
		holders:     map[string][]xapi.Ref[xapi.Role]{},
	}
	grant := func(permission, need string, extra []string) {
		p := xapi.New[xapi.Role]()
		p.UUID, p.NameLabel, p.NameDescription = nameUUID(permission), permission, "A basic permission"
		t.byRef[Ref(permission)] = p
		for _, role := range m.Roles {
			if m.Allows(role, need) || slices.Contains(extra, role) {
				t.permissions[role] = append(t.permissions[role], permission)
				t.holders[permission] = append(t.holders[permission], Ref(role))
			}
		}
	}
	for _, class := range m.Ordered {
		for _, msg := range class.Methods {
			name := class.Name + "." + msg.Name
			grant(name, msg.Role, slices.Concat(msg.ExtraRoles, everybodyMay(m, name)))
			for key, role := range msg.KeyRoles {
				grant(name+"/key:"+key, role, msg.ExtraRoles)
			}
		}
	}
	for _, action := range m.HTTP {
		grant("http/"+action.Name, action.Role, action.ExtraRoles)
	}
	for i, name := range m.Roles {
		r := xapi.New[xapi.Role]()
		r.UUID, r.NameLabel = nameUUID(name), name
		r.NameDescription = fmt.Sprintf("The role %s and all below it", name)
		if i+1 < len(m.Roles) {
			r.Subroles = []xapi.Ref[xapi.Role]{Ref(m.Roles[i+1])}
		}
		t.byRef[Ref(name)] = r
		slices.Sort(t.permissions[name])
	}
	return t
}

// Named returns the name of a role that users can have, "" for anything else.
func (t *Table) Named(ref xapi.Ref[xapi.Role]) string {
	if r := t.byRef[ref]; r != nil && t.permissions[r.NameLabel] != nil {
		return r.NameLabel
	}
	return ""
}

// Record returns the record of a role or permission, which must not be changed;
// HANDLE_INVALID when there is none.
func (t *Table) Record(ref xapi.Ref[xapi.Role]) (*xapi.Role, error) {
	r := t.byRef[ref]
	if r == nil {
		return nil, xapi.NewError(xapi.ErrHandleInvalid, "role", string(ref))
	}
	return r, nil
}

// Permissions returns the names of the permissions of a role, sorted, which must
// not be changed; nil when it is no role that users can have.
func (t *Table) Permissions(role string) []string { return t.permissions[role] }

// Holders returns the roles that have a permission, strongest first.
func (t *Table) Holders(permission string) []xapi.Ref[xapi.Role] {
	return append([]xapi.Ref[xapi.Role]{}, t.holders[permission]...)
}

// Strongest returns the strongest of some roles; those that do not exist count for nothing.
func (t *Table) Strongest(roles []string) string {
	for _, r := range t.model.Roles {
		if slices.Contains(roles, r) {
			return r
		}
	}
	return ""
}

// Allows says whether a role is at least need.
func (t *Table) Allows(role, need string) bool { return role == All || t.model.Allows(role, need) }

// MaySend says whether a role may send the message of a name, such as
// VDI.snapshot, with these parameters: RBAC_PERMISSION_DENIED [permission,
// text] when not.
func (t *Table) MaySend(role, name string, m *xapi.Method, args []any) error {
	if role == All {
		return nil
	}
	need, permission := m.Role, name
	if len(m.KeyRoles) > 0 {
		if key, ok := keyArgument(m, args); ok {
			if role, pattern := keyRole(m.KeyRoles, key); role != "" {
				need, permission = role, name+"/key:"+pattern
			}
		}
	}
	if t.Allows(role, need) || slices.Contains(m.ExtraRoles, role) || slices.Contains(ownBusiness, name) {
		return nil
	}
	return t.Denied(permission, need)
}

// MayUse is MaySend for an HTTP action; one that the datamodel does not have is
// INTERNAL_ERROR.
func (t *Table) MayUse(role, action string) error {
	h := t.model.HTTP[action]
	if h == nil {
		return xapi.NewError(xapi.ErrInternalError, "no HTTP action "+action)
	}
	if t.Allows(role, h.Role) || slices.Contains(h.ExtraRoles, role) {
		return nil
	}
	return t.Denied("http/"+action, h.Role)
}

// Denied is the refusal of what roles from need upwards may do.
func (t *Table) Denied(permission, need string) *xapi.Error {
	var roles []string
	for _, r := range t.model.Roles {
		if t.model.Allows(r, need) {
			roles = append(roles, r)
		}
	}
	return xapi.NewError(xapi.ErrRBACPermissionDenied, permission,
		fmt.Sprintf("No permission in user session. (Roles with this permission: %s)", strings.Join(roles, ", ")))
}

// ownBusiness are messages that any user may send, because they concern nobody else. The datamodel has none of them,
// for there only root has a password that the server knows.
var ownBusiness = []string{"session.change_password"}

// everybodyMay returns all roles for a message of ownBusiness.
func everybodyMay(m *xapi.Model, name string) []string {
	if slices.Contains(ownBusiness, name) {
		return m.Roles
	}
	return nil
}

// keyArgument returns the map key that the message names.
func keyArgument(m *xapi.Method, args []any) (string, bool) {
	for i, p := range m.Params {
		if p.Name == "key" && i < len(args) {
			key, ok := args[i].(string)
			return key, ok
		}
	}
	return "", false
}

// keyRole finds the role that a message needs for a particular map key, if the
// datamodel gives the key one of its own. Patterns may end in "*".
func keyRole(roles map[string]string, key string) (role, pattern string) {
	if r, ok := roles[key]; ok {
		return r, key
	}
	for p, r := range roles {
		if prefix, ok := strings.CutSuffix(p, "*"); ok && strings.HasPrefix(key, prefix) {
			return r, p
		}
	}
	return "", ""
}
