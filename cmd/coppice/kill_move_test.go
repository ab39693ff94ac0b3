package main

import (
	"fmt"
	"io"
	"maps"
	"math/rand/v2"
	"net/http"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
)

// kill ends the server at once, checks its stores, and starts it again.
func (w *world) kill() {
	w.Helper()
	if err := w.cmd.Process.Kill(); err != nil {
		w.Fatal(err)
	}
	_ = w.cmd.Wait()
	if got := runCommand(w.T, "check", "--data", w.data); got.code != exitOK || !strings.Contains(got.stdout, "no problems") {
		w.Fatalf("check: exit code %d\n%s%s", got.code, got.stdout, got.stderr)
	}
	w.process = nil
	w.restart()
}

// used is what an SR takes now, in bytes.
func (w *world) used(sr any) int {
	w.Helper()
	w.do("SR.scan", sr)
	n, err := strconv.Atoi(fmt.Sprint(w.do("SR.get_physical_utilisation", sr)))
	if err != nil {
		w.Fatal(err)
	}
	return n
}

// wantUsed waits until an SR takes no more than it did, but for some metadata:
// what is given up goes in the background.
func (w *world) wantUsed(sr any, before int) {
	w.Helper()
	got := 0
	for range 1000 {
		if got = w.used(sr); got <= before+2<<20 {
			return
		}
	}
	w.Errorf("%d bytes are used, there were %d", got, before)
}

// wantFree checks that no object of a class is busy.
func (w *world) wantFree(class string) {
	w.Helper()
	for ref, r := range w.do(class + ".get_all_records").(map[string]any) {
		if busy := r.(map[string]any)["current_operations"].(map[string]any); len(busy) > 0 {
			w.Errorf("%s %s is busy after the start: %v", class, ref, busy)
		}
	}
}

// guest makes a VM with disks.
func (w *world) guest(disks ...string) string {
	w.Helper()
	template := w.do("VM.get_by_name_label", "Other install media").([]any)[0]
	vm := w.do("VM.clone", template, "guest").(string)
	w.do("VM.provision", vm)
	for n, vdi := range disks {
		w.do("VBD.create", map[string]any{
			"VM": vm, "VDI": vdi, "userdevice": fmt.Sprint(n), "bootable": false, "mode": "RW", "type": "Disk", "empty": false,
			"other_config": map[string]any{}, "qos_algorithm_type": "", "qos_algorithm_params": map[string]any{},
		})
	}
	return vm
}

// until polls a few times whether something has come about, and gives up then.
func (w *world) until(done <-chan struct{}, calls int) {
	for range calls {
		select {
		case <-done:
			return
		default:
			w.do("pool.get_all")
		}
	}
}

// TestKillImport kills a server while it imports a VM, a new one and one that
// replaces an older: afterwards there is the older one, whole, or the new one,
// and nothing else; what the import had stored is free again.
func TestKillImport(t *testing.T) {
	w := &world{T: t, data: filepath.Join(t.TempDir(), "data"), password: writePassword(t)}
	w.restart()
	const size = 6 << 20
	contents := make([]byte, size)
	_, _ = rand.NewChaCha8([32]byte{1}).Read(contents)
	disk := w.disk(size)
	w.upload(t, w.session, disk, 'o', size) // what the older VM has
	vm := w.guest(disk)
	snap := w.do("VM.snapshot", vm, "kept")
	uuid := w.do("VM.get_uuid", vm).(string)
	sr := w.do("VDI.get_SR", disk)

	w.do("VM.set_user_version", vm, 1)
	if status := w.put(disk, contents, size, ""); status != "success" {
		t.Fatalf("upload: %s", status)
	}
	resp, err := http.Get(fmt.Sprintf("%s/export?session_id=%s&ref=%s", w.url, w.session, vm))
	if err != nil {
		t.Fatal(err)
	}
	archive, err := io.ReadAll(resp.Body)
	resp.Body.Close()
	if err != nil || resp.StatusCode != http.StatusOK {
		t.Fatalf("export: %s, %v", resp.Status, err)
	}
	newSum := w.do("VDI.checksum", disk)
	w.upload(t, w.session, disk, 'o', size)
	oldSum := w.do("VDI.checksum", disk)
	older := w.do("VM.get_all_records").(map[string]any)
	disks := w.do("VDI.get_all").([]any)
	used := w.used(sr)

	for round := range 6 {
		restore := round%2 == 1
		query := ""
		if restore {
			query = "&restore=true&force=true"
		}
		task := w.do("task.create", "import", "").(string)
		limit := len(archive)
		if round < 4 {
			limit = (round + 1) * len(archive) / 6
		}
		target := fmt.Sprintf("%s/import?session_id=%s&task_id=%s&sr_id=%s%s", w.url, w.session, task, sr, query)
		gate, sent, done := make(chan struct{}), make(chan struct{}), make(chan struct{})
		go func() {
			defer close(done)
			req, err := http.NewRequest(http.MethodPut, target, &pausing{data: archive, at: limit, sent: sent, gate: gate})
			if err != nil {
				return
			}
			req.ContentLength = int64(len(archive))
			if resp, err := http.DefaultClient.Do(req); err == nil {
				_, _ = io.Copy(io.Discard, resp.Body)
				resp.Body.Close()
			}
		}()
		<-sent
		if limit == len(archive) {
			close(gate)
			w.until(done, 3*round) // around the commit
		}
		w.kill()
		if limit < len(archive) {
			close(gate)
		}
		<-done

		w.wantFree("VM")
		w.wantFree("VDI")
		w.wantFree("SR")
		now := w.do("VM.get_all_records").(map[string]any)
		_, err := w.call("VM.get_uuid", w.session, vm)
		replaced := err != nil
		var added []string
		for ref := range now {
			if older[ref] == nil {
				added = append(added, ref)
			}
		}
		switch {
		case limit < len(archive) && (replaced || len(added) > 0):
			t.Fatalf("round %d: half an archive makes %d VMs, replaced %v", round, len(added), replaced)
		case len(added) > 1, restore && replaced != (len(added) == 1), !restore && replaced:
			t.Fatalf("round %d: %d new VMs, the older one replaced: %v", round, len(added), replaced)
		}
		if len(added) == 1 {
			w.wantDisk(added[0], newSum)
			if restore {
				if got := w.do("VM.get_uuid", added[0]); got != uuid {
					t.Errorf("round %d: the new VM is %v, want %v", round, got, uuid)
				}
				if of := w.do("VM.get_snapshot_of", snap); of != added[0] {
					t.Errorf("round %d: the snapshot is one of %v", round, of)
				}
				vm = added[0]
				older = now
			} else {
				w.remove(added[0])
			}
		}
		if !replaced {
			w.wantDisk(vm, oldSum)
		} else { // the disk of the older VM stays, as after VM.destroy
			if got := w.do("VDI.checksum", disk); got != oldSum {
				t.Errorf("round %d: the disk of the older VM is %v, want %v", round, got, oldSum)
			}
			oldSum = newSum
			disk = w.disksOf(vm)[0]
			disks = w.do("VDI.get_all").([]any)
			used = w.used(sr)
		}
		if left := w.do("VDI.get_all").([]any); len(left) != len(disks) {
			t.Errorf("round %d: %d disks, want %d", round, len(left), len(disks))
		}
		w.wantUsed(sr, used)
	}
}

// disksOf lists the disks of a VM.
func (w *world) disksOf(vm string) (disks []string) {
	w.Helper()
	for _, vbd := range w.do("VM.get_VBDs", vm).([]any) {
		disks = append(disks, w.do("VBD.get_VDI", vbd).(string))
	}
	return disks
}

// wantDisk checks what the only disk of a VM holds.
func (w *world) wantDisk(vm string, sum any) {
	w.Helper()
	disks := w.disksOf(vm)
	if len(disks) != 1 {
		w.Fatalf("the VM has %d disks", len(disks))
	}
	if got := w.do("VDI.checksum", disks[0]); got != sum {
		w.Errorf("the disk of the VM is %v, want %v", got, sum)
	}
}

// remove destroys a VM with its disks.
func (w *world) remove(vm string) {
	w.Helper()
	disks := w.disksOf(vm)
	w.do("VM.destroy", vm)
	for _, d := range disks {
		w.do("VDI.destroy", d)
	}
}

// pausing is a body that stops at a place until the gate opens, and ends there
// with an error.
type pausing struct {
	data       []byte
	at, pos    int
	sent, gate chan struct{}
}

func (p *pausing) Read(b []byte) (int, error) {
	if p.pos == p.at {
		if p.sent != nil {
			close(p.sent)
			p.sent = nil
		}
		<-p.gate
		return 0, io.EOF
	}
	n := copy(b, p.data[p.pos:p.at])
	p.pos += n
	return n, nil
}

// TestKillMigrate kills a server while a disk of a VM moves to another SR and
// back: the disk is whole, in one of them and in no other, the VM and the
// snapshots have it, and what the other SR had of it is free again.
func TestKillMigrate(t *testing.T) {
	w := &world{T: t, data: filepath.Join(t.TempDir(), "data"), password: writePassword(t)}
	w.restart()
	const size = 8 << 20
	contents := make([]byte, size)
	_, _ = rand.NewChaCha8([32]byte{2}).Read(contents)
	disk := w.disk(size)
	if status := w.put(disk, contents, size, ""); status != "success" {
		t.Fatalf("upload: %s", status)
	}
	sum := w.do("VDI.checksum", disk)
	vm := w.guest(disk)
	snap := w.do("VDI.snapshot", disk)
	host := w.do("host.get_all").([]any)[0]
	srs := []any{
		w.do("VDI.get_SR", disk),
		w.do("SR.create", host, map[string]any{}, "0", "second", "", "cow", "user", false, map[string]any{}),
	}
	full := w.used(srs[0])
	empty := w.used(srs[1])
	for round := range 4 {
		from := slices.Index(srs, w.do("VDI.get_SR", disk))
		done := make(chan struct{})
		p, session := w.process, w.session
		go func() {
			defer close(done)
			_, _ = p.call("VDI.pool_migrate", session, disk, srs[1-from], map[string]any{}) // which the kill may cut off
		}()
		w.until(done, 6*round)
		w.kill()
		<-done
		w.wantFree("VM")
		w.wantFree("VDI")
		w.wantFree("SR")
		all := w.do("VDI.get_all_records").(map[string]any)
		w.wantDisk(vm, sum)
		disk = w.disksOf(vm)[0]
		if want := slices.Sorted(slices.Values([]string{disk, snap.(string)})); !slices.Equal(slices.Sorted(maps.Keys(all)), want) {
			t.Fatalf("round %d: disks %v, want %v", round, slices.Sorted(maps.Keys(all)), want)
		}
		if of := w.do("VDI.get_snapshot_of", snap); of != disk {
			t.Errorf("round %d: the snapshot is one of %v, not of %v", round, of, disk)
		}
		if got := w.do("VDI.checksum", snap); got != sum {
			t.Errorf("round %d: the snapshot is %v, want %v", round, got, sum)
		}
		if slices.Index(srs, w.do("VDI.get_SR", disk)) == 0 {
			w.wantUsed(srs[1], empty)
		}
		w.wantUsed(srs[0], full+size) // the snapshot's, and those of a copy that came back
	}
}
