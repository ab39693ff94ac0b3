package cow

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"maps"
	"math/rand/v2"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"coppice/internal/vfs"
)

var (
	cutCrashes = flag.Int("cow.crashes", 0, "simulated crashes of TestPowerCuts; 0 is the ordinary number")
	cutSeed    = flag.Uint64("cow.cutseed", 0, "seed of the first trace of TestPowerCuts; 0 takes the time")
	cutOps     = flag.Int("cow.cutops", 0, "operations of a trace of TestPowerCuts; 0 mixes lengths up to 200")
	soakTime   = flag.Duration("cow.soak", 0, "run the long forms of the tests for this time each")
)

// cutKinds are the operations of a trace and how often they come.
var cutKinds = []struct {
	kind   string
	weight int
}{
	{"create", 3},
	{"write", 20},
	{"big", 6},
	{"bulk", 3},
	{"zero", 6},
	{"flush", 16},
	{"snapshot", 5},
	{"graft", 3},
	{"group", 2},
	{"clone", 3},
	{"revert", 3},
	{"resize", 3},
	{"delete", 5},
	{"attrs", 2},
	{"pin", 2},
	{"unpin", 2},
	{"sync", 5},
	{"writeout", 4},
	{"kick", 6},
	{"stall", 8},
	{"reopen", 1},
}

// cutTrace is a random trace of n operations on few and small volumes, so
// that a crash is soon verified.
func cutTrace(rng *rand.Rand, n int) []op {
	total := 0
	for _, k := range cutKinds {
		total += k.weight
	}
	ops := []op{{kind: "create", a: 20, b: 1}}
	for len(ops) < n {
		x := rng.IntN(total)
		for _, k := range cutKinds {
			if x -= k.weight; x < 0 {
				o := op{k.kind, rng.Uint32(), rng.Uint32(), rng.Uint32(), rng.Uint64()}
				switch k.kind {
				case "create":
					o.a %= 20
				case "resize":
					o.b %= 24
				}
				ops = append(ops, o)
				if o.kind == "stall" && rng.IntN(3) > 0 { // into whatever is free then
					ops = append(ops, op{"big", rng.Uint32(), rng.Uint32(), rng.Uint32() | 15, rng.Uint64()})
				}
				break
			}
		}
	}
	return ops
}

// cutter runs a trace and takes the power away at every write boundary.
type cutter struct {
	w   *world
	rng *rand.Rand
	st  *cutStats

	// limit is the number of outcomes of a power cut up to which every one is
	// tried. Beyond it those are that keep or lose one or two things, and some
	// that decide about each at random.
	limit int

	mu      sync.Mutex // guards what follows
	taken   []*vfs.Mem // the directory before each call that changes it, not yet verified
	stallIn int        // calls until one is held; 0 is never
	atSuper bool       // counting those for the superblock only
	stalled chan struct{}
	goOn    chan struct{} // closed to let the held call go on

	// A checkpoint that is held at one of its calls while operations go on.
	held    int           // operations left before it goes on, 0 when none is held
	release func()        // lets it go on
	synced  chan struct{} // closed when it is over
}

// cutStats counts what was done, for all workers.
type cutStats struct {
	traces, ops, boundaries, full, crashes, second atomic.Int64
	want                                           int64
	end                                            time.Time // zero: until there are enough crashes
}

func (st *cutStats) done() bool {
	if !st.end.IsZero() {
		return time.Now().After(st.end)
	}
	return st.crashes.Load()+st.second.Load() >= st.want
}

func (st *cutStats) String() string {
	return fmt.Sprintf("%d traces, %d operations, %d write boundaries (%d with every outcome), %d crashes and %d second ones in recovery",
		st.traces.Load(), st.ops.Load(), st.boundaries.Load(), st.full.Load(), st.crashes.Load(), st.second.Load())
}

func (c *cutter) hook(call vfs.Call) error {
	switch call.Op {
	case vfs.OpRead, vfs.OpOpen, vfs.OpList, vfs.OpLock:
		return nil
	}
	for range len(call.Name) * 3 { // a device takes its time, in which others go on
		runtime.Gosched()
	}
	c.mu.Lock()
	c.taken = append(c.taken, c.w.mem.Kill())
	var goOn chan struct{}
	if c.stallIn > 0 && (call.Op == vfs.OpWrite || call.Op == vfs.OpDatasync) && (!c.atSuper || call.Name == superName) {
		if c.stallIn--; c.stallIn == 0 {
			goOn = c.goOn
			close(c.stalled)
		}
	}
	c.mu.Unlock()
	if goOn != nil {
		<-goOn
	}
	return nil
}

// stall begins a checkpoint and holds it at its nth call, or the nth for the
// superblock, if it has so many, for some operations.
func (c *cutter) stall(n int, atSuper bool, ops int) error {
	stalled, goOn, synced := make(chan struct{}), make(chan struct{}), make(chan struct{})
	c.mu.Lock()
	c.stallIn, c.atSuper, c.stalled, c.goOn = n, atSuper, stalled, goOn
	c.mu.Unlock()
	var err error
	go func() {
		defer close(synced)
		err = c.w.s.sync(context.Background())
	}()
	c.release, c.synced = sync.OnceFunc(func() { close(goOn) }), synced
	select {
	case <-stalled:
		c.held = ops
		return nil
	case <-synced: // it has fewer calls
		c.mu.Lock()
		c.stallIn = 0
		c.mu.Unlock()
		c.unstall()
		return err
	}
}

// unstall lets a held checkpoint end.
func (c *cutter) unstall() {
	if c.release != nil {
		c.release()
		<-c.synced
		c.held, c.release = 0, nil
	}
}

// stallLimit is how long an operation may wait for a held checkpoint before
// that goes on: some cannot end without it.
const stallLimit = 20 * time.Millisecond

// use has every further call go through the hook.
func (c *cutter) use() { c.w.inj = vfs.NewInject(c.w.mem, nil, c.hook) }

// step runs an operation and verifies the crashes at its boundaries.
func (c *cutter) step(o op) error {
	before := cloneModel(c.w.vols)
	release := c.release
	if release == nil {
		release = func() {}
	}
	limit := time.AfterFunc(stallLimit, release)
	var err error
	switch o.kind {
	case "stall":
		if c.release == nil {
			n, atSuper := 1+int(o.a%30), o.seed%3 == 0
			if atSuper {
				n = 1 + n%3
			}
			err = c.stall(n, atSuper, 1+int(o.b%4))
		}
	case "reopen":
		c.unstall()
		err = c.reopen()
	case "kick": // a checkpoint beside the next operations
		c.w.s.kick()
	case "create", "clone", "snapshot", "group":
		if len(c.w.vols) < 6 {
			err = c.w.step(o)
		}
	default:
		err = c.w.step(o)
	}
	limit.Stop()
	if err != nil {
		return err
	}
	c.mu.Lock()
	taken := c.taken
	c.taken = nil
	c.mu.Unlock()
	if c.held > 0 && o.kind != "stall" {
		taken = append(taken, c.w.mem.Kill())
		if c.held--; c.held == 0 {
			defer c.unstall()
		}
	}
	for i, m := range taken {
		if err := c.cuts(m, before); err != nil {
			return fmt.Errorf("power cut at boundary %d of %d: %w", i, len(taken), err)
		}
		if c.st.done() {
			break
		}
	}
	return nil
}

func (c *cutter) reopen() error {
	w := c.w
	if err := w.s.Close(); err != nil {
		return err
	}
	for _, m := range w.vols {
		m.settle()
	}
	w.disks, w.pins = map[ID]*Disk{}, nil
	var err error
	w.s, err = Open(context.Background(), w.inj, w.opts)
	return err
}

// cuts verifies what a power cut may leave of m, and the death of the process.
func (c *cutter) cuts(m *vfs.Mem, before map[ID]*mvol) error {
	c.st.boundaries.Add(1)
	for range 3 {
		if err := c.verify(m.Kill(), before, true); err != nil {
			return fmt.Errorf("kill: %w", err)
		}
	}
	var arity []int // of the choices when the newest is always taken
	newest := m.Crash(func(n int) int { arity = append(arity, n); return n - 1 })
	total, limit := 1, c.limit
	for _, n := range arity {
		if total *= n; total > limit {
			break
		}
	}
	if total <= limit {
		c.st.full.Add(1)
		i := 0
		for d := range m.Crashes() {
			if err := c.verify(d, before, false); err != nil {
				return fmt.Errorf("outcome %d of about %d: %w", i, total, err)
			}
			i++
		}
		return nil
	}
	// pick returns the outcome in which choice i is as f says.
	pick := func(f func(i, n int) int) *vfs.Mem {
		i := -1
		return m.Crash(func(n int) int { i++; return f(i, n) })
	}
	outcomes := []*vfs.Mem{newest, pick(func(int, int) int { return 0 })}
	for range max(1, limit/16) {
		one, other, odds := c.rng.IntN(len(arity)), c.rng.IntN(len(arity)), c.rng.IntN(10)
		outcomes = append(outcomes,
			pick(func(i, n int) int { // all but one or two
				if i == one || i == other {
					return 0
				}
				return n - 1
			}),
			pick(func(i, n int) int { // one or two
				if i == one || i == other {
					return n - 1
				}
				return 0
			}),
			pick(func(_, n int) int { // few, or most
				if c.rng.IntN(10) < odds {
					return c.rng.IntN(n)
				}
				return 0
			}),
			m.Crash(c.rng.IntN))
	}
	for i, d := range outcomes {
		if err := c.verify(d, before, false); err != nil {
			return fmt.Errorf("sampled outcome %d: %w", i, err)
		}
	}
	return nil
}

// verify opens a store as a crash left it and compares it with the model. After
// a kill, and now and then otherwise, there is a second crash in the recovery.
func (c *cutter) verify(m *vfs.Mem, before map[ID]*mvol, killed bool) error {
	c.st.crashes.Add(1)
	var second *vfs.Mem
	hook := func(vfs.Call) error { return nil }
	if killed || c.rng.IntN(6) == 0 {
		var mu sync.Mutex
		left := c.rng.IntN(40)
		hook = func(call vfs.Call) error {
			mu.Lock()
			defer mu.Unlock()
			if call.Op == vfs.OpRead || second != nil {
				return nil
			}
			if left--; left < 0 {
				second = c.second(m)
			}
			return nil
		}
	}
	if err := c.recovered(m, before, hook); err != nil || second == nil {
		return err
	}
	c.st.second.Add(1)
	if err := c.recovered(second, before, func(vfs.Call) error { return nil }); err != nil {
		return fmt.Errorf("second crash: %w", err)
	}
	return nil
}

// second returns what one more crash may leave of m.
func (c *cutter) second(m *vfs.Mem) *vfs.Mem {
	switch c.rng.IntN(5) {
	case 0:
		return m.Kill()
	case 1, 2:
		return m.Crash(func(int) int { return 0 })
	default:
		return m.Crash(c.rng.IntN)
	}
}

// recovered expects m to hold the state after the operation or before it, and
// an exact check to find nothing before and after the recovery.
func (c *cutter) recovered(m *vfs.Mem, before map[ID]*mvol, hook func(vfs.Call) error) error {
	if err := checkClean(m.Kill()); err != nil { // of a copy: a check syncs what it reads
		return err
	}
	s, err := Open(context.Background(), vfs.NewInject(m, nil, hook), c.w.opts)
	if err != nil {
		return err
	}
	var errs [2]error
	for i, vols := range []map[ID]*mvol{c.w.vols, before} {
		w := &world{opts: c.w.opts, s: s, vols: cloneModel(vols), disks: map[ID]*Disk{}}
		if errs[i] = w.compare(); errs[i] == nil {
			break
		}
	}
	if errs[1] != nil {
		err = fmt.Errorf("neither the state after the operation (%w) nor the one before (%w)", errs[0], errs[1])
	}
	if err := errors.Join(err, s.Close()); err != nil {
		return err
	}
	if err := checkClean(m); err != nil {
		return fmt.Errorf("after recovery: %w", err)
	}
	return nil
}

func cloneModel(vols map[ID]*mvol) map[ID]*mvol {
	out := maps.Clone(vols)
	for id, m := range out {
		out[id] = m.clone()
	}
	return out
}

// cutRun runs one trace.
func cutRun(ops []op, seed uint64, st *cutStats) error {
	w, err := newWorld(tinyOptions())
	if err != nil {
		return err
	}
	defer w.abandon()
	c := &cutter{w: w, rng: rand.New(rand.NewPCG(seed, 4)), st: st, limit: []int{256, 12, 12, 12}[seed%4]}
	if *soakTime > 0 {
		c.limit *= 4
	}
	c.use()
	defer c.unstall()
	if err := c.reopen(); err != nil {
		return err
	}
	st.traces.Add(1)
	for i, o := range ops {
		if st.done() {
			return nil
		}
		if err := c.step(o); err != nil {
			return fmt.Errorf("operation %d, %+v: %w", i, o, err)
		}
		st.ops.Add(1)
	}
	return nil
}

// TestPowerCuts takes the power away, or kills the process, before every call
// of a trace that changes a file, with every outcome of that where there are
// few, and expects everything acknowledged to be there and the exact check to
// find nothing. Traces follow one another until there have been enough
// crashes.
func TestPowerCuts(t *testing.T) {
	t.Parallel()
	st := &cutStats{want: int64(*cutCrashes)}
	if *soakTime > 0 {
		st.end = time.Now().Add(*soakTime)
	} else if st.want == 0 {
		st.want = 20_000
		if invariants {
			st.want = 4000
		}
	}
	first := *cutSeed
	if first == 0 {
		first = uint64(time.Now().UnixNano())
	}
	t.Logf("-cow.cutseed=%d", first)
	var wg sync.WaitGroup
	var next atomic.Uint64
	for range runtime.GOMAXPROCS(0) {
		wg.Go(func() {
			for !st.done() && !t.Failed() {
				seed := first + next.Add(1) - 1
				rng := rand.New(rand.NewPCG(seed, 5))
				n := *cutOps
				if n == 0 {
					n = []int{20, 60, 200}[seed%3]
				}
				ops := cutTrace(rng, n)
				if err := cutRun(ops, seed, st); err != nil {
					small := cutShrink(ops, seed, time.Now().Add(20*time.Second))
					for _, o := range small {
						t.Logf("%+v", o)
					}
					t.Errorf("-cow.cutseed=%d: %v\nshrunk to %d operations", seed, err, len(small))
				}
			}
		})
	}
	wg.Wait()
	t.Log(st)
}

// cutShrink removes operations as long as the trace still fails.
func cutShrink(ops []op, seed uint64, deadline time.Time) []op {
	for n := len(ops) / 2; n > 0; n /= 2 {
		for i := 0; i+n <= len(ops) && time.Now().Before(deadline); {
			less := slices.Delete(slices.Clone(ops), i, i+n)
			if cutRun(less, seed, &cutStats{end: deadline}) != nil {
				ops = less
			} else {
				i += n
			}
		}
	}
	return ops
}
