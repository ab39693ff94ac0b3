package qcow2

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"coppice/internal/peertest"
)

// Images of qemu-img with every option that changes how they look.
func TestReaderTakesQemuImages(t *testing.T) {
	qemu := peertest.Tool(t, "qemu-img", "qemu-utils")
	dir := t.TempDir()
	const size = 9*mib + 1536
	contents := disk(size, 1, [2]int64{0, 700}, [2]int64{mib + 3000, 300 << 10}, [2]int64{6 * mib, 3*mib + 1536})
	copy(contents[2*mib:], bytes.Repeat([]byte("compresses well "), 40<<10))
	raw := filepath.Join(dir, "disk.raw")
	if err := os.WriteFile(raw, contents, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		options string
		more    []string
		spools  bool // may be, as qemu writes it
	}{
		{options: "compat=0.10"},
		{options: "compat=1.1"},
		{options: "compat=1.1,lazy_refcounts=on"},
		{options: "compat=1.1,refcount_bits=1"},
		{options: "compat=1.1,refcount_bits=64"},
		{options: "cluster_size=512"},
		{options: "cluster_size=4096"},
		{options: "cluster_size=32768"},
		{options: "cluster_size=2097152"},
		{options: "compat=0.10,cluster_size=512", more: []string{"-c"}, spools: true},
		{options: "compat=0.10", more: []string{"-c"}},
		{options: "compression_type=zlib", more: []string{"-c"}},
		{options: "compression_type=zstd", more: []string{"-c"}},
		{options: "compression_type=zstd,cluster_size=2097152", more: []string{"-c"}},
		{options: "compression_type=zstd,cluster_size=4096", more: []string{"-c"}, spools: true},
		{options: "extended_l2=on,cluster_size=16384"},
		{options: "extended_l2=on,cluster_size=65536"},
		{options: "extended_l2=on,cluster_size=131072", more: []string{"-c"}},
		{options: "extended_l2=on,compression_type=zstd", more: []string{"-c"}},
		{options: "preallocation=metadata"},
		{options: "preallocation=falloc", spools: true},
		{options: "preallocation=full", spools: true},
		{options: "preallocation=metadata,extended_l2=on"},
		{options: "compat=1.1", more: []string{"-S", "0"}},
		{options: "compat=1.1", more: []string{"-W", "-m", "8"}, spools: true},
	} {
		t.Run(tt.options+strings.Join(tt.more, ""), func(t *testing.T) {
			file := filepath.Join(t.TempDir(), "disk.qcow2")
			peertest.Run(t, qemu, append(append([]string{"convert", "-f", "raw", "-O", "qcow2", "-o", tt.options}, tt.more...), raw, file)...)
			image, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			s := new(scratch)
			if got := applied(t, image, size, s); !bytes.Equal(got, contents) {
				t.Error(difference(got, contents))
			}
			if s.opened && !tt.spools {
				t.Error("needs a spool")
			}
		})
	}
}

// Images that were written after they were made: in any order, with holes made
// again, grown, with snapshots.
func TestReaderTakesUsedImages(t *testing.T) {
	qemu, qio := peertest.Tool(t, "qemu-img", "qemu-utils"), peertest.Tool(t, "qemu-io", "qemu-utils")
	for _, options := range []string{
		"cluster_size=65536", "cluster_size=512", "cluster_size=4096,compat=0.10", "extended_l2=on", "cluster_size=2097152", "cluster_size=65536,preallocation=metadata",
	} {
		t.Run(options, func(t *testing.T) {
			dir := t.TempDir()
			file, raw := filepath.Join(dir, "disk.qcow2"), filepath.Join(dir, "disk.raw")
			peertest.Run(t, qemu, "create", "-f", "qcow2", "-o", options, file, "5M")
			commands := []string{
				"write -P 1 4M 200k", "write -P 2 0 1M", "write -P 3 2M 70k", "write -z 64k 128k", "write -P 4 3000k 512",
				"discard 512k 256k", "write -P 5 2100k 90k", "write -z -u 4M 64k", "write -P 6 1M 3k",
			}
			args := []string{"-f", "qcow2"}
			for _, c := range commands {
				args = append(args, "-c", c)
			}
			peertest.Run(t, qio, append(args, file)...)
			if !strings.Contains(options, "preallocation") {
				peertest.Run(t, qemu, "snapshot", "-c", "before", file)
			}
			peertest.Run(t, qio, "-f", "qcow2", "-c", "write -P 7 100k 2M", "-c", "write -P 8 4500k 10k", file)
			peertest.Run(t, qemu, "convert", "-f", "qcow2", "-O", "raw", file, raw)
			want, err := os.ReadFile(raw)
			if err != nil {
				t.Fatal(err)
			}
			image, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			s := new(scratch)
			if got := applied(t, image, int64(len(want)), s); !bytes.Equal(got, want) {
				t.Error(difference(got, want))
			}
		})
	}
}

// An image with its tables at the end needs the spool for all of its data.
func TestReaderSpools(t *testing.T) {
	contents := disk(3*mib, 1, [2]int64{0, mib}, [2]int64{2 * mib, 100 << 10})
	image := tablesLast(t, contents)
	s := new(scratch)
	if got := applied(t, image, int64(len(contents)), s); !bytes.Equal(got, contents) {
		t.Error(difference(got, contents))
	}
	if !s.opened {
		t.Error("no spool was needed")
	}
	if err := apply(bytes.NewReader(write(t, contents, clustersOf(contents, nil), nil)), -1, contents, &scratch{opened: true}); err != nil {
		t.Errorf("an image with its tables first: %v", err)
	}
	r, err := NewReader(bytes.NewReader(image), ReaderOptions{Length: -1})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := r.Next(); !errors.Is(err, ErrFormat) {
		t.Errorf("without a spool: %v", err)
	}
	full := errors.New("full")
	if r, err = NewReader(bytes.NewReader(image), ReaderOptions{Length: -1, Spool: func() (Spool, error) { return nil, full }}); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if _, err := r.Next(); !errors.Is(err, full) {
			t.Errorf("no room for a spool: %v", err)
		}
	}
}

// A run that is in the spool says where: nothing of it is read again. Clusters
// may be referred to more than once.
func TestReaderSaysWhere(t *testing.T) {
	const size = 12 * mib
	contents := disk(size, 1, [2]int64{0, 4*mib + 100}, [2]int64{5 * mib, 64 << 10}, [2]int64{6*mib - 512, 5 * mib})
	image := tablesLast(t, contents)
	be := binary.BigEndian
	l2At := be.Uint64(image[be.Uint64(image[40:]):]) & maskOffset
	copy(image[l2At+8*11*mib/ClusterSize:], image[l2At:][:8])
	copy(contents[11*mib:], contents[:ClusterSize])
	s := new(scratch)
	if got := applied(t, image, size, s); !bytes.Equal(got, contents) {
		t.Errorf("with a shared cluster: %s", difference(got, contents))
	}

	s = new(scratch)
	r, err := NewReader(bytes.NewReader(image), ReaderOptions{Length: -1, Spool: s.open})
	if err != nil {
		t.Fatal(err)
	}
	got := make([]byte, size)
	for {
		run, err := r.Next()
		if err == io.EOF {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		if !run.Spooled || run.Len > spoolRun {
			t.Errorf("%+v, want a run of the spool of at most %d bytes", run, spoolRun)
		}
		if run.Off%(2*ClusterSize) == 0 { // what has been read in part goes on at the next run, too
			if _, err := io.ReadFull(r, make([]byte, 1000)); err != nil {
				t.Fatal(err)
			}
		}
		copy(got[run.Off:run.End()], s.b[run.From:])
	}
	if !bytes.Equal(got, contents) {
		t.Error(difference(got, contents))
	}

	// What is zero and has to wait is in no spool.
	empty := tablesLast(t, disk(mib, 1, [2]int64{0, 1}))
	clear(empty[ClusterSize:be.Uint64(empty[40:])]) // data and refcounts
	s = new(scratch)
	if r, err = NewReader(bytes.NewReader(empty), ReaderOptions{Length: -1, Spool: s.open}); err != nil {
		t.Fatal(err)
	}
	if run, err := r.Next(); err != nil || run != (Run{Len: ClusterSize, Zero: true}) {
		t.Errorf("zeros: %+v, %v", run, err)
	}
}

// tablesLast moves the tables of a small image behind its data.
func tablesLast(t testing.TB, contents []byte) []byte {
	t.Helper()
	b := write(t, contents, clustersOf(contents, nil), nil)
	be := binary.BigEndian
	l1At, l2At := be.Uint64(b[40:]), uint64(0)
	l2At = be.Uint64(b[l1At:]) & maskOffset
	data := l2At + ClusterSize
	shift := data - ClusterSize // what moves to the end
	for i := range uint64(perTable) {
		if e := be.Uint64(b[l2At+8*i:]); e != 0 {
			be.PutUint64(b[l2At+8*i:], e-shift)
		}
	}
	moved := uint64(len(b)) - shift
	be.PutUint64(b[l1At:], (l2At-ClusterSize+moved)|flagCopied)
	be.PutUint64(b[40:], l1At-ClusterSize+moved)
	be.PutUint64(b[48:], be.Uint64(b[48:])-ClusterSize+moved)
	out := bytes.Clone(b[:ClusterSize])
	out = append(out, b[data:]...)
	return append(out, b[ClusterSize:data]...)
}

// A table that is too much to remember is put off, and the result is the same.
func TestReaderPutsTablesOff(t *testing.T) {
	const size = 700 * mib
	base := disk(size, 1, [2]int64{0, mib}, [2]int64{600 * mib, mib})
	image := write(t, base, clustersOf(base, nil), nil)
	s := new(scratch)
	r, err := NewReader(bytes.NewReader(image), ReaderOptions{Length: -1, Spool: s.open})
	if err != nil {
		t.Fatal(err)
	}
	got := make([]byte, size)
	crowd := func() {
		for i := range int64(maxAhead) { // far ahead, never reached
			r.ahead = append(r.ahead, claim{off: maxFile + i, kind: claimRefBlock})
		}
	}
	for n := 0; ; n++ {
		if n == 0 {
			crowd()
		}
		if len(r.late) == 2 {
			r.ahead = r.ahead[:0]
		}
		run, err := r.advanceOnce()
		if err == io.EOF {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		if run.Len > 0 && !run.Zero {
			if _, err := io.ReadFull(r.from, got[run.Off:run.End()]); err != nil {
				t.Fatal(err)
			}
		}
	}
	if !bytes.Equal(got, base) {
		t.Error(difference(got, base))
	}
}

// Every field of the header and every entry at its extremes: a typed error or
// a disk, never anything else.
func TestReaderRefuses(t *testing.T) {
	contents := disk(3*mib, 1, [2]int64{0, mib})
	good := write(t, contents, clustersOf(contents, nil), &Backing{Name: "base.qcow2", Format: "qcow2"})
	be := binary.BigEndian
	l1 := int(be.Uint64(good[40:]))
	l2 := int(be.Uint64(good[l1:]) & maskOffset)
	u32 := func(at int, v uint32) func([]byte) { return func(b []byte) { be.PutUint32(b[at:], v) } }
	u64 := func(at int, v uint64) func([]byte) { return func(b []byte) { be.PutUint64(b[at:], v) } }
	for want, change := range map[string]func([]byte){
		"magic at byte 0":                  u32(0, 0x514649FA),
		"version at byte 4 is 1":           u32(4, 1),
		"version at byte 4 is 4":           u32(4, 4),
		"backing file offset at byte 8":    u64(8, ClusterSize),
		"backing file offset at byte 8 is": u64(8, 1<<63),
		"backing file size at byte 16":     u32(16, 1024),
		"cluster bits at byte 20 is 8":     u32(20, 8),
		"cluster bits at byte 20 is 22":    u32(20, 22),
		"size at byte 24":                  u64(24, 1<<63),
		"encryption at byte 32":            u32(32, 1),
		"L1 entries at byte 36 is 0":       u32(36, 0),
		"L1 entries at byte 36 is 4294":    u32(36, 1<<32-1),
		"L1 table offset at byte 40 is 0":  u64(40, 0),
		"L1 table offset at byte 40 is 1,": u64(40, 1),
		"L1 table offset at byte 40 is 18": u64(40, 1<<64-1),
		"L1 table offset at byte 40 is 72": u64(40, 1<<56),
		"refcount table offset":            u64(48, 77),
		"refcount table clusters":          u32(56, 1<<32-1),
		"not marked corrupt":               u64(72, incompatCorrupt),
		"without an external data file":    u64(72, incompatDataFile),
		"incompatible features":            u64(72, 1<<63),
		"compression type":                 u64(72, incompatCompress),
		"refcount order at byte 96":        u32(96, 7),
		"header length at byte 100 is 100": u32(100, 100),
		"header length at byte 100 is 429": u32(100, 1<<32-8),
		"L1 entry":                         u64(l1, 512),
		"L1 entry at":                      u64(l1, 1<<50),
		"L2 entry":                         u64(l2, 3*512),
		"L2 entry at":                      u64(l2, 1<<50),
		"used already, or behind the end":  u64(l2+8, be.Uint64(good[l1:])&maskOffset),
		"data cluster at":                  u64(l2+8, be.Uint64(good[l2:])),
		"compressed cluster":               u64(l2, uint64(len(good)-512)|flagCompressed),
	} {
		b := bytes.Clone(good)
		change(b)
		got := make([]byte, len(contents))
		err := apply(bytes.NewReader(b), int64(len(b)), got, new(scratch))
		if !errors.Is(err, ErrFormat) || !strings.Contains(err.Error(), want) {
			t.Errorf("%v, want one that says %q", err, want)
		}
		err = apply(bytes.NewReader(b), -1, got, new(scratch))
		if !errors.Is(err, ErrFormat) && !errors.Is(err, io.ErrUnexpectedEOF) {
			t.Errorf("%s, length unknown: %v", want, err)
		}
	}
}

// shared is an image with clusters of 512 bytes and so many L2 tables, of which
// the first and the last are the same one, or not; it comes before the L1 table
// or behind.
func shared(tables int, before, same bool) []byte {
	be := binary.BigEndian
	l1 := make([]byte, (8*tables+511)/512*512)
	l1At, l2At := 512, 512+len(l1)
	if before {
		l2At, l1At = 512, 512+2*512
	}
	b := make([]byte, 512+2*512+len(l1))
	be.PutUint32(b, magic)
	be.PutUint64(b[24:], uint64(tables)*64*512)
	for at, v := range map[int]uint32{4: 3, 20: 9, 36: uint32(tables), 44: uint32(l1At), 96: 4, 100: headSizeV3} {
		be.PutUint32(b[at:], v)
	}
	be.PutUint64(b[l1At:], uint64(l2At))
	if !same {
		l2At += 512
	}
	be.PutUint64(b[l1At+8*(tables-1):], uint64(l2At))
	return b
}

// A table of tables may be used while the image comes or from the spool: an L2
// table that stands in it twice is refused in all cases.
func TestReaderRefusesSharedTables(t *testing.T) {
	for _, tables := range []int{2, 100, maxL1Ahead, maxL1Ahead + 1, maxL1Ahead + 3000} {
		for _, before := range []bool{false, true} {
			for _, same := range []bool{false, true} {
				b := shared(tables, before, same)
				r, err := NewReader(bytes.NewReader(b), ReaderOptions{Length: -1, Spool: new(scratch).open})
				if err != nil {
					t.Fatal(err)
				}
				_, err = r.Next()
				refused := errors.Is(err, ErrFormat) && strings.Contains(err.Error(), "used already")
				if same != refused || !same && err != io.EOF {
					t.Errorf("%d tables, before the L1 table: %v, the same: %v: %v", tables, before, same, err)
				}
			}
		}
	}
}

// Data that comes before its table is used once, too: what is taken from the
// spool is never more than the image has.
func TestReaderRefusesSharedData(t *testing.T) {
	contents := disk(8*mib, 1, [2]int64{0, 8 * mib})
	b := tablesLast(t, contents)
	be := binary.BigEndian
	l2 := int(be.Uint64(b[be.Uint64(b[40:]):]) & maskOffset)
	be.PutUint64(b[24:], 64*mib)
	for i := range 64 * mib / ClusterSize {
		copy(b[l2+8*i:], b[l2:l2+8]) // the first cluster
	}
	err := apply(bytes.NewReader(b), -1, make([]byte, 64*mib), new(scratch))
	if !errors.Is(err, ErrFormat) || !strings.Contains(err.Error(), "used already") {
		t.Errorf("more than the image has: %v", err)
	}
}

// An image that ends too early is told from a whole one wherever it ends.
func TestReaderNoticesTheEnd(t *testing.T) {
	contents := disk(mib+512, 1, [2]int64{0, 200 << 10}, [2]int64{mib, 512})
	for name, image := range map[string][]byte{
		"tables first": write(t, contents, clustersOf(contents, nil), nil),
		"tables last":  tablesLast(t, contents),
	} {
		for cut := 0; cut < len(image); cut += SectorSize {
			for _, length := range []int64{int64(len(image)), int64(cut), -1} {
				got := make([]byte, len(contents))
				err := apply(bytes.NewReader(image[:cut]), length, got, new(scratch))
				if err == nil && length == int64(len(image)) {
					t.Fatalf("%s, cut at %d of %d: no error", name, cut, length)
				}
				if err == nil && !bytes.Equal(got, contents) {
					t.Fatalf("%s, cut at %d, length %d: no error, and %s", name, cut, length, difference(got, contents))
				}
				if err != nil && !errors.Is(err, ErrFormat) && !errors.Is(err, io.ErrUnexpectedEOF) {
					t.Fatalf("%s, cut at %d: %v", name, cut, err)
				}
			}
		}
	}
}

// The names of other files in an image are text.
func TestReaderOpensNothing(t *testing.T) {
	contents := disk(mib, 1, [2]int64{0, mib})
	image := write(t, contents, clustersOf(contents, nil), &Backing{Name: "passwd", Format: "raw"})
	for _, name := range []string{"/etc/passwd", "json:{\"driver\":\"file\"}", strings.Repeat("a", maxBackName)} {
		b := bytes.Clone(image)
		at := binary.BigEndian.Uint64(b[8:])
		binary.BigEndian.PutUint32(b[16:], uint32(copy(b[at:], name)))
		if got := applied(t, b, mib, new(scratch)); !bytes.Equal(got, contents) {
			t.Error(difference(got, contents))
		}
	}
}

func TestReaderKeepsItsError(t *testing.T) {
	contents := disk(mib, 1, [2]int64{0, mib})
	image := write(t, contents, clustersOf(contents, nil), nil)
	broken := errors.New("broken")
	for _, at := range []int{0, 100, ClusterSize, len(image) - 5} {
		src := io.MultiReader(bytes.NewReader(image[:at]), failing{broken})
		r, err := NewReader(src, ReaderOptions{Length: -1})
		for err == nil {
			if _, err = r.Next(); err == nil {
				_, err = io.Copy(io.Discard, r)
			}
		}
		if !errors.Is(err, broken) {
			t.Errorf("source broken at %d: %v", at, err)
		}
		if r == nil {
			continue
		}
		if _, again := r.Next(); again == nil || fmt.Sprint(again) != fmt.Sprint(err) {
			t.Errorf("then %v", again)
		}
		if _, again := r.Read(make([]byte, 1)); again == nil {
			t.Error("then there is something to read")
		}
	}
}

type failing struct{ err error }

func (f failing) Read([]byte) (int, error) { return 0, f.err }
