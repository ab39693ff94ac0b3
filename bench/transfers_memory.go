package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"
)

// benchMemory finds the resident memory of the server during one transfer and
// during eight at once, with a small full disk and with one of 1 TiB. What one
// takes is what the other seven add.
func benchMemory(ctx context.Context, cfg config, srv *server) error {
	const many, data = 8, 128 * mib
	disks := make([]benchDisk, 2)
	for i, size := range []int64{data, tib} {
		var err error
		if disks[i], err = srv.newDisk(ctx, cfg, bytesText(size), size, data); err != nil {
			return err
		}
		if err := os.Rename(disks[i].raw, disks[i].raw+"."+disks[i].name); err != nil {
			return err
		}
		disks[i].raw += "." + disks[i].name
	}
	fmt.Printf("\nPeak of the server's resident memory during transfers of %s, MiB\n", bytesText(data))
	fmt.Printf("  %-44s %12s %12s %16s\n", "", "one", "eight", "for each more")
	for _, f := range imageFormats {
		for _, d := range disks {
			if f.name == "raw" && d.size != d.data {
				continue // is sent and received with its holes
			}
			image := filepath.Join(cfg.scratch, "disk.image")
			if err := srv.downloadFile(ctx, srv.exportURL(d.vdi, f.name, ""), image, nil); err != nil {
				return err
			}
			out := func(ctx context.Context, _ string) error {
				return srv.drain(ctx, srv.exportURL(d.vdi, f.name, ""), nil)
			}
			in := func(ctx context.Context, vdi string) error { return srv.importFile(ctx, vdi, f.name, image) }
			for _, way := range []struct {
				name     string
				transfer func(ctx context.Context, vdi string) error
			}{{"export", out}, {"import", in}} {
				var peaks [3]int
				for i, n := range []int{1, 1, many} { // the first one lets what was before be collected
					var err error
					if peaks[i], err = peakOf(ctx, srv, d.size, n, way.transfer); err != nil {
						return err
					}
				}
				one, eight := peaks[1], peaks[2]
				fmt.Printf("  %-44s %12d %12d %16.1f\n", f.name+" "+way.name+", disk of "+d.name, one, eight, float64(eight-one)/(many-1))
			}
			if err := os.Remove(image); err != nil {
				return err
			}
		}
	}
	for _, d := range disks {
		if err := srv.dropDisk(ctx, d); err != nil {
			return err
		}
	}
	return nil
}

// peakOf is the largest resident memory of the server during n transfers at
// once, each with an empty disk of its own of size bytes, in MiB.
func peakOf(ctx context.Context, srv *server, size int64, n int, transfer func(ctx context.Context, vdi string) error) (int, error) {
	vdis := make([]string, n)
	for i := range vdis {
		var err error
		if vdis[i], err = srv.createVDI(ctx, size); err != nil {
			return 0, err
		}
	}
	if err := srv.resetPeak(); err != nil {
		return 0, err
	}
	errs := make([]error, n)
	var all sync.WaitGroup
	for i, vdi := range vdis {
		all.Go(func() { errs[i] = transfer(ctx, vdi) })
	}
	all.Wait()
	peak, err := srv.peakRSS()
	errs = append(errs, err)
	for _, vdi := range vdis {
		errs = append(errs, srv.destroyVDI(ctx, vdi))
	}
	return peak, errors.Join(errs...)
}
