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
		poolMethods(), hostMethods(), srMethods(), srProbeMethods(), pbdMethods(), vdiMethods(), vmMethods(), vmFieldMethods(), vmPowerMethods(), vmGuestMethods(),
		vbdMethods(), vifMethods(), vifConfigMethods(), networkMethods(), messageMethods(), vmssMethods(),
		nbdMethods(), subjectMethods(), roleMethods(), databaseMethods(),
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
			if field != "other_config" { // a hold decides what may happen to a disk
				return nil
			}
			return a.db.Update(ctx, func(tx *db.Tx) error { return a.refreshVDI(tx, xapi.Ref[xapi.VDI](ref)) })
		},
		// How VMs are reverted and what suspended ones may do is chosen here.
		"pool": func(a *API, ctx context.Context, c *Call, ref, field string) error {
			if field != "other_config" {
				return nil
			}
			return a.db.Update(ctx, a.refreshChoices)
		},
		// Being a template, or on hold, decides what a VM may do.
		"VM": func(a *API, ctx context.Context, c *Call, ref, field string) error {
			if field != "is_a_template" && field != "other_config" {
				return nil
			}
			return a.db.Update(ctx, func(tx *db.Tx) error { return a.refreshVM(tx, xapi.Ref[xapi.VM](ref)) })
		},
	}
}
