package api

import (
	"context"

	"coppice/internal/db"
	"coppice/internal/xapi"
)

// Disks that hold the database of a pool, for recovery elsewhere, are not
// written by this server, and it recovers none. SRs say so when asked.

// databaseMethods are the messages about them.
func databaseMethods() map[string]any {
	return map[string]any{
		"VDI.open_database":                       (*API).vdiOpenDatabase,
		"VDI.read_database_pool_uuid":             (*API).vdiReadDatabasePoolUUID,
		"SR.assert_supports_database_replication": (*API).srNoReplication,
		"SR.enable_database_replication":          (*API).srNoReplication,
		"SR.disable_database_replication":         (*API).srDisableReplication,
		"SR.assert_can_host_ha_statefile":         (*API).srNoReplication,
	}
}

// vdiOpenDatabase refuses disks of other types first, as every server does.
func (a *API) vdiOpenDatabase(ctx context.Context, c *Call, ref xapi.Ref[xapi.VDI]) (xapi.Ref[xapi.Session], error) {
	return "", a.db.View(func(tx *db.Tx) error {
		v, err := db.Get(tx, ref)
		switch {
		case err != nil:
			return err
		case v.Type != xapi.VDITypeMetadata:
			return xapi.NewError(xapi.ErrVDIIncompatibleType, string(ref), string(v.Type))
		}
		return xapi.NewError(xapi.ErrCouldNotImportDatabase, "This server does not recover pools")
	})
}

// vdiReadDatabasePoolUUID returns the pool whose database is known to be on a
// disk: none.
func (a *API) vdiReadDatabasePoolUUID(ctx context.Context, c *Call, ref xapi.Ref[xapi.VDI]) (string, error) {
	return "", a.db.View(func(tx *db.Tx) error {
		_, err := db.Get(tx, ref)
		return err
	})
}

// srNoReplication refuses to keep a pool's database, or the state of a cluster
// that no cluster writes, on an SR.
func (a *API) srNoReplication(ctx context.Context, c *Call, ref xapi.Ref[xapi.SR]) error {
	return a.db.View(func(tx *db.Tx) error {
		if _, err := db.Get(tx, ref); err != nil {
			return err
		}
		if !srAttached(tx, ref) {
			return xapi.NewError(xapi.ErrSRHasNoPBDs, string(ref))
		}
		return xapi.NewError(xapi.ErrSROperationNotSupported, string(ref))
	})
}

// srDisableReplication ends what never began.
func (a *API) srDisableReplication(ctx context.Context, c *Call, ref xapi.Ref[xapi.SR]) error {
	return a.db.View(func(tx *db.Tx) error {
		_, err := db.Get(tx, ref)
		return err
	})
}
