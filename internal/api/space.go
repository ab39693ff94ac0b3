package api

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"
	"time"

	"coppice/internal/db"
	"coppice/internal/storage"
	"coppice/internal/xapi"
)

// A disk's physical_utilisation is what it maps, shared or not. What it has of
// its own, which is what its deletion would give back, takes a walk over its
// map to tell. It is told when it is asked for, by VDI.update and the plugin
// functions below, and stays in sm_config with its age, where lists have it for
// nothing.
const (
	exclusiveKey   = "coppice:exclusive"    // bytes
	exclusiveAtKey = "coppice:exclusive-at" // of which state, RFC 3339
	// writtenKey holds the bytes of data that a disk has and the snapshot that
	// it descends from has not.
	writtenKey = "coppice:written"

	// exclusivePatience is how long VDI.update looks for it.
	exclusivePatience = time.Second
)

// transient tells keys of sm_config that the server writes about the storage,
// and that mean nothing to another server with a copy of it.
func transient(key string) bool { return strings.HasPrefix(key, "coppice:") && key != zeroedKey }

// lastingSMConfig is what of sm_config the storage keeps.
func lastingSMConfig(m map[string]string) map[string]string {
	lasting := maps.Clone(m)
	maps.DeleteFunc(lasting, func(k, _ string) bool { return transient(k) })
	return lasting
}

// space is what has been measured of one disk.
type space struct {
	storage.Freed       // by its deletion
	written       int64 // since its parent; -1 when that is not known
}

// measure tells what a disk has of its own. ErrNotFound of the storage when it
// has no volume.
func measure(ctx context.Context, repo *repository, id storage.ID) (s space, err error) {
	e, ok := repo.Repo.(storage.SpaceEstimator)
	if !ok {
		return s, xapi.NewError(xapi.ErrSROperationNotSupported, string(repo.sr))
	}
	if s.Freed, err = e.WouldFree(ctx, id); err != nil {
		return s, fmt.Errorf("what VDI %s has of its own: %w", id, err)
	}
	s.written = -1
	if w, ok := repo.Repo.(storage.WriteCounter); ok {
		s.written, err = w.WrittenSinceParent(ctx, id)
		if errors.Is(err, storage.ErrNoData) {
			s.written, err = 0, nil
		}
	}
	return s, err
}

// record puts it into the record of the disk.
func (s space) record(tx *db.Tx, ref xapi.Ref[xapi.VDI]) error {
	return db.Modify(tx, ref, func(v *xapi.VDI) {
		v.SMConfig[exclusiveKey] = strconv.FormatInt(s.Bytes, 10)
		v.SMConfig[exclusiveAtKey] = s.At.UTC().Format(time.RFC3339)
		if s.written >= 0 {
			v.SMConfig[writtenKey] = strconv.FormatInt(s.written, 10)
		}
	})
}

// noteSpace measures a disk, within a second; if that is not enough, what was
// known stays.
func (a *API) noteSpace(ctx context.Context, w *diskWork) {
	short, cancel := context.WithTimeout(ctx, exclusivePatience)
	defer cancel()
	s, err := measure(short, w.repo, w.id())
	if err == nil {
		err = a.db.Update(ctx, func(tx *db.Tx) error { return s.record(tx, w.ref) })
	}
	if err != nil {
		a.log.Debug("what a disk has of its own is not known", "vdi", w.ref, "err", err)
	}
}

// freedReport is the answer of the plugin function vdi-would-free.
type freedReport struct {
	Bytes int64     `json:"bytes"`
	At    time.Time `json:"at"`    // of the state that was looked at
	Exact bool      `json:"exact"` // false when it changed meanwhile
}

// pluginWouldFree tells, in JSON, what destroying all of the disks whose uuids
// are in vdis, parted by commas, would give back: together, so what only they
// share is in it.
func (a *API) pluginWouldFree(ctx context.Context, args map[string]string) (string, error) {
	var ids []storage.ID
	var sr xapi.Ref[xapi.SR]
	err := a.db.View(func(tx *db.Tx) error {
		for id := range strings.SplitSeq(args["vdis"], ",") {
			ref, v, err := db.ByUUID[xapi.VDI](tx, strings.TrimSpace(id))
			switch {
			case err != nil:
				return err
			case v.Missing:
				return xapi.NewError(xapi.ErrVDIMissing, string(v.SR), string(ref))
			case sr != "" && v.SR != sr: // they share nothing
				return xapi.NewError(xapi.ErrOperationNotAllowed, "The VDIs are in different SRs.")
			}
			sr, ids = v.SR, append(ids, storage.ID(v.UUID))
		}
		return nil
	})
	if err != nil {
		return "", err
	}
	repo, err := a.repos.get(sr)
	if err != nil {
		return "", err
	}
	e, ok := repo.Repo.(storage.SpaceEstimator)
	if !ok {
		return "", xapi.NewError(xapi.ErrSROperationNotSupported, string(sr))
	}
	f, err := e.WouldFree(ctx, ids...)
	if err != nil {
		return "", fmt.Errorf("what %d disks have of their own: %w", len(ids), err)
	}
	return toJSON(freedReport{f.Bytes, f.At.UTC(), f.Exact})
}

// spaceReport is the answer of the plugin function sr-space.
type spaceReport struct {
	SR    string `json:"sr"`    // uuid
	Disks int    `json:"disks"` // measured
	Bytes int64  `json:"bytes"` // that some disk has of its own
}

// spaceBatch is how many records are brought up to date in one commit.
const spaceBatch = 64

// pluginSpace measures what each disk of the SR whose uuid is sr has of its
// own. It tells its progress and can be cancelled; what has been measured by
// then stays.
func (a *API) pluginSpace(ctx context.Context, c *Call, args map[string]string) (string, error) {
	repo, drop, err := a.pluginSR(c, args, "sr-space")
	if err != nil {
		return "", err
	}
	defer drop()
	var refs []xapi.Ref[xapi.VDI]
	err = a.db.View(func(tx *db.Tx) error {
		sr, err := db.Get(tx, repo.sr)
		if err == nil {
			refs = slices.Clone(sr.VDIs)
		}
		return err
	})
	if err != nil {
		return "", err
	}
	report := spaceReport{SR: args["sr"]}
	for n := 0; n < len(refs); n += spaceBatch {
		measured, err := a.measureAll(ctx, repo, refs[n:min(n+spaceBatch, len(refs))])
		if err != nil {
			return "", err
		}
		err = a.db.Update(ctx, func(tx *db.Tx) error {
			for ref, s := range measured {
				if _, err := db.Get(tx, ref); err != nil {
					continue // destroyed meanwhile
				}
				if err := s.record(tx, ref); err != nil {
					return err
				}
				report.Disks++
				report.Bytes += s.Bytes
			}
			return nil
		})
		if err != nil {
			return "", err
		}
		c.Progress(int64(n), int64(len(refs)))
	}
	return toJSON(report)
}

// measureAll measures some disks. Disks that are gone, or whose volumes are, are
// left out.
func (a *API) measureAll(ctx context.Context, repo *repository, refs []xapi.Ref[xapi.VDI]) (map[xapi.Ref[xapi.VDI]]space, error) {
	measured := map[xapi.Ref[xapi.VDI]]space{}
	for _, ref := range refs {
		var id storage.ID
		_ = a.db.View(func(tx *db.Tx) error {
			if v, err := db.Get(tx, ref); err == nil {
				id = storage.ID(v.UUID)
			}
			return nil
		})
		if id == "" {
			continue
		}
		s, err := measure(ctx, repo, id)
		switch {
		case errors.Is(err, storage.ErrNotFound):
		case err != nil:
			return nil, err
		default:
			measured[ref] = s
		}
	}
	return measured, nil
}
