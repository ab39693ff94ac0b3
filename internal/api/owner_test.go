package api

import (
	"bytes"
	"context"
	"fmt"
	"slices"
	"testing"

	"coppice/internal/db"
	"coppice/internal/storage"
	"coppice/internal/storage/mem"
	"coppice/internal/xapi"
)

// copyStore makes a copy of a database, as a backup of its file does.
func copyStore(t *testing.T, s db.Store) *db.MemStore {
	t.Helper()
	dup, err := db.CopyStore(t.Context(), s)
	if err != nil {
		t.Fatal(err)
	}
	return dup
}

// named returns the disk of a name.
func (r *rig) named(label string) (ref vdiRef, v *xapi.VDI) {
	r.t.Helper()
	r.view(func(tx *db.Tx) {
		refs := db.ByName[xapi.VDI](tx, label)
		if len(refs) != 1 {
			r.t.Fatalf("%d disks are called %q", len(refs), label)
		}
		ref = refs[0]
		v, _ = db.Get(tx, ref)
	})
	return ref, v
}

// count tells how many messages of a name there are.
func (r *rig) count(name string) (n int) {
	r.view(func(tx *db.Tx) {
		for _, m := range db.All[xapi.Message](tx) {
			if m.Name == name {
				n++
			}
		}
	})
	return n
}

// later makes the disks that a backup does not have: "later", with contents and
// a snapshot, and "of kept", a snapshot of the disk kept. It destroys "gone".
func (r *rig) later(kept, gone vdiRef) {
	r.t.Helper()
	disk := r.disk(4 << 20)
	r.call("VDI.set_name_label", disk, "later")
	r.call("VDI.set_tags", disk, []string{"a", "b"})
	r.write(disk, []byte("precious"), 1<<20)
	r.call("VDI.set_name_label", r.call("VDI.snapshot", disk), "of later")
	r.call("VDI.set_name_label", r.call("VDI.snapshot", kept), "of kept")
	r.call("VDI.destroy", gone)
}

// wantRecovered checks what the start with the backup has made of them.
func (r *rig) wantRecovered(kept vdiRef) {
	r.t.Helper()
	for label, of := range map[string]string{"later": "", "of later": "later", "of kept": "kept"} {
		ref, v := r.named(label)
		if v.OtherConfig[recoveredKey] == "" || v.Missing || v.IsASnapshot != (of != "") {
			r.t.Errorf("recovered %q as %+v", label, v)
		}
		if of != "" {
			if want, _ := r.named(of); v.SnapshotOf != want {
				r.t.Errorf("%q is a snapshot of %s, want %q", label, v.SnapshotOf, of)
			}
		}
		if got := r.contents(ref)[1<<20 : 1<<20+8]; label != "of kept" && string(got) != "precious" {
			r.t.Errorf("contents of %q: %q", label, got)
		}
	}
	if _, v := r.named("later"); !slices.Equal(v.Tags, []string{"a", "b"}) {
		r.t.Errorf("tags %q", v.Tags)
	}
	if _, marked := record(r.core, kept).OtherConfig[recoveredKey]; marked {
		r.t.Error("a disk that the backup has counts as recovered")
	}
	if _, v := r.named("gone"); !v.Missing {
		r.t.Error("a disk that is gone from the storage is not missing")
	}
	pbd := record(r.core, xapi.Ref[xapi.PBD](r.pbd(r.sr)))
	if why, ok := pbd.OtherConfig[recoverKey]; ok || !pbd.CurrentlyAttached {
		r.t.Errorf("the PBD is left with %q, attached: %v", why, pbd.CurrentlyAttached)
	}
}

// A database that is older than its store does not take the newer disks for
// the rest of crashed operations. Neither does the newer one when it comes
// back to a store that the older one has used since.
func TestOlderDatabase(t *testing.T) {
	onDrivers(t, func(t *testing.T, r *rig) {
		kept, gone := r.disk(2<<20), r.disk(2<<20)
		r.call("VDI.set_name_label", kept, "kept")
		r.call("VDI.set_name_label", gone, "gone")
		newer := r.store.Store
		backup := copyStore(t, newer)
		r.later(kept, gone)
		r.stop(t)
		r.store.Store = backup
		d, err := db.Open(t.Context(), xapi.Datamodel(), backup) // a check of the stores asks it where they are
		if err != nil {
			t.Fatal(err)
		}
		if err := d.Close(); err != nil {
			t.Fatal(err)
		}
		r.start(t)
		r.wantRecovered(kept)
		if n := r.count(recoveredAlert); n != 1 {
			t.Errorf("%d alerts", n)
		}
		r.restart()
		r.wantRecovered(kept)
		if n := r.count(recoveredAlert); n != 1 {
			t.Errorf("%d alerts after another restart", n)
		}
		r.call("SR.scan", string(r.sr))
		r.wantConsistent()
		// Recognised, a store is as before: what a crash leaves is reclaimed.
		orphan := storage.ID("11111111-2222-4333-8444-555555555555")
		repo, err := r.repos.get(r.sr)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := repo.Create(t.Context(), orphanSpec(string(orphan))); err != nil {
			t.Fatal(err)
		}
		r.restart()
		if slices.Contains(r.volumes(r.sr), string(orphan)) {
			t.Error("the rest of a crashed operation is not reclaimed any more")
		}
		r.call("VDI.set_name_label", r.disk(2<<20), "of the backup")
		r.stop(t)
		r.store.Store = newer
		r.start(t)
		if _, v := r.named("of the backup"); v.OtherConfig[recoveredKey] == "" {
			t.Errorf("the newer database has %+v", v)
		}
		if _, v := r.named("later"); v.Missing || v.OtherConfig[recoveredKey] != "" {
			t.Errorf("the newer database has %+v", v)
		}
		r.wantConsistent()
		for _, uuid := range r.disks(r.sr) {
			r.call("VDI.destroy", r.ref(uuid))
		}
	})
}

// A store that cannot be opened when its mark is to be compared, and can a
// moment later, is treated as one of which nothing is known.
func TestOlderDatabaseAndALateStore(t *testing.T) {
	onDrivers(t, func(t *testing.T, r *rig) {
		kept, gone := r.disk(2<<20), r.disk(2<<20)
		r.call("VDI.set_name_label", kept, "kept")
		backup := copyStore(t, r.store.Store)
		r.later(kept, gone)
		r.stop(t)
		r.store.Store = backup
		open, tried := r.driver.Open, false
		r.driver.Open = func(ctx context.Context, config map[string]string, create bool) (storage.Repo, error) {
			if !tried {
				tried = true
				return nil, storage.ErrCorrupt
			}
			return open(ctx, config, create)
		}
		r.start(t)
		ref, v := r.named("later")
		if got := r.contents(ref)[1<<20 : 1<<20+8]; string(got) != "precious" || v.Missing {
			t.Errorf("%q in %+v", got, v)
		}
		pbd := record(r.core, xapi.Ref[xapi.PBD](r.pbd(r.sr)))
		if !tried || !pbd.CurrentlyAttached || pbd.OtherConfig[unavailableKey] != "" {
			t.Errorf("PBD %+v", pbd)
		}
		r.call("SR.scan", string(r.sr)) // what has been destroyed since the backup
		r.wantConsistent()
		for _, uuid := range r.disks(r.sr) {
			r.call("VDI.destroy", r.ref(uuid))
		}
	})
}

// A database of somebody else destroys nothing.
func TestForeignDatabase(t *testing.T) {
	onDrivers(t, func(t *testing.T, r *rig) {
		disk := r.disk(2 << 20)
		r.call("VDI.set_name_label", disk, "ours")
		r.write(disk, []byte("ours"), 0)
		other := newRigOn(t, memAs(r.driver.Type))
		other.call("VDI.set_name_label", other.disk(2<<20), "theirs")
		foreign := copyStore(t, other.store.Store)
		r.stop(t)
		r.store.Store = foreign
		r.start(t)
		ref, v := r.named("ours")
		if v.OtherConfig[recoveredKey] == "" || string(r.contents(ref)[:4]) != "ours" {
			t.Errorf("recovered %+v", v)
		}
		if _, v := r.named("theirs"); !v.Missing {
			t.Error("a disk of the other store is not missing")
		}
		r.call("SR.scan", string(r.sr))
		r.destroy(ref)
	})
}

// memAs is a memory driver that goes by the name of another.
func memAs(typ string) storage.Driver {
	d := mem.Driver()
	d.Type = typ
	return d
}

// A start with an older database may be killed anywhere: the next one recovers
// all the same.
func TestOlderDatabaseKilled(t *testing.T) {
	for _, commits := range []bool{false, true} {
		for _, kind := range []faultKind{failBefore, failAfter, failAlways} {
			t.Run(fmt.Sprintf("commit-%v-%v", commits, kind), func(t *testing.T) {
				for n := 1; ; n++ {
					r := newRig(t)
					kept, gone := r.disk(2<<20), r.disk(2<<20)
					r.call("VDI.set_name_label", kept, "kept")
					r.call("VDI.set_name_label", gone, "gone")
					backup := copyStore(t, r.store.Store)
					r.later(kept, gone)
					r.stop(t)
					r.store.Store = backup
					r.faults.arm(n, kind, commits)
					if err := r.tryStart(t); err == nil {
						r.stop(t)
					}
					fired := r.faults.hasFired()
					r.faults.disarm()
					r.start(t)
					r.wantRecovered(kept)
					if t.Failed() {
						t.Fatalf("at call %d", n)
					}
					if !fired {
						if n == 1 {
							t.Fatal("a start makes no call that could fail")
						}
						return
					}
				}
			})
		}
	}
}

// A mark that cannot be read is no licence to delete.
func TestUnreadableMark(t *testing.T) {
	r := newRig(t)
	repo, err := r.repos.get(r.sr)
	if err != nil {
		t.Fatal(err)
	}
	const orphan = "11111111-2222-4333-8444-555555555555"
	if _, err := repo.Create(t.Context(), orphanSpec(orphan)); err != nil {
		t.Fatal(err)
	}
	r.stop(t)
	raw, err := r.driver.Open(t.Context(), map[string]string{"location": r.dir + "/" + defaultStore}, false)
	if err != nil {
		t.Fatal(err)
	}
	if b, err := raw.(storage.Labeled).RepoAttrs(t.Context()); err != nil || len(b) == 0 {
		t.Fatalf("the store has the mark %q, %v", b, err)
	}
	if err := raw.(storage.Labeled).SetRepoAttrs(t.Context(), []byte("{")); err != nil {
		t.Fatal(err)
	}
	if err := raw.Close(); err != nil {
		t.Fatal(err)
	}
	r.start(t)
	if got := record(r.core, r.ref(orphan)); got.OtherConfig[recoveredKey] == "" {
		t.Errorf("the volume without a record has become %+v", got)
	}
}

// A store that cannot be marked, as a full one, is used all the same.
func TestMarkRefused(t *testing.T) {
	r := newRig(t)
	ref := r.disk(2 << 20)
	uuid := record(r.core, ref).UUID
	r.faults.refuseLabels(true)
	r.restart()
	if got := record(r.core, r.ref(uuid)); got.Missing {
		t.Errorf("the disk is %+v", got)
	}
	if !bytes.Contains(r.records.Bytes(), []byte("does not know how far")) {
		t.Errorf("the log does not speak of it:\n%s", r.records)
	}
	r.faults.refuseLabels(false)
	r.restart()
	r.wantConsistent()
}
