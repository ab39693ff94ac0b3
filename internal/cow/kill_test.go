package cow

import (
	"bufio"
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"flag"
	"fmt"
	"io"
	"maps"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"syscall"
	"testing"
	"time"

	"coppice/internal/vfs"
)

var (
	killRounds = flag.Int("cow.kills", 0, "rounds of TestKill; 0 is the ordinary number")
	killWriter = flag.String("cow.writer", "", "be the process that TestKill kills, on the store in this `directory`")
	killFirst  = flag.Uint64("cow.first", 0, "number of the first write of that process")
)

const (
	killUnits = 256 // of the disk that the client writes
	killUnit  = 4096
)

var killDisk = ID{1}

// killEvent is what the client tells on its standard output: begun before a
// call, acked after it.
type killEvent struct {
	Kind byte // 'w' begun write, 'f' flush that returned, 's' begun snapshot, 'S' snapshot that returned
	Unit uint32
	N    uint64 // number of the write or snapshot; of a flush, the last write before it
}

// TestKillWriter is not a test of its own: it is the client of [TestKill],
// which runs it as a process and kills that.
func TestKillWriter(t *testing.T) {
	if *killWriter == "" {
		t.Skip("is run by TestKill")
	}
	err := writeUntilKilled(*killWriter, *killFirst, os.Stdout)
	t.Fatal(err) // it should not have ended
}

// writeUntilKilled opens the store and writes rising numbers into random
// units, flushes, snapshots and deletes snapshots.
func writeUntilKilled(path string, n uint64, out io.Writer) error {
	ctx := context.Background()
	dir, err := vfs.OpenDir(path)
	if err != nil {
		return err
	}
	// Small limits, so that checkpoints and large flushes are frequent.
	s, err := Open(ctx, dir, Options{Limits: Limits{DirectMin: 64 << 10, Entries: 600}})
	if err != nil {
		return err
	}
	d, err := s.OpenDisk(ctx, killDisk, Live)
	if err != nil {
		return err
	}
	tell := func(e killEvent) error { return binary.Write(out, binary.LittleEndian, e) }
	rng := rand.New(rand.NewPCG(n, 1))
	var snaps []uint64
	for {
		units := 1 + rng.IntN(3)
		if rng.IntN(10) == 0 {
			units = 20 + rng.IntN(20) // directly to the space files
		}
		first := rng.IntN(killUnits - units)
		p := make([]byte, units*killUnit)
		for i := range units {
			n++
			stamp(p[i*killUnit:(i+1)*killUnit], n)
			if err := tell(killEvent{'w', uint32(first + i), n}); err != nil {
				return err
			}
		}
		if _, err := d.WriteAt(p, int64(first)*killUnit); err != nil {
			return err
		}
		switch k := rng.IntN(12); {
		case k < 4:
			if err := d.Flush(ctx); err != nil {
				return err
			}
			if err := tell(killEvent{'f', 0, n}); err != nil {
				return err
			}
		case k == 4:
			if err := tell(killEvent{'s', 0, n}); err != nil {
				return err
			}
			if _, err := s.Snapshot(ctx, []Pair{{Src: killDisk, New: killSnap(n)}}); err != nil {
				return err
			}
			if err := tell(killEvent{'S', 0, n}); err != nil {
				return err
			}
			snaps = append(snaps, n)
		case k == 5 && len(snaps) > 3:
			if err := s.Delete(ctx, killSnap(snaps[0])); err != nil {
				return err
			}
			snaps = snaps[1:]
		}
	}
}

// killSnap is the name of the snapshot taken after write n.
func killSnap(n uint64) ID {
	id := ID{2}
	binary.BigEndian.PutUint64(id[8:], n)
	return id
}

// killState is what the disk may hold: of each unit the versions written
// since it was last flushed, newest last.
type killState struct {
	units [killUnits][]uint64
	last  uint64 // number of the last write
	snaps map[uint64][killUnits]uint64
	asked uint64 // a snapshot was asked for after this write and may exist
}

// read takes in what the client said before it died. A last event may be cut.
func (k *killState) read(r io.Reader) (events int, err error) {
	for {
		var e killEvent
		if err := binary.Read(r, binary.LittleEndian, &e); errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
			return events, nil
		} else if err != nil {
			return events, err
		}
		events++
		switch e.Kind {
		case 'w':
			k.units[e.Unit] = append(k.units[e.Unit], e.N)
			k.last = e.N
		case 's':
			k.asked = e.N
		case 'S':
			var now [killUnits]uint64
			for u, vs := range k.units {
				now[u] = vs[len(vs)-1]
			}
			k.snaps[e.N] = now
			fallthrough // it has flushed, too
		case 'f':
			for u, vs := range k.units {
				k.units[u] = vs[len(vs)-1:]
			}
		default:
			return events, fmt.Errorf("the client said %+v", e)
		}
	}
}

// verify compares a store with what it may hold, and takes over what it does.
func (k *killState) verify(s *Store) error {
	ctx := context.Background()
	buf := make([]byte, killUnits*killUnit)
	read := func(id ID) (got [killUnits]uint64, err error) {
		d, err := s.OpenDisk(ctx, id, Live)
		if err != nil {
			return got, err
		}
		if _, err := d.ReadAt(buf, 0); err != nil {
			return got, err
		}
		for u := range got {
			if got[u], err = readStamp(buf[u*killUnit : (u+1)*killUnit]); err != nil {
				return got, err
			}
		}
		return got, d.Close()
	}
	got, err := read(killDisk)
	if err != nil {
		return err
	}
	for u, n := range got {
		ok := false
		for _, v := range k.units[u] {
			ok = ok || v == n
		}
		if !ok {
			return fmt.Errorf("unit %d holds write %d, want one of %d", u, n, k.units[u])
		}
		k.units[u] = []uint64{n}
	}
	found := map[uint64]bool{}
	for i := range s.List() {
		n := binary.BigEndian.Uint64(i.ID[8:])
		if i.ID == killDisk {
			continue
		}
		want, ok := k.snaps[n]
		if !ok && n != k.asked {
			return fmt.Errorf("there is a snapshot of write %d that nobody asked for", n)
		}
		if got, err := read(i.ID); err != nil || ok && got != want {
			return fmt.Errorf("snapshot of write %d is not what it was (%v)", n, err)
		}
		found[n] = true
		if err := s.Delete(ctx, i.ID); err != nil {
			return err
		}
	}
	taken := slices.Sorted(maps.Keys(k.snaps))
	for _, n := range taken[max(0, len(taken)-3):] { // the client deletes older ones only
		if !found[n] {
			return fmt.Errorf("the snapshot of write %d is lost", n)
		}
	}
	k.snaps, k.asked = map[uint64][killUnits]uint64{}, 0
	return nil
}

// TestKill kills a process that writes to a store in a real directory, again
// and again, and expects everything it had flushed to be there and the exact
// check to find nothing.
func TestKill(t *testing.T) {
	t.Parallel()
	ctx := context.Background()
	rounds := *killRounds
	var end time.Time
	switch {
	case *soakTime > 0:
		end = time.Now().Add(*soakTime)
	case rounds == 0 && invariants:
		rounds = 8
	case rounds == 0:
		rounds = 20
	}
	path := filepath.Join(t.TempDir(), "store")
	dir, err := vfs.CreateDir(path)
	if err != nil {
		t.Fatal(err)
	}
	s, err := Create(ctx, dir, Options{LogBytes: 2 << 20})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := s.Create(ctx, killDisk, killUnits*killUnit, nil); err != nil {
		t.Fatal(err)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	k := &killState{snaps: map[uint64][killUnits]uint64{}}
	for u := range k.units {
		k.units[u] = []uint64{0}
	}
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	rng := rand.New(rand.NewPCG(seed, 7))
	kills, events := 0, 0
	for ; kills < rounds || time.Now().Before(end); kills++ {
		n, err := killRound(path, k, 1+rng.IntN(4000))
		events += n
		if err != nil {
			t.Fatalf("round %d: %v", kills, err)
		}
		for p, err := range Check(ctx, dir) {
			t.Fatalf("round %d: check: %v %v", kills, p, err)
		}
		s, err := Open(ctx, dir, Options{})
		if err != nil {
			t.Fatalf("round %d: %v", kills, err)
		}
		if err := k.verify(s); err != nil {
			t.Fatalf("round %d: %v", kills, err)
		}
		if err := s.Close(); err != nil {
			t.Fatal(err)
		}
		for p, err := range Check(ctx, dir) {
			t.Fatalf("round %d: check after recovery: %v %v", kills, p, err)
		}
	}
	t.Logf("%d kills, %d events of the client", kills, events)
}

// killRound runs the client, kills it after so many events, and takes in what
// it said.
func killRound(path string, k *killState, after int) (events int, err error) {
	cmd := exec.Command(os.Args[0], "-test.run=^TestKillWriter$", "-cow.writer="+path, fmt.Sprintf("-cow.first=%d", k.last))
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.StdoutPipe()
	if err != nil {
		return 0, err
	}
	if err := cmd.Start(); err != nil {
		return 0, err
	}
	size := binary.Size(killEvent{})
	r := bufio.NewReaderSize(out, 1<<20)
	events, err = k.read(io.LimitReader(r, int64(after*size)))
	err = errors.Join(err, cmd.Process.Signal(syscall.SIGKILL))
	n, rerr := k.read(r) // what it wrote before it died
	_ = cmd.Wait()       // it was killed
	if err = errors.Join(err, rerr); err == nil && events < after {
		err = fmt.Errorf("the client ended after %d events: %s", events, stderr.Bytes())
	}
	return events + n, err
}
