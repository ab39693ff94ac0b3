package main

import (
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"coppice/internal/nbd"
)

var nbdSections = []section{
	{name: "nbd/random", server: true, run: benchNBDRandom},
	{name: "nbd/sequential", server: true, run: benchNBDSequential},
	{name: "nbd/copy", server: true, run: benchNBDCopy},
	{name: "nbd/snapshot", server: true, run: benchNBDSnapshot},
	{name: "nbd/cold", server: true, run: benchNBDCold},
	{name: "nbd/pause", server: true, run: benchNBDPause},
	{name: "long/nbd/chain", server: true, long: true, run: benchNBDChain},
}

// nbdSize is how large the disks are, in bytes, all of it written.
const nbdSize = 1 << 30

// device is a block device that somebody serves over a Unix socket.
type device struct {
	name string
	uri  string
	pid  int
	stop func() error
	// again makes a snapshot, in the way of the peer, and goes on serving.
	again func(ctx context.Context) error
	vdi   string // reference of the disk, of ours
}

// socket is the URI of an export on a Unix socket.
func socket(path, export string) string { return "nbd+unix:///" + export + "?socket=" + path }

// ownDevice makes a disk and names it.
func (s *server) ownDevice(ctx context.Context, cfg config) (*device, error) {
	d := &device{name: "coppice", pid: s.cmd.Process.Pid, stop: func() error { return nil }}
	err := s.call(ctx, &d.vdi, "VDI.create", s.session, map[string]any{
		"SR": s.sr, "virtual_size": int64(nbdSize), "type": "user", "sharable": false, "read_only": false,
		"other_config": map[string]any{}, "name_label": "nbd",
	})
	if err != nil {
		return nil, err
	}
	var uuid string
	if err := s.call(ctx, &uuid, "VDI.get_uuid", s.session, d.vdi); err != nil {
		return nil, err
	}
	d.uri = socket(filepath.Join(cfg.scratch, "data", "nbd.sock"), "rw/"+uuid)
	d.again = func(ctx context.Context) error {
		var snapshot string
		return s.call(ctx, &snapshot, "VDI.snapshot", s.session, d.vdi)
	}
	d.stop = func() error {
		var nothing any
		return s.call(context.WithoutCancel(ctx), &nothing, "VDI.destroy", s.session, d.vdi)
	}
	return d, nil
}

// nbdPeer starts a program that serves a file on a Unix socket.
func nbdPeer(ctx context.Context, cfg config, name, export string, args func(sock string) []string) (*device, error) {
	sock := filepath.Join(cfg.scratch, strings.ReplaceAll(name, " ", "-")+".sock")
	var cmd *exec.Cmd
	d := &device{name: name, uri: socket(sock, export)}
	end := func() error {
		_ = cmd.Process.Signal(os.Interrupt)
		_ = cmd.Wait() // some call their own end by a signal a failure
		err := os.Remove(sock)
		if errors.Is(err, os.ErrNotExist) {
			return nil
		}
		return err
	}
	begin := func() error {
		a := args(sock)
		cmd = exec.Command(a[0], a[1:]...)
		if err := cmd.Start(); err != nil {
			return err
		}
		d.pid = cmd.Process.Pid
		for deadline := time.Now().Add(20 * time.Second); ; time.Sleep(20 * time.Millisecond) {
			if _, err := os.Stat(sock); err == nil {
				return nil
			} else if time.Now().After(deadline) || ctx.Err() != nil {
				return errors.Join(fmt.Errorf("%s does not listen: %w", name, err), cmd.Process.Kill(), end())
			}
		}
	}
	d.stop = end
	d.again = func(context.Context) error { return begin() }
	return d, begin()
}

// qemuNBD serves an image with qemu-nbd.
func qemuNBD(ctx context.Context, cfg config, name, format, file string) (*device, error) {
	return nbdPeer(ctx, cfg, name, "", func(sock string) []string {
		return []string{"qemu-nbd", "-k", sock, "-f", format, "-t", "-e", "16", "--cache=writeback", "--discard=unmap", file}
	})
}

// contestantsNBD makes the devices that are compared, each full of data.
func contestantsNBD(ctx context.Context, cfg config, s *server) (ds []*device, err error) {
	defer func() {
		if err != nil {
			err = errors.Join(err, stopAll(ds))
		}
	}()
	own, err := s.ownDevice(ctx, cfg)
	if err != nil {
		return nil, err
	}
	ds = append(ds, own)
	for _, format := range []string{"qcow2", "raw", "vpc"} {
		file := filepath.Join(cfg.scratch, "nbd."+format)
		if err := command("qemu-img", "create", "-q", "-f", format, file, strconv.Itoa(nbdSize))(ctx); err != nil {
			return ds, err
		}
		d, err := qemuNBD(ctx, cfg, "qemu-nbd "+format, format, file)
		if err != nil {
			return ds, err
		}
		ds = append(ds, d)
	}
	file := filepath.Join(cfg.scratch, "nbd.nbdkit")
	if err := command("truncate", "-s", strconv.Itoa(nbdSize), file)(ctx); err != nil {
		return ds, err
	}
	d, err := nbdPeer(ctx, cfg, "nbdkit file", "", func(sock string) []string {
		return []string{"nbdkit", "-f", "-U", sock, "file", file}
	})
	if err != nil {
		return ds, err
	}
	ds = append(ds, d)
	for _, d := range ds {
		if _, err := d.fio(ctx, "--rw=write", "--bs=1m", "--iodepth=4", "--end_fsync=1"); err != nil {
			return ds, err
		}
	}
	return ds, nil
}

func stopAll(ds []*device) error {
	var errs []error
	for _, d := range ds {
		errs = append(errs, d.stop())
	}
	return errors.Join(errs...)
}

// sample is what one run of fio found.
type sample struct {
	perSecond float64 // operations
	bytes     float64 // per second
	p99       time.Duration
	cpu       time.Duration // of the server, for each operation
}

// fio runs one job on a device.
func (d *device) fio(ctx context.Context, args ...string) (sample, error) {
	before, err := cpuTime(d.pid)
	if err != nil {
		return sample{}, err
	}
	args = append([]string{
		"--name=job", "--ioengine=nbd", "--uri=" + d.uri, "--size=" + strconv.Itoa(nbdSize),
		"--randrepeat=0", "--norandommap", "--refill_buffers", "--output-format=json",
	}, args...)
	cmd := exec.CommandContext(ctx, "fio", args...)
	var text, errText strings.Builder
	cmd.Stdout, cmd.Stderr = &text, &errText
	if err := cmd.Run(); err != nil {
		return sample{}, fmt.Errorf("fio on %s: %w: %s%s", d.name, err, errText.String(), text.String())
	}
	after, err := cpuTime(d.pid)
	if err != nil {
		return sample{}, err
	}
	type side struct {
		IOPS    float64 `json:"iops"`
		BWBytes float64 `json:"bw_bytes"`
		Total   float64 `json:"total_ios"`
		Clat    struct {
			Percentile map[string]float64 `json:"percentile"`
		} `json:"clat_ns"`
	}
	var result struct {
		Jobs []struct{ Read, Write side }
	}
	js := text.String()
	if i := strings.Index(js, "{"); i > 0 {
		js = js[i:] // behind a warning
	}
	if err := json.Unmarshal([]byte(js), &result); err != nil || len(result.Jobs) != 1 {
		return sample{}, fmt.Errorf("fio on %s says %q: %w", d.name, text.String(), err)
	}
	r, w := result.Jobs[0].Read, result.Jobs[0].Write
	p99 := max(r.Clat.Percentile["99.000000"], w.Clat.Percentile["99.000000"])
	return sample{
		perSecond: r.IOPS + w.IOPS, bytes: r.BWBytes + w.BWBytes, p99: time.Duration(p99),
		cpu: time.Duration(float64(after-before) / max(1, r.Total+w.Total)),
	}, nil
}

// cpuTime is what a process has used.
func cpuTime(pid int) (time.Duration, error) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return 0, err
	}
	_, rest, _ := strings.Cut(string(b), ") ")
	fields := strings.Fields(rest)
	var ticks int64
	for _, f := range fields[11:13] { // utime and stime
		n, err := strconv.ParseInt(f, 10, 64)
		if err != nil {
			return 0, err
		}
		ticks += n
	}
	return time.Duration(ticks) * 10 * time.Millisecond, nil
}

// compareFIO runs a job on the devices in turn and prints a row for each: the
// medians, and the median over the rounds of the first one's rate relative
// to it. before, which may be nil, is not counted.
func compareFIO(ctx context.Context, cfg config, title string, ds []*device, before func(*device) error, args ...string) error {
	samples := make([][]sample, len(ds))
	for range cfg.rounds {
		for i, d := range ds {
			if before != nil {
				if err := before(d); err != nil {
					return fmt.Errorf("%s: %w", d.name, err)
				}
			}
			got, err := d.fio(ctx, append([]string{"--time_based=1", "--runtime=2"}, args...)...)
			if err != nil {
				return err
			}
			samples[i] = append(samples[i], got)
		}
	}
	fmt.Printf("\n%s\n", title)
	fmt.Printf("  %-20s %12s %12s %10s %14s   %s\n", "", "per second", "rate", "p99", "CPU of server", "rate of "+ds[0].name+" against it")
	for i, d := range ds {
		of := func(get func(sample) float64) float64 {
			var vs []float64
			for _, s := range samples[i] {
				vs = append(vs, get(s))
			}
			slices.Sort(vs)
			return vs[len(vs)/2]
		}
		ratio := ""
		if i > 0 {
			var rs []float64
			for r, s := range samples[i] {
				rs = append(rs, samples[0][r].perSecond/s.perSecond)
			}
			slices.Sort(rs)
			ratio = fmt.Sprintf("%.2fx", rs[len(rs)/2])
		}
		fmt.Printf("  %-20s %12.0f %7.0f MB/s %10s %14s   %s\n", d.name,
			of(func(s sample) float64 { return s.perSecond }), of(func(s sample) float64 { return s.bytes / 1e6 }),
			time.Duration(of(func(s sample) float64 { return float64(s.p99) })).Round(time.Microsecond),
			time.Duration(of(func(s sample) float64 { return float64(s.cpu) })).Round(100*time.Nanosecond), ratio)
	}
	return nil
}

// withNBD runs fn with the contestants.
func withNBD(ctx context.Context, cfg config, s *server, fn func([]*device) error) error {
	ds, err := contestantsNBD(ctx, cfg, s)
	if err != nil {
		return err
	}
	return errors.Join(fn(ds), stopAll(ds))
}

func benchNBDRandom(ctx context.Context, cfg config, s *server) error {
	return withNBD(ctx, cfg, s, func(ds []*device) error {
		for _, job := range []struct {
			title string
			args  []string
		}{
			{"NBD: 4 KiB random read, 32 at a time", []string{"--rw=randread", "--iodepth=32"}},
			{"NBD: 4 KiB random read, one at a time", []string{"--rw=randread", "--iodepth=1"}},
			{"NBD: 4 KiB random write, 32 at a time, no flush", []string{"--rw=randwrite", "--iodepth=32"}},
			{"NBD: 4 KiB random write, one at a time, no flush", []string{"--rw=randwrite", "--iodepth=1"}},
			{"NBD: 4 KiB random write, one at a time, a flush after each", []string{"--rw=randwrite", "--iodepth=1", "--fsync=1"}},
			{"NBD: 4 KiB random write, 32 at a time, a flush after each 32", []string{"--rw=randwrite", "--iodepth=32", "--fsync=32"}},
		} {
			if err := compareFIO(ctx, cfg, job.title, ds, nil, append(job.args, "--bs=4k")...); err != nil {
				return err
			}
		}
		return nil
	})
}

func benchNBDSequential(ctx context.Context, cfg config, s *server) error {
	return withNBD(ctx, cfg, s, func(ds []*device) error {
		if err := compareFIO(ctx, cfg, "NBD: 1 MiB sequential read, 4 at a time", ds, nil, "--rw=read", "--bs=1m", "--iodepth=4"); err != nil {
			return err
		}
		return compareFIO(ctx, cfg, "NBD: 1 MiB sequential write, 4 at a time", ds, nil, "--rw=write", "--bs=1m", "--iodepth=4")
	})
}

func benchNBDCopy(ctx context.Context, cfg config, s *server) error {
	return withNBD(ctx, cfg, s, func(ds []*device) error {
		var out, in []contestant
		for _, d := range ds {
			file := filepath.Join(cfg.scratch, "copy.raw")
			out = append(out, contestant{
				name: d.name, bytes: nbdSize, run: command("nbdcopy", d.uri, "null:"),
			})
			in = append(in, contestant{
				name: d.name, bytes: nbdSize, run: command("nbdcopy", "--flush", file, d.uri),
			})
		}
		if err := compare(ctx, cfg, "nbdcopy of a full disk of 1 GiB to nowhere", out...); err != nil {
			return err
		}
		if err := command("nbdcopy", ds[0].uri, filepath.Join(cfg.scratch, "copy.raw"))(ctx); err != nil {
			return err
		}
		return compare(ctx, cfg, "nbdcopy of a file of 1 GiB onto the disk, flushed", in...)
	})
}

// benchNBDSnapshot writes right after a snapshot. The peer is qcow2 with
// internal snapshots, taken between two runs of its server.
func benchNBDSnapshot(ctx context.Context, cfg config, s *server) error {
	return withNBD(ctx, cfg, s, func(ds []*device) error {
		ds = ds[:2]
		n := 0
		snapshot := func(d *device) error {
			if d.vdi != "" {
				return d.again(ctx)
			}
			if err := d.stop(); err != nil {
				return err
			}
			n++
			if err := command("qemu-img", "snapshot", "-c", strconv.Itoa(n), filepath.Join(cfg.scratch, "nbd.qcow2"))(ctx); err != nil {
				return err
			}
			return d.again(ctx)
		}
		args := []string{"--rw=randwrite", "--bs=4k", "--iodepth=32"}
		if err := compareFIO(ctx, cfg, "NBD: 4 KiB random write, 32 at a time, settled", ds, nil, args...); err != nil {
			return err
		}
		return compareFIO(ctx, cfg, "NBD: 4 KiB random write, 32 at a time, right after a snapshot", ds, snapshot, args...)
	})
}

// scatter writes 4 KiB at n random places of a device, and flushes.
func (d *device) scatter(ctx context.Context, n int) (err error) {
	c, err := d.dial()
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, c.Close()) }()
	p := make([]byte, block)
	for range n {
		binary.NativeEndian.PutUint64(p, rand.Uint64())
		if _, err := c.WriteAt(p, rand.Int64N(nbdSize/block)*block); err != nil {
			return err
		}
	}
	return c.Flush(ctx)
}

// dial connects to a device.
func (d *device) dial() (*nbd.Client, error) {
	export, sock, _ := strings.Cut(strings.TrimPrefix(d.uri, "nbd+unix:///"), "?socket=")
	nc, err := net.Dial("unix", sock)
	if err != nil {
		return nil, err
	}
	dialogue, err := nbd.Begin(nc)
	if err != nil {
		return nil, errors.Join(err, nc.Close())
	}
	c, err := dialogue.Go(export)
	if err != nil {
		return nil, errors.Join(err, nc.Close())
	}
	return c, nil
}

// benchNBDChain reads from disks with 200 snapshots, between which a little has
// been written; a peer's are a chain of 200 qcow2 files.
func benchNBDChain(ctx context.Context, cfg config, s *server) (err error) {
	const depth, writes = 200, 256
	own, err := s.ownDevice(ctx, cfg)
	if err != nil {
		return err
	}
	ds := []*device{own}
	defer func() { err = errors.Join(err, stopAll(ds)) }()
	fill := []string{"--rw=write", "--bs=1m", "--iodepth=4", "--end_fsync=1"}
	if _, err := own.fio(ctx, fill...); err != nil {
		return err
	}
	plain, err := s.ownDevice(ctx, cfg)
	if err != nil {
		return err
	}
	plain.name = "coppice, no snapshot"
	ds = append(ds, plain)
	if _, err := plain.fio(ctx, fill...); err != nil {
		return err
	}
	for range depth {
		if err := own.again(ctx); err != nil {
			return err
		}
		if err := own.scatter(ctx, writes); err != nil {
			return err
		}
	}
	file := func(n int) string { return filepath.Join(cfg.scratch, fmt.Sprintf("chain-%d.qcow2", n)) }
	if err := command("qemu-img", "create", "-q", "-f", "qcow2", file(0), strconv.Itoa(nbdSize))(ctx); err != nil {
		return err
	}
	for n := 0; ; n++ {
		d, err := qemuNBD(ctx, cfg, "qcow2 chain", "qcow2", file(n))
		if err != nil {
			return err
		}
		if n == depth {
			ds = append(ds, d)
			break
		}
		if n == 0 {
			_, err = d.fio(ctx, fill...)
		} else {
			err = d.scatter(ctx, writes)
		}
		if err := errors.Join(err, d.stop()); err != nil {
			return err
		}
		if err := command("qemu-img", "create", "-q", "-f", "qcow2", "-b", file(n), "-F", "qcow2", file(n+1))(ctx); err != nil {
			return err
		}
	}
	return compareFIO(ctx, cfg, "NBD: 4 KiB random read, 32 at a time, with 200 snapshots", ds, nil, "--rw=randread", "--bs=4k", "--iodepth=32")
}
