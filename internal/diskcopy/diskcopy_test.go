package diskcopy

import (
	"bytes"
	"context"
	"errors"
	"math/rand/v2"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/uuid"

	"coppice/internal/storage"
	"coppice/internal/storage/mem"
	"coppice/internal/xapi"
)

// rig is a repository, or two.
type rig struct {
	t    *testing.T
	repo storage.Repo
}

func newRig(t *testing.T) *rig {
	t.Helper()
	repo, err := mem.Driver().Open(t.Context(), map[string]string{"location": "x"}, true)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := repo.Close(); err != nil {
			t.Error(err)
		}
	})
	return &rig{t, repo}
}

func newID() storage.ID { return storage.ID(uuid.NewString()) }

// create makes a volume with contents.
func (r *rig) create(contents []byte) storage.ID {
	r.t.Helper()
	id := newID()
	if _, err := r.repo.Create(r.t.Context(), storage.Spec{ID: id, Size: int64(len(contents))}); err != nil {
		r.t.Fatal(err)
	}
	v := r.open(id).Volume
	for off := 0; off < len(contents); off += storage.Unit {
		if p := contents[off : off+storage.Unit]; !allZero(p) {
			r.write(v, p, int64(off))
		}
	}
	return id
}

func allZero(p []byte) bool { return bytes.Equal(p, make([]byte, len(p))) }

// clone makes a volume with the contents of another.
func (r *rig) clone(of storage.ID) storage.ID {
	r.t.Helper()
	id := newID()
	if _, err := r.repo.Clone(r.t.Context(), storage.Derived{Source: of, ID: id}); err != nil {
		r.t.Fatal(err)
	}
	return id
}

// open opens a volume until the end of the test.
func (r *rig) open(id storage.ID) Disk {
	r.t.Helper()
	v, err := r.repo.Open(r.t.Context(), id, storage.Live)
	if err != nil {
		r.t.Fatal(err)
	}
	r.t.Cleanup(func() {
		if err := v.Close(); err != nil {
			r.t.Error(err)
		}
	})
	return Disk{Volume: v, Repo: r.repo, Name: string(id)}
}

func (r *rig) write(v storage.Volume, p []byte, off int64) {
	r.t.Helper()
	if _, err := v.WriteAt(p, off); err != nil {
		r.t.Fatal(err)
	}
}

func (r *rig) contents(v storage.Volume) []byte {
	r.t.Helper()
	p := make([]byte, v.Size())
	if err := storage.ReadFull(v, p, 0); err != nil {
		r.t.Fatal(err)
	}
	return p
}

// copied makes a volume by a job.
func (r *rig) copied(j Job, zeroed *Zeroed) storage.ID {
	r.t.Helper()
	info, err := j.Create(r.t.Context(), r.repo, storage.Spec{ID: newID()}, zeroed)
	if err != nil {
		r.t.Fatal(err)
	}
	return info.ID
}

const size = 4 << 20

// pair makes a base and a volume that was it before it changed: some was written, some zeroed, in part in sectors.
// They are in the repositories of from and to, which may be one.
func pair(from, to *rig, seed uint64) (base, disk storage.ID) {
	random := rand.New(rand.NewPCG(seed, 0))
	old := make([]byte, size)
	for range 20 {
		off, n := random.IntN(size/2), random.IntN(256<<10)
		for i := range n {
			old[off+i] = byte(1 + random.IntN(255))
		}
	}
	base = from.create(old)
	if from == to {
		disk = to.clone(base)
	} else {
		disk = to.create(old)
	}
	v := to.open(disk).Volume
	for i := range 40 {
		off, n := int64(random.IntN(size/512-256))*512, int64(1+random.IntN(256))*512
		p := make([]byte, n)
		switch i % 3 {
		case 0:
			for i := range p {
				p[i] = byte(1 + random.IntN(255))
			}
			fallthrough
		case 1:
			to.write(v, p, off)
		default:
			off, n = off/storage.Unit*storage.Unit, (n+storage.Unit-1)/storage.Unit*storage.Unit
			if err := v.Zero(to.t.Context(), off, min(n, size-off)); err != nil {
				to.t.Fatal(err)
			}
		}
	}
	return base, disk
}

// A copy is the original; and so is a delta to a base that is copied into a copy of the base. What somebody wrote there
// meanwhile stays where disk and base are alike, to the sector. All of it within a repository and between two.
func TestCopies(t *testing.T) {
	for seed := range uint64(4) {
		r := newRig(t)
		other := r
		if seed%2 == 1 {
			other = newRig(t)
		}
		baseID, diskID := pair(other, r, seed)
		base, disk := other.open(baseID), r.open(diskID)
		old, want := r.contents(base.Volume), r.contents(disk.Volume)
		last := int64(0)
		whole := Job{From: disk, Progress: func(done, total int64) {
			if done < last || total != size {
				t.Errorf("at %d of %d after %d", done, total, last)
			}
			last = done
		}}
		if !bytes.Equal(r.contents(other.open(other.copied(whole, nil)).Volume), want) {
			t.Errorf("%d: a copy is not the original", seed)
		}
		if last == 0 {
			t.Errorf("%d: no progress", seed)
		}

		var zeroed Zeroed
		delta := r.open(r.copied(Job{From: disk, Base: &base}, &zeroed))
		if zeroed.String() == "" {
			t.Errorf("%d: the delta remembers nothing", seed)
		}
		merged := other.open(other.clone(baseID))
		if err := (Job{From: delta, Zeroed: zeroed.String()}).Into(t.Context(), merged.Volume); err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(r.contents(merged.Volume), want) {
			t.Errorf("%d: base and delta do not make the original", seed)
		}

		into := other.open(other.clone(baseID))
		mine := r.contents(into.Volume)
		for off := 0; off < size; off += 16 << 10 {
			copy(mine[off:off+512], bytes.Repeat([]byte{0xa5}, 512))
		}
		r.write(into.Volume, mine, 0)
		for off := 0; off < size; off += 512 {
			if !bytes.Equal(old[off:off+512], want[off:off+512]) {
				copy(mine[off:off+512], want[off:off+512])
			}
		}
		if err := (Job{From: disk, Base: &base}).Into(t.Context(), into.Volume); err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(r.contents(into.Volume), mine) {
			t.Errorf("%d: sectors that are alike were copied, or others were not", seed)
		}
	}
}

// A copy that is cancelled, or cannot be written, ends with the reason.
func TestCopyEnds(t *testing.T) {
	r := newRig(t)
	_, id := pair(r, r, 1)
	disk := r.open(id)
	why := errors.New("why")
	ctx, cancel := context.WithCancelCause(t.Context())
	job := Job{From: disk, Progress: func(int64, int64) { cancel(why) }}
	if err := job.Into(ctx, r.open(r.create(make([]byte, size))).Volume); !errors.Is(err, why) {
		t.Errorf("a cancelled copy: %v", err)
	}
	if _, err := job.Create(ctx, r.repo, storage.Spec{ID: newID()}, nil); !errors.Is(err, why) {
		t.Errorf("a copy that was cancelled before: %v", err)
	}
	job.Progress = nil
	if _, err := job.Create(t.Context(), r.repo, storage.Spec{ID: id}, nil); !errors.Is(err, storage.ErrExists) {
		t.Errorf("a copy to what there is: %v", err)
	}
	full := failing{r.open(r.create(make([]byte, size))).Volume}
	if err := job.Into(t.Context(), full); !errors.Is(err, storage.ErrNoSpace) {
		t.Errorf("a copy without space: %v", err)
	}
}

// failing is a volume of a store without space.
type failing struct{ storage.Volume }

func (failing) WriteAt([]byte, int64) (int, error) { return 0, storage.ErrNoSpace }

func TestZeroed(t *testing.T) {
	for _, c := range []struct {
		text string
		want []storage.Extent
	}{
		{"", nil},
		{"0+1", []storage.Extent{{Off: 0, Len: 4096, Hole: true}}},
		{"1+2,3+4", []storage.Extent{{Off: 4096, Len: 8192, Hole: true}, {Off: 6 * 4096, Len: 2 * 4096, Hole: true}}},
		{"1+2,x", []storage.Extent{{Off: 4096, Len: 8192, Hole: true}}},
		{"-1+2", nil},
		{"1+0", nil},
		{"1+-5", nil},
		{"9+1", nil},
		{"9223372036854775807+1", nil},
		{"0+9223372036854775807", nil},
		{"1 + 2", nil},
	} {
		if diff := cmp.Diff(c.want, parseZeroed(c.text, 8*4096)); diff != "" {
			t.Errorf("%q (-want +got):\n%s", c.text, diff)
		}
	}
	var z Zeroed
	for i := range int64(1 << 20) {
		if err := z.add(i*8192, 4096); err != nil {
			if !errors.Is(err, xapi.NewError(xapi.ErrOperationNotAllowed)) || i < 4096 {
				t.Errorf("after %d ranges: %v", i, err)
			}
			return
		}
	}
	t.Error("any number of ranges fits")
}
