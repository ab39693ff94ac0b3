package server

import (
	"bytes"
	"cmp"
	"context"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"strings"
	"sync"
	"testing"
	"testing/iotest"
	"testing/synctest"
	"time"

	"coppice/internal/storage"
	"coppice/internal/vhd"
)

// decode stores a body on a volume, and says how many bytes were changed.
func decode(t *testing.T, dec decoder, b []byte, length int64, v storage.Volume) (int64, error) {
	t.Helper()
	u := &upload{size: v.Size(), overlay: storage.NewOverlay(v), done: func(done, total int64) {
		if done < 0 || done > total {
			t.Errorf("progress is %d of %d", done, total)
		}
	}, interrupt: func() {}}
	var shadow storage.Volume
	u.atomic = func() error {
		shadow = testDisk(t, testRepo(t), 99, contentsOf(t, v))
		u.overlay = storage.NewOverlay(shadow)
		return nil
	}
	err := dec(t.Context(), iotest.HalfReader(bytes.NewReader(b)), length, u)
	if err == nil && shadow != nil {
		err = storage.NewOverlay(v).WriteAt(t.Context(), contentsOf(t, shadow), 0)
	}
	return u.overlay.Changed(), err
}

func TestReadRaw(t *testing.T) {
	const size = 4 * mib
	old := random(size, 1, [2]int64{0, size})
	for name, tt := range map[string]struct {
		body    []byte
		changed int64
		fault   string
	}{
		"nothing":      {body: nil},
		"one byte":     {body: []byte{^old[0]}, changed: 1},
		"same":         {body: old},
		"shorter":      {body: random(3*mib+5, 2, [2]int64{0, 3*mib + 5}), changed: 3*mib + 5},
		"whole":        {body: random(size, 2, [2]int64{0, size}), changed: size},
		"zeroes":       {body: make([]byte, size), changed: size},
		"one unit":     {body: append(bytes.Clone(old[:mib]), 1, 2, 3), changed: 3},
		"byte too far": {body: append(bytes.Clone(old), 0), fault: "more bytes than the disk has"},
	} {
		t.Run(name, func(t *testing.T) {
			for _, known := range []bool{false, true} {
				length := int64(-1)
				if known {
					length = int64(len(tt.body))
				}
				v := testDisk(t, testRepo(t), 1, old)
				changed, err := decode(t, readRaw, tt.body, length, v)
				if !isFault(err, tt.fault) {
					t.Fatalf("error is %v, want %q", err, tt.fault)
				}
				want := bytes.Clone(old)
				copy(want, tt.body)
				if got := contentsOf(t, v); !bytes.Equal(got, want) {
					t.Error("wrong contents")
				}
				if err == nil && changed != tt.changed {
					t.Errorf("%d bytes changed, want %d", changed, tt.changed)
				}
			}
		})
	}
}

// isFault tells whether err is a fault of the body with that text; "" means none.
func isFault(err error, text string) bool {
	if text == "" {
		return err == nil
	}
	_, ok := errors.AsType[*bodyError](err)
	return ok && strings.Contains(err.Error(), text)
}

// imageOf is a VHD of contents: a delta against a base when there is one.
func imageOf(t *testing.T, contents, base []byte) []byte {
	t.Helper()
	repo := testRepo(t)
	v, from := testDisk(t, repo, 1, contents), storage.Volume(nil)
	if base != nil {
		from = testDisk(t, repo, 2, base)
	}
	return encode(t, planVHD, downloadOf(repo, v, from))
}

func TestReadVHD(t *testing.T) {
	const size = 8 * mib
	old := random(size, 1, [2]int64{0, size})
	one := random(size, 2, [2]int64{mib, 3 * mib}, [2]int64{6 * mib, 4096})
	two := bytes.Clone(one)
	copy(two[3*mib:], "changed")
	clear(two[6*mib:][:4096])
	full, delta := imageOf(t, one, nil), imageOf(t, two, one)
	onOld := applied(t, full, old)

	flipped := bytes.Clone(full)
	flipped[70] ^= 1
	late := bytes.Clone(full)
	late[len(late)-1] ^= 1
	for name, tt := range map[string]struct {
		body   []byte
		disk   []byte // before
		want   []byte
		fault  string
		early  string // the fault when the length is known, if it is another one
		length int64  // of the body, when it is a lie
	}{
		"full onto zeroes":          {body: full, disk: make([]byte, size), want: one},
		"full onto contents":        {body: full, disk: old, want: onOld},
		"full onto itself":          {body: full, disk: one, want: one},
		"delta onto its base":       {body: delta, disk: one, want: two},
		"onto a larger disk":        {body: full, disk: make([]byte, size+mib), want: append(bytes.Clone(one), make([]byte, mib)...)},
		"onto a smaller disk":       {body: full, disk: make([]byte, 6*mib), want: make([]byte, 6*mib), fault: "disk ends at 6291456"},
		"behind an empty line":      {body: append([]byte("\r\n"), full...), disk: make([]byte, size), want: one},
		"behind two empty lines":    {body: append([]byte("\r\n\r\n"), full...), disk: old, want: old, fault: "want 2 (fixed)", early: "length of a fixed image"},
		"raw in place of a VHD":     {body: old, disk: one, want: one, fault: "footer cookie"},
		"nothing":                   {body: nil, disk: old, want: old, fault: "unexpected EOF"},
		"an empty line":             {body: []byte("\r\n"), disk: old, want: old, fault: "unexpected EOF"},
		"one byte":                  {body: []byte("c"), disk: old, want: old, fault: "unexpected EOF"},
		"wrong checksum":            {body: flipped, disk: old, want: old, fault: "footer checksum"},
		"wrong trailer":             {body: late, disk: make([]byte, size), want: one, fault: "trailing footer"},
		"cut at the trailing one":   {body: full[:len(full)-512], disk: make([]byte, size), want: one, fault: "trailing footer", early: "place of block"},
		"cut in a block":            {body: full[:len(full)-3*mib], disk: make([]byte, size), fault: "unexpected EOF", early: "place of block"},
		"shorter than it is said":   {body: full, disk: make([]byte, size), length: int64(len(full)) + 512, want: one, fault: "unexpected EOF"},
		"block behind the length":   {body: full, disk: old, length: int64(len(full)) - 512, want: old, fault: "place of block"},
		"more behind the last byte": {body: append(bytes.Clone(full), 1), disk: make([]byte, size), want: one, fault: "trailing footer"},
	} {
		t.Run(name, func(t *testing.T) {
			for _, known := range []bool{false, true} {
				length, fault, want := int64(-1), tt.fault, tt.want
				if known {
					length = cmp.Or(tt.length, int64(len(tt.body)))
					if tt.early != "" {
						fault, want = tt.early, tt.disk
					}
				} else if tt.length != 0 {
					continue
				}
				v := testDisk(t, testRepo(t), 1, tt.disk)
				if _, err := decode(t, readVHD, tt.body, length, v); !isFault(err, fault) {
					t.Fatalf("length %d: error is %v, want %q", length, err, fault)
				}
				if want != nil && !bytes.Equal(contentsOf(t, v), want) {
					t.Errorf("length %d: wrong contents", length)
				}
			}
		})
	}
}

// Sectors, not blocks, are the unit of an import: one bit is 512 bytes.
func TestReadVHDOneSector(t *testing.T) {
	old := random(2*mib, 1, [2]int64{0, 2 * mib})
	b := imageOf(t, random(2*mib, 2, [2]int64{0, 2 * mib}), nil)
	r, err := vhd.NewReader(bytes.NewReader(b), vhd.ReaderOptions{Length: -1})
	if err != nil {
		t.Fatal(err)
	}
	bitmap := b[r.Header().TableOffset()+512:][:512]
	clear(bitmap)
	bitmap[100] = 0x10
	v := testDisk(t, testRepo(t), 3, old)
	changed, err := decode(t, readVHD, b, int64(len(b)), v)
	if err != nil || changed != 512 {
		t.Errorf("%d bytes changed, error %v; want 512", changed, err)
	}
	if got := contentsOf(t, v); !bytes.Equal(got, applied(t, b, old)) || bytes.Equal(got, old) {
		t.Error("wrong contents")
	}
}

// frames is a body in the chunked form.
func frames(pieces ...piece) []byte {
	var b []byte
	for _, p := range pieces {
		b = binary.LittleEndian.AppendUint64(b, uint64(p.off))
		b = binary.LittleEndian.AppendUint32(b, uint32(len(p.data)))
		b = append(b, p.data...)
	}
	return b
}

func TestReadChunked(t *testing.T) {
	const size = 4 * mib
	old := random(size, 1, [2]int64{0, size})
	data := random(3*mib, 2, [2]int64{0, 3 * mib})
	head := func(off uint64, n uint32) []byte {
		return binary.LittleEndian.AppendUint32(binary.LittleEndian.AppendUint64(nil, off), n)
	}
	for name, tt := range map[string]struct {
		body  []byte
		want  []piece
		fault string
	}{
		"only the end":        {body: frames(piece{})},
		"one":                 {body: frames(piece{off: 513, data: data[:77]}, piece{}), want: []piece{{off: 513, data: data[:77]}}},
		"large":               {body: frames(piece{off: mib, data: data}, piece{}), want: []piece{{off: mib, data: data}}},
		"backwards":           {body: frames(piece{off: mib, data: data[:9]}, piece{off: 7, data: data[9:20]}, piece{}), want: []piece{{off: mib, data: data[:9]}, {off: 7, data: data[9:20]}}},
		"overlapping":         {body: frames(piece{off: 5, data: data[:9]}, piece{off: 7, data: data[9:20]}, piece{}), want: []piece{{off: 5, data: data[:9]}, {off: 7, data: data[9:20]}}},
		"at offset 0":         {body: frames(piece{data: data[:100]}, piece{}), want: []piece{{data: data[:100]}}},
		"empty in the middle": {body: frames(piece{off: 9}, piece{off: 1, data: data[:3]}, piece{}), want: []piece{{off: 1, data: data[:3]}}},
		"last byte":           {body: frames(piece{off: size - 1, data: data[:1]}, piece{}), want: []piece{{off: size - 1, data: data[:1]}}},
		"more behind the end": {body: append(frames(piece{}), frames(piece{off: 1, data: data})...)},
		"no end":              {body: frames(piece{off: 1, data: data[:3]}), want: []piece{{off: 1, data: data[:3]}}, fault: "unexpected EOF"},
		"nothing":             {fault: "unexpected EOF"},
		"cut header":          {body: head(5, 5)[:11], fault: "unexpected EOF"},
		"cut data":            {body: append(head(5, 5), 1, 2), fault: "unexpected EOF"},
		"behind the disk":     {body: frames(piece{off: size, data: data[:1]}), fault: "does not fit a disk of 4194304"},
		"across the end":      {body: frames(piece{off: size - 1, data: data[:2]}), fault: "does not fit"},
		"offset overflows":    {body: head(1<<63+5, 5), fault: "does not fit"},
		"largest offset":      {body: head(1<<64-1, 1<<32-1), fault: "does not fit"},
		"largest length":      {body: head(0, 1<<32-1), fault: "does not fit"},
	} {
		t.Run(name, func(t *testing.T) {
			v := testDisk(t, testRepo(t), 1, old)
			if _, err := decode(t, readChunked, tt.body, -1, v); !isFault(err, tt.fault) {
				t.Fatalf("error is %v, want %q", err, tt.fault)
			}
			want := bytes.Clone(old)
			for _, p := range tt.want {
				copy(want[p.off:], p.data)
			}
			if !bytes.Equal(contentsOf(t, v), want) {
				t.Error("wrong contents")
			}
		})
	}
}

// A store that fails ends an upload at once, also while the client is silent.
func TestUploadStorageFails(t *testing.T) {
	for name, dec := range map[string]decoder{"raw": readRaw, "chunked": readChunked, "vhd": readVHD} {
		t.Run(name, func(t *testing.T) {
			data := random(4*mib, 1, [2]int64{0, 4 * mib})
			start := map[string][]byte{
				"raw":     data[:3*mib],
				"chunked": frames(piece{data: data})[:3*mib],
				"vhd":     imageOf(t, data, nil)[:3*mib],
			}[name]
			v := &watched{Volume: testDisk(t, testRepo(t), 7, make([]byte, 4*mib)), fail: func(int64) error { return errTest }}
			synctest.Test(t, func(t *testing.T) {
				ours, theirs := net.Pipe()
				go func() { _, _ = theirs.Write(start) }() // and then nothing more
				u := &upload{size: 4 * mib, overlay: storage.NewOverlay(v), done: func(int64, int64) {}, interrupt: func() {
					_ = ours.SetDeadline(time.Unix(1, 0))
				}}
				if err := dec(t.Context(), ours, -1, u); err != errTest {
					t.Errorf("error is %v, want %v", err, errTest)
				}
				_ = ours.Close()
				_ = theirs.Close()
			})
		})
	}
}

// tablesOnly is a qcow2 image of which the first of its L2 tables refers to
// data and all others are empty. All of them come before the L1 table, so that
// they are read from scratch space.
func tablesOnly(tables int) []byte {
	const cluster = 512
	l1 := (1 + tables + 1) * cluster
	b := make([]byte, l1+8*tables)
	be := binary.BigEndian
	be.PutUint32(b, 0x514649FB)
	be.PutUint32(b[4:], 2)
	be.PutUint32(b[20:], 9) // bits of a cluster
	be.PutUint64(b[24:], uint64(tables*cluster/8*cluster))
	be.PutUint32(b[36:], uint32(tables))
	be.PutUint64(b[40:], uint64(l1))
	data := (1 + tables) * cluster
	be.PutUint64(b[cluster:], uint64(data)) // the first entry of the first table
	copy(b[data:], "data")
	for i := range tables {
		be.PutUint64(b[l1+8*i:], uint64((1+i)*cluster))
	}
	return b
}

// tableReads is scratch space that counts reads, and makes all but the first
// ones wait.
type tableReads struct {
	storage.Volume
	n       int
	waiting chan struct{}
}

func (s *tableReads) ReadAt(p []byte, off int64) (int, error) {
	if s.n++; s.n > 2 { // the first table and its data
		<-s.waiting
	}
	return s.Volume.ReadAt(p, off)
}

// A store that fails ends an upload also when there are many tables left that
// say nothing.
func TestUploadStorageFailsBetweenTables(t *testing.T) {
	const tables = 128
	image := tablesOnly(tables)
	repo := testRepo(t)
	v := &watched{Volume: testDisk(t, repo, 1, make([]byte, 4*mib)), fail: func(int64) error { return errTest }}
	space := testDisk(t, repo, 2, make([]byte, mib))
	synctest.Test(t, func(t *testing.T) {
		s := &tableReads{Volume: space, waiting: make(chan struct{})}
		u := &upload{
			size: 4 * mib, overlay: storage.NewOverlay(v), done: func(int64, int64) {},
			interrupt: sync.OnceFunc(func() { close(s.waiting) }),
			scratch:   func(int64) (storage.Volume, *storage.CloneBatch, error) { return s, nil, nil },
		}
		if err := readQcow2(t.Context(), bytes.NewReader(image), int64(len(image)), u); err != errTest {
			t.Errorf("error is %v, want %v", err, errTest)
		}
		if s.n > 3 {
			t.Errorf("%d reads of scratch space, want none after the write failed", s.n)
		}
	})
}

// A cancelled upload ends at once, also while the client is silent.
func TestUploadCancelled(t *testing.T) {
	for name, dec := range map[string]decoder{"raw": readRaw, "chunked": readChunked, "vhd": readVHD} {
		for _, sent := range []int{0, 5, 600, 2 * mib} {
			data := imageOf(t, random(8*mib, 1, [2]int64{0, 8 * mib}), nil)
			if name == "chunked" {
				data = frames(piece{data: data[:7*mib]})
			}
			v := testDisk(t, testRepo(t), 7+sent, make([]byte, 8*mib))
			synctest.Test(t, func(t *testing.T) {
				ctx, cancel := context.WithCancelCause(t.Context())
				ours, theirs := net.Pipe()
				interrupt := func() { _ = ours.SetDeadline(time.Unix(1, 0)) }
				defer context.AfterFunc(ctx, interrupt)()
				go func() {
					_, _ = theirs.Write(data[:sent])
					time.Sleep(time.Second) // until everything else waits
					cancel(errTest)
				}()
				u := &upload{size: 8 * mib, overlay: storage.NewOverlay(v), done: func(int64, int64) {}, interrupt: interrupt}
				if err := dec(ctx, ours, -1, u); err == nil {
					t.Errorf("%s, %d bytes: no error", name, sent)
				}
				_ = ours.Close()
				_ = theirs.Close()
			})
		}
	}
}

func TestSkipLineEnd(t *testing.T) {
	for _, tt := range []struct {
		in, want        string
		length, shorter int64
	}{
		{"\r\nabc", "abc", 5, 3},
		{"\r\nabc", "abc", -1, -1},
		{"\r\n\r\nabc", "\r\nabc", 7, 5},
		{"\n\rabc", "\n\rabc", 5, 5},
		{"\r", "\r", 1, 1},
		{"", "", 0, 0},
	} {
		r, length, err := skipLineEnd(strings.NewReader(tt.in), tt.length)
		if err != nil {
			t.Fatal(err)
		}
		if got, err := io.ReadAll(r); err != nil || string(got) != tt.want || length != tt.shorter {
			t.Errorf("%q of %d: %q of %d, error %v", tt.in, tt.length, got, length, err)
		}
	}
	if _, _, err := skipLineEnd(iotest.ErrReader(errTest), -1); err != errTest {
		t.Errorf("error is %v", err)
	}
}
