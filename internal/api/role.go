package api

import (
	"context"

	"coppice/internal/db"
	"coppice/internal/rbac"
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

// refreshRoles makes the rows of class role those of the datamodel.
func (a *API) refreshRoles(tx *db.Tx) error {
	for ref := range db.All[xapi.Role](tx) {
		if a.roles.Named(ref) == "" {
			if err := db.Delete(tx, ref); err != nil {
				return err
			}
		}
	}
	for _, name := range a.model.Roles {
		ref := rbac.Ref(name)
		want, err := a.roles.Record(ref)
		if err != nil {
			return err
		}
		err = db.Modify(tx, ref, func(r *xapi.Role) { *r = *xapi.ClassOf[xapi.Role]().Clone(want).(*xapi.Role) })
		if gone(err) {
			err = db.InsertAs(tx, ref, xapi.ClassOf[xapi.Role]().Clone(want).(*xapi.Role))
		}
		if err != nil {
			return err
		}
	}
	return nil
}

func (a *API) roleGetPermissionsNameLabel(ctx context.Context, c *Call, ref xapi.Ref[xapi.Role]) ([]string, error) {
	r, err := a.roles.Record(ref)
	if err != nil {
		return nil, err
	}
	if names := a.roles.Permissions(r.NameLabel); names != nil {
		return names, nil
	}
	return []string{r.NameLabel}, nil // a permission
}

func (a *API) roleGetPermissions(ctx context.Context, c *Call, ref xapi.Ref[xapi.Role]) ([]xapi.Ref[xapi.Role], error) {
	names, err := a.roleGetPermissionsNameLabel(ctx, c, ref)
	refs := make([]xapi.Ref[xapi.Role], len(names))
	for i, name := range names {
		refs[i] = rbac.Ref(name)
	}
	return refs, err
}

func (a *API) roleGetByPermission(ctx context.Context, c *Call, ref xapi.Ref[xapi.Role]) ([]xapi.Ref[xapi.Role], error) {
	r, err := a.roles.Record(ref)
	if err != nil {
		return nil, err
	}
	return a.roleGetByPermissionNameLabel(ctx, c, r.NameLabel)
}

// roleGetByPermissionNameLabel lists the roles that have a permission; none has one that does not exist.
func (a *API) roleGetByPermissionNameLabel(ctx context.Context, c *Call, permission string) ([]xapi.Ref[xapi.Role], error) {
	return a.roles.Holders(permission), nil
}

func (a *API) roleGetRecord(ctx context.Context, c *Call, ref xapi.Ref[xapi.Role]) (*xapi.Role, error) {
	return a.roles.Record(ref)
}

func (a *API) roleGetByUUID(ctx context.Context, c *Call, uuid string) (xapi.Ref[xapi.Role], error) {
	ref := xapi.Ref[xapi.Role]("OpaqueRef:" + uuid)
	if _, err := a.roles.Record(ref); err != nil {
		return "", xapi.NewError(xapi.ErrUUIDInvalid, "role", uuid)
	}
	return ref, nil
}

func (a *API) roleGetByNameLabel(ctx context.Context, c *Call, label string) ([]xapi.Ref[xapi.Role], error) {
	refs := []xapi.Ref[xapi.Role]{}
	if _, err := a.roles.Record(rbac.Ref(label)); err == nil {
		refs = append(refs, rbac.Ref(label))
	}
	return refs, nil
}

func (a *API) roleGetUUID(ctx context.Context, c *Call, ref xapi.Ref[xapi.Role]) (string, error) {
	r, err := a.roles.Record(ref)
	if err != nil {
		return "", err
	}
	return r.UUID, nil
}

func (a *API) roleGetNameLabel(ctx context.Context, c *Call, ref xapi.Ref[xapi.Role]) (string, error) {
	r, err := a.roles.Record(ref)
	if err != nil {
		return "", err
	}
	return r.NameLabel, nil
}

func (a *API) roleGetNameDescription(ctx context.Context, c *Call, ref xapi.Ref[xapi.Role]) (string, error) {
	r, err := a.roles.Record(ref)
	if err != nil {
		return "", err
	}
	return r.NameDescription, nil
}

func (a *API) roleGetSubroles(ctx context.Context, c *Call, ref xapi.Ref[xapi.Role]) ([]xapi.Ref[xapi.Role], error) {
	r, err := a.roles.Record(ref)
	if err != nil {
		return nil, err
	}
	return r.Subroles, nil
}

func (a *API) roleGetIsInternal(ctx context.Context, c *Call, ref xapi.Ref[xapi.Role]) (bool, error) {
	r, err := a.roles.Record(ref)
	return err == nil && r.IsInternal, err
}

// rights is the role by which a session is judged.
func (s *session) rights() string {
	if s.superuser || s.pool {
		return rbac.All
	}
	return s.role
}

// authorize says whether s may send message m with these parameters:
// RBAC_PERMISSION_DENIED [permission, message] when not.
func (a *API) authorize(s *session, m *method, args []any) error {
	return a.roles.MaySend(s.rights(), m.name, m.msg, args)
}

// authorizeHTTP is authorize for an HTTP action of the datamodel.
func (a *API) authorizeHTTP(s *session, action string) error {
	return a.roles.MayUse(s.rights(), action)
}
