package qcow2

import (
	"bytes"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"coppice/internal/peertest"
)

const mib = 1 << 20

// sizes are disks of all kinds: smaller than a cluster, odd in sectors and
// clusters, at the borders of L2 tables and refcount blocks.
var sizes = []int64{
	512, 1024, 4096, 64<<10 - 512, 64 << 10, 64<<10 + 512, 100 << 10, mib - 512, mib, mib + 512, 2 * mib, 3*mib + 4096,
	10*mib + 7*512, 16 * mib, 33*mib + 512, 64 * mib, 70*mib - 512, 80*mib + 4096, 512*mib + 512,
}

func TestQemuReadsImages(t *testing.T) {
	qemu := peertest.Tool(t, "qemu-img", "qemu-utils")
	dir := t.TempDir()
	for _, size := range sizes {
		base := disk(size, 1, [2]int64{0, 300}, [2]int64{mib, 70 << 10}, [2]int64{5*mib + 100, 2 * mib}, [2]int64{size - 512, 512})
		target := bytes.Clone(base)
		copy(target[size/2:], "changed in the middle")
		clear(target[min(mib, size):min(mib+40<<10, size)])
		full := write(t, base, clustersOf(base, nil), nil)
		delta := write(t, target, clustersOf(target, base), &Backing{Name: "full.qcow2", Format: "qcow2"})
		files := map[string][]byte{"base.raw": base, "target.raw": target, "full.qcow2": full, "delta.qcow2": delta}
		for name, b := range files {
			if err := os.WriteFile(filepath.Join(dir, name), b, 0o600); err != nil {
				t.Fatal(err)
			}
		}
		at := func(name string) string { return filepath.Join(dir, name) }
		for _, pair := range [][2]string{{"full.qcow2", "base.raw"}, {"delta.qcow2", "target.raw"}} {
			if out := peertest.Run(t, qemu, "check", at(pair[0])); !strings.Contains(out, "No errors were found") {
				t.Errorf("%d: %s", size, out)
			}
			peertest.Run(t, qemu, "compare", at(pair[0]), "-F", "raw", at(pair[1]))
			var info struct {
				Size int64 `json:"virtual-size"`
			}
			if err := json.Unmarshal([]byte(peertest.Run(t, qemu, "info", "--output=json", at(pair[0]))), &info); err != nil || info.Size != size {
				t.Errorf("%d: qemu-img says %d, %v", size, info.Size, err)
			}
		}
		if got := applied(t, full, size, new(scratch)); !bytes.Equal(got, base) {
			t.Errorf("%d: full: %s", size, difference(got, base))
		}
		got := bytes.Clone(base)
		if err := apply(bytes.NewReader(delta), int64(len(delta)), got, new(scratch)); err != nil || !bytes.Equal(got, target) {
			t.Errorf("%d: delta: %v, %s", size, err, difference(got, target))
		}
	}
}

// A delta can be moved to another base, and merged into its base.
func TestQemuRebasesAndCommits(t *testing.T) {
	qemu := peertest.Tool(t, "qemu-img", "qemu-utils")
	dir := t.TempDir()
	const size = 20 * mib
	base := disk(size, 1, [2]int64{0, 12 * mib})
	target := bytes.Clone(base)
	clear(target[2*mib : 4*mib])
	copy(target[9*mib:], "changed")
	at := func(name string) string { return filepath.Join(dir, name) }
	for name, b := range map[string][]byte{
		"base.raw": base, "target.raw": target,
		"full.qcow2":  write(t, base, clustersOf(base, nil), nil),
		"delta.qcow2": write(t, target, clustersOf(target, base), &Backing{Name: "elsewhere.qcow2", Format: "qcow2"}),
	} {
		if err := os.WriteFile(at(name), b, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	for _, to := range [][2]string{{"base.raw", "raw"}, {"full.qcow2", "qcow2"}} {
		peertest.Run(t, qemu, "rebase", "-u", "-b", to[0], "-F", to[1], at("delta.qcow2"))
		peertest.Run(t, qemu, "compare", at("delta.qcow2"), "-F", "raw", at("target.raw"))
	}
	peertest.Run(t, qemu, "commit", "-d", at("delta.qcow2"))
	peertest.Run(t, qemu, "compare", at("full.qcow2"), "-F", "raw", at("target.raw"))
	peertest.Run(t, qemu, "check", at("full.qcow2"))
}

// The figures of the largest disks follow from the set alone.
func TestLayoutOfLargeDisks(t *testing.T) {
	for _, tt := range []struct {
		size, from, n int64
		want          int64
	}{
		{MaxSize, 0, 0, (1 + 1 + 1 + 512) * ClusterSize},
		{1 << 40, 0, 0, 4 * ClusterSize},
		{1 << 40, 0, 1 << 40, (1 + 513 + 1 + 1 + 2048 + 1<<24) * ClusterSize},
		{MaxSize, MaxSize - 1, 1, (1 + 1 + 1 + 512 + 1 + 1) * ClusterSize},
	} {
		set := NewClusterSet(tt.size)
		set.Add(tt.from, tt.n)
		l, err := NewLayout(Options{Size: tt.size, Clusters: set})
		if err != nil {
			t.Fatal(err)
		}
		if l.Length() != tt.want {
			t.Errorf("%d of %d bytes: length %d, want %d", tt.n, tt.size, l.Length(), tt.want)
		}
	}
}

func TestQemuOpensLargestDisk(t *testing.T) {
	qemu := peertest.Tool(t, "qemu-img", "qemu-utils")
	set := NewClusterSet(MaxSize)
	set.Add(MaxSize-1, 1)
	l, err := NewLayout(Options{Size: MaxSize, Clusters: set})
	if err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(t.TempDir(), "large.qcow2")
	f, err := os.Create(file)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := l.WriteHead(f); err != nil {
		t.Fatal(err)
	}
	if err := f.Truncate(l.Length()); err != nil {
		t.Fatal(err)
	}
	if out := peertest.Run(t, qemu, "check", file); !strings.Contains(out, "No errors were found") {
		t.Error(out)
	}
}

func TestOptions(t *testing.T) {
	set := NewClusterSet(mib)
	for want, o := range map[string]Options{
		"size 0 is not":                      {Clusters: set},
		"size 1000 is not":                   {Size: 1000, Clusters: set},
		"exceeds 2251799813685248":           {Size: MaxSize + 512, Clusters: set},
		"not made for size 512":              {Size: 512, Clusters: set},
		"not made for size 1024":             {Size: 1024},
		`backing name "/etc/passwd"`:         {Size: mib, Clusters: set, Backing: &Backing{Name: "/etc/passwd", Format: "raw"}},
		`backing name "json:{}"`:             {Size: mib, Clusters: set, Backing: &Backing{Name: "json:{}", Format: "raw"}},
		`backing name ""`:                    {Size: mib, Clusters: set, Backing: &Backing{Format: "raw"}},
		`backing format ""`:                  {Size: mib, Clusters: set, Backing: &Backing{Name: "a"}},
		fmt.Sprintf("at most %d", maxName):   {Size: mib, Clusters: set, Backing: &Backing{Name: strings.Repeat("a", 201), Format: "raw"}},
		`backing format "aaaaaaaaaaaaaaaaa"`: {Size: mib, Clusters: set, Backing: &Backing{Name: "a", Format: strings.Repeat("a", 17)}},
	} {
		if _, err := NewLayout(o); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%+v: %v, want %q", o, err, want)
		}
	}
}

func TestClusterSet(t *testing.T) {
	const c = ClusterSize
	s := NewClusterSet(2 * perTable * c)
	for _, r := range [][2]int64{{0, 1}, {c - 1, 2}, {5 * c, 0}, {63 * c, 2 * c}, {perTable*c - 1, 2}, {64 * c, c}} {
		s.Add(r[0], r[1])
	}
	want := []Run{{Off: 0, Len: 2 * c}, {Off: 63 * c, Len: 2 * c}, {Off: (perTable - 1) * c, Len: 2 * c}}
	if got := slices.Collect(s.Runs()); !slices.Equal(got, want) || s.Len() != 6 {
		t.Errorf("%d clusters, runs %v, want %v", s.Len(), got, want)
	}
	for range s.Runs() {
		break
	}
	s.Add(0, 2*perTable*c)
	s.Add(c, 3*c) // full already
	if got := slices.Collect(s.Runs()); !slices.Equal(got, []Run{{Len: 2 * perTable * c}}) || s.Len() != 2*perTable {
		t.Errorf("full set: %d clusters, runs %v", s.Len(), got)
	}
	if s.tables[0] != fullTable || s.tables[1] != fullTable {
		t.Error("full tables take room")
	}
}
