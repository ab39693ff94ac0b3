package api

import (
	"bytes"
	"context"
	"errors"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"coppice/internal/storage"
	"coppice/internal/storage/mem"
	"coppice/internal/xapi"
)

var testEndpoints = NBDEndpoints{
	Socket: "/data/nbd.sock", Address: "192.0.2.1", TLS: 10809, Plain: 10810, Certificate: "PEM", Subject: "host",
}

// nbdRig is a rig that listens for NBD, as far as clients can tell.
func nbdRig(t *testing.T) *rig {
	t.Helper()
	return newRigWith(t, mem.Driver(), func(c *Config) { c.NBD = func() NBDEndpoints { return testEndpoints } })
}

// newRigWith is newRigOn with an adjusted configuration.
func newRigWith(t *testing.T, d storage.Driver, adjust func(*Config)) *rig {
	t.Helper()
	r := newRigOn(t, d)
	r.adjust = adjust
	r.restart()
	return r
}

// local is a client on the Unix socket.
func local(process string) NBDClient { return NBDClient{Origin: trusted, Process: process} }

// attach attaches an export until the test ends or it is closed.
func (r *rig) attach(o NBDClient, name string) *NBDAttachment {
	r.t.Helper()
	at, err := r.NBDAttach(r.t.Context(), o, name)
	if err != nil {
		r.t.Fatalf("attach %s: %v", name, err)
	}
	return at
}

func (r *rig) wantNotAttached(want string, o NBDClient, name string) {
	r.t.Helper()
	at, err := r.NBDAttach(r.t.Context(), o, name)
	if err == nil {
		at.Close()
	}
	if got := description(err); !strings.HasPrefix(got, want) {
		r.t.Errorf("attach %s: got %q, want %q", name, got, want)
	}
}

func TestNBDNames(t *testing.T) {
	const id = "11111111-2222-4333-8444-555555555555"
	for s, want := range map[string]nbdName{
		id:                                   {id: id, mode: nbdReadOnly},
		"/" + id:                             {id: id, mode: nbdReadOnly},
		"/" + id + "?session_id=OpaqueRef:1": {id: id, mode: nbdReadOnly, session: "OpaqueRef:1"},
		"/ro/" + id:                          {id: id, mode: nbdReadOnly},
		"rw/" + id + "?session_id=x":         {id: id, mode: nbdReadWrite, session: "x"},
		"cow/" + id + "?keep=a+b":            {id: id, mode: nbdCopyOnWrite, keep: "a b"},
		"vbd/" + id:                          {kind: nbdOfVBD, id: id, mode: nbdReadOnly},
		"once/ABC":                           {kind: nbdOfToken, id: "ABC", mode: nbdReadOnly},
	} {
		if got, err := parseNBDName(s); err != nil || got != want {
			t.Errorf("%q: %+v, %v, want %+v", s, got, err, want)
		}
	}
	for _, s := range []string{
		"", "/", "rw/", "xx/" + id, "rw/rw/" + id, strings.ToUpper("abcdef12") + id[8:], id + "/", id + "?x=1",
		id + "?keep=a", "cow/" + id + "?keep=", id + "?session_id=1&session_id=2", id + "?%zz", "once/", "once/A?session_id=1",
	} {
		if got, err := parseNBDName(s); code(err) != xapi.ErrVDIMissing {
			t.Errorf("%q: %+v, %v, want VDI_MISSING", s, got, err)
		}
	}
	if got, want := nbdURI("/a b/nbd.sock", "rw/"+id), "nbd+unix:///rw/"+id+"?socket=/a%20b/nbd.sock"; got != want {
		t.Errorf("URI %s, want %s", got, want)
	}
}

// A disk that is attached read-write counts as such for every operation.
func TestNBDAttachRules(t *testing.T) {
	r := nbdRig(t)
	disk := r.disk(4 << 20)
	id := record(r.core, disk).UUID
	snap := r.call("VDI.snapshot", disk).(vdiRef)
	a := r.attach(local("1"), "rw/"+id)
	if a.ReadOnly || a.Volume.Size() != 4<<20 {
		t.Errorf("attached %+v", a)
	}
	b := r.attach(local("1"), "rw/"+id) // a second connection of the same client
	r.wantNotAttached("VDI_IN_USE|"+string(disk), local("2"), "rw/"+id)
	if _, err := a.Volume.WriteAt([]byte("written"), 0); err != nil {
		t.Fatal(err)
	}
	got := make([]byte, 7)
	if _, err := b.Volume.ReadAt(got, 0); err != nil || string(got) != "written" {
		t.Errorf("the other connection reads %q, %v", got, err)
	}
	q, _ := r.importRequest(id)
	if _, err := r.Import(t.Context(), trusted, q); description(err) != "VDI_IN_USE|"+string(disk)+"|import" {
		t.Errorf("import: %v", err)
	}
	r.fails("VDI_IN_USE|"+string(disk)+"|destroy", "VDI.destroy", disk)
	r.fails("VDI_IN_USE|"+string(disk)+"|revert_from", "VDI.revert", snap)
	r.fails("VDI_IN_USE|"+string(disk)+"|resize", "VDI.resize", disk, 8<<20)
	r.fails("VDI_IN_USE|"+string(disk)+"|unplug", "PBD.unplug", r.pbd(r.sr))
	if ops := record(r.core, disk).AllowedOperations; slices.Contains(ops, xapi.VDIOperationsDestroy) || !slices.Contains(ops, xapi.VDIOperationsSnapshot) {
		t.Errorf("allowed operations %v", ops)
	}
	later := r.call("VDI.snapshot", disk).(vdiRef)
	clone := r.call("VDI.clone", disk).(vdiRef)
	for _, ref := range []vdiRef{later, clone} {
		if c := r.contents(ref); !bytes.HasPrefix(c, []byte("written")) {
			t.Errorf("a copy of the attached disk begins with %q", c[:7])
		}
	}
	// Readers have their own instant and are in nobody's way.
	c := r.attach(local("2"), id)
	if _, err := a.Volume.WriteAt([]byte("changed"), 0); err != nil {
		t.Fatal(err)
	}
	if _, err := c.Volume.ReadAt(got, 0); err != nil || string(got) != "written" || !c.ReadOnly {
		t.Errorf("a reader sees %q, %v", got, err)
	}
	c2 := r.attach(local("2"), id)
	if _, err := c2.Volume.ReadAt(got, 0); err != nil || string(got) != "written" {
		t.Errorf("another connection of the reader sees %q, %v", got, err)
	}
	c.Close()
	c2.Close()
	a.Close()
	r.fails("VDI_IN_USE|"+string(disk)+"|destroy", "VDI.destroy", disk) // b
	b.Close()
	r.call("VDI.revert", snap)
	r.call("VDI.destroy", disk)
	r.wantNotAttached("UUID_INVALID|VDI", local("1"), id)
	r.wantNotAttached("VDI_READONLY|"+string(snap), local("1"), "rw/"+record(r.core, snap).UUID)
	r.wantConsistent()
}

func TestNBDSharable(t *testing.T) {
	r := nbdRig(t)
	args := diskArgs(r.sr, 4<<20)
	args["sharable"] = true
	id := record(r.core, r.call("VDI.create", args).(vdiRef)).UUID
	a, b := r.attach(local("1"), "rw/"+id), r.attach(local("2"), "rw/"+id)
	in := TransferRequest{Session: string(r.root), Action: "put_import_raw_vdi", VDI: id, Length: 4 << 20}
	if _, err := r.Import(r.t.Context(), trusted, in); code(err) != xapi.ErrVDIInUse {
		t.Errorf("import under clients that write: %v", err)
	}
	a.Close()
	b.Close()
	x, err := r.Import(r.t.Context(), trusted, in)
	if err != nil {
		t.Fatal(err)
	}
	r.wantNotAttached("VDI_IN_USE", local("1"), "rw/"+id)
	if err := errors.Join(x.Keep(4096), x.Finish(nil)); err != nil {
		t.Fatal(err)
	}
	r.attach(local("1"), "rw/"+id).Close()
	if n, err := r.Received(r.t.Context(), trusted, in); err != nil || n != 0 {
		t.Errorf("after a client that may write the disk has %d bytes of an upload, %v", n, err)
	}
}

// Sessions and their roles decide who may attach, and the end of a session is
// the end of what it attached.
func TestNBDSessions(t *testing.T) {
	r := nbdRig(t)
	id := record(r.core, r.disk(4<<20)).UUID
	remote := NBDClient{Origin: Origin{Peer: "192.0.2.7"}}
	r.wantNotAttached("SESSION_INVALID", remote, id)
	r.wantNotAttached("SESSION_INVALID|OpaqueRef:none", remote, "/"+id+"?session_id=OpaqueRef:none")
	if _, err := r.NBDDescribe(remote, id); code(err) != xapi.ErrSessionInvalid {
		t.Errorf("describe without a session: %v", err)
	}
	for _, err := range r.NBDNames(remote) {
		if code(err) != xapi.ErrSessionInvalid {
			t.Errorf("list without a session: %v", err)
		}
	}
	for role, ok := range map[string]bool{"read-only": false, "vm-operator": false, "vm-admin": true, "pool-admin": true} {
		s := r.as(role)
		for _, mode := range []string{"", "rw/", "cow/"} {
			name := mode + id + "?session_id=" + string(s)
			if !ok {
				r.wantNotAttached("RBAC_PERMISSION_DENIED", remote, name)
				continue
			}
			at := r.attach(remote, name)
			if at.Context.Err() != nil {
				t.Error("an attachment ends at once")
			}
			at.Close()
		}
	}
	s := r.as("vm-admin")
	at := r.attach(remote, "rw/"+id+"?session_id="+string(s))
	r.wantNotAttached("VDI_IN_USE", remote, "rw/"+id+"?session_id="+string(r.root))
	if err := r.Logout(s); err != nil {
		t.Fatal(err)
	}
	<-at.Context.Done()
	at.Close()
	r.wantNotAttached("SESSION_INVALID", remote, "rw/"+id+"?session_id="+string(s))
	r.attach(remote, "rw/"+id+"?session_id="+string(r.root)).Close()
}

func TestNBDCopyOnWrite(t *testing.T) {
	r := nbdRig(t)
	disk := filledDisk(r)
	want := r.contents(disk)
	snap := r.call("VDI.snapshot", disk).(vdiRef)
	id := record(r.core, snap).UUID
	before := r.volumes(r.sr)
	a, b := r.attach(local("1"), "cow/"+id), r.attach(local("2"), "cow/"+id)
	if _, err := a.Volume.WriteAt([]byte("mine"), 0); err != nil {
		t.Fatal(err)
	}
	got := make([]byte, 4)
	if _, err := b.Volume.ReadAt(got, 0); err != nil || !bytes.Equal(got, want[:4]) {
		t.Errorf("another client's clone begins with %q, %v", got, err)
	}
	r.call("SR.scan", string(r.sr)) // takes no clone for a disk
	a.Close()
	b.Close()
	if after := r.volumes(r.sr); !slices.Equal(before, after) {
		t.Errorf("volumes %q, want %q: the clones are gone", after, before)
	}
	k := r.attach(local("1"), "cow/"+id+"?keep=kept")
	if _, err := k.Volume.WriteAt([]byte("kept"), 0); err != nil {
		t.Fatal(err)
	}
	same, apart := r.attach(local("1"), "cow/"+id+"?keep=kept"), r.attach(local("1"), "cow/"+id)
	if _, err := same.Volume.ReadAt(got, 0); err != nil || string(got) != "kept" {
		t.Errorf("another connection to the clone reads %q, %v", got, err)
	}
	if _, err := apart.Volume.ReadAt(got, 0); err != nil || !bytes.Equal(got, want[:4]) {
		t.Errorf("a clone that is not to be kept begins with %q, %v", got, err)
	}
	apart.Close()
	same.Close()
	r.call("VDI.destroy", snap) // what is derived from it stays
	k.Close()
	kept := r.call("VDI.get_by_name_label", "kept").([]string)
	if len(kept) != 1 {
		t.Fatalf("disks %q, want the one that was kept", kept)
	}
	if c := r.contents(vdiRef(kept[0])); string(c[:4]) != "kept" || !bytes.Equal(c[4:], want[4:]) {
		t.Error("what was kept is not what was written")
	}
	if !bytes.Equal(r.contents(disk), want) {
		t.Error("the source has changed")
	}
	r.wantConsistent()
	// A crash leaves nothing.
	r.attach(local("1"), "cow/"+record(r.core, disk).UUID)
	before = r.disks(r.sr)
	r.restart()
	if after := r.volumes(r.sr); len(after) != len(before) {
		t.Errorf("volumes %q after a restart, want %d", after, len(before))
	}
}

func TestNBDInfo(t *testing.T) {
	r := nbdRig(t)
	disk := r.disk(4 << 20)
	id := record(r.core, disk).UUID
	info := func(session xapi.Ref[xapi.Session]) []*xapi.VDINBDServerInfo {
		t.Helper()
		res, err := r.try(session, "VDI.get_nbd_info", disk)
		if err != nil {
			t.Fatal(err)
		}
		return res.Value.([]*xapi.VDINBDServerInfo)
	}
	if got := info(r.root); len(got) != 0 {
		t.Errorf("without a purpose: %v", got)
	}
	network := r.call("network.get_all").([]string)[0]
	r.call("network.add_purpose", network, "nbd")
	r.call("network.add_purpose", network, "nbd")
	r.fails("NETWORK_INCOMPATIBLE_PURPOSES|insecure_nbd|nbd", "network.add_purpose", network, "insecure_nbd")
	s := r.as("vm-admin")
	want := xapi.VDINBDServerInfo{
		Address: "192.0.2.1", Port: 10809, Cert: "PEM", Subject: "host", Exportname: "/" + id + "?session_id=" + string(s),
	}
	if got := info(s); len(got) != 1 || *got[0] != want {
		t.Errorf("info %+v, want %+v", got, want)
	}
	r.attach(NBDClient{}, info(s)[0].Exportname).Close()
	r.call("network.remove_purpose", network, "nbd")
	r.call("network.add_purpose", network, "insecure_nbd")
	if got := info(r.root); len(got) != 1 || got[0].Port != 10810 || got[0].Cert != "" {
		t.Errorf("insecure info %+v", got)
	}
	r.wantFailure("RBAC_PERMISSION_DENIED", r.as("vm-operator"), "VDI.get_nbd_info", disk)
}

func TestNBDTokens(t *testing.T) {
	r := nbdRig(t)
	begun := time.Now()
	var passed atomic.Int64
	r.adjust = func(c *Config) {
		c.NBD = func() NBDEndpoints { return testEndpoints }
		c.Now = func() time.Time { return begun.Add(time.Duration(passed.Load())) }
	}
	r.restart()
	id := record(r.core, r.disk(4<<20)).UUID
	token := func(args map[string]string) string {
		t.Helper()
		text := r.call("host.call_plugin", r.host, "coppice", "nbd", args).(string)
		name, _, _ := strings.Cut(strings.TrimPrefix(text, "export "), "\n")
		return name
	}
	anybody := NBDClient{Origin: Origin{Peer: "192.0.2.7"}}
	name := token(map[string]string{"vdi": id, "mode": "rw", "seconds": "10"})
	a, b := r.attach(anybody, name), r.attach(anybody, name)
	if a.ReadOnly {
		t.Error("a token for writing gives a read-only disk")
	}
	if _, err := r.NBDAttach(t.Context(), anybody, name+"x"); code(err) != xapi.ErrSessionInvalid {
		t.Errorf("a token that was made up: %v", err)
	}
	passed.Store(int64(11 * time.Second))
	r.wantNotAttached("SESSION_INVALID", anybody, name)
	if a.Context.Err() != nil {
		t.Error("the end of a token ends its connections")
	}
	a.Close()
	b.Close()
	for _, args := range []map[string]string{
		{"vdi": id, "mode": "up"},
		{"vdi": id, "seconds": "0"},
		{"vdi": id, "seconds": "3601"},
		{"vdi": id, "seconds": "x"},
		{"vdi": id, "keep": "x"},
	} {
		r.wantFailure("INVALID_VALUE", r.root, "host.call_plugin", r.host, "coppice", "nbd", args)
	}
	r.wantFailure("UUID_INVALID|VDI", r.root, "host.call_plugin", r.host, "coppice", "nbd", map[string]string{"vdi": "x"})
	r.wantFailure("RBAC_PERMISSION_DENIED", r.as("vm-admin"), "host.call_plugin", r.host, "coppice", "nbd", map[string]string{"vdi": id})
}

func TestVBDPlug(t *testing.T) {
	r := nbdRig(t)
	disk := r.disk(4 << 20)
	id := record(r.core, disk).UUID
	guest := r.vm("guest")
	ref := r.vbd(guest, disk, "0", "RW")
	r.fails("VM_BAD_POWER_STATE|"+string(guest)+"|Running|Halted", "VBD.plug", string(ref))
	r.fails("VM_BAD_POWER_STATE|"+string(guest)+"|Running|Halted", "VBD.unplug", string(ref))
	r.fails("VM_BAD_POWER_STATE|"+string(guest)+"|Running|Halted", "VBD.assert_attachable", string(ref))
	r.fails("VM_BAD_POWER_STATE|"+string(guest)+"|Running|Halted", "VBD.pause", string(ref))

	vbd := r.vbd(r.dom0, disk, "autodetect", "RW")
	export := "vbd/" + record(r.core, vbd).UUID
	r.fails("DEVICE_ALREADY_DETACHED|"+string(vbd), "VBD.unplug", string(vbd))
	r.wantNotAttached("DEVICE_ALREADY_DETACHED", local("1"), export)
	r.fails("DEVICE_ALREADY_DETACHED|"+string(vbd), "VBD.unpause", string(vbd), "")
	r.call("VBD.assert_attachable", string(vbd))
	r.call("VBD.plug", string(vbd))
	r.fails("DEVICE_ALREADY_ATTACHED|"+string(vbd), "VBD.plug", string(vbd))
	r.fails("DEVICE_ALREADY_ATTACHED|"+string(vbd), "VBD.assert_attachable", string(vbd))
	if _, err := r.try(r.root, "VBD.pause", string(vbd)); code(err) != "OPERATION_NOT_ALLOWED" {
		t.Errorf("pause: %v", err)
	}
	uri := "nbd+unix:///" + export + "?socket=/data/nbd.sock"
	got := record(r.core, vbd)
	if !got.CurrentlyAttached || got.Device != uri || got.RuntimeProperties["coppice:nbd-uri"] != uri {
		t.Errorf("plugged: %+v", got)
	}
	r.fails("VDI_IN_USE|"+string(disk)+"|destroy", "VDI.destroy", disk)
	r.wantNotAttached("VDI_IN_USE", local("1"), "rw/"+id)
	other := r.vbd(r.dom0, disk, "autodetect", "RW")
	r.fails("VDI_IN_USE|"+string(disk)+"|nbd", "VBD.plug", string(other))
	r.fails("VDI_IN_USE|"+string(disk)+"|nbd", "VBD.assert_attachable", string(other))

	a, b := r.attach(local("1"), export), r.attach(local("2"), export)
	if _, err := a.Volume.WriteAt([]byte("x"), 0); err != nil {
		t.Error(err)
	}
	r.fails("DEVICE_DETACH_REJECTED|VBD|"+string(vbd)+"|NBD clients are connected: 2", "VBD.unplug", string(vbd))
	r.call("VBD.unplug_force", string(vbd))
	<-a.Context.Done()
	<-b.Context.Done()
	if got := record(r.core, vbd); got.CurrentlyAttached || got.Device != "" || len(got.RuntimeProperties) != 0 {
		t.Errorf("unplugged: %+v", got)
	}
	r.wantNotAttached("DEVICE_ALREADY_DETACHED", local("1"), export)
	a.Close()
	b.Close()
	r.attach(local("3"), "rw/"+id).Close() // the disk is free

	// A plugged VBD is not plugged any more after a restart.
	r.call("VBD.plug", string(vbd))
	r.restart()
	if got := record(r.core, vbd); got.CurrentlyAttached || got.Device != "" {
		t.Errorf("after a restart: %+v", got)
	}
	r.call("VBD.plug", string(vbd))
	r.call("VBD.unplug", string(vbd))
	snap := r.call("VDI.snapshot", disk).(vdiRef)
	ro := r.vbd(r.dom0, snap, "autodetect", "RO")
	r.call("VBD.plug", string(ro))
	if at := r.attach(local("1"), "vbd/"+record(r.core, ro).UUID); !at.ReadOnly {
		t.Error("an RO VBD gives a writable disk")
	} else {
		at.Close()
	}
	r.call("VBD.unplug", string(ro))
	r.wantConsistent()
}

func TestNBDChanged(t *testing.T) {
	r := nbdRig(t)
	disk := r.disk(4 << 20)
	snap := r.call("VDI.snapshot", disk).(vdiRef)
	base := record(r.core, snap).UUID
	r.write(disk, bytes.Repeat([]byte{1}, 8192), 1<<20)
	at := r.attach(local("1"), record(r.core, disk).UUID)
	defer at.Close()
	changed, err := r.NBDChanged(at, base)
	if err != nil {
		t.Fatal(err)
	}
	var got []storage.Extent
	for e, err := range changed(context.Background(), 0, 4<<20) {
		if err != nil {
			t.Fatal(err)
		}
		got = append(got, e)
	}
	if want := []storage.Extent{{Off: 1 << 20, Len: 8192}}; !slices.Equal(got, want) {
		t.Errorf("changed %v, want %v", got, want)
	}
	for range changed(context.Background(), 0, 1<<20) {
		t.Error("a change behind the range")
	}
	if _, err := r.NBDChanged(at, "11111111-2222-4333-8444-555555555555"); code(err) != xapi.ErrUUIDInvalid {
		t.Errorf("unknown base: %v", err)
	}
	if err := r.NBDComparable(local("1"), record(r.core, disk).UUID, base); err != nil {
		t.Errorf("comparable: %v", err)
	}
}
