package main

import (
	"context"
	"encoding/binary"
	"flag"
	"fmt"
	"math/rand/v2"
	"net"
	"path/filepath"
	"slices"
	"sync"
	"sync/atomic"
	"testing"

	"coppice/internal/nbd"
)

var nbdKills = flag.Int("nbd.kills", 3, "how often TestKillUnderNBD and TestKillUnderFIO kill the server")

const (
	killBlock  = 4096
	killBlocks = 2048
)

// blockHistory is what a block may hold after a crash: what it held at the
// last flush, and everything that was written to it since. Zero is the state
// of zeros, others are versions.
type blockHistory [][]uint64

// fillBlock makes the contents of a block in a state.
func fillBlock(p []byte, block int, state uint64) {
	clear(p)
	if state == 0 {
		return
	}
	for i := 0; i < len(p); i += 16 {
		binary.LittleEndian.PutUint64(p[i:], uint64(block)<<32|uint64(i))
		binary.LittleEndian.PutUint64(p[i+8:], state)
	}
}

// check says which block of a disk is in a state that it cannot be in, and
// takes the states for what there is from now on.
func (h blockHistory) check(c *nbd.Client) error {
	got, want := make([]byte, killBlock), make([]byte, killBlock)
	for block := range h {
		if _, err := c.ReadAt(got, int64(block)*killBlock); err != nil {
			return err
		}
		state := binary.LittleEndian.Uint64(got[8:])
		fillBlock(want, block, state)
		if !slices.Contains(h[block], state) || string(got) != string(want) {
			return fmt.Errorf("block %d: state %d, or a mixture of some; possible are %d", block, state, h[block])
		}
		h[block] = []uint64{state}
	}
	return nil
}

// dialNBD opens an export of a server on its Unix socket.
func dialNBD(data, export string) (*nbd.Client, error) {
	nc, err := net.Dial("unix", string(dataDir(data).nbdSocket()))
	if err != nil {
		return nil, err
	}
	d, err := nbd.Begin(nc)
	if err != nil {
		return nil, err
	}
	if err := d.Extended(); err != nil {
		return nil, err
	}
	return d.Go(export)
}

// disk makes a disk in the default SR and returns its uuid.
func (p *process) disk(t *testing.T, session any, size int64, sharable bool) string {
	t.Helper()
	pools, err := p.call("pool.get_all_records", session)
	if err != nil {
		t.Fatal(err)
	}
	for _, pool := range pools.(map[string]any) {
		vdi, err := p.call("VDI.create", session, map[string]any{
			"SR": pool.(map[string]any)["default_SR"], "virtual_size": size, "type": "user",
			"sharable": sharable, "read_only": false, "other_config": map[string]any{}, "name_label": "disk",
		})
		if err != nil {
			t.Fatal(err)
		}
		uuid, err := p.call("VDI.get_uuid", session, vdi)
		if err != nil {
			t.Fatal(err)
		}
		return uuid.(string)
	}
	t.Fatal("there is no pool")
	return ""
}

// TestKillUnderNBD kills a server while several connections write to a disk
// and flush. What was flushed is there again, every block is whole, and the
// store is sound.
func TestKillUnderNBD(t *testing.T) {
	data := filepath.Join(t.TempDir(), "data")
	flags := []string{"--admin-password-file", writePassword(t), "--nbd", "off"}
	p := startProcess(t, data, flags...)
	session := p.login(t)
	export := "rw/" + p.disk(t, session, killBlock*killBlocks, false)
	history := make(blockHistory, killBlocks)
	for i := range history {
		history[i] = []uint64{0}
	}
	var version atomic.Uint64
	operations := 0
	for round := range *nbdKills {
		limit := int64(2000 + rand.IntN(6000))
		operations += killAfter(t, p, data, export, history, &version, limit)
		p = startProcess(t, data, flags...)
		c, err := dialNBD(data, export)
		if err != nil {
			t.Fatal(err)
		}
		if err := history.check(c); err != nil {
			t.Fatalf("after kill %d: %v", round+1, err)
		}
		if err := c.Close(); err != nil {
			t.Fatal(err)
		}
	}
	t.Logf("%d operations, %d kills", operations, *nbdKills)
	_ = p.cmd.Process.Kill()
	_ = p.cmd.Wait()
	if got := runCommand(t, "check", "--data", data); got.code != exitOK {
		t.Errorf("check: exit code %d\n%s%s", got.code, got.stdout, got.stderr)
	}
}

// killAfter has four clients write, each to its own blocks, and kills the
// server after limit operations.
func killAfter(t *testing.T, p *process, data, export string, history blockHistory, version *atomic.Uint64, limit int64) int {
	t.Helper()
	const writers = 4
	var done atomic.Int64
	var wg sync.WaitGroup
	for w := range writers {
		c, err := dialNBD(data, export)
		if err != nil {
			t.Fatal(err)
		}
		wg.Go(func() {
			defer c.Abort()
			touched := map[int]bool{}
			buf := make([]byte, killBlock)
			for {
				if done.Add(1) == limit {
					_ = p.cmd.Process.Kill()
				}
				block := rand.IntN(killBlocks/writers)*writers + w
				var err error
				switch rand.IntN(20) {
				case 0:
					if err = c.Flush(context.Background()); err == nil {
						for b := range touched {
							history[b] = history[b][len(history[b])-1:]
						}
						clear(touched)
					}
				case 1:
					history[block] = append(history[block], 0)
					touched[block] = true
					err = c.WriteZeroes(int64(block)*killBlock, killBlock, 0)
				default:
					state := version.Add(1)
					history[block] = append(history[block], state)
					touched[block] = true
					fillBlock(buf, block, state)
					through := rand.IntN(20) == 0
					flags := uint16(0)
					if through {
						flags = nbd.CmdFUA
					}
					if _, err = c.Write(buf, int64(block)*killBlock, flags); err == nil && through {
						history[block] = []uint64{state}
					}
				}
				if err != nil {
					return // the server is gone
				}
			}
		})
	}
	wg.Wait()
	_ = p.cmd.Wait()
	return int(done.Load())
}
