package cow

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"sync"
	"syscall"
	"testing"

	engine "coppice/internal/cow"
	"coppice/internal/storage"
	"coppice/internal/vfs"
)

const (
	unit      = storage.Unit
	diskUnits = 12
)

// promise is what a volume may hold, unit by unit: any of the versions since
// it was last durable, the newest last.
type promise struct {
	units  [diskUnits][]byte // one letter for each version, of which the unit is full
	unsure bool              // is being created or deleted: need not exist
}

func (p *promise) set(u int, letter byte) { p.units[u] = append(p.units[u], letter) }

// newest is the contents that reads show.
func (p *promise) newest() *promise {
	n := &promise{}
	for u, versions := range p.units {
		n.units[u] = []byte{versions[len(versions)-1]}
	}
	return n
}

func (p *promise) clone() *promise {
	c := &promise{unsure: p.unsure}
	for u, versions := range p.units {
		c.units[u] = slices.Clone(versions)
	}
	return c
}

// history is a random sequence of operations on a store, and what the store
// has promised at any time.
type history struct {
	ctx  context.Context
	rng  *rand.Rand
	repo storage.Repo
	open map[storage.ID]storage.Volume
	next int

	mu     sync.Mutex
	disks  map[storage.ID]*promise // guarded by mu, with what is in it
	frozen map[storage.ID]bool     // guarded by mu: read-only
}

// promised returns a copy of what must hold now.
func (h *history) promised() map[storage.ID]*promise {
	h.mu.Lock()
	defer h.mu.Unlock()
	out := map[storage.ID]*promise{}
	for id, p := range h.disks {
		out[id] = p.clone()
	}
	return out
}

// locked changes what is promised.
func (h *history) locked(fn func()) {
	h.mu.Lock()
	defer h.mu.Unlock()
	fn()
}

func (h *history) pick(ok func(storage.ID) bool) (storage.ID, bool) {
	ids := slices.DeleteFunc(slices.Sorted(maps.Keys(h.disks)), func(id storage.ID) bool { return !ok(id) })
	if len(ids) == 0 {
		return "", false
	}
	return ids[h.rng.IntN(len(ids))], true
}

// step does one operation.
func (h *history) step() error {
	any := func(storage.ID) bool { return true }
	writable := func(id storage.ID) bool { return !h.frozen[id] }
	id, ok := h.pick(writable)
	if !ok || h.rng.IntN(12) == 0 {
		p := &promise{}
		for u := range p.units {
			p.set(u, 0)
		}
		return h.add(p, false, func(id storage.ID) error {
			_, err := h.repo.Create(h.ctx, storage.Spec{ID: id, Size: diskUnits * unit, Attrs: []byte(id)})
			return err
		})
	}
	switch h.rng.IntN(11) {
	case 0, 1, 2, 3:
		u := h.rng.IntN(diskUnits)
		n := 1 + h.rng.IntN(diskUnits-u)
		letter := byte(h.rng.IntN(256))
		h.locked(func() {
			for i := u; i < u+n; i++ {
				h.disks[id].set(i, letter)
			}
		})
		_, err := h.open[id].WriteAt(bytes.Repeat([]byte{letter}, n*unit), int64(u)*unit)
		return err
	case 4, 5:
		settled := h.disks[id].newest()
		err := h.open[id].Flush(h.ctx)
		if err == nil {
			h.locked(func() { h.disks[id] = settled })
		}
		return err
	case 6, 7:
		src, _ := h.pick(any)
		frozen := h.rng.IntN(2) == 0
		return h.add(h.disks[src].newest(), frozen, func(id storage.ID) error {
			make := h.repo.Clone
			if frozen {
				make = h.repo.Snapshot
			}
			_, err := make(h.ctx, storage.Derived{Source: src, ID: id, Attrs: []byte(id)})
			return err
		})
	case 8:
		victim, _ := h.pick(any)
		h.locked(func() { h.disks[victim].unsure = true })
		err := h.repo.Delete(h.ctx, victim)
		if err == nil {
			h.locked(func() { delete(h.disks, victim) })
		}
		return err
	case 9:
		from, _ := h.pick(any)
		given := h.disks[from].newest().units
		n := 1 + h.rng.IntN(diskUnits)
		to, at := h.rng.IntN(diskUnits-n+1), h.rng.IntN(diskUnits-n+1)
		h.locked(func() {
			for i := range n {
				h.disks[id].set(to+i, given[at+i][0])
			}
		})
		err := h.repo.(storage.RangeCloner).CloneRanges(h.ctx, h.open[id], h.open[from],
			[]storage.RangeClone{{To: int64(to) * unit, From: int64(at) * unit, Len: int64(n) * unit}})
		if err == nil {
			h.locked(func() { copy(h.disks[id].units[to:to+n], given[at:at+n]) })
		}
		return err
	default:
		to, _ := h.pick(any)
		settled := h.disks[to].newest()
		h.locked(func() {
			for u, versions := range settled.units {
				h.disks[id].set(u, versions[0])
			}
		})
		err := h.repo.(storage.Reverter).Revert(h.ctx, id, to)
		if err == nil && id != to {
			h.locked(func() { h.disks[id] = settled })
		}
		return err
	}
}

// add makes a volume by call.
func (h *history) add(p *promise, frozen bool, call func(storage.ID) error) error {
	h.next++
	id := storage.ID(fmt.Sprintf("%08x-c0de-4bad-8bee-0123456789ab", h.next))
	p.unsure = true
	h.locked(func() { h.disks[id], h.frozen[id] = p, frozen })
	err := call(id)
	if err != nil {
		return err
	}
	h.locked(func() { p.unsure = false })
	h.open[id], err = h.repo.Open(h.ctx, id, storage.Live)
	return err
}

// verify opens what a crash has left and compares it with what was promised.
func verify(ctx context.Context, fsys vfs.FS, want map[storage.ID]*promise) error {
	repo, err := openStore(ctx, fsys, tiny(), false)
	if err != nil {
		return err
	}
	err = compare(ctx, repo, want)
	if cerr := repo.Close(); cerr != nil {
		return errors.Join(err, cerr)
	}
	for p, cerr := range engine.Check(ctx, fsys) {
		err = errors.Join(err, cerr, fmt.Errorf("check: %v", p))
	}
	return err
}

func compare(ctx context.Context, repo storage.Repo, want map[storage.ID]*promise) error {
	seen := map[storage.ID]bool{}
	for info, err := range repo.List(ctx) {
		if err != nil {
			return err
		}
		p := want[info.ID]
		if p == nil {
			return fmt.Errorf("volume %.8s is back", info.ID)
		}
		if string(info.Attrs) != string(info.ID) {
			return fmt.Errorf("volume %.8s has the attributes %q", info.ID, info.Attrs)
		}
		seen[info.ID] = true
		v, err := repo.Open(ctx, info.ID, storage.Live)
		if err != nil {
			return err
		}
		buf := make([]byte, unit)
		for u, versions := range p.units {
			if _, err := v.ReadAt(buf, int64(u)*unit); err != nil {
				return err
			}
			if !bytes.Equal(buf, bytes.Repeat(buf[:1], unit)) || !slices.Contains(versions, buf[0]) {
				return fmt.Errorf("volume %.8s: unit %d holds %#x…%#x, want all one of %#x", info.ID, u, buf[0], buf[unit-1], versions)
			}
		}
		if err := v.Close(); err != nil {
			return err
		}
	}
	for id, p := range want {
		if !seen[id] && !p.unsure {
			return fmt.Errorf("volume %.8s is lost", id)
		}
	}
	return nil
}

// newHistory starts a history on a store whose file calls hook sees.
func newHistory(ctx context.Context, mem *vfs.Mem, seed uint64, hook func(vfs.Call) error) (*history, error) {
	repo, err := openStore(ctx, vfs.NewInject(mem, nil, hook), tiny(), true)
	return &history{
		ctx: ctx, rng: rand.New(rand.NewPCG(seed, 1)), repo: repo,
		open: map[storage.ID]storage.Volume{}, disks: map[storage.ID]*promise{}, frozen: map[storage.ID]bool{},
	}, err
}

// TestCrashAtEveryCall cuts the power, or kills the process and cuts the power
// later, before each call to the files of random histories, and opens what is
// left.
func TestCrashAtEveryCall(t *testing.T) {
	type cut struct {
		fs   *vfs.Mem
		want map[storage.ID]*promise
		call vfs.Call
	}
	for seed := range uint64(6) {
		mem := vfs.NewMem(0)
		rng := rand.New(rand.NewPCG(seed, 2))
		var mu sync.Mutex
		var cuts []cut
		var h *history
		hook := func(c vfs.Call) error {
			mu.Lock()
			defer mu.Unlock()
			if h == nil || c.Op == vfs.OpRead {
				return nil
			}
			before := h.promised()
			left := mem.Kill()
			if rng.IntN(3) > 0 {
				left = left.Crash(rng.IntN)
			}
			// What was promised while the clone was taken is in one of the two.
			for id, p := range h.promised() {
				if before[id] == nil {
					p.unsure = true
					before[id] = p
				}
				for u := range p.units {
					before[id].units[u] = append(before[id].units[u], p.units[u]...)
				}
			}
			after := h.promised()
			for id, p := range before {
				p.unsure = p.unsure || after[id] == nil
			}
			cuts = append(cuts, cut{left, before, c})
			return nil
		}
		made, err := newHistory(t.Context(), mem, seed, hook)
		if err != nil {
			t.Fatal(err)
		}
		mu.Lock()
		h = made
		mu.Unlock()
		for i := range 40 {
			if err := made.step(); err != nil {
				t.Fatalf("seed %d, step %d: %v", seed, i, err)
			}
		}
		if err := made.repo.Close(); err != nil {
			t.Fatal(err)
		}
		for i, c := range cuts {
			again := c.fs.Kill()
			if err := verify(t.Context(), c.fs, c.want); err != nil {
				t.Fatalf("seed %d, cut %d, before %+v: %v", seed, i, c.call, err)
			}
			if i%2 == 0 {
				continue
			}
			if err := writeAndCrash(t.Context(), again, c.want, rng); err != nil {
				t.Fatalf("seed %d, cut %d, before %+v, written on, and again: %v", seed, i, c.call, err)
			}
		}
	}
}

// writeAndCrash opens what a crash has left, writes to all of it without a
// flush, so that what was free is used at once, and cuts the power again.
func writeAndCrash(ctx context.Context, fsys *vfs.Mem, want map[storage.ID]*promise, rng *rand.Rand) error {
	repo, err := openStore(ctx, fsys, tiny(), false)
	if err != nil {
		return err
	}
	for info, err := range repo.List(ctx) {
		if err != nil {
			return err
		}
		if info.ReadOnly {
			continue
		}
		for u := range want[info.ID].units {
			want[info.ID].set(u, 0xee)
		}
		v, err := repo.Open(ctx, info.ID, storage.Live)
		if err != nil {
			return err
		}
		if _, err := v.WriteAt(bytes.Repeat([]byte{0xee}, diskUnits*unit), 0); err != nil {
			return err
		}
	}
	left := []*vfs.Mem{fsys.Crash(rng.IntN), fsys.Crash(rng.IntN)}
	if err := repo.Close(); err != nil {
		return err
	}
	for _, l := range left {
		if err := verify(ctx, l, want); err != nil {
			return err
		}
	}
	return nil
}

// TestFaultAtEveryCall fails each call to the files of a history in turn. The
// store says so, goes on to read, and keeps what it had promised.
func TestFaultAtEveryCall(t *testing.T) {
	for _, c := range []struct {
		ops []vfs.Op
		err error
		// kinds are the errors that users may see; what a write of data to
		// the host says is passed on.
		kinds []error
	}{
		{[]vfs.Op{vfs.OpWrite}, syscall.EIO, []error{syscall.EIO, storage.ErrRepoReadOnly}},
		{[]vfs.Op{vfs.OpWrite}, &vfs.ShortWrite{N: 700, Err: syscall.ENOSPC}, []error{storage.ErrNoSpace, storage.ErrRepoReadOnly}},
		{[]vfs.Op{vfs.OpDatasync, vfs.OpSyncDir}, syscall.EIO, []error{storage.ErrRepoReadOnly}},
		{[]vfs.Op{vfs.OpAllocate, vfs.OpCreate, vfs.OpPunch}, syscall.ENOSPC, []error{storage.ErrNoSpace}},
	} {
		t.Run(fmt.Sprint(c.ops, c.err), func(t *testing.T) {
			n := 1
			for failAt(t, &vfs.Fault{Ops: c.ops, Err: c.err, Nth: n}, c.kinds) {
				n++
			}
			if n < 3 {
				t.Errorf("only %d calls", n-1)
			}
		})
	}
}

// failAt runs a history in which f strikes, and reports whether it did.
func failAt(t *testing.T, f *vfs.Fault, kinds []error) bool {
	t.Helper()
	mem := vfs.NewMem(0)
	armed := false
	var mu sync.Mutex
	hook := func(c vfs.Call) error {
		mu.Lock()
		defer mu.Unlock()
		if !armed {
			return nil
		}
		return f.Hook(c)
	}
	h, err := newHistory(t.Context(), mem, 3, hook)
	if err != nil {
		t.Fatal(err)
	}
	mu.Lock()
	armed = true
	mu.Unlock()
	for range 40 {
		if err = h.step(); err != nil {
			break
		}
	}
	if err != nil && !slices.ContainsFunc(kinds, func(k error) bool { return errors.Is(err, k) }) {
		t.Fatalf("call %d fails: %v", f.Nth, err)
	}
	for id, v := range h.open {
		if _, rerr := v.ReadAt(make([]byte, unit), 0); rerr != nil && !errors.Is(rerr, storage.ErrNotFound) {
			t.Fatalf("call %d: reading %.8s afterwards: %v", f.Nth, id, rerr)
		}
	}
	closeErr := h.repo.Close()
	if err == nil && f.Calls() < f.Nth {
		if closeErr != nil {
			t.Fatalf("close: %v", closeErr)
		}
		return false
	}
	want := h.promised()
	left := mem.Crash(rand.New(rand.NewPCG(uint64(f.Nth), 3)).IntN)
	if err := verify(t.Context(), left, want); err != nil {
		t.Fatalf("call %d, then a power cut: %v", f.Nth, err)
	}
	return true
}
