package api

import (
	"context"
	"errors"
	"fmt"
	"time"

	"coppice/internal/db"
	"coppice/internal/storage"
	"coppice/internal/xapi"
)

// The sizes of SRs are compared with what their storage says soon after an
// operation, once for all that come together, and now and then, because space
// also changes in the background; those of disks, of which there are many and
// which the storage knows only some time after they were written, now and then.
const (
	usagePause    = time.Second
	usageInterval = 30 * time.Second
)

// watchUsage keeps the sizes of SRs and of what their disks map up to date until the server stops.
func (a *API) watchUsage() {
	lasting := troubles{log: a.log, ctx: a.ctx}
	next := time.Now().Add(usageInterval) // when disks are looked at
	for {
		select {
		case <-a.ctx.Done():
			return
		case <-time.After(usageInterval):
		case <-a.repos.wake:
			select {
			case <-a.ctx.Done():
				return
			case <-time.After(usagePause):
			}
		}
		lasting.note("sizes of SRs are out of date", "", a.refreshUsage(a.ctx))
		if !time.Now().Before(next) {
			for _, repo := range a.repos.all() {
				lasting.note("sizes of disks are out of date", repo.sr, a.refreshDisks(a.ctx, repo))
			}
			next = time.Now().Add(usageInterval)
		}
		for _, repo := range a.repos.all() {
			lasting.note("what is damaged is not recorded", repo.sr, a.noteDamage(a.ctx, repo, false))
		}
		lasting.note("event tokens may not survive a crash", "", a.db.Sync(a.ctx))
		for _, repo := range a.repos.all() {
			lasting.note("a store does not know how far the database is", repo.sr, a.markStore(a.ctx, repo))
		}
	}
}

// refreshUsage writes the sizes of the attached SRs, where they have changed.
func (a *API) refreshUsage(ctx context.Context) error {
	var errs []error
	for _, repo := range a.repos.all() {
		usage, err := repo.Usage(ctx)
		if err != nil {
			errs = append(errs, fmt.Errorf("SR %s: %w", repo.sr, err))
			continue
		}
		stale := false
		err = a.db.View(func(tx *db.Tx) error {
			sr, err := db.Get(tx, repo.sr)
			stale = err == nil && (sr.PhysicalSize != usage.Total || sr.PhysicalUtilisation != usage.Used)
			return nil
		})
		if err != nil || !stale {
			errs = append(errs, err)
			continue
		}
		errs = append(errs, a.db.Update(ctx, func(tx *db.Tx) error {
			if _, err := db.Get(tx, repo.sr); err != nil {
				return nil // forgotten meanwhile
			}
			return db.Modify(tx, repo.sr, func(sr *xapi.SR) {
				sr.PhysicalSize, sr.PhysicalUtilisation = usage.Total, usage.Used
			})
		}))
	}
	return errors.Join(errs...)
}

// refreshDisks writes how much the disks of an SR map, where that has changed.
// Disks that an operation is at are left to it.
func (a *API) refreshDisks(ctx context.Context, repo *repository) error {
	list := repo.List
	if l, ok := repo.Repo.(storage.BareLister); ok {
		list = l.ListBare
	}
	inv, err := listVolumes(ctx, repo, list(ctx))
	if err != nil {
		return err
	}
	defer inv.end()
	used := func(v *xapi.VDI) (n int64, stale bool) {
		info, ok := inv.volumes[storage.ID(v.UUID)]
		return info.Used, ok && v.SR == repo.sr && !info.NoData && v.PhysicalUtilisation != info.Used && inv.settled(info.ID)
	}
	var stale []xapi.Ref[xapi.VDI]
	err = a.db.View(func(tx *db.Tx) error {
		for ref, v := range db.All[xapi.VDI](tx) {
			if _, ok := used(v); ok {
				stale = append(stale, ref)
			}
		}
		return nil
	})
	if err != nil || len(stale) == 0 {
		return err
	}
	return a.db.Update(ctx, func(tx *db.Tx) error {
		for _, ref := range stale {
			v, err := db.Get(tx, ref)
			if err != nil {
				continue // destroyed meanwhile
			}
			n, ok := used(v)
			if !ok {
				continue
			}
			if err := db.Modify(tx, ref, func(v *xapi.VDI) { v.PhysicalUtilisation = n }); err != nil {
				return err
			}
		}
		return nil
	})
}
