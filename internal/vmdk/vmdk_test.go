package vmdk

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"coppice/internal/peertest"
)

const mib = 1 << 20

// disk returns size bytes of which only the given ranges are not zero. Every
// other range compresses well.
func disk(size int64, ranges ...[2]int64) []byte {
	b := make([]byte, size)
	rng := rand.NewChaCha8([32]byte{7})
	for i, r := range ranges {
		part := b[min(r[0], size):min(r[0]+r[1], size)]
		if i%2 == 0 {
			_, _ = rng.Read(part)
		} else {
			copy(part, bytes.Repeat([]byte("text "), len(part)/5))
		}
	}
	return b
}

// write makes an image of a disk without its grains of zeros.
func write(t testing.TB, contents []byte) []byte {
	t.Helper()
	var out bytes.Buffer
	w, err := NewWriter(&out, Options{Size: int64(len(contents)), CID: 0x12345678})
	if err != nil {
		t.Fatal(err)
	}
	var g Grain
	for off := 0; off < len(contents); off += GrainSize {
		grain := make([]byte, GrainSize)
		copy(grain, contents[off:])
		if bytes.Equal(grain, make([]byte, GrainSize)) {
			continue
		}
		if err := g.Compress(int64(off/GrainSize), grain); err != nil {
			t.Fatal(err)
		}
		if err := w.Write(&g); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return out.Bytes()
}

// apply reads an image over a disk of its size.
func apply(image []byte, length int64, over []byte) error {
	r, err := NewReader(bytes.NewReader(image), ReaderOptions{Length: length})
	if err != nil {
		return err
	}
	if r.Size() != int64(len(over)) {
		return fmt.Errorf("size is %d, want %d", r.Size(), len(over))
	}
	for {
		run, err := r.Next()
		if err == io.EOF {
			return nil
		}
		if err != nil {
			return err
		}
		if _, err := io.ReadFull(r, over[run.Off:run.Off+run.Len]); err != nil {
			return err
		}
	}
}

var sizes = []int64{
	512, 1024, 4096, 64<<10 - 512, 64 << 10, 64<<10 + 512, 100 << 10, mib - 512, mib, mib + 512, 2 * mib, 3*mib + 4096,
	10*mib + 7*512, 16 * mib, 32*mib - 512, 32 * mib, 32*mib + 512, 64 * mib, 70*mib + 4096, 100 * mib,
}

func TestQemuReadsImages(t *testing.T) {
	qemu := peertest.Tool(t, "qemu-img", "qemu-utils")
	for _, size := range sizes {
		contents := disk(size, [2]int64{0, 100}, [2]int64{mib, 300 << 10}, [2]int64{33 * mib, 2 * mib}, [2]int64{size - 512, 512})
		image := write(t, contents)
		if again := write(t, contents); !bytes.Equal(image, again) {
			t.Errorf("%d: two images of a disk differ", size)
		}
		raw, file := filepath.Join(t.TempDir(), "raw"), filepath.Join(t.TempDir(), "vmdk")
		for name, b := range map[string][]byte{raw: contents, file: image} {
			if err := os.WriteFile(name, b, 0o600); err != nil {
				t.Fatal(err)
			}
		}
		peertest.Run(t, qemu, "compare", "-F", "raw", file, raw)
		peertest.Run(t, qemu, "check", file)
		var info struct {
			Size int64 `json:"virtual-size"`
		}
		if err := json.Unmarshal([]byte(peertest.Run(t, qemu, "info", "--output=json", file)), &info); err != nil || info.Size != size {
			t.Errorf("%d: qemu-img says %d, %v", size, info.Size, err)
		}
		for _, length := range []int64{-1, int64(len(image))} {
			got := make([]byte, size)
			if err := apply(image, length, got); err != nil || !bytes.Equal(got, contents) {
				t.Errorf("%d, length %d: %v, or not the contents", size, length, err)
			}
		}
		theirs := filepath.Join(t.TempDir(), "theirs")
		peertest.Run(t, qemu, "convert", "-f", "raw", "-O", "vmdk", "-o", "subformat=streamOptimized", raw, theirs)
		b, err := os.ReadFile(theirs)
		if err != nil {
			t.Fatal(err)
		}
		got := make([]byte, size)
		if err := apply(b, int64(len(b)), got); err != nil || !bytes.Equal(got, contents) {
			t.Errorf("%d, made by qemu-img: %v, or not the contents", size, err)
		}
	}
}

// An image that ends too early is told from a whole one wherever it ends.
func TestReaderNoticesTheEnd(t *testing.T) {
	qemu := peertest.Tool(t, "qemu-img", "qemu-utils")
	contents := disk(mib+512, [2]int64{0, 200 << 10}, [2]int64{300 << 10, 100 << 10}, [2]int64{mib, 512})
	raw, theirs := filepath.Join(t.TempDir(), "raw"), filepath.Join(t.TempDir(), "theirs")
	if err := os.WriteFile(raw, contents, 0o600); err != nil {
		t.Fatal(err)
	}
	peertest.Run(t, qemu, "convert", "-f", "raw", "-O", "vmdk", "-o", "subformat=streamOptimized", raw, theirs)
	b, err := os.ReadFile(theirs)
	if err != nil {
		t.Fatal(err)
	}
	for name, image := range map[string][]byte{"ours": write(t, contents), "theirs": b} {
		for cut := 0; cut < len(image); cut += SectorSize {
			for _, length := range []int64{-1, int64(len(image))} {
				got := make([]byte, len(contents))
				err := apply(image[:cut], length, got)
				if err == nil && (length >= 0 || !bytes.Equal(got, contents)) {
					t.Fatalf("%s, cut at %d of %d, length %d: no error", name, cut, len(image), length)
				}
				if err != nil && !errors.Is(err, ErrFormat) && !errors.Is(err, io.ErrUnexpectedEOF) {
					t.Fatalf("%s, cut at %d: %v", name, cut, err)
				}
			}
		}
	}
}

// fronted is the image of a disk with its directory at a sector before the
// grains and its tables at others, as qemu-img writes them; edit changes the
// entries.
func fronted(t testing.TB, contents []byte, directory uint32, tables []uint32, edit func(entries []uint32)) []byte {
	t.Helper()
	le := binary.LittleEndian
	image := write(t, contents)
	front, grains := bytes.Clone(image[:overheadSectors*SectorSize]), image[overheadSectors*SectorSize:]
	entries := make([]uint32, len(tables)*perTable)
	body := []byte(nil)
	for len(grains) > 0 {
		sector, size := le.Uint64(grains), int64(le.Uint32(grains[8:]))
		n := roundUp(grainHead+size, SectorSize)
		if size == 0 { // a table or directory that is left out
			if n = SectorSize * (1 + int64(sector)); le.Uint32(grains[grainHead:]) == markerFooter {
				break
			}
		} else {
			entries[sector*SectorSize/GrainSize] = uint32(overheadSectors + len(body)/SectorSize)
			body = append(body, grains[:n]...)
		}
		grains = grains[n:]
	}
	if edit != nil {
		edit(entries)
	}
	le.PutUint64(front[56:], uint64(directory))
	for i, at := range tables {
		le.PutUint32(front[int64(directory)*SectorSize+4*int64(i):], at)
		for j, e := range entries[i*perTable:][:perTable] {
			le.PutUint32(front[int64(at)*SectorSize+4*int64(j):], e)
		}
	}
	return append(front, body...)
}

// Tables in front may lie in any order; what they say is what counts for others.
func TestReaderTakesTablesInFront(t *testing.T) {
	qemu := peertest.Tool(t, "qemu-img", "qemu-utils")
	contents := disk(70*mib, [2]int64{0, mib}, [2]int64{33 * mib, 100 << 10}, [2]int64{69 * mib, mib})
	raw, file := filepath.Join(t.TempDir(), "raw"), filepath.Join(t.TempDir(), "vmdk")
	if err := os.WriteFile(raw, contents, 0o600); err != nil {
		t.Fatal(err)
	}
	for name, tt := range map[string]struct {
		directory uint32
		tables    []uint32
		moved     uint32 // where the directory says that the first table is, if not there
		fault     string
	}{
		"behind the directory":       {directory: 30, tables: []uint32{31, 35, 40}},
		"before it":                  {directory: 100, tables: []uint32{30, 34, 40}},
		"on both sides, any order":   {directory: 60, tables: []uint32{90, 30, 61}},
		"one is used twice":          {directory: 60, tables: []uint32{90, 30, 61}, moved: 30, fault: "place of a grain table at byte 30724"},
		"one reaches into another":   {directory: 60, tables: []uint32{90, 30, 61}, moved: 63, fault: "place of a grain table at byte 30720"},
		"one reaches into it":        {directory: 60, tables: []uint32{90, 30, 61}, moved: 57, fault: "place of a grain table at byte 30720"},
		"one lies in it":             {directory: 60, tables: []uint32{90, 30, 61}, moved: 60, fault: "place of a grain table at byte 30720"},
		"one is far behind":          {directory: 60, tables: []uint32{90, 30, 61}, moved: 1<<32 - 1, fault: "place of a grain table at byte 30720"},
		"one is behind the overhead": {directory: 60, tables: []uint32{90, 30, 61}, moved: 125, fault: "place of a grain table at byte 30720"},
	} {
		image := fronted(t, contents, tt.directory, tt.tables, nil)
		if tt.moved > 0 {
			binary.LittleEndian.PutUint32(image[int64(tt.directory)*SectorSize:], tt.moved)
		}
		for _, length := range []int64{-1, int64(len(image))} {
			got := make([]byte, len(contents))
			err := apply(image, length, got)
			if tt.fault != "" {
				if !errors.Is(err, ErrFormat) || !strings.Contains(err.Error(), tt.fault) {
					t.Errorf("%s: %v, want one that says %q", name, err, tt.fault)
				}
			} else if err != nil || !bytes.Equal(got, contents) {
				t.Errorf("%s: %v, or not the contents", name, err)
			}
		}
		if tt.fault == "" {
			if err := os.WriteFile(file, image, 0o600); err != nil {
				t.Fatal(err)
			}
			peertest.Run(t, qemu, "compare", "-F", "raw", file, raw)
		}
	}
}

// Who can seek reads what the tables say, so a stream that says something else
// is refused.
func TestReaderRefusesOtherGrains(t *testing.T) {
	contents := disk(2*mib, [2]int64{0, mib})
	for name, edit := range map[string]func(entries []uint32){
		"an entry is missing":          func(e []uint32) { e[3] = 0 },
		"a grain is one of zeros":      func(e []uint32) { e[15] = 1 },
		"two entries are exchanged":    func(e []uint32) { e[2], e[5] = e[5], e[2] },
		"two entries mean one grain":   func(e []uint32) { e[2] = e[5] },
		"one grain stands for another": func(e []uint32) { e[2], e[20] = 0, e[2] },
	} {
		image := fronted(t, contents, 60, []uint32{30}, edit)
		err := apply(image, int64(len(image)), make([]byte, len(contents)))
		if !errors.Is(err, ErrFormat) || !strings.Contains(err.Error(), "other grains than the 16 that came") {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// What is remembered in front of a directory is bounded.
func TestReaderForgetsTables(t *testing.T) {
	le := binary.LittleEndian
	const directory = 1 + maxBefore/SectorSize
	for sector, fault := range map[uint32]string{30: "one behind the directory", directory + 1: ""} {
		image := make([]byte, (directory+8)*SectorSize)
		copy(image, write(t, make([]byte, mib))[:SectorSize])
		le.PutUint64(image[56:], directory+1)
		le.PutUint64(image[64:], directory+8)
		le.PutUint32(image[(directory+1)*SectorSize:], sector+1)
		if err := apply(image, -1, make([]byte, mib)); fault == "" && err != nil || fault != "" && (!errors.Is(err, ErrFormat) || !strings.Contains(err.Error(), fault)) {
			t.Errorf("table at sector %d: %v, want %q", sector, err, fault)
		}
	}
}

// A header may say where the directory behind the grains is: until that has
// come, the image is not complete.
func TestReaderWaitsForDirectory(t *testing.T) {
	contents := disk(2*mib, [2]int64{0, mib})
	image := write(t, contents)
	le := binary.LittleEndian
	le.PutUint64(image[56:], le.Uint64(image[len(image)-1024+56:]))
	got := make([]byte, len(contents))
	if err := apply(image, -1, got); err != nil || !bytes.Equal(got, contents) {
		t.Errorf("whole: %v, or not the contents", err)
	}
	first := overheadSectors * SectorSize
	end := first + int(roundUp(grainHead+int64(le.Uint32(image[first+8:])), SectorSize))
	if err := apply(image[:end], -1, got); !errors.Is(err, io.ErrUnexpectedEOF) {
		t.Errorf("behind the first grain: %v", err)
	}
}

func TestReaderRefuses(t *testing.T) {
	contents := disk(2*mib, [2]int64{0, mib})
	good := write(t, contents)
	le := binary.LittleEndian
	u32 := func(at int, v uint32) func([]byte) { return func(b []byte) { le.PutUint32(b[at:], v) } }
	u64 := func(at int, v uint64) func([]byte) { return func(b []byte) { le.PutUint64(b[at:], v) } }
	first := overheadSectors * SectorSize
	for want, change := range map[string]func([]byte){
		"magic":                          u32(0, 0),
		"version at byte 4 is 4":         u32(4, 4),
		"version at byte 4 is 0":         u32(4, 0),
		"flags":                          u32(8, 1),
		"flags at byte 8 is 0x10001":     u32(8, 0x10001),
		"capacity at byte 12":            u64(12, 1<<60),
		"grain size at byte 20 is 0":     u64(20, 0),
		"grain size at byte 20 is 129":   u64(20, 129),
		"grain size at byte 20 is 1099":  u64(20, 1<<40),
		"entries of a table":             u32(44, 511),
		"line ends":                      u32(73, 0),
		"overhead at byte 64 is 0":       u64(64, 0),
		"overhead at byte 64 is 18":      u64(64, 1<<64-1),
		"sector of a grain":              u64(first, 1),
		"sector of a grain at byte 6553": u64(first, 1<<40),
		"length of a grain":              u32(first+8, 1<<32-1),
		"grain at byte":                  u32(first+grainHead+4, 0x12345678),
		"footer at byte":                 u64(len(good)-1024+12, 5),
		"directory at byte":              u64(len(good)-1024+56, 5),
		"without a footer":               u64(len(good)-1536, 0),
	} {
		b := bytes.Clone(good)
		change(b)
		if want == "without a footer" {
			clear(b[len(b)-1536 : len(b)-1024])
		}
		err := apply(b, int64(len(b)), make([]byte, len(contents)))
		if !errors.Is(err, ErrFormat) || !strings.Contains(err.Error(), want) {
			t.Errorf("%v, want one that says %q", err, want)
		}
	}
}

func TestWriterRefuses(t *testing.T) {
	for _, size := range []int64{0, 511, MaxSize + 512, -512} {
		if _, err := NewWriter(io.Discard, Options{Size: size}); err == nil {
			t.Errorf("size %d is taken", size)
		}
	}
	w, err := NewWriter(io.Discard, Options{Size: mib})
	if err != nil {
		t.Fatal(err)
	}
	var g Grain
	for _, index := range []int64{3, 3} {
		if err := g.Compress(index, make([]byte, GrainSize)); err != nil {
			t.Fatal(err)
		}
		err = w.Write(&g)
	}
	if err == nil {
		t.Error("a grain is taken twice")
	}
	if again := w.Close(); again != err {
		t.Errorf("then Close says %v", again)
	}
	broken := errors.New("broken")
	if _, err := NewWriter(failing{broken}, Options{Size: mib}); !errors.Is(err, broken) {
		t.Errorf("a broken connection: %v", err)
	}
}

type failing struct{ err error }

func (f failing) Write([]byte) (int, error) { return 0, f.err }

// FuzzReader feeds anything to a Reader: it ends with io.EOF or a typed error,
// and its runs lie on the disk.
func FuzzReader(f *testing.F) {
	small := write(f, disk(70<<10, [2]int64{0, 10}, [2]int64{66 << 10, 100}))
	f.Add(small)
	f.Add(append(bytes.Clone(small[:SectorSize]), small[overheadSectors*SectorSize:]...))
	f.Add(fronted(f, disk(70<<10, [2]int64{0, 10}, [2]int64{66 << 10, 100}), 60, []uint32{30}, nil))
	f.Fuzz(func(t *testing.T, b []byte) {
		for _, length := range []int64{-1, int64(len(b)), int64(len(b)) + 5} {
			r, err := NewReader(bytes.NewReader(b), ReaderOptions{Length: length})
			for n := 0; err == nil; n++ {
				var run Run
				if run, err = r.Next(); err != nil {
					break
				}
				if run.Off < 0 || run.Len <= 0 || run.Off+run.Len > r.Size() || n > len(b) {
					t.Fatalf("run %d is %+v of a disk of %d", n, run, r.Size())
				}
				if _, err := io.ReadFull(r, make([]byte, run.Len)); err != nil {
					t.Fatal(err)
				}
			}
			if err != io.EOF && !errors.Is(err, ErrFormat) && !errors.Is(err, io.ErrUnexpectedEOF) {
				t.Fatalf("error is %v", err)
			}
		}
	})
}
