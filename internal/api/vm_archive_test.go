package api

import (
	"errors"
	"slices"
	"testing"

	"coppice/internal/db"
	"coppice/internal/xapi"
)

// manifestOf is the manifest of a VM.
func (r *rig) manifestOf(vm vmRef, o archiveOptions) (text []byte, disks []archivedDisk) {
	r.t.Helper()
	r.view(func(tx *db.Tx) {
		ar, err := collect(tx, []vmRef{vm}, o)
		if err != nil {
			r.t.Fatal(err)
		}
		_, host, err := r.core.API.host(tx)
		if err != nil {
			r.t.Fatal(err)
		}
		if text, err = ar.manifest(host); err != nil {
			r.t.Fatal(err)
		}
		disks = ar.disks
	})
	return text, disks
}

// What a manifest says is read as it was, and the disks that an archive has
// are those that its reader wants.
func TestManifest(t *testing.T) {
	r := newRig(t)
	vm, _ := r.guest("guest")
	r.call("VM.snapshot", vm, "snap", []string{})
	r.suspend(vm)
	for name, tt := range map[string]struct {
		o          archiveOptions
		vms, disks int
		state      xapi.VMPowerState
	}{
		"plain":               {archiveOptions{}, 1, 2, xapi.VMPowerStateHalted},
		"with its memory":     {archiveOptions{state: true}, 1, 3, xapi.VMPowerStateSuspended},
		"with snapshots":      {archiveOptions{snapshots: true}, 2, 4, xapi.VMPowerStateHalted},
		"all of it":           {archiveOptions{snapshots: true, state: true}, 2, 5, xapi.VMPowerStateSuspended},
		"without its devices": {archiveOptions{exclude: []string{"vbd", "vif"}}, 1, 0, xapi.VMPowerStateHalted},
	} {
		text, disks := r.manifestOf(vm, tt.o)
		ar, err := readManifest(text)
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		if err := ar.check(); err != nil {
			t.Errorf("%s: %v", name, err)
		}
		var sent, wanted []string
		for _, d := range disks {
			sent = append(sent, d.id)
		}
		for _, id := range ar.wanted() {
			wanted = append(wanted, string(id))
		}
		slices.Sort(wanted)
		if len(ar.vms) != tt.vms || len(sent) != tt.disks || !slices.Equal(sent, wanted) {
			t.Errorf("%s: VMs %q, disks %q, wanted %q", name, ar.vms, sent, wanted)
		}
		got := part(ar, xapi.Ref[xapi.VM](ar.vms[0]))
		if src := record(r.core, vm); got.UUID != src.UUID || got.PowerState != tt.state || got.MemoryStaticMax != src.MemoryStaticMax || len(got.CurrentOperations) > 0 {
			t.Errorf("%s: %+v", name, got)
		}
	}
}

// FuzzManifest reads a manifest from anywhere: what it takes can be checked,
// and what it refuses has a code of an import.
func FuzzManifest(f *testing.F) {
	const head = "<value><struct><member><name>version</name><value><struct><member><name>export_vsn</name><value>2</value></member></struct></value></member>" +
		"<member><name>objects</name><value><array><data><value><struct><member><name>class</name><value>"
	const middle = "</value></member><member><name>id</name><value>Ref:0</value></member><member><name>snapshot</name><value><struct>"
	const tail = "</struct></value></member></struct></value></data></array></value></member></struct></value>"
	f.Add("<value><struct></struct></value>")
	f.Add(head + "VM" + middle + "<member><name>VCPUs_max</name><value>1</value></member><member><name>tags</name><value>x</value></member>" + tail)
	f.Add(head + "VDI" + middle + "<member><name>virtual_size</name><value>-9</value></member>" + tail)
	f.Add(head + "VBD" + middle + "<member><name>VM</name><value>Ref:0</value></member>" + tail)
	f.Add(head + "host" + middle + tail)
	f.Fuzz(func(t *testing.T, text string) {
		ar, err := readManifest([]byte(text))
		if err != nil {
			e, ok := errors.AsType[*xapi.Error](err)
			if !ok || e.Code != xapi.ErrImportError && e.Code != xapi.ErrImportIncompatibleVersion {
				t.Fatal(err)
			}
			return
		}
		if err := ar.check(); err == nil {
			ar.wanted()
		}
	})
}
