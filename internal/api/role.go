package api

import (
	"context"
	"fmt"
	"slices"

	"coppice/internal/db"
	"coppice/internal/xapi"
)

func roleMethods() map[string]any {
	return map[string]any{
		"role.get_permissions":              (*API).roleGetPermissions,
		"role.get_permissions_name_label":   (*API).roleGetPermissionsNameLabel,
		"role.get_by_permission":            (*API).roleGetByPermission,
		"role.get_by_permission_name_label": (*API).roleGetByPermissionNameLabel,
		"role.get_record":                   (*API).roleGetRecord,
		"role.get_by_uuid":                  (*API).roleGetByUUID,
		"role.get_by_name_label":            (*API).roleGetByNameLabel,
		"role.get_uuid":                     (*API).roleGetUUID,
		"role.get_name_label":               (*API).roleGetNameLabel,
		"role.get_name_description":         (*API).roleGetNameDescription,
		"role.get_subroles":                 (*API).roleGetSubroles,
		"role.get_is_internal":              (*API).roleGetIsInternal,
	}
}

// roleTable is what class role says. A role is one of the six that users have, or a permission: the right to send one
// message or to use one HTTP action. Permissions can be looked at, but lists and events show the six only, because
// nothing about the some thousand others ever changes.
type roleTable struct {
	byRef       map[xapi.Ref[xapi.Role]]*xapi.Role // roles and permissions
	permissions map[string][]string                // names by the name of the role, sorted
	holders     map[string][]xapi.Ref[xapi.Role]   // the roles that have a permission, strongest first
}

// roleRef is the reference of a role or permission. The datamodel refers to roles by it.
func roleRef(name string) xapi.Ref[xapi.Role] {
	return xapi.Ref[xapi.Role]("OpaqueRef:" + nameUUID(name))
}

// newRoleTable makes the table from the datamodel, with the rules that authorize goes by.
func newRoleTable(m *xapi.Model) roleTable {
	t := roleTable{
		byRef:       map[xapi.Ref[xapi.Role]]*xapi.Role{},
		permissions: map[string][]string{},
		holders:     map[string][]xapi.Ref[xapi.Role]{},
	}
	grant := func(permission, need string, extra []string) {
		p := xapi.New[xapi.Role]()
		p.UUID, p.NameLabel, p.NameDescription = nameUUID(permission), permission, "A basic permission"
		t.byRef[roleRef(permission)] = p
		for _, role := range m.Roles {
			if m.Allows(role, need) || slices.Contains(extra, role) {
				t.permissions[role] = append(t.permissions[role], permission)
				t.holders[permission] = append(t.holders[permission], roleRef(role))
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
			r.Subroles = []xapi.Ref[xapi.Role]{roleRef(m.Roles[i+1])}
		}
		t.byRef[roleRef(name)] = r
		slices.Sort(t.permissions[name])
	}
	return t
}

// named returns the name of a role that users can have, "" for anything else.
func (t *roleTable) named(ref xapi.Ref[xapi.Role]) string {
	if r := t.byRef[ref]; r != nil && t.permissions[r.NameLabel] != nil {
		return r.NameLabel
	}
	return ""
}

// refreshRoles makes the rows of class role those of the datamodel.
func (a *API) refreshRoles(tx *db.Tx) error {
	for ref := range db.All[xapi.Role](tx) {
		if a.roles.named(ref) == "" {
			if err := db.Delete(tx, ref); err != nil {
				return err
			}
		}
	}
	for _, name := range a.model.Roles {
		ref, want := roleRef(name), a.roles.byRef[roleRef(name)]
		err := db.Modify(tx, ref, func(r *xapi.Role) { *r = *xapi.ClassOf[xapi.Role]().Clone(want).(*xapi.Role) })
		if gone(err) {
			err = db.InsertAs(tx, ref, xapi.ClassOf[xapi.Role]().Clone(want).(*xapi.Role))
		}
		if err != nil {
			return err
		}
	}
	return nil
}

func (a *API) roleRecord(ref xapi.Ref[xapi.Role]) (*xapi.Role, error) {
	r := a.roles.byRef[ref]
	if r == nil {
		return nil, xapi.NewError(xapi.ErrHandleInvalid, "role", string(ref))
	}
	return r, nil
}

func (a *API) roleGetPermissionsNameLabel(ctx context.Context, c *Call, ref xapi.Ref[xapi.Role]) ([]string, error) {
	r, err := a.roleRecord(ref)
	if err != nil {
		return nil, err
	}
	if names, ok := a.roles.permissions[r.NameLabel]; ok {
		return names, nil
	}
	return []string{r.NameLabel}, nil // a permission
}

func (a *API) roleGetPermissions(ctx context.Context, c *Call, ref xapi.Ref[xapi.Role]) ([]xapi.Ref[xapi.Role], error) {
	names, err := a.roleGetPermissionsNameLabel(ctx, c, ref)
	refs := make([]xapi.Ref[xapi.Role], len(names))
	for i, name := range names {
		refs[i] = roleRef(name)
	}
	return refs, err
}

func (a *API) roleGetByPermission(ctx context.Context, c *Call, ref xapi.Ref[xapi.Role]) ([]xapi.Ref[xapi.Role], error) {
	r, err := a.roleRecord(ref)
	if err != nil {
		return nil, err
	}
	return a.roleGetByPermissionNameLabel(ctx, c, r.NameLabel)
}

// roleGetByPermissionNameLabel lists the roles that have a permission; none has one that does not exist.
func (a *API) roleGetByPermissionNameLabel(ctx context.Context, c *Call, permission string) ([]xapi.Ref[xapi.Role], error) {
	return slices.Clip(append([]xapi.Ref[xapi.Role]{}, a.roles.holders[permission]...)), nil
}

func (a *API) roleGetRecord(ctx context.Context, c *Call, ref xapi.Ref[xapi.Role]) (*xapi.Role, error) {
	return a.roleRecord(ref)
}

func (a *API) roleGetByUUID(ctx context.Context, c *Call, uuid string) (xapi.Ref[xapi.Role], error) {
	ref := xapi.Ref[xapi.Role]("OpaqueRef:" + uuid)
	if a.roles.byRef[ref] == nil {
		return "", xapi.NewError(xapi.ErrUUIDInvalid, "role", uuid)
	}
	return ref, nil
}

func (a *API) roleGetByNameLabel(ctx context.Context, c *Call, label string) ([]xapi.Ref[xapi.Role], error) {
	refs := []xapi.Ref[xapi.Role]{}
	if a.roles.byRef[roleRef(label)] != nil {
		refs = append(refs, roleRef(label))
	}
	return refs, nil
}

func (a *API) roleGetUUID(ctx context.Context, c *Call, ref xapi.Ref[xapi.Role]) (string, error) {
	r, err := a.roleRecord(ref)
	if err != nil {
		return "", err
	}
	return r.UUID, nil
}

func (a *API) roleGetNameLabel(ctx context.Context, c *Call, ref xapi.Ref[xapi.Role]) (string, error) {
	r, err := a.roleRecord(ref)
	if err != nil {
		return "", err
	}
	return r.NameLabel, nil
}

func (a *API) roleGetNameDescription(ctx context.Context, c *Call, ref xapi.Ref[xapi.Role]) (string, error) {
	r, err := a.roleRecord(ref)
	if err != nil {
		return "", err
	}
	return r.NameDescription, nil
}

func (a *API) roleGetSubroles(ctx context.Context, c *Call, ref xapi.Ref[xapi.Role]) ([]xapi.Ref[xapi.Role], error) {
	r, err := a.roleRecord(ref)
	if err != nil {
		return nil, err
	}
	return r.Subroles, nil
}

func (a *API) roleGetIsInternal(ctx context.Context, c *Call, ref xapi.Ref[xapi.Role]) (bool, error) {
	r, err := a.roleRecord(ref)
	return err == nil && r.IsInternal, err
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

// RoleNames returns the names of the roles that users can have, strongest first.
func RoleNames() []string { return slices.Clone(xapi.Datamodel().Roles) }
