package server

import (
	"encoding/binary"
	"fmt"
	"sync/atomic"
	"testing"

	"coppice/internal/nbd"
)

// guest makes a VM with disks and returns its reference and their uuids, in
// the order of its devices.
func (r *faultRig) guest(disks int) (vm string, uuids []string) {
	r.t.Helper()
	for _, template := range r.must("VM.get_by_name_label", "Other install media").([]any) {
		vm = r.must("VM.clone", template, "guest").(string)
	}
	r.must("VM.provision", vm)
	sr := r.defaultSR()
	for i := range disks {
		ref, uuid := r.newDisk(sr, 2<<20)
		r.must("VBD.create", map[string]any{
			"VM": vm, "VDI": ref, "userdevice": fmt.Sprint(i), "bootable": false, "mode": "RW", "type": "Disk",
			"unpluggable": true, "empty": false, "other_config": map[string]any{}, "qos_algorithm_type": "",
			"qos_algorithm_params": map[string]any{},
		})
		uuids = append(uuids, uuid)
	}
	return vm, uuids
}

// disksOf returns the uuids of the disks of a VM in the order of its devices.
func (r *faultRig) disksOf(vm string) []string {
	r.t.Helper()
	byDevice := map[string]string{}
	for _, vbd := range r.must("VM.get_VBDs", vm).([]any) {
		record := r.must("VBD.get_record", vbd).(map[string]any)
		byDevice[record["userdevice"].(string)] = r.must("VDI.get_uuid", record["VDI"]).(string)
	}
	var uuids []string
	for i := range byDevice {
		uuids = append(uuids, i)
	}
	for i := range uuids {
		uuids[i] = byDevice[fmt.Sprint(i)]
	}
	return uuids
}

// counter reads what the last write to a disk was.
func (r *faultRig) counter(uuid string) uint64 {
	r.t.Helper()
	c := r.open(uuid)
	p := make([]byte, 8)
	if _, err := c.ReadAt(p, 4096); err != nil {
		r.t.Fatal(err)
	}
	if err := c.Close(); err != nil {
		r.t.Error(err)
	}
	return binary.LittleEndian.Uint64(p)
}

// TestNBDSnapshotsOfVMs has a client write to the disks of a VM in turn, each
// write after the answer to the one before, while the VM is snapshotted: the
// disks of a snapshot are of one instant. The VM cannot be reverted meanwhile, and
// can afterwards.
func TestNBDSnapshotsOfVMs(t *testing.T) {
	r := newFaultRig(t, &faultHost{options: smallRegions()})
	const disks = 3
	vm, uuids := r.guest(disks)
	var open [disks]*nbd.Client
	for i, uuid := range uuids {
		open[i] = r.open("rw/" + uuid)
	}
	var written atomic.Uint64 // to all disks
	stop, ended := make(chan struct{}), make(chan error, 1)
	go func() {
		p := make([]byte, 8)
		for n := uint64(1); ; n++ {
			binary.LittleEndian.PutUint64(p, n)
			for _, c := range open {
				if _, err := c.WriteAt(p, 4096); err != nil {
					ended <- err
					return
				}
			}
			written.Store(n)
			select {
			case <-stop:
				ended <- nil
				return
			default:
			}
		}
	}()
	var last string
	var shown uint64
	for round := range 8 {
		before := written.Load()
		last = r.must("VM.snapshot", vm, fmt.Sprint("snapshot ", round)).(string)
		copies := r.disksOf(last)
		if len(copies) != disks {
			t.Fatalf("a snapshot of %d disks, want %d", len(copies), disks)
		}
		first := r.counter(copies[0])
		if first < before {
			t.Errorf("snapshot %d shows write %d, %d was answered before", round, first, before)
		}
		for i, uuid := range copies {
			// Write n reaches the first disk first.
			n := r.counter(uuid)
			if n > first || n+1 < first {
				t.Errorf("snapshot %d: disk %d shows write %d beside %d on the first", round, i, n, first)
			}
			shown = n
		}
	}
	r.wantCode("VDI_IN_USE", "VM.revert", last)
	close(stop)
	if err := <-ended; err != nil {
		t.Fatal(err)
	}
	for _, c := range open {
		if err := c.Close(); err != nil {
			t.Error(err)
		}
	}
	r.must("VM.revert", last)
	if got := r.counter(r.disksOf(vm)[disks-1]); got != shown {
		t.Errorf("after the revert the last disk shows write %d, want %d", got, shown)
	}
}
