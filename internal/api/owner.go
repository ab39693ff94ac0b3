package api

import (
	"context"
	"encoding/json"
	"fmt"
	"time"

	"coppice/internal/db"
	"coppice/internal/storage"
	"coppice/internal/xapi"
)

// storeMark is what a store remembers, in the attributes of the repository as
// a whole, of the database that used it last. Start-up compares the two before
// it deletes what that database does not know: a database that is older than
// its mark was copied before disks were made that the store has.
//
// The mark is JSON. Keys are added, never changed in meaning.
type storeMark struct {
	Database string `json:"database"` // uuid of the pool
	Revision uint64 `json:"revision"` // db.Stored, when the mark was made
	SR       string `json:"sr"`       // uuid
	// Attrs is the attrsVersion of all attribute blobs in the store when they
	// said what the records of that revision say; 0 when that is not known.
	Attrs int `json:"attrs,omitempty"`
}

// recoverKey is the key in a PBD's other_config that says why, at the next
// chance, volumes without records get records instead of being reclaimed.
// It is there from the commit in which that was recognised to the one that has
// done it.
const recoverKey = "coppice:recover"

// recoveredKey is the key in other_config of a disk whose record was made
// from the storage at such a start: when, and why.
const recoveredKey = "coppice:recovered"

// recoveredAlert is the name of the message about it, and its priority.
const (
	recoveredAlert    = "COPPICE_DISKS_RECOVERED"
	recoveredPriority = 2
)

// markOf returns the mark of a store; the zero mark when it has none.
func markOf(ctx context.Context, r storage.Repo) (m storeMark, err error) {
	l, ok := r.(storage.Labeled)
	if !ok {
		return m, nil
	}
	b, err := l.RepoAttrs(ctx)
	if err != nil || len(b) == 0 {
		return m, err
	}
	if err := json.Unmarshal(b, &m); err != nil {
		return m, fmt.Errorf("mark of the store: %w", err)
	}
	return m, nil
}

// strangeTo says why a store cannot be trusted to have been used by this
// database and no later state of it; "" when it can. A store without a mark
// was used by a version that made none.
func (m storeMark) strangeTo(pool string, stored uint64) string {
	switch {
	case m.Database == "":
		return ""
	case m.Database != pool:
		return "the store was last used by another database"
	case m.Revision > stored:
		return "the database is older than the store"
	}
	return ""
}

// recognize opens the stores that were attached when the server stopped and
// compares their marks with the database, before anything is committed to it:
// from then on its age could not be told. What is recognised is noted in one
// commit, so that no crash can make it forgotten. A store that cannot be opened
// now is left to openStorage, which then trusts nothing about it.
func (a *API) recognize(ctx context.Context) error {
	stored, pool := a.db.Stored(), ""
	attached := map[xapi.Ref[xapi.PBD]]*xapi.PBD{}
	types := map[xapi.Ref[xapi.SR]]string{}
	err := a.db.View(func(tx *db.Tx) error {
		_, p, err := a.pool(tx)
		if err != nil {
			return nil // the first start
		}
		pool = p.UUID
		for ref, pbd := range db.All[xapi.PBD](tx) {
			if sr, err := db.Get(tx, pbd.SR); err == nil && pbd.CurrentlyAttached {
				attached[ref], types[pbd.SR] = pbd, sr.Type
			}
		}
		return nil
	})
	if err != nil {
		return err
	}
	strange := map[xapi.Ref[xapi.PBD]]string{}
	newest := uint64(0)
	for ref, pbd := range attached {
		drv, err := a.driver(types[pbd.SR])
		if err != nil {
			continue
		}
		r, err := drv.Open(ctx, pbd.DeviceConfig, false)
		if err != nil {
			continue
		}
		repo := newRepository(pbd.SR, r)
		a.repos.early(repo)
		m, err := markOf(ctx, r)
		why := m.strangeTo(pool, stored)
		repo.attrsKnown = err == nil && m.Database == pool && m.Revision == stored && m.Attrs == attrsVersion
		if err != nil {
			why = "what the store says of its database cannot be read: " + err.Error()
		}
		if why != "" {
			strange[ref] = why
		}
		if m.Database == pool {
			newest = max(newest, m.Revision)
		}
	}
	if len(strange) == 0 {
		return nil
	}
	// Whoever continued the newer state and comes back with it is older from
	// now on.
	err = a.db.Update(ctx, func(tx *db.Tx) error {
		for ref, why := range strange {
			a.log.Error("volumes without records will be recovered, not reclaimed", "pbd", ref, "why", why)
			if err := db.Modify(tx, ref, func(p *xapi.PBD) { p.OtherConfig[recoverKey] = why }); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		return err
	}
	return a.db.Advance(ctx, newest)
}

// recovery says why volumes of an SR without records are to be recovered; ""
// when they are not.
func recovery(tx *db.Tx, sr xapi.Ref[xapi.SR]) string {
	rec, err := db.Get(tx, sr)
	if err != nil {
		return ""
	}
	for _, ref := range rec.PBDs {
		if p, err := db.Get(tx, ref); err == nil && p.OtherConfig[recoverKey] != "" {
			return p.OtherConfig[recoverKey]
		}
	}
	return ""
}

// recoverVolumes gives records to volumes that a later state of the database,
// or another one, has made, marks them, and raises an alert. What VDI.forget
// left stays without.
func (a *API) recoverVolumes(tx *db.Tx, repo *repository, unowned []storage.Info, why string) error {
	var found []storage.Info
	for _, info := range unowned {
		if at, ok := decodeAttrs(info.Attrs); !ok || !at.Forgotten {
			found = append(found, info)
		}
	}
	if err := a.introduceVolumes(tx, repo, found); err != nil {
		return err
	}
	note := a.now().UTC().Format(time.RFC3339) + ": " + why
	for _, info := range found {
		ref, v, err := db.ByUUID[xapi.VDI](tx, string(info.ID))
		if err != nil || v.SR != repo.sr {
			continue
		}
		a.log.Warn("recovered a disk from its volume", "vdi", v.UUID, "name", v.NameLabel, "why", why)
		if err := db.Modify(tx, ref, func(v *xapi.VDI) { v.OtherConfig[recoveredKey] = note }); err != nil {
			return err
		}
	}
	sr, err := db.Get(tx, repo.sr)
	if err != nil {
		return err
	}
	for _, p := range sr.PBDs {
		if err := db.Modify(tx, p, func(p *xapi.PBD) { delete(p.OtherConfig, recoverKey) }); err != nil {
			return err
		}
	}
	body := fmt.Sprintf("%s; %d disks without records were recovered", why, len(found))
	_, err = a.addMessage(tx, recoveredAlert, recoveredPriority, xapi.ClsSR, sr.UUID, body)
	return err
}

// ownStore says whether a store that is being attached was last used by this
// database, or by a version that left no mark.
func (a *API) ownStore(ctx context.Context, repo *repository) (own bool, err error) {
	m, err := markOf(ctx, repo.Repo)
	if err != nil {
		a.log.Warn("a store does not say whose it is", "sr", repo.sr, "err", err)
		return false, nil
	}
	err = a.db.View(func(tx *db.Tx) error {
		_, p, err := a.pool(tx)
		own = m.Database == "" || err == nil && m.Database == p.UUID
		return nil
	})
	return own, err
}

// markStore has a store remember the database as it is now. That is only ever
// late, never wrong: the mark is of a state that is durable.
func (a *API) markStore(ctx context.Context, repo *repository) error {
	return a.markStoreWith(ctx, repo, 0)
}

// markStoreWith is markStore when the attribute blobs are of a version and say
// what the records say, and nothing changes any more.
func (a *API) markStoreWith(ctx context.Context, repo *repository, attrs int) error {
	l, ok := repo.Repo.(storage.Labeled)
	if !ok {
		return nil
	}
	repo.attrs.Lock()
	defer repo.attrs.Unlock()
	m := storeMark{Revision: a.db.Stored(), Attrs: attrs}
	err := a.db.View(func(tx *db.Tx) error {
		_, p, err := a.pool(tx)
		if err != nil {
			return err
		}
		sr, err := db.Get(tx, repo.sr)
		if err != nil {
			return err
		}
		m.Database, m.SR = p.UUID, sr.UUID
		return nil
	})
	if err != nil || m == repo.marked {
		return nil // the SR is gone, or the store knows
	}
	b, err := json.Marshal(m)
	if err != nil {
		return err
	}
	if err := l.SetRepoAttrs(ctx, b); err != nil {
		return fmt.Errorf("mark the store of SR %s: %w", repo.sr, err)
	}
	repo.marked = m
	return nil
}
