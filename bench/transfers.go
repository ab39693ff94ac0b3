package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"time"
)

const (
	mib = 1 << 20
	gib = 1 << 30
	tib = 1 << 40
)

// makeImage writes a sparse raw image of the given size that holds data bytes
// of noise, in runs of 4 MiB spread evenly over it. The noise follows from
// the seed.
func makeImage(path string, seed byte, size, data int64) (err error) {
	f, err := os.Create(path)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	if err := f.Truncate(size); err != nil {
		return err
	}
	const run = 4 * mib
	noise := rand.NewChaCha8([32]byte{seed})
	buf := make([]byte, run)
	stride := size / (data / run)
	for off := int64(0); off+run <= size; off += stride {
		_, _ = noise.Read(buf) // cannot fail
		if _, err := f.WriteAt(buf, off); err != nil {
			return err
		}
	}
	return f.Sync()
}

// scatterNoise writes noise over data bytes of an image, in runs of run bytes
// at different places that follow from the seed.
func scatterNoise(path string, seed byte, data, run int64) (err error) {
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	st, err := f.Stat()
	if err != nil {
		return err
	}
	noise := rand.NewChaCha8([32]byte{seed})
	places := rand.New(noise).Perm(int(st.Size() / run))
	buf := make([]byte, run)
	for _, at := range places[:data/run] {
		_, _ = noise.Read(buf) // cannot fail
		if _, err := f.WriteAt(buf, int64(at)*run); err != nil {
			return err
		}
	}
	return f.Sync()
}

// benchFirstByte waits for the first byte of an export of a nearly empty disk
// of 1 TiB.
func benchFirstByte(ctx context.Context, cfg config, srv *server) error {
	d, err := srv.newDisk(ctx, cfg, "", tib, cfg.dense)
	if err != nil {
		return err
	}
	snap, err := srv.snapshotVDI(ctx, d.vdi)
	if err != nil {
		return err
	}
	var cs []contestant
	first := func(name, url string) {
		cs = append(cs, contestant{name, 0, func(ctx context.Context) error {
			body, _, err := srv.open(ctx, url, nil)
			if err != nil {
				return err
			}
			defer body.Close()
			_, err = io.ReadFull(body, make([]byte, 1))
			return err
		}, nil})
	}
	for _, f := range imageFormats {
		first(f.name, srv.exportURL(d.vdi, f.name, ""))
	}
	first("vhd, delta of nothing", srv.exportURL(d.vdi, "vhd", snap))
	err = compare(ctx, cfg, "First byte of an export of a disk of 1 TiB with "+bytesText(cfg.dense)+" of data", cs...)
	return errors.Join(err, srv.destroyVDI(ctx, snap), srv.dropDisk(ctx, d))
}

// benchEight exports one disk eight times at once, and imports eight.
func benchEight(ctx context.Context, cfg config, srv *server) (err error) {
	const many = 8
	cfg = cfg.fewer()
	lim, err := startLimit()
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, lim.Close()) }()
	size := cfg.dense / 4
	d, err := srv.newDisk(ctx, cfg, "", size, size)
	if err != nil {
		return err
	}
	// atOnce runs n transfers and tells unfair, unless nil, how many times as long
	// the last one took as the first.
	atOnce := func(n int, transfer func(ctx context.Context, i int) error, unfair *[]float64) func(context.Context) error {
		return func(ctx context.Context) error {
			errs, times := make([]error, n), make([]time.Duration, n)
			var all sync.WaitGroup
			for i := range n {
				all.Go(func() {
					start := time.Now()
					errs[i] = transfer(ctx, i)
					times[i] = time.Since(start)
				})
			}
			all.Wait()
			if unfair != nil {
				*unfair = append(*unfair, float64(slices.Max(times))/float64(slices.Min(times)))
			}
			return errors.Join(errs...)
		}
	}
	run := func(title string, transfer, limited func(ctx context.Context, i int) error, clean, cleanLimited func() error) error {
		var unfair []float64
		if err := compare(ctx, cfg, title,
			contestant{"coppice, eight at once", many * size, atOnce(many, transfer, &unfair), clean},
			contestant{"limit, eight at once", many * size, atOnce(many, limited, nil), cleanLimited},
			contestant{"coppice, one", size, atOnce(1, transfer, nil), clean},
		); err != nil {
			return err
		}
		fmt.Printf("  the slowest of our eight took %.2f times as long as the fastest\n", slices.Max(unfair[1:]))
		return nil
	}
	for _, f := range imageFormats {
		url, image := srv.exportURL(d.vdi, f.name, ""), filepath.Join(cfg.scratch, "disk.image")
		if err := srv.downloadFile(ctx, url, image, nil); err != nil {
			return err
		}
		err := run(f.name+" export of a full disk of "+bytesText(size)+" to a sink",
			func(ctx context.Context, _ int) error { return srv.drain(ctx, url, nil) },
			func(ctx context.Context, _ int) error { return srv.drain(ctx, lim.base+image, nil) }, nil, nil)
		if err != nil {
			return err
		}
		targets := make([]string, many)
		out := func(i int) string { return filepath.Join(cfg.scratch, fmt.Sprintf("out%d", i)) }
		err = run(f.name+" import of a full disk of "+bytesText(size), func(ctx context.Context, i int) (err error) {
			if targets[i], err = srv.createVDI(ctx, size); err != nil {
				return err
			}
			return srv.importFile(ctx, targets[i], f.name, image)
		}, func(ctx context.Context, i int) error {
			return srv.uploadFile(ctx, lim.base+out(i), image)
		}, func() (err error) {
			for i, vdi := range targets {
				if vdi != "" {
					err = errors.Join(err, srv.destroyVDI(ctx, vdi))
				}
				targets[i] = ""
			}
			return err
		}, func() (err error) {
			for i := range many {
				err = errors.Join(err, os.Remove(out(i)))
			}
			return err
		})
		if err := errors.Join(err, os.Remove(image)); err != nil {
			return err
		}
	}
	return srv.dropDisk(ctx, d)
}

// changedRun is how long each of the changes of benchDelta is, in bytes.
const changedRun = 64 << 10

// benchDelta exports what has changed of a full disk, scattered over it, and
// of an empty one of 1 TiB.
func benchDelta(ctx context.Context, cfg config, srv *server) (err error) {
	cfg = cfg.fewer()
	lim, err := startLimit()
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, lim.Close()) }()
	for _, size := range []int64{cfg.dense, tib} {
		d, err := srv.newDisk(ctx, cfg, "", size, cfg.dense)
		if err != nil {
			return err
		}
		var snaps []string
		base, err := srv.snapshotVDI(ctx, d.vdi)
		if err != nil {
			return err
		}
		for i, permille := range []int64{1, 10, 100} {
			if size != cfg.dense && permille > 10 {
				break // is the same as of the full one
			}
			changed := cfg.dense * permille / 1000 / changedRun * changedRun
			if err := scatterNoise(d.raw, byte(2+i), changed, changedRun); err != nil {
				return err
			}
			image := filepath.Join(cfg.scratch, "changed.qcow2")
			if err := command("qemu-img", "convert", "-f", "raw", "-O", "qcow2", d.raw, image)(ctx); err != nil {
				return err
			}
			if err := errors.Join(srv.importFile(ctx, d.vdi, "qcow2", image), os.Remove(image)); err != nil {
				return err
			}
			after, err := srv.snapshotVDI(ctx, d.vdi)
			if err != nil {
				return err
			}
			title := fmt.Sprintf("Delta export of %.1f %% of %s, scattered in runs of 64 KiB over a disk of %s, to a sink",
				float64(permille)/10, bytesText(cfg.dense), bytesText(size))
			if err := compareDelta(ctx, cfg, srv, lim, title, after, base, changed); err != nil {
				return err
			}
			snaps, base = append(snaps, base), after
		}
		for _, s := range append(snaps, base) {
			if err := srv.destroyVDI(ctx, s); err != nil {
				return err
			}
		}
		if err := srv.dropDisk(ctx, d); err != nil {
			return err
		}
	}
	return nil
}

// compareDelta exports a delta in the formats that have them, beside the limit
// sending as many bytes.
func compareDelta(ctx context.Context, cfg config, srv *server, lim *limit, title, after, base string, changed int64) error {
	for _, format := range []string{"qcow2", "vhd"} {
		url, file := srv.exportURL(after, format, base), filepath.Join(cfg.scratch, "delta")
		if err := srv.downloadFile(ctx, url, file, nil); err != nil {
			return err
		}
		st, err := os.Stat(file)
		if err != nil {
			return err
		}
		err = compare(ctx, cfg, fmt.Sprintf("%s (%s: %d MiB for %d MiB that have changed)", title, format, st.Size()>>20, changed>>20),
			contestant{"coppice", st.Size(), func(ctx context.Context) error { return srv.drain(ctx, url, nil) }, nil},
			contestant{"limit, the same bytes", st.Size(), func(ctx context.Context) error { return srv.drain(ctx, lim.base+file, nil) }, nil},
			contestant{"coppice, the whole disk", 0, func(ctx context.Context) error { return srv.drain(ctx, srv.exportURL(after, format, ""), nil) }, nil},
		)
		if err := errors.Join(err, os.Remove(file)); err != nil {
			return err
		}
	}
	return nil
}
