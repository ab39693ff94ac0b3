package ova

import (
	"errors"
	"slices"
	"testing"

	"coppice/internal/db"
	"coppice/internal/xapi"
)

// insert adds an object.
func insert[T any](t *testing.T, tx *db.Tx, rec *T) xapi.Ref[T] {
	t.Helper()
	ref, err := db.Insert(tx, rec)
	if err != nil {
		t.Fatal(err)
	}
	return ref
}

// guest is a database with a suspended VM that has two disks, a CD and a VIF, and a snapshot of it with two disks.
func guest(t *testing.T) (*db.DB, xapi.Ref[xapi.VM]) {
	t.Helper()
	d, err := db.Open(t.Context(), xapi.Datamodel(), db.NewMemStore())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := d.Close(); err != nil {
			t.Error(err)
		}
	})
	var ref xapi.Ref[xapi.VM]
	err = d.Update(t.Context(), func(tx *db.Tx) error {
		disks := insert(t, tx, xapi.New[xapi.SR]())
		iso := xapi.New[xapi.SR]()
		iso.ContentType = isoContent
		images := insert(t, tx, iso)
		network := insert(t, tx, xapi.New[xapi.Network]())
		vdi := func(sr xapi.Ref[xapi.SR], of xapi.Ref[xapi.VDI]) xapi.Ref[xapi.VDI] {
			v := xapi.New[xapi.VDI]()
			v.SR, v.SnapshotOf, v.IsASnapshot = sr, of, !of.IsNull()
			return insert(t, tx, v)
		}
		plug := func(vm xapi.Ref[xapi.VM], disk xapi.Ref[xapi.VDI], kind xapi.VBDType) {
			b := xapi.New[xapi.VBD]()
			b.VM, b.VDI, b.Type = vm, disk, kind
			insert(t, tx, b)
		}
		vm := xapi.New[xapi.VM]()
		vm.NameLabel, vm.MemoryStaticMax = "guest", 1<<30
		vm.PowerState, vm.SuspendVDI = xapi.VMPowerStateSuspended, vdi(disks, xapi.NullRef)
		vm.CurrentOperations = map[string]xapi.VMOperations{"OpaqueRef:task": xapi.VMOperationsExport}
		ref = insert(t, tx, vm)
		snap := xapi.New[xapi.VM]()
		snap.IsASnapshot, snap.SnapshotOf, snap.PowerState = true, ref, xapi.VMPowerStateHalted
		snapshot := insert(t, tx, snap)
		for range 2 {
			disk := vdi(disks, xapi.NullRef)
			plug(ref, disk, xapi.VBDTypeDisk)
			plug(snapshot, vdi(disks, disk), xapi.VBDTypeDisk)
		}
		plug(ref, vdi(images, xapi.NullRef), xapi.VBDTypeCD)
		vif := xapi.New[xapi.VIF]()
		vif.VM, vif.Network = ref, network
		insert(t, tx, vif)
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return d, ref
}

// What a manifest says is read as it was, and the disks that an archive has
// are those that its reader wants.
func TestManifest(t *testing.T) {
	d, vm := guest(t)
	for name, tt := range map[string]struct {
		o                Options
		vms, disks, vifs int
		state            xapi.VMPowerState
	}{
		"plain":               {Options{}, 1, 2, 1, xapi.VMPowerStateHalted},
		"with its memory":     {Options{State: true}, 1, 3, 1, xapi.VMPowerStateSuspended},
		"with snapshots":      {Options{Snapshots: true}, 2, 4, 1, xapi.VMPowerStateHalted},
		"all of it":           {Options{Snapshots: true, State: true}, 2, 5, 1, xapi.VMPowerStateSuspended},
		"without its devices": {Options{Exclude: []string{"vbd", "vif"}}, 1, 0, 0, xapi.VMPowerStateHalted},
	} {
		var c *Collection
		var text []byte
		var src *xapi.VM
		err := d.View(func(tx *db.Tx) (err error) {
			if src, err = db.Get(tx, vm); err != nil {
				return err
			}
			if c, err = Collect(tx, []xapi.Ref[xapi.VM]{vm}, tt.o); err != nil {
				return err
			}
			text, err = c.Manifest(xapi.New[xapi.Host]())
			return err
		})
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		m, err := Parse(text)
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		var sent, wanted []string
		for _, d := range c.Disks {
			sent = append(sent, d.ID)
		}
		for _, id := range m.Disks() {
			wanted = append(wanted, string(id))
		}
		slices.Sort(wanted)
		if len(m.VMs) != tt.vms || len(sent) != tt.disks || !slices.Equal(sent, wanted) {
			t.Errorf("%s: VMs %q, disks %q, wanted %q", name, m.VMs, sent, wanted)
		}
		got := Get(m, m.VMs[0])
		if got.UUID != src.UUID || got.PowerState != tt.state || got.MemoryStaticMax != src.MemoryStaticMax || len(got.CurrentOperations) > 0 {
			t.Errorf("%s: %+v", name, got)
		}
		vifs := m.VIFs(m.VMs[0])
		if len(vifs) != tt.vifs {
			t.Errorf("%s: %d VIFs, want %d", name, len(vifs), tt.vifs)
		}
		for _, v := range vifs {
			if Get(m, v.Network) == nil {
				t.Errorf("%s: a VIF has no network", name)
			}
		}
		for _, b := range m.VBDs(m.VMs[0]) {
			if disk := Get(m, b.VDI); disk == nil || m.Filled(disk) != (b.Type == xapi.VBDTypeDisk) {
				t.Errorf("%s: a VBD of type %s has the disk %+v", name, b.Type, disk)
			}
		}
		// A snapshot that is exported with its VM still is one.
		for _, id := range m.VMs[1:] {
			if snap := Get(m, id); !snap.IsASnapshot || snap.SnapshotOf != m.VMs[0] {
				t.Errorf("%s: snapshot %+v", name, snap)
			}
		}
	}
}

// FuzzParse reads a manifest from anywhere: what it takes can be asked for
// everything, and what it refuses has a code of an import.
func FuzzParse(f *testing.F) {
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
		m, err := Parse([]byte(text))
		if err != nil {
			e, ok := errors.AsType[*xapi.Error](err)
			if !ok || e.Code != xapi.ErrImportError && e.Code != xapi.ErrImportIncompatibleVersion {
				t.Fatal(err)
			}
			return
		}
		m.Disks()
		for _, vm := range m.VMs {
			if Get(m, vm) == nil {
				t.Fatalf("%s is none", vm)
			}
			m.VBDs(vm)
			m.VIFs(vm)
		}
	})
}
