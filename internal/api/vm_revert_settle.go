package api

import (
	"context"
	"fmt"
	"maps"
	"slices"

	"coppice/internal/db"
	"coppice/internal/storage"
	"coppice/internal/xapi"
)

// revertMark is what the attribute blob of a volume says that holds the
// contents of a disk from before a revert of its VM, or of itself. A revert is
// complete when the record of what is reverted says so; until then its
// generation, generation_id of a VM and generationKey of a disk, is the one in
// the mark, and after that never again. So whoever finds the volume without a
// record knows whether the disk has to go back.
type revertMark struct {
	VM         string `json:"vm,omitempty"`         // uuid; none when the disk alone is reverted
	Generation string `json:"generation,omitempty"` // before the revert
	Gone       bool   `json:"gone,omitempty"`       // there was no such VM before
	Disk       string `json:"disk"`                 // uuid of the disk whose contents these were
}

// incomplete tells whether the revert that made the mark was not completed.
func (m *revertMark) incomplete(tx *db.Tx) bool {
	if m.VM == "" {
		_, v, err := db.ByUUID[xapi.VDI](tx, m.Disk)
		return err == nil && m.Generation != "" && v.SMConfig[generationKey] == m.Generation
	}
	_, vm, err := db.ByUUID[xapi.VM](tx, m.VM)
	if m.Gone {
		return err != nil
	}
	return err == nil && vm.GenerationID == m.Generation
}

// settleReverts undoes reverts that were cut off between the first disk
// that was put back and the commit that makes a revert true, as far as they
// concern the repository that inv lists: each disk gets the contents back that
// it had before. The volumes that held them are then deleted, as are those
// that a completed revert has left. inv is kept up to date. An error leaves
// everything for the next time.
//
// A volume whose disk this database does not know belongs to another server's
// revert, of which nothing can be said here: it stays, and becomes a disk like
// any other that is found.
func (a *API) settleReverts(ctx context.Context, inv *inventory) error {
	marks := map[storage.ID]*revertMark{}
	pending := map[storage.ID]bool{}
	err := a.db.View(func(tx *db.Tx) error {
		for _, id := range a.strangers(inv) { // the others are disks, perhaps undo snapshots of completed reverts
			if _, _, err := db.ByUUID[xapi.VDI](tx, string(id)); err == nil {
				continue
			}
			at, ok := decodeAttrs(inv.volumes[id].Attrs)
			if !ok || at.Revert == nil {
				continue
			}
			_, _, unknown := db.ByUUID[xapi.VDI](tx, at.Revert.Disk)
			_, there := inv.volumes[storage.ID(at.Revert.Disk)]
			if unknown == nil || !there {
				marks[id], pending[id] = at.Revert, there && at.Revert.incomplete(tx)
			}
		}
		return nil
	})
	if err != nil {
		return err
	}
	for _, id := range slices.Sorted(maps.Keys(marks)) {
		if pending[id] {
			disk := storage.ID(marks[id].Disk)
			r, ok := inv.repo.Repo.(storage.Reverter)
			if !ok {
				return fmt.Errorf("undo the revert of VDI %s: the driver cannot", disk)
			}
			if err := r.Revert(ctx, disk, id); err != nil {
				return fmt.Errorf("undo the revert of VDI %s: %w", disk, err)
			}
			info, err := inv.repo.Stat(ctx, disk)
			if err != nil {
				return fmt.Errorf("look at VDI %s: %w", disk, err)
			}
			inv.volumes[disk] = info
			a.log.Warn("a revert that was cut off has been undone", "vm", marks[id].VM, "vdi", disk)
		}
	}
	for id := range marks {
		if err := inv.repo.remove(ctx, id); err != nil {
			return fmt.Errorf("delete volume %s: %w", id, err)
		}
		delete(inv.volumes, id)
	}
	return nil
}
