package main

import (
	"bytes"
	"fmt"
	"io"
	"net/http"
	"path/filepath"
	"strings"
	"testing"
)

// must is call for what cannot fail.
func (p *process) must(t *testing.T, method string, params ...any) any {
	t.Helper()
	v, err := p.call(method, params...)
	if err != nil {
		t.Fatalf("%s: %v", method, err)
	}
	return v
}

// upload fills a disk with a byte.
func (p *process) upload(t *testing.T, session, vdi string, fill byte, size int) {
	t.Helper()
	task := p.must(t, "task.create", session, "upload", "")
	url := fmt.Sprintf("%s/import_raw_vdi?session_id=%s&vdi=%s&format=raw&task_id=%s", p.url, session, vdi, task)
	req, err := http.NewRequest(http.MethodPut, url, bytes.NewReader(bytes.Repeat([]byte{fill}, size)))
	if err != nil {
		t.Fatal(err)
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := io.Copy(io.Discard, resp.Body); err != nil { // the answer ends with the upload
		t.Fatal(err)
	}
	resp.Body.Close()
	status := any("pending")
	for status == "pending" {
		status = p.must(t, "task.get_status", session, task)
	}
	if resp.StatusCode != http.StatusOK || status != "success" {
		t.Fatalf("upload: %s, task %v", resp.Status, status)
	}
}

// TestKillRevert kills a server while it reverts a VM of two disks from one
// snapshot to another and back, with an undo snapshot each time. Whenever it
// starts again, the disks and the record of the VM are those of one and the
// same snapshot, and the store is sound.
func TestKillRevert(t *testing.T) {
	data := filepath.Join(t.TempDir(), "data")
	flags := []string{"--admin-password-file", writePassword(t), "--nbd", "off"}
	const size = 2 << 20
	p := startProcess(t, data, flags...)
	session := p.login(t)
	pools := p.must(t, "pool.get_all", session).([]any)
	sr := p.must(t, "pool.get_default_SR", session, pools[0])
	p.must(t, "pool.add_to_other_config", session, pools[0], "coppice:undo", "true")
	templates := p.must(t, "VM.get_by_name_label", session, "Other install media").([]any)
	vm := p.must(t, "VM.clone", session, templates[0], "guest")
	p.must(t, "VM.provision", session, vm)
	var disks []string
	for n := range 2 {
		vdi := p.must(t, "VDI.create", session, map[string]any{
			"SR": sr, "virtual_size": size, "type": "user", "sharable": false, "read_only": false,
			"other_config": map[string]any{}, "name_label": "disk",
		}).(string)
		p.must(t, "VBD.create", session, map[string]any{
			"VM": vm, "VDI": vdi, "userdevice": fmt.Sprint(n), "bootable": false, "mode": "RW", "type": "Disk", "empty": false,
			"other_config": map[string]any{}, "qos_algorithm_type": "", "qos_algorithm_params": map[string]any{},
		})
		disks = append(disks, vdi)
	}
	sums := map[any]any{} // of the disks, by snapshot
	var snaps []any
	for _, fill := range []byte{'a', 'b'} {
		for _, vdi := range disks {
			p.upload(t, session, vdi, fill, size)
		}
		snap := p.must(t, "VM.snapshot", session, vm, string(fill))
		snaps = append(snaps, snap)
		sums[snap] = p.must(t, "VDI.checksum", session, disks[0])
	}

	for round := range 6 {
		reverted := make(chan struct{})
		go func() {
			defer close(reverted)
			for i := range 100 {
				if _, err := p.call("VM.revert", session, snaps[(round+i)%2]); err != nil {
					return // killed, or in the middle of it
				}
			}
		}()
		for range 5 + 7*round { // some time
			if _, err := p.call("VM.get_uuid", session, vm); err != nil {
				t.Fatal(err)
			}
		}
		if err := p.cmd.Process.Kill(); err != nil {
			t.Fatal(err)
		}
		_ = p.cmd.Wait()
		<-reverted

		if got := runCommand(t, "check", "--data", data); got.code != exitOK || !strings.Contains(got.stdout, "no problems") {
			t.Fatalf("round %d: check: exit code %d\n%s%s", round, got.code, got.stdout, got.stderr)
		}
		p = startProcess(t, data, flags...)
		session = p.login(t)
		parent := p.must(t, "VM.get_parent", session, vm)
		want, ok := sums[parent]
		if !ok {
			t.Fatalf("round %d: the parent is %v", round, parent)
		}
		for n, vdi := range disks {
			if got := p.must(t, "VDI.checksum", session, vdi); got != want {
				t.Errorf("round %d: disk %d is %v, the VM's parent says %v", round, n, got, want)
			}
		}
		// The VM and its snapshots have all of their disks, and there are no others.
		owned := map[any]bool{}
		for _, ref := range append(p.must(t, "VM.get_snapshots", session, vm).([]any), vm) {
			for _, vbd := range p.must(t, "VM.get_VBDs", session, ref).([]any) {
				owned[p.must(t, "VBD.get_VDI", session, vbd)] = true
			}
		}
		if all := p.must(t, "VDI.get_all", session).([]any); len(all) != len(owned) {
			t.Errorf("round %d: %d disks, VMs have %d", round, len(all), len(owned))
		}
	}
}
