package api

import (
	"context"
	"maps"

	"coppice/internal/db"
	"coppice/internal/xapi"
)

// classMethods collects the method tables of the classes. A table stands at
// the top of the file of its class.
func classMethods() map[string]any {
	all := map[string]any{}
	for _, table := range []map[string]any{
		poolMethods(), hostMethods(), srMethods(), pbdMethods(), vdiMethods(), vmMethods(), vmFieldMethods(),
		vbdMethods(), vifMethods(), networkMethods(), messageMethods(),
	} {
		maps.Copy(all, table)
	}
	return all
}

// fieldHooks are run after a mechanical message has changed a field of an
// object of the class.
func fieldHooks() map[string]fieldHook {
	return map[string]fieldHook{
		// The volume knows these fields too.
		"VDI": func(a *API, ctx context.Context, c *Call, ref, field string) error {
			a.syncAttrs(ctx, xapi.Ref[xapi.VDI](ref))
			return nil
		},
		// Being a template decides what a VM may do.
		"VM": func(a *API, ctx context.Context, c *Call, ref, field string) error {
			if field != "is_a_template" {
				return nil
			}
			return a.db.Update(ctx, func(tx *db.Tx) error { return a.refreshVM(tx, xapi.Ref[xapi.VM](ref)) })
		},
	}
}
