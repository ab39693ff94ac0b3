package api

import (
	"context"
	"encoding/json"
	"errors"
	"time"

	"coppice/internal/db"
	"coppice/internal/storage"
	"coppice/internal/xapi"
)

// diskAttrs is what the attribute blob of a volume says: enough of the VDI's
// record to make it again from the storage alone, when an SR is introduced
// somewhere else or the database is lost. The record is the truth; the blob
// follows it, and SR.scan brings it up to date where that failed.
//
// The blob is JSON. Keys are added, never changed in meaning; a reader takes
// what it knows and lets the rest be. When attrsOf or encode come to say
// something else of a record, attrsVersion changes.
type diskAttrs struct {
	SR          string            `json:"sr"` // uuid
	UUID        string            `json:"uuid"`
	Label       string            `json:"name_label"`
	Description string            `json:"name_description,omitempty"`
	Type        xapi.VDIType      `json:"type"`
	Snapshot    bool              `json:"is_a_snapshot,omitempty"`
	SnapshotOf  string            `json:"snapshot_of,omitempty"` // uuid
	Time        time.Time         `json:"snapshot_time,omitzero"`
	Sharable    bool              `json:"sharable,omitempty"`
	ReadOnly    bool              `json:"read_only,omitempty"`
	OnBoot      xapi.OnBoot       `json:"on_boot,omitempty"`
	Caching     bool              `json:"allow_caching,omitempty"`
	CBT         bool              `json:"cbt_enabled,omitempty"`
	OtherConfig map[string]string `json:"other_config,omitempty"`
	SMConfig    map[string]string `json:"sm_config,omitempty"`
	Xenstore    map[string]string `json:"xenstore_data,omitempty"`
	Tags        []string          `json:"tags,omitempty"`
	// Forgotten marks a volume that VDI.forget took the record of, so that
	// start-up does not take it for the rest of a crashed operation.
	Forgotten bool `json:"forgotten,omitempty"`
	// Revert marks a volume that keeps the contents from before a VM.revert,
	// until the revert is complete.
	Revert *revertMark `json:"revert,omitempty"`
}

// attrsVersion tells in the mark of a store which program made the attribute
// blobs, so that one that would make others does so at its first start.
const attrsVersion = 1

// attrsOf describes a record.
func attrsOf(tx *db.Tx, v *xapi.VDI) diskAttrs {
	at := diskAttrs{
		UUID: v.UUID, Label: v.NameLabel, Description: v.NameDescription, Type: v.Type,
		Snapshot: v.IsASnapshot, Sharable: v.Sharable, ReadOnly: v.ReadOnly,
		OnBoot: v.OnBoot, Caching: v.AllowCaching, CBT: v.CBTEnabled, OtherConfig: v.OtherConfig,
		SMConfig: lastingSMConfig(v.SMConfig), Xenstore: v.XenstoreData, Tags: v.Tags,
	}
	if !v.SnapshotTime.Equal(time.Unix(0, 0)) {
		at.Time = v.SnapshotTime.UTC()
	}
	if of, err := db.Get(tx, v.SnapshotOf); err == nil {
		at.SnapshotOf = of.UUID
	}
	if sr, err := db.Get(tx, v.SR); err == nil {
		at.SR = sr.UUID
	}
	return at
}

// inherit takes over what an older blob of the volume knows and the record
// does not tell any more: which disk a snapshot was taken of, once that disk is
// gone.
func (at diskAttrs) inherit(old []byte) diskAttrs {
	if !at.Snapshot || at.SnapshotOf != "" {
		return at
	}
	if was, ok := decodeAttrs(old); ok {
		at.SnapshotOf = was.SnapshotOf
	}
	return at
}

// apply fills in a record; snapshot_of is resolved by the caller, who knows
// all records.
func (at diskAttrs) apply(v *xapi.VDI) {
	v.NameLabel, v.NameDescription = at.Label, at.Description
	if at.Type != "" {
		v.Type = at.Type
	}
	v.IsASnapshot, v.Sharable, v.ReadOnly = at.Snapshot, at.Sharable, at.ReadOnly
	if at.OnBoot != "" {
		v.OnBoot = at.OnBoot
	}
	v.AllowCaching, v.CBTEnabled = at.Caching, at.CBT
	if !at.Time.IsZero() {
		v.SnapshotTime = at.Time
	}
	v.OtherConfig, v.SMConfig, v.XenstoreData, v.Tags = at.OtherConfig, at.SMConfig, at.Xenstore, at.Tags
}

// longestText is how much of a name or description fits into a blob that
// would be too large otherwise, in bytes.
const longestText = 4 << 10

// encode returns the blob, at most storage.MaxAttrs bytes. A record that is
// larger loses first its free-form data, then its maps, then the ends of its
// texts: what identifies the disk always fits.
func (at diskAttrs) encode() []byte {
	shrink := []func(){
		func() { at.Xenstore = nil },
		func() { at.SMConfig = nil },
		func() { at.OtherConfig = nil },
		func() { at.Tags = nil },
		func() {
			at.Description = at.Description[:min(len(at.Description), longestText)]
			at.Label = at.Label[:min(len(at.Label), longestText)]
		},
	}
	for i := 0; ; i++ {
		b, err := json.Marshal(at)
		if err != nil {
			panic("api: disk attributes do not encode: " + err.Error()) // strings, maps and a time always do
		}
		if len(b) <= storage.MaxAttrs || i == len(shrink) {
			return b
		}
		shrink[i]()
	}
}

// decodeAttrs reads a blob; ok is false when it is not one of ours.
func decodeAttrs(b []byte) (at diskAttrs, ok bool) {
	if err := json.Unmarshal(b, &at); err != nil || at.UUID == "" {
		return diskAttrs{}, false
	}
	return at, true
}

// syncAttrs writes the blob of a disk's volume from its record. The blob is a
// copy for bad days: when it cannot be written now, that is logged and the
// next scan does it.
func (a *API) syncAttrs(ctx context.Context, ref xapi.Ref[xapi.VDI]) {
	var sr xapi.Ref[xapi.SR]
	_ = a.db.View(func(tx *db.Tx) error {
		if v, err := db.Get(tx, ref); err == nil {
			sr = v.SR
		}
		return nil
	})
	repo, err := a.repos.get(sr)
	if err != nil {
		return // not attached, or the disk is gone
	}
	if err := a.writeAttrs(ctx, repo, ref); err != nil {
		a.log.Warn("the volume's copy of the VDI record is out of date", "vdi", ref, "err", err)
	}
}

// writeAttrs does what syncAttrs says. Writers of one repo take turns and
// read the record in their turn, so the last one writes the last state.
func (a *API) writeAttrs(ctx context.Context, repo *repository, ref xapi.Ref[xapi.VDI]) (err error) {
	w, ok := repo.Repo.(storage.Attributer)
	if !ok {
		return nil
	}
	repo.attrs.Lock()
	defer repo.attrs.Unlock()
	defer func() { repo.attrsStale = repo.attrsStale || err != nil }()
	var id storage.ID
	var at diskAttrs
	gone := a.db.View(func(tx *db.Tx) error {
		v, err := db.Get(tx, ref)
		if err != nil {
			return err
		}
		id, at = storage.ID(v.UUID), attrsOf(tx, v)
		return nil
	})
	if gone != nil {
		return nil // deleted meanwhile
	}
	if at.Snapshot && at.SnapshotOf == "" {
		info, err := repo.Stat(ctx, id)
		if err != nil {
			return err
		}
		at = at.inherit(info.Attrs)
	}
	if err := w.SetAttrs(ctx, id, at.encode()); err != nil && !errors.Is(err, storage.ErrNotFound) {
		return err
	}
	return nil
}
