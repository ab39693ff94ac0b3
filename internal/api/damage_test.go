package api

import (
	"bytes"
	"context"
	"encoding/json"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"coppice/internal/storage"
	"coppice/internal/storage/cow"
	"coppice/internal/xapi"
)

// plugin calls a function of our plugin and decodes its answer.
func plugin[T any](r *rig, fn string, args map[string]string) (answer T) {
	r.t.Helper()
	text := r.call("host.call_plugin", r.host, "coppice", fn, args).(string)
	if err := json.Unmarshal([]byte(text), &answer); err != nil {
		r.t.Fatalf("%s answers %q: %v", fn, text, err)
	}
	return answer
}

// flip changes one byte of what the store has of some bytes of a disk.
func (r *rig) flip(old []byte) {
	r.t.Helper()
	f, err := os.OpenFile(filepath.Join(r.dir, defaultStore, "space-0000"), os.O_RDWR, 0)
	if err != nil {
		r.t.Fatal(err)
	}
	defer f.Close()
	buf := make([]byte, 1<<20)
	for off := int64(0); ; off += int64(len(buf)) {
		n, err := f.ReadAt(buf, off)
		if i := bytes.Index(buf[:n], old); i >= 0 {
			if _, err := f.WriteAt([]byte{old[0] ^ 1}, off+int64(i)); err != nil {
				r.t.Fatal(err)
			}
			return
		}
		if err == io.EOF {
			r.t.Fatal("the store does not have these bytes")
		} else if err != nil {
			r.t.Fatal(err)
		}
	}
}

// noisyDisk is a disk of 4 MiB full of bytes that occur once.
func (r *rig) noisyDisk() (vdiRef, []byte) {
	r.t.Helper()
	ref := r.disk(4 << 20)
	data := make([]byte, 4<<20)
	_, _ = rand.NewChaCha8([32]byte{1}).Read(data)
	r.write(ref, data, 0)
	return ref, data
}

// A damaged disk is told by a scrub, in its record, its SR's and an alert; it
// is not exported or copied, but what is whole of it can be had; and all of
// that ends when it is made good.
func TestDamage(t *testing.T) {
	r := newRigOn(t, cow.Driver())
	disk, data := r.noisyDisk()
	whole := r.call("VDI.clone", r.disk(2<<20)).(vdiRef)
	srUUID := record(r.core, r.sr).UUID
	scrub := func() scrubReport { return plugin[scrubReport](r, "sr-scrub", map[string]string{"sr": srUUID}) }
	if got := scrub(); len(got.Problems) != 0 || got.SR != srUUID {
		t.Fatalf("a sound store has %+v", got)
	}
	if got := record(r.core, r.sr).SMConfig; got[scrubbedKey] == "" || got[damagedKey] != "" || got[brokenKey] != "" {
		t.Errorf("sm_config of the SR: %v", got)
	}

	r.flip(data[1<<20 : 1<<20+storage.Unit])
	r.flip(data[3<<20 : 3<<20+storage.Unit])
	r.flip(data[3<<20+storage.Unit : 3<<20+2*storage.Unit])
	uuid := record(r.core, disk).UUID
	got := scrub()
	offsets := []int64{}
	for _, p := range got.Problems {
		if p.VDI != uuid || p.Length != storage.Unit {
			t.Errorf("problem %+v", p)
		}
		offsets = append(offsets, p.Offset)
	}
	slices.Sort(offsets)
	if want := []int64{1 << 20, 3 << 20, 3<<20 + storage.Unit}; !slices.Equal(offsets, want) {
		t.Fatalf("problems at %d, want %d", offsets, want)
	}
	for range 2 {
		if got := record(r.core, disk).SMConfig[damagedKey]; got != "1048576+4096 3145728+8192" {
			t.Errorf("the disk is damaged at %q", got)
		}
		if got := record(r.core, r.sr).SMConfig[damagedKey]; got != "1" {
			t.Errorf("the SR has %q damaged disks", got)
		}
		if got := record(r.core, whole).SMConfig[damagedKey]; got != "" {
			t.Errorf("a whole disk is damaged at %q", got)
		}
		if n := r.count(damageAlert); n != 1 {
			t.Errorf("%d alerts, want one", n)
		}
		scrub()
	}

	ioError := "VDI_IO_ERROR|Device I/O errors at byte 1048576 of VDI " + uuid
	r.fails(ioError, "VDI.copy", disk, string(r.sr))
	r.fails(ioError, "VDI.checksum", disk)
	_, err := r.Export(t.Context(), trusted, TransferRequest{Session: string(r.root), Action: "get_export_raw_vdi", VDI: string(disk)})
	if description(err) != ioError {
		t.Errorf("export: %v", err)
	}
	v := r.volume(disk)
	p := make([]byte, 1<<20)
	if _, err := v.ReadAt(p, 2<<20); err != nil || !bytes.Equal(p, data[2<<20:3<<20]) {
		t.Errorf("what is whole of it cannot be read: %v", err)
	}
	if err := v.Close(); err != nil {
		t.Fatal(err)
	}

	r.restart() // the storage has forgotten what it knew
	if err := r.refresh(t.Context()); err != nil {
		t.Fatal(err)
	}
	disk = r.ref(uuid)
	if got := record(r.core, disk).SMConfig[damagedKey]; got != "1048576+4096 3145728+8192" {
		t.Errorf("after a restart the disk is damaged at %q", got)
	}
	r.write(disk, data, 0)
	if sum := r.call("VDI.checksum", disk); sum == "" {
		t.Error("no checksum")
	}
	scrub()
	if got := record(r.core, disk).SMConfig[damagedKey] + record(r.core, r.sr).SMConfig[damagedKey]; got != "" {
		t.Errorf("made good it is damaged at %q", got)
	}
	r.wantConsistent()
}

// refresh does what the server does now and then.
func (r *rig) refresh(ctx context.Context) error {
	repo, err := r.repos.get(r.sr)
	if err != nil {
		return err
	}
	return r.noteDamage(ctx, repo, false)
}

// A read that meets damage tells of it, without a scrub.
func TestDamageMetByRead(t *testing.T) {
	r := newRigOn(t, cow.Driver())
	disk, data := r.noisyDisk()
	r.flip(data[2<<20 : 2<<20+storage.Unit])
	if _, err := r.try(r.root, "VDI.checksum", disk); code(err) != "VDI_IO_ERROR" {
		t.Fatalf("checksum: %v", err)
	}
	for range 2 {
		if err := r.refresh(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	if got := record(r.core, disk).SMConfig[damagedKey]; got != "2097152+4096" || r.count(damageAlert) != 1 {
		t.Errorf("damaged at %q, %d alerts", got, r.count(damageAlert))
	}
	// The volume's copy of the record does not take this along.
	r.call("VDI.set_name_label", disk, "named")
	repo, err := r.repos.get(r.sr)
	if err != nil {
		t.Fatal(err)
	}
	info, err := repo.Stat(t.Context(), volumeID(record(r.core, disk)))
	if err != nil || strings.Contains(string(info.Attrs), damagedKey) {
		t.Errorf("attributes %s, %v", info.Attrs, err)
	}
}

// A scrub is a task: it can be cancelled, keeps its SR attached and runs once
// at a time.
func TestScrubTask(t *testing.T) {
	onDrivers(t, func(t *testing.T, r *rig) {
		disk, _ := r.noisyDisk()
		srUUID := record(r.core, r.sr).UUID
		slow := map[string]string{"sr": srUUID, "rate": "1000000"}
		task := r.call("Async.host.call_plugin", r.host, "coppice", "sr-scrub", slow).(xapi.Ref[xapi.Task])
		repo, err := r.repos.get(r.sr)
		if err != nil {
			t.Fatal(err)
		}
		for seen := r.db.Revision(); record(r.core, task).Progress == 0; seen = r.db.Revision() {
			if err := r.db.Wait(t.Context(), seen); err != nil {
				t.Fatal(err)
			}
		}
		r.fails("OTHER_OPERATION_IN_PROGRESS|SR|"+string(r.sr)+"|sr-scrub|"+string(task), "host.call_plugin", r.host, "coppice", "sr-scrub", slow)
		r.fails("SR_BACKEND_FAILURE_16||The SR is in use [opterr=a disk is being filled, or the SR is looked through]|", "PBD.unplug", r.pbd(r.sr))
		r.call("task.cancel", task)
		r.wait(task)
		if got := record(r.core, task); got.Status != xapi.TaskStatusTypeCancelled {
			t.Errorf("the task is %s %v", got.Status, got.ErrorInfo)
		}
		if got := record(r.core, r.sr).SMConfig[scrubbedKey]; got != "" {
			t.Errorf("a cancelled scrub counts as done at %s", got)
		}
		if repo.isHeld() {
			t.Error("the SR is still held")
		}
		r.destroy(disk)
	})
}

func TestPluginArguments(t *testing.T) {
	r := newRig(t)
	sr := record(r.core, r.sr).UUID
	for _, c := range []struct {
		fn   string
		args map[string]string
		want string
	}{
		{"sr-scrub", nil, "UUID_INVALID|SR|"},
		{"sr-scrub", map[string]string{"sr": "nobody"}, "UUID_INVALID|SR|nobody"},
		{"sr-scrub", map[string]string{"sr": sr, "rate": "fast"}, "INVALID_VALUE|rate|fast"},
		{"sr-scrub", map[string]string{"sr": sr, "rate": "-1"}, "INVALID_VALUE|rate|-1"},
		{"sr-space", map[string]string{"sr": "nobody"}, "UUID_INVALID|SR|nobody"},
		{"vdi-would-free", nil, "UUID_INVALID|VDI|"},
		{"vdi-would-free", map[string]string{"vdis": "nobody"}, "UUID_INVALID|VDI|nobody"},
		{"nothing", nil, "XENAPI_PLUGIN_FAILURE|unknown function|nothing|"},
	} {
		r.fails(c.want, "host.call_plugin", r.host, "coppice", c.fn, c.args)
	}
}
