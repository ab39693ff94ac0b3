package api

import (
	"bytes"
	"context"
	"testing"
	"testing/synctest"

	"coppice/internal/db"
	"coppice/internal/ova"
	"coppice/internal/storage"
	"coppice/internal/xapi"
)

// sealedArchive is an archive of VMs as it travels: a manifest, and the
// contents of the disks that follow it by their names in there.
type sealedArchive struct {
	manifest []byte
	disks    map[string][]byte
}

// archive makes an archive of a VM with its snapshots.
func (r *rig) archive(vm vmRef) (a sealedArchive) {
	r.t.Helper()
	a.disks = map[string][]byte{}
	r.view(func(tx *db.Tx) {
		vms, err := ova.Collect(tx, []vmRef{vm}, ova.Options{Snapshots: true})
		if err != nil {
			r.t.Fatal(err)
		}
		_, host, err := r.core.API.host(tx)
		if err != nil {
			r.t.Fatal(err)
		}
		if a.manifest, err = vms.Manifest(host); err != nil {
			r.t.Fatal(err)
		}
		for _, d := range vms.Disks {
			a.disks[d.ID] = r.contents(d.Ref)
		}
	})
	return a
}

// bring imports an archive as its handler does.
func (r *rig) bring(a sealedArchive, how VMImportRequest) error {
	how.Session, how.Action = string(r.root), "put_import"
	if !how.Metadata {
		how.SR = string(r.sr)
	}
	x, err := r.ImportVM(r.t.Context(), trusted, how)
	if err != nil {
		return err
	}
	return x.Finish(func() error {
		disks, err := x.Begin(bytes.NewReader(a.manifest))
		if err != nil {
			return err
		}
		for _, d := range disks {
			if _, err := x.Base(r.t.Context(), d.Name); err != nil {
				return err
			}
			if err := storage.NewOverlay(d.Volume).WriteAt(r.t.Context(), a.disks[d.Name], 0); err != nil {
				return err
			}
			x.Arrived(d.Name)
		}
		return nil
	}())
}

// An import of VMs is all or nothing, whatever fails.
func TestVMImportFaultAtEveryCall(t *testing.T) {
	from := newRig(t)
	vm := from.vm("guest")
	disk := from.disk(2 << 20)
	from.call("VDI.set_name_label", disk, "disk")
	from.write(disk, bytes.Repeat([]byte("data"), 2000), 4096)
	from.vbd(vm, disk, "0", "RW")
	from.call("VM.snapshot", vm, "snap")
	from.call("VDI.resize", disk, 4<<20)
	from.write(disk, []byte("changed"), 8192)
	a := from.archive(vm)
	if len(a.disks) != 2 {
		t.Fatalf("%d disks", len(a.disks))
	}
	nothing := func(*rig) vmRef { return xapi.NullRef }
	sweepFaults(t, vmFaultCase{nothing, func(r *rig, _ vmRef) error { return r.bring(a, VMImportRequest{}) }}, func(r *rig) {
		if err := r.bring(a, VMImportRequest{}); err != nil {
			t.Errorf("the next import: %v", err)
		}
	})
}

// An import that replaces a VM leaves the old one or the new one, whatever
// fails: never none, and never both.
func TestVMImportReplaceFaultAtEveryCall(t *testing.T) {
	for name, how := range map[string]VMImportRequest{
		"with disks": {Restore: true, Force: true},
		"metadata":   {Restore: true, Force: true, Metadata: true},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			var a sealedArchive
			var uuid, mac string
			setup := func(r *rig) vmRef {
				vm, disk := r.vm("guest"), r.disk(2<<20)
				r.vbd(vm, disk, "0", "RW")
				r.vif(vm, "0")
				if how.Metadata {
					r.call("VM.snapshot", vm, "snap")
				}
				a = r.archive(vm)
				uuid, mac = record(r.core, vm).UUID, record(r.core, record(r.core, vm).VIFs[0]).MAC
				r.call("VM.set_name_description", vm, "changed since")
				r.write(disk, []byte("changed since"), 8192)
				return vm
			}
			sweepFaults(t, vmFaultCase{setup, func(r *rig, _ vmRef) error { return r.bring(a, how) }}, func(r *rig) {
				r.view(func(tx *db.Tx) {
					_, vm, err := db.ByUUID[xapi.VM](tx, uuid)
					if err != nil {
						t.Fatal(err)
					}
					if vif, err := db.Get(tx, vm.VIFs[0]); err != nil || vif.MAC != mac {
						t.Errorf("%v, MAC %+v, was %s", err, vif, mac)
					}
				})
			})
		})
	}
}

// A VM is replaced when nobody uses it any more, and not at all when it runs.
func TestVMImportReplaceWaits(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t)
		vm, _ := r.guest("guest")
		a, how := r.archive(vm), VMImportRequest{Restore: true, Force: true}
		uuid := record(r.core, vm).UUID
		for _, state := range []xapi.VMPowerState{xapi.VMPowerStateSuspended, xapi.VMPowerStatePaused, xapi.VMPowerStateRunning} {
			set(r, vm, func(v *xapi.VM) { v.PowerState = state })
			if err := r.bring(a, how); code(err) != xapi.ErrVMBadPowerState {
				t.Errorf("%s: %v", state, err)
			}
		}
		set(r, vm, func(v *xapi.VM) { v.PowerState = xapi.VMPowerStateHalted })
		export, err := r.ExportVM(t.Context(), trusted, VMExportRequest{Session: string(r.root), Action: "get_export", VM: string(vm)})
		if err != nil {
			t.Fatal(err)
		}
		done := make(chan error, 1)
		go func() { done <- r.bring(a, how) }()
		synctest.Wait()
		if record(r.core, vm); len(done) > 0 {
			t.Error("a VM that is being exported has been replaced")
		}
		if err := export.Finish(nil); err != nil {
			t.Error(err)
		}
		if err := <-done; err != nil {
			t.Error(err)
		}
		r.view(func(tx *db.Tx) {
			if ref, _, err := db.ByUUID[xapi.VM](tx, uuid); err != nil || ref == vm {
				t.Errorf("of that UUID: %s, %v", ref, err)
			}
		})
	})
}

// otherServer is a server that has one disk with the contents of data.
type otherServer struct {
	disk    SourceDisk
	data    []byte
	fetched bool   // something has been asked for
	base    string // to what
}

func (o *otherServer) Connect(context.Context, Source) (SourceSession, error) { return o, nil }
func (o *otherServer) Close(context.Context)                                  {}
func (o *otherServer) Disk(context.Context, string) (SourceDisk, error)       { return o.disk, nil }

func (o *otherServer) Fetch(ctx context.Context, f Fetch) (int64, error) {
	o.fetched, o.base = true, f.Base
	return int64(len(o.data)), storage.NewOverlay(f.Volume).WriteAt(ctx, o.data, 0)
}

const (
	firstThere  = "11111111-2222-4333-8444-000000000001"
	secondThere = "11111111-2222-4333-8444-000000000002"
)

// newOther is a server with a snapshot, as it was first or as it is then.
func newOther(second bool) *otherServer {
	o := &otherServer{
		disk: SourceDisk{UUID: firstThere, Label: "disk", Size: 2 << 20, Snapshot: true},
		data: bytes.Repeat([]byte("1"), 1<<20),
	}
	if second {
		o.disk.UUID, o.disk.Size = secondThere, 4<<20
		o.data = append(bytes.Clone(o.data), bytes.Repeat([]byte("2"), 2<<20)...)
	}
	return o
}

// pull pulls the disk of another server, onto the only disk that there is, if
// there is one.
func (r *rig) pull(o *otherServer) error {
	r.t.Helper()
	r.cfg.Sources = o
	args := map[string]string{"remote-url": "https://there", "remote-vdi": o.disk.UUID}
	r.view(func(tx *db.Tx) {
		for ref := range db.All[xapi.VDI](tx) {
			args["vdi"] = string(ref)
		}
	})
	if args["vdi"] == "" {
		args["sr"] = string(r.sr)
	}
	_, err := r.try(r.root, "host.call_plugin", r.host, ourPlugin, "vdi-pull", args)
	return err
}

// A pull is all or nothing, whatever fails, and the next one begins where the
// disk is.
func TestPullFaultAtEveryCall(t *testing.T) {
	again := func(r *rig) {
		var had []pulled
		r.view(func(tx *db.Tx) {
			for _, v := range db.All[xapi.VDI](tx) {
				had = pulledOf(v)
			}
		})
		o := newOther(true)
		if err := r.pull(o); err != nil {
			t.Errorf("the next pull: %v", err)
		}
		if o.fetched && o.base != firstThere {
			t.Errorf("the next pull is to %q, the disk says %v", o.base, had)
		}
		r.wantConsistent()
	}
	first := func(r *rig) vmRef {
		if err := r.pull(newOther(false)); err != nil {
			t.Fatal(err)
		}
		return xapi.NullRef
	}
	sweepFaults(t, vmFaultCase{first, func(r *rig, _ vmRef) error { return r.pull(newOther(true)) }}, again)
}
