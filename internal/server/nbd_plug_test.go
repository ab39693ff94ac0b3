package server

import (
	"bytes"
	"errors"
	"net/url"
	"strings"
	"testing"

	"coppice/internal/nbd"
)

// token asks for a way to a disk that needs no session, and returns the name of
// the export.
func (r *faultRig) token(vdi, mode string) string {
	r.t.Helper()
	host := r.must("host.get_all").([]any)[0]
	said := r.must("host.call_plugin", host, "coppice", "nbd", map[string]any{"vdi": vdi, "mode": mode}).(string)
	_, after, ok := strings.Cut(said, "once/")
	if !ok {
		r.t.Fatalf("no token in %q", said)
	}
	name, _, _ := strings.Cut(strings.Fields(after)[0], "?")
	return "once/" + name
}

// TestNBDPlugBesideWrites pulls the plug of a VBD while its clients write: not
// as long as they are asked for, at once when it is forced. What was answered is
// there.
func TestNBDPlugBesideWrites(t *testing.T) {
	r := newFaultRig(t, &faultHost{options: smallRegions()})
	ref, uuid := r.newDisk(r.defaultSR(), 8<<20)
	host := r.must("host.get_all").([]any)[0]
	vbd := r.must("VBD.create", map[string]any{
		"VM": r.must("host.get_control_domain", host), "VDI": ref, "userdevice": "autodetect", "bootable": false, "mode": "RW",
		"type": "Disk", "unpluggable": true, "empty": false, "other_config": map[string]any{}, "qos_algorithm_type": "",
		"qos_algorithm_params": map[string]any{},
	})
	export := "vbd/" + r.must("VBD.get_uuid", vbd).(string)
	s := &storm{}
	for range 2 {
		r.must("VBD.plug", vbd)
		s.start(func() *nbd.Client { return r.open(export) })
		s.more(t, 10)
		r.wantCode("DEVICE_DETACH_REJECTED", "VBD.unplug", vbd)
		s.more(t, 10)
		r.must("VBD.unplug_force", vbd)
		s.running.Wait()
		for i, err := range s.ended {
			if !errors.Is(err, nbd.ErrDisconnected) {
				t.Errorf("writer %d after the unplug: %v", i, err)
			}
		}
		c := r.open("rw/" + uuid)
		s.check(t, "after the unplug", c, s.answered())
		if err := c.Close(); err != nil {
			t.Error(err)
		}
	}
	_, err := r.onSocket(t).Go(export)
	wantRefusal(t, "a VBD that is not plugged", err, nbd.ErrUnknown)
}

// TestNBDTokenShared has two connections come with one token, others with
// another one, and the disk go.
func TestNBDTokenShared(t *testing.T) {
	r := newFaultRig(t, &faultHost{options: smallRegions()})
	ref, uuid := r.newDisk(r.defaultSR(), 1<<20)
	writer, another := r.token(uuid, "rw"), r.token(uuid, "rw")
	first, err := r.overTLS(t).Go(writer)
	if err != nil {
		t.Fatal(err)
	}
	second, err := r.overTLS(t).Go("/" + writer)
	if err != nil {
		t.Fatalf("the same token again: %v", err)
	}
	p, got := []byte("one disk"), make([]byte, 8)
	if _, err := first.WriteAt(p, 100); err != nil {
		t.Fatal(err)
	}
	if _, err := second.ReadAt(got, 100); err != nil || !bytes.Equal(got, p) {
		t.Errorf("the other connection reads %q, %v", got, err)
	}
	_, err = r.overTLS(t).Go(another)
	wantRefusal(t, "another writer", err, nbd.ErrPolicy)
	_, err = r.overTLS(t).Go(writer + url.QueryEscape("x"))
	wantRefusal(t, "a token that is none", err, nbd.ErrPolicy)
	scratch, err := r.overTLS(t).Go(r.token(uuid, "cow"))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := scratch.WriteAt([]byte("mine"), 100); err != nil {
		t.Error(err)
	}
	if _, err := first.ReadAt(got, 100); err != nil || !bytes.Equal(got, p) {
		t.Errorf("the disk has what was written to a clone: %q, %v", got, err)
	}
	late := r.token(uuid, "ro")
	for _, c := range []*nbd.Client{first, second} {
		if err := c.Close(); err != nil {
			t.Error(err)
		}
	}
	r.must("VDI.destroy", ref)
	if _, err := scratch.ReadAt(got, 100); err != nil || !bytes.Equal(got, []byte("minedisk")) {
		t.Errorf("the clone of a disk that is gone: %q, %v", got, err)
	}
	for _, name := range []string{late, writer} {
		_, err = r.overTLS(t).Go(name)
		wantRefusal(t, "a token of a disk that is gone", err, nbd.ErrUnknown)
	}
}
