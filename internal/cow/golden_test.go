package cow

import (
	"archive/zip"
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"flag"
	"fmt"
	"io"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"coppice/internal/vfs"
)

var writeGolden = flag.Bool("cow.golden", false, "write the store that TestFormatIsFrozen makes to testdata")

// goldenName is the store of the version that is written now, below testdata:
// a zip of its files, and a text of what is in it. Those of older versions stay
// there for ever.
var goldenName = fmt.Sprintf("store-v%d", formatVersion)

// goldenGeometry has the page and the unit of an ordinary store, and regions
// of 2 MiB, so that a store is small.
var goldenGeometry = Geometry{UnitSize: 4096, Fanout: 256, PageCounters: 64, RegionsPerFile: 2}

// goldenStore makes a store, the same one every time: volumes with attributes,
// holes, snapshots, clones, a snapshot without its data, a volume that is
// deleted and not reaped, and operations of each kind that are in the log only.
// It is as a kill leaves it. What is released when does not matter: no unit is
// used twice.
func goldenStore(t *testing.T) *vfs.Mem {
	t.Helper()
	ctx := context.Background()
	m := vfs.NewMem(0)
	o := Options{Geometry: goldenGeometry, LogBytes: minLogBytes(goldenGeometry), CheckpointAfter: 1 << 40, Limits: Limits{ReapPages: 1}}
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	must(createFiles(m, o))
	f, err := m.Open(superName)
	must(err)
	sb, err := newestSuper(f)
	must(err)
	copy(sb.uuid[:], "golden store UUID")
	copy(sb.logKey[:], "golden store log")
	must(errors.Join(writeSuper(f, sb), f.Close()))

	// Once it is armed, the tree writer stops where it has written a superblock.
	armed, wrote, goOn := make(chan struct{}, 1), make(chan struct{}), make(chan struct{})
	s, err := Open(ctx, vfs.NewInject(m, nil, func(c vfs.Call) error {
		if c.Op == vfs.OpDatasync && c.Name == superName {
			select {
			case <-armed:
				close(wrote)
				<-goOn
			default:
			}
		}
		return nil
	}), o)
	must(err)
	disks := map[byte]*Disk{}
	open := func(n byte) {
		t.Helper()
		d, err := s.OpenDisk(ctx, ID{n}, Live)
		must(err)
		disks[n] = d
	}
	create := func(n byte, size int64, attrs string) {
		t.Helper()
		_, err := s.Create(ctx, ID{n}, size, []byte(attrs))
		must(err)
		open(n)
	}
	write := func(n byte, off, size int64) { // and flush
		t.Helper()
		line := fmt.Sprintf("volume %d from byte %d, %d bytes\n", n, off, size)
		p := bytes.Repeat([]byte(line), int(size)/len(line)+1)[:size]
		_, err := disks[n].WriteAt(p, off)
		must(err)
		must(disks[n].Flush(ctx))
	}
	settle := func() { // until nothing is left to do
		t.Helper()
		must(drain(s))
		synctest.Wait()
	}
	create(1, 1<<30, "attributes of the first volume")
	write(1, 0, 300<<10) // straight to the space files
	write(1, 5<<20, 20<<10)
	write(1, 1<<30-4096, 4096)
	settle()
	_, err = s.Snapshot(ctx, []Pair{{Src: ID{1}, New: ID{2}}})
	must(err)
	write(1, 8<<10, 40<<10)
	must(disks[1].Zero(ctx, 5<<20, 8<<10))
	must(disks[1].Flush(ctx))
	settle()
	_, err = s.Clone(ctx, Pair{Src: ID{2}, New: ID{3}, Attrs: bytes.Repeat([]byte("long "), 2000)})
	must(err)
	open(3)
	write(3, 700<<10, 12<<10)
	create(4, 64<<20, "")
	write(4, 0, 64<<10)
	settle()
	_, err = s.Snapshot(ctx, []Pair{{Src: ID{4}, New: ID{5}}})
	must(err)
	write(4, 32<<10, 64<<10)
	must(s.DestroyData(ctx, ID{5}))
	settle()
	create(6, 1<<30, "to be deleted")
	for i := range int64(4) {
		write(6, i*100<<20, 8<<10)
	}
	settle()
	must(s.Delete(ctx, ID{6}))
	armed <- struct{}{}
	s.kick()
	<-wrote
	// From here on everything is in the log behind the superblock.
	write(1, 40<<20, 24<<10)
	write(3, 100, 1000)
	write(4, 10<<20, 280<<10)
	must(disks[3].Zero(ctx, 4096, 8192))
	must(disks[3].Flush(ctx))
	_, err = s.Snapshot(ctx, []Pair{{Src: ID{1}, New: ID{7}}, {Src: ID{4}, New: ID{8}, Attrs: []byte("of a group")}})
	must(err)
	write(1, 0, 5000)
	must(s.Revert(ctx, ID{3}, ID{7}))
	_, err = s.Resize(ctx, ID{4}, 48<<20)
	must(err)
	must(s.SetAttrs(ctx, ID{2}, []byte("set in the log")))
	create(9, 1<<20, "made in the log")
	write(9, 4096, 4096)
	create(10, 1<<20, "")
	must(s.Delete(ctx, ID{10}))
	must(s.DestroyData(ctx, ID{8}))
	killed := m.Kill()
	close(goOn)
	must(s.Close())
	return killed
}

// contentsOf describes every volume of an open store: a line of what it is and
// checksums of its bytes and attributes.
func contentsOf(s *Store) (string, error) {
	ctx := context.Background()
	var b strings.Builder
	for i := range s.List() {
		attrs, err := s.Attrs(ctx, i.ID)
		if err != nil {
			return "", err
		}
		h := sha256.New()
		if !i.NoData {
			d, err := s.OpenDisk(ctx, i.ID, Live)
			if err != nil {
				return "", err
			}
			for e, err := range d.Extents(ctx, 0, i.Size) { // of all but holes
				if err != nil {
					return "", err
				}
				if e.Hole {
					continue
				}
				fmt.Fprintln(h, e.Off, e.Len)
				if _, err := io.Copy(h, io.NewSectionReader(d, e.Off, e.Len)); err != nil {
					return "", err
				}
			}
		}
		fmt.Fprintf(&b, "%v size %d read-only %v no-data %v parent %v contents %x attributes %x\n",
			i.ID, i.Size, i.ReadOnly, i.NoData, i.Parent, h.Sum(nil), sha256.Sum256(attrs))
	}
	return b.String(), nil
}

// filesOf returns the files of a store.
func filesOf(m *vfs.Mem) (map[string][]byte, error) {
	names, err := m.List()
	if err != nil {
		return nil, err
	}
	files := map[string][]byte{}
	for _, name := range names {
		f, err := m.Open(name)
		if err != nil {
			return nil, err
		}
		size, err := f.Size()
		if err != nil {
			return nil, err
		}
		files[name] = make([]byte, size)
		if _, err := f.ReadAt(files[name], 0); err != nil && err != io.EOF {
			return nil, err
		}
		if err := f.Close(); err != nil {
			return nil, err
		}
	}
	return files, nil
}

// readStore unpacks a store of testdata.
func readStore(t *testing.T, name string) map[string][]byte {
	t.Helper()
	z, err := zip.OpenReader(filepath.Join("testdata", name+".zip"))
	if err != nil {
		t.Fatal(err)
	}
	defer z.Close()
	files := map[string][]byte{}
	for _, f := range z.File {
		r, err := f.Open()
		if err != nil {
			t.Fatal(err)
		}
		if files[f.Name], err = io.ReadAll(r); err != nil {
			t.Fatal(err)
		}
	}
	return files
}

// TestOldStores opens a store of every version that there has been, replays its
// log, and finds in it what was put there; then it works with it.
func TestOldStores(t *testing.T) {
	names, err := filepath.Glob("testdata/store-v*.zip")
	if err != nil || len(names) < formatVersion {
		t.Fatalf("stores %q, %v", names, err)
	}
	ctx := context.Background()
	for _, name := range names {
		name = strings.TrimSuffix(filepath.Base(name), ".zip")
		t.Run(name, func(t *testing.T) {
			m := vfs.NewMem(0)
			for file, b := range readStore(t, name) {
				f, err := m.Create(file)
				if err == nil {
					err = f.Allocate(0, int64(len(b)))
				}
				if err == nil && len(b) > 0 {
					_, err = f.WriteAt(b, 0)
				}
				if err = errors.Join(err, f.Datasync(), f.Close()); err != nil {
					t.Fatal(err)
				}
			}
			if err := m.SyncDir(); err != nil {
				t.Fatal(err)
			}
			want, err := os.ReadFile(filepath.Join("testdata", name+".txt"))
			if err != nil {
				t.Fatal(err)
			}
			if err := checkClean(m); err != nil {
				t.Fatal(err)
			}
			s, err := Open(ctx, m, Options{})
			if err != nil {
				t.Fatal(err)
			}
			got, err := contentsOf(s)
			if err != nil || got != string(want) {
				t.Fatalf("%v\n%s\nwant\n%s", err, got, want)
			}
			if err := errors.Join(drain(s), s.Close(), checkClean(m)); err != nil {
				t.Fatal(err)
			}
			if s, err = Open(ctx, m, Options{}); err != nil {
				t.Fatal(err)
			}
			if got, err = contentsOf(s); err != nil || got != string(want) {
				t.Errorf("after the recovery: %v\n%s", err, got)
			}
			for i := range s.List() {
				if err := s.Delete(ctx, i.ID); err != nil {
					t.Fatal(err)
				}
			}
			if err := errors.Join(drain(s), s.Close(), checkClean(m)); err != nil {
				t.Fatal(err)
			}
		})
	}
}

// TestFormatIsFrozen makes the golden store again and compares every byte. A
// difference is a change of the format, which needs a version or a feature bit
// of its own and a store beside the old ones; or one of what is put where, which
// is none: then -cow.golden writes the store anew, after TestOldStores has
// passed with the one before.
func TestFormatIsFrozen(t *testing.T) {
	if invariants {
		t.Skip("freed units are poisoned")
	}
	var files map[string][]byte
	var text string
	synctest.Test(t, func(t *testing.T) {
		m := goldenStore(t)
		var err error
		if files, err = filesOf(m); err != nil {
			t.Fatal(err)
		}
		s, err := Open(context.Background(), m, Options{})
		if err != nil {
			t.Fatal(err)
		}
		if text, err = contentsOf(s); err != nil {
			t.Fatal(err)
		}
		if err := s.Close(); err != nil {
			t.Fatal(err)
		}
	})
	if *writeGolden {
		var b bytes.Buffer
		z := zip.NewWriter(&b)
		for _, name := range slices.Sorted(maps.Keys(files)) {
			w, err := z.CreateHeader(&zip.FileHeader{Name: name, Method: zip.Deflate, Modified: time.Unix(0, 0).UTC()})
			if err != nil {
				t.Fatal(err)
			}
			if _, err := w.Write(files[name]); err != nil {
				t.Fatal(err)
			}
		}
		err := errors.Join(z.Close(),
			os.WriteFile(filepath.Join("testdata", goldenName+".zip"), b.Bytes(), 0o644),
			os.WriteFile(filepath.Join("testdata", goldenName+".txt"), []byte(text), 0o644))
		if err != nil {
			t.Fatal(err)
		}
	}
	want := readStore(t, goldenName)
	for _, name := range slices.Sorted(maps.Keys(want)) {
		got := files[name]
		if bytes.Equal(got, want[name]) {
			continue
		}
		at := 0
		for at < min(len(got), len(want[name])) && got[at] == want[name][at] {
			at++
		}
		t.Errorf("%s: %d bytes, the golden store has %d, and they differ from byte %d on", name, len(got), len(want[name]), at)
	}
	if len(files) != len(want) {
		t.Errorf("files %q, want %q", slices.Sorted(maps.Keys(files)), slices.Sorted(maps.Keys(want)))
	}
}

// TestEntriesAreFrozen compares entries with their bytes. A golden store has
// nothing that is lost.
func TestEntriesAreFrozen(t *testing.T) {
	for _, tt := range []struct {
		entry entry
		want  string
	}{
		{entry{}, "0000000000 0000000000 00000000 00 00"},
		{hole(0x0102030405), "0000000000 0504030201 00000000 00 00"},
		{entry{addr: 0xa1a2a3a4a5, birth: 0x0102030405, crc: 0xc1c2c3c4, kind: kindData}, "a5a4a3a2a1 0504030201 c4c3c2c1 01 00"},
		{entry{addr: 0xa1a2a3a4a5, birth: 0x0102030405, crc: 0xc1c2c3c4, kind: kindPage, level: 1}, "a5a4a3a2a1 0504030201 c4c3c2c1 02 01"},
		{entry{addr: maxAddr, birth: maxEpoch, crc: 1<<32 - 1, kind: kindPage, level: 5, twice: true}, "ffffffffff ffffffffff ffffffff 02 85"},
		{lost(0x0102030405), "0000000000 0504030201 00000000 03 00"},
	} {
		var b [entrySize]byte
		tt.entry.put(b[:])
		got := fmt.Sprintf("%x %x %x %x %x", b[:5], b[5:10], b[10:14], b[14:15], b[15:])
		if got != tt.want || getEntry(b[:]) != tt.entry {
			t.Errorf("%+v: %s, want %s; read back %+v", tt.entry, got, tt.want, getEntry(b[:]))
		}
	}
}
