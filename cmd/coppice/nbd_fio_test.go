package main

import (
	"context"
	"fmt"
	"net/url"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"coppice/internal/peertest"
)

// fioPatience bounds each run of fio; no test that passes comes near it.
const fioPatience = 2 * time.Minute

// fioRig runs fio on a disk of a server that is killed now and then.
type fioRig struct {
	t    *testing.T
	path string // of fio
	dir  string // where it leaves its files
	uri  string
	size int64 // bytes of each half of the disk
}

// command is fio with a job on one half of the disk.
func (r *fioRig) command(ctx context.Context, name string, half int64, args ...string) *exec.Cmd {
	c := exec.CommandContext(ctx, r.path, append([]string{
		"--name=" + name, "--ioengine=nbd", "--uri=" + r.uri, "--bs=4k", "--iodepth=16", "--verify_fatal=1",
		fmt.Sprintf("--offset=%d", half*r.size), fmt.Sprintf("--size=%d", r.size),
	}, args...)...)
	c.Dir = r.dir
	return c
}

// run runs such a job to its end and returns what it printed.
func (r *fioRig) run(name string, half int64, args ...string) (string, error) {
	ctx, cancel := context.WithTimeout(r.t.Context(), fioPatience)
	defer cancel()
	out, err := r.command(ctx, name, half, args...).CombinedOutput()
	return string(out), err
}

// must is run of what must succeed.
func (r *fioRig) must(name string, half int64, args ...string) {
	r.t.Helper()
	if out, err := r.run(name, half, args...); err != nil {
		r.t.Fatalf("fio, %s: %v\n%s", name, err, out)
	}
}

// generation is how fio recognises what one round wrote: every block holds the
// round and its own offset.
func generation(round int) []string {
	return []string{"--verify=pattern", "--verify_interval=4096", fmt.Sprintf(`--verify_pattern="round%03d"%%o`, round)}
}

// saying is what a program says, and whether it has said something yet.
type saying struct {
	text  string
	heard chan struct{} // closed when it has

	mu  sync.Mutex
	all strings.Builder // guarded by mu
}

func newSaying(text string) *saying { return &saying{text: text, heard: make(chan struct{})} }

func (s *saying) Write(p []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	before := strings.Contains(s.all.String(), s.text)
	s.all.Write(p)
	if !before && strings.Contains(s.all.String(), s.text) {
		close(s.heard)
	}
	return len(p), nil
}

func (s *saying) String() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.all.String()
}

// TestKillUnderFIO kills the server while one fio writes and flushes as much as
// it can and after another one has ended with a flush. What the latter wrote is
// there, all of it and no older; of the former every block is whole. The
// store is sound.
func TestKillUnderFIO(t *testing.T) {
	const settled, loaded = 0, 1 // halves of the disk
	r := &fioRig{t: t, path: peertest.Tool(t, "fio", "fio"), dir: t.TempDir(), size: 8 << 20}
	data := filepath.Join(t.TempDir(), "data")
	flags := []string{"--admin-password-file", writePassword(t), "--nbd", "off"}
	p := startProcess(t, data, flags...)
	session := p.login(t)
	r.uri = "nbd+unix:///rw/" + p.disk(t, session, 2*r.size, true) + "?socket=" + url.PathEscape(dataDir(data).nbdSocket())
	r.must("fill", loaded, "--rw=write", "--verify=crc32c", "--do_verify=0", "--end_fsync=1")
	for round := 1; round <= *nbdKills; round++ {
		ctx, cancel := context.WithTimeout(t.Context(), fioPatience)
		load := r.command(ctx, "load", loaded, "--rw=randwrite", "--norandommap=1", "--verify=crc32c", "--do_verify=0",
			"--fsync=16", "--loops=1000000", fmt.Sprintf("--randseed=%d", round))
		said := newSaying("connected to NBD server")
		load.Stdout, load.Stderr = said, said
		if err := load.Start(); err != nil {
			t.Fatal(err)
		}
		select {
		case <-said.heard:
		case <-ctx.Done():
			_ = load.Wait()
			t.Fatalf("round %d: the load does not begin\n%s", round, said)
		}
		r.must("settle", settled, append(generation(round), "--rw=randwrite", "--do_verify=0", "--end_fsync=1")...)
		_ = p.cmd.Process.Kill()
		err := load.Wait()
		cancel()
		if err == nil || ctx.Err() == context.DeadlineExceeded {
			t.Fatalf("round %d: the load ended before the server or not with it: %v\n%s", round, err, said)
		}
		_ = p.cmd.Wait()
		p = startProcess(t, data, flags...)
		r.must("verify what was flushed", settled, append(generation(round), "--rw=read")...)
		r.must("verify the load", loaded, "--rw=read", "--verify=crc32c")
		if out, err := r.run("older", settled, append(generation(round-1), "--rw=read")...); err == nil {
			t.Fatalf("round %d: fio takes it for the round before\n%s", round, out)
		}
	}
	t.Logf("%d kills", *nbdKills)
	_ = p.cmd.Process.Kill()
	_ = p.cmd.Wait()
	if got := runCommand(t, "check", "--data", data); got.code != exitOK {
		t.Errorf("check: exit code %d\n%s%s", got.code, got.stdout, got.stderr)
	}
}
