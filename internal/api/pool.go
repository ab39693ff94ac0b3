package api

import (
	"context"

	"coppice/internal/db"
	"coppice/internal/xapi"
)

func poolMethods() map[string]any {
	return map[string]any{
		"pool.sync_database":                  (*API).poolSyncDatabase,
		"pool.has_extension":                  (*API).poolHasExtension,
		"pool.add_to_guest_agent_config":      (*API).poolAddToGuestAgentConfig,
		"pool.remove_from_guest_agent_config": (*API).poolRemoveFromGuestAgentConfig,
		"pool.is_slave":                       (*API).poolIsSlave,
	}
}

// poolSyncDatabase returns at once: the database of a pool of one host is in
// step with itself, and on the disk before a change is acknowledged.
func (a *API) poolSyncDatabase(ctx context.Context, c *Call) error { return nil }

// poolHasExtension answers for host.call_extension: there are none.
func (a *API) poolHasExtension(ctx context.Context, c *Call, ref xapi.Ref[xapi.Pool], name string) (bool, error) {
	return false, a.db.View(func(tx *db.Tx) error { _, err := db.Get(tx, ref); return err })
}

func (a *API) poolAddToGuestAgentConfig(ctx context.Context, c *Call, ref xapi.Ref[xapi.Pool], key, value string) error {
	return a.db.Update(ctx, func(tx *db.Tx) error {
		p, err := db.Get(tx, ref)
		if err != nil {
			return err
		}
		if _, ok := p.GuestAgentConfig[key]; ok {
			return xapi.NewError(xapi.ErrMapDuplicateKey, "pool", "guest_agent_config", string(ref), key)
		}
		return db.Modify(tx, ref, func(p *xapi.Pool) { p.GuestAgentConfig[key] = value })
	})
}

func (a *API) poolRemoveFromGuestAgentConfig(ctx context.Context, c *Call, ref xapi.Ref[xapi.Pool], key string) error {
	return a.db.Update(ctx, func(tx *db.Tx) error {
		return db.Modify(tx, ref, func(p *xapi.Pool) { delete(p.GuestAgentConfig, key) })
	})
}

// poolIsSlave says whether a host takes orders from another: the one host is
// the master.
func (a *API) poolIsSlave(ctx context.Context, c *Call, ref xapi.Ref[xapi.Host]) (bool, error) {
	return false, a.db.View(func(tx *db.Tx) error { _, err := db.Get(tx, ref); return err })
}
