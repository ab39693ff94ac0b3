// Package all lists the storage drivers that a server has.
package all

import (
	"coppice/internal/storage"
	"coppice/internal/storage/cow"
	"coppice/internal/storage/mem"
)

// Registry returns the drivers by type.
func Registry() storage.Registry {
	r := storage.Registry{}
	for _, d := range []storage.Driver{cow.Driver(), mem.Driver()} {
		r[d.Type] = d
	}
	return r
}
