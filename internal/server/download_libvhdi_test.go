package server

import (
	"bytes"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"coppice/internal/peertest"
	"coppice/internal/vhd"
)

// readChain prints the contents of a delta that lies over its parent.
const readChain = `
import pyvhdi, sys
base, delta = pyvhdi.file(), pyvhdi.file()
base.open(sys.argv[1])
delta.open(sys.argv[2])
delta.set_parent(base)
left = delta.get_media_size()
while left > 0:
    piece = delta.read_buffer(min(left, 1 << 20))
    sys.stdout.buffer.write(piece)
    left -= len(piece)
`

// libvhdi finds nothing behind the end of a parent, not even zeros.
func TestLibvhdiReadsResized(t *testing.T) {
	python := peertest.Tool(t, "/usr/bin/python3", "python3")
	if exec.Command(python, "-c", "import pyvhdi").Run() != nil {
		if os.Getenv("CI") != "" {
			t.Fatal("the package python3-libvhdi is not installed; CI needs it")
		}
		t.Skip("the Debian package python3-libvhdi is not installed")
	}
	for name, tt := range map[string]struct {
		from, to int64
		grown    [2]int64 // new data
	}{
		"by holes":                   {from: 10 * mib, to: 18 * mib},
		"by holes, from the middle":  {from: 5*mib + 4096, to: 12 * mib},
		"within the last block":      {from: 5*mib + 4096, to: 5*mib + 65536},
		"with data":                  {from: 10 * mib, to: 18 * mib, grown: [2]int64{13 * mib, 4096}},
		"with data, from the middle": {from: 5 * mib, to: 9*mib + 4096, grown: [2]int64{7 * mib, mib}},
		"data across the end":        {from: 5 * mib, to: 8 * mib, grown: [2]int64{5 * mib, 4096}},
		"not":                        {from: 6 * mib, to: 6 * mib},
		"to less":                    {from: 10 * mib, to: 5*mib + 4096},
	} {
		t.Run(name, func(t *testing.T) {
			base := random(tt.from, 1, [2]int64{mib, 2 * mib}, [2]int64{tt.from - 65536, 65536})
			to := make([]byte, tt.to)
			copy(to, base)
			copy(to[4096:], "changed")
			copy(to[tt.grown[0]:], random(tt.grown[1], 2, [2]int64{0, tt.grown[1]}))
			repo := testRepo(t)
			from := testDisk(t, repo, 1, base)
			full := downloadOf(nil, from, nil)
			full.vdi = baseTest
			dir := t.TempDir()
			files := []string{filepath.Join(dir, baseTest.UUID+".vhd"), filepath.Join(dir, "delta.vhd")}
			for i, d := range []*download{full, downloadOf(repo, testEdit(t, repo, 1, 2, to), from)} {
				if err := os.WriteFile(files[i], encode(t, planVHD, d), 0o600); err != nil {
					t.Fatal(err)
				}
			}
			cmd := exec.CommandContext(t.Context(), python, "-c", readChain, files[0], files[1])
			var errs bytes.Buffer
			cmd.Stderr = &errs
			got, err := cmd.Output()
			if err != nil {
				t.Fatalf("%v\n%s", err, errs.String())
			}
			if !bytes.Equal(got, to) {
				t.Errorf("%d bytes that are not the %d of the disk", len(got), len(to))
			}
		})
	}
}

// What a delta costs for the sake of libvhdi is bounded.
func TestAddGrown(t *testing.T) {
	const base = 3 * mib
	for _, tt := range []struct {
		size   int64
		data   []int64 // blocks
		blocks int64
	}{
		{size: base},
		{size: 2 * mib},
		{size: 4 * mib, blocks: 1},
		{size: 2*mib + maxBlank, blocks: maxBlank / vhd.BlockSize},
		{size: 4*mib + maxBlank},
		{size: 4*mib + maxBlank, data: []int64{0, 7}, blocks: 1 + maxBlank/vhd.BlockSize},
		{size: 6*mib + maxBlank, data: []int64{0, 7}, blocks: 1},
		{size: vhd.MaxSize},
	} {
		set := vhd.NewBlockSet(tt.size)
		for _, i := range tt.data {
			set.Add(i*vhd.BlockSize, 1)
		}
		before := set.Has(0)
		addGrown(set, base, tt.size)
		n := set.Len()
		if before {
			n--
		}
		if n != tt.blocks {
			t.Errorf("%d bytes, data in %d: %d blocks behind the end, want %d", tt.size, tt.data, n, tt.blocks)
		}
	}
}
