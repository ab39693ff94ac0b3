package api

import (
	"bytes"
	"errors"
	"io"
	"math"
	"strings"
	"testing"

	"coppice/internal/storage"
	"coppice/internal/xapi"
)

// What goes to a shadow shows at the end, at once, or never.
func TestImportShadow(t *testing.T) {
	r := newRig(t)
	disk := filledDisk(r)
	before := r.contents(disk)
	for _, fault := range []error{io.ErrUnexpectedEOF, nil} {
		q, task := r.importRequest(string(disk))
		x, err := r.Import(t.Context(), trusted, q)
		if err != nil {
			t.Fatal(err)
		}
		if err := errors.Join(x.Shadow(), x.Shadow()); err != nil {
			t.Fatal(err)
		}
		if _, err := x.Volume.WriteAt([]byte("atomic"), 4096); err != nil {
			t.Fatal(err)
		}
		scratch, _, err := x.Scratch(3<<20 + 1)
		if err != nil {
			t.Fatal(err)
		}
		if scratch.Size() < 3<<20+1 {
			t.Errorf("scratch volume of %d bytes", scratch.Size())
		}
		for size, want := range map[int64]int64{0: storage.Unit, math.MaxInt64: storage.MaxSize} {
			if v, _, err := x.Scratch(size); err != nil || v.Size() != want {
				t.Errorf("scratch volume for %d bytes: %v, want %d", size, err, want)
			}
		}
		x.Describe("coppice:test", "seen")
		r.call("SR.scan", string(r.sr)) // takes neither for a stray
		if !bytes.Equal(r.contents(disk), before) {
			t.Error("the shadow shows before the end")
		}
		if err := x.Finish(fault); (err == nil) != (fault == nil) {
			t.Errorf("Finish(%v): %v", fault, err)
		}
		want := bytes.Clone(before)
		if fault == nil {
			copy(want[4096:], "atomic")
		}
		if !bytes.Equal(r.contents(disk), want) {
			t.Errorf("after Finish(%v) the disk is something else", fault)
		}
		if got := record(r.core, task).OtherConfig["coppice:test"]; got != "seen" {
			t.Errorf("other_config of the task says %q", got)
		}
		r.wantConsistent()
	}
}

// A crash in the middle leaves the disk as it was and nothing else.
func TestImportShadowCrash(t *testing.T) {
	r := newRig(t)
	disk := filledDisk(r)
	before := r.contents(disk)
	q, _ := r.importRequest(string(disk))
	x, err := r.Import(t.Context(), trusted, q)
	if err != nil {
		t.Fatal(err)
	}
	if err := x.Shadow(); err != nil {
		t.Fatal(err)
	}
	if _, err := x.Volume.WriteAt([]byte("lost"), 0); err != nil {
		t.Fatal(err)
	}
	scratch, _, err := x.Scratch(1 << 20)
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(x.Volume.Flush(t.Context()), scratch.Flush(t.Context())); err != nil {
		t.Fatal(err)
	}
	// What was made by then is what a crash leaves, whenever the rest of the
	// import comes to an end.
	x.shadow.done()
	for _, h := range x.scratch {
		h.done()
	}
	x.shadow, x.scratch = nil, nil
	if err := x.Finish(io.ErrUnexpectedEOF); err == nil {
		t.Error("a failed import succeeded")
	}
	r.restart()
	if !bytes.Equal(r.contents(disk), before) {
		t.Error("the disk has changed")
	}
	r.wantConsistent()
}

func TestImportHolds(t *testing.T) {
	r := newRig(t)
	disk := filledDisk(r)
	snap := r.call("VDI.snapshot", disk).(vdiRef)
	other := filledDisk(r)
	small := r.disk(1 << 20)
	elsewhere := r.call("VDI.copy", disk, r.secondSR()).(vdiRef)
	q, _ := r.importRequest(string(disk))
	x, err := r.Import(t.Context(), trusted, q)
	if err != nil {
		t.Fatal(err)
	}
	if rec, err := x.Holds("base", string(snap)); err != nil || rec.UUID != record(r.core, snap).UUID {
		t.Errorf("its snapshot: %v, %v", rec, err)
	}
	if _, err := x.Holds("base", record(r.core, other).UUID); err != nil {
		t.Errorf("a disk with equal contents: %v", err)
	}
	for vdi, want := range map[string]string{
		string(small):     "INVALID_VALUE|base|" + string(small),
		"none":            "UUID_INVALID|VDI|none",
		"":                "VDI_MISSING",
		string(elsewhere): "SR_OPERATION_NOT_SUPPORTED|" + string(record(r.core, elsewhere).SR),
	} {
		if _, err := x.Holds("base", vdi); description(r.apiError(err)) != want {
			t.Errorf("%s: %v, want %s", vdi, err, want)
		}
	}
	if _, err := x.Volume.WriteAt([]byte("different"), 1<<20); err != nil {
		t.Fatal(err)
	}
	if _, err := x.Holds("base", string(snap)); description(err) != "INVALID_VALUE|base|"+string(snap) {
		t.Errorf("after a write: %v", err)
	}
	if err := x.Finish(nil); err != nil {
		t.Fatal(err)
	}
	r.wantConsistent()
}

// How far an upload came is in the record of the disk, across a restart.
func TestImportKeep(t *testing.T) {
	r := newRig(t)
	disk := r.disk(4 << 20)
	q, _ := r.importRequest(string(disk))
	x, err := r.Import(t.Context(), trusted, q)
	if err != nil {
		t.Fatal(err)
	}
	if x.Received() != 0 {
		t.Errorf("a fresh disk has %d bytes", x.Received())
	}
	if err := x.Keep(4096); err != nil {
		t.Fatal(err)
	}
	if err := x.Finish(storage.ErrClosed); err == nil {
		t.Error("a failed import succeeded")
	}
	r.restart()
	q, _ = r.importRequest(string(disk))
	if n, err := r.Received(t.Context(), trusted, q); err != nil || n != 4096 {
		t.Errorf("Received: %d, %v", n, err)
	}
	if x, err = r.Import(t.Context(), trusted, q); err != nil {
		t.Fatal(err)
	}
	if x.Received() != 4096 {
		t.Errorf("the import says %d bytes", x.Received())
	}
	if err := errors.Join(x.Keep(0), x.Finish(nil)); err != nil {
		t.Error(err)
	}
	if n, err := r.Received(t.Context(), trusted, q); err != nil || n != 0 {
		t.Errorf("Received after the end: %d, %v", n, err)
	}
	snap := r.call("VDI.snapshot", disk).(vdiRef)
	for what, change := range map[string]func(){
		"a revert": func() { r.call("VDI.revert", snap) },
		"a copy":   func() { r.call("VDI.copy", r.disk(4<<20), xapi.NullRef, xapi.NullRef, disk) },
	} {
		q, _ := r.importRequest(string(disk))
		x, err := r.Import(t.Context(), trusted, q)
		if err != nil {
			t.Fatal(err)
		}
		if err := errors.Join(x.Keep(8192), x.Finish(storage.ErrClosed)); !errors.Is(err, storage.ErrClosed) {
			t.Fatal(err)
		}
		change()
		if got := record(r.core, disk).OtherConfig[receivedKey]; got != "" {
			t.Errorf("after %s the disk has %s bytes of the upload", what, got)
		}
	}
	q.VDI = "none"
	if _, err := r.Received(t.Context(), trusted, q); err == nil || !strings.Contains(err.Error(), xapi.ErrUUIDInvalid) {
		t.Errorf("of no disk: %v", err)
	}
	r.wantConsistent()
}
