package storage

import (
	"context"
	"slices"
)

// Driver makes repositories of one type.
type Driver struct {
	Type        string // the SR type clients name: "cow", "mem"
	Description string
	// Config lists the device-config keys it understands, with what they mean.
	Config map[string]string
	// Open opens the repo that config names, creating it when create is set
	// and it does not exist; without create that is ErrNoRepo. ErrLocked
	// when it is open already, ErrInvalid for a bad config.
	Open func(ctx context.Context, config map[string]string, create bool) (Repo, error)
	// Destroy removes the repo that config names with all its volumes. It must
	// be closed, or the error is ErrLocked; ErrNoRepo when there is none. One
	// that was cut short leaves the repo, or none and at most garbage that
	// an Open with create removes.
	Destroy func(ctx context.Context, config map[string]string) error
	// Features are those of any repo of the type, as Features computes them.
	Features []string
}

// Registry is the set of drivers of a server, by type.
type Registry map[string]Driver

// Types returns the registered types, sorted.
func (r Registry) Types() []string {
	types := make([]string, 0, len(r))
	for t := range r {
		types = append(types, t)
	}
	slices.Sort(types)
	return types
}

// Features returns the SM feature names that follow from what a driver's Repo
// type implements, in a fixed order: a feature cannot be advertised without
// the code behind it.
func Features(r Repo) []string {
	f := []string{
		"SR_PROBE", "SR_SCAN", "SR_UPDATE",
		"VDI_CREATE", "VDI_DELETE", "VDI_ATTACH", "VDI_DETACH", "VDI_ACTIVATE", "VDI_DEACTIVATE",
		"VDI_UPDATE", "VDI_CLONE", "VDI_SNAPSHOT", "VDI_GENERATE_CONFIG", "THIN_PROVISIONING",
	}
	if _, ok := r.(Resizer); ok {
		f = append(f, "VDI_RESIZE")
	}
	if _, ok := r.(Reverter); ok {
		f = append(f, "VDI_REVERT")
	}
	_, destroys := r.(DataDestroyer)
	if _, tracks := r.(ChangeTracker); tracks && destroys {
		f = append(f, "VDI_CONFIG_CBT")
	}
	return f
}
