package xecmd_test

import (
	"bytes"
	"context"
	"crypto/md5"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"coppice/internal/nbd"
	"coppice/internal/rpc"
	"coppice/internal/storage"
	"coppice/internal/storage/cow"
	"coppice/internal/storage/mem"
)

// The behaviours that the test suite of XenAPI servers asserts and that need a
// whole server: commands of xe, files, and the disks of the control domain,
// which are opened by the URI that VBD.device is.

// lab is a server that is also spoken to in one dialect, over HTTP.
type lab struct {
	*shell
	dialect rpc.Dialect
	session string
	sr      string // reference
	dom0    string
}

// inLabs runs a test in each dialect, on an SR of another driver, and checks
// that it leaves no disk behind.
func inLabs(t *testing.T, test func(t *testing.T, l *lab)) {
	t.Parallel()
	for name, on := range map[string]struct {
		dialect rpc.Dialect
		driver  storage.Driver
	}{"XML-RPC": {rpc.XMLRPC, mem.Driver()}, "JSON-RPC": {rpc.JSONRPC2, cow.Driver()}} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			l := &lab{shell: newShellOn(t, on.driver), dialect: on.dialect}
			var err error
			if l.session, err = text(l.send("session.login_with_password", "root", password)); err != nil {
				t.Fatal(err)
			}
			l.sr = l.text("SR.get_by_uuid", l.must("sr-list", "--minimal"))
			l.dom0 = l.text("VM.get_by_uuid", l.must("vm-list", "is-control-domain=true", "--minimal"))
			test(t, l)
			if left := l.must("vdi-list", "--minimal"); left != "" && !t.Failed() {
				t.Errorf("disks left: %s", left)
			}
		})
	}
}

// send makes a call over HTTP.
func (l *lab) send(method string, params ...any) (any, error) {
	var body bytes.Buffer
	if err := rpc.WriteCall(&body, l.dialect, 1, method, params...); err != nil {
		return nil, err
	}
	path, kind := "/RPC2", "text/xml"
	if l.dialect == rpc.JSONRPC2 {
		path, kind = "/jsonrpc", "application/json"
	}
	resp, err := http.Post(l.url+path, kind, &body)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	return rpc.ReadResponse(l.dialect, resp.Body, 16<<20)
}

func text(v any, err error) (string, error) {
	s, _ := v.(string)
	return s, err
}

// call makes a call in the session that succeeds.
func (l *lab) call(method string, params ...any) any {
	l.t.Helper()
	v, err := l.send(method, append([]any{l.session}, params...)...)
	if err != nil {
		l.t.Fatalf("%s%q: %v", method, params, err)
	}
	return v
}

func (l *lab) text(method string, params ...any) string {
	l.t.Helper()
	return l.call(method, params...).(string)
}

func (l *lab) list(method string, params ...any) []any {
	l.t.Helper()
	return l.call(method, params...).([]any)
}

// disk makes a disk and returns its reference and uuid.
func (l *lab) disk(size int64, smConfig map[string]any) (ref, uuid string) {
	l.t.Helper()
	ref = l.text("VDI.create", map[string]any{
		"SR": l.sr, "virtual_size": size, "type": "user", "sharable": false, "read_only": false,
		"other_config": map[string]any{}, "sm_config": smConfig, "name_label": "quicktest",
	})
	return ref, l.text("VDI.get_uuid", ref)
}

// plug attaches a disk to the control domain and opens what it gets.
func (l *lab) plug(vdi, mode string) (vbd string, device *nbd.Client) {
	l.t.Helper()
	vbd = l.text("VBD.create", map[string]any{
		"VM": l.dom0, "VDI": vdi, "userdevice": "autodetect", "bootable": false, "mode": mode, "type": "Disk",
		"unpluggable": true, "empty": false, "other_config": map[string]any{}, "qos_algorithm_type": "",
		"qos_algorithm_params": map[string]any{},
	})
	l.call("VBD.plug", vbd)
	uri, err := url.Parse(l.text("VBD.get_device", vbd))
	if err != nil || uri.Scheme != "nbd+unix" {
		l.t.Fatalf("device %v, %v", uri, err)
	}
	return vbd, l.open(strings.TrimPrefix(uri.Path, "/"))
}

// unplug takes a disk from the control domain.
func (l *lab) unplug(vbd string, device *nbd.Client) {
	l.t.Helper()
	if err := device.Close(); err != nil {
		l.t.Error(err)
	}
	l.call("VBD.unplug", vbd)
	l.call("VBD.destroy", vbd)
}

// open opens an export.
func (l *lab) open(export string) *nbd.Client {
	l.t.Helper()
	nc, err := net.Dial("unix", l.nbd)
	if err != nil {
		l.t.Fatal(err)
	}
	l.t.Cleanup(func() { nc.Close() })
	d, err := nbd.Begin(nc)
	if err != nil {
		l.t.Fatal(err)
	}
	c, err := d.Go(export)
	if err != nil {
		l.t.Fatalf("open %s: %v", export, err)
	}
	return c
}

// write puts bytes into a disk.
func (l *lab) write(vdi string, p []byte, off int64) {
	l.t.Helper()
	vbd, c := l.plug(vdi, "RW")
	if _, err := c.WriteAt(p, off); err != nil {
		l.t.Fatal(err)
	}
	if err := c.Flush(context.Background()); err != nil {
		l.t.Fatal(err)
	}
	l.unplug(vbd, c)
}

// sum is the MD5 of all of a disk.
func (l *lab) sum(vdi string) string {
	l.t.Helper()
	vbd, c := l.plug(vdi, "RO")
	h := md5.New()
	if _, err := io.Copy(h, io.NewSectionReader(c, 0, c.Size())); err != nil {
		l.t.Fatal(err)
	}
	l.unplug(vbd, c)
	return fmt.Sprintf("%x", h.Sum(nil))
}

// fill gives a disk of 4 MiB the contents that the suite calls by a name.
func (l *lab) fill(vdi, contents string, rng *rand.Rand) {
	l.t.Helper()
	noise := func(n int) []byte {
		p := make([]byte, n)
		for i := range p {
			p[i] = byte(rng.Uint32())
		}
		return p
	}
	switch contents {
	case "random":
		vbd, c := l.plug(vdi, "RW")
		for range rng.IntN(100) + 1 {
			p := noise(rng.IntN(2<<10-1) + 1)
			// The device takes sectors: what is around an extent is read first.
			off := rng.Int64N(c.Size() - int64(len(p)))
			start, end := off&^511, min((off+int64(len(p))+511)&^511, c.Size())
			sectors := make([]byte, end-start)
			if _, err := c.ReadAt(sectors, start); err != nil {
				l.t.Fatal(err)
			}
			copy(sectors[off-start:], p)
			if _, err := c.WriteAt(sectors, start); err != nil {
				l.t.Fatal(err)
			}
		}
		l.unplug(vbd, c)
	case "full":
		l.write(vdi, noise(4<<20), 0)
	}
}

// destroy destroys disks twice: the second time must be HANDLE_INVALID.
func (l *lab) destroy(vdis ...string) {
	l.t.Helper()
	for _, vdi := range vdis {
		l.call("VDI.destroy", vdi)
		if _, err := l.send("VDI.destroy", l.session, vdi); err == nil || !strings.Contains(err.Error(), "HANDLE_INVALID") {
			l.t.Errorf("destroyed twice: %v", err)
		}
	}
}

func TestQT_VDI_10(t *testing.T) {
	inLabs(t, func(t *testing.T, l *lab) {
		vdi, _ := l.disk(4<<20, nil)
		l.call("VDI.set_tags", vdi, []string{"quick", "test"})
		check := func(when string) {
			t.Helper()
			start := time.Now().Add(-time.Second)
			snap := l.text("VDI.snapshot", vdi)
			end := time.Now().Add(time.Second)
			src, got := l.call("VDI.get_record", vdi).(map[string]any), l.call("VDI.get_record", snap).(map[string]any)
			at, err := time.Parse("20060102T15:04:05Z", got["snapshot_time"].(string))
			if err != nil || at.Before(start) || at.After(end) {
				t.Errorf("%s: snapshot_time %v, %v", when, got["snapshot_time"], err)
			}
			if got["is_a_snapshot"] != true || got["snapshot_of"] != vdi || fmt.Sprint(got["virtual_size"]) != fmt.Sprint(src["virtual_size"]) ||
				got["location"] == src["location"] || fmt.Sprint(got["tags"]) != fmt.Sprint(src["tags"]) {
				t.Errorf("%s: snapshot %v of %v", when, got, src)
			}
			l.call("VDI.update", snap)
			for _, field := range []string{
				"cbt_enabled", "is_a_snapshot", "location", "managed", "name_description", "name_label", "snapshot_of", "snapshot_time", "virtual_size",
			} {
				if now := l.call("VDI.get_"+field, snap); fmt.Sprint(now) != fmt.Sprint(got[field]) {
					t.Errorf("%s: VDI.update changes %s from %v to %v", when, field, got[field], now)
				}
			}
			l.destroy(snap)
		}
		vbd, c := l.plug(vdi, "RW")
		check("plugged")
		l.unplug(vbd, c)
		check("unplugged")
		l.destroy(vdi)
	})
}

func TestQT_VDI_11(t *testing.T) {
	inLabs(t, func(t *testing.T, l *lab) {
		pbd := l.list("SR.get_PBDs", l.sr)[0]
		l.call("PBD.unplug", pbd)
		l.call("PBD.plug", pbd)
		for _, size := range []int64{4 << 20, 1 << 30} {
			vdi, _ := l.disk(size, nil)
			vbd, c := l.plug(vdi, "RW")
			if want := fmt.Sprint(l.call("VDI.get_virtual_size", vdi)); fmt.Sprint(c.Size()) != want {
				t.Errorf("device of %d bytes, virtual_size %s", c.Size(), want)
			}
			l.unplug(vbd, c)
			l.destroy(vdi)
		}
	})
}

func TestQT_VDI_13(t *testing.T) {
	inLabs(t, func(t *testing.T, l *lab) {
		vdi, _ := l.disk(4<<20, nil)
		l.write(vdi, []byte(strings.Repeat("contents", 64)), 0)
		type attachment struct {
			vbd string
			c   *nbd.Client
		}
		var all []attachment
		for range 20 {
			vbd, c := l.plug(vdi, "RO")
			all = append(all, attachment{vbd, c})
		}
		for i, a := range all {
			p := make([]byte, 8)
			if _, err := a.c.ReadAt(p, 0); err != nil || string(p) != "contents" {
				t.Errorf("attachment %d: %q, %v", i, p, err)
			}
		}
		for _, a := range slices.Backward(all) {
			l.unplug(a.vbd, a.c)
		}
		l.destroy(vdi)
	})
}

// Uninstalling a VM removes its disks, its snapshots and theirs.
func TestQT_REV_5(t *testing.T) {
	inLabs(t, func(t *testing.T, l *lab) {
		uuid := l.must("vm-install", "template=Other install media", "new-name-label=quicktest")
		vm := l.text("VM.get_by_uuid", uuid)
		for i := range 2 {
			vdi, _ := l.disk(4<<20, nil)
			l.call("VBD.create", map[string]any{
				"VM": vm, "VDI": vdi, "userdevice": fmt.Sprint(i), "bootable": false, "mode": "RW", "type": "Disk",
				"unpluggable": true, "empty": false, "other_config": map[string]any{"owner": "true"}, "qos_algorithm_type": "",
				"qos_algorithm_params": map[string]any{}, "currently_attached": true,
			})
		}
		first := l.text("VM.snapshot", vm, "first", []string{})
		l.call("VM.snapshot", vm, "second", []string{})
		l.call("VM.revert", first)
		l.must("vm-uninstall", "uuid="+uuid, "--force")
		if left := l.must("vm-list", "is-control-domain=false", "--minimal"); left != "" {
			t.Errorf("VMs left: %s", left)
		}
		if left := l.must("snapshot-list", "--minimal"); left != "" {
			t.Errorf("snapshots left: %s", left)
		}
	})
}

// travels moves disks of each kind of contents through a file into another.
func travels(t *testing.T, format string, smConfig map[string]any) {
	inLabs(t, func(t *testing.T, l *lab) {
		rng := rand.New(rand.NewPCG(3, 4))
		for _, contents := range []string{"empty", "random", "full"} {
			vdi, uuid := l.disk(4<<20, smConfig)
			l.fill(vdi, contents, rng)
			file := contents + "." + format
			l.must("vdi-export", "uuid="+uuid, "filename="+file, "format="+format)
			other, otherUUID := l.disk(4<<20, smConfig)
			l.must("vdi-import", "uuid="+otherUUID, "filename="+file, "format="+format)
			if got, want := l.sum(other), l.sum(vdi); got != want {
				t.Errorf("%s: MD5 %s, want %s", contents, got, want)
			}
			l.destroy(vdi, other)
		}
	})
}

func TestQT_INT_2(t *testing.T) { travels(t, "raw", nil) }
func TestQT_INT_3(t *testing.T) { travels(t, "vhd", nil) }
func TestQT_INT_4(t *testing.T) { travels(t, "tar", nil) }
func TestQT_INT_5(t *testing.T) { travels(t, "qcow2", map[string]any{"image-format": "qcow2"}) }

// A delta to a disk that is not related makes that disk the same.
func TestQT_INT_D(t *testing.T) {
	inLabs(t, func(t *testing.T, l *lab) {
		rng := rand.New(rand.NewPCG(5, 6))
		for _, format := range []string{"vhd", "qcow2"} {
			for _, pair := range [][2]string{
				{"empty", "empty"}, {"random", "empty"}, {"random", "random"}, {"full", "empty"}, {"full", "random"}, {"full", "full"},
			} {
				vdi, uuid := l.disk(4<<20, map[string]any{"image-format": format})
				base, baseUUID := l.disk(4<<20, map[string]any{"image-format": format})
				l.fill(vdi, pair[0], rng)
				l.fill(base, pair[1], rng)
				file := strings.Join(pair[:], "-") + "." + format
				l.must("vdi-export", "uuid="+uuid, "filename="+file, "format="+format, "base="+baseUUID)
				l.must("vdi-import", "uuid="+baseUUID, "filename="+file, "format="+format)
				if got, want := l.sum(base), l.sum(vdi); got != want {
					t.Errorf("%s, %s to %s: MD5 %s, want %s", format, pair[0], pair[1], got, want)
				}
				l.destroy(vdi, base)
			}
		}
	})
}

const maxSize = 2040 << 30

// largest makes the largest disk that a VHD can hold, with something at its end.
func (l *lab) largest() (vdi, uuid string) {
	l.t.Helper()
	vdi, uuid = l.disk(maxSize, map[string]any{"image-format": "vhd"})
	if got := fmt.Sprint(l.call("VDI.get_virtual_size", vdi)); got != fmt.Sprint(int64(maxSize)) {
		l.t.Fatalf("virtual_size %s", got)
	}
	l.write(vdi, bytes.Repeat([]byte{'z'}, 1024), maxSize-1024)
	return vdi, uuid
}

func (l *lab) wantEnd(vdi string) {
	l.t.Helper()
	vbd, c := l.plug(vdi, "RO")
	p := make([]byte, 1536)
	want := append(make([]byte, 512), bytes.Repeat([]byte{'z'}, 1024)...)
	if _, err := c.ReadAt(p, maxSize-1536); err != nil || !bytes.Equal(p, want) {
		l.t.Errorf("the end of the disk: %v, %q…", err, p[508:516])
	}
	l.unplug(vbd, c)
}

func TestQT_MAX_1(t *testing.T) {
	inLabs(t, func(t *testing.T, l *lab) {
		vdi, _ := l.largest()
		dup := l.text("VDI.copy", vdi, l.sr, "OpaqueRef:NULL", "OpaqueRef:NULL")
		l.wantEnd(dup)
		l.destroy(vdi, dup)
	})
}

func TestQT_MAX_2(t *testing.T) {
	inLabs(t, func(t *testing.T, l *lab) {
		vdi, uuid := l.largest()
		l.must("vdi-export", "uuid="+uuid, "filename=largest.vhd", "format=vhd")
		info, err := os.Stat(filepath.Join(l.dir, "largest.vhd"))
		if err != nil {
			t.Fatal(err)
		}
		if info.Size() > 16<<20 {
			t.Errorf("the file has %d bytes", info.Size())
		}
		other, otherUUID := l.disk(maxSize, nil)
		l.must("vdi-import", "uuid="+otherUUID, "filename=largest.vhd", "format=vhd")
		l.wantEnd(other)
		l.destroy(vdi, other)
	})
}

// An import into an SR that is not there fails as a request and as a task.
func TestQT_IMP_1(t *testing.T) {
	inLabs(t, func(t *testing.T, l *lab) {
		task := l.text("task.create", "import", "")
		conn, err := net.Dial("tcp", strings.TrimPrefix(l.url, "http://"))
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		fmt.Fprintf(conn, "PUT /import_raw_vdi?session_id=%s&sr_id=fake_sr&task_id=%s HTTP/1.0\r\nContent-Length: 512\r\n\r\n%s",
			l.session, task, strings.Repeat("x", 512))
		answer, err := io.ReadAll(conn)
		if status, _, _ := strings.Cut(string(answer), "\r\n"); err != nil || strings.Contains(status, " 200 ") {
			t.Errorf("%v, status %q", err, status)
		}
		if got := l.text("task.get_status", task); got != "failure" {
			t.Errorf("task: %s", got)
		}
		l.call("task.destroy", task)
	})
}

// A VM travels as a file with its drives, and its disks are new ones.
func TestQT_XVA_1(t *testing.T) {
	inLabs(t, func(t *testing.T, l *lab) {
		uuid := l.must("vm-install", "template=Other install media", "new-name-label=quicktest")
		vm := l.text("VM.get_by_uuid", uuid)
		drive := func(device, kind string, empty bool, vdi string, other map[string]any) {
			l.call("VBD.create", map[string]any{
				"VM": vm, "VDI": vdi, "userdevice": device, "bootable": false, "mode": map[bool]string{true: "RO", false: "RW"}[empty],
				"type": kind, "unpluggable": true, "empty": empty, "other_config": other, "qos_algorithm_type": "",
				"qos_algorithm_params": map[string]any{},
			})
		}
		drive("0", "CD", true, "OpaqueRef:NULL", map[string]any{})
		vdi, _ := l.disk(4<<20, nil)
		drive("1", "Disk", false, vdi, map[string]any{"owner": "true"})
		drives := func(vm string) map[string][3]any {
			got := map[string][3]any{}
			for _, vbd := range l.list("VM.get_VBDs", vm) {
				rec := l.call("VBD.get_record", vbd).(map[string]any)
				got[rec["userdevice"].(string)] = [3]any{rec["type"], rec["empty"], rec["VDI"]}
			}
			return got
		}
		l.must("vm-export", "vm=quicktest", "filename=quicktest.xva")
		made := l.must("vm-import", "filename=quicktest.xva", "sr-uuid="+l.text("SR.get_uuid", l.sr))
		before, after := drives(vm), drives(l.text("VM.get_by_uuid", made))
		if len(after) != len(before) {
			t.Errorf("drives %v, then %v", before, after)
		}
		for device, want := range before {
			if got := after[device]; got[0] != want[0] || got[1] != want[1] || (got[2] == want[2]) != (device == "0") {
				t.Errorf("device %s: %v, then %v", device, want, got)
			}
		}
		l.must("vm-uninstall", "uuid="+made, "--force")
		l.must("vm-uninstall", "uuid="+uuid, "--force")
	})
}

// Disks that are attached while the host starts do not exist here: what would
// attach them is refused by its name, and leaves no VBD.
func TestQT_STATIC_1(t *testing.T) {
	inLabs(t, func(t *testing.T, l *lab) {
		vdi, _ := l.disk(4<<20, nil)
		host := l.text("host.get_by_uuid", l.must("host-list", "--minimal"))
		_, err := l.send("host.attach_static_vdis", l.session, host, map[string]any{vdi: "quicktest"})
		if err == nil || !strings.Contains(err.Error(), "reserved for members of the pool") {
			t.Errorf("host.attach_static_vdis: %v", err)
		}
		if vbds := l.list("VDI.get_VBDs", vdi); len(vbds) > 0 {
			t.Errorf("VBDs %v", vbds)
		}
		l.destroy(vdi)
	})
}
