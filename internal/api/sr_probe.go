package api

import (
	"context"
	"encoding/xml"
	"errors"
	"fmt"
	"maps"
	"slices"

	"coppice/internal/db"
	"coppice/internal/storage"
	"coppice/internal/xapi"
)

func srProbeMethods() map[string]any {
	return map[string]any{
		"SR.probe":            (*API).srProbe,
		"SR.probe_ext":        (*API).srProbeExt,
		"SR.get_data_sources": (*API).srGetDataSources,
		"SR.query_data_source": func(a *API, _ context.Context, _ *Call, ref xapi.Ref[xapi.SR], name string) (float64, error) {
			return 0, a.noDataSource(ref, name)
		},
		"SR.record_data_source":          srDataSource,
		"SR.forget_data_source_archives": srDataSource,
	}
}

// probe finds the SRs that a device configuration leads to, sorted by UUID:
// those with a PBD that says the same, or else the one that the volumes there
// remember. Its space is that of the store; nil when it is not looked at,
// because the SR is attached and its record knows, or there is no store.
func (a *API) probe(ctx context.Context, host xapi.Ref[xapi.Host], config map[string]string, typ string) (uuids []string, space *storage.Usage, err error) {
	drv, err := a.driver(typ)
	if err != nil {
		return nil, nil, err
	}
	wanted, err := a.located(config)
	if err != nil {
		return nil, nil, err
	}
	found := map[string]bool{}
	err = a.db.View(func(tx *db.Tx) error {
		if _, err := db.Get(tx, host); err != nil {
			return err
		}
		for _, pbd := range db.All[xapi.PBD](tx) {
			sr, err := db.Get(tx, pbd.SR)
			if err != nil || sr.Type != typ {
				continue
			}
			if used, err := a.located(pbd.DeviceConfig); err == nil && maps.Equal(used, wanted) {
				found[sr.UUID] = true
			}
		}
		return nil
	})
	if err != nil {
		return nil, nil, err
	}
	if len(found) == 0 {
		if space, err = readStore(ctx, drv, config, found); err != nil {
			return nil, nil, fmt.Errorf("probe: %w", err)
		}
	}
	return slices.Sorted(maps.Keys(found)), space, nil
}

// readStore notes which SRs the store at a configuration says it is, and
// returns its space. Where there is no store there is neither.
func readStore(ctx context.Context, drv storage.Driver, config map[string]string, found map[string]bool) (*storage.Usage, error) {
	r, err := drv.Open(ctx, config, false)
	switch {
	case errors.Is(err, storage.ErrNoRepo):
		return nil, nil
	case err != nil:
		return nil, err
	}
	// A mark that cannot be read leaves what the volumes say.
	if m, err := markOf(ctx, r); err == nil && m.SR != "" {
		found[m.SR] = true
	}
	for info, e := range r.List(ctx) {
		if err = e; err != nil {
			break
		}
		if at, ok := decodeAttrs(info.Attrs); ok && at.SR != "" {
			found[at.SR] = true
		}
	}
	usage, used := r.Usage(ctx)
	return &usage, cmpErr(err, used, r.Close())
}

// srList is what SR.probe answers.
type srList struct {
	XMLName xml.Name  `xml:"SRlist"`
	SRs     []srEntry `xml:"SR"`
}

type srEntry struct {
	UUID string `xml:"UUID"`
}

// srProbe lists, as XML, the SRs that a device configuration leads to.
func (a *API) srProbe(ctx context.Context, c *Call, host xapi.Ref[xapi.Host], config map[string]string, typ string, smConfig map[string]string) (string, error) {
	uuids, _, err := a.probe(ctx, host, config, typ)
	if err != nil {
		return "", err
	}
	var list srList
	for _, id := range uuids {
		list.SRs = append(list.SRs, srEntry{UUID: id})
	}
	b, err := xml.Marshal(list)
	return string(b), err
}

// srProbeExt is srProbe in records: a configuration that is complete, with the
// SR that it leads to. One that leads to a store which no SR has used yet is
// complete, too, and has none.
func (a *API) srProbeExt(ctx context.Context, c *Call, host xapi.Ref[xapi.Host], config map[string]string, typ string, smConfig map[string]string) ([]*xapi.ProbeResult, error) {
	uuids, space, err := a.probe(ctx, host, config, typ)
	if err != nil {
		return nil, err
	}
	result := func(sr *xapi.SRStat) *xapi.ProbeResult {
		return &xapi.ProbeResult{Complete: true, Configuration: maps.Clone(config), ExtraInfo: map[string]string{}, SR: sr}
	}
	if len(uuids) == 0 {
		return []*xapi.ProbeResult{result(nil)}, nil
	}
	results := []*xapi.ProbeResult{}
	err = a.db.View(func(tx *db.Tx) error {
		for _, id := range uuids {
			results = append(results, result(srStat(tx, id, space)))
		}
		return nil
	})
	return results, err
}

// srStat describes an SR by its record, if it has one, and by the space of its
// store, if that has been looked at.
func srStat(tx *db.Tx, id string, space *storage.Usage) *xapi.SRStat {
	stat := &xapi.SRStat{UUID: &id, Health: xapi.SRHealthHealthy}
	ref, sr, err := db.ByUUID[xapi.SR](tx, id)
	if err == nil {
		stat.NameLabel, stat.NameDescription = sr.NameLabel, sr.NameDescription
		stat.TotalSpace, stat.FreeSpace = sr.PhysicalSize, max(0, sr.PhysicalSize-sr.PhysicalUtilisation)
	}
	switch {
	case space != nil:
		stat.TotalSpace, stat.FreeSpace = space.Total, space.Free
	case err == nil && !srAttached(tx, ref):
		stat.Health = xapi.SRHealthUnavailable
	}
	return stat
}

// srGetDataSources: what is measured of SRs is at /metrics, and none of it is
// recorded here.
func (a *API) srGetDataSources(ctx context.Context, c *Call, ref xapi.Ref[xapi.SR]) ([]*xapi.DataSource, error) {
	return []*xapi.DataSource{}, a.db.View(func(tx *db.Tx) error {
		_, err := db.Get(tx, ref)
		return err
	})
}

func srDataSource(a *API, _ context.Context, _ *Call, ref xapi.Ref[xapi.SR], name string) error {
	return a.noDataSource(ref, name)
}

// noDataSource refuses the name of a data source of an SR, which has none.
func (a *API) noDataSource(ref xapi.Ref[xapi.SR], name string) error {
	return a.db.View(func(tx *db.Tx) error {
		if _, err := db.Get(tx, ref); err != nil {
			return err
		}
		return invalidValue("data_source", name)
	})
}
