package server

import (
	"archive/tar"
	"bytes"
	"crypto/sha1"
	"encoding/hex"
	"fmt"
	"io"
	"net"
	"slices"
	"strings"
	"testing"

	"coppice/internal/rpc"

	"github.com/google/go-cmp/cmp"
)

type member struct {
	tar.Header
	data []byte
}

// unpack takes an archive apart.
func unpack(t *testing.T, archive []byte) (all []member) {
	t.Helper()
	for r := tar.NewReader(bytes.NewReader(archive)); ; {
		h, err := r.Next()
		if err == io.EOF {
			return all
		}
		if err != nil {
			t.Fatal(err)
		}
		data, err := io.ReadAll(r)
		if err != nil {
			t.Fatal(err)
		}
		all = append(all, member{tar.Header{Name: h.Name, Typeflag: h.Typeflag, Mode: 0o600}, data})
	}
}

func pack(t *testing.T, all []member) []byte {
	t.Helper()
	var out bytes.Buffer
	w := tar.NewWriter(&out)
	for _, m := range all {
		m.Size = int64(len(m.data))
		if err := w.WriteHeader(&m.Header); err != nil {
			t.Fatal(err)
		}
		if _, err := w.Write(m.data); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return out.Bytes()
}

// Archives that are wrong are refused by name, and leave nothing.
func TestXVAHostile(t *testing.T) {
	y := newYard(t)
	good := y.archive("/export", "ref", y.vm)
	parts := func() []member { return slices.Clone(unpack(t, good)) }
	edit := func(old, new string) []byte {
		p := parts()
		if !bytes.Contains(p[0].data, []byte(old)) {
			t.Fatalf("no %q in the manifest", old)
		}
		p[0].data = bytes.Replace(p[0].data, []byte(old), []byte(new), 1)
		return pack(t, p)
	}
	with := func(name string, kind byte) []byte {
		p := parts()
		return pack(t, slices.Insert(p, 3, member{Header: tar.Header{Name: name, Typeflag: kind, Linkname: "/etc/passwd", Mode: 0o600}}))
	}
	without := func(n ...int) []byte {
		p := parts()
		slices.Sort(n)
		slices.Reverse(n)
		for _, i := range n {
			p = slices.Delete(p, i, i+1)
		}
		return pack(t, p)
	}
	last := len(parts())
	size := fmt.Sprintf("<name>virtual_size</name><value>%v</value>", y.record("VDI", y.disks[0])["virtual_size"])
	corrupt := parts()
	corrupt[3].data = bytes.Clone(corrupt[3].data)
	corrupt[3].data[0] ^= 1
	swapped := parts()
	swapped[1], swapped[2], swapped[3], swapped[4] = swapped[3], swapped[4], swapped[1], swapped[2]
	packed := y.archive("/export", "ref", y.vm, "use_compression", "zstd")
	broken := bytes.Clone(packed)
	clear(broken[len(broken)/2:][:100])
	before := y.population()
	for name, tt := range map[string]struct {
		body []byte
		code string
	}{
		"nothing":                {nil, "IMPORT_ERROR_PREMATURE_EOF"},
		"zeros":                  {make([]byte, 10240), "IMPORT_ERROR_PREMATURE_EOF"},
		"noise":                  {random(mib, 7, [2]int64{0, mib}), "IMPORT_ERROR"},
		"no manifest":            {without(0), "IMPORT_ERROR_UNEXPECTED_FILE"},
		"first chunk missing":    {without(1, 2), "IMPORT_ERROR"},
		"last chunk missing":     {without(last-2, last-1), "IMPORT_ERROR"},
		"checksum missing":       {without(2), "IMPORT_ERROR"},
		"wrong checksum":         {pack(t, corrupt), "IMPORT_ERROR_SOME_CHECKSUMS_FAILED"},
		"out of order":           {pack(t, swapped), "IMPORT_ERROR"},
		"symbolic link":          {with("Ref:9/00000001", tar.TypeSymlink), "IMPORT_ERROR"},
		"hard link":              {with("Ref:9/00000001", tar.TypeLink), "IMPORT_ERROR"},
		"out of the archive":     {with("../../etc/passwd", tar.TypeReg), "IMPORT_ERROR_UNEXPECTED_FILE"},
		"absolute":               {with("/00000001", tar.TypeReg), "IMPORT_ERROR_UNEXPECTED_FILE"},
		"a disk nobody has":      {with("Ref:99/00000001", tar.TypeReg), "IMPORT_ERROR_UNEXPECTED_FILE"},
		"absurd size":            {edit(size, "<name>virtual_size</name><value>9223372036854775807</value>"), "IMPORT_ERROR"},
		"negative size":          {edit(size, "<name>virtual_size</name><value>-1</value>"), "IMPORT_ERROR"},
		"a byte too large":       {edit(size, "<name>virtual_size</name><value>2251799813685249</value>"), "IMPORT_ERROR"},
		"no size":                {edit(size, "<name>virtual_size</name><value>0</value>"), "IMPORT_ERROR"},
		"smaller than its data":  {edit(size, "<name>virtual_size</name><value>4096</value>"), "IMPORT_ERROR"},
		"size in words":          {edit(size, "<name>virtual_size</name><value>much</value>"), "IMPORT_ERROR"},
		"newer version":          {edit("<name>export_vsn</name><value>2", "<name>export_vsn</name><value>3"), "IMPORT_INCOMPATIBLE_VERSION"},
		"no version":             {edit("<name>version</name>", "<name>versions</name>"), "IMPORT_INCOMPATIBLE_VERSION"},
		"no objects":             {edit("<name>objects</name>", "<name>object</name>"), "IMPORT_ERROR"},
		"not XML":                {edit("<value><struct>", "<value><struct"), "IMPORT_ERROR"},
		"a VDI is missing":       {edit("<name>class</name><value>VDI</value>", "<name>class</name><value>Other</value>"), "IMPORT_ERROR_FAILED_TO_FIND_OBJECT"},
		"a device twice":         {edit("<name>userdevice</name><value>1</value>", "<name>userdevice</name><value>2</value>"), "DEVICE_ALREADY_EXISTS"},
		"a VM of values":         {edit("<name>tags</name><value><array><data>", "<name>tags</name><value><array><data>"+strings.Repeat("<value/>", rpc.MaxValues)), "IMPORT_ERROR"},
		"two of a name":          {edit("<name>id</name><value>Ref:1</value>", "<name>id</name><value>Ref:0</value>"), "IMPORT_ERROR"},
		"memory upside down":     {edit("<name>memory_static_min</name><value>1</value>", "<name>memory_static_min</name><value>2</value>"), "MEMORY_CONSTRAINT_VIOLATION_ORDER"},
		"damaged and compressed": {broken, "IMPORT_ERROR_SOME_CHECKSUMS_FAILED"},
		"compression cut short":  {packed[:len(packed)-10], "IMPORT_ERROR_PREMATURE_EOF"},
		"compressed noise":       {append([]byte{0x1f, 0x8b}, make([]byte, 5000)...), "IMPORT_ERROR"},
	} {
		if o := y.bring("/import", tt.body); len(o) < 2 || o[1] != tt.code {
			t.Errorf("%s: task says %q", name, o)
		}
	}
	if o := y.bring("/import", good, "sr_id", "OpaqueRef:x"); len(o) < 2 || o[1] != "HANDLE_INVALID" {
		t.Errorf("no SR: %q", o)
	}
	if diff := cmp.Diff(before, y.population()); diff != "" {
		t.Fatalf("left behind: %s", diff)
	}
	if o := y.bring("/import", pack(t, corrupt), "force", "true"); o[0] != "success" {
		t.Errorf("wrong checksum, forced: %q", o)
	}
	// What older servers write.
	old := parts()
	for i, m := range old {
		if name, ok := strings.CutSuffix(m.Name, ".xxhash"); ok {
			sum := sha1.Sum(old[i-1].data)
			old[i].Name, old[i].data = name+".checksum", []byte(hex.EncodeToString(sum[:]))
		}
	}
	if got := y.shape(y.brought("/import", pack(t, old))[0]); !cmp.Equal(got, y.shape(y.vm)) {
		t.Error("with SHA-1 checksums another VM comes in")
	}
}

// An archive that ends early leaves nothing, wherever it ends.
func TestXVATruncated(t *testing.T) {
	y := newYard(t)
	whole := y.archive("/export", "ref", y.vm)
	manifest := len(unpack(t, whole)[0].data)
	before := y.population()
	cuts := []int{len(whole) - 1024, len(whole) - 1, len(whole) / 2}
	for cut := 512; cut < 512+(manifest+511)/512*512+4096; cut += 512 {
		cuts = append(cuts, cut)
	}
	for _, cut := range cuts {
		task := y.task()
		conn := y.dial(t, "tcp").(*net.TCPConn)
		fmt.Fprintf(conn, "PUT %s HTTP/1.1\r\nHost: h\r\nContent-Length: %d\r\n\r\n", y.url("/import", "task_id", task), len(whole))
		y.untilBlank(conn)
		if _, err := conn.Write(whole[:cut]); err != nil {
			t.Fatal(err)
		}
		if err := conn.CloseWrite(); err != nil {
			t.Fatal(err)
		}
		_, _ = io.Copy(io.Discard, conn)
		if o := y.settled(task); !slices.Equal(o, []string{"failure", "IMPORT_ERROR_PREMATURE_EOF"}) {
			t.Fatalf("cut at %d of %d: %q", cut, len(whole), o)
		}
		conn.Close()
	}
	if diff := cmp.Diff(before, y.population()); diff != "" {
		t.Errorf("left behind: %s", diff)
	}
}
