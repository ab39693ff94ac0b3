package api

import (
	"context"
	"fmt"
	"maps"
	"slices"

	"coppice/internal/storage"
	"coppice/internal/xapi"
)

// vdiSnapshot makes a read-only disk with the contents of this instant. It
// takes the same time for every disk: one commit in the storage and one in the
// database. driverParams are hints to other drivers and mean nothing to ours.
func (a *API) vdiSnapshot(ctx context.Context, c *Call, ref xapi.Ref[xapi.VDI], driverParams map[string]string) (xapi.Ref[xapi.VDI], error) {
	w, err := a.beginDisk(ctx, c, ref, xapi.VDIOperationsSnapshot, xapi.StorageOperationsVDISnapshot)
	if err != nil {
		return "", err
	}
	defer w.release()
	return a.addDisk(ctx, w.repo, a.snapshotRecord(ref, w.rec), func(id storage.ID, attrs []byte) (storage.Info, error) {
		info, err := w.repo.Snapshot(ctx, storage.Derived{Source: w.id(), ID: id, Attrs: attrs})
		if err != nil {
			return info, fmt.Errorf("snapshot VDI %s: %w", w.id(), err)
		}
		return info, nil
	})
}

// vdiClone makes a writable disk with the contents of this instant, as fast
// as a snapshot. It is a disk of its own: nothing points from one to the other.
func (a *API) vdiClone(ctx context.Context, c *Call, ref xapi.Ref[xapi.VDI], driverParams map[string]string) (xapi.Ref[xapi.VDI], error) {
	w, err := a.beginDisk(ctx, c, ref, xapi.VDIOperationsClone, xapi.StorageOperationsVDIClone)
	if err != nil {
		return "", err
	}
	defer w.release()
	return a.addDisk(ctx, w.repo, derivedDisk(w.rec), func(id storage.ID, attrs []byte) (storage.Info, error) {
		info, err := w.repo.Clone(ctx, storage.Derived{Source: w.id(), ID: id, Attrs: attrs})
		if err != nil {
			return info, fmt.Errorf("clone VDI %s: %w", w.id(), err)
		}
		return info, nil
	})
}

// derivedDisk is the record of a disk made from src: what a user would call
// its properties is the same, its identity and history are its own.
func derivedDisk(src *xapi.VDI) *xapi.VDI {
	rec := xapi.New[xapi.VDI]()
	rec.SR, rec.Type, rec.VirtualSize = src.SR, src.Type, src.VirtualSize
	rec.NameLabel, rec.NameDescription = src.NameLabel, src.NameDescription
	rec.Sharable, rec.OnBoot, rec.AllowCaching = src.Sharable, src.OnBoot, src.AllowCaching
	rec.OtherConfig, rec.XenstoreData = maps.Clone(src.OtherConfig), maps.Clone(src.XenstoreData)
	for _, key := range []string{holdKey, receivedKey, recoveredKey, undoKey, pullKey} {
		delete(rec.OtherConfig, key) // it was meant for src
	}
	rec.Tags = slices.Clone(src.Tags)
	if z, ok := src.SMConfig[zeroedKey]; ok { // it is about the contents
		rec.SMConfig[zeroedKey] = z
	}
	return rec
}
