// Command bench measures Coppice side by side with the tools a user would pick
// instead, in one run and on one file system, and prints a table of medians
// and ratios.
//
// Every comparison alternates its contestants (A, B, C, A, B, C, …), so that
// a machine whose speed drifts slows all of them down alike; the ratio is the
// median of the ratios of the rounds, not the ratio of two medians. The
// contestants:
//
//   - coppice: the real binary, started on a fresh directory, driven over
//     loopback HTTP by the same client as the limit;
//   - qemu-img: the whole process, as its user would wait for it;
//   - nbdcopy: the same, from a raw file;
//   - limit: a do-nothing HTTP server on loopback that reads (or writes) the
//     same bytes, takes the CRC32C of each 4 KiB and does nothing else. It is
//     what any server that verifies its data could reach here.
//
// The sections "engine/…" measure the storage engine alone, through its Go
// interface, against a raw file that the same loops read and write. Those
// called "long/…", and "api", take minutes and run only when they are asked for.
//
// The sections "nbd/…" put fio and nbdcopy in front of block devices, served by
// us, by qemu-nbd and by nbdkit, over Unix sockets.
//
// The sections "transfers/…" move disks in and out, with -gib GiB of data.
//
// Usage: go run ./bench [-rounds N] [-dir DIR] [-only REGEXP] [-gib N] [-cpuprofile FILE];
// it needs qemu-img and curl, for NBD also qemu-nbd, nbdkit, nbdcopy and fio, and, but for
// the engine, bin/coppice (make build).
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"regexp"
	"runtime"
	"runtime/pprof"
	"slices"

	"golang.org/x/sys/unix"
)

// config is what the flags say.
type config struct {
	rounds  int
	dir     string
	binary  string
	only    *regexp.Regexp
	profile string
	dense   int64  // bytes of data of the disks that are moved
	scratch string // a directory of this run, below dir
}

// section is a part of the benchmark that can be run alone.
type section struct {
	name   string
	server bool // needs a running server; run gets nil otherwise
	long   bool // runs only when -only asks for it
	run    func(context.Context, config, *server) error
}

var serverSections = []section{
	{name: "transfers/formats", server: true, run: benchFormats},
	{name: "transfers/sparse", server: true, run: benchSparse},
	{name: "transfers/first-byte", server: true, run: benchFirstByte},
	{name: "transfers/eight", server: true, run: benchEight},
	{name: "transfers/delta", server: true, run: benchDelta},
	{name: "transfers/tables-last", server: true, run: benchTablesLast},
	{name: "transfers/pull", server: true, run: benchPull},
	{name: "transfers/memory", server: true, run: benchMemory},
	{name: "snapshot", server: true, run: benchSnapshot},
	{name: "api", long: true, run: benchAPI},
}

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, unix.SIGTERM)
	defer stop()
	if len(os.Args) == 3 && os.Args[1] == crashWriter {
		if err := writeUntilKilled(ctx, os.Args[2]); err != nil {
			fmt.Fprintln(os.Stderr, "bench:", err)
			os.Exit(1)
		}
		return
	}
	if err := run(ctx); err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context) (err error) {
	var cfg config
	only := flag.String("only", "", "run only the sections whose name matches this `regexp`")
	flag.IntVar(&cfg.rounds, "rounds", 5, "measured rounds of each comparison, after one that is not counted")
	flag.StringVar(&cfg.dir, "dir", os.TempDir(), "where the store and the image files are put")
	flag.StringVar(&cfg.binary, "coppice", "bin/coppice", "the server binary")
	flag.StringVar(&cfg.profile, "cpuprofile", "", "write a CPU profile of the run to this `file`")
	gibs := flag.Int64("gib", 1, "GiB of data of the disks that are exported and imported")
	flag.Parse()
	if *gibs <= 0 {
		return fmt.Errorf("-gib %d", *gibs)
	}
	cfg.dense = *gibs * gib
	if cfg.only, err = regexp.Compile(*only); err != nil {
		return err
	}
	if cfg.binary, err = filepath.Abs(cfg.binary); err != nil {
		return err
	}
	if cfg.scratch, err = os.MkdirTemp(cfg.dir, "coppice-bench-"); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(cfg.scratch)) }()

	if cfg.profile != "" {
		f, err := os.Create(cfg.profile)
		if err != nil {
			return err
		}
		defer func() { err = errors.Join(err, f.Close()) }()
		if err := pprof.StartCPUProfile(f); err != nil {
			return err
		}
		defer pprof.StopCPUProfile()
	}
	var srv *server
	fmt.Printf("%d CPUs, %s, %d rounds, files in %s\n", runtime.NumCPU(), runtime.Version(), cfg.rounds, cfg.dir)
	for _, s := range slices.Concat(serverSections, nbdSections, engineSections) {
		if s.long && *only == "" || !cfg.only.MatchString(s.name) {
			continue
		}
		if s.server && srv == nil {
			if srv, err = startServer(ctx, cfg); err != nil {
				return err
			}
			defer func() { err = errors.Join(err, srv.stop()) }()
		}
		if err := s.run(ctx, cfg, srv); err != nil {
			return fmt.Errorf("%s: %w", s.name, err)
		}
	}
	return nil
}
