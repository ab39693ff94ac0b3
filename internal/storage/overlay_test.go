package storage_test

import (
	"bytes"
	"context"
	"errors"
	"io"
	"iter"
	"math/rand/v2"
	"slices"
	"sync"
	"testing"

	"coppice/internal/storage"
	"coppice/internal/storage/mem"
)

const unit = storage.Unit

// recorder is a volume that notes what is written to it and read from it.
type recorder struct {
	storage.Volume
	mu      sync.Mutex
	touched map[int64]bool // units written or zeroed
	calls   int            // writes and zeroings
	read    int64          // bytes
	fail    error          // of the next write
}

func (r *recorder) note(off, n int64) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.calls++
	for u := off / unit; u*unit < off+n; u++ {
		r.touched[u] = true
	}
}

func (r *recorder) ReadAt(p []byte, off int64) (int, error) {
	r.read += int64(len(p))
	return r.Volume.ReadAt(p, off)
}

func (r *recorder) WriteAt(p []byte, off int64) (int, error) {
	if err := r.fail; err != nil {
		r.fail = nil
		n, _ := r.Volume.WriteAt(p[:len(p)/2], off)
		return n, err
	}
	r.note(off, int64(len(p)))
	return r.Volume.WriteAt(p, off)
}

func (r *recorder) Zero(ctx context.Context, off, n int64) error {
	r.note(off, n)
	return r.Volume.Zero(ctx, off, n)
}

// volume returns a volume of a new repository, holding data.
func volume(t testing.TB, size int64, data []byte) *recorder {
	t.Helper()
	repo, err := mem.Driver().Open(t.Context(), nil, true)
	must(t, err)
	t.Cleanup(func() { _ = repo.Close() })
	const id = "00000000-0000-4000-8000-000000000000"
	_, err = repo.Create(t.Context(), storage.Spec{ID: id, Size: size})
	must(t, err)
	v, err := repo.Open(t.Context(), id, storage.Live)
	must(t, err)
	_, err = v.WriteAt(data, 0)
	must(t, err)
	return &recorder{Volume: v, touched: map[int64]bool{}}
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func contents(t testing.TB, v storage.Volume) []byte {
	t.Helper()
	p := make([]byte, v.Size())
	if _, err := v.ReadAt(p, 0); err != nil && err != io.EOF {
		t.Fatal(err)
	}
	return p
}

// picture makes one unit per letter: "." zeros, others full of the letter.
func picture(letters string) []byte {
	var p []byte
	for _, l := range []byte(letters) {
		if l == '.' {
			l = 0
		}
		p = append(p, bytes.Repeat([]byte{l}, unit)...)
	}
	return p
}

func TestOverlayTouchesOnlyChanges(t *testing.T) {
	for _, c := range []struct {
		name, old, new string
		touched        []int64
		calls          int
	}{
		{"into a hole", "......", "aa..b.", []int64{0, 1, 4}, 2},
		{"zeros into a hole", "......", "......", nil, 0},
		{"the same", "abcdef", "abcdef", nil, 0},
		{"all new", "abcdef", "ghijkl", []int64{0, 1, 2, 3, 4, 5}, 1},
		{"some new", "abcdef", "abXYeZ", []int64{2, 3, 5}, 2},
		{"zeros over data", "abcdef", "a..d.f", []int64{1, 2, 4}, 2},
		{"mixed", "ab..ef", "aXc.e.", []int64{1, 2, 5}, 3},
	} {
		for _, step := range []int{1, 500, unit, unit + 1, 3 * unit, 1 << 20} {
			if step == 1 && c.name != "mixed" {
				continue
			}
			v := volume(t, int64(len(c.old))*unit, picture(c.old))
			o := storage.NewOverlay(v)
			off := int64(0)
			for part := range slices.Chunk(picture(c.new), step) {
				must(t, o.WriteAt(t.Context(), part, off))
				off += int64(len(part))
			}
			if !bytes.Equal(contents(t, v), picture(c.new)) {
				t.Errorf("%s, in steps of %d: wrong contents", c.name, step)
			}
			var touched []int64
			for u := range v.touched {
				touched = append(touched, u)
			}
			slices.Sort(touched)
			if !slices.Equal(touched, c.touched) {
				t.Errorf("%s, in steps of %d: units %v touched, want %v", c.name, step, touched, c.touched)
			}
			if step == 1<<20 {
				if v.calls != c.calls {
					t.Errorf("%s: %d calls, want %d", c.name, v.calls, c.calls)
				}
				if want := int64(len(c.touched)) * unit; o.Changed() != want {
					t.Errorf("%s: Changed = %d, want %d", c.name, o.Changed(), want)
				}
			}
		}
	}
}

func TestOverlayZero(t *testing.T) {
	v := volume(t, 8*unit, picture("ab..cdef"))
	o := storage.NewOverlay(v)
	must(t, o.Zero(t.Context(), unit+100, 4*unit))
	want := picture("ab..cdef")
	clear(want[unit+100 : 5*unit+100])
	if !bytes.Equal(contents(t, v), want) {
		t.Error("wrong contents")
	}
	for _, u := range []int64{0, 2, 3, 6, 7} {
		if v.touched[u] {
			t.Errorf("unit %d touched", u)
		}
	}
	calls := v.calls
	must(t, o.Zero(t.Context(), unit+100, 4*unit))
	if v.calls != calls {
		t.Errorf("%d calls for zeros over zeros", v.calls-calls)
	}
}

func TestOverlayRandom(t *testing.T) {
	const size = 100 * unit
	rng := rand.New(rand.NewPCG(1, 1))
	v := volume(t, size, nil)
	o := storage.NewOverlay(v)
	model := make([]byte, size)
	next := int64(0)
	for range 300 {
		off := rng.Int64N(size)
		if rng.IntN(3) > 0 && next < size {
			off = next
		}
		n := min(size-off, rng.Int64N(6*unit))
		next = off + n
		p := slices.Clone(model[off : off+n])
		for range rng.IntN(3) {
			if n > 0 {
				from := rng.Int64N(n)
				to := from + rng.Int64N(n-from+1)
				for i := from; i < to; i++ {
					p[i] = byte(rng.IntN(2)) * byte(off)
				}
			}
		}
		clear(v.touched)
		if rng.IntN(8) == 0 {
			clear(p)
			must(t, o.Zero(t.Context(), off, n))
		} else {
			must(t, o.WriteAt(t.Context(), p, off))
		}
		before := slices.Clone(model)
		copy(model[off:], p)
		if !bytes.Equal(contents(t, v), model) {
			t.Fatalf("wrong contents after %d bytes at %d", n, off)
		}
		for u := range v.touched {
			if bytes.Equal(before[u*unit:][:unit], model[u*unit:][:unit]) {
				t.Fatalf("unit %d touched by %d bytes at %d, and has not changed", u, n, off)
			}
		}
	}
}

func TestOverlayErrors(t *testing.T) {
	v := volume(t, 4*unit, picture("abcd"))
	o := storage.NewOverlay(v)
	for _, c := range []struct{ off, n int64 }{{-1, 1}, {4 * unit, 1}, {0, 4*unit + 1}} {
		if err := o.WriteAt(t.Context(), make([]byte, c.n), c.off); !errors.Is(err, storage.ErrInvalid) {
			t.Errorf("WriteAt(%d bytes, %d): %v", c.n, c.off, err)
		}
		if err := o.Zero(t.Context(), c.off, c.n); !errors.Is(err, storage.ErrInvalid) {
			t.Errorf("Zero(%d, %d): %v", c.off, c.n, err)
		}
	}
	// After a failure in the middle, what is known of the volume is forgotten.
	v.fail = &storage.SpaceError{Needed: 1}
	if err := o.WriteAt(t.Context(), picture("wxyz"), 0); !errors.Is(err, storage.ErrNoSpace) {
		t.Errorf("a failed write gives %v", err)
	}
	must(t, o.WriteAt(t.Context(), picture("abcd"), 0))
	if !bytes.Equal(contents(t, v), picture("abcd")) {
		t.Error("wrong contents after a failure and another try")
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := storage.NewOverlay(v).WriteAt(ctx, picture("e"), 0); !errors.Is(err, context.Canceled) {
		t.Errorf("with a cancelled context: %v", err)
	}
}

// TestOverlayReadsLittle checks that small writes far apart do not read much
// more than what they are compared with.
func TestOverlayReadsLittle(t *testing.T) {
	const size = 16 << 20
	data := bytes.Repeat([]byte{1}, size)
	v := volume(t, size, data)
	o := storage.NewOverlay(v)
	for i := range int64(16) {
		must(t, o.WriteAt(t.Context(), data[:unit], i*37%16*(1<<20)))
	}
	if v.read > 16*32<<10 {
		t.Errorf("%d bytes read for 16 units", v.read)
	}
	v.read = 0
	for off := int64(0); off < size; off += 64 << 10 {
		must(t, o.WriteAt(t.Context(), data[:64<<10], off))
	}
	if v.read > size+size/8 || v.calls != 0 {
		t.Errorf("%d bytes read and %d writes for %d bytes that were there", v.read, v.calls, size)
	}
}

// flat is a volume whose own cost is a copy: all data or all hole.
type flat struct {
	storage.Volume
	data []byte // nil: all hole
	size int64
}

func (f *flat) Size() int64 { return f.size }

func (f *flat) ReadAt(p []byte, off int64) (int, error) { return copy(p, f.data[off:]), nil }

func (f *flat) Extents(_ context.Context, off, n int64) iter.Seq2[storage.Extent, error] {
	return func(yield func(storage.Extent, error) bool) {
		yield(storage.Extent{Off: off, Len: n, Hole: f.data == nil}, nil)
	}
}

func BenchmarkOverlay(b *testing.B) {
	const size = 256 << 20
	chunk := make([]byte, 1<<20)
	run := func(v storage.Volume, p []byte) func(*testing.B) {
		return func(b *testing.B) {
			b.SetBytes(size)
			for b.Loop() {
				o := storage.NewOverlay(v)
				for off := int64(0); off < size; off += int64(len(p)) {
					must(b, o.WriteAt(b.Context(), p, off))
				}
				if o.Changed() != 0 {
					b.Fatal("something was written")
				}
			}
		}
	}
	b.Run("zeros-into-hole", run(&flat{size: size}, chunk))
	ones := bytes.Repeat([]byte{1}, size)
	b.Run("unchanged", run(&flat{size: size, data: ones}, ones[:1<<20]))
	b.Run("copy", func(b *testing.B) { // what reading alone costs
		b.SetBytes(size)
		for b.Loop() {
			for off := 0; off < size; off += len(chunk) {
				copy(chunk, ones[off:])
			}
		}
	})
}
