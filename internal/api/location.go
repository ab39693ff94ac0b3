package api

import (
	"context"
	"maps"
	"path/filepath"

	"coppice/internal/storage"
)

// locationKey is the device-config key that says where a driver keeps its
// data, for the drivers that have one. A relative path starts at the data
// directory. That is how the locations that are made up here are written, so
// that a data directory which is moved, or copied, takes its stores along: a
// copy must not lead to the stores of the original, for there it would find
// the disks made since and reclaim them as nobody's.
const locationKey = "location"

// locate is the absolute form of a location.
func (a *API) locate(location string) (string, error) {
	if filepath.IsAbs(location) {
		return filepath.Clean(location), nil
	}
	return filepath.Abs(filepath.Join(a.cfg.DataDir, location))
}

// located returns a device-config with its location in absolute form. One
// without a location is returned as it is.
func (a *API) located(config map[string]string) (map[string]string, error) {
	if config[locationKey] == "" {
		return config, nil
	}
	path, err := a.locate(config[locationKey])
	if err != nil {
		return nil, err
	}
	config = maps.Clone(config)
	config[locationKey] = path
	return config, nil
}

// rooted returns a driver that is passed absolute locations.
func (a *API) rooted(d storage.Driver) storage.Driver {
	open, destroy := d.Open, d.Destroy
	d.Open = func(ctx context.Context, config map[string]string, create bool) (storage.Repo, error) {
		config, err := a.located(config)
		if err != nil {
			return nil, err
		}
		return open(ctx, config, create)
	}
	d.Destroy = func(ctx context.Context, config map[string]string) error {
		config, err := a.located(config)
		if err != nil {
			return err
		}
		return destroy(ctx, config)
	}
	return d
}
