package api

import (
	"bytes"
	"context"
	"errors"
	"io"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"coppice/internal/storage"
	"coppice/internal/xapi"
)

type taskRef = xapi.Ref[xapi.Task]

// exportRequest is a request to export vdi with a task of the client.
func (r *rig) exportRequest(vdi string) (TransferRequest, taskRef) {
	r.t.Helper()
	task := r.call("task.create", "label", "").(taskRef)
	return TransferRequest{Session: string(r.root), Task: string(task), Action: "get_export_raw_vdi", VDI: vdi, Length: -1}, task
}

func (r *rig) importRequest(vdi string) (TransferRequest, taskRef) {
	r.t.Helper()
	q, task := r.exportRequest(vdi)
	q.Action = "put_import_raw_vdi"
	return q, task
}

// wantTask checks how a task ended.
func (r *rig) wantTask(task taskRef, status xapi.TaskStatusType, result string, info ...string) {
	r.t.Helper()
	got := record(r.core, task)
	if got.Status != status || got.Result != result || !slices.Equal(got.ErrorInfo, info) || got.Progress != 1 {
		r.t.Errorf("task: %s, result %q, error_info %q, progress %v; want %s, %q, %q",
			got.Status, got.Result, got.ErrorInfo, got.Progress, status, result, info)
	}
}

// An export serves one instant, whatever happens to the disk meanwhile, and
// hinders nothing.
func TestExport(t *testing.T) {
	r := newRig(t)
	disk := filledDisk(r)
	want := r.contents(disk)
	q, task := r.exportRequest(record(r.core, disk).UUID)
	x, err := r.Export(t.Context(), trusted, q)
	if err != nil {
		t.Fatal(err)
	}
	if x.Task != task || x.Ref != disk || x.VDI.UUID != q.VDI || x.Base != nil || x.Volume.Size() != 4<<20 {
		t.Errorf("export %+v", x)
	}
	r.fails("VDI_IN_USE|"+string(disk)+"|unplug", "PBD.unplug", r.pbd(r.sr))
	r.write(disk, []byte("changed meanwhile"), 0)
	r.call("VDI.snapshot", disk)
	r.call("VDI.destroy", disk)
	got := make([]byte, 4<<20)
	if n, err := x.Volume.ReadAt(got, 0); n != len(got) || err != nil && !errors.Is(err, io.EOF) {
		t.Fatal(n, err)
	}
	if !bytes.Equal(got, want) {
		t.Error("the export is not the disk as it was")
	}
	if err := x.Finish(nil); err != nil {
		t.Error(err)
	}
	r.wantTask(task, xapi.TaskStatusTypeSuccess, "")
	r.wantConsistent()
}

func TestExportWithBase(t *testing.T) {
	r := newRig(t)
	disk := filledDisk(r)
	base := r.call("VDI.snapshot", disk).(vdiRef)
	r.write(disk, []byte("more"), 3<<20)
	q, _ := r.exportRequest(string(disk))
	q.Base = string(base)
	x, err := r.Export(t.Context(), trusted, q)
	if err != nil {
		t.Fatal(err)
	}
	if x.BaseRef != base || x.BaseVDI.UUID != record(r.core, base).UUID {
		t.Errorf("base %s, want %s", x.BaseRef, base)
	}
	var changed []storage.Extent
	for e, err := range x.Repo.(storage.Differ).Diff(t.Context(), x.Base, x.Volume, 0) {
		if err != nil {
			t.Fatal(err)
		}
		changed = append(changed, e)
	}
	if want := []storage.Extent{{Off: 3 << 20, Len: storage.Unit}}; !slices.Equal(changed, want) {
		t.Errorf("changed %v, want %v", changed, want)
	}
	if err := x.Finish(nil); err != nil {
		t.Error(err)
	}

	elsewhere := r.call("VDI.copy", disk, r.secondSR()).(vdiRef)
	q, task := r.exportRequest(string(disk))
	q.Base = string(elsewhere)
	foreign := string(record(r.core, elsewhere).SR)
	if _, err := r.Export(t.Context(), trusted, q); description(err) != "SR_OPERATION_NOT_SUPPORTED|"+foreign {
		t.Errorf("base in another SR: %v", err)
	}
	r.wantTask(task, xapi.TaskStatusTypeFailure, "", "SR_OPERATION_NOT_SUPPORTED", foreign)
	r.wantConsistent()
}

func TestExportErrors(t *testing.T) {
	r := newRig(t)
	disk := r.disk(1 << 20)
	r.call("VDI.enable_cbt", disk)
	metadata := r.call("VDI.snapshot", disk).(vdiRef)
	r.call("VDI.data_destroy", metadata)
	for _, c := range []struct{ vdi, base, want string }{
		{"", "", "VDI_MISSING"},
		{"OpaqueRef:no", "", "HANDLE_INVALID|VDI|OpaqueRef:no"},
		{"no-uuid", "", "UUID_INVALID|VDI|no-uuid"},
		{string(disk), "no-uuid", "UUID_INVALID|VDI|no-uuid"},
		{string(metadata), "", "VDI_INCOMPATIBLE_TYPE|" + string(metadata) + "|cbt_metadata"},
		{string(disk), string(metadata), "VDI_INCOMPATIBLE_TYPE|" + string(metadata) + "|cbt_metadata"},
	} {
		q, task := r.exportRequest(c.vdi)
		q.Base = c.base
		_, err := r.Export(t.Context(), trusted, q)
		if description(err) != c.want {
			t.Errorf("vdi=%q base=%q: %v, want %s", c.vdi, c.base, err, c.want)
		}
		if e, ok := errors.AsType[*xapi.Error](err); ok {
			r.wantTask(task, xapi.TaskStatusTypeFailure, "", e.Description()...)
		}
	}
	q, task := r.exportRequest(string(disk))
	q.Session = "OpaqueRef:no"
	if _, err := r.Export(t.Context(), trusted, q); description(err) != "SESSION_INVALID|OpaqueRef:no" {
		t.Errorf("session: %v", err)
	}
	if got := record(r.core, task); got.Status != xapi.TaskStatusTypePending {
		t.Errorf("a stranger ended the task: %s", got.Status)
	}
	r.wantConsistent()
}

func TestExportFailureAndCancel(t *testing.T) {
	r := newRig(t)
	disk := r.disk(1 << 20)
	q, task := r.exportRequest(string(disk))
	x, err := r.Export(t.Context(), trusted, q)
	if err != nil {
		t.Fatal(err)
	}
	if err := x.Finish(&storage.CorruptError{Volume: "v"}); description(err) != "VDI_IO_ERROR|Device I/O errors at byte 0 of VDI v" {
		t.Errorf("Finish: %v", err)
	}
	r.wantTask(task, xapi.TaskStatusTypeFailure, "", "VDI_IO_ERROR", "Device I/O errors at byte 0 of VDI v")

	q, task = r.exportRequest(string(disk))
	if x, err = r.Export(t.Context(), trusted, q); err != nil {
		t.Fatal(err)
	}
	r.call("task.cancel", task)
	<-x.Context().Done()
	if err := x.Finish(context.Cause(x.Context())); code(err) != "TASK_CANCELLED" {
		t.Errorf("Finish: %v", err)
	}
	r.wantTask(task, xapi.TaskStatusTypeCancelled, "", "TASK_CANCELLED", string(task))
	r.wantConsistent()
}

func TestImport(t *testing.T) {
	synctest.Test(t, testImport) // what is refused waits before
}

func testImport(t *testing.T) {
	r := newRig(t)
	disk := r.disk(2 << 20)
	q, task := r.importRequest(string(disk))
	x, err := r.Import(t.Context(), trusted, q)
	if err != nil {
		t.Fatal(err)
	}
	if x.Task != task || x.Ref != disk {
		t.Errorf("import %+v", x)
	}
	// While it runs, the disk is like attached read-write.
	for op, want := range map[string]string{
		"VDI.destroy": "destroy", "VDI.checksum": "", "VDI.snapshot": "", "VDI.clone": "", "VDI.update": "update",
	} {
		if want == "" {
			r.call(op, disk)
		} else {
			r.fails("VDI_IN_USE|"+string(disk)+"|"+want, op, disk)
		}
	}
	r.fails("VDI_IN_USE|"+string(disk)+"|resize", "VDI.resize", disk, 4<<20)
	if slices.Contains(record(r.core, disk).AllowedOperations, xapi.VDIOperationsDestroy) {
		t.Error("destroy is advertised during an import")
	}
	second, secondTask := r.importRequest(string(disk))
	if _, err := r.Import(t.Context(), trusted, second); description(err) != "VDI_IN_USE|"+string(disk)+"|import" {
		t.Errorf("a second import: %v", err)
	}
	r.wantTask(secondTask, xapi.TaskStatusTypeFailure, "", "VDI_IN_USE", string(disk), "import")

	if _, err := x.Volume.WriteAt(bytes.Repeat([]byte{7}, 1<<20), 0); err != nil {
		t.Fatal(err)
	}
	if err := x.Finish(nil); err != nil {
		t.Fatal(err)
	}
	r.wantTask(task, xapi.TaskStatusTypeSuccess, "<value>"+string(disk)+"</value>")
	if got := record(r.core, disk); got.PhysicalUtilisation != 1<<20 || !slices.Contains(got.AllowedOperations, xapi.VDIOperationsDestroy) {
		t.Errorf("disk %+v", got)
	}
	r.wantConsistent()
}

// Whoever has interrupted an import may use the disk at once: what the server
// still has to do about the first one is waited for.
func TestImportAgain(t *testing.T) {
	for name, again := range map[string]func(r *rig, disk vdiRef) error{
		"import": func(r *rig, disk vdiRef) error {
			q, _ := r.importRequest(string(disk))
			x, err := r.Import(r.t.Context(), trusted, q)
			if err == nil {
				err = x.Finish(nil)
			}
			return err
		},
		"destroy": func(r *rig, disk vdiRef) error {
			_, err := r.try(r.root, "VDI.destroy", disk)
			return err
		},
		"resize": func(r *rig, disk vdiRef) error {
			_, err := r.try(r.root, "VDI.resize", disk, "8388608")
			return err
		},
		"copy": func(r *rig, disk vdiRef) error {
			_, err := r.try(r.root, "VDI.copy", r.disk(2<<20), "", "", disk)
			return err
		},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				r := newRig(t)
				disk := r.disk(2 << 20)
				q, _ := r.importRequest(string(disk))
				x, err := r.Import(t.Context(), trusted, q)
				if err != nil {
					t.Fatal(err)
				}
				done := make(chan error, 1)
				go func() { done <- again(r, disk) }()
				time.Sleep(writerPatience - 1)
				if err := x.Finish(xapi.NewError(xapi.ErrClientError, "gone")); code(err) != xapi.ErrClientError {
					t.Errorf("the interrupted import: %v", err)
				}
				if err := <-done; err != nil {
					t.Errorf("after it: %v", err)
				}
				r.wantConsistent()
			})
		})
	}
}

func TestImportErrors(t *testing.T) {
	r := newRig(t)
	disk := r.disk(1 << 20)
	snap := r.call("VDI.snapshot", disk).(vdiRef)
	ro := r.disk(1 << 20)
	set(r, ro, func(v *xapi.VDI) { v.ReadOnly = true })
	r.syncAttrs(t.Context(), ro) // the volume says so, too
	attached := r.disk(1 << 20)
	vbd := r.vbd(r.vm("vm"), attached, "0", "RW")
	set(r, vbd, func(b *xapi.VBD) { b.CurrentlyAttached = true })
	unmanaged := r.disk(1 << 20)
	set(r, unmanaged, func(v *xapi.VDI) { v.Managed = false })
	for _, c := range []struct {
		vdi, sr, format string
		length          int64
		want            string
	}{
		{"", "", "", 1, "VDI_MISSING"},
		{"", "fake_sr", "", 1, "UUID_INVALID|SR|fake_sr"}, // QT-IMP-1
		{"", string(r.sr), "vhd", 1, "INTERNAL_ERROR|Only raw data of known length can be imported without a VDI"},
		{"", string(r.sr), "raw", -1, "INTERNAL_ERROR|Only raw data of known length can be imported without a VDI"},
		{string(snap), "", "", 1, "VDI_READONLY|" + string(snap)},
		{string(ro), "", "", 1, "VDI_READONLY|" + string(ro)},
		{string(attached), "", "", 1, "VDI_IN_USE|" + string(attached) + "|import"},
		{string(unmanaged), "", "", 1, "VDI_NOT_MANAGED|" + string(unmanaged)},
		{"OpaqueRef:no", "", "", 1, "HANDLE_INVALID|VDI|OpaqueRef:no"},
	} {
		q, task := r.importRequest(c.vdi)
		q.SR, q.Format, q.Length = c.sr, c.format, c.length
		_, err := r.Import(t.Context(), trusted, q)
		if description(err) != c.want {
			t.Errorf("%+v: %v", c, err)
		}
		if got := record(r.core, task); got.Status != xapi.TaskStatusTypeFailure {
			t.Errorf("%+v: task %s", c, got.Status)
		}
	}
	set(r, unmanaged, func(v *xapi.VDI) { v.Managed = true })
	r.wantConsistent()
}

// A disk made by an import appears when it is complete, or never.
func TestImportNewDisk(t *testing.T) {
	r := newRig(t)
	q, task := r.importRequest("")
	q.SR, q.Length = record(r.core, r.sr).UUID, 3<<20
	x, err := r.Import(t.Context(), trusted, q)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := x.Volume.WriteAt([]byte("hello"), 0); err != nil {
		t.Fatal(err)
	}
	r.call("SR.scan", string(r.sr)) // does not take the unfinished disk for a stray
	r.fails("SR_BACKEND_FAILURE_16||The SR is in use [opterr=a disk is being filled, or the SR is looked through]|", "PBD.unplug", r.pbd(r.sr))
	r.destroy(r.disk(1 << 20)) // others go on
	if got := r.disks(r.sr); len(got) != 0 {
		t.Errorf("the unfinished disk is visible: %q", got)
	}
	if err := x.Finish(nil); err != nil {
		t.Fatal(err)
	}
	ref := r.ref(x.VDI.UUID)
	got := record(r.core, ref)
	if got.NameLabel != "Imported VDI" || got.Type != xapi.VDITypeUser || got.VirtualSize != 4<<20 || string(r.contents(ref)[:5]) != "hello" {
		t.Errorf("disk %+v", got)
	}
	r.wantTask(task, xapi.TaskStatusTypeSuccess, "<value>"+string(ref)+"</value>")

	q, task = r.importRequest("")
	q.SR, q.Length = string(r.sr), 1<<20
	if x, err = r.Import(t.Context(), trusted, q); err != nil {
		t.Fatal(err)
	}
	if err := x.Finish(io.ErrUnexpectedEOF); err == nil {
		t.Error("a failed import succeeded")
	}
	if got := record(r.core, task); got.Status != xapi.TaskStatusTypeFailure {
		t.Errorf("task %s", got.Status)
	}
	r.wantConsistent()
}

func TestCheckImport(t *testing.T) {
	r := newRig(t)
	disk := r.disk(1 << 20)
	base := TransferRequest{Session: string(r.root), Action: "put_import_raw_vdi"}
	for _, c := range []struct {
		change func(*TransferRequest)
		want   string
	}{
		{func(q *TransferRequest) { q.VDI = string(disk) }, ""},
		{func(q *TransferRequest) { q.SR = string(r.sr) }, ""},
		{func(q *TransferRequest) { q.VDI = "x" }, "UUID_INVALID|VDI|x"},
		{func(q *TransferRequest) { q.SR = "x" }, "UUID_INVALID|SR|x"},
		{func(q *TransferRequest) {}, "VDI_MISSING"},
		{func(q *TransferRequest) { q.Session = "OpaqueRef:x" }, "SESSION_INVALID|OpaqueRef:x"},
	} {
		q := base
		c.change(&q)
		if err := r.CheckImport(t.Context(), trusted, q); description(err) != c.want {
			t.Errorf("%+v: %v, want %q", q, err, c.want)
		}
	}
	low := r.as("read-only")
	base.Session, base.VDI = string(low), string(disk)
	before := r.API.db.Revision()
	if err := r.CheckImport(t.Context(), trusted, base); code(err) != "RBAC_PERMISSION_DENIED" {
		t.Errorf("read-only: %v", err)
	}
	if got := r.API.db.Revision(); got != before {
		t.Errorf("a probe changed something: revision %d, then %d", before, got)
	}
}
