package api

import (
	"bytes"
	"encoding/base64"
	"strings"
	"testing"
	"testing/synctest"

	"coppice/internal/db"
	"coppice/internal/xapi"
)

// wantCBT checks cbt_enabled of disks.
func (w *wire) wantCBT(want bool, refs ...vdiRef) {
	w.t.Helper()
	for _, ref := range refs {
		if got := w.call("VDI.get_cbt_enabled", ref).(bool); got != want {
			w.t.Errorf("cbt_enabled of %s is %v, want %v", ref, got, want)
		}
	}
}

func TestQT_CBT_1(t *testing.T) {
	onWire(t, func(t *testing.T, w *wire) {
		ref := w.disk(4 << 20)
		for range 2 { // idempotent
			w.call("VDI.enable_cbt", ref)
			w.wantCBT(true, ref)
		}
		w.updateCheck(ref)
		w.destroy(ref)
	})
}

func TestQT_CBT_2(t *testing.T) {
	onWire(t, func(t *testing.T, w *wire) {
		ref := w.disk(4 << 20)
		w.call("VDI.enable_cbt", ref)
		snap := w.vdi("VDI.snapshot", ref, map[string]string{})
		w.wantCBT(true, ref, snap)
		w.updateCheck(ref)
		w.updateCheck(snap)
		w.destroy(snap, ref)
	})
}

func TestQT_CBT_3(t *testing.T) {
	onWire(t, func(t *testing.T, w *wire) {
		ref := w.disk(4 << 20)
		w.call("VDI.enable_cbt", ref)
		for range 2 {
			w.call("VDI.disable_cbt", ref)
			w.wantCBT(false, ref)
		}
		snap := w.vdi("VDI.snapshot", ref, map[string]string{})
		w.wantCBT(false, snap)
		w.updateCheck(ref)
		w.destroy(snap, ref)
	})
}

func TestQT_CBT_4(t *testing.T) {
	onWire(t, func(t *testing.T, w *wire) {
		ref := w.disk(4 << 20)
		w.write(ref, bytes.Repeat([]byte("data"), 1<<18), 0)
		w.call("VDI.enable_cbt", ref)
		snap := w.vdi("VDI.snapshot", ref, map[string]string{})
		before := record(w.core, snap)
		for range 2 { // the second time it is done already
			w.call("VDI.data_destroy", snap)
		}
		w.wantCBT(true, snap)
		if got := w.call("VDI.get_type", snap); got != "cbt_metadata" {
			t.Errorf("type %v", got)
		}
		config := w.call("VDI.get_other_config", snap).(map[string]any)
		if got := config["content_id"]; got != "/No content: this is a cbt_metadata VDI/" {
			t.Errorf("content_id %v", got)
		}
		after := record(w.core, snap)
		if after.UUID != before.UUID || after.SnapshotOf != ref || !after.IsASnapshot || after.PhysicalUtilisation != 0 || after.VirtualSize != before.VirtualSize {
			t.Errorf("the record is %+v, was %+v", after, before)
		}
		incompatible := "VDI_INCOMPATIBLE_TYPE|" + string(snap) + "|cbt_metadata"
		w.refuses(incompatible, "VDI.clone", snap, map[string]string{})
		w.refuses(incompatible, "VDI.snapshot", snap, map[string]string{})
		w.refuses(incompatible, "VDI.copy", snap, string(w.sr))
		w.refuses(incompatible, "VDI.revert", snap)
		w.refuses(incompatible, "VDI.checksum", snap)
		w.refuses(incompatible, "VDI.get_nbd_info", snap)
		w.destroy(snap, ref)
	})
}

func TestQT_CBT_5(t *testing.T) {
	onWire(t, func(t *testing.T, w *wire) {
		ref := w.disk(4 << 20)
		w.call("VDI.enable_cbt", ref)
		clone := w.vdi("VDI.clone", ref, map[string]string{})
		w.wantCBT(false, clone)
		w.wantCBT(true, ref)
		w.updateCheck(clone)
		w.destroy(clone, ref)
	})
}

func TestQT_CBT_6(t *testing.T) {
	onWire(t, func(t *testing.T, w *wire) {
		ref := w.disk(4 << 20)
		w.call("VDI.enable_cbt", ref)
		dup := w.vdi("VDI.copy", ref, string(w.sr), xapi.NullRef, xapi.NullRef)
		w.wantCBT(false, dup)
		w.wantCBT(true, ref)
		w.updateCheck(dup)
		w.destroy(dup, ref)
	})
}

func TestQT_CBT_7(t *testing.T) {
	onWire(t, func(t *testing.T, w *wire) {
		ref := w.disk(4 << 20)
		w.call("VDI.enable_cbt", ref)
		dup := w.vdi("VDI.copy", ref, string(w.sr), xapi.NullRef, xapi.NullRef)
		into := w.disk(4 << 20)
		if got := w.vdi("VDI.copy", ref, xapi.NullRef, dup, into); got != into {
			t.Errorf("copied into %s, want %s", got, into)
		}
		w.wantCBT(false, into)
		fresh := w.disk(4 << 20)
		for _, v := range []vdiRef{ref, dup, into, fresh} {
			w.updateCheck(v)
		}
		w.destroy(fresh, into, dup, ref)
	})
}

// changed asks for a list of changed blocks and returns its bitmap.
func (w *wire) changed(from, to vdiRef) []byte {
	w.t.Helper()
	b, err := base64.StdEncoding.DecodeString(w.call("VDI.list_changed_blocks", from, to).(string))
	if err != nil {
		w.t.Fatal(err)
	}
	return b
}

// bitmapOf is the bitmap of n blocks in which those in set are changed.
func bitmapOf(n int, set ...int) []byte {
	b := make([]byte, (n+7)/8)
	for _, i := range set {
		b[i/8] |= 1 << (7 - i%8)
	}
	return b
}

const block = 64 << 10

func TestListChangedBlocks(t *testing.T) {
	onWire(t, func(t *testing.T, w *wire) {
		ref := w.disk(6 << 20) // 96 blocks
		w.write(ref, bytes.Repeat([]byte("old"), 1<<20), 0)
		w.call("VDI.enable_cbt", ref)
		snap := func() vdiRef { return w.vdi("VDI.snapshot", ref, map[string]string{}) }
		want := func(from, to vdiRef, set ...int) {
			t.Helper()
			if got := w.changed(from, to); !bytes.Equal(got, bitmapOf(96, set...)) {
				t.Errorf("got %x, want %x", got, bitmapOf(96, set...))
			}
		}
		first := snap()
		want(first, ref)
		w.write(ref, []byte("new"), 7*block-1) // two blocks
		w.write(ref, []byte("new"), 95*block+5)
		second := snap()
		v := w.volume(ref)
		if err := v.Zero(t.Context(), 8*block, 2*block); err != nil {
			t.Fatal(err)
		}
		if err := v.Close(); err != nil {
			t.Fatal(err)
		}
		third := snap()
		want(first, second, 6, 7, 95)
		want(second, third, 8, 9)
		want(first, third, 6, 7, 8, 9, 95)
		want(first, ref, 6, 7, 8, 9, 95)
		w.call("VDI.data_destroy", first)
		w.call("VDI.data_destroy", second)
		want(first, third, 6, 7, 8, 9, 95)
		want(second, ref, 8, 9)
		w.restart()
		ids := map[vdiRef]bool{}
		w.view(func(tx *db.Tx) {
			for r := range db.All[xapi.VDI](tx) {
				ids[r] = true
			}
		})
		if !ids[first] || !ids[second] {
			t.Fatal("a disk without data has vanished over a restart")
		}
		want(first, ref, 6, 7, 8, 9, 95)
		w.call("VDI.resize", ref, 8<<20)
		w.write(ref, []byte("grown"), 7<<20)
		if got := w.changed(third, ref); !bytes.Equal(got, bitmapOf(128, 112)) {
			t.Errorf("grown: %x", got)
		}
		w.call("VDI.destroy", second)
		want(first, third, 6, 7, 8, 9, 95)
		w.destroy(first, third, ref)
	})
}

// The refusals, and the extension that takes back some of them.
func TestListChangedBlocksRefused(t *testing.T) {
	onWire(t, func(t *testing.T, w *wire) {
		const refused = "SR_BACKEND_FAILURE_460|"
		ref, other := w.disk(2<<20), w.disk(2<<20)
		before := w.vdi("VDI.snapshot", ref, map[string]string{})
		w.write(ref, []byte("x"), 3*block)
		w.call("VDI.enable_cbt", ref)
		w.call("VDI.enable_cbt", other)
		first := w.vdi("VDI.snapshot", ref, map[string]string{})
		w.write(ref, []byte("y"), 4*block)
		second := w.vdi("VDI.snapshot", ref, map[string]string{})

		w.refuses(refused, "VDI.list_changed_blocks", first, first)
		w.refuses(refused, "VDI.list_changed_blocks", before, ref)   // not enabled
		w.refuses(refused, "VDI.list_changed_blocks", first, other)  // unrelated
		w.refuses(refused, "VDI.list_changed_blocks", second, first) // the wrong way round
		w.refuses(refused, "VDI.list_changed_blocks", ref, first)
		w.refuses("HANDLE_INVALID|VDI|OpaqueRef:gone", "VDI.list_changed_blocks", "OpaqueRef:gone", ref)
		w.refuses("HANDLE_INVALID|VDI|OpaqueRef:gone", "VDI.list_changed_blocks", first, "OpaqueRef:gone")

		w.call("pool.add_to_other_config", w.pool, "coppice:changed-blocks", "any")
		for _, c := range []struct {
			from, to vdiRef
			set      []int
		}{
			{before, ref, []int{3, 4}},
			{second, first, []int{4}},
			{other, second, []int{3, 4}},
			{ref, other, []int{3, 4}},
		} {
			if got := w.changed(c.from, c.to); !bytes.Equal(got, bitmapOf(32, c.set...)) {
				t.Errorf("got %x, want %v", got, c.set)
			}
		}
		w.call("VDI.data_destroy", first)
		w.refuses(refused, "VDI.list_changed_blocks", first, other) // nothing to compare with
		w.refuses(refused, "VDI.list_changed_blocks", first, before)
		w.refuses("SR_BACKEND_FAILURE_460||Failed to calculate changed blocks for given VDIs. [opterr=The data of the target VDI has been destroyed]", "VDI.list_changed_blocks", before, first)
		w.destroy(before, first, second, ref, other)
	})
}

func TestCBTRules(t *testing.T) {
	onWire(t, func(t *testing.T, w *wire) {
		ref := w.disk(2 << 20)
		snap := w.vdi("VDI.snapshot", ref, map[string]string{})
		w.refuses("OPERATION_NOT_ALLOWED|VDI is a snapshot: "+string(snap), "VDI.enable_cbt", snap)
		w.refuses("OPERATION_NOT_ALLOWED|VDI is a snapshot: "+string(snap), "VDI.disable_cbt", snap)
		w.refuses("OPERATION_NOT_ALLOWED|VDI is not a snapshot: "+string(ref), "VDI.data_destroy", ref)
		w.refuses("VDI_NO_CBT_METADATA|"+string(snap), "VDI.data_destroy", snap)
		w.refuses("PERMISSION_DENIED|", "VDI.set_cbt_enabled", ref, true)
		args := diskArgs(w.sr, 2<<20)
		args["type"] = "cbt_metadata"
		w.refuses("VDI_INCOMPATIBLE_TYPE||cbt_metadata", "VDI.create", args)
		args["type"] = "suspend"
		suspend := w.vdi("VDI.create", args)
		w.refuses("VDI_INCOMPATIBLE_TYPE|"+string(suspend)+"|suspend", "VDI.enable_cbt", suspend)

		w.call("VDI.enable_cbt", ref)
		tracked := w.vdi("VDI.snapshot", ref, map[string]string{})
		w.call("VDI.add_to_other_config", tracked, "coppice:hold", "evidence")
		w.refuses("OPERATION_BLOCKED|"+string(tracked), "VDI.data_destroy", tracked)
		w.refuses("OPERATION_BLOCKED|"+string(tracked), "VDI.destroy", tracked)
		w.call("VDI.remove_from_other_config", tracked, "coppice:hold")
		w.destroy(tracked, snap, suspend, ref)
	})
}

// VDI.data_destroy waits for a disk that is being detached, 4 s, and takes the
// VBDs away.
func TestDataDestroyAttached(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t)
		disk := r.disk(2 << 20)
		r.call("VDI.enable_cbt", disk)
		snap := r.call("VDI.snapshot", disk).(vdiRef)
		vbd := r.vbd(r.vm("holder"), snap, "0", "RO")
		attach := func(on bool) {
			r.update(func(tx *db.Tx) error {
				return db.Modify(tx, vbd, func(b *xapi.VBD) { b.CurrentlyAttached = on })
			})
		}
		attach(true)
		begun := r.now()
		r.fails("VDI_IN_USE|"+string(snap)+"|data_destroy", "VDI.data_destroy", snap)
		if waited := r.now().Sub(begun); waited != detachPatience {
			t.Errorf("waited %v, want %v", waited, detachPatience)
		}
		if got := record(r.core, snap); got.Type != xapi.VDITypeUser || len(got.VBDs) != 1 {
			t.Errorf("a refused VDI.data_destroy leaves %+v", got)
		}
		done := make(chan error, 1)
		go func() {
			_, err := r.try(r.root, "VDI.data_destroy", snap)
			done <- err
		}()
		synctest.Wait()
		attach(false)
		if err := <-done; err != nil {
			t.Fatal(err)
		}
		if got := record(r.core, snap); got.Type != xapi.VDITypeCBTMetadata || len(got.VBDs) != 0 {
			t.Errorf("VDI.data_destroy leaves %+v", got)
		}
		r.fails("HANDLE_INVALID|VBD|"+string(vbd), "VBD.get_record", string(vbd))
	})
}

// What a snapshot without data is can be told from the storage alone.
func TestCBTMetadataFromStorage(t *testing.T) {
	onDrivers(t, func(t *testing.T, r *rig) {
		disk := r.disk(2 << 20)
		r.call("VDI.enable_cbt", disk)
		snap := r.call("VDI.snapshot", disk).(vdiRef)
		r.call("VDI.data_destroy", snap)
		uuid := record(r.core, snap).UUID
		r.call("VDI.forget", snap)
		r.call("SR.scan", string(r.sr))
		snap = r.ref(uuid)
		got := record(r.core, snap)
		if got.Type != xapi.VDITypeCBTMetadata || !got.CBTEnabled || got.SnapshotOf != disk || !strings.HasPrefix(got.OtherConfig["content_id"], "/No content") {
			t.Errorf("the scan found %+v", got)
		}
		if !record(r.core, disk).CBTEnabled {
			t.Error("cbt_enabled of the disk is lost")
		}
		if v := r.call("VDI.list_changed_blocks", snap, disk); v != "AAAAAA==" {
			t.Errorf("changed blocks %v", v)
		}
		r.destroy(snap, disk)
	})
}
