package api

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"

	"coppice/internal/db"
	"coppice/internal/storage"
	"coppice/internal/xapi"
)

// unavailableKey is the key in a PBD's other_config that says why its SR could
// not be opened at start-up. The next start plugs it again.
const unavailableKey = "coppice:unavailable"

// openStorage opens the repositories of all SRs that were attached when the
// server stopped, and brings records and volumes back in line: both are
// durable on their own, and a crash can have come between the two commits of
// an operation.
//
//   - A volume without a record is the rest of a creation that was never
//     acknowledged, or of a deletion that was; it is reclaimed and reported.
//     Only what VDI.forget left is kept. When the store has been used by a
//     later state of the database than this, or by another one, the volume
//     is a disk of that and is recovered instead; see storeMark.
//   - A record without a volume cannot come from a crash. It is kept, marked
//     missing, and reported: its SR may have been tampered with.
//   - Sizes are read again.
//
// An SR that cannot be opened is left detached and reported, in the log and
// in its PBD; the others work.
func (a *API) openStorage(ctx context.Context) error {
	wanted := map[xapi.Ref[xapi.PBD]]*xapi.PBD{}
	err := a.db.View(func(tx *db.Tx) error {
		for ref, pbd := range db.All[xapi.PBD](tx) {
			if _, err := a.repos.get(pbd.SR); err == nil {
				continue // bootstrap has just made it
			}
			if pbd.CurrentlyAttached || pbd.OtherConfig[unavailableKey] != "" {
				wanted[ref] = pbd
			}
		}
		return nil
	})
	if err != nil {
		return err
	}
	for _, ref := range slices.Sorted(maps.Keys(wanted)) {
		var failed error
		if repo := a.repos.takeEarly(wanted[ref].SR); repo != nil {
			failed = a.reopen(ctx, repo)
		} else { // what happened to it since is not known, so nothing is reclaimed
			failed = a.plug(ctx, ref, wanted[ref])
		}
		if failed == nil {
			continue
		}
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		a.log.Error("an SR cannot be opened and is left detached", "pbd", ref, "err", failed)
		err := a.db.Update(ctx, func(tx *db.Tx) error {
			err := db.Modify(tx, ref, func(p *xapi.PBD) {
				p.CurrentlyAttached = false
				p.OtherConfig[unavailableKey] = failed.Error()
			})
			return cmpErr(err, touchDisksOf(tx, wanted[ref].SR))
		})
		if err != nil {
			return err
		}
	}
	if err := a.db.Settle(ctx, a.restoreAllowed); err != nil {
		return err
	}
	a.repos.wake = make(chan struct{}, 1)
	a.background.Go(a.watchUsage)
	return nil
}

// touchDisksOf counts an SR and its disks as modified, which allow something
// else from now on than clients were told before the start: the database does
// not remember what for all of them.
func touchDisksOf(tx *db.Tx, ref xapi.Ref[xapi.SR]) error {
	sr, err := db.Get(tx, ref)
	if err != nil {
		return nil // no disks then
	}
	for _, v := range sr.VDIs {
		if err := tx.Touch(xapi.ClassOf[xapi.VDI](), string(v)); err != nil {
			return err
		}
	}
	return tx.Touch(xapi.ClassOf[xapi.SR](), string(ref))
}

// reopen attaches a repository that recognize has opened, and reconciles it. It
// is closed after an error.
func (a *API) reopen(ctx context.Context, repo *repository) error {
	a.repos.put(repo)
	if err := a.reconcile(ctx, repo); err != nil {
		a.repos.take(repo.sr)
		return errors.Join(fmt.Errorf("reconcile SR %s: %w", repo.sr, err), repo.Close())
	}
	return nil
}

// reconcile does for one repository what openStorage says.
func (a *API) reconcile(ctx context.Context, repo *repository) error {
	take := takeInventory
	if repo.attrsKnown {
		take = a.takeBareInventory
	}
	inv, err := take(ctx, repo)
	if err != nil {
		return err
	}
	defer inv.end()
	var why string
	err = a.db.View(func(tx *db.Tx) error {
		why = recovery(tx, repo.sr)
		return nil
	})
	if err == nil && why == "" {
		err = a.settleReverts(ctx, inv)
	}
	if err != nil {
		return err
	}
	var unowned []storage.Info
	err = a.db.Update(ctx, func(tx *db.Tx) (err error) {
		unowned, err = a.compareWith(tx, inv, markMissing)
		if err != nil || why == "" {
			return err
		}
		err, unowned = a.recoverVolumes(tx, repo, unowned, why), nil
		return err
	})
	if err != nil {
		return err
	}
	if err := a.reclaim(ctx, repo, unowned); err != nil {
		// Garbage is a nuisance, not a reason to keep users from their disks.
		a.log.Error("reclaiming is incomplete", "sr", repo.sr, "err", err)
	}
	a.finishDataDestroys(ctx, inv)
	if repo.attrsKnown {
		for _, ref := range inv.bared {
			a.syncAttrs(ctx, ref)
		}
	} else {
		a.refreshAttrs(ctx, inv)
	}
	if err := a.markStore(ctx, repo); err != nil {
		a.log.Warn("a store does not know how far the database is", "err", err) // a full one can be used
	}
	return nil
}

// finishDataDestroys destroys the data of disks that have none by their
// records: a crash came between the two.
func (a *API) finishDataDestroys(ctx context.Context, inv *inventory) {
	unfinished := map[xapi.Ref[xapi.VDI]]storage.ID{}
	_ = a.db.View(func(tx *db.Tx) error {
		for ref, v := range db.All[xapi.VDI](tx) {
			if v.SR != inv.repo.sr || v.Type != xapi.VDITypeCBTMetadata {
				continue
			}
			if info, ok := inv.volumes[storage.ID(v.UUID)]; ok && !info.NoData {
				unfinished[ref] = info.ID
			}
		}
		return nil
	})
	for ref, id := range unfinished {
		if err := a.finishDataDestroy(ctx, inv.repo, ref, id); err != nil {
			a.log.Error("the data of a disk could not be destroyed", "vdi", id, "err", err)
		}
	}
}

// closeStorage marks and closes every repository. Nothing changes any more, so
// the marks tell what the attribute blobs are worth.
func (a *API) closeStorage() error {
	ctx := context.Background()
	if err := a.db.Sync(ctx); err != nil { // the database closes at the revision that the marks name
		a.log.Warn("event tokens may not survive the restart", "err", err)
	}
	for _, repo := range a.repos.all() {
		repo.attrs.Lock()
		version := attrsVersion
		if repo.attrsStale {
			version = 0
		}
		repo.attrs.Unlock()
		if err := a.markStoreWith(ctx, repo, version); err != nil {
			a.log.Warn("a store does not know how far the database is", "err", err)
		}
	}
	return a.repos.closeAll()
}
