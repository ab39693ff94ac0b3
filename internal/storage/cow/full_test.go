package cow

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"testing"

	engine "coppice/internal/cow"
	"coppice/internal/storage"
	"coppice/internal/vfs"
)

// TestFull fills stores to the last byte, by a limit of their own and by a
// full host. Whatever was refused has changed nothing, everything reads,
// everything can be deleted, and then there is room again.
func TestFull(t *testing.T) {
	for _, c := range []struct {
		name     string
		capacity int64 // of the host, in bytes
		opts     engine.Options
	}{
		{"limit", 0, engine.Options{MaxBytes: 128 << 20}},
		{"host", 130 << 20, engine.Options{}},
		{"host, small regions", 90<<20 + 12345, engine.Options{Geometry: tiny().Geometry, Limits: tiny().Limits}},
	} {
		t.Run(c.name, func(t *testing.T) {
			f := &fixture{t: t, fs: vfs.NewMem(c.capacity), opts: c.opts}
			f.open()
			t.Cleanup(func() {
				f.close()
				f.check()
			})
			for round := range 2 {
				fill(t, f, uint64(round))
			}
		})
	}
}

// fill writes until there is no room, and deletes everything.
func fill(t *testing.T, f *fixture, seed uint64) {
	const size = 4 << 20
	ctx := t.Context()
	rng := rand.New(rand.NewPCG(seed, 7))
	noise := rand.NewChaCha8([32]byte{byte(seed)})
	type disk struct {
		storage.Volume
		data []byte
	}
	disks := map[storage.ID]disk{}
	usage := func() storage.Usage {
		t.Helper()
		u, err := f.Repo.Usage(ctx)
		if err != nil {
			t.Fatal(err)
		}
		return u
	}
	refused := 0
	for n := 1; refused < 8; n++ {
		id := storage.ID(fmt.Sprintf("%08x-c0de-4bad-8bee-0123456789ab", n))
		_, err := f.Repo.Create(ctx, storage.Spec{ID: id, Size: size})
		if err == nil {
			v, oerr := f.Repo.Open(ctx, id, storage.Live)
			if oerr != nil {
				t.Fatal(oerr)
			}
			disks[id] = disk{v, make([]byte, size)}
		} else if refused++; !errors.Is(err, storage.ErrNoSpace) {
			t.Fatalf("create: %v", err)
		}
		for id, d := range disks { // in random order
			p := make([]byte, 1+rng.IntN(1<<rng.IntN(21)))
			_, _ = noise.Read(p) // never fails
			off := rng.IntN(size - len(p))
			k, err := d.WriteAt(p, int64(off))
			if err == nil {
				copy(d.data[off:], p)
				continue
			}
			if refused++; !errors.Is(err, storage.ErrNoSpace) {
				t.Fatalf("write to %.8s: %v", id, err)
			}
			copy(d.data[off:], p[:k]) // what was written before there was no room
		}
	}
	if free := usage().Free; free > 8<<20 {
		t.Errorf("writes are refused when %d bytes are free", free)
	}
	check := func() {
		t.Helper()
		for id, d := range disks {
			if err := d.Flush(ctx); err != nil {
				t.Fatalf("flush of %.8s: %v", id, err)
			}
			got := make([]byte, size)
			if _, err := d.ReadAt(got, 0); err != nil {
				t.Fatalf("read of %.8s: %v", id, err)
			}
			if !bytes.Equal(got, d.data) {
				t.Fatalf("%.8s has changed", id)
			}
		}
	}
	check()
	for id, d := range disks { // discards are either done or refused
		if err := d.Zero(ctx, 0, size/2); err == nil {
			clear(d.data[:size/2])
		} else if !errors.Is(err, storage.ErrNoSpace) {
			t.Fatalf("zeroing half of %.8s: %v", id, err)
		}
	}
	check()
	total := len(disks)
	for id := range disks {
		if err := f.Repo.Delete(ctx, id); err != nil {
			t.Fatalf("delete with a full store: %v", err)
		}
		delete(disks, id)
		if len(disks) == total/2 {
			check()
		}
	}
	for i := 0; usage().Free < 16<<20; i++ {
		if i == 1000 {
			t.Fatalf("only %d bytes are free after everything has been deleted", usage().Free)
		}
		id := storage.ID(fmt.Sprintf("%08x-c0de-4bad-8bee-0123456789ab", 1<<20+i))
		if _, err := f.Repo.Create(ctx, storage.Spec{ID: id, Size: size}); err != nil {
			continue
		}
		if err := f.Repo.Delete(ctx, id); err != nil {
			t.Fatal(err)
		}
	}
}
