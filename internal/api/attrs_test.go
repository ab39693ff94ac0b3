package api

import (
	"testing"

	"coppice/internal/storage"
)

// A start looks at the attributes of volumes when it cannot know that they say
// what the records say: a change of them failed, or the last run was cut off.
// After a stop in which nothing was left to do it does not.
func TestAttributesAtAStart(t *testing.T) {
	onDrivers(t, func(t *testing.T, r *rig) {
		disk := r.disk(2 << 20)
		id := volumeID(record(r.core, disk))
		repo := func() *repository {
			repo, err := r.repos.get(r.sr)
			if err != nil {
				t.Fatal(err)
			}
			return repo
		}
		want := func(known bool, label string) {
			t.Helper()
			info, err := repo().Stat(t.Context(), id)
			if err != nil {
				t.Fatal(err)
			}
			if at, _ := decodeAttrs(info.Attrs); at.Label != label || repo().attrsKnown != known {
				t.Errorf("label %q, known %v, want %q, %v", at.Label, repo().attrsKnown, label, known)
			}
		}
		r.faults.arm(1, failBefore, false)
		r.call("VDI.set_name_label", disk, "one")
		r.restart()
		want(false, "one")
		r.restart()
		want(true, "one")

		r.call("VDI.set_name_label", disk, "two")
		r.restart()
		want(true, "two")

		r.faults.refuseLabels(true) // the mark of the stop that comes, too
		r.faults.arm(1, failBefore, false)
		r.call("VDI.set_name_label", disk, "three")
		r.stop(t)
		r.faults.refuseLabels(false)
		r.start(t)
		want(false, "three")

		err := repo().Repo.(storage.Attributer).SetAttrs(t.Context(), id, []byte(`{"uuid":"x","name_label":"other"}`))
		if err != nil {
			t.Fatal(err)
		}
		r.restart()
		want(true, "other") // which nothing but the server changes
		r.call("SR.scan", string(r.sr))
		want(true, "three")
		r.destroy(disk)
	})
}
