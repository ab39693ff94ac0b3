package api

import (
	"context"
	"time"

	"coppice/internal/db"
	"coppice/internal/xapi"
)

func hostMethods() map[string]any {
	return map[string]any{
		"host.get_servertime":          (*API).hostGetServertime,
		"host.get_server_localtime":    (*API).hostGetServerLocaltime,
		"host.list_methods":            (*API).hostListMethods,
		"host.call_plugin":             (*API).hostCallPlugin,
		"host.has_extension":           (*API).hostHasExtension,
		"host.compute_free_memory":     (*API).hostComputeFreeMemory,
		"host.compute_memory_overhead": (*API).hostComputeMemoryOverhead,
		"host.is_in_emergency_mode":    (*API).hostIsInEmergencyMode,
		"host.enable":                  (*API).hostEnable,
		"host.disable":                 (*API).hostDisable,
		"host.sync_data":               (*API).hostSyncData,
		"host.get_server_certificate":  (*API).hostGetServerCertificate,
	}
}

// onHost runs fn on the record of a host.
func (a *API) onHost(ref xapi.Ref[xapi.Host], fn func(*db.Tx, *xapi.Host) error) error {
	return a.db.View(func(tx *db.Tx) error {
		h, err := db.Get(tx, ref)
		if err != nil {
			return err
		}
		return fn(tx, h)
	})
}

func (a *API) hostGetServertime(ctx context.Context, c *Call, ref xapi.Ref[xapi.Host]) (time.Time, error) {
	return a.now(), a.onHost(ref, func(*db.Tx, *xapi.Host) error { return nil })
}

// hostGetServerLocaltime returns what a clock on the host's wall shows, as if
// it were UTC.
func (a *API) hostGetServerLocaltime(ctx context.Context, c *Call, ref xapi.Ref[xapi.Host]) (time.Time, error) {
	t := a.now().Local()
	wall := time.Date(t.Year(), t.Month(), t.Day(), t.Hour(), t.Minute(), t.Second(), 0, time.UTC)
	return wall, a.onHost(ref, func(*db.Tx, *xapi.Host) error { return nil })
}

func (a *API) hostListMethods(ctx context.Context, c *Call) ([]string, error) {
	return a.Methods(), nil
}

// ourPlugin is the name under which host.call_plugin reaches what XenAPI has no message for.
const ourPlugin = "coppice"

// hostCallPlugin runs a function of our plugin. Other plugins, which would be
// scripts of the host, do not exist, which is what clients that try one
// expect to hear.
func (a *API) hostCallPlugin(ctx context.Context, c *Call, ref xapi.Ref[xapi.Host], plugin, fn string, args map[string]string) (string, error) {
	if err := a.onHost(ref, func(*db.Tx, *xapi.Host) error { return nil }); err != nil {
		return "", err
	}
	if plugin != ourPlugin {
		return "", xapi.NewError(xapi.ErrXenAPIMissingPlugin, plugin)
	}
	switch fn {
	case "vmss-preview":
		return a.pluginPreview(args)
	case "sr-scrub":
		return a.pluginScrub(ctx, c, args)
	case "sr-space":
		return a.pluginSpace(ctx, c, args)
	case "vdi-would-free":
		return a.pluginWouldFree(ctx, args)
	case "nbd":
		return a.pluginNBD(c, args)
	case "vdi-pull":
		return a.pluginPull(ctx, c, args)
	}
	return "", xapi.NewError(xapi.ErrXenAPIPluginFailure, "unknown function", fn, "")
}

// pluginPreview says what the schedule whose uuid is vmss would prune now.
func (a *API) pluginPreview(args map[string]string) (string, error) {
	var ref xapi.Ref[xapi.VMSS]
	err := a.db.View(func(tx *db.Tx) (err error) {
		ref, _, err = db.ByUUID[xapi.VMSS](tx, args["vmss"])
		return err
	})
	if err != nil {
		return "", err
	}
	return a.pruningPreview(ref)
}

func (a *API) hostHasExtension(ctx context.Context, c *Call, ref xapi.Ref[xapi.Host], name string) (bool, error) {
	return false, a.onHost(ref, func(*db.Tx, *xapi.Host) error { return nil })
}

// hostComputeFreeMemory returns the bytes that the host could give away now.
func (a *API) hostComputeFreeMemory(ctx context.Context, c *Call, ref xapi.Ref[xapi.Host]) (int64, error) {
	_, free := memory()
	return free, a.onHost(ref, func(*db.Tx, *xapi.Host) error { return nil })
}

// hostComputeMemoryOverhead returns what virtualisation costs, in bytes:
// nothing, where nothing is virtualised.
func (a *API) hostComputeMemoryOverhead(ctx context.Context, c *Call, ref xapi.Ref[xapi.Host]) (int64, error) {
	return 0, a.onHost(ref, func(*db.Tx, *xapi.Host) error { return nil })
}

func (a *API) hostIsInEmergencyMode(ctx context.Context, c *Call) (bool, error) { return false, nil }

func (a *API) hostEnable(ctx context.Context, c *Call, ref xapi.Ref[xapi.Host]) error {
	return a.setHostEnabled(ctx, ref, true)
}

// hostDisable says that no VM should be started here. It stays so until
// host.enable, or the next start of the server.
func (a *API) hostDisable(ctx context.Context, c *Call, ref xapi.Ref[xapi.Host], autoEnable bool) error {
	return a.setHostEnabled(ctx, ref, false)
}

func (a *API) setHostEnabled(ctx context.Context, ref xapi.Ref[xapi.Host], on bool) error {
	return a.db.Update(ctx, func(tx *db.Tx) error {
		return db.Modify(tx, ref, func(h *xapi.Host) { h.Enabled = on })
	})
}

// hostSyncData: one host has nothing to synchronise with.
func (a *API) hostSyncData(ctx context.Context, c *Call, ref xapi.Ref[xapi.Host]) error {
	return a.onHost(ref, func(*db.Tx, *xapi.Host) error { return nil })
}
