package api

import (
	"context"
	"fmt"

	"coppice/internal/db"
	"coppice/internal/xapi"
)

func networkMethods() map[string]any {
	return map[string]any{
		"network.create":                   (*API).networkCreate,
		"network.destroy":                  (*API).networkDestroy,
		"network.set_default_locking_mode": (*API).networkSetDefaultLockingMode,
	}
}

// networkCreate records a network, for VMs to name.
func (a *API) networkCreate(ctx context.Context, c *Call, args *xapi.Network) (ref xapi.Ref[xapi.Network], err error) {
	n := args
	err = a.db.Update(ctx, func(tx *db.Tx) (err error) {
		if n.Bridge == "" {
			n.Bridge = freeBridge(tx)
		}
		ref, err = db.Insert(tx, n)
		return err
	})
	if err != nil {
		return "", err
	}
	return ref, nil
}

// freeBridge is a name of a bridge that no network has.
func freeBridge(tx *db.Tx) (name string) {
	bridges := map[string]bool{}
	for _, other := range db.All[xapi.Network](tx) {
		bridges[other.Bridge] = true
	}
	for i := 0; name == "" || bridges[name]; i++ {
		name = fmt.Sprintf("xapi%d", i)
	}
	return name
}

// networkDestroy removes a network that nothing is connected to.
func (a *API) networkDestroy(ctx context.Context, c *Call, ref xapi.Ref[xapi.Network]) error {
	return a.db.Update(ctx, func(tx *db.Tx) error {
		n, err := db.Get(tx, ref)
		if err != nil {
			return err
		}
		if len(n.PIFs) > 0 {
			return xapi.NewError(xapi.ErrNetworkContainsPIF, refsText(n.PIFs)...)
		}
		if len(n.VIFs) > 0 {
			return xapi.NewError(xapi.ErrNetworkContainsVIF, refsText(n.VIFs)...)
		}
		return db.Delete(tx, ref)
	})
}

func refsText[T any](refs []xapi.Ref[T]) []string {
	text := make([]string, len(refs))
	for i, r := range refs {
		text[i] = string(r)
	}
	return text
}

// networkSetDefaultLockingMode changes what VIFs may send that leave this to
// their network. It cannot change under one that is attached.
func (a *API) networkSetDefaultLockingMode(ctx context.Context, c *Call, ref xapi.Ref[xapi.Network], mode xapi.NetworkDefaultLockingMode) error {
	return a.db.Update(ctx, func(tx *db.Tx) error {
		n, err := db.Get(tx, ref)
		if err != nil {
			return err
		}
		for _, v := range n.VIFs {
			vif, err := db.Get(tx, v)
			if err == nil && vif.CurrentlyAttached && vif.LockingMode == xapi.VIFLockingModeNetworkDefault {
				return xapi.NewError(xapi.ErrVIFInUse, string(ref), string(v))
			}
		}
		return db.Modify(tx, ref, func(n *xapi.Network) { n.DefaultLockingMode = mode })
	})
}
