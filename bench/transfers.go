package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
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

// benchVHD moves a 4 GiB disk with 1 GiB of data out and in.
func benchVHD(ctx context.Context, cfg config, srv *server) (err error) {
	raw, vhd := filepath.Join(cfg.scratch, "disk.img"), filepath.Join(cfg.scratch, "disk.vhd")
	out := filepath.Join(cfg.scratch, "out")
	if err := makeImage(raw, 1, 4*gib, gib); err != nil {
		return err
	}
	vdi, err := srv.createVDI(ctx, 4*gib)
	if err != nil {
		return err
	}
	if err := srv.importFile(ctx, vdi, "raw", raw); err != nil {
		return err
	}
	if err := srv.downloadFile(ctx, srv.exportURL(vdi, "vhd", ""), vhd); err != nil {
		return err
	}
	st, err := os.Stat(vhd)
	if err != nil {
		return err
	}
	lim, err := startLimit()
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, lim.Close()) }()

	if err := srv.resetPeak(); err != nil {
		return err
	}
	err = compare(ctx, cfg, "VHD export of a 4 GiB disk with 1 GiB of data, to a file",
		contestant{"coppice", st.Size(), func(ctx context.Context) error {
			return srv.downloadFile(ctx, srv.exportURL(vdi, "vhd", ""), out)
		}, remove(out)},
		contestant{"limit (HTTP + CRC32C, same client)", st.Size(), func(ctx context.Context) error {
			return srv.downloadFile(ctx, lim.base+vhd, out)
		}, remove(out)},
		contestant{"qemu-img convert raw → vpc", st.Size(), command("qemu-img", "convert", "-f", "raw", "-O", "vpc",
			"-o", "subformat=dynamic,force_size=on", raw, out), remove(out)},
		contestant{"cp of the same file", st.Size(), command("cp", "--sparse=never", "--reflink=never", vhd, out), remove(out)},
	)
	if err != nil {
		return err
	}
	if err := printPeak(srv); err != nil {
		return err
	}

	if err := srv.resetPeak(); err != nil {
		return err
	}
	var target string
	err = compare(ctx, cfg, "VHD import of the same file into an empty disk (ours and the limit are on disk at the end)",
		contestant{"coppice", st.Size(), func(ctx context.Context) (err error) {
			if target, err = srv.createVDI(ctx, 4*gib); err != nil {
				return err
			}
			return srv.importFile(ctx, target, "vhd", vhd)
		}, func() error { return srv.destroyVDI(ctx, target) }},
		contestant{"limit (HTTP + CRC32C + fdatasync)", st.Size(), func(ctx context.Context) error {
			return srv.uploadFile(ctx, lim.base+out, vhd)
		}, remove(out)},
		contestant{"qemu-img convert vpc → raw (no sync)", st.Size(), command("qemu-img", "convert", "-f", "vpc", "-O", "raw", vhd, out), remove(out)},
		contestant{"qemu-img convert vpc → raw (-t writeback)", st.Size(), command("qemu-img", "convert", "-t", "writeback", "-f", "vpc", "-O", "raw", vhd, out), remove(out)},
		contestant{"cp of the same file (no sync)", st.Size(), command("cp", "--sparse=never", "--reflink=never", vhd, out), remove(out)},
	)
	if err != nil {
		return err
	}
	if err := printPeak(srv); err != nil {
		return err
	}
	return errors.Join(srv.destroyVDI(ctx, vdi), os.Remove(raw), os.Remove(vhd))
}

func printPeak(srv *server) error {
	peak, err := srv.peakRSS()
	if err != nil {
		return err
	}
	fmt.Printf("  peak resident memory of the server meanwhile: %d MiB\n", peak)
	return nil
}

// benchDelta exports 64 MiB of changes of a 1 TiB disk.
func benchDelta(ctx context.Context, cfg config, srv *server) error {
	const changed = 64 * mib
	raw := filepath.Join(cfg.scratch, "changed.img")
	if err := makeImage(raw, 2, changed, changed); err != nil {
		return err
	}
	base := filepath.Join(cfg.scratch, "base.img")
	if err := makeImage(base, 3, 2*gib, 2*gib); err != nil {
		return err
	}
	prepare := func(size int64) (vdi, before, after string, err error) {
		if vdi, err = srv.createVDI(ctx, size); err != nil {
			return
		}
		if err = srv.importFile(ctx, vdi, "raw", base); err != nil {
			return
		}
		if before, err = srv.snapshotVDI(ctx, vdi); err != nil {
			return
		}
		if err = srv.importFile(ctx, vdi, "raw", raw); err != nil {
			return
		}
		after, err = srv.snapshotVDI(ctx, vdi)
		return
	}
	export := func(vdi, base string) func(context.Context) error {
		return func(ctx context.Context) error {
			return srv.download(ctx, srv.exportURL(vdi, "vhd", base), io.Discard)
		}
	}
	vdiL, beforeL, afterL, err := prepare(tib)
	if err != nil {
		return err
	}
	vdiS, beforeS, afterS, err := prepare(4 * gib)
	if err != nil {
		return err
	}
	err = compare(ctx, cfg, "Delta export of 64 MiB changed, to a sink",
		contestant{"delta, 1 TiB disk", changed, export(afterL, beforeL), nil},
		contestant{"delta, 4 GiB disk", changed, export(afterS, beforeS), nil},
		contestant{"full export of the 1 TiB disk (2 GiB of data)", 2 * gib, export(afterL, ""), nil},
		contestant{"reading a file of 64 MiB (cat)", changed, command("cat", raw), nil},
	)
	for _, v := range []string{vdiL, beforeL, afterL, vdiS, beforeS, afterS} {
		err = errors.Join(err, srv.destroyVDI(ctx, v))
	}
	return errors.Join(err, os.Remove(raw), os.Remove(base))
}
