package ova

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"testing"
	"testing/iotest"

	"coppice/internal/db"
	"coppice/internal/db/dbtest"
	"coppice/internal/rpc"
	"coppice/internal/xapi"
)

// guest is a database with a suspended VM that has two disks, a CD and a VIF, and a snapshot of it with two disks.
func guest(t *testing.T) (*dbtest.DB, xapi.Ref[xapi.VM]) {
	t.Helper()
	d := dbtest.Open(t)
	disks := dbtest.Insert(d, xapi.New[xapi.SR]())
	iso := xapi.New[xapi.SR]()
	iso.ContentType = isoContent
	images := dbtest.Insert(d, iso)
	network := dbtest.Insert(d, xapi.New[xapi.Network]())
	vdi := func(sr xapi.Ref[xapi.SR], of xapi.Ref[xapi.VDI]) xapi.Ref[xapi.VDI] {
		v := xapi.New[xapi.VDI]()
		v.SR, v.SnapshotOf, v.IsASnapshot = sr, of, !of.IsNull()
		return dbtest.Insert(d, v)
	}
	plug := func(vm xapi.Ref[xapi.VM], disk xapi.Ref[xapi.VDI], kind xapi.VBDType) {
		b := xapi.New[xapi.VBD]()
		b.VM, b.VDI, b.Type = vm, disk, kind
		dbtest.Insert(d, b)
	}
	vm := xapi.New[xapi.VM]()
	vm.NameLabel, vm.MemoryStaticMax = "guest", 1<<30
	vm.PowerState, vm.SuspendVDI = xapi.VMPowerStateSuspended, vdi(disks, xapi.NullRef)
	vm.CurrentOperations = map[string]xapi.VMOperations{"OpaqueRef:task": xapi.VMOperationsExport}
	ref := dbtest.Insert(d, vm)
	snap := xapi.New[xapi.VM]()
	snap.IsASnapshot, snap.SnapshotOf, snap.PowerState = true, ref, xapi.VMPowerStateHalted
	snapshot := dbtest.Insert(d, snap)
	for range 2 {
		disk := vdi(disks, xapi.NullRef)
		plug(ref, disk, xapi.VBDTypeDisk)
		plug(snapshot, vdi(disks, disk), xapi.VBDTypeDisk)
	}
	plug(ref, vdi(images, xapi.NullRef), xapi.VBDTypeCD)
	vif := xapi.New[xapi.VIF]()
	vif.VM, vif.Network = ref, network
	dbtest.Insert(d, vif)
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
		m, err := Parse(bytes.NewReader(text))
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

// manifest is a manifest with n objects that are all alike but for their
// names; it is made while it is read.
func manifest(n int, class, fields string) io.Reader {
	const head = "<value><struct><member><name>version</name><value><struct/></value></member><member><name>objects</name><value><array><data>"
	all := []io.Reader{strings.NewReader(head)}
	for i := range n {
		all = append(all, strings.NewReader(fmt.Sprintf("<value><struct><member><name>class</name><value>%s</value></member><member><name>id</name><value>Ref:%d</value></member>"+
			"<member><name>snapshot</name><value><struct>", class, i)), strings.NewReader(fields), strings.NewReader("</struct></value></member></struct></value>"))
	}
	return io.MultiReader(append(all, strings.NewReader("</data></array></value></member></struct></value>"))...)
}

// A manifest that would take too much memory is refused, one that is as large
// as is possible is not.
func TestManifestLimits(t *testing.T) {
	const (
		values  = 2000
		around  = 2                 // values of a manifest without objects
		each    = 4                 // those of an object without fields
		largest = rpc.MaxValues - 4 // those of a set that is the only field of an object
	)
	set := func(n int) string {
		return "<member><name>tags</name><value><array><data>" + strings.Repeat("<value/>", n) + "</data></array></value></member>"
	}
	fields := len(xapi.ClassOf[xapi.VBD]().Fields)
	for name, tt := range map[string]struct {
		in     io.Reader
		values int
		says   string // "" when it is read
	}{
		"a large object":   {manifest(1, "VM", set(largest)), MaxValues, ""},
		"too large a one":  {manifest(1, "VM", set(largest+1)), MaxValues, "object of the manifest has more than 100000 values"},
		"many values":      {manifest(6, "VM", set((values-around)/6-each-1)), values, ""},
		"too many values":  {manifest(6, "VM", set((values-around)/6-each)), values, "manifest has more than 2000 values"},
		"of other classes": {manifest((values-around)/each+1, "pool_patch", ""), values, "manifest has more than 2000 values"},
		"many records":     {manifest(values/fields, "VBD", ""), values, ""},
		"too many records": {manifest(values/fields+1, "VBD", ""), values, "manifest has more than 2000 values"},
	} {
		_, err := parse(tt.in, tt.values)
		e, ok := errors.AsType[*xapi.Error](err)
		if ok != (tt.says != "") || !ok && err != nil || ok && (e.Code != xapi.ErrImportError || !strings.Contains(e.Params[0], tt.says)) {
			t.Errorf("%s: %v, want %q", name, err, tt.says)
		}
	}
}

// What the reader of a manifest says is not said to be the manifest's fault.
func TestManifestUnreadable(t *testing.T) {
	boom := errors.New("boom")
	text, err := io.ReadAll(manifest(2, "VM", ""))
	if err != nil {
		t.Fatal(err)
	}
	for n := 0; n < len(text); n += 7 {
		if _, err := Parse(io.MultiReader(bytes.NewReader(text[:n]), iotest.ErrReader(boom))); !errors.Is(err, boom) {
			t.Fatalf("after %d bytes: %v", n, err)
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
		m, err := Parse(strings.NewReader(text))
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
