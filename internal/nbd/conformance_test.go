package nbd

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"iter"
	"math"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"coppice/internal/storage"
)

// eachWire runs fn for each way of framing.
func eachWire(t *testing.T, fn func(t *testing.T, w wire)) {
	for name, w := range wires {
		t.Run(name, func(t *testing.T) { fn(t, w) })
	}
}

func TestReadsAndWrites(t *testing.T) {
	const size = 40 << 20
	eachWire(t, func(t *testing.T, w wire) {
		_, v := newVolume(t, size)
		r := newRig(t, map[string]*Export{"disk": {Device: v}}, Options{}, nil)
		c := r.connect(w, "disk")
		if c.Size() != size {
			t.Fatalf("size %d, want %d", c.Size(), size)
		}
		shadow := make([]byte, size)
		rng := rand.New(rand.NewPCG(1, uint64(w)))
		lengths := []int{1, 511, 4096, 5000, smallSize, smallSize + 1, 300 << 10, pieceSize, pieceSize + 1, 9 << 20, maxRequest}
		for i, n := range lengths {
			p := make([]byte, n)
			for j := range p {
				p[j] = byte(rng.Uint32() | 1)
			}
			off := rng.Int64N(size - int64(n) + 1)
			flags := uint16(0)
			if i%2 == 1 {
				flags = CmdFUA
			}
			if _, err := c.Write(p, off, flags); err != nil {
				t.Fatalf("write %d bytes at %d: %v", n, off, err)
			}
			copy(shadow[off:], p)
			hole := rng.Int64N(size - 1<<20)
			if err := c.WriteZeroes(hole, 1<<20-7, uint16(i%2)*CmdNoHole); err != nil {
				t.Fatal(err)
			}
			clear(shadow[hole : hole+1<<20-7])
			for range 3 {
				n := lengths[rng.IntN(len(lengths))]
				off := rng.Int64N(size - int64(n) + 1)
				got := make([]byte, n)
				if _, err := c.ReadAt(got, off); err != nil {
					t.Fatalf("read %d bytes at %d: %v", n, off, err)
				}
				if !bytes.Equal(got, shadow[off:off+int64(n)]) {
					t.Fatalf("%d bytes at %d are not what was written", n, off)
				}
			}
		}
		if err := c.Flush(context.Background()); err != nil {
			t.Fatal(err)
		}
		got := make([]byte, size)
		if _, err := v.ReadAt(got, 0); err != nil || !bytes.Equal(got, shadow) {
			t.Fatalf("the device does not hold what was written: %v", err)
		}
		if err := c.Close(); err != nil {
			t.Fatal(err)
		}
	})
}

func TestTrim(t *testing.T) {
	_, v := newVolume(t, 1<<20)
	r := newRig(t, map[string]*Export{"disk": {Device: v}}, Options{}, nil)
	c := r.connect(wireExtended, "disk", ContextAllocation)
	full := bytes.Repeat([]byte{7}, 1<<20)
	if _, err := c.WriteAt(full, 0); err != nil {
		t.Fatal(err)
	}
	if err := c.Trim(5000, 100_000, CmdFUA); err != nil {
		t.Fatal(err)
	}
	got, err := c.Extents(0, 1<<20)
	if err != nil {
		t.Fatal(err)
	}
	want := []storage.Extent{{Off: 0, Len: 8192}, {Off: 8192, Len: 94208, Hole: true}, {Off: 102400, Len: 1<<20 - 102400}}
	if fmt.Sprint(got) != fmt.Sprint(want) {
		t.Errorf("extents %v, want %v: whole grains within the range, and no more", got, want)
	}
	if err := c.Trim(1, 100, 0); err != nil {
		t.Errorf("trim of less than a grain: %v", err)
	}
	b := make([]byte, 200)
	if _, err := c.ReadAt(b, 0); err != nil || !bytes.Equal(b, full[:200]) {
		t.Errorf("trim of less than a grain changed bytes beside its range or in it: %v", err)
	}
}

// wantErrno checks that an error is what a server says.
func wantErrno(t *testing.T, what string, err error, want Errno) {
	t.Helper()
	if !errors.Is(err, want) {
		t.Errorf("%s: %v, want %v", what, err, want)
	}
}

func TestRefusedRequests(t *testing.T) {
	const size = 1 << 20
	eachWire(t, func(t *testing.T, w wire) {
		_, v := newVolume(t, size)
		r := newRig(t, map[string]*Export{"rw": {Device: v}, "ro": {Device: v, ReadOnly: true}}, Options{}, nil)
		c := r.connect(w, "rw")
		block := make([]byte, 4096)
		past := func(do func(off int64) error, want Errno) {
			t.Helper()
			for _, off := range []int64{size - 4095, size, size + 1, math.MaxInt64 - 4096, math.MaxInt64, -1, -4096} {
				wantErrno(t, fmt.Sprintf("at %d", off), do(off), want)
			}
		}
		past(func(off int64) error { _, err := c.ReadAt(block, off); return err }, EINVAL)
		past(func(off int64) error { _, err := c.WriteAt(block, off); return err }, ENOSPC)
		past(func(off int64) error { return c.WriteZeroes(off, 4096, 0) }, ENOSPC)
		past(func(off int64) error { return c.Trim(off, 4096, 0) }, EINVAL)
		past(func(off int64) error { return c.Cache(off, 4096) }, EINVAL)
		for cmd := range uint16(20) {
			if cmd == cmdDisconnect {
				continue
			}
			for bit := range 16 {
				req := request{cmd: cmd, flags: 1 << bit, off: 0, length: 4096}
				var payload, data []byte
				switch cmd {
				case cmdRead:
					data = block
				case cmdWrite:
					payload = block
					if w == wireExtended {
						req.flags |= cmdPayloadLen
					}
				case cmdFlush:
					req.length = 0
				}
				if w == wireExtended && req.flags&cmdPayloadLen != 0 {
					payload = block[:req.length]
				}
				_, err := c.do(req, payload, data)
				ok := bit == 0 && cmd != cmdBlockStatus && cmd < cmdBlockStatus
				switch {
				case cmd == cmdRead && w != wireSimple && bit == 2,
					cmd == cmdWriteZeroes && (bit == 1 || bit == 4),
					cmd == cmdWrite && w == wireExtended && bit == 5:
					ok = true
				}
				if ok && err != nil {
					t.Errorf("command %d with flag bit %d: %v, want success", cmd, bit, err)
				}
				if !ok {
					wantErrno(t, fmt.Sprintf("command %d with flag bit %d", cmd, bit), err, EINVAL)
				}
			}
		}
		long := make([]byte, maxRequest+1)
		_, err := c.Read(long, 0, 0)
		wantErrno(t, "read past the end and too long", err, EINVAL)
		wantErrno(t, "flush of a range", func() error { _, err := c.do(request{cmd: cmdFlush, length: 1}, nil, nil); return err }(), EINVAL)
		if _, err := c.WriteAt(nil, 0); err != nil {
			t.Errorf("write of nothing: %v", err)
		}
		if _, err := c.ReadAt(nil, size); err != nil {
			t.Errorf("read of nothing: %v", err)
		}

		c = r.connect(w, "ro")
		if c.Flags()&FlagReadOnly == 0 {
			t.Error("a read-only export is not said to be one")
		}
		_, err = c.WriteAt(block, 0)
		wantErrno(t, "write", err, EPERM)
		wantErrno(t, "trim", c.Trim(0, 4096, 0), EPERM)
		wantErrno(t, "write zeroes", c.WriteZeroes(0, 4096, 0), EPERM)
		if _, err := c.ReadAt(block, 0); err != nil {
			t.Errorf("read: %v", err)
		}
		if err := c.Flush(context.Background()); err != nil {
			t.Errorf("flush: %v", err)
		}
	})
}

func TestTooLong(t *testing.T) {
	_, v := newVolume(t, 8<<30)
	r := newRig(t, map[string]*Export{"disk": {Device: v}}, Options{}, nil)
	c := r.connect(wireExtended, "disk")
	long := make([]byte, maxRequest+1)
	_, err := c.Read(long, 0, 0)
	wantErrno(t, "read", err, EINVAL)
	_, err = c.Read(long, 0, CmdDF)
	wantErrno(t, "read in one chunk", err, EOVERFLOW)
	_, err = c.WriteAt(long, 0)
	wantErrno(t, "write", err, EINVAL)
	if err := c.WriteZeroes(0, 8<<30, CmdFastZero); err != nil {
		t.Errorf("zero 8 GiB in one request: %v", err)
	}
	if _, err := c.ReadAt(long[:4096], 0); err != nil {
		t.Errorf("read after a write that was too long: %v", err)
	}
}

// faulty fails as it is told to.
type faulty struct {
	storage.Volume
	err   error
	after int64 // reads from here on fail
}

func (f *faulty) ReadAt(p []byte, off int64) (int, error) {
	if f.err != nil && off+int64(len(p)) > f.after {
		return 0, f.err
	}
	return f.Volume.ReadAt(p, off)
}

func (f *faulty) WriteAt(p []byte, off int64) (int, error) {
	if f.err != nil {
		return 0, f.err
	}
	return f.Volume.WriteAt(p, off)
}

func (f *faulty) Flush(ctx context.Context) error { return errors.Join(f.err, f.Volume.Flush(ctx)) }

func (f *faulty) Extents(ctx context.Context, off, n int64) iter.Seq2[storage.Extent, error] {
	return f.Volume.Extents(ctx, off, n)
}

func TestDeviceErrors(t *testing.T) {
	for want, err := range map[Errno]error{
		ENOSPC:    &storage.SpaceError{Needed: 5, Free: 1},
		EPERM:     storage.ErrReadOnly,
		EIO:       &storage.CorruptError{Volume: testDisk},
		ESHUTDOWN: storage.ErrClosed,
	} {
		_, v := newVolume(t, 16<<20)
		r := newRig(t, map[string]*Export{"disk": {Device: &faulty{Volume: v, err: err}}}, Options{}, nil)
		eachWire(t, func(t *testing.T, w wire) {
			c := r.connect(w, "disk")
			b := make([]byte, 5<<20)
			_, err := c.ReadAt(b[:4096], 0)
			wantErrno(t, "short read", err, want)
			_, err = c.WriteAt(b[:4096], 0)
			wantErrno(t, "short write", err, want)
			_, err = c.WriteAt(b, 0)
			wantErrno(t, "long write", err, want)
			_, err = c.Write(b[:1], 0, CmdFUA)
			wantErrno(t, "write through", err, want)
			wantErrno(t, "flush", c.Flush(context.Background()), want)
			if err := c.WriteZeroes(0, 1, 0); err != nil {
				t.Errorf("after errors: %v", err)
			}
		})
	}
	if got := errnoOf(storage.ErrRepoReadOnly); got != EIO {
		t.Errorf("a store that has failed is %v, want %v", got, EIO)
	}
}

func TestErrorWithinARead(t *testing.T) {
	_, v := newVolume(t, 16<<20)
	data := bytes.Repeat([]byte{3}, 16<<20)
	if _, err := v.WriteAt(data, 0); err != nil {
		t.Fatal(err)
	}
	r := newRig(t, map[string]*Export{"disk": {Device: &faulty{v, storage.ErrCorrupt, 6 << 20}}}, Options{}, nil)
	c := r.connect(wireStructured, "disk")
	_, err := c.ReadAt(make([]byte, 12<<20), 0)
	re, ok := errors.AsType[*RemoteError](err)
	if !ok || re.Errno != EIO || re.At != 6<<20 {
		t.Errorf("read over damage at %d: %#v, want EIO there", 6<<20, err)
	}
	if _, err := c.ReadAt(make([]byte, 1<<20), 0); err != nil {
		t.Errorf("after that: %v", err)
	}
	// In one piece: told behind it, and the connection goes on.
	for _, w := range []wire{wireStructured, wireExtended} {
		c := r.connect(w, "disk")
		_, err := c.Read(make([]byte, 12<<20), 0, CmdDF)
		re, ok := errors.AsType[*RemoteError](err)
		if !ok || re.Errno != EIO || re.At != 6<<20 {
			t.Errorf("wire %d: read over damage in one chunk: %#v, want EIO at %d", w, err, 6<<20)
		}
		if _, err := c.Read(make([]byte, 6<<20), 0, CmdDF); err != nil {
			t.Errorf("wire %d: after that: %v", w, err)
		}
	}
	// A simple reply has begun, and can only break off.
	if _, err := r.connect(wireSimple, "disk").Read(make([]byte, 12<<20), 0, 0); !errors.Is(err, io.ErrUnexpectedEOF) {
		t.Errorf("simple reply to a read over damage: %v, want the end in the middle", err)
	}
}

func TestBlockStatus(t *testing.T) {
	_, v := newVolume(t, 1<<40)
	changed := []storage.Extent{{Off: 4096, Len: 8192}, {Off: 1 << 20, Len: 4096}, {Off: 1 << 39, Len: 1 << 38}}
	e := &Export{Device: v, Changed: map[string]func(context.Context, int64, int64) iter.Seq2[storage.Extent, error]{
		"coppice:changed:x": func(_ context.Context, off, n int64) iter.Seq2[storage.Extent, error] {
			return func(yield func(storage.Extent, error) bool) {
				for _, e := range changed {
					lo, hi := max(e.Off, off), min(e.End(), off+n)
					if lo < hi && !yield(storage.Extent{Off: lo, Len: hi - lo}, nil) {
						return
					}
				}
			}
		},
	}}
	if _, err := v.WriteAt(bytes.Repeat([]byte{1}, 8192), 1<<20); err != nil {
		t.Fatal(err)
	}
	r := newRig(t, map[string]*Export{"disk": e}, Options{}, nil)
	c := r.connect(wireExtended, "disk", ContextAllocation, "coppice:changed:x")
	got, err := c.BlockStatus(0, 1<<40, 0)
	if err != nil {
		t.Fatal(err)
	}
	hole := uint32(StateHole | StateZero)
	want := map[string][]Status{
		ContextAllocation: {{1 << 20, hole}, {8192, 0}, {1<<40 - 1<<20 - 8192, hole}},
		"coppice:changed:x": {
			{4096, 0},
			{8192, StateDirty},
			{1<<20 - 12288, 0},
			{4096, StateDirty},
			{1<<39 - 1<<20 - 4096, 0},
			{1 << 38, StateDirty},
			{1<<40 - 1<<39 - 1<<38, 0},
		},
	}
	if fmt.Sprint(got) != fmt.Sprint(want) {
		t.Errorf("status %v, want %v", got, want)
	}
	got, err = c.BlockStatusOf(5000, 100, "coppice:changed:x")
	if want := (map[string][]Status{"coppice:changed:x": {{100, StateDirty}}}); err != nil || fmt.Sprint(got) != fmt.Sprint(want) {
		t.Errorf("status of one context %v, %v, want %v", got, err, want)
	}
	got, err = c.BlockStatus(0, 1<<40, CmdReqOne)
	if err != nil || len(got[ContextAllocation]) != 1 || len(got["coppice:changed:x"]) != 1 {
		t.Errorf("status of one extent: %v, %v", got, err)
	}
	_, err = c.BlockStatusOf(1<<40-1, 2, ContextAllocation)
	wantErrno(t, "past the end", err, EINVAL)
	_, err = c.BlockStatusOf(0, 10)
	wantErrno(t, "of no context", err, EINVAL)

	c = r.connect(wireStructured, "disk", ContextAllocation)
	got, err = c.BlockStatus(1<<20, 1<<31, 0)
	if want := []Status{{8192, 0}, {1<<31 - 8192, hole}}; err != nil || fmt.Sprint(got[ContextAllocation]) != fmt.Sprint(want) {
		t.Errorf("status in 32 bits %v, %v, want %v", got, err, want)
	}
	c = r.connect(wireStructured, "disk")
	_, err = c.BlockStatus(0, 4096, 0)
	wantErrno(t, "without a context", err, EINVAL)
}

// TestManyExtents has more of them than one reply describes.
func TestManyExtents(t *testing.T) {
	const units = 3 * maxDescriptors
	_, v := newVolume(t, units*4096)
	for i := int64(0); i < units; i += 2 {
		if _, err := v.WriteAt([]byte{1}, i*4096); err != nil {
			t.Fatal(err)
		}
	}
	r := newRig(t, map[string]*Export{"disk": {Device: v}}, Options{}, nil)
	c := r.connect(wireStructured, "disk", ContextAllocation)
	got, err := c.Extents(0, units*4096)
	if err != nil || len(got) != units {
		t.Fatalf("%d extents, %v, want %d", len(got), err, units)
	}
	for i, e := range got {
		if want := (storage.Extent{Off: int64(i) * 4096, Len: 4096, Hole: i%2 == 1}); e != want {
			t.Fatalf("extent %d: %v, want %v", i, e, want)
		}
	}
}

// TestConcurrent has many requests of several connections under way, each on
// its own part of the disk, against a model.
func TestConcurrent(t *testing.T) {
	const parts, part = 6, 1 << 20
	for _, memory := range []int64{1, DefaultMemory} {
		_, v := newVolume(t, parts*part)
		r := newRig(t, map[string]*Export{"disk": {Device: v}}, Options{Memory: memory}, nil)
		var wg sync.WaitGroup
		for i := range 3 {
			c := r.connect(wire(i), "disk")
			// Some requests are handed over, whatever they take.
			for j := range parts / 3 {
				wg.Go(func() {
					base := int64(i*parts/3+j) * part
					rng := rand.New(rand.NewPCG(uint64(base), 2))
					shadow := make([]byte, part)
					for range 150 {
						n := 1 + rng.IntN(200<<10)
						off := rng.IntN(part - n)
						switch rng.IntN(5) {
						case 0, 1:
							p := make([]byte, n)
							for k := range p {
								p[k] = byte(rng.Uint32())
							}
							if _, err := c.WriteAt(p, base+int64(off)); err != nil {
								t.Error(err)
								return
							}
							copy(shadow[off:], p)
						case 2:
							if err := c.WriteZeroes(base+int64(off), int64(n), 0); err != nil {
								t.Error(err)
								return
							}
							clear(shadow[off : off+n])
						case 3:
							if err := c.Flush(context.Background()); err != nil {
								t.Error(err)
								return
							}
						default:
							p := make([]byte, n)
							if _, err := c.ReadAt(p, base+int64(off)); err != nil {
								t.Error(err)
								return
							}
							if !bytes.Equal(p, shadow[off:off+n]) {
								t.Errorf("%d bytes at %d are not what was written", n, base+int64(off))
								return
							}
						}
					}
				})
			}
		}
		wg.Wait()
		// A request gives its memory back behind its reply.
		ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
		defer cancel()
		if err := r.server.Shutdown(ctx); err != nil {
			t.Errorf("shutdown: %v", err)
		}
		if left := r.server.memory.left.Load(); left != memory {
			t.Errorf("%d bytes of the budget of %d are left", left, memory)
		}
	}
}

// TestDenseThenSparse reads so much data that holes are not looked for any
// more, and then holes.
func TestDenseThenSparse(t *testing.T) {
	_, v := newVolume(t, 64<<20)
	data := bytes.Repeat([]byte("dense"), 8<<20)[:32<<20]
	if _, err := v.WriteAt(data, 0); err != nil {
		t.Fatal(err)
	}
	counted := &countingDevice{Volume: v}
	r := newRig(t, map[string]*Export{"disk": {Device: counted}}, Options{}, nil)
	c := r.connect(wireStructured, "disk")
	got := make([]byte, 1<<20)
	for off := int64(0); off < 64<<20; off += 1 << 20 {
		if _, err := c.ReadAt(got, off); err != nil {
			t.Fatal(err)
		}
		want := make([]byte, 1<<20)
		if off < 32<<20 {
			want = data[off : off+1<<20]
		}
		if !bytes.Equal(got, want) {
			t.Fatalf("the MiB at %d is not what was written", off)
		}
		if off == 31<<20 {
			if n := counted.looks.Load(); n > 12 {
				t.Errorf("looked for holes %d times in 32 reads of data", n)
			}
		}
	}
	if n := counted.read.Load() - 32<<20; n > denseLooks<<20 {
		t.Errorf("%d MiB of holes were read as data", n>>20)
	}
}

// countingDevice counts what is asked of it.
type countingDevice struct {
	storage.Volume
	looks atomic.Int64
	read  atomic.Int64 // bytes
}

func (d *countingDevice) ReadAt(p []byte, off int64) (int, error) {
	d.read.Add(int64(len(p)))
	return d.Volume.ReadAt(p, off)
}

func (d *countingDevice) Extents(ctx context.Context, off, n int64) iter.Seq2[storage.Extent, error] {
	d.looks.Add(1)
	return d.Volume.Extents(ctx, off, n)
}
