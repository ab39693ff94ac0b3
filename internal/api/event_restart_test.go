package api

import (
	"context"
	"maps"
	"slices"
	"strconv"
	"testing"

	"coppice/internal/claim"
	"coppice/internal/db"
	"coppice/internal/storage"
	"coppice/internal/xapi"
)

// told lists what a batch tells, as "class operation" by reference.
func told(batch *xapi.EventBatch) map[string]string {
	m := map[string]string{}
	for _, ev := range batch.Events {
		m[ev.Ref] = ev.Class + " " + string(ev.Operation)
	}
	return m
}

// A token of before a restart selects after it what has happened since, and
// of what a start does itself only what it changes.
func TestEventTokensSurviveARestart(t *testing.T) {
	r := newRig(t)
	gone, stays := r.vm("gone"), r.vm("stays")
	disk := r.disk(8 << 20)
	r.call("VDI.snapshot", disk, map[string]any{})
	r.call("message.create", "kept", 1, "VM", record(r.core, stays).UUID, "")
	token := r.from("", 0, "*").Token
	for i := range 3 {
		r.restart()
		got := told(r.from(token, 0, "*"))
		maps.DeleteFunc(got, func(_, what string) bool {
			return what == "host mod" || what == "host_metrics mod" ||
				what == "vm_metrics mod" && i == 0 // whose last_updated does not survive
		})
		if len(got) > 0 {
			t.Errorf("told after a restart: %v", got)
		}
		token = r.from("", 0, "*").Token
	}

	r.call("VM.destroy", gone)
	r.call("VDI.set_name_label", disk, "renamed")
	passing := r.vm("passing")
	r.call("VM.destroy", passing)
	born := r.vm("born")
	message := r.call("message.create", "new", 1, "VM", record(r.core, stays).UUID, "").(xapi.Ref[xapi.Message])
	r.restart()
	batch := r.from(token, 0, "vm", "vdi", "message")
	want := map[string]string{
		string(gone): "vm del", string(disk): "vdi mod", string(born): "vm add", string(message): "message add",
	}
	if got := told(batch); !maps.Equal(got, want) {
		t.Errorf("told: %v, want %v", got, want)
	}
	if n := int64(len(r.call("VM.get_all").([]string))); batch.ValidRefCounts["vm"] != n || batch.ValidRefCounts["message"] != 2 {
		t.Errorf("counts %d and %d, want %d and 2", batch.ValidRefCounts["vm"], batch.ValidRefCounts["message"], n)
	}
	if again := r.from(batch.Token, 0, "vm", "vdi", "message"); len(again.Events) != 0 {
		t.Errorf("told again: %s", summary(again))
	}
	// A token that this server has not given out yet is one of another server.
	if far := r.from("01152921504606846976,01152921504606846976", 0, "vm"); slices.ContainsFunc(far.Events, func(ev *xapi.Event) bool {
		return ev.Operation != xapi.EventOperationAdd
	}) || len(far.Events) == 0 {
		t.Errorf("told to a token from the future: %s", summary(far))
	}
}

// A reverted VM that had been destroyed has the reference that it had before.
// Whoever has seen either of them is told when it is gone in the end.
func TestEventsOfAReferenceThatIsUsedAgain(t *testing.T) {
	r := newRig(t)
	vm := r.vm("first")
	rec := record(r.core, vm)
	again := func() {
		r.call("VM.destroy", vm)
		r.update(func(tx *db.Tx) error {
			second := xapi.New[xapi.VM]()
			second.UUID, second.NameLabel, second.PowerState = rec.UUID, "second", xapi.VMPowerStateHalted
			return db.InsertAs(tx, vm, second)
		})
	}
	gone := map[string]string{string(vm): "vm del"}
	first := r.from("", 0, "vm").Token
	again()
	second := r.from(first, 0, "vm")
	if got, want := told(second), map[string]string{string(vm): "vm add"}; !maps.Equal(got, want) {
		t.Errorf("told of the second: %v, want %v", got, want)
	}
	again()
	r.restart()
	third := r.from("", 0, "vm").Token
	again()
	r.call("VM.destroy", vm)
	for range 2 {
		for _, token := range []string{first, second.Token, third} {
			if got := told(r.from(token, 0, "vm")); !maps.Equal(got, gone) {
				t.Errorf("told after %s: %v, want %v", token, got, gone)
			}
		}
		if batch := r.from(r.from("", 0, "vm").Token, 0, "vm"); len(batch.Events) != 0 {
			t.Errorf("told to who knows: %s", summary(batch))
		}
		r.restart()
	}
}

// crash starts the API on what a crash in the middle of a call would leave now
// of the database.
func (r *rig) crash(c *Call) {
	r.t.Helper()
	t, left := r.t, copyStore(r.t, r.store)
	c.end(Result{}, nil)
	r.stop(t)
	r.store = &faultStore{Store: left, faults: r.faults}
	r.start(t)
}

// What was being done when the server was killed is not being done any more,
// which whoever saw it is told, and nobody else.
func TestEventTokensSurviveACrash(t *testing.T) {
	r := newRig(t)
	busy, idle := r.disk(8<<20), r.disk(8<<20)
	c := r.begun()
	before := r.from("", 0, "vdi").Token
	if _, err := c.Claim(t.Context(), nil, claim.On(busy, xapi.VDIOperationsDestroy)); err != nil {
		t.Fatal(err)
	}
	r.call("VDI.set_name_label", idle, "renamed") // makes durable what has been told
	during := r.from(before, 0, "vdi").Token
	r.crash(c)
	if got, want := told(r.from(during, 0, "vdi")), map[string]string{string(busy): "vdi mod"}; !maps.Equal(got, want) {
		t.Errorf("told to who saw the operation: %v, want %v", got, want)
	}
	want := map[string]string{string(busy): "vdi mod", string(idle): "vdi mod"}
	if got := told(r.from(before, 0, "vdi")); !maps.Equal(got, want) {
		t.Errorf("told to who did not: %v, want %v", got, want)
	}
	if ops := record(r.core, busy).AllowedOperations; !slices.Contains(ops, xapi.VDIOperationsSnapshot) {
		t.Errorf("allowed: %v", ops)
	}
}

// forget makes so many commits that the history of the database goes back no
// further than to here.
func (r *rig) forget() {
	r.t.Helper()
	for i := range 4200 {
		r.update(func(tx *db.Tx) error {
			return db.Modify(tx, r.pool, func(p *xapi.Pool) { p.NameDescription = strconv.Itoa(i) })
		})
	}
}

// The disks of an SR that cannot be opened, and of one that can be again, allow
// something else than before, which clients are told however old the disks are.
func TestEventTokensAndAnUnavailableSR(t *testing.T) {
	r := newRig(t)
	disk := r.disk(8 << 20)
	good := r.driver.Open
	for _, open := range []func(context.Context, map[string]string, bool) (storage.Repo, error){
		func(context.Context, map[string]string, bool) (storage.Repo, error) { return nil, storage.ErrCorrupt },
		good,
	} {
		r.forget()
		before := record(r.core, disk).AllowedOperations
		token := r.from("", 0, "*").Token
		r.stop(t)
		r.driver.Open = open
		r.start(t)
		if now := record(r.core, disk).AllowedOperations; slices.Equal(now, before) {
			t.Errorf("allowed as before: %v", now)
		}
		got := told(r.from(token, 0, "vdi", "sr"))
		if want := map[string]string{string(disk): "vdi mod", string(r.sr): "sr mod"}; !maps.Equal(got, want) {
			t.Errorf("told: %v, want %v", got, want)
		}
	}
}

// A program that may make something else of the same records tells everything.
func TestEventTokensOfAnotherVersion(t *testing.T) {
	r := newRig(t)
	vm := r.vm("vm")
	token := r.from("", 0, "vm").Token
	r.adjust = func(cfg *Config) { cfg.Version = "1.2.4" }
	r.restart()
	if got := told(r.from(token, 0, "vm")); got[string(vm)] != "vm add" {
		t.Errorf("told by another version: %v", got)
	}
	token = r.from("", 0, "sr").Token
	r.adjust = func(cfg *Config) { cfg.Version, cfg.RevertByClone = "1.2.4", true }
	r.restart()
	if got := told(r.from(token, 0, "sr")); got[string(r.sr)] != "sr add" {
		t.Errorf("told by one that reverts otherwise: %v", got)
	}
}

// The same, as clients of both syntaxes see it, on storage of both types.
func TestEventTokensOnTheWire(t *testing.T) {
	onWire(t, func(t *testing.T, w *wire) {
		disk := w.call("VDI.create", diskArgs(w.sr, 8<<20)).(string)
		snapshot := w.call("VDI.snapshot", disk, map[string]any{}).(string)
		w.call("VDI.snapshot", disk, map[string]any{})
		token := w.call("event.from", []string{"vdi"}, "", 0.0).(map[string]any)["token"]
		w.call("VDI.destroy", snapshot)
		born := w.call("VDI.clone", disk, map[string]any{}).(string)
		w.restart()
		batch := w.call("event.from", []string{"vdi"}, token, 0.0).(map[string]any)
		got := map[string]string{}
		for _, ev := range batch["events"].([]any) {
			ev := ev.(map[string]any)
			got[ev["ref"].(string)] = ev["operation"].(string)
		}
		want := map[string]string{snapshot: "del", disk: "mod", born: "add"}
		if !maps.Equal(got, want) {
			t.Errorf("told after a restart: %v, want %v", got, want)
		}
		for _, ref := range w.call("VDI.get_all").([]any) {
			w.call("VDI.destroy", ref)
		}
	})
}
