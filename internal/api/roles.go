package api

import (
	"fmt"
	"slices"
	"strings"

	"coppice/internal/xapi"
)

// authorize says whether s may send message m with these parameters:
// RBAC_PERMISSION_DENIED [permission, message] when not.
func (a *API) authorize(s *session, m *method, args []any) error {
	if s.superuser || s.pool {
		return nil
	}
	need, permission := m.msg.Role, m.name
	if len(m.msg.KeyRoles) > 0 {
		if key, ok := keyArgument(m.msg, args); ok {
			if role, pattern := keyRole(m.msg.KeyRoles, key); role != "" {
				need, permission = role, m.name+"/key:"+pattern
			}
		}
	}
	if a.allows(s, need) || slices.Contains(m.msg.ExtraRoles, s.role) || slices.Contains(ownBusiness, m.name) {
		return nil
	}
	return a.denied(permission, need)
}

// authorizeHTTP is authorize for an HTTP action of the datamodel.
func (a *API) authorizeHTTP(s *session, action string) error {
	h := a.model.HTTP[action]
	if h == nil {
		return xapi.NewError(xapi.ErrInternalError, "no HTTP action "+action)
	}
	if s.superuser || s.pool || a.allows(s, h.Role) || slices.Contains(h.ExtraRoles, s.role) {
		return nil
	}
	return a.denied("http/"+action, h.Role)
}

// allows reports whether the session's role is at least need. No role is
// local-root: superusers and pool members never get here.
func (a *API) allows(s *session, need string) bool { return a.model.Allows(s.role, need) }

func (a *API) denied(permission, need string) *xapi.Error {
	var roles []string
	for _, r := range a.model.Roles {
		if a.model.Allows(r, need) {
			roles = append(roles, r)
		}
	}
	return xapi.NewError(xapi.ErrRBACPermissionDenied, permission,
		fmt.Sprintf("No permission in user session. (Roles with this permission: %s)", strings.Join(roles, ", ")))
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
